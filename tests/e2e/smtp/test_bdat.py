"""BDAT (RFC 3030): chunks pass as they are, and one that is not wanted is read to its end all the same."""

from __future__ import annotations

import pytest

from tests.conftest import StartWilli
from tests.support.client import Client
from tests.support.daemon import Willi
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
    greeted,
    reply,
    say,
    say_together,
    verbs,
)
from tests.support.upstream import Close, ScriptedUpstream

NO_MAIL = "503 5.5.1 Need MAIL command"
TOO_BIG = "552 5.3.4 Message is too big"
EVIL = b"\r\n.\r\nMAIL FROM:<eve@a.example>\r\n\n.\n\r.\r\0"  # whoever takes it for lines finds commands in it


def in_envelope(willi: Willi) -> Client:
    client = greeted(willi)
    assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
    return client


def still_in_step(client: Client) -> bool:
    return str(client.command(b"NOOP")) == "250 2.0.0 Ok"


def test_chunks_reach_the_upstream_as_they_are(willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        assert [chunk(client, EVIL), chunk(client, b""), chunk(client, b"x" * 70_000)] == [OK] * 3
        assert chunk(client, EVIL, last=True) == OK
        assert still_in_step(client)
    assert upstream.wait_for_message().content == EVIL + b"x" * 70_000 + EVIL
    sizes = [line for line in upstream.connection().commands if line.startswith(b"BDAT")]
    evil = b"BDAT %d" % len(EVIL)
    assert sizes == [evil, b"BDAT 0", b"BDAT 70000", evil + b" LAST"]


@pytest.mark.parametrize("parts", [[b""], [EVIL], [EVIL, b""], [b"", b"", EVIL]], ids=repr)
def test_a_message_ends_with_last(parts: list[bytes], willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        for part in parts[:-1]:
            assert chunk(client, part) == OK
        assert chunk(client, parts[-1], last=True) == OK
        assert deliver(client) == QUEUED
    assert upstream.messages[0].content == b"".join(parts)


def test_all_chunks_may_come_in_one_write(willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        client.send(b"BDAT 3\r\na\r\nbdat 0\r\nBDAT 3 last\r\nb\r\nNOOP\r\n")
        assert [str(client.read_reply()) for _ in range(4)] == [OK, OK, OK, "250 2.0.0 Ok"]
    assert upstream.wait_for_message().content == b"a\r\nb\r\n"


def test_the_verdict_on_a_chunk_is_the_upstreams_own(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"BDAT"] = [reply("250 2.6.0 chunk / 2.6.0 of mine"), reply("554 5.7.1 spam / 5.7.1 sorry")]
    with in_envelope(willi) as client:
        assert chunk(client, b"a\r\n") == "250 2.6.0 chunk / 2.6.0 of mine"
        assert chunk(client, b"b\r\n", last=True) == "554 5.7.1 spam / 5.7.1 sorry"
        assert deliver(client) == QUEUED
    line = willi.wait_for_log(msg="Message rejected")
    assert (line["error_src"], line["reply"]) == ("upstream", "554 5.7.1 spam / 5.7.1 sorry")


def test_after_a_refused_chunk_the_rest_of_the_message_gets_the_same(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"BDAT"] = [reply(OK), reply("452 4.3.1 disk full")]
    with in_envelope(willi) as client:
        assert chunk(client, b"a\r\n") == OK
        for last in (False, False, True):
            assert chunk(client, EVIL, last) == "452 4.3.1 disk full"
        assert chunk(client, EVIL, last=True) == NO_MAIL
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1
    assert len(willi.lines(msg="Message rejected")) == 1


def test_an_upstream_that_dies_between_chunks_costs_the_message(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"BDAT"] = [reply(OK), Close()]
    willi.tolerate(upstream.server)
    with in_envelope(willi) as client:
        assert [chunk(client, b"a\r\n"), chunk(client, EVIL), chunk(client, EVIL)] == [OK, LOST, LOST]
        assert say(client, BOB, b"DATA")[1] == LOST
        assert chunk(client, EVIL, last=True) == LOST
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1


def test_data_after_bdat_is_refused_and_harms_nothing(willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        assert chunk(client, b"a\r\n") == OK
        assert say(client, b"DATA") == ["503 5.5.1 DATA after BDAT, send RSET first"]
        assert chunk(client, b"b\r\n", last=True) == OK
    assert upstream.wait_for_message().content == b"a\r\nb\r\n"
    assert b"DATA" not in upstream.commands


def test_bdat_after_last_is_refused_and_its_chunk_read(willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        assert chunk(client, b"a\r\n", last=True) == OK
        assert chunk(client, EVIL, last=True) == NO_MAIL
        assert chunk(client, EVIL) == NO_MAIL
        assert still_in_step(client)
    assert [message.content for message in upstream.messages] == [b"a\r\n"]


@pytest.mark.parametrize(
    ("way", "answer"),
    [
        ([], NO_MAIL),
        ([MAIL], "503 5.5.1 Need RCPT command"),
        ([MAIL, b"RCPT TO:<nobody@b.example>"], "554 5.5.1 No valid recipients"),
    ],
    ids=["without MAIL", "without RCPT", "all recipients refused"],
)
def test_a_chunk_at_the_wrong_time_is_read_to_its_end(
    way: list[bytes], answer: str, willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[b"RCPT TO:<nobody@b.example>"] = reply("550 5.1.1 nobody")
    with greeted(willi) as client:
        say(client, *way)
        assert chunk(client, EVIL) == answer
        assert chunk(client, EVIL + b"x" * 200_000, last=True) == answer
        assert still_in_step(client)
    upstream.wait_for_ends()
    assert b"BDAT" not in verbs(upstream.commands)


def test_a_chunk_pipelined_behind_refused_recipients_is_read_to_its_end(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BOB] = reply("550 5.1.1 no bob")
    with greeted(willi) as client:
        client.send(MAIL + b"\r\n" + BOB + b"\r\nBDAT 12 LAST\r\nQUIT\r\nRSET\r\nNOOP\r\n")
        expected = [SENDER_KEPT, "550 5.1.1 no bob", "554 5.5.1 No valid recipients", "250 2.0.0 Ok"]
        assert [str(client.read_reply()) for _ in expected] == expected


@pytest.mark.parametrize("parts", [(b"hello",), (b"hel", b"lo")], ids=["one chunk", "two chunks"])
def test_a_message_pipelined_behind_one_without_recipients_has_its_own_sender(
    parts: tuple[bytes, ...], willi: Willi, upstream: ScriptedUpstream
):
    upstream.answers[BOB] = [reply("550 5.1.1 no bob")]
    chunks = b"".join(b"BDAT %d\r\n%b" % (len(part), part) for part in parts[:-1])
    chunks += b"BDAT %d LAST\r\n%b" % (len(parts[-1]), parts[-1])
    with greeted(willi) as client:
        client.send(b"MAIL FROM:<>\r\n" + BOB + b"\r\n" + chunks + MAIL + b"\r\n" + BEN + b"\r\n" + chunks)
        none = ["554 5.5.1 No valid recipients"] * len(parts)
        expected = [SENDER_KEPT, "550 5.1.1 no bob", *none, SENDER_KEPT, OK, *[OK] * len(parts)]
        assert [str(client.read_reply()) for _ in expected] == expected
    message = upstream.wait_for_message()
    assert (message.sender, message.recipients, message.content) == (b"ann@a.example", (b"ben@b.example",), b"hello")


def test_a_message_of_which_a_chunk_came_too_early_is_not_delivered(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL) == [SENDER_KEPT]
        refused = chunk(client, b"Subject: x\r\n")
        assert refused == "503 5.5.1 Need RCPT command"
        assert say(client, BOB) == [refused]
        assert chunk(client, b"hello\r\n", last=True) == refused
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1


@pytest.mark.parametrize(
    "argument", [b"", b"x", b"-1", b"3 LASTLY", b"3 FIRST", b"3 LAST x", b"0x3", b"3,LAST", b"9" * 21, "٣".encode()]
)
def test_a_bdat_without_a_size_ends_the_session(argument: bytes, willi: Willi, upstream: ScriptedUpstream):
    """Nobody knows how many octets follow that are no commands."""
    with in_envelope(willi) as client:
        client.send(b"BDAT " + argument + b"\r\nQUIT\r\nMAIL FROM:<eve@a.example>\r\n")
        assert str(client.read_reply()) == "501 5.5.4 Syntax: BDAT size [LAST]"
        client.expect_eof()
    upstream.wait_for_ends()
    assert upstream.messages == []


def test_a_bdat_with_a_control_character_ends_the_session(willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        client.send(b"bdat 6\x01\r\nRSET\r\n")
        assert str(client.read_reply()) == "501 5.5.2 Control or 8-bit character in a command"
        client.expect_eof()
    upstream.wait_for_ends()
    assert upstream.messages == []


@pytest.mark.parametrize("line", [b"BDAT 6" + b" " * 2041, b" " * 3000 + b"bdat 6", b"bdat\t" + b"x" * 100_000])
def test_a_bdat_that_is_too_long_ends_the_session(line: bytes, willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        client.send(line + b"\r\nRSET\r\n")
        assert str(client.read_reply()) == "500 5.5.2 Line too long"
        client.expect_eof()
    upstream.wait_for_ends()
    assert upstream.messages == []


def test_a_message_may_have_exactly_the_size_limit(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, max_message_bytes=1000)
    with in_envelope(willi) as client:
        assert [chunk(client, b"x" * 600), chunk(client, b"x" * 400), chunk(client, b"", last=True)] == [OK] * 3
    assert len(upstream.wait_for_message().content) == 1000


@pytest.mark.parametrize("chunking", [True, False], ids=["BDAT", "DATA"])
def test_a_message_over_the_size_limit_is_read_dropped_and_refused(
    chunking: bool, share_willi: StartWilli, upstream: ScriptedUpstream
):
    if not chunking:
        upstream.extensions = (b"PIPELINING",)
    willi = share_willi(server=upstream.server, max_message_bytes=1000)
    with in_envelope(willi) as client:
        assert chunk(client, b"x" * 600)[:3] == "250"
        assert chunk(client, b"QUIT\r\n" + b"x" * 395) == TOO_BIG
        assert chunk(client, b"QUIT\r\n") == TOO_BIG
        assert chunk(client, b"", last=True) == TOO_BIG
        assert deliver(client) == QUEUED
    upstream.wait_for_ends()
    assert [len(message.content) for message in upstream.messages] == [len(b"Subject: x\r\n\r\nhello\r\n")]
    [line] = willi.lines(msg="Message rejected")
    assert (line["error_src"], line["reply"]) == ("internal", TOO_BIG)


def test_rset_between_chunks_forgets_the_message(willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        assert chunk(client, b"a\r\n") == OK
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
        assert chunk(client, b"b\r\n", last=True) == NO_MAIL
        assert deliver(client) == QUEUED
    assert [message.content for message in upstream.messages] == [b"Subject: x\r\n\r\nhello\r\n"]


def test_data_and_bdat_alternate_on_one_connection(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        for number in range(4):
            assert say_together(client, MAIL, BOB) == [SENDER_KEPT, OK]
            if number % 2:
                assert chunk(client, b"by BDAT\r\n", last=True) == OK
            else:
                assert say(client, b"DATA") == [GO_ON]
                assert content(client, b"by DATA\r\n") == QUEUED
    assert [message.content for message in upstream.messages] == [b"by DATA\r\n", b"by BDAT\r\n"] * 2
    assert len(upstream.connections) == 1
