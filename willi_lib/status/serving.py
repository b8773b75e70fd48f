"""What the status process does: it reads the reports, asks the workers, and answers by HTTP."""

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

from .. import log
from ..config import Settings
from ..net.jobs import keep_going
from .http import Application, make_servers
from .overview import Asked, AskedStep
from .reports import MAX_ANY, Links, parse, send
from .totals import Totals

ANSWER_TIMEOUT = 3.0  # seconds
NEWS_TIMEOUT = 3.0  # seconds for the first reports


class Serving:
    """All of it."""

    def __init__(self, settings: Settings, sockets: Sequence[stdlib_socket.socket], links: Links, since: float) -> None:
        """since: what older workers have counted before is not counted here (monotonic)."""
        self._links = links
        self._log: tuple[str, str] = (settings.log, settings.loglevel)
        self._totals = Totals(since)
        self._servers = make_servers(sockets, Application(self._totals, self._ask))
        self._numbers = count(1)
        self._asked: dict[int, AsyncResult[tuple[list[Any], str]]] = {}
        self._has_news = Event()

    def start(self) -> None:
        """Begin to read; then to answer: not that no worker serves, only because none has had the time to say so."""
        gevent.spawn(keep_going, self._read)
        self._has_news.wait(NEWS_TIMEOUT)
        for server in self._servers:
            server.start()

    def _read(self) -> None:
        with gevent.socket.socket(fileno=os.dup(self._links.reports.fileno())) as reports:
            while True:
                self._take_in(parse(reports.recv(MAX_ANY)))

    def _take_in(self, report: dict[str, Any]) -> None:
        try:
            self._totals.take_in(report, time())
        except Exception:  # noqa: BLE001 -- of another version's making, perhaps: the next one may be better
            log.bug("Internal error")
        master = self._totals.master
        if master.log and (master.log, master.loglevel) != self._log:  # another file is in force
            self._log = (master.log, master.loglevel)
            log.set_up(master.loglevel, master.log)
        if self._totals.fresh_workers(time()):
            self._has_news.set()
        if "answer" in report:
            number, *answer = report["answer"]
            if asked := self._asked.get(number):
                asked.set(tuple(answer))

    # -- questions

    def _ask(self, address: str) -> Asked:
        """What a worker has for an address."""
        number = next(self._numbers)
        asked = self._asked[number] = AsyncResult()
        try:
            if not send(self._links.to_questions, number=number, address=address, asked_at=monotonic()):
                return Asked(address, (), "too many questions at the moment")
            steps, result = asked.wait(ANSWER_TIMEOUT) or ([], f"no worker has answered within {ANSWER_TIMEOUT:g} s")
        finally:
            del self._asked[number]
        return Asked(address, tuple(AskedStep(*step) for step in steps), result)
