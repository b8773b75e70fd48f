"""What Willi offers, and what it does if the upstream lacks some of that."""

from __future__ import annotations

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.dns import DnsServer
from tests.support.talk import (
    BOB,
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
)
from tests.support.upstream import EXTENSIONS, GREETING, Action, Close, ScriptedUpstream

UMLAUT = "MAIL FROM:<änn@a.example> SMTPUTF8".encode()
NO_SMTPUTF8 = "550 5.6.7 Server for this recipient does not support SMTPUTF8"
NO_8BITMIME = "550 5.6.3 Server for this recipient does not support 8BITMIME"
LATER = "451 4.4.1 Server that may support this message does not answer, try again"
UNKNOWN = "555 5.5.4 MAIL or RCPT parameter not recognized"
SYNTAX = "501 5.5.4 Syntax error in parameters"


def without(*names: bytes) -> tuple[bytes, ...]:
    """What a scripted upstream offers, but for these."""
    return tuple(extension for extension in EXTENSIONS if extension.split()[0] not in names)


def offered(client: Client) -> list[bytes]:
    return list(client.command(EHLO).lines[1:])


# What is offered


def test_the_offer(willi: Willi):
    with willi.connect() as client:
        assert offered(client) == [
            b"PIPELINING", b"SIZE 20971520", b"ENHANCEDSTATUSCODES", b"8BITMIME", b"SMTPUTF8", b"CHUNKING",
        ]  # fmt: skip


def test_size_says_what_the_file_says(start_willi: StartWilli, upstream: ScriptedUpstream):
    with start_willi(server=upstream.server, max_message_bytes="10kB").connect() as client:
        assert b"SIZE 10000" in offered(client)


@pytest.mark.parametrize(
    ("extensions", "left"),
    [
        (["8BITMIME"], [b"8BITMIME"]),
        (["CHUNKING", "8BITMIME"], [b"8BITMIME", b"CHUNKING"]),
        (["SMTPUTF8", "8BITMIME"], [b"8BITMIME", b"SMTPUTF8"]),
    ],
    ids=str,
)
def test_the_extensions_in_the_file_remain(
    extensions: list[str], left: list[bytes], start_willi: StartWilli, upstream: ScriptedUpstream
):
    with start_willi(server=upstream.server, extensions=extensions).connect() as client:
        assert offered(client) == [b"PIPELINING", b"SIZE 20971520", b"ENHANCEDSTATUSCODES", *left]


def test_what_is_not_offered_is_refused(start_willi: StartWilli, upstream: ScriptedUpstream):
    with greeted(start_willi(server=upstream.server, extensions="")) as client:
        assert say(client, MAIL + b" BODY=8BITMIME", MAIL + b" SMTPUTF8") == [UNKNOWN, UNKNOWN]
        assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        assert chunk(client, b"QUIT\r\n", last=True) == "502 5.5.1 Command not implemented"
        assert say(client, b"DATA") == [GO_ON]
        assert content(client) == QUEUED


# SIZE


def test_the_size_is_passed_on(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client, mail=MAIL + b" size=12345 body=8bitmime") == QUEUED
    assert upstream.wait_for_message().mail == MAIL + b" SIZE=12345 BODY=8BITMIME"


def test_an_upstream_without_size_does_not_hear_it(willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = without(b"SIZE")
    with greeted(willi) as client:
        assert deliver(client, mail=MAIL + b" SIZE=12345") == QUEUED
    assert upstream.wait_for_message().mail == MAIL


def test_a_size_above_the_limit_is_refused_at_once(start_willi: StartWilli, upstream: ScriptedUpstream):
    with greeted(start_willi(server=upstream.server, max_message_bytes=1000)) as client:
        too_big = "552 5.3.4 Message is too big"
        lines = MAIL + b" SIZE=1001", MAIL + b" SIZE=" + b"9" * 20, b"DATA", MAIL + b" SIZE=1000"
        assert say(client, *lines) == [too_big, too_big, "503 5.5.1 Need MAIL command", SENDER_KEPT]


@pytest.mark.parametrize("size", [b"SIZE", b"SIZE=", b"SIZE=-1", b"SIZE=1k", b"SIZE=" + b"9" * 21, b"SIZE=1 SIZE=1"])
def test_a_size_that_is_none_is_a_syntax_error(size: bytes, willi: Willi):
    with greeted(willi) as client:
        assert str(client.command(MAIL + b" " + size)) == SYNTAX


# SMTPUTF8


def test_non_ascii_addresses_are_passed_on(willi: Willi, upstream: ScriptedUpstream):
    bob = "RCPT TO:<bøb@bücher.example>".encode()
    with greeted(willi) as client:
        assert deliver(client, bob, mail=UMLAUT) == QUEUED
    message = upstream.wait_for_message()
    assert (message.mail, message.rcpts) == (UMLAUT, (bob,))


def test_joiners_and_letters_newer_than_this_python_are_letters(start_willi: StartWilli, upstream: ScriptedUpstream):
    farsi, new = "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.example", "\U0001faea.example"
    names = [f"xn--{name[:-8].encode('punycode').decode()}.example" for name in (farsi, new)]
    lines = "".join(f"{name};{upstream.server};false\n" for name in (*names, "b.example", "b.org"))
    willi = start_willi(csv=f"pattern;server;tls_verify\n{lines}")
    addresses = [f"bob@{farsi}", f"ben@{new}", "\u0936\u094d\u200d\u0930@b.example", "\U0001f468\u200d\U0001f469@b.org"]
    with greeted(willi) as client:
        for address in addresses:
            path = address.encode()
            assert deliver(client, b"RCPT TO:<%b>" % path, mail=b"MAIL FROM:<%b> SMTPUTF8" % path) == QUEUED
    assert [m.recipients for m in upstream.messages] == [(address.encode(),) for address in addresses]
    assert willi.lines(msg="Message accepted")[0]["to"] == addresses[0]


def test_smtputf8_is_refused_if_the_upstream_lacks_it(willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = without(b"SMTPUTF8")
    with greeted(willi) as client:
        heard = say(client, UMLAUT, BOB, BOB, b"DATA")
        assert heard == [SENDER_KEPT, NO_SMTPUTF8, NO_SMTPUTF8, "554 5.5.1 No valid recipients"]
        assert say(client, b"RSET") == ["250 2.0.0 Ok"]
        assert deliver(client) == QUEUED
    assert UMLAUT not in upstream.commands
    assert len(upstream.connections) == 1


@pytest.mark.parametrize("parameter", [b" SMTPUTF8", b" BODY=8BITMIME"])
def test_nothing_is_refused_for_good_by_a_host_that_stands_in_for_another(
    parameter: bytes, start_willi: StartWilli, upstream: ScriptedUpstream, other: ScriptedUpstream
):
    """What one upstream lacks, the one that is down may have."""
    willi = start_willi(server=f"{other.server},{upstream.server}", strict_8bitmime=True)
    upstream.extensions = ()
    other.stop()
    for _ in range(2):  # at first the other one is asked, then it is known to be down
        with greeted(willi) as client:
            assert say(client, MAIL + parameter, BOB, b"RSET") == [SENDER_KEPT, LATER, "250 2.0.0 Ok"]
            assert deliver(client) == QUEUED


def test_nor_by_an_address_that_stands_in_for_another(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    six = start_upstream(host="::1")
    four = start_upstream(port=six.port)
    failures: list[Action] = [Close()]
    for upstream in (six, four):
        upstream.extensions = ()
        upstream.answers[GREETING] = failures
    dns.zone["mx.b.example"] = {"A": ["127.0.0.1"], "AAAA": ["::1"]}
    willi = start_willi(server=f"mx.b.example:{six.port}", dns=dns)
    for _ in range(2):
        with greeted(willi) as client:
            assert say(client, MAIL + b" SMTPUTF8", BOB) == [SENDER_KEPT, LATER]


def test_non_ascii_without_smtputf8_is_refused(willi: Willi):
    needs = "553 5.6.7 Non-ASCII address needs SMTPUTF8"
    with greeted(willi) as client:
        assert say(client, UMLAUT.removesuffix(b" SMTPUTF8"), MAIL) == [needs, SENDER_KEPT]
        assert say(client, "RCPT TO:<bøb@b.example>".encode()) == [needs]


@pytest.mark.parametrize("octets", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc2\x9b", b"\xe2\x80\xa8"], ids=repr)
def test_what_is_not_utf_8_or_no_letter_is_refused(octets: bytes, willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        bad = b"MAIL FROM:<ann" + octets + b"@a.example> SMTPUTF8"
        assert say(client, bad) == ["501 5.1.7 Bad sender address syntax"]
        assert say(client, UMLAUT) == [SENDER_KEPT]
        assert say(client, b"RCPT TO:<bob" + octets + b"@b.example>") == ["501 5.1.3 Bad recipient address syntax"]
    assert upstream.connections == []


def test_a_domain_is_found_by_its_letters_and_by_its_a_label(start_willi: StartWilli, upstream: ScriptedUpstream):
    csv = f"pattern;server;tls_verify\nxn--bcher-kva.example;{upstream.server};false\n"
    with greeted(start_willi(csv=csv)) as client:
        assert deliver(client, "RCPT TO:<bob@BÜCHER.example>".encode(), mail=UMLAUT) == QUEUED
    assert upstream.wait_for_message().rcpts == ("RCPT TO:<bob@BÜCHER.example>".encode(),)


# 8BITMIME


@pytest.mark.parametrize("body", [b"8BITMIME", b"7BIT"], ids=bytes.decode)
def test_an_upstream_without_8bitmime_gets_the_octets_all_the_same(
    body: bytes, willi: Willi, upstream: ScriptedUpstream
):
    upstream.extensions = without(b"8BITMIME")
    octets = b"Subject: \xe4\xf6\xfc\r\n\r\n\xff\r\n"
    with greeted(willi) as client:
        assert say(client, MAIL + b" BODY=" + body, BOB, b"DATA") == [SENDER_KEPT, OK, GO_ON]
        assert content(client, octets) == QUEUED
    message = upstream.wait_for_message()
    assert (message.mail, message.content) == (MAIL, octets)


def test_a_strict_willi_refuses_8bitmime_if_the_upstream_lacks_it(start_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.extensions = without(b"8BITMIME")
    with greeted(start_willi(server=upstream.server, strict_8bitmime=True)) as client:
        assert say(client, MAIL + b" BODY=8BITMIME", BOB) == [SENDER_KEPT, NO_8BITMIME]
        assert say(client, b"RSET", MAIL + b" BODY=7BIT", BOB) == ["250 2.0.0 Ok", SENDER_KEPT, OK]


@pytest.mark.parametrize("body", [b"BODY", b"BODY=BINARYMIME", b"BODY=9BIT"], ids=bytes.decode)
def test_another_body_is_refused(body: bytes, willi: Willi):
    with greeted(willi) as client:
        assert str(client.command(MAIL + b" " + body)) == UNKNOWN


# CHUNKING


def test_chunks_become_data_if_the_upstream_lacks_chunking(willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = without(b"CHUNKING")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        assert chunk(client, b"Subject: x\r\n\r\n.") == "250 2.0.0 15 octets received"
        assert chunk(client, b"\r\n..\r\n.\r") == "250 2.0.0 8 octets received"
        assert chunk(client, b"\nno line end", last=True) == QUEUED
        assert deliver(client) == QUEUED
    first = upstream.wait_for_message()
    assert first.wire == b"Subject: x\r\n\r\n..\r\n...\r\n..\r\nno line end\r\n.\r\n"
    assert len(upstream.connections) == 1


@pytest.mark.parametrize(
    ("parts", "wire"),
    [
        ([b""], b".\r\n"),
        ([b"hello\r\n", b""], b"hello\r\n.\r\n"),
        ([b"hello", b""], b"hello\r\n.\r\n"),
        ([b"hello\r", b"\n"], b"hello\r\n.\r\n"),
        ([b".\r\n"], b"..\r\n.\r\n"),
        ([b"\r\n", b".\r\n"], b"\r\n..\r\n.\r\n"),
        ([b"\r", b"\n", b".", b"\r", b"\n"], b"\r\n..\r\n.\r\n"),
    ],
    ids=repr,
)
def test_no_chunk_can_end_the_data_that_it_becomes(
    parts: list[bytes], wire: bytes, willi: Willi, upstream: ScriptedUpstream
):
    upstream.extensions = without(b"CHUNKING")
    with greeted(willi) as client:
        say(client, MAIL, BOB)
        for part in parts[:-1]:
            assert chunk(client, part) == f"250 2.0.0 {len(part)} octets received"
        assert chunk(client, parts[-1], last=True) == QUEUED
    assert upstream.wait_for_message().wire == wire


def test_a_refused_data_is_the_answer_to_the_first_chunk(willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = without(b"CHUNKING")
    upstream.answers[b"DATA"] = [reply("451 4.3.0 no disk")]
    with greeted(willi) as client:
        say(client, MAIL, BOB)
        assert chunk(client, b"QUIT\r\n") == "451 4.3.0 no disk"
        assert chunk(client, b"QUIT\r\n", last=True) == "451 4.3.0 no disk"
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1


# Parameters


def test_unknown_parameters_of_mail_are_refused(willi: Willi):
    with greeted(willi) as client:
        for parameter in (b"RET=HDRS", b"ENVID=x", b"AUTH=<>", b"REQUIRETLS", b"HOLDFOR=1", b"X-Y=z", b"SMTPUTF8=yes"):
            assert say(client, MAIL + b" " + parameter) == [UNKNOWN], parameter
        for parameter in (b"=", b"=x", b"A==", b"A=b=c", b"A=\xc3\xa4", b"-a"):
            assert say(client, MAIL + b" " + parameter) == [SYNTAX], parameter
        assert say(client, MAIL) == [SENDER_KEPT]


def test_unknown_parameters_of_rcpt_are_refused(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL) == [SENDER_KEPT]
        for parameter in (b"NOTIFY=NEVER", b"ORCPT=rfc822;bob@b.example", b"X"):
            assert say(client, BOB + b" " + parameter) == [UNKNOWN], parameter
        assert say(client, BOB) == [OK]
    assert upstream.connection().commands[1:3] == [MAIL, BOB]


# HELO


def test_a_client_that_says_helo_gets_helo_upstream(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi, b"HELO c.example") as client:
        assert deliver(client) == QUEUED
    heard = upstream.connection().commands
    assert heard[:5] == [b"EHLO willi.example", b"HELO willi.example", MAIL, BOB, b"DATA"]


def test_the_reply_to_helo_is_one_line(willi: Willi):
    with willi.connect() as client:
        assert str(client.command(b"HELO c.example")) == "250 willi.example"


@pytest.mark.parametrize("send_proxy", ["no", "v2"])
def test_an_upstream_that_takes_one_greeting_only_serves_helo_clients_too(
    send_proxy: str, start_willi: StartWilli, start_upstream: StartUpstream
):
    """OpenSMTPD: 503 to HELO after EHLO, and MAIL is possible all the same."""
    upstream = start_upstream(proxy=send_proxy != "no")
    upstream.answers[b"HELO"] = reply("503 5.5.1 Invalid command: Already identified")
    willi = start_willi(server=upstream.server, send_proxy=send_proxy)
    with greeted(willi, b"HELO c.example") as client:
        assert deliver(client) == QUEUED
    assert [line.split()[0] for line in upstream.commands[:3]] == [b"EHLO", b"HELO", b"MAIL"]
