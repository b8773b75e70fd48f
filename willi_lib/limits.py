"""How many connections at a time, and how many a minute from one address.

Pure bookkeeping of one worker: the worker asks at accept, or after the PROXY header.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, deque
from time import monotonic

from .smtp import reply as replies
from .smtp.reply import Reply

RATE_WINDOW = 60.0  # seconds
IPV6_PREFIX = 64  # bits: whoever has one address of a /64 has them all


class Limits:
    """Connections counted in all, and by client."""

    def __init__(self, connections: int, per_address: int, rate: int) -> None:
        """rate: new connections a minute and client; 0: as many as they like."""
        self._most = connections
        self._most_per_address = per_address
        self._rate = rate
        self.total = 0
        self._open: Counter[str] = Counter()
        self._recent: dict[str, deque[float]] = {}
        self._swept = monotonic()

    @property
    def has_room(self) -> bool:
        """Whether most of the connections are still to be had."""
        return self.total * 2 < self._most

    def enter(self) -> Reply | None:
        """Count a connection in; the refusal if there are too many: then it is not counted."""
        if self.total >= self._most:
            return replies.TOO_MANY_CONNECTIONS
        self.total += 1
        return None

    def leave(self) -> None:
        """Count out a connection that `enter` counted in."""
        self.total -= 1

    def enter_address(self, address: str) -> Reply | None:
        """Count a client in; the refusal if it has too many or comes too often: then it is not counted."""
        client = client_of(address)
        if self._open[client] >= self._most_per_address:
            return replies.TOO_MANY_CONNECTIONS_FROM_YOU
        if self._rate and not self._under_rate(client):
            return replies.TOO_FAST
        self._open[client] += 1
        return None

    def leave_address(self, address: str) -> None:
        """Count out a client that `enter_address` counted in."""
        client = client_of(address)
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]

    def _under_rate(self, client: str) -> bool:
        """Note one more connection of this client, unless it had its share in the last minute."""
        now = monotonic()
        if now - self._swept > RATE_WINDOW:
            self._swept = now
            self._recent = {key: times for key, times in self._recent.items() if now - times[-1] < RATE_WINDOW}
        times = self._recent.setdefault(client, deque())
        while times and now - times[0] >= RATE_WINDOW:
            times.popleft()
        if len(times) >= self._rate:
            return False
        times.append(now)
        return True


def client_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in address:
        return address
    mapped = ipaddress.IPv6Address(address).ipv4_mapped  # on an inherited socket that serves both families
    return str(mapped or ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
