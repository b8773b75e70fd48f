"""An upstream that says more than it was asked, at a moment when nobody would look: never is it taken for an answer."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.conftest import StartWilli
from tests.support.certificates import Pair
from tests.support.dns import DnsServer, Fault
from tests.support.loopback import wait_until
from tests.support.promise import greeted
from tests.support.raw import Peer, RawUpstream
from tests.support.talk import BOB, MAIL, NO_ANSWER, QUEUED, SENDER_KEPT, deliver, say
from tests.support.upstream import ScriptedUpstream

FEATURES = b"250-raw.example\r\n250-CHUNKING\r\n250 PIPELINING\r\n"


@pytest.fixture
def beside() -> Iterator[Callable[..., Future[None]]]:
    """Run the upstream's side of the dialogue; its end, or what went wrong in it, is its result."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


class TlsPeer:
    """The upstream's side of TLS 1.2, where each octet is sent when the test wants it."""

    def __init__(self, peer: Peer, pair: Pair) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.cert, pair.key)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        self.socket = peer.socket
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._read = b""

    def shake_hands(self, early: bytes = b"") -> None:
        """early: said in the same segment as the last octets of the handshake."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._in.write(self.socket.recv(65536))
        self.say(early)

    def say(self, octets: bytes) -> None:
        if octets:
            self._tls.write(octets)
        self._flush()

    def read_line(self) -> bytes:
        """b"": the connection has ended."""
        while b"\r\n" not in self._read:
            try:
                self._read += self._tls.read(65536)
            except ssl.SSLWantReadError:
                octets = self.socket.recv(65536)
                if not octets:
                    return b""
                self._in.write(octets)
            except ssl.SSLError:  # close_notify
                return b""
        line, _, self._read = self._read.partition(b"\r\n")
        return line

    def _flush(self) -> None:
        if self._out.pending:
            self.socket.sendall(self._out.read())


@pytest.mark.parametrize("early", [b"250 early\r\n", FEATURES, b"2"], ids=["250", "EHLO reply", "half a line"])
def test_words_that_came_with_the_handshake_are_no_answer_to_ehlo(
    early: bytes, share_willi: StartWilli, raw: RawUpstream, postfix_certificate: Pair, beside
):
    """With them every answer would have been taken for the one before it: 250 for a recipient that was refused."""
    willi = share_willi(server=raw.server, upstream_tls="always")
    willi.tolerate("Upstream failed")

    def serve() -> None:
        peer = raw.accept()
        peer.introduce(b"STARTTLS", b"PIPELINING")
        peer.answer(b"STARTTLS", b"220 go on\r\n")
        tls = TlsPeer(peer, postfix_certificate)
        tls.shake_hands(early)
        for answer in (FEATURES, b"250 sender ok\r\n", b"550 5.1.1 no such user\r\n"):
            if not tls.read_line():
                return
            tls.say(answer)

    done = beside(serve)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    done.result(60)


def test_a_host_that_says_goodbye_while_the_dns_is_asked_is_followed_by_the_next(
    start_willi: StartWilli, raw: RawUpstream, upstream: ScriptedUpstream, dns: DnsServer, beside
):
    """XCLIENT waits for the client's name; a restart in that time is no verdict on the client."""
    dns.zone["1.0.0.127.in-addr.arpa"] = Fault.SILENCE
    willi = start_willi(server=f"{raw.server}, {upstream.server}", dns=dns, dns_timeout="2s")

    def serve() -> None:
        peer = raw.accept()
        peer.introduce(b"XCLIENT NAME ADDR PORT")
        wait_until(lambda: dns.queries, "the question for the client's name")
        peer.socket.sendall(b"421 4.3.2 restarting\r\n")
        peer.socket.close()

    done = beside(serve)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    done.result(60)
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("octets", [b"25", b"\0", b"250 fake\r\n", b"421 bye\r\n"])
def test_a_kept_connection_with_words_on_it_is_replaced_without_delay(
    octets: bytes, share_willi: StartWilli, raw: RawUpstream, beside
):
    willi = share_willi(server=raw.server, upstream_timeout="10m")
    said = threading.Event()

    def serve() -> None:
        peer = raw.accept()
        take_message(peer)
        peer.socket.sendall(octets)
        said.set()
        take_message(raw.accept())

    done = beside(serve)
    with greeted(willi) as client:
        assert deliver(client).startswith("250 ")
        assert said.wait(60)
        assert deliver(client).startswith("250 ")
    done.result(60)


def take_message(peer: Peer) -> None:
    peer.take_envelope()
    peer.answer(b"DATA", b"354 go on\r\n")
    peer.read_for(b"\r\n.\r\n")
    peer.socket.sendall(b"250 2.0.0 ok\r\n")


def test_a_kept_connection_on_which_tls_broke_is_replaced_without_delay(
    start_willi: StartWilli, raw: RawUpstream, postfix_certificate: Pair, beside
):
    """OpenSSL tells a bad record once only; whoever then waits for more waits for ever."""
    willi = start_willi(server=raw.server, upstream_timeout="10m", upstream_tls="always")
    said = threading.Event()

    def take(peer: Peer) -> TlsPeer:
        peer.introduce(b"STARTTLS")
        peer.answer(b"STARTTLS", b"220 go on\r\n")
        tls = TlsPeer(peer, postfix_certificate)
        tls.shake_hands()
        for answer in (b"250 raw.example\r\n", b"250 ok\r\n", b"250 ok\r\n", b"354 go on\r\n"):
            assert tls.read_line()
            tls.say(answer)
        while tls.read_line() != b".":
            continue
        tls.say(b"250 2.0.0 ok\r\n")
        return tls

    def serve() -> None:
        take(raw.accept()).socket.sendall(b"\x17\x03\x03\x00\x20" + b"no record of this connection....")
        said.set()
        take(raw.accept())

    done = beside(serve)
    with greeted(willi) as client:
        assert deliver(client).startswith("250 ")
        assert said.wait(60)
        assert deliver(client).startswith("250 ")
    done.result(60)


def test_an_upstream_that_greets_twice_is_given_up(start_willi: StartWilli, raw: RawUpstream, beside):
    """The second 220 was taken for the answer to EHLO, and then each answer for the one before it."""
    willi = start_willi(server=raw.server)
    willi.tolerate("Upstream failed")

    def serve() -> None:
        peer = raw.accept()
        peer.socket.sendall(b"220 one\r\n")
        peer.read_for(b"\r\n")
        peer.socket.sendall(b"220 two\r\n")
        peer.read_until_dropped()

    done = beside(serve)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    done.result(60)
