"""XCLIENT: what a client may say in it, and what an upstream is told."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib.smtp import reply as replies
from willi_lib.smtp.reply import Rejected
from willi_lib.smtp.xclient import MAX_LINE, MAX_VALUE, Told, from_xtext, lines, parse, xtext


def is_refused(argument: bytes) -> bool:
    with pytest.raises(Rejected) as refused:
        parse(argument)
    return refused.value.reply == replies.BAD_XCLIENT


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_xtext_is_read_back_and_is_printable_ascii_without_spaces(text):
    encoded = xtext(text)
    assert from_xtext(encoded) == text
    assert re.fullmatch(rb"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*", encoded)


@pytest.mark.parametrize(("text", "encoded"), [
    ("IPV6:2001:db8::1", b"IPV6:2001:db8::1"), ("[UNAVAILABLE]", b"[UNAVAILABLE]"), ("a+b=c d", b"a+2Bb+3Dc+20d"),
    ("\r\n", b"+0D+0A"), ("ü", b"+C3+BC"), ("", b""),
])  # fmt: skip
def test_xtext_escapes_what_it_must(text, encoded):
    assert xtext(text) == encoded


def test_attributes_are_decoded_and_what_is_not_mentioned_is_none():
    assert parse(b"name=c.example ADDR=192+2E0.2.1 Helo=a+2Bb+3Dc") == Told("192.0.2.1", 0, "c.example")
    assert parse(b"Port=25 PROTO=ESMTP") == Told(None, 25, None)
    assert parse(b"HELO=" + b"x" * MAX_VALUE) == Told(None, 0, None)


@pytest.mark.parametrize("argument", [
    b"", b" ", b"NAME", b"NAME=", b"NAME=a ADDR", b"HELO=" + b"x" * 256, b"HELO=+0A", b"HELO=a+20b+0D", b"HELO=+C3+BC",
    b"HELO=+FF", b"HELO=\xff", b"HELO=+1B[m", b"HELO=+7F", b"ADDR=192.0.2.1 ADDR=192.0.2.2", b"HELO=a helo=a",
    b"NAME=a+2", b"NAME=a+", b"NAME=+", b"NAME=a+2x", b"NAME=a+XYb", b"NAME=a+2db", b"NAME=a++2B", b"NAME=a=b",
    b"ADDR=192.0.2.1 NAME=a+2", b"NAME=a+2 ADDR=192.0.2.1", b"HELO=+2", b"HELO=x+4", b"LOGIN=+Z1", b"PORT=2+5",
    b"ADDR=IPV6:2001:db8::1+", b"=x", b"NAME==x", b"LOGIN=x", b"ADDR=192.0.2.1 DESTPORT=25", b"\xc3\xbc=x",
])  # fmt: skip
def test_a_bad_attribute_is_refused(argument):
    assert is_refused(argument)


@pytest.mark.parametrize(("text", "address"), [
    ("192.0.2.1", "192.0.2.1"), ("IPV6:2001:DB8:0::1", "2001:db8::1"), ("ipv6:::1", "::1"), ("[UNAVAILABLE]", ""),
    ("[tempunavail]", ""), ("IPV6:::ffff:192.0.2.1", "192.0.2.1"), ("IPV6:::FFFF:c000:201", "192.0.2.1"),
    ("IPV6:0:0:0:0:0:ffff:192.0.2.1", "192.0.2.1"),
])  # fmt: skip
def test_an_address_is_normalised(text, address):
    assert parse(b"ADDR=" + text.encode()).address == address


@pytest.mark.parametrize("text", ["", "2001:db8::1", "IPV6:192.0.2.1", "192.0.2.01", "192.0.2", "c.example", "IPV6:",
                                  "IPV6:fe80::1%eth0", "[192.0.2.1]", "٣.0.0.1"])  # fmt: skip
def test_a_bad_address_is_refused(text):
    assert is_refused(b"ADDR=" + xtext(text))


@pytest.mark.parametrize("text", ["c.example", "a_b.example", "[UNAVAILABLE]", "[tempunavail]"])
def test_a_name_is_a_host_name_or_says_that_there_is_none(text):
    assert (parse(b"NAME=" + text.encode()).name or "").lower() == text.lower()


@pytest.mark.parametrize("text", ["", "a b", "-a.example", "192.0.2.1", "[UNKNOWN]", "a..b", "x" * 255])
def test_a_bad_name_is_refused(text):
    assert is_refused(b"NAME=" + xtext(text))


def test_a_port_is_a_number_up_to_65535():
    assert [parse(b"PORT=" + text).port for text in (b"0", b"25", b"65535", b"[unavailable]")] == [0, 25, 65535, 0]
    assert all(is_refused(b"PORT=" + text) for text in (b"", b"-1", b"65536", b"000025", b"x", b"0x1"))


def client(helo: str, name: str) -> list[tuple[str, str]]:
    return [("PROTO", "ESMTP"), ("HELO", helo), ("NAME", name), ("PORT", "65535"), ("ADDR", "IPV6:2001:db8::1")]


def test_all_attributes_go_in_one_command_if_they_fit():
    assert lines(client("c.example", "[UNAVAILABLE]")) == [
        b"XCLIENT PROTO=ESMTP HELO=c.example NAME=[UNAVAILABLE] PORT=65535 ADDR=IPV6:2001:db8::1"
    ]
    assert lines([]) == []
    assert lines([("ADDR", "192.0.2.1")]) == [b"XCLIENT ADDR=192.0.2.1"]


@pytest.mark.parametrize("length", range(180, 254))
def test_a_command_that_gets_too_long_is_split_at_the_right_octet(length):
    commands = lines(client("h" * MAX_VALUE, "n" * length))
    assert b"".join(command.removeprefix(b"XCLIENT") for command in commands) == (
        b" PROTO=ESMTP HELO=%b NAME=%b PORT=65535 ADDR=IPV6:2001:db8::1" % (b"h" * MAX_VALUE, b"n" * length)
    )
    assert commands[-1].endswith(b" PORT=65535 ADDR=IPV6:2001:db8::1")
    assert len(commands) == (1 if len(b"".join(commands)) + 2 <= MAX_LINE else 2)
    assert all(len(command) + 2 <= MAX_LINE for command in commands)


@pytest.mark.parametrize("helo", ["+" * 85, "=" * 85, "+" * 84 + "aaa"])
def test_a_value_that_is_255_octets_as_xtext_is_sent(helo):
    assert b" HELO=" + xtext(helo) in lines(client(helo, "c.example"))[0]


@pytest.mark.parametrize("helo", ["+" * 86, "=" * 255, "+" * 85 + "a"])
def test_a_value_that_is_longer_as_xtext_is_left_out_and_the_address_is_still_sent(helo):
    assert lines(client(helo, "c.example")) == [b"XCLIENT PROTO=ESMTP NAME=c.example PORT=65535 ADDR=IPV6:2001:db8::1"]


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=MAX_VALUE), st.integers(1, 253))
def test_whatever_a_client_calls_itself_its_address_goes_upstream_last_and_every_line_is_short(helo, length):
    commands = lines(client(helo, "n" * length))
    assert commands[-1].endswith(b" PORT=65535 ADDR=IPV6:2001:db8::1")
    told = dict(client(helo, "n" * length))
    for command in commands:
        assert len(command) + 2 <= MAX_LINE
        assert command.isascii() and command.decode().isprintable()
        for word in command.split()[1:]:
            name, _, value = word.partition(b"=")
            assert from_xtext(value) == told[name.decode()]
