"""install.sh on a Debian without systemd: the first time, and what the init script does."""

from __future__ import annotations

import re
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.check import NOBODY
from tests.support.installation import (
    CONF,
    ETC,
    FIRST_WORDS,
    HOME,
    INIT,
    LOG,
    NEW,
    OLD,
    PID_FILE,
    UNPACKED,
    WHY_NOT,
    banner,
    configure,
    install,
    next_commands,
    plain_words,
    send_message,
    upstream_on,
)  # fmt: skip
from tests.support.loopback import ROOT, wait_until
from tests.support.machine import Layers, Machine
from tests.support.talk import reply

# The first time


def test_a_first_install_says_what_to_copy_and_the_log_why_willi_does_not_run(machine, installed):
    assert machine.path(LOG).read_text() == WHY_NOT
    assert plain_words(installed.said) == FIRST_WORDS
    assert f"cp -p {CONF}.example {CONF}" in next_commands(installed.said)
    assert machine.ask(INIT, "status").returncode == 3
    assert [path.name[3:] for path in machine.path("/etc/rc2.d").glob("S*willi")] == ["willi"]  # it starts at boot


def test_the_commands_that_install_sh_proposes_lead_to_a_running_willi(machine, installed):
    *copy, check, start = next_commands(installed.said)
    with upstream_on(machine) as upstream:
        for command in copy:
            machine.run("sh", "-c", command)
        edited = "domain = mx.example\n[mappings]\n[[file]]\ntype = csv\nfile = upstream_servers.csv\n"
        machine.path(CONF).write_text(edited)  # keeps owner and mode, as an editor does
        machine.path(f"{ETC}/upstream_servers.csv").write_text(f"pattern;server\nb.example;{upstream.server}\n")
        upstream.answers[NOBODY] = reply("454 4.7.1 Relay access denied")
        assert f"ok     csv:{ETC}/upstream_servers.csv: 1 pattern" in machine.run("sh", "-c", check)
        machine.run("sh", "-c", start)
        send_message(machine, upstream)


def test_owners_and_modes_do_not_depend_on_the_umask_of_root(machine):
    listed = machine.run("stat", "--format", "%A %U:%G %n", ETC, f"{ETC}/willi.conf.example", LOG, f"{HOME}/willi.py")
    assert listed.splitlines() == [
        f"drwxr-s--- root:willi {ETC}",
        f"-rw-r----- root:willi {ETC}/willi.conf.example",
        f"-rw-r----- root:adm {LOG}",
        f"lrwxrwxrwx root:root {HOME}/willi.py",
    ]
    closed = r"\( ! -perm -o=r -o ! -user root \)"
    assert machine.run("sh", "-c", rf"find -L {HOME} -path {ETC} -prune -o {closed} -print") == ""
    account = machine.run("getent", "passwd", "willi").strip().split(":")
    assert account[5:] == ["/nonexistent", "/usr/sbin/nologin"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        pytest.param(("setpriv", "--reuid=65534", "--clear-groups"), "must be run as root", id="not root"),
        pytest.param(("env", "PYTHON=/usr/bin/python2"), "PYTHON=/usr/bin/python2 is no program", id="no Python"),
        pytest.param(("env", "PYTHON=/usr/local/bin/python3.9"), "is Python 3.9, and Willi needs 3.10", id="too old"),
        pytest.param(("env", "PYTHON=/root/python3"), "can be run by root only", id="of root alone"),
        pytest.param((), "apt-get install python{version}-venv", id="no venv"),
        pytest.param(
            ("sh", "-c", f"cd {UNPACKED}; export CDPATH=.; exec willi-{OLD}/install.sh"),
            "python{version}-venv",
            id="CDPATH",
        ),
    ],
)
def test_what_is_missing_is_told_before_anything_is_changed(python_troubles, how, words):
    version = python_troubles.run("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2], end='')")
    done = python_troubles.ask(*how, f"{UNPACKED}/willi-{OLD}/install.sh")
    assert done.returncode == 1
    assert words.format(version=version) in done.stderr
    assert not python_troubles.path(HOME).exists()
    assert python_troubles.ask("getent", "passwd", "willi").returncode != 0


@pytest.fixture(scope="module")
def python_troubles(layers: Layers, without_systemd: tuple[Path, ...], releases: Path) -> Iterator[Machine]:
    """No venv, a Python that is old, and one that only root can run."""
    with layers.change(layers.directory("layer"), *without_systemd, binds={releases: UNPACKED}) as machine:
        packages = machine.run("dpkg-query", "--show", "--showformat=${Package} ", "python3*-venv").split()
        machine.run("dpkg", "--purge", *packages)
        old = '#!/bin/sh\nexec /usr/bin/python3 -I -c "import sys; sys.version_info = 3, 9; exec(sys.argv[1])" "$3"\n'
        machine.write("/usr/local/bin/python3.9", old, 0o755)
        machine.run("cp", "-L", "/usr/bin/python3", "/root/python3")
        yield machine


def test_the_account_of_a_person_is_not_taken(start_machine, without_systemd):
    machine = start_machine(*without_systemd)
    machine.run("useradd", "--create-home", "--shell", "/bin/sh", "willi")
    done = install(machine, OLD)
    assert done.returncode == 1
    assert "the user willi can log in" in done.stderr
    assert not machine.path(HOME).exists()


def test_without_wheels_it_asks_the_network_and_leaves_nothing_if_there_is_none(start_machine, without_systemd):
    machine = start_machine(*without_systemd)
    machine.run("sh", "-c", f"cp -R {UNPACKED}/willi-{OLD} /root/copy; rm -r /root/copy/wheels")
    done = install(machine, "/root/copy", PIP_RETRIES="0", LACKING="gevent")
    assert done.returncode == 1
    assert "The release has no wheels for Python" in done.stdout
    assert not machine.path(HOME).exists()


def test_a_wheel_that_is_broken_is_named_and_nothing_is_left(start_machine, without_systemd):
    machine = start_machine(*without_systemd)
    machine.run("sh", "-c", f"cp -R {UNPACKED}/willi-{OLD} /root/copy; truncate -s 100 /root/copy/wheels/gevent-*")
    done = install(machine, "/root/copy", PIP_RETRIES="0", LACKING="gevent")
    assert done.returncode == 1
    assert "pip could not install the wheels of the release" in done.stderr
    assert "gevent-" in done.stderr and "is invalid" in done.stderr
    assert not machine.path(HOME).exists()


def test_who_may_not_see_the_configuration_is_told_so_and_not_that_there_is_none(machine):
    configure(machine)
    done = machine.ask("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"{HOME}/willi.py", "top")
    assert (done.returncode, done.stderr) == (1, f"{CONF}: cannot read it: Permission denied\n")


def test_on_a_file_system_without_programs_it_says_so_and_changes_nothing(start_machine, without_systemd):
    machine = start_machine(*without_systemd)
    machine.run("mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", "/opt")
    done = install(machine, OLD)
    assert done.returncode == 1
    assert "no program can run in /opt/willi: its file system is mounted noexec" in done.stderr
    assert "mount -o remount,exec /opt" in done.stderr
    assert not machine.path(HOME).exists()


# The init script


def test_the_init_script_runs_willi_without_any_right_but_low_ports(machine):
    configure(machine)
    machine.run(INIT, "start")
    pid = machine.path(PID_FILE).read_text().strip()
    status = machine.path(f"/proc/{pid}/status").read_text()
    willi = machine.run("id", "--user", "willi").strip()
    assert re.search(rf"^Uid:\s+{willi}\s+{willi}\s+{willi}\s+{willi}$", status, re.MULTILINE)
    assert set(re.findall(r"^Cap\w+:\s+(\w+)$", status, re.MULTILINE)) == {f"{1 << 10:016x}"}  # CAP_NET_BIND_SERVICE


def test_the_init_script_knows_whether_willi_runs(machine):
    configure(machine)
    assert machine.ask(INIT, "status").returncode == 3
    machine.run(INIT, "start")
    pid = machine.path(PID_FILE).read_text()
    machine.run(INIT, "start")  # once more does nothing
    assert machine.path(PID_FILE).read_text() == pid
    assert machine.ask(INIT, "status").returncode == 0
    machine.run("sh", "-c", f"kill -KILL {pid}")
    wait_until(lambda: machine.ask(INIT, "status").returncode == 1, "status to see a dead Willi")
    wait_until(lambda: not machine.processes("willi.py"), "the end of the workers, whose master is dead")
    machine.write(PID_FILE, "1\n")  # the number belongs to somebody else by now
    assert machine.ask(INIT, "status").returncode == 1
    machine.run(INIT, "start")
    machine.run(INIT, "stop")
    assert machine.ask(INIT, "status").returncode == 3
    assert machine.processes("willi.py") == []
    machine.run(INIT, "stop")  # once more is no fault


def test_a_start_that_fails_says_why_on_the_terminal(machine):
    configure(machine)
    with machine.host.inside():
        taken = socket.create_server(("", 25))
    with taken:
        done = machine.ask(INIT, "start")
    assert done.returncode == 1
    assert "cannot listen on 0.0.0.0:25" in done.stderr
    machine.run(INIT, "start")


def test_reload_and_restart_keep_the_old_willi_if_there_is_a_fault_in_the_file(machine):
    configure(machine)
    machine.run(INIT, "start")
    pid = machine.path(PID_FILE).read_text()
    configure(machine, read_timeot="5m")
    for action in ("reload", "force-reload", "restart"):
        done = machine.ask(INIT, action)
        assert done.returncode == 1
        assert "read_timeot: unknown key; did you mean 'read_timeout'?" in done.stderr
    configure(machine, listen="192.0.2.77:25")  # nobody's, and the file has no fault
    done = machine.ask(INIT, "reload")
    assert done.returncode == 1
    assert "Willi was left as it is:\ncannot listen on 192.0.2.77:25" in done.stderr
    configure(machine, domain="new.example")
    assert banner(machine) == "220 mx.example ESMTP Willi"
    machine.run(INIT, "reload")
    wait_until(lambda: banner(machine) == "220 new.example ESMTP Willi", "the new file in force")
    assert machine.path(PID_FILE).read_text() == pid


def test_logrotate_does_not_part_willi_from_its_log(machine):
    configure(machine)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        machine.run("logrotate", "--force", "/etc/logrotate.d/willi")
        assert "msg=Ready" in machine.path(f"{LOG}.1").read_text()
        send_message(machine, upstream)
    wait_until(lambda: 'msg="Message accepted"' in machine.path(LOG).read_text(), "the line of a message")
    assert "msg=Ready" not in machine.path(LOG).read_text()


def test_the_commands_of_the_readme_lead_from_the_two_files_to_a_running_willi(machine):
    """Those of the installation are the first thing that `installed` does."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"^(    cat .*\n(?:    .*\n)+)", readme, re.MULTILINE)
    commands = textwrap.dedent(commands).replace("systemctl start willi", f"{INIT} start")
    machine.run("sh", "-euc", f"umask 077\n{commands}")
    assert banner(machine) == "220 mx.example.org ESMTP Willi"
    [check] = re.findall(r"^    (runuser .*)$", readme, re.MULTILINE)
    done = machine.ask("sh", "-c", check)  # whose mail.example.org this machine cannot find
    assert done.stdout.splitlines()[0] == f"ok     {CONF}: mappings: 1, domain mx.example.org"
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert [line for line in wrong if "DNS" not in line and "mail.example.org" not in line] == []


def test_the_installed_copy_of_install_sh_does_not_upgrade_from_itself(machine):
    done = machine.ask(f"{HOME}/install.sh")
    assert done.returncode == 1
    assert "run install.sh of an unpacked release" in done.stderr


def test_uninstall_leaves_the_configuration_for_the_next_install(machine):
    configure(machine)
    machine.run(INIT, "start")
    conf = machine.path(CONF).read_text()
    for _ in range(2):  # a second time is no fault
        machine.run("sh", "-c", f"[ ! -e {HOME}/install.sh ] || {HOME}/install.sh --uninstall")
        install(machine, OLD, "--uninstall").check_returncode()
        assert [path.name for path in machine.path(HOME).iterdir()] == ["etc"]
    assert machine.path(CONF).read_text() == conf
    assert machine.processes("willi.py") == []
    assert machine.run("find", "/etc", "-name", "*willi", "-not", "-path", f"{ETC}/*") == ""
    machine.run("getent", "passwd", "willi")
    with upstream_on(machine) as upstream:
        install(machine, NEW).check_returncode()
        send_message(machine, upstream)
