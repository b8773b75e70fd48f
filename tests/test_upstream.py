"""upstream.py where it takes a moment between two system calls to show it."""

from __future__ import annotations

import socket
from _socket import socket as RawSocket

import pytest

from willi_lib.net.deadline import Deadline
from willi_lib.net.wire import Wire
from willi_lib.proxy.upstream import Upstream, UpstreamFailed
from willi_lib.routing.route import Route, Server


def test_a_goodbye_that_comes_while_rset_is_said_is_no_verdict(monkeypatch: pytest.MonkeyPatch):
    """It was idle since the last message, and the next one goes over a new connection."""
    ours, peer = socket.socketpair()
    wire = Wire(RawSocket(fileno=ours.detach()), Deadline())
    wire._socket.setblocking(False)
    upstream = Upstream(wire, Server("mx.example"), Route((Server("mx.example"),)), "192.0.2.1")
    upstream.introduced = upstream.in_transaction = True
    peer.sendall(b"421 4.4.2 idle for too long\r\n")
    looks, pending = iter([False]), Wire.pending  # the first look is too early
    monkeypatch.setattr(Wire, "pending", lambda self: next(looks, None) is None and pending(self))
    with pytest.raises(UpstreamFailed):
        upstream.reset()
    upstream.drop()
    peer.close()
