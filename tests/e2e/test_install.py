"""install.sh of a real release on Debian systems of its own, where systemd runs and where it does not.

The systems have no network: neither is one needed, nor could a test do harm by it.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import show_on_failure
from tests.support import old_program
from tests.support.certificates import Authority
from tests.support.check import NOBODY
from tests.support.client import Client
from tests.support.daemon import Setting, write_config
from tests.support.dns import DnsServer
from tests.support.loopback import HOST, ROOT, need, wait_until
from tests.support.machine import Layers, Machine
from tests.support.machine import debian as make_debian
from tests.support.mariadb import Mariadb
from tests.support.release import build_release
from tests.support.talk import EHLO, MAIL, QUEUED, deliver, reply
from tests.support.traffic import CONNECT, Traffic
from tests.support.upstream import ScriptedUpstream

OLD, NEW = "1.0.0", "1.0.1"
UNPACKED = "/srv"  # where machines find the releases
HOME = "/opt/willi"
ETC = f"{HOME}/etc"
CONF = f"{ETC}/willi.conf"
INIT = "/etc/init.d/willi"
LOG = "/var/log/willi.log"
PID_FILE = "/run/willi.pid"
WHY_NOT = f"{CONF}: cannot read it: No such file or directory\n"
FIRST_WORDS = [f"willi {OLD} is installed in {HOME}.", f"It does not run yet, since there is no {CONF}. Next:"]
INTERRUPTED = "install.sh: interrupted. What runs and what is installed is as it was."
NOT_NOW = "install.sh: the service is being replaced, which cannot be left half done. Please wait.\n"
BROKEN_RELEASE = "\ndef run(*_: object, **__: object) -> None:\n    raise Unusable('this release cannot start')\n"
SENDERS = 4
UPSTREAM_PORT = 2525
SOCKET = "/run/mysqld/mysqld.sock"
PEM = "/etc/ssl/private/mx.pem"

StartMachine = Callable[..., Machine]
Answer = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Installed:
    """A system on which install.sh has just run for the first time."""

    layers: tuple[Path, ...]
    said: str


# What all tests share: it takes a while


@pytest.fixture(scope="module")
def layers() -> Iterator[Layers]:
    kept = Layers()
    yield kept
    kept.remove()


@pytest.fixture(scope="module")
def releases(layers: Layers) -> Path:
    """A directory with two releases of this tree, as `make release` builds them, unpacked."""
    need("git", "make", "gzip")
    unpacked = layers.directory("releases")
    for version in (OLD, NEW):
        tarball = build_release(layers.directory("source") / version, tag=f"v{version}")
        subprocess.run(["tar", "--extract", "--file", tarball, "--directory", unpacked], check=True)
    shutil.copytree(tarball.parent, unpacked / "built", ignore=shutil.ignore_patterns("wheels"))  # of NEW
    return unpacked


@pytest.fixture(scope="module")
def debian(layers: Layers) -> Path:
    """A small Debian with Python."""
    return make_debian()


@pytest.fixture(scope="module")
def without_systemd(layers: Layers, debian: Path) -> tuple[Path, ...]:
    """The same as a container has it."""
    with layers.change(debian) as (machine, layer):
        machine.run("dpkg", "--purge", "--force-depends", "--force-remove-protected", "systemd-sysv", "systemd")
        return debian, layer


@pytest.fixture(scope="module")
def installed(layers: Layers, without_systemd: tuple[Path, ...], releases: Path) -> Installed:
    """By a root who lets nobody read his files, where no program has an init script yet (Debian 13 in a container)."""
    with layers.change(*without_systemd, binds={releases: UNPACKED}) as (machine, layer):
        machine.run("rm", "-rf", "/etc/init.d")
        assert machine.ask("sh", "-c", "command -v cc gcc make").stdout == ""
        assert machine.run("cat", "/proc/net/route").count("\n") == 1  # the heading
        said = machine.run("sh", "-c", f"umask 077; {UNPACKED}/willi-{OLD}/install.sh 2>&1")
    return Installed((*without_systemd, layer), said)


@pytest.fixture(scope="module")
def installed_with_systemd(layers: Layers, debian: Path, releases: Path) -> Installed:
    """After the Go program, whose installer made an account without a group."""
    with layers.change(debian, boot=True, binds={releases: UNPACKED}) as (machine, layer):
        machine.run("useradd", "--system", "--gid=nogroup", "--no-create-home", "--shell=/usr/sbin/nologin", "willi")
        machine.run("install", "-d", "-o", "willi", ETC)
        said = machine.run("sh", "-c", f"{UNPACKED}/willi-{OLD}/install.sh 2>&1")
    return Installed((debian, layer), said)


# What each test has for itself


@pytest.fixture
def start_machine(request: pytest.FixtureRequest, layers: Layers, releases: Path) -> Iterator[StartMachine]:
    """start_machine(*layers, boot=False, binds=None): it finds the releases in UNPACKED."""
    with ExitStack() as ends:

        def start(*below: Path, boot: bool = False, binds: Mapping[Path, str] | None = None) -> Machine:
            machine = Machine(layers, below, boot=boot, binds={releases: UNPACKED, **(binds or {})})
            ends.callback(machine.stop)
            show_on_failure(request, "console", machine.console)
            show_on_failure(request, "log", machine.path(LOG))
            return machine

        yield start


@pytest.fixture
def machine(start_machine: StartMachine, installed: Installed) -> Machine:
    """Without systemd; Willi is installed and has no configuration."""
    return start_machine(*installed.layers)


@pytest.fixture
def systemd(start_machine: StartMachine, installed_with_systemd: Installed) -> Machine:
    """With systemd; Willi is installed and has no configuration."""
    return start_machine(*installed_with_systemd.layers, boot=True)


@contextmanager
def upstream_on(machine: Machine) -> Iterator[ScriptedUpstream]:
    with machine.host.inside():
        upstream = ScriptedUpstream(UPSTREAM_PORT)
    try:
        yield upstream
    finally:
        upstream.stop()


def install(machine: Machine, version: str, *arguments: str, **environment: str) -> Answer:
    return machine.ask(f"{UNPACKED}/willi-{version}/install.sh", *arguments, environment=environment)


def configure(machine: Machine, **settings: Setting) -> None:
    """A willi.conf that sends all mail to `upstream_on` the machine."""
    route: dict[str, Setting] = {"type": "static", "server": f"{HOST}:{UPSTREAM_PORT}", "tls_verify": False}
    defaults: dict[str, Setting] = {"domain": "mx.example", "workers": 2, "drain_timeout": "5s"}
    write_config(machine.path(CONF), {**defaults, "mappings": {"all": route}, **settings})
    machine.run("chgrp", "willi", CONF)
    machine.run("chmod", "640", CONF)


def connect(machine: Machine) -> Client:
    with machine.host.inside():
        return Client(25)


def banner(machine: Machine) -> str:
    with connect(machine) as client:
        return str(client.read_reply())


def send_message(machine: Machine, upstream: ScriptedUpstream) -> None:
    """One that must be accepted."""
    already = len(upstream.messages)
    with connect(machine) as client:
        assert client.read_reply().code == 220
        assert client.command(EHLO).code == 250
        assert deliver(client) == QUEUED
    assert upstream.wait_for_message(already).recipients == (b"bob@b.example",)


def version_on(machine: Machine) -> str:
    return machine.run(f"{HOME}/venv/bin/python", f"{HOME}/willi.py", "--version").strip()


def next_commands(said: str) -> list[str]:
    """Those that install.sh proposes at its end."""
    return [line.strip() for line in said.splitlines() if line.startswith("    ") and not line.startswith("    edit")]


def plain_words(said: str) -> list[str]:
    """All else that it says after "Building in ...", faults included."""
    return [line for line in said.splitlines()[1:] if not line.startswith("    ")]


def traffic(machine: Machine, name: str) -> Traffic:
    return Traffic(name, [partial(connect, machine)] * SENDERS)


def none_was_refused(senders: Traffic) -> bool:
    """Every connection got an answer; a 421 of a Willi that drains is one."""
    return [one for one in senders.failed if one.stage == CONNECT and not one.answer] == []


def nothing_but_one_release(machine: Machine) -> bool:
    """No remains of an upgrade, whatever became of it."""
    names = sorted(path.name for path in machine.path(HOME).iterdir())
    linked = ["install.sh", "venv", "willi.init", "willi.py", "willi.service", "willi_lib"]
    releases = list(machine.path(f"{HOME}/releases").iterdir())
    return names == sorted(["current", "etc", "releases", *linked]) and len(releases) == 1


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
    with layers.change(*without_systemd, binds={releases: UNPACKED}) as (machine, _):
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
    machine.run("sh", "-c", f"cp -R {UNPACKED}/willi-{OLD} /root/willi; rm -r /root/willi/wheels")
    done = machine.ask("/root/willi/install.sh", environment={"PIP_RETRIES": "0"})
    assert done.returncode == 1
    assert "The release has no wheels for Python" in done.stdout
    assert not machine.path(HOME).exists()


def test_a_wheel_that_is_broken_is_named_and_nothing_is_left(start_machine, without_systemd):
    machine = start_machine(*without_systemd)
    machine.run("sh", "-c", f"cp -R {UNPACKED}/willi-{OLD} /root/willi; truncate -s 100 /root/willi/wheels/gevent-*")
    done = machine.ask("/root/willi/install.sh", environment={"PIP_RETRIES": "0"})
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


# Upgrades


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


def test_an_upgrade_that_cannot_use_the_configuration_is_refused_and_the_old_willi_goes_on(machine):
    configure(machine)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        pid = machine.path(PID_FILE).read_text()
        configure(machine, mappings={"file": {"type": "csv", "file": "lost.csv"}}, read_timeout="5m")
        done = install(machine, NEW)
        assert done.returncode == 1
        assert f"{ETC}/lost.csv" in done.stderr
        assert version_on(machine) == f"willi {OLD}"
        assert machine.path(PID_FILE).read_text() == pid
        send_message(machine, upstream)
    assert nothing_but_one_release(machine)


def test_a_configuration_that_only_root_can_read_is_refused_while_the_old_willi_still_runs(machine):
    """As an editor leaves it under umask 077: neither the new Willi nor the old one could start with it."""
    configure(machine)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        machine.run("chown", "root:root", CONF)
        machine.run("chmod", "600", CONF)
        for done in (install(machine, NEW), machine.ask(INIT, "restart")):
            assert done.returncode == 1
            assert f"{CONF}: cannot read it: Permission denied" in done.stderr + done.stdout
        assert version_on(machine) == f"willi {OLD}"
        send_message(machine, upstream)


def test_opt_willi_may_be_a_symlink(machine):
    configure(machine)
    machine.run("mv", "/opt/willi", "/opt/data")
    machine.run("ln", "-s", "/opt/data", "/opt/willi")
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        done = install(machine, NEW)
        assert done.returncode == 0, done.stdout + done.stderr
        machine.run(INIT, "restart")
        assert version_on(machine) == f"willi {NEW}"
        send_message(machine, upstream)


def test_a_release_that_does_not_start_makes_way_for_the_old_one(machine):
    configure(machine)
    machine.run("cp", "-R", f"{UNPACKED}/willi-{NEW}", "/root/willi")
    with machine.path("/root/willi/willi_lib/processes/master.py").open("a") as master:
        master.write(BROKEN_RELEASE)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        done = machine.ask("/root/willi/install.sh")
        assert done.returncode == 1
        assert "this release cannot start" in done.stderr
        assert f"willi {NEW} was thrown away" in done.stderr
        assert version_on(machine) == f"willi {OLD}"
        send_message(machine, upstream)
    assert nothing_but_one_release(machine)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_upgrade_that_is_killed_leaves_the_old_willi_and_the_next_one_clears_up(machine, number):
    configure(machine)
    killer = f'#!/bin/sh\ncase $* in *venv\\ /*) kill -{number.value} $PPID ;; esac\nexec /usr/bin/python3 "$@"\n'
    machine.write("/usr/local/bin/killer", killer, 0o755)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        done = install(machine, NEW, PYTHON="/usr/local/bin/killer")
        assert done.returncode != 0
        assert number == signal.SIGKILL or done.stderr.splitlines()[-1] == INTERRUPTED
        assert version_on(machine) == f"willi {OLD}"
        send_message(machine, upstream)
        assert nothing_but_one_release(machine) or number == signal.SIGKILL
        assert install(machine, NEW).returncode == 0
        send_message(machine, upstream)
    assert version_on(machine) == f"willi {NEW}"
    assert nothing_but_one_release(machine)


# $1: the installation, $2: Willi's log.
INTERRUPT_WHILE_IT_DRAINS = """
"$1" & job=$!
until grep -q msg=Draining "$2"; do sleep 0.1; done
kill -TERM $job
wait $job
"""


def test_an_upgrade_says_what_it_waits_for_and_ends_well_if_it_is_interrupted_then(machine):
    configure(machine, workers=1)
    with upstream_on(machine) as upstream:
        machine.run(INIT, "start")
        with connect(machine) as client:  # in a transaction, so that it takes until drain_timeout
            assert client.read_reply().code == 220
            assert client.command(EHLO).code == 250
            assert client.command(MAIL).code == 250
            new = f"{UNPACKED}/willi-{NEW}/install.sh"
            done = machine.ask("bash", "-c", INTERRUPT_WHILE_IT_DRAINS, "bash", new, LOG)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "What has begun is finished first, for up to drain_timeout" in done.stdout
        assert NOT_NOW in done.stderr
        assert "It is running." in done.stdout
        send_message(machine, upstream)
    assert version_on(machine) == f"willi {NEW}"


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


def test_the_commands_of_the_readme_lead_from_the_two_files_to_a_running_willi(start_machine, without_systemd):
    machine = start_machine(*without_systemd)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [unpack] = re.findall(r"^(    sha256sum .*\n(?:    .*\n)+)", readme, re.MULTILINE)
    [commands] = re.findall(r"^(    cat .*\n(?:    .*\n)+)", readme, re.MULTILINE)
    commands = textwrap.dedent(commands).replace("systemctl start willi", f"{INIT} start")
    machine.run("cp", "-R", f"{UNPACKED}/built", "/root/willi")
    machine.run("sh", "-euc", f"umask 077\ncd /root/willi\n{textwrap.dedent(unpack)}{commands}")
    assert banner(machine) == "220 mx.example.org ESMTP Willi"
    [check] = re.findall(r"^    (runuser .*)$", readme, re.MULTILINE)
    done = machine.ask("sh", "-c", check)  # whose mail.example.org this machine cannot find
    assert done.stdout.splitlines()[0] == f"ok     {CONF}: mappings: 1, domain mx.example.org"
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert [line for line in wrong if "DNS" not in line and "mail.example.org" not in line] == []


# The same where systemd runs


def show(machine: Machine, name: str) -> str:
    return machine.run("systemctl", "show", "--value", f"--property={name}", "willi").strip()


def journal(machine: Machine) -> str:
    """Willi's own lines since the boot."""
    machine.run("journalctl", "--sync")
    return machine.run("journalctl", "--boot", "--identifier=willi", "--output=cat", "--no-pager")


def has_come_back(machine: Machine, times: int) -> bool:
    """systemd has started it anew so many times, and it serves."""
    return (show(machine, "NRestarts"), show(machine, "ActiveState")) == (str(times), "active")


def drop_in(machine: Machine, text: str) -> None:
    machine.write("/etc/systemd/system/willi.service.d/test.conf", f"[Service]\n{text}\n")
    machine.run("systemctl", "daemon-reload")


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
    wait_until(lambda: show(systemd, "NRestarts") != "0", "another try", 30)
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


# From another program, and back to it


NEW_CONF = f"{CONF}.new"


@pytest.fixture
def with_old_program(start_machine: StartMachine, debian: Path) -> Machine:
    """systemd runs the other program, and Willi is not installed."""
    machine = start_machine(debian, boot=True)
    old_program.start(machine)
    wait_until(lambda: speaks(machine, old_program.BANNER), "the old program")
    return machine


def speaks(machine: Machine, words: str) -> bool:
    """Whether that is the banner."""
    try:
        return banner(machine) == words
    except OSError:
        return False


def write_new_configuration(machine: Machine, **settings: Setting) -> None:
    """As docs/from-the-go-program.md wants it: beside the one of the old program."""
    old = machine.path(CONF).read_text()
    machine.run("groupadd", "--force", "--system", "willi")
    configure(machine, **settings)
    machine.run("mv", CONF, NEW_CONF)
    machine.run("chmod", "644", NEW_CONF)
    machine.write(CONF, old)


def old_program_goes_on(machine: Machine) -> bool:
    """It serves, and would again after a restart."""
    machine.run("systemctl", "restart", "willi")
    wait_until(lambda: speaks(machine, old_program.BANNER), "the old program after a restart", 30)
    return machine.path(CONF).read_text() == old_program.SETTINGS


def test_from_the_old_program_to_willi_and_back(with_old_program):
    machine = with_old_program
    write_new_configuration(machine)
    done = install(machine, NEW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.path(f"{CONF}.old").read_text() == old_program.SETTINGS
    with upstream_on(machine) as upstream:
        send_message(machine, upstream)
    done = machine.ask(f"{HOME}/install.sh", "--back")
    assert done.returncode == 0, done.stdout + done.stderr
    assert old_program_goes_on(machine)
    assert sorted(path.name for path in machine.path(HOME).iterdir()) == ["etc", "willi"]
    assert machine.path(NEW_CONF).exists()


def test_a_way_back_that_fails_leaves_willi_running(with_old_program):
    machine = with_old_program
    write_new_configuration(machine)
    assert install(machine, NEW).returncode == 0
    machine.path(f"{CONF}.old").write_text("not what it reads")
    done = machine.ask(f"{HOME}/install.sh", "--back")
    assert done.returncode == 1
    assert "Failed to load config file" in done.stderr
    assert done.stderr.endswith("install.sh: Willi serves again.\n")
    assert banner(machine) == "220 mx.example ESMTP Willi"
    assert show(machine, "ActiveState") == "active"


def test_a_willi_that_does_not_start_makes_way_for_the_old_program_and_its_file(with_old_program):
    machine = with_old_program
    write_new_configuration(machine)
    machine.run("cp", "-R", f"{UNPACKED}/willi-{NEW}", "/root/willi")
    with machine.path("/root/willi/willi_lib/processes/master.py").open("a") as master:
        master.write(BROKEN_RELEASE)
    done = machine.ask("/root/willi/install.sh")
    assert done.returncode == 1
    assert "this release cannot start" in done.stderr
    assert "The program that was here before runs again" in done.stderr
    assert banner(machine) == old_program.BANNER
    assert old_program_goes_on(machine)
    assert machine.path(NEW_CONF).exists()
    assert not machine.path(f"{HOME}/current").exists()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        pytest.param(lambda machine: None, f"write the new configuration into {NEW_CONF}", id="no new file"),
        pytest.param(lambda machine: configure(machine), "which is in the new form already", id="rewritten in place"),
        pytest.param(
            lambda machine: write_new_configuration(machine, read_timeot="5m"), "read_timeot: unknown key", id="a fault"
        ),
    ],
)
def test_the_old_program_is_not_touched_before_there_is_a_file_for_the_new_one(with_old_program, prepare, words):
    machine = with_old_program
    machine.run("groupadd", "--system", "willi")
    prepare(machine)
    pid = show(machine, "MainPID")
    done = install(machine, NEW)
    assert done.returncode == 1
    assert words in " ".join(done.stderr.split())
    assert show(machine, "MainPID") == pid
    assert banner(machine) == old_program.BANNER


def test_with_systemd_no_client_is_refused_by_reloads_restarts_and_upgrades(systemd):
    configure(systemd)
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
    systemd.run("cp", "-R", f"{UNPACKED}/willi-{NEW}", "/root/willi")
    with systemd.path("/root/willi/willi_lib/processes/master.py").open("a") as master:
        master.write(BROKEN_RELEASE)
    with upstream_on(systemd) as upstream:
        systemd.run("systemctl", "start", "willi")
        done = systemd.ask("/root/willi/install.sh")
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
        for number, name in ((1, "STOP"), (2, "KILL")):
            systemd.run("sh", "-c", f"kill -{name} {show(systemd, 'MainPID')}")
            wait_until(partial(has_come_back, systemd, number), f"restart {number}", 60)
            send_message(systemd, upstream)


def test_a_port_that_is_taken_is_tried_again_until_it_is_free(systemd):
    configure(systemd)
    with systemd.host.inside():
        taken = socket.create_server(("", 25))
    with taken:
        assert systemd.ask("systemctl", "start", "willi").returncode != 0
        assert "cannot listen on 0.0.0.0:25" in journal(systemd)
    wait_until(lambda: show(systemd, "ActiveState") == "active", "Willi at its port", 60)


def test_in_its_sandbox_willi_reaches_a_database_socket_syslog_the_dns_and_keys_of_a_group(
    start_machine, installed_with_systemd, mariadb: Mariadb, certificates: Authority, tmp_path
):
    """All that the unit's hardening could be in the way of."""
    machine = start_machine(*installed_with_systemd.layers, boot=True, binds={mariadb.socket: SOCKET})
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
