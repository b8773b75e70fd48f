"""An SMTP client that sends exactly the octets it is given."""

from __future__ import annotations

import select
import socket
import ssl
import struct
from types import TracebackType

from tests.support.loopback import HOST, PATIENCE
from willi_lib.smtp.reply import Reply, parse_reply_line


class Client:
    """One connection. Nothing is sent or read unasked, not even the greeting.

    Used as a context manager it hangs up at the end, without QUIT.
    """

    def __init__(self, port: int, host: str = HOST, source: str = "", seconds: float = PATIENCE) -> None:
        """source: another loopback address to come from; seconds: the limit for every single read."""
        self.socket: socket.socket = socket.create_connection(
            (host, port), seconds, source_address=(source, 0) if source else None
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # octet by octet means a segment each
        self._buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Our end as the log names it."""
        host, port = self.socket.getsockname()[:2]
        return f"{host}:{port}"

    def send(self, octets: bytes) -> None:
        self.socket.sendall(octets)

    def send_slowly(self, octets: bytes) -> None:
        """Every octet in a write of its own."""
        for position in range(len(octets)):
            self.socket.sendall(octets[position : position + 1])

    def command(self, line: bytes) -> Reply:
        """Send one line, CRLF is added, and read the reply to it."""
        self.send(line + b"\r\n")
        return self.read_reply()

    def commands(self, *lines: bytes) -> list[Reply]:
        """Send a pipelined group in one write and read a reply to each."""
        self.send(b"".join(line + b"\r\n" for line in lines))
        return [self.read_reply() for _ in lines]

    def read_reply(self) -> Reply:
        """One whole reply. Raises ConnectionError if the connection ends first, TimeoutError if nothing comes."""
        lines = []
        while True:
            code, last, text = parse_reply_line(self.read_line())
            lines.append(text)
            if last:
                return Reply(code, tuple(lines))

    def read_line(self) -> bytes:
        """One line without its CRLF."""
        while b"\r\n" not in self._buffer:
            octets = self.socket.recv(65536)
            if not octets:
                raise ConnectionError(f"the server closed the connection after {self._buffer!r}")
            self._buffer += octets
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        assert b"\n" not in line, f"a bare LF in a reply: {line!r}"
        return line

    def has_octets(self) -> bool:
        """Whether something has come that is not read yet."""
        return self._buffer != b"" or select.select([self.socket], [], [], 0)[0] != []

    def read_to_end(self) -> bytes:
        """All that still comes until the server closes. Raises ConnectionResetError if it resets."""
        rest = self._buffer
        self._buffer = b""
        while octets := self.socket.recv(65536):
            rest += octets
        return rest

    def expect_eof(self) -> None:
        """The server closes properly and says nothing more."""
        rest = self.read_to_end()
        assert rest == b"", f"more than the end: {rest!r}"

    def starttls(self, context: ssl.SSLContext | None = None, name: str = "localhost") -> Reply:
        """STARTTLS and, after a 220, the handshake (without a context: nothing is verified)."""
        reply = self.command(b"STARTTLS")
        if reply.code == 220:
            self.handshake(context, name)
        return reply

    def handshake(self, context: ssl.SSLContext | None = None, name: str = "localhost") -> None:
        """name: what is sent as SNI, and verified if the context verifies."""
        assert self._buffer == b"", f"plain text after the reply to STARTTLS: {self._buffer!r}"
        if context is None:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self.socket = context.wrap_socket(self.socket, server_hostname=name)

    def finish(self) -> None:
        """Say that nothing more will come, and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up: FIN if all was read."""
        self.socket.close()

    def reset(self) -> None:
        """Hang up with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
