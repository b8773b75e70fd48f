"""Promise 2: a message that the client did not finish is never finished upstream, and its rest is no command."""

from __future__ import annotations

import signal

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Pair
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import wait_until
from tests.support.postfix import Postfix
from tests.support.promise import (
    all_at_once,
    assert_nothing_was_finished,
    greeted,
    in_data,
    in_envelope,
    sent,
)
from tests.support.raw import RawUpstream
from tests.support.talk import BOB, MAIL, QUEUED, chunk, content, deliver, say
from tests.support.upstream import Connection, Ended, Hold, ScriptedUpstream

MESSAGE = b"Subject: x\r\n\r\n..\r\nQUIT\r\n.x\r\n\r\n.\r\n"
CHUNKS = b"BDAT 8\r\na\r\nQUIT\nBDAT 0\r\nBDAT 6 LAST\r\nx\r\n.\r\n"[:-1]  # all but the last octet
WHOLE = b"Subject: x\n\nhello\n"  # what `content` and `deliver` send, as Postfix stores it
LEAVING = {"close": Client.close, "reset": Client.reset, "half-close": Client.finish}
TOO_SLOW = "421 4.4.2 Timeout, closing connection"
TOO_BIG = "552 5.3.4 Message is too big"
BARE = "550 5.5.2 Message has a bare CR or LF"


def leave(client: Client, how: str) -> None:
    """Hang up in this way; one that only half-closes must not be told that its message was taken."""
    LEAVING[how](client)
    if how == "half-close":
        assert b"250" not in client.read_to_end()
        client.close()


@pytest.mark.parametrize("how", LEAVING)
def test_a_client_that_hangs_up_at_any_octet_of_data_has_sent_nothing(
    how: str, share_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = share_willi(server=upstream.server)
    for octets in range(len(MESSAGE)):
        client = in_data(willi)
        client.send(MESSAGE[:octets])
        leave(client, how)
    assert len(upstream.connections) == len(MESSAGE)
    assert_nothing_was_finished(upstream, MESSAGE)


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("extensions", [(b"CHUNKING",), ()], ids=["BDAT", "BDAT to DATA"])
def test_a_client_that_hangs_up_at_any_octet_of_bdat_has_sent_nothing(
    extensions: tuple[bytes, ...], how: str, willi: Willi, upstream: ScriptedUpstream
):
    upstream.extensions = extensions
    header = len(b"BDAT 8\r\n")
    for octets in range(header, len(CHUNKS) + 1):
        client = in_envelope(willi)
        client.send(CHUNKS[:octets])
        LEAVING[how](client)
        if how == "half-close":
            assert client.read_to_end().count(b"250") <= 2, "those of the first two chunks"
            client.close()
    upstream.wait_for_ends()
    assert upstream.messages == []
    for connection in upstream.connections:
        assert b"QUIT" not in connection.commands
        assert connection.ended in (Ended.EOF, Ended.RESET)


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("octets", [0, 1, 15, 16, 17, len(MESSAGE) - 5, len(MESSAGE) - 2, len(MESSAGE) - 1])
def test_a_client_that_hangs_up_under_tls_has_sent_nothing(
    octets: int, how: str, share_willi: StartWilli, postfix_certificate: Pair, start_upstream: StartUpstream
):
    upstream = start_upstream(tls=postfix_certificate.server_context())
    willi = share_willi(server=upstream.server, tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key)
    client = in_data(willi, tls=True)
    client.send(MESSAGE[:octets])
    if how == "half-close":
        client.socket.unwrap()  # type: ignore[attr-defined]  # close_notify, properly
        client.close()
    else:
        LEAVING[how](client)
    assert upstream.connection().wait_for_end() in (Ended.EOF, Ended.RESET)
    assert_nothing_was_finished(upstream, MESSAGE)
    assert upstream.connection().tls


def test_postfix_stores_nothing_of_messages_that_are_cut_at_any_octet(share_willi: StartWilli, postfix: Postfix):
    willi = share_willi(server=postfix.server)
    recipient = "cut-data@b.example"
    for octets in range(len(MESSAGE)):
        client = in_data(willi, recipient)
        client.send(MESSAGE[:octets])
        leave(client, ("close", "reset", "half-close")[octets % 3])
    with in_data(willi, recipient) as client:
        assert content(client).startswith("250 2.0.0 Ok: queued as ")
    assert postfix.wait_for_message(recipient).content == WHOLE
    assert len(postfix.stored(recipient)) == 1


def test_postfix_stores_nothing_of_chunks_that_are_cut_at_any_octet(share_willi: StartWilli, postfix: Postfix):
    willi = share_willi(server=postfix.server)
    recipient = "cut-bdat@b.example"
    for octets in range(len(CHUNKS) + 1):
        client = in_envelope(willi, recipient)
        client.send(CHUNKS[:octets])
        (client.close if octets % 2 else client.reset)()
    with in_envelope(willi, recipient) as client:
        assert chunk(client, WHOLE.replace(b"\n", b"\r\n"), last=True).startswith("250 2.0.0 Ok: ")
    assert postfix.wait_for_message(recipient).content == WHOLE
    assert len(postfix.stored(recipient)) == 1


def test_a_client_that_leaves_before_354_has_sent_nothing(willi: Willi, upstream: ScriptedUpstream):
    held = upstream.answers[b"DATA"] = Hold()
    client = in_envelope(willi)
    client.send(b"DATA\r\n" + MESSAGE[:12])
    assert held.reached.wait(60)
    client.close()
    held.release()
    assert_nothing_was_finished(upstream, MESSAGE)


@pytest.mark.parametrize(
    ("extensions", "ending"), [((), "drain_timeout"), ((b"PIPELINING",), "client")], ids=["one by one", "group"]
)
def test_nothing_is_said_behind_a_data_that_was_not_answered_yet(
    extensions: tuple[bytes, ...], ending: str, start_willi: StartWilli, raw: RawUpstream
):
    """Not even QUIT: the upstream would take it for the message."""
    willi = start_willi(server=raw.server, drain_timeout="1s")
    client = greeted(willi)
    client.send(b"".join(line + b"\r\n" for line in (MAIL, BOB, b"DATA")))
    peer = raw.accept()
    peer.take_envelope(*extensions)
    assert peer.read_line() == b"DATA"
    if ending == "client":
        client.close()
    else:
        willi.signal(signal.SIGTERM)
    assert peer.read_until_dropped() == b""


@pytest.mark.parametrize("command", [b"QUIT", b"RSET", b"EHLO d.example", b"HELO d.example"])
def test_chunks_without_a_last_one_are_given_up_without_quit(command: bytes, willi: Willi, upstream: ScriptedUpstream):
    with in_envelope(willi) as client:
        assert chunk(client, b"half\r\n") == "250 2.0.0 ok"
        assert client.command(command).code in (221, 250)
        assert_nothing_was_finished(upstream, b"half\r\n")


def test_chunks_that_become_data_are_given_up_without_a_dot(willi: Willi, upstream: ScriptedUpstream):
    upstream.extensions = ()
    client = in_envelope(willi)
    assert chunk(client, b"half\r\n") == "250 2.0.0 6 octets received"
    assert say(client, b"RSET", MAIL, BOB) == ["250 2.0.0 Ok", "250 2.1.0 Ok", "250 2.0.0 ok"]
    assert chunk(client, b"whole\r\n", last=True) == QUEUED
    assert [message.content for message in upstream.messages] == [b"whole\r\n"]
    first = ended(upstream.connections[0])
    assert first.unfinished == b"half\r\n"
    assert first.commands[-1] == b"DATA"


def ended(connection: Connection) -> Connection:
    """Once its end has been noted, and with it what it left."""
    wait_until(lambda: connection.ended, "the end of a connection")
    return connection


def test_a_client_that_is_too_slow_has_sent_nothing(share_willi: StartWilli, upstream: ScriptedUpstream):
    """It is told so, and what it sends after that is nobody's command."""
    willi = share_willi(server=upstream.server, read_timeout="3s")

    def stop_after(octets: int) -> None:
        client = in_data(willi)
        client.send(MESSAGE[:octets])
        assert str(client.read_reply()) == TOO_SLOW
        client.send(MESSAGE[octets:] + b"NOOP\r\n")
        client.expect_eof()

    all_at_once(stop_after, range(0, len(MESSAGE), 3))
    assert_nothing_was_finished(upstream, MESSAGE)


def test_a_chunk_that_is_too_slow_has_not_been_sent(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, read_timeout="3s")

    def stop_after(octets: int) -> None:
        client = in_envelope(willi)
        client.send(b"BDAT 10 LAST\r\n" + b"NOOP\r\nNOOP"[:octets])
        assert str(client.read_reply()) == TOO_SLOW
        client.close()

    all_at_once(stop_after, range(10))
    upstream.wait_for_ends()
    assert upstream.messages == []
    assert all(b"QUIT" not in connection.commands for connection in upstream.connections)


@pytest.mark.parametrize("verb", [b"DATA", b"BDAT", b"BDAT to DATA"])
def test_a_message_may_have_the_largest_size_and_not_one_octet_more(
    verb: bytes, share_willi: StartWilli, upstream: ScriptedUpstream
):
    if verb == b"BDAT to DATA":
        upstream.extensions = ()
    willi = share_willi(server=upstream.server, max_message_bytes=100_000)
    line = b"." + b"x" * 97 + b"\r\n"
    for size in (100_000, 100_001, 1_000_000):
        octets = (line * 10_000)[: size - 2] + b"\r\n"
        if verb == b"DATA":
            client = in_data(willi)
            client.send(octets.replace(b"\r\n.", b"\r\n..").replace(b".", b"..", 1) + b".\r\n")
        else:
            client = in_envelope(willi)
            client.send(b"BDAT %d LAST\r\n" % size + octets)
        reply = str(client.read_reply())
        assert reply.startswith("250 ") if size == 100_000 else reply == TOO_BIG, (size, reply)
        assert say(client, b"NOOP", b"QUIT") == ["250 2.0.0 Ok", "221 2.0.0 Bye"]
    ends = upstream.wait_for_ends()
    assert ends[0] is Ended.QUIT and set(ends[1:]) <= {Ended.EOF, Ended.RESET}
    assert [len(message.content) for message in upstream.messages] == [100_000]
    assert all(b"QUIT" not in connection.commands for connection in upstream.connections[1:])


def test_the_sizes_of_chunks_add_up(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_message_bytes=2000)
    client = in_envelope(willi)
    assert [chunk(client, b"x" * 1000) for _ in range(2)] == ["250 2.0.0 ok"] * 2
    assert chunk(client, b"NOOP\r\n", last=False) == TOO_BIG
    assert chunk(client, b"NOOP\r\n", last=True) == TOO_BIG
    assert deliver(client) == QUEUED
    first = ended(upstream.connections[0])
    assert first.unfinished == b"x" * 2000
    assert first.commands[-1] == b"BDAT 1000"
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("last", [True, False])
def test_a_chunk_of_any_announced_size_is_no_message(last: bool, share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server)
    client = in_envelope(willi)
    client.send(b"BDAT 99999999999999999999%s\r\nx\r\n.\r\nQUIT\r\n" % (b" LAST" if last else b""))
    client.finish()
    client.expect_eof()
    upstream.wait_for_ends()
    assert upstream.messages == []


@pytest.mark.parametrize("bad", [b"a\nb", b"a\rb", b"\n.\n", b"\n", b"\r", b"x\r\n\n.\r\nNOOP", b"\n.\rNOOP"], ids=repr)
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT to DATA"])
def test_broken_framing_is_refused_at_the_end_and_nothing_of_it_executed(
    verb: bytes, bad: bytes, share_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = share_willi(server=upstream.server, bare_newline="reject")
    octets = b"x\r\n" + bad + b"\r\n" + MAIL + b"\r\nQUIT\r\n"
    if verb == b"DATA":
        client = in_data(willi)
        for position in range(len(octets)):
            client.send(octets[position : position + 1])
        client.send(b".\r\n")
    else:
        upstream.extensions = ()
        client = in_envelope(willi)
        client.send(b"BDAT %d LAST\r\n" % len(octets) + octets)
    assert str(client.read_reply()) == BARE
    assert say(client, b"NOOP") == ["250 2.0.0 Ok"]
    assert deliver(client) == QUEUED
    assert len(upstream.messages) == 1
    first = ended(upstream.connections[0])
    assert first.unfinished is not None
    assert b"QUIT" not in first.commands


def test_broken_framing_does_not_reach_postfix(start_willi: StartWilli, postfix: Postfix):
    willi = start_willi(server=postfix.server, bare_newline="reject")
    recipient = "framing@b.example"
    with greeted(willi) as client:
        for bad in (b"\n.\n", b"\n.\r\n", b"\r.\r\n", b"a\nb", b"a\rb"):
            assert sent(client, recipient, b"Subject: x\r\n\r\n" + bad + b"\r\n") == BARE
        assert sent(client, recipient, WHOLE.replace(b"\n", b"\r\n")).startswith("250 2.0.0 Ok: queued as ")
    assert postfix.wait_for_message(recipient).content == WHOLE
    assert len(postfix.stored(recipient)) == 1
