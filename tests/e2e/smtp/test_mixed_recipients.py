"""Recipients of one message that belong to different upstreams: mixed_recipients."""

from __future__ import annotations

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.daemon import Willi
from tests.support.talk import (
    BEN,
    BOB,
    CARL,
    EHLO,
    GO_ON,
    MAIL,
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
from tests.support.upstream import Hold, ScriptedUpstream

UNMAPPED = b"RCPT TO:<eve@e.example>"
ELSEWHERE = "451 4.3.0 Different destination, please send separately"


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream) -> Willi:
    """One with `mixed_recipients = defer`."""
    return share_willi(csv=two_domains(upstream, other), mixed_recipients="defer", max_recipients=7)


@pytest.mark.parametrize("together", [True, False], ids=["pipelined", "one by one"])
def test_a_recipient_of_another_upstream_is_asked_to_be_sent_separately(
    together: bool, willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    with greeted(willi) as client:
        lines = MAIL, BOB, CARL, BEN, b"DATA"
        heard = say_together(client, *lines) if together else say(client, *lines)
        assert heard == [SENDER_KEPT, OK, ELSEWHERE, OK, GO_ON]
        assert content(client) == QUEUED
        assert deliver(client, CARL) == QUEUED
    assert upstream.wait_for_message().recipients == (b"bob@b.example", b"ben@b.example")
    assert other.wait_for_message().recipients == (b"carl@c.example",)


def test_the_first_recipient_may_have_been_refused(willi: Willi, upstream: ScriptedUpstream, other: ScriptedUpstream):
    upstream.answers[BOB] = reply("550 5.1.1 no bob here")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, CARL, BEN)[1:] == ["550 5.1.1 no bob here", ELSEWHERE, OK]
    assert other.connections == []


def test_one_that_is_nobodys_is_refused_in_this_mode(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        lines = MAIL, BOB, UNMAPPED, BEN
        assert say_together(client, *lines) == [SENDER_KEPT, OK, "554 5.7.1 Relay access denied", OK]
    upstream.wait_for_ends()
    assert UNMAPPED not in upstream.commands


def test_only_in_this_mode_the_limits_are_announced(willi: Willi, start_willi: StartWilli, upstream: ScriptedUpstream):
    limits = b"LIMITS RCPTMAX=7 RCPTDOMAINMAX=1"  # RFC 9422
    with willi.connect() as client:
        assert limits in client.command(EHLO).lines
    usual = start_willi(server=upstream.server, max_recipients=7)
    with usual.connect() as client:
        assert not any(line.startswith(b"LIMITS") for line in client.command(EHLO).lines)


def test_two_domains_of_one_upstream_go_together(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(csv=two_domains(upstream, upstream), mixed_recipients="defer")
    with greeted(willi) as client:
        assert deliver(client, BOB, CARL) == QUEUED
    assert upstream.wait_for_message().recipients == (b"bob@b.example", b"carl@c.example")


def test_a_route_that_changes_after_its_recipient_was_sent_ahead_changes_nothing(
    start_willi: StartWilli, start_upstream: StartUpstream
):
    """The upstream's answer to it must not be left over and be taken for the answer to something else."""
    here, there = start_upstream(), start_upstream()
    csv = f"pattern;server;tls_verify\nb.example;{here.server}\nc.example;{here.server}\n"
    willi = start_willi(csv=csv, mixed_recipients="defer")
    hold = here.answers[b"RCPT TO:<bob@b.example>"] = Hold()
    here.answers[b"BDAT"] = reply("554 5.7.1 refused")
    with greeted(willi) as client:
        client.send(MAIL + b"\r\nRCPT TO:<bob@b.example>\r\nRCPT TO:<eva@c.example>\r\n")
        assert hold.reached.wait(60)
        willi.replace_csv(csv.replace(f"c.example;{here.server}", f"c.example;{there.server}"))
        willi.wait_for_log(msg="CSV file read again")
        hold.release()
        assert [str(client.read_reply()) for _ in range(3)] == [SENDER_KEPT, OK, OK]
        assert chunk(client, b"hello\r\n", last=True) == "554 5.7.1 refused"
    assert there.connections == []
