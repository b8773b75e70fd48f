"""The mappings of one worker over time: CSV files that are read at its start and when they change."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

import gevent
from gevent.event import AsyncResult
from gevent.threadpool import ThreadPool

from .. import log
from ..config import MysqlSettings
from ..mappings import csv_file as csv
from ..mappings.csv_file import CsvError, CsvFile, Held
from ..mappings.last_row import LastRow
from ..mappings.mysql import Mysql
from ..mappings.open import MappingError
from ..routing.route import LookupFailed
from ..routing.route import Mapping as AnyMapping
from . import news

ANSWERS_LOST = "Reload while a database is down, remembered answers are lost"
START_LOOK = 0.25  # seconds between looks of a worker that starts

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """How a worker starts."""

    held: Mapping[str, Held] = field(default_factory=dict)  # by file: the tables of the workers that serve
    alone: bool = False  # there were such workers, and none is left
    reload: news.Reload = ""
    last_rows: Mapping[MysqlSettings, LastRow] = field(default_factory=dict)  # shared by all workers


class DatabaseDown(MappingError):
    """An automatic reload would forget the answers that the workers remember. The text is for the log."""


class MappingWatch:
    """Reads and looks; `tell` hears what the other workers should know."""

    def __init__(self, mappings: Sequence[AnyMapping], tell: Callable[[news.Message], None]) -> None:
        self._csv_files = [mapping for mapping in mappings if isinstance(mapping, CsvFile)]
        self._databases = [mapping for mapping in mappings if isinstance(mapping, Mysql)]
        self._tell = tell

    def load(self, start: Start) -> None:
        """Read all CSV files. Raises CsvError, MappingError.

        Beside workers that serve nothing is taken that is worse than what they have: no empty table, none that is
        being written, and none that cannot be read just now. If no such worker is left, we serve without that table
        until it can be read, which means 451.
        """
        for database in self._databases if start.reload else ():
            _ask_before_reload(database, start.reload)
        for csv_file in self._csv_files:
            held = start.held.get(csv_file.file)
            if held:
                csv_file.follow(held)
            try:
                self._load(csv_file, bool(held), 0.0 if held and start.alone else csv.START_PATIENCE)
            except CsvError as error:
                if not (held and start.alone):
                    raise
                self._tell(news.of_fault(csv_file, error))

    def _load(self, csv_file: CsvFile, follows: bool, patience: float) -> None:
        """Wait as long as that for a file that is not ready. Raises CsvError."""
        deadline = monotonic() + patience
        fault = CsvError(f"{csv_file.file}: still being written", passing=True)
        while True:
            try:
                if csv_file.changed() or not (follows or csv_file.fault):
                    csv_file.load()
                    self._tell(news.of_table(csv_file))
                    return
            except CsvError as error:
                if not error.passing:
                    raise
                fault = error
            if monotonic() >= deadline:
                raise fault
            gevent.sleep(START_LOOK)

    def look(self) -> None:
        """To be called every second or two: read a CSV file again when it has changed; a bad one changes nothing."""
        for csv_file in self._csv_files:
            try:
                if csv_file.changed():
                    csv_file.load()
                    self._tell(news.of_table(csv_file))
            except CsvError as error:
                self._tell(news.of_fault(csv_file, error))

    def close(self) -> None:
        """Take leave of the databases."""
        for database in self._databases:
            database.close()


def _ask_before_reload(database: Mysql, reload: news.Reload) -> None:
    """Raises MappingError: new workers would get no answers, and those that serve have some.

    A database that is gone does not stop a reload that an administrator asks for; one that answers that a name, the
    password or the query is wrong does.
    """
    fault = database.fault()
    if fault is None:
        return
    if reload == "automatic":
        raise DatabaseDown(f"{database.name}: {fault}")
    if reload == "asked" and (isinstance(fault, LookupFailed) or fault.not_there):
        raise MappingError(f"{database.name}: {fault}")
    log.warn(ANSWERS_LOST, mapping=database.name, error=str(fault))


class FileThread:
    """Does the work with one file in a thread: if the file's server is dead, that thread hangs, and no session."""

    def __init__(self) -> None:
        self._pool = ThreadPool(1)
        self._last: AsyncResult[Exception | None] | None = None

    def __call__(self, work: Callable[[], T]) -> T:
        """Raises what the work raises, and OSError if it takes too long; at once, as long as an earlier one hangs."""
        results: list[T] = []

        def attempt() -> Exception | None:
            try:
                results.append(work())
            except Exception as error:  # noqa: BLE001 -- raised below; gevent would also print it
                return error
            return None

        if self._last is None or self._last.ready():
            try:
                self._last = self._pool.spawn(attempt)
            except RuntimeError as error:  # the system has no more threads
                raise OSError(errno.EAGAIN, str(error)) from None
            self._last.wait(csv.FILE_TIMEOUT)
            if self._last.ready():
                if failure := self._last.get():
                    raise failure
                return results[0]
        raise TimeoutError(errno.ETIMEDOUT, "its file system does not answer")
