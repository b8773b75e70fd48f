"""What a child does for its master: it shows that it is alive, and notices that the master is dead."""

from __future__ import annotations

from contextlib import suppress

import gevent
import gevent.socket

from .. import log
from .scoreboard import Row

PULSE = 1.0  # seconds between two signs of life


def show_life(row: Row) -> None:
    """Does not return."""
    while True:
        row.beat()
        log.flush()
        gevent.sleep(PULSE)


def wait_for_death(master: gevent.socket.socket) -> None:
    """Return when its end of the channel is closed."""
    with suppress(OSError):  # it has not read our last words
        while master.recv(100):
            pass
