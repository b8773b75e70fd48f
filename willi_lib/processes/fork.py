"""Signals of the master, and the first steps of a child before its own work begins."""

from __future__ import annotations

import os
import pwd
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from grp import getgrnam
from pathlib import Path
from typing import NoReturn

from .. import log
from ..config import Settings
from .child import Child

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)  # that the master blocks and takes one by one
ARG_START, ARG_END = 48, 49  # fields of /proc/PID/stat, see proc(5)


def block_signals() -> None:
    """Keep all signals for the master. To be called first of all: a SIGHUP that comes before would end us."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would tell us nothing
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # with which logrotate tells other programs to open their logs
        signal.signal(number, signal.SIG_IGN)


def become(
    name: str, settings: Settings, master: int, siblings: Iterable[Child],
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
        log.set_up(settings.loglevel, settings.log)
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
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)  # `tell_ready` ends it


def name_process(name: str, in_command: bool = True) -> None:
    """name: for pgrep and top, at most 15 octets. in_command: also for `ps aux`, in the place of the interpreter.

    Where there is no /proc, or the kernel does not let us, nothing changes.
    """
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)
        if not in_command:
            return
        _, program, *rest = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        title = b"\0".join([name.encode(), program.rpartition(b"/")[2], *rest])
        fields = ["", "", *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]
        start, room = int(fields[ARG_START - 1]), int(fields[ARG_END - 1]) - int(fields[ARG_START - 1])
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(title[: room - 1].ljust(room, b"\0"))


def drop_privileges(settings: Settings) -> None:
    """Become `user` and `group`, for good, once all is read that only root may. Only if Willi was started as root."""
    if os.geteuid() != 0 or not settings.user:
        return
    account = pwd.getpwnam(settings.user)
    group = getgrnam(settings.group).gr_gid if settings.group else account.pw_gid
    os.initgroups(settings.user, group)
    os.setgid(group)
    os.setuid(account.pw_uid)
