"""The mappings: tables, databases, and the routes that they have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as ByKey
from dataclasses import dataclass, replace

from ..config import Settings
from ..mappings.open import open_mappings
from ..routing.route import HostFacts, LookupFailed, Mapping, MappingError, MappingFacts, NoRoute, Route
from ..routing.search import find_route
from ..status.finding import Finding
from ..status.words import several
from .finding import faults
from .rules import is_own

FIX = "correct that line, file or setting; until then a running Willi keeps what it has"


@dataclass(frozen=True)
class Destinations:
    """The routes that are known beforehand: those in a database are not, and may be millions."""

    routes: ByKey[Route, bool]  # and whether it takes every recipient
    several: bool  # two recipients of one message may belong to different servers

    @classmethod
    def of(cls, facts: Iterable[MappingFacts]) -> Destinations:
        routes: dict[Route, bool] = defaultdict(bool)
        some_are_unknown = False
        for one in facts:
            some_are_unknown = some_are_unknown or one.routes is None
            for route in one.routes or ():
                routes[route] |= one.takes_all
        return cls(routes, some_are_unknown or len({route.servers for route in routes}) > 1)


def load_mappings(settings: Settings) -> tuple[list[Mapping], list[Finding]]:
    """The mappings that can be used, with their tables read, and what is wrong with others. A database may be down."""
    loaded: list[Mapping] = []
    found: list[Finding] = []
    for one in settings.mappings:
        try:
            mappings = open_mappings(replace(settings, mappings=(one,)))
            for mapping in mappings:
                if mapping.files():
                    mapping.load()
            loaded += mappings
        except MappingError as error:
            found += faults(str(error), FIX)
    return loaded, found


def check_mappings(facts_of: Sequence[tuple[str, MappingFacts]]) -> Iterator[Finding]:
    """facts_of: each mapping by name, in the order of the file."""
    for number, (name, facts) in enumerate(facts_of, 1):
        if facts.patterns is not None:
            yield from _check_table(name, facts, facts.patterns)
        for host in facts.hosts:
            yield _check_database(f"{name}: {host.name}", host)
        if facts.takes_all and facts.routes:
            what = f"takes every recipient, so {', '.join(map(str, facts.routes))} must refuse foreign ones itself"
            yield Finding("ok", name, what)
            if later := ", ".join(other for other, _ in facts_of[number:]):
                what = f"has an answer for everyone: {later} is never asked"
                yield Finding("warn", name, what, "make it the last mapping")


def check_postmaster(settings: Settings, mappings: Sequence[Mapping]) -> Iterator[Finding]:
    """RFC 5321 §4.5.1. A mapping that does not answer has been told already."""
    address = f"postmaster@{settings.domain}"
    try:
        route = find_route(mappings, address, settings.recipient_delimiter, subdomains=settings.subdomains)
        yield Finding("ok", "postmaster", f"{address} goes to {route}")
    except NoRoute:
        what = f"mail to {address}, where others report trouble, gets 554 (RFC 5321 asks to take it)"
        advice = "add a line for that address to a table, with the server of a mailbox of yours"
        yield Finding("warn", "postmaster", what, advice)
    except LookupFailed:
        return


def _check_table(name: str, facts: MappingFacts, patterns: int) -> Iterator[Finding]:
    if not patterns:
        what = f"{several(0, 'pattern')}: recipients that no other mapping has get 451"
        yield Finding("warn", name, what, "add a line for each domain: pattern;server;tls_verify")
        return
    yield Finding("ok", name, several(patterns, "pattern"))
    if facts.table and not facts.table.ends_a_line:
        what = "no line end at its end: if a part of it is missing, the recipients in that part get 554"
        yield Finding("warn", name, what, "see whether the last line is the last one; if so, add the line end")
    routes = facts.routes or ()
    unverified = [
        route for route in routes if not route.tls_verify and not all(is_own(server.host) for server in route.servers)
    ]
    if unverified:
        what = f"{len(unverified)} of {several(len(routes), 'route')} have tls_verify = false"
        advice = "leave the third field empty where the server's certificate is valid"
        yield Finding("warn", name, f"{what}: whoever sits in between can read such mail", advice)


def _check_database(subject: str, host: HostFacts) -> Finding:
    if host.fault and host.answered:
        advice = "correct query or file, or the right to read it (GRANT SELECT, chgrp willi)"
        return Finding("wrong", subject, host.fault, advice)
    if host.fault:
        advice = "is it up, may we reach it, and are user, password and tls_ca right?"
        return Finding("wrong", subject, host.fault, advice)
    if host.tls or not host.host or host.host == "localhost" or is_own(host.host):
        return Finding("ok", subject, host.text)
    advice = "set tls_ca, so that nobody in between can read, or change where mail goes"
    return Finding("warn", subject, host.text, advice)
