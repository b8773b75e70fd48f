"""The numbers of the small charts: what page.html draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .means import MINUTES
from .overview import Limit, Minute
from .words import moment, number

STEP = 4  # units of the picture for a minute, a gap of 1 included
HEIGHT = 40  # units
LEAST = 1.5  # units: one refusal beside a thousand shall be seen


class Layer(NamedTuple):
    """What is counted, minute by minute; layers are stacked."""

    field: str  # of a Minute
    name: str  # as in: 3 accepted
    mark: str  # its class in page.css


class Bar(NamedTuple):
    """One minute."""

    x: int
    title: str
    parts: Sequence[tuple[str, float, float]]  # from below: mark, y, height


class Chart:
    """The last hour of something. name: as in `messages accepted`."""

    def __init__(self, name: str, minutes: Sequence[Minute], *layers: Layer) -> None:
        self.name = name
        self.sums = {layer.mark: sum(getattr(minute, layer.field) for minute in minutes) for layer in layers}
        self.sum = sum(self.sums.values())
        self.counts = [sum(getattr(minute, layer.field) for layer in layers) for minute in minutes]
        self.highest = max(self.counts, default=0)
        self.label = f"{name} in each of the last {MINUTES} minutes: {number(self.sum)} in all, "
        self.label += f"at most {number(self.highest)} in a minute"
        bars = [self._bar(minute, layers) for minute in minutes]
        self.bars = [bar._replace(x=STEP * place) for place, bar in enumerate(bars, MINUTES - len(bars)) if bar.parts]

    def _bar(self, minute: Minute, layers: Sequence[Layer]) -> Bar:
        parts, said, y = [], [], float(HEIGHT)
        for field, name, mark in layers:
            if count := getattr(minute, field):
                height = max(LEAST, (HEIGHT - LEAST * len(layers)) * count / self.highest)
                y -= height
                parts.append((mark, round(y, 2), round(height, 2)))
                said.append(f"{number(count)} {name}")
        return Bar(0, f"{moment(minute.began):%H:%M} {', '.join(said)}", parts)


def last_hour(minutes: Sequence[Minute]) -> dict[str, Chart]:
    """The charts of the page."""
    return {
        "sessions": Chart("Sessions", minutes, Layer("sessions", "began", "calm")),
        "accepted": Chart("Accepted", minutes, Layer("accepted", "accepted", "fine")),
        "rejected": Chart(
            "Rejected", minutes, Layer("rejected_by_upstream", "by upstreams", "upstream"),
            Layer("rejected_by_willi", "by Willi", "own"),
        ),
        "refused": Chart("Turned away", minutes, Layer("refused", "turned away", "own")),
        "failed": Chart("Failed", minutes, Layer("failed", "failed", "wrong")),
    }  # fmt: skip


def filled(limit: Limit) -> float:
    """How much of its bar, in percent; one of 5,000 shall be seen."""
    return min(100.0, max(1.0, 100 * limit.used / limit.most)) if limit.most and limit.used else 0.0
