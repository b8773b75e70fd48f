"""One client, from banner to QUIT: a method named after each verb.

A method returns a reply and never writes; `run` alone writes. `guarded` is the only
place where an exception becomes a reply. What is under way for one message is in
`Transaction`; the upstream side of it is in `Dispatch`; what is logged, in `SessionLog`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum, auto

from ..net.deadline import TimeLimit, WireError
from ..net.wire import BadFraming, LineTooLong, TlsFailed, Wire
from ..routing.route import LookupFailed, NoRoute
from ..smtp import reply as replies
from ..smtp import xclient
from ..smtp.proxy_header import is_header
from ..smtp.reply import Reject, Reply
from ..smtp.syntax import Path, may_be_bdat, parse_bdat, parse_helo, parse_mail, parse_rcpt, split_command
from ..status.counts import REFUSED
from .context import Service
from .message_log import SessionLog
from .relay import Content, Relay
from .transaction import Dispatch, Refusal, Transaction
from .upstream import Client, Refused, UpstreamFailed

# Between two messages that were accepted; what goes beyond is an error, and errors have max_errors.
MAX_JUNK = 100  # commands and transactions that come to nothing; Postfix's smtpd_junk_command_limit
MAX_DEFERRALS = 1000  # 4yz of our own, as for recipients over max_recipients (smtpd_recipient_overshoot_limit)
LOOKS = 5  # at a client that has closed its side, before it counts as gone: until then it may still read
SESSION_ID_LENGTH = 10
SESSION_ID_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PAIRS_OF_LETTERS = [first + second for first in SESSION_ID_LETTERS for second in SESSION_ID_LETTERS]


class Stage(Enum):
    """What the client may say next."""

    START = auto()  # no EHLO yet
    HANDSHAKE = auto()  # STARTTLS was answered with 220
    GREETED = auto()
    SENDER = auto()  # MAIL was answered with 250, no recipient was accepted yet
    RECIPIENT = auto()  # at least one recipient was accepted
    CONTENT = auto()  # DATA was answered with 354
    CHUNKS = auto()  # BDAT has begun
    FAILED = auto()  # the upstream failed in this transaction


ANY = frozenset(Stage) - {Stage.HANDSHAKE, Stage.CONTENT}  # the stages in which commands are read
IDLE = frozenset((Stage.START, Stage.GREETED))  # no transaction
ENVELOPE = frozenset((Stage.SENDER, Stage.RECIPIENT, Stage.FAILED))


class ShuttingDown(Exception):
    """Willi ends, and this client has no transaction."""


class ClientGone(Exception):
    """The client has hung up while its upstream was asked. No WireError: what failed is no upstream."""


class Session:
    """The dialogue with one client."""

    def __init__(self, sid: str, service: Service, wire: Wire, client: Client, may_xclient: bool = False) -> None:
        """sid: `new_session_id`'s, for the log. may_xclient: the client may say who it really is."""
        self.log = SessionLog(sid, client, service.counts)
        self.service = service
        self.settings = service.settings
        self.wire = wire
        self.clock = wire.clock
        self.client = client
        self.may_xclient = may_xclient
        self.stage = Stage.START
        self.transaction: Transaction | None = None
        self.dispatch = Dispatch(sid, self.settings, service.mappings, service.connector, wire, client, service.counts)
        self.errors = 0  # of the client's own, since its last message
        self.junk = self.deferrals = 0  # since then, too
        self.closing = False  # after the reply that is about to be written
        self.has_quit = False
        self.draining = False
        self.waiting = False  # for a command
        self.asking = False  # the upstream, before the message
        self.looks_gone = 0  # looks in a row by which the client had hung up
        self.ending = False  # nothing is left but to hang up

    # -- the loop

    def run(self) -> None:
        """Talk until one side has enough. Nothing that a client does makes it raise."""
        try:
            self.write(self.service.greeting)
            while not self.closing:
                answer = self.step()
                if answer:
                    self.write(answer)
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

    def step(self) -> Reply | None:
        """Do what comes next; the answer to it, if there is one."""
        if self.stage is Stage.CONTENT:
            return self.guarded(self.content)
        if self.stage is Stage.HANDSHAKE:
            self.handshake()
            return None
        if not self.wire.has_line:
            self.wire.flush()  # before `waiting`, in which a drain would cut an answer off
        if self.draining and self.stage in IDLE:
            raise ShuttingDown
        try:
            self.waiting = True
            with self.clock.limit(self.settings.read_timeout, "waiting for a command (read_timeout)"):
                line = self.wire.read_line()
        except LineTooLong as error:
            self.closing = may_be_bdat(error.beginning)
            return self.counted(replies.LINE_TOO_LONG)
        finally:
            self.waiting = False
        return self.counted(self.guarded(lambda: self.command(line)))

    def command(self, line: bytes) -> Reply:
        """Run one command. What it raises, `guarded` turns into a reply."""
        if is_header(line, () if line else self.wire.peek_lines()):
            self.log.warn("A PROXY header is not expected from this host: is it missing in proxy_protocol_hosts?")
            self.service.counts.add(REFUSED, "proxy_header")
            return replies.NO_HEADER
        try:
            verb, argument = split_command(line)
        except Reject:
            self.closing = may_be_bdat(line)
            raise
        if verb not in VERBS:
            return replies.NOT_HTTP if verb in OTHER_PROTOCOLS else replies.UNKNOWN_COMMAND
        method, stages = VERBS[verb]
        if self.stage not in stages:
            return self.out_of_sequence(verb)
        if verb in JUNK and not (verb == b"RSET" and self.transaction and self.transaction.is_refused):
            self.count_junk()
        return method(self, argument)

    def out_of_sequence(self, verb: bytes) -> Reply:
        """What is missing."""
        if self.stage is Stage.START:
            return replies.HELO_FIRST
        return OUT_OF_SEQUENCE.get((self.stage, verb), replies.BAD_SEQUENCE)

    def guarded(self, work: Callable[[], Reply]) -> Reply:
        """Do something: the only place where an exception becomes a reply."""
        try:
            return work()
        except Reject as refusal:
            return self.refuse(refusal.reply)
        except Refused as refusal:
            self.log.blame = ("upstream", str(refusal))
            return refusal.reply
        except NoRoute:
            return self.refuse(replies.NO_ROUTE)
        except LookupFailed as failure:
            write = self.log.debug if failure.logged else self.log.error
            write("Lookup failed", error=str(failure))
            return self.refuse(replies.LOOKUP_FAILED, str(failure))
        except UpstreamFailed as failure:
            return self.fail(failure)
        except (WireError, ShuttingDown, ClientGone):  # run() closes; there is nobody left to answer
            raise
        except Exception as bug:  # noqa: BLE001 -- our fault: it may try again, elsewhere its octets may be no commands
            self.log.bug("Internal error")
            self.closing = True
            return self.refuse(replies.OUR_FAULT, f"internal error: {bug!r}")

    def refuse(self, answer: Reply, why: str = "") -> Reply:
        """Note for the log that this refusal is our own."""
        self.log.blame = ("internal", why or str(answer))
        return answer

    def counted(self, answer: Reply) -> Reply:
        """Hang up on a client that makes too many errors. What an upstream refuses is for the upstream to count."""
        if not answer.positive and replies.is_own(answer):
            if answer.permanent:
                self.errors += 1
            else:
                self.deferrals += 1
                self.errors += self.deferrals > MAX_DEFERRALS
        if self.errors < self.settings.max_errors:
            return answer
        self.log.info("Too many errors", reply=str(answer))
        self.service.counts.add(REFUSED, "max_errors")
        return replies.TOO_MANY_ERRORS

    def count_junk(self) -> None:
        """Count a command, or a transaction, that came to nothing."""
        self.junk += 1
        self.errors += self.junk > MAX_JUNK

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
            self.wire.hang_up(linger=self.wire.buffered or not self.has_quit)
            self.dispatch.quit()
        finally:
            self.drop_upstream()
            self.clock.close()

    def drain(self) -> None:
        """End after the running transaction; at once if there is none. Called from another greenlet."""
        self.draining = True
        self.clock.interrupt(ShuttingDown(), unless=lambda: not self.waiting or self.stage not in IDLE)

    def look_at_client(self) -> None:
        """End if the client has hung up while its upstream takes its time. Called from another greenlet.

        Not while the upstream judges a whole message: its verdict is worth a line in the log. A client that has only
        closed its side, and waits for the answer to its last command, looks the same, and has it if that comes soon.
        """
        self.looks_gone = self.looks_gone + 1 if self.asking and self.wire.has_hung_up() else 0
        if self.looks_gone >= LOOKS:
            self.clock.interrupt(ClientGone(), unless=lambda: not self.asking)

    def stop(self) -> None:
        """End now, whatever is under way: drain_timeout is over."""
        self.clock.interrupt(ShuttingDown(), unless=lambda: self.ending)

    # -- verbs: the introduction

    def ehlo(self, argument: bytes) -> Reply:
        """EHLO (RFC 5321 §4.1.1.1)."""
        self.introduce(argument, esmtp=True)
        return self.service.ehlo_reply(self.client.tls is not None, self.may_xclient)

    def helo(self, argument: bytes) -> Reply:
        """HELO, without extensions, for the client and for the upstream."""
        self.introduce(argument, esmtp=False)
        return Reply(250, (self.settings.domain.encode(),))

    def introduce(self, argument: bytes, esmtp: bool) -> None:
        """Take a new name; an upstream connection that knows the old one is of no more use."""
        name = parse_helo(argument)
        self.forget_transaction()
        self.dispatch.quit()
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
        if not self.service.server_tls:
            return replies.NOT_IMPLEMENTED
        self.stage = Stage.HANDSHAKE
        return replies.READY_FOR_TLS

    def handshake(self) -> None:
        """What came along with STARTTLS is thrown away, and all that was said before is forgotten (RFC 3207 §4.2)."""
        assert self.service.server_tls
        if self.wire.buffered:
            self.log.warn("Clear text after STARTTLS dropped")
        with self.clock.limit(self.settings.read_timeout, "in the TLS handshake (read_timeout)"):
            self.wire.start_tls(self.service.server_tls, server_side=True)
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
            client.name = self.service.resolver.start_name_of(address) if address else lambda: xclient.UNAVAILABLE
        if name is not None:
            client.name = lambda: name
        self.start_over()
        return self.service.greeting

    def start_over(self) -> None:
        """Back to the greeting."""
        self.dispatch.quit()
        self.client.helo = ""
        self.stage = Stage.START

    # -- verbs: the transaction

    def mail(self, argument: bytes) -> Reply:
        """MAIL (RFC 5321 §4.1.1.2). It is kept until a recipient says which upstream shall hear it."""
        if self.draining:  # the transaction that could go on was a failed one
            raise ShuttingDown
        if self.transaction:  # a failed one: no recipient behind a refused MAIL is one of it
            self.count_junk()
            self.forget_transaction()
        self.stage = Stage.GREETED
        try:
            mail = parse_mail(argument, self.settings.extensions)
            if mail.size is not None and mail.size > self.settings.max_message_bytes:
                raise Reject(replies.TOO_BIG)
        except Reject as refusal:
            self.log.syntax("MAIL refused", argument, refusal)
            raise
        self.transaction = Transaction(mail)
        self.stage = Stage.SENDER
        return replies.SENDER_KEPT

    def rcpt(self, argument: bytes) -> Reply:
        """RCPT (RFC 5321 §4.1.1.3). The first recipient chooses the upstream."""
        transaction = self.current()
        try:
            recipient = parse_rcpt(argument, transaction.mail.smtputf8)
        except Reject as refusal:
            self.log.syntax("RCPT refused", argument, refusal)
            raise
        answer = self.guarded(lambda: self.offer(transaction, recipient))
        if answer.positive:
            transaction.recipients.append(recipient)
            self.stage = Stage.RECIPIENT
        else:
            transaction.refuse(answer)
            self.log.message(transaction, answer, recipient)
        return answer

    def offer(self, transaction: Transaction, recipient: Path) -> Reply:
        """Have the upstream take a recipient; find and open the upstream first if need be."""
        if transaction.verdict:
            raise Reject(transaction.verdict)
        if len(transaction.recipients) >= self.settings.max_recipients:
            raise Reject(replies.TOO_MANY_RECIPIENTS)
        if self.stage is Stage.FAILED and transaction.recipients:
            raise Reject(replies.UPSTREAM_LOST)
        try:
            answer = self.ask_upstream(lambda: self.dispatch.ask_rcpt(transaction, recipient))
        except WireError as error:  # the limit has struck in between, as in a DNS look-up
            raise UpstreamFailed(str(error)) from None
        except Refused as refusal:  # of MAIL, or of the client
            raise Refused(replies.at_rcpt(refusal.reply)) from None
        if not answer.positive:
            raise Refused(answer)
        return answer

    def data(self, argument: bytes) -> Reply:
        """DATA (RFC 5321 §4.1.1.4): the 354 is the upstream's own, and `content` follows it."""
        transaction = self.current()
        upstream = transaction.upstream
        if argument:
            return replies.NO_PARAMETERS
        if self.stage is Stage.FAILED:
            return replies.UPSTREAM_LOST
        if upstream is None or not (transaction.recipients or upstream.is_ahead(b"DATA")):
            return transaction.no_recipients()
        answer = self.guarded(lambda: self.ask_upstream(upstream.begin_data))
        if not transaction.recipients and (answer.code == 354 or answer.permanent):
            if answer.code == 354:
                self.drop_upstream()  # it waits for a message that the client will not send
            return transaction.no_recipients()
        if answer.code != 354:
            if transaction.recipients and transaction.upstream:  # else `fail` has logged it
                self.log.message(transaction, answer)
            return answer
        transaction.relay = Relay(self.settings, self.wire, upstream)
        self.stage = Stage.CONTENT
        return answer

    def ask_upstream(self, work: Callable[[], Reply]) -> Reply:
        """Ask it something, within upstream_timeout. `look_at_client` ends this if the client hangs up meanwhile."""
        self.asking = True
        try:
            with self.clock.limit(self.settings.upstream_timeout, "asking the upstream (upstream_timeout)"):
                return work()
        finally:
            self.asking = False

    def content(self) -> Reply:
        """The message after 354."""
        transaction = self.current()
        relay = transaction.relay
        assert relay
        return self.relayed(transaction, relay, relay.data)

    def bdat(self, argument: bytes) -> Reply:
        """BDAT (RFC 3030 §2). A chunk that is not wanted is read to its end all the same."""
        try:
            size, last = parse_bdat(argument)
        except Reject:
            self.closing = True  # how many octets follow that are no commands?
            raise
        if not size and not last:
            self.count_junk()
        transaction = self.transaction
        offered = "CHUNKING" in self.settings.extensions
        if not offered or transaction is None or transaction.upstream is None or not transaction.recipients:
            refusal = self.bdat_refusal(transaction) if offered else replies.NOT_IMPLEMENTED
            Content(self.settings, self.wire).skip(size)
            if offered and last and self.stage in (Stage.SENDER, Stage.CHUNKS):
                self.count_junk()
                self.finish_transaction(accepted=False)  # as with Postfix: a MAIL may have been sent behind it
            elif offered and transaction:
                transaction.verdict = refusal  # later chunks and recipients would make another message
            return refusal
        relay = transaction.relay = transaction.relay or Relay(self.settings, self.wire, transaction.upstream)
        self.stage = Stage.CHUNKS
        return self.relayed(transaction, relay, lambda: relay.chunk(size, last), last)

    def bdat_refusal(self, transaction: Transaction | None) -> Reply:
        """Why a chunk is not wanted."""
        if transaction is None:
            return replies.HELO_FIRST if self.stage is Stage.START else replies.MAIL_FIRST
        if transaction.verdict:
            return transaction.verdict
        if self.stage is Stage.FAILED:
            return replies.UPSTREAM_LOST
        return transaction.no_recipients()

    def relayed(self, transaction: Transaction, relay: Relay, work: Callable[[], Reply], last: bool = True) -> Reply:
        """Pass on message content, and draw the consequences.

        last: this is the end of the message.
        """
        try:
            answer = work()
        except WireError as error:
            self.log.blame = ("client", f"message not finished: {error}")
            self.log.message(transaction, None)
            raise
        except ShuttingDown:
            self.log.blame = ("internal", "shutting down before the verdict (drain_timeout)")
            self.log.message(transaction, None)
            raise
        except Exception as bug:
            self.log.blame = ("internal", f"internal error: {bug!r}")
            self.log.message(transaction, replies.OUR_FAULT)
            raise
        if last or relay.refusal is not None:
            self.log.blame = relay.blame or ("upstream", str(answer))
            self.log.message(transaction, answer)
        if relay.failed:
            self.dispatch.mark_down(relay.upstream)  # the next client's message goes to another host first
            self.log.upstream_failed(relay.upstream, self.log.blame[1])
        if relay.refusal is not None:  # and the upstream was dropped
            self.dispatch.upstream = transaction.upstream = None
            transaction.verdict = relay.refusal
        if last:
            self.finish_transaction(answer.positive)
        elif relay.failed:
            self.stage = Stage.FAILED
        if last and answer.positive:
            self.errors = self.junk = self.deferrals = self.dispatch.in_vain = 0
        return answer

    # -- verbs: the rest

    def rset(self, argument: bytes) -> Reply:
        """RSET (RFC 5321 §4.1.1.5). The upstream hears of it if it is needed again."""
        if argument:
            return replies.NO_PARAMETERS
        self.forget_transaction()
        if self.stage is not Stage.START:
            self.stage = Stage.GREETED
        return replies.RESET

    def noop(self, _argument: bytes) -> Reply:
        """NOOP (RFC 5321 §4.1.1.9)."""
        return replies.NOOP

    def vrfy(self, argument: bytes) -> Reply:
        """VRFY: neither yes nor no (RFC 5321 §3.5.3)."""
        return replies.CANNOT_VRFY if argument else replies.SYNTAX

    def help(self, _argument: bytes) -> Reply:
        """HELP (RFC 5321 §4.1.1.8)."""
        return replies.HELP

    def not_implemented(self, _argument: bytes) -> Reply:
        """EXPN and AUTH: known, and not for an MX."""
        return replies.NOT_IMPLEMENTED

    def quit(self, argument: bytes) -> Reply:
        """QUIT (RFC 5321 §4.1.1.10). The upstream hears it when the client has its answer."""
        if argument:
            return replies.NO_PARAMETERS
        self.closing = self.has_quit = True
        return replies.BYE

    def fail(self, failure: UpstreamFailed) -> Reply:
        """The upstream is of no more use: the transaction has failed, and is not forgotten."""
        transaction = self.transaction
        self.log.upstream_failed(self.dispatch.upstream, str(failure))
        answer = self.refuse(replies.UPSTREAM_FAILED, str(failure))
        if transaction:
            self.stage = Stage.FAILED
            if transaction.upstream:
                transaction.refusals[transaction.upstream.route] = Refusal(replies.UPSTREAM_FAILED, by_upstream=False)
            if transaction.recipients:
                answer = self.refuse(replies.UPSTREAM_LOST, str(failure))
                self.log.message(transaction, answer)  # for those who had been accepted
        self.drop_upstream()
        return answer

    def drop_upstream(self) -> None:
        """Close the upstream connection: an unfinished message stays unfinished."""
        self.dispatch.drop()
        if self.transaction:
            self.transaction.upstream = None

    # -- the state of the transaction

    def current(self) -> Transaction:
        """The transaction: VERBS lets nobody come here without one."""
        assert self.transaction
        return self.transaction

    def finish_transaction(self, accepted: bool) -> None:
        """It has come to its end; the upstream waits for the next MAIL."""
        self.transaction = None
        self.stage = Stage.GREETED
        if self.dispatch.upstream:
            # Postfix remembers a message that smtpd_end_of_data_restrictions have refused: RSET before the next one.
            self.dispatch.upstream.in_transaction = not accepted

    def forget_transaction(self) -> None:
        """It comes to no end. Where content has begun, only dropping the connection keeps it from being delivered."""
        transaction, upstream = self.transaction, self.dispatch.upstream
        if transaction and upstream and (transaction.relay or upstream.is_ahead()):
            self.drop_upstream()
        self.transaction = None


def new_session_id() -> str:
    """What all log lines of a session have in common."""
    return "".join(random.choices(PAIRS_OF_LETTERS, k=SESSION_ID_LENGTH // 2))


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
    b"NOOP": (Session.noop, ANY),
    b"VRFY": (Session.vrfy, ANY),
    b"EXPN": (Session.not_implemented, ANY),
    b"AUTH": (Session.not_implemented, ANY),
    b"HELP": (Session.help, ANY),
    b"QUIT": (Session.quit, ANY),
}
JUNK = frozenset((b"EHLO", b"HELO", b"RSET", b"NOOP", b"VRFY", b"HELP"))
OUT_OF_SEQUENCE = {
    (Stage.GREETED, b"RCPT"): replies.MAIL_FIRST,
    (Stage.GREETED, b"DATA"): replies.MAIL_FIRST,
    (Stage.SENDER, b"MAIL"): replies.NESTED_MAIL,
    (Stage.RECIPIENT, b"MAIL"): replies.NESTED_MAIL,
    (Stage.CHUNKS, b"MAIL"): replies.NESTED_MAIL,
    (Stage.CHUNKS, b"DATA"): replies.DATA_AFTER_BDAT,
}
OTHER_PROTOCOLS = frozenset((b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"DELETE", b"TRACE", b"PATCH"))
