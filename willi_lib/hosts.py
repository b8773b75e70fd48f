"""What a host name is, an IP address, and `host:port`: for the file, the tables, and what peers say."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

MAX_HOST_NAME = 253  # characters, RFC 1035 §2.3.4 without length octets
EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # to listen at; and where this machine finds it
_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"  # RFC 1123 §2.1, and the underscore that some names have
DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"  # in lower case
_HOST_NAME = re.compile(DOMAIN, re.ASCII | re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]*))(?::(.*))?")


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port. An empty host means all addresses, IPv4 and IPv6."""

    host: str
    port: int

    def __str__(self) -> str:
        return with_port(self.host, self.port)

    @property
    def here(self) -> Address:
        """Where a program on this machine finds what listens at it."""
        return Address(EVERYWHERE.get(self.host, self.host), self.port)


def with_port(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(text: str) -> tuple[str, str | None]:
    """The host, without brackets, and what stands behind it as a port. Raises ValueError(what is wrong)."""
    if text.count(":") > 1 and "[" not in text:  # where would a port begin?
        raise ValueError("an IPv6 address needs brackets, as in [2001:db8::1] or [2001:db8::1]:25")
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None:
        raise ValueError("must be host, host:port or [IPv6 address]:port")
    return match[1] or match[2], match[3]


def parse_port(text: str, least: int = 1) -> int:
    """Raises ValueError(what is wrong)."""
    if not re.fullmatch("[0-9]{1,5}", text) or not least <= int(text) <= 65535:
        raise ValueError(f"the port must be {least} to 65535")
    return int(text)


def is_host_name(text: str) -> bool:
    """Whether it has the form of one, in ASCII, and of no IPv4 address, nor of a part of one."""
    fits = _HOST_NAME.fullmatch(text) is not None and len(text) <= MAX_HOST_NAME
    return fits and not text.rpartition(".")[2].isdigit()


def parse_ip(text: str) -> str | None:
    """An IP address, canonical; None: it is none, and may be a name."""
    if ":" in text or text[-1:].isdigit():  # else trying takes longer than all the rest
        with suppress(ValueError):
            return str(canonical(text))
    return None


def canonical(address: str | bytes) -> IPv4Address | IPv6Address:
    """As text or packed; what is IPv4 written as IPv6 (::ffff:192.0.2.1) is IPv4. Raises ValueError."""
    found = ip_address(address)
    mapped: IPv4Address | None = getattr(found, "ipv4_mapped", None)
    return mapped or found
