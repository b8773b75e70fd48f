"""Willi, nginx mail, HAProxy and no proxy at all, side by side.

All of them run at the same time; in each round each of them gets the same load, in shuffled order, so that a slow
moment of the machine hits all alike. The figures are medians of the rounds, the ratios medians of the ratios of each
round. A session that fails, or a message that is lost, changed or doubled, ends it with exit status 1 and no results.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import report
from .rig import KINDS, Proxy, RigFailed, Upstream, find, machine, make_certificate, say, versions
from .traffic import Load, Sent, SessionFailed, hold, let_go, make_message, send

SETTLE = 0.05  # seconds for a proxy to close what its clients have closed
IDLE_SETTLE = 1.0  # seconds until its memory is looked at
MOST_DESCRIPTORS = 20_000  # for one process; nginx reserves memory for each
WARM_UP = 0.25  # of a round's sessions, before the first one


@dataclass(frozen=True)
class Plan:
    """A scenario. sessions: in each round for each proxy; idle: they are held open, once, and memory is what counts."""

    title: str
    load: Load
    sessions: int
    idle: bool = False

    @property
    def unit(self) -> str:
        if self.idle:
            return "KiB a connection"
        return "CPU s a GB" if self.load.size > 1 << 20 else "CPU ms a session"

    def with_clients(self, clients: int) -> Plan:
        """The same with so many clients at a time; 0: its own."""
        return replace(self, load=replace(self.load, clients=clients or self.load.clients))

    def cost(self, seconds: float, sessions: int, message: bytes) -> float:
        """CPU seconds of so many sessions, in the unit."""
        messages = sessions * self.load.messages
        return seconds * 1e9 / (messages * len(message)) if self.load.size > 1 << 20 else seconds * 1e3 / sessions


PLANS = {
    "plain": Plan("4 KiB a session", Load(50), 400),
    "tlsc": Plan("4 KiB a session, STARTTLS with the client", Load(50, tls=True), 200),
    "ten": Plan("Ten messages of 4 KiB a session", Load(50, messages=10), 100),
    "big": Plan("25 MiB a session, an attachment", Load(4, size=25 << 20), 8),
    "bigtext": Plan("25 MiB a session, text with dots", Load(4, size=25 << 20, text=True), 8),
    "one": Plan("4 KiB a session, one client at a time", Load(1), 25),
    "idle": Plan("Idle connections", Load(50), 5000, idle=True),
    "idletls": Plan("Idle connections after STARTTLS", Load(50, tls=True), 5000, idle=True),
}


@dataclass
class Slices:
    """What the rounds have shown of one proxy in one scenario. CPU in seconds; cost in the unit of the scenario."""

    costs: list[float] = field(default_factory=list)
    user: float = 0.0
    system: float = 0.0
    rates: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Bench:
    """One run: the rig, what was asked for, and what was found."""

    def __init__(self, arguments: argparse.Namespace, directory: Path, upstream: Upstream, descriptors: int) -> None:
        self._arguments = arguments
        self._directory = directory
        self._upstream = upstream
        self._descriptors = descriptors
        self._plans = {name: PLANS[name].with_clients(arguments.clients) for name in arguments.scenarios}
        self._messages = {name: make_message(plan.load) for name, plan in self._plans.items()}
        self._found = {
            name: {kind: Slices() for kind in arguments.proxies if fits(kind, plan)}
            for name, plan in self._plans.items()
        }
        self.rounds = 0
        self.memory: dict[str, tuple[float, float]] = {}  # MiB, before the first round and after the last

    def run(self) -> dict[str, report.Scenario]:
        """Everything. Raises RigFailed, SessionFailed, OSError."""
        for name, plan in self._plans.items():
            if plan.idle:
                for kind in self._found[name]:
                    self._idle(name, kind)
        loads = [name for name, plan in self._plans.items() if not plan.idle]
        if loads:
            self._run_rounds(loads)
        return {name: self._summary(name) for name in self._plans}

    def _run_rounds(self, loads: list[str]) -> None:
        with ExitStack() as stack:
            proxies = {kind: stack.enter_context(self._started(kind)) for kind in self._arguments.proxies}
            for name in loads:
                for kind in self._found[name]:
                    self._send(name, proxies[kind], WARM_UP)
            before = {kind: proxy.memory() for kind, proxy in proxies.items()}
            deadline = time.monotonic() + self._arguments.minutes * 60
            while self.rounds < self._arguments.rounds and (not self.rounds or time.monotonic() < deadline):
                self.rounds += 1
                say(f"round {self.rounds} of {self._arguments.rounds}")
                for name in loads:
                    for kind in random.sample(list(self._found[name]), len(self._found[name])):
                        self._slice(name, proxies[kind])
            self.memory = {kind: (before[kind] / 1024, proxy.memory() / 1024) for kind, proxy in proxies.items()}
        if self.rounds < self._arguments.rounds:
            say(f"{self._arguments.minutes:g} minutes are over: {self.rounds} rounds\n")

    def _started(self, kind: str) -> AbstractContextManager[Proxy]:
        return Proxy.started(kind, self._upstream, self._directory, self._descriptors, self._arguments.lines)

    def _slice(self, name: str, proxy: Proxy) -> None:
        """One measured load."""
        before = proxy.cpu()
        sessions, sent = self._send(name, proxy)
        cpu = proxy.cpu() - before
        slices = self._found[name][proxy.name]
        slices.costs.append(self._plans[name].cost(cpu.total, sessions, self._messages[name]))
        slices.user += cpu.user
        slices.system += cpu.system
        slices.rates.append(sessions / sent.seconds)
        slices.times += sent.times

    def _send(self, name: str, proxy: Proxy, part: float = 1.0) -> tuple[int, Sent]:
        """A load, or a part of it, and whether all of it has arrived: how many sessions, and their times."""
        plan, message = self._plans[name], self._messages[name]
        sessions = max(2, plan.load.clients, round(plan.sessions * self._arguments.size * part))
        try:
            sent = send(proxy.port, plan.load, message, sessions)
        except (SessionFailed, OSError) as failure:
            raise SessionFailed(f"{name}, {proxy.name}: a session failed: {failure}") from None
        arrived, expected = self._upstream.received(), {zlib.crc32(message): sessions * plan.load.messages}
        if arrived != expected:
            raise SessionFailed(
                f"{name}, {proxy.name}: {sum(expected.values())} messages were sent and taken; at the upstream arrived "
                f"{arrived.get(zlib.crc32(message), 0)} of them unchanged, and {sum(arrived.values())} in all"
            )
        time.sleep(SETTLE)
        return sessions, sent

    def _idle(self, name: str, kind: str) -> None:
        """The memory of idle sessions, of a proxy that has just started and served a few."""
        plan = self._plans[name]
        sessions = max(2, min(round(plan.sessions * self._arguments.size), self._descriptors // 2 - 200))
        say(f"{name}: {sessions} connections to {kind}")
        with self._started(kind) as proxy:
            try:
                send(proxy.port, Load(1), make_message(Load(1)), 20)
                before = proxy.memory()
                held = hold(proxy.port, plan.load, sessions)
                time.sleep(IDLE_SETTLE)
                memory = proxy.memory() - before
                let_go(held)
            except (SessionFailed, OSError) as failure:
                raise SessionFailed(f"{name}, {kind}: an idle session failed: {failure}") from None
        self._upstream.received()  # those few
        self._found[name][kind].costs.append(memory / sessions)

    def _summary(self, name: str) -> report.Scenario:
        plan, found = self._plans[name], self._found[name]
        return report.Scenario(plan.title, plan.unit, {kind: summary(kind, found) for kind in found})


def summary(kind: str, found: dict[str, Slices]) -> report.Figures:
    """Of one proxy; the others are there for the ratios, which are taken round by round."""
    own = found[kind]
    ratios = {
        peer: report.Spread.of([mine / its for mine, its in zip(own.costs, found[peer].costs, strict=True)])
        for peer in report.PEERS
        if peer in found and peer != kind and any(own.costs)
    }
    cost = report.Spread.of(own.costs) if any(own.costs) else None
    if not own.times:
        return report.Figures(cost, ratios=ratios)
    kernel = own.system / (own.user + own.system) if own.user + own.system else None
    percentiles = statistics.quantiles((1e3 * seconds for seconds in own.times), n=100, method="inclusive")
    return report.Figures(cost, kernel, statistics.median(own.rates), percentiles[49], percentiles[98], ratios)


def available() -> list[str]:
    """The rows of the table on this machine."""
    processors = len(os.sched_getaffinity(0))
    names = [name for name, kind in KINDS.items() if not kind.needs or find(kind.needs)]
    return [name for name in names if name != "Willi-2" or processors > 1]


def fits(kind: str, plan: Plan) -> bool:
    """Whether it can do it: STARTTLS is not for all, and idle memory is for processes."""
    return (KINDS[kind].tls or not plan.load.tls) and (KINDS[kind].command is not None or not plan.idle)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(PLANS)}; all without")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is measured (15)")
    parser.add_argument("--minutes", type=float, default=5.0, help="no round begins later (5)")
    parser.add_argument("--size", type=float, default=1.0, metavar="PART", help="of the usual sessions of a round (1)")
    parser.add_argument("--proxies", type=lambda text: text.split(","), help=f"of {','.join(KINDS)}; all without")
    parser.add_argument("--clients", type=int, default=0, help="at a time, instead of those of the scenario")
    parser.add_argument("--lines", type=int, default=2, help="of Willi's table (2)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where results.* go (bench)")
    arguments = parser.parse_args()
    arguments.scenarios = arguments.scenarios or list(PLANS)
    arguments.proxies = arguments.proxies or available()
    for asked, known in ((arguments.scenarios, list(PLANS)), (arguments.proxies, available())):
        if unknown := set(asked) - set(known):
            parser.error(f"not here: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if min(arguments.rounds, arguments.size, arguments.lines) <= 0:
        parser.error("--rounds, --size and --lines must be more than 0")
    return arguments


def main() -> int:
    """Measure, print, write; the exit status."""
    arguments = parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for missing in KINDS.keys() - set(available()):
        say(f"{missing} is not measured: it is not installed" if KINDS[missing].needs else f"{missing}: one CPU only")
    try:
        with tempfile.TemporaryDirectory(prefix="willi-bench-") as name, ExitStack() as stack:
            directory = Path(name)
            make_certificate(directory)
            upstream = stack.enter_context(Upstream.started(directory))
            bench = Bench(arguments, directory, upstream, min(hard, MOST_DESCRIPTORS))
            scenarios = bench.run()
    except (RigFailed, SessionFailed, OSError, subprocess.SubprocessError) as failure:
        say(f"\nFAILED: {failure}")
        return 1
    command = "python -m bench " + " ".join(sys.argv[1:])
    today, numbers = time.strftime("%Y-%m-%d"), versions("nginx", "haproxy")
    results = report.Results(today, command.strip(), bench.rounds, machine(), numbers, scenarios, bench.memory)
    report.write(results, arguments.results)
    print(report.table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
