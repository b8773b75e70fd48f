"""A mean of the last hour."""

from __future__ import annotations

from collections import deque

MINUTE = 60.0  # seconds
MINUTES = 60


class HourMean:
    """Durations of the last hour, added up by minutes."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, float, float]] = deque(maxlen=MINUTES)  # the minute, how many, their seconds

    def add(self, number: float, seconds: float, now: float) -> None:
        """So many more, and their sum."""
        minute = int(now // MINUTE)
        if self._minutes and self._minutes[-1][0] == minute:
            _, before, seconds_before = self._minutes.pop()
            number, seconds = number + before, seconds + seconds_before
        self._minutes.append((minute, number, seconds))

    def mean(self, now: float) -> float | None:
        """In seconds; None: there were none."""
        this = now // MINUTE
        recent = [entry for entry in self._minutes if this - MINUTES < entry[0] <= this]
        number = sum(entry[1] for entry in recent)
        return sum(entry[2] for entry in recent) / number if number else None
