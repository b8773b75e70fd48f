"""A client whose messages go to several upstreams in turn: the connections of its last routes stay open."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.talk import (
    BOB,
    CARL,
    EHLO,
    GO_ON,
    MAIL,
    NO_ANSWER,
    OK,
    QUEUED,
    SENDER_KEPT,
    deliver,
    greeted,
    reply,
    say,
    two_domains,
    verbs,
)
from tests.support.upstream import EXTENSIONS, VERDICT, Close, Ended, Reset, ScriptedUpstream

BUSY = "421 4.3.2 idle for too long, goodbye"
RSET_DONE = "250 2.0.0 Ok"
MESSAGE = [b"MAIL", b"RCPT", b"DATA"]


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream) -> Willi:
    return share_willi(csv=two_domains(upstream, other), xclient_hosts="127.0.0.5")


def deliver_in_turn(client: Client, *recipients: bytes) -> None:
    for recipient in recipients:
        assert deliver(client, recipient) == QUEUED


def delivered(upstreams: Sequence[ScriptedUpstream]) -> list[list[int]]:
    """For each upstream: how many messages each of its connections had."""
    return [[len(connection.messages) for connection in upstream.connections] for upstream in upstreams]


def test_two_upstreams_in_turn_keep_one_connection_each(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL, BOB, CARL, BOB)
        say(client, b"QUIT")
    assert upstream.wait_for_ends() == other.wait_for_ends() == [Ended.QUIT]
    assert verbs(upstream.commands) == [b"EHLO", *MESSAGE * 3, b"QUIT"]
    assert verbs(other.commands) == [b"EHLO", *MESSAGE * 2, b"QUIT"]


def test_a_client_that_hangs_up_leaves_no_connection_behind(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL)
    assert upstream.wait_for_ends() == other.wait_for_ends() == [Ended.QUIT]


def test_one_for_a_client_at_a_time_if_the_setting_says_so(
    share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    willi = share_willi(csv=two_domains(upstream, other), kept_upstreams=1)
    with greeted(willi) as client:
        deliver_in_turn(client, BOB)
        deliver_in_turn(client, CARL)
        assert upstream.connection().wait_for_end() is Ended.QUIT
        deliver_in_turn(client, CARL, BOB)
        assert other.connection().wait_for_end() is Ended.QUIT
    assert delivered([upstream, other]) == [[1, 1], [2]]


def test_for_a_fifth_route_the_one_unused_longest_says_quit(share_willi: StartWilli, start_upstream: StartUpstream):
    upstreams = [start_upstream() for _ in range(5)]
    rows = "".join(f"d{number}.example;{one.server};false\n" for number, one in enumerate(upstreams))
    willi = share_willi(csv=f"pattern;server;tls_verify\n{rows}")
    to = [b"RCPT TO:<ann@d%d.example>" % number for number in range(5)]
    with greeted(willi) as client:
        deliver_in_turn(client, *to[:4], to[0], to[4])
        assert upstreams[1].connection().wait_for_end() is Ended.QUIT
        deliver_in_turn(client, to[0], to[2], to[3], to[4], to[1])
        assert upstreams[0].connection().wait_for_end() is Ended.QUIT
        deliver_in_turn(client, *to[1:])
    assert delivered(upstreams) == [[3], [1, 2], [3], [3], [3]]


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["closed", "reset"])
def test_one_that_dies_meanwhile_is_replaced_silently(
    end: Close | Reset, willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL)
        upstream.answers[b"MAIL"] = [end]
        deliver_in_turn(client, BOB, CARL, BOB)
    assert delivered([upstream, other]) == [[1, 2], [2]]


def test_one_whose_server_was_restarted_meanwhile_is_replaced_silently(
    start_willi: StartWilli, start_upstream: StartUpstream, other: ScriptedUpstream
):
    before = start_upstream()
    willi = start_willi(csv=two_domains(before, other))
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL)
        before.stop()
        after = start_upstream(port=before.port)
        deliver_in_turn(client, BOB, CARL)
    assert delivered([before, after, other]) == [[1], [1], [2]]


@pytest.mark.parametrize("left", ["nothing", "RSET to say"])
def test_the_goodbye_of_one_is_no_answer_to_the_next_message(
    left: str, willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    """It has said 421 while another one was in use."""
    with greeted(willi) as client:
        if left == "nothing":
            upstream.answers[VERDICT] = [reply(QUEUED).octets + reply(BUSY).octets]
            deliver_in_turn(client, BOB)
        else:
            upstream.answers[b"RCPT"] = [reply(OK).octets + reply(BUSY).octets]
            assert say(client, MAIL, BOB, b"RSET") == [SENDER_KEPT, OK, RSET_DONE]
        deliver_in_turn(client, CARL, BOB, CARL)
    assert delivered([upstream, other]) == [[int(left == "nothing"), 1], [2]]


def test_a_421_to_mail_on_one_that_was_kept_is_not_passed_on(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    upstream.answers[b"MAIL"] = [reply(OK), reply(BUSY)]
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL, BOB, CARL)
    assert delivered([upstream, other]) == [[1, 1], [2]]


def test_what_an_abandoned_transaction_left_is_reset_when_its_route_comes_again(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"RSET") == [SENDER_KEPT, OK, RSET_DONE]
        deliver_in_turn(client, CARL, BOB)
    assert verbs(upstream.connection().commands)[:4] == [b"EHLO", b"MAIL", b"RCPT", b"RSET"]
    assert upstream.wait_for_message().recipients == (b"bob@b.example",)
    assert verbs(other.connection().commands)[:4] == [b"EHLO", *MESSAGE]


def test_an_unfinished_message_ends_its_own_connection_without_quit(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        deliver_in_turn(client, BOB)
        assert say(client, MAIL, CARL, b"DATA")[-1] == GO_ON
        client.send(b"half a message\r\n")
    assert other.connection().wait_for_end() in (Ended.EOF, Ended.RESET)
    assert len(other.connections) == 1
    assert upstream.wait_for_ends() == [Ended.QUIT]
    assert other.messages == []


def test_an_upstream_that_fails_costs_no_connection_but_its_own(
    start_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    willi = start_willi(csv=two_domains(upstream, other))
    willi.tolerate("Upstream failed")
    with greeted(willi) as client:
        deliver_in_turn(client, BOB)
        other.stop()
        assert say(client, MAIL, CARL, b"RSET") == [SENDER_KEPT, NO_ANSWER, RSET_DONE]
        deliver_in_turn(client, BOB)
    assert delivered([upstream]) == [[2]]


@pytest.mark.parametrize("line", [EHLO, b"XCLIENT ADDR=192.0.2.7"], ids=["EHLO", "XCLIENT"])
def test_no_connection_outlives_who_the_client_was(
    line: bytes, willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi, source="127.0.0.5") as client:
        deliver_in_turn(client, BOB, CARL)
        assert client.command(line).code in (220, 250)
        assert upstream.connection().wait_for_end() is other.connection().wait_for_end() is Ended.QUIT
        say(client, EHLO)
        deliver_in_turn(client, BOB, CARL)
    assert delivered([upstream, other]) == [[1, 1], [1, 1]]


def test_each_client_that_a_proxy_speaks_for_has_connections_of_its_own(
    share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    for one in (upstream, other):
        one.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR PORT")
    willi = share_willi(csv=two_domains(upstream, other), xclient_hosts="127.0.0.5")
    with greeted(willi, source="127.0.0.5") as client:
        for address in (b"192.0.2.7", b"192.0.2.8"):
            assert client.command(b"XCLIENT ADDR=" + address).code == 220
            say(client, EHLO)
            deliver_in_turn(client, BOB, CARL, BOB)
    for one in (upstream, other):
        lines = [line for line in one.commands if line.startswith(b"XCLIENT")]
        assert [line.rpartition(b"=")[2] for line in lines] == [b"192.0.2.7", b"192.0.2.8"]
    assert delivered([upstream, other]) == [[2, 2], [1, 1]]


def test_tls_routes_keep_their_connections_too_and_starttls_of_the_client_ends_those_in_clear(
    share_willi: StartWilli, start_upstream: StartUpstream, certificates: Authority
):
    """And one server with two kinds of verification is two routes: what was not verified serves no other."""
    pair = certificates.issue("willi.example", "127.0.0.1")
    upstream, other = (start_upstream(tls=pair.server_context()) for _ in range(2))
    rows = f"b.example;{upstream.server};true\nc.example;{other.server};false\nd.example;{upstream.server};false\n"
    willi = share_willi(
        csv=f"pattern;server;tls_verify\n{rows}",
        tls_cert=pair.cert, tls_key=pair.key, upstream_tls_ca=str(certificates.ca),
    )  # fmt: skip
    dan = b"RCPT TO:<dan@d.example>"
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL, dan)
        client.starttls()
        assert {*upstream.wait_for_ends(), *other.wait_for_ends()} == {Ended.QUIT}
        say(client, EHLO)
        deliver_in_turn(client, BOB, CARL, dan, BOB, CARL, dan)
    assert [[connection.tls for connection in one.connections] for one in (upstream, other)] == [
        [False, False, True, True], [False, True],
    ]  # fmt: skip
    assert delivered([upstream, other]) == [[1, 1, 2, 2], [1, 2]]
    assert {*upstream.wait_for_ends(), *other.wait_for_ends()} == {Ended.QUIT}


def test_a_drain_says_quit_to_all(start_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream):
    willi = start_willi(csv=two_domains(upstream, other))
    with greeted(willi) as client:
        deliver_in_turn(client, BOB, CARL)
        willi.signal(signal.SIGTERM)
        assert client.read_reply().code == 421
        assert upstream.wait_for_ends() == other.wait_for_ends() == [Ended.QUIT]
