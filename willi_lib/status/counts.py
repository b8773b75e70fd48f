"""The table of all that /metrics shows, and what one process counts of it.

A metric is one row of the table. docs/monitoring.md lists the same rows, and a test compares them: a new counter needs
its row, there and here, and the call that counts it. Labels have few values: words of ours, mappings and upstream
hosts; never what a client may choose.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from time import monotonic, time
from typing import Any

COUNTER, HISTOGRAM, GAUGE, FOR_PAGE = "counter", "histogram", "gauge", "only shown on the page"


@dataclass(frozen=True, eq=False)
class Metric:
    name: str  # without willi_, and without _total of a counter
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()  # of its one label: they are shown before anything has happened
    bounds: tuple[float, ...] = ()  # of the buckets of a histogram, in seconds: the most that belongs into each

    @property
    def full_name(self) -> str:
        return f"willi_{self.name}" + ("_total" if self.kind == COUNTER else "")


LIMITS = ("max_connections", "max_connections_per_ip", "max_connection_rate")

SESSIONS_OPEN = Metric("sessions_open", GAUGE, "SMTP sessions that are open")
SESSIONS = Metric("sessions", COUNTER, "SMTP sessions that began")
REFUSED = Metric(
    "sessions_refused", COUNTER,
    "connections and sessions that were turned away: the name of the limit, draining, proxy_header",
    ("reason",), (*LIMITS, "max_errors", "draining", "proxy_header"),
)  # fmt: skip
SESSION_SECONDS = Metric(
    "session_duration_seconds", HISTOGRAM, "histogram: duration of SMTP sessions",
    bounds=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)  # fmt: skip
CONNECTIONS = Metric("connections", GAUGE, "connections that are open, as max_connections counts them")
LIMIT_CONNECTIONS = Metric("limit_connections", GAUGE, "the setting max_connections")
LIMIT_PER_IP = Metric("limit_connections_per_ip", GAUGE, "the setting max_connections_per_ip")
LIMIT_RATE = Metric("limit_connection_rate", GAUGE, "the setting max_connection_rate; 0 is no limit")
MESSAGES = Metric(
    "messages", COUNTER,
    "messages: accepted, rejected_by_upstream, rejected_by_willi; failed: client, upstream or mapping was lost",
    ("verdict", "mapping"),
)  # fmt: skip
RECIPIENTS = Metric("recipients", COUNTER, "recipients by the same verdicts, refused ones too", ("verdict", "mapping"))
VERDICTS = Metric("verdicts", FOR_PAGE, "lines of the log about a message or a refused recipient", ("verdict",))
OCTETS = Metric("octets", COUNTER, "octets of messages, accepted or not", ("mapping",))
VERDICT_SECONDS = Metric(
    "verdict_duration_seconds", HISTOGRAM, "histogram: from the end of a message to the upstream's verdict",
    bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600),
)  # fmt: skip
TLS = Metric("tls", COUNTER, "sessions (client) and connections (upstream); none is clear text", ("side", "version"))
XCLIENT = Metric(
    "xclient", COUNTER, "upstream connections: accepted, refused (to us), client_refused, not_offered, off",
    ("outcome",), ("accepted", "refused", "client_refused", "not_offered", "off"),
)  # fmt: skip
UPSTREAM_UP = Metric("upstream_up", GAUGE, "1: the last try to reach this host succeeded", ("host",))
DOWN_SINCE = Metric("upstream_down_since_seconds", GAUGE, "since when this host is down; none if it is up", ("host",))
CONNECTS = Metric("upstream_connects", COUNTER, "connections upstream: opened, refused, failed", ("host", "outcome"))
LOST = Metric("upstream_lost", COUNTER, "connections upstream that failed inside a transaction", ("host",))
HOST_MESSAGES = Metric("upstream_messages", COUNTER, "lines of the log about this host", ("host", "verdict"))
HOST_OCTETS = Metric("upstream_octets", COUNTER, "octets of messages to this host", ("host",))
GREETING_SECONDS = Metric("upstream_greeting_seconds", FOR_PAGE, "what CONNECT_SECONDS counts", ("host",))
CONNECT_SECONDS = Metric(
    "upstream_connect_duration_seconds", HISTOGRAM, "histogram: from connecting to an upstream to its greeting",
    bounds=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
)  # fmt: skip
LOOKUPS = Metric(
    "lookups", COUNTER, "look-ups of recipients: hit, miss, error; stale: from memory, while the database is down",
    ("mapping", "outcome"),
)  # fmt: skip
LOOKUP_SECONDS = Metric(
    "lookup_duration_seconds", HISTOGRAM, "histogram: look-up of a recipient in one mapping", ("mapping",),
    bounds=(0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
)  # fmt: skip
CACHE_HITS = Metric("lookup_cache_hits", COUNTER, "keys that a database mapping knew already", ("mapping",))
PATTERNS = Metric("mapping_patterns", GAUGE, "patterns of a CSV file", ("mapping",))
LOADED_AT = Metric("mapping_loaded_timestamp_seconds", GAUGE, "when a CSV file was read", ("mapping",))
DATABASE_UP = Metric("database_up", GAUGE, "1: the database answers", ("mapping",))
EXPIRES = Metric("certificate_expiry_timestamp_seconds", GAUGE, "when a certificate of tls_cert ends", ("file",))
WORKERS = Metric("workers", GAUGE, "workers: starting, serving, draining", ("state",))
WORKERS_WANTED = Metric("workers_wanted", GAUGE, "workers that should serve")
RELOADS = Metric("reloads", COUNTER, "reloads of the configuration: ok, failed", ("outcome",))
LAST_RELOAD = Metric("last_reload_timestamp_seconds", GAUGE, "when the configuration was last read again")
STARTED = Metric("start_time_seconds", GAUGE, "when the master was started")
BUILD = Metric("build_info", GAUGE, "always 1", ("version", "python"))

TABLE = {row.name: row for row in list(vars().values()) if isinstance(row, Metric)}  # in this order

# Verdicts
ACCEPTED = "accepted"
REJECTED_BY_UPSTREAM = "rejected_by_upstream"
REJECTED_BY_WILLI = "rejected_by_willi"
FAILED = "failed"  # the client or the upstream was lost, or a mapping could not answer

# Outcomes of a try to reach an upstream host
OPENED = "opened"
REFUSED_CLIENT = "refused"  # it answers, and does not want this client, or us
NOT_OPENED = "failed"

MAX_EVENTS = 50
MAX_HOSTS = 200  # upstream hosts with a name of their own: there may be a million of them
MAX_TEXT = 300  # characters of what a client or an upstream said
OTHER = "other"  # the name of all other hosts

Row = list[Any]  # name, values of the labels, value: of a metric, or of one of these
HOST, EVENT = "host", "event"


@dataclass(frozen=True)
class Event:
    """A line of the log about a message, a refused recipient or a refused connection; key of /status.json."""

    at: float  # seconds since 1970
    kind: str  # accepted, rejected, refused (a connection)
    sid: str
    client: str
    sender: str
    recipients: str
    upstream: str
    reply: str
    error: str
    error_src: str  # client, internal, upstream, or empty
    octets: int
    seconds: float


@dataclass
class HostState:
    """When an upstream host was last reached or not; seconds since 1970, 0 for never."""

    reached: float = 0.0
    failing_since: float = 0.0  # the first failure after that
    failed: float = 0.0  # the last failure
    error: str = ""  # its words

    def merge(self, other: HostState) -> None:
        """Take in what another worker has met."""
        self.reached = max(self.reached, other.reached)
        if other.failed > self.failed:
            self.failed, self.error = other.failed, other.error
        began = (self.failing_since, other.failing_since, self.failed, other.failed)
        self.failing_since = min((moment for moment in began if moment > self.reached), default=0.0)

    def cut_at(self, now: float) -> None:
        """A clock that was fast must not make what it saw outweigh what comes."""
        self.reached, self.failing_since, self.failed = (
            min(moment, now) for moment in (self.reached, self.failing_since, self.failed)
        )


class Counts:
    """What a process has counted since it began.

    Each session pays for this, so it does little: what happens together is one entry, and `rows`, which must be called
    every second, makes of it all the numbers that it stands for.
    """

    def __init__(self) -> None:
        self.began = monotonic()
        self._numbers: defaultdict[tuple[Any, ...], float] = defaultdict(int)  # by metric and values of its labels
        self._durations: dict[tuple[Any, ...], list[float]] = {}  # how many are in each bucket or longer, and the sum
        self._hosts: dict[str, HostState] = {}
        self._events: deque[tuple[float, str, Mapping[str, Any]]] = deque(maxlen=MAX_EVENTS)
        # What is not in these yet: durations, and the lines, recipients and octets of messages
        self._samples: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
        self._ended: defaultdict[str, list[float]] = defaultdict(list)
        self._looked_up: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._opened: defaultdict[tuple[object, str, str], list[float]] = defaultdict(list)
        self._messages: defaultdict[tuple[str, str, str, bool], list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(self, *key: Any, number: float = 1) -> None:
        """Count something. key: the metric, and the values of its labels."""
        self._numbers[key] += number

    def took(self, seconds: float, *key: Any) -> None:
        """Count a duration."""
        self._samples[key].append(seconds)

    def session_ended(self, seconds: float, tls: str) -> None:
        self._ended[tls].append(seconds)

    def looked_up(self, seconds: float, mapping: str, outcome: str) -> None:
        self._looked_up[mapping, outcome].append(seconds)

    def message(self, verdict: str, mapping: str, host: str, recipients: int, octets: int, whole: bool = True) -> None:
        """What became of a message; if not `whole`, of a refused recipient. host: empty if it is not known."""
        row = self._messages[verdict, mapping, host, whole]
        row[0] += 1
        row[1] += recipients
        row[2] += octets

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Keep one of the last messages and refusals. fields: as in the log."""
        self._events.append((time(), kind, fields))

    # -- upstream hosts

    def opened(self, server: object, seconds: float, tls: str, xclient: str) -> None:
        """It is ready for MAIL. seconds: from connecting to its greeting. tls: version; xclient: outcome."""
        self._opened[server, tls, xclient].append(seconds)

    def refused(self, server: object) -> None:
        """It answers, and does not want this client, or us."""
        self.add(CONNECTS, self._reached(server), REFUSED_CLIENT)

    def not_opened(self, server: object, error: str) -> None:
        """None of its addresses was of use."""
        self.add(CONNECTS, self._failed(server, error), NOT_OPENED)

    def lost(self, server: object, error: str) -> None:
        """It was there, and failed inside a transaction."""
        self.add(LOST, self._failed(server, error))

    def _reached(self, server: object) -> str:
        name = self._host(server)
        self._hosts[name].reached, self._hosts[name].failing_since = time(), 0.0
        return name

    def _failed(self, server: object, error: str) -> str:
        self._count_pending()  # it was opened before
        name = self._host(server)
        state, now = self._hosts[name], time()
        state.failing_since = state.failing_since or now
        state.failed, state.error = now, clipped(error)
        return name

    def _host(self, server: object) -> str:
        """The name under which a host is counted."""
        name = str(server)
        if name not in self._hosts:
            if len(self._hosts) >= MAX_HOSTS:
                name = OTHER
            self._hosts.setdefault(name, HostState())
        return name

    # -- reporting

    def rows(self) -> list[Row]:
        """How much so far, and the events since the last time."""
        self._count_pending()
        events, self._events = self._events, deque(maxlen=MAX_EVENTS)
        counted = [*self._numbers.items(), *self._durations.items()]
        return [
            *([metric.name, labels, value] for (metric, *labels), value in counted),
            *([HOST, [name], vars(state)] for name, state in self._hosts.items() if name != OTHER),
            *([EVENT, [], vars(_event(*event))] for event in events),
        ]

    def _count_pending(self) -> None:
        """Make the numbers of what was counted together."""
        for tls, samples in self._ended.items():
            self.add(TLS, "client", tls, number=len(samples))
            self._samples[SESSION_SECONDS,] += samples
        for (mapping, outcome), samples in self._looked_up.items():
            self.add(LOOKUPS, mapping, outcome, number=len(samples))
            self._samples[LOOKUP_SECONDS, mapping] += samples
        for (server, tls, xclient), samples in self._opened.items():
            name = self._reached(server)
            self.add(CONNECTS, name, OPENED, number=len(samples))
            self.add(TLS, "upstream", tls, number=len(samples))
            self.add(XCLIENT, xclient, number=len(samples))
            self._samples[GREETING_SECONDS, name] += samples
            self._samples[CONNECT_SECONDS,] += samples
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
        for key, samples in self._samples.items():
            bounds = key[0].bounds
            row = self._durations.setdefault(key, [0] * (len(bounds) + 2))
            samples.sort()
            upto = [0, *(bisect_right(samples, bound) for bound in bounds), len(samples)]
            for bucket, (before, after) in enumerate(pairwise(upto)):
                row[bucket] += after - before
            row[-1] += sum(samples)
        for pending in (self._ended, self._looked_up, self._opened, self._messages, self._samples):
            pending.clear()


def _event(at: float, kind: str, fields: Mapping[str, Any]) -> Event:
    def text(name: str) -> str:
        return clipped(str(fields.get(name) or ""))

    return Event(
        at, kind, sid=text("sid"), client=text("client"), sender=text("from"), recipients=text("to"),
        upstream=text("upstream"), reply=text("reply"), error=text("error"), error_src=text("error_src"),
        octets=fields.get("bytes", 0), seconds=fields.get("duration", 0.0),
    )  # fmt: skip


def clipped(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
