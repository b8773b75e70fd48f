"""Signals of the master, and the first steps of a child before its own work begins."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import NoReturn

from .. import log
from .child import Child
from .process_name import name_process

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)  # that the master blocks and takes one by one


def block_signals() -> None:
    """Keep all signals for the master. To be called first of all: a SIGHUP that comes before would end us."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would tell us nothing
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def become(
    name: str, loglevel: str, log_to: str, master: int, siblings: Iterable[Child],
    work: Callable[[socket.socket], int], channel: socket.socket,
) -> NoReturn:  # fmt: skip
    """Let go of what only the master may have, and do the work, whose result is the exit status.

    master: its process number as it was before the fork; it may be dead already.
    """
    status = 1
    try:
        name_process(name)
        os.environ.pop("NOTIFY_SOCKET", None)
        for number in (signal.SIGHUP, signal.SIGINT):  # meant for the master, even if a terminal sends it to all
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for child in siblings:
            child.channel.close()
        log.set_up(loglevel, log_to)
        _end_with_the_master_while_starting(master)
        status = work(channel)
    except BaseException:  # noqa: BLE001 -- the stack below is the master's
        log.bug("Internal error")
    finally:
        os._exit(status)


def _end_with_the_master_while_starting(master: int) -> None:
    """Until gevent waits for the end of the socket to the master: a table may hang for ever on a dead file server."""

    def look(*_: object) -> None:
        if os.getppid() != master:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)  # the child's `run` ends it
