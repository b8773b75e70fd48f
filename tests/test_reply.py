"""Replies as values, the line of an upstream's reply, and the catalogue of our own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib.smtp import reply as replies
from willi_lib.smtp.reply import (
    MAX_REPLY_LINES,
    BadReply,
    Rejected,
    Reply,
    at_rcpt,
    first_reply,
    is_own,
    own,
    parse_reply_line,
    salvage,
)

OWN = {name: value for name, value in vars(replies).items() if isinstance(value, Reply)}


def test_a_reply_of_one_line_ends_with_crlf():
    assert Reply(250, (b"2.0.0 Ok",)).octets == b"250 2.0.0 Ok\r\n"
    assert Reply(250, (b"",)).octets == b"250 \r\n"


def test_all_lines_but_the_last_have_a_hyphen():
    assert Reply(250, (b"mx", b"", b"SIZE")).octets == b"250-mx\r\n250-\r\n250 SIZE\r\n"


def test_replies_are_equal_by_value_and_can_be_keys():
    assert Reply(250, (b"Ok",)) == Reply(250, (b"Ok",)) != Reply(250, (b"ok",))
    assert len({Reply(250, (b"Ok",)), Reply(250, (b"Ok",)), Reply(251, (b"Ok",))}) == 2


@pytest.mark.parametrize(("code", "positive", "permanent"), [
    (200, True, False), (299, True, False), (300, False, False), (354, False, False), (399, False, False),
    (400, False, False), (499, False, False), (500, False, True), (599, False, True),
])  # fmt: skip
def test_the_first_digit_says_what_a_reply_means(code, positive, permanent):
    reply = Reply(code, (b"",))
    assert (reply.positive, reply.permanent) == (positive, permanent)


@pytest.mark.parametrize(("code", "positive", "welcomes"), [
    (219, True, True), (220, False, True), (221, False, False), (222, True, True), (250, True, True),
    (354, False, False), (421, False, False),
])  # fmt: skip
def test_a_greeting_and_a_goodbye_are_no_yes_to_a_command(code, positive, welcomes):
    reply = Reply(code, (b"",))
    assert (reply.positive, reply.welcomes) == (positive, welcomes)


def test_for_the_log_a_reply_is_one_line_whatever_is_in_it():
    assert str(Reply(550, (b"5.1.1 no bob", "5.1.1 grüß".encode(), b"\xff"))) == "550 5.1.1 no bob / 5.1.1 grüß / \\xff"


def test_a_refusal_carries_its_reply():
    refusal = Rejected(replies.TOO_BIG)
    assert refusal.reply is replies.TOO_BIG
    assert str(refusal) == "552 5.3.4 Message is too big"


@pytest.mark.parametrize(("line", "parsed"), [
    (b"250", (250, True, b"")),
    (b"250 ", (250, True, b"")),
    (b"250-", (250, False, b"")),
    (b"250  two", (250, True, b" two")),
    (b"250--", (250, False, b"-")),
    (b"200 first", (200, True, b"first")),
    (b"599 last", (599, True, b"last")),
    (b"550 \x1b[31m\xff\0", (550, True, b"?[31m\xff?")),
    (b"550 a\tb \x7f\x1f\x80", (550, True, b"a\tb ??\x80")),
])  # fmt: skip
def test_a_reply_line_is_code_end_and_text(line, parsed):
    assert parse_reply_line(line) == parsed


@pytest.mark.parametrize("line", [
    b"", b" ", b"2", b"3", b"25", b"45", b"59", b"250Ok", b"250\tOk", b"2500 Ok", b"199 Ok", b"600 Ok", b"999 Ok",
    b"000 Ok", b" 250 Ok", b"-250 Ok", b"+25 Ok", b"2 0 Ok", b"25a Ok", b"\xb2\xb5\xb0 Ok", "²50 Ok".encode(), b"Ok",
])  # fmt: skip
def test_what_is_no_reply_line_is_refused(line):
    with pytest.raises(BadReply):
        parse_reply_line(line)


IN_ORDER = [
    (b"250\r\n", Reply(250, (b"",))),
    (b"250 \r\n", Reply(250, (b"",))),
    (b"354 Go ahead\r\n", Reply(354, (b"Go ahead",))),
    (b"250-mx\r\n250-\r\n250 SIZE 5\r\n", Reply(250, (b"mx", b"", b"SIZE 5"))),
    (b"250-5.1.1 n\to\r\n550 \0\xff-\x1b\r\n", Reply(550, (b"5.1.1 n\to", b"?\xff-?"))),
    (b"250-x\r\n" * (MAX_REPLY_LINES - 1) + b"250 y\r\n", Reply(250, (b"x",) * (MAX_REPLY_LINES - 1) + (b"y",))),
]


@pytest.mark.parametrize(("octets", "reply"), IN_ORDER)
@pytest.mark.parametrize("next_reply", [b"", b"2", b"\r\n", b"550 5.1.1 no\r\n"])
def test_a_reply_that_is_in_order_is_taken_at_once_and_no_more_than_that(octets, reply, next_reply):
    assert first_reply(octets + next_reply) == (reply, len(octets))


@pytest.mark.parametrize(("octets", "reply"), IN_ORDER[:5])
def test_a_reply_is_not_taken_before_it_is_complete(octets, reply):
    assert [first_reply(octets[:size]) for size in range(len(octets))] == [None] * len(octets)


@pytest.mark.parametrize("octets", [
    b"Ok\r\n", b"250Ok\r\n", b"199 Ok\r\n", b"600 Ok\r\n", b" 250 Ok\r\n", b"\xb2\xb5\xb0 Ok\r\n", b"250 Ok\n",
    b"250 O\rk\r\n", b"250 O\nk\r\n", b"250-a\n250 b\r\n", b"250-a\r\nOk\r\n250 b\r\n",
    b"250-x\r\n" * MAX_REPLY_LINES + b"250 y\r\n",
])  # fmt: skip
def test_what_is_not_in_order_is_left_to_whoever_looks_at_each_line(octets):
    assert first_reply(octets) is None


def test_what_is_no_reply_line_is_quoted_in_part_only():
    with pytest.raises(BadReply) as error:
        parse_reply_line(b"\n" * 4000)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


SALVAGED = [
    (b"250 2.0.0 Ok\nqueued as AB12\r\n", "250 2.0.0 Ok / queued as AB12"),
    (b"250 2.0.0 Ok: queued as AB12\r\r\n", "250 2.0.0 Ok: queued as AB12"),
    (b"250 2.0.0 Ok\n", "250 2.0.0 Ok"),
    (b"250-2.0.0 Ok\n250 queued\n", "250 2.0.0 Ok / queued"),
    (b"250-2.0.0 Ok\r\nqueued\r\n250 bye\r\n", "250 2.0.0 Ok / queued / bye"),
    (b"250 one\n550 two\n", "250 one"),
    (b"\r\n250 Ok\r\n", "250 Ok"),
    (b" \t250 Ok\r\n", "250 Ok"),
    (b"550-one\r\n550", "550 one"),
    (b"250", "250 "),
    (b"250-", "250 "),
    (b"250 2.0.0 o\0k\x1b\n", "250 2.0.0 o?k?"),
    (b"250 a\rb\n", "250 a?b"),
    (b"250\tOk\n", "250 \tOk"),
    (b"552 " + b"x" * 5000, "552 " + "x" * 506),
    (b"250-x\r\n" * 300, "250 " + " / ".join("x" * MAX_REPLY_LINES)),
]


@pytest.mark.parametrize(("octets", "reply"), SALVAGED, ids=range(len(SALVAGED)))
def test_of_a_badly_framed_verdict_the_code_counts_and_the_text_is_kept_as_far_as_it_can_be(octets, reply):
    assert str(salvage(octets)) == reply


@pytest.mark.parametrize("octets", [
    b"", b"2", b"25", b"\r\n", b" 25 0 Ok", b"2500 Ok", b"199 Ok", b"600 Ok", b"250Ok", b"250_Ok",
    b"Ok\r\n250 Ok\r\n",
])  # fmt: skip
def test_where_no_code_can_be_read_there_is_no_verdict(octets):
    assert salvage(octets) is None


@given(st.binary(max_size=40))
def test_what_is_salvaged_can_be_sent_to_a_client(octets):
    reply = salvage(b"250" + octets)
    assert reply is None or first_reply(reply.octets) == (reply, len(reply.octets))


@given(st.binary(max_size=8))
def test_any_line_is_a_reply_line_or_refused(line):
    try:
        code, last, text = parse_reply_line(line)
    except BadReply:
        assert not re.match(rb"[2-5][0-9][0-9](?:[ -]|\Z)", line)
    else:
        assert 200 <= code <= 599
        assert b"%d%s" % (code, b"" if len(line) == 3 else b" " if last else b"-") == line[:4]
        assert text == re.sub(rb"[\0-\x08\x0a-\x1f\x7f]", b"?", line[4:])


TEXT = st.lists(st.sampled_from([b"\t", b" ", b"-", b"a", b"\x80", b"\xff"]), max_size=20).map(b"".join)


@given(st.integers(200, 599), st.lists(TEXT, min_size=1))
def test_a_reply_is_read_back_as_it_was_written(code, lines):
    written = Reply(code, tuple(lines)).octets
    *parsed, rest = (line for line in written.split(b"\r\n"))
    assert rest == b""
    assert [parse_reply_line(line) for line in parsed] == [
        (code, number == len(lines), text) for number, text in enumerate(lines, start=1)
    ]


@pytest.mark.parametrize("name", OWN)
def test_our_own_replies_have_an_enhanced_code_of_the_same_class(name):
    reply = OWN[name]
    assert len(reply.lines) == 1
    assert re.fullmatch(rb"%d\.\d{1,3}\.\d{1,3} [ -~]+" % (reply.code // 100), reply.lines[0])
    assert len(reply.octets) <= 512  # RFC 5321 §4.5.3.1.5


def test_a_reply_in_our_words_is_not_our_own():
    assert all(map(is_own, OWN.values()))
    assert not any(is_own(Reply(reply.code, reply.lines)) for reply in OWN.values())


def test_at_rcpt_no_refusal_is_a_552():
    full = (b"5.3.4 too big", b"5.3.4 sorry")
    assert at_rcpt(Reply(552, full)) == Reply(554, full)
    for code in (450, 452, 550, 551, 553):
        assert at_rcpt(Reply(code, full)) == Reply(code, full)


def test_what_goes_wrong_inside_willi_is_temporary():
    ours = ("OUR_FAULT", "LOOKUP_FAILED", "UPSTREAM_FAILED", "UPSTREAM_LOST", "XCLIENT_NEEDED")
    assert {OWN[name].code // 100 for name in ours} == {4}


def test_a_reply_of_our_own_without_an_enhanced_code_begins_with_its_text():
    assert own(220, "", "mx.example ESMTP") == Reply(220, (b"mx.example ESMTP",))
