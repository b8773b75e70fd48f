"""Small charts as inline SVG: classes and presentation attributes only, so that a strict policy lets them pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, element
from .words import moment, number, several

MINUTES = 60
STEP = 4  # units of the picture for a minute, a gap of 1 included
HEIGHT = 40
LEAST = 1.5  # units: one refusal beside a thousand shall be seen
BAR = 100  # units, the whole of a limit


@dataclass(frozen=True)
class Layer:
    """What is counted, minute by minute; layers are stacked."""

    name: str  # as in: 3 accepted
    class_: str
    counts: Sequence[int]


def minutes(what: str, began: Sequence[float], layers: Sequence[Layer]) -> Markup:
    """A bar for each of the last minutes, the last one at the right. what: as in `messages accepted`."""
    stacks = list(zip(*(layer.counts for layer in layers), strict=True))[-MINUTES:]
    began = began[-MINUTES:]
    highest = max(map(sum, stacks), default=0)
    first = MINUTES - len(stacks)
    bars = [
        _stack(first + place, moment(at).strftime("%H:%M"), layers, stack, highest)
        for place, (at, stack) in enumerate(zip(began, stacks, strict=True))
        if any(stack)
    ]
    base = element("line", x1=0, x2=MINUTES * STEP, y1=HEIGHT, y2=HEIGHT, class_="base")
    label = f"{what} in each of the last {MINUTES} minutes: {number(sum(map(sum, stacks)))} in all, "
    label += f"at most {number(highest)} in a minute"
    view = f"0 0 {MINUTES * STEP} {HEIGHT}"
    return element(
        "svg", bars, base, class_="chart", viewBox=view, preserveAspectRatio="none", role="img", aria_label=label
    )


def _stack(place: int, clock: str, layers: Sequence[Layer], counts: Sequence[int], highest: int) -> Markup:
    parts: list[Markup] = []
    y = float(HEIGHT)
    for layer, count in zip(layers, counts, strict=True):
        if count:
            height = max(LEAST, (HEIGHT - LEAST * len(layers)) * count / highest)
            y -= height
            parts.append(_rect(place * STEP, y, STEP - 1, height, layer.class_))
    told = ", ".join(f"{number(count)} {layer.name}" for layer, count in zip(layers, counts, strict=True) if count)
    return element("g", element("title", f"{clock} {told}"), parts)


def bar(used: int, most: int, class_: str) -> Markup:
    """How near a limit is; the numbers stand beside it."""
    filled = min(BAR, max(1, BAR * used / most)) if most and used else 0  # one of 5,000 shall be seen
    shape = [_rect(0, 0, BAR, 8, "room"), _rect(0, 0, filled, 8, class_)]
    label = f"{several(used, 'is', 'are')} used of {number(most)}"
    return element(
        "svg", shape, class_="bar", viewBox=f"0 0 {BAR} 8", preserveAspectRatio="none", role="img", aria_label=label
    )


def _rect(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    def short(value: float) -> str:
        return f"{value:.2f}".rstrip("0").rstrip(".")

    return element("rect", x=short(x), y=short(y), width=short(width), height=short(height), class_=class_)
