"""From a recipient to the upstream that is responsible for it.

`find_route` is the one door: it knows the keys of an address, their case and the
order of the search. A mapping only answers for keys. Pure: no socket, no log.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol
from unicodedata import name, normalize

from willi_lib.hosts import DOMAIN, is_host_name, parse_ip, parse_port, split_host_port, with_port
from willi_lib.text import refuse_invisible

DEFAULT_PORT = 25
UNSURE = "the table is empty, or is being written"

UpstreamTls = Literal["auto", "always", "require", "never"]
Xclient = Literal["try", "require", "no"]
SendProxy = Literal["no", "v1", "v2"]
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


@dataclass(frozen=True, slots=True)
class Server:
    """One entry of a route's `server`: a host and port, or the MX hosts of a domain."""

    host: str  # name, IPv4 or IPv6 address without brackets; with mx: the domain
    port: int = DEFAULT_PORT
    mx: bool = False

    def __str__(self) -> str:
        """As an administrator writes it: `host:port`, `[address]:port` or `mx:domain`."""
        return f"mx:{self.host}" if self.mx else with_port(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Route:
    """Where the mail for a recipient goes, and how."""

    servers: tuple[Server, ...]  # tried in this order
    tls_verify: bool = True
    policy: Policy = field(default_factory=Policy)
    mapping: str = field(default="", compare=False)  # the name of the mapping, for the log

    def __str__(self) -> str:
        """The servers, as an administrator writes them."""
        return ",".join(map(str, self.servers))


class NoRoute(Exception):
    """No mapping matches: a definite answer."""


class LookupFailed(Exception):
    """A mapping could not answer: try again later.

    told: the log has this already, so that nobody needs to repeat it for every client.
    """

    def __init__(self, why: str = "", told: bool = False) -> None:
        super().__init__(why)
        self.told = told


class Answer(NamedTuple):
    """What a mapping has for one key."""

    route: Route | None
    origin: Origin = ""


class MappingError(Exception):
    """A mapping that cannot be used; one fault a line of the text.

    passing: nothing is wrong with it as far as we know, it could not be read just now.
    """

    def __init__(self, *faults: str, passing: bool = False) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults
        self.passing = passing


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
    hosts: tuple[HostFacts, ...] = ()


class Mapping(Protocol):
    """One source of routes."""

    name: str  # for the log: "csv:/etc/willi/map.csv"

    def load(self) -> bool:
        """Read what is to be read now, if there is anything: whether there was. Called at the start, then every second.

        Raises MappingError; what was read before stays.
        """

    def close(self) -> None:
        """Release connections and files."""

    def files(self) -> Sequence[str]:
        """What `load` reads. Empty: it need not be called every second."""

    def facts(self, thorough: bool = False) -> MappingFacts:
        """thorough: with the hosts of a database, each of which is asked. That takes time."""

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        """The answer for exactly each key, in this order; a key is not asked for before its answer is taken.

        keys: of one recipient, folded by `keys_of`. A time limit is for all of them together.
        The answers raise LookupFailed, without the mapping's name in the text: `find_route` adds that.
        Must not log, must not retry for ever.
        """


# The search


@dataclass(frozen=True, slots=True)
class Step:
    """One key asked in one mapping: a route, a failure, or neither."""

    mapping: str
    key: str
    route: Route | None
    failure: LookupFailed | None = None
    origin: Origin = ""

    @property
    def is_last(self) -> bool:
        """Whether the search ends here: nobody else is asked."""
        return self.route is not None or self.failure is not None


def search(mappings: Sequence[Mapping], recipient: str, delimiter: str = "") -> Iterator[Step]:
    """Ask each mapping for all keys of the recipient, up to the first match or failure."""
    keys = keys_of(recipient, delimiter)
    for mapping in mappings:
        for step in ask(mapping, keys):
            yield step
            if step.is_last:
                return


def ask(mapping: Mapping, keys: Sequence[str]) -> Iterator[Step]:
    """Ask one mapping for all keys of a recipient, up to the first match or failure."""
    answers = mapping.find(keys)
    for key in keys:
        try:
            route, origin = next(answers)
        except LookupFailed as failure:
            yield Step(mapping.name, key, None, failure)
            return
        yield Step(mapping.name, key, route, None, origin)
        if route is not None:
            return


def find_route(mappings: Sequence[Mapping], recipient: str, delimiter: str = "") -> Route:
    """The first match, so that an earlier mapping's domain beats a later one's address.

    Raises NoRoute, or LookupFailed from the first mapping that fails: the search
    ends there, since a later, more general mapping might send the mail elsewhere.
    """
    return conclude(list(search(mappings, recipient, delimiter)), recipient)


def conclude(steps: Sequence[Step], recipient: str) -> Route:
    """The route that a search has come to. Raises NoRoute, LookupFailed."""
    if steps and (failure := steps[-1].failure):
        raise LookupFailed(f"{steps[-1].mapping}: {failure}", failure.told)
    if steps and (route := steps[-1].route):
        return route
    for step in steps:
        if step.origin == "unsure":
            raise LookupFailed(f"{step.mapping}: {UNSURE}", told=True)
    raise NoRoute(recipient)


# Keys

_DOMAIN = re.compile(DOMAIN)
_LITERAL = re.compile(r"\[[!-Z^-~]+\]")  # RFC 5321 §4.1.3, whatever the address in it
_FOLDED = re.compile(rf"(?:[a-z0-9._+-]+@)?{DOMAIN}")  # what folding leaves alone: nearly every pattern
_UNQUOTED = re.compile(r'[^\x00-\x20\x7f"(),:;<>@\[\]\\]+')  # lenient about dots: "a..b" does occur
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ATOM = r"[^\x00-\x20\x7f\"(),.:;<>@\[\]\\]+"
_DOT_STRING = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
# What word processors and spreadsheets make of quotation marks and hyphens; no domain has them (RFC 5892).
_TYPESET = re.compile("[\u00ab\u00bb\u2010-\u2015\u2018-\u201f\u2039\u203a\u2212]")


def keys_of(recipient: str, delimiter: str = "") -> tuple[str, ...]:
    """The keys to ask for, folded: user+ext@domain, user@domain, domain.

    recipient: without angle brackets and source route. One without a domain
        (postmaster) has a single key.
    delimiter: a set of characters; the local part is cut at the first of them,
        unless nothing would remain, or quotes are needed around it.
    """
    local, at, domain = recipient.rpartition("@")
    domain = _fold_domain(domain)
    if not at or not domain or domain.endswith('"'):  # the @ of "a@b" belongs to the local part
        return (_fold_local_part(recipient),)
    local = _fold_local_part(local)
    if delimiter and not local.startswith('"'):
        cut = min((found for found in map(local.find, delimiter) if found >= 0), default=0)
        if cut:
            return f"{local}@{domain}", f"{local[:cut]}@{domain}", domain
    return f"{local}@{domain}", domain


def fold_pattern(pattern: str) -> str:
    """The key that an administrator's pattern, an address or a domain, stands for.

    Raises ValueError with a short reason if no recipient can have that key.
    """
    if _FOLDED.fullmatch(pattern):
        return pattern
    refuse_invisible(pattern)
    local, at, domain = pattern.rpartition("@")
    _refuse_typeset(domain)
    domain = _fold_domain(domain)
    if at and local in ("", "*"):
        raise ValueError(f"{pattern[:80]!r}: a whole domain is written without {local}@")
    if domain.startswith((".", "*")):
        raise ValueError(
            f"{pattern[:80]!r}: neither an address nor a domain; there are no wildcards: one line for each domain"
        )
    if not (_DOMAIN.fullmatch(domain) or _LITERAL.fullmatch(domain)):
        raise ValueError(f"{pattern[:80]!r}: neither an address nor a domain")
    if not at:
        return domain
    if not (_UNQUOTED.fullmatch(local) or _QUOTED.fullmatch(local)):
        raise ValueError(f"{pattern[:80]!r}: neither an address nor a domain")
    return f"{_fold_local_part(local)}@{domain}"


def _refuse_typeset(domain: str) -> None:
    """Raises ValueError: punycode would make an A-label of such a character that no client ever asks for."""
    if found := _TYPESET.search(domain):
        code = f"U+{ord(found[0]):04X} {name(found[0])}"
        raise ValueError(f"{domain[:80]!r}: has {code}, which no domain has: write it in ASCII, or leave it out")


def _fold_local_part(local: str) -> str:
    """Lower case, without needless quotes and backslashes, which mean nothing (RFC 5321 §4.1.2)."""
    quoted = _QUOTED.fullmatch(local) if local.startswith('"') else None
    if quoted is not None:
        local = re.sub(r"\\(.)", r"\1", quoted[1])
        if not _DOT_STRING.fullmatch(local):
            local = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
    return local.lower() if local.isascii() else normalize("NFC", local.lower())


def _fold_domain(domain: str) -> str:
    """Lower case, A-labels, no dot at the end. What has no A-label stays, in lower case.

    The mapping is that of RFC 5895, letter by letter as in UTS #46: Python's lower() makes another letter of a capital
    sigma at the end of a word. Python's `idna` codec is IDNA 2003 for ever: there
    `straße.example` means `strasse.example`, which may be somebody else's.
    """
    if domain.isascii():
        return domain.lower().removesuffix(".")
    lower = normalize("NFKC", domain).replace("Σ", "σ").lower()
    name = ".".join(map(_a_label, normalize("NFC", lower).replace("\u3002", ".").removesuffix(".").split(".")))
    return name if _DOMAIN.fullmatch(name) else domain.replace("Σ", "σ").lower().removesuffix(".")


def _a_label(label: str) -> str:
    """As it is if that is ASCII, or longer than a label can be (encoding takes quadratic time)."""
    if label.isascii() or len(label) > 63:
        return label
    return "xn--" + label.encode("punycode").decode("ascii")


# What stands behind a key

_TRUTH = {"true": True, "t": True, "yes": True, "1": True, "false": False, "f": False, "no": False, "0": False}


def parse_tls_verify(text: str) -> bool:
    """true/false, yes/no, t/f or 1/0 in any case. Raises ValueError with a short reason."""
    truth = _TRUTH.get(text.strip().lower())
    if truth is None:
        raise ValueError(f"{text[:80]!r}: tls_verify must be true or false")
    return truth


def parse_servers(text: str) -> tuple[Server, ...]:
    """What an administrator calls `server`, several with commas between them.

    One is `host`, `host:port`, `[2001:db8::1]:port` or `mx:domain`. Names must have
    the form of one, and become lower case and A-labels.
    Raises ValueError with a short reason for the administrator.
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
    _refuse_typeset(text)
    name = _fold_domain(text)
    if not is_host_name(name):
        is_digits = name.replace(".", "").isdigit()
        raise ValueError("not a host name, nor a whole IPv4 address" if is_digits else "not a host name")
    return name
