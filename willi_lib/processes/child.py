"""One worker as the master sees it: a process, its socket, its row.

The worker says READY by that socket when it could serve, or what is wrong, and ends; the master
answers GO. It says LEAVING if somebody else has told it to end, and NEWS of its mappings. Each of these
is a packet. The end of the socket tells a worker that the master is dead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from time import monotonic

from ..config import MysqlSettings, Settings
from ..mappings.last_row import LastRow
from ..net.tls import ServerTls
from .news import News
from .scoreboard import Scoreboard

READY = b"ready"
GO = b"go"
LEAVING = b" leaving"
NEWS = b"news "  # and JSON
MAX_WORDS = 100_000  # octets of a packet: what a worker says is wrong
MAX_PACKETS = 100  # that are heard in one go
# Exit statuses of a worker that could not start: a fault, one that may pass, a database that is down.
FAULT, TRY_AGAIN, DATABASE_DOWN = 1, 4, 5
DRAIN_MARGIN = 15.0  # seconds after drain_timeout, in which a worker says goodbye


class State(Enum):
    """What a worker is about."""

    STARTING = auto()
    READY = auto()  # and has not been told to go
    SERVING = auto()
    DRAINING = auto()
    KILLED = auto()


@dataclass(frozen=True, eq=False)
class Generation:
    """The workers that have read the same file."""

    settings: Settings
    board: Scoreboard
    tls: ServerTls
    last_rows: Mapping[MysqlSettings, LastRow]
    news: News = field(default_factory=News)


class Child:
    """A worker process."""

    def __init__(self, generation: Generation, row: int, become: Callable[[socket.socket], None]) -> None:
        """Forks. become: what the new process does, with its end of the socket; it must not return.

        Raises OSError: no process or descriptor is left.
        """
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
        generation.board.give(row)

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
        """Whether somebody else than the master has told it to end."""
        return self.state is State.SERVING and self.words == READY + LEAVING

    def go(self) -> None:
        """Let it take clients."""
        self._turn(State.SERVING)
        with suppress(OSError):  # it has died just now: waitpid will tell
            self.channel.send(GO)

    def drain(self) -> None:
        """Let it finish what it has begun, and end."""
        self._turn(State.DRAINING)
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._turn(State.KILLED)
        os.kill(self.pid, signal.SIGKILL)

    def silence(self) -> float:
        """Seconds since it last showed that it is alive."""
        return monotonic() - max(self.generation.board.last_beat(self.row), self.since)

    def is_late(self) -> bool:
        """Whether it drains longer than it may."""
        limit = self.generation.settings.drain_timeout + DRAIN_MARGIN
        return self.state is State.DRAINING and monotonic() - self.since > limit

    def forget(self) -> None:
        """It has ended: so has all that it counted."""
        self.channel.close()
        self.generation.board.clear(self.row)

    def _turn(self, state: State) -> None:
        self.state = state
        self.since = monotonic()
