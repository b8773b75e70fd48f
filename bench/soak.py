"""Willi under full load for as long as you like, and what it holds meanwhile: `make soak MINUTES=30`.

Well-behaved clients of several kinds work side by side with some that hang up within a message, are refused, or make
nothing but errors. Every few seconds memory and descriptors of master and workers are read. In the end all messages
must have arrived as often as they were taken, none that was broken off, and nothing may have grown: else it exits with
status 1. soak.json and soak.svg show it either way.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import gevent

from .report import STYLE, WIDTH, svg_text
from .rig import Proxy, RigFailed, Upstream, Use, machine, make_certificate, say, versions
from .traffic import PATIENCE, RECIPIENT, Client, Load, SessionFailed, make_message, send

LOADS = {
    "plain": Load(20),
    "STARTTLS": Load(10, tls=True),
    "ten messages": Load(5, messages=10),
    "1 MiB": Load(2, size=1 << 20),
}
BROKEN_OFF = b"Subject: broken off\r\n\r\nnobody shall ever read this\r\n"
ENVELOPE = b"MAIL FROM:<eva@client.example>\r\nRCPT TO:<%b>\r\nDATA"
STRANGER = b"somebody@elsewhere.example"  # nobody's: 554
MOST_DESCRIPTORS = 4096
INTERVAL = 10.0  # seconds between two looks, if there is time for as many as
FEWEST_LOOKS = 20
WARM_UP = 0.2  # of the time, for caches to fill
MAY_GROW = 1.05  # the last quarter to the first one, after that
MAY_GROW_BY = 2.0  # MiB; less is no growth, whatever the ratio
TIME_TO_REST = 4.0  # seconds until the last connections are closed; Willi waits 2 s for who does not read


class Users:
    """The clients at work: what they did, and what went wrong."""

    def __init__(self, port: int) -> None:
        self.sessions = 0
        self.errors: Counter[str] = Counter()
        self.times: list[float] = []  # seconds of plain sessions since somebody last looked
        self.expected: Counter[int] = Counter()  # messages that were taken, by their checksum
        self._port = port
        self._over = False

    def start(self) -> list[gevent.Greenlet[..., None]]:
        """All of them, until `end`."""
        rude = (self._break_off, self._hang_up_in_data, self._be_refused, self._err)
        work: list[Callable[[], None]] = [*rude]
        for kind, load in LOADS.items():
            work += [partial(self._send, kind)] * load.clients
        return [gevent.spawn(self._again_and_again, session) for session in work]

    def end(self) -> None:
        """Let each finish its session."""
        self._over = True

    def _again_and_again(self, session: Callable[[], None]) -> None:
        while not self._over:
            try:
                with gevent.Timeout(PATIENCE, SessionFailed(f"a session took more than {PATIENCE:g} s")):
                    session()
                self.sessions += 1
            except (SessionFailed, OSError) as failure:
                self.errors[str(failure)] += 1
                gevent.sleep(0.1)  # a Willi that is gone fails at once

    def _send(self, kind: str) -> None:
        load = LOADS[kind]
        message = MESSAGES[kind]
        sent = send(self._port, Load(1, load.messages, load.size, tls=load.tls), message, 1)
        self.expected[zlib.crc32(message)] += load.messages
        if kind == "plain":
            self.times += sent.times

    def _break_off(self) -> None:
        client = Client(self._port)
        client.command(ENVELOPE % RECIPIENT, b"250", b"250", b"354")
        client.close()

    def _hang_up_in_data(self) -> None:
        client = Client(self._port)
        client.command(ENVELOPE % RECIPIENT + b"\r\n" + BROKEN_OFF * 100, b"250", b"250", b"354")
        client.close()

    def _be_refused(self) -> None:
        client = Client(self._port)
        client.command(ENVELOPE % STRANGER + b"\r\nQUIT", b"250", b"554", b"554", b"221")
        client.close()

    def _err(self) -> None:
        client = Client(self._port)
        client.command(b"NOSUCH\r\nMAIL FROM:<\r\nDATA\r\n" + b"x" * 3000 + b"\r\nQUIT", *4 * [b"50"], b"221")
        client.close()


MESSAGES = {kind: make_message(load) for kind, load in LOADS.items()}


@dataclass(frozen=True)
class Look:
    """What was seen at one moment. Lists: the master, then the workers; MiB, descriptors. p50: ms, plain sessions."""

    seconds: float
    pss: list[float]
    private: list[float]
    descriptors: list[int]
    sessions: float  # a second, since the look before
    p50: float | None
    errors: int  # since the look before

    def __str__(self) -> str:
        return (
            f"{self.seconds:6.0f} s: {sum(self.pss):.1f} MiB, {sum(self.descriptors)} descriptors, "
            f"{self.sessions:.0f} sessions a second, {self.errors} errors"
        )


@dataclass(frozen=True)
class Soak:
    """One run. at_rest: descriptors of master and workers before the first client, and after the last."""

    date: str
    command: str
    minutes: float
    machine: dict[str, str | int]
    versions: dict[str, str]
    sessions: int
    messages: int
    errors: dict[str, int]
    at_rest: list[list[int]]
    looks: list[Look] = field(repr=False)
    faults: list[str]

    @property
    def where(self) -> list[str]:
        """When, on what, with which versions."""
        numbers = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return [
            f"{self.date}, {self.command}: {self.sessions:,} sessions, {self.messages:,} messages, "
            f"{sum(self.errors.values())} errors",
            "{cpus} x {cpu}, {system}, Linux {kernel}".format(**self.machine),
            numbers,
        ]


def growth_of(looks: Sequence[Look]) -> list[str]:
    """What has grown: a fault for each. Medians of the first and the last quarter, after the warm-up.

    Not PSS: a process's part of what is shared grows when others who share it end, such as another Python.
    """
    warm = looks[round(len(looks) * WARM_UP) :]
    quarter = max(1, len(warm) // 4)
    first, last = warm[:quarter], warm[-quarter:]
    curves: dict[str, Callable[[Look], float]] = {
        "MiB of private memory": lambda look: sum(look.private),
        "descriptors": lambda look: sum(look.descriptors),
    }
    faults = []
    for name, value in curves.items():
        before, after = (statistics.median(map(value, part)) for part in (first, last))
        margin = MAY_GROW_BY if "MiB" in name else sum(load.clients for load in LOADS.values())
        if after > before * MAY_GROW and after > before + margin:
            faults.append(f"{name}: from {before:.1f} to {after:.1f}")
    return faults


def run(minutes: float, directory: Path) -> Soak:
    """Everything. Raises RigFailed, OSError."""
    with ExitStack() as stack:
        make_certificate(directory)
        upstream = stack.enter_context(Upstream.started(directory))
        proxy = stack.enter_context(Proxy.started("Willi-2", upstream, directory, MOST_DESCRIPTORS, lines=1000))
        resting = rest(proxy)
        users = Users(proxy.port)
        greenlets = users.start()
        looks = look_on(users, proxy, minutes * 60)
        users.end()
        gevent.joinall(greenlets, timeout=PATIENCE + 5)
        rested = rest(proxy)
        faults = growth_of(looks) + [f"{error}: {count} times" for error, count in users.errors.items()]
        if rested != resting:
            faults.append(f"descriptors at rest: {resting} before, {rested} after")
        arrived = upstream.received()
        if arrived != users.expected:
            faults.append(f"{users.expected.total()} messages were taken, {sum(arrived.values())} arrived")
        faults += complaints(directory)
    command = f"make soak MINUTES={minutes:g}"
    return Soak(
        time.strftime("%Y-%m-%d"), command, minutes, machine(), versions(), users.sessions, users.expected.total(),
        dict(users.errors), [resting, rested], looks, faults,
    )  # fmt: skip


def look_on(users: Users, proxy: Proxy, seconds: float) -> list[Look]:
    """Look again and again, for so long. Raises RigFailed if a process is not the one it was."""
    looks: list[Look] = []
    interval = min(INTERVAL, seconds / FEWEST_LOOKS)
    processes = [use.process for use in proxy.uses()]
    begun = last = time.monotonic()
    sessions = errors = 0
    while last - begun < seconds:
        gevent.sleep(interval)
        uses, now = proxy.uses(), time.monotonic()
        if [use.process for use in uses] != processes:
            raise RigFailed(f"a process has ended: there were {processes}, there are {uses}")
        times, users.times = users.times, []
        looks.append(Look(
            round(now - begun, 1),
            [round(use.pss / 1024, 2) for use in uses],
            [round(use.private / 1024, 2) for use in uses],
            descriptors_of(uses),
            round((users.sessions - sessions) / (now - last), 1),
            round(1e3 * statistics.median(times), 1) if times else None,
            users.errors.total() - errors,
        ))  # fmt: skip
        sessions, errors, last = users.sessions, users.errors.total(), now
        say(str(looks[-1]))
    return looks


def descriptors_of(uses: Sequence[Use]) -> list[int]:
    """Of each process."""
    return [use.descriptors for use in uses]


def rest(proxy: Proxy) -> list[int]:
    """The descriptors of each process without clients: the fewest within TIME_TO_REST."""
    deadline, fewest = time.monotonic() + TIME_TO_REST, descriptors_of(proxy.uses())
    while time.monotonic() < deadline:
        gevent.sleep(0.1)
        fewest = [min(both) for both in zip(fewest, descriptors_of(proxy.uses()), strict=True)]
    return fewest


def complaints(directory: Path) -> list[str]:
    """The first lines at error level, and whatever is no log line."""
    found = []
    for log in directory.glob("*/log"):
        with log.open(encoding="utf-8", errors="replace") as lines:
            bad = (line.rstrip() for line in lines if not line.startswith("t=") or " lvl=error " in line)
            found += list(islice(bad, 10))
    return found


# -- the picture

LEFT, RIGHT, PANEL, STEP = 70, 24, 110, 150
LINES = ("#1a7f37", "#0969da", "#bc4c00")  # the master, the workers; visible on white and on black


def picture(soak: Soak) -> str:
    """SVG: memory, descriptors, and sessions a second, over the time."""
    names = ["master", *(f"worker {number}" for number in range(1, len(soak.looks[0].pss)))]
    panels: list[tuple[str, Sequence[Sequence[float]], Sequence[str]]] = [
        ("Memory, MiB (PSS)", list(map(list, zip(*(look.pss for look in soak.looks), strict=True))), names),
        ("Descriptors", list(map(list, zip(*(look.descriptors for look in soak.looks), strict=True))), names),
        ("Sessions a second", [[look.sessions for look in soak.looks]], ["all"]),
    ]
    seconds = [look.seconds for look in soak.looks]
    parts = [_panel(56 + STEP * number, seconds, *panel) for number, panel in enumerate(panels)]
    below = 56 + STEP * len(panels) + 14
    parts += [svg_text(16, below + 14 * number, line, "small") for number, line in enumerate(soak.where)]
    height = below + 14 * len(soak.where)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>What Willi holds under full load</title>
<style>{STYLE}
polyline {{ fill: none; stroke-width: 1.5 }} .axis {{ stroke: #afb8c1 }}</style>
<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>
{svg_text(16, 30, f"What Willi holds during {soak.minutes:g} minutes of full load", "title")}
{"".join(parts)}</svg>
"""


def _panel(
    top: int, seconds: Sequence[float], title: str, curves: Sequence[Sequence[float]], names: Sequence[str]
) -> str:
    """Curves over one axis of time; each scale begins at 0, so that flat looks flat."""
    most = max(max(curve) for curve in curves) * 1.1 or 1.0
    bottom, width = top + PANEL, WIDTH - LEFT - RIGHT
    parts = [
        svg_text(16, top, title, "title"),
        f'<path class="axis" d="M{LEFT} {top + 10}V{bottom}H{WIDTH - RIGHT}" fill="none"/>\n',
        svg_text(LEFT - 8, top + 20, f"{most:.0f}", "name"),
        svg_text(LEFT - 8, bottom, "0", "name"),
        svg_text(WIDTH - RIGHT - 50, bottom + 14, f"{seconds[-1] / 60:.1f} min", "small"),
    ]
    for number, (curve, name) in enumerate(zip(curves, names, strict=True)):
        points = " ".join(
            f"{LEFT + width * second / seconds[-1]:.1f},{bottom - (PANEL - 10) * value / most:.1f}"
            for second, value in zip(seconds, curve, strict=True)
        )
        colour, x = LINES[number % len(LINES)], LEFT + 170 * (number + 1)
        parts += [
            f'<polyline points="{points}" stroke="{colour}"/>\n',
            f'<rect x="{x - 14}" y="{top - 6}" width="10" height="4" fill="{colour}"/>\n',
            svg_text(x, top, f"{name}: {curve[0]:.0f} to {curve[-1]:.0f}", "small"),
        ]
    return "".join(parts)


def main() -> int:
    """Run, write, tell; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of full load (30)")
    parser.add_argument("--results", type=Path, default=Path("docs"), help="where soak.json and soak.svg go (docs)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_DESCRIPTORS), hard))
    try:
        with tempfile.TemporaryDirectory(prefix="willi-soak-") as name:
            soak = run(arguments.minutes, Path(name))
    except (RigFailed, OSError) as failure:
        say(f"\nFAILED: {failure}")
        return 1
    (arguments.results / "soak.json").write_text(json.dumps(asdict(soak), indent=1) + "\n", encoding="utf-8")
    (arguments.results / "soak.svg").write_text(picture(soak), encoding="utf-8")
    print("\n".join(soak.where))
    for fault in soak.faults:
        say(f"FAULT: {fault}")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
