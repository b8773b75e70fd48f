"""HAProxy's PROXY header: from load balancers in front of Willi, and to upstreams without XCLIENT."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

import pytest

from tests.conftest import StartUpstream, StartWilli, TwoHosts
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import free_port
from tests.support.talk import BOB, EHLO, MAIL, OK, QUEUED, SENDER_KEPT, deliver, greeted, reply, say
from tests.support.upstream import EXTENSIONS, GREETING, Close, ScriptedUpstream

BALANCER = "127.0.0.5"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
NO_HEADER = b"421 4.7.0 No PROXY header is expected from your address\r\n"
NOT_EXPECTED = "A PROXY header is not expected from this host: is it missing in proxy_protocol_hosts?"
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n"
ADDRESSES = bytes([192, 0, 2, 7, 198, 51, 100, 1]) + (4711).to_bytes(2, "big") + (25).to_bytes(2, "big")
V2 = SIGNATURE + b"\x21\x11\0\x0c" + ADDRESSES
V2_TLV = SIGNATURE + b"\x21\x11\0\x13" + ADDRESSES + b"\x04\0\x04abcd"
LOCAL = SIGNATURE + b"\x20\0\0\0"
XCLIENT = (*EXTENSIONS, b"XCLIENT ADDR PORT")


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    """One behind a load balancer."""
    upstream.extensions = XCLIENT
    return share_willi(server=upstream.server, proxy_protocol_hosts=f"{BALANCER}, 2001:db8::/32")


def connect(willi: Willi, source: str = BALANCER) -> Client:
    return willi.connect(source=source, greeting=False)


def told_of(upstream: ScriptedUpstream) -> bytes:
    """The XCLIENT command of the latest connection."""
    return next(line for line in upstream.connections[-1].commands if line.startswith(b"XCLIENT"))


# In


@pytest.mark.parametrize("header", [V1, V2, V2_TLV], ids=["v1", "v2", "v2 with TLV"])
@pytest.mark.parametrize("way", ["whole", "slowly", "with EHLO"])
def test_the_client_is_who_the_header_names(header: bytes, way: str, willi: Willi, upstream: ScriptedUpstream):
    with connect(willi) as client:
        if way == "slowly":
            client.send_slowly(header)
        else:
            client.send(header + (EHLO + b"\r\n" if way == "with EHLO" else b""))
        assert str(client.read_reply()) == "220 willi.example ESMTP Willi"
        assert (client.read_reply() if way == "with EHLO" else client.command(EHLO)).code == 250
        assert deliver(client) == QUEUED
    assert told_of(upstream) == b"XCLIENT PORT=4711 ADDR=192.0.2.7"
    assert willi.wait_for_log(msg="Message accepted")["client"] == "192.0.2.7:4711"


def test_an_ipv6_client_is_who_the_header_names(willi: Willi, upstream: ScriptedUpstream):
    v6 = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    for header in (
        b"PROXY TCP6 2001:db8::7 2001:DB8:0:0::1 4711 25\r\n",
        SIGNATURE + b"\x21\x21\0\x24" + v6 + v6 + ADDRESSES[8:],
    ):
        with connect(willi) as client:
            client.send(header)
            assert client.read_reply().code == 220
            say(client, EHLO)
            assert deliver(client) == QUEUED
        assert told_of(upstream) == b"XCLIENT PORT=4711 ADDR=IPV6:2001:db8::7"
    assert len(willi.lines(msg="Message accepted", client="[2001:db8::7]:4711")) == 2


@pytest.mark.parametrize("header", [LOCAL, b"PROXY UNKNOWN\r\n"], ids=["LOCAL", "UNKNOWN"])
def test_a_health_check_is_a_session_with_the_real_address(header: bytes, willi: Willi, upstream: ScriptedUpstream):
    with connect(willi) as client:
        client.send(header)
        assert client.read_reply().code == 220
        say(client, EHLO)
        assert deliver(client) == QUEUED
        own_port = client.socket.getsockname()[1]
    assert told_of(upstream) == f"XCLIENT PORT={own_port} ADDR={BALANCER}".encode()


BAD_HEADERS = [
    EHLO + b"\r\n",
    b"\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"PROXY\r\n",
    b"PROXY TCP4 192.0.2.7\r\n",
    b"PROXY TCP4 999.0.2.7 198.51.100.1 4711 25\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25 \r\n",
    b"PROXY TCP4 2001:db8::7 198.51.100.1 4711 25\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 99999\r\n",
    b"PROXY " + b"x" * 200,
    b"proxy TCP4 192.0.2.7 198.51.100.1 4711 25\r\n",
    SIGNATURE + b"\x31\x11\0\x0c" + ADDRESSES,
    SIGNATURE + b"\x2f\x11\0\x0c" + ADDRESSES,
    SIGNATURE + b"\x21\x11\0\x04" + ADDRESSES,
    SIGNATURE + b"\x21\x11\xff\xff" + b"\0" * 3000,
    SIGNATURE + b"\x20\0\xff\xff" + b"\0" * 3000,
]


def test_without_a_right_header_nothing_is_said(willi: Willi, upstream: ScriptedUpstream):
    for header in BAD_HEADERS:
        with connect(willi) as client:
            client.send(header)
            client.finish()
            try:
                assert client.read_to_end() == b"", header
            except ConnectionResetError:  # more was sent than was looked at
                continue
    assert upstream.connections == []
    assert len(willi.lines(msg="Connection dropped", client=BALANCER)) == len(BAD_HEADERS)


def test_a_header_that_does_not_come_is_waited_for_3_seconds(willi: Willi):
    """Also if its octets come one by one, each in good time."""
    began = time.monotonic()
    clients = [connect(willi) for _ in range(4)]
    silent, half, half_binary, slow = clients
    half.send(V1[:-1])
    half_binary.send(V2[:-1])
    slow.socket.settimeout(0.3)
    slow_end = b"not yet"
    for number in range(len(V1)):
        try:
            slow.send(V1[number : number + 1])
            slow_end = slow.socket.recv(100)
            break
        except TimeoutError:
            continue
        except ConnectionError:
            slow_end = b""
            break
    assert slow_end == b""
    for client in (silent, half, half_binary):
        client.expect_eof()
    assert time.monotonic() - began > 2.5
    for client in clients:
        client.close()
    assert len(willi.lines(msg="Connection dropped")) == 4


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_a_header_is_never_guessed_from_anyone_else(header: bytes, willi: Willi, upstream: ScriptedUpstream):
    with connect(willi, source="127.0.0.6") as client:
        port = client.socket.getsockname()[1]
        assert client.read_reply().code == 220, "without waiting for anything"
        client.send(header + EHLO + b"\r\n")
        assert client.read_to_end() == NO_HEADER
    assert willi.wait_for_log(lvl="warn", msg=NOT_EXPECTED)["client"] == f"127.0.0.6:{port}"
    with greeted(willi, source="127.0.0.6") as client:
        assert deliver(client) == QUEUED
    assert b"ADDR=127.0.0.6" in told_of(upstream)


def test_a_header_may_not_come_twice(willi: Willi, upstream: ScriptedUpstream):
    with connect(willi) as client:
        client.send(V1 + V1.replace(b"192.0.2.7", b"203.0.113.1"))
        assert client.read_reply().code == 220
        assert client.read_to_end() == NO_HEADER
    assert upstream.connections == []
    assert willi.wait_for_log(lvl="warn", msg=NOT_EXPECTED)["client"] == "192.0.2.7:4711"


@pytest.mark.parametrize("way", ["by octets", "behind EHLO"])
@pytest.mark.parametrize("header", [V1, V2, LOCAL, b"PROXY UNKNOWN\r\n"], ids=["v1", "v2", "LOCAL", "UNKNOWN"])
def test_a_header_from_a_stranger_ends_the_session_however_it_comes(header: bytes, way: str, willi: Willi):
    with connect(willi, source="127.0.0.6") as client:
        assert client.read_reply().code == 220
        if way == "by octets":
            with suppress(ConnectionError):  # it need not wait for all of them
                client.send_slowly(header)
        else:
            say(client, EHLO)
            client.send(header)
        assert client.read_to_end().endswith(NO_HEADER)
    assert willi.wait_for_log(msg=NOT_EXPECTED)["client"].startswith("127.0.0.6:")


def test_what_the_balancer_may_its_clients_may_not(start_willi: StartWilli, upstream: ScriptedUpstream):
    """XCLIENT is allowed to the address that the header names, not to the one that brings it."""
    willi = start_willi(server=upstream.server, proxy_protocol_hosts=BALANCER, xclient_hosts=[BALANCER, "192.0.2.8"])
    denied = "550 5.7.0 XCLIENT is not allowed from your address"
    for address, expected in (("192.0.2.7", denied), ("192.0.2.8", "220 ")):
        with connect(willi) as client:
            client.send(V1.replace(b"192.0.2.7", address.encode()))
            client.read_reply()
            say(client, EHLO)
            assert str(client.command(b"XCLIENT ADDR=203.0.113.1")).startswith(expected)


def test_health_checks_do_not_count_as_a_client(start_willi: StartWilli, upstream: ScriptedUpstream):
    """However often they come: or a limit meant for strangers would have the balancer take Willi for dead."""
    willi = start_willi(
        server=upstream.server, proxy_protocol_hosts=BALANCER, max_connection_rate=2, max_connections_per_ip=1
    )
    checks = [connect(willi) for _ in range(4)]
    for check in checks:
        check.send(LOCAL)
        assert check.read_reply().code == 220
    for check in checks:
        assert [check.command(line).code for line in (EHLO, b"QUIT")] == [250, 221]
        check.close()


def test_limits_per_address_count_the_client_not_the_balancer(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, proxy_protocol_hosts=BALANCER, max_connections_per_ip=1)
    with connect(willi) as one, connect(willi) as two, connect(willi) as other:
        for client in (one, two):
            client.send(V1)
        other.send(V1.replace(b"192.0.2.7", b"192.0.2.8"))
        assert sorted((one.read_reply().code, two.read_reply().code)) == [220, 421]
        assert other.read_reply().code == 220


# Out


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_upstream_is_told_by_a_header_who_the_client_is(
    version: str, start_willi: StartWilli, start_upstream: StartUpstream
):
    upstream = start_upstream(proxy=True)
    willi = start_willi(server=upstream.server, send_proxy=version)
    with greeted(willi) as client:
        assert deliver(client) == deliver(client) == QUEUED
        own_port = client.socket.getsockname()[1]
    ports = own_port.to_bytes(2, "big") + willi.port.to_bytes(2, "big")
    expected = {
        "v1": f"PROXY TCP4 127.0.0.1 127.0.0.1 {own_port} {willi.port}\r\n".encode(),
        "v2": SIGNATURE + b"\x21\x11\0\x0c" + bytes([127, 0, 0, 1]) * 2 + ports,
    }
    [connection] = upstream.connections
    assert connection.proxy_header == expected[version]
    assert connection.commands[:2] == [EHLO, MAIL], "the client's own name: the upstream knows him"


def test_an_ipv6_client_has_an_ipv6_header(start_willi: StartWilli, start_upstream: StartUpstream):
    upstream, port = start_upstream(proxy=True), free_port()
    start_willi(server=upstream.server, send_proxy="v1", listen=f"[::1]:{port}", probe=False)
    with Client(port, host="::1") as client:
        client.read_reply()
        say(client, EHLO)
        assert deliver(client) == QUEUED
        own_port = client.socket.getsockname()[1]
    assert upstream.connection().proxy_header == f"PROXY TCP6 ::1 ::1 {own_port} {port}\r\n".encode()


def test_a_header_passes_through(start_willi: StartWilli, start_upstream: StartUpstream):
    upstream = start_upstream(proxy=True)
    willi = start_willi(server=upstream.server, send_proxy="v1", proxy_protocol_hosts=BALANCER)
    with connect(willi) as client:
        client.send(V2)
        client.read_reply()
        say(client, EHLO)
        assert deliver(client) == QUEUED
    assert upstream.connection().proxy_header == V1


def test_the_header_is_not_encrypted(start_willi: StartWilli, certificates: Authority, start_upstream: StartUpstream):
    upstream = start_upstream(proxy=True, tls=certificates.issue("mx.example").server_context())
    willi = start_willi(server=upstream.server, send_proxy="v1", upstream_tls="require")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert upstream.connection().proxy_header.startswith(b"PROXY TCP4 127.0.0.1 ")
    assert upstream.connection().tls


def test_a_mapping_may_have_a_header_of_its_own(
    start_willi: StartWilli, upstream: ScriptedUpstream, start_upstream: StartUpstream
):
    proxied = start_upstream(proxy=True)
    csv = f"pattern;server;tls_verify\nc.example;{upstream.server};false\n"
    one = {"type": "static", "server": proxied.server, "tls_verify": False, "send_proxy": "v2"}
    willi = start_willi(csv=csv, mappings={"one": one})
    with greeted(willi) as client:
        assert deliver(client) == deliver(client, b"RCPT TO:<carl@c.example>") == QUEUED
    assert proxied.connection().proxy_header.startswith(SIGNATURE)
    assert upstream.connection().reads[0] == b"EHLO willi.example\r\n"


VERDICTS = ["554 5.7.1 192.0.2.7 is blocked", "450 4.7.1 no good name", "421 4.7.0 too many from 192.0.2.7"]


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("step", [GREETING, b"EHLO"], ids=["greeting", "EHLO"])
@pytest.mark.parametrize("verb", [b"EHLO", b"HELO"], ids=bytes.decode)
def test_what_an_upstream_says_of_a_client_that_it_knows_is_its_verdict(
    verb: bytes, step: bytes, verdict: str, two_hosts: TwoHosts
):
    """The client hears it, from one host, which is not down for that: the next client goes there, too."""
    willi, first, second, bob = two_hosts(proxy=True, send_proxy="v1")
    first.answers[step] = [reply(verdict)]
    first.answers[b"HELO"] = [reply(verdict)]
    with greeted(willi, verb + b" c.example") as client:
        assert say(client, MAIL, bob) == [SENDER_KEPT, verdict]
    first.answers.clear()
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert (len(first.messages), second.connections) == (1, [])


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        (b"PROXY", "502 5.5.2 Error: command not recognized"),  # comes in place of that to EHLO
        (b"EHLO", "500 5.5.2 Error: bad syntax"),
        (GREETING, "554 SMTP synchronization error"),
        (GREETING, "550 5.5.1 Protocol error"),
    ],
)
@pytest.mark.parametrize("verb", [b"EHLO", b"HELO"], ids=bytes.decode)
def test_an_upstream_that_expects_no_header_bounces_no_mail(
    verb: bytes, step: bytes, answer: str, share_willi: StartWilli, start_upstream: StartUpstream
):
    upstream = start_upstream(proxy=step != b"PROXY")
    upstream.answers[step] = reply(answer)
    willi = share_willi(server=upstream.server, send_proxy="v1", connect_timeout="2s")
    willi.tolerate("Upstream failed")
    with greeted(willi, verb + b" c.example") as client:
        answers = say(client, MAIL, BOB, b"DATA")
    assert [line[:3] for line in answers] == ["250", "451", "451"]
    assert not any(line.startswith(b"MAIL") for line in upstream.commands)


@pytest.mark.parametrize(
    ("verdict", "heard"),
    [("554 5.7.1 192.0.2.7 is blocked", "554 5.7.1 192.0.2.7 is blocked"), ("502 5.5.1 what?", OK)],
    ids=["of the client", "EHLO is not known"],
)
def test_a_refusal_of_ehlo_after_which_the_upstream_hangs_up_is_its_verdict_unless_it_does_not_know_ehlo(
    verdict: str, heard: str, two_hosts: TwoHosts
):
    willi, first, _, bob = two_hosts(proxy=True, send_proxy="v1")
    first.answers[b"EHLO"] = [reply(verdict)]
    first.answers[b"HELO"] = Close()
    with greeted(willi) as client:
        assert say(client, MAIL, bob) == [SENDER_KEPT, heard]
