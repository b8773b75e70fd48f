"""The status process: a child of the master's, on which no mail depends."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

import gc
import signal
import socket as stdlib_socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import gevent
import gevent.socket
from gevent.event import Event

from willi_lib import log
from willi_lib.config import Settings
from willi_lib.net.jobs import keep_going

from .reports import PULSE, SIGN_OF_LIFE, Links
from .serving import Serving


def run(
    settings: Settings, sockets: Sequence[stdlib_socket.socket], links: Links, channel: stdlib_socket.socket,
    since: float, drop_privileges: Callable[[], None],
) -> None:  # fmt: skip
    """Serve until SIGTERM, or until the master is dead.

    channel: to the master. since: what older workers have counted before is not counted here (monotonic).
    drop_privileges: is called when gevent has imported all it needs, which `user` may not be able to read.
    """
    master = gevent.socket.socket(fileno=channel.detach())
    drop_privileges()
    serving = Serving(settings, sockets, links, since)
    gc.freeze()
    ends = Event()
    gevent.signal_handler(signal.SIGTERM, ends.set)
    signal.setitimer(signal.ITIMER_REAL, 0)
    gevent.spawn(serving.start)
    gevent.spawn(keep_going, lambda: _show_life(master))
    gevent.spawn(_wait_for_end, master).link(lambda _: ends.set())
    ends.wait()


def _wait_for_end(master: gevent.socket.socket) -> None:
    with suppress(OSError):
        master.recv(1)  # it says nothing: this returns when it is dead


def _show_life(master: gevent.socket.socket) -> None:
    """So that the master can tell if we hang."""
    with suppress(OSError):  # it is dead, and `_wait_for_end` has noticed
        while True:
            master.send(SIGN_OF_LIFE)
            log.flush()
            gevent.sleep(PULSE)
