"""The status process: a child of the master's, on which no mail depends."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

import gc
import signal
import socket as stdlib_socket
from collections.abc import Sequence
from contextlib import suppress

import gevent
import gevent.socket
from gevent.event import Event

from ..config import Settings
from ..net.jobs import keep_going
from ..status.reports import Links
from ..status.web import Serving
from .child import READY
from .in_child import show_life, wait_for_death
from .privileges import drop_privileges
from .scoreboard import Row


def run(
    settings: Settings, sockets: Sequence[stdlib_socket.socket], row: Row, links: Links,
    channel: stdlib_socket.socket, since: float,
) -> None:  # fmt: skip
    """Serve until SIGTERM, or until the master is dead.

    channel: to the master. since: what older workers have counted before is not counted here (monotonic).
    """
    master = gevent.socket.socket(fileno=channel.detach())
    drop_privileges(settings)  # not before gevent has its hub: it imports what only root may be able to read
    serving = Serving(settings, sockets, links, since)
    gc.freeze()
    ends = Event()
    gevent.signal_handler(signal.SIGTERM, ends.set)
    signal.setitimer(signal.ITIMER_REAL, 0)
    gevent.spawn(serving.start)
    gevent.spawn(keep_going, lambda: show_life(row))
    gevent.spawn(wait_for_death, master).link(lambda _: ends.set())
    with suppress(OSError):  # the master is dead
        master.sendall(READY)
    ends.wait()
