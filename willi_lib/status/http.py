"""What the status address answers. GET only, and nothing that a browser elsewhere could use.

There is no password. So a page on another site must not be able to have a browser read this one by a name of its own
that leads here (DNS rebinding): only addresses and names that are ours are answered.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from email.message import Message
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from time import time
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import gevent
from gevent.server import StreamServer

from .. import log
from . import metrics, page, view
from .overview import Asked
from .totals import FRESH, Totals

MAX_CONNECTIONS = 200  # at the same time; one more ends the oldest. gevent accepts up to 100 before it serves one
TIME_LIMIT = 10.0  # seconds for a connection, which is one request
MAX_REQUEST = 16 << 10  # octets, without a body, which is not read
MAX_ADDRESS = 400  # characters to look up; a real one has 320 at most
METHODS = ("GET", "HEAD")
HOST_AND_PORT = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(:[0-9]{0,5})?")  # in lower case
WHOLE_URL = re.compile(r"(?i)https?://(?P<host>[^/]*)(?P<path>/.*)?")
END_OF_HEAD = re.compile(rb"\n\r?\n")
HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Connection", "close"),
]
TEXT = "text/plain; charset=utf-8"

Ask = Callable[[str], Asked]


class Answer(NamedTuple):
    """What a browser gets."""

    body: str | bytes
    kind: str = TEXT
    status: HTTPStatus = HTTPStatus.OK


class Application:
    """What there is to see, and for which request."""

    def __init__(self, totals: Totals, ask: Ask) -> None:
        """ask: waits for a worker."""
        self._totals = totals
        self._ask = ask
        self._routes: dict[str, Callable[[str], Answer]] = {
            "/": self._page,
            "/style.css": lambda _: Answer(page.STYLE, "text/css; charset=utf-8"),
            "/status.json": self._json,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
        }

    def answer(self, method: str, target: str, version: str, headers: Message) -> Answer:
        """To one request. target: a path and a query, or a whole URL."""
        try:
            return self._answer(method, target, version, headers)
        except Exception:  # noqa: BLE001 -- the next one shall be answered
            log.bug("Internal error", path=target)
            return Answer("internal error\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)

    def _answer(self, method: str, target: str, version: str, headers: Message) -> Answer:
        if method not in METHODS:
            return Answer("GET and HEAD only\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
        hosts = headers.get_all("Host", [])
        if len(hosts) > 1 or not (hosts or version == "HTTP/1.0"):
            return Answer("One Host header, please.\n", status=HTTPStatus.BAD_REQUEST)  # RFC 9112 §3.2
        if whole := WHOLE_URL.fullmatch(target):  # which counts in the place of Host, RFC 9112 §3.2.2
            hosts, target = [whole["host"]], whole["path"] or "/"
        if hosts and not self._is_ours(hosts[0]):
            why = "This name is not one of ours. Use an address, localhost, or `domain` of willi.conf.\n"
            return Answer(why, status=HTTPStatus.MISDIRECTED_REQUEST)
        if _is_drawn_in(headers):
            return Answer("Not from another site.\n", status=HTTPStatus.FORBIDDEN)
        path, _, query = target.partition("?")
        route = self._routes.get(path)
        return route(query) if route else Answer("not found\n", status=HTTPStatus.NOT_FOUND)

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

    def _page(self, query: str) -> Answer:
        question = parse_qs(query, keep_blank_values=True)
        asked = None
        if "address" in question:
            address = question["address"][0].strip()[:MAX_ADDRESS]
            asked = self._ask(address) if address else Asked("", (), "")
        return Answer(page.render(view.overview(self._totals, time()), asked), "text/html; charset=utf-8")

    def _json(self, _: str) -> Answer:
        facts = dataclasses.asdict(view.overview(self._totals, time()))
        return Answer(json.dumps(facts) + "\n", "application/json")

    def _metrics(self, _: str) -> Answer:
        return Answer(metrics.exposition(self._totals, time()), metrics.CONTENT_TYPE)

    def _healthz(self, _: str) -> Answer:
        """Whether mail is served at all."""
        return _verdict([] if self._totals.master.number("serving") else ["no worker serves"])

    def _readyz(self, _: str) -> Answer:
        """Whether a load balancer should send clients here."""
        now, master = time(), self._totals.master
        reasons = []
        if master.stopping:
            reasons.append("Willi is being stopped")
        if not master.number("serving"):
            reasons.append("no worker serves")
        elif not self._totals.fresh_workers(now) or self._totals.master_at < now - FRESH:
            reasons.append("the last reports of the workers are too old")
        return _verdict(reasons)


def _is_drawn_in(headers: Message) -> bool:
    """Whether a page of another site has a browser ask, not a person who follows a link (Fetch Metadata).

    Another port of this host is the same site, and another page all the same. A frame is navigated, too.
    """
    site, mode = headers["Sec-Fetch-Site"], headers["Sec-Fetch-Mode"]
    followed = mode == "navigate" and headers.get("Sec-Fetch-Dest", "document") == "document"
    return site in ("cross-site", "same-site") and not followed


def _verdict(reasons: Sequence[str]) -> Answer:
    if reasons:
        return Answer("\n".join([*reasons, ""]), status=HTTPStatus.SERVICE_UNAVAILABLE)
    return Answer("ok\n")


class Handler(BaseHTTPRequestHandler):
    """One request, in bounds. What comes of bad ones is no matter for our log."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"

    def __init__(self, application: Application, connection: Any, address: Any) -> None:
        self._application = application
        super().__init__(connection, address, None)  # type: ignore[arg-type]  # it asks no server

    def setup(self) -> None:
        """Read the request, but not its body. One that is too long, or has no end, is none."""
        head = b""
        while not END_OF_HEAD.search(head) and len(head) < MAX_REQUEST and (more := self.request.recv(4096)):
            head += more
        self.rfile = io.BytesIO(head if END_OF_HEAD.search(head) else b"")
        self.wfile = self._output = io.BytesIO()

    def handle(self) -> None:
        """Answer it."""
        self.raw_requestline = self.rfile.readline()
        if self.raw_requestline and self.parse_request():
            self._send(self._application.answer(self.command, self.path, self.request_version, self.headers))

    def finish(self) -> None:
        """Send the answer."""
        self.request.sendall(self._output.getvalue())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `parse_request` says of a bad request."""
        log.debug("Bad request for the status", error=message or "")
        self._send(Answer(f"{message}\n", status=HTTPStatus(code)))

    def _send(self, answer: Answer) -> None:
        octets = answer.body.encode("utf-8", "backslashreplace") if isinstance(answer.body, str) else answer.body
        allow = [("Allow", ", ".join(METHODS))] if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else []
        described = [("Date", self.date_time_string()), ("Content-Type", answer.kind), ("Content-Length", len(octets))]
        self.send_response_only(answer.status)
        for name, value in (*described, *HEADERS, *allow):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(octets)


def _serve(application: Application, connection: Any, address: Any) -> None:
    """One connection."""
    try:
        gevent.with_timeout(TIME_LIMIT, Handler, application, connection, address, timeout_value=None)
    except OSError as error:
        log.debug("Status client gone", error=str(error))


class Connections:
    """All that are open. One too many ends the oldest, so that none has to wait for others that say or read nothing."""

    def __init__(self) -> None:
        self._open: dict[gevent.Greenlet[..., object], None] = {}

    def spawn(self, serve: Callable[..., object], *arguments: object) -> gevent.Greenlet[..., object]:
        """Serve one more."""
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.kill(block=False)
        greenlet = gevent.spawn(serve, *arguments)
        self._open[greenlet] = None
        greenlet.link(lambda ended: self._open.pop(ended, None))
        return greenlet


def make_servers(sockets: Iterable[Any], application: Application) -> list[StreamServer]:
    """Not started yet."""
    spawn: Any = Connections().spawn
    return [StreamServer(one, partial(_serve, application), spawn=spawn) for one in sockets]
