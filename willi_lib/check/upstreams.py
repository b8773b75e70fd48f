"""Talk to every address of every host of every route: as far as MAIL, and once as a stranger that wants a relay.

The stranger says MAIL with the empty sender, in clear, and RCPT to an address that cannot exist
(RFC 2606 §2), then RSET and QUIT: no message is sent. Its address is one that no machine has
(RFC 5737), so that an upstream that knows clients by XCLIENT or a PROXY header does not take
it for a host of its own network. Where Willi may have clients of IPv6, one of these is introduced as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from gevent.pool import Pool

from willi_lib.config import Settings
from willi_lib.net.deadline import Clock, WireError
from willi_lib.net.resolver import NO_ANSWER, Address, Resolver
from willi_lib.net.tls import CertificateFacts
from willi_lib.proxy.connector import Connector
from willi_lib.proxy.upstream import Client, Refused, Upstream, UpstreamFailed, WantsTls, is_not_from_us
from willi_lib.routing.route import Route, Server
from willi_lib.smtp import reply as replies
from willi_lib.smtp import xclient
from willi_lib.smtp.reply import BadReply, Reject, Reply
from willi_lib.status.words import several

from .certificates import WARN_DAYS, days_left
from .promises import is_own
from .report import Finding, Notes, Report
from .resolver import SEE_RESOLV_CONF
from .routes import Destinations

PROBES_AT_A_TIME = 20
MAX_NAMED = 5  # hosts without an address, if it is the name servers that are silent
SILENT_DNS = rf"{NO_ANSWER}|\(dns_timeout\)"
STRANGER, STRANGER6 = "192.0.2.1", "2001:db8::1"  # RFC 5737, RFC 3849
NOBODY = "relay-test@willi-check.invalid"  # RFC 2606
FAULTS = (UpstreamFailed, WireError, BadReply, Reject, Refused)

ALLOW_XCLIENT = "allow Willi's address to use XCLIENT there (Postfix: smtpd_authorized_xclient_hosts)"
ALLOW_IPV6 = "have it use IPv6 (Postfix: inet_protocols = all), if it takes IPv4 clients"
SEES_US = "it takes us for the client, in its blocklists, limits and SPF"
# What to do about a failure, by its text.
ADVICE = (
    (r"Mail loops back", "name the mail server itself in the route, or give Willi another domain"),
    (SILENT_DNS, "ask for that name with dig: the name servers of its zone may be down, or its DNSSEC wrong"),
    (r"no address for", "correct the name in the route, or add it to the DNS"),
    (r"STARTTLS is required", "switch STARTTLS on there, or set upstream_tls = always"),
    (r"(?i)mismatch", "name that server in the route as its certificate does, or have one issued for this name"),
    (r"(?i)self.signed|issuer", "set upstream_tls_ca to its authority, or tls_verify of the route to false"),
    (r"(?i)certificate has expired", "have it renewed there"),
    (r"(?i)not yet valid", "look at the clocks of both hosts"),
    (r"(?i)certificate", "look at its certificate, or set tls_verify of the route to false"),
    (r"(?i)handshake|TLS", "look at the TLS settings and the log of that server"),
    (r"XCLIENT", f"{ALLOW_XCLIENT}, or set xclient = try"),
    (r"connect_timeout|[Uu]nreachable|No route", "is it up, and does no firewall keep us from it?"),
    (r"refused$", "start the server there, or correct host and port in the route"),
    (r"greeting: |EHLO: |HELO: ", "it refuses us, whoever the client is: allow Willi's address there"),
)
TRY_AGAIN = "try again in some minutes, if it is greylisting"
ASK_ITS_LOG = "the log of that server should say why"
EXPECTS_HEADER = "does that port expect a PROXY header (send_proxy)?"


@dataclass(frozen=True)
class Target:
    """A route to one of its hosts alone."""

    route: Route
    takes_all: bool  # some mapping sends every recipient there

    @property
    def server(self) -> Server:
        return self.route.servers[0]


def look_at_upstreams(
    settings: Settings, destinations: Destinations, resolver: Resolver, report: Report, dns_answers: bool
) -> None:
    """Several at a time, each once, although many routes may share it. Raises CertificateError."""
    prober = Prober(settings, destinations.several, resolver)
    pool = Pool(PROBES_AT_A_TIME)
    to_servers: dict[Route, bool] = {}
    for route, takes_all in destinations.routes.items():
        for server in route.servers:
            _merge(to_servers, replace(route, servers=(server,)), takes_all)
    to_hosts: dict[Route, bool] = {}
    for routes, takes_all in zip(pool.imap(prober.hosts_of, to_servers), list(to_servers.values()), strict=True):
        for route in routes:
            _merge(to_hosts, route, takes_all)
    targets = [Target(route, takes_all) for route, takes_all in to_hosts.items()]
    with report.progress("upstreams", len(targets)) as progress:

        def probe(target: Target) -> list[Finding]:
            findings = prober.probe_host(target)
            progress.step()
            return findings

        unknown: list[str] = []
        for findings in pool.imap(probe, targets):
            for finding in findings:
                if not dns_answers and re.search(SILENT_DNS, finding.what):
                    unknown.append(finding.subject)
                else:
                    report.add(finding)
    if unknown:
        hosts = ", ".join([*unknown[:MAX_NAMED], "..."][: len(unknown)])
        report.wrong("upstreams", f"not tried, since {NO_ANSWER} ({len(unknown)}): {hosts}", SEE_RESOLV_CONF)


def _merge(routes: dict[Route, bool], route: Route, takes_all: bool) -> None:
    """Equal routes differ in nothing that matters to a host, but in who may be sent there."""
    routes[route] = takes_all or routes.get(route, False)


class Prober:
    """Asks one host at a time."""

    def __init__(self, settings: Settings, several: bool, resolver: Resolver) -> None:
        """several: two recipients of one message may belong to different servers."""
        self._settings = settings
        self._loses_recipients = several and settings.mixed_recipients == "first"
        self._connector = Connector(settings, resolver)
        others = (*settings.proxy_protocol_hosts, *settings.xclient_hosts)
        self._has_ipv6_clients = bool(others) or any(":" in (one.host or "::") for one in settings.listen)

    def hosts_of(self, route: Route) -> list[Route]:
        """The same route to each of its hosts alone. Why there are not more of them `look_at_dns` has said."""
        return [replace(route, servers=(host,)) for host in self._connector._hosts(route, [], [], frozenset())]

    def probe_host(self, target: Target) -> list[Finding]:
        """What there is to say of each address of a host. If one of them is of use, a dead one is a warning only."""
        clock = Clock()
        try:
            addresses = self._connector._addresses(target.server, clock)
            found = [self._probe(target, address, clock) for address in addresses]
        except UpstreamFailed as error:
            return [self._failure(target, str(target.server), error)]
        finally:
            clock.close()
        useful = any(isinstance(one, Notes) for one in found)
        findings: list[Finding] = []
        for one in found:
            if isinstance(one, Notes):
                findings += one.findings
            else:
                findings.append(replace(one, level="warn") if useful else one)
        return findings

    def _probe(self, target: Target, address: Address, clock: Clock) -> Notes | Finding:
        """What there is to say of an address of use, or why it is none."""
        where = str(target.server) if address[1] == target.server.host else f"{target.server} [{address[1]}]"
        notes = Notes(where)
        try:
            with clock.limit(self._settings.upstream_timeout, "checking"):
                upstream = self._open(target, address, clock, client="127.0.0.1", name="localhost")
                _describe_tls(upstream, address[1], notes)
                _describe_introduction(upstream, notes)
                self._describe_features(upstream, notes)
                upstream.quit()
        except FAULTS as error:
            return self._failure(target, where, error)
        self._try_as_stranger(target, address, clock, notes)
        if self._has_ipv6_clients:
            self._try_ipv6(target, address, clock, notes)
        return notes

    def _open(
        self, target: Target, address: Address, clock: Clock, client: str, name: str, tls: bool = True
    ) -> Upstream:
        """Introduce a client. tls: that it is in TLS, so that STARTTLS is tried. Raises any of FAULTS."""
        who = Client(client, 25, own=lambda: ("127.0.0.1", 25), name=lambda: name)
        who.helo, who.tls = self._settings.domain, "as if" if tls else None
        limit = self._settings.upstream_timeout
        return self._connector._open(target.route, target.server, address, who, clock, "check", limit)

    def _failure(self, target: Target, where: str, error: Exception) -> Finding:
        text = str(error).removeprefix(f"{target.server}: ")
        if isinstance(error, Reject) and error.reply == replies.MAIL_LOOP:
            text += f": it calls itself {self._settings.domain}, which is our domain"
        advice = next((advice for pattern, advice in ADVICE if re.search(pattern, text)), ASK_ITS_LOG)
        if target.route.policy.send_proxy != "no" and not text.endswith("refused"):
            advice = EXPECTS_HEADER
        return Finding("wrong", where, text, advice)

    # -- what it can do

    def _describe_features(self, upstream: Upstream, notes: Notes) -> None:
        """What it lacks of that which Willi offers to every client."""
        offered = ("PIPELINING", *sorted(self._settings.extensions))
        lacks = [name for name in offered if name not in upstream.features]
        if lacks:
            notes.fact(f"lacks {' '.join(lacks)}")
        if "SMTPUTF8" in lacks:
            advice = "take SMTPUTF8 out of extensions, or switch it on there"
            notes.warn("without SMTPUTF8: mail with such addresses gets 550", advice)
        if "8BITMIME" in lacks and self._settings.strict_8bitmime:
            notes.warn("without 8BITMIME: 8-bit mail gets 550 (strict_8bitmime)", "set strict_8bitmime = no")
        limit = upstream.features.get("SIZE", "")
        if limit.isdecimal() and 0 < int(limit) < self._settings.max_message_bytes:
            notes.fact(f"takes {limit} octets, less than max_message_bytes")

    # -- what it makes of a stranger, and whether it relays

    def _try_as_stranger(self, target: Target, address: Address, clock: Clock, notes: Notes) -> None:
        """Say MAIL as a client in clear, and RCPT if its answer matters: can recipients of others get there?"""
        try:
            with clock.limit(self._settings.upstream_timeout, "checking"):
                upstream, answer = self._say_mail(target, address, clock, notes)
                if not answer.positive:
                    _judge_mail(answer, notes)
                elif target.takes_all or self._settings.mixed_recipients == "first":
                    self._judge(upstream.ask(b"RCPT TO:<" + NOBODY.encode() + b">"), notes)
                if answer.positive:
                    upstream.ask(b"RSET")
                upstream.quit()
        except (Reject, Refused) as refusal:
            self._judge(refusal.reply, notes)
        except FAULTS as error:
            notes.warn(f"whether it relays is not known: {error}", ASK_ITS_LOG)

    def _say_mail(self, target: Target, address: Address, clock: Clock, notes: Notes) -> tuple[Upstream, Reply]:
        """The answer to MAIL, over TLS if the upstream wants that. Raises any of FAULTS."""
        upstream = self._open(target, address, clock, STRANGER, "willi-check.invalid", tls=False)
        answer = upstream.ask(b"MAIL FROM:<>")
        if is_not_from_us(answer) and isinstance(upstream.unwelcome("MAIL", answer), WantsTls):
            notes.fact("wants TLS")
            upstream.quit()
            upstream = self._open(target, address, clock, STRANGER, "willi-check.invalid")
            answer = upstream.ask(b"MAIL FROM:<>")
        return upstream, answer

    def _try_ipv6(self, target: Target, address: Address, clock: Clock, notes: Notes) -> None:
        """Whether the upstream can be told an address of IPv6, if it can be told one at all."""
        try:
            with clock.limit(self._settings.upstream_timeout, "checking"):
                upstream = self._open(target, address, clock, STRANGER6, xclient.UNAVAILABLE)
                if not upstream.address_told:
                    notes.warn("XCLIENT: it takes no IPv6 address, and does not know such clients", ALLOW_IPV6)
                upstream.quit()
        except FAULTS as error:
            text = str(error).removeprefix(f"{target.server}: ")
            notes.warn(f"an IPv6 client ({STRANGER6}) is refused there: {text}", ALLOW_IPV6)

    def _judge(self, answer: Reply, notes: Notes) -> None:
        about_relaying = answer.code == 454 or is_not_from_us(answer) or b"relay" in b" ".join(answer.lines).lower()
        if answer.positive:
            notes.wrong(
                f"takes mail for anybody ({answer}): with it Willi is an open relay",
                "have it refuse recipients that are not its own, and keep Willi's address out of its mynetworks",
            )
        elif answer.permanent and not is_not_from_us(answer) and self._loses_recipients:
            notes.warn(
                f"refuses recipients of other upstreams for good ({answer}): a message to both reaches only one",
                "set mixed_recipients = defer, or have it say 454 (Postfix: defer_unauth_destination)",
            )
        elif answer.permanent or about_relaying:
            notes.fact(f"does not relay ({answer.code})")
        else:
            notes.warn(f"whether it relays is not known ({answer})", TRY_AGAIN)


def _judge_mail(answer: Reply, notes: Notes) -> None:
    """A refused MAIL says nothing about relaying."""
    if is_not_from_us(answer):
        advice = "have it take mail from Willi's address without a password"
        notes.wrong(f"takes no mail from us (MAIL: {answer}): all of it gets a 451", advice)
    elif answer.permanent:
        what = f"MAIL FROM:<> is refused ({answer}): no bounce gets there, and whether it relays is not known"
        notes.warn(what, "have it take the empty sender (RFC 5321 §6.1)")
    else:
        notes.warn(f"whether it relays is not known (MAIL: {answer})", TRY_AGAIN)


def _describe_tls(upstream: Upstream, address: str, notes: Notes) -> None:
    route, version = upstream.route, upstream.wire.tls_version
    if version:
        notes.fact(f"{version}, certificate {'verified' if route.tls_verify else 'not verified'}")
        _describe_certificate(upstream, notes)
        return
    never = route.policy.upstream_tls == "never"
    notes.fact("TLS is off (upstream_tls = never)" if never else "no STARTTLS")
    if not is_own(address):
        advice = "set upstream_tls = auto" if never else "switch STARTTLS on there, and set upstream_tls = require"
        notes.warn("mail goes there in clear, even if it came by TLS", advice)


def _describe_certificate(upstream: Upstream, notes: Notes) -> None:
    """Of one that is not verified nothing is known, and nothing matters."""
    certificate = upstream.wire.peer_certificate
    if certificate and (days := days_left(CertificateFacts(certificate).expires)) < WARN_DAYS:
        notes.warn(f"its certificate ends in {several(days, 'day')}: then mail for it gets a 451", "have it renewed")


def _describe_introduction(upstream: Upstream, notes: Notes) -> None:
    """How the upstream learns who the client is."""
    policy, answer = upstream.route.policy, upstream.xclient_answer
    if policy.send_proxy != "no":
        notes.fact(f"PROXY header {policy.send_proxy} sent")
    if answer and answer.welcomes:
        _describe_attributes(upstream.xclient_offer.upper().split(), notes)
    elif answer:
        notes.fact("XCLIENT refused")
        notes.warn(f"XCLIENT: {answer}: {SEES_US}", ALLOW_XCLIENT)
    elif policy.xclient == "no":
        notes.fact("XCLIENT is off")
    elif policy.send_proxy == "no":
        notes.fact("no XCLIENT")
        notes.warn(f"no XCLIENT: {SEES_US}", f"{ALLOW_XCLIENT}, or set send_proxy, or xclient = no")


def _describe_attributes(offered: list[str], notes: Notes) -> None:
    missing = sorted(xclient.ATTRIBUTES - set(offered))
    notes.fact(f"XCLIENT accepted, but not {' '.join(missing)}" if missing else "XCLIENT accepted")
    if "ADDR" in missing:
        notes.warn(f"XCLIENT without ADDR: {SEES_US}", "have it take ADDR, too")
