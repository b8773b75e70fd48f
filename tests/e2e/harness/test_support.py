"""The tests' own servers and clients: what they record is what was there."""

from __future__ import annotations

import signal
import smtplib
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import StartPostfix, StartUpstream, StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import OWN_INTERPRETER, Willi, parse_logfmt, run_willi
from tests.support.dns import DnsServer, Fault
from tests.support.forked import Forked
from tests.support.loopback import HOST, PATIENCE
from tests.support.postfix import Postfix
from tests.support.twin import Twin
from tests.support.upstream import (
    GREETING,
    VERDICT,
    Close,
    Drip,
    Ended,
    Hold,
    Message,
    Reset,
    ScriptedUpstream,
    Silence,
)
from willi_lib.smtp.reply import Reply

NO_BOB = Reply(550, (b"5.1.1 no bob here", b"5.1.1 sorry"))
ODD_MESSAGE = b"Subject: odd\r\n\r\n.\r\n..dots\r\nlong " + b"x" * 5000 + b"\r\n8-bit \xe4\xff NUL \0 end\r\n"


def in_transaction(upstream: ScriptedUpstream) -> Client:
    """A client that was told 250 for its recipient."""
    client = Client(upstream.port)
    client.read_reply()
    for line in (b"EHLO c.example", b"MAIL FROM:<ann@a.example>", b"RCPT TO:<bob@b.example>"):
        assert client.command(line).code == 250
    return client


def test_the_upstream_records_what_smtplib_sends(upstream: ScriptedUpstream):
    with smtplib.SMTP(HOST, upstream.port, local_hostname="c.example") as client:
        client.sendmail("ann@a.example", ["bob@b.example", "ben@b.example"], ".\r\nhello")
    connection = upstream.connection()
    assert connection.wait_for_end() is Ended.QUIT
    assert [line.lower() for line in connection.commands] == [  # older versions of smtplib write "mail FROM"
        b"ehlo c.example", b"mail from:<ann@a.example> size=8",
        b"rcpt to:<bob@b.example>", b"rcpt to:<ben@b.example>", b"data", b"quit",
    ]  # fmt: skip
    [message] = connection.messages
    assert message.sender == b"ann@a.example"
    assert message.recipients == (b"bob@b.example", b"ben@b.example")
    assert message.content == b".\r\nhello\r\n"
    assert message.wire == b"..\r\nhello\r\n.\r\n"
    assert connection.received.lower().startswith(b"ehlo c.example\r\nmail ")


def test_an_answer_can_be_scripted_by_line_and_by_verb_and_in_turn(upstream: ScriptedUpstream):
    upstream.answers[b"RCPT TO:<bob@b.example>"] = NO_BOB
    upstream.answers[b"MAIL"] = [Reply(451, (b"4.3.0 later",)), Drip(Reply(250, (b"2.1.0 ok",)))]
    upstream.answers[GREETING] = Reply(220, (b"strange.example",))
    with Client(upstream.port) as client:
        assert client.read_reply().lines == (b"strange.example",)
        client.command(b"EHLO c.example")
        codes = [client.command(b"MAIL FROM:<>").code for _ in range(3)]
        assert codes == [451, 250, 503]
        assert client.command(b"RCPT TO:<bob@b.example>") == NO_BOB
        assert client.command(b"DATA").code == 503


def test_bdat_chunks_become_one_message(upstream: ScriptedUpstream):
    with in_transaction(upstream) as client:
        client.send(b"BDAT 5\r\na\r\n.\rBDAT 4 LAST\r\n\n\r\nbQUIT\r\n")
        assert [client.read_reply().code for _ in range(3)] == [250, 250, 221]
        client.expect_eof()
    mail, rcpts = b"MAIL FROM:<ann@a.example>", (b"RCPT TO:<bob@b.example>",)
    assert upstream.messages == [Message(mail, rcpts, b"a\r\n.\r\n\r\nb", b"a\r\n.\r\n\r\nb")]


def test_the_upstream_takes_only_what_it_offers(upstream: ScriptedUpstream):
    upstream.extensions = (b"SIZE 1000",)
    with Client(upstream.port) as client:
        client.read_reply()
        assert client.command(b"MAIL FROM:<>").code == 503
        assert client.command(b"EHLO c.example").lines == (b"upstream.example", b"SIZE 1000")
        assert client.command(b"MAIL FROM:<> BODY=8BITMIME").code == 555
        assert client.command(b"MAIL FROM:<> SIZE=10").code == 250
        assert [reply.code for reply in client.commands(b"RCPT TO:<a@b.example>", b"NOOP")] == [554, 250]
        assert client.command(b"RCPT TO:<a@b.example>").code == 250
        assert client.command(b"BDAT 0 LAST").code == 503
    assert upstream.messages == []


def test_an_upstream_that_closes_sends_eof(upstream: ScriptedUpstream):
    upstream.answers[VERDICT] = Close()
    with in_transaction(upstream) as client:
        assert client.command(b"DATA").code == 354
        client.send(b"x\r\n.\r\n")
        client.expect_eof()
    assert upstream.wait_for_message().content == b"x\r\n"
    assert upstream.wait_for_ends() == [Ended.OURS]


def test_an_upstream_that_resets_is_felt_as_a_reset(upstream: ScriptedUpstream):
    upstream.answers[b"DATA"] = Reset()
    with in_transaction(upstream) as client, pytest.raises(ConnectionResetError):
        client.command(b"DATA")


@pytest.mark.parametrize("octets", [0, 1, 5])
def test_an_upstream_can_be_killed_within_a_message(octets: int, upstream: ScriptedUpstream):
    upstream.kill_after = octets
    with in_transaction(upstream) as client:
        assert client.command(b"DATA").code == 354
        with pytest.raises(ConnectionError):
            client.send_slowly(b"hello\r\n.\r\n")
            client.read_to_end()
    assert upstream.connection().wait_for_end() is Ended.OURS
    assert upstream.connection().unfinished == b"hello"[:octets]
    assert upstream.messages == []


def test_a_client_that_hangs_up_is_told_apart_from_one_that_resets(upstream: ScriptedUpstream):
    upstream.answers[b"DATA"] = Silence()
    with in_transaction(upstream) as client:
        client.send(b"DATA\r\n")
        upstream.connection().wait_for_command(b"DATA")
    in_transaction(upstream).reset()
    assert upstream.wait_for_ends() == [Ended.EOF, Ended.RESET]


def test_an_answer_is_held_until_the_test_releases_it(upstream: ScriptedUpstream):
    held = upstream.answers[VERDICT] = Hold()
    with in_transaction(upstream) as client:
        client.command(b"DATA")
        client.send(b"hello\r\n.\r\n")
        assert held.reached.wait(PATIENCE)
        client.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.read_reply()
        held.release()
        client.socket.settimeout(PATIENCE)
        assert client.read_reply().code == 250


def test_certificates_are_trusted_expired_or_unknown(certificates: Authority, start_upstream: StartUpstream):
    good = start_upstream(tls=certificates.issue("mx.example", "127.0.0.1").server_context())
    with Client(good.port) as client:
        client.read_reply()
        assert b"STARTTLS" in client.command(b"EHLO c.example").lines
        assert client.starttls(certificates.client_context(), "mx.example").code == 220
        assert b"STARTTLS" not in client.command(b"EHLO c.example").lines
        assert good.connection().tls
    for pair, why in (
        (certificates.expired("mx.example"), "expired"),
        (certificates.self_signed("mx.example"), "self-signed"),
        (certificates.issue("other.example"), "mismatch"),
    ):
        bad = start_upstream(tls=pair.server_context())
        with Client(bad.port) as client:
            client.read_reply()
            with pytest.raises(ssl.SSLCertVerificationError, match=why):
                client.starttls(certificates.client_context(), "mx.example")
        assert bad.connection().wait_for_end() is Ended.TLS


@pytest.mark.parametrize(
    "header", [b"PROXY UNKNOWN\r\n", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 25\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\x03abc"]
)
def test_a_proxy_header_is_kept_apart(header: bytes, start_upstream: StartUpstream):
    upstream = start_upstream(proxy=True)
    with Client(upstream.port) as client:
        client.send(header)
        assert client.read_reply().code == 220
    assert upstream.connection().proxy_header == header
    assert upstream.connection().commands == []


def test_postfix_stores_a_message_as_it_was_sent(postfix: Postfix):
    with Client(postfix.port) as client:
        client.read_reply()
        offered = client.command(b"EHLO c.example").lines
        for extension in (b"PIPELINING", b"8BITMIME", b"SMTPUTF8", b"CHUNKING", b"STARTTLS"):
            assert extension in offered
        assert client.command(b"XCLIENT NAME=mail.d.example ADDR=192.0.2.7 PORT=1234").code == 220
        assert client.command(b"EHLO d.example").code == 250
        client.commands(b"MAIL FROM:<ann@a.example> BODY=8BITMIME", b"RCPT TO:<stored@b.example>", b"DATA")
        client.send(ODD_MESSAGE.replace(b"\r\n.", b"\r\n..") + b".\r\n")
        assert client.read_reply().code == 250
    stored = postfix.wait_for_message("stored@b.example")
    assert stored.content == ODD_MESSAGE.replace(b"\r\n", b"\n")
    assert stored.sender == "ann@a.example"
    assert "from d.example (mail.d.example [192.0.2.7])" in stored.received


def test_postfix_delivers_through_a_relay(start_postfix: StartPostfix, upstream: ScriptedUpstream):
    upstream.answers[b"RCPT"] = [Reply(451, (b"4.3.0 not now",))]
    sender = start_postfix("sender.example", settings={"relayhost": f"[{HOST}]:{upstream.port}"})
    with sender.client() as client:
        client.sendmail("ann@a.example", ["bob@b.example"], "Subject: x\r\n\r\nhello\r\n")
    message = upstream.wait_for_message()
    assert message.recipients == (b"bob@b.example",)
    assert message.content.endswith(b"\r\n\r\nhello\r\n")
    assert b"EHLO sender.example" in upstream.commands
    sender.stop()
    with pytest.raises(ConnectionRefusedError):
        sender.client()


LOOK_UPS = """
import gevent.monkey; gevent.monkey.patch_all()
import socket, dns.resolver
from gevent.resolver.ares import Resolver
from gevent import get_hub
ares = Resolver(hub=get_hub())
print(ares.gethostbyname("mx.b.example"))
print(ares.gethostbyaddr("127.0.0.7")[0])
print(ares.gethostbyaddr("127.0.0.1")[0])
print(ares.getaddrinfo("mx6.b.example", 25, socket.AF_INET6)[0][4][0])
print(dns.resolver.resolve("b.example", "MX")[0].exchange)
for name in ("none.example", "broken.example"):
    try:
        ares.gethostbyname(name)
    except OSError as error:
        print(type(error).__name__, error.args[0])
"""


def test_a_process_can_have_a_resolver_of_its_own(dns: DnsServer):
    dns.host("mx.b.example", "127.0.0.7")
    dns.host("mx6.b.example", "::7")
    dns.reverse("127.0.0.1", "home.example")
    dns.zone["b.example"] = {"MX": ["10 mx.b.example."]}
    dns.zone["broken.example"] = Fault.SERVFAIL
    done = subprocess.run([*dns.prefix, sys.executable, "-c", LOOK_UPS], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    assert words[:5] == ["127.0.0.7", "mx.b.example", "home.example", "::7", "mx.b.example."], done.stderr
    assert words[5::2] == ["gaierror", "herror"], "NXDOMAIN and SERVFAIL"
    assert ("b.example", "MX") in dns.queries


def test_a_log_line_is_read_as_it_was_meant():
    line = r't=2026-01-01T00:00:00+0000 lvl=info msg="Message \"accepted\"" from="a\x1b\n\\" bytes=12 to='
    assert parse_logfmt(line) == {
        "t": "2026-01-01T00:00:00+0000", "lvl": "info", "msg": 'Message "accepted"', "from": "a\x1b\n\\", "bytes": "12",
        "to": "",
    }  # fmt: skip
    with pytest.raises(AssertionError, match="not logfmt"):
        parse_logfmt("Traceback (most recent call last):")
    with pytest.raises(AssertionError, match="twice"):
        parse_logfmt("lvl=info lvl=error")


# A twin


def test_what_a_twin_changes_and_starts_stays_in_it():
    twin = Twin()
    try:
        twin.run("sh", "-c", f"echo changed >/etc/passwd; echo shared >{twin.home}/file")
        assert twin.run("cat", "/etc/passwd") == "changed\n"
        assert "changed" not in Path("/etc/passwd").read_text()
        assert (twin.home / "file").read_text() == "shared\n"
        program = twin.start("sleep", "600", log_file=twin.home / "log")
        assert program.poll() is None
    finally:
        twin.stop()
    assert program.wait(PATIENCE) != 0, "ended with its twin"
    assert not twin.home.exists()


def test_a_forked_willi_is_as_one_with_an_interpreter_of_its_own(start_willi: StartWilli, upstream: ScriptedUpstream):
    forked, own = (start_willi(server=upstream.server, prefix=prefix) for prefix in ((), OWN_INTERPRETER))

    def state(willi: Willi) -> list[object]:
        process = Path(f"/proc/{willi.process.pid}")
        signals = [line for line in (process / "status").read_text().splitlines() if line.startswith("Sig")]
        return [(process / "cwd").readlink(), sorted(one.name for one in (process / "fd").iterdir()), signals]

    assert isinstance(forked.process, Forked)
    assert not isinstance(own.process, Forked)
    assert state(forked) == state(own)
    for willi in forked, own:
        willi.tolerate("The master is dead")
        willi.kill()
        assert willi.process.returncode == -signal.SIGKILL
    refused = run_willi("check", "-c", "/nowhere/willi.conf")
    assert refused.returncode == 1
    assert "/nowhere/willi.conf" in refused.stderr + refused.stdout
