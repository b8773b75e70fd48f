"""Machines on which Willi is installed, or can be. The whole run shares what takes long: see tests/support/once.py.

The machines have no network: neither is one needed, nor could a test do harm by it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import show_on_failure
from tests.support import old_program
from tests.support.installation import HOME, LOG, NEW, OLD, QUICK_PYTHON, QUICK_PYTHON_TEXT, UNPACKED, VENV
from tests.support.loopback import ROOT
from tests.support.machine import Layers, Machine
from tests.support.machine import debian as make_debian
from tests.support.once import once
from tests.support.release import release

StartMachine = Callable[..., Machine]


@dataclass(frozen=True)
class Installed:
    """A system on which install.sh has just run for the first time."""

    layers: tuple[Path, ...]
    said: str


@pytest.fixture(scope="module")
def layers() -> Iterator[Layers]:
    kept = Layers()
    yield kept
    kept.remove()


@pytest.fixture(scope="module")
def releases(layers: Layers) -> Path:
    """OLD, as `make release` builds it of this tree, unpacked; and NEW, which has another version and is else the same.

    Beside them are the files that make has left, in `built`, and QUICK_PYTHON.
    """
    return once("releases", make_releases)


def make_releases(directory: Path) -> None:
    tarball = release()
    subprocess.run(["tar", "--extract", "--file", tarball, "--directory", directory], check=True)
    shutil.copytree(directory / f"willi-{OLD}", directory / f"willi-{NEW}")
    module = directory / f"willi-{NEW}" / "willi_lib" / "__init__.py"
    module.write_text(module.read_text().replace(f'"{OLD}"', f'"{NEW}"'))
    shutil.copytree(tarball.parent, directory / "built")
    python = directory / Path(QUICK_PYTHON).name
    python.write_text(QUICK_PYTHON_TEXT)
    python.chmod(0o755)


@pytest.fixture(scope="module")
def debian(layers: Layers) -> Path:
    """A small Debian with Python."""
    return make_debian()


@pytest.fixture(scope="module")
def without_systemd(layers: Layers, debian: Path) -> tuple[Path, ...]:
    """The same as a container has it."""

    def purge_systemd(layer: Path) -> None:
        with layers.change(layer, debian) as machine:
            machine.run("dpkg", "--purge", "--force-depends", "--force-remove-protected", "systemd-sysv", "systemd")

    return debian, once("without-systemd", purge_systemd)


@pytest.fixture(scope="module")
def installed(layers: Layers, without_systemd: tuple[Path, ...], releases: Path) -> Installed:
    """As the README says, from the two files that make leaves, in /root/willi.

    By a root who lets nobody read his files, where no program has an init script yet (Debian 13 in a container).
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"^(    sha256sum .*\n(?:    .*\n)+)", readme, re.MULTILINE)

    def follow_the_readme(directory: Path) -> None:
        (directory / "layer").mkdir()
        with layers.change(directory / "layer", *without_systemd, binds={releases: UNPACKED}) as machine:
            machine.run("rm", "-rf", "/etc/init.d")
            assert machine.ask("sh", "-c", "command -v cc gcc make").stdout == ""
            assert machine.run("cat", "/proc/net/route").count("\n") == 1  # the heading
            machine.run("cp", "-R", f"{UNPACKED}/built", "/root/willi")
            said = machine.run("sh", "-euc", f"umask 077\ncd /root/willi\nexec 2>&1\n{textwrap.dedent(commands)}")
            checked, _, said = said.partition("\n")
            assert checked == f"willi-{OLD}.tar.gz: OK"
            (directory / "said").write_text(said)

    made = once("installed", follow_the_readme)
    return Installed((*without_systemd, made / "layer"), (made / "said").read_text())


@pytest.fixture(scope="module")
def binds(releases: Path, installed: Installed) -> Mapping[Path, str]:
    """What every machine can read: the releases, and the environment of Python for QUICK_PYTHON."""
    [venv] = installed.layers[-1].glob(f"{HOME[1:]}/releases/*/venv")
    return {releases: UNPACKED, venv: VENV}


@pytest.fixture(scope="module")
def installed_with_systemd(layers: Layers, debian: Path, binds: Mapping[Path, str]) -> Installed:
    """After the Go program."""

    def install_after_it(directory: Path) -> None:
        (directory / "layer").mkdir()
        with layers.change(directory / "layer", debian, boot=True, binds=binds) as machine:
            old_program.make_account(machine)
            said = machine.run("sh", "-c", f"PYTHON={QUICK_PYTHON} {UNPACKED}/willi-{OLD}/install.sh 2>&1")
            (directory / "said").write_text(said)

    made = once("installed-with-systemd", install_after_it)
    return Installed((debian, made / "layer"), (made / "said").read_text())


@pytest.fixture
def start_machine(request: pytest.FixtureRequest, layers: Layers, binds: Mapping[Path, str]) -> Iterator[StartMachine]:
    """start_machine(*layers, boot=False, more=None): it finds the releases in UNPACKED."""
    with ExitStack() as ends:

        def start(*below: Path, boot: bool = False, more: Mapping[Path, str] | None = None) -> Machine:
            machine = Machine(layers, below, boot=boot, binds={**binds, **(more or {})})
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
