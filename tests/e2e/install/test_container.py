"""Containerfile: its steps in a small Debian, and its command as a container runs it, by the page that says how."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import parse_logfmt, willi_environment
from tests.support.installation import ETC, OLD, QUICK_PYTHON, UNPACKED, banner, configure, send_message, upstream_on
from tests.support.loopback import PATIENCE, ROOT, wait_until
from tests.support.machine import Layers, Machine

TEXT = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
STEPS = re.findall(r"^([A-Z]+) (.*)$", TEXT, re.MULTILINE)
PAGE = (
    (ROOT / "docs/install.md").read_text(encoding="utf-8").partition("\n## In a container\n")[2].partition("\n## ")[0]
)
BIND = "CAP_NET_BIND_SERVICE"
A_PROXY = {"http_proxy": "http://127.0.0.1:9"}  # Podman passes that of its host on
# As `--read-only --cap-drop=all --cap-add=net_bind_service` has it: process 1 of its own, and no way to more rights.
CONTAINED = """\
mount --make-rprivate / && mount -o remount,bind,ro /
exec setpriv --reuid=willi --regid=willi --clear-groups --inh-caps=-all --bounding-set=-all,+net_bind_service "$@"
"""


def step(name: str) -> str:
    [value] = [str(value) for instruction, value in STEPS if instruction == name]
    return value


@pytest.fixture(scope="module")
def image(layers: Layers, without_systemd: tuple[Path, ...], binds: dict[Path, str]) -> tuple[Path, ...]:
    """What the steps leave. That of apt-get cannot be run without a network: its packages must be there."""
    layer = layers.directory("image")
    with layers.change(layer, *without_systemd, binds=binds) as machine:
        for instruction, value in STEPS:
            if instruction == "COPY":
                source, target = value.split()
                assert source == "."
                machine.run("cp", "-R", f"{UNPACKED}/willi-{OLD}", target)
            elif value.startswith("apt-get"):
                packages = re.findall(r"--no-install-recommends ([a-z0-9 -]+) &&", value)[0].split()
                machine.run("dpkg", "--status", *packages)
            elif instruction == "RUN":
                machine.run("sh", "-euc", value, environment={"PYTHON": QUICK_PYTHON})
    return (*without_systemd, layer)


@contextmanager
def container(machine: Machine) -> Iterator[subprocess.Popen[str]]:
    command = [*json.loads(step("ENTRYPOINT")), *json.loads(step("CMD"))]
    process = subprocess.Popen(
        ["nsenter", f"--target={machine.pid}", "--all", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child",
         "--mount-proc", "sh", "-euc", CONTAINED, "sh", *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=willi_environment(),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()  # what it has started ends with the machine
        process.wait()


def test_the_file_is_short_and_starts_what_install_sh_has_installed():
    assert len((ROOT / "Containerfile").read_text().splitlines()) <= 25
    assert [name for name, _ in STEPS if name not in ("RUN", "COPY")] == [
        "FROM", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD",
    ]  # fmt: skip
    assert (step("USER"), step("EXPOSE"), step("STOPSIGNAL")) == ("825", "25", "SIGTERM")
    assert step("FROM").startswith("docker.io/library/debian:")


def test_it_serves_port_25_as_process_1_without_root_without_dev_log_and_with_a_read_only_root(
    layers: Layers, image: tuple[Path, ...], binds: dict[Path, str]
):
    machine = Machine(layers, image, binds=binds)
    try:
        assert not machine.path("/dev/log").exists()
        [setting] = re.findall(r"`(status_listen = \S+)`", PAGE)
        configure(machine, **dict([setting.split(" = ")]))
        health = ["sh", "-c", 'exec "$@"', "sh", *json.loads(step("HEALTHCHECK").partition(" CMD ")[2])]
        assert machine.ask(*health).returncode != 0
        with upstream_on(machine) as upstream, container(machine) as willi:
            wait_until(lambda: machine.ask(*health, environment=A_PROXY).returncode == 0, "a good health")
            assert banner(machine).startswith("220 ")
            send_message(machine, upstream)
            [unshare] = children(willi.pid)
            [master] = children(unshare)
            status = Path(f"/proc/{master}/status").read_text()
            assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE), "process 1 of its own"
            assert re.search(r"^Uid:\t825\t825\t825\t825$", status, re.MULTILINE)
            assert re.search(r"^CapBnd:\t0*400$", status, re.MULTILINE), "net_bind_service alone"
            subprocess.run(["kill", f"-{signal.Signals[step('STOPSIGNAL')].value}", str(master)], check=True)
            said, _ = willi.communicate(timeout=PATIENCE)
            assert willi.returncode == 0, said
        lines = [parse_logfmt(line) for line in said.splitlines()]
        assert [line["msg"] for line in lines if line["msg"] in ("Starting", "Message accepted", "Stopped")] == [
            "Starting", "Message accepted", "Stopped",
        ]  # fmt: skip
        assert [line for line in lines if line["lvl"] in ("warn", "error")] == []
    finally:
        machine.stop()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_page_names_the_number_of_the_user_and_what_the_steps_need():
    numbers = set(re.findall(r"--[gu]id (\d+)", TEXT))
    assert len(numbers) == 1 and f"chgrp {numbers.pop()} " in PAGE
    assert f":{ETC}:ro" in PAGE
