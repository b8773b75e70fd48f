"""What the status shows of the master itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic, time

from ..config import Settings
from ..status.counts import LIMITS
from ..status.reports import Links, MasterReport, send
from .child import Child

INTERVAL = 1.0  # seconds between reports, if nothing has changed


class Reporter:
    """Tells it the status process, which need not be there."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._report = self._sent = MasterReport(pid=os.getpid(), started=time())
        self._sent_at = 0.0

    def reloaded(self) -> None:
        """The new workers have taken over."""
        number = self._report.reloads + 1
        self._report = replace(self._report, reloads=number, last_reload=time(), last_reload_error="")

    def reload_failed(self, why: str) -> None:
        """Nothing has changed."""
        self._report = replace(self._report, reloads_failed=self._report.reloads_failed + 1, last_reload_error=why)

    def send(self, settings: Settings, listen: str, workers: Sequence[Child], stopping: bool) -> None:
        """When something has changed, and each second."""
        report = replace(
            self._report,
            domain=settings.domain,
            log=settings.log,
            loglevel=settings.loglevel,
            listen=listen.split(",") if listen else [],
            wanted=settings.workers,
            workers={str(worker.pid): worker.state.name.lower() for worker in workers},
            stopping=stopping,
            connections=sum(board.total for board in {worker.row.board for worker in workers}),
            limits={name: getattr(settings, name) for name in LIMITS},
        )
        is_due = report != self._sent or monotonic() - self._sent_at >= INTERVAL
        if is_due and send(self._links.to_reports, master=report):
            self._sent, self._sent_at = report, monotonic()
