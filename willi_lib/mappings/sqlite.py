"""Routes from a table in a SQLite file, which other programs may write or replace at any time.

A look-up blocks its worker, so a query that takes long is ended, and a lock is waited for outside of SQLite. SQLite
sees what others write; what it cannot see is another file under the name, or other octets that were copied into it.

A file in WAL mode needs two more files, which SQLite would create. Without them all of the table is in the file itself
and no program writes: it is read as one that cannot change, and must be the same one afterwards.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import TypeVar

import gevent

from ..config import SqliteSettings
from ..files import Stamp, open_file
from ..net.own_lack import is_own_lack
from ..routing.route import HostFacts, LookupFailed, Route
from .row import WrongColumns, route_of
from .source import NOBODY, Down, NotNow, OwnLack, statement_of

T = TypeVar("T")

QUERY_TIME = 0.1  # seconds in which the worker does nothing else
INSTRUCTIONS = 1000  # of SQLite, between two looks at the clock
LOCK_TIME = 1.0  # seconds that a look-up waits for a program that writes; a commit takes milliseconds
TOO_LONG = f"the query took more than {QUERY_TIME:g} s: is there an index on the pattern?"
NO_SHM = "beside it is a -wal without its -shm: open it once with a program that may write"
NOT_ITS_WAL = "beside it is the -wal of another file: end the program that writes that, and remove -wal and -shm"
# Also when a program that writes in WAL mode has just begun or ended: it makes and removes the -wal and the -shm.
MAY_PASS = ("is locked", "readonly database", "unable to open", NO_SHM, NOT_ITS_WAL)
NO_INDEX = "the query reads all of the table: is there an index on the pattern?"
READS_ALL = re.compile(rb"SCAN (?![(\d]|CONSTANT|SUBQUERY)")  # a table, not what was found in one (sqlite.org/eqp.html)
NO_ROWS = "the table is empty: recipients that no other mapping has get 451"
FEW_ROWS = 10_000  # which take no time without an index, too
COUNTING = 30.0  # seconds that `check` counts rows ...
MOST_ROWS = 1_000_000  # ... and how many; until then a program that writes may have to wait
WAL_MODE = b"\2\2"  # https://www.sqlite.org/fileformat.html, octets 18 and 19
UNCHANGING = "mode=ro&immutable=1"


class _Busy(Down):
    """Another program writes just now, it seems."""


class SqliteFile:
    """One query, asked of one file."""

    def __init__(self, settings: SqliteSettings, mapping: str) -> None:
        """mapping: the name that routes bear. Raises ValueError: a query without `?`."""
        self._policy, self._mapping = settings.policy, mapping
        self._name, self._query = settings.file, settings.query
        self._parameters = statement_of(settings.query)[1]
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[object, ...] = ()  # what the file was then
        self._end = 0.0  # of what SQLite does just now (monotonic)

    def ask(self, key: str) -> Route | None:
        """The route in the first row for this key. Raises Down, OwnLack, LookupFailed."""
        return self._patiently(lambda connection: self._ask(connection, key)[0])

    def inspect_hosts(self) -> tuple[HostFacts, ...]:
        """The file, as it answers just now."""
        try:
            return (HostFacts(self._name, "", text=self._patiently(self._inspect)),)
        except (Down, LookupFailed) as fault:
            return (HostFacts(self._name, "", fault=str(fault).removeprefix(f"{self._name}: ")),)

    def _patiently(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Again for some time, if another program is in the way."""
        give_up, pause = monotonic() + LOCK_TIME, 0.005
        while True:
            try:
                with self._open(QUERY_TIME) as connection:
                    return work(connection)
            except _Busy:
                if monotonic() + pause > give_up:
                    raise
            gevent.sleep(pause)
            pause *= 2

    def _inspect(self, connection: sqlite3.Connection) -> str:
        """Raises LookupFailed: the query is of no use."""
        names = self._ask(connection, NOBODY)[1]
        rows = dict(self._count_rows(connection))
        most = max(rows.values(), default=1)
        if not most:
            raise LookupFailed(NO_ROWS)
        if most > FEW_ROWS and self._reads_all(connection):
            raise LookupFailed(NO_INDEX)
        facts = [f"SQLite {sqlite3.sqlite_version}", f"columns {', '.join(names)}"]
        facts += (f"rows in {table}: {n:,}{' or more' if n == MOST_ROWS else ''}" for table, n in rows.items())
        return ", ".join(facts)

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None

    def _ask(self, connection: sqlite3.Connection, key: str) -> tuple[Route | None, list[str]]:
        """The route in the first row, and the names of the columns. Raises Down, LookupFailed."""
        with closing(connection.execute(self._query, (key,) * self._parameters)) as cursor:
            names = [column[0] for column in cursor.description or ()] or ["none"]  # as ATTACH
            row = cursor.fetchone()
        try:
            return route_of(self._policy, self._mapping, key, names, row), names
        except WrongColumns as why:
            raise NotNow(f"{self._name}: {why}", not_there=True) from None

    def _reads_all(self, connection: sqlite3.Connection) -> bool:
        """Whether SQLite has no index for the query."""
        plan = connection.execute(f"EXPLAIN QUERY PLAN {self._query}", (NOBODY,) * self._parameters)
        return any(READS_ALL.match(detail) for _, _, _, detail in plan.fetchall())

    def _count_rows(self, connection: sqlite3.Connection) -> Iterator[tuple[str, int]]:
        """Of the tables that the query names."""
        self._end = monotonic() + COUNTING
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if (table := name.decode()) in self._query:
                [[rows]] = connection.execute(f'SELECT count(*) FROM (SELECT 1 FROM "{table}" LIMIT {MOST_ROWS})')
                yield table, rows

    @contextmanager
    def _open(self, seconds: float) -> Iterator[sqlite3.Connection]:
        """seconds: for what is done with it, during which this process does nothing else.

        Raises Down, OwnLack, also for what fails in the block.
        """
        try:
            file = os.path.realpath(self._name)  # beside it are the other files of SQLite
            now = _state(file)
            if self._connection is None or self._opened != now:
                self.close()
                mode = _mode(file)
                self._connection = sqlite3.connect(
                    f"{Path(file).as_uri()}?{mode}", uri=True, timeout=0, isolation_level=None
                )
                self._connection.set_progress_handler(lambda: monotonic() > self._end, INSTRUCTIONS)
                self._connection.set_authorizer(_authorize)
                self._connection.text_factory = bytes  # row.py says what is wrong with a text
                self._opened = () if mode == UNCHANGING else now
            self._end = monotonic() + seconds
            yield self._connection
            if not self._opened and _state(file) != now:
                raise _Busy(f"{self._name}: written while it was read")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | MemoryError | sqlite3.Error | sqlite3.Warning):
                raise self._failure(error) from None
            raise

    def _failure(self, error: Exception) -> Down:
        """What it means. sqlite3.Warning: several statements, before Python 3.12."""
        text = getattr(error, "strerror", None) or str(error) or "not enough memory"
        text = f"{self._name}: {TOO_LONG if text == 'interrupted' else text}"
        if is_own_lack(error):
            return OwnLack(text)
        is_passing = any(words in text for words in MAY_PASS)
        return (_Busy if is_passing else NotNow)(text, not_there="is locked" not in text)


def _authorize(action: int, *_: object) -> int:
    """No ATTACH, nor VACUUM INTO, which would create a file that is called as the key, whatever that is."""
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def _state(file: str) -> tuple[object, ...]:
    """Differs if the file has to be opened again: also by another user, who may not read it. Raises OSError."""
    return Stamp.of(Path(file).stat()), _log_of(file)[0], os.geteuid()


def _mode(file: str) -> str:
    """How to open it. It must not be open: that connection would lose its locks here. Raises OSError."""
    with open_file(file) as opened:
        header = opened.read(20)
    number, size = _log_of(file)
    if header[18:] != WAL_MODE:
        if size:  # SQLite would take it for this file's: old rows would stay, and new ones be missing
            raise OSError(errno.ENOENT, NOT_ITS_WAL)
        return "mode=ro"
    if number and Path(f"{file}-shm").exists():  # a program that writes has it open, perhaps
        return "mode=ro"
    if size:
        raise OSError(errno.ENOENT, NO_SHM)
    return UNCHANGING


def _log_of(file: str) -> tuple[int, int]:
    """The inode and the size of what was written in WAL mode."""
    try:
        status = Path(f"{file}-wal").stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_size
