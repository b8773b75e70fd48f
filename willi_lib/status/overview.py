"""What a postmaster sees at a glance, as values: the page, `willi.py top` and /status.json show all of it.

Times are seconds since 1970, durations seconds, sizes octets. What a client has said is in here as it was said:
whoever shows it escapes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .finding import Finding


@dataclass(frozen=True)
class Minute:
    began: float
    sessions: int = 0  # that began
    refused: int = 0  # connections and sessions that Willi turned away
    accepted: int = 0  # messages
    rejected_by_upstream: int = 0  # messages and recipients
    rejected_by_willi: int = 0
    failed: int = 0  # messages that came to no verdict: the client or the upstream was lost


@dataclass(frozen=True)
class Host:
    name: str  # host:port
    up: bool
    down_since: float | None  # none: it is up
    connections: int  # that were opened, since the status process began
    failures: int  # that were not, or were lost
    accepted: int  # messages
    rejected: int  # messages and recipients
    octets: int
    connect_seconds: float | None  # mean of the last hour, greeting included; None: none was opened
    last_error: str
    last_error_at: float | None


@dataclass(frozen=True)
class Table:
    """One mapping."""

    name: str  # as in the log, such as csv:/opt/willi/etc/map.csv
    kind: str  # static, csv, mysql
    patterns: int | None  # None: unknown, as in a database
    loaded_at: float | None
    lookups: int
    hits: int
    errors: int
    lookup_seconds: float | None  # mean of the last hour
    database_up: bool | None  # None: it is no database
    cache_entries: int | None
    cache_hits: int | None
    last_error: str


@dataclass(frozen=True)
class CertificateState:
    file: str
    names: tuple[str, ...]
    expires: float


@dataclass(frozen=True)
class Limit:
    name: str  # the key, such as max_connections
    used: int
    most: int
    refused: int  # for this limit, since the status process began


@dataclass(frozen=True)
class Event:
    """One line of the log about a message or a refused recipient, or a refused connection."""

    at: float
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


@dataclass(frozen=True)
class Overview:
    now: float
    version: str
    domain: str
    pid: int  # the master's
    started: float  # of the master
    listen: tuple[str, ...]
    problems: tuple[Finding, ...]  # what an administrator should look at now, the worst first; none: all is well
    workers: int  # that serve
    workers_wanted: int
    workers_draining: int
    reloads: int
    reloads_failed: int
    last_reload: float | None
    last_reload_error: str
    sessions: int  # open now
    sessions_total: int
    accepted_total: int
    rejected_total: int
    failed_total: int
    octets_total: int
    minutes: tuple[Minute, ...]  # the last 60, the oldest first
    hosts: tuple[Host, ...]  # the busiest first; beyond MAX_HOSTS all together as `other`
    tables: tuple[Table, ...]  # in the order of the file
    certificates: tuple[CertificateState, ...]
    limits: tuple[Limit, ...]
    events: tuple[Event, ...]  # the last 50, the newest first


@dataclass(frozen=True)
class AskedStep:
    """One key that was asked in one mapping."""

    mapping: str
    key: str
    answer: str
    seconds: float | None


@dataclass(frozen=True)
class Asked:
    """What `lookup` says of one address."""

    address: str
    steps: tuple[AskedStep, ...]
    result: str  # "route: ..." or why none
