"""PIPELINING (RFC 2920) in both directions: groups stay groups, and how they were cut makes no difference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from time import monotonic

import pytest

from tests.conftest import StartWilli
from tests.support.client import Client
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
    chunk,
    content,
    deliver,
    greeted,
    reply,
    say,
    say_together,
)
from tests.support.upstream import Delay, ScriptedUpstream, Silence

CRLF = b"\r\n"
HOLD = 2.0  # seconds; willi_lib.processes.worker has it, and with it all of gevent's patches
MANY = [b"RCPT TO:<user%d@b.example>" % number for number in range(60)]


def group(*lines: bytes) -> bytes:
    return b"".join(line + CRLF for line in lines)


def test_recipients_and_data_of_one_group_reach_the_upstream_in_one_write(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, BEN, CARL, b"DATA")
        assert heard == [SENDER_KEPT, OK, OK, OK, GO_ON]
        assert upstream.connection().reads == [b"EHLO willi.example\r\n", group(MAIL, BOB, BEN, CARL, b"DATA")]
        assert content(client) == QUEUED


def test_a_group_after_the_first_recipient_is_one_write_too(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        assert say_together(client, BEN, CARL, b"DATA") == [OK, OK, GO_ON]
        assert upstream.connection().reads[1:] == [group(MAIL, BOB), group(BEN, CARL, b"DATA")]
        assert content(client) == QUEUED


def test_a_large_group_is_one_round_trip(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say_together(client, MAIL, *MANY, b"DATA") == [SENDER_KEPT, *[OK] * len(MANY), GO_ON]
        assert upstream.connection().reads[1:] == [group(MAIL, *MANY, b"DATA")]
        assert content(client) == QUEUED


def test_a_group_on_a_kept_connection_is_one_write(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        before = len(upstream.connection().reads)
        assert say_together(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, OK, OK, GO_ON]
        assert upstream.connection().reads[before:] == [group(MAIL, BOB, BEN, b"DATA")]


def test_an_upstream_without_pipelining_is_asked_one_by_one(willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = (b"SIZE",)
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, OK, OK, GO_ON]
        assert upstream.connection().reads[1:] == [line + CRLF for line in (MAIL, BOB, BEN, b"DATA")]
        assert content(client) == QUEUED


def test_the_replies_to_a_group_are_one_write(willi: Willi, upstream: ScriptedUpstream):
    """However slowly the upstream gives its answers."""
    upstream.answers[BEN] = Delay(0.1)
    with greeted(willi) as client:
        began = monotonic()
        client.send(group(MAIL, BOB, BEN, CARL, b"DATA"))
        together, took = client.socket.recv(65536), monotonic() - began
        replies = group(SENDER_KEPT.encode(), *[OK.encode()] * 3, GO_ON.encode())
        assert together == replies or took >= HOLD, "what is known waits for HOLD and no longer"


def test_each_answer_belongs_to_its_recipient(willi: Willi, upstream: ScriptedUpstream):
    expected = []
    for number, line in enumerate(MANY):
        answer = (OK, f"550 5.1.1 no user{number}", f"452 4.2.2 user{number} is full")[number % 3]
        expected.append(answer)
        upstream.answers[line] = reply(answer)
    with greeted(willi) as client:
        assert say_together(client, MAIL, *MANY, b"DATA") == [SENDER_KEPT, *expected, GO_ON]
        assert content(client) == QUEUED
    accepted = tuple(line[9:-1] for line in MANY[::3])
    assert upstream.wait_for_message().recipients == accepted


def test_a_wrong_line_in_a_group_gets_its_reply_in_its_place(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        lines = MAIL, BOB, b"RCPT TO:<nobody>", BEN, b"BOGUS", b"RCPT TO:<x@b.example> NOTIFY=NEVER", CARL, b"DATA"
        assert say_together(client, *lines) == [
            SENDER_KEPT, OK, "553 5.1.3 Recipient address needs a domain", OK, "500 5.5.2 Command not recognized",
            "555 5.5.4 MAIL or RCPT parameter not recognized", OK, GO_ON,
        ]  # fmt: skip
        assert content(client) == QUEUED
    assert upstream.wait_for_message().recipients == (b"bob@b.example", b"ben@b.example", b"carl@c.example")


def test_whole_transactions_may_follow_each_other_in_one_write(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        first = group(MAIL, BOB, b"BDAT 7 LAST") + b"first\r\n"
        second = group(MAIL, BEN, b"RSET", MAIL, CARL, b"BDAT 8 LAST") + b"second\r\n"
        client.send(first + second + group(b"NOOP", b"QUIT"))
        expected = [SENDER_KEPT, OK, OK, SENDER_KEPT, OK, "250 2.0.0 Ok", SENDER_KEPT, OK, OK]
        assert [str(client.read_reply()) for _ in expected] == expected
        assert [str(client.read_reply()) for _ in range(2)] == ["250 2.0.0 Ok", "221 2.0.0 Bye"]
        client.expect_eof()
    assert [(m.recipients, m.content) for m in upstream.messages] == [
        ((b"bob@b.example",), b"first\r\n"), ((b"carl@c.example",), b"second\r\n"),
    ]  # fmt: skip


def test_commands_behind_the_end_of_a_message_are_commands(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA")[2] == GO_ON
        client.send(b"hello\r\n.\r\n" + group(MAIL, BEN, b"DATA"))
        expected = [QUEUED, SENDER_KEPT, OK, GO_ON]
        assert [str(client.read_reply()) for _ in expected] == expected
        assert content(client) == QUEUED
    assert upstream.wait_for_message(0).content == b"hello\r\n"


@pytest.mark.parametrize("answer", [GO_ON, "554 5.5.1 no valid recipients"])
def test_data_in_a_group_without_a_valid_recipient_delivers_nothing(
    answer: str, willi: Willi, upstream: ScriptedUpstream
):
    """An upstream that says 354 all the same (RFC 2920 §3.1) waits for a message that the client will not send."""
    upstream.answers[b"RCPT"] = reply("550 5.1.1 nobody here")
    upstream.answers[b"DATA"] = reply(answer)
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, BEN, b"DATA")
        assert heard[:3] == [SENDER_KEPT, *["550 5.1.1 nobody here"] * 2]
        assert heard[3] in ("554 5.5.1 No valid recipients", "554 5.5.1 no valid recipients")
        del upstream.answers[b"RCPT"], upstream.answers[b"DATA"]
        assert str(client.command(b"RSET")) == "250 2.0.0 Ok"
        assert deliver(client) == QUEUED
    upstream.wait_for_ends()
    assert [message.content for message in upstream.messages] == [b"Subject: x\r\n\r\nhello\r\n"]


@pytest.mark.parametrize("answer", [GO_ON, "554 5.5.1 Error: no valid recipients", "503 5.5.1 RCPT first"])
@pytest.mark.parametrize("say_it", [say, say_together], ids=["one by one", "in a group"])
def test_data_after_a_deferred_recipient_is_deferred(
    say_it: Callable[..., list[str]], answer: str, willi: Willi, upstream: ScriptedUpstream
):
    """A client that looks at the last answer only must not take a message for refused that was greylisted."""
    upstream.answers[BOB], upstream.answers[BEN] = reply("450 4.2.0 greylisted"), reply("550 5.1.1 no ben")
    upstream.answers[b"DATA"] = reply(answer)
    with greeted(willi) as client:
        heard = say_it(client, MAIL, BOB, BEN, b"DATA")
        assert heard[1:] == ["450 4.2.0 greylisted", "550 5.1.1 no ben", "451 4.5.1 No valid recipients, try again"]
        assert say(client, b"DATA") == ["451 4.5.1 No valid recipients, try again"]
    upstream.wait_for_ends()
    assert upstream.messages == []


def test_a_refused_mail_is_told_though_the_upstream_takes_its_time_with_the_rest(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    """The answers behind it mean nothing."""
    willi = start_willi(server=upstream.server, upstream_timeout="1h")
    upstream.answers[b"MAIL"] = [reply("550 5.7.1 no")]
    upstream.answers[b"RCPT"] = Silence()
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB) == [SENDER_KEPT, "550 5.7.1 no"]
        del upstream.answers[b"RCPT"]
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
        assert deliver(client) == QUEUED
    assert len(upstream.connections) == 2


def test_a_refusal_of_data_for_now_is_passed_on(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT"], upstream.answers[b"DATA"] = reply("550 5.1.1 no"), reply("451 4.3.0 not now")
    with greeted(willi) as client:
        assert say_together(client, MAIL, BOB, b"DATA")[1:] == ["550 5.1.1 no", "451 4.3.0 not now"]
        upstream.answers[b"DATA"] = reply("421 4.3.2 going down")
        assert say_together(client, b"RSET", MAIL, BOB, b"DATA")[2:] == ["550 5.1.1 no", "421 4.3.2 going down"]
        client.expect_eof()


@pytest.mark.parametrize("end", [b"RSET", b"QUIT", b"EHLO c.example"], ids=bytes.decode)
def test_a_group_that_ends_otherwise_leaves_nothing_behind(end: bytes, willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        heard = say_together(client, MAIL, BOB, BEN, end)
        assert heard[:3] == [SENDER_KEPT, OK, OK]
    upstream.wait_for_ends()
    assert upstream.messages == []


def test_a_group_is_cut_at_max_recipients(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_recipients=3)
    with greeted(willi) as client:
        too_many = "452 4.5.3 Too many recipients"
        heard = say_together(client, MAIL, *MANY[:5], b"DATA")
        assert heard == [SENDER_KEPT, OK, OK, OK, too_many, too_many, GO_ON]
        assert content(client) == QUEUED
    assert upstream.commands.count(MANY[3]) == 0
    assert len(upstream.wait_for_message().recipients) == 3


def test_an_upstream_that_speaks_out_of_turn_is_not_believed(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, upstream_timeout="1s")
    willi.tolerate(upstream.server)
    offered = b"250-upstream.example\r\n250 PIPELINING\r\n"
    for extra in (b"250 2.0.0 ok\r\n", b"421 4.3.2 no\r\n", b"garbage\r\n", b"250-half"):
        upstream.answers[b"EHLO"] = [offered + extra]
        with greeted(willi) as client:
            heard = say_together(client, MAIL, BOB, b"DATA", b"NOOP")
            assert [answer[:3] for answer in heard] == ["250", "451", "451", "250"], extra
    assert upstream.messages == []
    assert not willi.lines(msg="Internal error")


# Every cut of a session into two segments

HEADER = b"Subject: cut\r\n\r\n..\r\n"
SCRIPT: list[tuple[bytes, list[str]]] = [
    (b"EHLO c.example\r\n", []),  # its reply is compared by its code
    (group(MAIL), [SENDER_KEPT]),
    (group(BOB), [OK]),
    (group(b"RCPT TO:<no@b.example>"), ["550 5.1.1 no"]),
    (group(BEN), [OK]),
    (group(b"DATA"), [GO_ON]),
    (HEADER + b"QUIT\r\n.\r\n", [QUEUED]),
    (group(b"NOOP"), ["250 2.0.0 Ok"]),
    (group(MAIL), [SENDER_KEPT]),
    (group(b"RCPT TO:<nobody>"), ["553 5.1.3 Recipient address needs a domain"]),
    (group(BEN), [OK]),
    (b"BDAT 12\r\nQUIT\r\nRSET\r\n", [OK]),
    (b"BDAT 0 LAST\r\n", [OK]),
    (group(b"QUIT"), ["221 2.0.0 Bye"]),
]


def part_before(position: int) -> int:
    """How many replies are due when so many octets were sent."""
    ends = itertools.accumulate(len(octets) for octets, _ in SCRIPT)
    return sum(end <= position for end in ends)


def test_every_cut_into_two_segments_gives_the_same_replies(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT TO:<no@b.example>"] = reply("550 5.1.1 no")
    whole = b"".join(octets for octets, _ in SCRIPT)
    expected = [answer for _, answers in SCRIPT for answer in answers]
    for position in range(1, len(whole)):
        with willi.connect() as client:
            heard = cut_at(position, whole, client)
            assert heard == expected, f"cut at {position}: {whole[:position][-20:]!r}"
            client.expect_eof()
    assert {message.content for message in upstream.messages} == {
        b"Subject: cut\r\n\r\n.\r\nQUIT\r\n", b"QUIT\r\nRSET\r\n",
    }  # fmt: skip
    assert len(upstream.messages) == 2 * (len(whole) - 1)


def cut_at(position: int, whole: bytes, client: Client) -> list[str]:
    """The replies but for that to EHLO. What is due for the first segment is read before the second one is sent."""
    due = part_before(position)
    client.send(whole[:position])
    replies = [client.read_reply() for _ in range(due)]
    client.send(whole[position:])
    replies += [client.read_reply() for _ in range(len(SCRIPT) - due)]
    assert replies[0].code == 250
    return [str(answer) for answer in replies[1:]]


def test_a_session_octet_by_octet_gives_the_same_replies(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT TO:<no@b.example>"] = reply("550 5.1.1 no")
    with willi.connect() as client:
        client.send_slowly(b"".join(octets for octets, _ in SCRIPT))
        replies = [str(client.read_reply()) for _ in SCRIPT][1:]
        assert replies == [answer for _, answers in SCRIPT for answer in answers]
        client.expect_eof()


def test_a_client_that_hangs_up_within_a_group_delivers_nothing(willi: Willi, upstream: ScriptedUpstream):
    """Also if DATA was sent ahead and the upstream is waiting for the message."""
    for line in (BOB, BEN, b"DATA"):
        lines = [MAIL, BOB, BEN, b"DATA"]
        with greeted(willi) as client:
            client.send(group(*lines[: lines.index(line) + 1]))
    upstream.connection(2)
    upstream.wait_for_ends()
    assert upstream.messages == []


def test_a_chunk_that_begins_in_the_segment_of_its_command_is_no_command(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        assert chunk(client, b"QUIT\r\n", last=True) == OK
        assert str(client.command(b"NOOP")) == "250 2.0.0 Ok"
    assert upstream.wait_for_message().content == b"QUIT\r\n"
