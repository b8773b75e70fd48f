"""What the processes report, and the way there: datagrams, sent without waiting.

The master makes the two pairs of sockets once, and every process inherits their ends: `reports` leads from the workers
and the master to the status process, `questions` from that to whichever worker serves. A report says how much so far,
not how much since the last one: if one is lost, the next one makes up for it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..routing.route import Route
from .counts import Row

MAX_DATAGRAM = 32 << 10  # octets of what we put together; a system's default for a socket is six times that
MAX_ANY = 256 << 10  # octets of whatever may come
ANSWER_TIMEOUT = 3.0  # seconds, after which the answer to a question is not waited for

encode = json.JSONEncoder(default=vars, separators=(",", ":")).encode


@dataclass(frozen=True)
class MappingState:
    """A mapping as a worker has it, and what was counted of it; a key of /status.json. None: it knows no such thing."""

    name: str  # as in the log, such as csv:/opt/willi/etc/map.csv
    kind: str  # static, csv, sqlite, mysql
    patterns: int | None = None
    loaded_at: float | None = None  # seconds since 1970
    last_error: str = ""
    database_up: bool | None = None
    seen: float = 0.0  # when the database last answered or failed, seconds since 1970; 0: it was not asked
    cache_entries: int | None = None
    lookups: int = 0
    hits: int = 0
    errors: int = 0
    cache_hits: int | None = None
    lookup_seconds: float | None = None  # mean of the last hour


@dataclass(frozen=True)
class CertificateState:
    """As a worker has read it; a key of /status.json."""

    file: str
    names: tuple[str, ...]
    expires: float  # seconds since 1970


@dataclass
class WorkerReport:
    """What a worker says of itself each second. A long one comes in parts, which differ in their rows."""

    pid: int
    began: float = 0.0  # monotonic; with the pid it tells one worker from another
    turn: int = 0  # the same for all parts
    sessions: int = 0  # that are open
    peaks: dict[str, int] = field(default_factory=dict)  # the most that one client had, by the name of the limit
    mappings: list[MappingState] = field(default_factory=list)
    certificates: list[CertificateState] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def parse(cls, mappings: list[Any], certificates: list[Any], **facts: Any) -> WorkerReport:
        known = [CertificateState(one["file"], tuple(one["names"]), one["expires"]) for one in certificates]
        return cls(**facts, mappings=[MappingState(**one) for one in mappings], certificates=known)


@dataclass
class MasterReport:
    """What the master says of itself and its workers, when it has changed and each second."""

    pid: int = 0
    started: float = 0.0
    domain: str = ""
    log: str = ""  # these two as in the file
    loglevel: str = ""
    listen: Sequence[str] = ()
    wanted: int = 0  # workers
    workers: dict[str, str] = field(default_factory=dict)  # the name of the state by pid
    reloads: int = 0
    reloads_failed: int = 0
    last_reload: float | None = None
    last_reload_error: str = ""
    stopping: bool = False
    connections: int = 0
    limits: dict[str, int] = field(default_factory=dict)

    def number(self, state: str) -> int:
        return list(self.workers.values()).count(state)


class AskedStep(NamedTuple):
    """One key that was asked in one mapping."""

    mapping: str
    key: str
    answer: str
    seconds: float | None  # None: it was in memory


@dataclass(frozen=True)
class Asked:
    """What a session would find for an address."""

    address: str
    steps: tuple[AskedStep, ...]
    result: str  # "route: ..." or why none
    route: Route | None = None  # not in an answer to the status process, which shows only the text


class Links:
    def __init__(self) -> None:
        """Raises OSError: no descriptor is left."""
        self.reports, self.to_reports = _pair()
        self.questions, self.to_questions = _pair()

    def close_readers(self) -> None:
        """In a worker, which reads questions only."""
        self.reports.close()
        self.to_questions.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Where to read, where to write."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in pair:
        end.setblocking(False)
    return pair


def send(sender: socket.socket, **report: object) -> bool:
    """Whether it could be sent at once."""
    try:
        sender.send(encode(report).encode("ascii"))
    except OSError:  # the reader does not keep up, or it is too large
        return False
    return True


def packed(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """As many rows together as a datagram may hold; at least one list."""
    part: list[Any] = []
    size = 0
    for row in rows:
        length = len(encode(row)) + 1
        if part and size + length > MAX_DATAGRAM:
            yield part
            part, size = [], 0
        part.append(row)
        size += length
    yield part


def receive(reader: Any) -> dict[str, Any]:
    """The next report; an empty one if it is none, as of a process of another version. Raises OSError."""
    try:
        report = json.loads(reader.recv(MAX_ANY))
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}
