"""The upstream learns by XCLIENT who the client is (https://www.postfix.org/XCLIENT_README.html)."""

from __future__ import annotations

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.dns import DnsServer, Fault
from tests.support.loopback import free_port
from tests.support.postfix import Postfix
from tests.support.talk import BEN, BOB, GO_ON, MAIL, NO_ANSWER, OK, QUEUED, SENDER_KEPT, deliver, greeted, reply, say
from tests.support.upstream import EXTENSIONS, Action, Close, ScriptedUpstream

ALL = b"XCLIENT NAME ADDR PORT PROTO HELO LOGIN DESTADDR DESTPORT"
NEEDED = "451 4.3.5 Server for this recipient does not accept our XCLIENT, try again"


@pytest.fixture
def upstream(upstream: ScriptedUpstream) -> ScriptedUpstream:
    """One that takes XCLIENT."""
    upstream.extensions = (*EXTENSIONS, ALL)
    return upstream


def port_of(client: Client) -> int:
    port: int = client.socket.getsockname()[1]
    return port


def attributes(line: bytes) -> dict[bytes, bytes]:
    name, *words = line.split(b" ")
    assert name == b"XCLIENT"
    return dict(word.split(b"=", 1) for word in words)


def test_the_upstream_learns_all_that_it_asks_for(start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer):
    dns.host("client.example", "127.0.0.7")
    willi = start_willi(server=upstream.server, dns=dns)
    with greeted(willi, source="127.0.0.7") as client:
        assert deliver(client) == QUEUED
        told = f"XCLIENT PROTO=ESMTP HELO=c.example NAME=client.example PORT={port_of(client)} ADDR=127.0.0.7"
    heard = upstream.connection().commands
    assert heard[:5] == [b"EHLO willi.example", told.encode(), b"EHLO c.example", MAIL, BOB]


def test_it_is_told_once_for_each_connection(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client) == deliver(client) == QUEUED
    assert sum(line.startswith(b"XCLIENT") for line in upstream.commands) == 1


def test_a_client_that_says_helo_is_told_of_as_such(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, b"HELO c.example") as client:
        assert deliver(client) == QUEUED
    heard = upstream.connection().commands
    assert attributes(heard[1])[b"PROTO"] == b"SMTP"
    assert heard[2] == b"HELO c.example"


def test_starttls_comes_first(start_willi: StartWilli, certificates: Authority, upstream: ScriptedUpstream):
    upstream.tls = certificates.issue("mx.example").server_context()
    willi = start_willi(server=upstream.server, upstream_tls="require")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    heard = upstream.connection().commands
    told = heard.pop(3)
    assert heard[:5] == [b"EHLO willi.example", b"STARTTLS", b"EHLO willi.example", b"EHLO c.example", MAIL]
    assert told.startswith(b"XCLIENT ")


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        (b"XCLIENT ADDR", [b"ADDR"]),
        (b"XCLIENT NAME ADDR", [b"NAME", b"ADDR"]),
        (b"XCLIENT ADDR PORT", [b"PORT", b"ADDR"]),
        (b"xclient helo proto addr", [b"PROTO", b"HELO", b"ADDR"]),
        (b"XCLIENT=NAME LOGIN", [b"NAME"]),
    ],
    ids=repr,
)
def test_only_what_is_listed_is_told(listed: bytes, told: list[bytes], willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = (b"PIPELINING", listed, b"XCLIENT")[:2]
    upstream.answers[b"XCLIENT"] = reply("220 upstream.example ESMTP")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert list(attributes(upstream.connection().commands[1])) == told


@pytest.mark.parametrize("listed", [b"XCLIENT", b"XCLIENT LOGIN"], ids=bytes.decode)
def test_nothing_is_told_to_who_lists_nothing_of_ours(listed: bytes, willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = (listed,)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert upstream.connection().commands[:2] == [b"EHLO willi.example", MAIL]


def test_the_last_ehlo_counts(willi: Willi, upstream: ScriptedUpstream):
    """Before it knew the client it offered SIZE and PIPELINING; to this client it does not."""
    upstream.answers[b"EHLO c.example"] = reply("250 upstream.example / 8BITMIME")
    with greeted(willi) as client:
        assert deliver(client, BOB, BEN, mail=MAIL + b" SIZE=100 BODY=8BITMIME") == QUEUED
    reads = upstream.connection().reads
    assert upstream.wait_for_message().mail == MAIL + b" BODY=8BITMIME"
    assert BOB + b"\r\n" in reads


def test_values_are_xtext(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, b"EHLO a+b=c.example") as client:
        assert deliver(client) == QUEUED
    assert attributes(upstream.connection().commands[1])[b"HELO"] == b"a+2Bb+3Dc.example"
    assert b"EHLO a+b=c.example" in upstream.commands


def test_an_ipv6_client_is_told_of_as_such(start_willi: StartWilli, upstream: ScriptedUpstream):
    port = free_port("127.0.0.1")
    willi = start_willi(server=upstream.server, listen=f"[::1]:{port}", probe=False)
    with Client(port, host="::1") as client:
        assert client.read_reply().code == 220
        say(client, b"EHLO c.example")
        assert deliver(client) == QUEUED
        told = attributes(upstream.connection().commands[1])
        assert (told[b"ADDR"], told[b"PORT"]) == (b"IPV6:::1", str(port_of(client)).encode())
        assert willi.wait_for_log(msg="Message accepted")["client"] == f"[::1]:{port_of(client)}"


def test_long_values_are_split_at_512_octets(start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer):
    helo, name = b"h" * 255, ".".join(["n" * 60] * 4)
    dns.host(name, "127.0.0.7")
    willi = start_willi(server=upstream.server, dns=dns)
    with greeted(willi, b"EHLO " + helo, source="127.0.0.7") as client:
        assert deliver(client) == QUEUED
    lines = [line for line in upstream.connection().commands if line.startswith(b"XCLIENT")]
    assert all(len(line) + 2 <= 512 for line in lines)
    assert [list(attributes(line)) for line in lines] == [[b"PROTO", b"HELO"], [b"NAME", b"PORT", b"ADDR"]]
    assert (attributes(lines[0])[b"HELO"], attributes(lines[1])[b"NAME"]) == (helo, name.encode())


@pytest.mark.parametrize(("length", "told"), [(85, [b"PROTO", b"HELO"]), (86, [b"PROTO"])])
def test_a_value_that_postfix_would_not_take_is_left_out(
    length: int, told: list[bytes], willi: Willi, upstream: ScriptedUpstream
):
    with greeted(willi, b"EHLO " + b"=" * length) as client:
        assert deliver(client) == QUEUED
    [line] = [line for line in upstream.connection().commands if line.startswith(b"XCLIENT")]
    assert list(attributes(line)) == [*told, b"NAME", b"PORT", b"ADDR"]


def test_a_helo_that_the_upstream_does_not_take_cannot_hide_the_client(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"XCLIENT"] = [b"501 5.5.4 Bad HELO syntax\r\n"]
    with greeted(willi, b"EHLO bad_helo") as client:
        assert deliver(client) == QUEUED
    [first, second] = [line for line in upstream.connection().commands if line.startswith(b"XCLIENT")]
    assert attributes(first)[b"HELO"] == b"bad_helo"
    rest = attributes(first)
    del rest[b"HELO"]
    assert attributes(second) == rest


# What an upstream may not take of a client's, and what it is told then. In the order in which it is tried.
NO_HELO = [(b"127.0.0.7", b"client.example")]
NO_NAME = [*NO_HELO, (b"127.0.0.7", b"[UNAVAILABLE]")]
NO_ADDRESS = [*NO_NAME, (b"[UNAVAILABLE]", b"client.example")]
NOTHING = [*NO_ADDRESS, (b"[UNAVAILABLE]", b"[UNAVAILABLE]")]


@pytest.mark.parametrize("code", [b"501", b"504"], ids=bytes.decode)
@pytest.mark.parametrize("told", [NO_HELO, NO_NAME, NO_ADDRESS, NOTHING], ids=len)
def test_no_value_that_the_upstream_does_not_take_gives_the_client_our_own_name(
    told: list[tuple[bytes, bytes]], code: bytes, start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer
):
    dns.host("client.example", "127.0.0.7")
    upstream.answers[b"XCLIENT"] = [code + b" 5.5.4 Bad syntax\r\n"] * len(told)
    willi = start_willi(server=upstream.server, dns=dns)
    with greeted(willi, source="127.0.0.7") as client:
        assert deliver(client) == QUEUED
    first, *others = [attributes(line) for line in upstream.commands if line.startswith(b"XCLIENT")]
    assert (first[b"HELO"], first[b"NAME"], first[b"ADDR"]) == (b"c.example", b"client.example", b"127.0.0.7")
    assert [(one[b"ADDR"], one[b"NAME"]) for one in others] == told
    assert not any(b"HELO" in one for one in others)
    warned = willi.lines(lvl="warn", msg="XCLIENT: the upstream does not take this address, and was told none")
    assert len(warned) == (told in (NO_ADDRESS, NOTHING))


def ipv6_client(willi: Willi, port: int) -> Client:
    client = Client(port, host="::1")
    assert client.read_reply().code == 220
    say(client, b"EHLO c.example")
    return client


@pytest.mark.parametrize(
    ("xclient", "takes_unavailable", "answer"),
    [("try", True, QUEUED), ("try", False, NEEDED), ("require", True, NEEDED), ("require", False, NEEDED)],
)
def test_an_upstream_without_ipv6_does_not_hear_ipv6_clients_as_willi(
    xclient: str, takes_unavailable: bool, answer: str, start_willi: StartWilli, upstream: ScriptedUpstream,
    dns: DnsServer,
):  # fmt: skip
    port = free_port("127.0.0.1")
    refusals = 2 if takes_unavailable else 10  # with HELO and without; there is no NAME
    upstream.answers[b"XCLIENT"] = [b"501 5.5.4 Bad ADDR syntax: IPV6:::1\r\n"] * refusals
    willi = start_willi(server=upstream.server, dns=dns, listen=f"[::1]:{port}", probe=False, xclient=xclient)
    willi.tolerate("XCLIENT failed")
    with ipv6_client(willi, port) as client:
        if answer == QUEUED:
            assert deliver(client) == QUEUED
        else:
            assert say(client, MAIL, BOB, b"QUIT") == [SENDER_KEPT, NEEDED, "221 2.0.0 Bye"]
    assert (MAIL in upstream.commands) == (answer == QUEUED)
    told = attributes([line for line in upstream.commands if line.startswith(b"XCLIENT")][-1])
    assert told[b"ADDR"] == (b"[UNAVAILABLE]" if xclient == "try" else b"IPV6:::1")


def test_a_postfix_without_ipv6_takes_the_mail_of_an_ipv6_client_without_trusting_it(
    start_willi: StartWilli, postfix: Postfix
):
    port = free_port("127.0.0.1")
    willi = start_willi(server=postfix.server, listen=f"[::1]:{port}", probe=False)
    with ipv6_client(willi, port) as client:
        assert deliver(client, b"RCPT TO:<xclient6@b.example>").startswith("250 2.0.0 Ok: queued as ")
        assert say(client, MAIL, b"RCPT TO:<x@other.example>")[1].startswith("454 4.7.1 ")  # it is not in mynetworks
    assert " [unknown])" in postfix.wait_for_message("xclient6@b.example").received


def test_an_upstream_that_takes_half_of_what_it_is_told_hears_no_mail(
    start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer
):
    """The rest of it is ours: the name of the client, and the address of Willi."""
    name = ".".join(["n" * 60] * 4)
    dns.host(name, "127.0.0.7")
    upstream.answers[b"XCLIENT"] = [b"220 ok\r\n", b"550 5.7.0 Error: insufficient authorization\r\n"]
    willi = start_willi(server=upstream.server, dns=dns)
    willi.tolerate("XCLIENT failed")
    with greeted(willi, b"EHLO " + b"h" * 255, source="127.0.0.7") as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NEEDED]
    assert MAIL not in upstream.commands


@pytest.mark.parametrize("answer", ["221 2.0.0 bye", "211 2.0.0 ok", "251 2.0.0 ok"])
def test_only_220_and_250_say_that_the_client_is_known(answer: str, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"XCLIENT"] = reply(answer)
    willi.tolerate(upstream.server)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    assert MAIL not in upstream.commands


def test_a_250_to_xclient_is_a_yes_too(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"XCLIENT"] = reply("250 2.0.0 ok")  # nginx takes it for one
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert upstream.connection().commands[2] == b"EHLO c.example"


@pytest.mark.parametrize("second_ehlo", ["250 upstream.example / PIPELINING", "502 5.5.2 what?"])
def test_where_xclient_is_gone_after_starttls_the_mail_does_not_go_in_our_own_name(
    second_ehlo: str, share_willi: StartWilli, certificates: Authority, upstream: ScriptedUpstream
):
    upstream.tls = certificates.issue("mx.example").server_context()
    first = reply("250 upstream.example / STARTTLS / XCLIENT NAME ADDR")
    upstream.answers[b"EHLO"] = [first, reply(second_ehlo)]
    willi = share_willi(server=upstream.server, upstream_tls="always")
    willi.tolerate("XCLIENT failed")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NEEDED]
    assert MAIL not in upstream.commands
    assert willi.wait_for_log(lvl="error")["error"] == "offered before STARTTLS, and not any more"


@pytest.mark.parametrize("offer", [b"XCLIENT", b"XCLIENT LOGIN", b"XCLIENT NAME HELO PROTO PORT"], ids=bytes.decode)
def test_where_xclient_is_required_it_has_to_take_the_address(
    offer: bytes, share_willi: StartWilli, upstream: ScriptedUpstream
):
    upstream.extensions = (*EXTENSIONS, offer)
    willi = share_willi(server=upstream.server, xclient="require")
    willi.tolerate("XCLIENT failed")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NEEDED]
    assert MAIL not in upstream.commands


# NAME


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["client.example."]}, "client.example": {"A": ["127.0.0.7"]}},
         b"client.example"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["Client.EXAMPLE."]}, "client.example": {"A": ["127.0.0.8", "127.0.0.7"]}},
         b"client.example"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["bank.example.", "client.example."]},
          "bank.example": {"A": ["127.0.0.9"]}, "client.example": {"A": ["127.0.0.7"]}}, b"client.example"),
        ({}, b"[UNAVAILABLE]"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["client.example."]}}, b"[UNAVAILABLE]"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["bank.example."]}, "bank.example": {"A": ["127.0.0.9"]}},
         b"[UNAVAILABLE]"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["a\\032b.example."]}, "a\\032b.example": {"A": ["127.0.0.7"]}},
         b"[UNAVAILABLE]"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["127.0.0.7."]}, "127.0.0.7": {"A": ["127.0.0.7"]}}, b"[UNAVAILABLE]"),
        ({"7.0.0.127.in-addr.arpa": {"A": ["127.0.0.7"]}}, b"[UNAVAILABLE]"),
        ({"7.0.0.127.in-addr.arpa": Fault.SERVFAIL}, b"[TEMPUNAVAIL]"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["client.example."]}, "client.example": Fault.SERVFAIL},
         b"[TEMPUNAVAIL]"),
        ({"7.0.0.127.in-addr.arpa": Fault.SILENCE}, b"[TEMPUNAVAIL]"),
        ({"7.0.0.127.in-addr.arpa": {"PTR": ["client.example."]}, "client.example": Fault.SILENCE},
         b"[TEMPUNAVAIL]"),
    ],
    ids=[
        "good", "other case and several addresses", "the second name", "NXDOMAIN", "leads nowhere", "somebody else's",
        "no host name", "an address", "no PTR", "SERVFAIL", "SERVFAIL for the name", "silence", "silence for the name",
    ],
)  # fmt: skip
def test_a_client_has_the_name_that_leads_back_to_it(
    names: dict[str, dict[str, list[str]] | Fault], told: bytes, start_willi: StartWilli,
    upstream: ScriptedUpstream, dns: DnsServer,
):  # fmt: skip
    for name, records in names.items():
        dns.zone[name] = records if isinstance(records, Fault) else {**records}
    dns_timeout = "1s" if Fault.SILENCE in names.values() else "60s"
    willi = start_willi(server=upstream.server, dns=dns, dns_timeout=dns_timeout)
    with greeted(willi, source="127.0.0.7") as client:
        assert deliver(client) == QUEUED
    assert attributes(upstream.connection().commands[1])[b"NAME"] == told


def test_names_are_cached(start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer):
    dns.host("client.example", "127.0.0.7")
    willi = start_willi(server=upstream.server, dns=dns)
    for _ in range(3):
        with greeted(willi, source="127.0.0.7") as client:
            assert deliver(client) == QUEUED
        dns.zone.clear()  # nobody would have a name now; and counting queries would count late repetitions
    told = [attributes(line)[b"NAME"] for line in upstream.commands if line.startswith(b"XCLIENT")]
    assert told == [b"client.example"] * 3


# Refusals


@pytest.mark.parametrize(
    "refusal",
    [*(f"{code} 5.5.1 no" for code in range(500, 505)), "550 5.7.0 Error: insufficient authorization"],
)
def test_a_refusal_of_ourselves_is_logged_and_the_mail_goes_on(refusal: str, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"XCLIENT"] = reply(refusal)
    willi.tolerate("XCLIENT refused")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    line = willi.wait_for_log(msg="XCLIENT refused", lvl="error")
    assert (line["error"], line["upstream"]) == (refusal, upstream.server)
    assert b"EHLO c.example" not in upstream.commands


@pytest.mark.parametrize(
    "refusal",
    [
        "550 5.7.1 your client is blocked",
        "554 5.7.1 no",
        "421 4.7.0 go",
        "450 4.7.1 x",
        "550 5.7.1 Client host [127.0.0.1] is not authorized to send mail here; see https://rbl.example",
        "550 5.7.1 your network has insufficient authorization, says rbl.example",
    ],
)
@pytest.mark.parametrize("step", [b"XCLIENT", b"EHLO c.example"], ids=["XCLIENT", "EHLO"])
def test_another_refusal_is_the_verdict_on_the_client(
    refusal: str, step: bytes, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[step] = reply(refusal)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, refusal]
        if refusal.startswith("421"):
            client.expect_eof()
        else:
            assert say(client, BEN, b"NOOP") == [refusal, "250 2.0.0 Ok"]
    upstream.wait_for_ends()
    assert MAIL not in upstream.commands
    assert len(upstream.connections) == 1
    line = willi.wait_for_log(msg="Message rejected")
    assert (line["error_src"], line["reply"]) == ("upstream", refusal)


def test_a_4xx_to_xclient_does_not_send_the_client_to_the_next_host(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    upstream.answers[b"XCLIENT"] = reply("450 4.7.1 later")
    willi = start_willi(server=f"{upstream.server},{upstream.server}")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "450 4.7.1 later"]
    assert len(upstream.connections) == 1


@pytest.mark.parametrize("answer", [Close(), b"garbage\r\n", reply("354 go on")], ids=str)
def test_an_upstream_that_dies_at_xclient_has_failed(answer: Action, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"XCLIENT"] = answer
    willi.tolerate(upstream.server)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]


@pytest.mark.parametrize(
    "answer", [reply("503 5.5.1 no"), reply("550 5.7.0 Error: insufficient authorization"), None], ids=str
)
def test_where_xclient_is_required_nothing_goes_without(
    answer: Action | None, share_willi: StartWilli, upstream: ScriptedUpstream
):
    if answer is None:
        upstream.extensions = EXTENSIONS
    else:
        upstream.answers[b"XCLIENT"] = answer
    willi = share_willi(server=upstream.server, xclient="require")
    willi.tolerate("XCLIENT")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, BOB) == [SENDER_KEPT, NEEDED, NEEDED]
    upstream.wait_for_ends()
    assert MAIL not in upstream.commands
    assert willi.lines(lvl="error")


@pytest.mark.parametrize(
    ("answer", "heard"),
    [
        (None, NEEDED),
        (reply("550 5.7.0 Error: insufficient authorization"), NEEDED),
        (reply("451 4.3.0 not now"), "451 4.3.0 not now"),
    ],
    ids=["not offered", "refused", "deferred"],
)
def test_where_xclient_is_required_the_next_host_is_asked(
    answer: Action | None, heard: str, start_willi: StartWilli, upstream: ScriptedUpstream,
    start_upstream: StartUpstream,
):  # fmt: skip
    first = start_upstream()
    if answer is not None:
        first.extensions = upstream.extensions
        first.answers[b"XCLIENT"] = answer
    willi = start_willi(server=f"{first.server},{upstream.server}", xclient="require")
    willi.tolerate("XCLIENT")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert MAIL not in first.commands
    willi = start_willi(server=first.server, xclient="require")
    willi.tolerate("XCLIENT")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, heard]


def test_where_xclient_is_required_the_next_client_goes_to_another_address(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    six = start_upstream(host="::1")
    four = start_upstream(port=six.port)
    refusals: list[Action] = [reply("550 5.7.0 Error: insufficient authorization")]
    for upstream in (six, four):
        upstream.extensions = (*EXTENSIONS, ALL)
        upstream.answers[b"XCLIENT"] = refusals
    dns.zone["mx.b.example"] = {"A": ["127.0.0.1"], "AAAA": ["::1"]}
    willi = start_willi(server=f"mx.b.example:{six.port}", xclient="require", dns=dns)
    willi.tolerate("XCLIENT")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NEEDED]
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert len(six.connections) == len(four.connections) == 1


def test_where_xclient_is_required_and_taken_all_is_well(share_willi: StartWilli, upstream: ScriptedUpstream):
    with greeted(share_willi(server=upstream.server, xclient="require")) as client:
        assert deliver(client) == QUEUED


def test_xclient_can_be_turned_off(start_willi: StartWilli, upstream: ScriptedUpstream):
    with greeted(start_willi(server=upstream.server, xclient="no")) as client:
        assert deliver(client) == QUEUED
    assert upstream.connection().commands[:2] == [b"EHLO willi.example", MAIL]


def test_a_mapping_may_differ_from_the_rest(start_willi: StartWilli, upstream: ScriptedUpstream):
    one = {"type": "static", "server": upstream.server, "tls_verify": False, "xclient": "no"}
    with greeted(start_willi(mappings={"one": one}, xclient="require")) as client:
        assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, OK, GO_ON]
    assert not any(line.startswith(b"XCLIENT") for line in upstream.commands)


def test_postfix_believes_it(start_willi: StartWilli, postfix: Postfix, dns: DnsServer):
    dns.host("client.example", "127.0.0.7")
    willi = start_willi(server=postfix.server, dns=dns)
    with greeted(willi, b"EHLO strange+name=x.example", source="127.0.0.7") as client:
        assert deliver(client, b"RCPT TO:<xclient@b.example>").startswith("250 2.0.0 Ok: queued as ")
    stored = postfix.wait_for_message("xclient@b.example")
    assert "from strange+name=x.example (client.example [127.0.0.7])" in stored.received


@pytest.mark.parametrize("name", [b"spammer.example", b"authority.example", b"not-authorized.example"])
def test_the_clients_own_words_do_not_make_its_refusal_our_affair(
    name: bytes, willi: Willi, upstream: ScriptedUpstream
):
    refusal = b"550 5.7.1 <%s>: Helo command rejected: listed" % name
    upstream.answers[b"XCLIENT"] = refusal + b"\r\n"
    with greeted(willi, b"EHLO " + name) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, refusal.decode()]


def test_a_silent_name_server_holds_nobody_up_for_the_name_of_a_loopback_address(
    start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer
):
    """gevent gives such names to the system's resolver, in which the whole worker stood still for 20 seconds."""
    dns.zone["1.0.0.127.in-addr.arpa"] = Fault.SILENCE
    willi = start_willi(server=upstream.server, dns=dns, dns_timeout="30s")
    with Client(willi.port, seconds=15) as first, Client(willi.port, seconds=15) as second:
        for client in (first, second):
            assert client.read_reply().code == 220
            assert client.command(b"EHLO c.example").code == 250
