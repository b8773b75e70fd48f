"""What is asked of the pure modules: each check takes octets from a stranger and raises AssertionError at a fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TypeVar

from tests.fuzz.lenient import OVERLONG, as_passed_on, content_of, early_end, strict_end, with_good_line_ends
from tests.support.daemon import parse_logfmt
from willi_lib import log
from willi_lib.smtp import proxy_header, syntax, xclient
from willi_lib.smtp.body import MAX_HELD, DataReader, Stuffer
from willi_lib.smtp.proxy_header import MAX_V1_LINE, MAX_V2_BLOCK, BadHeader, Endpoints
from willi_lib.smtp.reply import MAX_REPLY_LINES, BadReply, Rejected, Reply, first_reply, parse_reply_line

T = TypeVar("T")
EXTENSIONS = frozenset(("SMTPUTF8", "8BITMIME"))
FEATURES = {"SIZE": "", "8BITMIME": "", "SMTPUTF8": ""}
END = b"\r\n.\r\n"


# syntax.py


def check_syntax(line: bytes) -> None:
    """A line that ends in a command for the upstream, or in the log, brings nothing along."""
    split = _unless_refused(lambda: syntax.split_command(line))
    argument = split[1] if split else line
    for extensions in (EXTENSIONS, frozenset[str]()):
        mail = _unless_refused(lambda extensions=extensions: syntax.parse_mail(argument, extensions))  # type: ignore[misc]
        if split and mail:
            _check_mail(mail, extensions)
    for smtputf8 in (True, False):
        path = _unless_refused(lambda smtputf8=smtputf8: syntax.parse_rcpt(argument, smtputf8))  # type: ignore[misc]
        if split and path:
            _check_line(b"RCPT TO:" + path.octets, path.address)
            assert syntax.parse_rcpt(b"TO:" + path.octets, smtputf8) == path
    helo = _unless_refused(lambda: syntax.parse_helo(argument))
    if helo is not None:
        _check_line(b"EHLO " + helo.encode("ascii"), helo)
        _check_xclient([("PROTO", "ESMTP"), ("HELO", helo), ("PORT", "1"), ("ADDR", "192.0.2.1")])
    chunk = _unless_refused(lambda: syntax.parse_bdat(argument))
    assert chunk is None or 0 <= chunk[0] < 10**20
    if told := _unless_refused(lambda: xclient.parse(argument)):
        address, port, name = told
        assert not address or str(ip_address(address)) == address, address
        assert 0 <= port <= 65535
        assert name is None or (name.isascii() and name.isprintable() and name), name
        _check_xclient([("NAME", name or "[UNAVAILABLE]"), ("PORT", str(port)), ("ADDR", address or "[UNAVAILABLE]")])
    assert all(name == name.upper() for name in Reply(250, tuple(line.split(b"\n"))).features)


def _unless_refused(parse: Callable[[], T]) -> T | None:
    try:
        return parse()
    except Rejected:
        return None


def _check_mail(mail: syntax.Mail, extensions: frozenset[str]) -> None:
    line = mail.line(FEATURES)
    _check_line(line, mail.path.address)
    assert syntax.parse_mail(line.removeprefix(b"MAIL "), extensions) == mail
    assert mail.line({}).startswith(b"MAIL FROM:" + mail.path.octets)


def _check_line(line: bytes, text: str) -> None:
    """As a command, and in the log."""
    assert not any(octet < 0x20 or octet == 0x7F for octet in line), line
    assert len(line.decode("utf-8").splitlines()) == 1, line
    check_log_value(text)


def check_log_value(text: str) -> None:
    """It stays one field of one line, and says what it is."""
    line = f"msg=x to={log.quote(text)} lvl=info"
    assert line.isprintable(), line
    assert parse_logfmt(line) == {"msg": "x", "to": _shortened(text), "lvl": "info"}


def _shortened(text: str) -> str:
    return text if len(text) <= log.MAX_VALUE else text[: log.MAX_VALUE] + "..."


def _check_xclient(attributes: list[tuple[str, str]]) -> None:
    told: list[tuple[str, str]] = []
    for line in xclient.lines(attributes):
        assert len(line) + 2 <= 512, line
        verb, *words = line.split(b" ")
        assert verb == b"XCLIENT" and words, line
        for word in words:
            name, _, value = word.partition(b"=")
            told.append((name.decode("ascii"), _from_xtext(value)))
    assert told == [(name, value) for name, value in attributes if len(xclient.xtext(value)) <= 255]


def _from_xtext(octets: bytes) -> str:
    """RFC 3461 §4, the slow way."""
    out, position = bytearray(), 0
    while position < len(octets):
        octet = octets[position]
        assert 0x21 <= octet <= 0x7E and octet != ord("="), octets
        if octet == ord("+"):
            out.append(int(octets[position + 1 : position + 3], 16))
            position += 2
        else:
            out.append(octet)
        position += 1
    return out.decode("utf-8")


# reply.py


def check_reply(octets: bytes) -> None:
    """The quick way and the slow way agree; a reply passes on as itself and is one line in the log."""
    slowly = _read_slowly(octets)
    quickly = first_reply(octets)
    if quickly is None:
        return
    assert quickly == slowly
    reply, length = quickly
    assert length <= len(octets) and 200 <= reply.code <= 599
    assert first_reply(reply.octets) == (reply, len(reply.octets))
    assert reply.octets.count(b"\n") == reply.octets.count(b"\r") == len(reply.lines)
    assert reply.positive + reply.permanent <= 1
    check_log_value(str(reply))


def _read_slowly(octets: bytes) -> tuple[Reply, int] | None:
    texts: list[bytes] = []
    position = 0
    while (end := octets.find(b"\r\n", position)) >= 0 and len(texts) < MAX_REPLY_LINES:
        try:
            code, last, text = parse_reply_line(octets[position:end])
        except BadReply:
            return None
        texts.append(text)
        position = end + 2
        if last:
            return Reply(code, tuple(texts)), position
    return None


# proxy_header.py


def check_proxy_header(octets: bytes) -> None:
    """However a header arrives, its end and its meaning are the same, and none is waited for without a limit."""
    results = [_parse_header(octets[:length]) for length in range(len(octets) + 1)]
    decided = [result for result in results if result is not None]
    assert all(result == decided[0] for result in decided) or not isinstance(decided[0], tuple), octets
    undecided = results.count(None)
    assert results[:undecided] == [None] * undecided, "who has decided does not become unsure"
    assert undecided <= (MAX_V1_LINE if octets.startswith(b"PROXY ") else 16 + MAX_V2_BLOCK), octets
    if decided and isinstance(decided[0], tuple):
        endpoints, length = decided[0]
        assert length == undecided, "its last octet decides"
        if endpoints:
            _check_endpoints(endpoints)


def _parse_header(octets: bytes) -> tuple[Endpoints | None, int] | bool | None:
    """False: it is none."""
    try:
        return proxy_header.parse(octets)
    except BadHeader:
        return False


def _check_endpoints(endpoints: Endpoints) -> None:
    assert 0 <= endpoints.source_port <= 65535 and 0 <= endpoints.destination_port <= 65535
    for build in (proxy_header.build_v1, proxy_header.build_v2):
        header = build(endpoints)
        assert proxy_header.parse(header + b"EHLO x\r\n") == (endpoints, len(header)), header


# body.py


def check_body(octets: bytes, cuts: Sequence[int] = ()) -> None:
    """What a client says after DATA, with its end added, and as content of BDAT."""
    chunks = cut(octets + END + octets, cuts)
    for reject in (False, True):
        _check_data(chunks, reject)
        _check_stuffer(cut(octets, cuts), reject)


def cut(octets: bytes, cuts: Sequence[int]) -> list[bytes]:
    """In pieces: each cut is so many octets behind the one before."""
    pieces = []
    for length in cuts:
        pieces.append(octets[:length])
        octets = octets[length:]
    return [*pieces, octets]


def _check_data(chunks: Sequence[bytes], reject: bool) -> None:
    reader, out, left = DataReader(reject), b"", list(chunks)
    while not reader.done and left:
        out += reader.feed(left.pop(0))
    wire = b"".join(chunks)
    end = strict_end(wire)
    assert end is not None and reader.done, "what ends it has come"
    assert reader.rest + b"".join(left) == wire[end:]
    content = content_of(wire[: end - 3])
    wanted = with_good_line_ends(content)
    assert early_end(out) is None, out
    assert reader.malformed == (wanted != content)
    if reject and reader.malformed:
        return
    assert strict_end(out + b".\r\n") == len(out) + 3, out
    if not OVERLONG.search(wire):
        assert content_of(out) == as_passed_on(content), out
        assert reader.octets == len(wanted)


def _check_stuffer(chunks: Sequence[bytes], reject: bool) -> None:
    stuffer = Stuffer(reject)
    out = b""
    for chunk in chunks:
        out += stuffer.feed(chunk)
        assert len(stuffer._lines.held) <= MAX_HELD
    out += stuffer.finish()
    content = b"".join(chunks)
    wanted = with_good_line_ends(content)
    assert early_end(out) is None, out
    assert stuffer.malformed == (wanted != content)
    if reject and stuffer.malformed:
        return
    wanted = as_passed_on(content)
    if wanted and not wanted.endswith(b"\r\n"):
        wanted += b"\r\n"
    assert strict_end(out + b".\r\n") == len(out) + 3, out
    if not OVERLONG.search(content):
        assert content_of(out) == wanted, out
