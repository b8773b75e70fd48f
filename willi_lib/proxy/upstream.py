"""The conversation with one upstream, after its introduction: the client's commands, content, RSET and QUIT."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .. import log
from ..hosts import with_port
from ..net.deadline import WireError
from ..net.replies import read_reply, read_verdict
from ..net.wire import Wire
from ..routing.route import Route, Server
from ..smtp import reply as replies
from ..smtp.body import END_OF_DATA
from ..smtp.reply import UPSTREAM, BadReply, Rejected, Reply
from ..smtp.xclient import TEMPUNAVAIL

LAST_WORDS_TIMEOUT = 0.1  # seconds for the rest of a reply of which the beginning has come already
ONE_WRITE = 64 << 10  # octets up to which copying the end of a message costs less than a second write
INTERMEDIATE = {"DATA": 354, "STARTTLS": 220, "XCLIENT": 220}  # the codes that are neither yes nor no, where due
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


class NextMayTake(Rejected):
    """A host that must be told who the client is was not, or defers that. The next host of the route may take it."""


class MailLoop(Rejected):
    """The upstream is ourselves, or the host that the mail comes from."""

    def __init__(self, server: Server | None = None, is_ours: bool = False) -> None:
        super().__init__(replies.MAIL_LOOP)
        self.server = server
        self.is_ours = is_ours  # it bears our domain, and so it does for every client


@dataclass(slots=True)
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

    def __init__(self, wire: Wire, server: Server, route: Route, address: str) -> None:
        self.wire = wire
        self.server = server
        self.address = address  # the one of the server's that it is
        self.route = route
        self.features: Mapping[str, str] = {}
        self.knows_client = False  # by XCLIENT or a PROXY header
        self.greeted_after = 0.0  # seconds
        self.xclient = ""  # what became of it
        self.stands_in = False  # for a host or address that failed a moment ago, and may take what this one does not
        self.introduced = False  # and waits for MAIL, which may take time
        self.in_transaction = False  # it heard MAIL, and no end of that
        self.could_use_tls = False  # it offers STARTTLS, and the setting allows that
        self.out_of_step = False  # dropped after a badly framed reply: the next one could be a part of that
        self._pipelined: deque[bytes] = deque()  # sent, the answers still to come
        self.xclient_offer = ""  # the attributes that it lists; not all go on to list them afterwards (for `check`)
        self.xclient_answer: Reply | None = None
        self.address_told = True  # unless it does not take that of this client

    # -- commands

    def ask(self, line: bytes) -> Reply:
        """Send one command, unless it was pipelined, and return its answer. Raises UpstreamFailed."""
        if not self._pipelined:
            self._send([line])
        elif self._pipelined[0] != line:  # a bug of ours
            raise UpstreamFailed(f"{self.server}: pipelined something else than {line!r}")
        try:
            answer = read_reply(self.wire)
        except (WireError, BadReply) as error:
            raise UpstreamFailed(f"{self.server}: {_verb(line)}: {error}") from None
        self._pipelined.popleft()  # not before: behind a DATA whose answer was not heard, QUIT would be content
        if not answer.positive and answer.code < 400 and answer.code != INTERMEDIATE.get(_verb(line)):
            raise UpstreamFailed(f"{self.server}: {_verb(line)}: {answer}")  # a goodbye, or a second greeting
        return answer

    def send_pipelined(self, lines: Sequence[bytes]) -> None:
        """Send commands in one write, whose answers `ask` will fetch. Raises UpstreamFailed.

        To an upstream that does not offer PIPELINING nothing is sent, and `ask` sends them one by one.
        """
        if len(lines) > 1 and "PIPELINING" in self.features and not self._pipelined:
            self._send(lines)

    def is_pipelined(self, line: bytes | None = None) -> bool:
        """Whether this command, or any, was sent and has no answer yet."""
        return bool(self._pipelined) if line is None else line in self._pipelined

    def _send(self, lines: Sequence[bytes]) -> None:
        """Raises UpstreamFailed, also if the upstream has spoken out of turn: its answers could not be told apart.

        Its goodbye inside a transaction is Rejected, as if it were the answer.
        """
        wire = self.wire
        try:
            # During the introduction the last answer has only just come, and an extra recv would find nothing.
            if wire.pending() if self.introduced else wire.buffered():
                with wire.deadline.limit(LAST_WORDS_TIMEOUT, "early words"):  # half a line must not hold us up
                    words = read_reply(wire)
                if words.code == 421 and self.in_transaction:
                    raise Rejected(words, UPSTREAM)
                raise UpstreamFailed(f"{self.server}: spoke out of turn: {words}")
            wire.write(b"\r\n".join([*lines, b""]))
            wire.flush()
        except (WireError, BadReply) as error:
            raise UpstreamFailed(f"{self.server}: {error}") from None
        self._pipelined.extend(lines)

    def unwelcome(self, command: str, answer: Reply) -> UpstreamFailed:
        """What an answer means that is about us, as `is_not_from_us` says."""
        kind = WantsTls if self.could_use_tls and not self.wire.tls_version else UpstreamFailed
        return kind(f"{self.server}: {command}: {answer}")

    # -- the message

    def begin_data(self) -> Reply:
        """DATA; the upstream's 354. Raises Rejected, UpstreamFailed."""
        answer = self.ask(b"DATA")
        if is_not_from_us(answer):
            raise self.unwelcome("DATA", answer)
        if answer.code >= 400:
            raise Rejected(answer, UPSTREAM)
        if answer.code != 354:
            raise UpstreamFailed(f"{self.server}: DATA: {answer}")
        return answer

    def send(self, octets: bytes) -> None:
        """Pass on message content. Raises Rejected, UpstreamFailed."""
        if self._pipelined:  # a DATA among them would make a message of what is meant as a chunk, or the reverse
            raise UpstreamFailed(f"{self.server}: content before the answer to {self._pipelined[0]!r}")
        if self.out_of_step:
            raise UpstreamFailed(f"{self.server}: badly framed reply to the chunk before")
        if self.wire.pending():  # it may take content for commands, and what it says now is no verdict
            self._last_words()
            did = "spoke" if self.wire.buffered() else "hung up"
            raise UpstreamFailed(f"{self.server}: {did} inside the message")
        try:
            self.wire.send(octets)
        except WireError as error:
            self._last_words()
            raise UpstreamFailed(f"{self.server}: {error}") from None

    def finish(self, octets: bytes) -> Reply:
        """Pass on the last content of DATA, end it, and return the verdict. Raises Rejected, UpstreamFailed."""
        if len(octets) > ONE_WRITE:
            self.send(octets)
            octets = b""
        return self.finish_chunk(octets + END_OF_DATA)

    def finish_chunk(self, octets: bytes) -> Reply:
        """The same for a chunk of BDAT, which ends by its length."""
        self.send(octets)
        try:
            verdict, in_order = read_verdict(self.wire)
            if verdict.code == 354 and in_order:  # DATA was answered twice, and the message is still to be judged
                verdict, in_order = read_verdict(self.wire)[0], False
        except (WireError, BadReply) as error:
            raise UpstreamFailed(f"{self.server}: no verdict: {error}") from None
        if not in_order:
            self.out_of_step = True
            self.drop()
            log.warn("Badly framed reply to a message", upstream=str(self.server), reply=str(verdict))
        if not verdict.positive and verdict.code < 400:
            raise UpstreamFailed(f"{self.server}: no verdict: {verdict}")
        return verdict

    def _last_words(self) -> None:
        """Raise Rejected if the upstream has said why it wants no more of the message."""
        try:
            with self.wire.deadline.limit(LAST_WORDS_TIMEOUT, "last words"):
                words = read_verdict(self.wire)[0] if self.wire.pending() and self.wire.buffered() else None
        except (WireError, BadReply) as error:
            log.debug("No last words", upstream=str(self.server), error=str(error))
            return
        if words and words.code >= 400:
            raise Rejected(words, UPSTREAM)

    # -- the end of a transaction or of the connection

    @property
    def is_of_use(self) -> bool:
        """Whether another transaction may follow: no answer is missing, and none was badly framed."""
        return not (self._pipelined or self.out_of_step)

    def drain_answers(self) -> None:
        """Fetch the answers to what was pipelined behind a refused MAIL. Raises UpstreamFailed."""
        while self._pipelined:
            if self.ask(self._pipelined[0]).code == 354:
                raise UpstreamFailed(f"{self.server}: wants a message that it will not get")

    def reset(self) -> None:
        """Make it ready for the next MAIL. Raises UpstreamFailed, also if it has hung up meanwhile."""
        if not self.is_of_use:
            raise UpstreamFailed(f"{self.server}: kept connection is of no use")
        heard_mail, self.in_transaction = self.in_transaction, False  # a goodbye from here on is no verdict
        if heard_mail and not self.ask(b"RSET").positive:
            raise UpstreamFailed(f"{self.server}: RSET refused")

    def quit(self) -> None:
        """Say QUIT and close. Nothing depends on the answer, so there is no wait, as with Postfix."""
        self.wire.write(b"QUIT\r\n")
        self.wire.hang_up(patient=False)

    def drop(self) -> None:
        """Close at once: no dot, no QUIT, so that an unfinished message stays unfinished.

        Also the end of one that the client is told was lost: it is not to arrive after that.
        """
        self.wire.abort()


def _verb(line: bytes) -> str:
    return line.partition(b" ")[0].decode()
