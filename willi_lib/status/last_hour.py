"""The last sixty minutes: what is added up minute by minute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

MINUTE = 60.0  # seconds
MINUTES = 60


class LastHour:
    """Numbers by their names."""

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

    def mean(self, now: float) -> float | None:
        """Of the durations: `seconds` by `number`; None: there were none."""
        sums = {name: sum(counted.get(name, 0.0) for _, counted in self.minutes(now)) for name in ("seconds", "number")}
        return sums["seconds"] / sums["number"] if sums["number"] else None
