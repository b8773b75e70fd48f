"""What a client has said and heard, read with the eyes of RFC 5321 and nothing of Willi's: an oracle."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.fuzz.lenient import content_of, strict_end

CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
BLANKS = b" \t"
BDAT = re.compile(rb"[ \t]*BDAT[ \t]+(\d{1,20})(|[ \t]+LAST)[ \t]*", re.IGNORECASE)
MAX_LINE = 2048  # octets with CRLF
REPLY_LINE = re.compile(rb"([2-5][0-9]{2})([ -])([^\r\n]*)\r\n")
LAST_WORDS = (b"421", b"221")
NOT_OFFERED = b"502 5.5.1 Command not implemented\r\n"  # to BDAT: as if it had not been said
LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"  # the last word to what may have been BDAT
PATH = re.compile(rb"<[ \t]*(.*?)[ \t]*>(?!.*>)")
GIVES_UP = (b"500 5.5.2 Bare CR or LF in a command\r\n", b"501 5.5.4 Syntax: BDAT size [LAST]\r\n")


def split_replies(octets: bytes) -> list[bytes]:
    """Each reply with all its lines. Raises AssertionError if there is anything else."""
    replies, lines, position = [], b"", 0
    while position < len(octets):
        line = REPLY_LINE.match(octets, position)
        assert line, f"not a reply: {octets[position:][:200]!r}"
        assert not lines or lines[:3] == line[1], f"two codes in one reply: {octets!r}"
        lines += line[0]
        position = line.end()
        if line[2] == b" ":
            replies.append(lines)
            lines = b""
    assert not lines, f"half a reply: {lines!r}"
    return replies


@dataclass(frozen=True)
class Sent:
    """A message that the client has brought to its end, and the verdict."""

    content: bytes
    verdict: bytes
    chunked: bool
    envelope: tuple[bytes, ...] = ()


@dataclass
class Story:
    """All that happened, in order.

    unheard: commands that have no answer, as they came after the last one that has, up to the first DATA or BDAT.
    open: what the client said last has no answer, and was complete.
    """

    commands: list[bytes] = field(default_factory=list)
    messages: list[Sent] = field(default_factory=list)
    unheard: list[bytes] = field(default_factory=list)
    open: bytes = b""

    def then(self, later: Story) -> Story:
        """This one and what came after it."""
        return Story(self.commands + later.commands, self.messages + later.messages, later.unheard, later.open)


class Reader:
    """Puts commands and replies side by side."""

    def __init__(self, said: bytes, heard: bytes, greeted: bool = False) -> None:
        self._greeted = greeted
        self._said = said
        self._replies = split_replies(heard)
        self._story = Story()
        self._chunks: list[bytes] = []
        self._poisoned = False  # a chunk of this message was refused
        self._envelope: tuple[bytes, ...] = ()  # the sender, then the recipients that were accepted

    def read(self) -> Story:
        if not self._greeted and self._next() is None:  # no greeting: it was gone too soon
            return self._story
        while self._command():
            pass
        for line in self._said.split(b"\r\n")[:-1]:
            self._story.unheard.append(line)
            if line.lstrip(BLANKS)[:4].upper() in (b"DATA", b"BDAT"):
                break
        return self._story

    def _next(self) -> bytes | None:
        """The next reply; None: there is none. After a last word there may be no other."""
        if not self._replies:
            return None
        reply = self._replies.pop(0)
        assert not reply.startswith(b"421") or not self._replies, f"after 421: {self._replies}"
        return reply

    def _command(self) -> bool:
        """Whether there may be one more."""
        line, crlf, rest = self._said.partition(b"\r\n")
        reply = self._next()
        if reply is None:
            chunk = _chunk_of(line)
            whole = chunk is None or len(rest) >= chunk[0]
            self._story.open = line if crlf and whole else b""
            return False
        if reply.startswith(b"421") or reply in GIVES_UP:
            assert not self._replies, f"after {reply!r}: {self._replies}"
            chunk = _chunk_of(line)
            if crlf and chunk and len(rest) >= chunk[0]:  # the upstream's last word may be a verdict
                self._said = rest
                self._chunk(*chunk, reply)
            return False
        assert crlf, f"{reply!r} to nothing: {line!r}"
        self._said = rest
        self._story.commands.append(line)
        return self._draw_conclusions(line, reply)

    def _draw_conclusions(self, line: bytes, reply: bytes) -> bool:
        verb = (line.split() or [b""])[0].upper()
        chunk = _chunk_of(line)
        if reply == LINE_TOO_LONG and not self._replies:  # then the octets behind it are no commands
            self._said = b""
        if chunk:
            return self._chunk(*chunk, reply)
        assert not reply.startswith(b"3") or (verb == b"DATA" and reply.startswith(b"354")), (line, reply)
        if reply.startswith(b"354"):
            return self._content()
        if verb in (b"EHLO", b"HELO", b"RSET", b"MAIL") and reply.startswith(b"2"):
            self._chunks, self._poisoned, self._envelope = [], False, ()
        if verb in (b"MAIL", b"RCPT") and reply.startswith(b"2"):
            self._envelope += path_of(line)
        ends = (verb == b"QUIT" and reply.startswith(b"221")) or (verb == b"STARTTLS" and reply.startswith(b"220"))
        assert not ends or not self._replies
        if verb == b"STARTTLS" and ends:
            self._said = b""  # what came along with it is as if it had never been said
        return not ends

    def _chunk(self, size: int, last: bool, reply: bytes) -> bool:
        if len(self._said) < size:
            assert reply.startswith((b"4", b"5")), f"{reply!r} to half a chunk"
            return False
        self._chunks.append(self._said[:size])
        self._said = self._said[size:]
        accepted = reply.startswith(b"2")
        self._poisoned = self._poisoned or not accepted
        if last:
            assert accepted != self._poisoned, f"{reply!r} to a message of which a part was refused"
            self._story.messages.append(Sent(b"".join(self._chunks), reply, True, self._envelope))
            self._chunks, self._poisoned = [], False
            self._envelope = self._envelope if reply == NOT_OFFERED else ()
        return True

    def _content(self) -> bool:
        end = strict_end(self._said)
        verdict = self._next()
        if end is None:
            assert verdict is None or verdict.startswith(b"4"), f"{verdict!r} to half a message"
            return False
        if verdict is None:
            self._story.open = b"(message)"
            return False
        self._story.messages.append(Sent(content_of(self._said[: end - 3]), verdict, False, self._envelope))
        self._said, self._envelope = self._said[end:], ()
        return not verdict.startswith(b"421")


def path_of(line: bytes) -> tuple[bytes, ...]:
    """What stands between the brackets of MAIL or RCPT, brackets included; empty: there are none."""
    found = PATH.search(line)
    return (b"<%b>" % found[1],) if found else ()


def _chunk_of(line: bytes) -> tuple[int, bool] | None:
    """The size that a BDAT command names, and whether it is the last; None: it is no such command."""
    in_order = not CONTROL.search(line) and len(line) + 2 <= MAX_LINE
    chunk = BDAT.fullmatch(line) if in_order else None
    return (int(chunk[1]), bool(chunk[2])) if chunk else None
