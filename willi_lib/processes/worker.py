"""One process that serves clients: gevent, TLS, limits, CSV files read again, and the end of it all."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

import gc
import os
import socket as stdlib_socket
import sys
from collections.abc import Sequence
from functools import partial

import gevent
from gevent.event import Event

from .. import log
from ..mappings.open import open_mappings
from ..mappings.surroundings import Surroundings
from ..net.jobs import keep_going
from ..net.resolver import Resolver
from ..net.wire import Wire, give_way
from ..proxy.connector import Connector
from ..proxy.context import SessionContext
from ..proxy.lookup import show
from ..routing.route import MappingError
from ..status.counts import Counts
from ..status.reporter import Reporter
from ..status.reports import Links
from . import mapping_watch
from .admission import Admission
from .child import CannotStart
from .fork import drop_privileges
from .generation import Generation, Start
from .in_child import Master, show_life
from .limits import Limits
from .mapping_watch import FileThread
from .news import Message
from .scoreboard import Row

MAPPING_INTERVAL = 1.0  # seconds between looks at the mappings
MAX_FAULTS = 10_000  # characters of what is wrong at a start
HOLD = 2.0  # seconds; an answer that was kept back for its group goes out after this time, or twice it at the most
GARBAGE_THRESHOLD = 50_000  # allocations between collections: -3 to -8 % CPU a session, measured


def run(
    generation: Generation, sockets: Sequence[stdlib_socket.socket], row: Row, links: Links,
    channel: stdlib_socket.socket, start: Start,
) -> int:  # fmt: skip
    """A worker of the master's, from its start to its end; the exit status."""
    master = Master(channel)
    try:
        worker = Worker(generation, sockets, row, links, start, master)
    except CannotStart as failure:
        master.tell(failed={"faults": str(failure)[:MAX_FAULTS], **vars(failure)})
        return 1
    master.tell_ready(worker.end)
    if master.wait_for_go():
        worker.serve()
    log.finish()
    return 0


class Worker:
    """Everything that one process holds."""

    def __init__(
        self, generation: Generation, sockets: Sequence[stdlib_socket.socket], row: Row, links: Links,
        start: Start, master: Master,
    ) -> None:  # fmt: skip
        """Loads all tables, and becomes `user`: whatever is wrong is wrong before the first client.

        Raises CannotStart.
        """
        settings = generation.settings
        resolver = self._resolver = Resolver(settings.dns_timeout)
        resolver.serve_all_sockets()
        self._master = master
        counts = Counts()
        try:
            around = Surroundings(give_way, FileThread, start.held, generation.known_rows)
            self._mappings = open_mappings(settings, around)
            mapping_watch.load(self._mappings, start, self._tell_news)
        except MappingError as error:
            raise CannotStart(str(error), error.passing or error.missing) from None
        connector = Connector(settings, generation.upstream_tls.contexts, resolver, counts)
        limits = Limits(row, settings.max_connections, settings.max_connections_per_ip, settings.max_connection_rate)
        context = SessionContext(settings, self._mappings, connector, resolver, generation.tls.context, counts)
        self._admission = Admission(context, limits, sockets)
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
        self._asked_to_end.set()

    def _end_with_master(self) -> None:
        self._master.wait_for_death()
        if not self._asked_to_end.is_set():
            log.error("The master is dead, this worker drains and ends", pid=os.getpid())
            self.end()

    def serve(self) -> None:
        """Take clients until asked to end, and let running transactions finish."""
        watcher = gevent.spawn(self._end_with_master)
        self._admission.open()
        jobs = (self._watch_mappings, partial(show_life, self._row), self._report, self._release_answers)
        helpers = [gevent.spawn(keep_going, job) for job in (*jobs, self._resolver.follow_resolv_conf)]
        answering = gevent.spawn(keep_going, self._reporter.answer_questions)
        self._asked_to_end.wait()
        self._master.tell(leaving=True)
        answering.kill()
        self._admission.drain()
        gevent.killall(helpers)
        self._reporter.finish()
        for mapping in self._mappings:
            mapping.close()
        watcher.kill()

    def _release_answers(self) -> None:
        """Send answers that have waited for the rest of their group since the last look.

        Sessions whose client has gone end here, too. One look at all sessions now and then costs less than a timer for
        each group.
        """
        before: set[Wire] = set()
        while True:
            gevent.sleep(HOLD)
            holding = {session.wire for session in self._admission.sessions if session.wire.holds_output()}
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
            mapping_watch.look(self._mappings, self._tell_news)

    def _tell_news(self, message: Message) -> None:
        self._master.tell(**message)


def _log_unraisable(bug: sys.UnraisableHookArgs) -> None:
    """An exception in a callback from C, such as for a server name of a TLS client that is no text."""
    log.warn("Exception ignored", where=repr(bug.object), error=f"{bug.exc_type.__name__}: {bug.exc_value}")
