"""The page and /status.json without a daemon: what `render` makes, with the headers of the status process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.support import overviews
from tests.support.loopback import HOST
from willi_lib.status import page
from willi_lib.status.overview import Overview
from willi_lib.status.reports import Asked

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'"
)


class StatusServer:
    """Answers at `url`; `overview` is what it shows, `answers` what a path answers instead."""

    def __init__(self, overview: Overview) -> None:
        self.overview = overview
        self.answers: dict[str, bytes] = {}
        self.asked: list[str] = []  # the paths, in order
        self.then: dict[str, Callable[[], None]] = {}  # done once, when a path has been answered
        self._server = ThreadingHTTPServer((HOST, 0), _handler(self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)

    def answer(self, target: str) -> tuple[str, bytes]:
        """The type and the octets for the target of a GET."""
        self.asked.append(target)
        if target in self.answers:
            return "text/plain", self.answers[target]
        parts = urlsplit(target)
        made: dict[str, Callable[[], tuple[str, str]]] = {
            "/": lambda: ("text/html; charset=utf-8", page.render(self.overview, _question(parts.query))),
            "/style.css": lambda: ("text/css; charset=utf-8", page.STYLE),
            "/status.json": lambda: ("application/json", json.dumps(asdict(self.overview))),
        }
        kind, text = made[parts.path]()
        self.then.pop(parts.path, lambda: None)()
        return kind, text.encode()


def _question(query: str) -> Asked | None:
    address = parse_qs(query, keep_blank_values=True).get("address")
    if address is None:
        return None
    return overviews.asked(address[0]) if address[0] else Asked("", (), "")


def _handler(server: StatusServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = server.answer(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass  # a test says itself what it has seen

    return Handler
