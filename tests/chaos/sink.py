"""An upstream as a process of its own, so that it can be killed: what it says 250 to is in a file before it says so.

python -m tests.chaos.sink ADDRESS PORT FILE SEED [EXTENSION...]

It is in a bad mood now and then: refuses, hangs up, or stores a message and resets the connection without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import struct
import sys
import threading
from contextlib import suppress

from tests.fuzz.lenient import content_of

MOODY = 0.015  # of all answers
PATIENCE = 120.0  # seconds for the next octets


class Session:
    """One connection."""

    def __init__(self, peer: socket.socket, store: int, extensions: list[str], draw: random.Random) -> None:
        peer.settimeout(PATIENCE)
        self._peer = peer
        self._file = peer.makefile("rb")
        self._store = store
        self._extensions = extensions
        self._draw = draw
        self._chunks: list[bytes] = []

    def run(self) -> None:
        with suppress(OSError, ValueError), self._peer, self._file:
            self._say(220, "sink.example ESMTP")
            while line := self._line():
                verb, _, argument = line.partition(b" ")
                if not self._hear(verb.upper(), argument):
                    break

    def _line(self) -> bytes:
        return self._file.readline(4096).removesuffix(b"\r\n")

    def _hear(self, verb: bytes, argument: bytes) -> bool:
        """Whether the conversation goes on."""
        if verb == b"EHLO":
            lines = ["sink.example", *self._extensions]
            self._peer.sendall("".join(f"250{' ' if line is lines[-1] else '-'}{line}\r\n" for line in lines).encode())
        elif verb == b"DATA":
            return self._data()
        elif verb == b"BDAT":
            return self._chunk(argument)
        elif verb == b"QUIT":
            self._say(221, "2.0.0 bye")
            return False
        else:
            if verb in (b"RSET", b"MAIL"):
                self._chunks = []
            return self._in_a_mood() or self._say(250, "2.0.0 ok")
        return True

    def _in_a_mood(self) -> bool:
        """Whether it has said something else than it should. Raises OSError: it has gone."""
        if self._draw.random() > MOODY:
            return False
        mood = self._draw.randrange(3)
        if mood == 0:
            return self._say(452, "4.3.1 not now")
        if mood == 1:
            self._say(421, "4.3.2 going down")
        raise OSError

    def _data(self) -> bool:
        if self._in_a_mood():
            return True
        self._say(354, "go on")
        wire = b""
        while not (wire.endswith(b"\r\n.\r\n") or wire == b".\r\n"):
            line = self._file.readline()
            if not line.endswith(b"\n"):
                return False  # it has hung up in the middle
            wire += line
        return self._keep(content_of(wire[:-3]))

    def _chunk(self, argument: bytes) -> bool:
        size, _, last = argument.partition(b" ")
        octets = self._file.read(int(size))
        if len(octets) < int(size):
            return False
        self._chunks.append(octets)
        return self._keep(b"".join(self._chunks)) if last else self._say(250, "2.0.0 ok")

    def _keep(self, content: bytes) -> bool:
        self._chunks = []
        if self._in_a_mood():  # and has not kept it
            return True
        mark = content.partition(b"\r\n")[0].removeprefix(b"Subject: ").decode("ascii", "replace")
        record = {"mark": mark, "digest": hashlib.sha256(content).hexdigest()}
        os.write(self._store, json.dumps(record).encode() + b"\n")
        if self._draw.random() < MOODY:  # the one case in which nobody can know
            self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        return self._say(250, f"2.0.0 kept {mark}")

    def _say(self, code: int, text: str) -> bool:
        self._peer.sendall(f"{code} {text}\r\n".encode())
        return True


def main() -> None:
    address, port, path, seed, *extensions = sys.argv[1:]
    draw = random.Random(seed)
    store = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    with socket.create_server((address, int(port)), backlog=128) as listener:
        while True:
            peer, _ = listener.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = Session(peer, store, extensions, random.Random(draw.random()))
            threading.Thread(target=session.run, daemon=True).start()


if __name__ == "__main__":
    main()
