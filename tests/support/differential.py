"""The same sessions once to a server and once through Willi, and what came of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.support.client import Client
from tests.support.corpus import CLIENT, Chunk, Message, Session, Step, Tls, Together
from tests.support.loopback import wait_until
from tests.support.postfix import Stored
from tests.support.talk import EHLO

AT_A_TIME = 6  # sessions: they mostly wait
WAIT = 60.0  # seconds for one answer, and for the last delivery; a server may let those wait who make errors
CLOSED = "(closed)"
NOT_SENT = "(not sent)"
CONNECT = "(connect)"
CONTENT = "(message)"
RECEIVED = "(Received)"
REPAIRED = "(message with line ends that Willi repairs)"

# What each server calls a message: it is the only thing in its answers that is never the same.
_NAME = re.compile(
    r"(?<=queued as )[0-9A-Za-z]+|(?<=OK id=)[0-9A-Za-z-]+|(?<=2\.0\.0 )[0-9a-f]{8}(?= Message accepted)"
)
_NAME_IN_RECEIVED = re.compile(r" id ([0-9A-Za-z-]+)")
_TIME = re.compile(r"\d\d:\d\d:\d\d")


class Server(Protocol):
    """One of the real ones."""

    log_file: Path

    def stored(self) -> list[Stored]: ...
    def is_idle(self) -> bool: ...
    def stop(self) -> None: ...


class Answer(NamedTuple):
    """What was said, and what was heard; a reply as for a log, without the name of the message."""

    said: str
    reply: str


@dataclass
class Outcome:
    """Of one session on one way."""

    answers: list[Answer]
    sent: list[bytes]  # each message that was accepted, dots unstuffed
    stored: list[list[tuple[str, str, bytes]]] = field(default_factory=list)  # the same: sender, recipient, content
    received: list[str] = field(default_factory=list)  # what the server wrote on top, times and names of messages as *


class Way(NamedTuple):
    """All of one way."""

    outcomes: Mapping[str, Outcome]
    strays: list[Stored]  # that no reply spoke of


class _Player:
    """One session as it is played."""

    def __init__(self, session: Session, port: int) -> None:
        self.answers: list[Answer] = []
        self.names: list[str] = []  # of accepted messages, as the server calls them
        self.sent: list[bytes] = []  # their contents
        self._session = session
        self._chunks = b""  # of the message that is under way
        self._client = Client(port, source=session.source, seconds=WAIT)
        self._open = True

    def play(self) -> None:
        with self._client:
            self._hear(CONNECT)
            for step in self._session.steps:
                self._take(step)
            if self._session.quits:
                self._take(b"QUIT")

    def _take(self, step: Step) -> None:
        if isinstance(step, Message):
            self._say_message(step)
        elif isinstance(step, Tls):
            self._take(b"STARTTLS")
            if self._open and self.answers[-1].reply.startswith("220"):
                self._client.handshake()
        else:
            steps = step.steps if isinstance(step, Together) else (step,)
            self._send(b"".join(map(_octets, steps)))
            for part in steps:
                self._chunks = self._chunks + part.octets if isinstance(part, Chunk) else b""
                self._hear(_label(part), self._chunks)

    def _say_message(self, message: Message) -> None:
        said = CONTENT if self._session.repaired is None else REPAIRED
        if not self.answers[-1].reply.startswith("354"):
            self.answers.append(Answer(said, NOT_SENT))
            return
        self._send(message.octets)
        self._hear(said, (b"\r\n" + message.octets[:-3]).replace(b"\r\n.", b"\r\n")[2:])

    def _send(self, octets: bytes) -> None:
        try:
            self._client.send(octets)
        except ConnectionError:
            self._open = False

    def _hear(self, said: str, content: bytes = b"") -> None:
        reply = CLOSED
        if self._open:
            try:
                reply = str(self._client.read_reply())
            except ConnectionError:
                self._open = False
        found = _NAME.findall(reply)
        if found:
            self.names += found
            self.sent.append(content)
            self._chunks = b""
        self.answers.append(Answer(said, _NAME.sub("*", reply)))


def _octets(step: bytes | Chunk) -> bytes:
    return _bdat(step) + b"\r\n" + step.octets if isinstance(step, Chunk) else step + b"\r\n"


def _label(step: bytes | Chunk) -> str:
    return (_bdat(step) if isinstance(step, Chunk) else step).decode("utf-8", "backslashreplace")


def _bdat(chunk: Chunk) -> bytes:
    return b"BDAT %d%s" % (len(chunk.octets), b" LAST" if chunk.last else b"")


def features(port: int) -> frozenset[str]:
    """What is offered to a client."""
    with Client(port, source=CLIENT) as client:
        client.read_reply()
        return frozenset(line.split()[0].decode() for line in client.command(EHLO).lines[1:])


def one_by_one(session: Session) -> Session:
    """The same without PIPELINING."""
    steps = [part for step in session.steps for part in (step.steps if isinstance(step, Together) else (step,))]
    return replace(session, steps=tuple(steps))


def play_all(sessions: Mapping[str, Session], port: int, server: Server) -> Way:
    """Play them at this port, some at a time, and see what lies in the mailbox of the server when all is delivered."""
    before = {_name_of(message) for message in server.stored()}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        players = dict(zip(sessions, pool.map(lambda session: _played(session, port), sessions.values()), strict=True))
    wait_until(server.is_idle, "the delivery of all messages", WAIT)
    stored: dict[str, list[Stored]] = {}
    for message in server.stored():
        if _name_of(message) not in before:
            stored.setdefault(_name_of(message), []).append(message)
    outcomes = {name: _outcome(player, stored) for name, player in players.items()}
    return Way(outcomes, [message for rest in stored.values() for message in rest])


def _played(session: Session, port: int) -> _Player:
    player = _Player(session, port)
    player.play()
    return player


def _outcome(player: _Player, stored: dict[str, list[Stored]]) -> Outcome:
    """Takes the messages of this session out of `stored`."""
    outcome = Outcome(player.answers, player.sent)
    for name in player.names:
        messages = stored.pop(name, [])
        outcome.stored.append(sorted((m.sender, m.recipient, m.content) for m in messages))
        outcome.received += sorted(_TIME.sub("*", _NAME_IN_RECEIVED.sub(" id *", m.received)) for m in messages)
    return outcome


def _name_of(message: Stored) -> str:
    found = _NAME_IN_RECEIVED.search(message.received)
    assert found, message.received
    return found[1]


class Exchange(NamedTuple):
    """The same said on both ways, and what was heard; at the end the words of each Received."""

    said: str
    direct: str
    through: str
    earlier: tuple[str, ...]  # refusals that came directly before this in the session


def exchanges(direct: Outcome, through: Outcome) -> Iterator[Exchange]:
    refusals: list[str] = []
    for one, other in zip(direct.answers, through.answers, strict=True):
        yield Exchange(one.said, one.reply, other.reply, tuple(refusals))
        if one.reply[:1] in ("4", "5"):
            refusals.append(one.reply)
    for one_line, other_line in zip(direct.received, through.received, strict=False):
        for word, other_word in zip(one_line.split(), other_line.split(), strict=False):
            yield Exchange(RECEIVED, word, other_word, ())
