"""The status process as the master sees it: its listening sockets, and its life."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import NoReturn

from willi_lib import log
from willi_lib.config import Address, Settings
from willi_lib.processes.listeners import PATIENCE, CannotBind, bind, needed_for
from willi_lib.status.reports import Links, MasterReport, send

HANG_TIMEOUT = 60.0  # seconds without a sign of life, after which it is killed
END_TIMEOUT = 15.0  # seconds
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before one is replaced that soon died; doubled each time
LONG_LIFE = 60.0  # seconds
BIND_INTERVAL = 10.0  # seconds between tries to listen
INTERVAL = 1.0  # seconds between the facts of the master, if they have not changed


class _Process:
    """One of them."""

    def __init__(self, settings: Settings, become: Callable[[socket.socket], NoReturn]) -> None:
        """Forks. become: what the new process does, with its end of the channel. Raises OSError."""
        self.settings = settings
        self.started = self.heard = monotonic()
        self.end_by: float | None = None  # it was told to end
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                self.channel.close()
                become(theirs)
        self.channel.setblocking(False)

    def listen(self) -> None:
        """Take note of its signs of life."""
        with suppress(BlockingIOError, ConnectionError):
            while self.channel.recv(4096):
                self.heard = monotonic()

    def end(self, number: signal.Signals) -> None:
        """By this signal."""
        self.end_by = monotonic() + END_TIMEOUT
        os.kill(self.pid, number)


class Keeper:
    """There is one status process if `status_listen` is set, and for a moment two after a reload."""

    def __init__(self, become: Callable[[Settings, socket.socket, float], NoReturn]) -> None:
        """become: what the new process does, with its end of the channel, and since when workers count for it.

        Raises OSError: no descriptor is left.
        """
        self.links = Links()
        self._become = become
        self._bound: dict[Address, socket.socket] = {}
        self._process: _Process | None = None
        self._leaving: list[_Process] = []
        self._fault = ""  # why the address cannot be had
        self._settings: Settings | None = None  # that the process should have
        self._delay = 0.0
        self._replace_at = 0.0
        self._since = monotonic()
        self._told = MasterReport()
        self._told_at = 0.0

    # -- sockets

    @property
    def sockets(self) -> list[socket.socket]:
        """All of them."""
        return list(self._bound.values())

    def open(self, settings: Settings, patience: float = PATIENCE) -> None:
        """Listen where the file wants it, too. No mail waits for an address that cannot be had: it is tried again.

        Workers that start from now on are counted from their beginning if there will be another status process.
        """
        self._since = monotonic()
        try:
            self._bound |= bind(status_addresses(settings), self._bound, patience)
        except CannotBind as error:
            if str(error) != self._fault:
                log.warn("There is no status for now", error=str(error))
            self._fault = str(error)
        else:
            self._fault = ""

    def close_others(self, settings: Settings) -> None:
        """Close what is for another file."""
        for address in self._bound.keys() - needed_for(status_addresses(settings)):
            self._bound.pop(address).close()

    def sockets_for(self, settings: Settings) -> list[socket.socket]:
        """Those that this file wants."""
        return [self._bound[address] for address in needed_for(status_addresses(settings)) & self._bound.keys()]

    def close_in_child(self, sockets: Iterable[socket.socket]) -> None:
        """In a process that has nothing to do with these sockets, nor with the status processes."""
        for listener in sockets:
            listener.close()
        for process in self._all:
            process.channel.close()

    # -- processes

    @property
    def _all(self) -> list[_Process]:
        return [*self._leaving, *([self._process] if self._process else [])]

    @property
    def has_children(self) -> bool:
        """Whether there is any."""
        return bool(self._all)

    def follow(self, settings: Settings) -> None:
        """From now on this file is in force. If it wants another process, that one begins to count at zero."""
        self.close_others(settings)
        before, self._settings = self._process, settings if settings.status_listen else None
        if before and self._settings and _same(before.settings, settings):
            before.settings = settings
            return
        if before:
            self._leaving.append(before)
            self._process = None
        self._delay = self._replace_at = 0.0
        if self._settings:
            self._start()
        else:
            self.end()

    def look_after(self, awake_since: float) -> None:
        """Replace it when it has died, kill it when it hangs. To be called every second.

        awake_since: when this host last slept (monotonic): silence before that means nothing.
        """
        now = monotonic()
        for process in self._all:
            process.listen()
            late = process.end_by is not None and now > process.end_by
            if late or now - max(process.heard, awake_since) > HANG_TIMEOUT:
                log.error("Status process hangs, it is killed", pid=process.pid)
                process.end(signal.SIGKILL)
        if self._settings and not self._process and now >= self._replace_at:
            self._start()

    def bury(self, pid: int, status: int) -> None:
        """A child of the master has ended."""
        for process in self._all:
            if process.pid != pid:
                continue
            process.channel.close()
            if process is not self._process:
                self._leaving.remove(process)
                return
            self._process = None
            self._since = monotonic()
            if process.end_by is None:
                log.error("Status process ended by itself", pid=pid, status=os.waitstatus_to_exitcode(status))
            long = monotonic() - process.started > LONG_LIFE
            self._delay = 0.0 if long else min(max(FIRST_DELAY, self._delay * 2), LONGEST_DELAY)
            self._replace_at = monotonic() + self._delay

    def _start(self) -> None:
        settings = self._settings
        assert settings
        if not self.sockets_for(settings):
            self.open(settings, patience=0.0)
        if not self.sockets_for(settings):
            self._replace_at = monotonic() + BIND_INTERVAL
            return
        try:
            self._process = _Process(settings, lambda channel: self._become(settings, channel, self._since))
        except OSError as error:
            log.error("Cannot start the status process", error=str(error))
            self._delay = min(max(FIRST_DELAY, self._delay * 2), LONGEST_DELAY)
            self._replace_at = monotonic() + self._delay
        for process in self._leaving if self._process else ():
            if process.end_by is None:
                process.end(signal.SIGTERM)

    def tell(self, facts: MasterReport) -> None:
        """What the master knows, when it has changed and each second."""
        now = monotonic()
        due = facts != self._told or now - self._told_at >= INTERVAL
        if self._all and due and send(self.links.to_reports, master=facts):
            self._told, self._told_at = facts, now

    def end(self, at_once: bool = False) -> None:
        """End it for good."""
        self._settings = None
        for process in self._all:
            if at_once or process.end_by is None:
                process.end(signal.SIGKILL if at_once else signal.SIGTERM)


def status_addresses(settings: Settings) -> tuple[Address, ...]:
    """Where the file wants the status to be."""
    return (settings.status_listen,) if settings.status_listen else ()


def _same(old: Settings, new: Settings) -> bool:
    """Whether a status process of the old file may go on under the new one."""

    def wanted(settings: Settings) -> tuple[object, ...]:
        return settings.status_listen, settings.user, settings.group

    return wanted(old) == wanted(new)
