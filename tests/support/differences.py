"""Where a client hears something else from Willi than from the server behind it, and why: docs/interoperation.md."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.support.differential import CONNECT, RECEIVED, REPAIRED, Exchange
from willi_lib.smtp import reply as replies
from willi_lib.smtp.reply import Reply

POSTFIX, EXIM, OPENSMTPD = "Postfix", "Exim", "OpenSMTPD"
ALL = (POSTFIX, EXIM, OPENSMTPD)
HELLO = "(?:EHLO|HELO)( .*)?"
OWN_GREETING = r"220 mx\.willi\.example ESMTP Willi"
OWN_HELLO = r"250 mx\.willi\.example( / .*)?"
EARLIER = "(what was directly said to an earlier command)"


class Difference(NamedTuple):
    """Regular expressions say what it covers.

    parts: from here on the two sessions are about different things, and what is stored is no longer compared.
    some_versions: not every version of these servers shows it.
    """

    name: str
    why: str
    where: str  # an RFC, or a section of README.md or another page
    servers: tuple[str, ...]  # with which of them the corpus meets it
    said: str
    direct: str
    through: str
    parts: bool = False
    some_versions: bool = False

    def explains(self, exchange: Exchange) -> bool:
        if not (_is(self.said, exchange.said) and _is(self.direct, exchange.direct)):
            return False
        return exchange.through in exchange.earlier if self.through is EARLIER else _is(self.through, exchange.through)


def _is(pattern: str, text: str) -> bool:
    return bool(re.fullmatch(pattern, text, re.IGNORECASE | re.DOTALL))


def _own(*answers: Reply) -> str:
    """One of these replies of Willi's."""
    return "|".join(re.escape(str(answer)) for answer in answers)


DIFFERENCES = (
    Difference(
        "Greeting", "Willi greets in its own name: the server is not known yet.",
        'README, "What happens to a mail"', ALL, re.escape(CONNECT), "220 .*", OWN_GREETING,
    ),
    Difference(
        "EHLO and HELO", "Willi answers in its own name, and offers what it can do with every server.",
        "RFC 5321 §4.1.1.1", ALL, HELLO, "250 .*", OWN_HELLO,
    ),
    Difference(
        "EHLO a second time", "To Willi it is a RSET (the RFC wants it so). OpenSMTPD refuses it and goes on.",
        "RFC 5321 §4.1.4", (OPENSMTPD,), HELLO, "503 5.5.1 Invalid command: Already identified", OWN_HELLO, parts=True,
    ),
    Difference(
        "MAIL", "Willi keeps the sender until the first recipient says which server it is for.",
        'README, "What happens to a mail"', (EXIM, OPENSMTPD), "MAIL FROM:.*", "250 .*", _own(replies.SENDER_KEPT),
    ),
    Difference(
        "Message after a refused one", "Willi says RSET first. Postfix has not forgotten the refused one: 503.",
        "RFC 5321 §4.1.1.4", (POSTFIX,), "MAIL .*", "503 5.5.1 Error: nested MAIL command", _own(replies.SENDER_KEPT),
        parts=True, some_versions=True,  # Postfix 3.7, and not 3.10
    ),
    Difference(
        "Refusal before RCPT", "The server's refusal of the client's address, name or sender waits for a recipient.",
        'README, "What happens to a mail"', ALL, rf"\(connect\)|{HELLO}|MAIL FROM:.*", r"[45].*|\(closed\)",
        f"{OWN_GREETING}|{OWN_HELLO}|{_own(replies.SENDER_KEPT)}",
    ),
    Difference(
        "Refusal at RCPT", "There it is, word for word. The server alone says only that something is missing.",
        'README, "What happens to a mail"', ALL, "RCPT TO:.*", r"503 .*|\(closed\)", EARLIER,
    ),
    Difference(
        "No valid recipient", "Same meaning, other words, and 451 if one of the recipients was refused for now.",
        "RFC 5321 §3.3", ALL, "DATA|BDAT .*", r"5.*|\(closed\)",
        _own(replies.NO_VALID_RECIPIENTS, replies.NO_RECIPIENTS_YET, replies.RCPT_FIRST),
    ),
    Difference(
        "Wrong order", "A command out of its order never reaches the server: same code, other words.",
        "RFC 5321 §4.1.4", ALL, "MAIL .*|RCPT .*|DATA|STARTTLS", "50.*|55.*",
        _own(replies.HELO_FIRST, replies.MAIL_FIRST, replies.RCPT_FIRST, replies.NESTED_MAIL, replies.DATA_AFTER_BDAT,
             replies.TLS_ALREADY),
    ),
    Difference(
        "Syntax", "What is no command, or no address, never reaches the server: 5xx as there, other words.",
        "RFC 5321 §4.2.4", ALL, ".*", "5.*",
        _own(replies.UNKNOWN_COMMAND, replies.CONTROL_CHARACTER, replies.BAD_HELO, replies.BAD_SENDER,
             replies.BAD_RECIPIENT, replies.NO_PARAMETERS, replies.SYNTAX),
    ),
    Difference(
        "QUIT with a parameter", "Willi refuses it, Postfix hangs up.",
        "RFC 5321 §4.1.1", (POSTFIX,), "QUIT .*", "221 .*", _own(replies.NO_PARAMETERS), parts=True,
    ),
    Difference(
        "Parameter", "A parameter that Willi did not offer is refused with the code made for it.",
        "RFC 5321 §4.1.1.11", ALL, "(MAIL|RCPT) .*", "50.*|55.*", _own(replies.UNKNOWN_PARAMETER),
    ),
    Difference(
        "Recipient without a domain", "Without a domain there is no route; postmaster alone is allowed.",
        "RFC 5321 §2.3.5", ALL, "RCPT .*", "[45].*", _own(replies.NO_DOMAIN),
    ),
    Difference(
        "8-bit address", "Without SMTPUTF8 Willi refuses it. Postfix and Exim take it.",
        "RFC 6531 §3.5", ALL, "(MAIL|RCPT) .*", "250.*|5.*", _own(replies.NEEDS_SMTPUTF8), parts=True,
    ),
    Difference(
        "Too many recipients", "Willi has a limit of its own, max_recipients.",
        'configure.md, "Limits and times"', ALL, "RCPT .*", "250 .*", _own(replies.TOO_MANY_RECIPIENTS), parts=True,
    ),
    Difference(
        "Too big", "Willi has a limit of its own, max_message_bytes. OpenSMTPD looks at SIZE only later.",
        "RFC 1870 §6.1", ALL, "MAIL .*SIZE=.*", "552 .*|250 .*", _own(replies.TOO_BIG), parts=True,
    ),
    Difference(
        "NOOP, RSET, QUIT, STARTTLS", "Willi answers itself: same code, other words.",
        "RFC 5321 §4.1.1", (EXIM, OPENSMTPD), "NOOP.*|RSET|QUIT|STARTTLS", r"2.*|\(closed\)",
        _own(replies.NOOP, replies.RESET, replies.BYE, replies.READY_FOR_TLS),
    ),
    Difference(
        "NOOP and RSET", "Allowed before EHLO, and NOOP with a parameter, but not by OpenSMTPD.",
        "RFC 5321 §4.1.1.9", (OPENSMTPD,), "NOOP.*|RSET", "50[03] .*", _own(replies.RESET, replies.NOOP),
    ),
    Difference(
        "VRFY, EXPN, HELP, AUTH", "Willi knows no users and asks no server about them.",
        'README, "What Willi will not do"', ALL, "(VRFY|EXPN|HELP|AUTH)( .*)?", "2.*|5.*",
        _own(replies.CANNOT_VRFY, replies.HELP, replies.NOT_IMPLEMENTED),
    ),
    Difference(
        "SMTP or ESMTP in Received",
        "To Postfix, HELO after EHLO changes nothing. OpenSMTPD takes one greeting, and Willi's is EHLO.",
        "RFC 3848", (POSTFIX, OPENSMTPD), re.escape(RECEIVED), "E?SMTPS?", "E?SMTPS?",
    ),
    Difference(
        "Line ends that are not CRLF",
        "Willi repairs them, since some servers take them for the end of the message.",
        "RFC 5321 §2.3.8", ALL, re.escape(REPAIRED), ".*", "250 .*", parts=True,
    ),
)  # fmt: skip
LACKING = {
    "PIPELINING": "Willi sends one command after the other.",
    "CHUNKING": "Willi makes DATA of BDAT, and answers all chunks but the last itself.",
    "SMTPUTF8": "A message that says SMTPUTF8 is refused at RCPT: " + str(replies.NO_SMTPUTF8),
    "STARTTLS": "The client has TLS with Willi; between Willi and the server there is none.",
}
