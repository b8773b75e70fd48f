"""An upstream server that does what a test tells it, on a real socket, and remembers all that it heard.

Left alone it is a strict and friendly server: it accepts everything that is legal and refuses
the rest (bad order, parameters and pipelining that it did not offer). `answers` overrides single
answers, by the exact command line, or by its verb, or by GREETING or VERDICT.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from tests.support.loopback import HOST, PATIENCE, wait_until
from willi_lib.smtp.reply import Reply

GREETING = b"(greeting)"  # key in `answers`: what is said first
VERDICT = b"."  # key in `answers`: the answer to the whole message, after DATA
EXTENSIONS = (b"PIPELINING", b"SIZE 104857600", b"8BITMIME", b"ENHANCEDSTATUSCODES", b"SMTPUTF8", b"CHUNKING")
PARAMETERS = {b"SIZE": b"SIZE", b"BODY": b"8BITMIME", b"SMTPUTF8": b"SMTPUTF8"}  # of MAIL, and whose they are
READ = 65536  # octets a time
MAX_HOLD = 60.0  # seconds; who forgets to release() reads so
PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"


@dataclass(frozen=True)
class Close:
    """Close the connection instead of answering."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection instead of answering."""


@dataclass(frozen=True)
class Silence:
    """Never answer; listen until the peer gives up."""


@dataclass(frozen=True)
class Delay:
    """Answer later. Without `then`: what would have been answered anyhow."""

    seconds: float
    then: Reply | None = None


@dataclass(frozen=True)
class Drip:
    """Answer one octet at a time."""

    then: Reply
    seconds: float = 0.0  # between two octets


@dataclass(frozen=True)
class Hold:
    """Answer when the test says so: wait for `reached`, do something, then `release()`."""

    then: Reply | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        self.released.set()


# Octets are sent as they are: for what is not a reply, or comes with more behind it.
Action = Reply | bytes | Close | Reset | Silence | Delay | Drip | Hold
Answer = Action | list[Action]  # a list is used up one by one; then the default again


class Ended(Enum):
    """How a connection came to its end."""

    QUIT = "the peer said QUIT"
    EOF = "the peer closed without QUIT"
    RESET = "the peer reset the connection"
    OURS = "we closed or reset it"
    TLS = "the TLS handshake failed"


class _End(Exception):
    def __init__(self, how: Ended) -> None:
        super().__init__(how.value)
        self.how = how


@dataclass(frozen=True)
class Message:
    """A message that was sent to its very end."""

    mail: bytes  # the command: b"MAIL FROM:<ann@a.example> SIZE=100"
    rcpts: tuple[bytes, ...]  # the RCPT commands that were accepted
    content: bytes  # without dot-stuffing and without the final dot
    wire: bytes  # after DATA: all that followed the 354, the final dot included; after BDAT: as content

    @property
    def sender(self) -> bytes:
        return _path(self.mail)

    @property
    def recipients(self) -> tuple[bytes, ...]:
        return tuple(map(_path, self.rcpts))


def _path(command: bytes) -> bytes:
    found = re.search(rb"<(.*)>", command)
    assert found, command
    return found[1]


class ScriptedUpstream:
    """Listens on a loopback port from its making until `stop()`."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None, proxy: bool = False, host: str = HOST) -> None:
        """tls: STARTTLS is offered; proxy: a PROXY header is expected first (v1 or v2)."""
        self.name = b"upstream.example"
        self.tls = tls
        self.proxy = proxy
        self.extensions: tuple[bytes, ...] = EXTENSIONS
        self.answers: dict[bytes, Answer] = {}
        self.kill_after: int | None = None  # reset the connection once so many octets of a message are read
        self.connections: list[Connection] = []
        self.stopping = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name=f"upstream:{self.port}", daemon=True)
        self._thread.start()

    @property
    def server(self) -> str:
        """As a route names it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def commands(self) -> list[bytes]:
        """All commands of all connections, in the order of the connections."""
        return [line for connection in self.connections for line in connection.commands]

    @property
    def messages(self) -> list[Message]:
        """All completed messages of all connections."""
        return [message for connection in self.connections for message in connection.messages]

    def connection(self, number: int = 0) -> Connection:
        """The connection of that number (from 0), waiting for it if need be."""
        wait_until(lambda: len(self.connections) > number, f"connection {number} to the upstream")
        return self.connections[number]

    def wait_for_message(self, number: int = 0) -> Message:
        """The completed message of that number (from 0)."""
        wait_until(lambda: len(self.messages) > number, f"message {number} at the upstream")
        return self.messages[number]

    def wait_for_ends(self) -> list[Ended | None]:
        """How each connection ended, when all have."""
        wait_until(lambda: all(c.ended for c in self.connections), "the ends of the upstream's connections")
        return [connection.ended for connection in self.connections]

    def stop(self) -> None:
        """Close everything, as a server that is killed does. Nobody listens on the port any more."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join(PATIENCE)
        self._listener.close()
        for connection in self.connections:
            connection.stop()

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                peer, _ = self._listener.accept()
            except OSError:  # stop() has shut it down
                return
            connection = Connection(self, peer)
            self.connections.append(connection)  # first, so that nobody hears an answer of one that is not there
            connection.start()

    def answer_for(self, line: bytes, default: Reply) -> Action:
        """The next scripted answer to this command, or the default."""
        for key in (line, line.split(b" ", 1)[0].upper()):
            answer = self.answers.get(key)
            if isinstance(answer, list):
                answer = answer.pop(0) if answer else None
            if answer is not None:
                return answer
        return default


class Connection:
    """One connection to the upstream: what was heard, and the thread that answers."""

    def __init__(self, upstream: ScriptedUpstream, peer: socket.socket) -> None:
        self.commands: list[bytes] = []  # lines without CRLF, those of messages and BDAT octets excepted
        self.reads: list[bytes] = []  # what each recv() returned: as good as the peer's writes, on loopback
        self.messages: list[Message] = []
        self.unfinished: bytes | None = None  # what was read of a message that is not complete
        self.proxy_header = b""
        self.tls = False
        self.tls_error = ""
        self.ended: Ended | None = None
        self._upstream = upstream
        self._socket = peer
        self._buffer = bytearray()
        self._in_message = False
        self._helo = False
        self._mail: bytes | None = None
        self._rcpts: list[bytes] = []
        self._chunks: list[bytes] = []
        self._thread = threading.Thread(target=self._run, name=f"connection to {upstream.port}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def received(self) -> bytes:
        """Every octet, TLS taken off, in order."""
        return b"".join(self.reads)

    def wait_for_command(self, line: bytes) -> None:
        """Until this command (or one that begins so) was heard."""
        wait_until(lambda: any(c.startswith(line) for c in self.commands), f"{line!r} at the upstream")

    def wait_for_end(self) -> Ended:
        return wait_until(lambda: self.ended, "the end of a connection to the upstream")

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)

    # The conversation

    def _run(self) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        how = Ended.OURS
        try:
            self._converse()
        except _End as end:
            how = end.how
        except ssl.SSLError as error:
            self.tls_error = str(error)
            how = Ended.TLS
        except OSError:  # reset, broken pipe
            how = Ended.RESET
        self._socket.close()
        if self._in_message or self._chunks:
            self.unfinished = b"".join(self._chunks) + (bytes(self._buffer) if self._in_message else b"")
        self.ended = Ended.OURS if self._upstream.stopping.is_set() else how

    def _converse(self) -> None:
        if self._upstream.proxy:
            self._read_proxy_header()
        self._answer(GREETING, Reply(220, (self._upstream.name + b" ESMTP",)))
        while True:
            line = self._read_line()
            self.commands.append(line)
            verb, _, argument = line.partition(b" ")
            verb = verb.upper()
            default = self._default(verb, argument)
            if verb == b"BDAT":
                self._read_chunk(argument, legal=default.positive)
            code = self._answer(line, default)
            if verb == b"QUIT":
                raise _End(Ended.QUIT)
            self._after(verb, line, code)

    def _default(self, verb: bytes, argument: bytes) -> Reply:
        """The answer of a strict server."""
        if self._buffer and verb != b"BDAT" and not self._offers(b"PIPELINING"):
            return Reply(554, (b"5.5.0 pipelining was not offered",))
        if verb in (b"EHLO", b"HELO"):
            return self._greet(verb)
        if verb == b"STARTTLS" and self._upstream.tls and not self.tls:
            return Reply(220, (b"2.0.0 go ahead",))
        if verb == b"XCLIENT" and self._offers(b"XCLIENT") and self._mail is None:
            return Reply(220, (self._upstream.name + b" ESMTP",))
        if verb in (b"MAIL", b"RCPT", b"DATA", b"BDAT"):
            return self._transaction(verb, argument)
        known = {b"RSET": 250, b"NOOP": 250, b"VRFY": 252, b"QUIT": 221}
        return Reply(known[verb], (b"2.0.0 ok",)) if verb in known else Reply(502, (b"5.5.1 not here",))

    def _greet(self, verb: bytes) -> Reply:
        offered = self._upstream.extensions if verb == b"EHLO" else ()
        if verb == b"EHLO" and self._upstream.tls and not self.tls:
            offered += (b"STARTTLS",)
        return Reply(250, (self._upstream.name, *offered))

    def _transaction(self, verb: bytes, argument: bytes) -> Reply:
        order = {
            b"MAIL": self._helo and self._mail is None,
            b"RCPT": self._mail is not None,
            b"DATA": bool(self._rcpts) and not self._chunks,
            b"BDAT": bool(self._rcpts) and self._offers(b"CHUNKING"),
        }
        if not order[verb]:
            return Reply(503, (b"5.5.1 bad sequence",))
        if verb == b"MAIL":
            for parameter in argument.rpartition(b">")[2].split():
                owner = PARAMETERS.get(parameter.split(b"=")[0].upper())
                if owner is None or not self._offers(owner):
                    return Reply(555, (b"5.5.4 " + parameter + b" was not offered",))
        return Reply(354, (b"go on",)) if verb == b"DATA" else Reply(250, (b"2.0.0 ok",))

    def _offers(self, keyword: bytes) -> bool:
        return any(extension.split()[0] == keyword for extension in self._upstream.extensions)

    def _after(self, verb: bytes, line: bytes, code: int) -> None:
        """What an answer changes: the code decides, whoever chose it."""
        if verb == b"DATA" and code == 354:
            self._read_data()
            self._answer(VERDICT, Reply(250, (b"2.0.0 ok, queued as 1234",)))
        elif code // 100 != 2:
            return
        elif verb in (b"EHLO", b"HELO"):
            self._helo = True
            self._forget()
        elif verb in (b"STARTTLS", b"XCLIENT"):
            self._helo = False
            self._forget()
            if verb == b"STARTTLS":
                self._start_tls()
        elif verb == b"MAIL":
            self._mail = line
        elif verb == b"RCPT":
            self._rcpts.append(line)
        elif verb == b"RSET":
            self._forget()

    def _forget(self) -> None:
        self._mail, self._rcpts, self._chunks = None, [], []

    def _start_tls(self) -> None:
        assert self._upstream.tls
        self._socket = self._upstream.tls.wrap_socket(self._socket, server_side=True)
        self.tls = True

    # Messages

    def _read_data(self) -> None:
        """Only CRLF . CRLF ends it: `Message.wire` is for tests that look with other eyes."""
        wire = self._read_message(self._end_of_data)
        self._complete(re.sub(rb"(?:\A|(?<=\r\n))\.", b"", wire[:-3]), wire)

    def _end_of_data(self) -> int | None:
        if self._buffer.startswith(b".\r\n"):
            return 3
        last = len(self.reads[-1]) + 4  # it cannot have ended before the latest octets
        found = self._buffer.find(b"\r\n.\r\n", max(0, len(self._buffer) - last))
        return None if found < 0 else found + 5

    def _read_chunk(self, argument: bytes, legal: bool) -> None:
        size = int(argument.split()[0])
        self._chunks.append(self._read_message(lambda: size if len(self._buffer) >= size else None))
        if legal and argument.upper().endswith(b" LAST"):
            content = b"".join(self._chunks)
            self._complete(content, content)

    def _read_message(self, end: Callable[[], int | None]) -> bytes:
        self._in_message = True
        octets = self._read_until(end)
        self._in_message = False
        return octets

    def _complete(self, content: bytes, wire: bytes) -> None:
        assert self._mail is not None
        self.messages.append(Message(self._mail, tuple(self._rcpts), content, wire))
        self._forget()

    # Octets

    def _answer(self, line: bytes, default: Reply) -> int:
        """Say it, and return the code that the peer saw; 0 if none."""
        action = self._upstream.answer_for(line, default)
        if isinstance(action, Delay):
            self._upstream.stopping.wait(action.seconds)
            action = action.then or default
        elif isinstance(action, Hold):
            action.reached.set()
            released = action.released
            wait_until(lambda: released.is_set() or self._upstream.stopping.is_set(), "release()", MAX_HOLD)
            action = action.then or default
        if isinstance(action, Reply):
            self._socket.sendall(action.octets)
            return action.code
        if isinstance(action, bytes):
            self._socket.sendall(action)
            return int(action[:3]) if action[:3].isdigit() else 0
        if isinstance(action, Drip):
            for octet in action.then.octets:
                self._socket.sendall(bytes([octet]))
                self._upstream.stopping.wait(action.seconds)
            return action.then.code
        self._refuse_to_answer(action)
        return 0

    def _refuse_to_answer(self, action: Close | Reset | Silence) -> None:
        if isinstance(action, Reset):
            self._reset()
        if isinstance(action, Close):
            raise _End(Ended.OURS)
        while True:
            self._receive()

    def _reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _End(Ended.OURS)

    def _read_proxy_header(self) -> None:
        self._read_until(lambda: 0 if len(self._buffer) >= 13 else None)
        if self._buffer.startswith(PROXY_V2):
            self.proxy_header = self._read_until(lambda: 16 if len(self._buffer) >= 16 else None)
            size = int.from_bytes(self.proxy_header[14:16], "big")
            self.proxy_header += self._read_until(lambda: size if len(self._buffer) >= size else None)
        else:
            self.proxy_header = self._read_line() + b"\r\n"

    def _read_line(self) -> bytes:
        """A line without its CRLF."""
        return self._read_until(lambda: self._buffer.find(b"\r\n") + 2 if b"\r\n" in self._buffer else None)[:-2]

    def _read_until(self, size: Callable[[], int | None]) -> bytes:
        """Receive until `size` says how many octets of the buffer make up the whole; take them."""
        while True:
            self._kill_if_due()
            end = size()
            if end is not None:
                taken = bytes(self._buffer[:end])
                del self._buffer[:end]
                return taken
            self._receive()

    def _kill_if_due(self) -> None:
        if self._left_to_live() <= 0:
            self._reset()

    def _left_to_live(self) -> int:
        """Octets that may still be read before `kill_after` is reached."""
        if self._upstream.kill_after is None or not self._in_message:
            return READ
        return min(READ, self._upstream.kill_after - sum(map(len, self._chunks)) - len(self._buffer))

    def _receive(self) -> None:
        octets = self._socket.recv(self._left_to_live())
        if not octets:
            raise _End(Ended.EOF)
        self.reads.append(octets)
        self._buffer += octets
