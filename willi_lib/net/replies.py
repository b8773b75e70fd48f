"""Reading the replies of an upstream, whole ones at once, and what can be read of badly framed ones."""

from __future__ import annotations

from ..smtp import reply as replies
from ..smtp.reply import BadReply, Reply, first_reply, parse_reply_line
from .deadline import WireError
from .wire import LineTooLong, Wire

MAX_REPLY_LINE = 4096  # octets with CRLF; RFC 5321 §4.5.3.1.5 asks for 512
REST_OF_VERDICT = 10.0  # seconds for the rest of a verdict that has begun; its code is there, so little is lost


def read_reply(wire: Wire) -> Reply:
    """The peer's next reply, all its lines (RFC 5321 §4.2.1).

    Raises WireError; BadReply for what is no reply, as soon as that is known.
    """
    return _whole_reply(wire) or _read_lines(wire, [])


def read_verdict(wire: Wire) -> tuple[Reply, bool]:
    """The reply to a message, and whether it was in order. If not, nothing further is to be read as a reply.

    The peer has the message already: a code that can be read counts, however badly the text is framed, though
    its end never comes, and though other lines come first, as a warning that was not meant for us.
    Raises WireError, BadReply.
    """
    if whole := _whole_reply(wire):
        return whole, True
    first = not _drop_lines_without_code(wire)
    lines: list[bytes] = []
    try:
        with wire.deadline.limit(REST_OF_VERDICT, "waiting for the rest of a verdict"):
            return _read_lines(wire, lines), first
    except (WireError, BadReply):
        octets = b"\r\n".join([*lines, wire.peek()])
        verdict = replies.salvage(octets)
        if verdict is None:
            raise
        if wire.trace:
            wire.trace("<", octets)
        return verdict, False


def _whole_reply(wire: Wire) -> Reply | None:
    """The next reply if it comes in one piece and in order, as nearly all do; None: look at each line."""
    octets = wire.peek() or wire.receive()
    if len(octets) > MAX_REPLY_LINE or wire.trace or not (first := first_reply(octets)):
        return None
    reply, length = first
    wire.skip(length)
    return reply


def _drop_lines_without_code(wire: Wire) -> bool:
    """Wait for a code, and drop the lines before it; whether there were any. Raises WireError, BadReply."""
    dropped = 0
    while not replies.begins_with_code(wire.peek()):
        line, end, _ = wire.peek().partition(b"\n")
        if len(line) > MAX_REPLY_LINE or dropped > replies.MAX_REPLY_LINES:
            raise BadReply(f"not an SMTP reply: {line[:80]!r}")
        if not end:
            wire.receive()
            continue
        wire.skip(len(line) + 1)
        dropped += 1
        if wire.trace:
            wire.trace("<", line)
    return dropped > 0


def _read_lines(wire: Wire, lines: list[bytes]) -> Reply:
    """One line after the other, each added to `lines`: a reply that is long, strange, or not here yet."""
    texts: list[bytes] = []
    while len(texts) < replies.MAX_REPLY_LINES:
        try:
            line = wire.next_line(MAX_REPLY_LINE)
        except LineTooLong:
            raise BadReply(f"a reply line of more than {MAX_REPLY_LINE} octets") from None
        lines.append(line)
        code, last, text = parse_reply_line(line)
        texts.append(text)
        if last:
            return Reply(code, tuple(texts))
    raise BadReply(f"a reply of more than {replies.MAX_REPLY_LINES} lines")
