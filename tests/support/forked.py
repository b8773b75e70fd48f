"""Willi without the start of an interpreter, which takes most of the time of a short test.

A process that has read all modules, and no more, forks for each start; the child goes on as `python willi.py ...` does.
One such process is for daemons. It has only what is the same before and after gevent's patches: a master has none, and
each worker imports the rest for itself, as ever. The other process is for `check` and `lookup`.
Run as a program, this is that process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from os import fork, waitpid
from pathlib import Path
from select import POLLIN
from select import poll as Poll
from tempfile import TemporaryFile
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]
DAEMON, CHECK = "daemon", "check"
MODULES = {
    DAEMON: (
        "willi", "gevent.monkey", "gevent.pool", "gevent.server", "gevent.resolver.ares", "dns.message",
        "importlib.metadata", "zipfile", "willi_lib.smtp.body", "willi_lib.smtp.proxy_header", "willi_lib.smtp.xclient",
        "willi_lib.routing.search",
    ),
    CHECK: ("willi", "willi_lib.check"),
}  # fmt: skip
LARGEST_REQUEST = 256 << 10  # octets: the command and the environment
NUMBER = struct.Struct("i")  # first the pid, at the end what waitpid(2) says
STANDARD = (0, 1, 2)


class Forked:
    """What the tests need of subprocess.Popen. No thread waits for the end: it is asked for."""

    def __init__(
        self, kind: str, arguments: Sequence[str], standard: Sequence[int], environment: Mapping[str, str]
    ) -> None:
        """kind: DAEMON or CHECK. standard: the descriptors for stdin, stdout and stderr."""
        self.args = ["willi.py", *arguments]
        self.returncode: int | None = None
        self._taking = threading.RLock()
        request = json.dumps([self.args, dict(environment), str(Path.cwd())]).encode()
        self._replies, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(_server(kind), [request], [*standard, theirs.fileno()])
        self.pid: int = self._number()

    def _number(self) -> int:
        octets = self._replies.recv(NUMBER.size)
        assert octets, f"the process that forks has ended, at {self.args}"
        number: int
        (number,) = NUMBER.unpack(octets)
        return number

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        with self._taking:
            if self.returncode is None:
                self._replies.settimeout(timeout)
                try:
                    self.returncode = os.waitstatus_to_exitcode(self._number())
                except (TimeoutError, BlockingIOError):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
                self._replies.close()
            return self.returncode

    def send_signal(self, number: int) -> None:
        with self._taking:
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    kind: str, arguments: Sequence[str], environment: Mapping[str, str], seconds: float, stdin: BinaryIO | None
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured output. Raises subprocess.TimeoutExpired."""
    with TemporaryFile() as stdout, TemporaryFile() as stderr, Path(os.devnull).open("rb") as nothing:
        standard = [file.fileno() for file in (stdin or nothing, stdout, stderr)]
        process = Forked(kind, arguments, standard, environment)
        try:
            process.wait(seconds)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(process.args, process.wait(), stdout.read().decode(), stderr.read().decode())


@cache
def _server(kind: str) -> socket.socket:
    """It ends when we do."""
    from tests.support.daemon import PYTHON  # which needs this module

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
    with theirs:
        subprocess.Popen(
            [PYTHON, __file__, str(theirs.fileno()), kind], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    return ours


def main() -> None:
    """In the process that forks. What it imports afterwards may be patched by gevent: hence the names of functions."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(ROOT)
    for module in MODULES[sys.argv[2]]:
        importlib.import_module(module)
    gc.freeze()  # or the first collection in each child copies all that the parent has
    command, environment, directory = _serve(requests)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode, errors = ("r", "strict") if number == 0 else ("w", "backslashreplace" if number == 2 else "strict")
        setattr(sys, name, open(number, mode, errors=errors, closefd=False, buffering=1 if number == 2 else -1))  # noqa: SIM115
    sys.argv = command
    sys.exit(importlib.import_module("willi").main())


def _serve(requests: socket.socket) -> tuple[list[str], dict[str, str], str]:
    """Returns only in a child: its command, environment and directory."""
    poll = Poll()
    poll.register(requests, POLLIN)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != requests.fileno():
                poll.unregister(descriptor)
                os.close(descriptor)
                _tell_end(*running.pop(descriptor))
                continue
            octets, descriptors, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, len(STANDARD) + 1)
            if not octets:
                sys.exit()
            pid = fork()
            if pid == 0:
                _keep_standard(
                    descriptors, [requests.fileno(), *running, *(end.fileno() for _, end in running.values())]
                )
                command, environment, directory = json.loads(octets)
                return command, environment, directory
            *standard, last = descriptors
            for given in standard:
                os.close(given)
            end = os.pidfd_open(pid)
            running[end] = pid, socket.socket(fileno=last)
            running[end][1].send(NUMBER.pack(pid))
            poll.register(end, POLLIN)


def _keep_standard(given: Sequence[int], others: Sequence[int]) -> None:
    """In a child: the first of these descriptors become its own, all others are closed."""
    for number, descriptor in zip(STANDARD, given, strict=False):
        os.dup2(descriptor, number)
    for descriptor in (*given, *others):
        os.close(descriptor)
    if gevent := sys.modules.get("gevent"):
        gevent.reinit()  # or the children share its epoll


def _tell_end(pid: int, replies: socket.socket) -> None:
    with replies, suppress(BrokenPipeError):  # the test did not wait for it
        replies.send(NUMBER.pack(waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
