"""The site of docs/scaling.md: Willis behind load balancers, each on a host of its own, with its addresses."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from configobj import ConfigObj

from tests.support.client import Client
from tests.support.daemon import Setting, Willi
from tests.support.dns import DnsServer
from tests.support.haproxy import HAProxy, Keepalived
from tests.support.loopback import PATIENCE, ROOT, wait_until
from tests.support.network import Host, Network
from tests.support.talk import EHLO
from tests.support.traffic import Traffic
from tests.support.upstream import EXTENSIONS, ScriptedUpstream

PAGE = ROOT / "docs" / "scaling.md"
FLOATING = ("192.0.2.25", "2001:db8::25")
BALANCERS = {"lb1": ("192.0.2.11/24", "2001:db8::11/64"), "lb2": ("192.0.2.12/24", "2001:db8::12/64")}
WILLIS = {"willi1": "192.0.2.21/24", "willi2": "192.0.2.22/24"}
UPSTREAM = "192.0.2.31"
CLIENTS = {"mail.client.example": "198.51.100.7/24", "mail6.client.example": "2001:db8:7::7/64"}
SENDERS = 6
FAILOVER = PATIENCE  # seconds in which the floating address must have moved; two to five are usual
UP_AGAIN = PATIENCE  # seconds in which HAProxy must have noticed that a Willi is back: two good checks


class Balancer:
    """A host with HAProxy and keepalived."""

    def __init__(self, host: Host, directory: Path) -> None:
        """Nothing is started yet."""
        self.host = host
        self.haproxy = HAProxy(host, directory / "haproxy.log")
        self.keepalived = Keepalived(host, directory / "keepalived.log")

    @property
    def has_address(self) -> bool:
        return all(map(self.host.has_address, FLOATING))


class Site:
    """Nothing of it is on the network of the machine."""

    def __init__(self, directory: Path, ends: ExitStack, willi: dict[str, Setting]) -> None:
        """ends: stops everything; willi: settings of both Willis in addition to those of the page."""
        self._directory = directory
        self._ends = ends
        self.network = Network(directory)
        ends.callback(self.network.stop)
        self._client_host = self.network.host(*CLIENTS.values())
        self._client_host.route("192.0.2.0/24")
        self._client_host.route("2001:db8::/64")
        with self.network.host(f"{UPSTREAM}/24").inside():
            self.upstream = ScriptedUpstream(25, host=UPSTREAM)
        ends.callback(self.upstream.stop)
        self.upstream.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR")
        self.hosts: dict[str, Host] = {}  # of the Willis
        settings = {**settings_of_the_page(), **willi, "mappings": {"all": _static(UPSTREAM)}}
        self.willis = {name: self._start_willi(name, settings) for name in WILLIS}
        self.balancers = [self._start_balancer(name) for name in BALANCERS]

    def _start_willi(self, name: str, settings: dict[str, Setting]) -> Willi:
        host = self.hosts[name] = self.network.host(WILLIS[name])
        directory = self._subdirectory(name)
        with host.inside():
            dns = DnsServer(directory)
        self._ends.callback(dns.stop)
        for client, address in CLIENTS.items():
            dns.host(client, address.partition("/")[0])
        willi = Willi(directory, settings, host.prefix)
        self._ends.callback(willi.end)
        return willi

    def _start_balancer(self, name: str) -> Balancer:
        host = self.network.host(*BALANCERS[name])
        host.route("198.51.100.0/24")
        host.route("2001:db8:7::/64")
        balancer = Balancer(host, self._subdirectory(name))
        balancer.haproxy.start()
        self._ends.callback(balancer.haproxy.kill)
        return balancer

    def _subdirectory(self, name: str) -> Path:
        directory = self._directory / name
        directory.mkdir()
        return directory

    # The load balancers

    def start_keepalived(self) -> None:
        """One after the other: the first one has the address."""
        for balancer in self.balancers:
            balancer.keepalived.start()
            self._ends.callback(balancer.keepalived.kill)
            self.holder()

    @property
    def logs(self) -> dict[str, Path]:
        """Of all programs, by a title."""
        logs = {name: willi.log_file for name, willi in self.willis.items()}
        for name, balancer in zip(BALANCERS, self.balancers, strict=True):
            logs[f"HAProxy of {name}"] = balancer.haproxy.log_file
            logs[f"keepalived of {name}"] = balancer.keepalived.log_file
        return logs

    def holder(self) -> Balancer:
        """Who has the floating address, alone."""
        return wait_until(self._holder, "one holder of the floating address", FAILOVER)

    def _holder(self) -> Balancer | None:
        holders = [balancer for balancer in self.balancers if balancer.has_address]
        return holders[0] if len(holders) == 1 else None

    def wait_until_up(self, *names: str) -> None:
        """Until both HAProxies send clients to these Willis."""
        for balancer in self.balancers:
            balancer.haproxy.wait_until_up(*names, seconds=UP_AGAIN)

    def wait_until_idle(self) -> None:
        """Until no client is anywhere."""
        haproxy = self.holder().haproxy
        wait_until(lambda: not any(map(haproxy.sessions, self.willis)), "the end of the last session")

    def tell_haproxies(self, command: str) -> None:
        """A command to both, as an administrator must."""
        for balancer in self.balancers:
            answer = balancer.haproxy.ask(command)
            assert answer.strip() == "", f"{command}: {answer}"

    # Clients

    def connect(self, address: str = FLOATING[0], seconds: float = PATIENCE) -> Client:
        """A client that has said nothing and read nothing."""
        with self._client_host.inside():
            return Client(25, host=address, seconds=seconds)

    def greeted(self, address: str = FLOATING[0]) -> Client:
        """A client that has said EHLO."""
        client = self.connect(address)
        assert client.read_reply().code == 220
        assert client.command(EHLO).code == 250
        return client

    def greeted_at(self, name: str) -> Client:
        """A client that has said EHLO, and whom HAProxy has sent to this Willi."""
        haproxy = self.holder().haproxy
        with ExitStack() as elsewhere:
            for _ in range(10):  # who is elsewhere stays meanwhile, or the next one would go there again
                client = self.greeted()
                if haproxy.server_of(client.address) == name:
                    return client
                elsewhere.callback(client.close)
        raise AssertionError(f"HAProxy sends nobody to {name}")

    def traffic(self, name: str, seconds: float = PATIENCE) -> Traffic:
        """Senders, every other one of them over IPv6. seconds: what they wait for an answer."""
        return Traffic(name, [partial(self.connect, FLOATING[number % 2], seconds) for number in range(SENDERS)])


def settings_of_the_page() -> dict[str, Setting]:
    """What the page has for willi.conf behind HAProxy."""
    found = re.search(r"```ini\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return dict(ConfigObj(found[1].splitlines(), interpolation=False))


def _static(server: str) -> dict[str, Setting]:
    return {"type": "static", "server": server, "tls_verify": False}
