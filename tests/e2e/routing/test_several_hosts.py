"""What a host says before it knows the client is about us: the next host of the route is tried."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.conftest import StartUpstream, StartWilli, TwoHosts
from tests.support.certificates import Authority
from tests.support.daemon import Willi
from tests.support.dns import DnsServer, Fault
from tests.support.loopback import HOST, free_address, free_port, wait_until
from tests.support.talk import (
    BOB,
    CARL,
    GO_ON,
    LOST,
    MAIL,
    NO_ANSWER,
    OK,
    QUEUED,
    SENDER_KEPT,
    content,
    deliver,
    greeted,
    reply,
    say,
    say_together,
    two_domains,
)
from tests.support.upstream import (
    EXTENSIONS,
    GREETING,
    VERDICT,
    Action,
    Close,
    Delay,
    Drip,
    Ended,
    Reset,
    ScriptedUpstream,
    Silence,
)
from willi_lib.proxy.connector import MAX_ADDRESSES, MAX_MX_HOSTS

BAD_GREETINGS: dict[str, Action] = {
    "4xx": reply("421 4.3.2 not now"),
    "5xx": reply("554 5.7.1 not you, proxy"),
    "3xx": reply("354 go on"),
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n",
    "no newline": b"220 " + b"x" * 10_000,
    "bare newline": b"220 ready\n",
    "endless": b"220-more\r\n" * 1000,
    "silence": Silence(),
    "too slow": Drip(reply("220 " + "x" * 200), 0.1),
    "close": Close(),
    "reset": Reset(),
}
BAD_EHLOS: dict[str, Action] = {
    "4xx": reply("451 4.3.0 not now"),
    "421": reply("421 4.3.2 not now"),
    "3xx": reply("354 go on"),
    "garbage": b"hello to you too\r\n",
    "close": Close(),
    "reset": Reset(),
}


@pytest.mark.parametrize("kind", BAD_GREETINGS)
def test_after_such_a_greeting_the_next_host_is_tried(kind: str, two_hosts: TwoHosts):
    willi, bad, good, bob = two_hosts(connect_timeout="2s" if kind in ("silence", "too slow") else "60s")
    bad.answers[GREETING] = BAD_GREETINGS[kind]
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert len(good.messages) == 1
    assert bad.commands == []


@pytest.mark.parametrize("kind", BAD_EHLOS)
def test_after_such_an_answer_to_ehlo_the_next_host_is_tried(kind: str, two_hosts: TwoHosts):
    willi, bad, good, bob = two_hosts()
    bad.answers[b"EHLO"] = BAD_EHLOS[kind]
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert len(good.messages) == 1
    assert b"MAIL" not in b"".join(bad.commands)


def test_what_an_upstream_says_of_us_is_no_verdict_on_the_client(start_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.answers[GREETING] = reply("554 5.7.1 blocked, see https://b.example/ / 5.7.1 you know why")
    willi = start_willi(server=upstream.server)
    willi.tolerate(upstream.server)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    line = willi.wait_for_log(msg="Upstream failed", lvl="error")
    words = "554 5.7.1 blocked, see https://b.example/ / 5.7.1 you know why"
    assert line["error"] == f"{upstream.server}: greeting: {words}"


def test_the_words_of_every_host_that_failed_are_logged(start_willi: StartWilli, start_upstream: StartUpstream):
    one, two, gone = start_upstream(), start_upstream(), f"{HOST}:{free_port()}"
    one.answers[GREETING] = reply("554 5.7.1 no")
    two.answers[b"EHLO"] = reply("451 4.3.0 later")
    willi = start_willi(server=f"{one.server},{gone},{two.server}")
    willi.tolerate(one.server)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    line = willi.wait_for_log(msg="Upstream failed", lvl="error")
    assert line["error"] == "; ".join((
        f"{one.server}: greeting: 554 5.7.1 no",
        f"{gone}: Connection refused",
        f"{two.server}: EHLO: 451 4.3.0 later",
    ))  # fmt: skip


def test_an_upstream_that_does_not_know_ehlo_gets_helo(start_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.answers[b"EHLO"] = reply("502 5.5.1 what?")
    willi = start_willi(server=upstream.server)
    with greeted(willi) as client:
        assert deliver(client, mail=MAIL + b" SIZE=1000 BODY=8BITMIME") == QUEUED
    heard = [b"EHLO willi.example", b"HELO willi.example", MAIL, BOB, b"DATA"]
    assert upstream.connection().commands[:5] == heard


@pytest.mark.parametrize("hello", [b"EHLO", b"HELO"], ids=bytes.decode)
def test_a_host_that_refuses_helo_has_failed(hello: bytes, two_hosts: TwoHosts):
    willi, bad, good, bob = two_hosts()
    bad.answers[b"HELO"] = reply("550 5.7.1 no HELO from you")
    if hello == b"EHLO":
        bad.answers[b"EHLO"] = reply("550 5.7.1 no EHLO from you")
    with greeted(willi, hello + b" c.example") as client:
        assert deliver(client, bob) == QUEUED
    assert len(good.messages) == 1


def test_hosts_are_tried_in_their_order(two_hosts: TwoHosts):
    willi, first, second, bob = two_hosts()
    for _ in range(3):
        with greeted(willi) as client:
            assert deliver(client, bob) == QUEUED
    assert len(first.messages) == 3
    assert second.connections == []


def test_a_host_that_failed_is_tried_last_for_a_while(two_hosts: TwoHosts):
    willi, down, good, bob = two_hosts()
    down.answers[GREETING] = [reply("421 4.3.2 just starting")]
    for _ in range(3):
        with greeted(willi) as client:
            assert deliver(client, bob) == QUEUED
    assert len(down.connections) == 1
    assert len(good.messages) == 3
    good.stop()
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert len(down.messages) == 1, "it is tried all the same if there is no other"


LATE_FAILURES: dict[str, tuple[bytes, Action]] = {
    "EHLO, silence": (b"EHLO", Silence()),
    "MAIL, close": (b"MAIL", Close()),
    "MAIL, reset": (b"MAIL", Reset()),
    "MAIL, silence": (b"MAIL", Silence()),
    "MAIL, goodbye": (b"MAIL", reply("221 2.0.0 closing")),
    "MAIL, garbage": (b"MAIL", b"hello\r\n"),
    "RCPT, close": (b"RCPT", Close()),
    "RCPT, silence": (b"RCPT", Silence()),
}


@pytest.mark.parametrize("kind", LATE_FAILURES)
def test_a_host_that_fails_before_it_accepts_a_recipient_is_tried_last(kind: str, two_hosts: TwoHosts):
    """One whose smtpd crashes at each MAIL would else have all mail of the route wait."""
    verb, failure = LATE_FAILURES[kind]
    willi, bad, good, bob = two_hosts(upstream_timeout="2s" if failure == Silence() else "60s")
    bad.answers[verb] = failure
    willi.tolerate(bad.server)
    willi.tolerate("upstream_timeout")
    with greeted(willi) as client:
        assert say(client, MAIL, bob) == [SENDER_KEPT, NO_ANSWER]
    for _ in range(3):
        with greeted(willi) as client:
            assert deliver(client, bob) == QUEUED
    assert len(bad.connections) == 1
    assert len(good.messages) == 3


def test_a_host_that_fails_after_it_has_accepted_a_recipient_is_tried_last(two_hosts: TwoHosts):
    willi, bad, good, bob = two_hosts()
    bad.answers[b"DATA"] = Close()
    willi.tolerate(bad.server)
    with greeted(willi) as client:
        assert say(client, MAIL, bob, b"DATA") == [SENDER_KEPT, OK, LOST]
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert (len(bad.connections), len(good.messages)) == (1, 1)


@pytest.mark.parametrize("extensions", [EXTENSIONS, ()], ids=["pipelining", "one by one"])
@pytest.mark.parametrize("verb", [b"MAIL", b"RCPT"], ids=bytes.decode)
def test_a_host_that_says_421_before_it_accepts_a_recipient_is_tried_last(
    verb: bytes, extensions: tuple[bytes, ...], two_hosts: TwoHosts
):
    willi, busy, good, bob = two_hosts()
    busy.extensions = extensions
    busy.answers[verb] = reply("421 4.3.2 shutting down")
    with greeted(willi) as client:
        assert say_together(client, MAIL, bob) == [SENDER_KEPT, "421 4.3.2 shutting down"]
    for _ in range(2):
        with greeted(willi) as client:
            assert deliver(client, bob) == QUEUED
    assert (len(busy.connections), len(good.messages)) == (1, 2)


@pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "one by one"])
@pytest.mark.parametrize("end", [reply("421 4.7.0 too many errors"), Close()], ids=["421", "close"])
def test_a_host_that_has_enough_of_a_client_stays_first(end: Action, pipelined: bool, two_hosts: TwoHosts):
    """Postfix says 421 after 20 wrong guesses, and Exim's `drop` hangs up behind a 550: the next client is another."""
    willi, first, second, bob = two_hosts()
    first.answers[b"RCPT"] = [reply("550 5.1.1 no such user"), end]
    willi.tolerate(first.server)
    with greeted(willi) as client:
        assert (say_together if pipelined else say)(client, MAIL, bob, bob)[1] == "550 5.1.1 no such user"
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert second.connections == []


@pytest.mark.parametrize("death", ["at the end", "in the middle"])
@pytest.mark.parametrize("send", [b"DATA", b"BDAT"], ids=bytes.decode)
def test_a_host_that_dies_inside_the_message_is_tried_last(death: str, send: bytes, two_hosts: TwoHosts):
    willi, bad, good, bob = two_hosts()
    if death == "at the end":
        bad.answers[VERDICT] = bad.answers[b"BDAT"] = Close()
    else:
        bad.kill_after = 10
    willi.tolerate(bad.server)
    with greeted(willi) as client:
        assert say(client, MAIL, bob) == [SENDER_KEPT, OK]
        if send == b"DATA":
            assert say(client, b"DATA") == [GO_ON]
            assert content(client) == LOST
        else:
            client.send(b"BDAT 100 LAST\r\n" + b"x" * 98 + b"\r\n")
            assert str(client.read_reply()) == LOST
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert (len(bad.connections), len(good.messages)) == (1, 1)


@pytest.mark.parametrize("verb", [b"EHLO", b"STARTTLS", b"XCLIENT"], ids=bytes.decode)
def test_a_host_that_greets_and_then_is_silent_leaves_time_for_the_next_one(
    verb: bytes, two_hosts: TwoHosts, certificates: Authority
):
    tls = certificates.issue("localhost").server_context()
    willi, silent, _, bob = two_hosts(tls=tls, connect_timeout="2s", upstream_tls="always")
    silent.extensions = (*silent.extensions, b"XCLIENT ADDR")
    silent.answers[verb] = Silence()
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
        assert deliver(client, bob) == QUEUED
    assert len(silent.connections) == 1


def test_the_only_host_has_the_whole_time_for_its_introduction(start_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.answers[b"EHLO"] = Delay(2.5)
    willi = start_willi(server=upstream.server, connect_timeout="2s")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED


def test_a_refused_message_marks_no_host_as_down(two_hosts: TwoHosts):
    willi, first, second, bob = two_hosts()
    first.answers[b"MAIL"] = [reply("451 4.7.1 greylisted")]
    with greeted(willi) as client:
        assert say(client, MAIL, bob) == [SENDER_KEPT, "451 4.7.1 greylisted"]
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert len(first.messages) == 1
    assert second.connections == []


def test_a_host_that_is_down_is_down_for_all_its_routes(
    start_willi: StartWilli, upstream: ScriptedUpstream, start_upstream: StartUpstream
):
    down = start_upstream()
    down.answers[GREETING] = reply("421 4.3.2 no")
    csv = (
        "pattern;server;tls_verify\n"
        f"b.example;{down.server},{upstream.server};false\n"
        f"c.example;{down.server},{upstream.server};true\n"
    )
    willi = start_willi(csv=csv)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        assert deliver(client, b"RCPT TO:<carl@c.example>") == QUEUED
    assert len(down.connections) == 1


def test_all_hosts_and_addresses_together_have_one_upstream_timeout(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    silent = start_upstream()
    silent.answers[b"EHLO"] = Silence()
    dns.zone["mx.b.example"] = {"A": ["127.0.0.1"] * 1, "AAAA": ["::1"]}
    silent6 = start_upstream(port=silent.port, host="::1")
    silent6.answers[b"EHLO"] = Silence()
    servers = f"mx.b.example:{silent.port},{silent.server}"
    willi = start_willi(server=servers, dns=dns, upstream_timeout="2s")
    willi.tolerate("mx.b.example")
    with greeted(willi) as client:
        client.socket.settimeout(60)
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    assert len(silent.connections) + len(silent6.connections) == 1


def test_a_host_that_used_up_the_time_is_tried_last_by_the_next_client(two_hosts: TwoHosts):
    willi, silent, good, bob = two_hosts(upstream_timeout="2s")
    silent.answers[b"EHLO"] = Silence()
    willi.tolerate(silent.server)
    with greeted(willi) as client:
        assert say(client, MAIL, bob) == [SENDER_KEPT, NO_ANSWER]
    with greeted(willi) as client:
        assert deliver(client, bob) == QUEUED
    assert len(silent.connections) == len(good.messages) == 1


def test_a_host_with_two_addresses_is_tried_at_both(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    only6 = start_upstream(host="::1")
    dns.zone["mx.b.example"] = {"A": ["127.0.0.1"], "AAAA": ["::1"]}
    willi = start_willi(server=f"mx.b.example:{only6.port}", dns=dns)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(only6.messages) == 1


def test_an_address_that_failed_is_tried_last_for_a_while(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    six = start_upstream(host="::1")
    four = start_upstream(port=six.port)
    dns.zone["mx.b.example"] = {"A": ["127.0.0.1"], "AAAA": ["::1"]}
    willi = start_willi(server=f"mx.b.example:{six.port}", dns=dns)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    down, good = (six, four) if six.messages else (four, six)
    down.answers[GREETING] = [reply("421 4.3.2 just starting")]
    for _ in range(3):
        with greeted(willi) as client:
            assert deliver(client) == QUEUED
    assert len(down.connections) == 2, "the one before, and the one that failed"
    assert len(good.messages) == 3
    good.stop()
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(down.messages) == 2, "it is tried all the same if there is no other"


@pytest.mark.parametrize("verb", [b"MAIL", b"RCPT", VERDICT], ids=bytes.decode)
def test_an_address_that_greets_and_fails_later_is_tried_last(
    verb: bytes, start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    """IPv6 that loses large packets would else have all mail of a host wait that takes it by IPv4."""
    six = start_upstream(host="::1")
    four = start_upstream(port=six.port)
    failures: list[Action] = [Close()]
    six.answers[verb] = four.answers[verb] = failures
    dns.zone["mx.b.example"] = {"A": ["127.0.0.1"], "AAAA": ["::1"]}
    willi = start_willi(server=f"mx.b.example:{six.port}", dns=dns)
    willi.tolerate("connection closed")
    with greeted(willi) as client:
        if say(client, MAIL, BOB, b"DATA")[-1] == GO_ON:
            assert content(client) == LOST
    assert failures == []
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(six.connections) == len(four.connections) == 1


def test_an_ipv6_upstream_is_named_in_brackets(start_willi: StartWilli, start_upstream: StartUpstream):
    upstream = start_upstream(host="::1")
    willi = start_willi(server=upstream.server)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert willi.wait_for_log(msg="Message accepted")["upstream"] == f"[::1]:{upstream.port}"


@pytest.mark.parametrize("fault", [Fault.NXDOMAIN, Fault.SERVFAIL, Fault.SILENCE], ids=lambda fault: fault.name)
def test_a_host_without_an_address_has_failed(
    fault: Fault, start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer
):
    dns.zone["mx.b.example"] = fault
    willi = start_willi(server=f"mx.b.example,{upstream.server}", dns=dns, dns_timeout="1s")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1


def test_a_host_that_does_not_exist_is_a_451_with_its_name_in_the_log(start_willi: StartWilli, dns: DnsServer):
    willi = start_willi(server="mx.b.example", dns=dns)
    willi.tolerate("mx.b.example")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    assert "no address for mx.b.example" in willi.wait_for_log(msg="Upstream failed", lvl="error")["error"]


def test_a_changed_resolv_conf_is_noticed_and_its_odd_lines_are_passed_over(
    start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer
):
    good = dns.resolv_conf.read_text()
    dns.resolv_conf.write_text("")  # as at boot, before the network is there
    dns.zone["mx.b.example"] = {"A": [upstream.host]}
    willi = start_willi(server=f"mx.b.example:{upstream.port}", dns=dns, dns_timeout="1s", workers=1)
    willi.tolerate("mx.b.example")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    dns.resolv_conf.write_text("nameserver ns.example\nnameserver 127.0.0.1:53\n" + good)
    assert willi.wait_for_log(msg="resolv.conf read again")["name_servers"] == dns.address

    def delivers() -> bool:  # not at once: the failed look-up may still be under way
        with greeted(willi) as client:
            return say(client, MAIL, BOB)[-1].startswith("250")

    wait_until(delivers, "delivery")


# server_order


def servers_of(bob: bytes, willi: Willi, sessions: int = 30) -> Counter[str]:
    """How many of these sessions each upstream had."""
    for _ in range(sessions):
        with greeted(willi) as client:
            assert deliver(client, bob) == QUEUED
    willi.wait_for_log(msg="Message accepted", count=sessions)
    return Counter(line["upstream"] for line in willi.lines(msg="Message accepted")[-sessions:])


def test_in_random_order_the_hosts_of_a_route_share_the_load_and_one_that_failed_is_last(two_hosts: TwoHosts):
    willi, first, second, bob = two_hosts(server_order="random", workers=1)
    assert servers_of(bob, willi).keys() == {first.server, second.server}
    first.stop()
    willi.tolerate("Upstream failed")
    assert servers_of(bob, willi).keys() == {second.server}
    assert len(willi.lines(msg="Upstream failed")) <= 1


def test_the_order_of_a_mapping_is_its_own(start_willi: StartWilli, start_upstream: StartUpstream):
    first, second = start_upstream(), start_upstream()
    both = {"type": "static", "server": f"{first.server}, {second.server}", "tls_verify": False}
    willi = start_willi(mappings={"all": {**both, "server_order": "listed"}}, server_order="random")
    assert servers_of(BOB, willi) == {first.server: 30}


# mx:domain, always on port 25


@pytest.fixture
def mx_hosts(start_upstream: StartUpstream, dns: DnsServer) -> list[ScriptedUpstream]:
    """The MX hosts of b.example: mx1 before mx2."""
    dns.zone["b.example"] = {"MX": ["20 mx2.b.example.", "10 mx1.b.example."]}
    hosts = []
    for number in (1, 2):
        upstream = start_upstream(port=25, host=free_address(25))
        dns.zone[f"mx{number}.b.example"] = {"A": [upstream.host]}
        hosts.append(upstream)
    return hosts


def test_the_best_mx_host_is_taken(start_willi: StartWilli, dns: DnsServer, mx_hosts: list[ScriptedUpstream]):
    willi = start_willi(server="mx:b.example", dns=dns)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert [len(host.messages) for host in mx_hosts] == [1, 0]
    assert willi.wait_for_log(msg="Message accepted")["upstream"] == "mx1.b.example:25"


def test_if_the_best_mx_host_is_down_the_next_one_is_taken(
    start_willi: StartWilli, dns: DnsServer, mx_hosts: list[ScriptedUpstream]
):
    mx_hosts[0].stop()
    willi = start_willi(server="mx:b.example", dns=dns)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert [len(host.messages) for host in mx_hosts] == [0, 1]


def test_of_very_many_mx_hosts_and_addresses_only_some_are_tried(start_willi: StartWilli, dns: DnsServer):
    """RFC 5321 §5.1. Here all of them refuse the connection; the names are short, so that all are in one line."""
    dns.zone["b.x"] = {"MX": [f"{number} m{number}.b.x." for number in range(10, 40)]}
    for number in range(10, 40):
        dns.zone[f"m{number}.b.x"] = {"A": [f"127.26.{number}.1"]}
    dns.zone["many.x"] = {"A": [f"127.26.1.{host}" for host in range(1, 31)]}
    willi = start_willi(csv="pattern;server\nb.example;mx:b.x\nc.example;many.x\n", dns=dns)
    willi.tolerate("Upstream failed")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"RSET", MAIL, CARL)[::4] == [SENDER_KEPT, NO_ANSWER]
    willi.wait_for_log(msg="Upstream failed", count=2)
    by_mx, by_address = [str(line["error"]).split("; ") for line in willi.lines(msg="Upstream failed")]
    tried = [failure.partition(".")[0] for failure in by_mx]
    assert tried == [f"m{number}" for number in range(10, 10 + MAX_MX_HOSTS)]
    assert len(by_address) == MAX_ADDRESSES


@pytest.fixture
def backup(start_willi: StartWilli, dns: DnsServer, mx_hosts: list[ScriptedUpstream]) -> Willi:
    """A Willi that is the second MX host of b.example, between the two, of which the first one is down."""
    records = ["30 mx2.b.example.", "10 mx1.b.example.", "20 Willi.Example."]
    dns.zone["b.example"] = {"MX": records}
    mx_hosts[0].stop()
    willi = start_willi(server="mx:b.example", dns=dns)
    willi.tolerate("mx1.b.example")
    return willi


def test_as_a_backup_mx_willi_asks_only_better_hosts(backup: Willi, mx_hosts: list[ScriptedUpstream]):
    """RFC 5321 §5.1. The primary is down for a moment: nothing is bounced, and nothing goes in circles."""
    with greeted(backup) as client:
        assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, NO_ANSWER, LOST]
    assert mx_hosts[1].connections == []
    down = f"mx1.b.example:25 [{mx_hosts[0].host}]: Connection refused"
    assert backup.wait_for_log(msg="Upstream failed")["error"] == down


def test_as_a_backup_mx_of_another_name_willi_asks_only_better_hosts(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer, mx_hosts: list[ScriptedUpstream]
):
    """mx2.b.example is ourselves, as its EHLO says; the primary that is down is tried last, and still no bounce."""
    third = start_upstream(port=25, host=free_address(25))
    dns.zone["mx3.b.example"] = {"A": [third.host]}
    dns.zone["b.example"] = {"MX": ["10 mx1.b.example.", "20 mx2.b.example.", "20 mx3.b.example.", "30 mx3.b.example."]}
    mx_hosts[1].name = b"willi.example"
    third.name = b"willi.example"
    mx_hosts[0].answers[GREETING] = [reply("421 4.3.2 not now")] * 3
    willi = start_willi(server="mx:b.example", dns=dns)
    for text in ("mx1.b.example", "Mail loop"):
        willi.tolerate(text)
    for _ in range(3):
        with greeted(willi) as client:
            assert say(client, MAIL, BOB)[1] in (NO_ANSWER, OK)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(mx_hosts[0].messages) == 1
    assert len(mx_hosts[1].connections) + len(third.connections) == 1, "it knows itself now"


def test_as_the_best_mx_willi_is_a_loop(start_willi: StartWilli, dns: DnsServer, mx_hosts: list[ScriptedUpstream]):
    dns.zone["b.example"] = {"MX": ["10 mx1.b.example.", "10 willi.example.", "20 mx2.b.example."]}
    willi = start_willi(server="mx:b.example", dns=dns)
    willi.tolerate("Mail loop")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "554 5.4.6 Mail loops back to me"]
    assert mx_hosts[0].connections == mx_hosts[1].connections == []


def test_a_domain_without_mx_is_its_own_host(start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer):
    upstream = start_upstream(port=25, host=free_address(25))
    dns.zone["b.example"] = {"A": [upstream.host]}
    willi = start_willi(server="mx:b.example", dns=dns)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ({"MX": ["0 ."]}, "b.example takes no mail (null MX)"),
        (Fault.NXDOMAIN, "no MX for b.example"),
        (Fault.SERVFAIL, "no MX for b.example"),
        (Fault.SILENCE, "no MX for b.example"),
    ],
    ids=["null MX", "NXDOMAIN", "SERVFAIL", "silence"],
)
def test_a_domain_whose_mx_hosts_cannot_be_found_is_a_451(
    records: dict[str, list[str]] | Fault, why: str, start_willi: StartWilli, dns: DnsServer
):
    dns.zone["b.example"] = records if isinstance(records, Fault) else {**records}
    willi = start_willi(server="mx:b.example", dns=dns, dns_timeout="1s")
    willi.tolerate("b.example")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA")[:2] == [SENDER_KEPT, NO_ANSWER]
    assert why in willi.wait_for_log(msg="Upstream failed", lvl="error")["error"]


def test_the_same_hosts_by_two_patterns_are_one_route(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(csv=two_domains(upstream, upstream))
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        assert say(client, MAIL, b"RCPT TO:<carl@c.example>", b"DATA") == [SENDER_KEPT, OK, GO_ON]
    assert upstream.wait_for_ends() == [Ended.EOF]
