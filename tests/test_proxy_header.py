"""PROXY headers as HAProxy, nginx and load balancers in the cloud send them, and as nobody should."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib.smtp.proxy_header import MAX_V2_BLOCK, BadHeader, Endpoints, build_v1, build_v2, parse

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
IPV4 = Endpoints("192.0.2.1", 56324, "198.51.100.2", 25)
IPV6 = Endpoints("2001:db8::1", 56324, "2001:db8::2", 25)
IPV4_BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + (56324).to_bytes(2, "big") + (25).to_bytes(2, "big")
IPV6_BLOCK = ip_address("2001:db8::1").packed + ip_address("2001:db8::2").packed + IPV4_BLOCK[8:]


def v2(command: int, family: int, block: bytes = b"") -> bytes:
    return SIGNATURE + bytes([command, family]) + len(block).to_bytes(2, "big") + block


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


VALID = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25\r\n", IPV4),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 25\r\n", IPV6),
    (b"PROXY TCP6 2001:0DB8:0:0:0:0:0:1 2001:0db8::0002 56324 25\r\n", IPV6),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:c633:6402 56324 25\r\n", IPV4),
    (b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", Endpoints("0.0.0.0", 0, "255.255.255.255", 65535)),
    (b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"fffe"] * 2) + b" 65535 65535\r\n",
     Endpoints("ffff:" * 7 + "fffe", 65535, "ffff:" * 7 + "fffe", 65535)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN 192.0.2.1 what ever\0\xff\r\n", None),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", None),
    (v2(0x21, 0x11, IPV4_BLOCK), IPV4),
    (v2(0x21, 0x21, IPV6_BLOCK), IPV6),
    (v2(0x21, 0x21, ip_address("::ffff:192.0.2.1").packed + ip_address("2001:db8::2").packed + IPV4_BLOCK[8:]),
     Endpoints("192.0.2.1", 56324, "2001:db8::2", 25)),
    (v2(0x21, 0x11, IPV4_BLOCK + tlv(0x05, b"id") + tlv(0x04, b"") + tlv(0xEA, b"\1vpce-1")), IPV4),
    (v2(0x21, 0x11, IPV4_BLOCK + tlv(0x04, bytes(MAX_V2_BLOCK - 15))), IPV4),
    (v2(0x21, 0x11, IPV4_BLOCK + tlv(0x03, b"\0\0\0\0")), IPV4),  # a checksum, which is not looked at
    (v2(0x21, 0x11, IPV4_BLOCK + b"\4\0\2x"), IPV4),
    (v2(0x21, 0x00), None),
    (v2(0x21, 0x00, b"any thing"), None),
    (v2(0x21, 0x12, IPV4_BLOCK), None),
    (v2(0x21, 0x22, IPV6_BLOCK), None),
    (v2(0x21, 0x31, bytes(216)), None),
    (v2(0x20, 0x00), None),
    (v2(0x20, 0x11, IPV4_BLOCK), None),
    (v2(0x20, 0xFF, b"not looked at"), None),
]  # fmt: skip

INVALID = [
    b"EHLO client.example\r\n",
    b"\r\nEHLO",
    b"proxy TCP4 192.0.2.1 198.51.100.2 56324 25\r\n",
    b"PROXY\r\n",
    b"PROXY \r\n",
    b"PROXY TCP4\r\n",
    b"PROXY TCP5 192.0.2.1 198.51.100.2 56324 25\r\n",
    b"PROXY tcp4 192.0.2.1 198.51.100.2 56324 25\r\n",
    b"PROXY UNKNOWNS\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25 1\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25 \r\n",
    b"PROXY TCP4  192.0.2.1 198.51.100.2 56324 25\r\n",
    b"PROXY TCP4 192.0.2.01 198.51.100.2 56324 25\r\n",
    b"PROXY TCP4 192.0.2.256 198.51.100.2 56324 25\r\n",
    b"PROXY TCP4 192.0.2 198.51.100.2 56324 25\r\n",
    b"PROXY TCP4 192.0.2.1/32 198.51.100.2 56324 25\r\n",
    b"PROXY TCP4 2001:db8::1 2001:db8::2 56324 25\r\n",
    b"PROXY TCP6 192.0.2.1 198.51.100.2 56324 25\r\n",
    b"PROXY TCP6 fe80::1%eth0 fe80::2 56324 25\r\n",
    b"PROXY TCP6 2001:db8::1::2 2001:db8::2 56324 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 056324 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 025\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 +56324 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 -1 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 5_0 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2  25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 \xd9\xa1 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25\rEHLO",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25\r\r\n",
    b"PROXY UNKNOWN a\nb\r\n",
    b"PROXY UNKNOWN a\rb\r\n",
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    SIGNATURE[:-1] + b"\r",
    v2(0x11, 0x11, IPV4_BLOCK),
    v2(0x31, 0x11, IPV4_BLOCK),
    v2(0x22, 0x11, IPV4_BLOCK),
    v2(0x21, 0x41, IPV4_BLOCK),
    v2(0x21, 0x13, IPV4_BLOCK),
    v2(0x21, 0x11, IPV4_BLOCK[:-1]),
    v2(0x21, 0x11),
    v2(0x21, 0x21, IPV6_BLOCK[:-1]),
    v2(0x21, 0x21, IPV4_BLOCK),
    v2(0x21, 0x11, IPV4_BLOCK + tlv(0x04, bytes(MAX_V2_BLOCK - 14))),
    v2(0x20, 0x00, bytes(MAX_V2_BLOCK + 1)),
    v2(0x21, 0x00, bytes(0xFFFF)),
]


@pytest.mark.parametrize(("header", "endpoints"), VALID)
def test_a_header_tells_the_endpoints_and_its_length(header: bytes, endpoints: Endpoints | None):
    assert parse(header) == (endpoints, len(header))


@pytest.mark.parametrize(("header", "endpoints"), VALID)
@pytest.mark.parametrize("following", [b"E", b"EHLO client.example\r\n", b"\r\n", b"PROXY UNKNOWN\r\n", bytes(300)])
def test_what_follows_a_header_is_left_alone(header: bytes, endpoints: Endpoints | None, following: bytes):
    assert parse(header + following) == (endpoints, len(header))


@pytest.mark.parametrize("header", [header for header, _ in VALID])
def test_a_part_of_a_header_asks_for_more(header: bytes):
    for length in range(len(header)):
        assert parse(header[:length]) is None


@pytest.mark.parametrize("header", INVALID)
def test_what_is_no_header_is_refused_whole_and_octet_by_octet(header: bytes):
    with pytest.raises(BadHeader):
        parse(header)
    with pytest.raises(BadHeader):
        for length in range(len(header) + 1):
            assert parse(header[:length]) is None


@pytest.mark.parametrize(
    ("octets", "enough"),
    [
        (b"EHLO", 1),
        (b"\r\nEHLO", 3),
        (b"PROXIES", 5),
        (b"PROXY TCP4 192.0.2.1\n", 21),
        (b"PROXY TCP4 192.0.2.1\r\r", 22),
        (b"PROXY UNKNOWN " + b"x" * 200, 106),
        (v2(0x11, 0x11), 13),
        (v2(0x21, 0x41), 14),
        (v2(0x21, 0x11), 16),
        (v2(0x20, 0x11, bytes(0xFFFF)), 16),
    ],
)
def test_a_broken_frame_is_refused_at_once(octets: bytes, enough: int):
    assert parse(octets[: enough - 1]) is None
    with pytest.raises(BadHeader):
        parse(octets[:enough])


def test_headers_are_built_as_haproxy_writes_them():
    assert build_v1(IPV4) == VALID[0][0]
    assert build_v1(IPV6) == VALID[1][0]
    assert build_v2(IPV4) == v2(0x21, 0x11, IPV4_BLOCK)
    assert build_v2(IPV6) == v2(0x21, 0x21, IPV6_BLOCK)


def test_an_ipv4_client_that_came_over_ipv6_is_still_sent_as_ipv4():
    """As of a proxy in front that reaches us by IPv6: a server without IPv6 takes no TCP6, nor knows what it is."""
    mixed = Endpoints("192.0.2.1", 56324, "2001:db8::2", 25)
    assert build_v1(mixed) == b"PROXY TCP4 192.0.2.1 0.0.0.0 56324 25\r\n"
    assert build_v2(mixed) == v2(0x21, 0x11, bytes([192, 0, 2, 1, 0, 0, 0, 0]) + IPV4_BLOCK[8:])


def test_an_ipv6_client_that_came_over_ipv4_is_sent_as_ipv6():
    mixed = Endpoints("2001:db8::2", 56324, "192.0.2.1", 25)
    for header in (build_v1(mixed), build_v2(mixed)):
        assert parse(header) == (mixed, len(header))


def test_ipv4_from_a_socket_for_both_families_is_sent_as_ipv4():
    seen = Endpoints("::ffff:192.0.2.1", 56324, "::ffff:198.51.100.2", 25)
    assert build_v1(seen) == build_v1(IPV4)
    assert build_v2(seen) == build_v2(IPV4)


def test_a_zone_is_not_sent():
    seen = Endpoints("fe80::1%eth0", 56324, "fe80::2%eth0", 25)
    assert build_v1(seen) == b"PROXY TCP6 fe80::1 fe80::2 56324 25\r\n"
    assert parse(build_v2(seen)) == (Endpoints("fe80::1", 56324, "fe80::2", 25), 52)


ports = st.integers(0, 65535)


@given(st.ip_addresses(), ports, st.ip_addresses(), ports, st.binary(max_size=20))
def test_what_is_built_is_read_again(source, source_port, destination, destination_port, following):
    sent = Endpoints(unmapped(source), source_port, unmapped(destination), destination_port)
    if ":" in sent.destination and ":" not in sent.source:
        sent = replace(sent, destination="0.0.0.0")
    for header in (build_v1(sent), build_v2(sent)):
        assert parse(header + following) == (sent, len(header))
        assert all(parse(header[:length]) is None for length in range(len(header)))


def unmapped(address) -> str:
    return str(getattr(address, "ipv4_mapped", None) or address)


@given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP6 ", SIGNATURE, SIGNATURE + b"\x21\x11\0"]), st.binary(max_size=80))
def test_only_a_bad_header_is_ever_raised(start: bytes, octets: bytes):
    for length in range(len(octets) + 1):
        try:
            parsed = parse(start + octets[:length])
        except BadHeader:
            continue
        assert parsed is None or 0 < parsed[1] <= len(start) + length
