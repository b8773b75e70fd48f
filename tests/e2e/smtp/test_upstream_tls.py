"""TLS with upstreams: when it is used, what is verified, and that there is no way back to clear text."""

from __future__ import annotations

import pytest

from tests.conftest import StartPostfix, StartUpstream, StartWilli
from tests.support.certificates import Authority, Pair
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.dns import DnsServer
from tests.support.postfix import Postfix
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
    content,
    deliver,
    greeted,
    reply,
    say,
    say_together,
)
from tests.support.upstream import Action, Close, Drip, Ended, Reset, ScriptedUpstream


@pytest.fixture
def pair(certificates: Authority) -> Pair:
    return certificates.issue("mx.example", "127.0.0.1")


@pytest.fixture
def secure(start_upstream: StartUpstream, pair: Pair) -> ScriptedUpstream:
    """An upstream that offers STARTTLS, with a certificate for its address."""
    return start_upstream(tls=pair.server_context())


def to_verified(*upstreams: ScriptedUpstream) -> str:
    """A CSV with tls_verify as it is if nothing is said: true."""
    return f"pattern;server\nb.example;{','.join(upstream.server for upstream in upstreams)}\n"


def sends(willi: Willi, over_tls: bool) -> str:
    """What becomes of a message, by a client with or without TLS."""
    with greeted(willi) as client:
        if over_tls:
            client.starttls()
            say(client, EHLO)
        return outcome(client)


def outcome(client: Client) -> str:
    answers = say(client, MAIL, BOB)
    assert answers[0] == SENDER_KEPT
    if answers[1][:3] != "250":
        return answers[1]
    assert client.command(b"RSET").code == 250
    return deliver(client)


@pytest.mark.parametrize(
    ("upstream_tls", "client_tls", "offered", "used"),
    [
        ("auto", True, True, True),
        ("auto", False, True, False),
        ("auto", True, False, False),
        ("always", True, True, True),
        ("always", False, True, True),
        ("always", True, False, False),
        ("require", True, True, True),
        ("require", False, True, True),
        ("require", True, False, None),
        ("require", False, False, None),
        ("never", True, True, False),
        ("never", False, True, False),
    ],
)
def test_tls_is_used_as_the_setting_says(
    upstream_tls: str, client_tls: bool, offered: bool, used: bool | None,
    share_willi: StartWilli, upstream: ScriptedUpstream, secure: ScriptedUpstream, pair: Pair,
):  # fmt: skip
    target = secure if offered else upstream
    willi = share_willi(server=target.server, upstream_tls=upstream_tls, tls_cert=str(pair.cert), tls_key=str(pair.key))
    willi.tolerate("STARTTLS is required and not offered")
    assert sends(willi, client_tls) == (NO_ANSWER if used is None else QUEUED)
    if used is None:
        assert target.messages == []
        assert MAIL not in target.commands
    else:
        assert target.connection().tls is used
        line = willi.wait_for_log(msg="Message accepted")
        assert (line["client_tls"], line["upstream_tls"]) == (str(client_tls).lower(), str(used).lower())


def test_after_starttls_ehlo_is_said_again_and_counts(start_willi: StartWilli, secure: ScriptedUpstream):
    before, after = reply("250 upstream.example / STARTTLS / SIZE"), reply("250 upstream.example / 8BITMIME")
    secure.answers[b"EHLO"] = [before, after]
    willi = start_willi(server=secure.server, upstream_tls="require")
    with greeted(willi) as client:
        assert deliver(client, mail=MAIL + b" SIZE=100 BODY=8BITMIME") == QUEUED
    heard = [b"EHLO willi.example", b"STARTTLS", b"EHLO willi.example", MAIL + b" BODY=8BITMIME"]
    assert secure.connection().commands[:4] == heard


def test_a_good_certificate_is_verified_by_address(
    start_willi: StartWilli, certificates: Authority, secure: ScriptedUpstream
):
    willi = start_willi(csv=to_verified(secure), upstream_tls="require", upstream_tls_ca=str(certificates.ca))
    assert sends(willi, over_tls=False) == QUEUED
    assert secure.connection().tls


def test_a_good_certificate_is_verified_by_the_name_in_the_route(
    start_willi: StartWilli, certificates: Authority, secure: ScriptedUpstream, dns: DnsServer
):
    dns.zone["mx.example"] = {"A": ["127.0.0.1"]}
    willi = start_willi(
        csv=f"pattern;server\nb.example;mx.example:{secure.port}\n", upstream_tls="require",
        upstream_tls_ca=str(certificates.ca), dns=dns,
    )  # fmt: skip
    assert sends(willi, over_tls=False) == QUEUED


BAD = {
    "unknown": "self-signed certificate",
    "expired": "certificate has expired",
    "wrong name": "IP address mismatch, certificate is not valid for '127.0.0.1'",
}


def bad_pair(certificates: Authority, kind: str) -> Pair:
    if kind == "unknown":
        return certificates.self_signed("127.0.0.1")
    return certificates.expired("127.0.0.1") if kind == "expired" else certificates.issue("mx.other.example")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_certificate_is_a_451_and_the_log_says_why(
    kind: str, share_willi: StartWilli, certificates: Authority, start_upstream: StartUpstream
):
    bad = start_upstream(tls=bad_pair(certificates, kind).server_context())
    willi = share_willi(csv=to_verified(bad), upstream_tls="always", upstream_tls_ca=str(certificates.ca))
    willi.tolerate("certificate")
    assert sends(willi, over_tls=False) == NO_ANSWER
    line = willi.wait_for_log(msg="Upstream failed", lvl="error")
    assert BAD[kind] in line["error"]
    assert line["error"].startswith(f"{bad.server}: TLS handshake: ")
    assert bad.wait_for_ends() == [Ended.TLS]
    assert bad.messages == []


@pytest.mark.parametrize("kind", BAD)
def test_without_tls_verify_a_bad_certificate_is_no_obstacle(
    kind: str, share_willi: StartWilli, certificates: Authority, start_upstream: StartUpstream
):
    bad = start_upstream(tls=bad_pair(certificates, kind).server_context())
    willi = share_willi(server=bad.server, upstream_tls="require")
    assert sends(willi, over_tls=False) == QUEUED
    assert bad.connection().tls


def test_an_authority_of_this_machine_does_not_vouch_for_ours(start_willi: StartWilli, secure: ScriptedUpstream):
    willi = start_willi(csv=to_verified(secure), upstream_tls="require")
    willi.tolerate("certificate")
    assert sends(willi, over_tls=False) == NO_ANSWER


def test_after_a_bad_certificate_the_next_host_is_tried(
    start_willi: StartWilli, certificates: Authority, start_upstream: StartUpstream, secure: ScriptedUpstream
):
    bad = start_upstream(tls=bad_pair(certificates, "expired").server_context())
    willi = start_willi(csv=to_verified(bad, secure), upstream_tls="always", upstream_tls_ca=str(certificates.ca))
    assert sends(willi, over_tls=False) == QUEUED
    assert len(secure.messages) == 1


FAILURES: dict[str, Action] = {
    "454": reply("454 4.7.0 TLS not available"),
    "5xx": reply("502 5.5.1 what?"),
    "250": reply("250 2.0.0 sure"),
    "garbage": b"ok\r\n",
    "close": Close(),
    "reset": Reset(),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("setting", ["always", "require"])
def test_if_starttls_does_not_work_nothing_goes_in_clear(
    kind: str, setting: str, share_willi: StartWilli, secure: ScriptedUpstream
):
    secure.answers[b"STARTTLS"] = FAILURES[kind]
    willi = share_willi(server=secure.server, upstream_tls=setting)
    willi.tolerate(secure.server)
    assert sends(willi, over_tls=False) == NO_ANSWER
    secure.wait_for_ends()
    assert MAIL not in secure.commands


@pytest.mark.parametrize(
    "injected", [b"250 2.0.0 evil\r\n", b"250-upstream.example\r\n250 XCLIENT ADDR\r\n", b"x"], ids=repr
)
def test_answers_injected_behind_the_220_are_not_believed(
    injected: bytes, share_willi: StartWilli, secure: ScriptedUpstream
):
    secure.answers[b"STARTTLS"] = b"220 2.0.0 go ahead\r\n" + injected
    willi = share_willi(server=secure.server, upstream_tls="always")
    willi.tolerate("clear text after the 220")
    assert sends(willi, over_tls=False) == NO_ANSWER
    assert MAIL not in secure.commands


def test_a_handshake_that_does_not_end_is_bounded(start_willi: StartWilli, start_upstream: StartUpstream):
    upstream = start_upstream()
    upstream.extensions = (b"STARTTLS",)
    upstream.answers[b"STARTTLS"] = Drip(reply("220 " + "x" * 100), 0.1)
    willi = start_willi(server=upstream.server, upstream_tls="always", upstream_timeout="1s")
    willi.tolerate(upstream.server)
    assert sends(willi, over_tls=False) == NO_ANSWER


def test_a_mapping_may_require_what_others_do_not(
    start_willi: StartWilli, upstream: ScriptedUpstream, secure: ScriptedUpstream
):
    csv = f"pattern;server;tls_verify\nc.example;{upstream.server};false\n"
    one = {"type": "static", "server": secure.server, "tls_verify": False, "upstream_tls": "require"}
    willi = start_willi(csv=csv, mappings={"one": one}, upstream_tls="never")
    with greeted(willi) as client:
        assert deliver(client) == deliver(client, b"RCPT TO:<carl@c.example>") == QUEUED
    assert secure.connection().tls
    assert not upstream.connection().tls


def test_a_large_message_passes_through_tls_on_both_sides(
    start_willi: StartWilli, secure: ScriptedUpstream, pair: Pair
):
    octets = b"".join(b"%d " % number + b"x" * 70 + b"\r\n" for number in range(20_000))
    willi = start_willi(server=secure.server, tls_cert=str(pair.cert), tls_key=str(pair.key))
    with greeted(willi) as client:
        client.starttls()
        say(client, EHLO, MAIL, BOB, b"DATA")
        client.send(octets + b".\r\n")
        assert str(client.read_reply()) == QUEUED
    assert secure.wait_for_message().content == octets
    assert secure.connection().tls


def test_postfix_is_verified(start_willi: StartWilli, certificates: Authority, postfix: Postfix):
    csv = f"pattern;server\nb.example;{postfix.server}\n"
    willi = start_willi(csv=csv, upstream_tls="require", upstream_tls_ca=str(certificates.ca))
    with greeted(willi) as client:
        assert deliver(client, b"RCPT TO:<verified@b.example>").startswith("250 ")
    assert "using TLSv1.3" in postfix.wait_for_message("verified@b.example").received


# An upstream that takes nothing in clear (RFC 3207 §4): 530 is about us, not about the client

WANTS_TLS = "530 5.7.0 Must issue a STARTTLS command first"
WANTS_TLS_LATER = "451 5.7.3 STARTTLS is required to send mail"
WANTS_LOGIN = "530 5.7.57 Client not authenticated to send mail"
NOT_FROM_US = "451 4.7.0 Server for this recipient wants TLS or a password from us, try again"


@pytest.mark.parametrize(
    ("step", "hello", "pipelining", "words"),
    [
        (b"MAIL", b"EHLO c.example", True, WANTS_TLS),
        (b"MAIL", b"EHLO c.example", True, WANTS_TLS_LATER),
        (b"MAIL", b"HELO c.example", False, WANTS_TLS),
        (b"RCPT", b"EHLO c.example", True, WANTS_TLS),
        (b"RCPT", b"EHLO c.example", False, WANTS_TLS_LATER),
        (b"XCLIENT", b"EHLO c.example", True, WANTS_TLS),
        (b"EHLO c.example", b"EHLO c.example", True, WANTS_TLS),
        (b"HELO c.example", b"HELO c.example", True, WANTS_TLS_LATER),
    ],
)
def test_an_upstream_that_wants_tls_gets_it(
    step: bytes, hello: bytes, pipelining: bool, words: str, start_willi: StartWilli, secure: ScriptedUpstream
):
    secure.extensions = (*((b"PIPELINING",) if pipelining else ()), b"XCLIENT NAME ADDR PORT PROTO HELO")
    secure.answers[step] = [reply(words)]
    willi = start_willi(server=secure.server)
    with greeted(willi, hello) as client:
        assert say_together(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, OK, OK, "354 go on"]
        assert content(client) == QUEUED
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert [connection.tls for connection in secure.connections] == [False, True, True], "and it is remembered"
    assert secure.messages[0].recipients == (b"bob@b.example", b"ben@b.example")


@pytest.mark.parametrize("step", [b"MAIL", b"RCPT"], ids=bytes.decode)
def test_a_530_is_forgotten_where_tls_does_not_work(step: bytes, start_willi: StartWilli, secure: ScriptedUpstream):
    """It may be about one sender or recipient, and the others' mail must go on as before."""
    secure.answers[step] = [reply(WANTS_LOGIN)]
    willi = start_willi(csv=to_verified(secure))
    willi.tolerate("TLS handshake")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert not secure.connections[-1].tls


def test_a_postfix_that_wants_tls_gets_it(start_willi: StartWilli, start_postfix: StartPostfix, pair: Pair):
    postfix = start_postfix("mx.example", ("b.example",), tls=pair, settings={"smtpd_tls_security_level": "encrypt"})
    willi = start_willi(server=postfix.server)
    for _ in range(2):
        with greeted(willi) as client:
            assert deliver(client).startswith("250 2.0.0 Ok: queued as ")
    assert len(willi.lines(msg="The upstream wants TLS, and gets it from now on")) == 1


@pytest.mark.parametrize(
    ("step", "words", "answer"),
    [(b"MAIL", WANTS_TLS, NO_ANSWER), (b"MAIL", WANTS_LOGIN, NO_ANSWER), (b"RCPT", WANTS_LOGIN, NOT_FROM_US)],
    ids=["MAIL, TLS", "MAIL, a password", "RCPT"],
)
@pytest.mark.parametrize("kind", ["no STARTTLS", "in TLS already", "never"])
def test_a_530_that_tls_does_not_cure_is_a_451_and_an_error(
    kind: str, step: bytes, words: str, answer: str, start_willi: StartWilli,
    upstream: ScriptedUpstream, secure: ScriptedUpstream,
):  # fmt: skip
    target = upstream if kind == "no STARTTLS" else secure
    target.answers[step] = reply(words)
    willi = start_willi(server=target.server, upstream_tls="never" if kind == "never" else "auto")
    willi.tolerate(words)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, answer]
        assert str(client.command(b"DATA"))[:4] == "451 "
    assert words in willi.wait_for_log(lvl="error")["error"]


def test_a_530_to_one_of_the_recipients_defers_that_one(start_willi: StartWilli, secure: ScriptedUpstream):
    secure.answers[BEN] = reply(WANTS_LOGIN)
    willi = start_willi(server=secure.server)
    willi.tolerate(WANTS_LOGIN)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, OK, NOT_FROM_US, "354 go on"]
        assert content(client) == QUEUED
    assert secure.wait_for_message().recipients == (b"bob@b.example",)


def test_a_530_to_data_is_a_451(start_willi: StartWilli, secure: ScriptedUpstream):
    secure.answers[b"DATA"] = reply(WANTS_TLS)
    willi = start_willi(server=secure.server)
    willi.tolerate(WANTS_TLS)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, OK, LOST]
