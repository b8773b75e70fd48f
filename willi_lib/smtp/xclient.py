"""XCLIENT of Postfix: what a server says about its client (XCLIENT_README).

Values are xtext (RFC 3461 §4): upper-case hex for what is not printable ASCII, and for + and =.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..hosts import canonical, is_host_name, parse_port
from . import reply as replies
from .reply import Rejected

ATTRIBUTES = frozenset(("NAME", "ADDR", "PORT", "PROTO", "HELO"))  # that a host in `xclient_hosts` may send
MAX_LINE = 512  # octets with CRLF
MAX_VALUE = 255  # octets; Postfix refuses longer ones
UNAVAILABLE, TEMPUNAVAIL = "[UNAVAILABLE]", "[TEMPUNAVAIL]"  # there is none; it could not be found out in time

_PLAIN = frozenset(range(0x21, 0x7F)) - frozenset(b"+=")
_XTEXT_AS_IS = re.compile(b"[%s]*" % re.escape(bytes(sorted(_PLAIN))))
_XTEXT = re.compile(rb"(?:[%s]|\+[0-9A-F]{2})*" % re.escape(bytes(sorted(_PLAIN))))
_XTEXT_CODE = re.compile(rb"\+([0-9A-F]{2})")


class Told(NamedTuple):
    """What an XCLIENT command says. None: it does not mention that."""

    address: str | None  # canonical; empty: not known
    port: int  # 0: not known
    name: str | None  # a host name, UNAVAILABLE or TEMPUNAVAIL


def parse(argument: bytes) -> Told:
    """Raises Rejected, also for an attribute that is there twice: which of them is the client's?"""
    attributes: dict[str, str] = {}
    try:
        for word in argument.split():
            key, _, value = word.partition(b"=")
            attribute, text = key.decode("ascii").upper(), from_xtext(value)
            fits = 0 < len(text) <= MAX_VALUE and text.isprintable() and text.isascii()
            if attribute not in ATTRIBUTES or attribute in attributes or not fits:
                raise ValueError(attribute)
            attributes[attribute] = text
        if not attributes:
            raise ValueError("no attribute")
        address, name = attributes.get("ADDR"), attributes.get("NAME")
        return Told(
            None if address is None else _address(address),
            _port(attributes.get("PORT", UNAVAILABLE)),
            None if name is None else _name(name),
        )
    except ValueError:
        raise Rejected(replies.BAD_XCLIENT) from None


def lines(attributes: Sequence[tuple[str, str]]) -> list[bytes]:
    """XCLIENT commands for these attributes, in this order, PORT and ADDR last and together.

    A value that is too long as xtext is left out: Postfix would refuse the whole command, and a client with a hundred +
    in its EHLO would then speak in our name.
    """
    values = [(name, xtext(value)) for name, value in attributes]
    words = [b" %s=%s" % (name.encode("ascii"), value) for name, value in values if len(value) <= MAX_VALUE]
    if len(words) > 1 and words[-2].startswith(b" PORT=") and words[-1].startswith(b" ADDR="):
        words[-2:] = [words[-2] + words[-1]]
    commands = [b"XCLIENT"] if words else []
    for word in words:
        if len(commands[-1]) + len(word) + 2 > MAX_LINE:
            commands.append(b"XCLIENT")
        commands[-1] += word
    return commands


def xtext(text: str) -> bytes:
    octets = text.encode()
    if _XTEXT_AS_IS.fullmatch(octets):  # nearly always
        return octets
    return b"".join(bytes((octet,)) if octet in _PLAIN else b"+%02X" % octet for octet in octets)


def from_xtext(octets: bytes) -> str:
    """Raises ValueError."""
    if not _XTEXT.fullmatch(octets):
        raise ValueError("no xtext")
    return _XTEXT_CODE.sub(lambda match: bytes((int(match[1], 16),)), octets).decode()


def _address(text: str) -> str:
    if text.upper() in (UNAVAILABLE, TEMPUNAVAIL):
        return ""
    bare = text[5:] if text[:5].upper() == "IPV6:" else text
    if (bare != text) != (":" in bare) or "%" in bare:  # IPv6 without its word, the word without IPv6, a zone
        raise ValueError(text)
    return str(canonical(bare))


def _port(text: str) -> int:
    return 0 if text.upper() == UNAVAILABLE else parse_port(text, least=0)


def _name(text: str) -> str:
    if text.upper() in (UNAVAILABLE, TEMPUNAVAIL):
        return text.upper()
    if not is_host_name(text):  # an upstream would refuse it, and with it the address
        raise ValueError(text)
    return text
