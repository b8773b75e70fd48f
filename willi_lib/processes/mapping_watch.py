"""The mappings of one worker over time: CSV files that are read at its start and when they change."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.event import AsyncResult
from gevent.threadpool import ThreadPool
from gevent.util import wrap_errors

from .. import log
from ..mappings import csv_file
from ..routing.route import Mapping, MappingError
from .child import CannotStart
from .generation import Reload, Start
from .news import Message, of_fault, of_table

ANSWERS_LOST = "Reload while a database is down, remembered answers are lost"
START_LOOK = 0.25  # seconds between looks of a worker that starts


def load(mappings: Sequence[Mapping], start: Start, tell: Callable[[Message], None]) -> None:
    """Read all files. Raises MappingError, CannotStart.

    Beside workers that serve nothing is taken that is worse than what they have: no empty table, none that is being
    written, and none that cannot be read just now. If no such worker is left, we serve without that table until it can
    be read, which means 451.
    """
    for mapping in mappings:
        if not mapping.files():
            _load_at_once(mapping, start.reload, max(one.facts().remembers for one in mappings))
            continue
        may_be_missing = start.alone and mapping.name in start.held
        try:
            _load(mapping, 0.0 if may_be_missing else csv_file.START_PATIENCE)
            tell(of_table(mapping))
        except MappingError as error:
            if not may_be_missing:
                raise
            tell(of_fault(mapping, error))


def _load(mapping: Mapping, patience: float) -> None:
    """Wait as long as that for a file that is not ready. Raises MappingError."""
    deadline = monotonic() + patience
    fault = MappingError(f"{mapping.files()[0]}: still being written", passing=True)
    while True:
        try:
            if mapping.load():
                return
        except MappingError as error:
            if not error.passing:
                raise
            fault = error
        if monotonic() >= deadline:
            raise fault
        gevent.sleep(START_LOOK)


def _load_at_once(mapping: Mapping, reload: Reload, remembered: float) -> None:
    """If a database has no answers in a reload, new workers have none; those that serve have some.

    One that is gone does not stop a reload that an administrator asks for; one that answers that a name, the password
    or the query is wrong does.
    Raises MappingError, CannotStart.
    """
    try:
        mapping.load(reload=bool(reload))
    except MappingError as fault:
        if reload == "automatic":
            raise CannotStart(str(fault), remembered=remembered) from None
        if not reload or (reload == "asked" and not fault.passing):
            raise
        log.warn(ANSWERS_LOST, mapping=mapping.name, error=str(fault).removeprefix(f"{mapping.name}: "))


def look(mappings: Sequence[Mapping], tell: Callable[[Message], None]) -> None:
    """To be called every second or two: read what has changed; a bad file changes nothing."""
    for mapping in mappings:
        try:
            if mapping.files() and mapping.load():
                tell(of_table(mapping))
        except MappingError as error:
            tell(of_fault(mapping, error))


class FileThread:
    """Does the work with one file in a thread: if the file's server is dead, that thread hangs, and no session."""

    def __init__(self) -> None:
        self._pool = ThreadPool(1)
        self._last: AsyncResult[Any] | None = None

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Raises what the work raises, and OSError if it takes too long; at once, as long as an earlier one hangs."""
        if self._last is None or self._last.ready():
            try:
                self._last = self._pool.spawn(wrap_errors((Exception,), work))  # gevent would print what it raises
            except RuntimeError as error:  # the system has no more threads
                raise OSError(errno.EAGAIN, str(error)) from None
            self._last.wait(csv_file.FILE_TIMEOUT)
            if self._last.ready():
                result = self._last.get()
                if isinstance(result, Exception):
                    raise result
                return result
        raise TimeoutError(errno.ETIMEDOUT, "its file system does not answer")
