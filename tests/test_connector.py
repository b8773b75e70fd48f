"""connector.py where it takes a fault of this machine to show it."""

from __future__ import annotations

import socket
from _socket import socket as RawSocket
from time import monotonic

import pytest

from willi_lib.config import Settings
from willi_lib.net import resolver as resolver_module
from willi_lib.net.deadline import Deadline
from willi_lib.net.resolver import Address, DnsFailed, Resolver
from willi_lib.net.wire import Wire
from willi_lib.proxy import connector as connector_module
from willi_lib.proxy.connector import Connector
from willi_lib.proxy.upstream import Client, MailLoop, OurFault, Upstream, UpstreamFailed
from willi_lib.routing.route import Route, Server
from willi_lib.status.counts import Counts


class Failing(Resolver):
    """Finds no address, either because we have no descriptor or because there is none."""

    def __init__(self, own_lack: bool) -> None:
        super().__init__(1.0)
        self._own_lack = own_lack

    def addresses_of(self, host: str) -> list[Address]:
        raise DnsFailed(f"no address for {host}", self._own_lack)


@pytest.mark.parametrize("own_lack", [False, True])
def test_a_host_is_to_blame_for_a_name_without_address_unless_we_could_not_ask(own_lack):
    """A descriptor may be free again when the failure is looked at."""
    connector = Connector(Settings(path="willi.conf", mappings=()), {}, Failing(own_lack), Counts())
    with pytest.raises(UpstreamFailed, match="mx\\.example:25: no address for mx\\.example") as failure:
        connector._addresses(Server("mx.example", 25), Deadline())
    assert isinstance(failure.value, OurFault) == own_lack


def test_an_mx_host_that_was_ourselves_is_asked_again_after_a_minute(monkeypatch: pytest.MonkeyPatch):
    """A host that moves, or a name that is put right, must not have good mail bounced for an hour."""
    connector = Connector(Settings(path="willi.conf", mappings=()), {}, Resolver(1.0), Counts())
    loops = [MailLoop(Server("mx.example"), is_ours=True)]

    def connect(*_: object) -> None:
        if loops:
            raise loops.pop()

    monkeypatch.setattr(connector, "_connect", connect)
    client = Client("192.0.2.1", 1024, own=lambda: ("192.0.2.2", 25))
    connector.connect(Route((Server("b.example", mx=True),)), client, Deadline(), "SID")
    assert connector._is_ourselves("mx.example")
    now = monotonic()
    monkeypatch.setattr(resolver_module, "monotonic", lambda: now + 61)
    assert not connector._is_ourselves("mx.example")


def test_one_client_tries_for_all_whether_a_host_that_hung_is_back(monkeypatch: pytest.MonkeyPatch):
    """It greets, and only after minutes a client knows that it still hangs. All others would have gone there, too."""
    connector = Connector(Settings(path="willi.conf", mappings=()), {}, Resolver(1.0), Counts())
    host, other = Server("mx1.example"), Server("mx2.example")
    ours, peer = socket.socketpair()
    upstream = Upstream(Wire(RawSocket(fileno=ours.detach()), Deadline()), host, Route((host, other)), "192.0.2.1")
    now = monotonic()

    def first_after(seconds: float) -> Server:
        nonlocal now
        now += seconds
        return connector._by_state(iter((host, other)))[0]

    monkeypatch.setattr(connector_module, "monotonic", lambda: now)
    connector.note_failure(upstream)
    assert first_after(59) == other
    assert first_after(2) == host
    for _ in range(2):
        connector._note_open(upstream)
        assert first_after(59) == other
        assert first_after(2) == host
    connector._note_open(upstream)
    connector.note_accepted(upstream)
    assert first_after(61) == host
    connector._note_open(upstream)
    assert first_after(0) == host
    upstream.wire.received_at = now
    connector.note_failure(upstream)
    assert first_after(61) == host
    connector._note_open(upstream)
    assert first_after(0) == host, "one that hangs up is known to do so at once"
    upstream.drop()
    peer.close()
