"""Numbers, times and texts as a postmaster reads them, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

from willi_lib.text import visible

from .overview import CertificateState, Event, Host, Limit, Overview, Table

DAY = 86400  # seconds
SOON = 30 * DAY  # a certificate that ends so soon should have been renewed already
AT_ONCE = 14 * DAY  # as for the problems of an overview
NEAR = 0.8  # of a limit: look at it before clients are turned away
FOR_ALL = "max_connections"  # the other limits are for a client each, and one that runs into its own is no trouble
LAST_SECOND = 253402300799.0  # of the year 9999: datetime knows no later one


def shorten(text: str, most: int) -> str:
    """At most so many visible characters; the log has the rest."""
    text = visible(text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def number(count: int) -> str:
    """As 12,345."""
    return f"{count:,}"


def several(count: int, one: str, many: str = "") -> str:
    """As 1 message, 2 messages."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def size(octets: int) -> str:
    """As 1.2 MB, by thousands."""
    value = float(octets)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def duration(seconds: float) -> str:
    """As 4 µs, 0.4 ms, 12 ms, 3.4 s, 5 min, 2 h 10 min, 3 d 4 h."""
    if seconds < 0.0001:
        return f"{max(seconds, 0) * 1e6:.0f} µs"
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440:,} d {minutes // 60 % 24} h"


def moment(seconds: float) -> datetime:
    """In UTC, as all times are here."""
    return datetime.fromtimestamp(min(max(seconds, 0.0), LAST_SECOND), timezone.utc)


def clock(seconds: float, now: float) -> str:
    """As 14:03:22, and with the day before it if that is not today."""
    at = moment(seconds)
    return f"{at:%H:%M:%S}" if at.date() == moment(now).date() else f"{at:%b %d %H:%M}"


def share(part: int, whole: int) -> str:
    """As 97 %; nothing if there is no whole."""
    return f"{100 * part // whole} %" if whole else ""


def host_state(host: Host, now: float) -> str:
    """As up, or down 12 min."""
    if host.up:
        return "up"
    return f"down {duration(now - host.down_since)}" if host.down_since is not None else "down"


def certificate_state(certificate: CertificateState, now: float) -> str:
    """As 61 days left."""
    if certificate.fault:
        return "cannot be read"
    return time_left(certificate.expires - now)


def time_left(seconds: float) -> str:
    """As 61 days left, or expired 3 d 2 h ago."""
    if seconds <= 0:
        return f"expired {duration(-seconds)} ago"
    return f"{several(int(seconds // DAY), 'day')} left" if seconds >= DAY else f"{duration(seconds)} left"


def certificate_mark(certificate: CertificateState, now: float) -> str:
    """good, warn or bad."""
    left = certificate.expires - now
    if certificate.fault or left < AT_ONCE:
        return "bad"
    return "warn" if left < SOON else "good"


def limit_mark(limit: Limit) -> str:
    """good, warn or bad."""
    if not limit.most or limit.used < NEAR * limit.most:
        return "good"
    return "bad" if limit.name == FOR_ALL and limit.used >= limit.most else "warn"


def table_state(table: Table) -> tuple[str, str]:
    """good, warn or bad, and the state in words."""
    if table.database_up is False:
        return "bad", "down"
    if table.database_up:
        return "good", "up"
    return ("warn", "old table") if table.last_error else ("good", "in use")


def event_mark(event: Event) -> str:
    """good, warn or bad: bad is only what an administrator may have to mend."""
    if event.kind == "accepted":
        return "good"
    return "bad" if event.error_src == "internal" and event.reply.startswith("451") else "warn"


def refuser(event: Event) -> str:
    """Who did not want it."""
    return {"upstream": "by upstream", "internal": "by Willi", "client": "client lost"}.get(event.error_src, "")


def answer(event: Event) -> tuple[str, str]:
    """What the client was told, and what the log knows besides."""
    if not event.reply:
        return event.error, ""
    return event.reply, "" if event.error == event.reply else event.error


def headline(overview: Overview) -> str:
    """Is it well?"""
    if not overview.problems:
        return "All is well"
    return several(len(overview.problems), "problem needs you", "problems need you")


def advice(overview: Overview) -> list[str]:
    """What to do, beside what the problems themselves say."""
    return [hint for hint, applies in ADVICE if overview.problems and applies(overview)]


def _has_a_bad_certificate(overview: Overview) -> bool:
    return any(certificate_mark(certificate, overview.now) == "bad" for certificate in overview.certificates)


def _is_nearly_full(overview: Overview) -> bool:
    return any(limit.name == FOR_ALL and limit_mark(limit) != "good" for limit in overview.limits)


ADVICE: tuple[tuple[str, Callable[[Overview], bool]], ...] = (
    (
        "The log says why workers ended (lvl=error). The master starts new ones by itself.",
        lambda overview: overview.workers < overview.workers_wanted,
    ),
    (
        "While an upstream is down, its clients hear 451 and try again later: nothing is lost. Look at that server; "
        "willi.py check tries it from here.",
        lambda overview: any(not host.up for host in overview.hosts),
    ),
    (
        "While a database is down, answers that are known keep serving for stale_ttl, and others hear 451. Start it "
        "again; Willi finds it by itself.",
        lambda overview: any(table.database_up is False for table in overview.tables),
    ),
    (
        "A table with a wrong line is not taken; the old one serves. Mend the line that the error names.",
        lambda overview: any(table_state(table)[0] == "warn" for table in overview.tables),
    ),
    ("Renew certificates in place: Willi takes new files within 10 seconds.", _has_a_bad_certificate),
    (
        "Clients beyond max_connections are told 421 and try again. Raise it, if the machine can bear it, and reload.",
        _is_nearly_full,
    ),
    (
        "After a failed reload the old settings serve. Mend what the error names, then reload again.",
        lambda overview: bool(overview.last_reload_error),
    ),
)
