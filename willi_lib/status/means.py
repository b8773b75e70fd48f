"""The last sixty minutes: what is added up minute by minute, and a mean of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

MINUTE = 60.0  # seconds
MINUTES = 60


class LastHour:
    """Numbers by their names, added up by minutes."""

    def __init__(self) -> None:
        self._minutes: dict[float, defaultdict[str, float]] = {}  # by their beginning

    def add(self, now: float, **numbers: float) -> None:
        minute = self._minutes.setdefault(now // MINUTE * MINUTE, defaultdict(float))
        for name, number in numbers.items():
            minute[name] += number
        if len(self._minutes) > MINUTES:  # also those to come, of a clock that was fast
            shown = {began for began, _ in self.minutes(now)}
            self._minutes = {began: counted for began, counted in self._minutes.items() if began in shown}

    def minutes(self, now: float) -> Iterator[tuple[float, Mapping[str, float]]]:
        """The last 60 with their beginning, the oldest first, those in which nothing was counted too."""
        for ago in reversed(range(MINUTES)):
            began = now // MINUTE * MINUTE - MINUTE * ago
            yield began, self._minutes.get(began, {})


class HourMean:
    """Of the durations of the last hour."""

    def __init__(self) -> None:
        self._hour = LastHour()

    def add(self, number: float, seconds: float, now: float) -> None:
        """So many more, and their sum."""
        self._hour.add(now, number=number, seconds=seconds)

    def mean(self, now: float) -> float | None:
        """In seconds; None: there were none."""
        number = sum(counted.get("number", 0.0) for _, counted in self._hour.minutes(now))
        seconds = sum(counted.get("seconds", 0.0) for _, counted in self._hour.minutes(now))
        return seconds / number if number else None
