"""STARTTLS with clients: certificates by SNI, and nothing survives from before the handshake."""

from __future__ import annotations

import os
import signal
import ssl

import pytest

from tests.conftest import StartWilli
from tests.support.certificates import Authority, Pair
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import wait_until
from tests.support.talk import BOB, EHLO, MAIL, OK, QUEUED, SENDER_KEPT, deliver, greeted, say
from tests.support.upstream import Ended, ScriptedUpstream

NO_EHLO = "503 5.5.1 Send EHLO first"
READY = "220 2.0.0 Ready to start TLS"


@pytest.fixture
def pairs(certificates: Authority) -> list[Pair]:
    return [certificates.issue(*names) for names in (("mx.example",), ("mx.other.example", "*.wild.example"))]


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream, pairs: list[Pair]) -> Willi:
    return share_willi(
        server=upstream.server, tls_cert=[str(pair.cert) for pair in pairs], tls_key=[str(pair.key) for pair in pairs]
    )


def test_starttls_is_listed_where_it_is_not_the_last_line(willi: Willi):
    """Probes and simple clients look for "250-STARTTLS"."""
    with greeted(willi) as client:
        assert b"STARTTLS" in client.command(EHLO).lines[:-1]


def names_shown(client: Client) -> set[str]:
    """The names in the certificate that Willi has shown."""
    assert isinstance(client.socket, ssl.SSLSocket)
    certificate = client.socket.getpeercert()
    assert certificate
    return {str(entry[1]) for entry in certificate["subjectAltName"]}


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("mx.example", {"mx.example"}),
        ("MX.Example", {"mx.example"}),
        ("mx.other.example", {"mx.other.example", "*.wild.example"}),
        ("any.wild.example", {"mx.other.example", "*.wild.example"}),
        ("wild.example", {"mx.example"}),
        ("a.b.wild.example", {"mx.example"}),
        ("unknown.example", {"mx.example"}),
        (None, {"mx.example"}),
    ],
)
def test_the_name_that_the_client_asks_for_chooses_the_certificate(
    asked: str | None, shown: set[str], willi: Willi, certificates: Authority
):
    context = certificates.client_context()
    context.check_hostname = False
    with greeted(willi) as client:
        assert str(client.command(b"STARTTLS")) == READY
        client.socket = context.wrap_socket(client.socket, server_hostname=asked)
        assert names_shown(client) == shown


def test_a_client_that_verifies_is_content(willi: Willi, certificates: Authority, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert client.starttls(certificates.client_context(), "mx.other.example").code == 220
        say(client, EHLO)
        assert deliver(client) == QUEUED
    assert willi.wait_for_log(msg="Message accepted")["client_tls"] == "true"
    assert len(upstream.messages) == 1


def test_after_the_handshake_the_session_begins_anew(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        client.starttls()
        assert upstream.connection().wait_for_end() is Ended.QUIT, "it knows a client without TLS"
        assert say(client, MAIL, b"STARTTLS", BOB) == [NO_EHLO] * 3
        assert b"STARTTLS" not in client.command(EHLO).lines
        assert say(client, b"STARTTLS", MAIL) == ["503 5.5.1 TLS is already active", SENDER_KEPT]


@pytest.mark.parametrize(
    "injected",
    [MAIL + b"\r\n" + BOB + b"\r\n", EHLO + b"\r\n" + MAIL + b"\r\n", b"MAIL FROM:<ann", b"\r\n", b"x" * 5000],
    ids=lambda octets: repr(octets[:12]),
)
def test_clear_text_sent_along_with_starttls_is_dropped(injected: bytes, willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        client.send(b"STARTTLS\r\n" + injected)
        assert str(client.read_reply()) == READY
        client.handshake()
        assert say(client, b"NOOP", BOB) == ["250 2.0.0 Ok", NO_EHLO]
        say(client, EHLO)
        assert say(client, BOB) == ["503 5.5.1 Need MAIL command"]
    assert willi.wait_for_log(msg="Clear text after STARTTLS dropped", lvl="warn")
    assert upstream.connections == []


def test_starttls_has_no_parameters(willi: Willi):
    with greeted(willi) as client:
        assert say(client, b"STARTTLS now", MAIL) == ["501 5.5.4 No parameters allowed", SENDER_KEPT]


def test_without_a_certificate_there_is_no_starttls(start_willi: StartWilli, upstream: ScriptedUpstream):
    with start_willi(server=upstream.server).connect() as client:
        assert b"STARTTLS" not in client.command(EHLO).lines
        assert say(client, b"STARTTLS") == ["502 5.5.1 Command not implemented"]


@pytest.mark.parametrize("octets", [b"EHLO c.example\r\n", b"\x16\x03\x01\x00\x05hello", b""], ids=repr)
def test_a_failed_handshake_ends_the_connection_only(octets: bytes, willi: Willi):
    with greeted(willi) as client:
        assert say(client, b"STARTTLS") == [READY]
        client.send(octets)
        client.finish()
        rest = client.read_to_end()
        assert rest == b"" or rest.startswith(b"\x15\x03"), "a TLS alert or nothing"
    willi.probe()


def test_an_old_version_is_refused(start_willi: StartWilli, upstream: ScriptedUpstream, pairs: list[Pair]):
    pair = pairs[0]
    willi = start_willi(server=upstream.server, tls_cert=str(pair.cert), tls_key=str(pair.key), tls_min_version="1.3")
    for version, works in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = version
        with greeted(willi) as client:
            if works:
                client.starttls(context)
                assert client.command(EHLO).code == 250
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    client.starttls(context)


def test_a_client_that_hangs_up_without_close_notify_has_lost_nothing(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        client.starttls()
        say(client, EHLO)
        assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        assert deliver_on(client) == QUEUED
    upstream.wait_for_ends()
    assert len(upstream.messages) == 1


def deliver_on(client: Client) -> str:
    assert client.command(b"DATA").code == 354
    client.send(b"x" * 300_000 + b"\r\n.\r\n")  # more than one TLS record
    return str(client.read_reply())


# Sessions that are resumed


def shake(willi: Willi, session: ssl.SSLSession | None = None) -> tuple[ssl.SSLSession, bool]:
    """A handshake of TLS 1.2, where the ticket comes with it: the session, and whether it was resumed."""
    context = resuming
    with greeted(willi) as client:
        assert str(client.command(b"STARTTLS")) == READY
        client.socket = context.wrap_socket(client.socket, server_hostname="mx.example", session=session)
        assert client.socket.session
        return client.socket.session, bool(client.socket.session_reused)


def _resuming() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


resuming = _resuming()  # a session belongs to its context


def test_a_session_is_resumed_by_any_worker_and_after_a_reload(
    start_willi: StartWilli, upstream: ScriptedUpstream, pairs: list[Pair]
):
    willi = start_willi(server=upstream.server, workers=1, tls_cert=str(pairs[0].cert), tls_key=str(pairs[0].key))
    session, resumed = shake(willi)
    assert not resumed
    willi.reload()
    assert shake(willi, session)[1]
    willi.tolerate("Worker ended by itself")
    wait_until(lambda: len(willi.workers) == 1, "the end of the old worker")
    os.kill(willi.workers[0], signal.SIGKILL)
    willi.wait_for_log(msg="Worker replaced")
    assert shake(willi, session)[1]
    willi.reload({"tls_cert": str(pairs[1].cert), "tls_key": str(pairs[1].key)})
    assert not shake(willi, session)[1]
