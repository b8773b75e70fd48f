"""`willi.py check` and `willi.py lookup`: the questions of an administrator at a terminal."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

from collections.abc import Iterator, Sequence

from .. import log
from ..config import Settings
from ..net.resolver import Resolver
from ..net.tls import CertificateError, server_context, upstream_contexts
from ..proxy.lookup import show
from ..status.finding import Finding
from ..text import visible
from .finding import GOOD, WRONG, faults, report
from .machine import check_certificates, check_files, check_ports, check_rights
from .mappings import Destinations, check_mappings, check_postmaster, load_mappings
from .resolver import check_dns
from .rules import check_settings
from .upstreams import check_upstreams


def check(settings: Settings, as_json: bool = False) -> int:
    """Try all that the file names; the exit status. (The file itself has been read without fault.)"""
    log.silence()
    return report(_try_all(settings), as_json)


def check_quickly(settings: Settings, as_json: bool = False) -> int:
    """Whether Willi would start: read what its workers read, and bind what the master binds; the exit status."""
    log.silence()
    return report(_try_start(settings), as_json)


def _try_all(settings: Settings) -> Iterator[Finding]:
    yield Finding("ok", settings.path, f"mappings: {len(settings.mappings)}, domain {settings.domain}")
    for part in (check_settings, check_certificates, check_files, check_ports):
        yield from part(settings)
    resolver = Resolver(settings.dns_timeout)
    resolver.serve_all_sockets()
    mappings, unusable = load_mappings(settings)
    facts = [(mapping.name, mapping.facts(thorough=True)) for mapping in mappings]
    yield from unusable
    yield from check_mappings(facts)
    yield from check_rights(settings)
    if not unusable:
        yield from check_postmaster(settings, mappings)
    for mapping in mappings:
        mapping.close()
    destinations = Destinations.of(one for _, one in facts)
    dns = list(check_dns(settings, destinations, resolver))
    yield from dns
    yield from check_upstreams(settings, destinations, resolver, dns_answers=dns[0].level == "ok")


def _try_start(settings: Settings) -> Iterator[Finding]:
    _, found = load_mappings(settings)
    try:
        server_context(settings.certificates, settings.tls_min_version)
        upstream_contexts(settings)
    except CertificateError as error:
        found += faults(str(error))
    found += (finding for finding in check_ports(settings, quick=True) if finding.level != "ok")
    yield from found
    if not any(finding.level == "wrong" for finding in found):
        yield Finding("ok", settings.path, "Willi would start")


def lookup(settings: Settings, addresses: Sequence[str]) -> int:
    """Show what a session would find for each address; 0 if each has a route."""
    log.silence()
    Resolver(settings.dns_timeout).serve_all_sockets()
    mappings, unusable = load_mappings(settings)
    if unusable:
        print("\n".join(visible(str(finding)) for finding in unusable))
        return WRONG
    status = GOOD
    for address in addresses:
        asked = show(mappings, settings, address)
        lines = [address]
        for name, key, answer, seconds in asked.steps:
            lines.append(f"  {name}  {key}  {answer}" + (f"  ({seconds * 1000:.1f} ms)" if seconds is not None else ""))
        print("\n".join(map(visible, [*lines, f"  {asked.result}"])))
        status = status if asked.result.startswith("route: ") else WRONG
    for mapping in mappings:
        mapping.close()
    return status
