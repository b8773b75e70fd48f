"""What a child does for its master: it tells how it is, shows that it is alive, and notices that the master is dead."""

from __future__ import annotations

import json
import signal
import socket as stdlib_socket
from collections.abc import Callable
from contextlib import suppress

import gevent
import gevent.socket

from .. import log
from .child import GO
from .scoreboard import Row

PULSE = 1.0  # seconds between two signs of life
TELL_TIMEOUT = 1.0  # seconds for the master to take a packet


class Master:
    """As a child sees it: the other end of the socket."""

    def __init__(self, channel: stdlib_socket.socket) -> None:
        self._socket = gevent.socket.socket(fileno=channel.detach())

    def tell(self, **message: object) -> None:
        """`child.py` says which messages there are. One that is lost costs a line of the log, or some seconds."""
        with suppress(OSError, gevent.Timeout), gevent.Timeout(TELL_TIMEOUT):
            self._socket.sendall(json.dumps(message).encode())

    def tell_ready(self, end: Callable[[], None]) -> None:
        """end: is called on SIGTERM."""
        gevent.signal_handler(signal.SIGTERM, end)  # a second one changes nothing: systemd sends it to all
        signal.setitimer(signal.ITIMER_REAL, 0)  # see fork.py
        self.tell(ready=True)

    def wait_for_go(self) -> bool:
        """Whether it comes; else the master is dead."""
        with suppress(ConnectionError):
            return bool(self._socket.recv(len(GO)) == GO)
        return False

    def wait_for_death(self) -> None:
        with suppress(OSError):  # it has not read our last words
            while self._socket.recv(100):
                pass


def show_life(row: Row) -> None:
    """Does not return."""
    while True:
        row.beat()
        log.flush()
        gevent.sleep(PULSE)
