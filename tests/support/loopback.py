"""Ports, waiting, and what a machine must have for a test."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
PATIENCE = 10.0  # seconds that a test waits for what must happen; nothing here takes one

T = TypeVar("T")


def free_port(host: str = HOST) -> int:
    """A TCP port on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
    """Ask until the answer is true, and return it. Raises AssertionError when the time is over."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()  # never set: a wait that a signal handler may interrupt
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        pause.wait(0.01)
    return answer


def need(*programs: str, root: bool = False) -> None:
    """Skip the test if the machine lacks something. With CI=true a skip is a failure: see tests/conftest.py."""
    if root and os.geteuid() != 0:
        pytest.skip("needs root")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for program in programs:
        if shutil.which(program, path=path) is None:
            pytest.skip(f"needs {program}: see tests/e2e/packages.txt")
