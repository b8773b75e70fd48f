"""Message octets: the end of DATA, line ends, dot-stuffing (RFC 5321 §4.1.1.4, §4.5.2).

What leaves here for an upstream keeps three rules:

1. The only line end is CRLF. A bare LF has become CRLF, a bare CR a space.
2. A receiver that keeps to the RFC decodes exactly what it would have decoded from the
   sender's octets, apart from those line ends.
3. Before the session's own `END_OF_DATA`, no receiver takes a line for the end, however
   lenient it is. Dangerous is the "lone dot": a line of one dot and, around it, octets that
   one reader or another skips, such as `. SP`, `SP .`, `NUL .`; and a dot with a NUL behind
   it, whatever follows, since there are readers for which the NUL ends the line (OpenSMTPD).
   The content of a line has two spellings, with and without a stuffing dot before it, and one
   of them is harmless: `SP` for `. SP`; `. SP .`, with its two dots, for `SP .`; `NUL a` for
   `. NUL a`. Only `NUL .` has none, since one reader skips the NUL of the one and another one
   ends at the NUL of the other: there NUL becomes a space, an exception to rule 2.

Whoever edits this file: octets that are in order must pass at memory speed, so nothing
loops over their lines; and each regular expression starts with an octet to jump to or is
tried at one place only, and crosses a line at most twice.
"""

from __future__ import annotations

import re
from enum import Enum, auto

from .syntax import CR, DOT, LF, NUL

END_OF_DATA = b".\r\n"

MAX_HELD = 1000  # octets held back while a line may still become a lone dot; a text line's limit, RFC 5321 §4.5.3.1.6

# Octets that some reader skips at the ends of a line: NUL, and what isspace() or Java's trim() call blank.
_SKIPPED = rb"\x00-\x09\x0b\x0c\x0e-\x20"

_BLANK = rb"\x01-\x09\x0b\x0c\x0e-\x20"

# Lines that a lone dot is among, found in three quarters of the time: in nearly all data there is none.
_ONLY_DOTS_AND_SKIPPED = re.compile(rb"\n[.%b]+\r\n" % _SKIPPED)

# A lone dot, with or without a stuffing dot.
_LONE_DOT = re.compile(rb"\n\.?[%b]*\.[%b]*\r\n" % (_SKIPPED, _SKIPPED))
_LONE_DOT_FIRST = re.compile(rb"(\.?[%b]*\.[%b]*)\r\n" % (_SKIPPED, _SKIPPED))
_LONE_DOT_SO_FAR = re.compile(rb"\.?[\r%b]*(?:\.[\r%b]*)?\Z" % (_SKIPPED, _SKIPPED))  # CR: a space to be, or the CRLF

# Lone dots that are spelled otherwise, by constants but for NULs before the dot: a client may send nothing but such
# lines, all others wait meanwhile, and a call of a function for each line takes ten times as long.
_SKIPPED_BEHIND_DOT = re.compile(rb"\n\.(?=[%b]*\r\n)" % _SKIPPED)
_SKIPPED_BEFORE_DOT = re.compile(rb"\n(?=[%b]+\.[%b]*\r\n)" % (_SKIPPED, _SKIPPED))
_NUL_BEFORE_DOT = re.compile(rb"\n\.[%b]*\x00[%b]*(?=\.[%b]*\r\n)" % (_BLANK, _SKIPPED, _SKIPPED))
_LONE_BEFORE_NUL = re.compile(rb"[%b]*\.(?=[%b]*\x00)" % (_BLANK, _BLANK))
_DOT_BEFORE_NUL = re.compile(rb"\n\.(?=[%b]*\x00)" % _BLANK)
_BLANKS_DOT_BEFORE_NUL = re.compile(rb"\n(?=[%b]+\.[%b]*\x00)" % (_BLANK, _BLANK))


class DataReader:
    """DATA: dot-stuffed octets of the client, a chunk in, the octets for the upstream out.

    done: CRLF . CRLF was seen; nothing more may be fed.
    rest: what followed it in the last chunk: the client's next commands.
    octets: size of the message so far as RFC 1870 §3 counts it: without stuffing dots and the
        final dot line, line ends repaired. The few octets held back are not in it yet.
    """

    def __init__(self, reject_bare_newline: bool = False) -> None:
        """reject_bare_newline: once `malformed`, nothing comes out any more; the end is still found."""
        self.done = False
        self.rest = b""
        self.octets = 0
        self._reject = reject_bare_newline
        self._lines = _Lines(_Place.LINE)

    @property
    def malformed(self) -> bool:
        """A bare CR or LF was seen."""
        return self._lines.malformed

    def feed(self, chunk: bytes) -> bytes:
        """Return octets for the upstream: still dot-stuffed, without the final dot line; may be empty."""
        lines = self._lines
        data = lines.held + chunk
        dots = DOT in data  # base64 has none, and needs no more than this look
        may_be = dots and _ONLY_DOTS_AND_SKIPPED.search(data)
        first = _LONE_DOT.search(data, may_be.start()) if may_be else None  # the end is one, too; mostly the only one
        lone_dots = first is not None
        end = self._end(data, lone_dots)
        if end is not None:
            self.done = True
            self.rest = data[end + len(END_OF_DATA) :]
            data = data[:end]
            lone_dots = first is not None and first.start() + 1 < end
        stuffing_dot_may_be_first = lines.place in (_Place.LINE, _Place.CONTENT)
        out = lines.take(data, lone_dots)
        stuffed = out.count(b"\r\n.") if dots else 0
        self.octets += len(out) - stuffed - (stuffing_dot_may_be_first and out.startswith(b"."))
        return b"" if self._reject and self.malformed else out

    def _end(self, data: bytes, lone_dots: bool) -> int | None:
        """Where in data the final dot line begins."""
        if self._lines.place is _Place.LINE and data.startswith(END_OF_DATA):
            return 0
        crlf = data.find(b"\r\n" + END_OF_DATA) if lone_dots else -1
        return None if crlf < 0 else crlf + 2


class Stuffer:
    """BDAT to DATA: the content of chunks in, dot-stuffed octets out (RFC 3030 §2 to RFC 5321 §4.5.2)."""

    def __init__(self, reject_bare_newline: bool = False) -> None:
        """reject_bare_newline: once `malformed`, nothing comes out any more."""
        self._reject = reject_bare_newline
        self._lines = _Lines(_Place.CONTENT)

    @property
    def malformed(self) -> bool:
        """A bare CR or LF was seen."""
        return self._lines.malformed

    def feed(self, chunk: bytes) -> bytes:
        """Return octets for the upstream; may be empty."""
        out = self._lines.take(self._lines.held + chunk)
        return b"" if self._reject and self.malformed else out

    def finish(self) -> bytes:
        """Return what was held back, and a last CRLF if the content lacks one. `END_OF_DATA` comes after it."""
        complete = self._lines.place is _Place.CONTENT and not self._lines.held
        return b"" if complete else self.feed(b"\r\n")


class _Place(Enum):
    """Where the next octet, the first one held back included, stands."""

    LINE = auto()  # first of a line that its sender has stuffed: a dot is a stuffing dot, or the end
    CONTENT = auto()  # first of a line that is not stuffed: of a BDAT chunk, or after a bare LF
    BLANKS = auto()  # after MAX_HELD skipped octets or more, which are gone unstuffed, and nothing else
    INSIDE = auto()  # anywhere else: the line is no lone dot


class _Lines:
    """The three rules, for octets with stuffing dots (after_crlf = LINE) or without (CONTENT)."""

    def __init__(self, after_crlf: _Place) -> None:
        self.malformed = False
        self.held = b""
        self.place = after_crlf
        self._after_crlf = after_crlf

    def take(self, data: bytes, lone_dots: bool = True) -> bytes:
        """Return what can be decided of data, which begins with the octets held so far; hold the others.

        lone_dots: False if the caller knows that _LONE_DOT is not in data.
        """
        decided = self._decided(data)
        if len(data) - decided > MAX_HELD:
            return self._take_overlong(data)
        self.held = data[decided:]
        data = data[:decided]
        out = self._clean(data, lone_dots)
        if data.endswith(b"\r\n"):
            self.place = self._after_crlf
        elif data.endswith(b"\n"):
            self.place = _Place.CONTENT
        elif data:
            self.place = _Place.INSIDE
        return out

    def _decided(self, data: bytes) -> int:
        """How many octets can go: up to a last line that may become a lone dot, and not a last CR."""
        line = data.rfind(b"\n") + 1
        if (line or self.place is not _Place.INSIDE) and _LONE_DOT_SO_FAR.match(data, line):
            return line
        return len(data) - data.endswith(b"\r")

    def _take_overlong(self, data: bytes) -> bytes:
        """Decide about a last line that is only skipped octets, and at most one dot, but too long to be held.

        Both spellings may turn out wrong if there is no dot yet. So it goes as it is, and should a
        dot come, and again nothing but skipped octets, or a NUL, that dot is doubled: an exception
        to rule 2, for a line that no mail program writes. If there is a dot, NULs before it become
        spaces, whatever follows. Rule 3 has no exception.
        """
        end = len(data) - data.endswith(b"\r")
        self.held = data[end:]
        out = self._clean(data[:end] + b"\r\n", lone_dots=True)[:-2]
        self.place = _Place.INSIDE if b"." in out[out.rfind(b"\n") + 1 :] else _Place.BLANKS
        return out

    def _clean(self, data: bytes, lone_dots: bool) -> bytes:
        """Apply the rules to data from self.place on. Its lines are complete, but for a last one without danger."""
        if self._after_crlf is _Place.CONTENT:
            data = data.replace(b"\r\n.", b"\r\n..")
        if self.place is _Place.CONTENT and data.startswith(b"."):
            data = b"." + data
        without_crlf = data.replace(b"\r\n", b"  ")  # as long as before, so that it need not count them first
        if CR in without_crlf or LF in without_crlf:
            self.malformed = True
            data = _repair_line_ends(data)
            lone_dots = True
        first = _LONE_DOT_FIRST.match(data) if self.place is not _Place.INSIDE else None
        if first:
            data = _respelled(first[1], stuffed=self.place is _Place.LINE) + data[first.end(1) :]
        if lone_dots:
            data = _SKIPPED_BEFORE_DOT.sub(b"\n.", _SKIPPED_BEHIND_DOT.sub(b"\n", data))
            data = _NUL_BEFORE_DOT.sub(lambda line: line[0].replace(b"\0", b" "), data)
        return self._mind_nul(data) if NUL in data else data

    def _mind_nul(self, data: bytes) -> bytes:
        """Apply rule 3 for readers to which a line ends at a NUL."""
        if self.place is _Place.INSIDE:
            return _respelled_before_nul(data)
        if self.place is _Place.BLANKS and _LONE_BEFORE_NUL.match(data):
            data = b"." + data  # what a stuffing dot would change has gone already
        return _respelled_before_nul(b"\n" + data)[1:]


def _repair_line_ends(data: bytes) -> bytes:
    """Make a bare LF CRLF and a bare CR a space, and stuff the lines that begin after a bare LF."""
    data = data.replace(b"\n.", b"\n..").replace(b"\r\n..", b"\r\n.")
    return data.replace(b"\r\n", b"\n").replace(b"\r", b" ").replace(b"\n", b"\r\n")


def _respelled(line: bytes, stuffed: bool) -> bytes:
    """A lone dot with its stuffing dot taken away, or put before it and no NUL between them.

    stuffed: a dot at the beginning is a stuffing dot.
    """
    if stuffed and line.startswith(b"."):
        line = line[1:]
        if b"." not in line:
            return line
    elif line.count(b".") > 1:
        return line
    before, _, after = line.partition(b".")
    return b".%b.%b" % (before.replace(b"\0", b" "), after)


def _respelled_before_nul(data: bytes) -> bytes:
    """The same for lines that are a lone dot up to a NUL: their content stays."""
    return _BLANKS_DOT_BEFORE_NUL.sub(b"\n.", _DOT_BEFORE_NUL.sub(b"\n", data))
