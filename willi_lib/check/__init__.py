"""`willi.py check` and `willi.py lookup`: the questions of somebody at a terminal."""

from __future__ import annotations

from willi_lib.net import patch  # isort: skip  # noqa: F401 -- first of all

from willi_lib import log
from willi_lib.config import Settings
from willi_lib.mappings.csv_file import CsvError, CsvFile
from willi_lib.mappings.open import MappingError, open_mappings
from willi_lib.net.resolver import Resolver
from willi_lib.net.tls import CertificateError, server_context, upstream_contexts

from .certificates import look_at_certificates
from .files import look_at_files
from .lookup import lookup
from .ports import look_at_ports, look_whether_ports_stop_a_start
from .promises import look_at_promises
from .report import GOOD, Report
from .resolver import look_at_dns
from .routes import look_at_mappings, look_at_postmaster
from .upstreams import look_at_upstreams

__all__ = ["check", "check_quickly", "lookup"]


def check(settings: Settings, as_json: bool = False) -> int:
    """Try all that the file names; the exit status. (The file itself has been read without fault.)"""
    log.silence()
    report = Report(as_json)
    report.ok(settings.path, f"mappings: {len(settings.mappings)}, domain {settings.domain}")
    look_at_promises(settings, report)
    look_at_certificates(settings, report)
    look_at_files(settings, report)
    look_at_ports(settings, report)
    resolver = Resolver(settings.dns_timeout)
    resolver.serve_all_sockets()
    destinations = look_at_mappings(settings, report)
    look_at_postmaster(settings, report)
    dns_answers = look_at_dns(settings, destinations, resolver, report)
    try:
        look_at_upstreams(settings, destinations, resolver, report, dns_answers)
    except CertificateError as error:
        report.faults(str(error), "name a file of certificates in PEM that the user of the service can read")
    return report.end()


def check_quickly(settings: Settings, as_json: bool = False) -> int:
    """Whether Willi would start: read what its workers read, and bind what the master binds; the exit status."""
    log.silence()
    report = Report(as_json)
    try:
        for mapping in open_mappings(settings):
            if isinstance(mapping, CsvFile):
                mapping.load()
        server_context(settings.certificates, settings.tls_min_version)
        upstream_contexts(settings)
    except (MappingError, CsvError, CertificateError) as faults:
        report.faults(str(faults))
    look_whether_ports_stop_a_start(settings, report)
    if report.status == GOOD:
        report.ok(settings.path, "Willi would start")
    return report.end()
