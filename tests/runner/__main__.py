"""`python -m tests.runner --minutes 30 ...`: pytest with these arguments, an end, and nothing left behind.

At its end it says what was still open. However pytest ends, all processes of the tests are ended with it, and their
temporary directory is removed. What pytest keeps of its last runs (/tmp/willi-tests-...) stays.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.runner.plugin import DIRECTORY, open_tests

OVER = 124  # exit status when the time is over, as of timeout(1)
PAUSE = 0.05  # seconds between two looks
TO_WRITE_STACKS = 2.0  # seconds
TO_DIE = 30.0  # seconds for processes that were sent SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runner", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="the end of the run")
    given, arguments = parser.parse_known_args()
    # A process of a test whose parent dies becomes our child.
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which says what it has seen
    signal.signal(signal.SIGTERM, _end)
    directory = Path(tempfile.mkdtemp(prefix="willi-run-"))
    directory.chmod(0o1777)  # some of the tests' programs are not root's
    try:
        return _run(arguments, directory, given.minutes * 60)
    finally:
        _kill_all()
        _remove(directory)


def _end(number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def _run(arguments: list[str], directory: Path, seconds: float) -> int:
    """The exit status."""
    environment = {**os.environ, DIRECTORY: str(directory), "TMPDIR": str(directory)}
    deadline = time.monotonic() + seconds
    pytest = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], env=environment, preexec_fn=_with_us)
    try:
        while pytest.poll() is None:
            if time.monotonic() > deadline:
                print(f"\nThe tests have not ended within {seconds / 60:g} minutes.")
                _say_what_is_open(directory)
                return OVER
            _reap(pytest.pid)
            time.sleep(PAUSE)
    except SystemExit:
        print("\nThe tests are stopped by a signal.")
        _say_what_is_open(directory)
        raise
    if pytest.returncode < 0:
        print(f"pytest was ended by signal {-pytest.returncode}", flush=True)
        _say_stacks(directory)
    return pytest.returncode if pytest.returncode >= 0 else 128 - pytest.returncode


def _with_us() -> None:
    """In the child: it ends with us, and Ctrl-C reaches it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _say_what_is_open(directory: Path) -> None:
    running, ended = open_tests(directory)
    print(f"{ended} tests have ended.")
    for nodeid, age in running.items():
        print(f"still open, since {age:.0f} s: {nodeid}")
    for path in directory.glob("stacks-*"):
        with suppress(ProcessLookupError):
            os.kill(int(path.name.rpartition("-")[2]), signal.SIGUSR1)  # see plugin.py
    time.sleep(TO_WRITE_STACKS)
    _say_stacks(directory)


def _say_stacks(directory: Path) -> None:
    for path in sorted(directory.glob("stacks-*")):
        text = path.read_text(errors="backslashreplace")
        if text:
            print(f"--- {path.name}\n{text}")
    sys.stdout.flush()


def _children() -> list[int]:
    pid = os.getpid()
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _reap(but: int) -> None:
    """Orphans that have ended must not look as if they were there."""
    for pid in _children():
        if pid != but:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _kill_all() -> None:
    """All that are below us: the children of the dead become ours."""
    deadline = time.monotonic() + TO_DIE
    while children := _children():
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            print(f"processes that do not end: {children}", flush=True)
            return
        time.sleep(PAUSE)


def _remove(directory: Path) -> None:
    for pattern in (f"{directory.name}-*", f"*/{directory.name}-*"):  # see tests/support/machine.py
        for group in Path("/sys/fs/cgroup").glob(pattern):
            for path, _, _ in os.walk(group, topdown=False):
                with suppress(OSError):
                    Path(path).rmdir()
    mounts = Path("/proc/self/mounts").read_text()
    if str(directory) in mounts:
        print(f"{directory} stays: something is mounted there", flush=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
