"""Greenlets that must not die."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import gevent

from .. import log

PAUSE = 1.0  # seconds


def keep_going(job: Callable[[], None]) -> None:
    """Run a job that returns only at its end. What it raises, as when memory is short, is logged, and it goes on."""
    while True:
        try:
            job()
            return
        except Exception:  # noqa: BLE001 -- the next turn may do better, and without the job nothing would be noticed
            with suppress(MemoryError):
                log.bug("Internal error")
        gevent.sleep(PAUSE)
