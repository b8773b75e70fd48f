"""Willi on a machine of its own: installed from a release of this tree, configured, and used."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.client import Client
from tests.support.daemon import Setting, write_config
from tests.support.loopback import HOST
from tests.support.machine import Machine
from tests.support.release import VERSION
from tests.support.talk import EHLO, QUEUED, deliver
from tests.support.upstream import ScriptedUpstream

OLD, NEW = VERSION, "2.1.1"
UNPACKED = "/srv"  # where machines find both releases, unpacked, and `built`, as make leaves OLD
VENV = "/mnt"  # where they find the environment that the first installation has made
QUICK_PYTHON = f"{UNPACKED}/python3"
HOME = "/opt/willi"
ETC = f"{HOME}/etc"
CONF = f"{ETC}/willi.conf"
INIT = "/etc/init.d/willi"
LOG = "/var/log/willi.log"
PID_FILE = "/run/willi.pid"
WHY_NOT = f"{CONF}: cannot read it: No such file or directory\n"
FIRST_WORDS = [f"willi {OLD} is installed in {HOME}.", f"It does not run yet, since there is no {CONF}. Next:"]
BROKEN_RELEASE = "\ndef run(*_: object, **__: object) -> None:\n    raise Unusable('this release cannot start')\n"
UPSTREAM_PORT = 2525

# To make an environment and to fill it takes most of the time of an installation. With this one in PYTHON, install.sh
# gets a copy of that of the first installation, and pip finds nothing to do. LACKING: a library that it does not have.
QUICK_PYTHON_TEXT = f"""\
#!/bin/sh
case $* in
    "-I -m venv "*)
        cp -a {VENV} "$4"
        [ -z "${{LACKING-}}" ] || rm -r "$4"/lib/python3*/site-packages/"$LACKING"*
        ;;
    *) exec /usr/bin/python3 "$@" ;;
esac
"""


@contextmanager
def upstream_on(machine: Machine) -> Iterator[ScriptedUpstream]:
    with machine.host.inside():
        upstream = ScriptedUpstream(UPSTREAM_PORT)
    try:
        yield upstream
    finally:
        upstream.stop()


def install(machine: Machine, release: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh. release: a version, or a directory."""
    directory = release if release.startswith("/") else f"{UNPACKED}/willi-{release}"
    return machine.ask(f"{directory}/install.sh", *arguments, environment={"PYTHON": QUICK_PYTHON, **environment})


def copy_broken_release(machine: Machine) -> str:
    """The directory of one that cannot start."""
    machine.run("cp", "-R", f"{UNPACKED}/willi-{NEW}", "/root/broken")
    with machine.path("/root/broken/willi_lib/processes/master.py").open("a") as master:
        master.write(BROKEN_RELEASE)
    return "/root/broken"


def configure(machine: Machine, **settings: Setting) -> None:
    """A willi.conf that sends all mail to `upstream_on` the machine."""
    route: dict[str, Setting] = {"type": "static", "server": f"{HOST}:{UPSTREAM_PORT}", "tls_verify": False}
    defaults: dict[str, Setting] = {"domain": "mx.example", "workers": 1, "drain_timeout": "5s"}
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


def nothing_but_one_release(machine: Machine) -> bool:
    """No remains of an upgrade, whatever became of it."""
    names = sorted(path.name for path in machine.path(HOME).iterdir())
    linked = ["install.sh", "venv", "willi.init", "willi.py", "willi.service", "willi_lib"]
    releases = list(machine.path(f"{HOME}/releases").iterdir())
    return names == sorted(["current", "etc", "releases", *linked]) and len(releases) == 1


# Where systemd runs


def show(machine: Machine, name: str) -> str:
    """A property of the unit."""
    return machine.run("systemctl", "show", "--value", f"--property={name}", "willi").strip()


def journal(machine: Machine) -> str:
    """Willi's own lines since the boot."""
    machine.run("journalctl", "--sync")
    return machine.run("journalctl", "--boot", "--identifier=willi", "--output=cat", "--no-pager")


def drop_in(machine: Machine, text: str) -> None:
    machine.write("/etc/systemd/system/willi.service.d/test.conf", f"[Service]\n{text}\n")
    machine.run("systemctl", "daemon-reload")
