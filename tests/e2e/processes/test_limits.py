"""Limits: what is allowed at the limit, what is said one beyond, and that it is said before hanging up."""

from __future__ import annotations

import itertools
import socket
from contextlib import ExitStack
from functools import partial

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Pair
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import free_port, wait_until
from tests.support.talk import (
    BEN,
    BOB,
    CARL,
    EHLO,
    GO_ON,
    MAIL,
    NO_ANSWER,
    OK,
    QUEUED,
    SENDER_KEPT,
    content,
    deliver,
    greeted,
    reply,
    say,
    two_domains,
)
from tests.support.upstream import GREETING, Close, Delay, Ended, ScriptedUpstream, Silence
from willi_lib.proxy.commands import MAX_DEFERRALS, MAX_JUNK
from willi_lib.proxy.transaction import MAX_IN_VAIN

TOO_MANY = "421 4.3.2 Too many connections, try again later"
TOO_MANY_FROM_YOU = "421 4.7.0 Too many connections from your address"
TOO_FAST = "421 4.7.0 Too many connections from your address in a minute"
TOO_MANY_ERRORS = "421 4.7.0 Too many errors"
BANNER = "220 willi.example ESMTP Willi"
UNKNOWN = "500 5.5.2 Command not recognized"


def first_words(willi: Willi, ends: ExitStack, source: str = "127.0.0.2") -> str:
    """What a new connection hears; a refused one is closed properly after it. It stays open until the end."""
    client = ends.enter_context(willi.connect(source=source, greeting=False))
    answer = str(client.read_reply())
    if answer != BANNER:
        client.expect_eof()
    return answer


def test_max_connections(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_connections=3)
    with ExitStack() as ends:
        clients = [ends.enter_context(willi.connect(source=f"127.0.0.{number}")) for number in (2, 3, 4)]
        assert first_words(willi, ends, "127.0.0.5") == first_words(willi, ends, "127.0.0.2") == TOO_MANY
        say(clients[0], EHLO)
        assert deliver(clients[0]) == QUEUED, "those that are in are not harmed"
        assert str(clients[1].command(b"QUIT")) == "221 2.0.0 Bye"
        clients[1].expect_eof()
        assert first_words(willi, ends, "127.0.0.5") == BANNER
        assert first_words(willi, ends, "127.0.0.6") == TOO_MANY
    line = willi.wait_for_log(msg="Connection refused", client="127.0.0.6")
    assert line["reply"] == TOO_MANY


def test_max_connections_per_ip(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_connections_per_ip=2)
    with ExitStack() as ends:
        heard = [first_words(willi, ends) for _ in range(4)]
        assert heard == [BANNER, BANNER, TOO_MANY_FROM_YOU, TOO_MANY_FROM_YOU]
        assert first_words(willi, ends, "127.0.0.3") == BANNER
    wait_until(lambda: is_let_in(willi), "room after the others have gone")


def is_let_in(willi: Willi, source: str = "127.0.0.2") -> bool:
    with ExitStack() as ends:
        return first_words(willi, ends, source) == BANNER


def test_a_client_that_was_reset_does_not_count_for_ever(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_connections_per_ip=1)
    for way in ([], [EHLO], [EHLO, MAIL, BOB], [EHLO, MAIL, BOB, b"DATA"]):
        client = willi.connect(source="127.0.0.2")
        say(client, *way)
        client.reset()
        wait_until(lambda: is_let_in(willi), "room after a reset")
        wait_until(lambda: is_let_in(willi), "and again")


def test_a_client_that_hangs_up_while_its_upstream_takes_its_time_does_not_count(
    start_willi: StartWilli, start_upstream: StartUpstream, postfix_certificate: Pair
):
    """In each way and at each moment; side by side, since it takes some looks at all sessions until it counts as gone.

    There is room for one client of each address.
    """
    cases = list(itertools.product([GREETING, b"RCPT", b"DATA"], ["close", "reset", "close in TLS"]))
    upstreams, table = [], ["pattern;server;tls_verify\n"]
    for number, (verb, _) in enumerate(cases):
        upstream = start_upstream()
        upstream.answers[verb] = Silence()
        upstreams.append(upstream)
        table.append(f"{number}.example;{upstream.server};false\n")
    willi = start_willi(
        csv="".join(table), max_connections_per_ip=1, connect_timeout="4m",
        tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key,
    )  # fmt: skip
    for number, ((verb, way), upstream) in enumerate(zip(cases, upstreams, strict=True)):
        client = willi.connect(source=f"127.0.0.{number + 2}")
        if way == "close in TLS":
            assert say(client, EHLO)[0].startswith("250 ") and client.starttls().code == 220
        rcpt = b"RCPT TO:<bob@%d.example>" % number
        say(client, EHLO, MAIL, *([rcpt] if verb == b"DATA" else []))
        client.send((b"DATA" if verb == b"DATA" else rcpt) + b"\r\n")
        upstream.connection().wait_for_command(verb) if verb != GREETING else upstream.connection()
        if way == "reset":
            client.reset()
        else:
            client.close()
    for number, upstream in enumerate(upstreams):
        room = partial(is_let_in, willi, f"127.0.0.{number + 2}")
        wait_until(room, f"room after this one has gone: {cases[number]}")
        assert upstream.connection().wait_for_end() is Ended.EOF


def test_a_client_that_has_sent_all_and_still_listens_is_answered(share_willi: StartWilli, upstream: ScriptedUpstream):
    """As with `nc` and a file: its side is closed, and its commands are still to be read."""
    upstream.answers[BOB] = Delay(3)
    with greeted(share_willi(server=upstream.server)) as client:
        client.send(b"\r\n".join((MAIL, BOB, b"DATA", b"hello", b".", b"QUIT", b"")))
        client.finish()
        assert [client.read_reply().code for _ in range(5)] == [250, 250, 354, 250, 221]
        client.expect_eof()


@pytest.mark.parametrize("tls", [False, True], ids=["clear", "TLS"])
def test_a_client_that_only_listens_has_the_answer_to_its_last_command(
    tls: bool, share_willi: StartWilli, upstream: ScriptedUpstream, postfix_certificate: Pair
):
    """Even if that is no QUIT, it takes longer than a look at all sessions, and nothing else is to be read."""
    upstream.answers[BOB] = Delay(3)
    willi = share_willi(server=upstream.server, tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key)
    with greeted(willi) as client:
        if tls:
            assert client.starttls().code == 220
            say(client, EHLO)
        assert say(client, MAIL) == [SENDER_KEPT]
        client.send(BOB + b"\r\n")
        upstream.connection().wait_for_command(BOB)
        socket.socket.shutdown(client.socket, socket.SHUT_WR)  # of TCP: ssl's own would end TLS, too
        assert str(client.read_reply()) == OK


def test_one_ipv6_network_is_one_client(start_willi: StartWilli, upstream: ScriptedUpstream):
    port = free_port()
    start_willi(server=upstream.server, listen=f"[::1]:{port}", max_connections_per_ip=1, probe=False)
    with Client(port, host="::1") as one, Client(port, host="::1") as two:
        assert sorted(str(client.read_reply()) for client in (one, two)) == [BANNER, TOO_MANY_FROM_YOU]


def test_max_connection_rate(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_connection_rate=3)
    heard = []
    for _ in range(5):
        with ExitStack() as ends:
            heard.append(first_words(willi, ends))
    assert heard == [BANNER, BANNER, BANNER, TOO_FAST, TOO_FAST]
    with ExitStack() as ends:
        assert first_words(willi, ends, "127.0.0.3") == BANNER


def test_a_trusted_proxy_is_not_counted_as_one_client(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(
        server=upstream.server, max_connections_per_ip=1, max_connection_rate=1, xclient_hosts="127.0.0.2"
    )
    with ExitStack() as ends:
        assert [first_words(willi, ends) for _ in range(3)] == [BANNER] * 3


def test_what_a_refused_client_sends_is_not_looked_at(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_connections_per_ip=1)
    with willi.connect(), willi.connect(greeting=False) as client:
        client.send(b"\r\n".join((EHLO, MAIL, BOB, b"DATA", b"x" * 20_000, b"")))
        assert str(client.read_reply()) == TOO_MANY_FROM_YOU
        client.expect_eof()
    assert upstream.connections == []


# max_errors


def test_max_errors(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, max_errors=3)
    with willi.connect() as client:
        assert say(client, b"X", b"Y", b"NOOP") == [UNKNOWN, UNKNOWN, "250 2.0.0 Ok"]
        client.send(b"Z\r\n" + EHLO + b"\r\n" + MAIL + b"\r\n" + BOB + b"\r\nDATA\r\n")
        assert str(client.read_reply()) == TOO_MANY_ERRORS
        client.expect_eof()
    assert upstream.connections == []
    assert willi.wait_for_log(msg="Too many errors")["reply"] == UNKNOWN


@pytest.mark.parametrize("line", [b"RCPT TO:<x@b.example>", b"x" * 3000, b"MAIL FROM:<\x01>", b"AUTH PLAIN"], ids=repr)
def test_every_refusal_of_our_own_is_an_error(line: bytes, share_willi: StartWilli, upstream: ScriptedUpstream):
    with greeted(share_willi(server=upstream.server, max_errors=2)) as client:
        assert client.command(line[:3000]).permanent
        assert str(client.command(line[:3000])) == TOO_MANY_ERRORS
        client.expect_eof()


def test_what_the_upstream_refuses_is_for_the_upstream_to_count(share_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT"] = reply("550 5.1.1 nobody")
    with greeted(share_willi(server=upstream.server, max_errors=2)) as client:
        assert say(client, MAIL, *[BOB] * 5) == [SENDER_KEPT, *["550 5.1.1 nobody"] * 5]


def test_an_upstream_that_uses_our_words_is_not_counted(share_willi: StartWilli, upstream: ScriptedUpstream):
    ours = "554 5.7.1 Relay access denied"
    upstream.answers[b"RCPT"] = reply(ours)
    with greeted(share_willi(server=upstream.server, max_errors=2)) as client:
        assert say(client, MAIL, *[BOB] * 5) == [SENDER_KEPT, *[ours] * 5]


JUNK = {
    "NOOP": (b"NOOP",), "RSET": (b"RSET",), "HELP": (b"HELP",), "VRFY": (b"VRFY bob",), "EHLO": (EHLO,),
    "HELO": (b"HELO c.example",), "MAIL": (MAIL, b"RSET"), "MAIL EHLO": (MAIL, EHLO), "BDAT": (b"BDAT 0",),
}  # fmt: skip


@pytest.mark.parametrize("lines", JUNK.values(), ids=JUNK.keys())
def test_junk_beyond_its_limit_is_an_error(
    lines: tuple[bytes, ...], share_willi: StartWilli, upstream: ScriptedUpstream
):
    """Each way of coming to nothing, as often as is harmless, again after a message, and then once too often."""
    willi = share_willi(server=upstream.server, max_errors=2)
    with greeted(willi) as client:
        for _ in range(2):
            if lines[0].startswith(b"BDAT"):
                assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
            heard = [str(answer) for _ in range(MAX_JUNK - 1) for answer in client.commands(*lines)]
            assert all(answer.startswith("2") for answer in heard)
            assert say(client, b"RSET")[0] == "250 2.0.0 Ok"
            assert deliver(client) == QUEUED, "which makes up for it"
        if lines[0].startswith(b"BDAT"):
            assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        heard = [str(answer) for _ in range(MAX_JUNK + 1) for answer in client.commands(*lines)]
        assert all(answer.startswith("2") for answer in heard)
        client.send(b"".join(line + b"\r\n" for line in lines))
        assert client.read_to_end().decode().split("\r\n")[-2] == TOO_MANY_ERRORS
    assert willi.wait_for_log(msg="Too many errors")


def test_rset_after_refused_recipients_is_no_junk(share_willi: StartWilli, upstream: ScriptedUpstream):
    """A sender with a list of old addresses: what the upstream refuses is for the upstream to count."""
    upstream.answers[b"RCPT"] = reply("550 5.1.1 nobody")
    with greeted(share_willi(server=upstream.server, max_errors=1)) as client:
        refused = [SENDER_KEPT, "550 5.1.1 nobody", "250 2.0.0 Ok"]
        assert say(client, *[MAIL, BOB, b"RSET"] * (2 * MAX_JUNK)) == refused * (2 * MAX_JUNK)


def test_transactions_that_fail_are_junk(start_willi: StartWilli):
    nobody = f"127.0.0.1:{free_port()}"
    willi = start_willi(server=nobody, max_errors=1)
    willi.tolerate(nobody)
    with greeted(willi) as client:  # EHLO is the first junk
        assert say(client, *[b"NOOP"] * (MAX_JUNK - 2))[-1] == "250 2.0.0 Ok"
        assert say(client, *[MAIL, BOB] * 2) == [SENDER_KEPT, NO_ANSWER] * 2
        assert say(client, MAIL) == [TOO_MANY_ERRORS]
        client.expect_eof()


def test_transactions_that_end_with_a_refused_chunk_are_junk(share_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT"] = reply("450 4.2.1 not now")
    with greeted(share_willi(server=upstream.server, max_errors=1)) as client:
        assert say(client, *[b"NOOP"] * (MAX_JUNK - 2))[-1] == "250 2.0.0 Ok"
        assert say(client, MAIL, BOB, b"BDAT 0 LAST")[-1] == "451 4.5.1 No valid recipients, try again"
        assert say(client, MAIL, BOB, b"BDAT 0 LAST")[-1] == TOO_MANY_ERRORS
        client.expect_eof()


def test_what_we_defer_is_an_error_when_it_is_far_too_much(share_willi: StartWilli, upstream: ScriptedUpstream):
    """Else one connection could have lines written to the log for ever."""
    willi = share_willi(server=upstream.server, max_recipients=1, max_errors=2)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, OK]
        answers = {str(answer) for _ in range(10) for answer in client.commands(*[BEN] * (MAX_DEFERRALS // 10))}
        assert answers == {"452 4.5.3 Too many recipients"}
        assert say(client, BEN, BEN) == ["452 4.5.3 Too many recipients", TOO_MANY_ERRORS]
        client.expect_eof()


def test_a_message_that_is_accepted_makes_up_for_errors(share_willi: StartWilli, upstream: ScriptedUpstream):
    with greeted(share_willi(server=upstream.server, max_errors=3)) as client:
        for _ in range(3):
            assert say(client, b"X", b"Y") == [UNKNOWN, UNKNOWN]
            assert deliver(client) == QUEUED


# Upstream connections without a message


AGAIN = (EHLO, MAIL, BOB)


def test_a_client_has_only_so_many_upstream_connections_opened_in_vain(
    share_willi: StartWilli, upstream: ScriptedUpstream
):
    with share_willi(server=upstream.server).connect() as client:
        for _ in range(2):
            for _ in range(MAX_IN_VAIN - 1):
                assert say(client, *AGAIN)[1:] == [SENDER_KEPT, OK]
            assert say(client, *AGAIN, b"DATA")[1:] == [SENDER_KEPT, OK, GO_ON]
            assert content(client) == QUEUED, "which makes up for it"
        for _ in range(MAX_IN_VAIN):
            assert say(client, *AGAIN)[1:] == [SENDER_KEPT, OK]
        assert say(client, *AGAIN)[1:] == [SENDER_KEPT, TOO_MANY_ERRORS]
        client.expect_eof()
    assert len(upstream.connections) == 3 * MAX_IN_VAIN


@pytest.mark.parametrize("why", ["nobody listens", "421", "it hangs up at MAIL"])
def test_upstreams_that_fail_count_as_opened_in_vain(why: str, start_willi: StartWilli, start_upstream: StartUpstream):
    """A client does not have a host that is down or busy asked as often as it can say RCPT."""
    good, bad = start_upstream(), start_upstream()
    bad.answers.update({GREETING: reply("421 4.3.2 too busy")} if why == "421" else {b"MAIL": Close()})
    if why == "nobody listens":
        bad.stop()
    willi = start_willi(csv=two_domains(good, bad))
    willi.tolerate(bad.server)
    with greeted(willi) as client:
        for _ in range(2):
            for _ in range(MAX_IN_VAIN - 1):
                assert say(client, MAIL, CARL, b"RSET")[1] == NO_ANSWER
            assert deliver(client) == QUEUED, "which makes up for it"
        for _ in range(MAX_IN_VAIN):
            assert say(client, MAIL, CARL, b"RSET")[1] == NO_ANSWER
        assert say(client, MAIL, CARL) == [SENDER_KEPT, TOO_MANY_ERRORS]
        client.expect_eof()
    assert len(bad.connections) in (0, 3 * MAX_IN_VAIN - 2)


# max_recipients


def test_max_recipients(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, max_recipients=3)
    lines = [b"RCPT TO:<user%d@b.example>" % number for number in range(5)]
    with greeted(willi) as client:
        too_many = "452 4.5.3 Too many recipients"
        assert say(client, MAIL, *lines) == [SENDER_KEPT, OK, OK, OK, too_many, too_many]
        assert say(client, b"DATA") == [GO_ON]
        assert content(client) == QUEUED
        assert deliver(client, *lines[3:]) == QUEUED, "which is how they come in the end"
    assert [len(message.recipients) for message in upstream.messages] == [3, 2]


def test_a_refused_recipient_takes_no_room(share_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.answers[BOB] = reply("550 5.1.1 no bob")
    willi = share_willi(server=upstream.server, max_recipients=1)
    with greeted(willi) as client:
        expected = [SENDER_KEPT, "550 5.1.1 no bob", "550 5.1.1 no bob", OK, "452 4.5.3 Too many recipients"]
        assert say(client, MAIL, BOB, BOB, b"RCPT TO:<ben@b.example>", BOB) == expected


def test_the_default_takes_a_hundred_recipients(willi: Willi):
    lines = [b"RCPT TO:<user%d@b.example>" % number for number in range(101)]
    with greeted(willi) as client:
        heard = [str(answer) for answer in client.commands(MAIL, *lines)]
        assert heard == [SENDER_KEPT, *[OK] * 100, "452 4.5.3 Too many recipients"]
