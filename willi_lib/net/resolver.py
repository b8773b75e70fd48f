"""Names and addresses from DNS: a client's name for XCLIENT, an upstream's addresses, MX hosts.

Names and addresses come through gevent's c-ares resolver, which also reads /etc/hosts;
MX records, which it does not know, through dnspython. Neither blocks another session.
Answers are cached for a short time and never more than `MAX_ENTRIES` of them.

A name with a dot in it is absolute: the search list of resolv.conf is for names of one label in
willi.conf and the tables, and never for names that the DNS has told.
"""

from __future__ import annotations

import ipaddress
import random
import socket
from _socket import socket as Socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Generic, TypeVar

import dns.exception
import dns.inet
import dns.rdtypes.ANY.CNAME  # these and PTR now: one that cannot be loaded at its first answer is not read for good
import dns.rdtypes.ANY.MX
import dns.resolver
import dns.reversename
import gevent
from gevent.resolver import ares, cares
from gevent.util import wrap_errors

from .. import log
from ..files import FileWatch, read_file
from ..hosts import is_host_name, parse_ip
from ..smtp.xclient import TEMPUNAVAIL, UNAVAILABLE
from .own_lack import is_own_lack

RESOLV_CONF = Path("/etc/resolv.conf")
RESOLV_CONF_INTERVAL = 5.0  # seconds between looks at it

NAME_TTL = 600.0  # seconds a client's name is kept
FAILURE_TTL = 10.0  # seconds that a failure to find a name is kept, so that a dead resolver is not asked by everyone
ADDRESS_TTL = 10.0  # seconds an upstream's addresses are kept: c-ares does not tell their TTL
MX_TTL = 60.0
MAX_NAMES = 5  # PTR records of one address that are tried
MAX_ENTRIES = 10_000  # per cache
NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_NODATA)
NO_ANSWER = "no name server answers"
ARES_FLAG_NOSEARCH = 1 << 5
ROUNDS = 4  # through all name servers, each twice as long as the one before; the caller's time limit ends them
# Seconds for a name server in the first round. gevent looks at time limits of c-ares once a second: a little less
# is the next look. So two silent ones of three cost two seconds of the usual three (`dns_timeout`).
FIRST_ROUND = 0.9

Address = tuple[socket.AddressFamily, str]
T = TypeVar("T")


class DnsFailed(Exception):
    """No answer, or none that is of use; the text says which."""

    def __init__(self, text: str, own_lack: bool = False) -> None:
        super().__init__(text)
        self.own_lack = own_lack  # no name server could be asked, since we have no descriptor, say


class Cache(Generic[T]):
    """What is known for a while, at most `MAX_ENTRIES` of it; the oldest goes first."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, T]] = {}

    def get(self, key: str) -> T | None:
        """None: there is none, or it is too old."""
        entry = self._entries.get(key)
        return entry[1] if entry and entry[0] > monotonic() else None

    def put(self, key: str, value: T, seconds: float) -> T:
        """Keep the value for so long, and return it."""
        self.forget(key)
        if len(self._entries) >= MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = (monotonic() + seconds, value)
        return value

    def forget(self, key: str) -> None:
        self._entries.pop(key, None)


class _Channel(cares.channel):
    """gevent's, for failures that c-ares tells before its call returns, as when no name server listens.

    gevent would wake up the waiting greenlet from itself; it may only be woken by the hub. Of a lack of our own c-ares
    says that no server can be reached: what it is can be seen only at this moment.
    """

    def __init__(self, loop: Any, **options: Any) -> None:
        super().__init__(loop, **options)
        self._loop = loop

    def gethostbyaddr(self, callback: Callable[[Any], object], address: str) -> None:
        super().gethostbyaddr(self._later(callback), address)

    def getaddrinfo(self, callback: Callable[[Any], object], *question: Any) -> None:
        super().getaddrinfo(self._later(callback), *question)

    def _later(self, callback: Callable[[Any], object]) -> Callable[[Any], None]:
        def answer(result: Any) -> None:
            if result.exception:
                try:
                    Socket().close()
                except OSError as lack:
                    result = cares.Result(exception=lack)
            self._loop.run_callback(callback, result)

        return answer


class _Channels(ares.Resolver):
    """gevent's, but for all names: those of the loopback it would give to the system's resolver, which blocks us."""

    cares_class = _Channel
    _LOCAL_HOSTNAMES = _LOCAL_AND_BROADCAST_HOSTNAMES = ()

    def read_again(self) -> None:
        """Take resolv.conf as it is now. What is being asked is asked again. Raises OSError: it cannot be read."""
        old, self.cares = self.cares, self.cares_class(self.hub.loop, **self.params)
        self.hub.loop.run_callback(old.destroy)


class _Ares(_Channels):
    """For absolute names, and with a second one for those of one label."""

    def __init__(self, **options: Any) -> None:
        super().__init__(flags=ARES_FLAG_NOSEARCH, **options)
        self._searching = _Channels(**options)

    def _getaddrinfo(self, host: bytes, *question: Any) -> Any:
        if b"." not in host and b":" not in host:
            return self._searching._getaddrinfo(host, *question)  # type: ignore[attr-defined]
        return super()._getaddrinfo(host.removesuffix(b"."), *question)  # type: ignore[misc]

    def read_again(self) -> None:
        super().read_again()
        self._searching.read_again()


def name_servers(resolv_conf: str) -> list[str]:
    """Their addresses, as the C library reads them: it passes over a line that it cannot use."""
    lines = [line.split() for line in resolv_conf.splitlines() if line.startswith("nameserver")]
    found = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    return [address for address in found if dns.inet.is_address(address)]


def absolute(name: str) -> str:
    """A name that the DNS has told, as a host to look for: one of a single label gets a dot."""
    return name if "." in name else f"{name}."


class Resolver:
    """What one worker knows of DNS."""

    def __init__(self, timeout: float, server: tuple[str, int] | None = None) -> None:
        """timeout: seconds for one question, retries included (`dns_timeout`).

        server: address and port of the only name server to ask, in place of resolv.conf's.
        """
        self._timeout = timeout
        self._dnspython = dns.resolver.Resolver(configure=False)
        self._asking: dict[str, gevent.Greenlet[..., str]] = {}
        self._resolv_conf = FileWatch(interval=0.0, retry=RESOLV_CONF_INTERVAL)
        self._resolv_conf.note([str(RESOLV_CONF)])
        self._resolv_conf.were_read()
        options: dict[str, Any] = {}
        servers: list[str] = []
        if server:
            servers, self._dnspython.port = [server[0]], server[1]
            options = {"servers": servers, "udp_port": server[1], "tcp_port": server[1]}
        else:
            with suppress(OSError):
                servers = name_servers(read_file(RESOLV_CONF).decode("utf-8", "replace"))
        self._ares = _Ares(tries=ROUNDS, timeout=FIRST_ROUND, **options)
        self._take_name_servers(servers or ["127.0.0.1"])  # without a name server, or a file, this host is one

    def _take_name_servers(self, addresses: list[str]) -> None:
        """For dnspython, and with no answer of others kept."""
        self._dnspython.nameservers = addresses
        self._dnspython.timeout = self._timeout / (2 * len(addresses))  # each is asked twice, however silent the others
        self._names: Cache[str] = Cache()
        self._addresses: Cache[list[Address]] = Cache()
        self._mx: Cache[list[tuple[int, str]]] = Cache()

    def serve_all_sockets(self) -> None:
        """Let every socket of this process, such as those to databases, find its host by the same rules."""
        gevent.get_hub().resolver = self._ares

    def follow_resolv_conf(self) -> None:
        """Read it again whenever it has changed; does not return."""
        logged = ""
        while True:
            gevent.sleep(RESOLV_CONF_INTERVAL)
            if not self._resolv_conf.look([str(RESOLV_CONF)]):
                continue
            self._resolv_conf.failed()  # unless the following succeeds
            try:
                servers = name_servers(read_file(RESOLV_CONF).decode("utf-8", "replace"))
                if not servers:  # it is still being written, or the network is down: the old ones are no worse
                    continue
                self._ares.read_again()
            except OSError as error:
                if str(error) != logged:
                    log.error("Cannot read resolv.conf, the old name servers stay", error=str(error))
                logged = str(error)
                continue
            self._resolv_conf.were_read()
            logged = ""
            self._take_name_servers(servers)
            log.info("resolv.conf read again", name_servers=" ".join(servers))

    def start_name_of(self, address: str) -> Callable[[], str]:
        """Begin to look for a client's name; the function returned waits for it, until dns_timeout from now.

        It returns a host name, UNAVAILABLE or TEMPUNAVAIL, and never raises.
        """
        known = self._names.get(address)
        if known is not None:
            return lambda: known
        asking = self._asking.get(address)
        if asking is None:
            asking = self._asking[address] = gevent.spawn(self._find_name, address)
        deadline = monotonic() + self._timeout

        def wait() -> str:
            asking.join(max(0.0, deadline - monotonic()))
            return asking.value or TEMPUNAVAIL

        return wait

    def _find_name(self, address: str) -> str:
        too_late = TEMPUNAVAIL, FAILURE_TTL
        try:
            name, seconds = gevent.with_timeout(self._timeout, self._verified_name, address, timeout_value=too_late)
            return self._names.put(address, name, seconds)
        finally:
            del self._asking[address]

    def _verified_name(self, address: str) -> tuple[str, float]:
        """The PTR name if it is valid and leads back to the address, and how long to keep that."""
        try:
            for candidate in self._names_of(address)[:MAX_NAMES]:
                candidate = candidate.rstrip(".").lower()
                if is_host_name(candidate) and self._leads_to(candidate, address):
                    return candidate, NAME_TTL
        except (OSError, dns.exception.DNSException) as error:
            return TEMPUNAVAIL, 0.0 if _own_lack(error) else FAILURE_TTL
        return UNAVAILABLE, NAME_TTL

    def _names_of(self, address: str) -> list[str]:
        """What the PTR records say. Raises DNSException if DNS does not answer."""
        try:
            name, aliases, _ = self._ares.gethostbyaddr(address)
            return list(dict.fromkeys((name, *aliases)))
        except OSError:
            pass  # gevent says "unknown host" whatever c-ares has met; dnspython tells a failure from no name
        try:
            answer = self.ask(dns.reversename.from_address(address).to_text(), "PTR")
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        return [str(record.target) for record in answer]

    def ask(self, name: str, kind: str) -> dns.resolver.Answer:
        """By dnspython, in a greenlet of its own: it would take a time limit of ours for a server's silence, and go on.

        Raises DNSException.
        """
        resolve = wrap_errors((dns.exception.DNSException,), self._dnspython.resolve)
        asking = gevent.spawn(resolve, name, kind, lifetime=self._timeout)
        try:
            answer = asking.get()
        finally:
            asking.kill(block=False)
        if isinstance(answer, dns.exception.DNSException):
            try:
                raise answer
            finally:
                del answer, asking  # else the exception and this frame keep each other alive, and the session
        return answer

    def _leads_to(self, name: str, address: str) -> bool:
        """Raises OSError if DNS does not answer. Addresses of the other kind would hide that."""
        wanted = ipaddress.ip_address(address)
        family = socket.AF_INET6 if wanted.version == 6 else socket.AF_INET
        try:
            found = self._ares.getaddrinfo(absolute(name), 0, family, socket.SOCK_STREAM)
        except OSError as error:
            if error.args[0] in NO_SUCH_NAME:
                return False
            raise
        return any(ipaddress.ip_address(entry[4][0]) == wanted for entry in found)

    def addresses_of(self, host: str) -> list[Address]:
        """The addresses of an upstream host, in the order to try them (RFC 6724). Raises DnsFailed."""
        known = self._addresses.get(host)
        if known is not None:
            return known
        if parse_ip(host):
            return self._addresses.put(host, [(socket.AF_INET6 if ":" in host else socket.AF_INET, host)], ADDRESS_TTL)
        try:
            found = self._ares.getaddrinfo(host, 0, socket.AF_UNSPEC, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: an MX host that no host can be called
            silent = any(word in str(error) for word in ("ARES_ETIMEOUT", "ARES_ECONNREFUSED", "ARES_ESERVFAIL"))
            why = NO_ANSWER if silent else error.args[-1]
            raise DnsFailed(f"no address for {host}: {why}", bool(_own_lack(error))) from None
        addresses = [(socket.AddressFamily(entry[0]), str(entry[4][0])) for entry in found]
        return self._addresses.put(host, list(dict.fromkeys(addresses)), ADDRESS_TTL)

    def mx_of(self, domain: str) -> list[tuple[int, str]]:
        """Preference and name of a domain's MX hosts, in the order to try them this time; itself if it has none.

        Those of equal preference share the load (RFC 5321 §5.1).
        Raises DnsFailed, also for a null MX (RFC 7505): a domain that takes no mail.
        """
        known = self._mx.get(domain) or self._mx.put(domain, self._ask_mx(domain), MX_TTL)
        return sorted(known, key=lambda host: (host[0], random.random()))

    def _ask_mx(self, domain: str) -> list[tuple[int, str]]:
        """Raises DnsFailed."""
        try:
            records = [(record.preference, str(record.exchange).rstrip(".")) for record in self.ask(domain, "MX")]
        except dns.resolver.NoAnswer:
            records = [(0, domain)]
        except (dns.exception.Timeout, dns.resolver.NoNameservers) as error:
            lack = _own_lack(error)
            raise DnsFailed(f"no MX for {domain}: {lack or NO_ANSWER}", bool(lack)) from None
        except dns.exception.DNSException as error:
            raise DnsFailed(f"no MX for {domain}: {error}") from None
        if not all(host for _, host in records):
            raise DnsFailed(f"{domain} takes no mail (null MX)")
        return [(preference, absolute(host.lower())) for preference, host in records]


def _own_lack(error: Exception) -> str:
    """What we lack, if that is why; dnspython tells what has happened with each server."""
    causes = [error, *(one[3] for one in getattr(error, "kwargs", {}).get("errors", ()))]
    return next((str(cause) for cause in causes if is_own_lack(cause)), "")
