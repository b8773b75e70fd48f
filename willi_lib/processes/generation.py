"""What the workers share that have read the same willi.conf. The master makes it, before it forks them."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import log
from ..config import Settings
from ..config.settings import MappingSettings
from ..mappings.known_rows import KnownRows
from ..net.tls import ServerTls, server_tls
from .news import News
from .scoreboard import Scoreboard

GENERATIONS = 4  # at the same time: one that serves, one that starts, two that drain; then a reload has to wait
DESCRIPTORS_PER_SESSION = 2  # the client and the upstream
SPARE_DESCRIPTORS = 64  # listeners, log, database, DNS


@dataclass(frozen=True, eq=False)
class Generation:
    """One file, and its workers."""

    settings: Settings
    board: Scoreboard
    tls: ServerTls
    known_rows: Mapping[MappingSettings, KnownRows]
    news: News = field(default_factory=News)

    @classmethod
    def of(cls, settings: Settings, before: Generation | None) -> Generation:
        """Reads the certificates for clients, once for all workers. before: what is the same is kept.

        Raises CertificateError.
        """
        tls = server_tls(settings, before.tls if before else None)
        known = before.known_rows if before else {}
        known_rows = {mapping: known.get(mapping) or KnownRows() for mapping in settings.mappings}
        return cls(settings, _board(settings, before), tls, known_rows, News(before.news.tables if before else None))

    @property
    def remembers(self) -> float:
        """Seconds for which its workers remember what a database has said."""
        times = ("cache_ttl", "stale_ttl")
        return max(sum(getattr(mapping, name, 0.0) for name in times) for mapping in self.settings.mappings)


def _board(settings: Settings, before: Generation | None) -> Scoreboard:
    """The one before, if it will do. What still drains is not counted in another one."""
    rows, rates = GENERATIONS * settings.workers, settings.max_connection_rate > 0
    if before and before.board.rows >= rows and before.board.rates >= rates:
        return before.board
    return Scoreboard(rows, rates)


def raise_descriptor_limit(settings: Settings) -> None:
    """As far as max_connections needs it. Warns of what is no fault of the file."""
    if os.geteuid() == 0 and not settings.user:
        log.warn("Willi runs as root: set user")
    wanted = settings.max_connections * DESCRIPTORS_PER_SESSION + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < wanted:
        log.warn("Too few file descriptors for max_connections", limit=hard, needed=wanted)
