"""A test that hangs fails alone, with all stacks of its process.

Each phase of a test (setup, call, teardown) has LIMIT seconds, and so has the setup of each shared fixture. After that
an exception is raised where the main thread waits. What is still there GRACE later is in C code, or catches everything:
its process is ended, pytest-xdist names the test, and a new process goes on with the next one.

pytest-timeout does not raise where gevent's loop runs, and counts a shared fixture as the test that needs it first.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import TextIO

import pytest

LIMIT = 100.0  # seconds: ten times what a test needs; with GRACE less than two minutes
GRACE = 18.0  # seconds


class Hangs(BaseException):
    """Not an Exception: hypothesis would try the same input again, and a test catches those."""


class Limits:
    """Of this process; `stacks` is where they are written when it is ended."""

    def __init__(self, stacks: TextIO | int, seconds: float = LIMIT, grace: float = GRACE) -> None:
        self.seconds = seconds
        self._stacks = stacks
        self._grace = grace
        self._deadlines: list[tuple[float, type[BaseException]]] = []  # of what has begun, the innermost last
        signal.signal(signal.SIGALRM, self._raise)

    @contextmanager
    def limit(self, error: type[BaseException] = Hangs) -> Iterator[None]:
        """The block may take `seconds`. Its time does not count for what is around it."""
        began = monotonic()
        self._deadlines.append((began + self.seconds, error))
        self._arm()
        try:
            yield
        finally:
            self._deadlines.pop()
            spent = monotonic() - began
            self._deadlines = [(deadline + spent, kind) for deadline, kind in self._deadlines]
            self._arm()

    def allow(self, seconds: float) -> None:
        """What runs now may take so long from now on."""
        if self._deadlines:
            deadline, error = self._deadlines.pop()
            self._deadlines.append((max(deadline, monotonic() + seconds), error))
            self._arm()

    def stop(self) -> None:
        self._deadlines.clear()
        self._arm()

    def _arm(self) -> None:
        if not self._deadlines:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            return
        left = max(0.001, self._deadlines[-1][0] - monotonic())
        signal.setitimer(signal.ITIMER_REAL, left)
        faulthandler.dump_traceback_later(left + self._grace, exit=True, file=self._stacks)

    def _raise(self, _number: int, frame: FrameType | None) -> None:
        error = self._deadlines[-1][1] if self._deadlines else Hangs
        hangs = error(f"it hangs. All stacks:\n{_all_stacks(frame)}")
        greenlet = sys.modules.get("greenlet")
        waiting = greenlet.getcurrent() if greenlet else None
        while waiting is not None and waiting.parent is not None:
            waiting = waiting.parent
        if waiting is not None and waiting is not greenlet.getcurrent():  # type: ignore[union-attr]
            waiting.throw(hangs)  # gevent's loop, or another greenlet, runs; the test waits here
        else:
            raise hangs


def _all_stacks(frame: FrameType | None) -> str:
    """Of the main thread, of the others, and of greenlets."""
    parts = ["".join(traceback.format_stack(frame))]
    frames = sys._current_frames()
    parts += [f"Thread {number}:\n{''.join(traceback.format_stack(at))}" for number, at in frames.items()]
    if "gevent" in sys.modules:
        from gevent import util

        parts += util.format_run_info()  # type: ignore[func-returns-value, arg-type]
    return "\n".join(parts)


_current: Limits | None = None


def allow(seconds: float) -> None:
    """For what is known to take long: the running test or fixture may take so long from now on."""
    if _current:
        _current.allow(seconds)


def start(stacks: TextIO | int, seconds: float, grace: float) -> Limits:
    """For the hooks in plugin.py."""
    global _current
    _current = Limits(stacks, seconds, grace)
    return _current


SHARED_ERROR = pytest.fail.Exception  # pytest keeps it, and all tests of the fixture fail at once
