"""The octets of one message, from the client to the upstream and the verdict back.

Whatever goes wrong on the way, the client's octets are read to their end, so that none
of them is taken for a command, and the upstream is dropped without an end of message.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from ..config import Settings
from ..net.deadline import FOREVER, TimeLimit
from ..net.wire import Wire
from ..smtp import reply as replies
from ..smtp.body import DataReader, Stuffer
from ..smtp.reply import Reply, own
from .upstream import Refused, Upstream, UpstreamFailed

SLOWEST = 100  # octets a second that a client must send ...
PACE_TIME = 300.0  # ... over so many seconds: else a line end a second would keep a message going for ever
LEAST_PROGRESS = 1000  # octets that renew read_timeout, as a line end does: a text line, RFC 5321 §4.5.3.1.6


class Content:
    """The client's octets as they come, under read_timeout."""

    def __init__(self, settings: Settings, client: Wire) -> None:
        self._settings = settings
        self._client = client
        self._progress = LEAST_PROGRESS  # octets since read_timeout was renewed
        self._waited = 0.0  # seconds for the client since then: what the upstream takes is not his
        self._patience = FOREVER  # until when at all, once it is only thrown away
        self._pace_seconds = 0.0  # of waiting for the client ...
        self._pace_octets = 0  # ... and what came meanwhile

    def read(self, most: int | None = None) -> bytes:
        """More octets, at least one. Raises WireError, so also if no line end or 1,000 octets come in time."""
        if self._progress >= LEAST_PROGRESS:
            self._progress, self._waited = 0, 0.0
        began = monotonic()
        deadline = began + self._settings.read_timeout - self._waited
        with self._client.clock.until(min(deadline, self._patience), "waiting for message content (read_timeout)"):
            octets = self._client.read_some(most)
        waited = monotonic() - began
        self._waited += waited
        self._progress += LEAST_PROGRESS if b"\n" in octets else len(octets)
        self.keep_pace(waited, len(octets))
        return octets

    def keep_pace(self, seconds: float, octets: int = 0) -> None:
        """Count so many seconds of waiting for the client. Raises TimeLimit if it is too slow over all."""
        self._pace_seconds += seconds
        self._pace_octets += octets
        if self._pace_seconds >= PACE_TIME:
            if self._pace_octets < SLOWEST * self._pace_seconds:
                raise TimeLimit(f"message content: fewer than {SLOWEST} octets a second (read_timeout)")
            self._pace_seconds, self._pace_octets = 0.0, 0

    def read_to_drop(self) -> None:
        """From here on nobody wants the octets, so they may not take for ever."""
        self._patience = monotonic() + self._settings.data_timeout

    def skip(self, size: int) -> None:
        """Read a chunk and throw it away."""
        self.read_to_drop()
        while size:
            size -= len(self.read(size))


class Relay:
    """One message on its way.

    octets: its size so far, as RFC 1870 counts.
    refusal: what the client gets in place of a verdict, since the upstream was dropped.
    blame: who refused, and why, for the log.
    failed: the upstream failed, so that the client may try again.
    verdict_seconds: what the upstream took for its last answer to content, if it gave one.
    """

    def __init__(self, settings: Settings, client: Wire, upstream: Upstream) -> None:
        self.octets = 0
        self.refusal: Reply | None = None
        self.blame: tuple[str, str] | None = None
        self.failed = False
        self.verdict_seconds: float | None = None
        self.upstream = upstream
        self._settings = settings
        self._client = client
        self._content = Content(settings, client)
        self._stuffer: Stuffer | None = None  # BDAT is being turned into DATA
        self._began = 0.0  # when a chunk began ...
        self._ended = 0.0  # ... and when the last one was answered

    def data(self) -> Reply:
        """The message after DATA and 354. Raises WireError if the client does not finish it."""
        reader = DataReader(self._rejects_bare_newlines())
        octets = b""
        while not reader.done:
            if octets:
                self._pass_on(octets)
            octets = reader.feed(self._content.read())
            self.octets = reader.octets
            self._check(reader.malformed)
        self._client.unread(reader.rest)
        return self._finish(self.upstream.finish, octets)

    def chunk(self, size: int, last: bool) -> Reply:
        """One BDAT command's octets (RFC 3030 §2). Raises WireError if the client does not finish it."""
        self._began = monotonic()
        if self._ended:
            self._content.keep_pace(self._began - self._ended)
        answer = self._take_chunk(size, last)
        self._ended = monotonic()
        return answer

    def _take_chunk(self, size: int, last: bool) -> Reply:
        self.octets += size
        self._check(malformed=False)
        if self.refusal is not None:
            self._content.skip(size)
            return self.refusal
        answer = self._pass_chunk(size, last) if self._takes_chunks() else self._convert_chunk(size, last)
        if not (answer.positive or last or self.refusal):
            self._refuse(answer, "upstream")  # later chunks of this message get the same
        return answer

    def _pass_chunk(self, size: int, last: bool) -> Reply:
        octets = b"BDAT %d%s\r\n" % (size, b" LAST" if last else b"")
        while size:
            more = self._content.read(size)
            size -= len(more)
            octets += more
            if size:
                self._pass_on(octets)
                octets = b""
        return self._finish(self.upstream.finish_chunk, octets)

    def _convert_chunk(self, size: int, last: bool) -> Reply:
        """For an upstream without CHUNKING: DATA, with dots stuffed and a last line end (RFC 5321 §4.5.2)."""
        if self._stuffer is None:
            self._conclude(self._begin_data)
            self._stuffer = Stuffer(self._rejects_bare_newlines())
        taken = own(250, "2.0.0", f"{size} octets received")
        while size:
            octets = self._content.read(size)
            size -= len(octets)
            self._pass_on(self._stuffer.feed(octets))
            self._check(self._stuffer.malformed)
        if not last:
            return self.refusal or taken
        octets = self._stuffer.finish()
        self._check(self._stuffer.malformed)
        return self._finish(self.upstream.finish, octets)

    def _begin_data(self) -> Reply:
        with self._client.clock.limit(self._settings.upstream_timeout, "asking the upstream (upstream_timeout)"):
            return self.upstream.begin_data()

    def _pass_on(self, octets: bytes) -> None:
        if self.refusal is None and octets:
            self._attempt(lambda: self.upstream.send(octets))

    def _check(self, malformed: bool) -> None:
        """Refuse a message that is too big, or has what `bare_newline = reject` forbids."""
        if self.refusal is not None:
            return
        if self.octets > self._settings.max_message_bytes:
            self._refuse(replies.TOO_BIG, "internal")
        elif malformed and self._rejects_bare_newlines():
            self._refuse(replies.BARE_NEWLINE, "internal")

    def _finish(self, finish: Callable[[bytes], Reply], octets: bytes) -> Reply:
        """Pass on the last octets; the upstream's answer to all of it.

        The client waits since its last octet, and data_timeout counts from there.
        """
        deadline = max(self._began, self._client.received_at) + self._settings.data_timeout

        def work() -> Reply:
            if monotonic() >= deadline:  # the end of a message must not be sent without time to hear of it
                raise UpstreamFailed(f"{self.upstream.server}: too slow to take the message (data_timeout)")
            with self._client.clock.until(deadline, "waiting for the verdict (data_timeout)"):
                return finish(octets)

        return self._conclude(work)

    def _conclude(self, work: Callable[[], Reply]) -> Reply:
        """The upstream's answer, or what stands in its place."""
        answers: list[Reply] = []
        if self.refusal is None:
            began = monotonic()
            self._attempt(lambda: answers.append(work()))
            self.verdict_seconds = monotonic() - began if answers else None
        return self.refusal or answers[0]

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Refused as refusal:
            self._refuse(refusal.reply, "upstream")
        except UpstreamFailed as failure:
            self.failed = True
            self._refuse(replies.UPSTREAM_LOST, "internal", str(failure))

    def _refuse(self, answer: Reply, source: str, why: str = "") -> None:
        """From here on octets are read and thrown away; the upstream sees no end of them."""
        self.refusal = answer
        self.verdict_seconds = None
        self.blame = (source, why or str(answer))
        self.upstream.drop()
        self._content.read_to_drop()

    def _takes_chunks(self) -> bool:
        return "CHUNKING" in self.upstream.features

    def _rejects_bare_newlines(self) -> bool:
        return self._settings.bare_newline == "reject"
