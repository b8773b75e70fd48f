"""What a worker tells the status process each second, and the questions that it answers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from time import monotonic, time
from typing import Any

import gevent
import gevent.socket

from .. import log
from ..config import Settings
from ..net.tls import CertificateError, certificate_facts
from ..routing.route import Mapping
from .counts import Counts
from .reports import ANSWER_TIMEOUT, Asked, CertificateState, Links, MappingState, WorkerReport, packed, receive, send

MAX_NAMES = 100  # of a certificate
INTERVAL = (0.8, 1.2)  # seconds between reports: at random, since all workers start at the same moment
PATIENCE = 2.0  # seconds for the parts of a report, since the way has room for ten of them
RETRY = 0.05  # seconds


class Reporter:
    """Sends nothing if there is no `status_listen`."""

    def __init__(
        self, settings: Settings, mappings: Sequence[Mapping], counts: Counts, links: Links,
        take_peaks: Callable[[], dict[str, int]], look_up: Callable[[str], Asked],
    ) -> None:  # fmt: skip
        """Reads the certificates once more: the worker may, as long as it is root.

        take_peaks: the most that one client had since the last time, by limit. look_up: answers for an address.
        """
        self._mappings = mappings
        self._counts = counts
        self._links = links
        self._take_peaks = take_peaks
        self._look_up = look_up
        self._wanted = settings.status_listen is not None
        self._certificates = _certificates(settings) if self._wanted else []
        self._turns = count()

    def report(self, sessions: Callable[[], int]) -> None:
        """Send how things are and what was counted, every second or so. sessions: that are open."""
        while True:
            try:
                if self._wanted:
                    self._send(sessions())
                else:
                    self._counts.rows()  # so that nothing piles up
            except Exception:  # noqa: BLE001 -- mail does not depend on it
                log.bug("Internal error")
            gevent.sleep(random.uniform(*INTERVAL))

    def finish(self) -> None:
        if self._wanted:
            self._send(sessions=0)

    def _send(self, sessions: int) -> None:
        """Wait a moment, not longer, for a reader that does not keep up."""
        mappings = _first([_mapping(mapping) for mapping in self._mappings])
        report = WorkerReport(
            os.getpid(), self._counts.began, next(self._turns), sessions, self._take_peaks(), mappings,
            self._certificates,
        )  # fmt: skip
        parts = [replace(report, rows=rows) for rows in packed(self._counts.rows())]
        deadline = monotonic() + PATIENCE
        for part in parts:
            while not send(self._links.to_reports, worker=part) and monotonic() < deadline:
                gevent.sleep(RETRY)

    def answer_questions(self) -> None:
        """Of the status process. Any worker that serves takes the next one."""
        if not self._wanted:
            return
        with gevent.socket.socket(fileno=os.dup(self._links.questions.fileno())) as questions:
            while True:
                question = receive(questions)
                left = float(question.get("asked_at", 0.0)) + ANSWER_TIMEOUT - monotonic()
                if left > 0:
                    gevent.with_timeout(left, self._answer, question, timeout_value=None)

    def _answer(self, question: dict[str, Any]) -> None:
        try:
            asked = self._look_up(str(question["address"]))
        except Exception as error:  # noqa: BLE001 -- the page shows it, and the next question is answered
            log.bug("Internal error")
            asked = Asked("", (), f"internal error: {error!r}")
        if not send(self._links.to_reports, answer=[question["number"], asked.steps, asked.result]):
            send(self._links.to_reports, answer=[question["number"], _first(asked.steps), asked.result])


def _first(facts: Sequence[Any]) -> list[Any]:
    """As many as fit: a report that is too large would never be sent."""
    return next(packed(facts))


def _mapping(mapping: Mapping) -> MappingState:
    facts, kind = mapping.facts(), mapping.name.partition(":")[0]
    seen = facts.seen and time() - monotonic() + facts.seen
    return MappingState(
        mapping.name, kind, facts.patterns, facts.loaded_at, facts.last_error, facts.database_up, seen,
        facts.cache_entries,
    )  # fmt: skip


def _certificates(settings: Settings) -> list[CertificateState]:
    found = []
    for pair in settings.certificates:
        with suppress(CertificateError):  # the worker has read it already, or would not be here
            facts = certificate_facts(pair)
            found.append(CertificateState(pair.cert, tuple(facts.names[:MAX_NAMES]), facts.expires.timestamp()))
    return _first(found)
