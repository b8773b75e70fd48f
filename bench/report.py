"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

PEERS = ("nginx", "HAProxy")  # the ratios are to them


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
        return cls(median, low, high)


@dataclass(frozen=True)
class Figures:
    """One proxy in one scenario.

    cost: in the unit of the scenario, without a proxy None; kernel: the part of the CPU time that is the kernel's;
    sessions: a second; p50, p99: milliseconds of a session; ratios: of the cost, to each peer.
    """

    cost: Spread | None
    kernel: float | None = None
    sessions: float | None = None
    p50: float | None = None
    p99: float | None = None
    ratios: dict[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """What was done, what a cost is counted in, and the figures by proxy."""

    title: str
    unit: str
    figures: dict[str, Figures]


@dataclass(frozen=True)
class Results:
    """One run of the whole. memory: MiB of each proxy, before the first round and after the last."""

    date: str
    command: str
    rounds: int
    machine: dict[str, str | int]
    versions: dict[str, str]
    scenarios: dict[str, Scenario]
    memory: dict[str, tuple[float, float]]

    @property
    def where(self) -> str:
        """When, on what, and with which versions."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        machine = "{cpus} x {cpu}, {system}, Linux {kernel}".format(**self.machine)
        return f"{self.date}, {self.command}\n{machine}\n{versions}"

    @property
    def proxies(self) -> list[str]:
        """In their order, each once."""
        return list(dict.fromkeys(name for scenario in self.scenarios.values() for name in scenario.figures))


def write(results: Results, directory: Path) -> None:
    """results.json and results.svg."""
    (directory / "results.json").write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    (directory / "results.svg").write_text(picture(results), encoding="utf-8")


# -- the table


def table(results: Results) -> str:
    """For the terminal: costs with ratios, then sessions a second with times."""
    costs = list(_cost_rows(results))
    times = list(_time_rows(results))
    text = f"{results.where}\n\nCPU time of all processes of the proxy; memory: PSS\n\n{_aligned(costs)}\n"
    if times[1:]:
        text += f"\nSessions a second, p50 / p99 of a session in ms\n\n{_aligned(times)}\n"
        text += "\nMiB before the first round and after the last: "
        text += ", ".join(f"{name} {before:.1f} and {after:.1f}" for name, (before, after) in results.memory.items())
    return text


def _cost_rows(results: Results) -> Iterator[list[str]]:
    proxies = [name for name in results.proxies if name != "direct"]
    yield ["", "", *proxies, *(f"Willi : {peer}" for peer in PEERS)]
    for name, scenario in results.scenarios.items():
        cells = [scenario.figures.get(proxy, Figures(None)) for proxy in proxies]
        ratios = scenario.figures.get("Willi", Figures(None)).ratios
        yield [
            name, scenario.unit,
            *(f"{cell.cost.median:#.3g}" if cell.cost else "-" for cell in cells),
            *(f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" if (r := ratios.get(peer)) else "-" for peer in PEERS),
        ]  # fmt: skip


def _time_rows(results: Results) -> Iterator[list[str]]:
    yield ["", *results.proxies]
    for name, scenario in results.scenarios.items():
        cells = [scenario.figures.get(proxy, Figures(None)) for proxy in results.proxies]
        if any(cell.sessions for cell in cells):
            yield [name, *(f"{c.sessions:.0f}, {c.p50:.1f} / {c.p99:.1f}" if c.sessions else "-" for c in cells)]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# -- the picture

WIDTH, LEFT, BAR, GAP, TOP = 700, 90, 14, 4, 84
LEGEND = (
    "CPU time of all its processes, and memory of idle connections: short is good. Willi-2 has two workers. nginx is",
    "its mail proxy, in C. HAProxy only copies octets, without SMTP: nothing between client and server costs less.",
)
COLOURS = {"Willi": "willi", "Willi-2": "willi two"}  # classes of the style; the others are grey
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .page { fill: #ffffff }
.small { font-size: 11px; fill: #59636e } .title { font-weight: 600 }
.bar { fill: #afb8c1 } .willi { fill: #1a7f37 } .two { fill: #6fbf82 }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .page { fill: #0d1117 } .small { fill: #9198a1 }
.bar { fill: #59636e } .willi { fill: #3fb950 } .two { fill: #2b7a3a } }"""


def picture(results: Results) -> str:
    """SVG: a block of bars for each scenario, each with a scale of its own; short bars are good."""
    y, parts = TOP, []
    for scenario in results.scenarios.values():
        block, height = _block(scenario, y)
        parts.append(block)
        y += height
    lines = results.where.split("\n")
    parts += [svg_text(16, y + 14 * number, line, "small") for number, line in enumerate(lines)]
    height = y + 14 * len(lines)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>What a session costs: Willi, nginx mail and HAProxy</title>
<style>{STYLE}</style>
<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>
{svg_text(16, 30, "What a session costs", "title")}
{svg_text(16, 50, LEGEND[0], "small")}{svg_text(16, 64, LEGEND[1], "small")}
{"".join(parts)}</svg>
"""


def _block(scenario: Scenario, y: int) -> tuple[str, int]:
    """The bars of one scenario from this height on, and how high they are."""
    costs = {name: figures.cost.median for name, figures in scenario.figures.items() if figures.cost}
    scale = (WIDTH - LEFT - 150) / max(costs.values(), default=1)
    parts = [svg_text(16, y + 12, f"{scenario.title}: {scenario.unit}", "title")]
    for number, (name, cost) in enumerate(costs.items()):
        top = y + 22 + number * (BAR + GAP)
        colour = COLOURS.get(name, "")
        ratio = scenario.figures[name].ratios.get(PEERS[0]) if name == "Willi" else None
        label = f"{cost:#.3g}" + (f", {ratio.median:.2f} x {PEERS[0]}" if ratio else "")
        shape = f'x="{LEFT}" y="{top}" width="{cost * scale:.1f}" height="{BAR}" rx="2"'
        parts += [
            svg_text(LEFT - 8, top + 13, name, "name"),
            f'<rect class="bar {colour}" {shape}/>\n',
            svg_text(LEFT + cost * scale + 8, top + 13, label, ""),
        ]
    return "".join(parts), 22 + len(costs) * (BAR + GAP) + 20


def svg_text(x: float, y: float, text: str, style: str) -> str:
    """A line of text; style "name": it ends at x."""
    anchor = ' text-anchor="end"' if style == "name" else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}"{anchor}>{escape(text)}</text>\n'
