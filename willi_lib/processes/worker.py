"""One process that serves clients: gevent, TLS, limits, CSV files read again, and the end of it all.

`run` is a worker of the master's; `Worker.run_alone` is the only process there is.
"""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

import gc
import json
import os
import signal
import socket as stdlib_socket
import sys
from _socket import socket as Socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_address
from time import monotonic

import gevent
import gevent.socket
from gevent.event import Event
from gevent.server import StreamServer

from .. import log
from ..config import Settings
from ..hosts import canonical
from ..mappings.csv_file import CsvError
from ..mappings.mysql import Notice
from ..mappings.open import MappingError, open_mappings
from ..net.deadline import Clock, WireError
from ..net.jobs import keep_going
from ..net.resolver import Resolver
from ..net.tls import CertificateError, ServerTls
from ..net.wire import PeerGone, Wire, give_way
from ..proxy.connector import Connector
from ..proxy.context import Service
from ..proxy.session import Session, new_session_id
from ..proxy.upstream import Client
from ..smtp import proxy_header
from ..smtp import reply as replies
from ..smtp.reply import Reply
from ..status.counts import REFUSED, Counts
from ..status.reporter import Reporter
from ..status.reports import Links
from .child import DATABASE_DOWN, FAULT, GO, LEAVING, MAX_WORDS, NEWS, READY, TRY_AGAIN
from .limits import OPEN, RATE, Limits
from .mapping_watch import DatabaseDown, FileThread, MappingWatch, Start
from .news import Message
from .privileges import drop_privileges
from .scoreboard import Row

ACCEPT_PAUSE = 1.0  # seconds without a descriptor: trying all the time would take the CPU from those who may free one
PROXY_HEADER_TIMEOUT = 3.0  # seconds; the least that its specification allows
MAPPING_INTERVAL = 1.0  # seconds between looks at the mappings
TELL_TIMEOUT = 1.0  # seconds for the master to take a packet
PULSE = 1.0  # seconds between two signs of life
HOLD = 2.0  # seconds; an answer that was kept back for its group goes out after this time, or twice it at the most
LAST_WORDS_TIMEOUT = 5.0  # seconds for sessions that are ended at drain_timeout to say so
REASONS = {  # why a connection is refused: the limits that do it
    replies.TOO_MANY_CONNECTIONS: "max_connections",
    replies.TOO_MANY_CONNECTIONS_FROM_YOU: OPEN,
    replies.TOO_FAST: RATE,
}
STARTUP_FAULTS = (MappingError, CsvError, CertificateError)
GARBAGE_THRESHOLD = 50_000  # allocations between collections: -3 to -8 % CPU a session, measured


class Listener(StreamServer):
    """gevent's server, handing out the raw non-blocking socket: one object and two watchers less a connection."""

    def __init__(self, listener: stdlib_socket.socket, serve: Callable[..., None]) -> None:
        super().__init__(listener, serve)
        self._serve = serve

    def do_read(self) -> tuple[Socket, tuple[str, int]] | None:  # type: ignore[override]
        """Accept one connection; None: there is none just now."""
        try:
            descriptor, address = self.socket._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:  # no descriptor is left, as a rule: the clients wait in the queue of the kernel
            log.warn("No connection can be accepted", error=str(error))
            self.stop_accepting()
            gevent.spawn_later(ACCEPT_PAUSE, self._resume)
            return None
        # With its family and type told, Python need not ask the kernel for them: three system calls less.
        connection = Socket(self.socket.family, self.socket.type, self.socket.proto, descriptor)
        connection.setblocking(False)
        return connection, address

    def _resume(self) -> None:
        if not self.closed:
            self.start_accepting()

    def do_handle(self, *connection_and_address: object) -> None:
        """A greenlet for each, without what gevent puts around it: 1.5 of 10 KiB a connection less, measured.

        The handler closes the connection, and must not raise.
        """
        gevent.spawn_raw(self._serve, *connection_and_address)

    def do_close(self, connection: Socket, *_: object) -> None:
        """Called when no greenlet could be made."""
        connection.close()


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
        return TRY_AGAIN if isinstance(faults, CsvError) and faults.passing else FAULT
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
        Raises MappingError, CsvError, CertificateError.
        """
        self._settings = settings
        resolver = self._resolver = Resolver(settings.dns_timeout)
        resolver.serve_all_sockets()
        self._mappings = open_mappings(settings, give_way, _log_notice, FileThread, start.last_rows)
        self._mapping_watch = MappingWatch(self._mappings, tell)
        self._mapping_watch.load(start)
        counts = self._counts = Counts()
        self._service = Service(
            settings,
            self._mappings,
            Connector(settings, resolver, counts),
            resolver,
            tls.context,
            counts,
        )
        self._row = row
        self._limits = Limits(
            row, settings.max_connections, settings.max_connections_per_ip, settings.max_connection_rate
        )
        self._reporter = Reporter(settings, self._mappings, self._limits, counts, links)
        self._servers = [Listener(listener, self._serve) for listener in sockets]
        if settings.workers > 1:
            for server in self._servers:
                server.max_accept = 1  # at a time: leave some to the others
        self._connections = 0  # those of no session, too: refused, or before a PROXY header
        self._sessions: set[Session] = set()
        self._wants_names = any(mapping.policy.xclient != "no" for mapping in settings.mappings)
        self._asked_to_end = Event()
        self._all_gone = Event()
        sys.unraisablehook = _log_unraisable
        drop_privileges(settings)
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD, 20, 20)

    def run_alone(self, show_status: Callable[[Callable[[], bool]], None]) -> None:
        """Serve until SIGTERM or SIGINT, then let running transactions finish; a second signal ends at once.

        show_status: is called first, with what tells whether it is to end.
        """
        show_status(self._asked_to_end.is_set)
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, self._on_signal)
        gevent.signal_handler(signal.SIGHUP, log.warn, "There is no reload with --debug: start Willi again")
        self.serve()

    def _on_signal(self) -> None:
        if self._asked_to_end.is_set():
            log.warn("Ended at once", sessions=len(self._sessions))
            os._exit(0)
        self.end()

    def end(self) -> None:
        """Let `serve` drain and return."""
        self._asked_to_end.set()

    def end_with(self, master: gevent.socket.socket) -> None:
        """Wait for the death of the master, whose end of this socket then closes, and end as well."""
        with suppress(ConnectionError):  # it has not read our last words
            master.recv(1)
        if not self._asked_to_end.is_set():
            log.error("The master is dead, this worker drains and ends", pid=os.getpid())
            self.end()

    def serve(self, about_to_end: Callable[[], None] = lambda: None) -> None:
        """Take clients until asked to end, and let running transactions finish.

        about_to_end: is called before that.
        """
        for server in self._servers:
            server.start()
        jobs = (self._watch_mappings, self._show_life, self._report, self._release_answers)
        helpers = [gevent.spawn(keep_going, job) for job in (*jobs, self._resolver.follow_resolv_conf)]
        answering = gevent.spawn(keep_going, self._reporter.answer_questions)
        self._asked_to_end.wait()
        about_to_end()
        answering.kill()
        self._drain()
        gevent.killall(helpers)
        self._reporter.finish()
        self._mapping_watch.close()

    def _drain(self) -> None:
        for server in self._servers:
            server.close()
        gevent.sleep(0)  # connections that were accepted in this very moment have no session yet
        log.info("Draining", pid=os.getpid(), sessions=len(self._sessions), drain_timeout=self._settings.drain_timeout)
        for session in list(self._sessions):
            session.drain()
        if self._connections and not self._all_gone.wait(self._settings.drain_timeout):
            log.warn("drain_timeout is over, ending sessions", sessions=len(self._sessions))
            for session in list(self._sessions):
                session.stop()
            self._all_gone.wait(LAST_WORDS_TIMEOUT)

    def _show_life(self) -> None:
        while True:
            self._row.beat()
            log.flush()
            gevent.sleep(PULSE)

    def _release_answers(self) -> None:
        """Send answers that have waited for the rest of their group since the last look; end where nobody listens.

        One look at all sessions now and then costs less than a timer for each group.
        """
        before: set[Wire] = set()
        while True:
            gevent.sleep(HOLD)
            holding = {session.wire for session in self._sessions if session.wire.holds_output}
            for wire in holding & before:
                wire.send_held()
            for session in self._sessions:
                session.look_at_client()
            before = holding

    def _report(self) -> None:
        """Apart from `_show_life`: whatever happens to the reports, the worker is alive."""
        self._reporter.report(lambda: len(self._sessions))

    def _watch_mappings(self) -> None:
        while True:
            gevent.sleep(MAPPING_INTERVAL)
            self._mapping_watch.look()

    # -- connections

    def _serve(self, connection: Socket, address: tuple[str, int]) -> None:
        """One connection, in its own greenlet."""
        self._connections += 1
        address = _plain(address[0]), address[1]
        sid = new_session_id()
        try:
            self._serve_limited(sid, connection, address)
        except Exception:  # noqa: BLE001 -- nobody above us could answer for it
            log.bug("Internal error", sid=sid, client=address[0])
        finally:
            connection.close()
            self._connections -= 1
            if self._asked_to_end.is_set() and not self._connections:
                self._all_gone.set()

    def _serve_limited(self, sid: str, connection: Socket, address: tuple[str, int]) -> None:
        """Unless there are too many already."""
        wire = Wire(connection, Clock(), log.tracer(sid, "client"), self._settings.write_timeout)
        refusal = self._limits.enter()
        if refusal:
            self._turn_away(wire, sid, address[0], refusal, linger=False)
            return
        try:
            self._admit(sid, wire, connection, address)
        except PeerGone as error:  # a health check of a load balancer, as a rule
            log.debug("Client gone", sid=sid, client=address[0], error=str(error))
        except (WireError, proxy_header.BadHeader, OSError) as error:
            log.warn("Connection dropped", sid=sid, client=address[0], error=str(error))
            if isinstance(error, proxy_header.BadHeader):
                self._counts.add(REFUSED, "proxy_header")
        finally:
            self._limits.leave()
            wire.close()
            wire.clock.close()

    def _admit(self, sid: str, wire: Wire, connection: Socket, address: tuple[str, int]) -> None:
        """Find out who it is, and whether that client may have one more connection."""
        client = Client(*address, own=connection.getsockname)
        balancer = is_in(client.address, self._settings.proxy_protocol_hosts)
        checks = balancer and not self._read_proxy_header(wire, client)
        trusted = is_in(client.address, self._settings.xclient_hosts)
        if trusted or checks:  # a proxy in front brings many clients; a refused health check would turn them all away
            self._talk(sid, wire, client, may_xclient=trusted)
            return
        counted = client.address
        refusal = self._limits.enter_address(counted)
        if refusal:
            self._turn_away(wire, sid, counted, refusal, linger=self._limits.has_room)
            return
        try:
            self._talk(sid, wire, client, may_xclient=False)
        finally:
            self._limits.leave_address(counted)

    def _talk(self, sid: str, wire: Wire, client: Client, may_xclient: bool) -> None:
        if self._wants_names:
            client.name = self._service.resolver.start_name_of(client.address)
        session = Session(sid, self._service, wire, client, may_xclient)
        self._sessions.add(session)
        counts, began = self._counts, monotonic()
        counts.sessions += 1
        if self._asked_to_end.is_set():
            counts.add(REFUSED, "draining")
            session.drain()
        try:
            session.run()
        finally:
            self._sessions.discard(session)
            counts.session_ended(monotonic() - began, client.tls or "none")

    def _read_proxy_header(self, wire: Wire, client: Client) -> bool:
        """Whether the load balancer names a client (not for a health check). Raises BadHeader, WireError."""
        header = b""
        with wire.clock.limit(PROXY_HEADER_TIMEOUT, "waiting for the PROXY header"):
            parsed = None
            while parsed is None:
                try:
                    header += wire.read_some()
                except PeerGone:
                    if header:
                        raise proxy_header.BadHeader("the connection ended inside the PROXY header") from None
                    raise
                parsed = proxy_header.parse(header)
        endpoints, length = parsed
        wire.unread(header[length:])
        if endpoints:
            client.address, client.port = endpoints.source, endpoints.source_port
            client.own = lambda: (endpoints.destination, endpoints.destination_port)
        return endpoints is not None

    def _turn_away(self, wire: Wire, sid: str, address: str, refusal: Reply, linger: bool) -> None:
        fields: dict[str, log.Value] = {"sid": sid, "client": address, "reply": str(refusal)}
        log.info("Connection refused", **fields)
        self._counts.add(REFUSED, REASONS[refusal])
        self._counts.event("refused", {**fields, "error": REASONS[refusal], "error_src": "internal"})
        if not is_in(address, self._settings.proxy_protocol_hosts):  # which hear nothing before their header
            wire.write(refusal.octets)
        wire.hang_up(linger)
        wire.clock.close()


def _log_unraisable(bug: sys.UnraisableHookArgs) -> None:
    """An exception in a callback from C, such as for a server name of a TLS client that is no text."""
    log.warn("Exception ignored", where=repr(bug.object), error=f"{bug.exc_type.__name__}: {bug.exc_value}")


def _plain(address: str) -> str:
    """Without a zone; an IPv4 client of a socket for both families is an IPv4 client."""
    return str(canonical(address.partition("%")[0])) if ":" in address else address


def is_in(address: str, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Whether an address belongs to one of the networks."""
    return bool(networks) and any(ip_address(address) in network for network in networks)


def _log_notice(notice: Notice) -> None:
    """What a mapping, which does not log, has to say."""
    levels = {"info": log.info, "warn": log.warn, "error": log.error}
    levels[notice.level](notice.text, mapping=notice.mapping, error=notice.error)
