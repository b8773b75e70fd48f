"""Load: a crowd of idle and slow clients, and full load for a while; `make load` and `make soak` are any size of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.soak import Look, growth_of
from tests.runner.limits import allow
from tests.support.loopback import ROOT, need, wait_until

# `make load` has more of them.
IDLE, SLOW = (int(os.environ.get(name, default)) for name, default in (("IDLE", "500"), ("SLOW", "50")))
MORE_LATENCY = 1.2  # that a crowd may cost
STEADY = Look(0.0, [10.0, 25.0, 25.0], [5.0, 15.0, 15.0], [6, 50, 50], 1000.0, 20.0, 0)


def run(module: str, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    allow(seconds + 10)
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def test_a_crowd_of_idle_and_slow_clients_is_not_felt_by_the_others():
    """On a machine that does other things as well one bad look is no proof: then ten times as many pairs decide."""
    need("openssl")
    if os.geteuid() and resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * (IDLE + SLOW) + 1000:
        pytest.skip("needs more file descriptors, or root")
    for pairs in (8, 80):
        done = run("bench.crowd", "--idle", str(IDLE), "--slow", str(SLOW), "--pairs", str(pairs), seconds=600)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if found["p50"]["median"] <= MORE_LATENCY:
            return
    raise AssertionError(f"with {IDLE} idle and {SLOW} slow clients: {found}")


def test_a_crowd_that_is_sent_away_is_a_failure(tmp_path: Path):
    """Else an empty room would be measured."""
    script = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    script += "while True: s.accept()[0].sendall(b'421 go away\\r\\n')"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        done = run("bench.crowd", "hold", server.stdout.readline().strip(), "1", "0")
        server.kill()
    assert done.returncode == 1 and done.stdout == ""
    assert "SessionFailed: '421 go away' where 220 should have come" in done.stderr


# The soak


def test_a_soak_gives_curves_and_finds_nothing(tmp_path: Path):
    need("openssl")
    done = run("bench.soak", "--minutes", "0.05", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    soak = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert soak["errors"] == {} and soak["faults"] == []
    assert soak["messages"] > soak["looks"][-1]["seconds"]
    assert len(soak["looks"]) >= 3
    for look in soak["looks"]:
        assert [len(look[name]) for name in ("pss", "private", "descriptors")] == [3, 3, 3]
        assert 0 < sum(look["private"]) <= sum(look["pss"])
    assert {"Willi", "Python", "gevent"} <= soak["versions"].keys()
    picture = ElementTree.parse(tmp_path / "soak.svg").getroot()
    curves = list(picture.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(curves) == 7
    assert {len(curve.attrib["points"].split()) for curve in curves} == {len(soak["looks"])}
    assert f"{soak['messages']:,} messages, 0 errors" in "".join(picture.itertext())


def test_a_worker_that_dies_ends_the_soak(tmp_path: Path):
    need("openssl")
    command = [sys.executable, "-m", "bench.soak", "--minutes", "1", "--results", str(tmp_path)]
    with (tmp_path / "told").open("wb") as told:
        soak = subprocess.Popen(command, cwd=ROOT, stdout=told, stderr=told)
    wait_until(lambda: " sessions a second" in (tmp_path / "told").read_text(), "the first look", 60)
    os.kill(max(workers_below(soak.pid)), signal.SIGKILL)
    assert soak.wait(60) == 1
    assert "FAILED: a process has ended" in (tmp_path / "told").read_text()
    assert not (tmp_path / "soak.json").exists()


def workers_below(pid: int) -> list[int]:
    """The children of its child that has some: the master."""
    children = [_children(child) for child in _children(pid)]
    return next(some for some in children if some)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("name", "curve", "found"),
    [
        ("private", lambda n: 15 + n * 0.1, ["MiB of private memory"]),
        ("descriptors", lambda n: 50 + n, ["descriptors"]),
        ("private", lambda n: 40 if n < 19 else 25, []),  # the warm-up is over
        ("private", lambda n: 25 + n % 2 * 10, []),  # up and down
        ("private", lambda n: 25 + n * 0.02, []),  # less than 2 MiB
        ("pss", lambda n: 25 + n * 0.1, []),  # somebody else has ended
        ("descriptors", lambda n: 50 + n % 20, []),
    ],
)
def test_what_grows_is_found_and_what_goes_up_and_down_is_not(name, curve, found):
    seen = [replaced(name, curve(number)) for number in range(95)]
    assert [fault.partition(":")[0] for fault in growth_of(seen)] == found


def replaced(name: str, value: float) -> Look:
    """Steady, but for one worker."""
    values = {**vars(STEADY)}
    values[name] = [*values[name][:2], value]
    return Look(**values)
