"""The mappings: tables, databases, and what they have as routes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from willi_lib.config import CsvSettings, MysqlSettings, Settings, StaticSettings
from willi_lib.hosts import Address
from willi_lib.mappings.csv_file import CsvError, CsvFile
from willi_lib.mappings.database import Database, Down
from willi_lib.mappings.mysql import Mysql
from willi_lib.mappings.open import MappingError, open_database, open_mappings
from willi_lib.routing.route import LookupFailed, Mapping, NoRoute, Route
from willi_lib.routing.search import find_route
from willi_lib.status.words import several

from .promises import is_own
from .report import Report


@dataclass
class Destinations:
    """The routes that are known beforehand: those in a database are not, and may be millions."""

    routes: dict[Route, bool] = field(default_factory=dict)  # and whether it takes every recipient
    hidden: bool = False  # there are more of them, in a database

    def add(self, route: Route, takes_all: bool) -> None:
        self.routes[route] = takes_all or self.routes.get(route, False)

    @property
    def several(self) -> bool:
        """Whether two recipients may belong to different servers."""
        return self.hidden or len({route.servers for route in self.routes}) > 1


def look_at_mappings(settings: Settings, report: Report) -> Destinations:
    """All mappings; the routes of those that know theirs beforehand."""
    destinations = Destinations()
    for one in settings.mappings:
        if isinstance(one, MysqlSettings):
            destinations.hidden = True
            _look_at_database(one, report)
            continue
        try:
            mapping = _open_one(settings, one)
        except (MappingError, CsvError) as error:
            report.faults(str(error), "correct that line or file; until then a running Willi keeps its old table")
            continue
        if isinstance(mapping, CsvFile):
            _look_at_table(mapping, report)
            for route in mapping.routes():
                destinations.add(route, takes_all=False)
        elif isinstance(one, StaticSettings):
            route = Route(one.server, one.tls_verify, one.policy, f"static:{one.name}")
            report.ok(f"static:{one.name}", f"takes every recipient, so {route} must refuse foreign ones itself")
            destinations.add(route, takes_all=True)
    return destinations


def look_at_postmaster(settings: Settings, report: Report) -> None:
    """RFC 5321 §4.5.1. A mapping that cannot be used, or does not answer, has been told already."""
    address = f"postmaster@{settings.domain}"
    mappings: list[Mapping] = []
    try:
        mappings = open_mappings(settings)
        for mapping in mappings:
            if isinstance(mapping, CsvFile):
                mapping.load()
        route = find_route(mappings, address, settings.recipient_delimiter)
    except NoRoute:
        what = f"mail to {address}, where others report trouble, gets 554 (RFC 5321 asks to take it)"
        report.warn("postmaster", what, "add a line for that address to a table, with the server of a mailbox of yours")
    except (MappingError, CsvError, LookupFailed):
        return
    else:
        report.ok("postmaster", f"{address} goes to {route}")
    finally:
        for mapping in mappings:
            if isinstance(mapping, Mysql):
                mapping.close()


def _open_one(settings: Settings, one: StaticSettings | CsvSettings) -> Mapping:
    """Raises MappingError, CsvError."""
    mapping = open_mappings(replace(settings, mappings=(one,)))[0]
    if isinstance(mapping, CsvFile):
        mapping.load()
    return mapping


def _look_at_table(mapping: CsvFile, report: Report) -> None:
    if not len(mapping):
        what = f"{several(0, 'pattern')}: recipients that no other mapping has get 451"
        report.warn(mapping.name, what, "add a line for each domain: pattern;server;tls_verify")
        return
    report.ok(mapping.name, several(len(mapping), "pattern"))
    if mapping.held and not mapping.held.ends_a_line:
        what = "no line end at its end: if a part of it is missing, the recipients in that part get 554"
        report.warn(mapping.name, what, "see whether the last line is the last one; if so, add the line end")
    unverified = sum(_is_unverified(route) for route in mapping.routes())
    if unverified:
        routes = several(len(mapping.routes()), "route")
        what = f"{unverified} of {routes} have tls_verify = false: whoever sits in between can read such mail"
        report.warn(mapping.name, what, "leave the third field empty where the server's certificate is valid")


def _is_unverified(route: Route) -> bool:
    """Whether it matters that the certificate is not looked at."""
    return not route.tls_verify and not all(is_own(server.host) for server in route.servers)


def _look_at_database(mapping: MysqlSettings, report: Report) -> None:
    """Connect to each host and have it prepare the query. The routes in it stay unknown: they may be millions."""
    name = f"mysql:{mapping.name}"
    try:
        database = open_database(mapping)
    except ValueError as fault:
        report.wrong(name, str(fault), "mend that setting")
        return
    for host in database.hosts:
        _look_at_database_host(name, database, host, report)


def _look_at_database_host(name: str, database: Database, host: Address, report: Report) -> None:
    subject = f"{name}: {database.name_of(host)}"
    try:
        facts = database.inspect(host)
    except Down as error:
        report.wrong(subject, str(error), "is it up, may we reach it, and are user, password and tls_ca right?")
    except LookupFailed as error:
        report.wrong(subject, str(error), "mend query, or the rights of user (GRANT SELECT)")
    else:
        tls = f"{facts.tls}, certificate verified" if facts.tls else "no TLS"
        text = f"{facts.version}, {tls}, columns {', '.join(facts.columns)}"
        if facts.tls or not host.host or host.host == "localhost" or is_own(host.host):
            report.ok(subject, text)
        else:
            report.warn(subject, text, "set tls_ca, so that nobody in between can read, or change where mail goes")
