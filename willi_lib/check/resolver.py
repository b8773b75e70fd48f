"""What the DNS says: does it answer, who are we, and where are the MX hosts."""

from __future__ import annotations

from ipaddress import ip_address
from time import monotonic

import dns.exception
import dns.resolver

from willi_lib.config import Settings
from willi_lib.net.resolver import DnsFailed, Resolver

from .report import Report
from .routes import Destinations

SEE_RESOLV_CONF = "see /etc/resolv.conf: is a name server there, is it up, and may we reach it?"


def look_at_dns(settings: Settings, destinations: Destinations, resolver: Resolver, report: Report) -> bool:
    """Whether it answers. Without an answer to the first question no other is asked."""
    began = monotonic()
    try:
        addresses = _addresses_of(settings.domain, resolver)
    except dns.exception.DNSException as error:
        _complain(settings, destinations, str(error), report)
        return False
    report.ok("DNS", f"the resolver answers ({(monotonic() - began) * 1000:.0f} ms)")
    if addresses:
        report.ok("domain", f"{settings.domain} is {', '.join(addresses)}")
    else:
        what = f"{settings.domain} has no address in the DNS"
        report.warn("domain", what, "add an A or AAAA record for it, or set domain to the name of this host")
    _look_at_mx(settings.domain, destinations, resolver, report)
    return True


def _complain(settings: Settings, destinations: Destinations, why: str, report: Report) -> None:
    """It is needed for the clients' names, and mostly for the upstreams."""
    if any(_is_name(server.host) for route in destinations.routes for server in route.servers):
        report.wrong("DNS", f"no answer, so that upstreams cannot be found: {why}", SEE_RESOLV_CONF)
    else:
        what = f"no answer, and each client waits up to {settings.dns_timeout:g} s (dns_timeout) for its name: {why}"
        report.warn("DNS", what, SEE_RESOLV_CONF)


def _addresses_of(name: str, resolver: Resolver) -> list[str]:
    """From the DNS, not from /etc/hosts: what others find. Raises DNSException if nobody answers."""
    found: list[str] = []
    for kind in ("A", "AAAA"):
        try:
            found += map(str, resolver.ask(name, kind))
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            continue
    return found


def _is_name(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return True
    return False


def _look_at_mx(domain: str, destinations: Destinations, resolver: Resolver, report: Report) -> None:
    """Where Willi is one of the MX hosts it asks only those that are better (RFC 5321 §5.1)."""
    servers = [server for route in destinations.routes for server in route.servers if server.mx]
    for server in dict.fromkeys(servers):
        try:
            hosts = resolver.mx_of(server.host)
            ours = min((preference for preference, host in hosts if host.rstrip(".") == domain.lower()), default=None)
            better = [host for preference, host in hosts if ours is None or preference < ours]
            if better:
                report.ok(str(server), ", ".join(better) + (", and Willi is the backup MX" if ours is not None else ""))
            else:
                what = "its best MX host is Willi itself: mail for it gets 554 5.4.6"
                report.wrong(str(server), what, "name the mail server itself in the route")
        except DnsFailed as error:
            report.wrong(str(server), str(error), "correct that domain's MX, or name its server in the route")
