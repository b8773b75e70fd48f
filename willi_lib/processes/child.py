"""A process that the master has forked, as the master sees it: a worker, or the status process.

Each packet of a child is a message, a JSON object: {"ready": true} when it could serve, {"failed": ...} if it never
will, {"leaving": true} if another process has told it to end, {"mapping": ...} for `news.py`. The master answers
"ready" by GO. The row of a child shows that it is alive, and the end of the socket tells it that the master is dead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from time import monotonic

from .generation import Generation
from .scoreboard import Row

GO = b"go"
MAX_PACKET = 200_000  # octets; as much as the kernel lets through
MAX_PACKETS = 100  # that are read in one go
START_TIMEOUT = 300.0  # seconds for a worker to read its tables and certificates
HANG_TIMEOUT = 60.0  # seconds without a sign of life
DRAIN_MARGIN = 15.0  # seconds after drain_timeout, in which a worker says goodbye
KILL_TIMEOUT = 5.0  # seconds for the kernel to end a process that is killed; one that waits for a dead disk may stay
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before a child is replaced that soon died; doubled each time
LONG_LIFE = 60.0  # seconds; a child that dies later is replaced at once


class CannotStart(Exception):
    """Workers of this file cannot start; the text has a line for each fault."""

    def __init__(self, faults: str, may_pass: bool = False, remembered: float | None = None) -> None:
        """may_pass: it is no mistake in the file, and another start may succeed.

        remembered: a database is down, of which workers that serve know answers for so many seconds.
        """
        super().__init__(faults)
        self.may_pass = may_pass
        self.remembered = remembered


@dataclass(frozen=True)
class Role:
    """What a child is called, by ps and in the log."""

    name: str
    ended: str
    hangs: str
    drains_too_long: str
    cannot_start: str


WORKER = Role(
    "willi-worker", "Worker ended by itself", "Worker hangs, it is killed", "Worker drains too long, it is killed",
    "Cannot replace a worker",
)  # fmt: skip
STATUS = Role(
    "willi-status", "Status process ended by itself", "Status process hangs, it is killed",
    "Status process does not end, it is killed", "Cannot start the status process",
)  # fmt: skip


class State(Enum):
    STARTING = auto()
    READY = auto()  # and has not been told to go
    SERVING = auto()
    DRAINING = auto()
    KILLED = auto()


class Child:
    """A process and its socket."""

    def __init__(self, role: Role, generation: Generation, row: Row, become: Callable[[socket.socket], None]) -> None:
        """Forks. become: what the new process does, with its end of the socket; it must not return.

        Raises OSError: no process or descriptor is left.
        """
        self.role = role
        self.generation = generation
        self.row = row
        self.state = State.STARTING
        self.failure: CannotStart | None = None
        self._said_leaving = False
        self.since = self.started = monotonic()  # of its state, of the process
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                self.channel.close()
                become(theirs)
        self.channel.setblocking(False)
        row.give()

    def listen(self) -> None:
        with suppress(BlockingIOError, ConnectionError):  # nothing more for now; its end is for waitpid to tell
            for _ in range(MAX_PACKETS):
                packet = self.channel.recv(MAX_PACKET)
                if not packet:
                    return
                message = json.loads(packet)
                if "mapping" in message:
                    self.generation.news.take(message, self.pid)
                elif "failed" in message:
                    self.failure = CannotStart(**message["failed"])
                elif "leaving" in message:
                    self._said_leaving = True
                elif self.state is State.STARTING:
                    self._turn(State.READY)

    @property
    def is_leaving(self) -> bool:
        """Whether another process than the master has told it to end."""
        return self._said_leaving and self.state is State.SERVING

    @property
    def is_ending(self) -> bool:
        return self.state in (State.DRAINING, State.KILLED)

    @property
    def is_lost(self) -> bool:
        """Whether the kernel does not end it."""
        return self.state is State.KILLED and monotonic() - self.since > KILL_TIMEOUT

    def go(self) -> None:
        """Let it take clients."""
        self._turn(State.SERVING)
        with suppress(OSError):  # it has died just now: waitpid will tell
            self.channel.send(GO)

    def end(self) -> None:
        """Let it finish what it has begun; kill it if it has not begun to serve."""
        if self.state is State.SERVING:
            self._turn(State.DRAINING)
            os.kill(self.pid, signal.SIGTERM)
        elif not self.is_ending:
            self.kill()

    def kill(self) -> None:
        if self.state is not State.KILLED:
            self._turn(State.KILLED)
        os.kill(self.pid, signal.SIGKILL)

    def silence(self) -> float:
        """Seconds since it last showed that it is alive."""
        return monotonic() - max(self.row.last_beat, self.since)

    def stuck(self, awake_since: float) -> str:
        """Why it must be killed; empty: it need not.

        awake_since: when this host last slept (monotonic): what a child should have done before that means nothing.
        """
        now, drain_timeout = monotonic(), self.generation.settings.drain_timeout if self.role is WORKER else 0.0
        if now - awake_since <= HANG_TIMEOUT:
            return ""
        if self.state is State.STARTING and now - self.started > START_TIMEOUT:
            return f"{self.role.name} was not ready within {START_TIMEOUT:g} s"
        if self.state is State.SERVING and self.silence() > HANG_TIMEOUT:
            return self.role.hangs
        is_late = self.state is State.DRAINING and now - self.since > drain_timeout + DRAIN_MARGIN
        return self.role.drains_too_long if is_late else ""

    def forget(self) -> None:
        """It has ended: so has all that it counted."""
        self.channel.close()
        self.row.clear()

    def _turn(self, state: State) -> None:
        self.state, self.since = state, monotonic()


class Backoff:
    """When to replace a child that has died: at once if it lived long, else later and later."""

    def __init__(self) -> None:
        self._delay = 0.0
        self._next = 0.0

    def is_over(self) -> bool:
        return monotonic() >= self._next

    def died(self, lived: float = 0.0) -> None:
        """After so many seconds, or without having served. Of several that soon die together, the first one counts."""
        if lived <= LONG_LIFE and not self.is_over():
            return
        self._delay = 0.0 if lived > LONG_LIFE else min(max(FIRST_DELAY, self._delay * 2), LONGEST_DELAY)
        self.wait(self._delay)

    def wait(self, seconds: float) -> None:
        self._next = monotonic() + seconds
