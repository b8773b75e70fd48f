"""Settings that are allowed, and make Willi break a promise, or an open relay of it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from willi_lib import log
from willi_lib.config import Settings, StaticSettings

from .report import Report

# RFC 5321 §4.5.3: what a client may count on.
SERVER_TIMEOUT = 300  # seconds, §4.5.3.2.7
BLOCK_TIMEOUT = 180  # seconds, §4.5.3.2.5
COMMAND_TIMEOUT = 300  # seconds that a client waits for the answer to MAIL and RCPT, §4.5.3.2.2 and 3
VERDICT_TIMEOUT = 600  # seconds that it waits for the answer to its message, §4.5.3.2.6
LEAST_RECIPIENTS = 100  # §4.5.3.1.8
LEAST_SIZE = 65536  # octets, §4.5.3.1.7

SHORT_DRAIN = 10  # seconds: a message of some MB takes that long
UNIT_DRAIN = 60  # seconds that etc/willi.service and etc/willi.init leave for a stop
DESCRIPTORS = 2  # for each session, as the master counts
OWN = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10",
        "::1/128", "fc00::/7", "fe80::/10",
    )
)  # fmt: skip
WORLD = {4: 8, 6: 16}  # a network with a shorter prefix is no longer anybody's own
LARGE = {4: 24, 6: 64}  # the same, for whom the world is meant to be closed


@dataclass(frozen=True)
class Rule:
    """A value that somebody should think about again."""

    setting: str
    broken: Callable[[Settings], bool]
    what: str
    advice: str


RULES = (
    Rule("domain", lambda s: "." not in s.domain,
         "is no full host name: upstreams may refuse it in EHLO", "set domain to the name of this host in the DNS"),
    Rule("loglevel", lambda s: s.loglevel in ("warn", "error"),
         "no line is written for a message: nobody can tell where it went", "set loglevel = info"),
    Rule("loglevel", lambda s: s.loglevel == "debug",
         "the log has every command of every session, and grows fast", "set loglevel = info"),
    Rule("tls_min_version", lambda s: s.tls_min_version == "1.3",
         "servers that know TLS 1.2 only will send their mail in clear", "set tls_min_version = 1.2"),
    Rule("tls_min_version", lambda s: s.tls_min_version in ("1.0", "1.1"),
         "versions of TLS that are broken are accepted (still better than clear text)", "set tls_min_version = 1.2"),
    Rule("read_timeout", lambda s: s.read_timeout < SERVER_TIMEOUT,
         "slow clients are cut off, and try again for days (RFC 5321 asks for 5 minutes)", "set read_timeout = 5m"),
    Rule("write_timeout", lambda s: s.write_timeout < BLOCK_TIMEOUT,
         "an upstream that takes a message slowly is given up (RFC 5321 asks for 3 minutes)", "set write_timeout = 5m"),
    Rule("upstream_timeout", lambda s: s.upstream_timeout > COMMAND_TIMEOUT,
         "clients wait 5 minutes for an answer: they are gone before the upstream is given up",
         "set upstream_timeout = 4m"),
    Rule("connect_timeout", lambda s: s.connect_timeout >= s.upstream_timeout,
         "as long as upstream_timeout: if the first host is silent, the others are never tried",
         "set connect_timeout = 20s"),
    Rule("data_timeout", lambda s: s.data_timeout < VERDICT_TIMEOUT,
         "an upstream that takes longer delivers, while the client is told 451: it sends the message again,"
         " and the recipient has it twice (RFC 5321 §4.5.3.2.6)", "set data_timeout = 10m"),
    Rule("drain_timeout", lambda s: s.drain_timeout < SHORT_DRAIN,
         "a stop or a reload cuts messages that are under way; their clients send them again",
         "set drain_timeout = 60s"),
    Rule("drain_timeout", lambda s: s.drain_timeout > UNIT_DRAIN,
         "longer than the service is given to stop, unless you have changed that",
         "raise TimeoutStopSec of the unit (STOP_TIMEOUT of the init script) above it"),
    Rule("max_message_bytes", lambda s: s.max_message_bytes < LEAST_SIZE,
         "messages that any server must take are refused (RFC 5321 §4.5.3.1.7)", "set max_message_bytes = 20MiB"),
    Rule("max_recipients", lambda s: s.max_recipients < LEAST_RECIPIENTS,
         "fewer than the 100 that a client may count on (RFC 5321 §4.5.3.1.8)", "set max_recipients = 100"),
    Rule("max_connections_per_ip", lambda s: s.max_connections_per_ip >= s.max_connections,
         "a single client can take all of max_connections", "set it far below max_connections"),
)  # fmt: skip


def look_at_promises(settings: Settings, report: Report) -> None:
    """What can be told from the file alone; whether an upstream relays is asked of the upstream."""
    for rule in RULES:
        if rule.broken(settings):
            report.warn(rule.setting, rule.what, rule.advice)
    _look_at_networks("xclient_hosts", settings.xclient_hosts, report)
    _look_at_networks("proxy_protocol_hosts", settings.proxy_protocol_hosts, report)
    _look_at_syslog(settings, report)
    _look_at_status(settings, report)
    _look_at_descriptors(settings, report)
    _look_at_mappings(settings, report)


def is_own(host: str) -> bool:
    """Whether a host, or a server's address, is on this machine or in a private network. A name is not."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in OWN)


def _look_at_networks(setting: str, networks: Sequence[IPv4Network | IPv6Network], report: Report) -> None:
    """Promise 9: no client can speak in another's name."""
    for network in networks:
        if network.prefixlen < WORLD[network.version]:
            what = f"{network} is the world: any client can claim any address, and no limit holds"
            report.wrong(setting, what, "name the addresses of your own machines")
        elif network.prefixlen < LARGE[network.version] and not _in_own(network):
            what = f"{network} is large: every host in it can claim to be any client"
            report.warn(setting, what, "name the addresses of your own machines")


def _in_own(network: IPv4Network | IPv6Network) -> bool:
    return any(network.version == own.version and network.subnet_of(own) for own in OWN)  # type: ignore[arg-type]


def _look_at_syslog(settings: Settings, report: Report) -> None:
    fault = log.syslog_fault() if settings.log == "syslog" else ""
    if fault:
        what = f"no line of the log is kept (log = syslog): {fault}"
        report.warn("log", what, "start a syslog daemon, or set log = stdout")


def _look_at_status(settings: Settings, report: Report) -> None:
    address = settings.status_listen
    if address and not (address.host and ip_address(address.host).is_loopback):
        what = f"{address} can be reached from other machines, and asks for no password"
        report.warn("status_listen", what, "use 127.0.0.1, or close it by a firewall but for your monitoring")


def _look_at_descriptors(settings: Settings, report: Report) -> None:
    needed = settings.max_connections * DESCRIPTORS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit < needed:
        what = f"{settings.max_connections} need {needed} open files, and here no more than {limit} are allowed"
        report.warn("max_connections", what, "raise LimitNOFILE of the unit (ulimit -n before a start by hand)")


def _look_at_mappings(settings: Settings, report: Report) -> None:
    kinds = [isinstance(mapping, StaticSettings) for mapping in settings.mappings]
    if any(kinds[:-1]):
        name = settings.mappings[kinds.index(True)].name
        later = ", ".join(f"[[{mapping.name}]]" for mapping in settings.mappings[kinds.index(True) + 1 :])
        report.warn(f"static:{name}", f"has an answer for everyone: {later} is never asked", "make it the last mapping")
    for what in _contradictions(settings):
        report.warn(*what)


def _contradictions(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Settings for upstreams that undo each other: subject, what, advice."""
    for mapping in settings.mappings:
        policy, subject = mapping.policy, f"[[{mapping.name}]]"
        if policy.upstream_tls == "never" and policy.upstream_tls_ca:
            yield subject, "upstream_tls_ca has no effect with upstream_tls = never", "set upstream_tls = auto"
        if policy.send_proxy != "no" and policy.xclient == "require":
            what = "xclient = require, though the PROXY header tells the upstream the same"
            yield subject, what, "set xclient = try, or send_proxy = no"
