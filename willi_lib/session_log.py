"""The log lines of one session, and the one line for each message that an administrator searches for."""

from __future__ import annotations

from time import monotonic

from . import log
from .dispatch import Transaction
from .smtp.reply import Reject, Reply
from .smtp.syntax import Path
from .upstream import Client


class SessionLog:
    """Lines that bear the session and its client.

    blame: who refused last ("client", "internal" or "upstream"), and why.
    """

    def __init__(self, sid: str, client: Client) -> None:
        self.blame = ("", "")
        self._sid = sid
        self._client = client

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

    def message(self, transaction: Transaction, answer: Reply | None, recipient: Path | None = None) -> None:
        """The one line for a message or a refused recipient; the fields of the Go program, and four more.

        answer: what the client was told; None: nothing, it has gone.
        """
        accepted = answer is not None and answer.positive
        recipients = [recipient] if recipient else transaction.recipients
        route, relay = transaction.route, transaction.relay
        upstream = transaction.upstream
        source, error = (None, None) if accepted else self.blame
        log.info(
            "Message accepted" if accepted else "Message rejected",
            sid=self._sid,
            client=str(self._client),
            client_helo=self._client.helo,
            client_tls=self._client.tls is not None,
            **{"from": transaction.mail.path.address},
            to=",".join([path.address for path in recipients]),
            upstream=str(upstream.server if upstream else route or ""),
            upstream_tls=upstream is not None and upstream.wire.tls_version is not None,
            error=error,
            error_src=source,
            reply=str(answer) if answer else None,
            bytes=relay.octets if relay else 0,
            duration=monotonic() - transaction.began,
            mapping=route.mapping if route else None,
        )
