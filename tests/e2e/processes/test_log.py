"""The log: one line for a message, one for a refused recipient, and nobody can forge one."""

from __future__ import annotations

import os
import pwd
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import PYTHON, Willi, parse_logfmt, run_willi, write_config
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port, need
from tests.support.talk import (
    BEN,
    BOB,
    EHLO,
    GO_ON,
    MAIL,
    OK,
    QUEUED,
    SENDER_KEPT,
    chunk,
    content,
    deliver,
    greeted,
    reply,
    say,
)
from tests.support.upstream import Close, ScriptedUpstream
from willi_lib.smtp.reply import Reply

CONTENT = b"Subject: x\r\n\r\nhello\r\n"


def canonical(willi: Willi, message: str, count: int = 1) -> dict[str, str]:
    """The line, without what differs from one run to the next."""
    line = willi.wait_for_log(msg=message, count=count)
    assert 0 <= float(line.pop("duration")) < PATIENCE
    assert len(line.pop("sid")) == 10
    assert line.pop("t")
    return line


def common(client: Client, upstream: ScriptedUpstream) -> dict[str, str]:
    """The fields of a message from Ann to Bob in clear."""
    return {
        "lvl": "info", "client": client.address, "client_helo": "c.example", "client_tls": "false",
        "from": "ann@a.example", "to": "bob@b.example", "upstream": upstream.server, "upstream_tls": "false",
        "mapping": "static:all",
    }  # fmt: skip


def test_an_accepted_message(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert deliver(client, BOB, BEN) == QUEUED
        assert canonical(willi, "Message accepted") == {
            **common(client, upstream), "msg": "Message accepted", "to": "bob@b.example,ben@b.example",
            "reply": QUEUED, "bytes": str(len(CONTENT)),
        }  # fmt: skip
    assert willi.lines(msg="Message rejected") == []


def test_the_fields_are_in_the_order_of_the_go_program(willi: Willi):
    with greeted(willi) as client:
        deliver(client)
    line = willi.wait_for_log(msg="Message accepted")
    assert list(line) == [
        "t", "lvl", "msg", "sid", "client", "client_helo", "client_tls", "from", "to", "upstream", "upstream_tls",
        "reply", "bytes", "duration", "mapping",
    ]  # fmt: skip


def test_a_message_by_bdat_counts_its_octets(willi: Willi):
    with greeted(willi) as client:
        say(client, MAIL, BOB)
        assert [chunk(client, b"12345"), chunk(client, b"678", last=True)] == [OK, OK]
    assert willi.wait_for_log(msg="Message accepted")["bytes"] == "8"


def test_a_recipient_that_the_upstream_refuses(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BOB] = reply("550 5.1.1 no bob / 5.1.1 sorry")
    with greeted(willi) as client:
        say(client, MAIL, BOB)
        refusal = "550 5.1.1 no bob / 5.1.1 sorry"
        assert canonical(willi, "Message rejected") == {
            **common(client, upstream), "msg": "Message rejected", "error": refusal, "error_src": "upstream",
            "reply": refusal, "bytes": "0",
        }  # fmt: skip


def test_a_recipient_that_nobody_is_responsible_for(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(csv=f"pattern;server\nc.example;{upstream.server}\n")
    with greeted(willi) as client:
        say(client, MAIL, BOB)
        refusal = "554 5.7.1 Relay access denied"
        expected = {
            **common(client, upstream), "msg": "Message rejected", "error": refusal, "error_src": "internal",
            "reply": refusal, "bytes": "0", "upstream": "",
        }  # fmt: skip
        del expected["mapping"]
        assert canonical(willi, "Message rejected") == expected


def test_a_message_that_is_refused_after_data(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"."] = reply("554 5.7.1 spam")
    with greeted(willi) as client:
        assert deliver(client) == "554 5.7.1 spam"
        assert canonical(willi, "Message rejected") == {
            **common(client, upstream), "msg": "Message rejected", "error": "554 5.7.1 spam", "error_src": "upstream",
            "reply": "554 5.7.1 spam", "bytes": str(len(CONTENT)),
        }  # fmt: skip
    assert len(willi.lines(msg="Message rejected")) == 1


def test_a_message_whose_data_is_refused(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[b"DATA"] = reply("451 4.3.0 no disk")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA")[2] == "451 4.3.0 no disk"
        line = canonical(willi, "Message rejected")
    assert (line["to"], line["reply"], line["error_src"]) == ("bob@b.example", "451 4.3.0 no disk", "upstream")


def test_a_client_that_goes_away_within_the_message(willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA") == [SENDER_KEPT, OK, GO_ON]
        client.send(b"half a mess")
        expected = {
            **common(client, upstream), "msg": "Message rejected", "error_src": "client", "bytes": "11",
            "error": "message not finished: connection closed",
        }  # fmt: skip
    assert canonical(willi, "Message rejected") == expected


def test_a_message_that_is_too_big(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, max_message_bytes=1000)
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA")[2] == GO_ON
        too_big = "552 5.3.4 Message is too big"
        assert content(client, b"x" * 2000 + b"\r\n") == too_big
        line = canonical(willi, "Message rejected")
        assert (line["error_src"], line["error"], line["reply"]) == ("internal", too_big, too_big)
        assert line["upstream"] == upstream.server


def test_tls_on_both_sides_is_seen(start_willi: StartWilli, certificates: Authority, upstream: ScriptedUpstream):
    pair = certificates.issue("mx.example")
    upstream.tls = pair.server_context()
    willi = start_willi(server=upstream.server, tls_cert=str(pair.cert), tls_key=str(pair.key))
    with greeted(willi) as client:
        client.starttls()
        say(client, EHLO)
        assert deliver(client) == QUEUED
    line = willi.wait_for_log(msg="Message accepted")
    assert (line["client_tls"], line["upstream_tls"]) == ("true", "true")


def test_all_lines_of_a_session_have_its_id(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BEN] = reply("550 5.1.1 no ben")
    with greeted(willi) as one, greeted(willi) as two:
        for client in (one, two):
            assert say(client, MAIL, BEN)[1] == "550 5.1.1 no ben"
            assert say(client, BOB, b"DATA")[1] == GO_ON
            assert content(client) == QUEUED
    ids = [line["sid"] for line in willi.log if "sid" in line and line["msg"].startswith("Message")]
    assert len(ids) == 4
    assert ids[0] == ids[1] != ids[2] == ids[3]


# Nothing forges a line. `willi.log` reads every line as logfmt and fails if one is not.

HOSTILE = [
    'x" lvl=error msg="forged',
    "x lvl=error",
    "a=b",
    "back\\slash",
    "back\\nslash",
    "$(reboot)`reboot`",
    "%s%n{0}",
]


def quoted(text: str) -> str:
    """As a quoted local part."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"@a.example'


@pytest.mark.parametrize("text", HOSTILE)
def test_no_address_forges_a_line(text: str, willi: Willi, upstream: ScriptedUpstream):
    with greeted(willi) as client:
        mail, rcpt = f"MAIL FROM:<{quoted(text)}>".encode(), f"RCPT TO:<{quoted(text)}>".encode()
        assert deliver(client, rcpt, mail=mail) == QUEUED
    line = willi.wait_for_log(msg="Message accepted")
    assert (line["lvl"], line["from"], line["to"]) == ("info", quoted(text), quoted(text))
    assert len([other for other in willi.log if other["lvl"] == "error"]) == 0


def test_no_helo_forges_a_line(willi: Willi):
    hellos = [text.replace(" ", "\u00a0").encode("ascii", "ignore") for text in HOSTILE]
    for number, hello in enumerate(hellos, 1):
        with greeted(willi, b"EHLO " + hello) as client:
            assert deliver(client) == QUEUED
        assert willi.wait_for_log(msg="Message accepted", count=number)["client_helo"] == hello.decode()
    assert len(willi.lines(msg="Message accepted")) == len(hellos)


def test_no_control_octet_of_an_upstream_reaches_a_line(willi: Willi, upstream: ScriptedUpstream):
    upstream.answers[BOB] = b"550-5.1.1 \x1b[2Jno\r\n550 5.1.1 bob\x00\x7f\xff \xc2\x9b31m \xe2\x80\xae\r\n"
    with greeted(willi) as client:
        assert client.command(MAIL).code == 250
        client.send(BOB + b"\r\n")
        assert client.read_line() == b"550-5.1.1 ?[2Jno"
        assert client.read_line() == b"550 5.1.1 bob??\xff \xc2\x9b31m \xe2\x80\xae"
    line = willi.wait_for_log(msg="Message rejected")
    assert line["reply"].startswith("550 5.1.1 ?[2Jno / 5.1.1 bob??\\xff ")
    octets = willi.log_file.read_bytes()
    assert not any(octet in octets for octet in (b"\x1b", b"\0", b"\x7f", b"\xc2\x9b", b"\xe2\x80\xae"))


def test_non_ascii_addresses_are_readable(willi: Willi):
    with greeted(willi) as client:
        rcpt = "RCPT TO:<bøb@bücher.example>".encode()
        assert deliver(client, rcpt, mail="MAIL FROM:<änn@a.example> SMTPUTF8".encode()) == QUEUED
    line = willi.wait_for_log(msg="Message accepted")
    assert (line["from"], line["to"]) == ("änn@a.example", "bøb@bücher.example")


def test_each_of_many_recipients_is_in_the_log_in_lines_of_the_same_session(willi: Willi):
    addresses = [f"{'x' * (number % 60)}{number}@b.example" for number in range(100)]
    with greeted(willi) as client:
        assert deliver(client, *(f"RCPT TO:<{address}>".encode() for address in addresses)) == QUEUED
        assert deliver(client) == QUEUED
    willi.wait_for_log(msg="Message accepted", to="bob@b.example")
    *parts, last = willi.lines(msg="Message accepted")
    assert len(parts) > 1
    assert ",".join(line["to"] for line in parts).split(",") == addresses
    assert [line["part"] for line in parts] == [f"{number}/{len(parts)}" for number in range(1, len(parts) + 1)]
    assert [line["bytes"] for line in parts] == [str(len(CONTENT)), *["0"] * (len(parts) - 1)]
    rest = [{key: line[key] for key in line.keys() - {"to", "part", "bytes", "t"}} for line in parts]
    assert rest == [rest[0]] * len(parts)
    assert last["sid"] == parts[0]["sid"] and "part" not in last
    assert max(map(len, willi.text.split("\n"))) < 2000


def test_a_reader_of_the_log_that_hangs_stops_no_session_and_lost_lines_are_told(
    tmp_path: Path, upstream: ScriptedUpstream
):
    """A pipe, two workers, and lines of which some would be longer than a pipe takes whole."""
    long = b"5.1.1 " + "\u0085".encode() * 150
    upstream.answers[BOB] = Reply(550, (long,) * 4)
    port, said = free_port(), 0
    config = write_config(tmp_path / "willi.conf", {
        "listen": f"{HOST}:{port}", "domain": "willi.example", "workers": 2,
        "mappings": {"all": {"type": "static", "server": upstream.server}},
    })  # fmt: skip
    reader, writer = os.pipe()
    process = subprocess.Popen([PYTHON, str(ROOT / "willi.py"), "-c", str(config)], stdout=writer, stderr=writer)
    os.close(writer)
    try:
        octets = os.read(reader, 65536)
        while b"msg=Ready" not in octets:
            octets += os.read(reader, 65536)
        for _ in range(60):  # the reader stops here; two workers keep up to 400 lines
            with Client(port) as client:
                client.read_reply()
                for _ in range(10):
                    assert say(client, EHLO, MAIL)[1] == SENDER_KEPT
                    assert client.command(BOB).code == 550
                    said += 1
        while sum(written_and_lost(octets)) < said:  # or those that wait would be lost at the end
            octets += os.read(reader, 65536)
        process.send_signal(signal.SIGTERM)
        while more := os.read(reader, 65536):
            octets += more
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)
    lines = octets.decode().split("\n")
    fields = [parse_logfmt(line) for line in lines if line]
    written, lost = written_and_lost(octets)
    assert written + lost >= said > written > 0 < lost
    assert max(len(line.encode()) for line in lines) < 4000
    assert fields[-1]["msg"] == "Stopped"


def written_and_lost(log: bytes) -> tuple[int, int]:
    """How many refusals its whole lines tell of, and how many lines they say are lost."""
    fields = [parse_logfmt(line) for line in log.decode(errors="replace").split("\n")[:-1]]
    lost = [int(line["lines"]) for line in fields if line["msg"] == "Log lines lost"]
    return sum(line["msg"] == "Message rejected" for line in fields), sum(lost)


def test_a_full_disk_costs_whole_lines_and_their_number_is_told(fresh_willi: Willi):
    pids = [fresh_willi.process.pid, *fresh_willi.children]
    for pid in pids:  # as if the disk had room for less than one more line
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (fresh_willi.log_file.stat().st_size + 40, resource.RLIM_INFINITY))
    with greeted(fresh_willi) as client:
        assert [deliver(client) for _ in range(3)] == [QUEUED] * 3
        assert fresh_willi.lines(msg="Message accepted") == []
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert deliver(client) == QUEUED
    fresh_willi.tolerate("Log lines lost")
    fresh_willi.wait_for_log(msg="Message accepted")
    assert [line["lines"] for line in fresh_willi.lines(msg="Log lines lost")] == ["3"]
    assert len(fresh_willi.lines(msg="Message accepted")) == 1


@pytest.mark.parametrize("log", ["stdout", "syslog"])
def test_why_willi_cannot_start_stands_on_stderr_too(tmp_path: Path, log: str):
    with socket.create_server((HOST, 0)) as taken:
        address = f"{HOST}:{taken.getsockname()[1]}"
        config = write_config(tmp_path / "willi.conf", {
            "listen": address, "log": log, "mappings": {"all": {"type": "static", "server": HOST}},
        })  # fmt: skip
        done = run_willi("-c", config)
    fault = f"cannot listen on {address}: Address already in use"
    assert done.returncode == 3
    assert f"cannot start: {fault}\n" in done.stderr
    assert (fault in done.stdout) == (log == "stdout")


def test_a_missing_syslog_is_told_at_the_start_and_by_check(tmp_path: Path):
    need("unshare", "mount", root=True)
    without = ["unshare", "-m", "sh", "-euc", '[ ! -e /dev/log ] || mount --bind /dev/null /dev/log; exec "$@"', "sh"]
    config = write_config(tmp_path / "willi.conf", {
        "listen": "192.0.2.77:25", "log": "syslog", "mappings": {"all": {"type": "static", "server": HOST}},
    })  # fmt: skip
    for words, text in (
        ((), "willi.py: no line of the log is kept: /dev/log: "),
        (("check", "--json"), "no line of the log is kept (log = syslog): /dev/log: "),
    ):
        command = [*without, PYTHON, str(ROOT / "willi.py"), *words, "-c", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert text in done.stdout + done.stderr


def test_why_willi_cannot_start_is_told_once_where_both_are_the_same(tmp_path: Path):
    (tmp_path / "map.csv").write_text("pattern;server\nb.example\n")
    config = write_config(tmp_path / "willi.conf", {
        "listen": f"{HOST}:{free_port()}", "mappings": {"all": {"type": "csv", "file": "map.csv"}},
    })  # fmt: skip
    command = [PYTHON, str(ROOT / "willi.py"), "-c", str(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout.count("map.csv:2: no server") == 1


def test_debug_shows_the_dialogue_but_not_the_message(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, loglevel="debug")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB, b"DATA")[2] == GO_ON
        assert content(client, b"top secret\r\n") == QUEUED
    willi.wait_for_log(msg="Message accepted")
    said = [(line["msg"], line["line"]) for line in willi.log if "line" in line]
    assert ("client <", MAIL.decode()) in said
    assert ("upstream >", BOB.decode()) in said
    assert ("upstream <", GO_ON) in said
    assert ("client >", QUEUED) in said
    assert "secret" not in willi.text


def test_with_debug_there_is_one_worker_and_the_dialogue_in_the_log_also_after_a_reload(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, workers=3, log="syslog", loglevel="error", options=["--debug"])
    for sessions in (1, 2):
        with greeted(willi) as client:
            assert deliver(client) == QUEUED
        willi.wait_for_log(msg="Message accepted", count=sessions)
        assert len(willi.lines(msg="client <", line=MAIL.decode())) == sessions
        if sessions == 1:
            willi.reload()
    assert [line["workers"] for line in (*willi.lines(msg="Ready"), *willi.lines(msg="Reloaded"))] == ["1", "1"]


def test_accepted_recipients_of_a_lost_upstream_are_in_the_log(willi: Willi, upstream: ScriptedUpstream):
    willi.tolerate("Upstream failed")
    upstream.answers[BEN] = Close()
    with greeted(willi) as client:
        lost = "451 4.4.2 Lost the server for this recipient, try again"
        assert say(client, MAIL, BOB, BEN, b"DATA") == [SENDER_KEPT, OK, lost, lost]
    willi.wait_for_log(msg="Message rejected", count=2)
    assert [line["to"] for line in willi.lines(msg="Message rejected")] == ["bob@b.example", "ben@b.example"]


def test_a_recipient_that_is_no_address_is_in_the_log(willi: Willi):
    with greeted(willi) as client:
        assert say(client, MAIL, b"RCPT TO:<bob>") == [SENDER_KEPT, "553 5.1.3 Recipient address needs a domain"]
    line = willi.wait_for_log(msg="RCPT refused")
    assert (line["argument"], line["reply"]) == ("TO:<bob>", "553 5.1.3 Recipient address needs a domain")


def test_willi_becomes_its_user_and_says_so_if_it_has_none(start_willi: StartWilli, upstream: ScriptedUpstream):
    need("id", root=True)
    root = start_willi(server=upstream.server)
    assert root.wait_for_log(msg="Willi runs as root: set user")["lvl"] == "warn"
    nobody = start_willi(server=upstream.server, user="nobody")
    status = Path(f"/proc/{nobody.workers[0]}/status").read_text()
    account = pwd.getpwnam("nobody")
    for key, number in (("Uid", account.pw_uid), ("Gid", account.pw_gid)):
        assert f"{key}:\t" + "\t".join([str(number)] * 4) in status
    with greeted(nobody) as client:
        assert deliver(client) == QUEUED
    assert nobody.lines(msg="Willi runs as root: set user") == []
