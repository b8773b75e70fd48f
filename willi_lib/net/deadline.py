"""The time limits of one greenlet: each covers a whole step, however many reads and writes it takes."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Any

from gevent import get_hub, getcurrent

FOREVER = float("inf")
STOOD_STILL = 0.5  # seconds that a timer comes too late: we did not run, and what came meanwhile is to be read first
AFTER_READING = -1  # libev's priority of our timers: reads are 0


class WireError(Exception):
    """The connection is of no further use."""


class TimeLimit(WireError):
    """A step took longer than it may."""


class Deadline:
    """The time limits of one greenlet, on one loop timer that is re-armed only for a nearer deadline."""

    __slots__ = ("_fires", "_greenlet", "_limit", "_timer", "waited_at")

    def __init__(self) -> None:
        self._greenlet = getcurrent()
        self._timer: Any = None  # gevent's stubs have no public name for a loop's timer and io
        self._fires = FOREVER
        self._limit: Limit | None = None  # the one in force
        self.waited_at = monotonic()  # when the greenlet last waited for a peer, or gave way to others

    def limit(self, seconds: float, doing: str) -> Limit:
        """Context: raise TimeLimit in this greenlet if the block takes longer. An outer limit stays in force."""
        return Limit(self, monotonic() + seconds, doing)

    def until(self, deadline: float, doing: str) -> Limit:
        """The same with a point in time, as of time.monotonic()."""
        return Limit(self, deadline, doing)

    def interrupt(self, error: Exception, unless: Callable[[], bool]) -> None:
        """Raise in the greenlet from outside, unless it has meanwhile come to do something else."""
        get_hub().loop.run_callback(lambda: None if unless() else self._greenlet.throw(error))

    def overdue(self) -> bool:
        """Whether the limit in force has passed."""
        return self._limit is not None and monotonic() >= self._limit.at

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
            self._fires = FOREVER

    def _arm(self, deadline: float, again: bool = False) -> None:
        self.close()
        self._fires = deadline
        self._timer = get_hub().loop.timer(max(0.0, deadline - monotonic()), priority=AFTER_READING)
        self._timer.start(self._on_timer, again, update=True)

    def _on_timer(self, again: bool) -> None:
        """Strike, if it is time. again: the loop has looked for what has come since the first time."""
        now = monotonic()
        late = now - self._fires
        self.close()
        limit = self._limit
        if limit is None or limit.at == FOREVER:
            return
        if now < limit.at:
            self._arm(limit.at)
        elif late > STOOD_STILL and not again:
            self._arm(now, again=True)
        else:
            self._greenlet.throw(TimeLimit(f"timed out {limit.doing}"))


class Limit:
    """One block under a time limit. A class, since a generator costs four times as much."""

    __slots__ = ("_deadline", "_outer", "at", "doing")

    def __init__(self, deadline: Deadline, at: float, doing: str) -> None:
        self._deadline = deadline
        self.at = at
        self.doing = doing

    def __enter__(self) -> None:
        deadline = self._deadline
        outer = self._outer = deadline._limit
        if outer is None or self.at < outer.at:
            deadline._limit = self
            if self.at < deadline._fires:
                deadline._arm(self.at)
        elif deadline._timer is None:  # the limit in force has struck already, and strikes again at the next wait
            deadline._arm(outer.at)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = self._deadline
        outer = deadline._limit = self._outer
        if outer and deadline._timer is None and outer.at < FOREVER:  # ours has struck: the outer one still counts
            deadline._arm(outer.at)
