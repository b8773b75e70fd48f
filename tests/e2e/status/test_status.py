"""The status of a running Willi: its numbers are those of the log, and no mail depends on it."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.e2e.processes.test_processes import is_there, served_by, status_of
from tests.runner.limits import allow
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import Willi, in_a_hurry
from tests.support.dns import DnsServer
from tests.support.examples import examples
from tests.support.loopback import HOST, free_port, steady_port, wait_until
from tests.support.promise import greeted, in_data
from tests.support.status import UNANSWERED, Status, status_process
from tests.support.talk import BEN, BOB, CARL, MAIL, QUEUED, chunk, content, deliver, reply, say
from tests.support.upstream import ScriptedUpstream

DIED = "Worker ended by itself"
STATUS_DIED = "Status process ended by itself"
DEAD = b"RCPT TO:<dora@dead.example>"  # whose upstream is not there
PATIENT = in_a_hurry(**{"child.HANG_TIMEOUT": 600.0})  # some tests have a process stand still
NO_VERDICT = ("451 4.4.1", "451 4.4.2", "451 4.3.0")


@pytest.fixture
def status() -> Status:
    return Status(free_port())


@pytest.fixture
def willi(start_willi: StartWilli, upstream: ScriptedUpstream, status: Status) -> Willi:
    """Of two workers; b.example is the upstream's, c.example too, dead.example nobody's, and that is all."""
    table = ["pattern;server;tls_verify", *(f"{name}.example;{upstream.server};no" for name in "bc")]
    willi = start_willi(
        csv="\n".join([*table, f"dead.example;{HOST}:{free_port()}", ""]), workers=2, status_listen=status.setting,
        max_connections_per_ip=1000, max_message_bytes="64KiB", prefix=PATIENT,
    )  # fmt: skip
    wait_until(status.answers, "an answer of the status")
    return willi


# The numbers


def verdict_of(line: dict[str, str]) -> str:
    """What a line of the log says became of a message or a recipient."""
    if line["msg"] == "Message accepted":
        return "accepted"
    if line["error_src"] == "upstream":
        return "rejected_by_upstream"
    if line["error_src"] == "client" or line.get("reply", "451 4.4.2").startswith(NO_VERDICT):
        return "failed"
    return "rejected_by_willi"


def run_of_everything(willi: Willi, upstream: ScriptedUpstream, pid: int) -> None:
    """One session each for all that can become of a message, in this worker."""
    with ExitStack() as ends:

        def client() -> Client:
            return ends.enter_context(served_by(willi, pid))

        several = client()
        assert deliver(several) == QUEUED
        assert deliver(several, BOB, BEN, CARL) == QUEUED
        assert say(several, MAIL, b"RCPT TO:<eve@elsewhere.example>")[1] == "554 5.7.1 Relay access denied"
        assert deliver(client(), BOB) == QUEUED
        upstream.answers[BEN] = reply("550 5.1.1 no ben here")
        partly = client()
        assert say(partly, MAIL, BOB, BEN)[2] == "550 5.1.1 no ben here"
        del upstream.answers[BEN]
        assert say(partly, b"DATA")[0].startswith("354")
        assert content(partly) == QUEUED
        big = client()
        assert say(big, MAIL, BOB)[1].startswith("250")
        assert chunk(big, b"Subject: x\r\n\r\n" + b"x" * 70_000, last=True) == "552 5.3.4 Message is too big"
        assert say(client(), MAIL, DEAD)[1].startswith("451 4.4.1")
        given_up = len(willi.lines(error_src="client"))
        hasty = client()
        assert say(hasty, MAIL, BOB, b"DATA")[2].startswith("354")
        hasty.send(b"half a message")
    wait_until(lambda: len(willi.lines(error_src="client")) > given_up, "the end of the message that was not finished")


def lines_of_messages(willi: Willi) -> list[dict[str, str]]:
    return [line for line in willi.log if line["msg"] in ("Message accepted", "Message rejected")]


def assert_equal_to_the_log(willi: Willi, status: Status, refused_recipients: int) -> None:
    """Line by line, by verdict and by mapping."""
    lines = lines_of_messages(willi)
    recipients: Counter[tuple[str, str]] = Counter()
    octets: Counter[str] = Counter()
    for line in lines:
        mapping = line.get("mapping", "none")
        recipients[verdict_of(line), mapping] += len(line["to"].split(","))
        octets[mapping] += int(line["bytes"])
    samples = status.samples()
    assert samples["willi_recipients_total"] == {
        (("mapping", mapping), ("verdict", verdict)): number for (verdict, mapping), number in recipients.items()
    }
    messages = samples["willi_messages_total"]
    assert sum(messages.values()) == len(lines) - refused_recipients
    accepted = [line for line in lines if verdict_of(line) == "accepted"]
    assert sum(value for labels, value in messages.items() if ("verdict", "accepted") in labels) == len(accepted)
    assert {dict(labels)["mapping"]: value for labels, value in samples["willi_octets_total"].items()} == {
        mapping: number for mapping, number in octets.items() if number or mapping != "none"
    }
    overview = status.overview()
    assert overview["accepted_total"] == len(accepted)
    assert overview["failed_total"] == sum(verdict_of(line) == "failed" for line in lines)
    assert overview["rejected_total"] == sum(verdict_of(line).startswith("rejected") for line in lines)
    assert [event["sid"] for event in overview["events"]] == [line["sid"] for line in reversed(lines)][:50]


def test_the_numbers_are_those_of_the_log_over_two_workers_and_a_reload(
    willi: Willi, upstream: ScriptedUpstream, status: Status
):
    willi.tolerate("Upstream failed")
    for round_number in range(2):
        for pid in willi.workers:
            run_of_everything(willi, upstream, pid)
        lines = lines_of_messages(willi)
        recipients = sum(len(line["to"].split(",")) for line in lines)
        status.wait_for(recipients, "willi_recipients_total")
        assert_equal_to_the_log(willi, status, refused_recipients=6 * (round_number + 1))
        if round_number == 0:
            old = willi.workers
            willi.reload()
            wait_until(lambda: len(willi.workers) == 2 and not set(willi.workers) & set(old), "new workers only")  # noqa: B023
    sessions = 1 + 4 * 6  # and the probe
    status.wait_for(sessions, "willi_session_duration_seconds_count")
    assert status.value("willi_sessions_total") == sessions
    assert status.value("willi_tls_total", side="client", version="none") == sessions
    assert status.value("willi_sessions_open") == 0
    status.wait_for(1, "willi_reloads_total", outcome="ok")
    assert status.value("willi_upstream_connects_total", host=upstream.server, outcome="opened") == len(
        upstream.connections
    )
    [dead] = [host for host in status.overview()["hosts"] if host["name"] != upstream.server]
    assert (dead["up"], dead["failures"]) == (False, 4)
    assert "Connection refused" in dead["last_error"]
    mapping = f"csv:{willi.csv}"
    assert status.value("willi_lookups_total", mapping=mapping, outcome="miss") == 4
    assert status.value("willi_lookup_duration_seconds_count") == status.value("willi_lookups_total")
    assert status.value("willi_mapping_patterns", mapping=mapping) == 3


def test_refused_connections_are_those_of_the_log(start_willi: StartWilli, upstream: ScriptedUpstream, status: Status):
    willi = start_willi(server=upstream.server, status_listen=status.setting, max_connections_per_ip=2)
    wait_until(status.answers, "an answer of the status")
    kept = [willi.connect() for _ in range(2)]
    for _ in range(3):
        with willi.connect(greeting=False) as client:
            assert client.read_reply().code == 421
    status.wait_for(3, "willi_sessions_refused_total", reason="max_connections_per_ip")
    status.wait_for(2, "willi_sessions_open")
    assert len(willi.lines(msg="Connection refused")) == 3
    assert status.value("willi_sessions_refused_total") == 3
    status.wait_for(len(kept), "willi_connections")
    overview = status.overview()
    assert [event["kind"] for event in overview["events"]] == ["refused"] * 3
    limits = {limit["name"]: limit for limit in overview["limits"]}
    assert limits["max_connections_per_ip"] == {"name": "max_connections_per_ip", "used": 2, "most": 2, "refused": 3}
    assert limits["max_connections"]["used"] == len(kept)
    assert sum(minute["refused"] for minute in overview["minutes"]) == 3


def test_tls_and_xclient_are_counted_for_each_side(
    start_willi: StartWilli, start_upstream: StartUpstream, certificates: Authority, status: Status
):
    pair = certificates.issue("willi.example")
    upstream = start_upstream(tls=certificates.issue("localhost").server_context())
    upstream.extensions = (*upstream.extensions, b"XCLIENT NAME ADDR")
    willi = start_willi(
        server=upstream.server, status_listen=status.setting, tls_cert=str(pair.cert), tls_key=str(pair.key)
    )
    wait_until(status.answers, "an answer of the status")
    client = greeted(willi, tls=True)
    assert deliver(client) == QUEUED
    client.command(b"QUIT")
    status.wait_for(1, "willi_tls_total", side="client", version="TLSv1.3")
    status.wait_for(1, "willi_tls_total", side="upstream", version="TLSv1.3")
    status.wait_for(1, "willi_xclient_total", outcome="accepted")
    [certificate] = status.overview()["certificates"]
    assert (certificate["file"], certificate["names"]) == (str(pair.cert), ["willi.example"])
    assert status.value("willi_certificate_expiry_timestamp_seconds") == certificate["expires"]


def test_no_label_is_of_a_clients_choice(willi: Willi, upstream: ScriptedUpstream, status: Status):
    assert deliver(greeted(willi)) == QUEUED
    assert say(greeted(willi), MAIL, b"RCPT TO:<eve@elsewhere.example>")[1].startswith("554")
    status.wait_for(2, "willi_recipients_total")
    status.wait_for(3, "willi_session_duration_seconds_count")  # with the probe
    before = {name: set(series) for name, series in status.samples().items()}
    for number in range(20):
        client = willi.connect()
        assert client.command(b"EHLO evil%d.invalid" % number).code == 250
        sender = b'MAIL FROM:<"evil\\"} %d"@evil%d.invalid>' % (number, number)
        assert deliver(client, b"RCPT TO:<evil%d+x@b.example>" % number, mail=sender) == QUEUED
        assert say(client, sender, b"RCPT TO:<x@evil%d.invalid>" % number)[1].startswith("554")
    status.wait_for(42, "willi_recipients_total")
    assert {name: set(series) for name, series in status.samples().items()} == before
    assert "evil" not in status.get("/metrics").body


# What happens to workers and to the status process


def test_a_killed_worker_takes_nothing_with_it_but_its_last_second(willi: Willi, status: Status):
    willi.tolerate(DIED)
    victim = willi.workers[0]
    client = served_by(willi, victim)
    assert deliver(client) == QUEUED
    status.wait_for(1, "willi_messages_total", verdict="accepted")
    status.wait_for(1, "willi_sessions_open")
    os.kill(victim, signal.SIGKILL)
    status.wait_for(0, "willi_sessions_open")
    wait_until(lambda: len(willi.workers) == 2 and victim not in willi.workers, "two workers again")
    status.wait_for(2, "willi_workers", state="serving")
    newcomer = willi.workers[-1]
    assert deliver(served_by(willi, newcomer)) == QUEUED
    status.wait_for(2, "willi_messages_total", verdict="accepted")


def counters(status: Status) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All series of /metrics that may only rise."""
    suffixes = ("_total", "_bucket", "_count", "_sum")
    samples = status.samples().items()
    return {(name, labels): value for name, series in samples if name.endswith(suffixes)
            for labels, value in series.items()}  # fmt: skip


def test_no_counter_goes_back_over_reloads_and_killed_workers(
    start_willi: StartWilli, upstream: ScriptedUpstream, status: Status
):
    allow(600)
    hurry = in_a_hurry(**{"child.FIRST_DELAY": 0.1, "child.LONGEST_DELAY": 0.1})
    willi = start_willi(server=upstream.server, workers=2, status_listen=status.setting, prefix=hurry)
    willi.tolerate(DIED)
    wait_until(status.answers, "an answer of the status")
    before = counters(status)

    def risen(delivered: int) -> bool:
        """Whether as many messages are counted; and nothing has gone back until then."""
        nonlocal before
        now = counters(status)
        assert {series: now.get(series) for series, value in before.items() if now.get(series, -1) < value} == {}
        before = now
        return status.value("willi_messages_total") == delivered

    rounds = examples(30)
    for number in range(rounds):
        assert deliver(greeted(willi)) == QUEUED
        assert say(greeted(willi), MAIL, b"RCPT TO:<>")[1].startswith("5")
        wait_until(lambda: risen(number + 1), "the message to be counted")  # noqa: B023
        if number % 2:
            old = willi.workers
            willi.reload()
            wait_until(lambda: not set(willi.workers) & set(old), "the end of the old workers")  # noqa: B023
        else:
            os.kill(willi.workers[0], signal.SIGKILL)
            willi.wait_for_log(msg="Worker replaced", count=number // 2 + 1)
    wait_until(lambda: risen(rounds), "the counters after the last reload")
    status.wait_for(rounds / 2, "willi_reloads_total", outcome="ok")


def test_mail_goes_on_without_the_status_process_which_comes_back(willi: Willi, status: Status):
    willi.tolerate(STATUS_DIED)
    victim = status_process(willi)
    assert victim
    assert deliver(greeted(willi)) == QUEUED
    status.wait_for(1, "willi_messages_total")
    os.kill(victim, signal.SIGKILL)
    for _ in range(3):
        assert deliver(greeted(willi)) == QUEUED
    wait_until(lambda: status_process(willi) not in (None, victim), "another status process")
    wait_until(status.answers, "an answer of the status")
    wait_until(lambda: status.overview()["problems"] == [], "no problems")
    assert deliver(greeted(willi)) == QUEUED
    last = willi.wait_for_log(msg="Message accepted", count=5)["sid"]
    wait_until(lambda: last in [event["sid"] for event in status.overview()["events"]], "the last message")
    assert 1 <= status.value("willi_messages_total") <= 4  # what had been told has gone with the old one
    assert len(willi.lines(msg=STATUS_DIED)) == 1


def test_workers_lose_nothing_while_the_status_process_stands_still(willi: Willi, status: Status):
    allow(300)
    stopped = status_process(willi)
    assert stopped
    os.kill(stopped, signal.SIGSTOP)
    for number in range(200):  # each with hosts of its own in the log, so that the reports grow
        assert deliver(greeted(willi), b"RCPT TO:<bob%d@b.example>" % number) == QUEUED
    os.kill(stopped, signal.SIGCONT)
    status.wait_for(200, "willi_messages_total")
    assert status_process(willi) == stopped


def test_a_status_at_another_address_begins_at_zero(willi: Willi, status: Status):
    assert deliver(greeted(willi)) == QUEUED
    status.wait_for(1, "willi_messages_total")
    other = Status(free_port())
    before = status_process(willi)
    assert before is not None
    os.kill(before, signal.SIGSTOP)  # it ends when the new workers have counted a message
    willi.reload({"status_listen": other.setting})
    assert deliver(greeted(willi)) == QUEUED
    os.kill(before, signal.SIGCONT)
    wait_until(lambda: not is_there(before), "the end of the old one")
    other.wait_for(1, "willi_messages_total")
    assert not status.answers()
    assert sum(minute["accepted"] for minute in other.overview()["minutes"]) == 1
    assert [event["kind"] for event in other.overview()["events"]] == ["accepted"]


def test_the_status_goes_on_over_other_reloads_under_the_new_file(willi: Willi, status: Status):
    assert deliver(greeted(willi)) == QUEUED
    status.wait_for(1, "willi_messages_total")
    before = status_process(willi)
    assert status.get("/healthz", Host="other.example").status == 421
    willi.reload({"domain": "other.example", "loglevel": "debug"})
    wait_until(lambda: status.get("/healthz", Host="other.example").status == 200, "the new name")
    assert status_process(willi) == before
    assert status.value("willi_messages_total") == 1
    with Client(status.port) as client:
        client.send(b"nonsense\r\n\r\n")
        client.read_to_end()
    willi.wait_for_log(msg="Bad request for the status", lvl="debug")


def test_a_reload_may_end_the_status_and_begin_it(willi: Willi, status: Status):
    willi.reload({"status_listen": ""})
    wait_until(lambda: status_process(willi) is None, "the end of the status process")
    assert not status.answers()
    willi.reload({"status_listen": status.setting})
    wait_until(status.answers, "an answer of the status")
    wait_until(lambda: status.overview()["problems"] == [], "no problems")


QUICKLY = in_a_hurry(**{"master.BIND_INTERVAL": 0.1})


@pytest.mark.parametrize("how", ["start", "reload"])
def test_a_status_address_that_is_taken_stops_no_mail_and_is_tried_again(
    start_willi: StartWilli, upstream: ScriptedUpstream, how: str
):
    with socket.create_server((HOST, 0)) as taken:
        status = Status(taken.getsockname()[1])
        before = {"status_listen": status.setting} if how == "start" else {}
        willi = start_willi(server=upstream.server, prefix=QUICKLY, **before)
        if how == "reload":
            willi.reload({"status_listen": status.setting})
        line = willi.wait_for_log(msg="There is no status for now")
        assert (line["lvl"], line["error"]) == ("warn", f"cannot listen on {status.setting}: Address already in use")
        assert deliver(greeted(willi)) == QUEUED
    wait_until(status.answers, "an answer of the status")
    wait_until(lambda: status.overview()["problems"] == [], "no problems")
    assert len(willi.lines(msg="There is no status for now")) == 1


def test_a_status_whose_new_address_is_taken_comes_when_that_is_free(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    old = Status(free_port())
    willi = start_willi(server=upstream.server, prefix=QUICKLY, status_listen=old.setting)
    wait_until(old.answers, "an answer")
    with socket.create_server((HOST, 0)) as taken:
        new = Status(taken.getsockname()[1])
        willi.reload({"status_listen": new.setting})
        willi.wait_for_log(msg="There is no status for now")
        wait_until(lambda: status_process(willi) is None, "the end of the status process")
    wait_until(new.answers, "the status at its new address")
    assert new.get("/readyz").status == 200


def test_a_new_address_of_the_status_that_the_old_one_contains_is_had_at_once(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    port = free_port()
    willi = start_willi(server=upstream.server, status_listen=f":{port}")
    wait_until(Status(port).answers, "an answer")
    before = status_process(willi)
    willi.reload({"status_listen": f"{HOST}:{port}"})
    wait_until(lambda: status_process(willi) not in (None, before), "another status process")
    wait_until(Status(port).answers, "an answer of the other one")
    assert not willi.lines(msg="There is no status for now")


def test_the_status_process_ends_with_the_master(willi: Willi):
    willi.tolerate("The master is dead")
    children = willi.children
    assert len(children) == 3
    willi.process.kill()
    willi.process.wait()
    wait_until(lambda: not any(map(is_there, children)), "the end of all processes")


def test_a_second_signal_ends_all_at_once_without_a_complaint(willi: Willi, status: Status):
    children = willi.children
    client = in_data(willi)  # or Willi could have ended before the second signal
    willi.signal(signal.SIGTERM)
    willi.wait_for_log(msg="Stopping")
    willi.signal(signal.SIGTERM)
    assert willi.wait() == 0
    client.close()
    assert not any(map(is_there, children))
    assert willi.lines(msg="Ended at once")
    assert not willi.lines(msg=STATUS_DIED)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_status_process_is_user_and_the_only_one_with_its_socket(
    start_willi: StartWilli, upstream: ScriptedUpstream, status: Status
):
    willi = start_willi(server=upstream.server, status_listen=status.setting, user="nobody")
    wait_until(status.answers, "an answer of the status")
    pid = status_process(willi)
    assert pid
    assert status_of(pid, "Uid").split() == ["65534"] * 4
    assert status_of(pid, "CapEff") == "0000000000000000"
    assert [listens(one, status.port) for one in (pid, *willi.workers)] == [True, False]
    assert [listens(one, willi.port) for one in (pid, *willi.workers)] == [False, True]


def listens(pid: int, port: int) -> bool:
    """Whether a process has the listening socket of this port."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            own.add(str(descriptor.readlink()))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().split("\n")[1:-1]]
    found = [f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]
    return bool(own.intersection(found))


# Health


def test_ready_until_it_drains(willi: Willi, status: Status):
    wait_until(lambda: status.get("/readyz").status == 200, "ready")
    assert status.get("/healthz").body == "ok\n"
    client = in_data(willi)
    willi.signal(signal.SIGTERM)
    wait_until(lambda: status.get("/readyz").status == 503, "not ready")
    assert "Willi is being stopped" in status.get("/readyz").body
    assert status.value("willi_workers", state="draining") >= 1
    assert content(client) == QUEUED
    assert willi.wait() == 0
    assert not status.answers()


def test_not_ready_while_workers_say_nothing(start_willi: StartWilli, upstream: ScriptedUpstream, status: Status):
    willi = start_willi(server=upstream.server, status_listen=status.setting)
    wait_until(lambda: status.answers() and status.get("/readyz").status == 200, "ready")
    [worker] = willi.workers
    os.kill(worker, signal.SIGSTOP)
    try:
        wait_until(lambda: status.get("/readyz").status == 503, "not ready", seconds=60)
        assert status.get("/healthz").status == 200
        assert any("not reported" in problem["what"] for problem in status.overview()["problems"])
    finally:
        os.kill(worker, signal.SIGCONT)
    wait_until(lambda: status.get("/readyz").status == 200, "ready again")


def test_a_host_shows_what_was_wrong_with_each_of_its_addresses(
    start_willi: StartWilli, start_upstream: StartUpstream, certificates: Authority, dns: DnsServer, status: Status
):
    other = start_upstream(host="127.0.0.2", tls=certificates.issue("other.example").server_context())
    dns.zone["up.example"] = {"A": ["127.0.0.2", "127.0.0.3"]}
    server = f"up.example:{other.port}"
    willi = start_willi(
        mappings={"all": {"type": "static", "server": server, "upstream_tls_ca": str(certificates.ca)}},
        upstream_tls="always", status_listen=status.setting, dns=dns,
    )  # fmt: skip
    willi.tolerate("Upstream failed")
    assert say(greeted(willi), MAIL, BOB)[1].startswith("451 4.4.1")
    wait_until(lambda: status.answers() and status.overview()["hosts"], "the host")
    [host] = status.overview()["hosts"]
    problems = [problem["what"] for problem in status.overview()["problems"]]
    whole = [host["last_error"], *problems, willi.lines(msg="Upstream failed")[0]["error"]]
    for text in whole:
        assert "[127.0.0.2]: TLS handshake: Hostname mismatch, " in text
        assert "[127.0.0.3]: Connection refused" in text
    assert len(whole) == 3


# What it says to whom


@pytest.fixture
def asked_willi(share_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    """Tests that send no mail and only ask the status share it; b.example is the upstream's."""
    return share_willi(
        csv=f"pattern;server;tls_verify\nb.example;{upstream.server};no\n",
        status_listen=f"{HOST}:{steady_port('status')}",
    )


@pytest.fixture
def asked(asked_willi: Willi) -> Status:
    """Its status."""
    status = Status(steady_port("status"))
    wait_until(status.answers, f"an answer of the status of {asked_willi.directory}")
    return status


OURS = ("localhost", "localhost:", "127.0.0.1:8025", "[::1]:8025", "willi.example", "WILLI.example.:80", "192.0.2.1")
NOT_OURS = (
    "evil.example", "127.0.0.1.evil.example", "willi.example.evil.example", "", "[evil]", "127.1", "2130706433",
    "[::1].evil.example", "[::1]evil.example", "[::1]:80.evil.example", "[::1%25evil.example]", "[127.0.0.1]", "::1",
    "localhost:80.evil.example", "localhost:evil.example", "localhost:@evil.example", "localhost@evil.example",
    "localhost..", "localhost evil.example", "localhost/evil.example", "0x7f.0.0.1", "127.0.0.1:8025:80",
)  # fmt: skip


def test_our_names_and_addresses_are_answered_and_no_others(asked: Status):
    for host in OURS:
        assert asked.get("/status.json", Host=host).status == 200, host
        assert asked.get(f"http://{host}/status.json", Host="evil.example").status == 200, host
    for host in NOT_OURS:
        answer = asked.get("/status.json", Host=host)
        assert answer.status == 421, host
        assert "willi.example" not in answer.body
    for host in set(NOT_OURS) - {"localhost evil.example", "localhost/evil.example"}:
        assert asked.get(f"http://{host}/status.json", Host="localhost").status == 421, host
    for path in ("/", "/metrics", "/readyz"):
        assert asked.get(path, Host="evil.example").status == 421


@pytest.mark.parametrize(("request_line", "hosts", "code"), [
    ("GET /healthz HTTP/1.1", ["localhost"], 200),
    ("GET /healthz HTTP/1.1", [], 400),
    ("GET http://localhost/healthz HTTP/1.1", [], 400),
    ("GET /healthz HTTP/1.1", ["localhost", "localhost"], 400),
    ("GET /healthz HTTP/1.1", ["localhost", "evil.example"], 400),
    ("GET /healthz HTTP/1.0", [], 200),
    ("GET /healthz HTTP/1.0", ["evil.example"], 421),
    ("GET http://willi.example:8025/healthz HTTP/1.1", ["localhost"], 200),
    ("GET HTTP://localhost/healthz?x=y HTTP/1.0", [], 200),
    ("GET http://localhost HTTP/1.0", [], 200),
    ("GET http://localhost/nowhere HTTP/1.0", [], 404),
    ("GET http://evil.example/healthz HTTP/1.0", [], 421),
])  # fmt: skip
def test_a_request_names_its_host_once(asked: Status, request_line: str, hosts: list[str], code: int):
    lines = [request_line, *(f"Host: {host}" for host in hosts), "", ""]
    with Client(asked.port) as client:
        client.send("\r\n".join(lines).encode())
        assert client.read_to_end().startswith(b"HTTP/1.1 %d " % code)


def test_another_site_may_lead_here_and_not_have_a_browser_ask(asked: Status):
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert asked.get("/?address=bob@b.example", **embedded).status == 403
    assert asked.get("/?address=bob@b.example", **{**embedded, "Sec-Fetch-Site": "same-site"}).status == 403
    followed = {**embedded, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert asked.get("/", **followed).status == 200
    assert asked.get("/", **{**followed, "Sec-Fetch-Dest": "iframe"}).status == 403
    assert asked.get("/", **{**embedded, "Sec-Fetch-Site": "same-origin"}).status == 200


def test_only_get_and_head(asked: Status):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = asked.get("/", method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    head = asked.get("/", "HEAD")
    assert (head.status, head.body) == (200, "")
    assert int(head.headers["content-length"]) > 0
    assert asked.get("/willi.conf").status == 404


def test_a_browser_is_told_to_be_strict(asked: Status):
    for path in ("/", "/status.json", "/nowhere"):
        headers = asked.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_what_is_no_request_ends_the_connection_and_nothing_else(asked_willi: Willi, asked: Status):
    for request in (b"\0\xff\r\n\r\n", b"GET /" + b"x" * 9000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b"HELO\r\n"):
        with Client(asked.port) as client:
            try:
                client.send(request)
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(65536):
                    pass
            except OSError as error:  # it has not read all of that, and may have closed already
                if error.errno not in (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE):
                    raise
    assert asked.get("/readyz").status == 200
    assert "Traceback" not in asked_willi.text


@pytest.mark.parametrize("octets", [b"", b"GET /", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_connections_that_ask_nothing_keep_no_other_waiting(asked: Status, octets: bytes):
    """How long it takes no test can say on a busy machine; tests/test_status.py has that they are ended for others."""
    idle = [Client(asked.port) for _ in range(300)]
    try:
        for client in idle:
            client.send(octets)
        for _ in range(3):
            assert asked.get("/healthz").status == 200
    finally:
        for client in idle:
            client.close()


def test_connections_that_do_not_read_keep_no_other_waiting(asked: Status):
    """The page is larger than a socket takes whose reader does nothing."""
    deaf = []
    try:
        for _ in range(300):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            one.connect((HOST, asked.port))
            one.sendall(b"GET /style.css HTTP/1.0\r\n\r\n")
            deaf.append(one)
        assert asked.get("/healthz").status == 200
    finally:
        for one in deaf:
            one.close()


# Lookup


def test_lookup_shows_a_hit_key_by_key(asked_willi: Willi, upstream: ScriptedUpstream, asked: Status):
    text = asked.lookup("Bob@B.example")
    for word in ("bob@b.example", f"csv:{asked_willi.csv}", f"route: {upstream.server}"):
        assert word in text
    assert asked.value("willi_lookups_total") == 0  # it is no client's


def test_lookup_shows_a_miss(asked: Status):
    assert "554 5.7.1 Relay access denied" in asked.lookup("eve@elsewhere.example")


def test_lookup_of_what_is_no_address_is_escaped(asked: Status):
    body = asked.get("/?address=%3Cscript%3Ealert(1)%3C/script%3E%40b.example").body
    assert "<script" not in body


def test_lookup_shows_that_a_database_fails(start_willi: StartWilli, upstream: ScriptedUpstream, status: Status):
    database = {"type": "mysql", "host": f"{HOST}:{free_port()}", "query": "SELECT server FROM t WHERE pattern = ?"}
    willi = start_willi(
        csv=f"pattern;server\nb.example;{upstream.server}\n", mappings={"db": database}, status_listen=status.setting
    )
    willi.tolerate("Database is down")
    willi.tolerate("Lookup failed")
    wait_until(status.answers, "an answer of the status")
    text = status.lookup("carl@c.example")
    assert "mysql:db" in text
    assert "451 4.3.0 Cannot look up this address now" in text
    status.wait_for(0, "willi_database_up", mapping="mysql:db")
    assert say(greeted(willi), MAIL, CARL)[1].startswith("451 4.3.0")
    status.wait_for(1, "willi_lookups_total", mapping="mysql:db", outcome="error")
    [problem] = [one for one in status.overview()["problems"] if one["subject"] == "mysql:db"]
    assert "database is down" in problem["what"]


def test_lookup_says_so_if_no_worker_answers(start_willi: StartWilli, upstream: ScriptedUpstream, status: Status):
    willi = start_willi(server=upstream.server, status_listen=status.setting)
    wait_until(status.answers, "an answer of the status")
    [worker] = willi.workers
    os.kill(worker, signal.SIGSTOP)
    try:
        assert UNANSWERED in status.get("/?address=bob@b.example").text
    finally:
        os.kill(worker, signal.SIGCONT)
    assert upstream.server in status.lookup("bob@b.example")
