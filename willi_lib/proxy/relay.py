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
from ..smtp.reply import UPSTREAM, Rejected, Reply, own
from ..smtp.syntax import LF
from .upstream import Upstream, UpstreamFailed

SLOWEST = 100  # octets a second that a client must send ...
PACE_TIME = 300.0  # ... over so many seconds: else a line end a second would keep a message going for ever
LEAST_PROGRESS = 1000  # octets that renew read_timeout, as a line end does: a text line, RFC 5321 §4.5.3.1.6


class Content:
    """The client's octets as they come, under read_timeout."""

    def __init__(self, settings: Settings, client: Wire) -> None:
        self._settings = settings
        self._client = client
        self._progress = LEAST_PROGRESS  # octets since read_timeout was renewed
        self._waited = 0.0  # seconds for the client since then; the time that the upstream takes is not in it
        self._drop_until = FOREVER  # the end of all reading, once the octets are only dropped
        self._pace_seconds = 0.0  # of waiting for the client ...
        self._pace_octets = 0  # ... and what came meanwhile

    def read(self, most: int | None = None) -> bytes:
        """More octets, at least one. Raises WireError, so also if no line end or 1,000 octets come in time."""
        if self._progress >= LEAST_PROGRESS:
            self._progress, self._waited = 0, 0.0
        began = monotonic()
        deadline = min(began + self._settings.read_timeout - self._waited, self._drop_until)
        with self._client.deadline.until(deadline, "waiting for message content (read_timeout)"):
            octets = self._client.read_some(most)
        waited = monotonic() - began
        self._waited += waited
        self._progress += LEAST_PROGRESS if LF in octets else len(octets)
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
        """From here on the octets are only dropped, within data_timeout."""
        self._drop_until = monotonic() + self._settings.data_timeout

    def skip(self, size: int) -> None:
        """Read a chunk and throw it away."""
        self.read_to_drop()
        while size:
            size -= len(self.read(size))


class Relay:
    """One message on its way."""

    def __init__(self, settings: Settings, client: Wire, upstream: Upstream) -> None:
        self.octets = 0  # its size so far, as RFC 1870 counts
        self.verdict_seconds: float | None = None  # what the upstream took for its last answer to content
        self.upstream = upstream
        self._settings = settings
        self._client = client
        self._content = Content(settings, client)
        self._rejects_bare_newlines = settings.bare_newline == "reject"
        self._stuffer: Stuffer | None = None  # BDAT is being turned into DATA
        self._left = 0  # octets of the chunk that the client still has to send
        self._chunk_began = 0.0
        self._chunk_ended = 0.0

    def data(self) -> Reply:
        """Pass on the message after DATA and 354; the verdict.

        Raises Rejected, UpstreamFailed: the upstream is dropped, and the octets are read to their end;
        WireError: the client does not finish it.
        """
        reader = DataReader(self._rejects_bare_newlines)
        octets = b""
        try:
            while not reader.done:
                if octets:
                    self.upstream.send(octets)
                octets = self._feed(reader)
                self._check(reader.malformed)
            return self._finish(self.upstream.finish, octets)
        except (Rejected, UpstreamFailed):
            self._drop_upstream()
            while not reader.done:
                self._feed(reader)
            raise
        finally:
            self._client.unread(reader.rest)

    def _feed(self, reader: DataReader) -> bytes:
        octets = reader.feed(self._content.read())
        self.octets = reader.octets
        return octets

    def chunk(self, size: int, last: bool) -> Reply:
        """Pass on one BDAT command's octets (RFC 3030 §2); the answer. Raises as `data` does."""
        self.verdict_seconds = None
        self._left = size
        self._chunk_began = monotonic()
        if self._chunk_ended:
            self._content.keep_pace(self._chunk_began - self._chunk_ended)
        self.octets += size
        try:
            self._check(malformed=False)
            takes_chunks = "CHUNKING" in self.upstream.features
            answer = self._pass_chunk(size, last) if takes_chunks else self._convert_chunk(size, last)
            if not (answer.positive or last):
                raise Rejected(answer, UPSTREAM)
        except (Rejected, UpstreamFailed):
            self._drop_upstream()
            self._content.skip(self._left)
            raise
        self._chunk_ended = monotonic()
        return answer

    def _read_chunk(self) -> bytes:
        octets = self._content.read(self._left)
        self._left -= len(octets)
        return octets

    def _pass_chunk(self, size: int, last: bool) -> Reply:
        octets = b"BDAT %d%s\r\n" % (size, b" LAST" if last else b"")
        while self._left:
            octets += self._read_chunk()
            if self._left:
                self.upstream.send(octets)
                octets = b""
        return self._finish(self.upstream.finish_chunk, octets)

    def _convert_chunk(self, size: int, last: bool) -> Reply:
        """For an upstream without CHUNKING: DATA, with dots stuffed and a last line end (RFC 5321 §4.5.2)."""
        if self._stuffer is None:
            with self._client.deadline.limit(self._settings.upstream_timeout, "asking the upstream (upstream_timeout)"):
                self.upstream.begin_data()
            self._stuffer = Stuffer(self._rejects_bare_newlines)
        while self._left:
            octets = self._stuffer.feed(self._read_chunk())
            if octets:
                self.upstream.send(octets)
            self._check(self._stuffer.malformed)
        if not last:
            return own(250, "2.0.0", f"{size} octets received")
        octets = self._stuffer.finish()
        self._check(self._stuffer.malformed)
        return self._finish(self.upstream.finish, octets)

    def _check(self, malformed: bool) -> None:
        """Raises Rejected: the message is too big, or has what `bare_newline = reject` forbids."""
        if self.octets > self._settings.max_message_bytes:
            raise Rejected(replies.TOO_BIG)
        if malformed and self._rejects_bare_newlines:
            raise Rejected(replies.BARE_NEWLINE)

    def _finish(self, finish: Callable[[bytes], Reply], octets: bytes) -> Reply:
        """Pass on the last octets; the upstream's answer to all of it.

        The client waits since its last octet, and data_timeout counts from there.
        """
        began = monotonic()
        deadline = max(self._chunk_began, self._client.received_at) + self._settings.data_timeout
        if began >= deadline:  # the end of a message must not be sent without time to hear of it
            raise UpstreamFailed(f"{self.upstream.server}: too slow to take the message (data_timeout)")
        with self._client.deadline.until(deadline, "waiting for the verdict (data_timeout)"):
            verdict = finish(octets)
        self.verdict_seconds = monotonic() - began
        return verdict

    def _drop_upstream(self) -> None:
        """From here on octets are read and thrown away; the upstream sees no end of them."""
        self.verdict_seconds = None
        self.upstream.drop()
        self._content.read_to_drop()
