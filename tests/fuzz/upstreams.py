"""Upstreams for the fuzzer: on a socket pair, in the loop of the session, saying what a script has them say."""

from __future__ import annotations

import re
import socket
from _socket import socket as RawSocket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import gevent

from tests.fuzz.clients import path_of
from tests.fuzz.lenient import content_of, early_end, strict_end

READ_EVENT = 1
USUAL, CLOSE, RESET, SILENT, REFUSE = "", "close", "reset", "silent", "refuse"  # what a script may say beside octets
DOMAIN = b"upstream.example"

ONE_REPLY = re.compile(rb"(?:([2-5][0-9]{2})-[^\r\n]*\r\n){0,199}[2-5][0-9]{2}(?: [^\r\n]*)?\r\n")
TEXT = rb"[^\x00-\x1f\x7f]"
COMMAND = re.compile(
    rb"(?:EHLO|HELO) [\x21-\x7e]{1,255}"
    rb"|MAIL FROM:<%b*>(?: SIZE=\d+)?(?: BODY=(?:7BIT|8BITMIME))?(?: SMTPUTF8)?"
    rb"|RCPT TO:<%b+>"
    rb"|DATA|RSET|QUIT|STARTTLS"
    rb"|BDAT \d+(?: LAST)?"
    rb"|XCLIENT(?: [A-Z]+=[\x21-\x3c\x3e-\x7e]+)+"
    rb"|PROXY TCP4 [0-9.]+ [0-9.]+ \d+ \d+" % (TEXT, TEXT)
)


@dataclass(frozen=True)
class Stored:
    """A message that came to its end, and what was said to it."""

    content: bytes
    verdict: bytes
    chunked: bool
    envelope: tuple[bytes, ...] = ()  # the sender, then the recipients that were accepted


@dataclass
class Plan:
    """What all upstreams of one session say, in the order in which they are asked."""

    answers: deque[str]
    features: tuple[str, ...]
    slow: bool = False  # what is said goes out when `say_late` is called
    said: list[bytes] = field(default_factory=list)
    upstreams: list[HostileUpstream] = field(default_factory=list)
    faults: list[AssertionError] = field(default_factory=list)  # gevent would only print what a callback raises

    def next(self) -> str:
        return self.answers.popleft() if self.answers else USUAL


class HostileUpstream:
    """One connection. `honest`: it has given one reply to each command, so that both sides know where they are."""

    def __init__(self, plan: Plan) -> None:
        ours, theirs = socket.socketpair()
        self.theirs = RawSocket(fileno=theirs.detach())
        self.theirs.setblocking(False)
        self.honest = True
        self.commands: list[bytes] = []
        self.stored: list[Stored] = []
        self.left = False  # the peer has hung up
        self.ended = False
        self._plan = plan
        self._socket = ours
        self._socket.setblocking(False)
        self._buffer = self._late = b""
        self._in_data = self._in_tls = self._silent = False
        self._chunk: tuple[int, bool] | None = None
        self._chunks: list[bytes] = []
        self._envelope: tuple[bytes, ...] = ()
        self._watcher = gevent.get_hub().loop.io(ours.fileno(), READ_EVENT)
        self._watcher.start(self._on_readable)
        plan.upstreams.append(self)

    def greet(self) -> None:
        """Say the first word. It may be none."""
        self._answer(b"220 %b ESMTP\r\n" % DOMAIN)

    def end(self) -> None:
        """Let go of it; what has come of a message that is not complete is looked at, too."""
        if not self.ended:
            self.say_late()
            self.ended = True
            self._watcher.close()
            self._socket.close()
            if self._in_data and self.honest and not self._plan.faults:
                check_content(self._buffer)

    def _on_readable(self) -> None:
        try:
            self._read()
        except AssertionError as fault:
            self._plan.faults.append(fault)
            self.end()

    def _read(self) -> None:
        try:
            octets = self._socket.recv(1 << 20)
        except OSError:
            octets = b""
        if not octets:
            self.left = True
            self.end()
            return
        if self._in_tls:  # it is not able to shake hands, and says so
            with suppress(OSError):
                self._socket.send(b"what?\r\n")
            self.end()
        if self._silent or self.ended:
            return
        self._buffer += octets
        while not self.ended and not self._silent and self._step():
            pass

    def _step(self) -> bool:
        """Take one command or message from the buffer. False: it is not complete."""
        if self._in_data:
            return self._take_message()
        if self._chunk:
            return self._take_chunk(*self._chunk)
        line, crlf, rest = self._buffer.partition(b"\r\n")
        if not crlf:
            return False
        self._buffer = rest
        self.commands.append(line)
        if self.honest:
            assert COMMAND.fullmatch(line), line
        self._hear(line)
        return True

    def _hear(self, line: bytes) -> None:
        verb, _, argument = line.partition(b" ")
        if verb == b"BDAT" and (size := re.match(rb"\d{1,9}", argument)):
            self._chunk = int(size[0]), argument.endswith(b"LAST")
        elif verb != b"PROXY":
            self._conclude(verb, path_of(line), self._answer(self._usual(verb, argument)))

    def _usual(self, verb: bytes, argument: bytes) -> bytes:
        """What a friendly server would say."""
        if verb in (b"EHLO", b"HELO"):
            lines = [DOMAIN, *(feature.encode() for feature in self._plan.features if verb == b"EHLO")]
            return b"".join(b"250-%b\r\n" % line for line in lines[:-1]) + b"250 %b\r\n" % lines[-1]
        if verb == b"RCPT" and argument.startswith((b"TO:<no", b"TO:<later")):
            return b"550 5.1.1 no\r\n" if argument.startswith(b"TO:<no") else b"450 4.2.0 later\r\n"
        if verb == b"DATA":
            return b"354 go on\r\n" if len(self._envelope) > 1 and not self._chunks else b"503 5.5.1 no\r\n"
        known = {b"STARTTLS": b"220 go\r\n", b"XCLIENT": b"220 hello again\r\n", b"QUIT": b"221 bye\r\n"}
        return known.get(verb, b"250 2.0.0 ok\r\n")

    def _conclude(self, verb: bytes, path: tuple[bytes, ...], code: int) -> None:
        """What an answer changes."""
        if verb == b"DATA" and code == 354:
            self._in_data = True
        elif verb in (b"MAIL", b"RCPT") and code // 100 == 2:
            self._envelope = path if verb == b"MAIL" else self._envelope + path
        elif verb in (b"RSET", b"EHLO", b"HELO", b"XCLIENT") and code // 100 == 2:
            self._forget()
        elif verb == b"STARTTLS" and code == 220:
            self._in_tls = True
        elif verb == b"QUIT":
            self.end()

    def _forget(self) -> None:
        self._envelope, self._chunks = (), []

    def _take_message(self) -> bool:
        end = strict_end(self._buffer)
        if end is None:
            return False
        content, self._buffer = self._buffer[: end - 3], self._buffer[end:]
        self._in_data = False
        if self.honest:
            check_content(content)
        self._store(content_of(content), chunked=False)
        return True

    def _take_chunk(self, size: int, last: bool) -> bool:
        if len(self._buffer) < size:
            return False
        self._chunks.append(self._buffer[:size])
        self._buffer, self._chunk = self._buffer[size:], None
        if last:
            self._store(b"".join(self._chunks), chunked=True)
        elif self._answer(b"250 2.0.0 ok\r\n") // 100 != 2:
            self._forget()  # what comes now of this message must not make another one
        return True

    def _store(self, content: bytes, chunked: bool) -> None:
        said = len(self._plan.said)
        self._answer(b"250 2.0.0 queued as %d\r\n" % said)
        self.stored.append(Stored(content, b"".join(self._plan.said[said:]), chunked, self._envelope))
        self._forget()

    def say_late(self) -> None:
        """Send what has been said."""
        if self._late and not self.ended:
            octets, self._late = self._late, b""
            with suppress(OSError):  # the peer has gone
                self._socket.send(octets)

    def _answer(self, usual: bytes) -> int:
        """Say what the script has next, and return its code; 0 if none."""
        said = self._plan.next()
        if said in (CLOSE, RESET, REFUSE):
            self.end()
        elif said == SILENT:
            self._silent = True
        else:
            octets = said.encode("latin-1") or usual
            self.honest = self.honest and bool(ONE_REPLY.fullmatch(octets))
            self._plan.said.append(octets)
            self._late += octets
            if not self._plan.slow:
                self.say_late()
            code = octets.splitlines()[-1][:3] if ONE_REPLY.fullmatch(octets) else octets[:3]
            return int(code) if code.isdigit() else 0
        return 0


def check_content(wire: bytes) -> None:
    """Nobody may see an end in what we have, as the strict reader that we are, of an unfinished message."""
    position = early_end(wire)
    assert position is None, f"a lenient reader sees an end at {position}: {wire!r}"
