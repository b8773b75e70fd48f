"""The upstream side of a session: which upstream hears a transaction, on which connection, in which writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from .. import log
from ..config import Settings
from ..net.deadline import FOREVER, TimeLimit
from ..net.wire import Wire
from ..routing.route import LookupFailed, Mapping, NoRoute, Route
from ..smtp import reply as replies
from ..smtp.reply import Reject, Reply
from ..smtp.syntax import MAX_COMMAND_LINE, Mail, Path, parse_rcpt, split_command
from ..status.counts import REFUSED, Counts
from .connector import Connector
from .lookup import route_of
from .relay import Relay
from .upstream import Client, Refused, Upstream, UpstreamFailed, WantsTls, is_not_from_us

# Connections that a client may have opened one after the other without a message that is accepted: one for each EHLO or
# change of route. An upstream counts the refusals on one connection only.
MAX_IN_VAIN = 20

# Seconds for looking up, before their turn, the recipients that the client has sent in one group. What is not found by
# then is looked up in its turn, under the time limit of its own command.
LOOK_AHEAD_TIME = 1.0

SETTLE_TIME = 5.0  # seconds for what was asked behind a refused MAIL: meanwhile the client waits for a known answer


@dataclass(frozen=True)
class Refusal:
    """Why a route did not work out: kept as a value, since an exception grows by its frames each time it is raised."""

    reply: Reply
    by_upstream: bool

    def error(self) -> Reject | Refused:
        """A new exception that says so."""
        return Refused(self.reply) if self.by_upstream else Reject(self.reply)


@dataclass
class Transaction:
    """One message under way (RFC 5321 §3.3)."""

    mail: Mail
    began: float = field(default_factory=monotonic)
    recipients: list[Path] = field(default_factory=list)  # those that the upstream accepted
    refused: int = 0  # recipients that were not accepted
    deferred: int = 0  # those of them that may be tried again
    refusals: dict[Route, Refusal] = field(default_factory=dict)  # routes that did not work out
    route: Route | None = None  # the last one asked, for the log
    upstream: Upstream | None = None  # which accepted MAIL
    relay: Relay | None = None  # the content has begun
    verdict: Reply | None = None  # the message was refused before its end: what further chunks get

    def refuse(self, answer: Reply) -> None:
        """Count a recipient that was not accepted; there is no limit to them, so nothing else is kept."""
        self.refused += 1
        self.deferred += not answer.permanent

    @property
    def is_for_one_host(self) -> bool:
        """Whether it is clear which upstream host it was for: the one that took MAIL, or the only one of the route."""
        route = self.route
        return self.upstream is not None or (route is not None and len(route.servers) == 1 and not route.servers[0].mx)

    @property
    def is_refused(self) -> bool:
        """Whether all recipients were refused: the server that refused them counts that, and RSET is due then."""
        return self.refused > 0 and not self.recipients

    def no_recipients(self) -> Reply:
        """Why there can be no message; a client that looks at nothing else must not take a 4yz for final."""
        if not self.refused:
            return replies.RCPT_FIRST
        return replies.NO_RECIPIENTS_YET if self.deferred else replies.NO_VALID_RECIPIENTS


class Dispatch:
    """Chooses the upstream of each transaction, and keeps the connection for the client's next one."""

    def __init__(
        self,
        sid: str,
        settings: Settings,
        mappings: Sequence[Mapping],
        connector: Connector,
        client_wire: Wire,
        client: Client,
        counts: Counts,
    ) -> None:
        self.upstream: Upstream | None = None
        self.in_vain = 0  # connections since the last message that was accepted
        self._sid = sid
        self._settings = settings
        self._mappings = mappings
        self._connector = connector
        self._client_wire = client_wire
        self._client = client
        self._counts = counts

    def ask_rcpt(self, transaction: Transaction, recipient: Path) -> Reply:
        """The upstream's answer to RCPT; find and open the upstream first if need be.

        Raises NoRoute, LookupFailed, UpstreamFailed, Reject, Refused.
        """
        try:
            answer = self._ask_rcpt(transaction, recipient)
        except (UpstreamFailed, Refused) as error:
            self._note_failure(transaction, 421 if isinstance(error, UpstreamFailed) else error.reply.code)
            raise
        self._note_failure(transaction, answer.code)
        return answer

    def _note_failure(self, transaction: Transaction, code: int) -> None:
        if code == 421 and self.upstream and not transaction.recipients:  # else it was never there, or has served
            self.mark_down(self.upstream)

    def mark_down(self, upstream: Upstream) -> None:
        """Have this host tried last for a while."""
        self._connector.mark_down(upstream.server)

    def _ask_rcpt(self, transaction: Transaction, recipient: Path) -> Reply:
        line = _rcpt_line(recipient)
        upstream = transaction.upstream
        if upstream and upstream.is_ahead(line):  # decided when it was sent: a second look-up might differ
            return self._unless_unwelcome(transaction, upstream, recipient)
        if upstream and not self._may_share(transaction, upstream.route, recipient):
            if transaction.recipients or not transaction.refusals:
                raise Reject(replies.OTHER_DESTINATION)
            upstream = transaction.upstream = None
        if upstream is None:
            upstream = self._choose(transaction, recipient)
        elif not upstream.is_ahead():
            upstream.send_ahead([line, *self._lines_ahead(transaction, upstream)])
        return self._unless_unwelcome(transaction, upstream, recipient)

    def _unless_unwelcome(self, transaction: Transaction, upstream: Upstream, recipient: Path) -> Reply:
        """The answer to RCPT. One that is about us: ask again over TLS if that may help, else Reject with a 451."""
        line = _rcpt_line(recipient)
        answer = upstream.ask(line)
        if not is_not_from_us(answer):
            return answer
        failure = upstream.unwelcome("RCPT", answer)
        if isinstance(failure, WantsTls) and not transaction.recipients:
            self._go_over_to_tls()
            transaction.upstream = None
            upstream = self._choose(transaction, recipient)
            answer = upstream.ask(line)
            if not is_not_from_us(answer):
                return answer
        log.error("Upstream wants TLS or a password", sid=self._sid, upstream=str(upstream.server), error=str(answer))
        raise Reject(replies.NOT_FROM_US)

    def _go_over_to_tls(self) -> None:
        """The upstream takes nothing in clear: the next connection to it is another one."""
        if self.upstream:
            self._connector.note_wants_tls(self.upstream.server)
        self.drop()

    def _choose(self, transaction: Transaction, recipient: Path) -> Upstream:
        """The upstream for a recipient, which has accepted MAIL. A route is not tried twice in a transaction."""
        route = transaction.route = self._route_of(recipient)
        if route in transaction.refusals:
            raise transaction.refusals[route].error()
        try:
            try:
                upstream, answer = self._begin(transaction, route, recipient)
            except WantsTls:
                self._go_over_to_tls()
                upstream, answer = self._begin(transaction, route, recipient)
            if not answer.positive:
                self._settle(upstream, answer)
                raise Refused(answer)
        except (Reject, Refused) as refusal:
            transaction.refusals[route] = Refusal(refusal.reply, by_upstream=isinstance(refusal, Refused))
            raise
        except UpstreamFailed:
            transaction.refusals[route] = Refusal(replies.UPSTREAM_FAILED, by_upstream=False)
            raise
        transaction.upstream = upstream
        return upstream

    def _begin(self, transaction: Transaction, route: Route, recipient: Path) -> tuple[Upstream, Reply]:
        """Say MAIL on the kept connection if it is of this route and still of use, else on a new one."""
        if self.upstream and self.upstream.route != route:
            self.quit()
        if self.upstream:
            clock = self._client_wire.clock
            try:
                with clock.limit(self._settings.connect_timeout, "on a kept connection (connect_timeout)"):
                    self.upstream.reset()
                    answer = self._say_mail(self.upstream, transaction, recipient)
                if answer.code != 421:
                    return self.upstream, answer
            except UpstreamFailed as failure:
                if clock.overdue():
                    raise
                log.debug("Kept upstream connection is gone", sid=self._sid, error=str(failure))
            self.drop()
        self.upstream = self._connect(route)
        return self.upstream, self._say_mail(self.upstream, transaction, recipient)

    def _connect(self, route: Route) -> Upstream:
        """A new connection; 421 for a client that has had too many, whatever became of them."""
        if self.in_vain >= MAX_IN_VAIN:
            log.info("Too many upstream connections without a message", sid=self._sid, client=str(self._client))
            self._counts.add(REFUSED, "max_errors")
            raise Reject(replies.TOO_MANY_ERRORS)
        self.in_vain += 1
        return self._connector.connect(route, self._client, self._client_wire.clock, self._sid)

    def _say_mail(self, upstream: Upstream, transaction: Transaction, recipient: Path) -> Reply:
        """MAIL, and behind it in the same write what the client has sent in one group with this RCPT."""
        mail = transaction.mail
        if mail.smtputf8 and "SMTPUTF8" not in upstream.features:
            raise Reject(replies.NO_SMTPUTF8)
        if mail.body == "8BITMIME" and self._settings.strict_8bitmime and "8BITMIME" not in upstream.features:
            raise Reject(replies.NO_8BITMIME)
        line = mail.line(upstream.features)
        upstream.send_ahead([line, _rcpt_line(recipient), *self._lines_ahead(transaction, upstream)])
        answer = upstream.ask(line)
        upstream.in_transaction = True  # refused or not: RSET makes sure of it before the next MAIL
        if is_not_from_us(answer):
            raise upstream.unwelcome("MAIL", answer)
        return answer

    def _lines_ahead(self, transaction: Transaction, upstream: Upstream) -> list[bytes]:
        """The RCPT commands that the client has sent already, and DATA after them (RFC 2920).

        Only what will be passed on without fail when its turn comes; it stays in the
        buffer until then.
        """
        lines: list[bytes] = []
        if "PIPELINING" not in upstream.features:
            return lines
        room = self._settings.max_recipients - len(transaction.recipients) - 1
        deadline = monotonic() + LOOK_AHEAD_TIME
        for octets in self._client_wire.peek_lines():
            if len(octets) + 2 > MAX_COMMAND_LINE:
                break  # it will be refused
            try:
                verb, argument = split_command(octets)
                if verb == b"RCPT" and len(lines) < room:
                    recipient = parse_rcpt(argument, transaction.mail.smtputf8)
                    if not self._may_share(transaction, upstream.route, recipient, deadline):
                        break
                    lines.append(_rcpt_line(recipient))
                    continue
                if verb == b"DATA" and not argument:
                    lines.append(b"DATA")
            except (Reject, NoRoute, LookupFailed):  # its turn will come, and its reply
                pass
            break
        return lines

    def _route_of(self, recipient: Path, deadline: float = FOREVER) -> Route:
        """Raises NoRoute, LookupFailed, which is also what a time limit means here: no upstream is to blame."""
        try:
            with self._client_wire.clock.until(deadline, "looking up the recipient"):
                return route_of(self._mappings, self._settings, recipient, self._counts)
        except TimeLimit as limit:
            raise LookupFailed(str(limit)) from None

    def _may_share(self, transaction: Transaction, route: Route, recipient: Path, deadline: float = FOREVER) -> bool:
        """Whether a later recipient may go to the upstream of the first one. Raises NoRoute, LookupFailed.

        While none is accepted, one whose own upstream has refused MAIL or failed must not be asked of another.
        """
        settled = bool(transaction.recipients) or not transaction.refusals
        return (settled and self._settings.mixed_recipients == "first") or self._route_of(recipient, deadline) == route

    def _settle(self, upstream: Upstream, answer: Reply) -> None:
        """After a refused MAIL: fetch what else was asked in the same write. After 421 nothing more comes."""
        if answer.code == 421:
            self.mark_down(upstream)
            self.drop()
            return
        try:
            with self._client_wire.clock.limit(SETTLE_TIME, "waiting for the answers behind a refused MAIL"):
                upstream.settle()
        except UpstreamFailed as failure:
            log.debug("Upstream dropped", sid=self._sid, error=str(failure))
            self.drop()

    def drop(self) -> None:
        """Close the connection: an unfinished message stays unfinished."""
        if self.upstream:
            self.upstream.drop()
            self.upstream = None

    def quit(self) -> None:
        """Say goodbye to the upstream."""
        if self.upstream:
            self.upstream.quit()
            self.upstream = None


def _rcpt_line(recipient: Path) -> bytes:
    return b"RCPT TO:" + recipient.octets
