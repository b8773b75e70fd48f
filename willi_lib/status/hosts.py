"""The upstream hosts: the busiest with their names, all others as one.

There may be a million of them in the tables. A host that gets a name keeps it as long as it has something to do, and a
number never goes back: what was counted for the others stays with the others, what a forgotten host had goes with its
name. (A reader of counters would take any other way for thousands of new connections.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from willi_lib.status.counts import CONNECTS, GREETING_SECONDS, GREETINGS, HOST, NUMBER, OTHER, HostState, Key, Row

from .means import HourMean

MAX_HOSTS = 100
MAX_CANDIDATES = 1000  # without a name, that are watched
HOUR = 3600.0  # seconds after which a host without connections may lose its name
PERIOD = 60.0  # seconds between looks whether another host should have a name
MUCH_MORE = 2  # times the connections of one with a name, in a period


@dataclass
class HostTotals:
    """One host, or all others."""

    numbers: dict[Key, float] = field(default_factory=dict)  # the key without the host
    state: HostState = field(default_factory=HostState)
    used: float = 0.0  # when it last was
    recent: float = 0.0  # connections in this period
    greeting: HourMean = field(default_factory=HourMean)


class Hosts:
    """All of them."""

    def __init__(self) -> None:
        self.named: dict[str, HostTotals] = {}
        self.others = HostTotals()
        self._candidates: dict[str, float] = {}  # connections in this period
        self._period_began = 0.0

    def add(self, key: Key, number: float, now: float, past: bool = False) -> None:
        """key: a counter whose first label is the host. past: another status process has counted it."""
        kind, name, *labels = key
        self._look_at_candidates(now)
        host = self._find(name, now)
        short = (kind, *labels)
        host.numbers[short] = host.numbers.get(short, 0) + number
        host.used = now
        if past:
            return
        if kind == CONNECTS:
            host.recent += number
            known = name in self._candidates or len(self._candidates) < MAX_CANDIDATES
            if host is self.others and name != OTHER and known:
                self._candidates[name] = self._candidates.get(name, 0) + number
        elif kind == GREETINGS:
            host.greeting.add(number, 0.0, now)
        elif kind == GREETING_SECONDS:
            host.greeting.add(0.0, number, now)

    def note(self, name: str, state: HostState, now: float) -> None:
        """A worker has reached it, or has not."""
        host = self._find(name, now)
        if host is not self.others:
            host.state.not_after(now)
            host.state.merge(state)
            host.used = now

    def busiest(self) -> list[tuple[str, HostTotals]]:
        """Those with a name."""
        return sorted(self.named.items(), key=lambda item: (-_connections(item[1]), item[0]))

    @property
    def without_name(self) -> int:
        """Hosts that were seen lately among the others, as far as they are watched."""
        return len(self._candidates)

    def _find(self, name: str, now: float) -> HostTotals:
        known = self.named.get(name)
        if known is not None:
            return known
        if name == OTHER:
            return self.others
        if len(self.named) >= MAX_HOSTS:
            idle = min(self.named, key=lambda one: self.named[one].used)
            if self.named[idle].used > now - HOUR:
                return self.others
            del self.named[idle]
        self._candidates.pop(name, None)
        self.named[name] = HostTotals(used=now)
        return self.named[name]

    def _look_at_candidates(self, now: float) -> None:
        """Once in a period: whether one of the others has become much busier than one with a name."""
        if 0 <= now - self._period_began < PERIOD:  # below: the clock was set back
            return
        self._period_began = now
        if self._candidates and len(self.named) >= MAX_HOSTS:
            busiest = max(self._candidates, key=self._candidates.__getitem__)
            idlest = min(self.named, key=lambda one: (self.named[one].recent, self.named[one].used))
            if self._candidates[busiest] > MUCH_MORE * self.named[idlest].recent:
                del self.named[idlest]
                self.named[busiest] = HostTotals(used=now)
        self._candidates = {}
        for host in self.named.values():
            host.recent = 0.0

    def rows(self) -> Iterable[Row]:
        """For a hand-over."""
        for name, host in (*self.named.items(), (OTHER, self.others)):
            yield from ([NUMBER, number, key[0], name, *key[1:]] for key, number in host.numbers.items())
            if name != OTHER:
                yield [HOST, name, *vars(host.state).values()]


def _connections(host: HostTotals) -> float:
    return sum(number for key, number in host.numbers.items() if key[0] == CONNECTS)
