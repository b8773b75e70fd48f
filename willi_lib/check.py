"""`willi.py check` and `willi.py lookup`: the questions of somebody at a terminal."""

# ruff: noqa: E402

from __future__ import annotations

from gevent import monkey

monkey.patch_all(ssl=False)  # before the imports below, as in worker.py

import grp
import os
import pwd
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from time import monotonic

from gevent.pool import Pool

from . import log
from .config import CsvSettings, MysqlSettings, Settings
from .dns import Address, Resolver
from .mappings import MappingError, open_database, open_mappings, others_can_read
from .routing import LookupFailed, Mapping, Route, Step, search
from .routing.csv_file import CsvError, CsvFile
from .routing.database import Down
from .routing.mysql import Mysql
from .routing.static import Static
from .smtp import reply as replies
from .smtp.reply import BadReply, Reject
from .smtp.syntax import parse_rcpt
from .smtp.wire import Clock, WireError
from .tls import CertificateError, certificate_facts, server_context
from .upstream import Client, Connector, Refused, Upstream, UpstreamFailed

PROBES_AT_A_TIME = 20
WARN_DAYS = 14  # before a certificate ends
ORIGINS = {"": "", "asked": "", "cache": ", from the cache", "stale": ", from the cache, since the database is down"}
GOOD, WRONG = 0, 1


class Report:
    """One line per finding; the exit status follows from the worst."""

    def __init__(self) -> None:
        self.status = GOOD

    def ok(self, what: str) -> None:
        """As it should be."""
        print(f"ok     {what}")

    def warn(self, what: str) -> None:
        """It works, and may not be what was meant."""
        print(f"warn   {what}")

    def wrong(self, what: str) -> None:
        """It does not work."""
        print(f"wrong  {what}")
        self.status = WRONG


def check(settings: Settings) -> int:
    """Try all that the file names; the exit status. (The file itself has been read without fault.)"""
    log.silence()
    report = Report()
    report.ok(f"{settings.path}: mappings: {len(settings.mappings)}, domain {settings.domain}")
    if "." not in settings.domain:
        report.warn(f"domain {settings.domain} is no full host name: upstreams may refuse it in EHLO")
    _check_certificates(settings, report)
    routes = _check_mappings(settings, report)
    _check_rights(settings, report)
    _check_upstreams(settings, routes, report)
    return report.status


def check_quickly(settings: Settings) -> int:
    """Whether Willi would start: read what its workers read. Nothing is connected to; the exit status."""
    log.silence()
    report = Report()
    try:
        for mapping in open_mappings(settings):
            if isinstance(mapping, CsvFile):
                mapping.load()
        server_context(settings.certificates, settings.tls_min_version)
        report.ok(f"{settings.path}: Willi would start")
    except (MappingError, CsvError, CertificateError) as faults:
        for fault in str(faults).splitlines():
            report.wrong(fault)
    return report.status


def _check_certificates(settings: Settings, report: Report) -> None:
    if not settings.certificates:
        report.warn("no tls_cert: STARTTLS is not offered, mail comes in clear")
    for pair in settings.certificates:
        try:
            facts = certificate_facts(pair)
        except CertificateError as error:
            report.wrong(str(error))
            continue
        days = (facts.expires - datetime.now(timezone.utc)).days
        text = f"{pair.cert}: for {', '.join(facts.names) or 'no name'}, until {facts.expires:%Y-%m-%d} ({days} days)"
        (report.wrong if days < 0 else report.warn if days < WARN_DAYS else report.ok)(text)


def _check_mappings(settings: Settings, report: Report) -> list[Route]:
    """The routes of all mappings that know theirs beforehand, each once."""
    routes: dict[Route, None] = {}
    for one in settings.mappings:
        if isinstance(one, MysqlSettings):
            _check_database(one, report)
            continue
        try:
            mapping = _open_one(settings, one.name)
        except (MappingError, CsvError) as error:
            for fault in str(error).splitlines():
                report.wrong(fault)
            continue
        if isinstance(mapping, CsvFile):
            (report.ok if len(mapping) else report.warn)(f"{mapping.name}: {len(mapping)} patterns")
            routes.update(dict.fromkeys(mapping.routes()))
        elif isinstance(mapping, Static):
            report.warn(f"{mapping.name}: takes every recipient, so {mapping.route} must refuse foreign ones itself")
            routes[mapping.route] = None
    return list(routes)


def _check_database(mapping: MysqlSettings, report: Report) -> None:
    """Connect to each host and have it prepare the query. The routes in it stay unknown: they may be millions."""
    name = f"mysql:{mapping.name}"
    if others_can_read(mapping.password_file):
        report.warn(f"{name}: others than its owner can read {mapping.password_file}: chmod 600")
    try:
        database = open_database(mapping)
    except ValueError as fault:
        report.wrong(f"{name}: {fault}")
        return
    for host in database.hosts:
        try:
            facts = database.inspect(host)
        except (Down, LookupFailed) as error:
            report.wrong(f"{name}: {database.name_of(host)}: {error}")
            continue
        tls = f"{facts.tls}, certificate verified" if facts.tls else "no TLS"
        report.ok(f"{name}: {database.name_of(host)}: {facts.version}, {tls}, columns {', '.join(facts.columns)}")


def _check_rights(settings: Settings, report: Report) -> None:
    """The files that the workers read again when they are no longer root."""
    if os.geteuid() != 0 or not settings.user:
        return
    account = pwd.getpwnam(settings.user)
    group = grp.getgrnam(settings.group).gr_gid if settings.group else account.pw_gid
    groups = os.getgrouplist(settings.user, group)
    files = {mapping.policy.upstream_tls_ca for mapping in settings.mappings}
    files |= {mapping.file for mapping in settings.mappings if isinstance(mapping, CsvSettings)}
    for file in filter(os.path.exists, sorted(files)):
        test = subprocess.run(["test", "-r", file], user=account.pw_uid, group=group, extra_groups=groups, check=False)
        if test.returncode != 0:
            report.wrong(f"{file}: {settings.user} (user) may not read it, and will have to")


def _open_one(settings: Settings, name: str) -> Mapping:
    """Raises MappingError, CsvError."""
    chosen = tuple(mapping for mapping in settings.mappings if mapping.name == name)
    mapping = open_mappings(replace(settings, mappings=chosen))[0]
    if isinstance(mapping, CsvFile):
        mapping.load()
    return mapping


def _check_upstreams(settings: Settings, routes: Iterable[Route], report: Report) -> None:
    """Talk to every address of every host as far as MAIL."""
    connector = Connector(settings, Resolver(settings.dns_timeout))
    pool = Pool(PROBES_AT_A_TIME)
    # Each once, although many routes may share it: equal routes differ in nothing that matters to a host.
    to_servers = dict.fromkeys(replace(route, servers=(server,)) for route in routes for server in route.servers)
    to_hosts: dict[Route, None] = {}
    for hosts, failures in pool.imap(partial(_hosts_of, connector), to_servers):
        to_hosts.update(dict.fromkeys(hosts))
        for failure in failures:
            report.wrong(failure)
    for findings in pool.imap(partial(_probe_host, settings, connector), to_hosts):
        bad = report.warn if any(good for good, _ in findings) else report.wrong  # another address will do
        for good, text in findings:
            (report.ok if good else bad)(text)


def _hosts_of(connector: Connector, route: Route) -> tuple[list[Route], list[str]]:
    """The same route to each of its hosts alone, and why there are not more of them."""
    failures: list[str] = []
    return [replace(route, servers=(host,)) for host in connector._hosts(route, failures)], failures


def _probe_host(settings: Settings, connector: Connector, route: Route) -> list[tuple[bool, str]]:
    """For each address of a route's only host: whether it is good, and a text."""
    clock = Clock()
    try:
        addresses = connector._addresses(route.servers[0], clock)
        return [_probe(settings, connector, route, address, clock) for address in addresses]
    except UpstreamFailed as error:
        return [(False, str(error))]
    finally:
        clock.close()


def _probe(
    settings: Settings, connector: Connector, route: Route, address: Address, clock: Clock
) -> tuple[bool, str]:
    client = Client("127.0.0.1", 25, own=lambda: ("127.0.0.1", 25), name=lambda: "localhost")
    client.helo, client.tls = settings.domain, "as if"  # so that STARTTLS is tried
    server = route.servers[0]
    where = str(server) if address[1] == server.host else f"{server} [{address[1]}]"
    try:
        with clock.limit(settings.upstream_timeout, "checking"):
            upstream = connector._open(route, server, address, client, clock, "check")
            text = _describe(upstream, route)
            upstream.quit()
            return True, f"{where}: {text}"
    except (UpstreamFailed, WireError, BadReply) as error:
        return False, f"{where}: {str(error).removeprefix(f'{server}: ')}"
    except (Reject, Refused) as refusal:
        loop = f": it calls itself {settings.domain}, which is our domain" if refusal.reply == replies.MAIL_LOOP else ""
        return False, f"{where}: {refusal.reply}{loop}"


def _describe(upstream: Upstream, route: Route) -> str:
    lacks = [name for name in ("PIPELINING", "8BITMIME", "SMTPUTF8", "CHUNKING") if name not in upstream.features]
    lacking = f", lacks {' '.join(lacks)}" if lacks else ""
    return f"{_describe_tls(upstream, route)}, {_describe_introduction(upstream, route)}{lacking}"


def _describe_tls(upstream: Upstream, route: Route) -> str:
    version = upstream.wire.tls_version
    if version:
        return f"{version}, certificate {'verified' if route.tls_verify else 'not verified'}"
    if route.policy.upstream_tls == "never":
        return "TLS is off (upstream_tls = never)"
    return "no STARTTLS" + (", though tls_verify is on" if route.tls_verify else "")


def _describe_introduction(upstream: Upstream, route: Route) -> str:
    """How the upstream learns who the client is."""
    if route.policy.send_proxy != "no":
        return f"PROXY header {route.policy.send_proxy} sent"
    if upstream.knows_client:
        return "XCLIENT accepted"
    if route.policy.xclient == "no":
        return "XCLIENT is off: it sees our address as the client's"
    if "XCLIENT" in upstream.features:
        return "XCLIENT refused: allow our address to use it (Postfix: smtpd_authorized_xclient_hosts)"
    return "no XCLIENT: it sees our address as the client's"


def lookup(settings: Settings, addresses: Sequence[str]) -> int:
    """Show what a session would find for each address; 0 if each has a route."""
    log.silence()
    try:
        mappings = open_mappings(settings)
        for mapping in mappings:
            if isinstance(mapping, CsvFile):
                mapping.load()
    except (MappingError, CsvError) as error:
        print(error)
        return WRONG
    worst = max([_lookup_one(settings, mappings, address) for address in addresses])
    for mapping in mappings:
        if isinstance(mapping, Mysql):
            mapping.close()
    return worst


def _lookup_one(settings: Settings, mappings: Sequence[Mapping], address: str) -> int:
    print(address)
    try:
        path = parse_rcpt(b"TO:<" + address.encode() + b">", smtputf8=True)
    except Reject as refusal:
        print(f"  refused: {refusal.reply}")
        return WRONG
    recipient = path.address if path.domain else f"{path.address}@{settings.domain}"
    began = monotonic()
    for step in search(mappings, recipient, settings.recipient_delimiter):
        print(f"  {step.mapping}  {step.key}  {_answer(step)}{_origin(step, monotonic() - began)}")
        began = monotonic()
        if step.failure is not None:
            print("  the search ends here, the client gets 451 4.3.0")
            return WRONG
        if step.route:
            print(f"  route: {step.route}, tls_verify = {'true' if step.route.tls_verify else 'false'}")
            return GOOD
    print("  no mapping matches, the client gets 554 5.7.1 Relay access denied")
    return WRONG


def _origin(step: Step, seconds: float) -> str:
    """Where a database's answer comes from, and how long it took."""
    if not step.origin and step.failure is None:
        return ""
    return f"  ({seconds * 1000:.1f} ms{ORIGINS[step.origin]})"


def _answer(step: Step) -> str:
    if step.failure is not None:
        return f"failed: {step.failure}"
    return str(step.route) if step.route else "-"
