"""What the DNS says: does it answer, who are we, and where are the MX hosts."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import dns.exception
import dns.inet
import dns.resolver

from ..config import Settings
from ..net.resolver import DnsFailed, Resolver
from ..routing.route import Server
from ..status.finding import Finding
from .mappings import Destinations

SEE_RESOLV_CONF = "see /etc/resolv.conf: is a name server there, is it up, and may we reach it?"


def check_dns(settings: Settings, destinations: Destinations, resolver: Resolver) -> Iterator[Finding]:
    """The first finding is ok if the DNS answers. Without an answer to the first question no other is asked."""
    servers = dict.fromkeys(server for route in destinations.routes for server in route.servers)
    began = monotonic()
    try:
        addresses = _addresses_of(settings.domain, resolver)
    except dns.exception.DNSException as error:
        if not all(dns.inet.is_address(server.host) for server in servers):
            what = f"no answer, so that upstreams cannot be found: {error}"
            yield Finding("wrong", "DNS", what, SEE_RESOLV_CONF)
        else:
            what = f"no answer, and each client waits up to {settings.dns_timeout:g} s (dns_timeout) for its name"
            yield Finding("warn", "DNS", f"{what}: {error}", SEE_RESOLV_CONF)
        return
    yield Finding("ok", "DNS", f"the resolver answers ({(monotonic() - began) * 1000:.0f} ms)")
    if addresses:
        yield Finding("ok", "domain", f"{settings.domain} is {', '.join(addresses)}")
    else:
        advice = "add an A or AAAA record for it, or set domain to the name of this host"
        yield Finding("warn", "domain", f"{settings.domain} has no address in the DNS", advice)
    for server in servers:
        if server.mx:
            yield _check_mx(server, settings.domain.lower(), resolver)


def _addresses_of(name: str, resolver: Resolver) -> list[str]:
    """From the DNS, not from /etc/hosts: what others find. Raises DNSException: there is no answer."""
    found: list[str] = []
    for kind in ("A", "AAAA"):
        try:
            found += map(str, resolver.ask(name, kind))
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            continue
    return found


def _check_mx(server: Server, domain: str, resolver: Resolver) -> Finding:
    """Where Willi is one of the MX hosts it asks only those that are better (RFC 5321 §5.1)."""
    try:
        hosts = resolver.mx_of(server.host)
    except DnsFailed as error:
        return Finding("wrong", str(server), str(error), "correct that domain's MX, or name its server in the route")
    ours = min((preference for preference, host in hosts if host.rstrip(".") == domain), default=None)
    better = [host for preference, host in hosts if ours is None or preference < ours]
    if not better:
        what = "its best MX host is Willi itself: mail for it gets 554 5.4.6"
        return Finding("wrong", str(server), what, "name the mail server itself in the route")
    backup = ", and Willi is the backup MX" if ours is not None else ""
    return Finding("ok", str(server), ", ".join(better) + backup)
