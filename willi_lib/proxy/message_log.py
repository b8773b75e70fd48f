"""The log lines of one session, and the one line for each message that an administrator searches for."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from .. import log
from ..smtp import reply as replies
from ..smtp.reply import Reject, Reply
from ..smtp.syntax import Path
from ..status.counts import ACCEPTED, FAILED, REJECTED_BY_UPSTREAM, REJECTED_BY_WILLI, VERDICT_SECONDS, Counts
from .transaction import Transaction
from .upstream import Client, Upstream

# What Willi says when nobody has judged the message or the recipient.
NO_VERDICT = frozenset((
    replies.UPSTREAM_FAILED, replies.UPSTREAM_LOST, replies.LOOKUP_FAILED, replies.OUR_FAULT,
))  # fmt: skip
NO_MAPPING = "none"


class SessionLog:
    """Lines that bear the session and its client.

    blame: who refused last ("client", "internal" or "upstream"), and why.
    """

    def __init__(self, sid: str, client: Client, counts: Counts) -> None:
        self.blame = ("", "")
        self._sid = sid
        self._client = client
        self._counts = counts

    def debug(self, message: str, **fields: log.Value) -> None:
        """For whoever looks for a fault."""
        log.debug(message, sid=self._sid, client=str(self._client), **fields)

    def info(self, message: str, **fields: log.Value) -> None:
        """What happens every day."""
        log.info(message, sid=self._sid, client=str(self._client), **fields)

    def warn(self, message: str, **fields: log.Value) -> None:
        """What an administrator should look at some time."""
        log.warn(message, sid=self._sid, client=str(self._client), **fields)

    def error(self, message: str, **fields: log.Value) -> None:
        """What an administrator must mend."""
        log.error(message, sid=self._sid, client=str(self._client), **fields)

    def bug(self, message: str) -> None:
        """An exception that nobody expected. Call it in an except block."""
        log.bug(message, sid=self._sid, client=str(self._client))

    def syntax(self, message: str, argument: bytes, refusal: Reject) -> None:
        """A command of which no address can be told."""
        text = argument.decode("utf-8", "backslashreplace")
        self.info(message, argument=text, reply=str(refusal.reply))

    def upstream_failed(self, upstream: Upstream | None, error: str) -> None:
        """It could not be reached (None), or was lost."""
        self.error("Upstream failed", error=error)
        if upstream:
            self._counts.lost(upstream.server, error)

    def message(self, transaction: Transaction, answer: Reply | None, recipient: Path | None = None) -> None:
        """The one line for a message or a refused recipient; the fields of the Go program, and four more.

        A message with more recipients than a line has room for has more lines, which say `part=2/3` and no octets.
        answer: what the client was told; None: nothing, it has gone. Counted here and nowhere else, so that the
        numbers are those of the log.
        """
        accepted = answer is not None and answer.positive
        recipients = [recipient] if recipient else transaction.recipients
        route, relay = transaction.route, transaction.relay
        upstream = transaction.upstream
        source, error = (None, None) if accepted else self.blame
        host, octets = str(upstream.server if upstream else route or ""), relay.octets if relay else 0
        fields: dict[str, log.Value] = {
            "sid": self._sid,
            "client": str(self._client),
            "client_helo": self._client.helo,
            "client_tls": self._client.tls is not None,
            "from": transaction.mail.path.address,
            "to": ",".join([path.address for path in recipients]),
            "upstream": host,
            "upstream_tls": upstream is not None and upstream.wire.tls_version is not None,
            "error": error,
            "error_src": source,
            "reply": str(answer) if answer else None,
            "bytes": octets,
            "duration": monotonic() - transaction.began,
            "mapping": route.mapping if route else None,
        }
        _write("Message accepted" if accepted else "Message rejected", fields, [path.address for path in recipients])
        counts, mapping = self._counts, route.mapping if route else NO_MAPPING
        if not transaction.is_for_one_host:
            host = ""
        counts.message(self._verdict(answer), mapping, host, len(recipients), octets, whole=recipient is None)
        counts.event("accepted" if accepted else "rejected", fields)
        if relay and relay.verdict_seconds is not None:
            counts.took(relay.verdict_seconds, VERDICT_SECONDS)

    def _verdict(self, answer: Reply | None) -> str:
        if answer is not None and answer.positive:
            return ACCEPTED
        source = self.blame[0]
        if source == "upstream":
            return REJECTED_BY_UPSTREAM
        return FAILED if source == "client" or answer is None or answer in NO_VERDICT else REJECTED_BY_WILLI


def _write(message: str, fields: dict[str, log.Value], recipients: Sequence[str]) -> None:
    parts = in_parts(recipients) if len(recipients) > 1 else []
    if len(parts) < 2:
        log.info(message, **fields)
        return
    for number, part in enumerate(parts, 1):
        octets = fields["bytes"] if number == 1 else 0
        log.info(message, **{**fields, "to": part, "bytes": octets, "part": f"{number}/{len(parts)}"})


def in_parts(addresses: Sequence[str]) -> list[str]:
    """Joined by commas for as many lines as they need, so that none of them is cut."""
    parts: list[list[str]] = []
    room = 0
    for address in addresses:
        needed = log.length(address) + 1
        if needed > room:
            parts.append([])
            room = log.MAX_VALUE
        parts[-1].append(address)
        room -= needed
    return [",".join(part) for part in parts]
