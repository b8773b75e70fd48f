"""connector.py where it takes a fault of this machine to show it."""

from __future__ import annotations

from time import monotonic

import pytest

from willi_lib.config import Settings
from willi_lib.net import resolver as resolver_module
from willi_lib.net.deadline import Deadline
from willi_lib.net.resolver import Address, DnsFailed, Resolver
from willi_lib.proxy.connector import Connector
from willi_lib.proxy.upstream import Client, MailLoop, OurFault, UpstreamFailed
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
    connector = Connector(Settings(path="willi.conf", mappings=()), Failing(own_lack), Counts())
    with pytest.raises(UpstreamFailed, match="mx\\.example:25: no address for mx\\.example") as failure:
        connector._addresses(Server("mx.example", 25), Deadline())
    assert isinstance(failure.value, OurFault) == own_lack


def test_an_mx_host_that_was_ourselves_is_asked_again_after_a_minute(monkeypatch: pytest.MonkeyPatch):
    """A host that moves, or a name that is put right, must not have good mail bounced for an hour."""
    connector = Connector(Settings(path="willi.conf", mappings=()), Resolver(1.0), Counts())
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
