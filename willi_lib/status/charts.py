"""The numbers of the charts of the last hour: what page.html draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .overview import Minute
from .totals import MINUTES
from .words import moment, number

STEP = 4  # units of the picture for a minute, a gap of 1 included
HEIGHT = 40  # units
LEAST = 1.5  # units: one refusal beside a thousand shall be seen

Part = tuple[str, float, float]  # of a bar: its mark, y and height


class Layer(NamedTuple):
    """What is counted; layers are stacked."""

    field: str  # of a Minute
    name: str  # as in: 3 accepted
    mark: str  # its class in page.css


class Chart:
    def __init__(self, name: str, minutes: Sequence[Minute], *layers: Layer) -> None:
        self.name = name
        self.sums = {layer.mark: sum(getattr(minute, layer.field) for minute in minutes) for layer in layers}
        self.counts = [sum(getattr(minute, layer.field) for layer in layers) for minute in minutes]
        self.sum, self.highest = sum(self.counts), max(self.counts, default=0)
        self.label = f"{name} in each of the last {MINUTES} minutes: {number(self.sum)} in all, "
        self.label += f"at most {number(self.highest)} in a minute"
        self.bars = list(self._bars(minutes, layers))

    def _bars(self, minutes: Sequence[Minute], layers: Sequence[Layer]) -> Iterator[tuple[int, str, list[Part]]]:
        """x, the text and the parts from below, of each minute in which something was counted."""
        for place, minute in enumerate(minutes, MINUTES - len(minutes)):
            parts, said, y = [], [], float(HEIGHT)
            for field, name, mark in layers:
                if count := getattr(minute, field):
                    height = max(LEAST, (HEIGHT - LEAST * len(layers)) * count / self.highest)
                    y -= height
                    parts.append((mark, round(y, 2), round(height, 2)))
                    said.append(f"{number(count)} {name}")
            if parts:
                yield STEP * place, f"{moment(minute.began):%H:%M} {', '.join(said)}", parts


def last_hour(minutes: Sequence[Minute]) -> dict[str, Chart]:
    by_upstreams = Layer("rejected_by_upstream", "by upstreams", "upstream")
    by_willi = Layer("rejected_by_willi", "by Willi", "own")
    return {
        "sessions": Chart("Sessions", minutes, Layer("sessions", "began", "calm")),
        "accepted": Chart("Accepted", minutes, Layer("accepted", "accepted", "fine")),
        "rejected": Chart("Rejected", minutes, by_upstreams, by_willi),
        "refused": Chart("Turned away", minutes, Layer("refused", "turned away", "own")),
        "failed": Chart("Failed", minutes, Layer("failed", "failed", "wrong")),
    }
