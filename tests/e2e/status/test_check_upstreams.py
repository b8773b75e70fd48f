"""`willi.py check`: what it asks of upstreams, and what it makes of the answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import StartPostfix, StartUpstream
from tests.support.certificates import Authority, Pair
from tests.support.check import GOOD, NOBODY, WRONG, Finding, about, bad, configure, findings
from tests.support.daemon import run_willi
from tests.support.dns import DnsServer
from tests.support.loopback import HOST, free_port
from tests.support.postfix import Postfix
from tests.support.talk import reply
from tests.support.upstream import EXTENSIONS, GREETING, Close, ScriptedUpstream, Silence
from willi_lib.smtp.reply import Reply

XCLIENT = (*EXTENSIONS, b"XCLIENT NAME ADDR PORT PROTO HELO")
STRANGER = b"XCLIENT PROTO=ESMTP HELO=mx.willi.example NAME=willi-check.invalid PORT=25 ADDR=192.0.2.1"


@pytest.fixture
def careful(upstream: ScriptedUpstream) -> ScriptedUpstream:
    """An upstream about which there is nothing to say."""
    upstream.extensions = XCLIENT
    upstream.answers[NOBODY] = reply("454 4.7.1 Relay access denied")
    return upstream


@pytest.fixture
def pair(certificates: Authority) -> Pair:
    return certificates.issue(HOST)


def of_host(path: Path, upstream: ScriptedUpstream) -> list[Finding]:
    return about(findings(path), upstream.server)


def test_a_good_upstream_is_one_line(tmp_path: Path, postfix: Postfix):
    done = run_willi("check", "-c", configure(tmp_path, f"b.example;{postfix.server};false\n"))
    assert done.returncode == GOOD, done.stdout + done.stderr
    expected = f"ok     {postfix.server}: TLSv1.3, certificate not verified, XCLIENT accepted, does not relay (454)"
    assert [line for line in done.stdout.splitlines() if postfix.server in line] == [expected]


def test_those_that_are_down_refuse_or_are_silent(tmp_path: Path, start_upstream: StartUpstream):
    refusing, silent = start_upstream(), start_upstream()
    refusing.answers[GREETING] = reply("554 5.7.1 go away")
    silent.answers[GREETING] = Silence()
    down = f"{HOST}:{free_port()}"
    found = findings(configure(tmp_path, f"d1.example;{down}\nd2.example;{refusing.server}\n"))
    assert about(found, down) == [
        Finding("wrong", down, "Connection refused", "start the server there, or correct host and port in the route")
    ]
    [refused] = about(found, refusing.server)
    assert (refused.level, refused.what) == ("wrong", "greeting: 554 5.7.1 go away")
    assert "allow Willi's address there" in refused.advice
    path = configure(tmp_path, f"d3.example;{silent.server}\n")
    path.write_text(path.read_text().replace("connect_timeout = 20s", "connect_timeout = 0.5s"))
    [late] = of_host(path, silent)
    assert late.level == "wrong" and late.what.startswith("timed out connecting (connect_timeout)")
    assert "firewall" in late.advice


def test_every_address_of_every_host_is_asked_once(tmp_path: Path, careful: ScriptedUpstream, dns: DnsServer):
    port = careful.port
    dns.zone["several.example"] = {"A": [HOST, "127.0.0.2", "127.0.0.3"]}
    dns.zone["down.example"] = {"A": ["127.0.0.4", "127.0.0.5"]}
    dns.zone["b.example"] = dns.zone["c.example"] = {"MX": ["10 away.example.", "20 down.example."]}
    dns.zone["null.example"] = {"MX": ["0 ."]}
    path = configure(
        tmp_path,
        f"a.example;several.example:{port};no\naa.example;several.example:{port};no\n"
        f"d.example;down.example:{port};no\n"
        "b.example;mx:b.example;no\nc.example;mx:c.example;no\nn.example;mx:null.example;no\n",
        dns_timeout="20s",
    )
    found = findings(path, dns.prefix)
    hosts = [(one.level, one.subject, one.what) for one in found if ".example:" in one.subject]
    assert sorted(hosts) == sorted(
        [
            ("ok", f"several.example:{port} [{HOST}]", "no STARTTLS, XCLIENT accepted, does not relay (454)"),
            ("warn", f"several.example:{port} [127.0.0.2]", "Connection refused"),
            ("warn", f"several.example:{port} [127.0.0.3]", "Connection refused"),
            ("wrong", f"down.example:{port} [127.0.0.4]", "Connection refused"),
            ("wrong", f"down.example:{port} [127.0.0.5]", "Connection refused"),
            ("wrong", "down.example:25 [127.0.0.4]", "Connection refused"),
            ("wrong", "down.example:25 [127.0.0.5]", "Connection refused"),
            ("wrong", "away.example:25", "no address for away.example: Name or service not known"),
        ]
    )
    assert about(found, "mx:b.example")[0].what == "away.example, down.example"
    assert about(found, "mx:null.example")[0].level == "wrong"
    assert len(careful.connections) == 2  # as far as MAIL, and as a stranger


def test_mx_hosts_among_which_is_willi_itself(tmp_path: Path, dns: DnsServer):
    dns.zone["b.example"] = {"MX": ["10 mx1.b.example.", "20 MX.Willi.Example.", "30 mx3.b.example."]}
    dns.zone["c.example"] = {"MX": ["10 mx.willi.example.", "10 mx1.b.example.", "20 mx3.b.example."]}
    path = configure(tmp_path, "b.example;mx:b.example\nc.example;mx:c.example\n", dns_timeout="20s")
    found = findings(path, dns.prefix)
    [backup] = about(found, "mx:b.example")
    assert (backup.level, backup.what) == ("ok", "mx1.b.example, and Willi is the backup MX")
    [best] = about(found, "mx:c.example")
    assert best.level == "wrong" and "its best MX host is Willi itself" in best.what
    assert not about(found, "mx3.b.example:25")


# -- what they can do


def test_what_an_upstream_lacks_of_that_which_willi_offers(tmp_path: Path, careful: ScriptedUpstream):
    careful.extensions = (b"SIZE 1000000", b"XCLIENT NAME ADDR PORT PROTO HELO")
    line = f"b.example;{careful.server}\n"
    facts, problem = of_host(configure(tmp_path, line), careful)
    assert "lacks PIPELINING 8BITMIME CHUNKING SMTPUTF8, takes 1000000 octets, less than" in facts.what
    assert problem.level == "warn" and "SMTPUTF8" in problem.what and "extensions" in problem.advice
    [facts] = of_host(configure(tmp_path, line, "extensions = 8BITMIME"), careful)
    assert "lacks PIPELINING 8BITMIME, takes" in facts.what
    strict = of_host(configure(tmp_path, line, "extensions = 8BITMIME\nstrict_8bitmime = yes"), careful)
    assert [(one.level, one.advice) for one in bad(strict)] == [("warn", "set strict_8bitmime = no")]


def test_xclient_that_is_not_offered_is_off_or_is_refused(tmp_path: Path, careful: ScriptedUpstream):
    line = f"b.example;{careful.server}\n"
    careful.extensions = EXTENSIONS
    _, problem = of_host(configure(tmp_path, line), careful)
    assert problem.level == "warn" and "no XCLIENT: it takes us for the client" in problem.what
    assert "smtpd_authorized_xclient_hosts" in problem.advice
    [facts] = of_host(configure(tmp_path, line, "xclient = no"), careful)
    assert "XCLIENT is off" in facts.what
    careful.extensions = XCLIENT
    careful.answers[b"XCLIENT"] = reply("550 5.7.0 Error: insufficient authorization")
    _, problem = of_host(configure(tmp_path, line), careful)
    assert problem.level == "warn" and "550 5.7.0 Error: insufficient authorization" in problem.what
    [problem] = of_host(configure(tmp_path, line, "xclient = require"), careful)
    assert problem.level == "wrong" and "xclient = try" in problem.advice


def test_xclient_attributes_that_are_not_allowed(tmp_path: Path, careful: ScriptedUpstream):
    careful.extensions = (*EXTENSIONS, b"XCLIENT NAME ADDR")
    [facts] = of_host(configure(tmp_path, f"b.example;{careful.server}\n"), careful)
    assert "XCLIENT accepted, but not HELO PORT PROTO" in facts.what
    careful.extensions = (*EXTENSIONS, b"XCLIENT NAME PORT HELO PROTO")
    _, problem = of_host(configure(tmp_path, f"b.example;{careful.server}\n"), careful)
    assert problem.level == "warn" and "without ADDR" in problem.what


def test_a_certificate_that_is_not_valid_or_not_for_long(
    tmp_path: Path, start_upstream: StartUpstream, certificates: Authority
):
    good, foreign = certificates.issue(HOST), certificates.issue("other.example")
    servers = [start_upstream(tls=pair.server_context()) for pair in (good, foreign)]
    for server in servers:
        server.extensions = XCLIENT
        server.answers[NOBODY] = reply("454 4.7.1 Relay access denied")
    csv = "".join(f"d{n}.example;{server.server}\n" for n, server in enumerate(servers))
    found = findings(configure(tmp_path, csv, f"upstream_tls_ca = {certificates.ca}"))
    facts, problem = about(found, servers[0].server)
    assert facts.what.startswith("TLSv1.3, certificate verified, XCLIENT accepted")
    assert problem.level == "warn" and "its certificate ends in 6 days" in problem.what  # as the Authority makes them
    [problem] = about(found, servers[1].server)
    assert problem.level == "wrong" and "IP address mismatch" in problem.what
    assert problem.advice == "name that server in the route as its certificate does, or have one issued for this name"


@pytest.mark.parametrize(("kind", "what", "advice"), [
    ("expired", "certificate has expired", "have it renewed there"),
    ("self_signed", "self-signed certificate", "set upstream_tls_ca to its authority, or tls_verify of the route to f"),
])  # fmt: skip
def test_what_is_wrong_with_a_certificate_says_what_to_do(
    tmp_path: Path, start_upstream: StartUpstream, certificates: Authority, kind: str, what: str, advice: str
):
    upstream = start_upstream(tls=getattr(certificates, kind)(HOST).server_context())
    path = configure(tmp_path, f"b.example;{upstream.server}\n", f"upstream_tls_ca = {certificates.ca}")
    [problem] = about(findings(path), upstream.server)
    assert what in problem.what
    assert problem.advice.startswith(advice)


def test_a_port_that_expects_no_proxy_header(tmp_path: Path, careful: ScriptedUpstream):
    careful.answers[GREETING] = Close()
    [problem] = of_host(configure(tmp_path, f"b.example;{careful.server}\n", "send_proxy = v1"), careful)
    assert problem.level == "wrong" and "send_proxy" in problem.advice


def test_an_upstream_that_is_willi_itself(tmp_path: Path, careful: ScriptedUpstream):
    careful.name = b"mx.willi.example"
    [problem] = of_host(configure(tmp_path, f"b.example;{careful.server}\n"), careful)
    assert problem.level == "wrong" and "which is our domain" in problem.what
    assert "name the mail server itself" in problem.advice


# -- an open relay

STATIC = "[[rest]]\ntype = static\nserver = {}\ntls_verify = no\n"
RELAYS = "with it Willi is an open relay"


def test_a_stranger_asks_and_no_message_is_sent(tmp_path: Path, careful: ScriptedUpstream):
    of_host(configure(tmp_path, f"b.example;{careful.server}\n"), careful)
    stranger = careful.connection(1)
    hello = b"EHLO mx.willi.example"
    assert stranger.commands == [hello, STRANGER, hello, b"MAIL FROM:<>", NOBODY, b"RSET", b"QUIT"]
    assert careful.messages == []


@pytest.mark.parametrize("mappings", ["", STATIC])
def test_an_upstream_that_takes_everything_makes_an_open_relay(
    tmp_path: Path, careful: ScriptedUpstream, mappings: str
):
    del careful.answers[NOBODY]
    csv = "" if mappings else f"b.example;{careful.server}\n"  # later recipients of a message are not looked up
    problem = of_host(configure(tmp_path, csv, mappings=mappings.format(careful.server)), careful)[1]
    assert problem.level == "wrong" and RELAYS in problem.what


def test_with_defer_only_a_catch_all_can_be_abused(tmp_path: Path, careful: ScriptedUpstream):
    del careful.answers[NOBODY]
    line, defer = f"b.example;{careful.server};no\n", "mixed_recipients = defer"
    assert bad(of_host(configure(tmp_path, line, defer), careful)) == []
    assert NOBODY not in careful.commands
    [problem] = bad(of_host(configure(tmp_path, line, defer, STATIC.format(careful.server)), careful))
    assert problem.level == "wrong" and RELAYS in problem.what


def test_a_postfix_that_trusts_its_network_relays_for_willi_if_it_takes_no_xclient(
    tmp_path: Path, start_postfix: StartPostfix, postfix_certificate: Pair
):
    trusting = start_postfix("mx.example", ("b.example",), settings={"mynetworks": "127.0.0.0/8"})
    line = f"b.example;{trusting.server}\n"
    found = findings(configure(tmp_path, line))
    assert bad(about(found, trusting.server)) == []  # by XCLIENT it sees a stranger
    problems = bad(about(findings(configure(tmp_path, line, "xclient = no")), trusting.server))
    assert [problem.level for problem in problems] == ["wrong"] and RELAYS in problems[0].what


@pytest.mark.parametrize(
    ("answer", "level", "what"),
    [
        ("454 4.7.1 Relay access denied", "ok", "does not relay (454)"),
        ("550 5.1.1 who is that", "warn", "refuses recipients of other upstreams for good (550 5.1.1 who is that)"),
        ("450 4.2.0 Greylisted", "warn", "whether it relays is not known (450 4.2.0 Greylisted)"),
    ],
)
def test_what_the_answer_means_where_there_are_several_upstreams(
    tmp_path: Path, careful: ScriptedUpstream, start_upstream: StartUpstream, answer: str, level: str, what: str
):
    careful.answers[NOBODY] = reply(answer)
    csv = f"b.example;{careful.server}\nc.example;{HOST}:{free_port()}\n"
    last = of_host(configure(tmp_path, csv), careful)[-1]
    assert last.level == level and what in last.what


def test_a_refusal_for_good_is_right_where_there_is_one_upstream(tmp_path: Path, careful: ScriptedUpstream):
    careful.answers[NOBODY] = reply("554 5.7.1 Relay access denied")
    [facts] = of_host(configure(tmp_path, f"b.example;{careful.server}\n"), careful)
    assert facts.level == "ok" and "does not relay (554)" in facts.what


def test_the_refusal_of_a_stranger_counts_as_an_answer(tmp_path: Path, careful: ScriptedUpstream):
    careful.answers[STRANGER] = reply("550 5.7.1 your address is on a list")
    [facts] = of_host(configure(tmp_path, f"b.example;{careful.server}\n"), careful)
    assert "does not relay (550)" in facts.what


# -- what a client in clear, and one of IPv6, would meet


@pytest.mark.parametrize(
    ("answer", "level", "words"),
    [
        ("530 5.7.57 Client not authenticated to send mail", "wrong", "takes no mail from us (MAIL: 530 5.7.57"),
        ("530 5.7.0 Must issue a STARTTLS command first", "wrong", "takes no mail from us (MAIL: 530 5.7.0"),
        ("550 5.7.1 no null sender here", "warn", "MAIL FROM:<> is refused (550 5.7.1 no null sender here)"),
        ("450 4.7.1 greylisted", "warn", "whether it relays is not known (MAIL: 450 4.7.1 greylisted)"),
    ],
)
@pytest.mark.parametrize("mixed", ["first", "defer"])
def test_a_refused_mail_is_no_answer_to_whether_it_relays(
    tmp_path: Path, careful: ScriptedUpstream, answer: str, level: str, words: str, mixed: str
):
    careful.answers[b"MAIL"] = reply(answer)
    path = configure(tmp_path, f"b.example;{careful.server}\n", f"mixed_recipients = {mixed}")
    facts, problem = of_host(path, careful)
    assert "does not relay" not in facts.what
    assert problem.level == level and words in problem.what


def test_an_upstream_that_wants_tls_is_asked_over_tls(tmp_path: Path, start_upstream: StartUpstream, pair: Pair):
    upstream = start_upstream(tls=pair.server_context())
    upstream.extensions = XCLIENT
    upstream.answers[b"MAIL"] = [reply("530 5.7.0 Must issue a STARTTLS command first")]
    upstream.answers[NOBODY] = reply("454 4.7.1 Relay access denied")
    [facts] = of_host(configure(tmp_path, f"b.example;{upstream.server};no\n"), upstream)
    assert facts.level == "ok" and facts.what.endswith("wants TLS, does not relay (454)")


def with_ipv6(directory: Path, csv: str, more: str = "") -> Path:
    path = configure(directory, csv, more)
    text = path.read_text()
    path.write_text(text.replace(f"listen = {HOST}:", f"listen = [::1]:{free_port('127.0.0.1')}, {HOST}:"))
    return path


def test_an_upstream_that_takes_no_ipv6_address_by_xclient(tmp_path: Path, postfix: Postfix):
    """Postfix with inet_protocols = ipv4."""
    line = f"b.example;{postfix.server};no\n"
    [problem] = bad(about(findings(with_ipv6(tmp_path, line)), postfix.server))
    assert problem.level == "warn" and problem.what.startswith("XCLIENT: it takes no IPv6 address")
    assert "inet_protocols = all" in problem.advice
    [problem] = bad(about(findings(with_ipv6(tmp_path, line, "xclient = require")), postfix.server))
    assert problem.level == "warn" and "an IPv6 client (2001:db8::1) is refused there: 451 4.3.5" in problem.what
    assert bad(about(findings(configure(tmp_path, line)), postfix.server)) == [], "there are no IPv6 clients"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_upstream_that_takes_no_ipv6_address_in_a_proxy_header(
    tmp_path: Path, start_upstream: StartUpstream, version: str
):
    upstream = start_upstream(proxy=True)
    ok, refused = reply("220 upstream.example ESMTP"), reply("421 4.3.0 mx.example Server local error")
    upstream.answers[GREETING] = [ok, ok, refused]  # Postfix's; for the first client, the stranger, and that of IPv6
    upstream.answers[NOBODY] = reply("454 4.7.1 Relay access denied")
    path = with_ipv6(tmp_path, f"b.example;{upstream.server}\n", f"send_proxy = {version}")
    [problem] = bad(of_host(path, upstream))
    assert problem.level == "warn" and "an IPv6 client (2001:db8::1) is refused there: 421 4.3.0" in problem.what


def test_an_upstream_that_takes_ipv6_addresses(tmp_path: Path, careful: ScriptedUpstream):
    assert bad(of_host(with_ipv6(tmp_path, f"b.example;{careful.server}\n"), careful)) == []
    assert careful.connections[2].commands[1].endswith(b" ADDR=IPV6:2001:db8::1")


def test_what_an_upstream_says_cannot_control_a_terminal(tmp_path: Path, careful: ScriptedUpstream):
    careful.answers[GREETING] = Reply(554, (b"\x1b]0;owned\x07 \x9b31m",))
    path = configure(tmp_path, f"b.example;{careful.server}\n")
    done = run_willi("check", "-c", path)
    assert done.returncode == WRONG
    assert all(character.isprintable() or character == "\n" for character in done.stdout)
    assert "greeting: 554 ?]0;owned? \\x9b31m" in done.stdout
