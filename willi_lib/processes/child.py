"""A process that the master has forked, as the master sees it: a worker, or the status process.

It says READY by its socket when it could serve, or what is wrong, and ends; the master answers GO. It says LEAVING if
another process has told it to end, and a worker tells NEWS of its mappings. Each of these is a packet. Its row shows
that it is alive. The end of the socket tells it that the master is dead.
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

READY = b"ready"
GO = b"go"
LEAVING = b" leaving"
NEWS = b"news "  # and JSON
MAX_WORDS = 100_000  # octets of a packet: what a worker says is wrong
MAX_PACKETS = 100  # that are heard in one go
# Exit statuses of a worker that could not start: a fault, one that may pass, a database that is down.
FAULT, TRY_AGAIN, DATABASE_DOWN = 1, 4, 5
START_TIMEOUT = 300.0  # seconds for a worker to read its tables and certificates
HANG_TIMEOUT = 60.0  # seconds without a sign of life
DRAIN_MARGIN = 15.0  # seconds after drain_timeout, in which a worker says goodbye
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before a child is replaced that soon died; doubled each time
LONG_LIFE = 60.0  # seconds; a child that dies later is replaced at once


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
    """What a child is about."""

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
        self.words = b""  # what it said of itself
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
        """Hear what it has to say."""
        with suppress(BlockingIOError, ConnectionError):  # nothing more for now; its end is for waitpid to tell
            for _ in range(MAX_PACKETS):
                packet = self.channel.recv(MAX_WORDS)
                if packet.startswith(NEWS):
                    self.generation.news.take(json.loads(packet[len(NEWS) :]), self.pid)
                elif packet and len(self.words) < MAX_WORDS:
                    self.words += packet
        if self.state is State.STARTING and self.words == READY:
            self._turn(State.READY)

    @property
    def faults(self) -> str:
        """What it said is wrong; a line for each."""
        return "" if self.words.startswith(READY) else self.words.decode("utf-8", "replace")

    @property
    def is_leaving(self) -> bool:
        """Whether another process than the master has told it to end."""
        return self.state is State.SERVING and self.words == READY + LEAVING

    @property
    def is_ending(self) -> bool:
        """Whether it has been told to end."""
        return self.state in (State.DRAINING, State.KILLED)

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
        """End it at once."""
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
        self.state = state
        self.since = monotonic()


class Backoff:
    """When to replace a child that has died: at once if it lived long, else later and later."""

    def __init__(self) -> None:
        self._delay = 0.0
        self._next = 0.0

    def is_over(self) -> bool:
        """Whether another one may start now."""
        return monotonic() >= self._next

    def died(self, lived: float = 0.0) -> None:
        """After so many seconds, or without having served."""
        self._delay = 0.0 if lived > LONG_LIFE else min(max(FIRST_DELAY, self._delay * 2), LONGEST_DELAY)
        self.wait(self._delay)

    def wait(self, seconds: float) -> None:
        """Start none before."""
        self._next = monotonic() + seconds
