"""The client's end of a session's socket pair, in clear and then, perhaps, in TLS."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import gevent.socket

READY_FOR_TLS = b"220 2.0.0 Ready to start TLS\r\n"


@dataclass
class Phase:
    """What was said and heard, TLS taken off. A second one begins with TLS: all before it counts no more."""

    said: bytes = b""
    heard: bytes = b""


@lru_cache
def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class ClientEnd:
    """Sends packets: a piece is what Willi receives at a time."""

    def __init__(self, ours: socket.socket) -> None:
        ours.setblocking(False)
        self.phases = [Phase()]
        self._socket = ours
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    @property
    def now(self) -> Phase:
        return self.phases[-1]

    def send(self, piece: bytes) -> bool:
        """Whether Willi still takes it."""
        octets = piece
        if self._tls:
            self._tls.write(piece)
            octets = self._outgoing.read()
        try:
            self._socket.send(octets)
        except OSError:
            return False
        self.now.said += piece
        return True

    def hear(self, wait: bool) -> bytes | None:
        """Take what is there; wait: for something. What came, TLS not taken off; empty: the end; None: nothing."""
        while True:
            try:
                octets = self._socket.recv(1 << 20)
            except ConnectionError:  # it closed before it had read all; this is told once, and before what it said
                continue
            except BlockingIOError:
                if not wait:
                    return None
                gevent.socket.wait_read(self._socket.fileno())
                continue
            if self._tls is None:
                self.now.heard += octets
            else:
                self._incoming.write(octets)
                self._decrypt()
            return octets

    def _decrypt(self) -> None:
        assert self._tls
        with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while octets := self._tls.read(1 << 16):
                self.now.heard += octets

    def shake_hands(self) -> None:
        """If Willi has just said that it is ready."""
        if self._tls or not self.now.heard.endswith(READY_FOR_TLS):
            return
        tls = _context().wrap_bio(self._incoming, self._outgoing, server_hostname="willi.example")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._socket.send(self._outgoing.read())
                if not (octets := self.hear(wait=True)):
                    return
                self.now.heard = self.now.heard.removesuffix(octets)
                self._incoming.write(octets)
        with suppress(OSError):
            self._socket.send(self._outgoing.read())
        self._tls = tls
        self.phases.append(Phase())

    def finish(self) -> None:
        """Nothing more will be said."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
