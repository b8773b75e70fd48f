"""Routes from a file of lines `pattern;server;tls_verify`.

The first line is that header. Empty lines and lines that begin with `#` are skipped,
blanks around a field too. `tls_verify` may be missing or empty: true. A field may stand
in double quotes as in any CSV file, but not go on in the next line. UTF-8, with or
without a byte order mark.

A pattern that comes again with the same route is no fault, with another one it is:
mail must not depend on the order of lines that somebody has sorted.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, time

from willi_lib.routing import Answer, LookupFailed, Policy, Route, fold_pattern, parse_servers, parse_tls_verify

HEADER = "pattern;server;tls_verify"
MAX_FAULTS = 10  # reported of one file
CALM = 10.0  # seconds a file that is written in place must rest: half of it would have recipients refused
PAUSE_LINES = 2000  # some milliseconds of work

Stamp = tuple[int, int, int, int]  # the inode first


class CsvError(Exception):
    """The file cannot be used; one fault per line of the text."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class CsvFile:
    """A mapping held in memory as a whole. It answers once `load` has succeeded."""

    def __init__(self, name: str, file: str, policy: Policy, pause: Callable[[], None] = lambda: None) -> None:
        """name: for the log, "csv:/path".

        pause: called every few milliseconds of a long `load`; `find` answers meanwhile.
        """
        self.name = name
        self.file = file
        self.loaded_at: float | None = None  # seconds since 1970
        self.fault = ""  # of the last `load`, if the old table had to stay
        self._policy = policy
        self._pause = pause
        self._table: dict[str, Route] | None = None
        self._tried: Stamp | None = None  # the file when `load` last read it
        self._seen: Stamp | None = None  # the file when we last looked
        self._calm_at = 0.0  # monotonic: when it may be read if it stays like this

    def __len__(self) -> int:
        """The number of patterns."""
        return len(self._table or ())

    def routes(self) -> list[Route]:
        """The different routes of the table."""
        return list({id(route): route for route in (self._table or {}).values()}.values())

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        """The answers for exactly these keys. They raise LookupFailed before the first `load`."""
        for key in keys:
            if self._table is None:
                raise LookupFailed("not read yet")
            yield Answer(self._table.get(key))

    def changed(self) -> bool:
        """Whether it is time to `load`; to be asked every few seconds.

        A new file that took this name by a rename is complete, and read if the next look finds it the same.
        One that is written in place may be half of what it will be, and cut at a line end it would look
        perfect: it is read when it has rested for `CALM`. A failed `load` counts as well, so that a bad or
        vanished file is told once, not at every look.
        """
        before, self._seen = self._seen, self._stamp()
        if self._seen != before:
            in_place = before and self._seen and before[0] == self._seen[0]
            self._calm_at = monotonic() + (CALM if in_place else 0.0)
            return False
        return self._seen != self._tried and monotonic() >= self._calm_at

    def load(self) -> None:
        """Read the file; all of it replaces the old table, or, after CsvError, nothing does."""
        try:
            table = self._parse(self._read())
            if self._table and not table:
                raise CsvError(f"{self.file}: no patterns any more; write a new file beside it and rename that")
        except CsvError as error:
            self.fault = error.faults[0]
            raise
        self._table, self.loaded_at, self.fault = table, time(), ""

    def _stamp(self) -> Stamp | None:
        try:
            status = Path(self.file).stat()
        except OSError:
            return None  # `load` will say why
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read(self) -> bytes:
        self._tried = self._seen = self._stamp()
        try:
            with Path(self.file).open("rb") as file:
                before = os.fstat(file.fileno())
                octets = file.read()
                after = os.fstat(file.fileno())
        except OSError as failure:
            raise CsvError(f"{self.file}: {failure.strerror}") from failure
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CsvError(f"{self.file}: written while it was read")
        return octets

    def _parse(self, octets: bytes) -> dict[str, Route]:
        lines = enumerate(io.BytesIO(octets.removeprefix(codecs.BOM_UTF8)), 1)
        self._skip_header(lines)
        builder = _Builder(self.name, self._policy)
        faults: list[str] = []
        for number, line in lines:
            if number % PAUSE_LINES == 0:
                self._pause()
            try:
                builder.add(number, line)
            except ValueError as fault:
                faults.append(f"{self.file}:{number}: {fault}")
            if len(faults) == MAX_FAULTS:
                raise CsvError(*faults, f"{self.file}: not read further after {MAX_FAULTS} faults")
        if faults:
            raise CsvError(*faults)
        return builder.table

    def _skip_header(self, lines: Iterator[tuple[int, bytes]]) -> None:
        """Data in its place would be lost in silence, so it must be there."""
        for number, line in lines:
            try:
                text = _text(line)
                if text and not _is_header(text):
                    raise ValueError(f"must be the header {HEADER}, not {text[:80]!r}")
            except ValueError as fault:
                raise CsvError(f"{self.file}:{number}: {fault}") from None
            if text:
                return
        raise CsvError(f"{self.file}: empty, without even the header {HEADER}")


class _Builder:
    """The table of one file while it is being read."""

    def __init__(self, mapping: str, policy: Policy) -> None:
        self.table: dict[str, Route] = {}
        self._lines = array("I")  # where each key of the table stands, in the table's order
        self._mapping = mapping
        self._policy = policy
        self._routes: dict[str, Route] = {}  # by what follows the pattern
        self._unique: dict[Route, Route] = {}  # equal routes are one object, which saves memory and comparing

    def add(self, number: int, line: bytes) -> None:
        """Take in one line, comments and empty ones too. Raises ValueError."""
        text = _text(line)
        if not text:
            return
        pattern, rest = _split(text)
        key = _fold(pattern, rest)
        route = self._routes.get(rest) or self._new_route(rest)
        known = self.table.get(key)
        if known is None:
            self.table[key] = route
            self._lines.append(number)
        elif known is not route:
            first = self._lines[list(self.table).index(key)]
            raise ValueError(f"{pattern[:80]!r} again, but not with the route of line {first}")

    def _new_route(self, rest: str) -> Route:
        server, verify, *more = [field.strip() for field in rest.split(";")] + [""]
        if not server:
            raise ValueError(f"no server: a line is {HEADER}")
        if any(more):
            raise ValueError(f"more than three fields: a line is {HEADER}")
        tls_verify = parse_tls_verify(verify) if verify else True
        route = Route(parse_servers(server), tls_verify, self._policy, self._mapping)
        self._routes[rest] = self._unique.setdefault(route, route)
        return self._routes[rest]


def _fold(pattern: str, rest: str) -> str:
    """The key that the pattern stands for. Raises ValueError."""
    try:
        return fold_pattern(pattern.strip())
    except ValueError as fault:
        if "," in pattern and not rest:
            raise ValueError(f"{fault}; fields are separated by ;") from None
        raise


def _text(line: bytes) -> str:
    """The text of a line; empty also for a comment. Raises ValueError."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    return "" if text.startswith("#") else text


def _is_header(text: str) -> bool:
    pattern, rest = _split(text.lower())
    names = [name.strip() for name in (pattern, *rest.split(";"))]
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
