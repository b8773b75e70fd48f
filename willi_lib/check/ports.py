"""Whether `listen` and `status_listen` can be had, and who is there already."""

from __future__ import annotations

import errno
import os
import pwd
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import gevent

from willi_lib.config import Address, Settings
from willi_lib.processes.listeners import _families

from .report import Finding, Report

PATIENCE = 2.0  # seconds for whoever listens there to greet us
LISTENING = "0A"  # in /proc/net/tcp
ANYWHERE = (ip_address("0.0.0.0"), ip_address("::"))
MAX_ANSWER = 200  # octets of what it says that are shown
MAX_METRICS = 1 << 16  # octets in which Willi would have named one of its own
MAX_COMMAND = 80  # characters of a command line
OURS = re.compile(r"(^|[/ ])willi(\.py|-[a-z]+)?( |$)")  # in a command: Willi of any version
UNSEEN = "a process of "  # which only root may look at


def look_at_ports(settings: Settings, report: Report) -> None:
    """Bind each address for a moment, without listening."""
    for address in settings.listen:
        for one, needed in _families(address):
            report.add(_look("listen", one, needed))
    if settings.status_listen:
        for one, needed in _families(settings.status_listen):
            report.add(_look("status_listen", one, needed))
        for address in settings.listen:
            if _overlap(address, settings.status_listen):
                report.wrong("status_listen", f"{settings.status_listen} is in listen, too", "take another port")


def look_whether_ports_stop_a_start(settings: Settings, report: Report) -> None:
    """Only what would: a status that cannot be had is tried again, and an unseen process may be what Willi replaces."""
    for address in settings.listen:
        for one, needed in _families(address):
            finding = _look("listen", one, needed)
            if finding.level != "ok":
                report.add(replace(finding, level="warn") if UNSEEN in finding.what else finding)
    for one, needed in _families(settings.status_listen) if settings.status_listen else ():
        finding = _look("status_listen", one, needed)
        if finding.level != "ok":
            report.warn(finding.subject, f"{finding.what}: there would be no status for now", finding.advice)


def _overlap(one: Address, other: Address) -> bool:
    anywhere = not (one.host and other.host) or any(ip_address(each.host).is_unspecified for each in (one, other))
    return (anywhere or one.host == other.host) and one.port == other.port != 0


def _look(setting: str, address: Address, needed: bool) -> Finding:
    try:
        with _socket_for(address) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address.host, address.port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE or (error.errno == errno.EACCES and _is_taken(address)):
            return _look_at_owner(setting, address)
        if error.errno == errno.EACCES:
            what = f"{address} is free (below port 1024: this user may not open it, the service may)"
            return Finding("ok", setting, what)
        if needed:
            advice = "name an address of this machine: ip address" if error.errno == errno.EADDRNOTAVAIL else ""
            return Finding("wrong", setting, f"cannot listen on {address}: {error.strerror}", advice)
        return Finding("ok", setting, "no IPv6 on this host")
    return Finding("ok", setting, f"{address} is free")


def _look_at_owner(setting: str, address: Address) -> Finding:
    """Willi itself, or another program."""
    pid, command = next(_owners(address), (0, ""))
    speaks = "" if command else _metrics(address) if setting == "status_listen" else _greeting(address)
    if OURS.search(command) or "willi_" in speaks or speaks.endswith("ESMTP Willi"):
        what = f"Willi listens on {address} already" + (f" (process {pid})" if pid else "")
        return Finding("ok", setting, what)
    if pid == 1:
        return Finding("ok", setting, f"systemd holds {address}")
    says = repr(speaks[:MAX_ANSWER]) if speaks else "nothing"
    who = f"process {pid}, {command}" if pid else f"{UNSEEN}{_user(address)} that says {says}"
    advice = "stop it, and keep it from starting again, or take another address"
    return Finding("wrong", setting, f"{address} belongs to {who}", advice)


def _socket_for(address: Address) -> socket.socket:
    """Raises OSError."""
    return socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)


def _near(address: Address) -> tuple[str, int]:
    """Where to connect to it from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host), address.port


def _is_taken(address: Address) -> bool:
    """Whether somebody listens there; who may not bind it can still look, and connect."""
    if any(host.version == ip_address(address.host).version for host, _, _ in _listening(address)):
        return True
    with suppress(OSError), socket.create_connection(_near(address), PATIENCE):
        return True
    return False


def _greeting(address: Address) -> str:
    """The first line of whoever listens there; empty if he says none."""
    with suppress(OSError), socket.create_connection(_near(address), PATIENCE) as connection:
        line = connection.recv(MAX_ANSWER).decode("utf-8", "replace").partition("\r\n")[0]
        with suppress(OSError):
            connection.sendall(b"QUIT\r\n")
        return line
    return ""


def _metrics(address: Address) -> str:
    """The beginning of what it answers to Prometheus."""
    whole = gevent.Timeout(PATIENCE, TimeoutError)  # the socket's own limit is for each read
    with whole, suppress(OSError), socket.create_connection(_near(address), PATIENCE) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with connection.makefile("rb") as answer:
            return answer.read(MAX_METRICS).decode("utf-8", "replace")
    return ""


def _owners(address: Address) -> Iterator[tuple[int, str]]:
    """Process numbers and commands of those who listen there, as far as we may see them (root: all)."""
    sockets = {f"socket:[{inode}]" for _, _, inode in _listening(address)}
    for directory in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with suppress(OSError):  # it has ended, or is another user's
            if any(_link(file) in sockets for file in (directory / "fd").iterdir()):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                yield int(directory.name), command.strip()[:MAX_COMMAND]


def _link(file: Path) -> str:
    with suppress(OSError):
        return os.readlink(file)  # noqa: PTH115 -- not a path
    return ""


def _user(address: Address) -> str:
    """Whose socket it is, which everybody may know."""
    with suppress(KeyError):
        return next((pwd.getpwuid(uid).pw_name for _, uid, _ in _listening(address)), "somebody")
    return "somebody"


def _listening(address: Address) -> Iterator[tuple[IPv4Address | IPv6Address, int, str]]:
    """Address, user and inode of the sockets that keep us from listening on this address."""
    wanted = ip_address(address.host)
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                host, _, port = fields[1].partition(":")
                in_the_way = wanted.is_unspecified or _address(host) in (wanted, *ANYWHERE)
                if fields[3] == LISTENING and int(port, 16) == address.port and in_the_way:
                    yield _address(host), int(fields[7]), fields[9]


def _address(text: str) -> IPv4Address | IPv6Address:
    """An address as the kernel prints it: words of four octets in the machine's order."""
    octets = bytes.fromhex(text)
    if sys.byteorder == "little":
        octets = b"".join(octets[at : at + 4][::-1] for at in range(0, len(octets), 4))
    return ip_address(octets)
