"""session.py where the dialogue alone does not show it: the looks at a client that may have hung up."""

from __future__ import annotations

import socket
from _socket import socket as RawSocket
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic

import pytest

from willi_lib.config import Settings
from willi_lib.net.deadline import Deadline
from willi_lib.net.resolver import Resolver
from willi_lib.net.wire import Wire
from willi_lib.proxy import session as session_module
from willi_lib.proxy.connector import Connector
from willi_lib.proxy.context import SessionContext
from willi_lib.proxy.session import LOOKS, ClientGone, Session
from willi_lib.proxy.transaction import Transaction
from willi_lib.proxy.upstream import Client, Upstream
from willi_lib.routing.route import Route, Server
from willi_lib.smtp.reply import Reply
from willi_lib.smtp.syntax import Mail, Path
from willi_lib.status.counts import Counts

DATA = (b"DATA", b"", None)


@pytest.fixture
def asking() -> Iterator[Session]:
    """A session that waits for its upstream, and whose client has closed its side."""
    ours, peer = socket.socketpair()
    raw = RawSocket(fileno=ours.detach())
    raw.setblocking(False)
    settings, resolver, counts = Settings(path="willi.conf", mappings=()), Resolver(1.0), Counts()
    context = SessionContext(settings, [], Connector(settings, {}, resolver, counts), resolver, None, counts)
    with ExitStack() as ends:
        wire = Wire(raw, Deadline())
        ends.callback(wire.close)
        session = Session("SID", context, wire, Client("192.0.2.1", 25, own=lambda: ("192.0.2.2", 25)))
        session.asking = True
        peer.close()
        yield session


def test_a_client_that_has_closed_its_side_is_counted_look_by_look(asking: Session):
    for look in range(1, LOOKS):
        asking.look_at_client()
        assert asking.looks_gone == look


def test_a_client_whose_group_is_not_answered_yet_has_not_hung_up(asking: Session):
    """The commands were read together with the first one, and are no longer in the buffer."""
    asking.commands.group.append(DATA)
    for _ in range(LOOKS):
        asking.look_at_client()
    assert asking.looks_gone == 0


@pytest.mark.parametrize("seconds", [59.0, 61.0])
def test_an_upstream_that_outlasts_the_patience_of_a_client_has_failed(
    seconds: float, asking: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Else it would be the first for all clients that wait for less than upstream_timeout, and the log had no word."""
    server = Server("mx.example")
    asking.transaction = Transaction(Mail(Path("", None)), deque())
    asking.upstreams.open = Upstream(asking.wire, server, Route((server,)), "192.0.2.1")
    now = monotonic()
    monkeypatch.setattr(session_module, "monotonic", lambda: now)

    def wait() -> Reply:
        nonlocal now
        now += seconds
        raise ClientGone

    with pytest.raises(ClientGone):
        asking.ask(wait)
    log = capfd.readouterr().out
    assert ("mx.example:25: no answer for 61 s, and the client has hung up" in log) == (seconds > 60)
    assert asking.context.connector._is_down("mx.example", 25) == (seconds > 60)
