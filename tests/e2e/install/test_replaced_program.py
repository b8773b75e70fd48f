"""install.sh where another program is the service willi, and back to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.install.conftest import StartMachine
from tests.support import old_program
from tests.support.daemon import Setting
from tests.support.installation import (
    CONF,
    HOME,
    NEW,
    banner,
    configure,
    copy_broken_release,
    install,
    send_message,
    show,
    upstream_on,
)  # fmt: skip
from tests.support.loopback import wait_until
from tests.support.machine import Machine

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
    wait_until(lambda: speaks(machine, old_program.BANNER), "the old program after a restart")
    return machine.path(CONF).read_text() == old_program.SETTINGS


def test_from_the_old_program_to_willi_and_back_and_a_way_back_that_fails_leaves_willi_running(with_old_program):
    machine = with_old_program
    write_new_configuration(machine)
    done = install(machine, NEW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.path(f"{CONF}.old").read_text() == old_program.SETTINGS

    machine.path(f"{CONF}.old").write_text("not what it reads")
    done = machine.ask(f"{HOME}/install.sh", "--back")
    assert done.returncode == 1
    assert "Failed to load config file" in done.stderr
    assert done.stderr.endswith("install.sh: Willi serves again.\n")
    assert show(machine, "ActiveState") == "active"
    with upstream_on(machine) as upstream:
        send_message(machine, upstream)

    machine.path(f"{CONF}.old").write_text(old_program.SETTINGS)
    done = machine.ask(f"{HOME}/install.sh", "--back")
    assert done.returncode == 0, done.stdout + done.stderr
    assert old_program_goes_on(machine)
    assert sorted(path.name for path in machine.path(HOME).iterdir()) == ["etc", "willi"]
    assert machine.path(NEW_CONF).exists()


def test_a_willi_that_does_not_start_makes_way_for_the_old_program_and_its_file(with_old_program):
    machine = with_old_program
    write_new_configuration(machine)
    done = install(machine, copy_broken_release(machine))
    assert done.returncode == 1
    assert "this release cannot start" in done.stderr
    assert "The program that was here before runs again" in done.stderr
    assert banner(machine) == old_program.BANNER
    assert old_program_goes_on(machine)
    assert machine.path(NEW_CONF).exists()
    assert not machine.path(f"{HOME}/current").exists()


def test_the_old_program_is_not_touched_before_there_is_a_file_for_the_new_one(with_old_program):
    machine = with_old_program
    pid = show(machine, "MainPID")
    assert f"write the new configuration into {NEW_CONF}" in refusal(machine)
    configure(machine)  # in place of the old one
    assert "which is in the new form already" in refusal(machine)
    machine.write(CONF, old_program.SETTINGS)
    write_new_configuration(machine, read_timeot="5m")
    assert "read_timeot: unknown key" in refusal(machine)
    assert show(machine, "MainPID") == pid
    assert banner(machine) == old_program.BANNER


def refusal(machine: Machine) -> str:
    """Of install.sh, as one line."""
    done = install(machine, NEW)
    assert done.returncode == 1
    return " ".join(done.stderr.split())
