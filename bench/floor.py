"""The floor: the fewest steps in which Python and gevent can pass a session on, to see how far above it Willi is.

It looks at nothing but the ends of groups and of messages, keeps no limit, refuses nothing and logs nothing: with
any other client than the bench's own it would hang or lose mail.

    python -m bench.floor PORT UPSTREAM_PORT
"""

from __future__ import annotations

import gc
import socket
import sys
from _socket import socket as Socket
from contextlib import suppress
from typing import Any

import gevent
from gevent import get_hub, getcurrent
from gevent.server import StreamServer

from .traffic import HOST

CAPABILITIES = b"250-floor.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n"
INTRODUCTION = (b"EHLO floor.example\r\n", b"XCLIENT NAME=[UNAVAILABLE] ADDR=127.0.0.1\r\n", b"EHLO client.example\r\n")
END = b"\r\n.\r\n"
READ, BODY_READ = 16 << 10, 256 << 10  # octets, as Willi's


class Wire:
    """A socket and the two things to wait for on it."""

    def __init__(self, connection: Socket) -> None:
        self.socket = connection
        loop = get_hub().loop
        self._readable, self._writable = loop.io(connection.fileno(), 1), loop.io(connection.fileno(), 2)

    def receive(self, size: int = READ, eager: bool = False) -> bytes:
        """What comes next; eager: it is there already, as a rule."""
        if eager:
            with suppress(BlockingIOError):
                return self.socket.recv(size)
        _wait(self._readable)
        return self.socket.recv(size)

    def send(self, octets: bytes) -> None:
        """All of it."""
        while octets:
            with suppress(BlockingIOError):
                octets = octets[self.socket.send(octets) :]
            if octets:
                _wait(self._writable)

    def close(self) -> None:
        """Hang up."""
        self._readable.close()
        self._writable.close()
        self.socket.close()


def _wait(watcher: Any) -> None:
    watcher.start(getcurrent().switch)
    get_hub().switch()
    watcher.stop()


def serve(connection: Socket, upstream_port: int) -> None:
    """One session."""
    client, upstream = Wire(connection), None
    client.send(b"220 floor.example ESMTP\r\n")
    while command := client.receive():
        if command.startswith(b"EHLO"):
            client.send(CAPABILITIES)
        elif command.startswith(b"MAIL"):
            upstream = upstream or connect(upstream_port)
            if pass_message(client, upstream, command):
                break
        elif command.startswith(b"QUIT"):
            client.send(b"221 bye\r\n")
            break
    client.close()
    if upstream:
        upstream.send(b"QUIT\r\n")
        upstream.receive()
        upstream.close()


def connect(port: int) -> Wire:
    """An upstream that waits for MAIL."""
    connection = Socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.connect_ex((HOST, port))
    upstream = Wire(connection)
    upstream.receive()
    for line in INTRODUCTION:
        upstream.send(line)
        upstream.receive()
    return upstream


def pass_message(client: Wire, upstream: Wire, group: bytes) -> bool:
    """MAIL, RCPT and DATA in one write, the message, its verdict; whether QUIT came behind it."""
    upstream.send(group)
    answers = upstream.receive()
    while answers.count(b"\n") < 3:
        answers += upstream.receive()
    client.send(answers)
    tail = b""
    while True:
        octets = client.receive(BODY_READ, eager=True)
        tail = (tail + octets[-32:])[-32:]
        quits = tail.endswith(END + b"QUIT\r\n")
        upstream.send(octets.removesuffix(b"QUIT\r\n") if quits else octets)
        if quits or tail.endswith(END):
            client.send(upstream.receive() + (b"221 bye\r\n" if quits else b""))
            return quits


class Listener(StreamServer):
    """Hands out raw sockets, as Willi's does."""

    def do_read(self) -> tuple[Socket, int] | None:  # type: ignore[override]
        """One connection, if there is one."""
        try:
            descriptor, _ = self.socket._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return None
        connection = Socket(socket.AF_INET, socket.SOCK_STREAM, 0, descriptor)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, int(sys.argv[2])

    def do_handle(self, *arguments: object) -> None:
        """In a greenlet of its own."""
        gevent.spawn_raw(serve, *arguments)


if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(50_000)
    Listener((HOST, int(sys.argv[1])), serve, backlog=4096).serve_forever()
