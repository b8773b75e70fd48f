"""The status process: a child of the master's, on which no mail depends."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

import gc
import socket as stdlib_socket
from collections.abc import Sequence

import gevent
from gevent.event import Event

from ..config import Settings
from ..net.jobs import keep_going
from ..status.reports import Links
from ..status.web import Serving
from .fork import drop_privileges
from .in_child import Master, show_life
from .scoreboard import Row


def run(
    settings: Settings, sockets: Sequence[stdlib_socket.socket], row: Row, links: Links,
    channel: stdlib_socket.socket, since: float,
) -> None:  # fmt: skip
    """Serve until SIGTERM, or until the master is dead.

    since: what older workers have counted before is not counted here (monotonic).
    """
    master = Master(channel)
    drop_privileges(settings)  # not before gevent has its hub: it imports what only root may be able to read
    serving = Serving(settings, sockets, links, since)
    gc.freeze()
    ends = Event()
    master.tell_ready(ends.set)
    gevent.spawn(serving.start)
    gevent.spawn(keep_going, lambda: show_life(row))
    gevent.spawn(master.wait_for_death).link(lambda _: ends.set())
    ends.wait()
