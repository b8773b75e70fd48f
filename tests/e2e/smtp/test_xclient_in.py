"""XCLIENT from a proxy in front of Willi, or a test tool: from `xclient_hosts` and nobody else."""

from __future__ import annotations

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.daemon import Willi
from tests.support.talk import BOB, EHLO, MAIL, OK, QUEUED, SENDER_KEPT, deliver, greeted, say
from tests.support.upstream import EXTENSIONS, ScriptedUpstream

TRUSTED = "127.0.0.5"
DENIED = "550 5.7.0 XCLIENT is not allowed from your address"
BAD = "501 5.5.4 Bad XCLIENT attribute"
BANNER = "220 willi.example ESMTP Willi"


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    upstream.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR PORT")
    return share_willi(server=upstream.server, xclient_hosts="127.0.0.4/31")


def told_of(upstream: ScriptedUpstream) -> bytes:
    return next(line for line in upstream.connections[-1].commands if line.startswith(b"XCLIENT"))


def test_a_trusted_host_may_say_who_the_client_is(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, source=TRUSTED) as client:
        line = b"XCLIENT NAME=client.example ADDR=192.0.2.7 PORT=4711 PROTO=ESMTP HELO=x.example"
        assert say(client, line, MAIL) == [BANNER, "503 5.5.1 Send EHLO first"]
        say(client, EHLO)
        assert deliver(client) == QUEUED
    assert told_of(upstream) == b"XCLIENT NAME=client.example PORT=4711 ADDR=192.0.2.7"
    assert willi.wait_for_log(msg="Message accepted")["client"] == "192.0.2.7:4711"


def test_only_a_trusted_host_is_offered_it(willi: Willi):
    with willi.connect(source=TRUSTED) as client:
        assert b"XCLIENT ADDR HELO NAME PORT PROTO" in client.command(EHLO).lines
    with willi.connect() as client:
        assert not any(line.startswith(b"XCLIENT") for line in client.command(EHLO).lines)


def test_nobody_else_may(willi: Willi, upstream: ScriptedUpstream):
    with willi.connect(source="127.0.0.6") as client:
        lines = b"XCLIENT ADDR=192.0.2.7", EHLO, b"XCLIENT ADDR=192.0.2.7", b"XCLIENT bogus"
        assert [answer for answer in say(client, *lines) if answer[:3] != "250"] == [DENIED] * 3
        assert deliver(client) == QUEUED
    assert b"ADDR=127.0.0.6" in told_of(upstream)


def test_an_ipv6_client_and_xtext_are_understood(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, source=TRUSTED) as client:
        assert say(client, b"xclient addr=ipv6:2001:DB8:0::7 name=a+2Db.example") == [BANNER]
        say(client, EHLO)
        assert deliver(client) == QUEUED
    assert told_of(upstream).endswith(b" ADDR=IPV6:2001:db8::7")
    assert told_of(upstream).startswith(b"XCLIENT NAME=a-b.example ")


def test_it_may_be_said_again_and_for_each_client(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, source=TRUSTED) as client:
        for address in (b"192.0.2.7", b"192.0.2.8"):
            assert say(client, b"XCLIENT ADDR=" + address) == [BANNER]
            say(client, EHLO)
            assert deliver(client) == QUEUED
            assert told_of(upstream).endswith(b" ADDR=" + address)
    assert len(upstream.connections) == 2, "who was somebody else a minute ago has no kept connection"


def test_not_within_a_transaction(willi: Willi):
    with greeted(willi, source=TRUSTED) as client:
        assert say(client, MAIL, b"XCLIENT ADDR=192.0.2.7", BOB) == [
            SENDER_KEPT, "503 5.5.1 Bad sequence of commands", OK,
        ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        b"", b"ADDR", b"ADDR=", b"ADDR=x", b"ADDR=2001:db8::7", b"ADDR=IPV6:192.0.2.7", b"ADDR=999.0.2.7",
        b"PORT=65536", b"PORT=-1", b"PORT=x", b"LOGIN=ann", b"NAME=a+0Ab", b"NAME=a+FF", b"HELO=" + b"x" * 256,
        b"NAME=a+2 ADDR=192.0.2.7", b"ADDR=192.0.2.7 NAME=a+2", b"ADDR=192.0.2.7 HELO=a+2db", b"ADDR=192.0.2.7+",
        b"ADDR=192.0.2.7 ADDR=192.0.2.8", b"ADDR=192.0.2.7 NAME=a=b", b"ADDR=192.0.2.7 NAME=-a.example",
    ],
    ids=repr,
)  # fmt: skip
def test_a_bad_attribute_is_refused_and_changes_nothing(arguments: bytes, willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, source=TRUSTED) as client:
        assert say(client, b"XCLIENT " + arguments) == [BAD]
        assert deliver(client) == QUEUED
    assert told_of(upstream).endswith(b" ADDR=127.0.0.5")


NOTHING = b"XCLIENT NAME=[TEMPUNAVAIL] ADDR=[UNAVAILABLE] PORT=[UNAVAILABLE]"


def test_a_client_of_which_nothing_is_known_does_not_have_the_address_of_the_proxy(
    willi: Willi, upstream: ScriptedUpstream
):
    with greeted(willi, source=TRUSTED) as client:
        assert say(client, NOTHING) == [BANNER]
        say(client, EHLO)
        assert deliver(client) == QUEUED
    assert told_of(upstream) == b"XCLIENT NAME=[TEMPUNAVAIL] PORT=[UNAVAILABLE] ADDR=[UNAVAILABLE]"
    assert willi.wait_for_log(msg="Message accepted")["client"] == "unknown"


@pytest.mark.parametrize("setting", [{"xclient": "require"}, {"send_proxy": "v1"}, {"send_proxy": "v2"}], ids=str)
def test_a_client_of_which_nothing_is_known_is_deferred_where_its_address_must_be_told(
    setting: dict[str, str], start_willi: StartWilli, start_upstream: StartUpstream
):
    upstream = start_upstream(proxy="send_proxy" in setting)
    upstream.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR PORT")
    willi = start_willi(server=upstream.server, xclient_hosts=TRUSTED, **setting)
    willi.tolerate("the address of the client is not known")
    with greeted(willi, source=TRUSTED) as client:
        assert say(client, NOTHING) == [BANNER]
        say(client, EHLO)
        assert say(client, MAIL, BOB)[1].startswith("451 ")
    assert MAIL not in upstream.commands


@pytest.mark.parametrize("address", [b"IPV6:::ffff:192.0.2.7", b"IPV6:::FFFF:C000:207", b"192.0.2.7"])
def test_an_ipv4_client_is_one_however_its_address_is_written(address: bytes, willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, source=TRUSTED) as client:
        assert say(client, b"XCLIENT PORT=4711 ADDR=" + address) == [BANNER]
        say(client, EHLO)
        assert deliver(client) == QUEUED
    assert told_of(upstream).endswith(b" PORT=4711 ADDR=192.0.2.7")
    assert willi.wait_for_log(msg="Message accepted")["client"] == "192.0.2.7:4711"


def test_a_trusted_network_may_be_written_as_mapped_addresses(start_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR PORT")
    willi = start_willi(server=upstream.server, xclient_hosts="::ffff:127.0.0.5, ::ffff:127.0.1.0/120")
    for source in (TRUSTED, "127.0.1.9"):
        with greeted(willi, source=source) as client:
            assert say(client, b"XCLIENT ADDR=192.0.2.7") == [BANNER]
    with greeted(willi, source="127.0.0.6") as client:
        assert say(client, b"XCLIENT ADDR=192.0.2.7") == [DENIED]
