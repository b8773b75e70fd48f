"""Bounded, time-limited lines and octets on one socket, with the upgrade to TLS.

Built for few system calls, as measured on a plain session of 0.33 ms CPU: the raw
non-blocking socket (-5 %), TLS over memory BIOs in place of gevent's SSLSocket (-5 to
-14 %), one loop timer per session in place of a gevent.Timeout per read (-11 %), waiting
before the first recv of a command (-12 %), large reads for message octets (-35 % a GB).
"""

from __future__ import annotations

import socket as stdlib_socket
import ssl
import struct
from _socket import socket as Socket  # gevent replaces socket.socket; here we wait on the loop ourselves
from collections.abc import Callable
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from ..smtp.syntax import CR, LF, MAX_COMMAND_LINE
from .deadline import AFTER_READING, Deadline, WireError

READ_EVENT, WRITE_EVENT = 1, 2  # libev's EV_READ and EV_WRITE
COMMAND_READ = 16 << 10  # octets a recv when lines are expected
FIRST_BODY_READ = 64 << 10  # octets a recv of message content, doubled while the peer fills it ...
LARGEST_BODY_READ = 256 << 10  # ... up to this, and divided by four if the work with it has taken FAIR_TIME
CLOSE_NOTIFY = 24  # octets of that record in TLS 1.3, which hides what a record is; with a QUIT in it, it has 28
ALERT = b"\x15"  # the type of a record that before TLS 1.3 holds a close_notify (RFC 5246 §6.2.1)
CLOSE_WAIT = 8  # TCP: the peer has closed (linux/tcp_states.h)
MAX_RECORD = 16 << 10  # octets of content in a TLS record, RFC 8446 §5.1
ENCRYPTED_READ = 64 << 10  # octets a recv under TLS; OpenSSL's buffer grows to this and stays
MAX_PENDING_OUTPUT = 64 << 10  # octets of replies kept back for one write
WRITE_TIMEOUT = 300.0  # seconds, if nobody says otherwise: what RFC 5321 §4.5.3.2 has a server wait
RESET = struct.pack("ii", 1, 0)  # as SO_LINGER: a close resets the connection
LINGER = 2.0  # seconds for the peer to read our last words before the socket goes
LINGER_OCTETS = 1 << 20  # what we throw away meanwhile
FAIR_TIME = 0.01  # seconds with octets at hand all the time after which the others, and the clocks, get their turn

# By default glibc gives the memory of each large read back to the kernel, and faults it in again for the next. Freeing
# one larger block raises that threshold to twice its size (mallopt(3), M_MMAP_THRESHOLD): -7 % CPU a GB.
bytes(4 << 20)


class PeerGone(WireError):
    """The peer closed or reset the connection, or it broke."""


class BadFraming(WireError):
    """CR or LF alone where CRLF ends a line, or a line without an end."""


class TlsFailed(WireError):
    """The TLS handshake or a record of TLS was wrong."""


class LineTooLong(Exception):
    """The line was longer than its limit; it has been read to its end and dropped."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__()
        self.beginning = beginning  # as much as the limit


class Wire:
    """One connection. Every call that waits does so under the limits of `deadline`.

    write_timeout: seconds for the peer to take what is sent in one go.
    trace: called with a direction (`<` from the peer, `>` to it) and the octets of
        each line and reply, for a debug log.
    """

    __slots__ = (
        "_at", "_body_read", "_buffer", "_clear_in", "_clear_out", "_output", "_readable", "_socket",
        "_tls", "_tls_ended", "_writable", "_write_timeout", "deadline", "received_at", "trace",
    )  # fmt: skip

    def __init__(
        self,
        socket: Socket,
        deadline: Deadline,
        trace: Callable[[str, bytes], None] | None = None,
        write_timeout: float = WRITE_TIMEOUT,
    ) -> None:
        self._socket = socket
        self._write_timeout = write_timeout
        self.deadline = deadline
        self.trace = trace
        self._readable: Any = get_hub().loop.io(socket.fileno(), READ_EVENT)
        self._writable: Any = None  # made when a write has to wait, which is rare
        self._buffer = b""  # what was received and not yet taken ...
        self._at = 0  # ... from here on
        self._body_read = FIRST_BODY_READ
        self.received_at = 0.0  # when the latest octets came
        self._output = b""
        self._tls: ssl.SSLObject | None = None
        self._tls_ended = False  # by the peer's close_notify
        self._clear_in: ssl.MemoryBIO | None = None
        self._clear_out: ssl.MemoryBIO | None = None

    # -- reading

    def buffered(self) -> bool:
        """Whether octets were received that are not taken yet."""
        return self._at < len(self._buffer)

    def has_line(self) -> bool:
        """Whether a whole line is buffered."""
        return self._buffer.find(b"\r\n", self._at) >= 0

    def peek_lines(self) -> list[bytes]:
        """The complete lines that are buffered, without CRLF; they stay where they are.

        Of COMMAND_READ octets at the most: after a message there may be much more, and each look costs.
        """
        end = self._buffer.rfind(b"\r\n", self._at, self._at + COMMAND_READ)
        return self._buffer[self._at : end].split(b"\r\n") if end >= self._at else []

    def peek(self) -> bytes:
        """All octets that are buffered; they stay where they are."""
        return self._buffer[self._at :]

    def skip(self, size: int) -> None:
        """Take octets that `peek` or `receive` has shown."""
        self._at += size

    def read_line(self, limit: int = MAX_COMMAND_LINE) -> bytes:
        """The next line without its CRLF. Only CRLF ends a line (RFC 5321 §2.3.8).

        limit: octets, CRLF included.
        Raises WireError, and LineTooLong once the long line has been read to its end.
        """
        try:
            return self.next_line(limit)
        except LineTooLong:
            while (end := self._buffer.find(b"\r\n", self._at)) < 0:
                self._buffer = b"\r" if self._buffer.endswith(b"\r") else b""
                self._at = 0
                self.receive()
            self._at = end + 2
            raise

    def next_line(self, limit: int) -> bytes:
        """The same; a line that is too long or badly framed is still in the buffer, as far as it has come."""
        self._be_fair()
        if self._at == len(self._buffer):
            self.receive()
        while True:
            end = self._buffer.find(b"\r\n", self._at)
            # Of a last CR the LF may be on the way.
            line = self._buffer[self._at : end] if end >= 0 else self._buffer[self._at :].removesuffix(b"\r")
            if CR in line or LF in line:  # a lenient reader next to a strict one is what smuggling lives on
                raise BadFraming("bare CR or LF in a line")
            if len(line) + 2 > limit:
                raise LineTooLong(line[:limit])
            if end >= 0:
                break
            self.receive()
        self._at = end + 2
        if self.trace:
            self.trace("<", line)
        return line

    def read_some(self, most: int | None = None) -> bytes:
        """At least one octet of what comes next, at the most `most` octets. Raises WireError."""
        if not self.buffered():
            self.receive(self._body_read, eager=True)
            if self._body_read // 2 <= len(self._buffer) and self._body_read < LARGEST_BODY_READ:
                self._body_read *= 2
        end = len(self._buffer) if most is None else min(len(self._buffer), self._at + most)
        octets = self._buffer[self._at : end]
        self._at = end
        if end == len(self._buffer):
            self._buffer, self._at = b"", 0
        return octets

    def unread(self, octets: bytes) -> None:
        """Give back what followed the end of a message: the peer's next commands."""
        if octets:
            self._buffer = octets + self._buffer[self._at :]
            self._at = 0

    def pending(self) -> bool:
        """Whether the peer has sent something, or closed, that is not yet taken. Does not wait."""
        if self.buffered():
            return True
        try:
            octets = self._socket.recv(COMMAND_READ) if self._tls is None else self._decrypt(COMMAND_READ)
        except BlockingIOError:
            return False
        except (OSError, WireError):  # the next read says why
            return True
        if octets:
            self._buffer, self._at = octets, 0
        return True

    def has_hung_up(self) -> bool:
        """Whether the peer has closed the connection and left nothing to be done. Takes nothing, does not wait."""
        if self.buffered() or (self._tls and self._holds_records()):
            return False
        try:
            unread = self._socket.recv(CLOSE_NOTIFY + 1, stdlib_socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:  # it was reset
            return True
        if self._tls is None or (len(unread) > CLOSE_NOTIFY and not unread.startswith(ALERT)):
            return not unread
        state = self._socket.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_INFO, 1)[0]
        return state == CLOSE_WAIT  # with nothing unread but a goodbye of TLS

    def receive(self, size: int = COMMAND_READ, eager: bool = False) -> bytes:
        """Wait for more octets; all that are buffered then.

        eager: try to receive before waiting: right for content, which mostly is
            there already, wrong for commands, which mostly are not.
        Raises WireError.
        """
        if self._output or self._clear_out:
            self.flush()
        eager = eager or (self._tls is not None and self._holds_records())
        if eager:
            self._be_fair()
        while True:
            if not eager:
                _wait(self._readable)
            try:
                octets = self._socket.recv(size) if self._tls is None else self._decrypt(size)
                break
            except BlockingIOError:
                eager = False
                self.flush()  # e.g. the answer to a key update
            except ssl.SSLError as error:
                raise TlsFailed(f"TLS: {error.reason or error}") from None
            except OSError as error:
                raise PeerGone(error.strerror or str(error)) from None
        if not octets:
            raise PeerGone("connection closed")
        self.received_at = monotonic()
        if not eager:
            self.deadline.waited_at = self.received_at
        self._buffer = self._buffer[self._at :] + octets
        self._at = 0
        return self._buffer

    def _be_fair(self) -> None:
        """Give way if there were octets at hand for long: what they ask for may take more time than they."""
        if monotonic() - self.deadline.waited_at > FAIR_TIME:
            self._body_read = max(COMMAND_READ, self._body_read // 4)
            give_way()
            self.deadline.waited_at = monotonic()

    def _decrypt(self, size: int) -> bytes:
        """What can be had, several TLS records at once, of one recv; b"": the peer closed.

        Of one only: a peer that sends nothing but key updates would never let go of us.
        Raises OSError; it is a BlockingIOError if there is nothing.
        """
        assert self._tls and self._clear_in
        records: list[bytes] = []
        try:
            if not self._holds_records():
                octets = self._socket.recv(ENCRYPTED_READ)
                if not octets:
                    return b""  # also without close_notify: SMTP says itself where a message ends
                self._clear_in.write(octets)
            while size > 0 and not self._tls_ended and self._holds_records():
                record = self._tls.read(min(size, MAX_RECORD))
                self._tls_ended = not record  # by close_notify; TCP may stay open, and must not be waited for
                records.append(record)
                size -= len(record)
        except ssl.SSLWantReadError:  # half a record, or none of application data
            if not records:
                raise BlockingIOError from None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._tls_ended = True
        except ssl.SSLError:
            self._tls_ended = True  # OpenSSL says it once only; what comes after it is no TLS
            if not records:
                raise
        return b"".join(records)

    def _holds_records(self) -> bool:
        """Whether OpenSSL has octets to read, or the end: its exception for nothing costs ten times as much."""
        assert self._tls and self._clear_in
        return self._tls_ended or bool(self._clear_in.pending or self._tls.pending())

    # -- writing

    def write(self, octets: bytes) -> None:
        """Keep octets back for one write together with what follows; reading flushes. Raises WireError."""
        if self.trace:
            self.trace(">", octets)
        self._output += octets
        if len(self._output) > MAX_PENDING_OUTPUT:
            self.flush()

    def flush(self) -> None:
        """Send what was kept back. Raises WireError."""
        if self.holds_output():
            self.send(b"")

    def holds_output(self) -> bool:
        """Whether something is kept back. Never while the owner is sending: it takes the octets away first."""
        return bool(self._output or (self._clear_out and self._clear_out.pending))

    def send_held(self) -> None:
        """Send what is kept back as far as the kernel takes it at once, while the owner waits for another peer.

        Never waits. The owner itself finds out if the connection is broken.
        """
        with suppress(OSError):
            if self._tls is None:
                self._output = self._output[self._socket.send(self._output) :]
                return
            assert self._clear_out
            if self._output and not self._clear_out.pending:  # else it would hold more and more
                octets, self._output = self._output, b""
                self._tls.write(octets)
            encrypted, sent = self._clear_out.read(), 0
            with suppress(BlockingIOError):
                sent = self._socket.send(encrypted)
            self._clear_out.write(encrypted[sent:])

    def send(self, octets: bytes) -> None:
        """Send message content at once, past the trace, behind what was kept back. Raises WireError."""
        octets, self._output = self._output + octets, b""
        try:
            if self._clear_out:
                if self._tls and octets:
                    self._tls.write(octets)
                octets = self._clear_out.read()
            try:
                sent = self._socket.send(octets)
            except BlockingIOError:
                sent = 0
            if sent < len(octets):
                with self.deadline.limit(self._write_timeout, "sending (write_timeout)"):
                    self._send_slowly(memoryview(octets)[sent:])
        except ssl.SSLError as error:
            raise TlsFailed(f"TLS: {error.reason or error}") from None
        except OSError as error:
            raise PeerGone(error.strerror or str(error)) from None

    def _send_slowly(self, octets: memoryview) -> None:
        """Send to a peer that does not keep up. If that ends early nothing may follow: `250 O421` would be a lie."""
        if self._writable is None:
            self._writable = get_hub().loop.io(self._socket.fileno(), WRITE_EVENT)
        try:
            while octets:
                _wait(self._writable)
                self.deadline.waited_at = monotonic()
                with suppress(BlockingIOError):
                    octets = octets[self._socket.send(octets) :]
        except BaseException:
            with suppress(OSError):  # the peer has gone
                self._socket.shutdown(stdlib_socket.SHUT_WR)
            raise

    # -- TLS and the end

    @property
    def tls_version(self) -> str | None:
        """`TLSv1.3` and the like; None: the connection is in clear."""
        return self._tls.version() if self._tls else None

    @property
    def peer_certificate(self) -> dict[str, object]:
        """Its fields, as the ssl module names them; empty without TLS, or if it was not verified."""
        return dict(self._tls.getpeercert() or {}) if self._tls else {}

    def start_tls(self, context: ssl.SSLContext, server_side: bool, server_name: str | None = None) -> None:
        """Shake hands (RFC 3207). What was buffered in clear is thrown away, never executed.

        Raises WireError.
        """
        self.flush()
        self._buffer, self._at = b"", 0
        self._clear_in, self._clear_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            tls = context.wrap_bio(self._clear_in, self._clear_out, server_side, server_name)
        except (ValueError, TypeError) as error:  # a name that Python's ssl cannot encode
            raise TlsFailed(f"TLS handshake: {error}") from None
        try:
            if server_side:  # it is the client who begins
                self._clear_in.write(self._receive_raw())
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self.flush()
                    self._clear_in.write(self._receive_raw())
            if tls.version() != "TLSv1.3":  # else what is left, such as a session ticket, goes out with the next write
                self.flush()
        except ssl.SSLError as error:
            with suppress(OSError):  # the peer may be gone
                self._socket.send(self._clear_out.read())  # the alert that tells it why
            raise TlsFailed(f"TLS handshake: {getattr(error, 'verify_message', '') or error.reason or error}") from None
        except OSError as error:
            raise PeerGone(f"TLS handshake: {error.strerror or error}") from None
        self._tls = tls

    def _receive_raw(self, eager: bool = False) -> bytes:
        """One recv, past TLS. eager: try before waiting."""
        while True:
            if not eager:
                _wait(self._readable)
                self.deadline.waited_at = monotonic()
            eager = False
            with suppress(BlockingIOError):
                if octets := self._socket.recv(COMMAND_READ):
                    return octets
                raise PeerGone("connection closed in the TLS handshake")

    def close(self) -> None:
        """End the connection at once. Nothing more is sent: an unfinished message stays unfinished.

        What is done with it afterwards is a WireError.
        """
        for event in (self._readable, self._writable):
            if event is not None:
                event.close()
        self._socket.close()
        self._readable = self._writable = None
        self._buffer, self._at = b"", 0

    def abort(self) -> None:
        """The same, and what the kernel still holds is not sent either, as it would be when the peer reads on."""
        with suppress(OSError, ValueError):  # closed already
            if any(ioctl(self._socket, TIOCOUTQ, bytes(4))):
                self._socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, RESET)
        self.close()

    def hang_up(self, linger: bool = False, patient: bool = True) -> None:
        """Send what was kept back, say goodbye to TLS, and close.

        linger: the peer may still be sending; a close would then reset the
            connection and take our last words away from it.
        patient: wait for the kernel to take them, if need be.
        """
        try:
            self._end_tls()
            self.send_held()
            if linger or (self.holds_output() and patient):
                with self.deadline.limit(LINGER, "closing"):
                    self.flush()
                    if linger:
                        self._drain()
        except (WireError, OSError) as error:
            if self.trace:
                self.trace(">", f"closed: {error}".encode())
        finally:
            self.close()

    def _drain(self) -> None:
        """Say that nothing more comes from us, and read until the peer has seen it."""
        self._socket.shutdown(stdlib_socket.SHUT_WR)
        dropped = 0
        while dropped < LINGER_OCTETS:
            dropped += len(self._receive_raw(eager=True))  # mostly it is the peer who has hung up

    def _end_tls(self) -> None:
        """Have close_notify go out in the same write as what was kept back."""
        if self._tls is None:
            return
        if self._output:
            self._tls.write(self._output)
            self._output = b""
        with suppress(ssl.SSLError):  # wants the peer's close_notify, which we need not wait for (RFC 8446 §6.1)
            self._tls.unwrap()


def give_way() -> None:
    """Let the loop look for what has come, and all others and the clocks have their turn.

    Not gevent.sleep(0): of that the loop runs 50 and more in a row before it looks.
    """
    timer = get_hub().loop.timer(0.0, priority=AFTER_READING)
    try:
        _wait(timer)
    finally:
        timer.close()


def _wait(event: Any) -> None:
    """What gevent's hub.wait() does without its Waiter, since nothing but this event switches to us: 0.7 KiB less."""
    if event is None:  # libev would end the whole process where a closed descriptor is waited for
        raise PeerGone("connection closed already")
    event.start(getcurrent().switch, event)
    try:
        switched_by = get_hub().switch()
        assert switched_by is event
    finally:
        event.stop()
