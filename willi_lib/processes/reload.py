"""What became of a reload: the master writes it down, and `systemctl reload` and the init script wait for it.

The file is in RUNTIME_DIRECTORY (systemd.exec(5)), which the unit and the init script set. Its first line is the time
at which the reload began, the others are the faults; without faults it succeeded. A waiting program takes no answer to
a reload that began before its own signal, so that several of them, and automatic reloads, do not confuse it.

    python -I reload.py PID      exit status 0: it serves with the new configuration; 1: the old one goes on

It needs nothing but Python, since it is run as a program of its own.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from time import monotonic, sleep

ANSWER = "reload"
LIMIT = 320.0  # seconds: a worker has 300 to start; less than TimeoutStartSec of the unit
STEP = 0.05  # seconds between looks


def write_answer(began: float, faults: str) -> None:
    """For those who wait, if there is a place for it. began: by the monotonic clock. Raises OSError."""
    if directory := runtime_directory():
        half = directory / f".{ANSWER}"
        half.write_text(f"{began}\n{faults}", encoding="utf-8", errors="backslashreplace")
        half.replace(directory / ANSWER)


def runtime_directory() -> Path | None:
    """A drop-in may add further ones behind ours."""
    first = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(first) if first else None


def reload(pid: int) -> str:
    """Have the master of this number reload; its faults, or why there is no answer. Empty: it has."""
    directory = runtime_directory()
    is_there = directory is not None and directory.is_dir()
    asked = monotonic()
    try:
        os.kill(pid, signal.SIGHUP)
        if directory is None:
            return "RUNTIME_DIRECTORY is not set: only the log says what becomes of this reload"
        if not is_there:
            return f"{directory} is missing: only the log says what becomes of this reload"
        while monotonic() < asked + LIMIT:
            began, _, faults = _read(directory / ANSWER).partition("\n")
            if began and float(began) >= asked:
                return faults
            sleep(STEP)
            os.kill(pid, 0)
    except ProcessLookupError:
        return "Willi does not run, or is being stopped"
    except OSError as error:
        return f"cannot reload: {error}"
    return f"no answer within {LIMIT:g} s; the log says what Willi waits for"


def _read(answer: Path) -> str:
    try:
        return answer.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""  # this is the first reload


if __name__ == "__main__":
    if faults := reload(int(sys.argv[1])):
        print(faults, file=sys.stderr)
        sys.exit(1)
