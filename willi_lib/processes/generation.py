"""What the workers share that have read the same willi.conf. The master makes it, before it forks them."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .. import log
from ..config import Settings
from ..config.settings import MappingSettings
from ..mappings.known_rows import KnownRows
from ..net.tls import ServerTls, UpstreamTls, server_tls, upstream_tls
from ..routing.route import HeldTable
from .news import News
from .scoreboard import Scoreboard

GENERATIONS = 4  # at the same time: one that serves, one that starts, two that drain; then a reload has to wait
DESCRIPTORS_PER_SESSION = 2  # the client and an upstream; few clients need more than one
SPARE_DESCRIPTORS = 64  # listeners, log, database, DNS

Reload = Literal["", "asked", "automatic", "overdue"]  # by SIGHUP; for a changed certificate; when that waited too long


@dataclass(frozen=True)
class Start:
    """How a worker starts."""

    held: Mapping[str, HeldTable]  # by mapping: the tables of the workers that serve
    alone: bool  # there were such workers, and none is left
    reload: Reload


@dataclass(frozen=True, eq=False)
class Generation:
    """One file, and its workers."""

    settings: Settings
    board: Scoreboard
    tls: ServerTls
    upstream_tls: UpstreamTls
    known_rows: Mapping[MappingSettings, KnownRows]
    news: News

    @classmethod
    def of(cls, settings: Settings, before: Generation | None) -> Generation:
        """Reads certificates and authorities, once for all workers. before: what is the same is kept.

        Raises CertificateError.
        """
        tls = server_tls(settings, before.tls if before else None)
        known = before.known_rows if before else {}
        known_rows = {mapping: known.get(mapping) or KnownRows() for mapping in settings.mappings}
        rows, rates = GENERATIONS * settings.workers, settings.max_connection_rate > 0
        if before and before.board.rows >= rows and before.board.rates >= rates:
            board = before.board  # what still drains is not counted in another one
        else:
            board = Scoreboard(rows, rates)
        news = News(before.news.tables if before else {})
        to_upstreams = upstream_tls(settings, before.upstream_tls if before else None)
        return cls(settings, board, tls, to_upstreams, known_rows, news)


def raise_descriptor_limit(settings: Settings) -> None:
    """As far as max_connections and kept_upstreams may need it. Warns of what is no fault of the file."""
    if os.geteuid() == 0 and not settings.user:
        log.warn("Willi runs as root: set user")
    needed = settings.max_connections * DESCRIPTORS_PER_SESSION + SPARE_DESCRIPTORS
    wanted = settings.max_connections * (1 + settings.kept_upstreams) + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < needed:
        log.warn("Too few file descriptors for max_connections", limit=hard, needed=needed)
