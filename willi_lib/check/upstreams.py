"""Talk to every address of every host of every route: as far as MAIL, and once as a stranger that wants a relay.

The stranger says MAIL with the empty sender, in clear, and RCPT to an address that cannot exist
(RFC 2606 §2), then RSET and QUIT: no message is sent. Its address is one that no machine has
(RFC 5737), so that an upstream that knows clients by XCLIENT or a PROXY header does not take
it for a host of its own network. Where Willi may have clients of IPv6, one of these is introduced as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf

from gevent.pool import Pool

from ..config import Settings
from ..net.deadline import Deadline, WireError
from ..net.resolver import NO_ANSWER, Address, Resolver
from ..net.tls import CertificateError, CertificateFacts, upstream_contexts
from ..proxy.connector import Connector
from ..proxy.upstream import Client, Upstream, UpstreamFailed, WantsTls, is_not_from_us
from ..routing.route import Route
from ..smtp import reply as replies
from ..smtp import xclient
from ..smtp.reply import BadReply, Rejected, Reply
from ..status.finding import Finding, Level, certificate_level
from ..status.words import DAY, several
from .finding import faults, show_progress
from .machine import seconds_left
from .mappings import Destinations
from .resolver import SEE_RESOLV_CONF
from .rules import is_own

PROBES_AT_A_TIME = 20
MAX_NAMED = 5  # hosts without an address, if it is the name servers that are silent
SILENT_DNS = rf"{NO_ANSWER}|\(dns_timeout\)"
STRANGER, STRANGER6 = "192.0.2.1", "2001:db8::1"  # RFC 5737, RFC 3849
STRANGERS_NAME = "willi-check.invalid"  # RFC 2606
RCPT_OF_STRANGER = b"RCPT TO:<relay-test@willi-check.invalid>"
FAULTS = (UpstreamFailed, WireError, BadReply, Rejected)

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
    (r"(greeting|EHLO|HELO): [45]", "it refuses us, whoever the client is: allow Willi's address there"),
)
TRY_AGAIN = "try again in some minutes, if it is greylisting"
ASK_ITS_LOG = "the log of that server should say why"
EXPECTS_HEADER = "does that port expect a PROXY header (send_proxy)?"

Note = tuple[Level, str, str]  # ok: a fact, all of which become one line; else a problem; and its advice


def check_upstreams(
    settings: Settings, destinations: Destinations, resolver: Resolver, dns_answers: bool
) -> Iterator[Finding]:
    """Several hosts at a time, each once, although many routes may share it."""
    try:
        connector = Connector(settings, upstream_contexts(settings), resolver)
    except CertificateError as error:
        yield from faults(str(error), "name a file of certificates in PEM that the user of the service can read")
        return
    pool = Pool(PROBES_AT_A_TIME)
    hosts: dict[Route, bool] = defaultdict(bool)  # each as a route to it alone, and whether it takes every recipient
    found = pool.imap(lambda route: list(connector._hosts(route, [], [], frozenset())), destinations.routes)
    for servers, (route, takes_all) in zip(found, destinations.routes.items(), strict=True):
        for server in servers:  # why there are not more of them check_dns has said
            hosts[replace(route, servers=(server,))] |= takes_all
    done = 0

    def probe(route: Route) -> list[Finding]:
        nonlocal done
        findings = list(HostProbe(settings, connector, destinations.several, route, hosts[route]).findings())
        done += 1
        show_progress(f"{done}/{len(hosts)} upstreams")
        return findings

    show_progress(f"0/{len(hosts)} upstreams")
    unknown: list[str] = []
    for findings in pool.imap(probe, hosts):
        for finding in findings:
            if not dns_answers and re.search(SILENT_DNS, finding.what):
                unknown.append(finding.subject)
            else:
                yield finding
    if unknown:
        names = ", ".join([*unknown[:MAX_NAMED], "..."][: len(unknown)])
        what = f"not tried, since {NO_ANSWER} ({len(unknown)}): {names}"
        yield Finding("wrong", "upstreams", what, SEE_RESOLV_CONF)


@dataclass
class HostProbe:
    """Asks one host, each of its addresses up to three times."""

    settings: Settings
    connector: Connector
    several: bool  # two recipients of one message may belong to different servers
    route: Route  # to this host alone
    takes_all: bool  # some mapping sends every recipient there
    deadline: Deadline = field(default_factory=Deadline)

    def findings(self) -> Iterator[Finding]:
        """If one of the addresses is of use, a dead one is a warning only."""
        server = self.route.servers[0]
        try:
            addresses = self.connector._addresses(server, self.deadline)
            found = [
                self._try_address(address, str(server) if address[1] == server.host else f"{server} [{address[1]}]")
                for address in addresses
            ]
        except UpstreamFailed as error:
            found = [[self._failure(str(server), error)]]
        finally:
            self.deadline.close()
        is_useful = any(first.level == "ok" for first, *_ in found)
        for first, *others in found:
            yield replace(first, level="warn") if is_useful and first.level == "wrong" else first
            yield from others

    def _try_address(self, address: Address, subject: str) -> list[Finding]:
        """The facts and the problems of one that is of use, or why it is none."""
        try:
            notes = list(self._try_as_client(address))
        except FAULTS as error:
            return [self._failure(subject, error)]
        notes += self._try_as_stranger(address)
        notes += self._try_ipv6(address)
        facts = ", ".join(what for level, what, _ in notes if level == "ok")
        problems = [Finding(level, subject, what, advice) for level, what, advice in notes if level != "ok"]
        return [Finding("ok", subject, facts), *problems]

    def _failure(self, subject: str, error: Exception) -> Finding:
        text = self._text(error)
        if isinstance(error, Rejected) and error.reply == replies.MAIL_LOOP:
            text += f": it calls itself {self.settings.domain}, which is our domain"
        advice = next((advice for pattern, advice in ADVICE if re.search(pattern, text)), ASK_ITS_LOG)
        if self.route.policy.send_proxy != "no" and not text.endswith("refused"):
            advice = EXPECTS_HEADER
        return Finding("wrong", subject, text, advice)

    def _text(self, error: Exception) -> str:
        return str(error).removeprefix(f"{self.route.servers[0]}: ")

    @contextmanager
    def _introduced(self, address: Address, client: str, name: str, tls: bool = True) -> Iterator[Upstream]:
        """Introduce a client. tls: that it is in TLS, so that STARTTLS is tried. Raises any of FAULTS."""
        who = Client(client, 25, own=lambda: ("127.0.0.1", 25), name=lambda: name)
        who.helo, who.tls = self.settings.domain, "as if" if tls else None
        limit, server = self.settings.upstream_timeout, self.route.servers[0]
        with self.deadline.limit(limit, "checking"):
            upstream = self.connector._open(self.route, server, address, who, self.deadline, "check", limit)
            yield upstream
            upstream.quit()

    def _try_as_client(self, address: Address) -> Iterator[Note]:
        """Introduce this machine, over TLS. Raises any of FAULTS."""
        with self._introduced(address, "127.0.0.1", "localhost") as upstream:
            yield from _describe_tls(upstream, address[1])
            yield from _describe_introduction(upstream)
            yield from self._describe_features(upstream)

    def _describe_features(self, upstream: Upstream) -> Iterator[Note]:
        """What it lacks of that which Willi offers to every client."""
        lacks = [name for name in ("PIPELINING", *sorted(self.settings.extensions)) if name not in upstream.features]
        if lacks:
            yield "ok", f"lacks {' '.join(lacks)}", ""
        if "SMTPUTF8" in lacks:
            advice = "take SMTPUTF8 out of extensions, or switch it on there"
            yield "warn", "without SMTPUTF8: mail with such addresses gets 550", advice
        if "8BITMIME" in lacks and self.settings.strict_8bitmime:
            yield "warn", "without 8BITMIME: 8-bit mail gets 550 (strict_8bitmime)", "set strict_8bitmime = no"
        limit = upstream.features.get("SIZE", "")
        if limit.isdecimal() and 0 < int(limit) < self.settings.max_message_bytes:
            yield "ok", f"takes {limit} octets, less than max_message_bytes", ""

    def _try_as_stranger(self, address: Address) -> Iterator[Note]:
        """Say MAIL as a client in clear, and RCPT if its answer matters: can recipients of others get there?"""
        try:
            for tls in (False, True):
                with self._introduced(address, STRANGER, STRANGERS_NAME, tls) as upstream:
                    answer = upstream.ask(b"MAIL FROM:<>")
                    if not tls and is_not_from_us(answer) and isinstance(upstream.unwelcome("MAIL", answer), WantsTls):
                        yield "ok", "wants TLS", ""
                        continue
                    if not answer.positive:
                        yield _judge_mail(answer)
                        return
                    if self.takes_all or self.settings.mixed_recipients == "first":
                        yield self._judge_rcpt(upstream.ask(RCPT_OF_STRANGER))
                    upstream.ask(b"RSET")
                    return
        except Rejected as refusal:
            yield self._judge_rcpt(refusal.reply)
        except FAULTS as error:
            yield "warn", f"whether it relays is not known: {error}", ASK_ITS_LOG

    def _judge_rcpt(self, answer: Reply) -> Note:
        loses_recipients = self.several and self.settings.mixed_recipients == "first"
        if answer.positive:
            advice = "have it refuse recipients that are not its own, and keep Willi's address out of its mynetworks"
            return "wrong", f"takes mail for anybody ({answer}): with it Willi is an open relay", advice
        if answer.permanent and not is_not_from_us(answer) and loses_recipients:
            what = f"refuses recipients of other upstreams for good ({answer}): a message to both reaches only one"
            return "warn", what, "set mixed_recipients = defer, or have it say 454 (Postfix: defer_unauth_destination)"
        is_about_relaying = answer.code == 454 or is_not_from_us(answer) or b"relay" in b" ".join(answer.lines).lower()
        if answer.permanent or is_about_relaying:
            return "ok", f"does not relay ({answer.code})", ""
        return "warn", f"whether it relays is not known ({answer})", TRY_AGAIN

    def _try_ipv6(self, address: Address) -> Iterator[Note]:
        """Whether it can be told an address of IPv6, if it can be told any, and Willi may have such clients."""
        behind_others = self.settings.proxy_protocol_hosts or self.settings.xclient_hosts
        if not behind_others and not any(":" in (one.host or "::") for one in self.settings.listen):
            return
        try:
            with self._introduced(address, STRANGER6, xclient.UNAVAILABLE) as upstream:
                pass
            if not upstream.address_told:
                yield "warn", "XCLIENT: it takes no IPv6 address, and does not know such clients", ALLOW_IPV6
        except FAULTS as error:
            yield "warn", f"an IPv6 client ({STRANGER6}) is refused there: {self._text(error)}", ALLOW_IPV6


def _judge_mail(answer: Reply) -> Note:
    """A refused MAIL says nothing about relaying."""
    if is_not_from_us(answer):
        advice = "have it take mail from Willi's address without a password"
        return "wrong", f"takes no mail from us (MAIL: {answer}): all of it gets a 451", advice
    if answer.permanent:
        what = f"MAIL FROM:<> is refused ({answer}): no bounce gets there, and whether it relays is not known"
        return "warn", what, "have it take the empty sender (RFC 5321 §6.1)"
    return "warn", f"whether it relays is not known (MAIL: {answer})", TRY_AGAIN


def _describe_tls(upstream: Upstream, address: str) -> Iterator[Note]:
    """Of a certificate that is not verified nothing is known, and nothing matters."""
    route, wire = upstream.route, upstream.wire
    if wire.tls_version:
        yield "ok", f"{wire.tls_version}, certificate {'verified' if route.tls_verify else 'not verified'}", ""
        left = seconds_left(CertificateFacts(wire.peer_certificate)) if wire.peer_certificate else inf
        if certificate_level(left) != "ok":
            what = f"its certificate ends in {several(int(left // DAY), 'day')}: then mail for it gets a 451"
            yield "warn", what, "have it renewed"
        return
    never = route.policy.upstream_tls == "never"
    yield "ok", "TLS is off (upstream_tls = never)" if never else "no STARTTLS", ""
    if not is_own(address):
        advice = "set upstream_tls = auto" if never else "switch STARTTLS on there, and set upstream_tls = require"
        yield "warn", "mail goes there in clear, even if it came by TLS", advice


def _describe_introduction(upstream: Upstream) -> Iterator[Note]:
    """How the upstream learns who the client is."""
    policy, answer = upstream.route.policy, upstream.xclient_answer
    if policy.send_proxy != "no":
        yield "ok", f"PROXY header {policy.send_proxy} sent", ""
    if answer and answer.welcomes:
        missing = sorted(xclient.ATTRIBUTES - set(upstream.xclient_offer.upper().split()))
        yield "ok", f"XCLIENT accepted, but not {' '.join(missing)}" if missing else "XCLIENT accepted", ""
        if "ADDR" in missing:
            yield "warn", f"XCLIENT without ADDR: {SEES_US}", "have it take ADDR, too"
    elif answer:
        yield "ok", "XCLIENT refused", ""
        yield "warn", f"XCLIENT: {answer}: {SEES_US}", ALLOW_XCLIENT
    elif policy.xclient == "no":
        yield "ok", "XCLIENT is off", ""
    elif policy.send_proxy == "no":
        yield "ok", "no XCLIENT", ""
        yield "warn", f"no XCLIENT: {SEES_US}", f"{ALLOW_XCLIENT}, or set send_proxy, or xclient = no"
