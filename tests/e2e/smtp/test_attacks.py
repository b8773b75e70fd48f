"""Attacks that no other file is about. SECURITY.md has the list of all, with their tests."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Authority, Pair
from tests.support.daemon import Willi
from tests.support.dns import DnsServer
from tests.support.loopback import HOST, need
from tests.support.talk import BOB, MAIL, NO_ANSWER, QUEUED, SENDER_KEPT, deliver, greeted, say, verbs
from tests.support.upstream import EXTENSIONS, GREETING, ScriptedUpstream
from willi_lib.smtp.reply import Reply

CLIENT = "127.0.0.9"
# As DNS writes them: \013\010 is CR LF. Their owner has an address for each of them, which leads back.
INJECTING_NAMES = [
    r"evil.example\013\010RSET\013\010",
    r"evil.example\010MAIL\032FROM:<eve@bank.example>",
    r"evil\032ADDR=192.0.2.1\032HELO=bank.example",
    r"evil+0D+0ARSET.example",
    r"evil\000.example",
    r"evil\"\032lvl=error\032msg=forged.example",
    r"[192.0.2.1]",
]
FORGED = b'x" lvl=error msg="forged" client=192.0.2.1'
KEYWORDS = tuple(b"X-KEYWORD-%d with=some parameters" % number for number in range(5000))


@pytest.mark.parametrize("name", INJECTING_NAMES)
def test_no_ptr_name_injects_anything(name: str, start_willi: StartWilli, upstream: ScriptedUpstream, dns: DnsServer):
    """Whoever owns an address says what its name is, in any octets."""
    upstream.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR PORT PROTO HELO")
    dns.reverse(CLIENT, name)
    dns.zone[name.lower()] = {"A": [CLIENT]}
    willi = start_willi(server=upstream.server, dns=dns)
    with greeted(willi, source=CLIENT) as client:
        assert deliver(client) == QUEUED
    told = [line for line in upstream.commands if line.startswith(b"XCLIENT")]
    assert len(told) == 1 and b" NAME=[UNAVAILABLE] " in told[0] and told[0].endswith(b" ADDR=127.0.0.9")
    assert verbs(upstream.commands)[:6] == [b"EHLO", b"XCLIENT", b"EHLO", b"MAIL", b"RCPT", b"DATA"]
    assert all(b"vil" not in octets for octets in (upstream.connection().received, willi.text.encode()))


def test_no_control_octet_of_an_upstream_reaches_the_client(willi: Willi, upstream: ScriptedUpstream):
    """A NUL ends the text for some readers, ESC is a command to a terminal. All else goes on word for word."""
    upstream.answers[BOB] = b"550-5.1.1 \0no\x1b[31m bob\x7f\r\n550 5.1.1\t gr\xc3\xbc\xc3\x9f \x01\xff\r\n"
    with greeted(willi) as client:
        client.send(MAIL + b"\r\n" + BOB + b"\r\n")
        assert client.read_reply().code == 250
        lines = [client.read_line(), client.read_line()]
    assert lines == [b"550-5.1.1 ?no?[31m bob?", b"550 5.1.1\t gr\xc3\xbc\xc3\x9f ?\xff"]
    logged = willi.wait_for_log(msg="Message rejected")
    assert logged["reply"] == "550 5.1.1 ?no?[31m bob? / 5.1.1\t grüß ?\\xff"


# TLS


def s_client(willi: Willi, typed: str, *options: str) -> str:
    """What openssl says after STARTTLS when this is typed."""
    need("openssl")
    command = ["openssl", "s_client", "-connect", f"{HOST}:{willi.port}", "-starttls", "smtp", *options]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def secure(share_willi: StartWilli, upstream: ScriptedUpstream, postfix_certificate: Pair) -> Willi:
    return share_willi(server=upstream.server, tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key)


def test_nothing_is_compressed_by_tls(secure: Willi):
    """Neither a bomb nor an oracle (CRIME)."""
    for version in ("-tls1_2", "-tls1_3"):
        told = s_client(secure, "", "-comp", version)
        assert "Compression: NONE" in told, told


def test_a_client_cannot_renegotiate(secure: Willi):
    """A handshake costs us more than the client; R in the first column asks for one. See tests/test_tls.py, too."""
    told = s_client(secure, "R\n", "-tls1_2")
    assert re.search(r"RENEGOTIATING\n.*no renegotiation", told, re.DOTALL | re.IGNORECASE), told
    secure.probe()


@pytest.mark.parametrize("weak", ["NULL", "aNULL", "RC4", "3DES", "EXPORT"])
def test_weak_ciphers_are_not_agreed_on(weak: str, secure: Willi):
    told = s_client(secure, "", "-tls1_2", "-cipher", f"{weak}:@SECLEVEL=0")
    assert re.search(r"handshake failure|no cipher match|no ciphers available", told), told


# Upstreams


def test_an_upstream_of_thousands_of_keywords_is_given_up(
    start_willi: StartWilli, start_upstream: StartUpstream, upstream: ScriptedUpstream
):
    hostile = start_upstream()
    hostile.extensions = KEYWORDS
    willi = start_willi(server=f"{hostile.server}, {upstream.server}")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert verbs(hostile.commands) == [b"EHLO"]
    assert len(upstream.messages) == 1


def test_keywords_that_nobody_knows_change_nothing(willi: Willi, upstream: ScriptedUpstream):
    """As many as a reply may have lines; the last one is there all the same."""
    upstream.extensions = (*KEYWORDS[:150], *EXTENSIONS)
    with greeted(willi) as client:
        assert deliver(client, mail=MAIL + b" BODY=8BITMIME") == QUEUED
    assert upstream.messages[0].mail == MAIL + b" BODY=8BITMIME"


@pytest.mark.parametrize("where", [GREETING, b"EHLO", BOB], ids=["greeting", "EHLO", "RCPT"])
def test_no_words_of_an_upstream_forge_a_line(where: bytes, willi: Willi, upstream: ScriptedUpstream):
    """As few as those of a client: each line that says so much has one level, one message and the client's address."""
    willi.tolerate("Upstream failed")
    upstream.answers[where] = upstream.answers[b"HELO"] = Reply(554, (b"5.7.1 " + FORGED, FORGED))
    with greeted(willi) as client:
        expected = f"554 5.7.1 {FORGED.decode()} / {FORGED.decode()}" if where == BOB else NO_ANSWER
        assert say(client, MAIL, BOB) == [SENDER_KEPT, expected]
        address = client.address
    line = willi.wait_for_log(msg="Message rejected")
    assert (line["lvl"], line["client"]) == ("info", address)
    assert FORGED.decode() in line["error"]
    assert {other["msg"] for other in willi.lines(lvl="error")} <= {"Upstream failed"}


def test_no_server_name_in_tls_forges_a_line(
    start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority
):
    """With several certificates the name chooses; one that is no text is passed over, and told in a line of its own."""
    pairs = [certificates.issue("a.example"), certificates.issue("b.example")]
    willi = start_willi(
        server=upstream.server, tls_cert=[str(pair.cert) for pair in pairs], tls_key=[str(pair.key) for pair in pairs]
    )
    for name in ('x" lvl=error msg="forged', "x lvl=error", "\u202e.example", "\x1b[2J"):
        told = s_client(willi, "", "-servername", name)
        assert not name.isascii() or "subject=CN=a.example" in told.replace(" ", ""), (name, told)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert all(line["lvl"] in ("info", "warn") for line in willi.log)
    assert "forged" not in {line["msg"] for line in willi.log}
