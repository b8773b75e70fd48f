"""The two ends of the measured proxy: clients that send messages, and the upstream that counts what arrives.

Postfix's smtp-source and smtp-sink would do for plain sessions, but not for STARTTLS, pipelining, XCLIENT, times of
sessions, or comparing what was sent with what came.

`python -m bench.traffic` is the upstream: a process of its own, until its stdin ends.
"""

from __future__ import annotations

import base64
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import gevent

# All addresses are numbers, and asking a thread for each of them would cost more than the connection.
gevent.config.resolver = "block"
from gevent import socket, ssl  # noqa: E402 -- after the choice of the resolver
from gevent.server import StreamServer  # noqa: E402

gevent.get_hub().NOT_ERROR += (Exception,)  # no traceback from a greenlet: at_once() raises what it raised

HOST = "127.0.0.1"
RECIPIENT = b"ann@bench.example"
FAREWELLS = 50  # at a time
PATIENCE = 60.0  # seconds for one session, which takes a thousandth of it
END = b"\r\n.\r\n"
READ = 256 << 10  # octets


class SessionFailed(Exception):
    """A reply that should not come, or none."""


# -- the clients


@dataclass(frozen=True)
class Load:
    """What the clients of one scenario do. size: octets of a message; text: it is no attachment."""

    clients: int
    messages: int = 1
    size: int = 4096
    text: bool = False
    tls: bool = False


@dataclass
class Sent:
    """Some sessions that all went well. seconds: for all; times: each session's, in seconds, from connect to close."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)


def make_message(load: Load) -> bytes:
    """A mail of about this size as it goes over the wire: some text, then an attachment in base64, or all text."""
    text = b"Hello. This is a line of text, and it ends with a dot.\r\n" * 19 + b"..This one began with one.\r\n"
    head = b"From: <eva@client.example>\r\nTo: <ann@bench.example>\r\nSubject: bench\r\n\r\n" + text
    octets = load.size - len(head)
    attachment = base64.encodebytes(random.Random(octets).randbytes(octets)).replace(b"\n", b"\r\n")
    rest = text * (octets // len(text) + 1) if load.text else attachment
    return head + rest[:octets].rpartition(b"\r\n")[0] + END


def client_context() -> ssl.SSLContext:
    """Full handshakes, no verification: most MX clients do not verify."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Client:
    """One session as a mail server has it: EHLO, STARTTLS if wanted, then pipelined groups (RFC 2920)."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None, source: str = "") -> None:
        """source: a loopback address to come from. Raises SessionFailed or OSError."""
        self._socket = socket.create_connection((HOST, port), source_address=(source, 0) if source else None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self.expect(b"220")
        self.command(b"EHLO client.example", b"250")
        if tls:
            self.command(b"STARTTLS", b"220")
            self._socket = tls.wrap_socket(self._socket)
            self.command(b"EHLO client.example", b"250")

    def command(self, line: bytes, *codes: bytes) -> None:
        """Send a line, or several, and expect as many replies as codes."""
        self._socket.sendall(line + b"\r\n")
        self.expect(*codes)

    def send(self, message: bytes, last: bool) -> None:
        """One transaction; QUIT comes with the end of the last message."""
        self.command(b"MAIL FROM:<eva@client.example>\r\nRCPT TO:<%b>\r\nDATA" % RECIPIENT, b"250", b"250", b"354")
        self._socket.sendall(message + b"QUIT\r\n" if last else message)
        self.expect(b"250", b"221") if last else self.expect(b"250")

    def expect(self, *codes: bytes) -> None:
        """Read one reply for each code. Raises SessionFailed."""
        for code in codes:
            line = self._line()
            while line[3:4] == b"-":
                line = self._line()
            if not line.startswith(code):
                raise SessionFailed(f"{line.decode(errors='replace')!r} where {code.decode()} should have come")

    def _line(self) -> bytes:
        while b"\n" not in self._unread:
            octets = self._socket.recv(READ)
            if not octets:
                raise SessionFailed("the connection was closed in the middle of a session")
            self._unread += octets
        line, _, self._unread = self._unread.partition(b"\n")
        return line.rstrip()

    def drip(self, octets: bytes) -> None:
        """Send them; no reply is read. Raises OSError."""
        self._socket.sendall(octets)

    def has_ended(self) -> bool:
        """Whether the other side has closed; what it has said before is thrown away. For the last look."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv(READ):
                continue
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def send(port: int, load: Load, message: bytes, sessions: int) -> Sent:
    """So many sessions, `load.clients` of them at a time. Raises SessionFailed or OSError at the first that fails."""
    sent, numbers, tls = Sent(), iter(range(sessions)), client_context() if load.tls else None

    def one_after_another() -> None:
        for _ in numbers:
            begun = time.perf_counter()
            with gevent.Timeout(PATIENCE, SessionFailed(f"a session took more than {PATIENCE:g} s")):
                client = Client(port, tls)
                try:
                    for number in range(1, load.messages + 1):
                        client.send(message, last=number == load.messages)
                finally:
                    client.close()
            sent.times.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    at_once(one_after_another, load.clients)
    sent.seconds = time.perf_counter() - begun
    return sent


def greets(port: int) -> bool:
    """Whether somebody takes mail there, and answers within a second."""
    try:
        with gevent.Timeout(1.0, SessionFailed("silence")):
            Client(port).close()
    except (SessionFailed, OSError):
        return False
    return True


def hold(port: int, load: Load, sessions: int, sources: Sequence[str] = ("",)) -> list[Client]:
    """So many sessions that have said EHLO and nothing more, from these addresses in turn.

    Raises SessionFailed or OSError.
    """
    held: list[Client] = []
    numbers, tls = iter(range(sessions)), client_context() if load.tls else None

    def one_after_another() -> None:
        for number in numbers:
            with gevent.Timeout(PATIENCE, SessionFailed(f"a session took more than {PATIENCE:g} s")):
                held.append(Client(port, tls, sources[number % len(sources)]))

    at_once(one_after_another, load.clients)
    return held


def let_go(held: list[Client]) -> None:
    """QUIT, which shows that they were served all the time. Raises SessionFailed or OSError."""
    clients = iter(held)

    def one_after_another() -> None:
        for client in clients:
            with gevent.Timeout(PATIENCE, SessionFailed(f"no answer to QUIT in {PATIENCE:g} s")):
                client.command(b"QUIT", b"221")
            client.close()

    at_once(one_after_another, FAREWELLS)


def at_once(work: Callable[[], None], times: int) -> None:
    """Run it in so many greenlets. The first exception ends them all and is raised."""
    greenlets = [gevent.spawn(work) for _ in range(times)]
    try:
        gevent.joinall(greenlets, raise_error=True)
    finally:
        gevent.killall(greenlets)


# -- the upstream


class Sink:
    """Takes every message, and counts by checksum. Its second port answers nginx's auth_http, and us, over HTTP."""

    GREETING = b"220 sink.example\r\n"
    ANSWERS = {  # noqa: RUF012 -- nobody changes it
        b"EHLO": b"250-sink.example\r\n250-PIPELINING\r\n250-SIZE\r\n250 XCLIENT NAME ADDR PORT PROTO HELO\r\n",
        b"HELO": b"250 sink.example\r\n",
        b"XCLI": GREETING,
        b"MAIL": b"250 2.1.0 ok\r\n",
        b"RCPT": b"250 2.1.5 ok\r\n",
        b"DATA": b"354 go on\r\n",
        b"QUIT": b"221 bye\r\n",
    }

    def __init__(self) -> None:
        self._received: Counter[int] = Counter()
        self._smtp = StreamServer((HOST, 0), self._serve_smtp, backlog=4096)
        self._http = StreamServer((HOST, 0), self._serve_http, backlog=4096)

    def run(self) -> None:
        """Until stdin ends, which it does when our parent is gone, however it ended."""
        self._smtp.start()
        self._http.start()
        print(json.dumps([self._smtp.server_port, self._http.server_port]), flush=True)
        socket.wait_read(0)

    def _serve_smtp(self, connection: socket.socket, _address: object) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(self.GREETING)
        unread, verb = b"", b""
        while verb != b"QUIT" and (octets := connection.recv(READ)):
            unread += octets
            answers = []
            while verb != b"QUIT" and b"\n" in unread:
                line, _, unread = unread.partition(b"\n")
                verb = line[:4].upper()
                answers.append(self.ANSWERS.get(verb, b"502 what?\r\n"))
                if verb == b"DATA":
                    connection.sendall(b"".join(answers))
                    unread = self._receive(connection, unread)
                    answers = [b"250 2.0.0 counted\r\n"]
            connection.sendall(b"".join(answers))

    def _receive(self, connection: socket.socket, octets: bytes) -> bytes:
        """Count one message; what came after it. An unfinished one does not count."""
        checksum, tail = 0, b""
        while (found := (tail + octets).find(END)) < 0:
            checksum = zlib.crc32(octets, checksum)
            tail = (tail + octets)[-len(END) + 1 :]
            if not (octets := connection.recv(READ)):
                return b""
        end = found + len(END) - len(tail)
        self._received[zlib.crc32(octets[:end], checksum)] += 1
        return octets[end:]

    def _serve_http(self, connection: socket.socket, _address: object) -> None:
        """One request: /auth sends every recipient to us (ngx_mail_auth_http_module); /received counts from now on."""
        request = b""
        while b"\r\n\r\n" not in request and (octets := connection.recv(READ)):
            request += octets
        if request.startswith(b"GET /auth"):
            head, body = f"Auth-Status: OK\r\nAuth-Server: {HOST}\r\nAuth-Port: {self._smtp.server_port}\r\n", ""
        else:
            head, body = "", json.dumps(self._received)
            self._received.clear()
        text = f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n{head}\r\n{body}"
        connection.sendall(text.encode())


if __name__ == "__main__":
    Sink().run()
