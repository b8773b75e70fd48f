"""Settings that are allowed, and make Willi break a promise, or an open relay of it."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from .. import log
from ..config import Settings
from ..processes.generation import DESCRIPTORS_PER_SESSION
from ..status.finding import Finding

MINUTE = 60  # seconds
UNIT_DRAIN = 60  # seconds that etc/willi.service and etc/willi.init leave for a stop
OWN = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10",
        "::1/128", "fc00::/7", "fe80::/10",
    )
)  # fmt: skip
WORLD = {4: 8, 6: 16}  # a network with a shorter prefix is too large to be one administrator's own
LARGE = {4: 24, 6: 64}  # the same for a network that is not private

Rule = tuple[str, bool, str, str]  # setting, whether its value is one to think about again, what is wrong, advice


def check_settings(settings: Settings) -> Iterator[Finding]:
    """What can be told from the file alone; whether an upstream relays is asked of the upstream."""
    for setting, is_broken, what, advice in (*_names(settings), *_limits(settings), *_mappings(settings)):
        if is_broken:
            yield Finding("warn", setting, what, advice)
    yield from _check_networks("xclient_hosts", settings.xclient_hosts)
    yield from _check_networks("proxy_protocol_hosts", settings.proxy_protocol_hosts)


def is_own(host: str) -> bool:
    """Whether a host, or a server's address, is on this machine or in a private network. A name is not."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in OWN)


def _names(s: Settings) -> tuple[Rule, ...]:
    fault = log.syslog_fault() if s.log == "syslog" else ""
    status = s.status_listen
    return (
        ("domain", "." not in s.domain,
         "is no full host name: upstreams may refuse it in EHLO", "set domain to the name of this host in the DNS"),
        ("loglevel", s.loglevel in ("warn", "error"),
         "no line is written for a message: nobody can tell where it went", "set loglevel = info"),
        ("loglevel", s.loglevel == "debug",
         "the log has every command of every session, and grows fast", "set loglevel = info"),
        ("log", fault != "",
         f"no line of the log is kept (log = syslog): {fault}", "start a syslog daemon, or set log = stdout"),
        ("tls_min_version", s.tls_min_version == "1.3",
         "servers that know TLS 1.2 only will send their mail in clear", "set tls_min_version = 1.2"),
        ("tls_min_version", s.tls_min_version in ("1.0", "1.1"),
         "versions of TLS that are broken are accepted (still better than clear text)", "set tls_min_version = 1.2"),
        ("status_listen", status is not None and not (status.host and ip_address(status.host).is_loopback),
         f"{status} can be reached from other machines, and asks for no password",
         "use 127.0.0.1, or close it by a firewall but for your monitoring"),
    )  # fmt: skip


def _limits(s: Settings) -> tuple[Rule, ...]:
    """RFC 5321 §4.5.3 says what a client may count on."""
    files, most_files = s.max_connections * DESCRIPTORS_PER_SESSION, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return (
        ("read_timeout", s.read_timeout < 5 * MINUTE,
         "slow clients are cut off, and try again for days (RFC 5321 asks for 5 minutes)", "set read_timeout = 5m"),
        ("write_timeout", s.write_timeout < 3 * MINUTE,
         "an upstream that takes a message slowly is given up (RFC 5321 asks for 3 minutes)", "set write_timeout = 5m"),
        ("upstream_timeout", s.upstream_timeout > 5 * MINUTE,
         "clients wait 5 minutes for an answer: they are gone before the upstream is given up",
         "set upstream_timeout = 4m"),
        ("connect_timeout", s.connect_timeout >= s.upstream_timeout,
         "as long as upstream_timeout: if the first host is silent, the others are never tried",
         "set connect_timeout = 20s"),
        ("data_timeout", s.data_timeout < 10 * MINUTE,
         "an upstream that takes longer delivers, while the client is told 451: it sends the message again,"
         " and the recipient has it twice (RFC 5321 §4.5.3.2.6)", "set data_timeout = 10m"),
        ("drain_timeout", s.drain_timeout < 10,
         "a stop or a reload cuts messages that are under way; their clients send them again",
         "set drain_timeout = 60s"),
        ("drain_timeout", s.drain_timeout > UNIT_DRAIN,
         "longer than the service is given to stop, unless you have changed that",
         "raise TimeoutStopSec of the unit (STOP_TIMEOUT of the init script) above it"),
        ("max_message_bytes", s.max_message_bytes < 65536,
         "messages that any server must take are refused (RFC 5321 §4.5.3.1.7)", "set max_message_bytes = 20MiB"),
        ("max_recipients", s.max_recipients < 100,
         "fewer than the 100 that a client may count on (RFC 5321 §4.5.3.1.8)", "set max_recipients = 100"),
        ("max_connections_per_ip", s.max_connections_per_ip >= s.max_connections,
         "a single client can take all of max_connections", "set it far below max_connections"),
        ("max_connections", most_files < files,
         f"{s.max_connections} need {files} open files, and here no more than {most_files} are allowed",
         "raise LimitNOFILE of the unit (ulimit -n before a start by hand)"),
    )  # fmt: skip


def _mappings(s: Settings) -> Iterator[Rule]:
    for mapping in s.mappings:
        policy, section = mapping.policy, f"[[{mapping.name}]]"
        yield from (
            (section, policy.upstream_tls == "never" and policy.upstream_tls_ca != "",
             "upstream_tls_ca has no effect with upstream_tls = never", "set upstream_tls = auto"),
            (section, policy.send_proxy != "no" and policy.xclient == "require",
             "xclient = require, though the PROXY header tells the upstream the same",
             "set xclient = try, or send_proxy = no"),
        )  # fmt: skip


def _check_networks(setting: str, networks: Iterable[IPv4Network | IPv6Network]) -> Iterator[Finding]:
    """Promise 9: no client can speak in another's name."""
    advice = "name the addresses of your own machines"
    for network in networks:
        if network.prefixlen < WORLD[network.version]:
            what = f"{network} is the world: any client can claim any address, and no limit holds"
            yield Finding("wrong", setting, what, advice)
        elif network.prefixlen < LARGE[network.version] and not _is_private(network):
            yield Finding("warn", setting, f"{network} is large: every host in it can claim to be any client", advice)


def _is_private(network: IPv4Network | IPv6Network) -> bool:
    return any(network.version == own.version and network.subnet_of(own) for own in OWN)  # type: ignore[arg-type]
