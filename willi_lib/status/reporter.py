"""What a worker tells the status process each second, and the questions that it answers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent
import gevent.socket

from .. import log
from ..config import Settings
from ..mappings.csv_file import CsvFile
from ..mappings.mysql import Mysql
from ..net.tls import CertificateError, certificate_facts
from ..processes.limits import Limits
from ..proxy import lookup
from ..routing.route import Mapping
from .counts import Counts
from .reports import MAX_ANY, Links, packed, parse, send, send_counts

MAX_NAMES = 100  # of a certificate
LAST_REPORT_TIMEOUT = 2.0  # seconds for the last counts, at the end of a worker
# Seconds between reports, and after one that could not be sent: at random, since the way has room for ten of them, and
# all workers start at the same moment.
INTERVAL, RETRY = (0.8, 1.2), (0.1, 0.4)
LAST_RETRY = 0.05  # seconds
ANSWER_TIMEOUT = 3.0  # seconds after which nobody waits any more for the answer to a question


class Reporter:
    """Sends nothing if there is no `status_listen`."""

    def __init__(
        self, settings: Settings, mappings: Sequence[Mapping], limits: Limits, counts: Counts, links: Links
    ) -> None:
        """Reads the certificates once more: not everybody may who wants to know about them."""
        self._settings = settings
        self._mappings = mappings
        self._limits = limits
        self._counts = counts
        self._links = links
        self._wanted = settings.status_listen is not None
        self._certificates = _certificates(settings) if self._wanted else []

    def report(self, sessions: Callable[[], int]) -> None:
        """Send how things are and what was counted, every second or so. Never waits for who reads it.

        sessions: that are open.
        """
        while True:
            sent = True
            try:
                sent = self._report(sessions())
            except Exception:  # noqa: BLE001 -- mail does not depend on it
                log.bug("Internal error")
            gevent.sleep(random.uniform(*(INTERVAL if sent else RETRY)))

    def _report(self, sessions: int) -> bool:
        """Whether it could be sent."""
        if not self._wanted:
            self._counts.take()  # and nobody needs it
            return True
        sent = send(self._links.to_reports, {"worker": self._state(sessions)})
        return send_counts(self._links.to_reports, self._counts) and sent

    def finish(self) -> None:
        """Send the last counts; wait a moment for who reads them."""
        deadline = monotonic() + LAST_REPORT_TIMEOUT
        while self._wanted and not send_counts(self._links.to_reports, self._counts) and monotonic() < deadline:
            gevent.sleep(LAST_RETRY)

    def _state(self, sessions: int) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "sessions": sessions,
            "peaks": self._limits.take_peaks(),
            "tables": _first([_table(mapping) for mapping in self._mappings]),
            "certificates": self._certificates,
        }

    def answer_questions(self) -> None:
        """Of the status process. Whoever serves takes the next one; several workers wait here."""
        if not self._wanted:
            return
        questions = gevent.socket.socket(fileno=os.dup(self._links.questions.fileno()))
        with questions:
            while True:
                question = parse(questions.recv(MAX_ANY))
                left = float(question.get("asked_at", 0.0)) + ANSWER_TIMEOUT - monotonic()
                if left > 0:
                    gevent.with_timeout(left, self._answer, question, timeout_value=None)

    def _answer(self, question: dict[str, Any]) -> None:
        try:
            steps, result = lookup.show(self._mappings, self._settings, str(question["address"]))
        except Exception as error:  # noqa: BLE001 -- whoever asks sees it, and the next question is answered
            log.bug("Internal error")
            steps, result = [], f"internal error: {error!r}"
        send(self._links.to_reports, {"answer": [question["number"], steps, result]})


def _first(facts: list[Any]) -> list[Any]:
    """As many as fit: a report that is too large would never be sent."""
    return next(packed(facts), [])


def _table(mapping: Mapping) -> dict[str, Any]:
    """A mapping as it is now; the names are those of `Table` in overview.py, and `seen`."""
    kind = mapping.name.partition(":")[0]
    facts: dict[str, Any] = {"name": mapping.name, "kind": kind}
    if isinstance(mapping, CsvFile):
        facts |= {"patterns": len(mapping), "loaded_at": mapping.loaded_at, "last_error": mapping.fault}
    elif isinstance(mapping, Mysql):
        now = mapping.condition
        facts |= {"database_up": now.up, "seen": now.seen, "last_error": now.error, "cache_entries": now.remembered}
    return facts


def _certificates(settings: Settings) -> list[list[Any]]:
    """Of each: file, names, when it expires, and what is wrong."""
    found: list[list[Any]] = []
    for pair in settings.certificates:
        with suppress(CertificateError):  # the worker has read it already, or would not be here
            facts = certificate_facts(pair)
            found.append([pair.cert, facts.names[:MAX_NAMES], facts.expires.timestamp(), ""])
    return _first(found)
