"""Many clients that send mail all the time, as other mail servers do: what was not answered with 250 is sent again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.support.client import Client
from tests.support.loopback import PATIENCE, wait_until
from tests.support.talk import BOB, EHLO, MAIL
from tests.support.upstream import ScriptedUpstream

CONNECT, MESSAGE = "CONNECT", "MESSAGE"  # stages; the others are verbs
TOO_LATE = "(no answer in time)"
COMMANDS = (("EHLO", EHLO), ("MAIL", MAIL), ("RCPT", BOB), ("DATA", b"DATA"))
BETWEEN_MESSAGES, BEFORE_NEXT_ATTEMPT = 0.01, 0.05  # seconds
LONGEST = 60.0  # seconds until a sender gives a message up
FILLING = b"twenty-four more octets\r\n" * 200

Connect = Callable[[], Client]


@dataclass(frozen=True)
class Attempt:
    """How far one message came in one session."""

    marker: str  # which message
    stage: str  # what was sent last
    answer: str  # to it; empty if the connection ended without one, or TOO_LATE

    @property
    def accepted(self) -> bool:
        return self.stage == MESSAGE and self.answer.startswith("250 ")

    @property
    def unanswered(self) -> bool:
        """It was sent to its very end, and nobody said what became of it."""
        return self.stage == MESSAGE and self.answer in ("", TOO_LATE)


def message(marker: str) -> bytes:
    return b"Subject: %s\r\n\r\n%s" % (marker.encode(), FILLING)


def attempt(connect: Connect, marker: str) -> Attempt:
    """One session with one message."""
    stage, answer = CONNECT, ""
    try:
        with connect() as client:
            answer = str(client.read_reply())
            for verb, line in (*COMMANDS, (MESSAGE, message(marker) + b".")):
                if answer[0] not in "23":
                    return Attempt(marker, stage, answer)
                stage, answer = verb, ""
                answer = str(client.command(line))
            with suppress(OSError):  # whether it is answered is not our business
                client.command(b"QUIT")
    except TimeoutError:
        answer = answer or TOO_LATE
    except OSError:
        pass  # the end of the connection
    return Attempt(marker, stage, answer)


def stored(upstream: ScriptedUpstream) -> Counter[str]:
    """How often the upstream has each message, whether or not anybody heard its 250."""
    return Counter(m.content.partition(b"\r\n")[0].removeprefix(b"Subject: ").decode() for m in upstream.messages)


class Traffic:
    """Senders at work, as long as the block lasts; each finishes its last message."""

    def __init__(self, name: str, connects: Sequence[Connect]) -> None:
        """name: of no other traffic; connects: of each sender its own."""
        self.name = name
        self.attempts: list[Attempt] = []
        self._end = threading.Event()
        self._pause = threading.Event()  # never set
        self._threads = [
            threading.Thread(target=self._send, args=(f"{name}-{number}", connect), daemon=True)
            for number, connect in enumerate(connects)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(LONGEST + 10)
            assert not thread.is_alive(), f"{thread.name} does not end"

    def _send(self, name: str, connect: Connect) -> None:
        number = 0
        while not self._end.wait(BETWEEN_MESSAGES):
            number += 1
            deadline = time.monotonic() + LONGEST
            while not self._try(connect, f"{name}-{number}") and time.monotonic() < deadline:
                self._pause.wait(BEFORE_NEXT_ATTEMPT)

    def _try(self, connect: Connect, marker: str) -> bool:
        done = attempt(connect, marker)
        self.attempts.append(done)
        return done.accepted

    @property
    def failed(self) -> list[Attempt]:
        return [done for done in self.attempts if not done.accepted]

    def wait_for_more(self, count: int = 30, seconds: float = PATIENCE) -> None:
        """Until so many more messages were accepted."""
        enough = len(self._accepted()) + count
        wait_until(lambda: len(self._accepted()) >= enough, f"{count} more messages", seconds)

    def _accepted(self) -> list[str]:
        return [done.marker for done in self.attempts if done.accepted]

    def check(self, upstream: ScriptedUpstream) -> None:
        """After the end: nothing is lost, and nothing is there twice without need.

        Each message was accepted once. It is stored once, and at most once more for each attempt that was left
        unanswered after its final dot: in that case no SMTP client can know, and it must send it again.
        """
        copies = {marker: copies for marker, copies in stored(upstream).items() if marker.startswith(f"{self.name}-")}
        unanswered = Counter(done.marker for done in self.attempts if done.unanswered)
        accepted = self._accepted()
        assert len(accepted) == len(set(accepted)) > 0
        assert set(accepted) == {done.marker for done in self.attempts}, "a sender has given up"
        assert copies.keys() == set(accepted)
        for marker, number in copies.items():
            assert 1 <= number <= 1 + unanswered[marker], (marker, number, unanswered[marker])
