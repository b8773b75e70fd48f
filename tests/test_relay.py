"""relay.py with a real client connection; the upstream is a stand-in that keeps what it is given."""

from __future__ import annotations

import socket
from _socket import socket as RawSocket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import monotonic

import gevent
import pytest
from gevent.event import Event

from tests.support.loopback import PATIENCE
from willi_lib.config import Settings
from willi_lib.net.deadline import Deadline, TimeLimit, WireError
from willi_lib.net.wire import Wire
from willi_lib.proxy import relay as module
from willi_lib.proxy.relay import Content, Relay
from willi_lib.proxy.upstream import Upstream, UpstreamFailed
from willi_lib.routing.route import Server
from willi_lib.smtp.reply import Reply

OK = Reply(250, (b"2.0.0 ok",))
SETTINGS = Settings(path="willi.conf", mappings=(), read_timeout=PATIENCE, upstream_timeout=PATIENCE, data_timeout=0.2)


class Stub:
    """Answers 250; `hang` is what it does first."""

    def __init__(self, features: dict[str, str], hang: Callable[[], object] = lambda: None) -> None:
        self.features = features
        self.server = Server("mx.example")
        self.hang = hang
        self.finished = 0

    def begin_data(self) -> Reply:
        self.hang()
        return Reply(354, (b"go on",))

    def send(self, octets: bytes) -> None: ...

    def finish(self, _octets: bytes) -> Reply:
        self.finished += 1
        try:
            self.hang()
        except WireError as error:
            raise UpstreamFailed(str(error)) from None
        return OK

    finish_chunk = finish

    def drop(self) -> None: ...


@pytest.fixture
def client() -> Iterator[tuple[Wire, socket.socket]]:
    """Our end and the client's."""
    ours, peer = socket.socketpair()
    raw = RawSocket(fileno=ours.detach())
    raw.setblocking(False)
    with ExitStack() as ends:
        wire = Wire(raw, Deadline())
        ends.callback(wire.deadline.close)
        ends.callback(wire.close)
        ends.callback(peer.close)
        yield wire, peer


def relay(wire: Wire, upstream: Stub, settings: Settings = SETTINGS) -> Relay:
    return Relay(settings, wire, upstream)  # type: ignore[arg-type]


def over_and_over(peer: socket.socket, octets: bytes) -> gevent.Greenlet[..., None]:
    def send() -> None:
        while True:
            peer.sendall(octets)
            gevent.sleep(0.01)

    return gevent.spawn(send)


def test_a_client_that_sends_little_over_a_long_time_is_too_slow(client, monkeypatch):
    """Each line end renews read_timeout, which alone would never end it."""
    monkeypatch.setattr(module, "PACE_TIME", 0.5)
    monkeypatch.setattr(module, "SLOWEST", 1_000_000)
    wire, peer = client
    dripping = over_and_over(peer, b"\n")
    content = Content(SETTINGS, wire)
    with pytest.raises(TimeLimit, match="read_timeout"), wire.deadline.limit(PATIENCE, "the test"):
        while True:
            content.read()
    dripping.kill()


def test_a_client_at_the_least_pace_is_not_too_slow(client):
    wire, _ = client
    content = Content(SETTINGS, wire)
    for _ in range(10):
        content.keep_pace(module.PACE_TIME / 2, module.SLOWEST * int(module.PACE_TIME) // 2)
        content.keep_pace(module.PACE_TIME / 2, module.SLOWEST * int(module.PACE_TIME) // 2)
    content.keep_pace(module.PACE_TIME / 2, 0)
    with pytest.raises(TimeLimit):
        content.keep_pace(module.PACE_TIME / 2, module.SLOWEST * int(module.PACE_TIME) - 1)


def test_the_time_between_chunks_is_the_clients(client, monkeypatch):
    wire, peer = client
    slow = relay(wire, Stub({"CHUNKING": ""}))
    peer.sendall(b"xx")
    assert slow.chunk(1, last=False) == OK
    monkeypatch.setattr(module, "monotonic", lambda: monotonic() + module.PACE_TIME)
    with pytest.raises(TimeLimit):
        slow.chunk(1, last=False)


@pytest.mark.parametrize("chunking", [True, False], ids=["BDAT", "BDAT to DATA"])
def test_data_timeout_ends_a_message_that_the_upstream_never_takes(chunking, client):
    """However it is stuck, sending or at the verdict."""
    wire, peer = client
    stuck = Stub({"CHUNKING": ""} if chunking else {})
    message = relay(wire, stuck)
    peer.sendall(b"helloworld")
    assert message.chunk(5, last=False).code == 250
    stuck.hang = Event().wait
    with wire.deadline.limit(PATIENCE, "the test"), pytest.raises(UpstreamFailed, match="data_timeout"):
        message.chunk(5, last=True)
    assert stuck.finished == 1 + chunking


def test_the_end_of_a_message_that_comes_too_late_is_not_sent(client):
    """The client has waited for data_timeout already while the upstream took its time with DATA."""
    wire, peer = client
    slow = Stub({}, hang=lambda: gevent.sleep(2 * SETTINGS.data_timeout))
    message = relay(wire, slow)
    peer.sendall(b"BDAT 5 LAST\r\nhello")
    assert wire.read_line() == b"BDAT 5 LAST"
    with pytest.raises(UpstreamFailed, match="too slow"):
        message.chunk(5, last=True)
    assert slow.finished == 0


def test_data_timeout_begins_with_the_last_octet_of_the_client(client):
    wire, peer = client
    stuck = Stub({}, hang=Event().wait)
    message = relay(wire, stuck)
    peer.sendall(b"hello\r\n.\r\n")
    began = monotonic()
    with wire.deadline.limit(PATIENCE, "the test"), pytest.raises(UpstreamFailed, match="data_timeout"):
        message.data()
    assert monotonic() - began >= SETTINGS.data_timeout


def test_the_upstream_is_a_real_one_as_far_as_the_relay_knows():
    """The stand-in has the methods that relay.py uses, under their names."""
    for name in ("begin_data", "send", "finish", "finish_chunk", "drop"):
        assert callable(getattr(Upstream, name))
        assert callable(getattr(Stub, name))
