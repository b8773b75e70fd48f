"""install.sh and the unit where systemd runs."""

from __future__ import annotations

import re
import socket
from functools import partial
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.dns import DnsServer
from tests.support.installation import (
    CONF,
    ETC,
    FIRST_WORDS,
    HOME,
    NEW,
    UPSTREAM_PORT,
    WHY_NOT,
    banner,
    configure,
    connect,
    drop_in,
    install,
    journal,
    next_commands,
    plain_words,
    send_message,
    show,
    upstream_on,
)  # fmt: skip
from tests.support.loopback import HOST, ROOT, wait_until
from tests.support.machine import Machine
from tests.support.mariadb import Mariadb
from tests.support.talk import EHLO, QUEUED, deliver

PEM = "/etc/ssl/private/mx.pem"
SOCKET = "/run/mysqld/mysqld.sock"


def restarts(machine: Machine) -> int:
    """How many times systemd has started it anew."""
    return int(show(machine, "NRestarts"))


def has_come_back(machine: Machine, before: int) -> bool:
    """systemd has started it anew since then, and it serves."""
    return restarts(machine) > before and show(machine, "ActiveState") == "active"


def test_with_systemd_a_first_install_leaves_no_failed_unit_and_the_journal_says_why(systemd, installed_with_systemd):
    said = installed_with_systemd.said
    assert plain_words(said) == FIRST_WORDS
    assert next_commands(said)[-1] == "systemctl start willi"
    assert systemd.run("systemctl", "is-enabled", "willi").strip() == "enabled"
    assert systemd.ask("systemctl", "is-active", "willi").stdout.strip() == "inactive"  # of this boot
    assert systemd.run("systemctl", "list-units", "--failed", "--quiet", "--plain", "willi.service") == ""
    assert journal(systemd) == WHY_NOT


@pytest.mark.parametrize("name", [f"{ETC}/upstream_servers.csv", "/etc/systemd/system/willi.service.d/own.conf"])
def test_with_systemd_a_configuration_that_is_lost_is_a_failure_and_no_first_install(systemd, name):
    systemd.write(name, "")
    systemd.run("systemctl", "daemon-reload")
    assert systemd.ask("systemctl", "start", "willi").returncode != 0
    assert show(systemd, "ActiveState") == "failed"
    assert journal(systemd).endswith(WHY_NOT)


def test_with_systemd_a_reload_that_failed_is_a_failure_of_systemctl(systemd):
    configure(systemd)
    systemd.run("systemctl", "start", "willi")
    systemd.run("systemctl", "reload", "willi")
    configure(systemd, listen="192.0.2.77:25")
    assert systemd.ask("systemctl", "reload", "willi").returncode != 0
    assert "cannot listen on 192.0.2.77:25: Cannot assign requested address" in journal(systemd)
    assert (show(systemd, "ActiveState"), banner(systemd)) == ("active", "220 mx.example ESMTP Willi")
    configure(systemd, domain="new.example")
    systemd.run("systemctl", "reload", "willi")
    assert banner(systemd) == "220 new.example ESMTP Willi"


def test_with_systemd_another_python_is_told_in_one_line_and_install_sh_again_helps(systemd):
    """What an upgrade of the system leaves: libraries for a Python that is not there any more."""
    configure(systemd)
    systemd.run("sh", "-c", f"cd {HOME}/venv/lib && mv python3.* python3.9")
    assert systemd.ask("systemctl", "start", "willi").returncode != 0
    [line, *more] = dict.fromkeys(journal(systemd).splitlines())
    assert (line, more) == (WHY_NOT.strip(), [line for line in more if "run install.sh of the release again" in line])
    assert len(more) == 1
    wait_until(lambda: show(systemd, "NRestarts") != "0", "another try")
    with upstream_on(systemd) as upstream:
        assert install(systemd, NEW).returncode == 0
        send_message(systemd, upstream)


def test_with_systemd_the_journal_says_where_a_mail_went(systemd):
    manual = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^    (journalctl .* (?:to|sid)=.*)$", manual, re.MULTILINE)
    configure(systemd)
    systemd.run("systemctl", "start", "willi")
    with upstream_on(systemd) as upstream:
        send_message(systemd, upstream)
    systemd.run("journalctl", "--sync")
    [line] = systemd.run("sh", "-c", first.replace(r"ann@example\.org", r"bob@b\.example")).splitlines()
    assert 'msg="Message accepted"' in line and "queued as 1234" in line
    [sid] = re.findall(r" sid=(\w+) ", line)
    assert systemd.run("sh", "-c", second.replace("1WKQGJHCKL", sid)).splitlines() == [line]


def test_with_systemd_uninstall_leaves_the_configuration(systemd):
    configure(systemd)
    systemd.run("systemctl", "start", "willi")
    systemd.run(f"{HOME}/install.sh", "--uninstall")
    assert [path.name for path in systemd.path(HOME).iterdir()] == ["etc"]
    assert systemd.processes("willi.py") == []
    assert show(systemd, "LoadState") == "not-found"
    assert systemd.run("find", "/etc/systemd", "-name", "willi*") == ""


def test_a_master_that_hangs_or_dies_is_replaced(systemd):
    configure(systemd)
    drop_in(systemd, "WatchdogSec=3s")
    with upstream_on(systemd) as upstream:
        systemd.run("systemctl", "start", "willi")
        for name in ("STOP", "KILL"):
            before = restarts(systemd)  # a slow machine may have had one of its own
            systemd.run("sh", "-c", f"kill -{name} {show(systemd, 'MainPID')}")
            wait_until(partial(has_come_back, systemd, before), f"the restart after {name}")
            send_message(systemd, upstream)


def test_a_port_that_is_taken_is_tried_again_until_it_is_free(systemd):
    configure(systemd)
    with systemd.host.inside():
        taken = socket.create_server(("", 25))
    with taken:
        assert systemd.ask("systemctl", "start", "willi").returncode != 0
        assert "cannot listen on 0.0.0.0:25" in journal(systemd)
    wait_until(lambda: show(systemd, "ActiveState") == "active", "Willi at its port", 60)


def test_a_table_that_is_missing_at_the_start_is_waited_for(systemd):
    """As at a boot, when its file system is mounted late."""
    table = f"{ETC}/map.csv"
    configure(systemd, mappings={"csv": {"type": "csv", "file": table}})
    assert systemd.ask("systemctl", "start", "willi").returncode != 0
    assert f"cannot read {table}: No such file or directory" in journal(systemd)
    systemd.write(table, "pattern;server\nb.example;127.0.0.1\n")
    wait_until(lambda: show(systemd, "ActiveState") == "active", "Willi with its table", 60)
    assert show(systemd, "NFileDescriptorStore") != "0"
    systemd.path(table).unlink()
    assert systemd.ask("systemctl", "restart", "willi").returncode != 0
    wait_until(lambda: show(systemd, "NFileDescriptorStore") == "0", "clients to be refused, and not to wait")
    assert show(systemd, "ActiveState") == "activating"  # it is tried again


def test_check_names_a_file_that_the_sandbox_hides(systemd):
    table = systemd.write("/home/ann/table.csv", f"pattern;server\nb.example;{HOST}\n")
    table.parent.chmod(0o755)
    configure(systemd, dns_timeout="1s", mappings={"table": {"type": "csv", "file": "/home/ann/table.csv"}})
    said = systemd.ask("runuser", "-u", "willi", "-g", "willi", "--", f"{HOME}/willi.py", "check").stdout
    assert "ok     csv:/home/ann/table.csv: 1 pattern" in said
    assert "warn   /home/ann/table.csv: systemd hides /home from the service" in said
    said = systemd.run(f"{HOME}/willi.py", "check", "--quick", "-c", CONF)
    assert said.startswith("warn   user: not set: ") and said.endswith("Willi would start\n")
    assert systemd.ask("systemctl", "start", "willi").returncode != 0
    assert "cannot read /home/ann/table.csv: Permission denied" in journal(systemd)


def test_in_its_sandbox_willi_reaches_a_database_socket_syslog_the_dns_and_keys_of_a_group(
    start_machine, installed_with_systemd, mariadb: Mariadb, certificates: Authority, tmp_path
):
    """All that the unit's hardening could be in the way of."""
    machine = start_machine(*installed_with_systemd.layers, boot=True, more={mariadb.socket: SOCKET})
    with machine.host.inside():
        dns = DnsServer(tmp_path)
    machine.write("/etc/resolv.conf", (tmp_path / "resolv.conf").read_text())
    dns.zone["mail.b.example"] = {"A": [HOST]}
    pair = certificates.issue("mx.example")
    machine.run("groupadd", "ssl-cert")
    machine.run("install", "-d", "-m", "710", "-g", "ssl-cert", "/etc/ssl/private")
    machine.write(PEM, Path(pair.cert).read_text() + Path(pair.key).read_text(), 0o640)
    machine.run("chgrp", "ssl-cert", PEM)
    drop_in(machine, "SupplementaryGroups=ssl-cert")
    database = mariadb.mapping(
        mariadb.table(("b.example", f"mail.b.example:{UPSTREAM_PORT}", False)), unix_socket=SOCKET
    )
    configure(machine, log="syslog", tls_cert=PEM, tls_key=PEM, mappings={"database": database})
    machine.run("systemctl", "start", "willi")
    with upstream_on(machine) as upstream, connect(machine) as client:
        assert client.read_reply().code == 220
        assert client.command(EHLO).code == 250
        assert client.starttls().code == 220
        assert client.command(EHLO).code == 250
        assert deliver(client) == QUEUED
        assert len(upstream.messages) == 1
    dns.stop()
    machine.run("journalctl", "--sync")
    assert "msg=Ready" in machine.run("journalctl", "--output=cat", "--no-pager", "_TRANSPORT=syslog")
