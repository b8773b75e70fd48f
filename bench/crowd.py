"""Normal traffic with and without a crowd of idle and slow clients beside it: `make crowd`.

Two Willis of the same kind, and the crowd is at one of them. A slow client sends an octet a second: half of them
commands, half a message. The same traffic goes to both Willis in turn, a fraction of a second each, in shuffled order;
the crowd stands still while the other one is measured. What counts is the ratio of the median sessions of each pair,
and of these ratios the median: a slow moment of the machine hits both alike. As a control the pairs are measured
before the crowd has come, too.

`python -m bench.crowd hold PORT IDLE SLOW` is the crowd: a process of its own, until its stdin ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import gevent

from .report import Spread
from .rig import Proxy, RigFailed, Upstream, make_certificate, running, say
from .traffic import PATIENCE, RECIPIENT, Client, Load, SessionFailed, hold, let_go, make_message, send

TRAFFIC = Load(2)  # clients, one session after the other
GROUP = 40  # sessions to one of the two
WARM_UP = 10  # groups to each
SOURCES = tuple(f"127.0.1.{number}" for number in range(1, 251))
TICKS = 20  # parts of a second, in each of which a part of the slow ones sends its octet
COMMAND = b"NOOP\r\n"
LINE = b"Subject: a line of sixty octets, so that it takes a minute..\r\n"
ENVELOPE = b"MAIL FROM:<eva@client.example>\r\nRCPT TO:<%b>\r\nDATA" % RECIPIENT
SPARE_DESCRIPTORS = 500
MESSAGE = make_message(TRAFFIC)


@dataclass(frozen=True)
class Comparison:
    """Of so many pairs; p50, p99: ratios, with the crowd to without. times: ms, p50 and p99 of all sessions.

    control: the ratio of the p50 before the crowd came.
    """

    idle: int
    slow: int
    pairs: int
    p50: Spread
    p99: Spread
    control: Spread
    times: dict[str, tuple[float, float]]


# -- the crowd


def be_crowd(port: int, idle: int, slow: int) -> None:
    """Come, say so, and stay until stdin ends; then the end of each idle one is a proper one, or an exception."""
    resting = hold(port, Load(50), idle, SOURCES)
    dripping = hold(port, Load(50), slow, SOURCES)
    in_data = dripping[::2]
    for client in in_data:
        client.command(ENVELOPE, b"250", b"250", b"354")
    print("here", flush=True)
    over = gevent.spawn(gevent.socket.wait_read, 0)
    drip(dripping, over)
    if lost := sum(client.has_ended() for client in dripping):
        raise SessionFailed(f"{lost} of {slow} slow clients were sent away")
    let_go(resting)


def drip(clients: list[Client], over: gevent.Greenlet[..., None]) -> None:
    """An octet a second from each of them: a command, or (every other one) a line of a message.

    After a stop it goes on at the same pace: an octet that was due meanwhile is not sent in addition.
    """
    for tick in itertools.count():
        second, part = divmod(tick, TICKS)
        for number in range(part, len(clients), TICKS):
            text = COMMAND if number % 2 else LINE
            clients[number].drip(text[second % len(text) :][:1])
        over.join(timeout=1 / TICKS)
        if over.ready():
            return


@contextmanager
def crowd(proxy: Proxy, idle: int, slow: int, log: Path) -> Iterator[int]:
    """They are there as long as the block lasts: their process. Raises RigFailed if one of them was not served."""
    command = [sys.executable, "-m", "bench.crowd", "hold", *map(str, (proxy.port, idle, slow))]
    with running(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        if not process.stdout.readline():
            raise RigFailed(f"the crowd did not come:\n{log.read_text(errors='replace')[-2000:]}")
        yield process.pid
        process.stdin.close()
        if process.wait(PATIENCE):
            raise RigFailed(f"the crowd was not served:\n{log.read_text(errors='replace')[-2000:]}")


# -- the measurement


class Pairs:
    """Measurements of two Willis, side by side."""

    def __init__(self, crowded: Proxy, empty: Proxy) -> None:
        self.times: dict[str, list[float]] = {"with": [], "without": []}  # ms
        self.p50: list[float] = []  # ratios, one a pair
        self.p99: list[float] = []
        self._proxies = {"with": crowded, "without": empty}

    def measure(self, holder: int = 0) -> None:
        """One pair. holder: the crowd's process. Raises SessionFailed, OSError."""
        found = {}
        for name in random.sample(["with", "without"], 2):
            if holder:
                os.kill(holder, signal.SIGCONT if name == "with" else signal.SIGSTOP)
            times = [1e3 * seconds for seconds in send(self._proxies[name].port, TRAFFIC, MESSAGE, GROUP).times]
            self.times[name] += times
            found[name] = percentiles(times)
        if holder:
            os.kill(holder, signal.SIGCONT)
        for ratios, mine, other in zip((self.p50, self.p99), found["with"], found["without"], strict=True):
            ratios.append(mine / other)


def percentiles(times: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return cuts[49], cuts[98]


def compare(idle: int, slow: int, pairs: int, descriptors: int, directory: Path) -> Comparison:
    """All of it. Raises RigFailed, SessionFailed, OSError."""
    with ExitStack() as stack:
        make_certificate(directory)
        upstream = stack.enter_context(Upstream.started(directory))
        crowded, empty = [
            stack.enter_context(Proxy.started("Willi-2", upstream, directory, descriptors, lines=1000))
            for _ in range(2)
        ]
        for proxy in (crowded, empty):
            send(proxy.port, TRAFFIC, MESSAGE, WARM_UP * GROUP)
        before, during = Pairs(crowded, empty), Pairs(crowded, empty)
        for _ in range(pairs):
            before.measure()
        say(f"{pairs} pairs without a crowd: {Spread.of(before.p50)}")
        with crowd(crowded, idle, slow, directory / "crowd.log") as holder:
            for _ in range(pairs):
                during.measure(holder)
    times = {name: percentiles(each) for name, each in during.times.items()}
    return Comparison(idle, slow, pairs, Spread.of(during.p50), Spread.of(during.p99), Spread.of(before.p50), times)


def main() -> int:
    """Compare, and print the figures as JSON; the exit status."""
    if sys.argv[1:2] == ["hold"]:
        be_crowd(*map(int, sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--idle", type=int, default=5000, help="clients that say EHLO and nothing more (5000)")
    parser.add_argument("--slow", type=int, default=500, help="clients that send an octet a second (500)")
    parser.add_argument("--pairs", type=int, default=60, help="of measurements (60)")
    arguments = parser.parse_args()
    needed = 2 * (arguments.idle + arguments.slow + SPARE_DESCRIPTORS)
    try:
        raise_descriptors(needed)
        with tempfile.TemporaryDirectory(prefix="willi-crowd-") as name:
            found = compare(arguments.idle, arguments.slow, arguments.pairs, needed, Path(name))
    except (RigFailed, SessionFailed, OSError, ValueError) as failure:
        say(f"\nFAILED: {failure}")
        return 1
    print(json.dumps(asdict(found), indent=1))
    return 0


def raise_descriptors(needed: int) -> None:
    """Ours are the clients', and Willi inherits the limit. Raises ValueError if it may not be so high."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, hard)))


if __name__ == "__main__":
    sys.exit(main())
