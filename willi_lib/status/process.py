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
from gevent.event import AsyncResult

from willi_lib import log
from willi_lib.config import Settings
from willi_lib.net.jobs import keep_going
from willi_lib.processes.privileges import drop_privileges
from willi_lib.status.reports import Links

from ..processes.keeper import HAND_OVER, PULSE, SIGN_OF_LIFE
from .serving import Serving


def run(
    settings: Settings,
    sockets: Sequence[stdlib_socket.socket],
    links: Links,
    channel: stdlib_socket.socket,
    has_predecessor: bool,
) -> None:
    """Serve until the master is dead, says so by SIGTERM, or has another one go on.

    channel: to the master. has_predecessor: another one that is about to hand over its numbers.
    """
    master = gevent.socket.socket(fileno=channel.detach())
    drop_privileges(settings)
    serving = Serving(settings, sockets, links)
    gc.freeze()
    ends: AsyncResult[bytes] = AsyncResult()
    gevent.signal_handler(signal.SIGTERM, ends.set, b"")
    gevent.spawn(lambda: ends.set(_hear(master)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    gevent.spawn(serving.start, has_predecessor)
    gevent.spawn(keep_going, lambda: _show_life(master))
    if ends.get() == HAND_OVER:
        serving.hand_over()


def _hear(master: gevent.socket.socket) -> bytes:
    """What the master says; nothing if it is dead."""
    try:
        return bytes(master.recv(len(HAND_OVER)))
    except OSError as error:
        log.debug("The master is dead", error=str(error))
        return b""


def _show_life(master: gevent.socket.socket) -> None:
    """So that the master can tell if we hang."""
    with suppress(OSError):  # it is dead, and `_hear` has noticed
        while True:
            master.send(SIGN_OF_LIFE)
            log.flush()
            gevent.sleep(PULSE)
