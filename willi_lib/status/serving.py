"""The status in whatever process has it: it reads the reports, asks the workers, and answers by HTTP."""

from __future__ import annotations

import os
import socket as stdlib_socket
from collections.abc import Sequence
from itertools import count
from time import monotonic, time
from typing import Any

import gevent
import gevent.socket
from gevent.event import AsyncResult, Event

from willi_lib import log
from willi_lib.config import Settings
from willi_lib.net.jobs import keep_going
from willi_lib.status.reports import MAX_ANY, Links, Report, packed, parse, send

from .http import Application, make_servers
from .overview import Asked, AskedStep
from .totals import Totals

ANSWER_TIMEOUT = 3.0  # seconds
HANDOVER_TIMEOUT = 5.0  # seconds to send all that was counted, and twice that to wait for it
NEWS_TIMEOUT = 3.0  # seconds for the first reports
HANDOVER_RETRY = 0.02  # seconds
INTERVAL = 1.0  # seconds


class Serving:
    """All of it."""

    def __init__(self, settings: Settings, sockets: Sequence[stdlib_socket.socket], links: Links) -> None:
        self._links = links
        self._totals = Totals(time())
        application = Application(self._totals, [settings.domain], self._ask)
        self._servers = make_servers(sockets, application)
        self._numbers = count(1)
        self._asked: dict[int, AsyncResult[tuple[list[Any], str]]] = {}
        self._has_past = Event()
        self._has_news = Event()
        self._reader: gevent.Greenlet[..., None] | None = None

    def start(self, has_predecessor: bool = False) -> None:
        """Begin to read, and then to answer.

        has_predecessor: whose numbers come first, or a reader would see them begin at zero. And nobody shall hear that
        no worker serves, only because none has had the time to say so.
        """
        self._reader = gevent.spawn(keep_going, self._read)
        if has_predecessor and not self._has_past.wait(2 * HANDOVER_TIMEOUT):
            log.warn("The status process before this one has handed over nothing, its counters are lost")
        self._has_news.wait(NEWS_TIMEOUT)
        for server in self._servers:
            server.start()

    def hand_over(self) -> None:
        """Stop, and send all that was counted to the next status process, which reads the reports now."""
        while self._servers:  # `start` shall find none if it still waits
            self._servers.pop().close()
        if self._reader:
            self._reader.kill()
        parts = [*self._totals.last_words(), *({"handover": rows} for rows in packed(self._totals.rows()))]
        deadline = monotonic() + HANDOVER_TIMEOUT
        reports: list[Report] = [*parts, {"handover_done": True}]
        for report in reports:
            while not send(self._links.to_reports, report) and monotonic() < deadline:
                gevent.sleep(HANDOVER_RETRY)

    # -- reports

    def _read(self) -> None:
        reports = gevent.socket.socket(fileno=os.dup(self._links.reports.fileno()))
        with reports:
            while True:
                report = parse(reports.recv(MAX_ANY))
                try:
                    self._take_in(report)
                except Exception:  # noqa: BLE001 -- of another version's making, perhaps: the next one may be better
                    log.bug("Internal error")

    def _take_in(self, report: Report) -> None:
        self._totals.take_in(report, time())
        if self._totals.fresh_workers(time()):
            self._has_news.set()
        if "handover_done" in report:
            self._has_past.set()
        if "answer" in report:
            number, *answer = report["answer"]
            asked = self._asked.get(number)
            if asked:
                asked.set(tuple(answer))

    # -- questions

    def _ask(self, address: str) -> Asked:
        """What a worker has for an address."""
        number = next(self._numbers)
        asked = self._asked[number] = AsyncResult()
        try:
            question = {"number": number, "address": address, "asked_at": monotonic()}
            if not send(self._links.to_questions, question):
                return Asked(address, (), "too many questions at the moment")
            steps, result = asked.wait(ANSWER_TIMEOUT) or ([], f"no worker has answered within {ANSWER_TIMEOUT:g} s")
        finally:
            del self._asked[number]
        return Asked(address, tuple(AskedStep(*step) for step in steps), result)
