"""`willi.py check` and `willi.py lookup`: the questions of somebody at a terminal."""

# ruff: noqa: E402

from __future__ import annotations

from gevent import monkey

monkey.patch_all(ssl=False)  # before the imports below, as in worker.py

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from time import monotonic

from gevent.pool import Pool

from . import log
from .config import MysqlSettings, Settings
from .dns import Resolver
from .mappings import MappingError, open_database, open_mappings, others_can_read
from .routing import LookupFailed, Mapping, Route, Server, Step, search
from .routing.csv_file import CsvError, CsvFile
from .routing.database import Down
from .routing.mysql import Mysql
from .routing.static import Static
from .smtp import reply as replies
from .smtp.reply import Reject
from .smtp.syntax import parse_rcpt
from .smtp.wire import Clock
from .tls import CertificateError, certificate_facts
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
    _check_upstreams(settings, _check_mappings(settings, report), report)
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


def _open_one(settings: Settings, name: str) -> Mapping:
    """Raises MappingError, CsvError."""
    chosen = tuple(mapping for mapping in settings.mappings if mapping.name == name)
    mapping = open_mappings(replace(settings, mappings=chosen))[0]
    if isinstance(mapping, CsvFile):
        mapping.load()
    return mapping


def _check_upstreams(settings: Settings, routes: Iterable[Route], report: Report) -> None:
    """Talk to every upstream as far as MAIL."""
    connector = Connector(settings, Resolver(settings.dns_timeout))
    # Each once, although many routes may share it: equal routes differ in nothing that matters to a server.
    probes = dict.fromkeys((replace(route, servers=(server,)), server) for route in routes for server in route.servers)
    pool = Pool(PROBES_AT_A_TIME)
    for good, text in pool.imap(lambda probe: _probe(settings, connector, *probe), probes):
        (report.ok if good else report.wrong)(text)


def _probe(settings: Settings, connector: Connector, route: Route, server: Server) -> tuple[bool, str]:
    client = Client("127.0.0.1", 25, own=lambda: ("127.0.0.1", 25), name=lambda: "localhost")
    client.helo, client.tls = settings.domain, "as if"  # so that STARTTLS is tried
    clock = Clock()
    try:
        with clock.limit(settings.upstream_timeout, "checking"):
            upstream = connector.connect(route, client, clock, "check")
            text = _describe(upstream, route)
            upstream.quit()
            return True, f"{server}: {text}"
    except UpstreamFailed as error:
        return False, str(error)
    except (Reject, Refused) as refusal:
        loop = f": it calls itself {settings.domain}, which is our domain" if refusal.reply == replies.MAIL_LOOP else ""
        return False, f"{server}: {refusal.reply}{loop}"
    finally:
        clock.close()


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
