"""A DNS server with a zone out of the test, and a way to make it the only resolver of one process."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import socket
import threading
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from tests.support.loopback import HOST, PATIENCE

TTL = 60
# Run a command with its own resolv.conf, hosts and nsswitch.conf; nobody else sees them. $1: their directory.
PRIVATE_RESOLVER = (
    'for file in resolv.conf hosts nsswitch.conf; do [ ! -e "/etc/$file" ] || mount --bind "$1/$file" "/etc/$file"; '
    'done; shift; exec "$@"'
)


class Fault(Enum):
    """What a name server answers besides records."""

    NXDOMAIN = dns.rcode.NXDOMAIN
    SERVFAIL = dns.rcode.SERVFAIL
    REFUSED = dns.rcode.REFUSED
    SILENCE = -1


class DnsServer:
    """UDP on port 53 of a loopback address of its own. Names that are not in `zone` do not exist.

    Without a directory (nobody needs its `prefix`) it is any free port of 127.0.0.1, for which root is not needed.
    zone: {"b.example": {"MX": ["10 mx.b.example."], "A": Fault.SERVFAIL}, "slow.example": Fault.SILENCE}
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.zone: dict[str, dict[str, Sequence[str] | Fault] | Fault] = {}
        self.queries: list[tuple[str, str]] = []  # (name, type) in their order
        self._socket = _bind_to_port_53() if directory else _bind_to_free_port()
        self._socket.settimeout(0.1)  # how soon stop() is noticed
        self.address: str
        self.port: int
        self.address, self.port = self._socket.getsockname()
        self._directory = directory
        self.resolv_conf = directory / "resolv.conf" if directory else Path()  # what `prefix` shows to the command
        if directory:
            self.resolv_conf.write_text(f"nameserver {self.address}\n")
            (directory / "hosts").write_text("# empty: names and addresses come from the test's zone\n")
            (directory / "nsswitch.conf").write_text("hosts: files dns\n")
        self._thread = threading.Thread(target=self._serve, name="dns", daemon=True)
        self._thread.start()

    @property
    def prefix(self) -> list[str]:
        """Put before a command: it knows no other resolver. Needs root; it keeps its process id."""
        return ["unshare", "--mount", "sh", "-euc", PRIVATE_RESOLVER, "sh", str(self._directory)]

    def host(self, name: str, address: str) -> None:
        """A name and an address that point to each other."""
        self.zone[name] = {"A" if ipaddress.ip_address(address).version == 4 else "AAAA": [address]}
        self.reverse(address, name)

    def reverse(self, address: str, name: str) -> None:
        """A PTR record alone, whether or not the name exists."""
        self.zone[ipaddress.ip_address(address).reverse_pointer] = {"PTR": [name + "."]}

    def stop(self) -> None:
        self._socket.close()
        self._thread.join(PATIENCE)

    def _serve(self) -> None:
        while self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                octets, peer = self._socket.recvfrom(4096)
                answer = self.answer(dns.message.from_wire(octets))
                if answer is not None:
                    self._socket.sendto(answer.to_wire(), peer)

    def answer(self, query: dns.message.Message) -> dns.message.Message | None:
        """The response; None: silence."""
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        self.queries.append((name, kind))
        zone = self.zone.get(name, Fault.NXDOMAIN)
        records = zone if isinstance(zone, Fault) else zone.get(kind, ())
        if records is Fault.SILENCE:
            return None
        response = dns.message.make_response(query, recursion_available=True)
        if isinstance(records, Fault):
            response.set_rcode(dns.rcode.Rcode(records.value))
        elif records:
            response.answer.append(dns.rrset.from_text(question.name, TTL, "IN", kind, *records))
        return response


def _bind_to_free_port() -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((HOST, 0))
    return server


def _bind_to_port_53() -> socket.socket:
    """On the first free address of 127.0.53.0/24, so that servers of several test runs do not meet."""
    for number in itertools.count(1):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            server.bind((f"127.0.53.{number}", 53))
        except PermissionError:
            server.close()
            raise
        except OSError:
            server.close()
            assert number < 254, "no free port 53 in 127.0.53.0/24"
        else:
            return server
    raise AssertionError("not reached")
