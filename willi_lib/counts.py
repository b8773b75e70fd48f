"""What one process counts, in plain numbers: no lock, and nothing that waits.

A number has a key: a name, and the values of its labels. All of them are bounded: words of ours, mappings and upstream
hosts; never what a client may choose. Every second all that was counted is taken, as rows that can be JSON, and added
up by whoever gets them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import time
from typing import Any

Key = tuple[str, ...]  # the name, then the values of its labels
Row = list[Any]  # its kind, and what belongs to it

MAX_EVENTS = 50
MAX_HOSTS = 200  # upstream hosts in what is taken at a time: there may be a million of them
MAX_TEXT = 300  # characters of what a client or an upstream said
OTHER = "other"  # the hosts for which there is no room

# Counters, and their labels
SESSIONS = "sessions"
REFUSED = "sessions_refused"  # reason
MESSAGES = "messages"  # verdict, mapping
RECIPIENTS = "recipients"  # verdict, mapping
VERDICTS = "verdicts"  # verdict: lines of the log, about a message or a refused recipient
OCTETS = "octets"  # mapping
TLS = "tls"  # side, version
XCLIENT = "xclient"  # outcome
LOOKUPS = "lookups"  # mapping, outcome
CACHE_HITS = "lookup_cache_hits"  # mapping

# Counters of an upstream host, which is the first label
CONNECTS = "upstream_connects"  # outcome
LOST = "upstream_lost"
HOST_MESSAGES = "upstream_messages"  # verdict: lines of the log as above
HOST_OCTETS = "upstream_octets"
GREETINGS = "upstream_greetings"
GREETING_SECONDS = "upstream_greeting_seconds"
OF_HOSTS = frozenset((CONNECTS, LOST, HOST_MESSAGES, HOST_OCTETS, GREETINGS, GREETING_SECONDS))

# Durations, their labels, and the upper bounds of the buckets in seconds
SESSION_SECONDS = "session_duration_seconds"
CONNECT_SECONDS = "upstream_connect_duration_seconds"
VERDICT_SECONDS = "verdict_duration_seconds"
LOOKUP_SECONDS = "lookup_duration_seconds"  # mapping
BOUNDS: dict[str, tuple[float, ...]] = {
    SESSION_SECONDS: (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
    CONNECT_SECONDS: (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
    VERDICT_SECONDS: (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600),
    LOOKUP_SECONDS: (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
}

# Verdicts
ACCEPTED = "accepted"
REJECTED_BY_UPSTREAM = "rejected_by_upstream"
REJECTED_BY_WILLI = "rejected_by_willi"
FAILED = "failed"  # the client or the upstream was lost, or a mapping could not answer

# Outcomes of a try to reach an upstream host
OPENED = "opened"
REFUSED_CLIENT = "refused"  # it answers, and does not want this client, or us
NOT_OPENED = "failed"

# Kinds of rows
NUMBER, DURATION, HOST, EVENT = "n", "d", "h", "e"


@dataclass
class HostState:
    """When an upstream host was last reached or not; seconds since 1970, 0 for never."""

    reached: float = 0.0
    failing_since: float = 0.0  # the first failure after that
    failed: float = 0.0  # the last failure
    error: str = ""  # its words

    def note_reached(self, now: float) -> None:
        """It has greeted."""
        self.reached, self.failing_since = now, 0.0

    def note_failed(self, now: float, error: str) -> None:
        """It was not to be reached, or was lost."""
        self.failing_since = self.failing_since or now
        self.failed, self.error = now, error

    def merge(self, other: HostState) -> None:
        """Take in what another worker has met."""
        self.reached = max(self.reached, other.reached)
        if other.failed > self.failed:
            self.failed, self.error = other.failed, other.error
        began = (self.failing_since, other.failing_since, self.failed, other.failed)
        self.failing_since = min((moment for moment in began if moment > self.reached), default=0.0)


class Counts:
    """What was counted since it was last taken."""

    def __init__(self) -> None:
        self._numbers: dict[Key, float] = {}
        self._durations: dict[Key, list[float]] = {}  # for each bucket, then for what is longer, and the sum
        self._hosts: dict[str, HostState] = {}
        self._events: deque[Row] = deque(maxlen=MAX_EVENTS)

    def add(self, *key: str, number: float = 1) -> None:
        """Count something."""
        self._numbers[key] = self._numbers.get(key, 0) + number

    def took(self, seconds: float, *key: str) -> None:
        """Count a duration."""
        row = self._durations.get(key)
        if row is None:
            row = self._durations[key] = [0] * (len(BOUNDS[key[0]]) + 2)
        row[bisect_left(BOUNDS[key[0]], seconds)] += 1
        row[-1] += seconds

    def event(self, *fields: str | float) -> None:
        """Keep one of the last messages and refusals: the fields of `Event` in overview.py."""
        self._events.append([EVENT, *fields])

    # -- upstream hosts

    def host(self, server: object) -> str:
        """The name under which a host is counted."""
        name = str(server)
        if name not in self._hosts:
            if len(self._hosts) >= MAX_HOSTS:
                return OTHER
            self._hosts[name] = HostState()
        return name

    def greeted(self, server: object, seconds: float) -> None:
        """It has said its greeting, so long after we began to connect."""
        name = self.host(server)
        self.took(seconds, CONNECT_SECONDS)
        self.add(GREETINGS, name)
        self.add(GREETING_SECONDS, name, number=seconds)

    def tried(self, server: object, outcome: str, error: str = "") -> None:
        """A host is ready for MAIL (OPENED), refused (REFUSED_CLIENT) or could not be reached (NOT_OPENED)."""
        name = self.host(server)
        self.add(CONNECTS, name, outcome)
        self._note(name, outcome == NOT_OPENED, error)

    def lost(self, server: object, error: str) -> None:
        """It was there, and failed inside a transaction."""
        name = self.host(server)
        self.add(LOST, name)
        self._note(name, True, error)

    def _note(self, name: str, failed: bool, error: str) -> None:
        if name == OTHER:
            return
        if failed:
            self._hosts[name].note_failed(time(), error)
        else:
            self._hosts[name].note_reached(time())

    # -- taking

    def take(self) -> list[Row]:
        """All of it, and begin anew."""
        rows = [
            *number_rows(self._numbers),
            *duration_rows(self._durations),
            *([HOST, name, *vars(state).values()] for name, state in self._hosts.items() if any(vars(state).values())),
            *self._events,
        ]
        self._numbers, self._durations, self._hosts = {}, {}, {}
        self._events.clear()
        return [clipped(row) for row in rows]

    def put_back(self, rows: Iterable[Row]) -> None:
        """What was taken, and reached nobody."""
        newer = list(self._events)
        self._events.clear()
        for kind, *row in rows:
            if kind == NUMBER:
                self.add(*row[1:], number=row[0])
            elif kind == DURATION:
                add_duration(self._durations, tuple(row[1:]), row[0])
            elif kind == HOST:
                self._hosts.setdefault(row[0], HostState()).merge(HostState(*row[1:]))
            else:
                self._events.append([kind, *row])
        self._events.extend(newer)


def number_rows(numbers: dict[Key, float]) -> Iterable[Row]:
    """Counters as rows."""
    return ([NUMBER, number, *key] for key, number in numbers.items())


def duration_rows(durations: dict[Key, list[float]]) -> Iterable[Row]:
    """Durations as rows."""
    return ([DURATION, row, *key] for key, row in durations.items())


def add_duration(durations: dict[Key, list[float]], key: Key, row: Sequence[float]) -> None:
    """Add up what was counted of durations."""
    known = durations.get(key)
    durations[key] = list(row) if known is None else [a + b for a, b in zip(known, row, strict=True)]


def clipped(row: Row) -> Row:
    """No field longer than MAX_TEXT."""
    return [field[:MAX_TEXT] + "..." if isinstance(field, str) and len(field) > MAX_TEXT else field for field in row]
