"""The targets of the fuzzer: for each how an input is made, out of what is nasty, and its check.

An input is decided by octets, its genes: the runner draws them at random, hypothesis draws them and shrinks them,
and the same ones always make the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tests.fuzz import dialogue, parsers, upstreams
from tests.fuzz.dialogue import Script

SEEDS = Path(__file__).parent / "seeds"
MOST_GENES = 48

T = TypeVar("T")


class Genes:
    """Octets that decide. When there are no more, it is always the first that is picked."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._at = 0

    def next(self) -> int:
        """0 to 255."""
        self._at += 1
        return self._octets[self._at - 1] if self._at <= len(self._octets) else 0

    def pick(self, options: Sequence[T]) -> T:
        return options[self.next() % len(options)]

    def pick_some(self, options: Sequence[T]) -> tuple[T, ...]:
        """Any of them, or none, in their order."""
        wanted = self.next()
        return tuple(option for number, option in enumerate(options) if wanted >> number & 1)


@dataclass(frozen=True)
class Target:
    """What is fuzzed. `seeds`: inputs that are always tried, and of which others are made."""

    name: str
    make: Callable[[Genes], Any]
    check: Callable[[Any], object]
    seeds: tuple[Any, ...]


def read_seeds(name: str) -> tuple[Any, ...]:
    """Octets as they lie there; scripts of sessions as JSON."""
    paths = sorted((SEEDS / name).iterdir())
    return tuple(Script.from_json(p.read_text("utf-8")) if name == "session" else p.read_bytes() for p in paths)


def octets_of(genes: Genes, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Tokens in any order, or a seed in which some places are replaced by tokens."""
    if genes.next() % 3 == 0:
        return b"".join(genes.pick(tokens) for _ in range(genes.next() % 20))
    made = genes.pick(seeds)
    for _ in range(1 + genes.next() % 3):
        at, length = genes.next() % (len(made) + 1), genes.pick((0, 0, 1, 2, 5))
        made = made[:at] + genes.pick(tokens) + made[at + length :]
    return made


def tokens(*words: bytes) -> tuple[bytes, ...]:
    """These, and single octets now and then."""
    octets = tuple(bytes([number]) for number in range(0, 256, 7))
    return (words * 8)[: 256 - len(octets)] + octets


SYNTAX = tokens(
    b"MAIL FROM:", b"RCPT TO:", b"EHLO ", b"BDAT ", b"XCLIENT ", b"<", b">", b"@", b'"', b"\\", b"a", b"ann@a.example",
    b"b.example", b"[192.0.2.1]", b"[IPv6:2001:db8::1]", b"<@x.example,@y.example:", b" ", b" SIZE=", b"1", b"99999",
    b" BODY=8BITMIME", b" BODY=7BIT", b" SMTPUTF8", b" LAST", b"=", b"+", b"+0A", b"+2B", b"ADDR=", b"NAME=", b"PORT=",
    b"IPV6:::1", b"[UNAVAILABLE]", b"postmaster", b"%", b"\r", b"\n", b"\0", b"\x7f", b"\xc3\xbc", b"\xe2\x80\xa8",
    b"\xc2\x85", b"\xe2\x80\x8d", b"\t", b"\xff", b"\xed\xa0\x80", b"x" * 260, b".", b",", b":",
)  # fmt: skip
BODY = tokens(
    b"\r\n", b"\r\n", b"\r", b"\n", b".", b".", b"\r\n.", b"\r\n..", b"\r\n.\r\n", b"\n.\n", b"\n.\r\n", b"\r\n.\n",
    b"\r.\r", b"\r\r\n", b".\r\r\n", b" ", b"\t", b"\0", b"\x0b", b"\x0c", b"\x1a", b"\x1f", b"a", b"ab c", b"\xff",
    b"\x85", b"\xa0", b" " * 998, b"\0" * 1001, b".\0a", b"MAIL FROM:<eve@a.example>\r\n",
)  # fmt: skip
CUTS = (*range(12), 998, 1000, 1001, 2003)  # what is held back ends at 1,000
REPLY = tokens(
    b"250 ", b"250-", b"250", b"220 ", b"354 ", b"421 4.3.2 ", b"550 5.1.1 ", b"199 ", b"600 ", b"\r\n", b"\r\n", b"\n",
    b"\r", b"-", b" ", b"SIZE 1000", b"PIPELINING", b"\0", b"\x1b[31m", b"\xc3\xbc", b"\xff", b'"', b"\\", b"=",
    b"250-x\r\n" * 120, b"y" * 1100,
)  # fmt: skip
PROXY = tokens(
    b"PROXY ", b"TCP4 ", b"TCP6 ", b"UNKNOWN", b"192.0.2.1 ", b"2001:db8::1 ", b"::ffff:192.0.2.1 ", b"25 ", b"65535",
    b"65536", b"0", b" ", b"\r\n", b"\r", b"\n", b"\r\n\r\n\0\r\nQUIT\n", b"\x21", b"\x20", b"\x11", b"\x21\x00",
    b"\x00\x0c", b"\x00\x24", b"\x01", b"\x03\x00\x04", b"\xff", b"fe80::1%eth0 ", b"x" * 100,
)  # fmt: skip

# The session

LINES = (
    b"EHLO c.example\r\n", b"HELO c.example\r\n", b"ehlo C.example \r\n", b"MAIL FROM:<ann@a.example>\r\n",
    b"MAIL FROM:<> SIZE=100\r\n", b"MAIL FROM:<ann@a.example> BODY=8BITMIME SMTPUTF8\r\n",
    b"MAIL FROM:<ann@a.example> SIZE=9999999999\r\n", b"RCPT TO:<bob@b.example>\r\n", b"RCPT TO:<ben@b.example>\r\n",
    b"RCPT TO:<no@b.example>\r\n", b"RCPT TO:<later@b.example>\r\n", b"RCPT TO:<carl@c.example>\r\n",
    b"RCPT TO:<x@broken.example>\r\n", b"RCPT TO:<x@nowhere.example>\r\n", b"RCPT TO:<Postmaster>\r\n", b"DATA\r\n",
    b"DATA\r\n", b"RSET\r\n", b"NOOP\r\n", b"VRFY x\r\n", b"QUIT\r\n", b"HELP\r\n", b"AUTH PLAIN\r\n", b"STARTTLS\r\n",
    b"GET / HTTP/1.0\r\n", b"XCLIENT ADDR=192.0.2.9 NAME=x.example\r\n", b"x" * 2047 + b"\r\n", b"\r\n",
    dialogue.HANDSHAKE,
    b"\tMAIL\t \tFROM:\t<\tann@a.example >\tSIZE=5 \r\n", b" rcpt  TO: \t< bob@b.example\t> \t\r\n",
    b"DATA\t\r\n", b"RSET \t\r\n",
    b"RCPT TO:<\xe0\xa4\xb6\xe2\x80\x8db@b.example>\r\n", b"RCPT TO:<\xe2\x80\xaeb@b.example>\r\n",
    b"RCPT TO:<\"a b>,<\"@b.example>\r\n", b"RCPT TO:<b\xc3\xbc@b.example>\r\n", b"NOOP a\nb\r\n", b"BDAT x\r\n",
)  # fmt: skip
CONTENT = (
    b"hello\r\n", b".\r\n", b".\r\n", b"\r\n.\r\n", b"..\r\n", b"a\r\n.\n", b"\n.\n", b"\n.\r\n", b"\r.\r", b"\r.\r\n",
    b" .\r\n", b". \r\n", b"\0.\r\n", b".\0\r\n", b"\r\n", b"\r", b"\n", b".", b"x" * 1200 + b"\r\n", b"\xff\0\r\n",
    b"\r\n.\nMAIL FROM:<eve@a.example>\r\nRCPT TO:<bob@b.example>\r\nDATA\r\nsmuggled\r\n.\r\n",
)  # fmt: skip
CHUNKS = (
    b"\tBDAT\t5 \tLAST\t\r\nhello", b"BDAT 6" + b" " * 2048 + b"\r\nRSET\r\n", b" " * 3000 + b"BDAT 6\r\nRSET\r\n",
    b"BDAT 5 LAST\r\nhi", b"BDAT 99999999999999999999 LAST\r\n", b"bdat 3 last \r\na.b",
    *(b"BDAT %d\r\n%b" % (len(octets), octets) for octets in (b"", b"hello\r\n", *CONTENT[1:8], CONTENT[-1])),
    *(b"BDAT %d LAST\r\n%b" % (len(octets), octets) for octets in (b"", b"hello\r\n", *CONTENT[1:8], CONTENT[-1])),
)  # fmt: skip
BEGIN = (b"EHLO c.example\r\n", b"MAIL FROM:<ann@a.example>\r\n", b"RCPT TO:<bob@b.example>\r\n")
START, ENVELOPE = b"".join(BEGIN), b"".join(BEGIN[1:])
BLOCKS = (
    START, START, START + b"DATA\r\n", ENVELOPE, ENVELOPE + b"DATA\r\n",
    ENVELOPE + b"RCPT TO:<no@b.example>\r\nDATA\r\n",
    ENVELOPE.replace(b"bob@b", b"carl@c") + b"DATA\r\nhello\r\n.\r\n", ENVELOPE + b"DATA\r\nhello\r\n.\r\n",
    ENVELOPE + b"BDAT 5 LAST\r\nhello", ENVELOPE.replace(b"ann@", b"eve@") + b"BDAT 5 LAST\r\nhello",
)  # fmt: skip
OTHER_REPLIES = (
    "250 2.0.0 ok\r\n", "250-a\r\n250 b\r\n", "421 4.3.2 bye\r\n", "450 4.2.0 later\r\n", "550 5.1.1 no\r\n",
    "354 go\r\n", "220 hello\r\n", "221 bye\r\n", "552 5.3.4 big\r\n", "554 5.5.0 \x1b[31m\"\xff\r\n",
    "502 5.5.1 what\r\n", "250\r\n", "250 willi.example\r\n", "250-x\r\n550 y\r\n", "250 a\r\n250 b\r\n",
    "250 a\r\n354 b\r\n", "250 half", "25", "hello\r\n", "\r\n", "250 a\n", "199 a\r\n",
    "250-a\r\n" * 199 + "250 a\r\n", "250-a\r\n" * 220, "y" * 5000,
    "250-x\r\n250 XCLIENT NAME ADDR PORT PROTO HELO\r\n", "250-x\r\n250-STARTTLS\r\n250 PIPELINING\r\n",
)  # fmt: skip
FEATURES = ("PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "CHUNKING", "XCLIENT NAME ADDR PORT PROTO HELO", "STARTTLS")
ANSWERS = (
    (upstreams.USUAL,) * 100 + OTHER_REPLIES
    + (upstreams.CLOSE, upstreams.RESET, upstreams.REFUSE, upstreams.CLOSE, upstreams.REFUSE, upstreams.SILENT)
)  # fmt: skip
PIECES = LINES + CONTENT * 2 + CHUNKS + BLOCKS * 4
IN_TLS = (b"EHLO c.example\r\n", b"STARTTLS\r\n", dialogue.HANDSHAKE)
INJECTING = (b"EHLO c.example\r\n", b"STARTTLS\r\n" + START.replace(b"ann@", b"eve@"), dialogue.HANDSHAKE)
OPENINGS: tuple[tuple[bytes, ...], ...] = (
    (START,), (START + b"DATA\r\n",), BEGIN, (), (START,), BEGIN, (*IN_TLS, START), (*INJECTING, START)
)  # fmt: skip
PACES = (dialogue.IN_TURN, dialogue.AT_ONCE, dialogue.AT_ONCE, dialogue.TOGETHER, dialogue.IN_TURN, dialogue.OCTETS)
ENDS = (dialogue.FINISH,) * 50 + (dialogue.HANG_UP,) * 6 + (dialogue.DRAIN, dialogue.STOP) * 2 + (dialogue.STAY,)
ENOUGH = ("PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "CHUNKING")


def script_of(genes: Genes, seeds: Sequence[Script]) -> Script:
    """A dialogue that gets somewhere, mostly, with something wrong in it."""
    base = Script(genes.pick(OPENINGS))
    if genes.next() % 3 == 0:
        seed = genes.pick(seeds)
        at = genes.next() % (len(seed.client) + 1)
        base = replace(seed, client=(*seed.client[:at], genes.pick(PIECES), *seed.client[at + genes.next() % 3 :]))
    client = (*base.client, *[genes.pick(PIECES) for _ in range(genes.next() % 9)])
    upstream = base.upstream
    if genes.next() % 2:
        upstream = tuple(genes.pick(ANSWERS) for _ in range(genes.next() % 14))
    features = ENOUGH if genes.next() % 2 else genes.pick_some(FEATURES)
    variant = genes.pick((base.variant, base.variant, "usual", *dialogue.VARIANTS))
    pace, end, debug, slow = genes.pick(PACES), genes.pick(ENDS), genes.next() % 4 == 3, genes.next() % 3 == 2
    return Script(client, pace, end, upstream, features, variant, debug, slow)


def body_of(genes: Genes, seeds: Sequence[bytes]) -> tuple[bytes, tuple[int, ...]]:
    """A message, and the lengths of the pieces in which it comes."""
    cuts = tuple(genes.pick(CUTS) for _ in range(genes.next() % 8))
    return octets_of(genes, seeds, BODY), cuts


def targets() -> dict[str, Target]:
    """All that there are, by name."""
    kept = {name: read_seeds(name) for name in ("syntax", "body", "reply", "proxy_protocol", "session")}
    messages = tuple((seed, cuts) for seed in kept["body"] for cuts in ((), (1,) * len(seed), (3, 2, 5)))

    def octets(name: str, words: Sequence[bytes], check: Callable[[bytes], object]) -> Target:
        return Target(name, lambda genes: octets_of(genes, kept[name], words), check, kept[name])

    found = [
        octets("syntax", SYNTAX, parsers.check_syntax),
        Target("body", lambda genes: body_of(genes, kept["body"]), lambda given: parsers.check_body(*given), messages),
        octets("reply", REPLY, parsers.check_reply),
        octets("proxy_protocol", PROXY, parsers.check_proxy_header),
        Target("session", lambda genes: script_of(genes, kept["session"]), dialogue.check_session, kept["session"]),
    ]
    return {target.name: target for target in found}
