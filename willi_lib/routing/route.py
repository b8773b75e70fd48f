"""What a route is, and what a mapping, a source of routes, can do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from ..hosts import is_host_name, parse_ip, parse_port, split_host_port, with_port
from ..text import is_true, refuse_invisible
from .keys import fold_domain, refuse_typeset

DEFAULT_PORT = 25

UpstreamTls = Literal["auto", "always", "require", "never"]
Xclient = Literal["try", "require", "no"]
SendProxy = Literal["no", "v1", "v2"]
ServerOrder = Literal["listed", "random"]
# Of an answer: "" a table in memory; unsure: one that is empty or may lack rows, so that its "no" is not definite;
# stale: too old, but there is no other.
Origin = Literal["", "unsure", "asked", "cache", "stale"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How to talk to the upstreams of a mapping (settings of section 8 that a mapping may override)."""

    upstream_tls: UpstreamTls = "auto"
    upstream_tls_ca: str = ""  # PEM file; empty: the system's
    xclient: Xclient = "try"
    send_proxy: SendProxy = "no"
    server_order: ServerOrder = "listed"


@dataclass(frozen=True, slots=True)
class Server:
    """One entry of a route's `server`: a host and port, or the MX hosts of a domain."""

    host: str  # name, IPv4 or IPv6 address without brackets; with mx: the domain
    port: int = DEFAULT_PORT
    mx: bool = False

    def __str__(self) -> str:
        """As an administrator writes it."""
        return f"mx:{self.host}" if self.mx else with_port(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Route:
    """Where the mail for a recipient goes, and how."""

    servers: tuple[Server, ...]  # tried in this order, or in any
    tls_verify: bool = True
    policy: Policy = field(default_factory=Policy)
    mapping: str = field(default="", compare=False)  # the name of the mapping, for the log

    def __str__(self) -> str:
        return ",".join(map(str, self.servers))


class NoRoute(Exception):
    """No mapping matches: a definite answer."""


class LookupFailed(Exception):
    """A mapping could not answer: try again later."""

    def __init__(self, why: str = "", logged: bool = False) -> None:
        super().__init__(why)
        self.logged = logged  # the log has this already; it is not repeated for every client


class Answer(NamedTuple):
    """What a mapping has for one key."""

    route: Route | None
    origin: Origin = ""


class MappingError(Exception):
    """A mapping that cannot be used; one fault a line of the text."""

    def __init__(self, *faults: str, passing: bool = False, missing: bool = False) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults
        self.passing = passing  # nothing is wrong with it as far as we know, it could not be read just now
        self.missing = missing  # its file, or the rest of it, is not there, or not yet


class HeldTable(NamedTuple):
    """What one worker has to know of the table that others hold, to take none that is worse."""

    version: tuple[int, ...]  # differs when the file does
    patterns: int
    ends_a_line: bool  # the last octet of the file does


class HostFacts(NamedTuple):
    """One host of a database, as it answered just now."""

    name: str  # as an administrator writes it
    host: str  # without port; empty: a socket of this machine
    tls: str = ""  # the version; empty: none
    text: str = ""  # what the server is, for an administrator
    fault: str = ""
    answered: bool = True  # the fault is what the host itself said of the query


@dataclass(frozen=True)
class MappingFacts:
    """How a mapping is now, for the status and for `check`. None: it has no such thing."""

    routes: Collection[Route] | None = None  # all of them; None: not known beforehand, as in a database
    takes_all: bool = False  # every recipient has a route here
    patterns: int | None = None
    table: HeldTable | None = None
    loaded_at: float | None = None  # seconds since 1970
    last_error: str = ""
    database_up: bool | None = None
    seen: float = 0.0  # when the database last answered or did not (monotonic); 0: nothing was asked yet
    cache_entries: int | None = None
    remembers: float = 0.0  # seconds for which answers serve while the database is down
    hosts: tuple[HostFacts, ...] = ()


class Mapping(Protocol):
    """One source of routes."""

    name: str  # for the log: "csv:/etc/willi/map.csv"

    def load(self, reload: bool = False) -> bool:
        """Read what is to be read now; whether there was anything. With files, it is called again every second.

        reload: this process takes the place of others. A database, which need not be there at a start, has to answer.
        Raises MappingError; what was read before stays.
        """

    def close(self) -> None:
        """Release connections and files."""

    def files(self) -> Sequence[str]:
        """What `load` reads."""

    def facts(self, thorough: bool = False) -> MappingFacts:
        """thorough: with the hosts of a database, each of which is asked. That takes time."""

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        """The answer for exactly each key, in this order; a key is not asked for before its answer is taken.

        keys: of one recipient, folded by `keys_of`. A time limit is for all of them together.
        The answers raise LookupFailed, without the mapping's name in the text: `find_route` adds that.
        Must not log, must not retry for ever.
        """


# What an administrator writes


def parse_tls_verify(text: str) -> bool:
    """Raises ValueError with a short reason."""
    return is_true(text, "tls_verify must be true or false")


def parse_servers(text: str) -> tuple[Server, ...]:
    """`host`, `host:port`, `[2001:db8::1]:port` or `mx:domain`, several with commas between them.

    Names become lower case and A-labels. Raises ValueError with a short reason for the administrator.
    """
    refuse_invisible(text)
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ValueError(f"{text[:80]!r}: a server is missing")
    return tuple(map(_parse_server, entries))


def _parse_server(entry: str) -> Server:
    try:
        scheme, colon, domain = entry.partition(":")
        if colon and scheme.lower() == "mx" and not domain.isdigit():  # `mx:25` is a host called mx
            return Server(_parse_name(domain), mx=True)
        if re.match(r"smtp:(?![0-9]*$)", entry, re.IGNORECASE):  # `smtp:25` is a host called smtp
            raise ValueError("write the host alone, without smtp:")
        host, port = split_host_port(entry)
        return Server(parse_ip(host) or _parse_name(host), DEFAULT_PORT if port is None else parse_port(port))
    except ValueError as fault:
        raise ValueError(f"{entry[:80]!r}: {fault}") from None


def _parse_name(text: str) -> str:
    refuse_typeset(text)
    name = fold_domain(text)
    if not is_host_name(name):
        is_digits = name.replace(".", "").isdigit()
        raise ValueError("not a host name, nor a whole IPv4 address" if is_digits else "not a host name")
    return name
