"""Promise 4: a recipient that was told 250 was told 250 by its upstream in this transaction."""

from __future__ import annotations

import pytest

from tests.conftest import StartPostfix, StartUpstream, StartWilli
from tests.support.daemon import Willi
from tests.support.promise import greeted, in_envelope, meet, rcpt
from tests.support.raw import RawUpstream
from tests.support.talk import (
    BEN,
    BOB,
    GO_ON,
    LOST,
    MAIL,
    OK,
    QUEUED,
    SENDER_KEPT,
    chunk,
    content,
    deliver,
    say,
    say_together,
    two_domains,
)
from tests.support.upstream import Close, Reset, ScriptedUpstream
from willi_lib.smtp.reply import Reply

NO_VALID_RECIPIENTS = "554 5.5.1 No valid recipients"
NO_RECIPIENTS_YET = "451 4.5.1 No valid recipients, try again"
UNKNOWN = Reply(550, (b"5.1.1 unknown",))
GREYLISTED = Reply(450, (b"4.7.1 greylisted",))


@pytest.mark.parametrize("pipelining", [True, False], ids=["PIPELINING", "one by one"])
def test_each_recipient_of_a_group_gets_its_own_answer(pipelining: bool, willi: Willi, upstream: ScriptedUpstream):
    if not pipelining:
        upstream.extensions = ()
    names = [f"{number}@b.example" for number in range(60)]
    for name in names[::3]:
        upstream.answers[rcpt(name)] = UNKNOWN
    for name in names[1::3]:
        upstream.answers[rcpt(name)] = GREYLISTED
    client = greeted(willi)
    expected = [str(UNKNOWN), str(GREYLISTED), OK] * 20
    assert say_together(client, MAIL, *map(rcpt, names), b"DATA") == [SENDER_KEPT, *expected, GO_ON]
    assert content(client) == QUEUED
    [message] = upstream.messages
    assert message.recipients == tuple(name.encode() for name in names[2::3])


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_answers_match_wherever_the_group_is_cut(size: int, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BEN] = UNKNOWN
    group = b"".join(line + b"\r\n" for line in (MAIL, BEN, BOB, BEN, BOB, BEN, b"RSET", MAIL, BEN, BOB, b"DATA"))
    client = greeted(willi)
    for position in range(0, len(group), size):
        client.send(group[position : position + size])
    no, yes = str(UNKNOWN), OK
    expected = [SENDER_KEPT, no, yes, no, yes, no, "250 2.0.0 Ok", SENDER_KEPT, no, yes, GO_ON]
    assert [str(client.read_reply()) for _ in expected] == expected
    assert content(client) == QUEUED
    assert upstream.messages[0].recipients == (b"bob@b.example",)


def test_a_reset_forgets_the_recipients_of_before(willi: Willi, upstream: ScriptedUpstream):
    client = in_envelope(willi)
    upstream.answers[BOB] = UNKNOWN
    assert say(client, b"RSET", MAIL, BOB, BEN, b"DATA") == ["250 2.0.0 Ok", SENDER_KEPT, str(UNKNOWN), OK, GO_ON]
    assert content(client) == QUEUED
    assert upstream.messages[0].recipients == (b"ben@b.example",)


@pytest.mark.parametrize("start_over", [b"RSET", b"EHLO d.example", b"HELO d.example"])
def test_what_was_told_before_does_not_hold_for_the_next_transaction(
    start_over: bytes, willi: Willi, upstream: ScriptedUpstream
):
    client = in_envelope(willi)
    assert client.command(start_over).code == 250
    assert say(client, b"DATA") == ["503 5.5.1 Need MAIL command"]
    assert say(client, MAIL, b"DATA") == [SENDER_KEPT, "503 5.5.1 Need RCPT command"]
    assert chunk(client, b"x\r\n", last=True) == "503 5.5.1 Need RCPT command"
    assert upstream.messages == []


@pytest.mark.parametrize("answer", [UNKNOWN, GREYLISTED], ids=str)
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT"])
def test_no_message_goes_to_nobody(verb: bytes, answer: Reply, willi: Willi, upstream: ScriptedUpstream):
    """Also if this upstream says 354 without a single recipient."""
    upstream.answers[b"RCPT"] = answer
    upstream.answers[b"DATA"] = Reply(354, (b"go on",))
    nobody = NO_VALID_RECIPIENTS if answer.permanent else NO_RECIPIENTS_YET
    client = greeted(willi)
    assert say(client, MAIL, BOB, BEN) == [SENDER_KEPT, str(answer), str(answer)]
    if verb == b"DATA":
        assert say(client, b"DATA") == [nobody]
    else:
        assert chunk(client, b"QUIT\r\n", last=True) == nobody
    assert say_together(client, b"RSET", MAIL, BOB, BEN, b"DATA") == [
        "250 2.0.0 Ok", SENDER_KEPT, str(answer), str(answer), nobody
    ]  # fmt: skip
    upstream.answers.clear()
    assert say(client, b"RSET") == ["250 2.0.0 Ok"]
    assert deliver(client) == QUEUED
    assert [message.recipients for message in upstream.messages] == [(b"bob@b.example",)]


@pytest.mark.parametrize("death", [Close(), Reset(), Reply(421, (b"4.3.2 bye",))], ids=str)
def test_a_kept_connection_that_is_gone_has_accepted_nobody(
    death: Close | Reset | Reply, willi: Willi, upstream: ScriptedUpstream
):
    """The new connection is asked for every recipient, and its answers count."""
    client = greeted(willi)
    assert deliver(client, BOB, BEN) == QUEUED
    upstream.answers[b"MAIL"] = [death]
    upstream.answers[BEN] = UNKNOWN
    assert say_together(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, OK, str(UNKNOWN), GO_ON]
    assert content(client) == QUEUED
    assert [message.recipients for message in upstream.messages] == [
        (b"bob@b.example", b"ben@b.example"), (b"bob@b.example",)
    ]  # fmt: skip


@pytest.mark.parametrize("death", [Close(), Reset()], ids=str)
def test_recipients_of_a_lost_connection_are_not_taken_to_another(
    death: Close | Reset, willi: Willi, upstream: ScriptedUpstream
):
    willi.tolerate("Upstream failed")
    client = in_envelope(willi)
    upstream.answers[BEN] = [death]
    assert say(client, BEN, b"RCPT TO:<tom@b.example>", b"DATA") == [LOST] * 3
    assert chunk(client, b"QUIT\r\n", last=True) == LOST
    assert len(upstream.connections) == 1
    assert upstream.messages == []


def test_an_answer_out_of_turn_is_nobodys_250(willi: Willi, share_willi: StartWilli, raw: RawUpstream):
    """Else the second recipient would get the surplus 250, and his own refusal would be the answer to DATA."""
    willi = share_willi(server=raw.server)
    willi.tolerate("spoke out of turn")
    client, peer = meet(willi, raw)
    peer.send(b"250 2.1.5 once more\r\n")
    assert say(client, BEN, b"DATA") == [LOST, LOST]
    assert peer.read_until_dropped() == b""


def test_the_upstreams_goodbye_between_two_recipients_is_passed_on(share_willi: StartWilli, raw: RawUpstream):
    willi = share_willi(server=raw.server)
    client, peer = meet(willi, raw)
    peer.send(b"421 4.4.2 too slow\r\n")
    peer.close()
    assert say(client, BEN) == ["421 4.4.2 too slow"]
    client.expect_eof()


def test_one_reply_in_three_pieces_is_one_reply(share_willi: StartWilli, raw: RawUpstream):
    willi = share_willi(server=raw.server)
    client, peer = meet(willi, raw, b"PIPELINING")
    client.send(BEN + b"\r\nRCPT TO:<tom@b.example>\r\n")
    peer.answer(b"RCPT", b"250-2.1.5 ")
    peer.answer(b"RCPT", b"o")
    peer.send(b"k\r\n250 2.1.5 ok\r\n550 5.1.1 no\r\n")
    assert [str(client.read_reply()) for _ in range(2)] == ["250 2.1.5 ok / 2.1.5 ok", "550 5.1.1 no"]


def test_each_transaction_asks_its_own_upstream(start_willi: StartWilli, start_upstream: StartUpstream):
    first, second = start_upstream(), start_upstream()
    second.answers[b"RCPT"] = UNKNOWN
    willi = start_willi(csv=two_domains(first, second))
    client = greeted(willi)
    for _ in range(3):
        assert deliver(client) == QUEUED
        assert say(client, MAIL, b"RCPT TO:<bob@c.example>", b"DATA") == [
            SENDER_KEPT, str(UNKNOWN), NO_VALID_RECIPIENTS
        ]  # fmt: skip
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
    assert len(first.messages) == 3
    assert second.messages == []


def test_deferred_recipients_are_not_told_250(start_willi: StartWilli, start_upstream: StartUpstream):
    first, second = start_upstream(), start_upstream()
    willi = start_willi(csv=two_domains(first, second), mixed_recipients="defer")
    client = greeted(willi)
    group = (MAIL, BOB, b"RCPT TO:<bob@c.example>", b"RCPT TO:<bob@d.example>", BEN, b"DATA")
    assert say_together(client, *group) == [
        SENDER_KEPT, OK, "451 4.3.0 Different destination, please send separately",
        "554 5.7.1 Relay access denied", OK, GO_ON,
    ]  # fmt: skip
    assert content(client) == QUEUED
    assert first.messages[0].recipients == (b"bob@b.example", b"ben@b.example")
    assert second.connections == []


def test_a_recipient_too_many_is_not_told_250(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_recipients=3)
    upstream.answers[rcpt("0@b.example")] = UNKNOWN
    client = greeted(willi)
    group = [rcpt(f"{number}@b.example") for number in range(6)]
    assert say_together(client, MAIL, *group, b"DATA") == [
        SENDER_KEPT, str(UNKNOWN), OK, OK, OK, *["452 4.5.3 Too many recipients"] * 2, GO_ON
    ]  # fmt: skip
    assert content(client) == QUEUED
    assert upstream.messages[0].recipients == (b"1@b.example", b"2@b.example", b"3@b.example")


def test_postfix_delivers_to_those_who_were_told_250_and_to_nobody_else(
    start_willi: StartWilli, start_postfix: StartPostfix
):
    postfix = start_postfix(domains=("b.example",), settings={"mynetworks": "192.0.2.1"})
    willi = start_willi(server=postfix.server)
    names = ["1@b.example", "2@nowhere.example", "3@b.example", "4@nowhere.example"]
    with greeted(willi) as client:
        replies = client.commands(MAIL, *map(rcpt, names), b"DATA")
        assert [reply.code for reply in replies] == [250, 250, 454, 250, 454, 354]
        assert str(replies[2]) == "454 4.7.1 <2@nowhere.example>: Relay access denied"
        assert content(client).startswith("250 2.0.0 Ok: queued as ")
    for name in (names[0], names[2]):
        postfix.wait_for_message(name)
    assert len(postfix.stored()) == 2
    assert postfix.queue() == []
