"""How many connections at a time, and how many a minute from one address: of all workers together.

The worker asks at accept, or after the PROXY header. A connection is counted first and looked at then: of two that take
the last place at the same moment in two workers both may be refused, but never are there more than allowed.
"""

from __future__ import annotations

import ipaddress

from ..smtp import reply as replies
from ..smtp.reply import Reply
from .scoreboard import Cells, Row, cells_of

OPEN, RATE = "max_connections_per_ip", "max_connection_rate"
IPV6_PREFIX = 64  # bits: a client that has one address of a /64 has them all


class Limits:
    """Connections counted in all, and by client."""

    def __init__(self, row: Row, connections: int, per_address: int, rate: int) -> None:
        """rate: new connections a minute and client; 0: as many as they like."""
        self._row = row
        self._board = row.board
        self._most = connections
        self._most_per_address = per_address
        self._rate = rate
        self._peaks = {OPEN: 0, RATE: 0}

    @property
    def has_room(self) -> bool:
        """Whether most of the connections are still to be had."""
        return self._board.total * 2 < self._most

    def enter(self) -> Reply | None:
        """Count a connection in; the refusal if there are too many: then it is not counted."""
        self._row.add(1)
        if self._board.total <= self._most:
            return None
        self._row.add(-1)
        return replies.TOO_MANY_CONNECTIONS

    def leave(self) -> None:
        self._row.add(-1)

    def enter_address(self, address: str) -> Reply | None:
        """Count a client in; the refusal if it has too many or comes too often: then it is not counted."""
        client = cells_of(client_of(address))
        self._row.add_open(client, 1)
        refusal = None
        if self._note(OPEN, self._board.open_of(client)) > self._most_per_address:
            refusal = replies.TOO_MANY_CONNECTIONS_FROM_YOU
        elif self._rate and self._is_too_fast(client):
            refusal = replies.TOO_FAST
        if refusal:
            self._row.add_open(client, -1)
        return refusal

    def leave_address(self, address: str) -> None:
        self._row.add_open(cells_of(client_of(address)), -1)

    def take_peaks(self) -> dict[str, int]:
        """The most that one client had since the last time, by the name of the limit."""
        taken, self._peaks = self._peaks, {OPEN: 0, RATE: 0}
        return taken

    def _is_too_fast(self, client: Cells) -> bool:
        """Count one more connection of this client, unless it had its share in the last minute."""
        self._row.add_recent(client)
        if self._note(RATE, self._board.recent_of(client)) <= self._rate:
            return False
        self._row.take_back_recent(client)
        return True

    def _note(self, limit: str, number: int) -> int:
        self._peaks[limit] = max(self._peaks[limit], number)
        return number


def client_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in address:
        return address
    mapped = ipaddress.IPv6Address(address).ipv4_mapped  # on an inherited socket that serves both families
    return str(mapped or ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
