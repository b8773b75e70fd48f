"""Promise 6: what goes wrong inside Willi is a 4xx; only a definite "no mapping matches" is a 5xx."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Authority
from tests.support.daemon import Setting, Willi
from tests.support.dns import DnsServer, Fault
from tests.support.loopback import HOST, need
from tests.support.network import Host
from tests.support.promise import greeted, in_data, in_envelope, rcpt
from tests.support.talk import BOB, CARL, LOST, MAIL, NO_ANSWER, QUEUED, SENDER_KEPT, chunk, content, deliver, say
from tests.support.upstream import ScriptedUpstream

NO_ROUTE = "554 5.7.1 Relay access denied"
CANNOT_LOOK_UP = "451 4.3.0 Cannot look up this address now"
NO_RECIPIENTS_YET = "451 4.5.1 No valid recipients, try again"
INTERNAL = "451 4.3.0 Internal error, try again"
TABLE = "pattern;server;tls_verify\nb.example;{server};false\n"

# The real program, in which one line is broken: a table that cannot answer, or a programming error.
BROKEN = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[2])))
from willi_lib.mappings import csv_file
from willi_lib.routing import route
from willi_lib.smtp import body

def find(self, keys):
    if "fail" in str(keys):
        raise route.LookupFailed("the table is on fire")
    if "bug" in str(keys):
        raise ZeroDivisionError("a bug")
    yield from real_find(self, keys)

def feed(self, chunk):
    if b"bug" in chunk:
        raise ZeroDivisionError("a bug")
    return real_feed(self, chunk)

real_find, csv_file.CsvFile.find = csv_file.CsvFile.find, find
real_feed, body.DataReader.feed = body.DataReader.feed, feed
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def broken(tmp_path: Path, upstream: ScriptedUpstream, request: pytest.FixtureRequest):
    """Willi with the faults of BROKEN; addresses with `fail` or `bug` and content with `bug` bring them out."""
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    (tmp_path / "table.csv").write_text(TABLE.format(server=upstream.server))
    mappings: dict[str, Setting] = {
        "table": {"type": "csv", "file": str(tmp_path / "table.csv")},
        "everybody else": {"type": "static", "server": upstream.server, "tls_verify": False},
    }
    willi = Willi(tmp_path / "willi", {"mappings": mappings}, prefix=(sys.executable, str(program)))
    willi.tolerate("the table is on fire")
    willi.tolerate("ZeroDivisionError")
    yield willi
    willi.end()


def test_a_lookup_that_fails_is_a_451_and_no_later_mapping_is_asked(broken: Willi, upstream: ScriptedUpstream):
    client = greeted(broken)
    fail = b"RCPT TO:<fail@b.example>"
    assert say(client, MAIL, fail, b"DATA") == [SENDER_KEPT, CANNOT_LOOK_UP, NO_RECIPIENTS_YET]
    assert upstream.connections == []
    assert say(client, BOB, b"DATA") == ["250 2.0.0 ok", "354 go on"]
    assert content(client) == QUEUED


def test_a_bug_in_a_lookup_is_a_451(broken: Willi, upstream: ScriptedUpstream):
    client = greeted(broken)
    assert say(client, MAIL, b"RCPT TO:<bug@b.example>") == [SENDER_KEPT, INTERNAL]
    client.expect_eof()
    assert deliver(greeted(broken)) == QUEUED, "nobody else is harmed"
    assert "ZeroDivisionError: a bug" in broken.lines(msg="Internal error")[0]["traceback"]


def test_a_bug_inside_the_message_is_a_451_and_the_rest_of_it_no_command(broken: Willi, upstream: ScriptedUpstream):
    client = in_data(broken)
    client.send(b"Subject: x\r\n\r\n")
    upstream.connection().wait_for_command(b"DATA")
    client.send(b"bug\r\nMAIL FROM:<eve@a.example>\r\nRCPT TO:<bob@b.example>\r\n.\r\nNOOP\r\n")
    assert str(client.read_reply()) == INTERNAL
    client.expect_eof()
    upstream.wait_for_ends()
    assert upstream.messages == []
    assert b"QUIT" not in upstream.commands


def test_only_no_match_is_a_554(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(csv=TABLE.format(server=upstream.server))
    client = greeted(willi)
    nobody = ["bob@c.example", "bob@x.b.example", "bob@b.example.org", "b.example@c.de", '"bob@b.example"@d.example']
    assert say(client, MAIL, *map(rcpt, nobody)) == [SENDER_KEPT, *[NO_ROUTE] * len(nobody)]
    assert upstream.connections == []
    assert say(client, b"RCPT TO:<Bob@B.EXAMPLE>") == ["250 2.0.0 ok"]


def test_a_table_that_has_become_bad_or_is_gone_keeps_serving(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(csv=TABLE.format(server=upstream.server))
    willi.tolerate("the old table stays")
    willi.replace_csv("pattern;server;tls_verify\nb.example;;;;false\n")
    willi.wait_for_log(lvl="error", msg="CSV file not read, the old table stays")
    client = greeted(willi)
    assert deliver(client) == QUEUED
    willi.csv.unlink()
    assert deliver(client) == QUEUED


@pytest.mark.parametrize("fault", [Fault.NXDOMAIN, Fault.SERVFAIL, Fault.REFUSED, Fault.SILENCE])
@pytest.mark.parametrize("server", ["mx.b.example:25", "mx:b.example"])
def test_dns_that_fails_is_a_451(server: str, fault: Fault, start_willi: StartWilli, dns: DnsServer):
    """Nobody's domain is said not to exist because our own upstream cannot be found."""
    dns.zone["b.example"] = dns.zone["mx.b.example"] = fault
    willi = start_willi(csv=f"pattern;server;tls_verify\nb.example;{server};true\n", dns=dns, dns_timeout="1s")
    willi.tolerate("Upstream failed")
    client = greeted(willi)
    assert say(client, MAIL, BOB, b"DATA", b"RSET") == [SENDER_KEPT, NO_ANSWER, LOST, "250 2.0.0 Ok"]


@pytest.mark.parametrize("record", ["0 .", "10 127.0.0.1.", "10 nowhere.example."])
def test_an_mx_that_leads_nowhere_is_a_451(record: str, start_willi: StartWilli, dns: DnsServer):
    dns.zone["b.example"] = {"MX": [record]}
    willi = start_willi(server="mx:b.example", dns=dns, dns_timeout="1s", connect_timeout="1s")
    willi.tolerate("Upstream failed")
    assert say(greeted(willi), MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]


def test_dns_that_takes_longer_than_the_command_may_is_a_451(start_willi: StartWilli, dns: DnsServer):
    dns.zone["b.example"] = Fault.SILENCE
    willi = start_willi(server="mx:b.example", dns=dns, dns_timeout="10m", upstream_timeout="1s")
    willi.tolerate("Upstream failed")
    client = greeted(willi)
    assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
    assert say(client, b"DATA", b"RSET") == [LOST, "250 2.0.0 Ok"]


def test_a_ca_file_that_is_no_longer_one_stops_no_mail(
    start_willi: StartWilli, start_upstream: StartUpstream, certificates: Authority, tmp_path: Path
):
    """The authorities that were read at the start serve on; the reload that follows says what is wrong."""
    upstream = start_upstream(tls=certificates.issue("localhost").server_context())
    ca = tmp_path / "ca.pem"
    ca.write_bytes(certificates.ca.read_bytes())
    willi = start_willi(
        csv=f"pattern;server;tls_verify\nb.example;localhost:{upstream.port};true\n",
        upstream_tls="always", upstream_tls_ca=ca,
    )  # fmt: skip
    ca.write_text("no certificate at all\n")
    willi.tolerate(str(ca))
    assert deliver(greeted(willi)) == QUEUED


def test_too_few_descriptors_are_a_451_and_pass(
    tmp_path: Path, upstream: ScriptedUpstream, start_upstream: StartUpstream
):
    """Clients took most of them, upstreams the last; nobody is told a 5xx, and all is well when they have gone."""
    other = start_upstream()
    table = tmp_path / "table.csv"
    table.write_text(
        f"pattern;server;tls_verify\nb.example;{upstream.server};false\nc.example;{upstream.server},{other.server};false\n"
    )
    settings: dict[str, Setting] = {"mappings": {"all": {"type": "csv", "file": str(table)}}}
    willi = Willi(tmp_path / "willi", settings, prefix=("prlimit", "--nofile=64:64"))
    willi.tolerate("Upstream failed")
    clients = [greeted(willi) for _ in range(30)]
    answers = [say(client, MAIL, BOB, b"NOOP")[1:] for client in clients]
    assert answers[0] == ["250 2.0.0 ok", "250 2.0.0 Ok"]
    assert answers[-1] == [NO_ANSWER, "250 2.0.0 Ok"]
    assert {answer for answer, _ in answers} == {"250 2.0.0 ok", NO_ANSWER}
    for client in clients:
        client.close()
    upstream.wait_for_ends()
    with greeted(willi) as client:
        assert deliver(client, CARL) == QUEUED
    assert other.connections == [], "what we lack marks no host as down"
    willi.end()


def test_without_a_local_port_no_host_is_marked_as_down(
    start_willi: StartWilli, start_upstream: StartUpstream, tmp_path: Path
):
    """All ports that a connection may come from are in use, on a machine of its own."""
    need("ip", "unshare", "nsenter", root=True)
    (tmp_path / "resolv.conf").touch()
    machine = Host(tmp_path / "resolv.conf")
    try:
        with machine.inside():
            first, other = start_upstream(), start_upstream()
            table = f"pattern;server\nb.example;{first.server}\nc.example;{first.server},{other.server}\n"
            willi = start_willi(csv=table, prefix=machine.prefix, probe=False)
            willi.tolerate("Upstream failed")
            client, taken = greeted(willi), socket.create_server((HOST, 0))
            port = taken.getsockname()[1]
            ports = f"echo {port} {port} >/proc/sys/net/ipv4/ip_local_port_range"
            # The /proc/sys of a container may be read-only.
            machine.run("unshare", "--mount", "sh", "-c", f"mount -t proc proc /proc; {ports}")
        assert say(client, MAIL, BOB) == [SENDER_KEPT, NO_ANSWER]
        willi.wait_for_log(error=f"{first.server}: Cannot assign requested address")
        taken.close()
        assert deliver(client, CARL) == QUEUED
        assert (len(first.messages), other.connections) == (1, [])
    finally:
        machine.stop()


def test_a_chunk_for_nobody_is_read_to_its_end_all_the_same(broken: Willi, upstream: ScriptedUpstream):
    client = greeted(broken)
    assert say(client, MAIL, b"RCPT TO:<fail@b.example>") == [SENDER_KEPT, CANNOT_LOOK_UP]
    assert chunk(client, b"QUIT\r\n" * 10_000) == NO_RECIPIENTS_YET
    assert chunk(client, b"QUIT\r\n" * 10_000, last=True) == NO_RECIPIENTS_YET
    assert say(client, b"NOOP") == ["250 2.0.0 Ok"]
    assert in_envelope(broken)
