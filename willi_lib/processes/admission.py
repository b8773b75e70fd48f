"""The connections of one worker: accepted, counted, let in behind their PROXY header or turned away, and drained."""

from __future__ import annotations

import os
from _socket import socket as Socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from socket import socket as StdlibSocket
from time import monotonic

import gevent
from gevent.event import Event
from gevent.server import StreamServer

from .. import log
from ..hosts import canonical
from ..net.deadline import Deadline, WireError
from ..net.wire import PeerGone, Wire
from ..proxy.context import SessionContext
from ..proxy.message_log import new_session_id
from ..proxy.session import Session
from ..proxy.upstream import Client
from ..smtp import proxy_header
from ..smtp import reply as replies
from ..smtp.reply import Reply
from ..status.counts import REFUSED, SESSIONS
from .limits import OPEN, RATE, Limits

ACCEPT_PAUSE = 1.0  # seconds without a descriptor: trying all the time would take the CPU from those who may free one
PROXY_HEADER_TIMEOUT = 3.0  # seconds; the least that its specification allows
LAST_WORDS_TIMEOUT = 5.0  # seconds for sessions that are ended at drain_timeout to say so
REASONS = {  # for the limits that turn a connection away
    replies.TOO_MANY_CONNECTIONS: "max_connections",
    replies.TOO_MANY_CONNECTIONS_FROM_YOU: OPEN,
    replies.TOO_FAST: RATE,
}


class Listener(StreamServer):
    """gevent's server, handing out the raw non-blocking socket: one object and two watchers less a connection."""

    def __init__(self, listener: StdlibSocket, serve: Callable[..., None]) -> None:
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


class Admission:
    """Lets clients in, as long as the worker serves."""

    def __init__(self, context: SessionContext, limits: Limits, sockets: Sequence[StdlibSocket]) -> None:
        self._context = context
        self._settings = context.settings
        self._counts = context.counts
        self._limits = limits
        self._listeners = [Listener(one, self._serve) for one in sockets]
        if self._settings.workers > 1:
            for listener in self._listeners:
                listener.max_accept = 1  # at a time: leave some to the others
        self._wants_names = any(mapping.policy.xclient != "no" for mapping in self._settings.mappings)
        self.sessions: set[Session] = set()
        self._connections = 0  # those without a session, too: turned away, or before a PROXY header
        self._is_draining = False
        self._all_gone = Event()

    def open(self) -> None:
        for listener in self._listeners:
            listener.start()

    def drain(self) -> None:
        """Accept no more, and let running transactions finish, until drain_timeout."""
        self._is_draining = True
        for listener in self._listeners:
            listener.close()
        gevent.sleep(0)  # connections that were accepted in this very moment have no session yet
        sessions, limit = len(self.sessions), self._settings.drain_timeout
        log.info("Draining", pid=os.getpid(), sessions=sessions, drain_timeout=limit)
        for session in list(self.sessions):
            session.drain()
        if self._connections and not self._all_gone.wait(limit):
            log.warn("drain_timeout is over, ending sessions", sessions=len(self.sessions))
            for session in list(self.sessions):
                session.stop()
            self._all_gone.wait(LAST_WORDS_TIMEOUT)

    def _serve(self, connection: Socket, address: tuple[str, int]) -> None:
        self._connections += 1
        sid, peer = new_session_id(), _plain(address[0])
        try:
            wire = Wire(connection, Deadline(), log.tracer(sid, "client"), self._settings.write_timeout)
            try:
                self._admit(sid, wire, Client(peer, address[1], own=connection.getsockname))
            except PeerGone as error:  # a health check of a load balancer, as a rule
                log.debug("Client gone", sid=sid, client=peer, error=str(error))
            except (WireError, proxy_header.BadHeader, OSError) as error:
                log.warn("Connection dropped", sid=sid, client=peer, error=str(error))
                if isinstance(error, proxy_header.BadHeader):
                    self._counts.add(REFUSED, "proxy_header")
            finally:
                wire.close()
                wire.deadline.close()
        except Exception:  # noqa: BLE001 -- nothing above us could answer for it
            log.bug("Internal error", sid=sid, client=peer)
        finally:
            connection.close()
            self._connections -= 1
            if self._is_draining and not self._connections:
                self._all_gone.set()

    def _admit(self, sid: str, wire: Wire, client: Client) -> None:
        """Count the connection, learn who the client is, and count it: a session, or a refusal.

        Raises BadHeader, WireError, OSError.
        """
        settings, limits = self._settings, self._limits
        refusal = limits.enter()
        if refusal:
            self._turn_away(sid, wire, client.address, refusal, linger=False)
            return
        try:
            is_check = is_in(client.address, settings.proxy_protocol_hosts) and not read_proxy_header(wire, client)
            may_xclient = is_in(client.address, settings.xclient_hosts)
            # A proxy in front brings many clients, and a health check that is turned away would turn them all away.
            counted = "" if may_xclient or is_check else client.address
            refusal = limits.enter_address(counted) if counted else None
            if refusal:
                self._turn_away(sid, wire, counted, refusal, linger=limits.has_room)
                return
            try:
                self._talk(sid, wire, client, may_xclient)
            finally:
                if counted:
                    limits.leave_address(counted)
        finally:
            limits.leave()

    def _talk(self, sid: str, wire: Wire, client: Client, may_xclient: bool) -> None:
        if self._wants_names:
            client.name = self._context.resolver.start_name_of(client.address)
        session = Session(sid, self._context, wire, client, may_xclient)
        self.sessions.add(session)
        counts, began = self._counts, monotonic()
        counts.add(SESSIONS)
        if self._is_draining:
            counts.add(REFUSED, "draining")
            session.drain()
        try:
            session.run()
        finally:
            self.sessions.discard(session)
            counts.session_ended(monotonic() - began, client.tls or "none")

    def _turn_away(self, sid: str, wire: Wire, address: str, refusal: Reply, linger: bool) -> None:
        fields: dict[str, log.Value] = {"sid": sid, "client": address, "reply": str(refusal)}
        log.info("Connection refused", **fields)
        self._counts.add(REFUSED, REASONS[refusal])
        self._counts.event("refused", {**fields, "error": REASONS[refusal], "error_src": "internal"})
        if not is_in(address, self._settings.proxy_protocol_hosts):  # which hear nothing before their header
            wire.write(refusal.octets)
        wire.hang_up(linger)


def read_proxy_header(wire: Wire, client: Client) -> bool:
    """Whether the load balancer names a client (not for a health check). Raises BadHeader, WireError."""
    header, parsed = b"", None
    with wire.deadline.limit(PROXY_HEADER_TIMEOUT, "waiting for the PROXY header"):
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


def _plain(address: str) -> str:
    """Without a zone; an IPv4 client of a socket for both families is an IPv4 client."""
    return str(canonical(address.partition("%")[0])) if ":" in address else address


def is_in(address: str, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    return bool(networks) and any(ip_address(address) in network for network in networks)
