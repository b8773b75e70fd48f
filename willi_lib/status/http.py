"""What the status address answers. GET only, and nothing that a browser elsewhere could use.

There is no password. So a page on another site must not be able to have a browser read this one by a name of its own
that leads here (DNS rebinding): only addresses and names that are ours are answered.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from ipaddress import ip_address
from time import time
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

from willi_lib import log

from . import metrics, page, view
from .overview import Asked
from .totals import FRESH, Totals

MAX_CONNECTIONS = 200  # at the same time; one more ends the oldest. gevent accepts up to 100 before it serves one
TIME_LIMIT = 10.0  # seconds for a connection, which is one request
MAX_REQUEST = 16 << 10  # octets
MAX_ADDRESS = 400  # characters to look up; a real one has 320 at most
METHODS = ("GET", "HEAD")
HOST_AND_PORT = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(:[0-9]{0,5})?")  # in lower case
WHOLE_URL = re.compile(r"(?i)https?://(?P<host>[^/]*)(?P<path>/.*)?")
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

Environ = dict[str, Any]
Ask = Callable[[str], Asked]


class Answer(NamedTuple):
    """What a browser gets."""

    body: str | bytes
    kind: str = TEXT
    status: HTTPStatus = HTTPStatus.OK


class Application:
    """By the rules of WSGI."""

    def __init__(self, totals: Totals, ask: Ask) -> None:
        """ask: waits for a worker."""
        self._totals = totals
        self._ask = ask
        self._routes: dict[str, Callable[[Environ], Answer]] = {
            "/": self._page,
            "/style.css": lambda _: Answer(page.STYLE, "text/css; charset=utf-8"),
            "/status.json": self._json,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
        }

    def __call__(self, environ: Environ, start_response: Callable[..., object]) -> list[bytes]:
        """Answer one request."""
        try:
            body, kind, status = self._answer(environ)
        except Exception:  # noqa: BLE001 -- the next one shall be answered
            log.bug("Internal error", path=str(environ.get("PATH_INFO")))
            body, kind, status = Answer("internal error\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)
        octets = body.encode("utf-8", "backslashreplace") if isinstance(body, str) else body
        extra = [("Allow", ", ".join(METHODS))] if status is HTTPStatus.METHOD_NOT_ALLOWED else []
        described = [("Content-Type", kind), ("Content-Length", str(len(octets)))]
        start_response(f"{status.value} {status.phrase}", [*described, *HEADERS, *extra])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [octets]

    def _answer(self, environ: Environ) -> Answer:
        if environ["REQUEST_METHOD"] not in METHODS:
            return Answer("GET and HEAD only\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
        host, path = environ.get("HTTP_HOST"), environ["PATH_INFO"]
        if "," in (host or "") or (host is None and environ.get("SERVER_PROTOCOL") == "HTTP/1.1"):
            return Answer("One Host header, please.\n", status=HTTPStatus.BAD_REQUEST)  # RFC 9112 §3.2
        if whole := WHOLE_URL.fullmatch(path):  # which counts in the place of Host, RFC 9112 §3.2.2
            host, path = whole["host"], whole["path"] or "/"
        if host is not None and not self._is_ours(host):
            why = "This name is not one of ours. Use an address, localhost, or `domain` of willi.conf.\n"
            return Answer(why, status=HTTPStatus.MISDIRECTED_REQUEST)
        if _is_drawn_in(environ):
            return Answer("Not from another site.\n", status=HTTPStatus.FORBIDDEN)
        route = self._routes.get(path)
        return route(environ) if route else Answer("not found\n", status=HTTPStatus.NOT_FOUND)

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

    def _page(self, environ: Environ) -> Answer:
        question = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        asked = None
        if "address" in question:
            address = question["address"][0].strip()[:MAX_ADDRESS]
            asked = self._ask(address) if address else Asked("", (), "")
        return Answer(page.render(view.overview(self._totals, time()), asked), "text/html; charset=utf-8")

    def _json(self, _: Environ) -> Answer:
        facts = dataclasses.asdict(view.overview(self._totals, time()))
        return Answer(json.dumps(facts) + "\n", "application/json")

    def _metrics(self, _: Environ) -> Answer:
        return Answer(metrics.exposition(self._totals, time()), metrics.CONTENT_TYPE)

    def _healthz(self, _: Environ) -> Answer:
        """Whether mail is served at all."""
        return _verdict([] if self._totals.master.number("serving") else ["no worker serves"])

    def _readyz(self, _: Environ) -> Answer:
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


def _is_drawn_in(environ: Environ) -> bool:
    """Whether a page of another site has a browser ask, not a person who follows a link (Fetch Metadata).

    Another port of this host is the same site, and another page all the same. A frame is navigated, too.
    """
    site, mode = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_SEC_FETCH_MODE")
    followed = mode == "navigate" and environ.get("HTTP_SEC_FETCH_DEST", "document") == "document"
    return site in ("cross-site", "same-site") and not followed


def _verdict(reasons: Sequence[str]) -> Answer:
    if reasons:
        return Answer("\n".join([*reasons, ""]), status=HTTPStatus.SERVICE_UNAVAILABLE)
    return Answer("ok\n")


class _Bounded:
    """The request as it comes, at most MAX_REQUEST octets of it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = MAX_REQUEST

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def readline(self, limit: int = -1) -> bytes:
        """At most that many octets. Raises ValueError when there is no room: what comes may be the Host header."""
        if not self._left:
            raise ValueError("the request is too long")
        return self._count(self._file.readline(min(limit, self._left) if limit >= 0 else self._left))

    def read(self, size: int = -1) -> bytes:
        """At most that many octets."""
        return self._count(self._file.read(min(size, self._left) if size >= 0 else self._left))

    def close(self) -> None:
        """Nobody wants more."""
        self._file.close()

    def _count(self, octets: bytes) -> bytes:
        self._left -= len(octets)
        return octets


class Handler(WSGIHandler):
    """One request, in bounds. What comes of bad ones is no matter for our log."""

    def __init__(self, connection: Any, address: Any, server: Any) -> None:
        super().__init__(connection, address, server)
        self.rfile = _Bounded(self.rfile)  # type: ignore[assignment]  # all that gevent needs of one

    def handle(self) -> None:
        """Serve the connection."""
        try:
            gevent.with_timeout(TIME_LIMIT, super().handle, timeout_value=None)
        except OSError as error:
            log.debug("Status client gone", error=str(error))

    def handle_one_request(self) -> Any:
        """One only, whatever the client wishes; an error is a pair."""
        result = super().handle_one_request()
        return None if result is True else result

    def _handle_client_error(self, ex: Exception) -> tuple[str, bytes]:
        log.debug("Bad request for the status", error=repr(ex))
        return "400", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def handle_error(self, kind: Any, error: Any, trace: Any) -> None:
        """The client has gone, its time is over, or its body is nonsense: our own errors stay in `Application`."""
        if not issubclass(kind, OSError | ValueError | gevent.Timeout | gevent.GreenletExit):
            super().handle_error(kind, error, trace)


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


def make_servers(sockets: Iterable[Any], application: Application) -> list[WSGIServer]:
    """Not started yet."""
    spawn: Any = Connections().spawn
    named = {"SERVER_NAME": "willi"}  # else gevent asks the DNS
    return [
        WSGIServer(one, application, spawn=spawn, log=None, error_log=None, handler_class=Handler, environ=named)
        for one in sockets
    ]
