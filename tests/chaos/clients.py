"""Clients that send marked messages all the time, each in its own way, and the book of what they were told."""

from __future__ import annotations

import hashlib
import random
import ssl
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from tests.support.client import Client
from willi_lib.smtp.reply import Reply

PATIENCE = 45.0  # seconds for any answer, or the end of the connection; Willi's own limits and all pauses are shorter
BETWEEN_SESSIONS = (0.1, 0.5)  # seconds
MOST_MESSAGES = 4  # of a session
UNFINISHED = 0.06  # of all messages
SIZES = (0, 0, 300, 2_000, 2_000, 40_000, 300_000)  # octets, about
LINES = (b"plain text", b".", b"..dots", b".hidden", b"", b"8-bit \xfc\xff", b"a" * 900, b"From me", b" . ")


class Fate(Enum):
    """What its sender knows of a message."""

    ACCEPTED = auto()  # 250 after its end
    DEFERRED = auto()  # 4xx after its end
    UNKNOWN = auto()  # its end was sent, or was about to be, and the connection broke
    UNFINISHED = auto()  # its end was never sent
    NOT_BEGUN = auto()  # it did not come to the content


@dataclass(frozen=True)
class Entry:
    """One message in the book."""

    domain: str
    digest: str
    fate: Fate
    code: int = 0  # of the last reply


class Book:
    """What became of each message, by its mark; and what should never be."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.calm = False  # nothing is done to Willi itself: each session has a right to an answer
        self._lock = threading.Lock()

    def enter(self, mark: str, entry: Entry) -> None:
        with self._lock:
            assert mark not in self.entries
            self.entries[mark] = entry
            self.counts[f"messages {entry.fate.name.lower()}"] += 1

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self._lock:
            self.faults.append(what)

    def broken(self, session: str, what: str, error: Exception, calm: bool) -> None:
        """A session without an end. calm: as it was when that began."""
        self.count(f"sessions {what}{' in the calm' if calm else ''}")
        if calm:
            self.fault(f"{session}: {what} in the calm: {error!r}")


class HungUp(Exception):
    """It was our own wish."""


class Refused(Exception):
    """An answer after which this message, or this session, is over."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


def message(mark: str, draw: random.Random) -> bytes:
    """Content with CRLF at its end, dots not stuffed."""
    size, lines = draw.choice(SIZES), [b"Subject: " + mark.encode(), b""]
    while size > 0:
        lines.append(draw.choice(LINES))
        size -= len(lines[-1]) + 2
    return b"\r\n".join([*lines, b"end of " + mark.encode(), b""])


class Sender:
    """One client after the other, in a thread."""

    def __init__(self, name: str, port: int, domains: Sequence[str], book: Book, seed: str) -> None:
        self._name = name
        self._port = port
        self._domains = domains
        self._book = book
        self._draw = random.Random(seed)
        self._number = 0
        self._pause = threading.Event()  # never set
        self._client: Client | None = None
        self._pipelines = self._slow = False
        self._fate, self._code = Fate.NOT_BEGUN, 0  # of the message under way

    def run(self, end: threading.Event) -> None:
        while not end.wait(self._draw.uniform(*BETWEEN_SESSIONS)):
            try:
                self._session()
            except Exception as error:  # noqa: BLE001 -- a fault of Willi, or of ours: it must be told, not lost in a thread
                self._book.fault(f"{self._name}-{self._number}: {error!r}")

    def _session(self) -> None:
        self._pipelines, self._slow = self._draw.random() < 0.5, self._draw.random() < 0.1
        calm = self._book.calm
        try:
            self._client = Client(self._port, seconds=PATIENCE)
        except OSError as error:
            self._book.broken(f"{self._name}-{self._number}", "without a connection", error, calm)
            return
        try:
            with self._client:
                self._introduce()
                for _ in range(self._draw.randint(1, MOST_MESSAGES)):
                    self._message()
                self._say(b"QUIT")
            self._book.count("sessions to their end")
        except TimeoutError:
            self._book.fault(f"{self._name}-{self._number}: no answer within {PATIENCE:g} s")
        except (OSError, ssl.SSLError) as error:
            self._book.broken(f"{self._name}-{self._number}", "broken", error, calm)
        except HungUp:
            self._book.count("sessions that hung up")
        except Refused as refusal:
            self._book.count(f"sessions ended with {refusal.reply.code}")

    def _introduce(self) -> None:
        assert self._client
        self._expect(self._client.read_reply())
        self._say(b"EHLO c.example")
        if self._draw.random() < 0.3:
            self._say(b"STARTTLS")
            self._client.handshake()
            self._say(b"EHLO c.example")
            self._book.count("sessions with STARTTLS")

    def _message(self) -> None:
        """One message, whatever comes of it, is entered into the book. Raises what ends the session."""
        self._number += 1
        mark = f"{self._name}-{self._number}"
        domain, content = self._draw.choice(self._domains), message(mark, self._draw)
        self._fate, self._code = Fate.NOT_BEGUN, 0
        try:
            self._deliver(mark, domain, content)
        except Refused as refusal:
            self._code = refusal.reply.code
            if self._code == 421:
                raise
            self._book.count(f"replies {self._code}")
            if self._fate is Fate.UNFINISHED:  # a chunk was refused: the message is over
                self._say(b"RSET")
        finally:
            self._book.enter(mark, Entry(domain, hashlib.sha256(content).hexdigest(), self._fate, self._code))

    def _deliver(self, mark: str, domain: str, content: bytes) -> None:
        chunked = self._draw.random() < 0.4
        self._envelope(mark, domain, chunked)
        self._fate = Fate.UNFINISHED
        pieces = _chunks(content, self._draw) if chunked else [_stuffed(content)]
        if self._draw.random() < UNFINISHED:
            self._break_off(pieces[-1])
        for piece in pieces[:-1]:
            self._send(piece)
            self._expect(self._read())
        self._fate = Fate.UNKNOWN
        self._send(pieces[-1])
        answer = self._read()
        self._fate, self._code = Fate.ACCEPTED if answer.positive else Fate.DEFERRED, answer.code
        self._expect(answer)

    def _envelope(self, mark: str, domain: str, chunked: bool) -> None:
        """Up to where the content may follow. Raises Refused."""
        lines = [b"MAIL FROM:<ann@a.example>", b"RCPT TO:<%b@%b>" % (mark.encode(), domain.encode())]
        if not chunked:
            lines.append(b"DATA")
        if self._pipelines:
            self._send(b"".join(line + b"\r\n" for line in lines))
        answers: list[Reply] = []
        for line in lines:
            if not self._pipelines:
                self._send(line + b"\r\n")
            answers.append(self._read())
            self._last_word(answers[-1])
            if answers[-1].code >= 400 and not self._pipelines:
                break
        worst = max(answers, key=lambda answer: answer.code if answer.code >= 400 else 0)
        if worst.code >= 400:
            if answers[-1].code == 354:
                raise AssertionError(f"354 after {worst}")
            self._send(b"RSET\r\n")
            self._expect(self._read())
            self._expect(worst)

    def _break_off(self, piece: bytes) -> None:
        """Hang up in the middle, one way or the other."""
        assert self._client
        self._send(piece[: self._draw.randrange(len(piece) - 3)])
        if self._draw.random() < 0.5:
            self._client.reset()
        raise HungUp

    def _send(self, octets: bytes) -> None:
        assert self._client
        if self._slow and len(octets) > 10:
            for start in range(0, len(octets), max(1, len(octets) // 4)):
                self._client.send(octets[start : start + max(1, len(octets) // 4)])
                self._pause.wait(0.2)
        else:
            self._client.send(octets)

    def _say(self, line: bytes) -> None:
        self._send(line + b"\r\n")
        self._expect(self._read())

    def _read(self) -> Reply:
        assert self._client
        return self._client.read_reply()

    def _last_word(self, answer: Reply) -> None:
        """Nothing comes after a 421."""
        if answer.code == 421:
            raise Refused(answer)

    def _expect(self, answer: Reply) -> None:
        """Raises Refused. 5xx would be wrong: all that is asked for is in order."""
        if answer.code >= 500:
            raise AssertionError(f"a permanent refusal: {answer}")
        if answer.code >= 400:
            raise Refused(answer)


def _stuffed(content: bytes) -> bytes:
    return (b"\r\n" + content).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n"


def _chunks(content: bytes, draw: random.Random) -> list[bytes]:
    """BDAT commands; a single one now and then."""
    cut = draw.choice((0, draw.randrange(len(content))))
    parts = [content[:cut], content[cut:]] if cut else [content]
    return [b"BDAT %d%b\r\n%b" % (len(part), b" LAST" if part is parts[-1] else b"", part) for part in parts]


class Traffic:
    """Senders at work as long as the block lasts; each finishes its last session."""

    def __init__(self, senders: Sequence[Sender]) -> None:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=sender.run, args=(self._end,), daemon=True) for sender in senders]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE * 4)
            assert not thread.is_alive(), "a session has not come to an end"
