"""Promise 7: on SIGTERM running transactions finish, up to drain_timeout; whatever is new gets 421."""

from __future__ import annotations

import signal
import socket

import pytest

from tests.conftest import StartWilli
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import PATIENCE, free_port
from tests.support.postfix import Postfix
from tests.support.promise import (
    assert_nothing_was_finished,
    greeted,
    in_data,
    in_envelope,
)
from tests.support.talk import (
    BOB,
    CARL,
    GO_ON,
    MAIL,
    NO_ANSWER,
    OK,
    QUEUED,
    SENDER_KEPT,
    chunk,
    content,
    say,
    say_together,
)
from tests.support.upstream import VERDICT, Ended, Hold, ScriptedUpstream

GOODBYE = "421 4.3.2 Service is shutting down, try again"


def terminate(willi: Willi) -> None:
    """SIGTERM, and Willi has understood."""
    willi.signal(signal.SIGTERM)
    willi.wait_for_log(msg="Draining")


def is_sent_away(client: Client) -> None:
    """Told 421, and a proper end of the connection."""
    assert str(client.read_reply()) == GOODBYE
    client.expect_eof()
    client.close()


def test_clients_without_a_transaction_are_told_421(willi: Willi, upstream: ScriptedUpstream):
    new, said_ehlo, after_a_message = willi.connect(), greeted(willi), in_data(willi)
    assert content(after_a_message) == QUEUED
    after_rset = in_envelope(willi)
    assert say(after_rset, b"RSET") == ["250 2.0.0 Ok"]
    terminate(willi)
    for client in (new, said_ehlo, after_a_message, after_rset):
        is_sent_away(client)
    assert willi.wait() == 0
    assert upstream.wait_for_ends() == [Ended.QUIT] * 2


def test_answers_that_a_slow_client_has_not_read_yet_are_not_cut_off(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    """One of them might be the 250 to a message, which would come a second time."""
    willi = start_willi(server=upstream.server, max_errors=1_000_000)
    client = greeted(willi)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        client.socket.setsockopt(socket.SOL_SOCKET, option, 64 << 10)
    client.socket.settimeout(1)
    with pytest.raises(TimeoutError):
        for _ in range(1000):
            client.send(b"NOOP\r\n" * 1000)  # until Willi can't send, and reads no more
    terminate(willi)
    client.socket.settimeout(PATIENCE)
    *answers, last = client.read_to_end().decode().split("\r\n")[:-1]
    assert len(answers) > 1000
    assert set(answers) == {"250 2.0.0 Ok"}
    assert last == GOODBYE


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA", "BDAT"])
def test_a_transaction_that_has_begun_goes_on_to_its_end(stage: str, willi: Willi, upstream: ScriptedUpstream):
    client = greeted(willi)
    assert say(client, MAIL) == [SENDER_KEPT]
    before = {"MAIL": [], "RCPT": [BOB], "DATA": [BOB, b"DATA"], "BDAT": [BOB]}[stage]
    assert say(client, *before) == [OK, GO_ON][: len(before)]
    if stage == "BDAT":
        assert chunk(client, b"Subject: x\r\n") == OK
    terminate(willi)
    if stage == "BDAT":
        assert chunk(client, b"\r\nhello\r\n", last=True) == OK
    else:
        rest = [BOB, b"DATA"][len(before) :]
        assert say(client, *rest) == [OK, GO_ON][len(before) :]
        assert content(client) == QUEUED
    is_sent_away(client)
    assert willi.wait() == 0
    assert upstream.messages[0].content == b"Subject: x\r\n\r\nhello\r\n"
    assert upstream.wait_for_ends() == [Ended.QUIT]


def test_the_verdict_is_awaited(willi: Willi, upstream: ScriptedUpstream):
    held = upstream.answers[VERDICT] = Hold()
    client = in_data(willi)
    client.send(b"hello\r\n.\r\n")
    assert held.reached.wait(PATIENCE)
    terminate(willi)
    held.release()
    assert str(client.read_reply()) == QUEUED
    is_sent_away(client)
    assert willi.wait() == 0


def test_the_next_transaction_of_a_group_is_a_new_one(willi: Willi, upstream: ScriptedUpstream):
    held = upstream.answers[VERDICT] = Hold()
    client = in_data(willi)
    client.send(b"hello\r\n.\r\n" + MAIL + b"\r\n" + BOB + b"\r\nDATA\r\n")
    assert held.reached.wait(PATIENCE)
    terminate(willi)
    held.release()
    assert str(client.read_reply()) == QUEUED
    is_sent_away(client)
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("command", [b"RSET", b"EHLO d.example"])
def test_who_gives_its_transaction_up_is_sent_away(command: bytes, willi: Willi, upstream: ScriptedUpstream):
    client = in_envelope(willi)
    terminate(willi)
    assert client.command(command).code == 250
    is_sent_away(client)
    assert willi.wait() == 0
    assert upstream.messages == []


def test_a_failed_transaction_ends_with_its_client(willi: Willi, upstream: ScriptedUpstream):
    willi.tolerate("Upstream failed")
    upstream.answers[b"DATA"] = b"nonsense\r\n"
    client = in_envelope(willi)
    terminate(willi)
    lost = "451 4.4.2 Lost the server for this recipient, try again"
    assert say_together(client, b"DATA", b"RSET") == [lost, "250 2.0.0 Ok"]
    is_sent_away(client)


def test_a_failed_transaction_may_try_other_recipients_and_no_other_transaction(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    nobody = f"127.0.0.1:{free_port()}"
    willi = start_willi(csv=f"pattern;server;tls_verify\nb.example;{upstream.server}\nc.example;{nobody}\n")
    willi.tolerate(nobody)
    clients = []
    for _ in range(2):
        client = greeted(willi)
        assert say(client, MAIL, CARL) == [SENDER_KEPT, NO_ANSWER]
        clients.append(client)
    goes_on, new = clients
    terminate(willi)
    new.send(MAIL + b"\r\n" + BOB + b"\r\nDATA\r\n")
    is_sent_away(new)
    assert say(goes_on, BOB, b"DATA") == [OK, GO_ON]
    assert content(goes_on) == QUEUED
    is_sent_away(goes_on)
    assert len(upstream.messages) == 1


def test_nobody_new_is_let_in(willi: Willi):
    client = in_envelope(willi)
    terminate(willi)
    with pytest.raises(ConnectionError):
        willi.connect()
    client.close()
    assert willi.wait() == 0


def test_drain_timeout_ends_what_takes_longer_and_delivers_no_half(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, drain_timeout="1s")
    message = b"Subject: x\r\n\r\nhalf of it\r\n"
    in_message, in_chunks, envelope = in_data(willi), in_envelope(willi), in_envelope(willi)
    in_message.send(message)
    assert chunk(in_chunks, message) == OK
    in_chunks.send(b"BDAT 10 LAST\r\nhalf")
    terminate(willi)
    for client in (in_message, in_chunks, envelope):
        is_sent_away(client)
    assert willi.wait() == 0
    assert upstream.messages == []
    ends = upstream.wait_for_ends()
    assert Ended.QUIT not in ends[:2]


def test_drain_timeout_ends_clients_that_do_not_even_hang_up(start_willi: StartWilli, upstream: ScriptedUpstream):
    """They were told 421 long ago; that they linger is no bug of ours."""
    willi = start_willi(server=upstream.server, drain_timeout="1s")
    idle, busy = greeted(willi), in_envelope(willi)
    terminate(willi)
    assert willi.wait() == 0
    for client in (idle, busy):
        is_sent_away(client)


def test_drain_timeout_ends_the_wait_for_a_verdict(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, drain_timeout="1s")
    held = upstream.answers[VERDICT] = Hold()
    client = in_data(willi)
    client.send(b"hello\r\n.\r\n")
    assert held.reached.wait(PATIENCE)
    terminate(willi)
    is_sent_away(client)
    assert willi.wait() == 0
    held.release()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_delivers_no_half(
    second: signal.Signals, start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, drain_timeout="1h")
    client = in_data(willi)
    client.send(b"Subject: x\r\n\r\nhalf of it\r\n")
    terminate(willi)
    willi.signal(second)
    assert willi.wait(PATIENCE) == 0
    assert_nothing_was_finished(upstream, b"Subject: x\r\n\r\nhalf of it\r\n")
    with pytest.raises(ConnectionError):
        client.read_reply()


def test_sigint_is_as_good_as_sigterm(willi: Willi):
    client = greeted(willi)
    willi.signal(signal.SIGINT)
    is_sent_away(client)
    assert willi.wait() == 0


def test_postfix_has_the_whole_message_or_none_of_it(start_willi: StartWilli, postfix: Postfix):
    willi = start_willi(server=postfix.server, drain_timeout="3s")
    whole, half = in_data(willi, "drained-whole@b.example"), in_data(willi, "drained-half@b.example")
    for client in (whole, half):
        client.send(b"Subject: x\r\n\r\nhello\r\n")
    terminate(willi)
    whole.send(b".\r\n")
    assert str(whole.read_reply()).startswith("250 2.0.0 Ok: queued as ")
    is_sent_away(whole)
    is_sent_away(half)
    assert willi.wait() == 0
    assert postfix.wait_for_message("drained-whole@b.example").content == b"Subject: x\n\nhello\n"
    assert postfix.stored("drained-half@b.example") == []
