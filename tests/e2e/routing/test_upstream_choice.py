"""The upstream is that of the first recipient, and what it says is what the client hears."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import StartWilli
from tests.support.daemon import Willi
from tests.support.talk import (
    BEN,
    BOB,
    CARL,
    GO_ON,
    MAIL,
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
from tests.support.upstream import Ended, ScriptedUpstream

UNMAPPED = b"RCPT TO:<eve@e.example>"
NO_ROUTE = "554 5.7.1 Relay access denied"


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream) -> Willi:
    return share_willi(csv=two_domains(upstream, other))


def test_the_first_recipient_chooses_the_upstream(willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client, CARL) == QUEUED
    assert other.wait_for_message().recipients == (b"carl@c.example",)
    assert upstream.connections == []


def test_later_recipients_go_where_the_first_one_went(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        assert deliver(client, BOB, CARL, UNMAPPED) == QUEUED
    assert upstream.wait_for_message().recipients == (b"bob@b.example", b"carl@c.example", b"eve@e.example")
    assert other.connections == []


def test_a_recipient_without_a_mapping_does_not_choose(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL, UNMAPPED, BOB, b"DATA") == [SENDER_KEPT, NO_ROUTE, OK, GO_ON]
        assert content(client) == QUEUED
    assert upstream.wait_for_message().recipients == (b"bob@b.example",)


def test_no_upstream_hears_of_a_message_without_a_mapping(
    willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        lines = MAIL, UNMAPPED, UNMAPPED, b"DATA", b"RSET", MAIL, b"DATA"
        nobody, nothing = "554 5.5.1 No valid recipients", "503 5.5.1 Need RCPT command"
        expected = [SENDER_KEPT, NO_ROUTE, NO_ROUTE, nobody, "250 2.0.0 Ok", SENDER_KEPT, nothing]
        assert say(client, *lines) == expected
    assert upstream.connections == other.connections == []


@pytest.mark.parametrize(
    "answer", ["550 5.7.1 go away / 5.7.1 and stay there", "451 4.7.1 greylisted", "452 4.3.1 full", "550"]
)
def test_a_refusal_of_mail_is_the_answer_to_rcpt_word_for_word(answer: str, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"MAIL"] = reply(answer)
    refusal = str(reply(answer))
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, BEN) == [SENDER_KEPT, refusal, refusal]
        nobody = "554 5.5.1 No valid recipients" if answer[0] == "5" else "451 4.5.1 No valid recipients, try again"
        assert say_together(client, BOB, BEN, b"DATA") == [refusal, refusal, nobody]
    upstream.wait_for_ends()
    assert upstream.commands.count(MAIL) == 1
    assert upstream.messages == []


def test_a_refused_mail_is_never_followed_by_a_recipient(willi: Willi, upstream: ScriptedUpstream):
    """What was sent along with MAIL in one group excepted: a PIPELINING upstream refuses that itself."""
    upstream.answers[MAIL] = reply("550 5.7.1 not you")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "550 5.7.1 not you"]
        assert say_together(client, BEN, BOB, b"DATA", b"NOOP")[3] == "250 2.0.0 Ok"
        lines = b"RSET", b"MAIL FROM:<eve@a.example>", BOB, b"DATA"
        assert say(client, *lines) == ["250 2.0.0 Ok", SENDER_KEPT, OK, GO_ON]
        assert content(client) == QUEUED
        heard = list(upstream.connection().commands)  # before it hears QUIT
    [message] = upstream.messages
    assert (message.sender, message.recipients) == (b"eve@a.example", (b"bob@b.example",))
    assert heard == [b"EHLO willi.example", MAIL, BOB, b"RSET", b"MAIL FROM:<eve@a.example>", BOB, b"DATA"]


def test_an_upstream_without_pipelining_hears_no_recipient_after_a_refused_mail(
    willi: Willi, upstream: ScriptedUpstream
):
    upstream.extensions = (b"SIZE",)
    upstream.answers[MAIL] = reply("550 5.7.1 not you")
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB, BEN, b"DATA")[:3] == [SENDER_KEPT, *["550 5.7.1 not you"] * 2]
    upstream.wait_for_ends()
    assert upstream.commands == [b"EHLO willi.example", MAIL, b"QUIT"]


def test_after_a_refused_mail_another_route_is_tried(willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream):
    upstream.answers[MAIL] = reply("550 5.7.1 not you")
    with greeted(willi) as client:
        expected = [SENDER_KEPT, "550 5.7.1 not you", OK, GO_ON]
        assert say_together(client, MAIL, BOB, CARL, b"DATA") == expected
        assert content(client) == QUEUED
    assert other.wait_for_message().recipients == (b"carl@c.example",)
    assert upstream.wait_for_ends() == [Ended.QUIT]


@pytest.mark.parametrize("together", [True, False], ids=["pipelined", "one by one"])
def test_a_recipient_whose_own_upstream_refused_is_not_asked_of_another(
    together: bool, willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    """The other one would refuse it for good, since it does not know its domain."""
    upstream.answers[MAIL] = reply("450 4.7.1 not now")
    other.answers[CARL] = reply("550 5.1.1 no carl here")
    with greeted(willi) as client:
        lines = MAIL, BOB, CARL, BEN
        heard = say_together(client, *lines) if together else say(client, *lines)
        assert heard == [SENDER_KEPT, "450 4.7.1 not now", "550 5.1.1 no carl here", "450 4.7.1 not now"]
    other.wait_for_ends()
    assert BEN not in other.commands


def test_a_refused_recipient_reaches_the_client_word_for_word(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BOB] = reply("550 5.1.1 no bob here / 5.1.1 sorry")
    upstream.answers[BEN] = reply("251 2.1.5 will forward / 2.1.5 surely")
    with greeted(willi) as client:
        heard = say(client, MAIL, BOB, BEN, b"DATA")
        assert heard == [
            SENDER_KEPT, "550 5.1.1 no bob here / 5.1.1 sorry", "251 2.1.5 will forward / 2.1.5 surely", GO_ON,
        ]  # fmt: skip
        assert content(client) == QUEUED
    assert upstream.wait_for_message().recipients == (b"ben@b.example",)


def test_the_verdict_reaches_the_client_word_for_word(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"."] = [reply("554 5.7.1 spam / 5.7.1 see https://b.example/"), reply("250")]
    with greeted(willi) as client:
        assert deliver(client) == "554 5.7.1 spam / 5.7.1 see https://b.example/"
        assert deliver(client) == "250 "
    assert upstream.wait_for_ends() == [Ended.QUIT]


@pytest.mark.parametrize("answer", ["451 4.3.0 not now", "554 5.5.1 no valid recipients"])
def test_a_refused_data_reaches_the_client_word_for_word(answer: str, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"DATA"] = [reply(answer)]
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA", b"DATA") == [SENDER_KEPT, OK, answer, GO_ON]
        assert content(client) == QUEUED


@pytest.mark.parametrize("say_it", [say, say_together], ids=["one by one", "in a group"])
def test_a_552_to_mail_is_a_554_at_rcpt(say_it: Callable[..., list[str]], willi: Willi, upstream: ScriptedUpstream):
    """There it would mean too many recipients, and the message would come again for days (RFC 5321 §4.5.3.1.10)."""
    upstream.answers[MAIL] = reply("552 5.3.4 too big / 5.3.4 by far")
    with greeted(willi) as client:
        assert say_it(client, MAIL, BOB, BEN)[1:] == ["554 5.3.4 too big / 5.3.4 by far"] * 2
    line = willi.wait_for_log(msg="Message rejected")
    assert (line["reply"], line["error_src"]) == ("554 5.3.4 too big / 5.3.4 by far", "upstream")


def test_a_552_to_rcpt_is_passed_on(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BOB] = reply("552 5.2.2 mailbox full")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "552 5.2.2 mailbox full"]


def test_the_354_is_the_upstreams_own(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"DATA"] = reply("354 send it / with a dot at the end")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA")[2] == "354 send it / with a dot at the end"


@pytest.mark.parametrize("verb", [b"MAIL", b"RCPT"])
def test_no_client_is_told_354_for_anything_but_data(verb: bytes, willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[verb] = reply("354 go on")
    willi.tolerate(f"{verb.decode()}: 354 go on")
    with greeted(willi) as client:
        heard = say(client, MAIL, BOB, b"DATA")
        assert [answer[:3] for answer in heard] == ["250", "451", "451"]
