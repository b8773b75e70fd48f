"""Two Willis behind two load balancers: what docs/scaling.md promises, with its own files and addresses.

Several hosts of a database are in test_mysql.py and test_database.py, those of a route in test_several_hosts.py.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import show_on_failure
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.haproxy import HAPROXY_CFG
from tests.support.loopback import ROOT, need, wait_until
from tests.support.site import FAILOVER, FLOATING, SENDERS, Balancer, Site
from tests.support.talk import BOB, EHLO, GO_ON, MAIL, OK, QUEUED, SENDER_KEPT, deliver, say
from tests.support.traffic import CONNECT, attempt, message, stored
from tests.support.upstream import VERDICT, Hold

GOODBYE = "421 4.3.2 Service is shutting down, try again"


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Authority
) -> Iterator[Site]:
    """All of it running, and the floating address on one of the load balancers."""
    need("haproxy", "keepalived", "ip", "curl", "unshare", "nsenter", root=True)
    pair = certificates.issue("mx.example.org")
    with ExitStack() as ends:
        site = Site(
            tmp_path_factory.mktemp("site"), ends, {"workers": 2, "tls_cert": str(pair.cert), "tls_key": str(pair.key)}
        )
        for title, path in site.logs.items():
            show_on_failure(request, title, path)
        site.start_keepalived()
        site.wait_until_up(*site.willis)
        yield site


def finish(client: Client, marker: str) -> str:
    """The rest of a message after 354, and the verdict."""
    client.send(message(marker) + b".\r\n")
    return str(client.read_reply())


def is_gone(client: Client) -> bool:
    """The connection ended without another word."""
    with client:
        try:
            return client.read_to_end() == b""
        except ConnectionResetError:
            return True


def minutes(setting: str) -> int:
    """The default of a time: test_documents.py holds that the example tells the truth."""
    example = (ROOT / "etc" / "willi.conf.example").read_text(encoding="utf-8")
    found = re.search(rf"^#{setting} = (\d+)m$", example, re.MULTILINE)
    assert found
    return int(found[1])


def test_the_timeouts_of_haproxy_are_longer_than_those_of_willi():
    """Or it would cut off clients that wait for a verdict, and they would send again what is stored already."""
    defaults = HAPROXY_CFG.read_text(encoding="utf-8").partition("\ndefaults\n")[2].partition("\nlisten ")[0]
    of_haproxy = dict(re.findall(r"^ +timeout (client|server) (\d+)m$", defaults, re.MULTILINE))
    longest = max(minutes(name) for name in ("data_timeout", "read_timeout", "write_timeout"))
    assert int(of_haproxy["client"]) > longest and int(of_haproxy["server"]) > longest


@pytest.mark.parametrize(
    ("address", "attributes"),
    [
        (FLOATING[0], b"XCLIENT NAME=mail.client.example ADDR=198.51.100.7"),
        (FLOATING[1], b"XCLIENT NAME=mail6.client.example ADDR=IPV6:2001:db8:7::7"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_the_upstream_hears_who_the_client_is(address: str, attributes: bytes, site: Site):
    with site.greeted(address) as client:
        assert deliver(client) == QUEUED
    assert attributes in site.upstream.connections[-1].commands


def test_starttls_is_between_the_client_and_willi(site: Site, certificates: Authority):
    with site.greeted() as client:
        assert client.starttls(certificates.client_context(), "mx.example.org").code == 220
        assert client.command(EHLO).code == 250
        assert deliver(client) == QUEUED


def test_health_checks_leave_no_line_in_the_log(site: Site):
    site.wait_until_idle()
    before = {name: willi.text for name, willi in site.willis.items()}
    site.tell_haproxies("set server mx/willi1 health down")
    site.wait_until_up("willi1")  # it takes two good checks of each HAProxy
    for balancer in site.balancers:
        wait_until(lambda: all_are_well(balancer), "good checks of all")  # noqa: B023
    assert {name: willi.text for name, willi in site.willis.items()} == before


def all_are_well(balancer: Balancer) -> bool:
    """By the last health check of each Willi."""
    servers = balancer.haproxy.servers().values()
    return all((server["check_status"], server["last_chk"]) == ("L7OK", "2.0.0 Bye") for server in servers)


def test_mail_goes_on_when_a_willi_is_killed_and_none_is_lost(site: Site):
    """Only a message that was stored while its 250 was on the way may be there twice: one for each session, at most."""
    haproxy, upstream = site.holder().haproxy, site.upstream
    held = upstream.answers[VERDICT] = Hold()
    unheard, half = site.greeted_at("willi1"), site.greeted_at("willi1")
    for client in (unheard, half):
        assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, OK, GO_ON]
    unheard.send(message("unheard") + b".\r\n")
    assert held.reached.wait(60)
    del upstream.answers[VERDICT]
    half.send(message("half"))
    with site.traffic("killed") as traffic:
        traffic.wait_for_more()
        site.hosts["willi1"].crash()
        assert is_gone(unheard)
        assert is_gone(half)
        haproxy.wait_until_down("willi1")
        traffic.wait_for_more()
        assert len(traffic.failed) <= SENDERS, "each sender was in one session when it happened"
        held.release()
        site.willis["willi1"].wait()
        site.willis["willi1"].start()
        site.wait_until_up("willi1")
        wait_until(lambda: haproxy.sessions("willi1"), "the first client of a Willi that is back")
        traffic.wait_for_more()
    assert len(traffic.failed) <= SENDERS
    traffic.check(upstream)
    assert [attempt(site.connect, marker).accepted for marker in ("unheard", "half")] == [True, True]
    assert (stored(upstream)["unheard"], stored(upstream)["half"]) == (2, 1)


def test_a_stopped_willi_finishes_its_transactions(site: Site):
    """Nobody hears more of it than 421, or the end of a connection, before MAIL."""
    willi, upstream = site.willis["willi1"], site.upstream
    idle, after_mail, in_data = (site.greeted_at("willi1") for _ in range(3))
    assert say(after_mail, MAIL) == [SENDER_KEPT]
    assert say(in_data, MAIL, BOB, b"DATA") == [SENDER_KEPT, OK, GO_ON]
    with site.traffic("stopped") as traffic:
        traffic.wait_for_more()
        willi.signal(signal.SIGTERM)
        willi.wait_for_log(msg="Draining")
        with idle:
            assert str(idle.read_reply()) == GOODBYE
            idle.expect_eof()
        traffic.wait_for_more()
        assert say(after_mail, BOB, b"DATA") == [OK, GO_ON]
        for client, marker in ((after_mail, "after-mail"), (in_data, "in-data")):
            with client:
                assert finish(client, marker) == QUEUED
                assert str(client.read_reply()) == GOODBYE
                client.expect_eof()
        assert willi.wait() == 0
        traffic.wait_for_more()
        willi.start()
        site.wait_until_up("willi1")
    for failed in traffic.failed:
        assert failed.stage in (CONNECT, "EHLO", "MAIL") and failed.answer in ("", GOODBYE), failed
    assert len(traffic.failed) <= SENDERS
    traffic.check(upstream)
    assert (stored(upstream)["after-mail"], stored(upstream)["in-data"]) == (1, 1)


def test_no_client_notices_a_willi_that_is_drained_before_it_is_stopped(site: Site):
    haproxy, willi = site.holder().haproxy, site.willis["willi2"]
    with site.traffic("drained") as traffic:
        traffic.wait_for_more()
        site.tell_haproxies("set server mx/willi2 state drain")
        wait_until(lambda: haproxy.sessions("willi2") == 0, "the last session of a drained Willi")
        willi.signal(signal.SIGTERM)
        assert willi.wait() == 0
        traffic.wait_for_more()
        willi.start()
        site.tell_haproxies("set server mx/willi2 state ready")
        site.wait_until_up("willi2")
        wait_until(lambda: haproxy.sessions("willi2"), "the first client of a Willi that is back")
    assert traffic.failed == []
    traffic.check(site.upstream)


def other_than(site: Site, balancer: Balancer) -> Balancer:
    [other] = [one for one in site.balancers if one is not balancer]
    return other


def test_the_floating_address_leaves_a_load_balancer_whose_haproxy_has_died(site: Site):
    first = site.holder()
    second = other_than(site, first)
    with site.traffic("died") as traffic:
        traffic.wait_for_more()
        first.haproxy.kill()
        wait_until(lambda: second.has_address, "the address on the other load balancer", FAILOVER)
        traffic.wait_for_more()
        wait_until(lambda: not first.has_address, "the end of the address on the first one", FAILOVER)
        steps = first.keepalived.log.count("Entering BACKUP STATE")
        first.haproxy.start()
        wait_until(lambda: first.keepalived.log.count("Entering BACKUP STATE") > steps, "two load balancers again")
        assert site.holder() is second, "who comes back does not take it away"
    traffic.check(site.upstream)


def test_the_floating_address_leaves_a_load_balancer_that_is_cut_off(site: Site):
    """Both have it until the network is whole again; then one of them, and everybody knows which one."""
    first = site.holder()
    second = other_than(site, first)
    with site.traffic("cut-off", seconds=3.0) as traffic:
        traffic.wait_for_more()
        site.network.unplug(first.host)
        wait_until(lambda: second.has_address, "the address on the other load balancer", FAILOVER)
        traffic.wait_for_more(seconds=FAILOVER)
        assert first.has_address
        site.network.plug(first.host)
        site.holder()
        traffic.wait_for_more(seconds=FAILOVER)
    traffic.check(site.upstream)
