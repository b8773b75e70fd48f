"""The status process at work: it reads the reports, asks the workers, and answers by HTTP.

GET only, and nothing that a browser elsewhere could use. There is no password. So a page on another site must not be
able to have a browser read this one by a name of its own that leads here (DNS rebinding): only addresses and names that
are ours are answered.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import socket as stdlib_socket
from collections.abc import Callable, Iterable, Sequence
from email.message import Message
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from ipaddress import ip_address
from itertools import count
from time import monotonic, time
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import gevent
import gevent.socket
from gevent.event import AsyncResult, Event
from gevent.server import StreamServer

from .. import log
from ..config import Settings
from ..net.jobs import keep_going
from . import metrics, page
from .overview import overview
from .reports import ANSWER_TIMEOUT, Asked, AskedStep, Links, receive, send
from .totals import FRESH, Totals

FIRST_REPORTS = 3.0  # seconds for the first reports
MAX_CONNECTIONS = 200  # at the same time; one more ends the oldest. gevent accepts up to 100 before it serves one
TIME_LIMIT = 10.0  # seconds for a connection, which is one request
MAX_REQUEST = 16 << 10  # octets, without a body, which is not read
MAX_ADDRESS = 400  # characters to look up; a real one has 320 at most
METHODS = ("GET", "HEAD")
REQUEST_LINE = re.compile(rb"([A-Za-z]+) ([!-~]+) HTTP/1\.([0-9])\r?\n")
END_OF_HEAD = re.compile(rb"\n\r?\n")
HOST_AND_PORT = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(:[0-9]{0,5})?")  # in lower case
WHOLE_URL = re.compile(r"(?i)https?://(?P<host>[^/]*)(?P<path>/.*)?")
HEADERS = (
    "Content-Security-Policy: default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options: nosniff",
    "X-Frame-Options: DENY",
    "Referrer-Policy: no-referrer",
    "Cache-Control: no-store",
    "Cross-Origin-Resource-Policy: same-origin",
    "Connection: close",
)
TEXT = "text/plain; charset=utf-8"


class HttpRequest(NamedTuple):
    method: str
    target: str  # a path and a query, or a whole URL
    headers: Message
    needs_host: bool = True  # HTTP/1.1 and later, RFC 9112 §3.2


class HttpAnswer(NamedTuple):
    body: str | bytes
    kind: str = TEXT
    status: HTTPStatus = HTTPStatus.OK

    def octets(self, method: str) -> bytes:
        body = self.body.encode("utf-8", "backslashreplace") if isinstance(self.body, str) else self.body
        allow = [f"Allow: {', '.join(METHODS)}"] if self.status is HTTPStatus.METHOD_NOT_ALLOWED else []
        lines = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}", f"Date: {formatdate(usegmt=True)}",
            f"Content-Type: {self.kind}", f"Content-Length: {len(body)}", *HEADERS, *allow, "", "",
        )  # fmt: skip
        return "\r\n".join(lines).encode("ascii") + (b"" if method == "HEAD" else body)


class Application:
    def __init__(self, totals: Totals, ask: Callable[[str], Asked]) -> None:
        """ask: waits for a worker."""
        self._totals = totals
        self._ask = ask
        self._routes: dict[str, Callable[[str], HttpAnswer]] = {
            "/": self._page,
            "/style.css": lambda _: HttpAnswer(page.STYLE, "text/css; charset=utf-8"),
            "/status.json": self._json,
            "/metrics": lambda _: HttpAnswer(metrics.exposition(totals, time()), metrics.CONTENT_TYPE),
            "/healthz": self._healthz,
            "/readyz": self._readyz,
        }

    def answer(self, request: HttpRequest) -> HttpAnswer:
        try:
            return self._answer(request)
        except Exception:  # noqa: BLE001 -- the next one shall be answered
            log.bug("Internal error", path=request.target)
            return HttpAnswer("internal error\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)

    def _answer(self, request: HttpRequest) -> HttpAnswer:
        if request.method not in METHODS:
            return HttpAnswer("GET and HEAD only\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
        hosts, target = request.headers.get_all("Host", []), request.target
        if len(hosts) > 1 or (request.needs_host and not hosts):
            return HttpAnswer("One Host header, please.\n", status=HTTPStatus.BAD_REQUEST)
        if whole := WHOLE_URL.fullmatch(target):  # which counts in the place of Host, RFC 9112 §3.2.2
            hosts, target = [whole["host"]], whole["path"] or "/"
        if hosts and not self._is_ours(hosts[0]):
            why = "This name is not one of ours. Use an address, localhost, or `domain` of willi.conf.\n"
            return HttpAnswer(why, status=HTTPStatus.MISDIRECTED_REQUEST)
        if _is_cross_site(request.headers):
            return HttpAnswer("Not from another site.\n", status=HTTPStatus.FORBIDDEN)
        path, _, query = target.partition("?")
        route = self._routes.get(path)
        return route(query) if route else HttpAnswer("not found\n", status=HTTPStatus.NOT_FOUND)

    def _is_ours(self, host: str) -> bool:
        """Whether the host of a URL means us: an address, which no name server can lead here, or a name of ours."""
        parts = HOST_AND_PORT.fullmatch(host.lower())
        if parts is None:
            return False
        if parts["name"].removesuffix(".") in ("localhost", self._totals.master.domain.lower()):
            return True
        try:
            return ip_address(parts["name"].strip("[]")).version == (6 if parts["name"].startswith("[") else 4)
        except ValueError:
            return False

    def _page(self, query: str) -> HttpAnswer:
        question = parse_qs(query, keep_blank_values=True)
        asked = None
        if "address" in question:
            address = question["address"][0].strip()[:MAX_ADDRESS]
            asked = self._ask(address) if address else Asked("", (), "")
        return HttpAnswer(page.render(overview(self._totals, time()), asked), "text/html; charset=utf-8")

    def _json(self, _: str) -> HttpAnswer:
        facts = dataclasses.asdict(overview(self._totals, time()))
        return HttpAnswer(json.dumps(facts) + "\n", "application/json")

    def _healthz(self, _: str) -> HttpAnswer:
        """Whether mail is served at all."""
        return _verdict("" if self._totals.master.number("serving") else "no worker serves\n")

    def _readyz(self, _: str) -> HttpAnswer:
        """Whether a load balancer should send clients here."""
        now, master = time(), self._totals.master
        why = "Willi is being stopped\n" if master.stopping else ""
        if not master.number("serving"):
            why += "no worker serves\n"
        elif not self._totals.fresh_workers(now) or self._totals.master_at < now - FRESH:
            why += "the last reports of the workers are too old\n"
        return _verdict(why)


def _verdict(why_not: str) -> HttpAnswer:
    return HttpAnswer(why_not, status=HTTPStatus.SERVICE_UNAVAILABLE) if why_not else HttpAnswer("ok\n")


def _is_cross_site(headers: Message) -> bool:
    """Whether a page of another site has a browser ask, not a person who follows a link (Fetch Metadata).

    Another port of this host is the same site, and another page all the same. A frame is navigated, too.
    """
    site, mode = headers["Sec-Fetch-Site"], headers["Sec-Fetch-Mode"]
    followed = mode == "navigate" and headers.get("Sec-Fetch-Dest", "document") == "document"
    return site in ("cross-site", "same-site") and not followed


# Connections


def read_request(connection: Any) -> HttpRequest | None:
    """All but its body. None: it is too long, has no end, or is not HTTP."""
    head = b""
    while not END_OF_HEAD.search(head) and len(head) < MAX_REQUEST and (more := connection.recv(4096)):
        head += more
    line = REQUEST_LINE.match(head)
    if not line or not END_OF_HEAD.search(head):
        return None
    try:
        headers = parse_headers(io.BytesIO(head[line.end() :]))
    except HTTPException:  # more of them than it takes
        return None
    return HttpRequest(line[1].decode("ascii"), line[2].decode("ascii"), headers, needs_host=line[3] != b"0")


def _serve(application: Application, connection: Any, _address: object) -> None:
    try:
        with gevent.Timeout(TIME_LIMIT):
            if request := read_request(connection):
                connection.sendall(application.answer(request).octets(request.method))
            else:
                log.debug("Bad request for the status")
                connection.sendall(HttpAnswer("bad request\n", status=HTTPStatus.BAD_REQUEST).octets("GET"))
    except (OSError, gevent.Timeout) as error:
        log.debug("Status client gone", error=str(error))


def make_servers(sockets: Iterable[Any], application: Application) -> list[StreamServer]:
    """Not started yet. A connection too many ends the oldest: none waits for others that say or read nothing."""
    connections: dict[gevent.Greenlet[..., object], None] = {}

    def spawn(*call: Any) -> gevent.Greenlet[..., object]:
        if len(connections) >= MAX_CONNECTIONS:
            oldest = next(iter(connections))
            del connections[oldest]
            oldest.kill(block=False)
        greenlet = gevent.spawn(*call)
        connections[greenlet] = None
        greenlet.link(lambda ended: connections.pop(ended, None))
        return greenlet

    serve: Any = {"handle": partial(_serve, application), "spawn": spawn}  # gevent's types know no such `spawn`
    return [StreamServer(one, **serve) for one in sockets]


# What there is to answer


class Serving:
    def __init__(self, settings: Settings, sockets: Sequence[stdlib_socket.socket], links: Links, since: float) -> None:
        """since: what older workers have counted before is not counted here (monotonic)."""
        self._links = links
        self._log: tuple[str, str] = settings.log, settings.loglevel
        self._totals = Totals(since)
        self._servers = make_servers(sockets, Application(self._totals, self._ask))
        self._numbers = count(1)
        self._asked: dict[int, AsyncResult[tuple[list[Any], str]]] = {}
        self._has_reports = Event()

    def start(self) -> None:
        """Begin to read; then to answer: not that no worker serves, only because none has had the time to say so."""
        gevent.spawn(keep_going, self._read)
        self._has_reports.wait(FIRST_REPORTS)
        for server in self._servers:
            server.start()

    def _read(self) -> None:
        with gevent.socket.socket(fileno=os.dup(self._links.reports.fileno())) as reports:
            while True:
                self._add_report(receive(reports))

    def _add_report(self, report: dict[str, Any]) -> None:
        try:
            self._totals.add_report(report, time())
        except Exception:  # noqa: BLE001 -- of another version's making, perhaps: the next one may be better
            log.bug("Internal error")
        master = self._totals.master
        if master.log and (master.log, master.loglevel) != self._log:  # another file is in force
            self._log = master.log, master.loglevel
            log.set_up(master.loglevel, master.log)
        if self._totals.fresh_workers(time()):
            self._has_reports.set()
        if "answer" in report:
            number, *answer = report["answer"]
            if asked := self._asked.get(number):
                asked.set(tuple(answer))

    def _ask(self, address: str) -> Asked:
        number = next(self._numbers)
        asked = self._asked[number] = AsyncResult()
        try:
            if not send(self._links.to_questions, number=number, address=address, asked_at=monotonic()):
                return Asked(address, (), "too many questions at the moment")
            steps, result = asked.wait(ANSWER_TIMEOUT) or ([], f"no worker has answered within {ANSWER_TIMEOUT:g} s")
        finally:
            del self._asked[number]
        return Asked(address, tuple(AskedStep(*step) for step in steps), result)
