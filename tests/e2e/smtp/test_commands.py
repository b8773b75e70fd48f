"""Commands and addresses: those that an MX does not do, those that are strange, and those that are hostile."""

from __future__ import annotations

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.daemon import Setting, Willi
from tests.support.dns import DnsServer
from tests.support.loopback import HOST, free_address, free_port
from tests.support.talk import (
    BEN,
    BOB,
    EHLO,
    GO_ON,
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
)
from tests.support.upstream import GREETING, ScriptedUpstream

BAD_SENDER = "501 5.1.7 Bad sender address syntax"
BAD_RECIPIENT = "501 5.1.3 Bad recipient address syntax"
NO_DOMAIN = "553 5.1.3 Recipient address needs a domain"
CONTROL = "501 5.5.2 Control or 8-bit character in a command"
UNKNOWN = "500 5.5.2 Command not recognized"


# Not for an MX


STRANGE_COMMANDS = {
    b"AUTH PLAIN AGFubgBzZWNyZXQ=": "502 5.5.1 Command not implemented",
    b"auth login": "502 5.5.1 Command not implemented",
    b"EXPN staff": "502 5.5.1 Command not implemented",
    b"VRFY bob": "252 2.5.2 Cannot VRFY user, but will take a message for him",
    b"VRFY": "501 5.5.4 Syntax error in parameters",
    b"HELP": "214 2.0.0 See RFC 5321; ask postmaster for help",
    b"help mail": "214 2.0.0 See RFC 5321; ask postmaster for help",
    b"NOOP whatever": "250 2.0.0 Ok",
    b"STARTTLS": "502 5.5.1 Command not implemented",
    b"BOGUS": UNKNOWN,
    b"": UNKNOWN,
    b" ": UNKNOWN,
    b"MAILFROM:<ann@a.example>": UNKNOWN,
    b"EHLO": "501 5.5.4 Syntax: EHLO or HELO and your host name",
    b"EHLO two words": "501 5.5.4 Syntax: EHLO or HELO and your host name",
    b"EHLO " + b"x" * 256: "501 5.5.4 Syntax: EHLO or HELO and your host name",
    b"x" * 2046: UNKNOWN,
    b"x" * 2047: "500 5.5.2 Line too long",
    b"x" * 100_000: "500 5.5.2 Line too long",
}


def test_strange_commands_are_answered_and_change_nothing(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, max_errors=100)
    with greeted(willi) as client:
        assert {line: say(client, line)[0] for line in STRANGE_COMMANDS} == STRANGE_COMMANDS
        assert deliver(client) == QUEUED


BROWSERS = (b"GET / HTTP/1.1", b"POST / HTTP/1.0", b"CONNECT mx.b.example:25 HTTP/1.1", b"get /", b"PUT /")


@pytest.mark.parametrize("line", BROWSERS, ids=repr)
def test_a_browser_is_sent_away(line: bytes, willi: Willi, upstream: ScriptedUpstream):
    for way in ([], [EHLO], [EHLO, MAIL, BOB]):
        client = willi.connect()
        say(client, *way)
        smuggled = b"\r\n".join((b"Host: willi.example", b"", EHLO, MAIL, BOB, b"DATA", b""))
        client.send(line + b"\r\n" + smuggled)
        assert str(client.read_reply()) == "421 4.7.0 This is an SMTP server"
        client.expect_eof()
        client.close()
    upstream.wait_for_ends()
    assert b"DATA" not in upstream.commands


def test_commands_are_known_in_any_case_and_with_blanks_of_any_kind(willi: Willi, upstream: ScriptedUpstream):
    with willi.connect() as client:
        lines = [b"\t ehlo \t c.example\t", b" Mail \tfrom: \t< ann@a.example\t>  ", b"rCPT\tTo:\tBob@B.Example\t"]
        assert say(client, *lines, b"data \t")[1:] == [SENDER_KEPT, OK, GO_ON]
        assert content(client) == QUEUED
        lines = [b"RSET\t", b"NOOP\t x\t", b" \tHELP\t", b"VRFY\t\tbob ", MAIL + b"\t SIZE=5\t \tBODY=8BITMIME", BOB]
        assert [answer[:3] for answer in say(client, *lines)] == ["250", "250", "214", "252", "250", "250"]
        client.send(b" BDAT\t 2 \r\n..\tBDAT 5\tLAST\t\r\nhello\tQUIT\t\r\n")
        assert [client.read_reply().code for _ in range(3)] == [250, 250, 221]
    upstream.wait_for_ends()
    assert upstream.commands[1:4] == [MAIL, b"RCPT TO:<Bob@B.Example>", b"DATA"]
    assert upstream.commands[4:] == [MAIL + b" SIZE=5 BODY=8BITMIME", BOB, b"BDAT 2", b"BDAT 5 LAST", b"QUIT"]


# Paths


RECIPIENTS = {  # as the client says them, and as the upstream hears them
    b"<bob@b.example>": b"<bob@b.example>",
    b" <bob@b.example>": b"<bob@b.example>",
    b"bob@b.example": b"<bob@b.example>",
    b"<@relay.example,@[192.0.2.1]:bob@b.example>": b"<bob@b.example>",
    b'<"bob smith"@b.example>': b'<"bob smith"@b.example>',
    b'<"a@b>c"@b.example>': b'<"a@b>c"@b.example>',
    b'<"quote\\"d"@b.example>': b'<"quote\\"d"@b.example>',
    b"<bob@[192.0.2.1]>": b"<bob@[192.0.2.1]>",
    b"<bob@[IPv6:2001:db8::1]>": b"<bob@[IPv6:2001:db8::1]>",
    b"<postmaster>": b"<postmaster>",
    b"<PostMaster>": b"<PostMaster>",
    b"<a..b@b.example>": b"<a..b@b.example>",
    b"<b%ob!x@b.example>": b"<b%ob!x@b.example>",
    b"<#$&'*+-/=?^_`{|}~@b.example>": b"<#$&'*+-/=?^_`{|}~@b.example>",
}


def test_strange_recipients_work(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        for said in RECIPIENTS:
            assert deliver(client, b"RCPT TO:" + said) == QUEUED
    assert [message.rcpts for message in upstream.messages] == [(b"RCPT TO:" + path,) for path in RECIPIENTS.values()]


BAD_RECIPIENTS = {
    b"<somebody>": NO_DOMAIN,
    b'<"some body">': NO_DOMAIN,
    b"<postmaster1>": NO_DOMAIN,
    b"<>": BAD_RECIPIENT,
    b"": BAD_RECIPIENT,
    b"<bob@>": BAD_RECIPIENT,
    b"<@b.example>": BAD_RECIPIENT,
    b"<bob@b@c.example>": BAD_RECIPIENT,
    b"<bob@b.example": BAD_RECIPIENT,
    b"bob@b.example>": BAD_RECIPIENT,
    b"<<bob@b.example>>": BAD_RECIPIENT,
    b"<bob smith@b.example>": BAD_RECIPIENT,
    b"<bob@b.example>x": BAD_RECIPIENT,
    b"<bob@b.example><ben@b.example>": BAD_RECIPIENT,
    b"<bob@b.example,ben@b.example>": BAD_RECIPIENT,
    b'<"bob@b.example>': BAD_RECIPIENT,
    b"<bob@[b.example>": BAD_RECIPIENT,
}


def test_recipients_that_are_none_are_refused(share_willi: StartWilli, upstream: ScriptedUpstream):
    willi = share_willi(server=upstream.server, max_errors=100)
    with greeted(willi) as client:
        assert say(client, MAIL) == [SENDER_KEPT]
        assert {path: say(client, b"RCPT TO:" + path)[0] for path in BAD_RECIPIENTS} == BAD_RECIPIENTS
        assert upstream.connections == []
        assert say(client, BEN) == [OK]


SENDERS = {
    b"<>": b"<>",
    b" <>": b"<>",
    b"<@relay.example:ann@a.example>": b"<ann@a.example>",
    b'<"ann smith"@a.example>': b'<"ann smith"@a.example>',
    b"<ann@[192.0.2.1]>": b"<ann@[192.0.2.1]>",
    b"<root>": b"<root>",
}


def test_strange_senders_work(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        for said in SENDERS:
            assert deliver(client, mail=b"MAIL FROM:" + said) == QUEUED
    assert [message.mail for message in upstream.messages] == [b"MAIL FROM:" + path for path in SENDERS.values()]


def test_senders_that_are_none_are_refused(willi: Willi):
    with greeted(willi) as client:
        for path in (b"<ann@>", b"<@a.example>", b"<ann@a.example", b"<a n@a.example>", b"<ann@a.example>>"):
            assert say(client, b"MAIL FROM:" + path) == [BAD_SENDER], path
        assert say(client, MAIL) == [SENDER_KEPT]


def test_postmaster_alone_is_the_postmaster_of_our_own_domain(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(csv=f"pattern;server;tls_verify\nwilli.example;{upstream.server};false\n")
    with greeted(willi) as client:
        assert deliver(client, b"RCPT TO:<postmaster>") == QUEUED
    assert upstream.wait_for_message().rcpts == (b"RCPT TO:<postmaster>",)


# Control octets never go upstream


def test_a_control_octet_never_goes_upstream(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_errors=200)
    with greeted(willi) as client:
        for octet in {*range(0x20), 0x7F} - set(b"\t\r\n"):
            evil = bytes([octet])
            lines = (
                b"RSET",
                b"MAIL FROM:<an" + evil + b"n@a.example>",
                MAIL,
                b"RCPT TO:<bob" + evil + b"@b.example>",
                b"RCPT TO:<bob@b.example>" + evil,
                BOB,
            )
            assert say(client, *lines) == ["250 2.0.0 Ok", CONTROL, SENDER_KEPT, CONTROL, CONTROL, OK], evil
    upstream.wait_for_ends()
    assert set(upstream.commands) == {b"EHLO willi.example", MAIL, BOB, b"RSET", b"QUIT"}


def test_a_bare_line_end_in_a_command_ends_the_session(willi: Willi, upstream: ScriptedUpstream):
    for end in (b"\n", b"\r", b"\n\r", b"\r\r\n", b"\n\r\n"):
        with greeted(willi) as client:
            assert say(client, MAIL) == [SENDER_KEPT]
            client.send(BOB + end + b"RCPT TO:<eve@b.example>\r\nDATA\r\n")
            assert str(client.read_reply()) == "500 5.5.2 Bare CR or LF in a command"
            client.expect_eof()
    assert upstream.connections == []


# The loop guard


@pytest.mark.parametrize("name", [b"willi.example", b"WILLI.Example", b"willi.example Hello [127.0.0.1]"], ids=repr)
def test_an_upstream_of_our_own_name_is_ourselves(name: bytes, willi: Willi, upstream: ScriptedUpstream):
    upstream.name = name
    willi.tolerate("Mail loop")
    with greeted(willi) as client:
        loops = "554 5.4.6 Mail loops back to me"
        assert say(client, MAIL, BOB, BEN) == [SENDER_KEPT, loops, loops]
    upstream.wait_for_ends()
    assert len(upstream.connections) == 1
    assert MAIL not in upstream.commands


def test_willi_as_its_own_upstream_does_not_loop(start_willi: StartWilli, upstream: ScriptedUpstream):
    first = start_willi(server=upstream.server)
    second = start_willi(server=f"127.0.0.1:{first.port}")
    second.tolerate("Mail loop")
    with greeted(second) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "554 5.4.6 Mail loops back to me"]
    assert upstream.connections == []


def test_another_willi_is_an_upstream_like_any_other(start_willi: StartWilli, upstream: ScriptedUpstream):
    inner = start_willi(server=upstream.server, domain="inner.example")
    outer = start_willi(server=f"127.0.0.1:{inner.port}")
    with greeted(outer) as client:
        assert deliver(client) == QUEUED
    assert upstream.wait_for_message().recipients == (b"bob@b.example",)


def two_willis(start_willi: StartWilli) -> tuple[Willi, Willi]:
    """Each is the other one's upstream, and may send it XCLIENT."""
    trusted: dict[str, str] = {"xclient_hosts": "127.0.0.0/8"}
    one = start_willi(server=f"{HOST}:{free_port()}", domain="one.example", **trusted)
    two = start_willi(server=f"{HOST}:{one.port}", domain="two.example", **trusted)
    to_two: dict[str, Setting] = {"type": "static", "server": f"{HOST}:{two.port}", "tls_verify": False}
    one.reload({"mappings": {"all": to_two}})
    for willi in (one, two):
        willi.tolerate("Mail loop")
    return one, two


def test_two_willis_that_are_each_others_upstream_are_a_loop(start_willi: StartWilli):
    one, two = two_willis(start_willi)
    with greeted(one) as client:
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "554 5.4.6 Mail loops back to me"]
    assert two.wait_for_log(msg="Message rejected")["reply"] == "554 5.4.6 Mail loops back to me"
    assert "Mail loop" in two.wait_for_log(lvl="error")["msg"]


def test_only_the_name_that_a_trusted_host_has_before_xclient_is_its_own(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    """A client of it may well be the upstream: it sends mail, too. So may a client of Willi itself."""
    willi = start_willi(server=upstream.server, xclient_hosts="127.0.0.5")
    willi.tolerate("Mail loop")
    for lines in ((b"EHLO front.example", b"XCLIENT ADDR=192.0.2.7"), (b"XCLIENT ADDR=192.0.2.7",)):
        with willi.connect(source="127.0.0.5") as client:
            say(client, *lines, b"EHLO upstream.example")
            assert deliver(client) == QUEUED
    with greeted(willi, b"EHLO Upstream.Example", source="127.0.0.6") as client:
        assert deliver(client) == QUEUED
    with greeted(willi, b"EHLO Upstream.Example", source="127.0.0.5") as client:
        say(client, b"XCLIENT ADDR=192.0.2.7", b"EHLO c.example")
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "554 5.4.6 Mail loops back to me"]


def test_where_one_host_of_a_route_is_ourselves_the_others_are_asked(
    start_willi: StartWilli, start_upstream: StartUpstream
):
    """That the others are down is no reason to bounce."""
    ourselves, good = start_upstream(), start_upstream()
    ourselves.name = b"willi.example"
    willi = start_willi(server=f"{ourselves.server},{good.server}")
    willi.tolerate(ourselves.server)
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    good.stop()
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, NO_ANSWER, LOST]
    failed = f"{good.server}: Connection refused; {ourselves.server}: mail loops"
    assert willi.wait_for_log(msg="Upstream failed")["error"] == failed


def test_mail_from_an_mx_host_makes_it_none_for_this_client_only(
    start_willi: StartWilli, start_upstream: StartUpstream, dns: DnsServer
):
    """Else one message in a circle would have the mail of all clients bounced for an hour."""
    upstream = start_upstream(port=25, host=free_address(25))
    dns.zone["mx1.b.example"] = {"A": [upstream.host]}
    dns.zone["b.example"] = {"MX": ["10 mx1.b.example."]}
    willi = start_willi(server="mx:b.example", dns=dns, xclient_hosts="127.0.0.5")
    willi.tolerate("Mail loop")
    with greeted(willi, b"EHLO Upstream.Example", source="127.0.0.5") as client:
        say(client, b"XCLIENT ADDR=192.0.2.7", b"EHLO c.example")
        assert say(client, MAIL, BOB) == [SENDER_KEPT, "554 5.4.6 Mail loops back to me"]
    with greeted(willi) as client:
        assert deliver(client) == QUEUED


def test_our_name_in_the_greeting_alone_is_no_loop(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[GREETING] = reply("220 willi.example ESMTP")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
