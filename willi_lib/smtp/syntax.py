"""Command lines, paths, parameters and the like: the only crossing between octets and text.

Grammar: RFC 5321 §4.1.2, widened where well-known servers are wider (each place says so),
since the upstream has the last word on an address. Never widened: control octets, blanks
inside an address, and whatever else could make the upstream see another command than we did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from . import reply as replies
from .reply import Rejected, Reply

MAX_COMMAND_LINE = 2048  # octets with CRLF: RFC 5321 §4.5.3.1.4 asks for 512 and more; Postfix's line_length_limit
MAX_HELO = 255  # octets, RFC 5321 §4.5.3.1.2
# Numbers: `LF in octets` costs an eighth of `b"\n" in octets`, for which Python raises an exception inside first.
NUL, LF, CR, DOT = b"\0\n\r."
POSTMASTER = "postmaster"  # the one recipient without a domain, RFC 5321 §4.5.1

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # but for the tab, which is a blank
# Of what RFC 6531 §3.3 allows in an address: C1 controls, line and paragraph separators, and bidirectional controls.
# Not what this Python cannot print: the joiners of Persian and Hindi, and letters newer than its tables.
_NEVER_IN_ADDRESS = re.compile("[\x80-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_ATOM = rb'[^\x00-\x20\x7f"()<>\[\]:;@\\,]'  # atext, dots anywhere (Postfix takes a..b@c too), and non-ASCII
_LOCAL_PART = rb'(?:%s+|"(?:[^\x00-\x1f\x7f"\\]|\\[\x20-\x7e])*")' % _ATOM
_DOMAIN = rb"(?:[0-9A-Za-z._\x80-\xff-]+|\[[0-9A-Za-z.:-]+\])"
_ADDRESS = rb"%s(?:@(%s))?" % (_LOCAL_PART, _DOMAIN)
_SOURCE_ROUTE = rb"(?:@%s(?:,@%s)*:)?" % (_DOMAIN, _DOMAIN)  # to be ignored, RFC 5321 §4.1.1.3
_PATH = re.compile(
    # Blanks around the address and a path without brackets are common; Postfix takes both.
    rb"[ \t]*(?:<[ \t]*(?:%s(?P<path>%s)[ \t]*)?>|(?P<bare>%s))(?:[ \t]+(?P<parameters>.*))?"
    % (_SOURCE_ROUTE, _ADDRESS, _ADDRESS)
)
_PARAMETER = re.compile(rb"([0-9A-Za-z][0-9A-Za-z-]*)(?:=([\x21-\x3c\x3e-\x7e]+))?")
_HELO = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_HELO)

Body = Literal["7BIT", "8BITMIME"]


class Path(NamedTuple):
    """A reverse- or forward-path without its brackets and without a source route."""

    address: str  # empty: the null reverse-path
    domain: str | None  # as sent; None: there is none

    @property
    def octets(self) -> bytes:
        """The path as it goes into a command, with brackets."""
        return b"<%s>" % self.address.encode()


# A command of a client: verb in upper case, argument, and of a RCPT that was read together with the one before it its
# recipient.
Command = tuple[bytes, bytes, Path | None]


class Mail(NamedTuple):
    """What a MAIL command says (RFC 5321 §4.1.1.2, RFC 1870, RFC 6152, RFC 6531)."""

    path: Path
    size: int | None = None  # octets
    body: Body | None = None
    smtputf8: bool = False

    def line(self, features: Mapping[str, str]) -> bytes:
        """The command for an upstream with these EHLO keywords: parameters that it does not know are left out."""
        parts = [b"MAIL FROM:", self.path.octets]
        if self.size is not None and "SIZE" in features:
            parts.append(b" SIZE=%d" % self.size)
        if self.body and "8BITMIME" in features:
            parts.append(b" BODY=%s" % self.body.encode())
        if self.smtputf8:
            parts.append(b" SMTPUTF8")
        return b"".join(parts)


def split_command(line: bytes) -> tuple[bytes, bytes]:
    """Verb in upper case, and argument; both may be empty. Blanks around them count for nothing (as with Postfix).

    Raises Rejected for control octets, which must never reach the upstream.
    """
    if _CONTROL.search(line):
        raise Rejected(replies.CONTROL_CHARACTER)
    verb, *argument = line.split(None, 1) or (b"",)
    return verb.upper(), argument[0].rstrip() if argument else b""


def may_be_bdat(line: bytes) -> bool:
    """Whether a line that begins so may be BDAT, behind which come octets that are no commands."""
    return b"BDAT".startswith(line.lstrip()[:4].upper())


def parse_helo(argument: bytes) -> str:
    """The name a client gives in EHLO or HELO.

    Names that are no host names are the upstream's to refuse. Raises Rejected.
    """
    if not _HELO.fullmatch(argument):
        raise Rejected(replies.BAD_HELO)
    return argument.decode("ascii")


def parse_mail(argument: bytes, extensions: frozenset[str]) -> Mail:
    """MAIL's argument. extensions: which of SMTPUTF8 and 8BITMIME are offered. Raises Rejected."""
    path, parameters = _split_path(argument, b"FROM:", replies.BAD_SENDER)
    size: int | None = None
    body: Body | None = None
    smtputf8 = False
    for key, value in _parse_parameters(parameters).items():
        if key == "SIZE" and value.isdigit() and len(value) <= 20:  # RFC 1870 §4
            size = int(value)
        elif key == "BODY" and value.upper() == "7BIT" and "8BITMIME" in extensions:
            body = "7BIT"
        elif key == "BODY" and value.upper() == "8BITMIME" and "8BITMIME" in extensions:
            body = "8BITMIME"
        elif key == "SMTPUTF8" and not value and "SMTPUTF8" in extensions:
            smtputf8 = True
        elif key == "SIZE":
            raise Rejected(replies.SYNTAX)
        else:
            raise Rejected(replies.UNKNOWN_PARAMETER)
    return Mail(_make_path(path, smtputf8, replies.BAD_SENDER), size, body, smtputf8)


def parse_rcpt(argument: bytes, smtputf8: bool) -> Path:
    """RCPT's argument. smtputf8: the MAIL command said so. Raises Rejected."""
    octets, parameters = _split_path(argument, b"TO:", replies.BAD_RECIPIENT)
    if not octets:
        raise Rejected(replies.BAD_RECIPIENT)
    if _parse_parameters(parameters):
        raise Rejected(replies.UNKNOWN_PARAMETER)
    path = _make_path(octets, smtputf8, replies.BAD_RECIPIENT)
    if path.domain is None and path.address.lower() != POSTMASTER:
        raise Rejected(replies.NO_DOMAIN)
    return path


def _split_path(argument: bytes, keyword: bytes, refusal: Reply) -> tuple[bytes, bytes]:
    """The address and the parameters of MAIL or RCPT, as octets."""
    if argument[: len(keyword)].upper() != keyword:
        raise Rejected(replies.SYNTAX)
    match = _PATH.fullmatch(argument, len(keyword))
    if not match:
        raise Rejected(refusal)
    return match["path"] or match["bare"] or b"", match["parameters"] or b""


def _make_path(octets: bytes, smtputf8: bool, refusal: Reply) -> Path:
    try:
        address = octets.decode("utf-8")
    except UnicodeDecodeError:
        raise Rejected(refusal) from None
    if not address.isascii():
        if not smtputf8:
            raise Rejected(replies.NEEDS_SMTPUTF8)
        if _NEVER_IN_ADDRESS.search(address):
            raise Rejected(refusal)
    quoted_end = address.rfind('"')
    at = address.rfind("@")
    return Path(address, address[at + 1 :] if at > quoted_end else None)


def _parse_parameters(octets: bytes) -> dict[str, str]:
    """`KEY=value KEY` by key in upper case; empty value: none was given. Raises Rejected."""
    parameters: dict[str, str] = {}
    for word in octets.split():
        match = _PARAMETER.fullmatch(word)
        if not match:
            raise Rejected(replies.SYNTAX)
        key = match[1].decode("ascii").upper()
        if key in parameters:
            raise Rejected(replies.SYNTAX)
        parameters[key] = (match[2] or b"").decode("ascii")
    return parameters


def parse_bdat(argument: bytes) -> tuple[int, bool]:
    """Size of the chunk in octets, and whether it is the LAST (RFC 3030 §2). Raises Rejected."""
    size, *words = argument.split() or (b"",)
    last = b" ".join(words)
    if not (size.isdigit() and len(size) <= 20 and last.upper() in (b"", b"LAST")):
        raise Rejected(replies.BAD_BDAT)
    return int(size), bool(last)
