"""What all processes of a run share, since it takes long to make."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.runner.limits import allow
from tests.runner.plugin import run_directory

MAKING = 900.0  # seconds for the longest of them, a Debian; about 30 are usual


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A directory of this run: one process makes it, the others wait for it. No test changes it."""
    allow(MAKING)
    made = run_directory() / name
    with (run_directory() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            half_made = made.with_name(f"{name}.new")
            shutil.rmtree(half_made, ignore_errors=True)
            half_made.mkdir()
            half_made.chmod(0o755)
            make(half_made)
            half_made.rename(made)
    return made
