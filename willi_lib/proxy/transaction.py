"""One message under way, and the upstream side of its session: which upstream hears it, on which connection."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from time import monotonic

from .. import log
from ..net.deadline import FOREVER, Deadline, TimeLimit
from ..routing.route import LookupFailed, NoRoute, Route
from ..smtp import reply as replies
from ..smtp.reply import UPSTREAM, WILLI, Outcome, Rejected, Reply
from ..smtp.syntax import Command, Mail, Path
from ..status.counts import REFUSED
from .context import SessionContext
from .lookup import route_of
from .relay import Relay
from .upstream import Client, Upstream, UpstreamFailed, WantsTls, is_not_from_us

# Connections that a client may have opened one after the other without a message that is accepted: one for each EHLO or
# change of route. An upstream counts the refusals on one connection only.
MAX_IN_VAIN = 20

# Seconds for looking up, before their turn, the recipients that the client has sent in one group. What is not found by
# then is looked up in its turn, under the time limit of its own command.
LOOK_AHEAD_TIME = 1.0

LONG_WAIT = 60.0  # seconds for one answer, after which an upstream has failed if the client hangs up

SETTLE_TIME = 5.0  # seconds for what was asked behind a refused MAIL: meanwhile the client waits for a known answer


@dataclass(slots=True)
class Transaction:
    """One message under way (RFC 5321 §3.3)."""

    mail: Mail
    group: deque[Command]  # RCPT, and DATA as the last: the client has sent them together with the command in hand
    began: float = field(default_factory=monotonic)
    recipients: list[Path] = field(default_factory=list)  # those that the upstream accepted
    refused: int = 0  # recipients that were not accepted
    deferred: int = 0  # those of them that may be tried again
    refusals: dict[Route, Outcome] = field(default_factory=dict)  # of routes that did not work out
    route: Route | None = None  # the last one asked, for the log
    has_upstream: bool = False  # the upstream of the session has accepted MAIL
    relay: Relay | None = None  # the content has begun
    refusal: Reply | None = None  # the message was refused before its end: what further chunks and recipients get

    def refuse(self, answer: Reply) -> None:
        """Count a recipient that was not accepted; there is no limit to them, so nothing else is kept."""
        self.refused += 1
        self.deferred += not answer.permanent

    @property
    def is_refused(self) -> bool:
        """Whether all recipients were refused: the server that refused them counts that, and RSET is due then."""
        return self.refused > 0 and not self.recipients

    def no_recipients(self) -> Reply:
        """Why there can be no message; a client that looks at nothing else must not take a 4yz for final."""
        if not self.refused:
            return replies.RCPT_FIRST
        return replies.NO_RECIPIENTS_YET if self.deferred else replies.NO_VALID_RECIPIENTS


class Upstreams:
    """Chooses the upstream of each transaction; owns its connection, and keeps those of the last routes.

    open: the connection of the last transaction that had one; the others wait until their route is asked for again.
    """

    def __init__(self, sid: str, context: SessionContext, client: Client, deadline: Deadline) -> None:
        self.open: Upstream | None = None
        self._kept: list[Upstream] = []  # without `open`; the one unused longest is the first
        self.in_vain = 0  # connections since the last message that was accepted
        self._sid = sid
        self._context = context
        self._settings = context.settings
        self._connector = context.connector
        self._client = client
        self._deadline = deadline

    def of(self, transaction: Transaction | None) -> Upstream | None:
        """The upstream that has accepted MAIL of this transaction, as long as it is there."""
        return self.open if transaction and transaction.has_upstream else None

    def add(self, transaction: Transaction, recipient: Path) -> Reply:
        """The upstream's answer to RCPT; find and open the upstream first if need be.

        Raises NoRoute, LookupFailed, UpstreamFailed, Rejected.
        """
        upstream = self.of(transaction)
        if transaction.refusal:
            raise Rejected(transaction.refusal)
        if len(transaction.recipients) >= self._settings.max_recipients:
            raise Rejected(replies.TOO_MANY_RECIPIENTS)
        if transaction.recipients and upstream is None:
            raise Rejected(replies.UPSTREAM_LOST)
        line = _rcpt_line(recipient)
        if upstream is None or not upstream.is_pipelined(line):  # else decided then: a second look-up might differ
            upstream = self._upstream_for(transaction, recipient)
        answer = upstream.ask(line)
        if is_not_from_us(answer):
            return self._ask_over_tls(upstream, transaction, recipient, answer)
        return answer

    def _upstream_for(self, transaction: Transaction, recipient: Path) -> Upstream:
        """The upstream that the recipient is to be asked of, with RCPT pipelined if others come with it."""
        upstream = self.of(transaction)
        if upstream and not self._may_share(transaction, upstream.route, recipient):
            if transaction.recipients or not transaction.refusals:
                raise Rejected(replies.OTHER_DESTINATION)
            upstream = None
        if upstream is None:
            return self._choose(transaction, recipient)
        if not upstream.is_pipelined():
            upstream.send_pipelined([_rcpt_line(recipient), *self._lines_ahead(transaction, upstream)])
        return upstream

    def _ask_over_tls(self, upstream: Upstream, transaction: Transaction, recipient: Path, answer: Reply) -> Reply:
        """Ask again if the answer to RCPT was about us, and TLS may help. Raises Rejected with a 451 if it does not."""
        if isinstance(upstream.unwelcome("RCPT", answer), WantsTls) and not transaction.recipients:
            self._go_over_to_tls()
            upstream = self._choose(transaction, recipient)
            answer = upstream.ask(_rcpt_line(recipient))
            if not is_not_from_us(answer):
                return answer
        log.error("Upstream wants TLS or a password", sid=self._sid, upstream=str(upstream.server), error=str(answer))
        raise Rejected(replies.NOT_FROM_US)

    def _go_over_to_tls(self) -> None:
        """The upstream takes nothing in clear: the next connection to it is another one."""
        if self.open:
            self._connector.note_wants_tls(self.open.server)
        self.drop()

    def _choose(self, transaction: Transaction, recipient: Path) -> Upstream:
        """The upstream for a recipient, which has accepted MAIL. A route is not tried twice in a transaction."""
        transaction.has_upstream = False
        route = transaction.route = self._route_of(recipient)
        if route not in transaction.refusals:
            try:
                upstream, answer = self._begin(transaction, route, recipient)
                if answer.positive:
                    transaction.has_upstream = True
                    return upstream
                self._drain_answers(upstream, answer)
                transaction.refusals[route] = Outcome(replies.at_rcpt(answer), UPSTREAM)
            except Rejected as rejected:
                transaction.refusals[route] = Outcome(replies.at_rcpt(rejected.reply), rejected.by)
            except UpstreamFailed:
                transaction.refusals[route] = Outcome(replies.UPSTREAM_FAILED, WILLI)
                raise
        reply, by, _ = transaction.refusals[route]
        assert reply
        raise Rejected(reply, by)

    def _begin(self, transaction: Transaction, route: Route, recipient: Path) -> tuple[Upstream, Reply]:
        """Say MAIL to the upstream, and a second time if it wants that over TLS."""
        try:
            return self._begin_once(transaction, route, recipient)
        except WantsTls:
            self._go_over_to_tls()
        return self._begin_once(transaction, route, recipient)

    def _begin_once(self, transaction: Transaction, route: Route, recipient: Path) -> tuple[Upstream, Reply]:
        """Say MAIL on the kept connection of this route if it is still of use, else on a new one."""
        if self.open is None or self.open.route != route:
            self._change_to(route)
        if self.open:
            try:
                with self._deadline.limit(self._settings.connect_timeout, "on a kept connection (connect_timeout)"):
                    self.open.reset()
                    answer = self._say_mail(self.open, transaction, recipient)
                if answer.code != 421:
                    return self.open, answer
            except UpstreamFailed as failure:
                if self._deadline.overdue():
                    raise
                log.debug("Kept upstream connection is gone", sid=self._sid, error=str(failure))
            self.drop()
        self.open = self._connect(route)
        return self.open, self._say_mail(self.open, transaction, recipient)

    def _change_to(self, route: Route) -> None:
        """Take the kept connection of another route, if there is one, and keep the one in hand."""
        self._put_away()
        for upstream in self._kept:
            if upstream.route == route:
                self._kept.remove(upstream)
                self.open = upstream
                break
        if len(self._kept) >= self._settings.kept_upstreams:  # the one in hand, or that is opened next, counts, too
            self._kept.pop(0).quit()

    def _put_away(self) -> None:
        if self.open and self.open.is_of_use:
            self._kept.append(self.open)
            self.open = None
        else:
            self.drop()

    def _connect(self, route: Route) -> Upstream:
        """A new connection; 421 for a client that has had too many, whatever became of them."""
        if self.in_vain >= MAX_IN_VAIN:
            log.info("Too many upstream connections without a message", sid=self._sid, client=str(self._client))
            self._context.counts.add(REFUSED, "max_errors")
            raise Rejected(replies.TOO_MANY_ERRORS)
        self.in_vain += 1
        return self._connector.connect(route, self._client, self._deadline, self._sid)

    def _say_mail(self, upstream: Upstream, transaction: Transaction, recipient: Path) -> Reply:
        """MAIL, and behind it in the same write what the client has sent in one group with this RCPT."""
        mail = transaction.mail
        if mail.smtputf8 and "SMTPUTF8" not in upstream.features:
            raise Rejected(replies.STANDS_IN if upstream.stands_in else replies.NO_SMTPUTF8)
        if mail.body == "8BITMIME" and self._settings.strict_8bitmime and "8BITMIME" not in upstream.features:
            raise Rejected(replies.STANDS_IN if upstream.stands_in else replies.NO_8BITMIME)
        line = mail.line(upstream.features)
        upstream.send_pipelined([line, _rcpt_line(recipient), *self._lines_ahead(transaction, upstream)])
        answer = upstream.ask(line)
        upstream.in_transaction = True  # refused or not: RSET makes sure of it before the next MAIL
        if is_not_from_us(answer):
            raise upstream.unwelcome("MAIL", answer)
        return answer

    def _lines_ahead(self, transaction: Transaction, upstream: Upstream) -> list[bytes]:
        """The commands of a group that can go upstream before their turn, as their answers will be passed on."""
        lines: list[bytes] = []
        if "PIPELINING" not in upstream.features:
            return lines
        room = self._settings.max_recipients - len(transaction.recipients) - 1
        deadline = monotonic() + LOOK_AHEAD_TIME
        for _verb, _argument, recipient in transaction.group:
            if recipient is None:
                lines.append(b"DATA")
                break
            try:
                if len(lines) >= room or not self._may_share(transaction, upstream.route, recipient, deadline):
                    break
            except (NoRoute, LookupFailed):  # its turn will come, and its reply
                break
            lines.append(_rcpt_line(recipient))
        return lines

    def _route_of(self, recipient: Path) -> Route:
        """Raises NoRoute, LookupFailed, which is also what a time limit means here: no upstream is to blame."""
        try:
            return route_of(self._context.mappings, self._settings, recipient, self._context.counts)
        except TimeLimit as limit:
            raise LookupFailed(str(limit)) from None

    def _may_share(self, transaction: Transaction, route: Route, recipient: Path, deadline: float = FOREVER) -> bool:
        """Whether a later recipient may go to the upstream of the first one. Raises NoRoute, LookupFailed.

        While none is accepted, one whose own upstream has refused MAIL or failed must not be asked of another.
        """
        settled = bool(transaction.recipients) or not transaction.refusals
        if settled and self._settings.mixed_recipients == "first":
            return True
        with self._deadline.until(deadline, "looking up the recipient"):
            return self._route_of(recipient) == route

    def _drain_answers(self, upstream: Upstream, answer: Reply) -> None:
        """After a refused MAIL: fetch what else was asked in the same write. After 421 nothing more comes."""
        if answer.code == 421:
            self.mark_down(upstream)
            self.drop()
            return
        try:
            with self._deadline.limit(SETTLE_TIME, "waiting for the answers behind a refused MAIL"):
                upstream.drain_answers()
        except UpstreamFailed as failure:
            log.debug("Upstream dropped", sid=self._sid, error=str(failure))
            self.drop()

    def note_failure(self, transaction: Transaction) -> None:
        """The upstream failed, or said 421: try its host last for a while, unless it had enough of this client."""
        if self.open and not transaction.refused:
            self.mark_down(self.open)

    def note_impatience(self, transaction: Transaction, seconds: float) -> None:
        """The client has hung up after so long a time; few wait until upstream_timeout, and nobody would hear of it."""
        if seconds > LONG_WAIT:
            where = self.open.server if self.open else transaction.route
            why = f"{where}: no answer for {seconds:.0f} s, and the client has hung up"
            log.error("Upstream failed", sid=self._sid, client=str(self._client), error=why)
            self.note_failure(transaction)

    def mark_down(self, upstream: Upstream) -> None:
        self._connector.note_failure(upstream)

    def note_accepted(self, upstream: Upstream) -> None:
        self.in_vain = 0
        self._connector.note_accepted(upstream)

    def drop(self) -> None:
        """Close the connection: an unfinished message stays unfinished."""
        if self.open:
            self.open.drop()
            self.open = None

    def quit(self) -> None:
        """Say goodbye to all."""
        self._put_away()
        while self._kept:
            self._kept.pop(0).quit()

    def drop_all(self) -> None:
        """Close what is left if `quit` did not come to its end."""
        self.drop()
        while self._kept:
            self._kept.pop().drop()


def _rcpt_line(recipient: Path) -> bytes:
    return b"RCPT TO:" + recipient.octets
