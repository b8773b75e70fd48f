"""Routes from a file of lines `pattern;server;tls_verify`; the first line is that header.

Empty lines and lines that begin with `#` are skipped, blanks around a field and empty fields at the end too.
`tls_verify` may be missing or empty: true. A field may stand in double quotes as in any CSV file, but not go on in the
next line. UTF-8, with or without a byte order mark.

A pattern that comes again with the same route is no fault, with another one it is: mail must not depend on the order of
lines that may be sorted.
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from pathlib import Path
from time import monotonic, time

from ..config import CsvSettings
from ..files import CALM, FileWatch, Stamp, open_file
from ..routing.keys import fold_pattern
from ..routing.route import (
    Answer,
    HeldTable,
    LookupFailed,
    MappingError,
    MappingFacts,
    Origin,
    Policy,
    Route,
    parse_servers,
    parse_tls_verify,
)
from .surroundings import Surroundings

HEADER = "pattern;server;tls_verify"
MAX_OCTETS = 256 << 20  # of one file, six million lines: each worker needs two to four times as much memory for it
TOO_LARGE = f"has more than {MAX_OCTETS >> 20} MiB, which is too much for the memory of every worker; use type = sqlite"
MAX_LINE = 1_000_000  # octets; a file of something else may be one line, of which several copies would be made
MAX_FAULTS = 10  # reported of one file
RETRY = 10.0  # seconds until a file that could not be read is tried again
FILE_TIMEOUT = 30.0  # seconds for the work with a file that may hang; a large one from a slow server takes some
START_PATIENCE = 30.0  # seconds in which a file must be ready for a worker that starts, if it may wait
PAUSE_LINES = 2000  # some milliseconds of work
NO_PATTERNS = "no patterns any more; write a new file beside it and rename that, or take the mapping out of willi.conf"
CUT_OFF = "has fewer patterns than before and no line end at its end: perhaps a part is missing; else add the line end"
# Before the first table, these are mistakes in willi.conf; later, and all others, they may be over the next time.
MISTAKES = frozenset((
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESPIPE, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG,
))  # fmt: skip


class CsvFile:
    """A mapping held in memory as a whole. It answers once `load` has succeeded."""

    def __init__(self, settings: CsvSettings, around: Surroundings) -> None:
        """If other workers hold its table, it begins under their rules: a file that has changed must have rested."""
        self.name = f"csv:{settings.file}"
        self._settings = settings
        self._file = settings.file
        self._pause = around.pause  # called every few milliseconds of a long `read`; `find` answers meanwhile
        self._aside = around.aside()
        self._new_table = partial(_Table, self.name, settings.policy, around.subdomains)
        self._table = self._new_table()
        self._loaded_at: float | None = None  # seconds since 1970
        self._fault = ""  # of the last `read`, if the old table had to stay
        self._held = around.held.get(self.name)  # the last whole table, ours or that of other workers
        self._unsure_until = 0.0  # monotonic: the first table may be half a file that is just being written
        self._unsure = False
        self._watch = FileWatch(0.0, RETRY, lambda path: self._aside(Path(path).stat))
        if self._held:
            self._watch.seen[settings.file] = Stamp(*self._held.version)

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        if self._loaded_at is None:
            raise LookupFailed(self._fault or "not read yet", logged=True)
        routes = self._table.routes
        origin: Origin = "unsure" if self._unsure else ""
        for key in keys:
            route = routes.get(key)
            if route is None and routes and self._unsure and key == keys[-1]:
                raise LookupFailed("its file is being written", logged=True)
            yield Answer(route, origin)

    def files(self) -> Sequence[str]:
        return (self._file,)

    def facts(self, thorough: bool = False) -> MappingFacts:
        routes, patterns = self._table.unique.keys(), len(self._table.routes)
        return MappingFacts(routes, False, patterns, self._held, self._loaded_at, self._fault)

    def close(self) -> None:
        pass

    def patterns(self) -> Set[str]:
        return self._table.routes.keys()

    def load(self, reload: bool = False) -> bool:
        """Read the file if it is the first time, or if `changed` says so."""
        is_due = self.changed() or not (self._held or self._fault)
        if is_due:
            self.read()
        return is_due

    def changed(self) -> bool:
        """Whether it is time to read the file; to be asked every second or two.

        What is wrong with a file is told once, not at every look; what could not be read is tried again.
        """
        is_due = self._watch.look((self._file,))
        self._unsure = self._unsure or (self._watch.is_being_written and monotonic() < self._unsure_until)
        return is_due

    def read(self) -> None:
        """Read the file that `changed` saw; all of it replaces the old table, or, after MappingError, nothing does."""
        is_first = self._held is None
        self._watch.failed()  # unless the following succeeds
        try:
            octets = self._octets()
            table = self._new_table()
            table.read(self._file, octets, self._pause)
            version = self._watch.seen[self._file] or ()
            self._held = self._compared(HeldTable(version, len(table.routes), octets.endswith(b"\n")))
        except MemoryError:
            self._fault = f"{self._file}: not enough memory to read it"
            raise MappingError(self._fault, passing=True) from None
        except MappingError as error:
            self._fault = error.faults[0]
            self._watch.failed(retry=error.passing)
            raise
        self._table = table
        self._watch.were_read()
        self._loaded_at, self._fault = time(), ""
        self._unsure, self._unsure_until = not table.routes, monotonic() + CALM if is_first else 0.0

    def _compared(self, new: HeldTable) -> HeldTable:
        """Raises MappingError: it is worse than the one that is held."""
        held = self._held or HeldTable((), 0, ends_a_line=False)
        if held.patterns and not new.patterns:
            raise MappingError(f"{self._file}: {NO_PATTERNS}")
        if new.patterns < held.patterns and held.ends_a_line and not new.ends_a_line:
            raise MappingError(f"{self._file}: {CUT_OFF}")
        return new

    def _octets(self) -> bytes:
        """All of the file. Raises MappingError."""
        octets: bytes
        try:
            stamp, octets, after = self._aside(self._read_whole)
        except OSError as failure:
            where = self._settings.where
            subject = f"{where}: file: cannot read {self._file}" if where else self._file
            passing, missing = self._held is not None or failure.errno not in MISTAKES, failure.errno == errno.ENOENT
            raise MappingError(f"{subject}: {failure.strerror}", passing=passing, missing=missing) from None
        seen = self._watch.seen[self._file] = self._watch.seen.get(self._file) or stamp
        if stamp != seen or (stamp.size, stamp.written) != (after.size, after.written):  # not of a later rename
            raise MappingError(f"{self._file}: written while it was read", passing=True)
        return octets

    def _read_whole(self) -> tuple[Stamp, bytes, Stamp]:
        """With the stamps before and after. Raises OSError, MappingError."""
        with open_file(self._file) as file:
            before = Stamp.of(os.fstat(file.fileno()))
            if before.size > MAX_OCTETS:
                raise MappingError(f"{self._file}: {TOO_LARGE}")
            octets = file.read(before.size + 1)  # so much is allocated; if the file grows, its stamp shows that
            return before, octets, Stamp.of(os.fstat(file.fileno()))


class _Table:
    """The patterns of one file."""

    def __init__(self, mapping: str, policy: Policy, subdomains: bool) -> None:
        self.routes: dict[str, Route] = {}  # by key
        self.unique: dict[Route, Route] = {}  # equal routes are one object, which saves memory and comparing
        self._lines = array("I")  # where each key stands, in the order of `routes`
        self._by_text: dict[str, Route] = {}  # by what follows the pattern
        self._mapping = mapping
        self._policy = policy
        self._subdomains = subdomains

    def read(self, file: str, octets: bytes, pause: Callable[[], None]) -> None:
        """Raises MappingError. The header must be there: a pattern in its place would be lost without a word."""
        has_header = False
        is_cut_off = not octets.endswith(b"\n")  # and nothing is wrong before its last line
        faults: list[str] = []
        for number, line in enumerate(io.BytesIO(octets.removeprefix(codecs.BOM_UTF8)), 1):
            if number % PAUSE_LINES == 0:
                pause()
            try:
                text = _text(line)
                if has_header and text:
                    self._add(number, text)
                elif text and not _is_header(text):
                    raise ValueError(f"must be the header {HEADER}, not {text[:80]!r}")
                has_header = has_header or bool(text)
            except ValueError as fault:
                is_cut_off = not faults and not line.endswith(b"\n") and len(line) <= MAX_LINE
                faults.append(f"{file}:{number}: {fault}")
                if not has_header:
                    break
                if len(faults) == MAX_FAULTS:
                    faults.append(f"{file}: not read further after {MAX_FAULTS} faults")
                    break
        if not has_header and not faults:
            faults = [f"{file}: empty, without even the header {HEADER}"]
        if faults:
            raise MappingError(*faults, missing=is_cut_off)

    def _add(self, number: int, text: str) -> None:
        """Raises ValueError."""
        pattern, rest = _split(text)
        if pattern.startswith("#") and not rest.strip("; "):  # a comment in one cell, quoted for its semicolon
            return
        key = _fold(pattern, rest, self._subdomains)
        route = self._by_text.get(rest) or self._new_route(rest)
        known = self.routes.get(key)
        if known is None:
            self.routes[key] = route
            self._lines.append(number)
        elif known is not route:
            first = self._lines[list(self.routes).index(key)]
            raise ValueError(f"{pattern[:80]!r} again, but not with the route of line {first}")

    def _new_route(self, rest: str) -> Route:
        server, verify, *more = [field.strip() for field in rest.split(";")] + [""]
        if not server:
            raise ValueError(f"no server: a line is {HEADER}")
        if any(more):
            raise ValueError(f"more than three fields: a line is {HEADER}")
        tls_verify = parse_tls_verify(verify) if verify else True
        route = Route(parse_servers(server), tls_verify, self._policy, self._mapping)
        self._by_text[rest] = self.unique.setdefault(route, route)
        return self._by_text[rest]


def _fold(pattern: str, rest: str, subdomains: bool) -> str:
    """The key that the pattern stands for. Raises ValueError."""
    try:
        return fold_pattern(pattern.strip(), subdomains)
    except ValueError as fault:
        if "," in pattern and not rest:
            raise ValueError(f"{fault}; fields are separated by ;") from None
        raise


_BLANK_ROW = re.compile(r'(?:""|[;\s])*')


def _text(line: bytes) -> str:
    """The text of a line; empty also for a comment, and for a blank row of a spreadsheet. Raises ValueError."""
    if len(line) > MAX_LINE:
        raise ValueError(f"more than {MAX_LINE:,} octets in a line: is this another file?")
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        is_utf16 = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise ValueError("not UTF-8" + (", but UTF-16: save the file as `CSV UTF-8`" if is_utf16 else "")) from None
    if "\r" in text:  # what follows would be lost in a comment
        raise ValueError("has a carriage return that ends no line: save the file with the line ends of Unix or Windows")
    return "" if text.startswith("#") or (text[:1] in ';"' and _BLANK_ROW.fullmatch(text)) else text


def _is_header(text: str) -> bool:
    pattern, rest = _split(text.lower())
    names = [name.strip() for name in (pattern, *rest.rstrip("; ").split(";"))]
    return names in (["pattern", "server", "tls_verify"], ["pattern", "server"])


def _split(text: str) -> tuple[str, str]:
    """The pattern and what follows it."""
    if '"' in text:
        try:
            pattern, *rest = next(csv.reader([text], delimiter=";", skipinitialspace=True, strict=True))
            return pattern, ";".join(rest)
        except csv.Error:
            pass  # the quotes are part of the pattern, as in "a b"@b.example
    pattern, _, following = text.partition(";")
    return pattern, following
