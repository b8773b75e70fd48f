"""The totals as a postmaster sees them: an `Overview`, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from willi_lib import VERSION
from willi_lib.status import counts

from .finding import RENEW, Finding
from .hosts import HostTotals
from .overview import Host, Limit, Overview, Table
from .totals import FRESH, Totals
from .words import FOR_ALL, certificate_state, limit_state, several

FORGET_FAILURE = 3600.0  # seconds after which a host that nobody has tried again is not called down any more
MAX_NAMED = 5  # hosts in one problem
LIMITS = ("max_connections", "max_connections_per_ip", "max_connection_rate")
READ_LOG = "The log says why workers ended (lvl=error). The master starts new ones by itself."
LOOK_AT_UPSTREAM = (
    "While an upstream is down, its clients hear 451 and try again later: nothing is lost. Look at that server; "
    "willi.py check tries it from here."
)
START_DATABASE = (
    "While a database is down, answers that are known keep serving for stale_ttl, and others hear 451. Start it again; "
    "Willi finds it by itself."
)
CORRECT_LINE = "A table with a wrong line is not taken; the old one serves. Correct the line that the error names."
RAISE_LIMIT = (
    "Clients beyond max_connections are told 421 and try again. Raise it, if the machine can bear it, and reload."
)
RELOAD_AGAIN = "After a failed reload the old settings serve. Correct what the error names, then reload again."
REJECTED = (counts.REJECTED_BY_UPSTREAM, counts.REJECTED_BY_WILLI)


def overview(totals: Totals, now: float) -> Overview:
    """All of it, at this moment."""
    master = totals.master
    events = sorted(totals.events, key=lambda event: event.at, reverse=True)
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
        sessions_total=int(totals.number(counts.SESSIONS)),
        accepted_total=int(totals.number(counts.VERDICTS, counts.ACCEPTED)),
        rejected_total=sum(int(totals.number(counts.VERDICTS, verdict)) for verdict in REJECTED),
        failed_total=int(totals.number(counts.VERDICTS, counts.FAILED)),
        octets_total=int(totals.number(counts.OCTETS)),
        minutes=totals.minutes(now),
        hosts=tuple(_host(name, host, now) for name, host in totals.hosts.busiest()),
        hosts_left_out=totals.hosts.without_name,
        tables=tuple(_table(totals, facts, now) for facts in totals.tables()),
        certificates=totals.certificates(),
        limits=tuple(limits(totals, now)),
        events=tuple(events),
    )


def sessions(totals: Totals) -> int:
    """That are open, in the workers that drain too."""
    return sum(worker.sessions for worker in totals.workers.values())


def down_since(host: HostTotals, now: float) -> float | None:
    """None: it is up, or nobody has tried for long."""
    state = host.state
    return state.failing_since if state.failing_since and state.failed > now - FORGET_FAILURE else None


def _host(name: str, host: HostTotals, now: float) -> Host:
    def number(kind: str, *labels: str) -> int:
        return int(sum(value for key, value in host.numbers.items() if key[: 1 + len(labels)] == (kind, *labels)))

    reached = number(counts.CONNECTS, counts.OPENED) + number(counts.CONNECTS, counts.REFUSED_CLIENT)
    since = down_since(host, now)
    return Host(
        name=name,
        up=since is None,
        down_since=since,
        connections=reached,
        failures=number(counts.CONNECTS, counts.NOT_OPENED) + number(counts.LOST),
        accepted=number(counts.HOST_MESSAGES, counts.ACCEPTED),
        rejected=sum(number(counts.HOST_MESSAGES, verdict) for verdict in REJECTED),
        octets=number(counts.HOST_OCTETS),
        connect_seconds=host.greeting.mean(now),
        last_error=host.state.error,
        last_error_at=host.state.failed or None,
    )


def _table(totals: Totals, facts: dict[str, Any], now: float) -> Table:
    name = facts["name"]
    is_database = "database_up" in facts
    mean = totals.means.get((counts.LOOKUP_SECONDS, name))
    hits = ("hit", "stale")
    return Table(
        name=name,
        kind=facts["kind"],
        patterns=facts.get("patterns"),
        loaded_at=facts.get("loaded_at"),
        lookups=int(totals.number(counts.LOOKUPS, name)),
        hits=sum(int(totals.number(counts.LOOKUPS, name, outcome)) for outcome in hits),
        errors=int(totals.number(counts.LOOKUPS, name, "error")),
        lookup_seconds=mean.mean(now) if mean else None,
        database_up=facts.get("database_up"),
        cache_entries=facts.get("cache_entries"),
        cache_hits=int(totals.number(counts.CACHE_HITS, name)) if is_database else None,
        last_error=facts.get("last_error", ""),
    )


def limits(totals: Totals, now: float) -> Iterator[Limit]:
    """Of clients: the most that a single one has had in the last minute."""
    for name in LIMITS:
        most = totals.master.limits.get(name, 0)
        if most:
            used = totals.master.connections if name == "max_connections" else min(totals.peak(name, now), most)
            yield Limit(name, used, most, int(totals.number(counts.REFUSED, name)))


def problems(totals: Totals, now: float) -> Iterator[Finding]:
    """What an administrator should look at now, the worst first."""
    yield from problems_of_processes(totals, now)
    if totals.master.last_reload_error:
        yield Finding("wrong", "reload", f"the last one failed: {totals.master.last_reload_error}", RELOAD_AGAIN)
    for facts in totals.tables():
        if facts.get("last_error"):
            down = facts.get("database_up") is False
            what, advice = ("database is down", START_DATABASE) if down else ("not read again", CORRECT_LINE)
            yield Finding("wrong" if down else "warn", facts["name"], f"{what}: {facts['last_error']}", advice)
    hosts = [(name, host) for name, host in totals.hosts.busiest() if down_since(host, now) is not None]
    for name, host in hosts[:MAX_NAMED]:
        yield Finding("wrong", name, f"the upstream is down: {host.state.error}", LOOK_AT_UPSTREAM)
    if len(hosts) > MAX_NAMED:
        yield Finding("wrong", "upstreams", several(len(hosts) - MAX_NAMED, "more is down", "more are down"))
    for certificate in totals.certificates():
        level, state = certificate_state(certificate, now)
        if level != "ok":
            yield Finding(level, certificate.file, f"certificate: {state}", RENEW)
    for limit in limits(totals, now):
        level, used = limit_state(limit)
        if limit.name == FOR_ALL and level != "ok":
            yield Finding(level, limit.name, f"{used} are in use", RAISE_LIMIT)


def problems_of_processes(totals: Totals, now: float) -> Iterator[Finding]:
    """Why mail may not be served just now."""
    master = totals.master
    if master.at < now - FRESH:
        yield Finding("wrong", "master", "has said nothing for some seconds")
        return
    if master.stopping:
        yield Finding("wrong", "Willi", "is being stopped")
        return
    serving = master.number("serving")
    if serving < master.wanted or not serving:
        what = f"only {serving} of {master.wanted} serve" if serving else "none serves"
        yield Finding("wrong", "workers", what, READ_LOG)
    silent = serving - len(totals.fresh_workers(now))
    if silent and serving:
        what = several(silent, "has", "have") + f" not reported for some seconds, of {serving}"
        yield Finding("wrong", "workers", what)
