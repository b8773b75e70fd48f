"""What one process counts, in plain numbers: no lock, and nothing that waits.

A number has a key: a name, and the values of its labels. All of them are bounded: words of ours, mappings and upstream
hosts; never what a client may choose. Every second all that was counted is taken, as rows that can be JSON, and added
up by whoever gets them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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

EVENT_FIELDS = ("sid", "client", "from", "to", "upstream", "reply", "error", "error_src")  # of the log

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

    def not_after(self, now: float) -> None:
        """A clock that was fast must not make what it saw outweigh what comes."""
        self.reached, self.failing_since, self.failed = (
            min(moment, now) for moment in (self.reached, self.failing_since, self.failed)
        )


NOTHING = HostState()


class Counts:
    """What was counted since it was last taken, which should be every second.

    Each session pays for this, so that it does little: what happens together is one entry, durations stay as they are,
    and only `take` makes of them all the numbers that they stand for.
    """

    def __init__(self) -> None:
        self.sessions = 0  # that began
        self._numbers: defaultdict[Key, float] = defaultdict(int)
        self._samples: defaultdict[Key, list[float]] = defaultdict(list)
        self._durations: dict[Key, list[float]] = {}  # for each bucket, then for what is longer, and the sum
        self._messages: defaultdict[tuple[str, str, str, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
        self._opened: defaultdict[tuple[object, str, str], list[float]] = defaultdict(list)
        self._hosts: dict[str, HostState] = {}
        self._events: deque[tuple[float, str, Mapping[str, object]]] = deque(maxlen=MAX_EVENTS)
        self._old_events: list[Row] = []  # that were put back

    def add(self, *key: str, number: float = 1) -> None:
        """Count something."""
        self._numbers[key] += number

    def took(self, seconds: float, *key: str) -> None:
        """Count a duration."""
        self._samples[key].append(seconds)

    def session_ended(self, seconds: float, tls: str) -> None:
        """After so long."""
        self._samples[SESSION_SECONDS, tls].append(seconds)

    def looked_up(self, seconds: float, mapping: str, outcome: str) -> None:
        """A recipient in one mapping."""
        self._samples[LOOKUP_SECONDS, mapping, outcome].append(seconds)

    def message(self, verdict: str, mapping: str, host: str, recipients: int, octets: int, whole: bool = True) -> None:
        """What became of a message; if not `whole`, of a refused recipient. host: empty if it is not known."""
        row = self._messages[verdict, mapping, host, whole]
        row[0] += 1
        row[1] += recipients
        row[2] += octets

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Keep one of the last messages and refusals. fields: as in the log."""
        self._events.append((time(), kind, fields))

    # -- upstream hosts

    def opened(self, server: object, seconds: float, tls: str, xclient: str) -> None:
        """It is ready for MAIL. seconds: from connecting to its greeting. tls: version; xclient: outcome."""
        self._opened[server, tls, xclient].append(seconds)

    def not_opened(self, server: object, error: str) -> None:
        """None of its addresses was of use."""
        self._note_failed(server, error, CONNECTS, NOT_OPENED)

    def lost(self, server: object, error: str) -> None:
        """It was there, and failed inside a transaction."""
        self._note_failed(server, error, LOST)

    def refused(self, server: object) -> None:
        """It answers, and does not want this client, or us."""
        name = self._host(str(server))
        self.add(CONNECTS, name, REFUSED_CLIENT)
        self._hosts[name].note_reached(time())

    def _note_failed(self, server: object, error: str, kind: str, *outcome: str) -> None:
        self._settle_opened()  # they came before
        name = self._host(str(server))
        self.add(kind, name, *outcome)
        self._hosts[name].note_failed(time(), error)

    def _host(self, name: str) -> str:
        """The name under which a host is counted."""
        if name not in self._hosts:
            if len(self._hosts) >= MAX_HOSTS:
                name = OTHER
            self._hosts.setdefault(name, HostState())
        return name

    # -- taking

    def take(self) -> list[Row]:
        """All of it, and begin anew."""
        self._settle()
        states = ((name, state) for name, state in self._hosts.items() if name != OTHER and state != NOTHING)
        hosts = [[HOST, name, *vars(state).values()] for name, state in states]
        events = [*self._old_events, *(_event_row(*event) for event in self._events)]
        rows = [*number_rows(self._numbers), *duration_rows(self._durations), *hosts, *events[-MAX_EVENTS:]]
        self._durations, self._hosts, self._old_events = {}, {}, []
        self._numbers.clear()
        self._events.clear()
        return [clipped(row) for row in rows]

    def _settle(self) -> None:
        """Make the numbers of what was counted together."""
        if self.sessions:
            self.add(SESSIONS, number=self.sessions)
            self.sessions = 0
        self._settle_messages()
        self._settle_opened()
        for (name, *labels), samples in self._samples.items():
            if name == LOOKUP_SECONDS and len(labels) == 2:
                self.add(LOOKUPS, *labels, number=len(samples))
                labels.pop()
            elif name == SESSION_SECONDS and labels:
                self.add(TLS, "client", *labels, number=len(samples))
                labels.pop()
            add_duration(self._durations, (name, *labels), in_buckets(name, samples))
        self._samples.clear()

    def _settle_messages(self) -> None:
        for (verdict, mapping, host, whole), (lines, recipients, octets) in self._messages.items():
            self.add(VERDICTS, verdict, number=lines)
            self.add(RECIPIENTS, verdict, mapping, number=recipients)
            if whole:
                self.add(MESSAGES, verdict, mapping, number=lines)
                self.add(OCTETS, mapping, number=octets)
            if host:
                name = self._host(host)
                self.add(HOST_MESSAGES, name, verdict, number=lines)
                self.add(HOST_OCTETS, name, number=octets)
        self._messages.clear()

    def _settle_opened(self) -> None:
        for (server, tls, xclient), samples in self._opened.items():
            name, number = self._host(str(server)), len(samples)
            self._hosts[name].note_reached(time())
            self.add(CONNECTS, name, OPENED, number=number)
            self.add(GREETINGS, name, number=number)
            self.add(GREETING_SECONDS, name, number=sum(samples))
            self.add(TLS, "upstream", tls, number=number)
            self.add(XCLIENT, xclient, number=number)
            add_duration(self._durations, (CONNECT_SECONDS,), in_buckets(CONNECT_SECONDS, samples))
        self._opened.clear()

    def put_back(self, rows: Iterable[Row]) -> None:
        """What was taken, and reached nobody."""
        for kind, *row in rows:
            if kind == NUMBER:
                number, name, *labels = row
                if name in OF_HOSTS:
                    labels[0] = self._host(labels[0])
                self.add(name, *labels, number=number)
            elif kind == DURATION:
                add_duration(self._durations, tuple(row[1:]), row[0])
            elif kind == HOST:
                self._hosts.setdefault(row[0], HostState()).merge(HostState(*row[1:]))
            else:
                self._old_events.append([kind, *row])


def _event_row(at: float, kind: str, fields: Mapping[str, object]) -> Row:
    """In the order of `Event` in overview.py."""
    words = [str(fields.get(name) or "") for name in EVENT_FIELDS]
    return [EVENT, at, kind, *words, fields.get("bytes", 0), fields.get("duration", 0.0)]


def number_rows(numbers: dict[Key, float]) -> Iterable[Row]:
    """Counters as rows."""
    return ([NUMBER, number, *key] for key, number in numbers.items())


def duration_rows(durations: dict[Key, list[float]]) -> Iterable[Row]:
    """Durations as rows."""
    return ([DURATION, row, *key] for key, row in durations.items())


def in_buckets(name: str, samples: list[float]) -> list[float]:
    """How many of them are in each bucket, how many are longer, and their sum."""
    samples.sort()
    upto = [bisect_right(samples, bound) for bound in BOUNDS[name]] + [len(samples)]
    return [upto[0], *(after - before for before, after in pairwise(upto)), sum(samples)]


def add_duration(durations: dict[Key, list[float]], key: Key, row: Sequence[float]) -> None:
    """Add up what was counted of durations."""
    known = durations.get(key)
    durations[key] = list(row) if known is None else [a + b for a, b in zip(known, row, strict=True)]


def clipped(row: Row) -> Row:
    """No field longer than MAX_TEXT."""
    return [field[:MAX_TEXT] + "..." if isinstance(field, str) and len(field) > MAX_TEXT else field for field in row]
