"""The log lines of one session, and the one line for each message that an administrator searches for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import monotonic

from .. import log
from ..smtp import reply as replies
from ..smtp.reply import CLIENT, UPSTREAM, Outcome
from ..smtp.syntax import Path
from ..status.counts import ACCEPTED, FAILED, REJECTED_BY_UPSTREAM, REJECTED_BY_WILLI, VERDICT_SECONDS, Counts
from .transaction import Transaction
from .upstream import Client, Upstream

# What Willi says where the message or the recipient was not judged.
NO_VERDICT = frozenset((
    None, replies.UPSTREAM_FAILED, replies.UPSTREAM_LOST, replies.LOOKUP_FAILED, replies.OUR_FAULT,
))  # fmt: skip
NO_MAPPING = "none"
SESSION_ID_LENGTH = 10
SESSION_ID_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PAIRS_OF_LETTERS = [first + second for first in SESSION_ID_LETTERS for second in SESSION_ID_LETTERS]


def new_session_id() -> str:
    """What all log lines of a session have in common."""
    return "".join(random.choices(PAIRS_OF_LETTERS, k=SESSION_ID_LENGTH // 2))


class SessionLog:
    """Lines that bear the session and its client."""

    def __init__(self, sid: str, client: Client, counts: Counts) -> None:
        self._sid = sid
        self._client = client
        self._counts = counts

    def debug(self, message: str, **fields: log.Value) -> None:
        log.debug(message, sid=self._sid, client=str(self._client), **fields)

    def info(self, message: str, **fields: log.Value) -> None:
        log.info(message, sid=self._sid, client=str(self._client), **fields)

    def warn(self, message: str, **fields: log.Value) -> None:
        log.warn(message, sid=self._sid, client=str(self._client), **fields)

    def error(self, message: str, **fields: log.Value) -> None:
        log.error(message, sid=self._sid, client=str(self._client), **fields)

    def bug(self, message: str) -> None:
        """An unexpected exception, with its traceback. Call it in an except block."""
        log.bug(message, sid=self._sid, client=str(self._client))

    def upstream_failed(self, upstream: Upstream | None, error: str) -> None:
        """It could not be reached (None), or was lost."""
        self.error("Upstream failed", error=error)
        if upstream:
            self._counts.lost(upstream.server, error)

    def message(
        self, transaction: Transaction, upstream: Upstream | None, outcome: Outcome, recipient: Path | None = None
    ) -> None:
        """The one line for a message or a refused recipient; the fields of the Go program, and four more.

        A message with more recipients than a line has room for has more lines, which say `part=2/3` and no octets.
        upstream: it has accepted MAIL. Counted here and nowhere else, so that the numbers are those of the log.
        """
        reply, route, relay, counts = outcome.reply, transaction.route, transaction.relay, self._counts
        accepted = reply is not None and reply.positive
        recipients = [path.address for path in ([recipient] if recipient else transaction.recipients)]
        host, octets = str(upstream.server if upstream else route or ""), relay.octets if relay else 0
        fields: dict[str, log.Value] = {
            "sid": self._sid,
            "client": str(self._client),
            "client_helo": self._client.helo,
            "client_tls": self._client.tls is not None,
            "from": transaction.mail.path.address,
            "to": ",".join(recipients),
            "upstream": host,
            "upstream_tls": upstream is not None and upstream.wire.tls_version is not None,
            "error": None if accepted else outcome.why or str(reply),
            "error_src": None if accepted else outcome.by,
            "reply": str(reply) if reply else None,
            "bytes": octets,
            "duration": monotonic() - transaction.began,
            "mapping": route.mapping if route else None,
        }
        _write("Message accepted" if accepted else "Message rejected", fields, recipients)
        if upstream is None and not (route and len(route.servers) == 1 and not route.servers[0].mx):
            host = ""  # which one it would have been is not known
        mapping = route.mapping if route else NO_MAPPING
        counts.message(_verdict(outcome), mapping, host, len(recipients), octets, whole=recipient is None)
        counts.event("accepted" if accepted else "rejected", fields)
        if relay and relay.verdict_seconds is not None:
            counts.took(relay.verdict_seconds, VERDICT_SECONDS)


def _verdict(outcome: Outcome) -> str:
    if outcome.reply is not None and outcome.reply.positive:
        return ACCEPTED
    if outcome.by == UPSTREAM:
        return REJECTED_BY_UPSTREAM
    return FAILED if outcome.by == CLIENT or outcome.reply in NO_VERDICT else REJECTED_BY_WILLI


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
