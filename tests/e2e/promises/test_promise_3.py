"""Promise 3: if the upstream dies before its verdict the client gets 451 4.4.x, never a 5xx and never silence."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import pytest

from tests.conftest import StartPostfix, StartUpstream, StartWilli
from tests.support.certificates import Authority, Pair
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import HOST, free_port
from tests.support.postfix import Postfix
from tests.support.promise import all_at_once, greeted, in_data, in_envelope, meet_in_data, rcpt
from tests.support.raw import Meanwhile, RawUpstream
from tests.support.talk import (
    BOB,
    LOST,
    MAIL,
    NO_ANSWER,
    QUEUED,
    SENDER_KEPT,
    chunk,
    content,
    deliver,
    say,
    say_together,
)
from tests.support.upstream import (
    EXTENSIONS,
    GREETING,
    VERDICT,
    Action,
    Close,
    Ended,
    Reset,
    ScriptedUpstream,
    Silence,
)
from willi_lib.smtp.reply import Reply

MESSAGE = b"Subject: x\r\n\r\n..\r\nhello\r\n"
SHORT = {"connect_timeout": "3s", "upstream_timeout": "4s", "data_timeout": "3s", "write_timeout": "3s"}
DEATHS: dict[str, Action] = {"FIN": Close(), "RST": Reset(), "silence": Silence()}


@dataclass(frozen=True)
class Step:
    """Where the upstream dies, and what the client hears from there on."""

    key: bytes  # of ScriptedUpstream.answers
    count: int  # so many of these were answered before
    replies: tuple[str, ...]  # to RCPT, to DATA, and after the final dot


BEFORE_RCPT = (NO_ANSWER, LOST)
STEPS = {
    "greeting": Step(GREETING, 0, BEFORE_RCPT),
    "EHLO": Step(b"EHLO", 0, BEFORE_RCPT),
    "STARTTLS": Step(b"STARTTLS", 0, BEFORE_RCPT),
    "EHLO in TLS": Step(b"EHLO", 1, BEFORE_RCPT),
    "XCLIENT": Step(b"XCLIENT", 0, BEFORE_RCPT),
    "EHLO after XCLIENT": Step(b"EHLO", 2, BEFORE_RCPT),
    "MAIL": Step(b"MAIL", 0, BEFORE_RCPT),
    "RCPT": Step(b"RCPT", 0, BEFORE_RCPT),
    "DATA": Step(b"DATA", 0, ("250 2.0.0 ok", LOST)),
    "verdict": Step(VERDICT, 0, ("250 2.0.0 ok", "354 go on", LOST)),
}
FRIENDLY: dict[bytes, Reply] = {
    b"EHLO": Reply(250, (b"upstream.example", *EXTENSIONS, b"XCLIENT ADDR PORT NAME HELO PROTO", b"STARTTLS")),
}


def play(client: Client, recipient: str, step: Step) -> None:
    """A transaction that fails where it must, and the next words of a client that goes on all the same."""
    assert str(client.command(MAIL)) == SENDER_KEPT
    answers = [str(client.command(rcpt(recipient))), str(client.command(b"DATA"))]
    if answers[1].startswith("354"):
        answers.append(content(client, MESSAGE))
    assert tuple(answers) == step.replies
    assert say(client, b"RSET", b"NOOP", b"QUIT") == ["250 2.0.0 Ok", "250 2.0.0 Ok", "221 2.0.0 Bye"]
    client.expect_eof()


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "TLS"])
def test_an_upstream_may_die_at_any_step(
    tls: bool, death: str, share_willi: StartWilli, start_upstream: StartUpstream, postfix_certificate: Pair
):
    """One domain for each step, all at once: each with an upstream that dies there."""
    upstreams = {}
    table = "pattern;server;tls_verify\n"
    for number, (name, step) in enumerate(STEPS.items()):
        if not tls and name in ("STARTTLS", "EHLO in TLS"):
            continue
        upstream = start_upstream(tls=postfix_certificate.server_context() if tls else None)
        upstream.extensions = (*EXTENSIONS, b"XCLIENT ADDR PORT NAME HELO PROTO")
        hello = Reply(250, (b"upstream.example", *upstream.extensions, b"STARTTLS"))
        before = step.count - (1 if step.count and not tls else 0)
        upstream.answers[step.key] = [hello] * before + [DEATHS[death]] * 9
        upstreams[f"bob@{number}.example"] = (upstream, step)
        table += f"{number}.example;{upstream.server};false\n"
    willi = share_willi(
        csv=table, tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key, dns_timeout="1s", **SHORT
    )
    willi.tolerate("Upstream failed")
    all_at_once(lambda recipient: play(greeted(willi, tls), recipient, upstreams[recipient][1]), upstreams)
    errors = [line["error"] for line in willi.lines(msg="Upstream failed")]
    for upstream, step in upstreams.values():
        if step.key != VERDICT:
            assert upstream.messages == []
        assert b"QUIT" not in upstream.commands
        where = {GREETING: "", VERDICT: "no verdict: "}.get(step.key, f"{step.key.decode()}: ")
        assert any(error.startswith(f"{upstream.server}: {where}") for error in errors), step


@pytest.mark.parametrize("verb", [b"DATA", b"BDAT", b"BDAT to DATA"])
def test_an_upstream_may_be_killed_at_any_octet_of_the_message(
    verb: bytes, start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server)
    willi.tolerate("Upstream failed")
    if verb == b"BDAT to DATA":
        upstream.extensions = ()
    for octets in range(len(MESSAGE) + 1):
        upstream.kill_after = octets
        client = in_data(willi) if verb == b"DATA" else in_envelope(willi)
        reply = content(client, MESSAGE) if verb == b"DATA" else chunk(client, MESSAGE, last=True)
        assert reply == LOST, octets
        assert say(client, b"NOOP", b"QUIT") == ["250 2.0.0 Ok", "221 2.0.0 Bye"]
    upstream.kill_after = None
    assert deliver(greeted(willi)) == QUEUED
    assert len(upstream.messages) == 1


def test_an_upstream_that_dies_while_the_client_still_sends_is_told_after_the_end(
    willi: Willi, upstream: ScriptedUpstream
):
    """Octets of a message for nobody are not taken for commands."""
    willi.tolerate("Upstream failed")
    upstream.kill_after = 10
    client = in_data(willi)
    client.send(b"Subject: x\r\n\r\n")
    assert upstream.connection().wait_for_end() is Ended.OURS
    client.send_slowly(b"QUIT\r\nDATA\r\n")
    assert content(client, b"." + MAIL + b"\r\n") == LOST
    upstream.kill_after = None
    assert deliver(client) == QUEUED


def test_chunks_after_the_upstreams_death_are_refused_to_the_last(willi: Willi, upstream: ScriptedUpstream):
    willi.tolerate("Upstream failed")
    client = in_envelope(willi)
    assert chunk(client, b"one\r\n") == "250 2.0.0 ok"
    upstream.kill_after = 8
    assert chunk(client, b"two\r\n") == LOST
    assert chunk(client, b"QUIT\r\n") == LOST
    assert chunk(client, b"DATA\r\n", last=True) == LOST
    upstream.kill_after = None
    assert say(client, b"RSET") == ["250 2.0.0 Ok"]
    assert deliver(client) == QUEUED


@pytest.mark.parametrize("death", DEATHS)
def test_a_pipelined_group_gets_451_from_the_death_on(death: str, share_willi: StartWilli, upstream: ScriptedUpstream):
    """Never 503 or 554 for DATA, which would bounce the mail."""
    willi = share_willi(server=upstream.server, **SHORT)
    willi.tolerate("Upstream failed")
    upstream.answers[b"RCPT TO:<two@b.example>"] = DEATHS[death]
    client = greeted(willi)
    group = (MAIL, rcpt("one@b.example"), rcpt("two@b.example"), rcpt("three@b.example"), b"DATA")
    assert say_together(client, *group) == [SENDER_KEPT, "250 2.0.0 ok", LOST, LOST, LOST]
    assert say_together(client, *group[:1], *group[2:]) == [SENDER_KEPT, NO_ANSWER, NO_ANSWER, LOST]
    upstream.answers.clear()
    assert deliver(client) == QUEUED


def test_nobody_listens_or_the_network_is_silent(start_willi: StartWilli):
    silent = socket.create_server((HOST, 0), backlog=0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:  # its queue is full, so that further SYNs get no answer
        filler.setblocking(False)
        filler.connect_ex(silent.getsockname())
    table = (
        "pattern;server;tls_verify\n"
        f"refused.example;{HOST}:{free_port()};false\n"
        f"silent.example;{HOST}:{silent.getsockname()[1]};false\n"
        "nowhere.example;does-not-exist.invalid:25;false\n"
        "unreachable.example;[100::1]:25;false\n"
        "mx.example;mx:does-not-exist.invalid;false\n"
    )
    willi = start_willi(csv=table, dns_timeout="1s", **SHORT)
    willi.tolerate("Upstream failed")
    step = Step(b"", 0, BEFORE_RCPT)
    domains = [line.split(";")[0] for line in table.splitlines()[1:]]
    all_at_once(lambda domain: play(greeted(willi), f"bob@{domain}", step), domains)
    for opened in (silent, *fillers):
        opened.close()


@pytest.mark.parametrize("code", [421, 450, 500, 521, 550, 554])
@pytest.mark.parametrize("where", [GREETING, b"EHLO"])
def test_what_is_said_to_us_before_the_client_is_known_is_no_refusal_of_it(
    where: bytes, code: int, willi: Willi, upstream: ScriptedUpstream
):
    willi.tolerate("Upstream failed")
    upstream.answers[where] = Reply(code, (b"5.7.1 go away",))
    upstream.answers[b"HELO"] = Reply(code, (b"5.7.1 go away",))
    client = greeted(willi)
    assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, NO_ANSWER, LOST]


@pytest.mark.parametrize("garbage", [b"354 go on\r\n", b"hello\r\n", b"\r\n", b"250 ok\n", b"2\r\n", b"100 x\r\n"])
@pytest.mark.parametrize("where", [GREETING, b"EHLO", b"MAIL", b"RCPT"])
def test_garbage_is_as_good_as_death(where: bytes, garbage: bytes, willi: Willi, upstream: ScriptedUpstream):
    willi.tolerate("Upstream failed")
    upstream.answers[where] = [garbage + b"\r\n"] if garbage.endswith(b"ok\n") else [garbage]
    client = greeted(willi)
    assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, NO_ANSWER, LOST]
    assert say(client, b"RSET") == ["250 2.0.0 Ok"]
    assert deliver(client) == QUEUED


@pytest.mark.parametrize("where", [b"EHLO", b"RCPT"])
@pytest.mark.parametrize("more", [b"250 2.0.0 once more\r\n", b"garbage\r\n", b"half a li"])
def test_an_upstream_that_says_more_than_it_was_asked_is_given_up(
    where: bytes, more: bytes, share_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = share_willi(server=upstream.server, **SHORT)
    willi.tolerate("Upstream failed")
    upstream.answers[where] = [b"250 upstream.example\r\n" + more]
    client = greeted(willi)
    answers = say(client, MAIL, BOB, b"DATA")
    assert answers[0] == SENDER_KEPT and answers[2] == LOST
    assert answers[1] == (NO_ANSWER if where != b"RCPT" else "250 upstream.example")
    assert say(client, b"RSET") == ["250 2.0.0 Ok"]
    assert deliver(client) == QUEUED


def test_an_upstream_that_does_not_read_is_given_up(share_willi: StartWilli, raw: RawUpstream):
    willi = share_willi(server=raw.server, **SHORT)
    willi.tolerate("Upstream failed")
    client, peer = meet_in_data(willi, raw)
    sending = Meanwhile(client, (b"x" * 98 + b"\r\n") * 150_000 + b".\r\n")
    assert str(client.read_reply()) == LOST
    sending.join()
    assert b"\r\n.\r\n" not in peer.read_until_dropped()


def test_the_end_of_a_message_that_was_told_to_be_lost_does_not_arrive_later(share_willi: StartWilli, raw: RawUpstream):
    """The kernel has taken all of it, and the upstream reads on when the client has had its answer."""
    willi = share_willi(server=raw.server, **SHORT)
    willi.tolerate("Upstream failed")
    client, peer = meet_in_data(willi, raw)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send((b"x" * 98 + b"\r\n") * 2_000 + b".\r\n")
    assert str(client.read_reply()) == LOST
    assert "(data_timeout)" in willi.lines(msg="Upstream failed")[-1]["error"]
    assert b"\r\n.\r\n" not in peer.read_until_dropped()


def test_an_upstream_that_half_closes_inside_the_message_is_given_up(share_willi: StartWilli, raw: RawUpstream):
    willi = share_willi(server=raw.server, **SHORT)
    willi.tolerate("Upstream failed")
    client, peer = meet_in_data(willi, raw)
    peer.finish()
    assert content(client) == LOST
    assert peer.read_until_dropped() == b""


@pytest.mark.parametrize("when", ["in the message", "between messages"])
def test_tls_that_breaks_upstream_is_no_fault_of_the_clients(
    when: str, share_willi: StartWilli, raw: RawUpstream, postfix_certificate: Pair
):
    """Octets that are no TLS come, and wait to be found when the message ends or the next one begins."""
    willi = share_willi(server=raw.server, upstream_tls="always", **SHORT)
    willi.tolerate("Upstream failed")
    client = greeted(willi)
    client.send(MAIL + b"\r\n" + BOB + b"\r\n")
    peer = raw.accept()
    peer.introduce(b"STARTTLS")
    peer.answer(b"STARTTLS", b"220 go ahead\r\n")
    clear = peer.socket.dup()
    peer.socket = postfix_certificate.server_context().wrap_socket(peer.socket, server_side=True)
    peer.answer(b"EHLO", b"250 raw.example\r\n")
    peer.answer(b"MAIL", b"250 2.1.0 ok\r\n")
    peer.answer(b"RCPT", b"250 2.1.5 ok\r\n")
    assert [client.read_reply().code for _ in range(2)] == [250, 250]
    client.send(b"DATA\r\n")
    peer.answer(b"DATA", b"354 go on\r\n")
    assert client.read_reply().code == 354
    if when == "in the message":
        clear.sendall(b"this is no TLS at all\r\n")
        assert content(client) == LOST
    else:
        client.send(b"x\r\n.\r\n")
        peer.read_for(b".\r\n")
        peer.send(b"250 2.0.0 queued\r\n")
        assert str(client.read_reply()) == "250 2.0.0 queued"
        clear.sendall(b"this is no TLS at all\r\n")
        client.send(MAIL + b"\r\n" + BOB + b"\r\n")
        assert str(client.read_reply()) == SENDER_KEPT
        raw.accept().close()  # the new connection, of which nothing comes
        assert str(client.read_reply()) == NO_ANSWER
    clear.close()
    assert say(client, b"NOOP") == ["250 2.0.0 Ok"]


@pytest.mark.parametrize("trust", ["expired", "self-signed", "another name"])
def test_an_upstream_that_is_not_who_it_should_be_is_a_451(
    trust: str, share_willi: StartWilli, start_upstream: StartUpstream, certificates: Authority
):
    pair = {
        "expired": lambda: certificates.expired("localhost"),
        "self-signed": lambda: certificates.self_signed("localhost"),
        "another name": lambda: certificates.issue("other.example"),
    }[trust]()
    upstream = start_upstream(tls=pair.server_context())
    willi = share_willi(
        csv=f"pattern;server;tls_verify\nb.example;localhost:{upstream.port};true\n",
        upstream_tls="always", upstream_tls_ca=certificates.ca,
    )  # fmt: skip
    willi.tolerate("Upstream failed")
    assert say(greeted(willi), MAIL, BOB, b"DATA") == [SENDER_KEPT, NO_ANSWER, LOST]
    assert upstream.messages == []


def test_a_real_postfix_that_is_stopped_in_the_message_is_a_451(start_willi: StartWilli, start_postfix: StartPostfix):
    postfix: Postfix = start_postfix(domains=("b.example",))
    willi = start_willi(server=postfix.server)
    willi.tolerate("Upstream failed")
    waiting = in_envelope(willi)
    client = in_data(willi)
    client.send(b"Subject: x\r\n\r\n")
    postfix.stop()
    assert content(client) == LOST
    assert say(waiting, b"DATA") == [LOST]
    assert say(greeted(willi), MAIL, BOB, b"DATA") == [SENDER_KEPT, NO_ANSWER, LOST]
