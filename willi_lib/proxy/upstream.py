"""Our client side: connect, EHLO, STARTTLS, XCLIENT, then the client's commands, and QUIT.

A `Connector` (one per worker) finds a host of a route that answers and returns an
`Upstream` that knows the client and waits for MAIL. All waits run on the session's clock.
"""

from __future__ import annotations

import errno
import os
import re
import socket as stdlib_socket
from _socket import socket as Socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from time import monotonic

from .. import log
from ..config import Settings
from ..hosts import with_port
from ..net.resolver import Address, Cache, DnsFailed, Resolver
from ..net.tls import upstream_contexts
from ..net.wire import Clock, PeerGone, Wire, WireError
from ..routing.route import Policy, Route, Server
from ..smtp import proxy_header
from ..smtp import reply as replies
from ..smtp.body import END_OF_DATA
from ..smtp.reply import BadReply, Reject, Reply
from ..smtp.syntax import TEMPUNAVAIL, UNAVAILABLE, parse_features, xclient_lines
from ..status.counts import XCLIENT, Counts

NO_MX = 1 << 16  # a preference that no MX record has
# Of a domain, and addresses of one host: what a DNS answer of 64 KiB can name would take all of upstream_timeout.
# RFC 5321 §5.1 allows such a limit; Postfix's is 5 addresses in all.
MAX_MX_HOSTS = 20
MAX_ADDRESSES = 10
DOWN_TIME = 60.0  # seconds that a host that failed is tried last
LAST_WORDS_TIMEOUT = 0.1  # seconds for the rest of a reply of which the beginning has come already
ONE_WRITE = 64 << 10  # octets up to which copying the end of a message costs less than a second write
INTERMEDIATE = {b"DATA": 354, b"STARTTLS": 220, b"XCLIENT": 220}  # the codes that are neither yes nor no, where due
OUR_LACK = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))  # of descriptors and memory

OURSELVES_TIME = 3600.0  # seconds that an MX host that turned out to be ourselves is not tried
WANTS_TLS_TIME = 3600.0  # seconds that a host that wants TLS is not tried in clear
NOT_KNOWN = 504  # and less: a command that is not known
TOLD = (220, 250)  # answers to XCLIENT that say that the upstream knows the client now
BAD_VALUE = (501, 504)  # answers to XCLIENT that say that a value is not taken

# Postfix's words, and nothing besides: what an upstream says of a client may have any words in it.
_NOT_AUTHORIZED = re.compile(rb"(?:5\.7\.\d+ )?(?:Error: )?insufficient authorization\.?", re.IGNORECASE)


# Exchange's words for 530, as its connectors with RequireTLS say them.
_TLS_IS_REQUIRED = re.compile(rb"(?:5\.7\.\d+ )?STARTTLS is required to send mail\b.*", re.IGNORECASE)


def is_not_from_us(answer: Reply) -> bool:
    """Whether it is about us, not about the client: TLS or a password is missing (RFC 3207 §4, RFC 4954 §6)."""
    return answer.code == 530 or (answer.code == 451 and _TLS_IS_REQUIRED.match(answer.lines[0]) is not None)


class UpstreamFailed(Exception):
    """No upstream, or no further use of this one; the text is for the log. The client gets a 451."""


class OurFault(UpstreamFailed):
    """The same because of something that we lack, for which no host is to blame."""


class WantsTls(UpstreamFailed):
    """The same because we spoke in clear, and the upstream offers TLS."""


class XclientNeeded(Reject):
    """No mail may go to this host, which was not told who the client is. The next one may be told."""

    def __init__(self) -> None:
        super().__init__(replies.XCLIENT_NEEDED)


class MailLoop(Reject):
    """The upstream is ourselves, or the host that the mail comes from."""

    def __init__(self, server: Server | None = None, is_ours: bool = False) -> None:
        super().__init__(replies.MAIL_LOOP)
        self.server = server
        self.is_ours = is_ours  # it bears our domain, and so it does for every client


class Refused(Exception):
    """The upstream's verdict on the client or the message, outside the answer to one of its commands."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class XclientDeferred(Refused):
    """A 4yz to an XCLIENT that is required: the next host may answer otherwise."""


@dataclass
class Client:
    """Who the client is, as far as the upstream may know."""

    address: str  # "": not known, as a proxy in front of us says
    port: int  # 0: not known
    own: Callable[[], tuple[str, int]]  # address and port at which it reached us; an IPv6 address has two fields more
    name: Callable[[], str] = lambda: TEMPUNAVAIL  # waits for DNS, at most until dns_timeout after the accept
    helo: str = ""
    esmtp: bool = True  # it said EHLO
    tls: str | None = None  # version; None: in clear
    proxy: str | None = None  # of a client of a host in `xclient_hosts`: what that host called itself; "": nothing

    def __str__(self) -> str:
        """`address:port` for the log, an IPv6 address in brackets."""
        return with_port(self.address, self.port) if self.address else "unknown"


class Upstream:
    """One connection to an upstream, after its last EHLO."""

    def __init__(self, wire: Wire, server: Server, route: Route) -> None:
        self.wire = wire
        self.server = server
        self.route = route
        self.features: Mapping[str, str] = {}
        self.knows_client = False  # by XCLIENT or a PROXY header
        self.greeted_after = 0.0  # seconds
        self.xclient = ""  # what became of it
        self.introduced = False  # and waits for MAIL, which may take time
        self.in_transaction = False  # it heard MAIL, and no end of that
        self.could_use_tls = False  # it offers STARTTLS, and the setting allows that
        self.out_of_step = False  # dropped after a badly framed reply: the next one could be a part of that
        self._ahead: deque[bytes] = deque()  # sent, the answers still to come
        self.xclient_offer = ""  # the attributes that it lists; not all go on to list them afterwards (for `check`)
        self.xclient_answer: Reply | None = None
        self.address_told = True  # unless it does not take that of this client

    # -- commands

    def ask(self, line: bytes) -> Reply:
        """Send one command and return its answer. A command of the group sent ahead is not sent again.

        Raises UpstreamFailed.
        """
        try:
            if not self._ahead:
                self._send_group([line])
                self._ahead.append(line)
            elif self._ahead[0] != line:
                raise UpstreamFailed(f"{self.server}: sent ahead something else than {line!r}")  # a bug of ours
            answer = self.wire.read_reply()
            self._ahead.popleft()  # not before: behind a DATA that nobody heard the answer to, QUIT would be content
        except (WireError, BadReply) as error:
            raise UpstreamFailed(f"{self.server}: {error}") from None
        if not answer.positive and answer.code < 400:
            verb = line.partition(b" ")[0]
            if answer.code != INTERMEDIATE.get(verb):  # a goodbye, or a second greeting
                raise UpstreamFailed(f"{self.server}: {verb.decode()}: {answer}")
        return answer

    def send_ahead(self, lines: Sequence[bytes]) -> None:
        """Send commands whose answers `ask` will fetch, in one write if the upstream offers PIPELINING.

        If it does not, nothing is sent, and `ask` sends one by one. Raises UpstreamFailed.
        """
        if len(lines) > 1 and "PIPELINING" in self.features and not self._ahead:
            try:
                self._send_group(lines)
            except (WireError, BadReply) as error:
                raise UpstreamFailed(f"{self.server}: {error}") from None
            self._ahead.extend(lines)

    def is_ahead(self, line: bytes | None = None) -> bool:
        """Whether this command, or any, is already under way."""
        return bool(self._ahead) if line is None else line in self._ahead

    def _send_group(self, lines: Sequence[bytes]) -> None:
        """Raises WireError, BadReply.

        UpstreamFailed if the upstream has spoken out of turn: its answers could not be
        told apart. Its goodbye inside a transaction is Refused, as if it were the answer.
        """
        # During the introduction the last answer has only just come: asking the kernel for more would be in vain. Where
        # it has not, those who know that look.
        if self.wire.pending() if self.introduced else self.wire.buffered:
            with self.wire.clock.limit(LAST_WORDS_TIMEOUT, "early words"):  # half a line must not hold us up
                words = self.wire.read_reply()
            if words.code == 421 and self.in_transaction:
                raise Refused(words)
            raise UpstreamFailed(f"{self.server}: spoke out of turn: {words}")
        self.wire.write(b"\r\n".join(lines) + b"\r\n")
        self.wire.flush()

    def unwelcome(self, command: str, answer: Reply) -> UpstreamFailed:
        """What an answer means that is about us, as `is_not_from_us` says."""
        kind = WantsTls if self.could_use_tls and not self.wire.tls_version else UpstreamFailed
        return kind(f"{self.server}: {command}: {answer}")

    # -- the message

    def begin_data(self) -> Reply:
        """DATA; the upstream's 354. Raises Refused, UpstreamFailed."""
        answer = self.ask(b"DATA")
        if is_not_from_us(answer):
            raise self.unwelcome("DATA", answer)
        if answer.code >= 400:
            raise Refused(answer)
        if answer.code != 354:
            raise UpstreamFailed(f"{self.server}: DATA: {answer}")
        return answer

    def send(self, octets: bytes) -> None:
        """Pass on message content. Raises Refused, UpstreamFailed."""
        if self._ahead:  # a DATA among them would make a message of what is meant as a chunk, or the reverse
            raise UpstreamFailed(f"{self.server}: content before the answer to {self._ahead[0]!r}")
        self._refuse_out_of_step()
        try:
            self.wire.send(octets)
        except WireError as error:
            self._last_words()
            raise UpstreamFailed(f"{self.server}: {error}") from None

    def finish(self, octets: bytes) -> Reply:
        """Pass on the last content of DATA, end it, and return the verdict. Raises Refused, UpstreamFailed."""
        if len(octets) > ONE_WRITE:
            self.send(octets)
            octets = b""
        return self.finish_chunk(octets + END_OF_DATA)

    def finish_chunk(self, octets: bytes) -> Reply:
        """The same for a chunk of BDAT, which ends by its length."""
        self._refuse_out_of_step()
        if self.wire.pending():  # an answer before its question must not be taken for the verdict
            self._last_words()
            did = "spoke" if self.wire.buffered else "hung up"
            raise UpstreamFailed(f"{self.server}: {did} inside the message")
        self.send(octets)
        try:
            verdict, in_order = self.wire.read_verdict()
        except (WireError, BadReply) as error:
            raise UpstreamFailed(f"{self.server}: {error}") from None
        if not in_order:
            self.out_of_step = True
            self.drop()
            log.warn("Badly framed reply to a message", upstream=str(self.server), reply=str(verdict))
        if not verdict.positive and verdict.code < 400:
            raise UpstreamFailed(f"{self.server}: no verdict: {verdict}")
        return verdict

    def _refuse_out_of_step(self) -> None:
        if self.out_of_step:
            raise UpstreamFailed(f"{self.server}: badly framed reply to the chunk before")

    def _last_words(self) -> None:
        """Raise Refused if the upstream has said why it wants no more of the message."""
        try:
            with self.wire.clock.limit(LAST_WORDS_TIMEOUT, "last words"):
                words = self.wire.read_verdict()[0] if self.wire.pending() and self.wire.buffered else None
        except (WireError, BadReply) as error:
            log.debug("No last words", upstream=str(self.server), error=str(error))
            return
        if words and words.code >= 400:
            raise Refused(words)

    # -- the end of a transaction or of the connection

    def settle(self) -> None:
        """Fetch the answers to what was sent ahead in vain. Raises UpstreamFailed."""
        while self._ahead:
            line = self._ahead[0]
            if self.ask(line).code == 354:
                raise UpstreamFailed(f"{self.server}: wants a message that nobody will get")

    def reset(self) -> None:
        """Make it ready for the next MAIL. Raises UpstreamFailed, also if it has hung up meanwhile."""
        useless = self._ahead or self.out_of_step
        if useless or (self.in_transaction and self.wire.pending()):  # else MAIL will look
            raise UpstreamFailed(f"{self.server}: kept connection is of no use")
        if self.in_transaction and not self.ask(b"RSET").positive:
            raise UpstreamFailed(f"{self.server}: RSET refused")
        self.in_transaction = False

    def quit(self) -> None:
        """Say QUIT and close. Nothing depends on the answer, so there is no wait for it, as with Postfix."""
        if self._ahead or self.out_of_step:
            self.drop()
            return
        self.wire.write(b"QUIT\r\n")
        self.wire.hang_up()

    def drop(self) -> None:
        """Close at once: no dot, no QUIT, so that an unfinished message stays unfinished."""
        self.wire.close()


class Connector:
    """Opens upstream connections; remembers for a while which hosts failed."""

    def __init__(self, settings: Settings, resolver: Resolver, counts: Counts | None = None) -> None:
        """Raises CertificateError: authorities that cannot be read."""
        self._settings = settings
        self._counts = counts or Counts()
        self._resolver = resolver
        self._contexts = upstream_contexts(settings)
        self._wants: Cache[bool] = Cache()  # hosts that take nothing in clear
        self._ourselves: Cache[bool] = Cache()  # MX hosts that turned out to be ourselves
        self._down: dict[tuple[str, int], float] = {}  # host or address, and port: down until (monotonic)

    def connect(self, route: Route, client: Client, clock: Clock, sid: str) -> Upstream:
        """The first host of the route that answers, ready for MAIL.

        Raises UpstreamFailed with what was wrong with each; Refused, the upstream's
        verdict on the client; Reject: the upstream is ourselves, or will not take XCLIENT.
        """
        origins: set[str] = set()  # MX hosts that turned out to be where this client's mail comes from
        while True:
            try:
                return self._connect(route, client, clock, sid, origins)
            except MailLoop as loop:
                if loop.server is None or loop.server.host in origins or self._is_ourselves(loop.server.host):
                    raise
                if loop.is_ours:
                    self._ourselves.put(loop.server.host, True, OURSELVES_TIME)
                else:
                    origins.add(loop.server.host)

    def _connect(self, route: Route, client: Client, clock: Clock, sid: str, origins: Set[str]) -> Upstream:
        failures: list[str] = []
        loops: list[str] = []  # hosts that are no way out
        servers = self._by_state(self._hosts(route, failures, loops, origins))
        for number, server in enumerate(servers, 1):
            began = monotonic()
            try:
                return self._open_host(route, server, client, clock, sid, is_last=number == len(servers))
            except UpstreamFailed as error:
                failures.append(str(error))
                is_ours = isinstance(error, OurFault)
            except MailLoop:
                self._counts.refused(server)
                if server not in route.servers:  # an MX host: others are out of the question, too
                    raise
                loops.append(str(server))
                continue
            except (Refused, Reject) as refusal:
                self._counts.refused(server)
                if number == len(servers) or not self._may_ask_next(server, refusal):
                    raise
                failures.append(f"{server}: {refusal.reply}")
                continue
            overdue = clock.overdue()
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

    def _may_ask_next(self, server: Server, refusal: Refused | Reject) -> bool:
        """Whether another host may take what this one refused: only where XCLIENT is required, and did not work."""
        if isinstance(refusal, XclientNeeded):
            self.mark_down(server)
        return isinstance(refusal, (XclientNeeded, XclientDeferred))

    def _open_host(
        self, route: Route, server: Server, client: Client, clock: Clock, sid: str, is_last: bool
    ) -> Upstream:
        """The first address of a host that answers. Raises as `connect` does.

        is_last: there is no other host that needs time to be tried, if this one greets and says nothing more.
        """
        failures: list[str] = []
        addresses = sorted(self._addresses(server, clock), key=lambda address: self._is_down(address[1], server.port))
        for address in addresses:
            if clock.overdue():
                break
            has_all = is_last and address == addresses[-1]
            seconds = self._settings.upstream_timeout if has_all else self._settings.connect_timeout
            try:
                upstream = self._open(route, server, address, client, clock, sid, seconds)
            except OurFault as error:
                raise OurFault(f"{server}: {error}") from None
            except (UpstreamFailed, WireError, BadReply) as error:
                where = "" if address[1] == server.host else f" [{address[1]}]"
                failures.append(f"{server}{where}: {str(error).removeprefix(f'{server}: ')}")
                if len(addresses) > 1 and not clock.overdue():  # else each client would wait for a silent IPv6 first
                    self.mark_down(Server(address[1], server.port))
            else:
                self._down.pop((address[1], server.port), None)
                self._note_open(upstream)
                return upstream
        raise UpstreamFailed("; ".join(failures) or f"{server}: no time was left for it")

    def _hosts(
        self, route: Route, failures: list[str], loops: list[str], origins: Set[str]
    ) -> Iterator[Server]:
        """The route's servers, with `mx:domain` replaced by its MX hosts."""
        for server in route.servers:
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
        self._down.pop((upstream.server.host, upstream.server.port), None)
        tls = upstream.wire.tls_version or "none"
        self._counts.opened(upstream.server, upstream.greeted_after, tls, upstream.xclient or "off")

    def mark_down(self, server: Server) -> None:
        """It failed before it accepted a recipient: for a while it is tried last."""
        now = monotonic()
        self._down = {key: until for key, until in self._down.items() if until > now}
        self._down[server.host, server.port] = now + DOWN_TIME

    def _addresses(self, server: Server, clock: Clock) -> list[Address]:
        try:
            with clock.limit(self._settings.dns_timeout, "looking up the address (dns_timeout)"):
                return self._resolver.addresses_of(server.host)[:MAX_ADDRESSES]
        except (DnsFailed, WireError) as error:
            _new_socket(stdlib_socket.AF_INET).close()  # without a descriptor there is no answer either
            raise UpstreamFailed(f"{server}: {error}") from None

    def note_wants_tls(self, server: Server) -> None:
        """It takes nothing in clear: for a while all goes over TLS, whatever the client used."""
        log.info("The upstream wants TLS, and gets it from now on", upstream=str(server))
        self._wants.put(str(server), True, WANTS_TLS_TIME)

    def _open(
        self, route: Route, server: Server, address: Address, client: Client, clock: Clock, sid: str, seconds: float
    ) -> Upstream:
        """One attempt at one address, and another one if it wants TLS. Raises as `_open_once` does.

        seconds: for what follows the greeting, up to MAIL.
        """
        try:
            return self._open_once(route, server, address, client, clock, sid, seconds)
        except WantsTls:
            self.note_wants_tls(server)
        return self._open_once(route, server, address, client, clock, sid, seconds)

    def _open_once(
        self, route: Route, server: Server, address: Address, client: Client, clock: Clock, sid: str, seconds: float
    ) -> Upstream:
        """Raises UpstreamFailed, WireError, BadReply, Refused, Reject."""
        began = monotonic()
        with clock.limit(self._settings.connect_timeout, "connecting (connect_timeout)"):
            connection = _connect(address, server.port)
            wire = Wire(connection, clock, log.tracer(sid, "upstream"), self._settings.write_timeout)
            upstream = Upstream(wire, server, route)
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
            with clock.limit(seconds, "waiting for the answers before MAIL"):
                self._introduce(upstream, client, sid)
            upstream.introduced = True
        except BaseException:  # TimeLimit and the like too: nobody else knows this connection yet
            upstream.drop()
            if upstream.xclient:
                self._counts.add(XCLIENT, upstream.xclient)
            raise
        return upstream

    def _expect_greeting(self, upstream: Upstream) -> None:
        greeting = upstream.wire.read_reply()
        if greeting.welcomes:
            return
        if upstream.route.policy.send_proxy != "no" and greeting.code >= 400 and not _is_of_header(greeting):
            raise Refused(greeting)  # by the PROXY header it knew whom it was talking to
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
        if policy.xclient != "no" and self._send_xclient(upstream, client, sid, was_offered):
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
            upstream.features = parse_features(answer)
        if is_not_from_us(answer):
            raise upstream.unwelcome("EHLO", answer)
        if answer.code >= 400 and upstream.knows_client:
            raise Refused(answer)  # by the PROXY header it knew whose name that is
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
            raise Refused(answer)
        upstream.features = parse_features(answer) if client.esmtp else {}

    def _wants_tls(self, upstream: Upstream, client: Client) -> bool:
        wish = upstream.route.policy.upstream_tls
        wanted = wish in ("always", "require") or client.tls or self._wants.get(str(upstream.server))
        wanted = wanted and wish != "never"
        return bool(wanted) and "STARTTLS" in upstream.features

    def _start_tls(self, upstream: Upstream) -> None:
        """Raises UpstreamFailed if it does not work: there is no way back to clear text (RFC 3207)."""
        answer = upstream.ask(b"STARTTLS")
        if answer.code != 220:
            raise UpstreamFailed(f"STARTTLS: {answer}")
        if upstream.wire.buffered:
            raise UpstreamFailed("STARTTLS: clear text after the 220")  # response injection
        route = upstream.route
        context = self._contexts[route.tls_verify, route.policy.upstream_tls_ca]
        upstream.wire.start_tls(context, server_side=False, server_name=upstream.server.host.rstrip("."))
        if upstream.wire.pending():  # in clear it has been dropped; in the records of its handshake nobody has looked
            raise UpstreamFailed(f"{upstream.server}: spoke before EHLO")

    def _send_xclient(self, upstream: Upstream, client: Client, sid: str, was_offered: bool) -> bool:
        """Tell the upstream who the client is. False: it was not told, and `xclient` allows that.

        was_offered: by the first EHLO, before STARTTLS.
        Raises Refused, Reject, UpstreamFailed.
        """
        offer = _xclient_offer(upstream, client, sid, was_offered)
        if offer is None:
            return False
        upstream.xclient_offer = offer
        listed = offer.upper().split()
        name = client.name() if "NAME" in listed else ""  # which may have to wait for DNS
        if upstream.wire.pending():
            raise UpstreamFailed(f"{upstream.server}: spoke out of turn, or hung up, before XCLIENT")
        required = upstream.route.policy.xclient == "require"
        half_told = False
        for attributes in _attempts(listed, client, name, may_hide_address=not required):
            answer, half = _ask_all(upstream, xclient_lines(attributes))
            half_told |= half
            if answer is None or answer.code not in BAD_VALUE:
                break
        if answer is None:
            return False
        if answer.code not in TOLD:
            return _judge_refusal(upstream, client, answer, half_told, sid)
        upstream.xclient = "accepted"
        upstream.address_told = not client.address or ("ADDR", UNAVAILABLE) not in attributes
        if not upstream.address_told:
            fields = {"sid": sid, "client": str(client), "upstream": str(upstream.server)}
            log.warn("XCLIENT: the upstream does not take this address, and was told none", **fields)
        return True


def _xclient_offer(upstream: Upstream, client: Client, sid: str, was_offered: bool) -> str | None:
    """What the upstream lists behind XCLIENT; None: it does not offer it. Raises Reject if that must not be."""
    offer = upstream.features.get("XCLIENT")
    fault = ""
    if "ADDR" not in (offer or "").upper().split():
        upstream.xclient = "not_offered"
        fault = "not offered" if offer is None else f"no ADDR in {offer!r}"
    elif not client.address:
        fault = "the address of the client is not known"
    if fault and upstream.route.policy.xclient == "require":
        raise _xclient_needed(upstream, sid, fault)
    if offer is None and was_offered and not upstream.knows_client:
        raise _xclient_needed(upstream, sid, "offered before STARTTLS, and not any more")
    return offer


def _attempts(listed: list[str], client: Client, name: str, may_hide_address: bool) -> Iterator[list[tuple[str, str]]]:
    """The attributes that the upstream listed, in the order to send them: ADDR ends our authority.

    Then with less and less that it may not like: HELO and NAME are what a client chooses, and a server
    without IPv6 takes no IPv6 address. None of that may make our own address of the client's.
    """
    helo = [("PROTO", "ESMTP" if client.esmtp else "SMTP"), ("HELO", client.helo)]
    address = f"IPV6:{client.address}" if ":" in client.address else client.address or UNAVAILABLE
    known = [("PORT", str(client.port or UNAVAILABLE)), ("ADDR", address)]
    unknown = [("PORT", UNAVAILABLE), ("ADDR", UNAVAILABLE)]
    attempts = [[*helo, ("NAME", name), *known]]
    for endpoint in (known, unknown) if may_hide_address else (known,):
        attempts += [[helo[0], ("NAME", one), *endpoint] for one in (name, UNAVAILABLE)]
    asked: list[list[tuple[str, str]]] = []
    for attempt in attempts:
        attributes = [attribute for attribute in attempt if attribute[0] in listed]
        if attributes not in asked:
            asked.append(attributes)
            yield attributes


def _ask_all(upstream: Upstream, lines: Sequence[bytes]) -> tuple[Reply | None, bool]:
    """Ask one after the other, up to the first that is refused.

    The last answer, which is kept for `check`, and whether others before it were accepted.
    """
    answer, asked = None, 0
    for line in lines:
        answer = upstream.ask(line)
        if answer.code not in TOLD:
            break
        asked += 1
    upstream.xclient_answer = answer
    return answer, 0 < asked < len(lines)


def _judge_refusal(upstream: Upstream, client: Client, answer: Reply, half_told: bool, sid: str) -> bool:
    """False: XCLIENT is refused to us, and the mail may go on without. Raises Refused, Reject, UpstreamFailed."""
    if answer.code < 400:
        raise UpstreamFailed(f"{upstream.server}: XCLIENT: {answer}")
    if is_not_from_us(answer):
        raise upstream.unwelcome("XCLIENT", answer)
    if not _is_about_us(answer):
        upstream.xclient = "client_refused"
        is_required = upstream.route.policy.xclient == "require"
        raise XclientDeferred(answer) if is_required and not answer.permanent else Refused(answer)
    upstream.xclient = "refused"
    if upstream.route.policy.xclient == "require" or half_told:
        raise _xclient_needed(upstream, sid, str(answer))
    # Where all that was left of the client's is an IPv4 address, it is not the client that is not taken.
    if answer.code in BAD_VALUE and "." not in client.address and not upstream.knows_client:
        raise _xclient_needed(upstream, sid, str(answer))
    log.error("XCLIENT refused", sid=sid, upstream=str(upstream.server), error=str(answer))
    return False


def _xclient_needed(upstream: Upstream, sid: str, why: str) -> XclientNeeded:
    """The refusal of mail that would go on in our own name."""
    log.error("XCLIENT failed, and the mail must not go without", sid=sid, upstream=str(upstream.server), error=why)
    return XclientNeeded()


def _is_about_us(answer: Reply) -> bool:
    """Whether a refusal of XCLIENT says that we may not use it, not that the client is unwelcome."""
    return 500 <= answer.code <= 504 or (
        answer.code == 550 and _NOT_AUTHORIZED.fullmatch(b" ".join(answer.lines)) is not None
    )


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
            raise OurFault(os.strerror(code)) if no_port or code in OUR_LACK else PeerGone(os.strerror(code))
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
        raise OurFault(why) if error.errno in OUR_LACK else PeerGone(why) from None
