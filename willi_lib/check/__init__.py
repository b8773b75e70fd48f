"""`willi.py check` and `willi.py lookup`: the questions of an administrator at a terminal."""

from __future__ import annotations

from ..net import patch  # isort: skip  # noqa: F401 -- first of all

from collections.abc import Iterator

from .. import log
from ..config import Settings
from ..net.resolver import Resolver
from ..net.tls import CertificateError, server_context, upstream_contexts
from ..status.finding import Finding
from .finding import faults, report
from .machine import UNIT, check_certificates, check_files, check_ports, check_rights
from .mappings import Destinations, check_mappings, check_postmaster, load_mappings
from .resolver import check_dns
from .routes import addresses_in, compare, lookup
from .rules import check_settings
from .upstreams import check_upstreams

__all__ = ["addresses_in", "check", "compare", "lookup"]


def check(settings: Settings, quick: bool, as_json: bool) -> int:
    """Try all that the file, which has been read without fault, names; the exit status.

    quick: only whether Willi would start: read what its workers read, and bind what the master binds.
    """
    log.silence()
    return report(_try_start(settings) if quick else _try_all(settings), as_json)


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
    found += check_rights(settings) if UNIT.exists() else ()  # of root's question; the service is never root
    yield from found
    if not any(finding.level == "wrong" for finding in found):
        yield Finding("ok", settings.path, "Willi would start")
