"""The totals as a postmaster sees them: an `Overview`, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from .. import VERSION
from . import counts
from .finding import RENEW, Finding
from .overview import Host, Limit, Overview, Table
from .reports import TableReport
from .totals import FRESH, Totals
from .words import FOR_ALL, certificate_state, limit_state, several

FORGET_FAILURE = 3600.0  # seconds after which a host that nobody has tried again is not called down any more
MAX_NAMED = 5  # hosts in one problem
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
        sessions_total=totals.number(counts.SESSIONS),
        accepted_total=totals.number(counts.VERDICTS, counts.ACCEPTED),
        rejected_total=sum(totals.number(counts.VERDICTS, verdict) for verdict in REJECTED),
        failed_total=totals.number(counts.VERDICTS, counts.FAILED),
        octets_total=totals.number(counts.OCTETS),
        minutes=totals.minutes(now),
        hosts=tuple(_host(totals, name, now) for name in totals.busiest_hosts()),
        tables=tuple(_table(totals, table, now) for table in totals.tables()),
        certificates=totals.certificates(),
        limits=tuple(limits(totals, now)),
        events=tuple(events),
    )


def sessions(totals: Totals) -> int:
    """That are open, in the workers that drain too."""
    return sum(worker.report.sessions for worker in totals.present())


def down_since(totals: Totals, host: str, now: float) -> float | None:
    """None: it is up, or nobody has tried for long."""
    state = totals.hosts[host]
    return state.failing_since if state.failing_since and state.failed > now - FORGET_FAILURE else None


def _host(totals: Totals, name: str, now: float) -> Host:
    number = totals.number
    since = down_since(totals, name, now)
    return Host(
        name=name,
        up=since is None,
        down_since=since,
        connections=sum(number(counts.CONNECTS, name, one) for one in (counts.OPENED, counts.REFUSED_CLIENT)),
        failures=number(counts.CONNECTS, name, counts.NOT_OPENED) + number(counts.LOST, name),
        accepted=number(counts.HOST_MESSAGES, name, counts.ACCEPTED),
        rejected=sum(number(counts.HOST_MESSAGES, name, verdict) for verdict in REJECTED),
        octets=number(counts.HOST_OCTETS, name),
        connect_seconds=totals.mean(counts.GREETING_SECONDS, name, now),
        last_error=totals.hosts[name].error,
        last_error_at=totals.hosts[name].failed or None,
    )


def _table(totals: Totals, table: TableReport, now: float) -> Table:
    name, number = table.name, totals.number
    return Table(
        name=name,
        kind=table.kind,
        patterns=table.patterns,
        loaded_at=table.loaded_at,
        lookups=number(counts.LOOKUPS, name),
        hits=number(counts.LOOKUPS, name, "hit") + number(counts.LOOKUPS, name, "stale"),
        errors=number(counts.LOOKUPS, name, "error"),
        lookup_seconds=totals.mean(counts.LOOKUP_SECONDS, name, now),
        database_up=table.database_up,
        cache_entries=table.cache_entries,
        cache_hits=number(counts.CACHE_HITS, name) if table.database_up is not None else None,
        last_error=table.last_error,
    )


def limits(totals: Totals, now: float) -> Iterator[Limit]:
    """Of clients: the most that a single one has had in the last minute."""
    for name in counts.LIMITS:
        most = totals.master.limits.get(name, 0)
        if most:
            used = totals.master.connections if name == "max_connections" else min(totals.peak(name, now), most)
            yield Limit(name, used, most, totals.number(counts.REFUSED, name))


def problems(totals: Totals, now: float) -> Iterator[Finding]:
    """What an administrator should look at now, the worst first."""
    yield from problems_of_processes(totals, now)
    if totals.master.last_reload_error:
        yield Finding("wrong", "reload", f"the last one failed: {totals.master.last_reload_error}", RELOAD_AGAIN)
    for table in totals.tables():
        if table.last_error:
            down = table.database_up is False
            what, advice = ("database is down", START_DATABASE) if down else ("not read again", CORRECT_LINE)
            yield Finding("wrong" if down else "warn", table.name, f"{what}: {table.last_error}", advice)
    hosts = [name for name in totals.busiest_hosts() if down_since(totals, name, now) is not None]
    for name in hosts[:MAX_NAMED]:
        yield Finding("wrong", name, f"the upstream is down: {totals.hosts[name].error}", LOOK_AT_UPSTREAM)
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
    if totals.master_at < now - FRESH:
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
