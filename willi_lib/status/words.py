"""Numbers, times and texts as a postmaster reads them, on the page and in the terminal."""

from __future__ import annotations

from datetime import datetime, timezone

from ..text import visible
from .finding import Level, certificate_level, limit_level
from .overview import CertificateState, Event, Host, Limit, Overview, Table

DAY = 86400  # seconds
FOR_ALL = "max_connections"  # the other limits are for a client each, and one that runs into its own is no trouble
LAST_SECOND = 253402300799.0  # of the year 9999: datetime knows no later one


def shorten(text: str, most: int) -> str:
    """At most so many visible characters; the log has the rest."""
    text = visible(text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def number(count: int | None) -> str:
    """As 12,345; nothing if it is unknown."""
    return f"{count:,}" if count is not None else ""


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


def duration(seconds: float | None) -> str:
    """As 4 µs, 0.4 ms, 12 ms, 3.4 s, 5 min, 2 h 10 min, 3 d 4 h; nothing if it is unknown."""
    if seconds is None:
        return ""
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


def time_left(seconds: float) -> str:
    """As 61 days left, or expired 3 d 2 h ago."""
    if seconds <= 0:
        return f"expired {duration(-seconds)} ago"
    return f"{several(int(seconds // DAY), 'day')} left" if seconds >= DAY else f"{duration(seconds)} left"


# How good something is (a class in page.css, a colour in the terminal), and what that is called.


def host_state(host: Host, now: float) -> tuple[Level, str]:
    return ("ok", "up") if host.down_since is None else ("wrong", f"down {duration(now - host.down_since)}")


def certificate_state(certificate: CertificateState, now: float) -> tuple[Level, str]:
    left = certificate.expires - now
    return certificate_level(left), time_left(left)


def table_state(table: Table) -> tuple[Level, str]:
    if table.database_up is False:
        return "wrong", "down"
    if table.database_up:
        return "ok", "up"
    return ("warn", "old table") if table.last_error else ("ok", "in use")


def limit_state(limit: Limit) -> tuple[Level, str]:
    level = limit_level(limit.used, limit.most)
    used = f"{number(limit.used)} of {number(limit.most)}"
    return "warn" if level == "wrong" and limit.name != FOR_ALL else level, used


def filled(limit: Limit) -> float:
    """How much of its bar, in percent; one of 5,000 shall be seen."""
    return min(100.0, max(1.0, 100 * limit.used / limit.most)) if limit.most and limit.used else 0.0


def event_level(event: Event) -> Level:
    """Wrong is only what an administrator may have to correct."""
    if event.kind == "accepted":
        return "ok"
    return "wrong" if event.error_src == "internal" and event.reply.startswith("451") else "warn"


def refuser(event: Event) -> str:
    return {"upstream": "by upstream", "internal": "by Willi", "client": "client lost"}.get(event.error_src, "")


def answer(event: Event) -> tuple[str, str]:
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
