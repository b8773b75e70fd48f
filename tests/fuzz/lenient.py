"""The most lenient reader there is, written without a look at body.py: what it sees, some server may see."""

from __future__ import annotations

import re

LINE_ENDS = frozenset(b"\r\n")  # it takes each of them, alone, for the end of a line
SKIPPED = frozenset(range(33)) - LINE_ENDS  # and does not see these at all: NUL, blanks, control characters
NUL = 0
LONE_DOT = re.compile(rb"([\x00-\x09\x0b\x0c\x0e-\x20]*)(\.[\x00-\x09\x0b\x0c\x0e-\x20]*)")
OVERLONG = re.compile(rb"[\x00-\x20.]{1000}")  # in a line that begins so, Willi may double a dot or make spaces of NULs


def early_end(content: bytes) -> int | None:
    """Where this reader takes a line of `content`, which begins at the start of one, for the end of a message.

    At the first NUL of a line too, if that was a lone dot so far: some skip NULs, some see no further than the first.
    """
    dots = others = nuls = 0
    for position, octet in enumerate(content):
        ends = octet in LINE_ENDS
        nuls += octet == NUL
        if dots == 1 and not others and (ends or (octet == NUL and nuls == 1)):
            return position
        if ends:
            dots = others = nuls = 0
        elif octet == ord("."):
            dots += 1
        elif octet not in SKIPPED:
            others += 1
    return None


def strict_end(octets: bytes) -> int | None:
    """Where message content ends for one who knows nothing but RFC 5321: the position behind CRLF . CRLF."""
    found = (b"\r\n" + octets).find(b"\r\n.\r\n")
    return None if found < 0 else found + 3


def content_of(wire: bytes) -> bytes:
    """The content of what followed 354, without its final dot line: RFC 5321 §4.5.2."""
    lines = wire.split(b"\r\n")
    return b"\r\n".join([line[1:] if line.startswith(b".") else line for line in lines])


def with_good_line_ends(content: bytes) -> bytes:
    """What `bare_newline = normalize` promises."""
    without_bare_cr = re.sub(rb"\r(?!\n)", b" ", content)
    return re.sub(rb"(?<!\r)\n", b"\r\n", without_bare_cr)


def as_passed_on(content: bytes) -> bytes:
    """The same, and what becomes of NULs before a lone dot: no spelling of it is safe with all readers."""
    lines = with_good_line_ends(content).split(b"\r\n")
    return b"\r\n".join([_without_nul(line) for line in lines])


def _without_nul(line: bytes) -> bytes:
    lone = LONE_DOT.fullmatch(line)
    return lone[1].replace(b"\0", b" ") + lone[2] if lone else line
