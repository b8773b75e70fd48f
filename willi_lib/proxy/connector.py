"""Finding a host of a route that answers, and telling it who the client is: connect, EHLO, STARTTLS, XCLIENT.

One `Connector` for each worker: it remembers hosts that failed. All waits run on the session's deadline.
"""

from __future__ import annotations

import errno
import os
import random
import socket as stdlib_socket
from _socket import socket as Socket
from collections.abc import Iterator, Set
from time import monotonic

from .. import log
from ..config import Settings
from ..net.deadline import Deadline, WireError
from ..net.own_lack import OWN_LACK, is_own_lack
from ..net.replies import read_reply
from ..net.resolver import Address, Cache, DnsFailed, Resolver
from ..net.tls import UpstreamContexts
from ..net.wire import PeerGone, Wire
from ..routing.route import Policy, Route, Server
from ..smtp import proxy_header
from ..smtp.reply import UPSTREAM, WILLI, BadReply, Rejected, Reply
from ..status.counts import XCLIENT, Counts
from .upstream import (
    Client,
    MailLoop,
    NextMayTake,
    OurFault,
    Upstream,
    UpstreamFailed,
    WantsTls,
    is_not_from_us,
)
from .xclient import send_xclient

NO_MX = 1 << 16  # a preference that no MX record has
# Of a domain, and addresses of one host: what a DNS answer of 64 KiB can name would take all of upstream_timeout.
# RFC 5321 §5.1 allows such a limit; Postfix's is 5 addresses in all.
MAX_MX_HOSTS = 20
MAX_ADDRESSES = 10
DOWN_TIME = 60.0  # seconds that a host that failed is tried last
OURSELVES_TIME = 60.0  # seconds that an MX host that turned out to be ourselves is not tried: that may be put right
WANTS_TLS_TIME = 3600.0  # seconds that a host that wants TLS is not tried in clear
NOT_KNOWN = 504  # and less: a command that is not known


class Connector:
    """Opens upstream connections; remembers for a while which hosts failed."""

    def __init__(
        self, settings: Settings, contexts: UpstreamContexts, resolver: Resolver, counts: Counts | None = None
    ) -> None:
        self._settings = settings
        self._counts = counts or Counts()
        self._resolver = resolver
        self._contexts = contexts
        self._wants: Cache[bool] = Cache()  # hosts that take nothing in clear
        self._ourselves: Cache[bool] = Cache()  # MX hosts that turned out to be ourselves
        self._down: dict[tuple[str, int], float] = {}  # host or address, and port: down until (monotonic)
        self._hanging: set[tuple[str, int]] = set()  # that fell silent behind the greeting; until a message is accepted

    def connect(self, route: Route, client: Client, deadline: Deadline, sid: str) -> Upstream:
        """The first host of the route that answers, ready for MAIL.

        Raises UpstreamFailed with what was wrong with each; Rejected: the upstream's verdict on the
        client, or the upstream is ourselves, or will not take XCLIENT.
        """
        origins: set[str] = set()  # MX hosts that turned out to be where this client's mail comes from
        while True:
            try:
                return self._connect(route, client, deadline, sid, origins)
            except MailLoop as loop:
                if loop.server is None or loop.server.host in origins or self._is_ourselves(loop.server.host):
                    raise
                if loop.is_ours:
                    self._ourselves.put(loop.server.host, True, OURSELVES_TIME)
                else:
                    origins.add(loop.server.host)

    def _connect(self, route: Route, client: Client, deadline: Deadline, sid: str, origins: Set[str]) -> Upstream:
        failures: list[str] = []
        loops: list[str] = []  # hosts that are no way out
        servers = self._by_state(self._hosts(route, failures, loops, origins))
        for number, server in enumerate(servers, 1):
            began = monotonic()
            try:
                upstream = self._open_host(route, server, client, deadline, sid, is_last=number == len(servers))
                upstream.stands_in |= bool(failures) or any(
                    self._is_down(one.host, one.port) for one in servers if one != server
                )
                return upstream
            except UpstreamFailed as error:
                failures.append(str(error))
                is_ours = isinstance(error, OurFault)
            except MailLoop:
                self._counts.refused(server)
                if server not in route.servers:  # an MX host: others are out of the question, too
                    raise
                loops.append(str(server))
                continue
            except Rejected as rejected:
                self._counts.refused(server)
                if number == len(servers) or not isinstance(rejected, NextMayTake):
                    raise
                failures.append(f"{server}: {rejected.reply}")
                continue
            overdue = deadline.overdue()
            had_time = number == 1 or not overdue or monotonic() - began > self._settings.connect_timeout
            if had_time and not is_ours:
                self._counts.not_opened(server, failures[-1])
                self.mark_down(server)
            if overdue:
                break
        if loops and not failures:
            log.error("Mail loop: no host of the route leads away from Willi", sid=sid, upstream=str(route))
            raise MailLoop
        raise UpstreamFailed("; ".join([*failures, *(f"{host}: mail loops" for host in loops)]))

    def _open_host(
        self, route: Route, server: Server, client: Client, deadline: Deadline, sid: str, is_last: bool
    ) -> Upstream:
        """The first address of a host that answers. Raises as `connect` does.

        is_last: there is no other host that needs time to be tried, if this one greets and says nothing more.
        """
        failures: list[str] = []
        addresses = sorted(
            self._addresses(server, deadline), key=lambda address: self._is_down(address[1], server.port)
        )
        for address in addresses:
            if deadline.overdue():
                break
            has_all = is_last and address == addresses[-1]
            seconds = self._settings.upstream_timeout if has_all else self._settings.connect_timeout
            try:
                upstream = self._open(route, server, address, client, deadline, sid, seconds)
            except OurFault as error:
                raise OurFault(f"{server}: {error}") from None
            except NextMayTake as rejected:
                if rejected.by == WILLI:
                    self.mark_down(server, address[1])
                raise
            except (UpstreamFailed, WireError, BadReply) as error:
                where = "" if address[1] == server.host else f" [{address[1]}]"
                failures.append(f"{server}{where}: {str(error).removeprefix(f'{server}: ')}")
                if len(addresses) > 1 and not deadline.overdue():  # else each client would wait for a silent IPv6 first
                    self.mark_down(Server(address[1], server.port))
            else:
                self._note_open(upstream)
                upstream.stands_in = any(self._is_down(one[1], server.port) for one in addresses if one != address)
                return upstream
        raise UpstreamFailed("; ".join(failures) or f"{server}: no time was left for it")

    def _hosts(self, route: Route, failures: list[str], loops: list[str], origins: Set[str]) -> Iterator[Server]:
        """The route's servers, with `mx:domain` replaced by its MX hosts."""
        is_random = route.policy.server_order == "random"
        for server in random.sample(route.servers, len(route.servers)) if is_random else route.servers:
            if not server.mx:
                yield server
                continue
            try:
                hosts = self._resolver.mx_of(server.host)
            except DnsFailed as error:
                failures.append(str(error))
                continue
            # Where we are an MX host, only a better one gets it (RFC 5321 §5.1): else it would go in circles.
            ours = min(
                (preference for preference, host in hosts if host in origins or self._is_ourselves(host)), default=NO_MX
            )
            if ours == hosts[0][0]:
                loops.append(str(server))
            better = [host for preference, host in hosts if preference < ours]
            yield from (Server(host, server.port) for host in better[:MAX_MX_HOSTS])

    def _is_ourselves(self, host: str) -> bool:
        return host.rstrip(".") == self._settings.domain.lower() or self._ourselves.get(host) is not None

    def _by_state(self, servers: Iterator[Server]) -> list[Server]:
        """Those that failed in the last `DOWN_TIME` go to the end."""
        return sorted(servers, key=lambda server: self._is_down(server.host, server.port))

    def _is_down(self, host: str, port: int) -> bool:
        return self._down.get((host, port), 0.0) > monotonic()

    def _note_open(self, upstream: Upstream) -> None:
        for place in _places(upstream):
            self._down.pop(place, None)
            if place in self._hanging:  # this client tries for all others whether it is back
                self._down[place] = monotonic() + DOWN_TIME
        tls = upstream.wire.tls_version or "none"
        self._counts.opened(upstream.server, upstream.greeted_after, tls, upstream.xclient or "off")

    def note_failure(self, upstream: Upstream) -> None:
        """It failed behind its greeting. After a long silence one client at a time tries whether it is back.

        Such a failure may take minutes, and until then all others would go there, too.
        """
        if monotonic() - upstream.wire.received_at > self._settings.connect_timeout:
            self._hanging.update(_places(upstream))
        self.mark_down(upstream.server, upstream.address)

    def note_accepted(self, upstream: Upstream) -> None:
        """It has accepted a message."""
        self._hanging.difference_update(_places(upstream))

    def mark_down(self, server: Server, address: str = "") -> None:
        """It failed, at this address: for a while both are tried last."""
        now = monotonic()
        self._down = {key: until for key, until in self._down.items() if until > now}
        for host in (server.host, address or server.host):
            self._down[host, server.port] = now + DOWN_TIME

    def _addresses(self, server: Server, deadline: Deadline) -> list[Address]:
        try:
            with deadline.limit(self._settings.dns_timeout, "looking up the address (dns_timeout)"):
                return self._resolver.addresses_of(server.host)[:MAX_ADDRESSES]
        except (DnsFailed, WireError) as error:
            is_ours = isinstance(error, DnsFailed) and error.own_lack
            raise (OurFault if is_ours else UpstreamFailed)(f"{server}: {error}") from None

    def note_wants_tls(self, server: Server) -> None:
        """It takes nothing in clear: for a while all goes over TLS, whatever the client used."""
        log.info("The upstream wants TLS, and gets it from now on", upstream=str(server))
        self._wants.put(str(server), True, WANTS_TLS_TIME)

    def _open(
        self,
        route: Route,
        server: Server,
        address: Address,
        client: Client,
        deadline: Deadline,
        sid: str,
        seconds: float,
    ) -> Upstream:
        """One attempt at one address, and another one if it wants TLS. Raises as `_open_once` does.

        seconds: for what follows the greeting, up to MAIL.
        """
        try:
            return self._open_once(route, server, address, client, deadline, sid, seconds)
        except WantsTls:
            self.note_wants_tls(server)
        return self._open_once(route, server, address, client, deadline, sid, seconds)

    def _open_once(
        self,
        route: Route,
        server: Server,
        address: Address,
        client: Client,
        deadline: Deadline,
        sid: str,
        seconds: float,
    ) -> Upstream:
        """Raises UpstreamFailed, WireError, BadReply, Rejected."""
        began = monotonic()
        with deadline.limit(self._settings.connect_timeout, "connecting (connect_timeout)"):
            connection = _connect(address, server.port)
            wire = Wire(connection, deadline, log.tracer(sid, "upstream"), self._settings.write_timeout)
            upstream = Upstream(wire, server, route, address[1])
            try:
                if route.policy.send_proxy != "no":
                    if not client.address:
                        raise UpstreamFailed("send_proxy: the address of the client is not known")
                    wire.write(_proxy_header(route.policy, client))
                    wire.flush()
                self._expect_greeting(upstream)
            except BaseException:
                upstream.drop()
                raise
        upstream.greeted_after = monotonic() - began
        try:
            with deadline.limit(seconds, "waiting for the answers before MAIL"):
                self._introduce(upstream, client, sid)
            upstream.introduced = True
        except BaseException:  # TimeLimit and the like too: nobody else knows this connection yet
            upstream.drop()
            if upstream.xclient:
                self._counts.add(XCLIENT, upstream.xclient)
            raise
        return upstream

    def _expect_greeting(self, upstream: Upstream) -> None:
        greeting = read_reply(upstream.wire)
        if greeting.welcomes:
            return
        if upstream.route.policy.send_proxy != "no" and greeting.code >= 400 and not _is_of_header(greeting):
            raise Rejected(greeting, UPSTREAM)  # by the PROXY header it knew whom it was talking to
        raise UpstreamFailed(f"greeting: {greeting}")

    def _introduce(self, upstream: Upstream, client: Client, sid: str) -> None:
        """EHLO, STARTTLS, EHLO, XCLIENT, EHLO: as many of them as apply."""
        policy = upstream.route.policy
        told = policy.send_proxy != "no"  # it knows the client already, so the client's name belongs into EHLO
        name = client.helo if told else self._settings.domain
        upstream.knows_client = told
        self._hello(upstream, client, name, sid)
        upstream.could_use_tls = "STARTTLS" in upstream.features and policy.upstream_tls != "never"
        was_offered = "XCLIENT" in upstream.features
        if self._wants_tls(upstream, client):
            try:
                self._start_tls(upstream)
                self._hello(upstream, client, name, sid)
            except (UpstreamFailed, WireError, BadReply):  # one 530 must not have all mail fail for an hour
                self._wants.forget(str(upstream.server))
                raise
        elif policy.upstream_tls == "require":
            raise UpstreamFailed("STARTTLS is required and not offered")
        if policy.xclient != "no" and send_xclient(upstream, client, sid, was_offered):
            upstream.knows_client = True
            self._hello_for(upstream, client, client.helo)
        elif not client.esmtp:
            self._hello_for(upstream, client, name, again=True)

    def _hello(self, upstream: Upstream, client: Client, name: str, sid: str) -> None:
        """EHLO, HELO if that is refused: what comes back is about us, unless the upstream knows the client already."""
        answer = upstream.ask(b"EHLO " + name.encode())
        if upstream.knows_client and _is_of_header(answer):  # the answers to EHLO and to all else would come too late
            raise UpstreamFailed(f"EHLO: {answer}: does it expect a PROXY header?")
        if answer.permanent:
            try:
                answer = upstream.ask(b"HELO " + name.encode())
            except UpstreamFailed:  # it has hung up behind its answer to EHLO, which counts if it is one about the name
                if answer.code <= NOT_KNOWN:
                    raise
            upstream.features = {}
        else:
            upstream.features = answer.features
        if is_not_from_us(answer):
            raise upstream.unwelcome("EHLO", answer)
        if answer.code >= 400 and upstream.knows_client:
            raise Rejected(answer, UPSTREAM)  # by the PROXY header it knew whose name that is
        if not answer.positive:
            raise UpstreamFailed(f"EHLO: {answer}")
        who = answer.lines[0].partition(b" ")[0].decode("ascii", "replace")
        if who.lower() == self._settings.domain.lower():
            log.error("Mail loop: the upstream has our domain", sid=sid, upstream=str(upstream.server), domain=who)
            raise MailLoop(upstream.server, is_ours=True)
        if client.proxy and who.lower() == client.proxy.lower():
            log.error("Mail loop: the upstream is the host that sends this by XCLIENT", sid=sid,
                      upstream=str(upstream.server), domain=who)  # fmt: skip
            raise MailLoop(upstream.server)

    def _hello_for(self, upstream: Upstream, client: Client, name: str, again: bool = False) -> None:
        """EHLO or HELO as the client said it: what comes back is the verdict on the client, if it is known.

        again: it has heard EHLO, and nothing since.
        """
        answer = upstream.ask((b"EHLO " if client.esmtp else b"HELO ") + name.encode())
        if answer.code == 503 and again:  # OpenSMTPD takes but one greeting, against RFC 5321 §4.1.4: it was our EHLO
            return
        if is_not_from_us(answer):
            raise upstream.unwelcome("EHLO", answer)
        if not answer.positive and not upstream.knows_client:
            raise UpstreamFailed(f"HELO: {answer}")
        if not answer.positive:
            raise Rejected(answer, UPSTREAM)
        upstream.features = answer.features if client.esmtp else {}

    def _wants_tls(self, upstream: Upstream, client: Client) -> bool:
        if not upstream.could_use_tls:
            return False
        wish = upstream.route.policy.upstream_tls
        return bool(wish in ("always", "require") or client.tls or self._wants.get(str(upstream.server)))

    def _start_tls(self, upstream: Upstream) -> None:
        """Raises UpstreamFailed if it does not work: there is no way back to clear text (RFC 3207)."""
        answer = upstream.ask(b"STARTTLS")
        if answer.code != 220:
            raise UpstreamFailed(f"STARTTLS: {answer}")
        if upstream.wire.buffered():
            raise UpstreamFailed("STARTTLS: clear text after the 220")  # response injection
        route = upstream.route
        context = self._contexts[route.tls_verify, route.policy.upstream_tls_ca]
        upstream.wire.start_tls(context, server_side=False, server_name=upstream.server.host.rstrip("."))
        if upstream.wire.pending():  # in clear it has been dropped; in the records of its handshake nobody has looked
            raise UpstreamFailed(f"{upstream.server}: spoke before EHLO")


def _places(upstream: Upstream) -> tuple[tuple[str, int], ...]:
    """The host and the address."""
    return (upstream.server.host, upstream.server.port), (upstream.address, upstream.server.port)


def _is_of_header(answer: Reply) -> bool:
    """Whether it looks as if the upstream took the PROXY header for commands: then it is no verdict on the client.

    The words are those of Exim and of Postfix's postscreen; HELO restrictions of Postfix have 501 and 504.
    """
    words = b" ".join(answer.lines).lower()
    return answer.code in (500, 502, 503) or b"synchronization error" in words or b"protocol error" in words


def _proxy_header(policy: Policy, client: Client) -> bytes:
    own_address, own_port = client.own()[:2]
    endpoints = proxy_header.Endpoints(client.address, client.port, own_address, own_port)
    build = proxy_header.build_v1 if policy.send_proxy == "v1" else proxy_header.build_v2
    return build(endpoints)


def _connect(address: Address, port: int) -> Socket:
    """A non-blocking socket that is connecting. Raises WireError, OurFault.

    Nobody waits for that alone: whoever reads the greeting, or writes the PROXY header, waits
    until it is there, and is told why it failed. gevent's own connect asks the resolver even for
    an address, which costs 23 % of a session.
    """
    family, host = address
    connection = _new_socket(family)
    try:
        connection.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
        code = connection.connect_ex((host, port))
        if code not in (0, errno.EINPROGRESS):
            # Without IPv6 the same code says that there is no address to come from, in place of no port.
            no_port = code == errno.EADDRNOTAVAIL and family == stdlib_socket.AF_INET
            raise OurFault(os.strerror(code)) if no_port or code in OWN_LACK else PeerGone(os.strerror(code))
    except BaseException:
        connection.close()
        raise
    return connection


def _new_socket(family: int) -> Socket:
    """Raises OurFault: no descriptor is left; PeerGone: there is no such family, as no IPv6."""
    kind = stdlib_socket.SOCK_STREAM | stdlib_socket.SOCK_NONBLOCK | stdlib_socket.SOCK_CLOEXEC
    try:
        return Socket(family, kind)
    except OSError as error:
        why = error.strerror or str(error)
        raise OurFault(why) if is_own_lack(error) else PeerGone(why) from None
