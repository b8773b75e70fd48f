"""What a postmaster sees at a glance, as values: the page, `willi.py top` and /status.json show all of it.

Times are seconds since 1970, durations seconds, sizes octets. What a client has said is in here as it was said: the
page and the terminal escape it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import VERSION
from . import counts
from .counts import Event
from .finding import RENEW, Finding, Level, certificate_level
from .reports import CertificateState, MappingState
from .totals import FRESH, Totals
from .words import duration, number, several, time_left

FORGET_FAILURE = 3600.0  # seconds after which a host that was not tried again is not called down any more
NEAR = 0.8  # of a limit: look at it before clients are turned away
FOR_ALL = "max_connections"  # the other limits are for a client each, and one that runs into its own is no trouble
MAX_NAMED = 5  # hosts in one problem
READ_LOG = "The log says why workers ended (lvl=error). The master starts new ones by itself."
LOOK_AT_UPSTREAM = (
    "While an upstream is down, its clients hear 451 and try again later: nothing is lost. Look at that server; "
    "willi.py check tries it from here."
)
REPAIR_DATABASE = (
    "While a database is down, recipients hear 451, but for answers that are known (stale_ttl of type = mysql). Start "
    "it again, or correct what the error says; Willi finds it by itself. As the user willi, willi.py check tells the "
    "same."
)
CORRECT_LINE = "A table with a wrong line is not taken; the old one serves. Correct the line that the error names."
RAISE_LIMIT = (
    "Clients beyond max_connections are told 421 and try again. Raise it, if the machine can bear it, and reload."
)
RELOAD_AGAIN = "After a failed reload the old settings serve. Correct what the error names, then reload again."
REJECTED = (counts.REJECTED_BY_UPSTREAM, counts.REJECTED_BY_WILLI)


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
class Limit:
    name: str  # the key, such as max_connections
    used: int
    most: int
    refused: int  # for this limit, since the status process began


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
    mappings: tuple[MappingState, ...]  # in the order of the file
    certificates: tuple[CertificateState, ...]
    limits: tuple[Limit, ...]
    events: tuple[Event, ...]  # the last 50, the newest first


def overview(totals: Totals, now: float) -> Overview:
    master = totals.master
    return Overview(
        now=now,
        version=VERSION,
        domain=master.domain,
        pid=master.pid,
        started=master.started,
        listen=tuple(master.listen),
        problems=tuple(problems(totals, now)),
        workers=master.number("serving"),
        workers_wanted=master.wanted,
        workers_draining=master.number("draining"),
        reloads=master.reloads,
        reloads_failed=master.reloads_failed,
        last_reload=master.last_reload,
        last_reload_error=master.last_reload_error,
        sessions=sessions(totals),
        sessions_total=totals.number(counts.SESSIONS),
        accepted_total=totals.number(counts.VERDICTS, counts.ACCEPTED),
        rejected_total=sum(totals.number(counts.VERDICTS, verdict) for verdict in REJECTED),
        failed_total=totals.number(counts.VERDICTS, counts.FAILED),
        octets_total=totals.number(counts.OCTETS),
        minutes=tuple(
            Minute(began, **{name: int(count) for name, count in counted.items()})
            for began, counted in totals.hour.minutes(now)
        ),
        hosts=tuple(_host(totals, name, now) for name in totals.busiest_hosts()),
        mappings=tuple(_mapping(totals, mapping, now) for mapping in totals.mappings()),
        certificates=totals.certificates(),
        limits=tuple(limits(totals, now)),
        events=tuple(sorted(totals.events, key=lambda event: event.at, reverse=True)),
    )


def sessions(totals: Totals) -> int:
    """That are open, in the workers that drain too."""
    return sum(worker.report.sessions for worker in totals.present())


def down_since(totals: Totals, host: str, now: float) -> float | None:
    """None: it is up, or was not tried for long."""
    state = totals.hosts[host]
    return state.failing_since if state.failing_since and state.failed > now - FORGET_FAILURE else None


def _host(totals: Totals, name: str, now: float) -> Host:
    count = totals.number
    since = down_since(totals, name, now)
    return Host(
        name=name,
        up=since is None,
        down_since=since,
        connections=sum(count(counts.CONNECTS, name, one) for one in (counts.OPENED, counts.REFUSED_CLIENT)),
        failures=count(counts.CONNECTS, name, counts.NOT_OPENED) + count(counts.LOST, name),
        accepted=count(counts.HOST_MESSAGES, name, counts.ACCEPTED),
        rejected=sum(count(counts.HOST_MESSAGES, name, verdict) for verdict in REJECTED),
        octets=count(counts.HOST_OCTETS, name),
        connect_seconds=totals.mean(counts.GREETING_SECONDS, name, now),
        last_error=totals.hosts[name].error,
        last_error_at=totals.hosts[name].failed or None,
    )


def _mapping(totals: Totals, mapping: MappingState, now: float) -> MappingState:
    name, count = mapping.name, totals.number
    return replace(
        mapping,
        lookups=count(counts.LOOKUPS, name),
        hits=count(counts.LOOKUPS, name, "hit") + count(counts.LOOKUPS, name, "stale"),
        errors=count(counts.LOOKUPS, name, "error"),
        cache_hits=count(counts.CACHE_HITS, name) if mapping.database_up is not None else None,
        lookup_seconds=totals.mean(counts.LOOKUP_SECONDS, name, now),
    )


def limits(totals: Totals, now: float) -> Iterator[Limit]:
    """Of clients: the most that a single one has had in the last minute."""
    for name in counts.LIMITS:
        if most := totals.master.limits.get(name, 0):
            used = totals.master.connections if name == FOR_ALL else min(totals.peak(name, now), most)
            yield Limit(name, used, most, totals.number(counts.REFUSED, name))


# What is wrong


def problems(totals: Totals, now: float) -> Iterator[Finding]:
    """What an administrator should look at now, the worst first."""
    yield from _problems_of_processes(totals, now)
    for mapping in totals.mappings():
        if mapping.last_error and mapping.database_up is False:
            yield Finding("wrong", mapping.name, f"database is down: {mapping.last_error}", REPAIR_DATABASE)
        elif mapping.last_error:
            yield Finding("warn", mapping.name, f"not read again: {mapping.last_error}", CORRECT_LINE)
    yield from _problems_of_hosts(totals, now)
    for certificate in totals.certificates():
        level, state = certificate_state(certificate, now)
        if level != "ok":
            yield Finding(level, certificate.file, f"certificate: {state}", RENEW)
    for limit in limits(totals, now):
        level, used = limit_state(limit)
        if limit.name == FOR_ALL and level != "ok":
            yield Finding(level, limit.name, f"{used} are in use", RAISE_LIMIT)


def _problems_of_processes(totals: Totals, now: float) -> Iterator[Finding]:
    """Why mail may not be served just now, or under the old settings."""
    master = totals.master
    serving = master.number("serving")
    silent = serving - len(totals.fresh_workers(now))
    if totals.master_at < now - FRESH:
        yield Finding("wrong", "master", "has said nothing for some seconds")
    elif master.stopping:
        yield Finding("wrong", "Willi", "is being stopped")
    else:
        if serving < master.wanted or not serving:
            what = f"only {serving} of {master.wanted} serve" if serving else "none serves"
            yield Finding("wrong", "workers", what, READ_LOG)
        if silent:
            what = several(silent, "has", "have") + f" not reported for some seconds, of {serving}"
            yield Finding("wrong", "workers", what)
    if master.last_reload_error:
        yield Finding("wrong", "reload", f"the last one failed: {master.last_reload_error}", RELOAD_AGAIN)


def _problems_of_hosts(totals: Totals, now: float) -> Iterator[Finding]:
    hosts = [name for name in totals.busiest_hosts() if down_since(totals, name, now) is not None]
    for name in hosts[:MAX_NAMED]:
        yield Finding("wrong", name, f"the upstream is down: {totals.hosts[name].error}", LOOK_AT_UPSTREAM)
    if len(hosts) > MAX_NAMED:
        yield Finding("wrong", "upstreams", several(len(hosts) - MAX_NAMED, "more is down", "more are down"))


# How good something is (a class in page.css, a colour in the terminal), and what that is called


def host_state(host: Host, now: float) -> tuple[Level, str]:
    return ("ok", "up") if host.down_since is None else ("wrong", f"down {duration(now - host.down_since)}")


def certificate_state(certificate: CertificateState, now: float) -> tuple[Level, str]:
    left = certificate.expires - now
    return certificate_level(left), time_left(left)


def mapping_state(mapping: MappingState) -> tuple[Level, str]:
    if mapping.database_up is not None:
        return ("ok", "up") if mapping.database_up else ("wrong", "down")
    return ("warn", "old table") if mapping.last_error else ("ok", "in use")


def limit_state(limit: Limit) -> tuple[Level, str]:
    level: Level = "ok"
    if limit.most and limit.used >= NEAR * limit.most:
        level = "wrong" if limit.used >= limit.most and limit.name == FOR_ALL else "warn"
    return level, f"{number(limit.used)} of {number(limit.most)}"


def percent_used(limit: Limit) -> float:
    """How much of its bar, in percent; one of 5,000 shall be seen."""
    return min(100.0, max(1.0, 100 * limit.used / limit.most)) if limit.most and limit.used else 0.0


def events_of(overview: Overview, address: str) -> list[Event]:
    """Those whose sender or recipients have this text; all if it is empty."""
    wanted = address.lower().strip("<>")
    return [event for event in overview.events if wanted in f"{event.sender},{event.recipients}".lower()]


def event_level(event: Event) -> Level:
    """Wrong is only what an administrator may have to correct."""
    if event.kind == "accepted":
        return "ok"
    return "wrong" if event.error_src == "internal" and event.reply.startswith("451") else "warn"


def refused_by(event: Event) -> str:
    return {"upstream": "by upstream", "internal": "by Willi", "client": "client lost"}.get(event.error_src, "")


def reply_and_reason(event: Event) -> tuple[str, str]:
    """What the client was told, and what the log knows besides."""
    if not event.reply:
        return event.error, ""
    return event.reply, "" if event.error == event.reply else event.error


def headline(overview: Overview) -> str:
    if not overview.problems:
        return "All is well"
    return several(len(overview.problems), "problem needs you", "problems need you")


def advice(overview: Overview) -> list[str]:
    """What to do, each once."""
    return list(dict.fromkeys(problem.advice for problem in overview.problems if problem.advice))
