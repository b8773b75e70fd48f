"""One process that serves clients: gevent, TLS, limits, CSV files read again, and the end of it all."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

import gc
import json
import os
import signal
import socket as stdlib_socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import gevent
import gevent.socket
from gevent.event import Event

from .. import log
from ..config import Settings
from ..mappings.open import open_mappings
from ..mappings.surroundings import Surroundings
from ..net.jobs import keep_going
from ..net.resolver import Resolver
from ..net.tls import CertificateError, ServerTls
from ..net.wire import Wire, give_way
from ..proxy.connector import Connector
from ..proxy.context import Service
from ..proxy.lookup import show
from ..routing.route import MappingError
from ..status.counts import Counts
from ..status.reporter import Reporter
from ..status.reports import Links
from .admission import Admission
from .child import DATABASE_DOWN, FAULT, GO, LEAVING, MAX_WORDS, NEWS, READY, TRY_AGAIN
from .in_child import show_life, wait_for_death
from .limits import Limits
from .mapping_watch import DatabaseDown, FileThread, MappingWatch, Start
from .news import Message
from .privileges import drop_privileges
from .scoreboard import Row

MAPPING_INTERVAL = 1.0  # seconds between looks at the mappings
TELL_TIMEOUT = 1.0  # seconds for the master to take a packet
HOLD = 2.0  # seconds; an answer that was kept back for its group goes out after this time, or twice it at the most
STARTUP_FAULTS = (MappingError, CertificateError)
GARBAGE_THRESHOLD = 50_000  # allocations between collections: -3 to -8 % CPU a session, measured


def run(
    settings: Settings, tls: ServerTls, sockets: Sequence[stdlib_socket.socket], row: Row, links: Links,
    channel: stdlib_socket.socket, start: Start,
) -> int:  # fmt: skip
    """A worker of the master's, from READY and GO to its end; the exit status."""
    master = gevent.socket.socket(fileno=channel.detach())
    try:
        worker = Worker(settings, tls, sockets, row, links, lambda message: _tell(master, message), start)
        gevent.signal_handler(signal.SIGTERM, worker.end)  # a second one changes nothing: systemd sends it to all
        signal.setitimer(signal.ITIMER_REAL, 0)
        master.sendall(READY)
        go = master.recv(len(GO))
    except STARTUP_FAULTS as faults:
        master.sendall(str(faults).encode("utf-8", "backslashreplace")[:MAX_WORDS])
        if isinstance(faults, DatabaseDown):
            return DATABASE_DOWN
        return TRY_AGAIN if isinstance(faults, MappingError) and faults.passing else FAULT
    except ConnectionError:
        go = b""
    if go != GO:
        return 1  # the master has died meanwhile
    watcher = gevent.spawn(worker.end_with, master)
    worker.serve(about_to_end=lambda: _say_leaving(master))
    watcher.kill()
    log.finish()
    return 0


def _tell(master: gevent.socket.socket, message: Message) -> None:
    """A message that is lost costs a line of the log, or some seconds of a worker that starts."""
    with suppress(OSError, gevent.Timeout), gevent.Timeout(TELL_TIMEOUT):
        master.sendall(NEWS + json.dumps(message).encode())


def _say_leaving(master: gevent.socket.socket) -> None:
    """So that the master, if it did not ask for it, has somebody else serve without waiting for our end."""
    with suppress(OSError):  # it is dead, or does not listen: a few octets more change nothing
        master.sendall(LEAVING)


class Worker:
    """Everything that one process holds."""

    def __init__(
        self, settings: Settings, tls: ServerTls, sockets: Sequence[stdlib_socket.socket], row: Row, links: Links,
        tell: Callable[[Message], None], start: Start,
    ) -> None:  # fmt: skip
        """Loads all tables and authorities, and becomes `user`: whatever is wrong is wrong before the first client.

        tell: hears what there is to say of the CSV files.
        Raises MappingError, CertificateError.
        """
        resolver = self._resolver = Resolver(settings.dns_timeout)
        resolver.serve_all_sockets()
        self._mappings = open_mappings(settings, Surroundings(give_way, FileThread, start.held, start.known_rows))
        self._mapping_watch = MappingWatch(self._mappings, tell)
        self._mapping_watch.load(start)
        counts = Counts()
        limits = Limits(row, settings.max_connections, settings.max_connections_per_ip, settings.max_connection_rate)
        connector = Connector(settings, resolver, counts)
        service = Service(settings, self._mappings, connector, resolver, tls.context, counts)
        self._admission = Admission(service, limits, sockets)
        self._row = row
        self._reporter = Reporter(
            settings, self._mappings, counts, links, limits.take_peaks, partial(show, self._mappings, settings)
        )
        self._asked_to_end = Event()
        sys.unraisablehook = _log_unraisable
        drop_privileges(settings)
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD, 20, 20)

    def end(self) -> None:
        """Let `serve` drain and return."""
        self._asked_to_end.set()

    def end_with(self, master: gevent.socket.socket) -> None:
        """Wait for the death of the master, whose end of this socket then closes, and end as well."""
        wait_for_death(master)
        if not self._asked_to_end.is_set():
            log.error("The master is dead, this worker drains and ends", pid=os.getpid())
            self.end()

    def serve(self, about_to_end: Callable[[], None]) -> None:
        """Take clients until asked to end, and let running transactions finish.

        about_to_end: is called before that.
        """
        self._admission.open()
        jobs = (self._watch_mappings, partial(show_life, self._row), self._report, self._release_answers)
        helpers = [gevent.spawn(keep_going, job) for job in (*jobs, self._resolver.follow_resolv_conf)]
        answering = gevent.spawn(keep_going, self._reporter.answer_questions)
        self._asked_to_end.wait()
        about_to_end()
        answering.kill()
        self._admission.drain()
        gevent.killall(helpers)
        self._reporter.finish()
        self._mapping_watch.close()

    def _release_answers(self) -> None:
        """Send answers that have waited for the rest of their group since the last look; end where nobody listens.

        One look at all sessions now and then costs less than a timer for each group.
        """
        before: set[Wire] = set()
        while True:
            gevent.sleep(HOLD)
            holding = {session.wire for session in self._admission.sessions if session.wire.holds_output}
            for wire in holding & before:
                wire.send_held()
            for session in self._admission.sessions:
                session.look_at_client()
            before = holding

    def _report(self) -> None:
        """Apart from `show_life`: whatever happens to the reports, the worker is alive."""
        self._reporter.report(lambda: len(self._admission.sessions))

    def _watch_mappings(self) -> None:
        while True:
            gevent.sleep(MAPPING_INTERVAL)
            self._mapping_watch.look()


def _log_unraisable(bug: sys.UnraisableHookArgs) -> None:
    """An exception in a callback from C, such as for a server name of a TLS client that is no text."""
    log.warn("Exception ignored", where=repr(bug.object), error=f"{bug.exc_type.__name__}: {bug.exc_value}")
