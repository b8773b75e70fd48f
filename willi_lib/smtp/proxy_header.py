"""HAProxy's PROXY protocol, versions 1 and 2: the address of the client, before the first octet of SMTP.

Section numbers are those of https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt. A
header is expected from configured networks only and never guessed (section 5): the caller's part.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from ..hosts import canonical

MAX_V1_LINE = 107  # octets with CRLF, section 2.1
MAX_V2_BLOCK = 2048  # octets after the first 16. The field can say 65,535; addresses and the usual TLVs take under 600

_V1_START = b"PROXY "
_V1_TCP = re.compile(rb"PROXY TCP([46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})")

_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_START = struct.Struct("!12sBBH")  # signature, version and command, family and protocol, length of the block
_V2_LOCAL, _V2_PROXY = 0x20, 0x21
_V2_TCP4, _V2_TCP6 = 0x11, 0x21
_V2_ADDRESSES = {_V2_TCP4: struct.Struct("!4s4sHH"), _V2_TCP6: struct.Struct("!16s16sHH")}

# With anything but TCP (UNSPEC, datagrams, unix sockets) the receiver "is free to accept the connection anyway and use
# the real endpoint addresses", and HAProxy and nginx do. Values outside of this table are invalid (section 2.2).
_V2_FAMILIES = {family | protocol for family in (0x00, 0x10, 0x20, 0x30) for protocol in (0, 1, 2)}


@dataclass(frozen=True)
class Endpoints:
    """Both ends of the client's connection, as the proxy sees it; addresses as ipaddress writes them."""

    source: str
    source_port: int
    destination: str
    destination_port: int


class BadHeader(Exception):
    """These octets are not the beginning of a PROXY header."""


def parse(buffer: bytes) -> tuple[Endpoints | None, int] | None:
    """Read the header with which a connection begins: the endpoints, and how many octets it took.

    None: it is not complete, read more. Endpoints None (LOCAL, UNKNOWN, not TCP): use the
    real ones. ::ffff:192.0.2.1, from a proxy that listens on both families, is 192.0.2.1.

    Raises BadHeader: at the first octet that is not of the frame, and for the fields of a
    v1 line when it is complete. No header is longer than 16 + MAX_V2_BLOCK octets.
    """
    if buffer.startswith(_V1_START[: len(buffer)]):
        return _parse_v1(buffer)
    if buffer.startswith(_V2_SIGNATURE[: len(buffer)]):
        return _parse_v2(buffer)
    raise BadHeader(f"not a PROXY header: {buffer[:16]!r}")


def is_header(line: bytes, following: Sequence[bytes] = ()) -> bool:
    """Whether what was read as a command line is the beginning of a header. following: the lines that came with it."""
    return line.startswith(_V1_START) or line == b"\0" or (not line and [*following[:2]] == [b"", b"\0"])


def build_v1(endpoints: Endpoints) -> bytes:
    """The header as a line of text (section 2.1)."""
    source, destination = _of_one_family(endpoints)
    family = "TCP4" if source.version == 4 else "TCP6"
    ports = f"{endpoints.source_port} {endpoints.destination_port}"
    return f"PROXY {family} {source} {destination} {ports}\r\n".encode("ascii")


def build_v2(endpoints: Endpoints) -> bytes:
    """The binary header (section 2.2), without TLVs."""
    source, destination = _of_one_family(endpoints)
    family = _V2_TCP4 if source.version == 4 else _V2_TCP6
    form = _V2_ADDRESSES[family]
    block = form.pack(source.packed, destination.packed, endpoints.source_port, endpoints.destination_port)
    return _V2_START.pack(_V2_SIGNATURE, _V2_PROXY, family, len(block)) + block


def _parse_v1(buffer: bytes) -> tuple[Endpoints | None, int] | None:
    line, crlf, _ = buffer.partition(b"\r\n")
    text = line if crlf else line.removesuffix(b"\r")
    if len(text) + 2 > MAX_V1_LINE:
        raise BadHeader("PROXY line too long")
    if b"\r" in text or b"\n" in text:
        raise BadHeader("CR or LF alone in a PROXY line")
    if not crlf:
        return None
    is_unknown = text.split(b" ")[1] == b"UNKNOWN"  # whatever comes after it
    return None if is_unknown else _v1_endpoints(text), len(line) + len(crlf)


def _v1_endpoints(text: bytes) -> Endpoints:
    if match := _V1_TCP.fullmatch(text):
        source, destination = match[2].decode("ascii"), match[3].decode("ascii")
        ports = int(match[4]), int(match[5])
        with suppress(ValueError):
            if (match[1] == b"6") == (":" in source) == (":" in destination) and max(ports) <= 65535:
                return Endpoints(str(canonical(source)), ports[0], str(canonical(destination)), ports[1])
    raise BadHeader(f"bad PROXY line: {text!r}")


def _parse_v2(buffer: bytes) -> tuple[Endpoints | None, int] | None:
    """TLVs are skipped; a checksum (CRC32C) among them is not verified: TCP has one."""
    if len(buffer) > 12 and buffer[12] not in (_V2_LOCAL, _V2_PROXY):
        raise BadHeader(f"bad PROXY version or command: {buffer[12]:#04x}")
    local = buffer[12:13] == bytes([_V2_LOCAL])  # a health check of the proxy's own: the rest is not looked at
    if len(buffer) > 13 and not local and buffer[13] not in _V2_FAMILIES:
        raise BadHeader(f"bad PROXY family or protocol: {buffer[13]:#04x}")
    if len(buffer) < _V2_START.size:
        return None
    _, _, family, length = _V2_START.unpack_from(buffer)
    form = None if local else _V2_ADDRESSES.get(family)
    if length > MAX_V2_BLOCK or (form and length < form.size):
        raise BadHeader(f"bad length of a PROXY header: {length}")
    end = _V2_START.size + length
    if len(buffer) < end:
        return None
    if form is None:
        return None, end
    source, destination, source_port, destination_port = form.unpack_from(buffer, _V2_START.size)
    return Endpoints(str(canonical(source)), source_port, str(canonical(destination)), destination_port), end


def _of_one_family(endpoints: Endpoints) -> tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address]:
    """The two addresses, without zones, in the family of the client: a server without IPv6 takes no other for IPv4."""
    source, destination = (canonical(text.partition("%")[0]) for text in (endpoints.source, endpoints.destination))
    if source.version == destination.version:
        return source, destination
    return source, IPv4Address("0.0.0.0") if source.version == 4 else IPv6Address(f"::ffff:{destination}")
