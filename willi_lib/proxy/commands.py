"""The commands of one client: read alone or in groups, and counted where they are wrong or lead to nothing."""

from __future__ import annotations

from collections import deque

from ..config import Settings
from ..net.wire import LineTooLong, Wire
from ..smtp import reply as replies
from ..smtp.proxy_header import is_header
from ..smtp.reply import Rejected, Reply
from ..smtp.syntax import MAX_COMMAND_LINE, Command, may_be_bdat, parse_rcpt, split_command
from ..status.counts import REFUSED, Counts
from .message_log import SessionLog

OTHER_PROTOCOLS = frozenset((b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"DELETE", b"TRACE", b"PATCH"))
JUNK = frozenset((b"EHLO", b"HELO", b"RSET", b"NOOP", b"VRFY", b"HELP"))  # verbs that lead to nothing
# Between two messages that were accepted; what goes beyond is an error, and errors have max_errors.
MAX_JUNK = 100  # commands and transactions that come to nothing; Postfix's smtpd_junk_command_limit
MAX_DEFERRALS = 1000  # 4yz of our own, as for recipients over max_recipients (smtpd_recipient_overshoot_limit)


class OutOfStep(Rejected):
    """A refusal behind which octets may come that are no commands: the session ends."""


class Commands:
    """What one client says, but for message content."""

    def __init__(self, wire: Wire, settings: Settings, log: SessionLog, counts: Counts) -> None:
        self.group: deque[Command] = deque()  # read together with a RCPT, to be answered in their turn
        self.is_waiting = False
        self._wire = wire
        self._settings = settings
        self._log = log
        self._counts = counts
        self._errors = self._junk = self._deferrals = 0

    def take(self) -> Command | None:
        """The next one, if it has come as a whole. Raises Rejected, WireError."""
        if self.group:
            return self.group.popleft()
        return self._read() if self._wire.has_line() else None

    def wait(self) -> Command:
        """The next one, when it has come. Raises Rejected, WireError."""
        self.is_waiting = True
        try:
            with self._wire.deadline.limit(self._settings.read_timeout, "waiting for a command (read_timeout)"):
                return self._read()
        finally:
            self.is_waiting = False

    def _read(self) -> Command:
        try:
            line = self._wire.read_line()
        except LineTooLong as error:
            raise self._kind(error.beginning)(replies.LINE_TOO_LONG) from None
        if is_header(line, () if line else self._wire.peek_lines()):
            self._log.warn("A PROXY header is not expected from this host: is it missing in proxy_protocol_hosts?")
            self._counts.add(REFUSED, "proxy_header")
            raise Rejected(replies.NO_HEADER)
        try:
            return *split_command(line), None
        except Rejected as rejected:
            raise self._kind(line)(rejected.reply) from None

    @staticmethod
    def _kind(line: bytes) -> type[Rejected]:
        return OutOfStep if may_be_bdat(line) else Rejected

    def read_group(self, smtputf8: bool) -> None:
        """Read the RCPT commands that the client has sent already, and DATA after them (RFC 2920).

        What would be refused, and what comes after it, stays in the buffer until its turn comes.
        """
        for line in self._wire.peek_lines():
            try:
                verb, argument = split_command(line)
                recipient = parse_rcpt(argument, smtputf8) if verb == b"RCPT" else None
            except Rejected:
                break
            is_data = verb == b"DATA" and not argument
            if not (recipient or is_data) or len(line) + 2 > MAX_COMMAND_LINE:
                break
            self._wire.read_line()
            self.group.append((verb, argument, recipient))
            if is_data:
                break

    def count(self, answer: Reply) -> Reply:
        """The answer, or 421 after too many errors. What an upstream refuses is for the upstream to count."""
        if answer.code >= 400 and replies.is_own(answer):
            if answer.permanent:
                self._errors += 1
            else:
                self._deferrals += 1
                self._errors += self._deferrals > MAX_DEFERRALS
        if self._errors < self._settings.max_errors:
            return answer
        self._log.info("Too many errors", reply=str(answer))
        self._counts.add(REFUSED, "max_errors")
        return replies.TOO_MANY_ERRORS

    def count_junk(self) -> None:
        """Count a command, or a transaction, that came to nothing."""
        self._junk += 1
        self._errors += self._junk > MAX_JUNK

    def forgive(self) -> None:
        """A message was accepted: errors are counted from here on."""
        self._errors = self._junk = self._deferrals = 0
