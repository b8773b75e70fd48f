"""docs/operate.md: where a mail went, from its recipient to the upstream's own log; and what helps at night."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import StartWilli
from tests.support.daemon import Willi, parse_logfmt
from tests.support.loopback import HOST, ROOT, free_port, wait_until
from tests.support.postfix import Postfix
from tests.support.talk import BOB, MAIL, QUEUED, content, deliver, greeted, say
from tests.support.upstream import ScriptedUpstream

SECTION = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8").partition("\n## Where did this mail go?\n")[2]
SECTION = SECTION.partition("\n## ")[0]
*COMMANDS, ON_THE_UPSTREAM = re.findall(r"^    (\S.*)$", SECTION, re.MULTILINE)
SYSTEMD, FILE, SYSLOG = COMMANDS[0:2], COMMANDS[2:4], COMMANDS[4:6]
[BY_CLIENT] = re.findall(r"`grep '(client=.*?)'`", SECTION)
RECIPIENT = "Lost@B.Example"  # as the client writes it; the sender, who complains, writes it in another way


def ask(command: str, directory: Path) -> list[str]:
    """What a command prints, with the stand-ins of this directory."""
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == "", command
    return done.stdout.splitlines()


def write_logs(willi: Willi, directory: Path) -> None:
    """The log of this Willi as the journal and rsyslog would have it, among lines of others."""
    bare = [line.partition(" ")[2] for line in willi.text.splitlines()]
    (directory / "journal").write_text("".join(f"2026-11-22T18:34:55+0000 mx1 willi[8]: {line}\n" for line in bare))
    journalctl = directory / "journalctl"
    journalctl.write_text(f'#!/bin/sh\n[ "$*" = "-u willi -o short-iso" ] && cat {directory}/journal\n')
    journalctl.chmod(0o755)
    stamp = "2026-11-22T18:34:55.999999+00:00 mx1"
    others = [f"{stamp} postfix/smtp[7]: 1A: to=<{RECIPIENT}>, status=sent", f"{stamp} cron[9]: to={RECIPIENT}"]
    mail_log = [*others, *(f"{stamp} willi[8]: {line}" for line in bare)]
    (directory / "mail.log").write_text("".join(f"{line}\n" for line in mail_log))


@pytest.fixture
def log(start_willi: StartWilli, postfix: Postfix, tmp_path: Path) -> Willi:
    """One message that is looked for, one recipient of its session that is refused, and a session of another client."""
    willi = start_willi(csv=f"pattern;server;tls_verify\nb.example;{postfix.server};false\n")
    with greeted(willi, source="127.0.0.2") as client:
        deliver(client, b"RCPT TO:<someone@b.example>")
    with greeted(willi) as client:
        said = say(client, MAIL, b"RCPT TO:<someone@elsewhere.example>", b"RCPT TO:<%s>" % RECIPIENT.encode(), b"DATA")
        assert [one[:3] for one in said] == ["250", "554", "250", "354"]
        assert content(client).startswith("250")
    willi.wait_for_log(msg="Message accepted", to=RECIPIENT)
    write_logs(willi, tmp_path)
    return willi


@pytest.mark.parametrize("commands", [SYSTEMD, FILE, SYSLOG], ids=["systemd", "file", "syslog"])
def test_three_commands_lead_from_a_recipient_to_the_upstreams_log(
    log: Willi, postfix: Postfix, tmp_path: Path, commands: list[str]
):
    files = {"/var/log/willi.log": str(log.log_file), "/var/log/mail.log": f"{tmp_path}/mail.log"}
    first, second = commands
    for named, ours in files.items():
        first, second = first.replace(named, ours), second.replace(named, ours)
    [found] = ask(first.replace(r"ann@example\.org", RECIPIENT.lower().replace(".", r"\.")), tmp_path)
    line = parse_logfmt(found[found.index("lvl=") :])
    assert (line["msg"], line["upstream"]) == ("Message accepted", postfix.server)
    session = ask(second.replace("1WKQGJHCKL", line["sid"]), tmp_path)
    assert [re.findall(r'msg="([^"]*)"', one) for one in session] == [["Message rejected"], ["Message accepted"]]
    [queue_number] = re.findall(r"queued as (\w+)", line["reply"])
    third = ON_THE_UPSTREAM.replace("630A5212AF3", queue_number).replace("/var/log/mail.log", str(postfix.log_file))
    wait_until(lambda: any("status=sent" in one for one in ask(third, tmp_path)), "the delivery in Postfix's log")


def test_a_client_is_found_by_its_address(log: Willi, tmp_path: Path):
    by_client = FILE[0].replace(r" to=[^ ]*ann@example\.org", BY_CLIENT.replace(r"203\.0\.113\.7", r"127\.0\.0\.2"))
    found = ask(by_client.replace("/var/log/willi.log", str(log.log_file)), tmp_path)
    assert [parse_logfmt(line)["to"] for line in found] == ["someone@b.example"]


def test_a_table_above_a_database_that_stays_down_takes_over_with_a_reload(
    start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path
):
    database = {"type": "mysql", "host": f"{HOST}:{free_port()}", "query": "SELECT server FROM t WHERE pattern = ?"}
    willi = start_willi(mappings={"database": database})
    willi.tolerate("Database is down")
    with greeted(willi) as client:
        assert say(client, MAIL, BOB)[1].startswith("451")
    (tmp_path / "rows.csv").write_text(f"pattern;server\nb.example;{upstream.server}\n", encoding="utf-8")
    table = {"type": "csv", "file": str(tmp_path / "rows.csv")}
    willi.reload({"mappings": {"table": table, "database": database}})
    with greeted(willi) as client:
        assert deliver(client, BOB) == QUEUED
        assert say(client, MAIL, b"RCPT TO:<someone@elsewhere.example>")[1].startswith("451")
