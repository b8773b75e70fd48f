"""An upstream whose every octet the test itself sends, at the moment of its choice."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.support.client import Client
from tests.support.loopback import HOST, PATIENCE


class Peer(Client):
    """Our end of a connection that Willi opened."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.settimeout(PATIENCE)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = accepted
        self._buffer = b""

    def answer(self, verb: bytes, octets: bytes) -> bytes:
        """Read a command, which must be of this verb, and send these octets. Returns the command."""
        line = self.read_line()
        assert line.split(b" ")[0] == verb, line
        self.send(octets)
        return line

    def introduce(self, *extensions: bytes) -> None:
        """Greeting and EHLO."""
        self.send(b"220 raw.example ESMTP\r\n")
        self.answer(b"EHLO", b"".join(b"250-%s\r\n" % line for line in (b"raw.example", *extensions)) + b"250 HELP\r\n")

    def take_envelope(self, *extensions: bytes) -> None:
        """Greeting, EHLO, and 250 for MAIL and one RCPT."""
        self.introduce(*extensions)
        self.answer(b"MAIL", b"250 2.1.0 ok\r\n")
        self.answer(b"RCPT", b"250 2.1.5 ok\r\n")

    def read_for(self, mark: bytes) -> bytes:
        """All that comes, up to these octets and with them."""
        while mark not in self._buffer:
            octets = self.socket.recv(65536)
            assert octets, f"the end, before {mark!r}: {self._buffer[-500:]!r}"
            self._buffer += octets
        end = self._buffer.index(mark) + len(mark)
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        return taken

    def read_until_dropped(self) -> bytes:
        """What still comes before Willi closes or resets the connection."""
        rest, self._buffer = self._buffer, b""
        with contextlib.suppress(ConnectionResetError):
            while octets := self.socket.recv(65536):
                rest += octets
        return rest

    def swallow(self, count: int) -> None:
        """Read so many octets and forget them."""
        count -= len(self._buffer)
        self._buffer = b""
        while count > 0:
            octets = self.socket.recv(min(count, 1 << 20))
            assert octets, f"the end, {count} octets too early"
            count -= len(octets)

    def flood(self, octets: bytes, pieces: int) -> int:
        """Send these octets again and again, at most so often, until Willi closes. How often it was."""
        for number in range(pieces):
            try:
                self.send(octets)
            except ConnectionError:
                return number
        return pieces


class RawUpstream:
    """Listens on a loopback port; nothing is answered unless the test does it."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server((HOST, port))
        self._listener.settimeout(PATIENCE)
        self._peers: list[Peer] = []

    @property
    def server(self) -> str:
        """As a route names it."""
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def accept(self) -> Peer:
        """The next connection."""
        peer = Peer(self._listener.accept()[0])
        self._peers.append(peer)
        return peer

    def stop(self) -> None:
        self._listener.close()
        for peer in self._peers:
            peer.close()


class Meanwhile(threading.Thread):
    """Send octets while the test does something else: more than the buffers in between hold."""

    def __init__(self, client: Client, octets: bytes) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._octets = octets
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed: what that means is for the test to say
            self._client.send(self._octets)
