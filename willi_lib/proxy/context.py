"""What all sessions of a worker share, and what Willi says of itself to each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ssl import SSLContext

from ..config import Settings
from ..net.resolver import Resolver
from ..routing.route import Mapping
from ..smtp import xclient
from ..smtp.reply import Reply
from ..status.counts import Counts
from .connector import Connector


@dataclass(frozen=True)
class SessionContext:
    """What all sessions of a worker share."""

    settings: Settings
    mappings: Sequence[Mapping]
    connector: Connector
    resolver: Resolver
    server_tls: SSLContext | None
    counts: Counts
    _ehlo_replies: dict[tuple[bool, bool], Reply] = field(default_factory=dict, init=False, compare=False)

    @cached_property
    def greeting(self) -> Reply:
        """What a client hears first."""
        return Reply(220, (f"{self.settings.domain} ESMTP Willi".encode(),))

    def ehlo_reply(self, in_tls: bool, may_xclient: bool) -> Reply:
        """The answer to EHLO (RFC 5321 §4.1.1.1): what we can keep to with any upstream."""
        known = self._ehlo_replies.get((in_tls, may_xclient))
        if known is None:
            known = self._ehlo_replies[in_tls, may_xclient] = self._make_ehlo_reply(in_tls, may_xclient)
        return known

    def _make_ehlo_reply(self, in_tls: bool, may_xclient: bool) -> Reply:
        settings = self.settings
        keywords = [
            settings.domain,
            # Early: there are probes and clients that look for "250-STARTTLS", which the last line would not be.
            *(["STARTTLS"] if self.server_tls and not in_tls else []),
            "PIPELINING",
            f"SIZE {settings.max_message_bytes}",
            "ENHANCEDSTATUSCODES",
            *(name for name in ("8BITMIME", "SMTPUTF8", "CHUNKING") if name in settings.extensions),
        ]
        if settings.mixed_recipients == "defer":
            keywords.append(f"LIMITS RCPTMAX={settings.max_recipients} RCPTDOMAINMAX=1")  # RFC 9422
        if may_xclient:
            keywords.append("XCLIENT " + " ".join(sorted(xclient.ATTRIBUTES)))
        return Reply(250, tuple(keyword.encode() for keyword in keywords))
