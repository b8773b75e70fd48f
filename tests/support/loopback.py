"""Ports, waiting, and what a machine must have for a test."""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
FIRST_CLIENT_PORT = max(20_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
PATIENCE = 60.0  # seconds that a test waits for what must happen; on a quiet machine nothing here takes three

T = TypeVar("T")


_marks: deque[socket.socket] = deque(maxlen=300)  # of our last ports and addresses: one that falls out is closed
_steady: dict[str, tuple[int, socket.socket]] = {}


def free_port(host: str = HOST) -> int:
    """A TCP port that no process has at this moment, that no other test gets, and that the kernel gives to no client.

    What keeps the other tests off, also those of another checkout, is a name that one process can have.
    """
    port, mark = _marked_port(host)
    _marks.append(mark)
    return port


def steady_port(name: str) -> int:
    """Such a port, and the same one whenever this process asks: a Willi that tests share finds each one's upstream."""
    if name not in _steady:
        _steady[name] = _marked_port(HOST)
    return _steady[name][0]


def free_address(port: int) -> str:
    """A loopback address at which no process has this port, and that no other test gets."""
    while True:
        address = f"127.25.{random.randrange(256)}.{random.randrange(1, 255)}"
        if mark := _mark_if_free(address, address, port):
            _marks.append(mark)
            return address


def _marked_port(host: str) -> tuple[int, socket.socket]:
    while True:
        port = random.randrange(10_000, FIRST_CLIENT_PORT)
        if mark := _mark_if_free(f"port-{port}", host, port):
            return port, mark


def _mark_if_free(name: str, host: str, port: int) -> socket.socket | None:
    """What keeps others from the same choice while it is open; None: another test has it, or a process the port."""
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0willi-test-{name}")
        with socket.socket() as probe:
            probe.bind((host, port))
    except PermissionError:  # of a port below 1024: no other choice helps
        mark.close()
        raise
    except OSError:
        mark.close()
        return None
    return mark


def wait_until(condition: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
    """Ask until the answer is true, and return it. Raises AssertionError when the time is over."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()  # never set: a wait that a signal handler may interrupt
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        pause.wait(0.01)
    return answer


def need(*programs: str, root: bool = False) -> None:
    """Skip the test if the machine lacks something. With CI=true a skip is a failure: see tests/conftest.py.

    WILLI_TESTS_ROOT=no leaves out what needs root, whoever runs the tests: see tests/pythons.sh.
    """
    if root and (os.geteuid() != 0 or os.environ.get("WILLI_TESTS_ROOT") == "no"):
        pytest.skip("needs root")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for program in programs:
        if shutil.which(program, path=path) is None:
            pytest.skip(f"needs {program}: see tests/e2e/packages.txt")
