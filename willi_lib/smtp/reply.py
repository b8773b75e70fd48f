"""SMTP replies as values (RFC 5321 §4.2), and every reply that Willi itself gives.

An upstream's reply travels to the client through `Reply` unchanged. What Willi says in its own name is in the catalogue
at the end: a search for a text finds one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

CLIENT, WILLI, UPSTREAM = "client", "internal", "upstream"  # the side that ended something; `error_src` in the log

MAX_REPLY_LINES = 200  # a bound on what we keep of an upstream's reply; real ones have under 20
MAX_SALVAGED_LINE = 512  # octets with code and CRLF of each line of a badly framed verdict, RFC 5321 §4.5.3.1.5

# A reply that is in order in each of its lines. Most are, and taking those at once costs a tenth of line by line.
_WHOLE_REPLY = re.compile(
    rb"(?:[2-5][0-9]{2}-[^\r\n]*\r\n){0,%d}[2-5][0-9]{2}(?: [^\r\n]*)?\r\n" % (MAX_REPLY_LINES - 1)
)
_READABLE_CODE = re.compile(rb"([2-5][0-9]{2})(?:([ -])|(?=[\t\r])|\Z)")

# The octets that RFC 5321 §4.2 allows in a reply's text, and those above 127: UTF-8 comes with SMTPUTF8 (RFC 6531
# §3.7.4). The others could be run by the terminal on which the client's log is read, or end the text there.
_PRINTABLE = bytes(octet if octet == 9 or (octet >= 32 and octet != 127) else ord("?") for octet in range(256))


@dataclass(frozen=True)
class Reply:
    """One SMTP reply: a code and at least one line of text.

    Lines are octets, without code and CRLF; an enhanced status code (RFC 2034)
    is part of the text. In what was read from a peer each control octet is a `?`.
    """

    code: int
    lines: tuple[bytes, ...]

    @cached_property
    def positive(self) -> bool:
        """A yes to a command: 2yz (RFC 5321 §4.2.1), but neither a greeting (220) nor a goodbye (221)."""
        return 200 <= self.code < 300 and self.code not in (220, 221)

    @property
    def welcomes(self) -> bool:
        """A yes where a greeting is one: to a connection or to XCLIENT."""
        return self.positive or self.code == 220

    @property
    def permanent(self) -> bool:
        """5yz: do not try again in this form."""
        return self.code >= 500

    @cached_property
    def octets(self) -> bytes:
        """The reply as it goes over the wire, CRLF included."""
        code = b"%d" % self.code
        if len(self.lines) == 1:
            return b"%s %s\r\n" % (code, self.lines[0])
        continued = b"".join(b"%s-%s\r\n" % (code, line) for line in self.lines[:-1])
        return b"%s%s %s\r\n" % (continued, code, self.lines[-1])

    @cached_property
    def features(self) -> Mapping[str, str]:
        """Of an answer to EHLO: keywords in upper case and their parameters; the first line is a greeting."""
        features = {}
        for line in self.lines[1:]:
            # "AUTH=LOGIN" and the like: old servers put = in place of the space.
            keyword, *parameters = re.split("[ =]", line.decode("ascii", "replace"), maxsplit=1)
            features[keyword.upper()] = parameters[0].strip() if parameters else ""
        return features

    def __str__(self) -> str:
        """One line for the log: code and text."""
        text = b" / ".join(self.lines).decode("utf-8", "backslashreplace")
        return f"{self.code} {text}"


class BadReply(Exception):
    """What the upstream sent is not a reply line."""


class Rejected(Exception):
    """A verdict on the client, its command or its message, by Willi or by the upstream."""

    def __init__(self, reply: Reply, by: str = WILLI) -> None:
        super().__init__(str(reply))
        self.reply = reply
        self.by = by


class Outcome(NamedTuple):
    """What a client was told about a message or a recipient, by which side, and why."""

    reply: Reply | None  # None: the client was gone
    by: str  # CLIENT, WILLI or UPSTREAM
    why: str = ""  # for the log, where it knows more than the reply says


def parse_reply_line(line: bytes) -> tuple[int, bool, bytes]:
    """Split a reply line without its CRLF: code, whether it is the last line, text.

    Raises BadReply. A line of three digits alone is accepted (RFC 5321 §4.2).
    """
    code, separator = line[:3], line[3:4]
    if not (len(code) == 3 and code.isdigit() and b"200" <= code < b"600" and separator in (b"", b" ", b"-")):
        raise BadReply(f"not an SMTP reply: {line[:80]!r}")
    return int(code), separator != b"-", line[4:].translate(_PRINTABLE)


@lru_cache(maxsize=256)
def first_reply(octets: bytes) -> tuple[Reply, int] | None:
    """The reply at the beginning, and its length; None if it is not complete, or not in order.

    Remembered with its octets and features, since an upstream says mostly the same: its EHLO reply, 250, 354.
    """
    whole = _WHOLE_REPLY.match(octets)
    if whole is None:
        return None
    lines = whole[0][:-2].split(b"\r\n")
    return Reply(int(lines[-1][:3]), tuple([line[4:].translate(_PRINTABLE) for line in lines])), whole.end()


def begins_with_code(octets: bytes) -> bool:
    """Whether the first thing behind blanks and empty lines is a code that can be read."""
    return _READABLE_CODE.match(octets.lstrip().partition(b"\n")[0]) is not None


def salvage(octets: bytes) -> Reply | None:
    """What can be read of a reply whose framing is bad, or whose end is missing; None: not even a code.

    Blanks and empty lines before it say nothing. A line without a code is more text, unless a whole reply follows
    another.
    """
    code, ended, lines = 0, False, list[bytes]()
    for line in octets.lstrip().split(b"\n")[:MAX_REPLY_LINES]:
        readable = _READABLE_CODE.match(line)
        if readable is None and not code:
            return None
        if readable is None:
            text = line
        elif ended:
            break
        else:
            code, ended, text = int(readable[1]), readable[2] != b"-", line[readable.end() :]
        text = text.rstrip(b"\r")[: MAX_SALVAGED_LINE - 6]
        if text or not lines:
            lines.append(text.translate(_PRINTABLE))
    return Reply(code, tuple(lines))


def own(code: int, enhanced: str, text: str) -> Reply:
    """A reply in Willi's own name."""
    return Reply(code, (f"{enhanced} {text}".strip().encode("ascii"),))


def at_rcpt(refusal: Reply) -> Reply:
    """A refusal of MAIL as the answer to RCPT, where 552 would mean "send the rest later" (RFC 5321 §4.5.3.1.10)."""
    return Reply(554, refusal.lines) if refusal.code == 552 else refusal


def is_own(answer: Reply) -> bool:
    """Whether it is one of those below: that very value, since an upstream may use the same words."""
    return id(answer) in _OWN


# 2yz
RESET = own(250, "2.0.0", "Ok")
NOOP = own(250, "2.0.0", "Ok")
SENDER_KEPT = own(250, "2.1.0", "Ok")
BYE = own(221, "2.0.0", "Bye")
READY_FOR_TLS = own(220, "2.0.0", "Ready to start TLS")
CANNOT_VRFY = own(252, "2.5.2", "Cannot VRFY user, but will take a message for him")  # RFC 5321 §3.5.3
HELP = own(214, "2.0.0", "See RFC 5321; ask postmaster for help")

# 4yz: try again
SHUTTING_DOWN = own(421, "4.3.2", "Service is shutting down, try again")
TOO_SLOW = own(421, "4.4.2", "Timeout, closing connection")
TOO_MANY_CONNECTIONS = own(421, "4.3.2", "Too many connections, try again later")
TOO_MANY_CONNECTIONS_FROM_YOU = own(421, "4.7.0", "Too many connections from your address")
TOO_FAST = own(421, "4.7.0", "Too many connections from your address in a minute")
TOO_MANY_ERRORS = own(421, "4.7.0", "Too many errors")
NO_HEADER = own(421, "4.7.0", "No PROXY header is expected from your address")
NOT_HTTP = own(421, "4.7.0", "This is an SMTP server")
LOOKUP_FAILED = own(451, "4.3.0", "Cannot look up this address now")
UPSTREAM_FAILED = own(451, "4.4.1", "No answer from the server for this recipient, try again")
UPSTREAM_LOST = own(451, "4.4.2", "Lost the server for this recipient, try again")
STANDS_IN = own(451, "4.4.1", "Server that may support this message does not answer, try again")
OTHER_DESTINATION = own(451, "4.3.0", "Different destination, please send separately")
OUR_FAULT = own(451, "4.3.0", "Internal error, try again")
NO_RECIPIENTS_YET = own(451, "4.5.1", "No valid recipients, try again")
XCLIENT_NEEDED = own(451, "4.3.5", "Server for this recipient does not accept our XCLIENT, try again")
NOT_FROM_US = own(451, "4.7.0", "Server for this recipient wants TLS or a password from us, try again")
TOO_MANY_RECIPIENTS = own(452, "4.5.3", "Too many recipients")  # RFC 5321 §4.5.3.1.10

# 5yz: do not try again
LINE_TOO_LONG = own(500, "5.5.2", "Line too long")  # RFC 5321 §4.5.3.1.4
UNKNOWN_COMMAND = own(500, "5.5.2", "Command not recognized")
BARE_NEWLINE_IN_COMMAND = own(500, "5.5.2", "Bare CR or LF in a command")
CONTROL_CHARACTER = own(501, "5.5.2", "Control or 8-bit character in a command")
SYNTAX = own(501, "5.5.4", "Syntax error in parameters")
BAD_HELO = own(501, "5.5.4", "Syntax: EHLO or HELO and your host name")
BAD_SENDER = own(501, "5.1.7", "Bad sender address syntax")
BAD_RECIPIENT = own(501, "5.1.3", "Bad recipient address syntax")
NO_PARAMETERS = own(501, "5.5.4", "No parameters allowed")
BAD_BDAT = own(501, "5.5.4", "Syntax: BDAT size [LAST]")
BAD_XCLIENT = own(501, "5.5.4", "Bad XCLIENT attribute")
NOT_IMPLEMENTED = own(502, "5.5.1", "Command not implemented")
BAD_SEQUENCE = own(503, "5.5.1", "Bad sequence of commands")
HELO_FIRST = own(503, "5.5.1", "Send EHLO first")
MAIL_FIRST = own(503, "5.5.1", "Need MAIL command")
RCPT_FIRST = own(503, "5.5.1", "Need RCPT command")
NESTED_MAIL = own(503, "5.5.1", "Nested MAIL command")
TLS_ALREADY = own(503, "5.5.1", "TLS is already active")
DATA_AFTER_BDAT = own(503, "5.5.1", "DATA after BDAT, send RSET first")  # RFC 3030 §2
XCLIENT_DENIED = own(550, "5.7.0", "XCLIENT is not allowed from your address")
NO_SMTPUTF8 = own(550, "5.6.7", "Server for this recipient does not support SMTPUTF8")  # RFC 6531 §3.5
NO_8BITMIME = own(550, "5.6.3", "Server for this recipient does not support 8BITMIME")
BARE_NEWLINE = own(550, "5.5.2", "Message has a bare CR or LF")
TOO_BIG = own(552, "5.3.4", "Message is too big")  # RFC 1870 §6.1
NO_DOMAIN = own(553, "5.1.3", "Recipient address needs a domain")
NEEDS_SMTPUTF8 = own(553, "5.6.7", "Non-ASCII address needs SMTPUTF8")  # RFC 6531 §3.5
NO_VALID_RECIPIENTS = own(554, "5.5.1", "No valid recipients")  # RFC 5321 §3.3
NO_ROUTE = own(554, "5.7.1", "Relay access denied")
MAIL_LOOP = own(554, "5.4.6", "Mail loops back to me")
UNKNOWN_PARAMETER = own(555, "5.5.4", "MAIL or RCPT parameter not recognized")  # RFC 5321 §4.1.1.11

_OWN = frozenset(id(value) for value in list(globals().values()) if isinstance(value, Reply))
