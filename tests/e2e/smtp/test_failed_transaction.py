"""An upstream that fails makes a transaction failed, not forgotten: 451 until it is given up, never 503."""

from __future__ import annotations

import pytest

from tests.conftest import StartWilli
from tests.support.daemon import Willi
from tests.support.loopback import HOST, free_port
from tests.support.talk import (
    BEN,
    BOB,
    CARL,
    EHLO,
    GO_ON,
    LOST,
    MAIL,
    NO_ANSWER,
    OK,
    QUEUED,
    SENDER_KEPT,
    chunk,
    content,
    deliver,
    greeted,
    reply,
    say,
    say_together,
    two_domains,
)
from tests.support.upstream import Close, Ended, Reset, ScriptedUpstream, Silence

BUSY = "421 4.3.2 shutting down / 4.3.2 come again"


@pytest.fixture
def willi(
    request: pytest.FixtureRequest, share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> Willi:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    is_silent = isinstance(parameters.get("death"), Silence)  # all others have the time that they need
    willi = share_willi(csv=two_domains(upstream, other), upstream_timeout="1s" if is_silent else "60s")
    willi.tolerate(upstream.server)
    return willi


def test_without_an_upstream_every_further_command_of_the_group_gets_451(willi: Willi, upstream: ScriptedUpstream):
    upstream.stop()
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, BEN, b"DATA", b"NOOP")
        assert heard == [SENDER_KEPT, NO_ANSWER, NO_ANSWER, LOST, "250 2.0.0 Ok"]
        assert say(client, BEN, b"DATA") == [NO_ANSWER, LOST]
        assert chunk(client, b"QUIT\r\n", last=True) == LOST
        assert chunk(client, b"QUIT\r\n") == LOST
        assert str(client.command(b"NOOP")) == "250 2.0.0 Ok"


@pytest.mark.parametrize("death", [Close(), Reset(), b"garbage\r\n", b"999 what\r\n", Silence()], ids=str)
@pytest.mark.parametrize("step", [b"MAIL", b"RCPT"], ids=bytes.decode)
def test_an_upstream_that_dies_before_any_recipient_is_not_asked_again(
    death: Close | Reset | bytes | Silence, step: bytes, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[step] = [death]
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, NO_ANSWER, NO_ANSWER, LOST]
        assert say(client, BOB, b"DATA") == [NO_ANSWER, LOST]
    upstream.wait_for_ends()
    assert len(upstream.connections) == 1


@pytest.mark.parametrize("death", [Close(), Reset(), b"garbage\r\n", Silence()], ids=str)
def test_an_upstream_that_dies_after_a_recipient_was_accepted_costs_the_whole_transaction(
    death: Close | Reset | bytes | Silence, willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    upstream.answers[BEN] = [death]
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, BEN, CARL, BOB, b"DATA")
        assert heard == [SENDER_KEPT, OK, LOST, LOST, LOST, LOST]
        assert chunk(client, b"QUIT\r\n", last=True) == LOST
    assert upstream.messages == []
    assert other.connections == []


@pytest.mark.parametrize("death", [Close(), Reset(), reply("250 2.0.0 ok"), reply("355 go on"), b"x\r\n"], ids=str)
def test_an_upstream_that_dies_at_data_costs_the_whole_transaction(
    death: Close | Reset | bytes, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[b"DATA"] = [death]
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA", b"DATA", BEN) == [SENDER_KEPT, OK, LOST, LOST, LOST]
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
        assert deliver(client) == QUEUED
    line = willi.lines(msg="Message rejected", reply=LOST, to="bob@b.example")[0]
    assert line["error"].startswith(upstream.server)
    assert upstream.wait_for_ends()[1:] == [Ended.QUIT]


@pytest.mark.parametrize("way_out", [b"RSET", MAIL, EHLO, b"HELO c.example"], ids=lambda line: line[:4].decode())
def test_a_failed_transaction_ends_with(way_out: bytes, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT"] = [Close()]
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, BOB) == [SENDER_KEPT, NO_ANSWER, NO_ANSWER]
        assert client.command(way_out).code == 250
        if way_out != MAIL:
            assert str(client.command(MAIL)) == SENDER_KEPT
        assert say(client, BOB, b"DATA") == [OK, GO_ON]
        assert content(client) == QUEUED
    assert len(upstream.connections) == 2


def test_while_none_is_accepted_another_route_may_be_tried(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    upstream.stop()
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB, CARL, b"DATA") == [SENDER_KEPT, NO_ANSWER, OK, GO_ON]
        assert content(client) == QUEUED
    assert other.wait_for_message().recipients == (b"carl@c.example",)


def test_a_recipient_whose_own_upstream_failed_is_not_asked_of_another(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    upstream.stop()
    other.answers[CARL] = reply("550 5.1.1 no carl here")
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, CARL, BEN, b"DATA")
        assert heard == [SENDER_KEPT, NO_ANSWER, "550 5.1.1 no carl here", NO_ANSWER, LOST]
    other.wait_for_ends()
    assert BEN not in other.commands


def test_both_routes_may_fail(willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream):
    upstream.stop()
    other.stop()
    willi.tolerate(other.server)
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, CARL, b"RCPT TO:<eve@e.example>", b"DATA")
        assert heard == [SENDER_KEPT, NO_ANSWER, NO_ANSWER, "554 5.7.1 Relay access denied", LOST]


@pytest.mark.parametrize("step", [b"MAIL", b"RCPT", b"DATA"], ids=bytes.decode)
@pytest.mark.parametrize("then", ["closes", "stays"])
@pytest.mark.parametrize("together", [True, False], ids=["pipelined", "one by one"])
def test_a_421_inside_a_transaction_is_passed_on_and_willi_hangs_up(
    step: bytes, then: str, together: bool, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[step] = [reply(BUSY)]
    if then == "closes":
        following = {b"MAIL": b"RCPT", b"RCPT": b"DATA", b"DATA": b"QUIT"}[step]
        upstream.answers[following] = [Close()]
    lines = [MAIL, BOB, b"DATA"]
    with greeted(willi) as client:
        if together:
            client.send(b"".join(line + b"\r\n" for line in lines))
        heard = [SENDER_KEPT, OK] if step == b"DATA" else [SENDER_KEPT]
        for number, answer in enumerate([*heard, BUSY]):
            if not together:
                client.send(lines[number] + b"\r\n")
            assert str(client.read_reply()) == answer
        client.expect_eof()
    assert upstream.messages == []


def test_a_421_as_the_verdict_is_passed_on_and_willi_hangs_up(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"."] = reply(BUSY)
    with greeted(willi) as client:
        assert deliver(client) == BUSY
        client.expect_eof()


def test_nothing_that_was_pipelined_is_done_after_a_421(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[MAIL] = reply(BUSY)
    with greeted(willi) as client:
        client.send(b"\r\n".join((MAIL, BOB, b"RSET", b"MAIL FROM:<eve@a.example>", BOB, b"DATA", b"")))
        assert [str(client.read_reply()) for _ in range(2)] == [SENDER_KEPT, BUSY]
        client.expect_eof()
    assert b"MAIL FROM:<eve@a.example>" not in upstream.commands


def test_nothing_more_is_awaited_after_a_421(start_willi: StartWilli, upstream: ScriptedUpstream):
    """Nor are the answers to what was sent in one group with MAIL."""
    upstream.answers[MAIL] = reply(BUSY)
    upstream.answers[BOB] = Silence()
    with greeted(start_willi(server=upstream.server)) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, BUSY]
        client.expect_eof()


def test_an_upstream_that_cannot_be_reached_is_logged_with_what_was_wrong(start_willi: StartWilli):
    port = free_port()
    willi = start_willi(server=f"{HOST}:{port}")
    willi.tolerate("Connection refused")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    line = willi.wait_for_log(msg="Upstream failed", lvl="error")
    assert line["error"] == f"{HOST}:{port}: Connection refused"


def test_after_the_end_of_a_message_for_nobody_no_recipient_joins_it(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    """The MAIL between them may have been refused or garbled."""
    upstream.stop()
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
        assert chunk(client, b"hello", last=True) == LOST
        assert say(client, CARL, b"DATA") == [LOST, LOST]
        assert chunk(client, b"hello", last=True) == LOST
        assert deliver(client, CARL) == QUEUED
    assert len(other.messages) == 1


def test_no_recipient_behind_a_refused_mail_has_the_sender_of_the_failed_transaction(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    upstream.stop()
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, b"MAIL FROM:<ben@a.example> WHAT=1", CARL, b"DATA")
        no_mail = "503 5.5.1 Need MAIL command"
        assert heard == [SENDER_KEPT, NO_ANSWER, "555 5.5.4 MAIL or RCPT parameter not recognized", no_mail, no_mail]
        assert deliver(client, CARL) == QUEUED
    assert len(other.messages) == 1
