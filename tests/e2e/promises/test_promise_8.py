"""Promise 8: every wait and every buffer has a limit, and the limit covers the whole step."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.runner.limits import allow
from tests.support.certificates import Pair
from tests.support.client import Client
from tests.support.daemon import Setting, Willi, write_config
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port
from tests.support.promise import all_at_once, greeted, in_data, in_envelope, meet, meet_in_data, resident
from tests.support.raw import Meanwhile, Peer, RawUpstream
from tests.support.talk import (
    BEN,
    BOB,
    EHLO,
    LOST,
    MAIL,
    NO_ANSWER,
    OK,
    QUEUED,
    SENDER_KEPT,
    chunk,
    content,
    deliver,
    say,
)
from tests.support.upstream import GREETING, MAX_HOLD, VERDICT, Delay, Drip, Hold, ScriptedUpstream
from willi_lib.smtp.reply import Reply

SHORT = {
    "read_timeout": "3s", "write_timeout": "3s", "connect_timeout": "3s", "upstream_timeout": "4s",
    "data_timeout": "3s",
}  # fmt: skip
TOO_SLOW = "421 4.4.2 Timeout, closing connection"
A_MEGABYTE = 1 << 20
ENDLESS = {"long lines": b"250-" + b"x" * 1000 + b"\r\n", "empty lines": b"250-\r\n", "a line": b"2", "LF": b"250 ok\n"}
FLAT = 20 * A_MEGABYTE  # by how much the daemon may grow: its own buffers, not a hundred megabytes


class Dripping(threading.Thread):
    """Sends one octet after the other, four a second, for as long as the peer stands it."""

    def __init__(self, peer: Client, octets: bytes) -> None:
        super().__init__(daemon=True)
        self._peer = peer
        self._octets = octets
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for position in range(len(self._octets)):
                self._peer.send(self._octets[position : position + 1])
                if self._ended.wait(0.25):
                    return
        except OSError:  # closed, which is what the test waits for
            pass

    def end(self) -> None:
        self._ended.set()
        self.join()


# Time: a client


def hear_too_slow(client: Client, octets: bytes) -> None:
    dripping = Dripping(client, octets)
    assert str(client.read_reply()) == TOO_SLOW
    dripping.end()
    client.close()


def test_a_client_that_drips_runs_into_read_timeout(share_willi: StartWilli, upstream: ScriptedUpstream):
    """Each octet comes well within read_timeout; the whole command, or a line of the message, does not."""
    willi = share_willi(server=upstream.server, **SHORT)
    slow: list[tuple[Callable[[], Client], bytes]] = [
        (willi.connect, b"EHLO c.example\r\n"),
        (willi.connect, b""),
        (lambda: greeted(willi), b"MAIL FROM:<ann@a.example>\r\n"),
        (lambda: in_envelope(willi), b"RCPT TO:<ben@b.example>\r\n"),
        (lambda: in_data(willi), b"Subject: x"),
        (lambda: in_data(willi), b"." * 20),
        (lambda: in_data(willi), b"\r" * 20),
        (lambda: in_data(willi), b""),
    ]

    def in_chunk(header: bytes) -> Client:
        client = in_envelope(willi)
        client.send(header)
        return client

    slow += [(partial(in_chunk, header), b"x" * 20) for header in (b"BDAT 20\r\n", b"BDAT 20 LAST\r\n")]
    all_at_once(lambda case: hear_too_slow(case[0](), case[1]), slow)
    assert upstream.messages == []


def test_a_chunk_that_nobody_wants_is_not_waited_for_either(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, **SHORT)

    def drip(header: bytes) -> None:
        client = greeted(willi)
        client.send(header)
        hear_too_slow(client, b"x" * 20)

    all_at_once(drip, [b"BDAT 20\r\n", b"BDAT 20 LAST\r\n", b"BDAT 99999999999999999999\r\n"])


def test_a_message_that_nobody_wants_any_more_has_data_timeout(start_willi: StartWilli, upstream: ScriptedUpstream):
    """Too big, and a line end every quarter of a second: read_timeout alone would never end it."""
    willi = start_willi(server=upstream.server, max_message_bytes=1000, **SHORT)
    client = in_data(willi)
    client.send(b"x" * 2000)
    hear_too_slow(client, b"\n" * 100)


def test_a_dripping_handshake_is_given_up(
    start_willi: StartWilli, upstream: ScriptedUpstream, postfix_certificate: Pair
):
    willi = start_willi(
        server=upstream.server, tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key, **SHORT
    )

    def drip(octets: bytes) -> None:
        client = greeted(willi)
        assert client.command(b"STARTTLS").code == 220
        dripping = Dripping(client, octets)
        assert client.read_to_end() in (b"", TOO_SLOW.encode() + b"\r\n")
        dripping.end()

    all_at_once(drip, [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 20])


def test_a_dripping_proxy_header_is_given_up(start_willi: StartWilli, upstream: ScriptedUpstream):
    """Three seconds, the least that the specification allows."""
    willi = start_willi(server=upstream.server, proxy_protocol_hosts="127.0.0.1", probe=False)

    def drip(octets: bytes) -> None:
        client = willi.connect(greeting=False)
        dripping = Dripping(client, octets)
        assert client.read_to_end() == b""
        dripping.end()

    all_at_once(drip, [b"", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 25\r\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0cabcd"])


def test_the_time_an_upstream_takes_is_not_the_clients(start_willi: StartWilli, upstream: ScriptedUpstream):
    """The second chunk comes at once; that the first one was answered late is not its fault."""
    willi = start_willi(server=upstream.server, read_timeout="4s", loglevel="debug")
    upstream.answers[b"BDAT 5"] = [Delay(4.5)]
    client = in_envelope(willi)
    assert chunk(client, b"no LF") == "250 2.0.0 ok"
    client.send(b"BDAT 6 LAST\r\nthe")
    willi.wait_for_log(msg="client <", line="BDAT 6 LAST")
    client.send(b"end")
    assert str(client.read_reply()) == "250 2.0.0 ok"
    assert upstream.messages[0].content == b"no LFtheend"


def test_a_client_that_does_not_read_its_replies_is_given_up(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_errors=1_000_000, **SHORT)
    client = greeted(willi)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    before = resident(willi)
    sending = Meanwhile(client, b"NOOP\r\n" * 5_000_000)
    allow(300)  # until all buffers are full
    willi.wait_for_log(msg="Hanging up", seconds=240)
    sending.join()
    assert resident(willi) - before < FLAT
    assert greeted(willi)


def test_a_client_that_does_not_read_one_reply_is_given_up(share_willi: StartWilli, upstream: ScriptedUpstream):
    """Long replies, one at a time; each flushed when the next command is awaited."""
    upstream.answers[b"RCPT"] = Reply(450, (b"x" * 500,) * 100)
    willi = share_willi(server=upstream.server, **SHORT)
    client = greeted(willi)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert say(client, MAIL) == [SENDER_KEPT]
    sending = Meanwhile(client, (BOB + b"\r\n") * 1000)
    willi.wait_for_log(msg="Hanging up")
    sending.join()


# Time: an upstream


def test_an_upstream_that_drips_runs_into_its_limits(start_willi: StartWilli):
    """One that lets its reply drip, a line in seconds, is as bad as a silent one."""

    def refuse(where: bytes) -> None:
        upstream = ScriptedUpstream()
        upstream.extensions = ()
        dripping = Drip(Reply(354 if where == b"DATA" else 250, (b"slowly, slowly",)), 0.4)
        code_in_time = Drip(Reply(250, (b"slowly, slowly" * 4,)), 0.1)
        upstream.answers[where] = code_in_time if where == VERDICT else dripping
        upstreams.append(upstream)
        table.append(f"{len(upstreams)}.example;{upstream.server};false\n")

    upstreams: list[ScriptedUpstream] = []
    table = ["pattern;server;tls_verify\n"]
    places = (GREETING, b"EHLO", b"MAIL", b"RCPT", b"DATA", VERDICT)
    for where in places:
        refuse(where)
    willi = start_willi(csv="".join(table), **SHORT)
    willi.tolerate("Upstream failed")

    def play(number: int) -> None:
        client = greeted(willi)
        answers = say(client, MAIL, b"RCPT TO:<bob@%d.example>" % (number + 1))
        if number < 4:
            assert answers == [SENDER_KEPT, NO_ANSWER]
            return
        assert answers == [SENDER_KEPT, "250 2.0.0 ok"]
        last = say(client, b"DATA")
        assert (last == [LOST]) if number == 4 else content(client).startswith("250 s")  # its code was there in time

    all_at_once(play, range(len(places)))
    for upstream in upstreams:
        upstream.stop()


def test_an_upstream_that_reads_slowly_is_given_up(start_willi: StartWilli, raw: RawUpstream):
    willi = start_willi(server=raw.server, **SHORT)
    willi.tolerate("Upstream failed")
    client, peer = meet_in_data(willi, raw)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ended = threading.Event()

    def read_slowly() -> None:
        while not ended.wait(0.2):
            peer.socket.recv(100)

    reading = threading.Thread(target=read_slowly, daemon=True)
    reading.start()
    sending = Meanwhile(client, b"x" * 98 * 200_000 + b"\r\n.\r\n")
    assert str(client.read_reply()) == LOST
    ended.set()
    reading.join()
    sending.join()


# Time: known answers


HELD_AT = {  # where the upstream takes its time, and how many answers of the group are known by then
    GREETING: 1, b"EHLO": 1, b"STARTTLS": 1, b"XCLIENT": 1, b"MAIL": 1, BOB: 1, BEN: 2, b"DATA": 3, b"BDAT": 3,
}  # fmt: skip


@pytest.mark.parametrize(("pipelining", "tls"), [(True, False), (False, True)], ids=["group", "TLS, one by one"])
def test_known_answers_do_not_wait_for_the_rest_of_their_group(
    pipelining: bool, tls: bool, share_willi: StartWilli, start_upstream: StartUpstream, postfix_certificate: Pair
):
    """The upstream answers only when the client has what was known before, at each place."""
    held, table = {}, ["pattern;server;tls_verify\n"]
    for number, where in enumerate(HELD_AT):
        upstream = start_upstream(tls=postfix_certificate.server_context())
        upstream.extensions = (b"SIZE", b"CHUNKING", b"XCLIENT NAME ADDR", *([b"PIPELINING"] * pipelining))
        held[where] = upstream.answers[where.replace(b"@b.", b"@%d." % number)] = Hold()
        table.append(f"{number}.example;{upstream.server};false\n")
    willi = share_willi(
        csv="".join(table), upstream_tls="always", tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key
    )

    def play(number: int, where: bytes) -> None:
        client = greeted(willi, tls)
        client.socket.settimeout(MAX_HOLD)
        group = b"".join(line + b"\r\n" for line in (MAIL, BOB, BEN)).replace(b"@b.", b"@%d." % number)
        client.send(group + (b"BDAT 5 LAST\r\nhello" if where == b"BDAT" else b"DATA\r\n"))
        known = [SENDER_KEPT, OK, OK][: HELD_AT[where]]
        assert [str(client.read_reply()) for _ in known] == known
        assert held[where].reached.wait(PATIENCE)
        held[where].release()
        rest = [client.read_reply().code for _ in range(4 - len(known))]
        assert rest == [250] * (len(rest) - 1) + [250 if where == b"BDAT" else 354]
        client.close()

    all_at_once(lambda case: play(*case), enumerate(HELD_AT))


# Memory


def test_a_command_line_of_50_megabytes_takes_no_memory(fresh_willi: Willi):
    client = greeted(fresh_willi)
    before = resident(fresh_willi)
    for _ in range(50):
        client.send(b"NOOP " + b"x" * A_MEGABYTE)
    assert resident(fresh_willi) - before < FLAT
    client.send(b"\r\n")
    assert str(client.read_reply()) == "500 5.5.2 Line too long"
    assert say(client, b"NOOP") == ["250 2.0.0 Ok"]


@pytest.mark.parametrize("octet", [b"x", b".", b" ", b"\0"], ids=repr)
def test_a_line_of_50_megabytes_in_a_message_takes_no_memory(octet: bytes, start_willi: StartWilli, raw: RawUpstream):
    willi = start_willi(server=raw.server, max_message_bytes="200MiB")
    client, peer = meet_in_data(willi, raw)
    size = 50 * A_MEGABYTE
    before = resident(willi)
    sending = Meanwhile(client, b"a" + octet * (size - 3) + b"\r\n.\r\n")
    peer.swallow(size)
    assert resident(willi) - before < FLAT
    assert peer.read_for(b".\r\n") == b".\r\n"
    peer.send(b"250 2.0.0 queued\r\n")
    sending.join()
    assert str(client.read_reply()) == "250 2.0.0 queued"


@pytest.mark.parametrize("octet", [b" ", b"\0"], ids=repr)
def test_a_line_of_blanks_takes_no_memory(octet: bytes, start_willi: StartWilli, raw: RawUpstream):
    """One that might still become a lone dot: it is not kept until that is known."""
    willi = start_willi(server=raw.server, max_message_bytes="200MiB")
    client, peer = meet_in_data(willi, raw)
    size = 50 * A_MEGABYTE
    before = resident(willi)
    sending = Meanwhile(client, octet * size + b"x\r\n.\r\n")
    peer.swallow(size)
    assert resident(willi) - before < FLAT
    assert peer.read_for(b"\r\n.\r\n") == b"x\r\n.\r\n"
    peer.send(b"250 2.0.0 queued\r\n")
    sending.join()
    assert str(client.read_reply()) == "250 2.0.0 queued"


@pytest.mark.parametrize("extensions", [(b"CHUNKING",), ()], ids=["BDAT", "BDAT to DATA"])
def test_a_chunk_of_50_megabytes_takes_no_memory(
    extensions: tuple[bytes, ...], start_willi: StartWilli, raw: RawUpstream
):
    willi = start_willi(server=raw.server, max_message_bytes="200MiB")
    client, peer = meet(willi, raw, *extensions)
    size = 50 * A_MEGABYTE
    before = resident(willi)
    client.send(b"BDAT %d LAST\r\n" % size)
    if not extensions:
        peer.answer(b"DATA", b"354 go on\r\n")
    sending = Meanwhile(client, b"x" * size)
    if extensions:
        peer.read_for(b"LAST\r\n")
    peer.swallow(size)
    assert resident(willi) - before < FLAT
    if not extensions:
        assert peer.read_for(b".\r\n") == b"\r\n.\r\n"
    peer.send(b"250 2.0.0 queued\r\n")
    sending.join()
    assert str(client.read_reply()) == "250 2.0.0 queued"


def test_a_message_that_is_too_big_takes_no_memory(fresh_willi: Willi):
    client = in_data(fresh_willi)
    before = resident(fresh_willi)
    for _ in range(50):
        client.send(b"x" * (A_MEGABYTE - 2) + b"\r\n")
    assert resident(fresh_willi) - before < FLAT
    assert content(client) == "552 5.3.4 Message is too big"


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("greeting", "long lines"), ("greeting", "LF"), ("EHLO", "empty lines"), ("EHLO", "a line"), ("RCPT", "a line"),
        ("RCPT", "long lines"), ("verdict", "a line"), ("verdict", "empty lines"), ("verdict", "LF"),
    ],
)  # fmt: skip
def test_an_endless_reply_takes_no_memory(where: str, kind: str, start_willi: StartWilli, raw: RawUpstream):
    willi = start_willi(server=raw.server, connect_timeout="2s", upstream_timeout="2s", data_timeout="2s")
    willi.tolerate("Upstream failed")
    line = ENDLESS[kind]
    before = resident(willi)
    if where == "verdict":
        client, peer = meet_in_data(willi, raw)
        client.send(b"x\r\n.\r\n")
        peer.read_for(b".\r\n")
    else:
        client = greeted(willi)
        assert say(client, MAIL) == [SENDER_KEPT]
        client.send(BOB + b"\r\n")
        peer = raw.accept()
        answer_until(peer, where)
    pieces = peer.flood(line * (A_MEGABYTE // len(line)), 100)
    heard = str(client.read_reply())
    if where == "verdict" and kind != "a line":
        assert heard.startswith("250 "), "its code was there at once"
    else:
        assert heard == (LOST if where == "verdict" else NO_ANSWER)
    assert pieces < 100
    assert resident(willi) - before < FLAT


def answer_until(peer: Peer, where: str) -> None:
    """What a good server says before this point."""
    if where == "greeting":
        return
    if where == "EHLO":
        peer.send(b"220 raw.example\r\n")
        peer.read_line()
        return
    peer.introduce()
    peer.answer(b"MAIL", b"250 2.1.0 ok\r\n")
    peer.read_line()


def test_pipelined_commands_without_end_take_no_memory(start_willi: StartWilli, upstream: ScriptedUpstream):
    """Their replies are read, so that nothing keeps the client from sending more."""
    willi = start_willi(server=upstream.server, max_errors=1_000_000)
    client = greeted(willi)
    before = resident(willi)
    lines = b"NOOP\r\nRSET\r\nVRFY x\r\n" * 1000
    for _ in range(50):
        sending = Meanwhile(client, lines)
        replies = [client.read_reply().code for _ in range(3000)]
        sending.join()
        assert replies == [250, 250, 252] * 1000
    assert resident(willi) - before < FLAT


def test_endless_recipients_take_no_memory(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_recipients=100, max_errors=1_000_000)
    client = greeted(willi)
    assert say(client, MAIL) == [SENDER_KEPT]
    before = resident(willi)
    for _ in range(20):
        replies = client.commands(*[BOB] * 1000)
    assert str(replies[-1]) == "452 4.5.3 Too many recipients"
    assert resident(willi) - before < FLAT
    assert len([line for line in upstream.commands if line == BOB]) == 100


def test_endless_refused_recipients_take_no_memory(fresh_willi: Willi, upstream: ScriptedUpstream):
    """Each with ten thousand octets of the upstream's own words, which are not kept."""
    upstream.answers[b"RCPT"] = Reply(450, (b"4.1.1 " + b"x" * 500,) * 20)
    client = greeted(fresh_willi)
    assert say(client, MAIL) == [SENDER_KEPT]
    before = resident(fresh_willi)
    for _ in range(60):
        assert {reply.code for reply in client.commands(*[BOB] * 50)} == {450}
    assert resident(fresh_willi) - before < FLAT
    assert say(client, b"DATA") == ["451 4.5.1 No valid recipients, try again"]


def test_endless_recipients_behind_a_refused_mail_take_no_memory(start_willi: StartWilli, upstream: ScriptedUpstream):
    """What the upstream said of MAIL is told again for each of them, and nothing of that is kept."""
    upstream.answers[b"MAIL"] = Reply(550, (b"5.7.1 not you",))
    willi = start_willi(server=upstream.server)
    client = greeted(willi)
    assert say(client, MAIL, BOB) == [SENDER_KEPT, "550 5.7.1 not you"]
    before = resident(willi)
    for _ in range(100):
        assert {str(reply) for reply in client.commands(*[BOB] * 100)} == {"550 5.7.1 not you"}
    assert resident(willi) - before < FLAT


@pytest.mark.parametrize("header", [b"PROXY TCP4 " + b"1" * 200, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff" + b"x" * 200])
def test_a_long_proxy_header_is_refused_before_it_is_there(
    header: bytes, start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, proxy_protocol_hosts="127.0.0.1", probe=False)
    client = willi.connect(greeting=False)
    client.send(header)
    with contextlib.suppress(ConnectionResetError):
        assert client.read_to_end() == b""
    willi.wait_for_log(msg="Connection dropped")


def test_errors_have_a_limit(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_errors=5)
    client = willi.connect()
    assert say(client, EHLO, *[b"XYZZY"] * 4)[1:] == ["500 5.5.2 Command not recognized"] * 4
    assert say(client, b"XYZZY") == ["421 4.7.0 Too many errors"]
    client.expect_eof()


def test_a_log_that_nobody_reads_stops_no_mail(tmp_path: Path, upstream: ScriptedUpstream):
    """Its pipe takes 64 KiB; then lines are lost."""
    static: dict[str, Setting] = {"type": "static", "server": upstream.server, "tls_verify": False}
    port = free_port()
    config = write_config(tmp_path / "willi.conf", {"listen": f"{HOST}:{port}", "mappings": {"all": static}})
    command = [sys.executable, str(ROOT / "willi.py"), "-c", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            while b"msg=Ready" not in process.stdout.readline():
                pass
            with Client(port) as client:
                assert client.read_reply().code == 220
                assert client.command(b"EHLO " + b"h" * 250).code == 250
                for _ in range(150):
                    assert deliver(client) == QUEUED
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
