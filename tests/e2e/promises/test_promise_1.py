"""Promise 1: a 250 after the message is the upstream's own, for exactly the octets that the client finished."""

from __future__ import annotations

import pytest

from tests.conftest import StartWilli
from tests.support.daemon import Willi
from tests.support.promise import in_data, in_envelope, meet, meet_in_data
from tests.support.raw import RawUpstream
from tests.support.talk import BEN, BOB, LOST, MAIL, QUEUED, chunk, content, deliver, greeted, say
from tests.support.upstream import VERDICT, Hold, ScriptedUpstream
from willi_lib.smtp.reply import Reply

CONTENT = b"Subject: x\r\n\r\nhello\r\n"

NO_VERDICTS = {
    "354 twice again": b"354 go on\r\n354 go on\r\n",
    "a greeting": b"220 upstream.example ESMTP\r\n",
    "a goodbye": b"221 2.0.0 upstream.example closing, going down\r\n",
    "a goodbye of two lines": b"221-2.0.0 upstream.example closing\r\n221 2.0.0 going down\r\n",
    "a badly framed goodbye": b"221 2.0.0 closing\n",
}
NO_CODES = {
    "a word": b"hello\r\n",
    "an empty line": b"\r\n",
    "two digits": b"25 ok\r\n",
    "a code out of range": b"999 ok\r\n",
    "no space": b"250_ok\r\n",
    "a letter O": b"25O ok\r\n",
    "octets out of TLS": bytes(range(128, 256)) + b"\r\n",
    "a line without end": b"x" * 5000,
    "very many lines": b"x\r\n" * 1000,
}
# What is a verdict all the same, and what the client hears of it.
BADLY_FRAMED = {
    "a lone LF": (b"250 2.0.0 Ok\nqueued as AB12\r\n", "250 2.0.0 Ok / queued as AB12"),
    "only a lone LF": (b"250 2.0.0 Ok\n", "250 2.0.0 Ok"),
    "two lines of a lone LF": (b"250 2.0.0 ok\n250 2.0.0 ok\r\n", "250 2.0.0 ok"),
    "CR CR LF": (b"250 2.0.0 Ok: queued as AB12\r\r\n", "250 2.0.0 Ok: queued as AB12"),
    "a lone CR": (b"250 2.0.0\rok\r\n", "250 2.0.0?ok"),
    "a line without a code": (b"250-2.0.0 Ok\r\nqueued\r\n250 bye\r\n", "250 2.0.0 Ok / queued / bye"),
    "many lines of nothing": (b"250-\r\n" * 300 + b"250 ok\r\n", "250 "),
    "a very long line": (b"250 " + b"x" * 10_000 + b"\r\n", "250 " + "x" * 506),
    "control octets": (b"250 2.0.0 q\0ueued \x1b[2J\n", "250 2.0.0 q?ueued ?[2J"),
    "behind a warning": (b"warning: cannot open /var/log/scan\r\n\r\n250 2.0.0 Ok\r\n", "250 2.0.0 Ok"),
    "a refusal behind a warning": (b"warning: disk is nearly full\n550 5.7.1 spam\r\n", "550 5.7.1 spam"),
    "behind a second 354": (b"354 go on\r\n250 2.0.0 Ok\r\n", "250 2.0.0 Ok"),
    "a refusal behind a second 354": (b"354 go on\r\n550 5.7.1 spam\r\n", "550 5.7.1 spam"),
    "a refusal": (b"552 5.3.4 too big\n", "552 5.3.4 too big"),
    "a deferral": (b"451-4.7.1 greylisted\n451 4.7.1 for 5 minutes\n", "451 4.7.1 greylisted / 4.7.1 for 5 minutes"),
}


@pytest.fixture
def raw_willi(share_willi: StartWilli, raw: RawUpstream) -> Willi:
    """A Willi that sends everything to `raw`."""
    willi = share_willi(server=raw.server)
    willi.tolerate("Upstream failed")
    return willi


@pytest.mark.parametrize(
    "verdict",
    [
        Reply(250, (b"2.0.0 Ok: queued as 4B2r5x1Tqz",)),
        Reply(250, (b"2.0.0 Ok: queued as 4B2r5x1Tqz", b"  two  spaces ", b"", b"and \xc3\xa4 at the end")),
        Reply(250, (b"",)),
        Reply(252, (b"odd",)),
        Reply(451, (b"4.7.1 greylisted", b"for 5 minutes")),
        Reply(550, (b"5.7.1 spam",)),
        Reply(552, (b"no enhanced code",)),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT", b"BDAT to DATA"])
def test_the_verdict_is_the_upstreams_word_for_word(
    verb: bytes, verdict: Reply, willi: Willi, upstream: ScriptedUpstream
):
    if verb == b"BDAT to DATA":
        upstream.extensions = (b"SIZE",)
    upstream.answers[b"BDAT 21 LAST"] = upstream.answers[VERDICT] = verdict
    client = in_data(willi) if verb == b"DATA" else in_envelope(willi)
    client.send(CONTENT + b".\r\n" if verb == b"DATA" else b"BDAT 21 LAST\r\n" + CONTENT)
    assert client.read_reply() == verdict
    [message] = upstream.messages
    assert message.content == CONTENT


def test_no_250_comes_before_the_upstreams(willi: Willi, upstream: ScriptedUpstream):
    held = upstream.answers[VERDICT] = Hold()
    client = in_data(willi)
    client.send(CONTENT + b".\r\n")
    assert held.reached.wait(60)
    client.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.read_reply()
    client.socket.settimeout(60)
    held.release()
    assert str(client.read_reply()) == QUEUED


def test_no_250_comes_before_the_upstreams_to_the_last_chunk(willi: Willi, upstream: ScriptedUpstream):
    held = upstream.answers[b"BDAT 3 LAST"] = Hold()
    client = in_envelope(willi)
    assert chunk(client, CONTENT[:-3]) == "250 2.0.0 ok"
    client.send(b"BDAT 3 LAST\r\n" + CONTENT[-3:])
    assert held.reached.wait(60)
    client.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.read_reply()
    client.socket.settimeout(60)
    held.release()
    assert str(client.read_reply()) == "250 2.0.0 ok"
    assert upstream.messages[0].content == CONTENT


def test_the_octets_end_where_the_client_ended_them(willi: Willi, upstream: ScriptedUpstream):
    """The next transaction comes in the same write, and looks like more of the message."""
    client = in_data(willi)
    more = [MAIL, BOB, BEN, b"DATA"]
    client.send(b"first\r\n..\r\n.\r\n" + b"".join(line + b"\r\n" for line in more))
    assert [client.read_reply().code for _ in range(5)] == [250, 250, 250, 250, 354]
    assert content(client, b"second\r\n") == QUEUED
    assert [message.content for message in upstream.messages] == [b"first\r\n.\r\n", b"second\r\n"]
    assert [message.recipients for message in upstream.messages] == [
        (b"bob@b.example",), (b"bob@b.example", b"ben@b.example")
    ]  # fmt: skip


def test_chunks_end_where_the_client_ended_them(willi: Willi, upstream: ScriptedUpstream):
    client = in_envelope(willi)
    client.send(b"BDAT 6\r\na\r\n.\r\nBDAT 0\r\nBDAT 6 LAST\r\nQUIT\r\nNOOP\r\n" + MAIL + b"\r\n")
    assert [str(client.read_reply()) for _ in range(5)] == [
        "250 2.0.0 ok", "250 2.0.0 ok", "250 2.0.0 ok", "250 2.0.0 Ok", "250 2.1.0 Ok"
    ]  # fmt: skip
    assert [message.content for message in upstream.messages] == [b"a\r\n.\r\nQUIT\r\n"]


@pytest.mark.parametrize("garbage", NO_VERDICTS.values(), ids=NO_VERDICTS.keys())
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT"])
def test_what_is_no_verdict_is_never_a_250(verb: bytes, garbage: bytes, willi: Willi, upstream: ScriptedUpstream):
    willi.tolerate("Upstream failed")
    upstream.answers[b"BDAT 21 LAST"] = upstream.answers[VERDICT] = garbage
    client = in_data(willi) if verb == b"DATA" else in_envelope(willi)
    client.send(CONTENT + b".\r\n" if verb == b"DATA" else b"BDAT 21 LAST\r\n" + CONTENT)
    assert str(client.read_reply()) == LOST
    assert say(client, b"NOOP") == ["250 2.0.0 Ok"]
    upstream.answers.clear()
    assert deliver(client) == QUEUED, "on a new connection"


@pytest.mark.parametrize("garbage", NO_CODES.values(), ids=NO_CODES.keys())
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT"])
def test_what_has_no_code_is_no_verdict(verb: bytes, garbage: bytes, raw_willi: Willi, raw: RawUpstream):
    """And neither is the end of the connection after it."""
    if verb == b"DATA":
        client, peer = meet_in_data(raw_willi, raw)
        client.send(CONTENT + b".\r\n")
    else:
        client, peer = meet(raw_willi, raw, b"CHUNKING")
        client.send(b"BDAT 21 LAST\r\n" + CONTENT)
    peer.read_for(CONTENT)
    peer.send(garbage)
    peer.close()
    assert str(client.read_reply()) == LOST


@pytest.mark.parametrize("octets", [b"warning: the scanner is slow\r\n", b"354 go on\r\n"], ids=repr)
def test_what_is_no_verdict_is_none_when_the_time_is_over(octets: bytes, start_willi: StartWilli, raw: RawUpstream):
    willi = start_willi(server=raw.server, data_timeout="1s")
    willi.tolerate("Upstream failed")
    client, peer = meet_in_data(willi, raw)
    client.send(CONTENT + b".\r\n")
    peer.read_for(CONTENT)
    peer.send(octets)
    assert str(client.read_reply()) == LOST


@pytest.mark.parametrize("kind", BADLY_FRAMED)
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT"])
def test_a_verdict_whose_code_can_be_read_is_one_however_badly_it_is_framed(
    verb: bytes, kind: str, willi: Willi, upstream: ScriptedUpstream
):
    """A 451 in its place would have the message delivered again at each attempt."""
    octets, heard = BADLY_FRAMED[kind]
    upstream.answers[VERDICT if verb == b"DATA" else b"BDAT 21 LAST"] = [octets]
    client = in_data(willi) if verb == b"DATA" else in_envelope(willi)
    client.send(CONTENT + b".\r\n" if verb == b"DATA" else b"BDAT 21 LAST\r\n" + CONTENT)
    assert str(client.read_reply()) == heard
    assert deliver(client) == QUEUED
    assert len(upstream.connections) == 2, "what follows such a reply cannot be told from a part of it"


@pytest.mark.parametrize("octets", [b"250 2.0.0 queued", b"250-2.0.0 queued\r\n"], ids=repr)
def test_a_verdict_after_which_the_upstream_hangs_up_is_one(octets: bytes, raw_willi: Willi, raw: RawUpstream):
    client, peer = meet_in_data(raw_willi, raw)
    client.send(b"x\r\n.\r\n")
    peer.read_for(b".\r\n")
    peer.send(octets)
    peer.close()
    assert str(client.read_reply()) == "250 2.0.0 queued"


@pytest.mark.parametrize("size", [10, 500_000], ids=["small", "large"])
@pytest.mark.parametrize("octets", [b"250 2.0.0 ok\n", b"250-2.0.0 ok\r\n\r\n250-more"], ids=repr)
def test_a_chunk_whose_answer_is_badly_framed_is_the_last_one(
    octets: bytes, size: int, willi: Willi, upstream: ScriptedUpstream
):
    """What follows could be the rest of that answer. No other session notices that the connection is closed."""
    willi.tolerate("badly framed reply to the chunk before")
    upstream.answers[b"BDAT 3"] = octets
    client, other = in_envelope(willi), in_envelope(willi, "ben@b.example")
    assert chunk(client, CONTENT[:3]).startswith("250 2.0.0 ok")
    assert chunk(client, size * b"x", last=True) == LOST
    assert upstream.messages == []
    upstream.answers.clear()
    assert [deliver(client), chunk(other, CONTENT, last=True)] == [QUEUED, "250 2.0.0 ok"]


def test_a_verdict_before_the_end_is_none(raw_willi: Willi, raw: RawUpstream):
    client, peer = meet_in_data(raw_willi, raw)
    client.send(b"Subject: x\r\n\r\nthe first half\r\n")
    peer.read_for(b"half\r\n")
    peer.send(b"250 2.0.0 Ok: queued as EARLY\r\n")
    client.send(b"the second half\r\n.\r\n")
    assert str(client.read_reply()) == LOST
    assert b"\r\n.\r\n" not in peer.read_until_dropped()


def test_a_verdict_together_with_354_is_none(raw_willi: Willi, raw: RawUpstream):
    client, peer = meet(raw_willi, raw)
    client.send(b"DATA\r\n")
    peer.answer(b"DATA", b"354 go on\r\n250 2.0.0 Ok: queued as EARLY\r\n")
    assert client.read_reply().code == 354
    client.send(b"x\r\n.\r\n")
    assert str(client.read_reply()) == LOST
    assert b".\r\n" not in peer.read_until_dropped()


def test_a_verdict_behind_a_second_354_is_one(start_willi: StartWilli, raw: RawUpstream):
    """A 451 in its place would have the message delivered again at each attempt."""
    willi = start_willi(server=raw.server)
    client, peer = meet_in_data(willi, raw)
    client.send(CONTENT + b".\r\n")
    peer.read_for(CONTENT + b".\r\n")
    peer.send(b"354 go on\r\n")
    peer.send(b"250 2.0.0 Ok: queued as ONE\r\n")
    assert str(client.read_reply()) == "250 2.0.0 Ok: queued as ONE"
    assert willi.wait_for_log(lvl="warn", msg="Badly framed reply to a message")
    assert peer.read_until_dropped() == b"", "not even QUIT: what comes next may be the answer to anything"


def test_a_second_354_is_no_verdict(raw_willi: Willi, raw: RawUpstream):
    client, peer = meet(raw_willi, raw)
    client.send(b"DATA\r\n")
    peer.answer(b"DATA", b"354 go on\r\n354 go on\r\n")
    assert client.read_reply().code == 354
    client.send(b"x\r\n.\r\n")
    assert str(client.read_reply()) == LOST


def test_no_content_goes_to_an_upstream_that_has_said_more_than_354(raw_willi: Willi, raw: RawUpstream):
    """It may have refused DATA, and would take the lines of a long message for commands."""
    client, peer = meet(raw_willi, raw)
    client.send(b"DATA\r\n")
    peer.answer(b"DATA", b"354 go on\r\n503 5.5.1 No recipients\r\n")
    assert client.read_reply().code == 354
    client.send(b"RCPT TO:<eve@e.example>\r\n" * 50_000 + b".\r\n")
    assert str(client.read_reply()) == "503 5.5.1 No recipients"
    assert peer.read_until_dropped() == b""


def test_a_second_answer_to_a_chunk_is_no_verdict(raw_willi: Willi, raw: RawUpstream):
    client, peer = meet(raw_willi, raw, b"CHUNKING")
    client.send(b"BDAT 7\r\nfirst\r\n")
    peer.read_for(b"first\r\n")
    peer.send(b"250 2.0.0 7 octets\r\n250 2.0.0 Ok: queued as EARLY\r\n")
    assert str(client.read_reply()) == "250 2.0.0 7 octets"
    assert chunk(client, b"second\r\n", last=True) == LOST
    assert b"second" not in peer.read_until_dropped()


def test_a_verdict_in_place_of_354_is_none(raw_willi: Willi, raw: RawUpstream):
    client, peer = meet(raw_willi, raw)
    client.send(b"DATA\r\n")
    peer.answer(b"DATA", b"250 2.0.0 Ok: queued already\r\n")
    assert str(client.read_reply()) == LOST
    assert peer.read_until_dropped() == b""
    assert say(client, b"DATA", b"RSET") == [LOST, "250 2.0.0 Ok"]


def test_a_refusal_inside_the_message_is_passed_on_after_its_end(raw_willi: Willi, raw: RawUpstream):
    """The upstream's last words are its own, too; and it is not sent the end."""
    client, peer = meet_in_data(raw_willi, raw)
    client.send(b"x\r\n")
    peer.read_for(b"x\r\n")
    peer.send(b"552 5.3.4 too much of this\r\n")
    client.send(b"NOOP\r\nQUIT\r\n.\r\nNOOP\r\n")
    assert str(client.read_reply()) == "552 5.3.4 too much of this"
    assert str(client.read_reply()) == "250 2.0.0 Ok"
    assert b"\r\n.\r\n" not in peer.read_until_dropped()


def test_a_late_second_verdict_is_not_that_of_the_next_message(raw_willi: Willi, raw: RawUpstream):
    client, peer = meet_in_data(raw_willi, raw)
    client.send(b"one\r\n.\r\n")
    peer.read_for(b".\r\n")
    peer.send(b"250 2.0.0 Ok: queued as ONE\r\n250 2.0.0 Ok: queued as ONE\r\n")
    assert str(client.read_reply()) == "250 2.0.0 Ok: queued as ONE"
    assert client.command(MAIL).code == 250
    client.send(BOB + b"\r\n")
    second = raw.accept()  # the first connection can't be trusted any more
    second.take_envelope()
    assert client.read_reply().code == 250
    client.send(b"DATA\r\n")
    second.answer(b"DATA", b"354 go on\r\n")
    client.read_reply()
    client.send(b"two\r\n.\r\n")
    assert second.read_for(b".\r\n") == b"two\r\n.\r\n"
    second.send(b"250 2.0.0 Ok: queued as TWO\r\n")
    assert str(client.read_reply()) == "250 2.0.0 Ok: queued as TWO"


def test_the_last_chunk_of_nothing_gets_the_upstreams_verdict(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"BDAT 0 LAST"] = Reply(250, (b"2.0.0 Ok: queued as NOTHING",))
    client = in_envelope(willi)
    assert chunk(client, b"x\r\n") == "250 2.0.0 ok"
    assert chunk(client, b"", last=True) == "250 2.0.0 Ok: queued as NOTHING"
    assert upstream.messages[0].content == b"x\r\n"


def test_a_chunk_that_was_refused_is_not_made_good_by_the_next(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"BDAT 3"] = Reply(554, (b"5.6.0 no",))
    client = in_envelope(willi)
    assert chunk(client, b"a\r\n") == "554 5.6.0 no"
    assert chunk(client, b"b\r\n") == "554 5.6.0 no"
    assert chunk(client, b"c\r\n", last=True) == "554 5.6.0 no"
    assert deliver(client) == QUEUED
    assert [message.content for message in upstream.messages] == [CONTENT]


def test_each_of_many_messages_gets_its_own_verdict(willi: Willi, upstream: ScriptedUpstream):
    verdicts = [Reply(250, (b"2.0.0 Ok: queued as %d" % number,)) for number in range(20)]
    upstream.answers[VERDICT] = list(verdicts)
    client = greeted(willi)
    assert [deliver(client) for _ in verdicts] == list(map(str, verdicts))
    assert len(upstream.connections) == 1
