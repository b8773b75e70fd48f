"""One client, from banner to QUIT: a method named after each verb.

A method returns a reply and never writes; `run` alone writes. `outcome_of` is the only place where an exception becomes
a reply. One message under way is a `Transaction`; its upstream side is in `Upstreams`, what is logged in `SessionLog`.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from ..net.deadline import TimeLimit, WireError
from ..net.wire import BadFraming, TlsFailed, Wire
from ..routing.route import LookupFailed, NoRoute
from ..smtp import reply as replies
from ..smtp import xclient
from ..smtp.reply import CLIENT, UPSTREAM, WILLI, Outcome, Rejected, Reply
from ..smtp.syntax import Command, Path, parse_bdat, parse_helo, parse_mail, parse_rcpt
from .commands import JUNK, OTHER_PROTOCOLS, Commands, OutOfStep
from .context import SessionContext
from .message_log import SessionLog
from .relay import Content, Relay
from .stage import ANY, ENVELOPE, IDLE, Stage, out_of_sequence
from .transaction import Transaction, Upstreams
from .upstream import Client, UpstreamFailed

LOOKS = 5  # at a client that has closed its side, before it counts as gone: until then it may still read


class SessionEnds(Exception):
    """Nothing more is answered, and `run` hangs up."""


class ShuttingDown(SessionEnds):
    """Willi ends, and this client has no transaction."""


class ClientGone(SessionEnds):
    """The client has hung up while its upstream was asked. No WireError: what failed is no upstream."""


class Session:
    """The dialogue with one client."""

    def __init__(
        self, sid: str, context: SessionContext, wire: Wire, client: Client, may_xclient: bool = False
    ) -> None:
        """sid: `new_session_id`'s, for the log. may_xclient: the client may say who it really is."""
        self.log = SessionLog(sid, client, context.counts)
        self.context = context
        self.settings = context.settings
        self.wire = wire
        self.deadline = wire.deadline
        self.client = client
        self.may_xclient = may_xclient
        self.stage = Stage.START
        self.transaction: Transaction | None = None
        self.upstreams = Upstreams(sid, context, client, wire.deadline)
        self.commands = Commands(wire, self.settings, self.log, context.counts)
        self.closing = False  # after the reply that is about to be written
        self.has_quit = False
        self.draining = False
        self.asking = False  # the upstream, before the message
        self.looks_gone = 0  # looks in a row by which the client had hung up
        self.ending = False  # nothing is left but to hang up

    # -- the loop

    def run(self) -> None:
        """Talk until one side has enough. Nothing that a client does makes it raise."""
        try:
            self.write(self.context.greeting)
            while not self.closing:
                if self.stage is Stage.HANDSHAKE:
                    self.handshake()
                else:
                    self.write(self.step())
        except TimeLimit as limit:
            self.end_with(replies.TOO_SLOW, str(limit))
        except ShuttingDown:
            self.end_with(replies.SHUTTING_DOWN, "shutting down")
        except ClientGone:
            self.log.debug("Client gone", error="it hung up while the upstream was asked")
        except TlsFailed as error:
            self.log.info("TLS failed", error=str(error))
        except BadFraming as error:
            self.end_with(replies.BARE_NEWLINE_IN_COMMAND, str(error))
        except WireError as error:
            self.log.debug("Client gone", error=str(error))
        finally:
            self.end()

    def step(self) -> Reply:
        """The answer to the next command, or to the message."""
        try:
            if self.stage is Stage.CONTENT:
                return self.pass_content()
            if (command := self.commands.take()) is None:
                self.wire.flush()  # before the wait, in which a drain would cut an answer off
            if self.draining and self.stage in IDLE:
                raise ShuttingDown
            return self.commands.count(self.obey(command or self.commands.wait()))
        except (WireError, SessionEnds):
            raise
        except Exception as error:  # noqa: BLE001 -- `outcome_of` has an answer to each
            answer = self.outcome_of(error).reply
            assert answer
            return self.commands.count(answer)

    def obey(self, command: Command) -> Reply:
        """Run one command."""
        verb, argument, recipient = command
        if verb not in VERBS:
            return replies.NOT_HTTP if verb in OTHER_PROTOCOLS else replies.UNKNOWN_COMMAND
        method, stages = VERBS[verb]
        if self.stage not in stages:
            return out_of_sequence(self.stage, verb)
        if verb in JUNK and not (verb == b"RSET" and self.transaction and self.transaction.is_refused):
            self.commands.count_junk()
        try:
            return self.rcpt(argument, recipient) if recipient else method(self, argument)
        except Rejected as rejected:
            if verb in ADDRESSES:
                what = "MAIL refused" if verb == b"MAIL" else "RCPT refused"
                self.log.info(what, argument=argument.decode("utf-8", "backslashreplace"), reply=str(rejected.reply))
            raise

    def outcome_of(self, error: Exception) -> Outcome:
        """What the client is told of an error: the only place where an exception becomes a reply."""
        if isinstance(error, Rejected):
            self.closing |= isinstance(error, OutOfStep)
            return Outcome(error.reply, error.by)
        if isinstance(error, NoRoute):
            return Outcome(replies.NO_ROUTE, WILLI)
        if isinstance(error, LookupFailed):
            write = self.log.debug if error.logged else self.log.error
            write("Lookup failed", error=str(error))
            return Outcome(replies.LOOKUP_FAILED, WILLI, str(error))
        if isinstance(error, (UpstreamFailed, WireError)):  # a time limit may have struck in between, as in a look-up
            return self.fail(str(error))
        # A bug in Willi: reply 451 and close, because we no longer know whether the next octets are commands.
        self.log.bug("Internal error")
        self.closing = True
        return Outcome(replies.OUR_FAULT, WILLI, f"internal error: {error!r}")

    def write(self, answer: Reply) -> None:
        """Write a reply. A 421 is the last word, whoever said it first (RFC 5321 §3.8)."""
        self.wire.write(answer.octets)
        if answer.code == 421:
            self.closing = True

    def end_with(self, answer: Reply, why: str) -> None:
        """Say why we hang up, if the client still listens."""
        self.log.info("Hanging up", error=why)
        if self.stage is Stage.HANDSHAKE:
            return  # clear text would be no TLS
        try:
            self.wire.write(answer.octets)
        except WireError as error:
            self.log.debug("Client gone", error=str(error))

    def end(self) -> None:
        """Leave nothing behind. A message that was not finished is dropped with its connection."""
        self.ending = True
        try:
            self.forget_transaction()
            self.wire.hang_up(linger=self.wire.buffered() or not self.has_quit)
            self.upstreams.quit()
        finally:
            self.upstreams.drop_all()
            self.deadline.close()

    def drain(self) -> None:
        """End after the running transaction; at once if there is none. Called from another greenlet."""
        self.draining = True
        self.deadline.interrupt(ShuttingDown(), unless=lambda: not self.commands.is_waiting or self.stage not in IDLE)

    def look_at_client(self) -> None:
        """End if the client has hung up while its upstream takes its time. Called from another greenlet.

        Not while the upstream judges a whole message: its verdict is worth a line in the log. A client that has only
        closed its side, and waits for the answer to its last command, looks the same, and has it if that comes soon.
        """
        is_gone = self.asking and not self.commands.group and self.wire.has_hung_up()
        self.looks_gone = self.looks_gone + 1 if is_gone else 0
        if self.looks_gone >= LOOKS:
            self.deadline.interrupt(ClientGone(), unless=lambda: not self.asking)

    def stop(self) -> None:
        """End now, whatever is under way: drain_timeout is over."""
        self.deadline.interrupt(ShuttingDown(), unless=lambda: self.ending)

    # -- verbs: the introduction

    def ehlo(self, argument: bytes) -> Reply:
        """EHLO (RFC 5321 §4.1.1.1)."""
        self.introduce(argument, esmtp=True)
        return self.context.ehlo_reply(self.client.tls is not None, self.may_xclient)

    def helo(self, argument: bytes) -> Reply:
        """HELO, without extensions, for the client and for the upstream."""
        self.introduce(argument, esmtp=False)
        return Reply(250, (self.settings.domain.encode(),))

    def introduce(self, argument: bytes, esmtp: bool) -> None:
        """Take a new name; upstream connections that know the old one are of no more use."""
        name = parse_helo(argument)
        self.forget_transaction()
        self.upstreams.quit()
        self.client.helo, self.client.esmtp = name, esmtp
        if self.may_xclient and self.client.proxy is None:
            self.client.proxy = name  # its own, before it speaks for others
        self.stage = Stage.GREETED

    def starttls(self, argument: bytes) -> Reply:
        """STARTTLS (RFC 3207 §4). The handshake follows when the 220 has been written."""
        if argument:
            return replies.NO_PARAMETERS
        if self.client.tls:
            return replies.TLS_ALREADY
        if not self.context.server_tls:
            return replies.NOT_IMPLEMENTED
        self.stage = Stage.HANDSHAKE
        return replies.READY_FOR_TLS

    def handshake(self) -> None:
        """What came along with STARTTLS is thrown away, and all that was said before is forgotten (RFC 3207 §4.2)."""
        assert self.context.server_tls
        if self.wire.buffered():
            self.log.warn("Clear text after STARTTLS dropped")
        with self.deadline.limit(self.settings.read_timeout, "in the TLS handshake (read_timeout)"):
            self.wire.start_tls(self.context.server_tls, server_side=True)
        self.client.tls = self.wire.tls_version
        self.start_over()

    def xclient(self, argument: bytes) -> Reply:
        """XCLIENT from a proxy or test tool that the administrator trusts (XCLIENT_README)."""
        if not self.may_xclient:
            return replies.XCLIENT_DENIED
        self.client.proxy = self.client.proxy or ""  # what it says after this is its client's
        address, port, name = xclient.parse(argument)
        client = self.client
        if address is not None:  # "": not known, and then the proxy's own must not stand for it
            client.address, client.port = address, port
            client.name = self.context.resolver.start_name_of(address) if address else lambda: xclient.UNAVAILABLE
        if name is not None:
            client.name = lambda: name
        self.start_over()
        return self.context.greeting

    def start_over(self) -> None:
        """Back to the greeting."""
        self.upstreams.quit()
        self.client.helo = ""
        self.stage = Stage.START

    # -- verbs: the transaction

    def mail(self, argument: bytes) -> Reply:
        """MAIL (RFC 5321 §4.1.1.2). It is kept until a recipient says which upstream shall hear it."""
        if self.draining:  # the transaction that could go on was a failed one
            raise ShuttingDown
        if self.transaction:  # a failed one: no recipient behind a refused MAIL is one of it
            self.commands.count_junk()
            self.forget_transaction()
        self.stage = Stage.GREETED
        mail = parse_mail(argument, self.settings.extensions)
        if mail.size is not None and mail.size > self.settings.max_message_bytes:
            raise Rejected(replies.TOO_BIG)
        self.transaction = Transaction(mail, self.commands.group)
        self.stage = Stage.SENDER
        return replies.SENDER_KEPT

    def rcpt(self, argument: bytes, recipient: Path | None = None) -> Reply:
        """RCPT (RFC 5321 §4.1.1.3). recipient: the argument, if it was parsed already."""
        transaction = self.current()
        recipient = recipient or parse_rcpt(argument, transaction.mail.smtputf8)
        if not self.commands.group:
            self.commands.read_group(transaction.mail.smtputf8)
        outcome = self.ask(self.upstreams.add, transaction, recipient)
        answer = outcome.reply
        assert answer
        if answer.positive:
            transaction.recipients.append(recipient)
            self.stage = Stage.RECIPIENT
            return answer
        if answer.code == 421 and outcome.by == UPSTREAM and not transaction.recipients:
            self.upstreams.note_failure(transaction)
        transaction.refuse(answer)
        self.log.message(transaction, self.upstreams.of(transaction), outcome, recipient)
        return answer

    def data(self, argument: bytes) -> Reply:
        """DATA (RFC 5321 §4.1.1.4): the 354 is the upstream's own, and the message follows it."""
        transaction = self.current()
        upstream = self.upstreams.of(transaction)
        if argument:
            return replies.NO_PARAMETERS
        if self.stage is Stage.FAILED:
            return replies.UPSTREAM_LOST
        if upstream is None or not (transaction.recipients or upstream.is_pipelined(b"DATA")):
            return transaction.no_recipients()
        outcome = self.ask(upstream.begin_data)
        answer = outcome.reply
        assert answer
        if not transaction.recipients and answer.code == 354:
            self.upstreams.drop()  # it waits for a message that the client will not send
        if not transaction.recipients and (answer.code == 354 or answer.permanent):
            return transaction.no_recipients()
        if answer.code != 354:
            if transaction.recipients and self.upstreams.open:  # else `fail` has logged it
                self.log.message(transaction, upstream, outcome)
            return answer
        transaction.relay = Relay(self.settings, self.wire, upstream)
        self.stage = Stage.CONTENT
        return answer

    def ask(self, work: Callable[..., Reply], *arguments: object) -> Outcome:
        """Ask the upstream, within upstream_timeout. `look_at_client` ends this if the client hangs up meanwhile."""
        self.asking = True
        began = monotonic()
        try:
            with self.deadline.limit(self.settings.upstream_timeout, "asking the upstream (upstream_timeout)"):
                return Outcome(work(*arguments), UPSTREAM)
        except ClientGone:
            self.upstreams.note_impatience(self.current(), monotonic() - began)
            raise
        except SessionEnds:
            raise
        except Exception as error:  # noqa: BLE001 -- `outcome_of` has an answer to each
            return self.outcome_of(error)
        finally:
            self.asking = False

    def bdat(self, argument: bytes) -> Reply:
        """BDAT (RFC 3030 §2). A chunk that is not wanted is read to its end all the same."""
        try:
            size, last = parse_bdat(argument)
        except Rejected as rejected:
            raise OutOfStep(rejected.reply) from None
        if not size and not last:
            self.commands.count_junk()
        transaction = self.transaction
        upstream = self.upstreams.of(transaction)
        if "CHUNKING" not in self.settings.extensions:
            Content(self.settings, self.wire).skip(size)
            return replies.NOT_IMPLEMENTED
        if transaction is None or upstream is None or not transaction.recipients:
            answer = self.bdat_refusal(transaction)
            Content(self.settings, self.wire).skip(size)
            if last and self.stage in (Stage.SENDER, Stage.CHUNKS):
                self.commands.count_junk()
                self.finish_transaction(accepted=False)  # as with Postfix: a MAIL may have been sent behind it
            elif transaction:
                transaction.refusal = answer  # later chunks and recipients would make another message
            return answer
        transaction.relay = transaction.relay or Relay(self.settings, self.wire, upstream)
        self.stage = Stage.CHUNKS
        return self.pass_content(size, last)

    def bdat_refusal(self, transaction: Transaction | None) -> Reply:
        """Why a chunk is not wanted."""
        if transaction is None:
            return replies.HELO_FIRST if self.stage is Stage.START else replies.MAIL_FIRST
        if transaction.refusal:
            return transaction.refusal
        if self.stage is Stage.FAILED:
            return replies.UPSTREAM_LOST
        return transaction.no_recipients()

    def pass_content(self, size: int | None = None, last: bool = True) -> Reply:
        """Pass on message content, and draw the consequences.

        size: of the chunk; None: a message after DATA. last: this is the end of the message.
        """
        transaction = self.current()
        relay = transaction.relay
        assert relay
        upstream, failed, stopped = relay.upstream, False, True
        try:
            answer = relay.data() if size is None else relay.chunk(size, last)
            outcome, stopped = Outcome(answer, UPSTREAM), False
        except Rejected as rejected:
            answer = rejected.reply
            outcome = Outcome(answer, rejected.by)
        except UpstreamFailed as failure:
            answer, failed = replies.UPSTREAM_LOST, True
            outcome = Outcome(answer, WILLI, str(failure))
        except Exception as error:
            self.log.message(transaction, upstream, outcome_of_unfinished(error))
            raise
        if last or stopped:
            self.log.message(transaction, upstream, outcome)
        if failed:
            self.upstreams.mark_down(upstream)  # the next client's message goes to another host first
            self.log.upstream_failed(upstream, outcome.why)
        if stopped:
            self.upstreams.drop()
            transaction.refusal = answer
        if last:
            self.finish_transaction(answer.positive)
        elif failed:
            self.stage = Stage.FAILED
        if last and answer.positive:
            self.commands.forgive()
            self.upstreams.note_accepted(upstream)
        return answer

    def rset(self, argument: bytes) -> Reply:
        """RSET (RFC 5321 §4.1.1.5). The upstream hears of it if it is needed again."""
        if argument:
            return replies.NO_PARAMETERS
        self.forget_transaction()
        if self.stage is not Stage.START:
            self.stage = Stage.GREETED
        return replies.RESET

    def vrfy(self, argument: bytes) -> Reply:
        """VRFY: neither yes nor no (RFC 5321 §3.5.3)."""
        return replies.CANNOT_VRFY if argument else replies.SYNTAX

    def quit(self, argument: bytes) -> Reply:
        """QUIT (RFC 5321 §4.1.1.10). The upstream hears it when the client has its answer."""
        if argument:
            return replies.NO_PARAMETERS
        self.closing = self.has_quit = True
        return replies.BYE

    def fail(self, why: str) -> Outcome:
        """The upstream is of no more use: the transaction has failed, and is not forgotten."""
        transaction = self.current()
        upstream = self.upstreams.of(transaction)
        self.log.upstream_failed(self.upstreams.open, why)
        self.upstreams.note_failure(transaction)
        outcome = Outcome(replies.UPSTREAM_FAILED, WILLI, why)
        self.stage = Stage.FAILED
        if upstream:
            transaction.refusals[upstream.route] = outcome
        if transaction.recipients:
            outcome = Outcome(replies.UPSTREAM_LOST, WILLI, why)
            self.log.message(transaction, upstream, outcome)  # for those that had been accepted
        self.upstreams.drop()
        return outcome

    def current(self) -> Transaction:
        """The transaction, in a stage that has one."""
        assert self.transaction
        return self.transaction

    def finish_transaction(self, accepted: bool) -> None:
        """It has come to its end; the upstream waits for the next MAIL."""
        self.transaction = None
        self.stage = Stage.GREETED
        if self.upstreams.open:
            # Postfix remembers a message that smtpd_end_of_data_restrictions have refused: RSET before the next one.
            self.upstreams.open.in_transaction = not accepted

    def forget_transaction(self) -> None:
        """It comes to no end. Where content has begun, only dropping the connection keeps it from being delivered."""
        transaction, upstream = self.transaction, self.upstreams.open
        if transaction and upstream and (transaction.relay or upstream.is_pipelined()):
            self.upstreams.drop()
        self.transaction = None


def outcome_of_unfinished(error: Exception) -> Outcome:
    """What became of a message whose session ends before its end."""
    if isinstance(error, WireError):
        return Outcome(None, CLIENT, f"message not finished: {error}")
    if isinstance(error, ShuttingDown):
        return Outcome(None, WILLI, "shutting down before the verdict (drain_timeout)")
    return Outcome(replies.OUR_FAULT, WILLI, f"internal error: {error!r}")


def always(answer: Reply) -> Callable[[Session, bytes], Reply]:
    """For a verb that has one answer, whatever its argument."""
    return lambda _session, _argument: answer


VERBS: dict[bytes, tuple[Callable[[Session, bytes], Reply], frozenset[Stage]]] = {
    # verb: (method, the stages in which the client may send it)
    b"EHLO": (Session.ehlo, ANY),
    b"HELO": (Session.helo, ANY),
    b"STARTTLS": (Session.starttls, frozenset((Stage.GREETED,))),
    b"XCLIENT": (Session.xclient, IDLE),
    b"MAIL": (Session.mail, frozenset((Stage.GREETED, Stage.FAILED))),
    b"RCPT": (Session.rcpt, ENVELOPE),
    b"DATA": (Session.data, ENVELOPE),
    b"BDAT": (Session.bdat, ANY),
    b"RSET": (Session.rset, ANY),
    b"NOOP": (always(replies.NOOP), ANY),
    b"VRFY": (Session.vrfy, ANY),
    b"EXPN": (always(replies.NOT_IMPLEMENTED), ANY),  # known, and not for an MX
    b"AUTH": (always(replies.NOT_IMPLEMENTED), ANY),
    b"HELP": (always(replies.HELP), ANY),
    b"QUIT": (Session.quit, ANY),
}
ADDRESSES = frozenset((b"MAIL", b"RCPT"))  # what is wrong with their arguments is logged
