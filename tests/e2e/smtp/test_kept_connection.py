"""The upstream connection stays for the client's next message, if that has the same route."""

from __future__ import annotations

from time import monotonic

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import PATIENCE, wait_until
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
    content,
    deliver,
    greeted,
    reply,
    say,
    say_together,
    two_domains,
    verbs,
)
from tests.support.upstream import VERDICT, Close, Ended, Hold, Reset, ScriptedUpstream, Silence

CLIENT = "127.0.0.3"
BUSY = "421 4.3.2 too many messages, goodbye"


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream) -> Willi:
    return share_willi(csv=two_domains(upstream, other))


def test_a_second_message_of_the_same_route_takes_the_same_connection(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client) == deliver(client) == QUEUED
        assert str(client.command(b"QUIT")) == "221 2.0.0 Bye"
    assert upstream.wait_for_ends() == [Ended.QUIT]
    once = [b"MAIL", b"RCPT", b"DATA"]
    assert verbs(upstream.commands) == [b"EHLO", *once, *once, b"QUIT"]


def test_a_new_ehlo_ends_the_kept_connection(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        client.command(EHLO)
        assert upstream.connection().wait_for_end() is Ended.QUIT
        assert deliver(client) == QUEUED
    assert upstream.wait_for_ends() == [Ended.QUIT, Ended.QUIT]


def test_what_an_abandoned_transaction_left_upstream_is_reset(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"RSET") == [SENDER_KEPT, OK, "250 2.0.0 Ok"]
        assert deliver(client, b"RCPT TO:<ben@b.example>") == QUEUED
    assert upstream.wait_for_message().recipients == (b"ben@b.example",)
    assert verbs(upstream.connection().commands)[:5] == [b"EHLO", b"MAIL", b"RCPT", b"RSET", b"MAIL"]
    assert upstream.wait_for_ends() == [Ended.QUIT]


@pytest.mark.parametrize("refusal", ["550 5.7.1 not this one", "451 4.7.1 not now"])
def test_a_refused_message_is_reset_before_the_next_one(refusal: str, willi: Willi, upstream: ScriptedUpstream):
    """Postfix forgets nothing of a message that smtpd_end_of_data_restrictions has refused."""
    upstream.answers[VERDICT] = reply(refusal)
    with greeted(willi) as client:
        assert deliver(client) == refusal
        del upstream.answers[VERDICT]
        assert deliver(client) == deliver(client) == QUEUED
    once = [b"MAIL", b"RCPT", b"DATA"]
    upstream.wait_for_ends()
    assert verbs(upstream.commands) == [b"EHLO", *once, b"RSET", *once, *once, b"QUIT"]


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["closed", "reset"])
def test_a_kept_connection_that_was_closed_meanwhile_is_replaced_silently(
    end: Close | Reset, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[b"MAIL"] = [reply(OK), end]
    with greeted(willi) as client:
        assert deliver(client) == deliver(client) == QUEUED
    assert len(upstream.connections) == 2
    assert len(upstream.messages) == 2


def test_an_upstream_that_restarts_between_two_messages_is_not_noticed(
    start_willi: StartWilli, start_upstream: StartUpstream
):
    before = start_upstream()
    willi = start_willi(server=before.server)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        before.stop()
        after = start_upstream(port=before.port)
        assert deliver(client) == QUEUED
    assert len(after.messages) == 1


@pytest.mark.parametrize("verb", [b"MAIL", b"RSET"], ids=bytes.decode)
def test_a_kept_connection_that_answers_421_is_replaced_silently(verb: bytes, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[verb] = [reply(OK), reply(BUSY)] if verb == b"MAIL" else [reply(BUSY)]
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB, b"RSET") == [SENDER_KEPT, OK, "250 2.0.0 Ok"]
        assert say_together(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, OK, GO_ON]
        assert content(client) == QUEUED
    assert [len(connection.messages) for connection in upstream.connections] == [0, 1]


def test_a_421_said_between_two_messages_is_not_taken_for_an_answer(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[VERDICT] = [reply(QUEUED).octets + reply(BUSY).octets]
    with greeted(willi) as client:
        assert deliver(client) == deliver(client) == QUEUED
    assert [len(connection.messages) for connection in upstream.connections] == [1, 1]


def test_the_connection_is_replaced_only_once(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"MAIL"] = [reply(OK), reply(BUSY), reply(BUSY)]
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        assert say(client, MAIL, BOB) == [SENDER_KEPT, BUSY]
        client.expect_eof()
    assert len(upstream.connections) == 2


def test_a_kept_connection_is_not_replaced_once_mail_was_accepted(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT"] = [reply(OK), reply(BUSY)]
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        assert say(client, MAIL, BOB) == [SENDER_KEPT, BUSY]
        client.expect_eof()
    assert len(upstream.connections) == 1


@pytest.mark.parametrize("verb", [b"MAIL", b"RSET"], ids=bytes.decode)
def test_a_kept_connection_that_stays_silent_is_replaced_after_connect_timeout(
    verb: bytes, share_willi: StartWilli, upstream: ScriptedUpstream
):
    """A firewall that forgets a connection tells neither end of it."""
    willi = share_willi(server=upstream.server, connect_timeout="1s")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        if verb == b"RSET":
            assert say(client, MAIL, BOB, b"RSET") == [SENDER_KEPT, OK, "250 2.0.0 Ok"]
        upstream.answers[verb] = [Silence()]
        assert deliver(client) == QUEUED
    assert len(upstream.connections) == 2


def test_a_kept_connection_and_the_new_one_that_stay_silent_cost_one_upstream_timeout(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    upstream.answers[b"MAIL"] = [reply(OK), Silence(), Silence()]
    willi = start_willi(server=upstream.server, connect_timeout="1s", upstream_timeout="3s")
    willi.tolerate("asking the upstream")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        began = monotonic()
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
        assert monotonic() - began >= 3
    assert len(upstream.connections) == 2


def test_another_connection_of_the_same_client_has_its_own_upstream_connection(
    willi: Willi, upstream: ScriptedUpstream
):
    with greeted(willi) as one, greeted(willi) as two:
        assert say(one, MAIL, BOB) == say(two, MAIL, BOB) == [SENDER_KEPT, OK]
        assert str(one.command(b"DATA")) == str(two.command(b"DATA")) == GO_ON
        assert content(two, b"two\r\n") == content(one, b"one\r\n") == QUEUED
    assert [connection.messages[0].content for connection in upstream.connections] == [b"one\r\n", b"two\r\n"]


def test_no_client_waits_for_the_answer_to_quit(
    start_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    """Neither for the next route, nor to be counted out: three waits of some seconds each time would be noticed."""
    held = upstream.answers[b"QUIT"] = other.answers[b"QUIT"] = Hold()
    willi = start_willi(csv=two_domains(upstream, other), max_connections_per_ip=1)
    took = []
    for _ in range(3):
        began = monotonic()
        with wait_until(lambda: let_in(willi), "room for one more connection") as client:
            assert client.command(EHLO).code == 250
            assert [deliver(client, who) for who in (BOB, CARL, BOB)] == [QUEUED] * 3
            assert str(client.command(b"QUIT")) == "221 2.0.0 Bye"
            client.expect_eof()
        took.append(monotonic() - began)
    assert min(took) < 6, "a machine that stands still for a moment does not do so three times"
    assert held.reached.wait(PATIENCE)
    held.release()
    assert {*upstream.wait_for_ends(), *other.wait_for_ends()} == {Ended.QUIT}


def let_in(willi: Willi) -> Client | None:
    """A client that has read its 220; None: it was refused."""
    client = willi.connect(source=CLIENT, greeting=False)
    if client.read_reply().code == 220:
        return client
    client.close()
    return None


@pytest.mark.parametrize("answer", [Silence(), Close(), reply("500 5.5.1 what?")], ids=["silence", "close", "500"])
def test_how_the_upstream_takes_quit_is_of_no_interest(
    answer: Silence | Close, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[b"QUIT"] = answer
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        assert str(client.command(b"QUIT")) == "221 2.0.0 Bye"
        client.expect_eof()
