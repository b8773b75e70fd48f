"""Numbers, times and texts as a postmaster reads them, on the page and in the terminal."""

from __future__ import annotations

from datetime import datetime, timezone

from ..text import visible

DAY = 86400  # seconds
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
