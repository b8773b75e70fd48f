"""install.sh where Willi runs already."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.support.examples import THOROUGH
from tests.support.installation import (
    CONF,
    ETC,
    INIT,
    LOG,
    NEW,
    OLD,
    PID_FILE,
    QUICK_PYTHON,
    UNPACKED,
    configure,
    connect,
    copy_broken_release,
    install,
    nothing_but_one_release,
    send_message,
    show,
    upstream_on,
    version_on,
)  # fmt: skip
from tests.support.loopback import ROOT, wait_until
from tests.support.machine import RUNNING, Machine
from tests.support.talk import EHLO, MAIL
from tests.support.traffic import CONNECT, Traffic

INTERRUPTED = "install.sh: interrupted. What runs and what is installed is as it was."
NOT_NOW = "install.sh: the service is being replaced, which cannot be left half done. Please wait.\n"
SENDERS = 4 if THOROUGH else 2


def traffic(machine: Machine, name: str) -> Traffic:
    return Traffic(name, [partial(connect, machine)] * SENDERS)


def none_was_refused(senders: Traffic) -> bool:
    """Every connection got an answer; a 421 of a Willi that drains is one."""
    return [one for one in senders.failed if one.stage == CONNECT and not one.answer] == []


def test_an_upgrade_replaces_the_program_and_nothing_that_is_the_users(machine):
    configure(machine, max_recipients=7)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        pid = machine.path(PID_FILE).read_text()
        machine.write(f"{ETC}/upstream_servers.csv", "pattern;server\n")
        machine.path(f"{CONF}.example").write_text("from before")
        conf = machine.path(CONF).read_text()
        done = install(machine, NEW)
        assert done.returncode == 0, done.stdout + done.stderr
        assert version_on(machine) == f"willi {NEW}"
        assert machine.path(PID_FILE).read_text() != pid
        assert "It is running." in done.stdout and "will not start" not in done.stdout
        send_message(machine, upstream)
    assert machine.path(CONF).read_text() == conf
    assert machine.path(f"{ETC}/upstream_servers.csv").read_text() == "pattern;server\n"
    assert machine.path(f"{CONF}.example").read_text() == (ROOT / "etc" / "willi.conf.example").read_text()
    assert nothing_but_one_release(machine)


def test_a_configuration_that_cannot_be_used_is_refused_and_the_old_willi_goes_on(machine):
    configure(machine)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        pid = machine.path(PID_FILE).read_text()
        configure(machine, mappings={"file": {"type": "csv", "file": "lost.csv"}}, read_timeout="5m")
        done = install(machine, NEW)
        assert done.returncode == 1
        assert f"{ETC}/lost.csv" in done.stderr

        configure(machine, listen="192.0.2.77:25")  # nobody's: neither of them could start with it
        done = install(machine, NEW)
        assert done.returncode == 1
        assert "cannot listen on 192.0.2.77:25: Cannot assign requested address" in done.stderr

        # As an editor leaves it under umask 077: neither the new Willi nor the old one could start with it.
        configure(machine)
        machine.run("chown", "root:root", CONF)
        machine.run("chmod", "600", CONF)
        for done in (install(machine, NEW), machine.ask(INIT, "restart")):
            assert done.returncode == 1
            assert f"{CONF}: cannot read it: Permission denied" in done.stderr + done.stdout
        assert version_on(machine) == f"willi {OLD}"
        assert machine.path(PID_FILE).read_text() == pid
        send_message(machine, upstream)
    assert nothing_but_one_release(machine)


def test_a_release_that_does_not_start_makes_way_for_the_old_one(machine):
    configure(machine)
    broken = copy_broken_release(machine)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        done = install(machine, broken)
        assert done.returncode == 1
        assert "this release cannot start" in done.stderr
        assert f"willi {NEW} was thrown away" in done.stderr
        assert version_on(machine) == f"willi {OLD}"
        send_message(machine, upstream)
    assert nothing_but_one_release(machine)


def test_an_upgrade_that_is_killed_leaves_the_old_willi_and_the_next_one_clears_up(machine):
    configure(machine)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        for number in (signal.SIGTERM, signal.SIGKILL):
            killer = f'case $* in *venv\\ /*) kill -{number.value} $PPID; exit ;; esac\nexec /usr/bin/python3 "$@"\n'
            machine.write("/usr/local/bin/killer", f"#!/bin/sh\n{killer}", 0o755)
            done = install(machine, NEW, PYTHON="/usr/local/bin/killer")
            assert done.returncode != 0
            assert number == signal.SIGKILL or done.stderr.splitlines()[-1] == INTERRUPTED
            assert version_on(machine) == f"willi {OLD}"
            send_message(machine, upstream)
            assert nothing_but_one_release(machine) == (number == signal.SIGTERM)
        assert install(machine, NEW).returncode == 0
        send_message(machine, upstream)
    assert version_on(machine) == f"willi {NEW}"
    assert nothing_but_one_release(machine)


# $1: the installation, $2: Willi's log, $3: what is said on stderr.
INTERRUPT_WHILE_IT_DRAINS = """
"$1" 2>"$3" & job=$!
until grep -q msg=Draining "$2"; do sleep 0.1; done
kill -TERM $job
wait $job
"""


def test_an_upgrade_says_what_it_waits_for_and_ends_well_if_it_is_interrupted_then(machine):
    """Here /opt/willi is a symlink, too."""
    configure(machine, drain_timeout="5m")
    machine.run("mv", "/opt/willi", "/opt/data")
    machine.run("ln", "-s", "/opt/data", "/opt/willi")
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        with ThreadPoolExecutor() as beside, connect(machine) as client:
            assert client.read_reply().code == 220
            assert client.command(EHLO).code == 250
            assert client.command(MAIL).code == 250  # in a transaction: the old Willi waits for its end
            said = machine.write("/root/said", "")
            new = f"{UNPACKED}/willi-{NEW}/install.sh"
            command = ["bash", "-c", INTERRUPT_WHILE_IT_DRAINS, "bash", new, LOG, "/root/said"]
            installing = beside.submit(machine.ask, *command, environment={"PYTHON": QUICK_PYTHON})
            wait_until(lambda: NOT_NOW in said.read_text() or installing.done(), NOT_NOW, RUNNING)
            client.close()
            done = installing.result()
        assert done.returncode == 0, done.stdout + said.read_text()
        assert "What has begun is finished first, for up to drain_timeout" in done.stdout
        assert NOT_NOW in said.read_text()
        assert "It is running." in done.stdout
        send_message(machine, upstream)
        machine.run(INIT, "restart")
        send_message(machine, upstream)
    assert version_on(machine) == f"willi {NEW}"


# The same where systemd runs


def test_with_systemd_no_client_is_refused_by_reloads_restarts_and_upgrades(systemd):
    configure(systemd, workers=2)
    with upstream_on(systemd) as upstream:
        systemd.run("systemctl", "start", "willi")
        assert show(systemd, "ActiveState") == "active"
        with traffic(systemd, "senders") as senders:
            for command in (["reload"], ["restart"], ["restart"], ["reload"]):
                senders.wait_for_more(20)
                systemd.run("systemctl", *command, "willi")
            senders.wait_for_more(20)
            pid = show(systemd, "MainPID")
            done = install(systemd, NEW)
            assert done.returncode == 0, done.stdout + done.stderr
            senders.wait_for_more(20)
        senders.check(upstream)
    assert none_was_refused(senders)
    assert show(systemd, "MainPID") != pid
    assert version_on(systemd) == f"willi {NEW}"
    assert nothing_but_one_release(systemd)


def test_with_systemd_a_release_that_does_not_start_makes_way_for_the_old_one(systemd):
    configure(systemd)
    broken = copy_broken_release(systemd)
    with upstream_on(systemd) as upstream:
        systemd.run("systemctl", "start", "willi")
        done = install(systemd, broken)
        assert done.returncode == 1
        assert "this release cannot start" in done.stderr
        assert f"willi {NEW} was thrown away" in done.stderr
        send_message(systemd, upstream)
    assert version_on(systemd) == f"willi {OLD}"
    assert nothing_but_one_release(systemd)


def test_with_systemd_a_willi_that_was_stopped_stays_so_and_one_that_was_changed_is_kept(systemd):
    configure(systemd)
    systemd.run("systemctl", "start", "willi")
    systemd.run("systemctl", "disable", "--now", "willi")
    systemd.write("/etc/systemd/system/willi.service", "[Service]\nExecStart=/bin/true\n")
    said = install(systemd, NEW)
    assert said.returncode == 0
    assert "It was stopped, and stays so. To start it: systemctl start willi" in said.stdout
    assert show(systemd, "ActiveState") == "inactive"
    assert show(systemd, "UnitFileState") == "disabled"
    assert systemd.path(f"{ETC}/willi.service.old").read_text() == "[Service]\nExecStart=/bin/true\n"
    assert systemd.path("/etc/systemd/system/willi.service").read_text() == (ROOT / "etc/willi.service").read_text()
