"""What a value may be: functions from its text to the value. They raise ValueError(what is wrong).

Inside Willi, times are seconds and sizes are octets; `5m` and `20MiB` exist here only.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_interface
from itertools import permutations
from typing import Any, TypeVar, get_args

from ..files import open_file
from ..hosts import EVERYWHERE, Address, canonical, is_host_name, parse_ip, parse_port, split_host_port
from .cpus import usable_cpus

T = TypeVar("T")

ALIASES = {"warning": "warn", "sql": "mysql"}
MAX_WORKERS = 256
EXTENSIONS = ("SMTPUTF8", "CHUNKING", "8BITMIME")
MAPPED_PREFIX = 96  # bits of ::ffff:0:0/96, in which IPv4 addresses are written as IPv6
TIMES = {"s": 1, "m": 60, "h": 3600}  # in seconds
SIZES = {"": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}  # in octets


def wrong(text: str, why: str) -> ValueError:
    return ValueError(f"{text[:80]!r}: {why}")


def enumerated(words: Sequence[str]) -> str:
    """As in: a, b or c."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def each(parse: Callable[[str], T], least: int = 0) -> Callable[[list[str]], tuple[T, ...]]:
    def several(words: list[str]) -> tuple[T, ...]:
        if len(words) < least:
            raise ValueError("is empty")
        return tuple(map(parse, words))

    return several


# Words and numbers


def one_of(text: str, words: Any) -> Any:
    """words: a Literal type; their case does not matter."""
    word = ALIASES.get(text.lower(), text.lower())
    if word not in get_args(words):
        raise wrong(text, f"must be {enumerated(get_args(words))}")
    return word


def count(text: str, least: int, most: int) -> int:
    if not re.fullmatch("[0-9]{1,15}", text) or not least <= int(text) <= most:
        raise wrong(text, f"must be a whole number from {least} to {most}")
    return int(text)


def worker_count(text: str) -> int:
    return min(usable_cpus(), MAX_WORKERS) if text.lower() == "auto" else count(text, 1, MAX_WORKERS)


def duration(text: str, most: str, zero: bool = False) -> float:
    """Seconds. zero: whether 0s is allowed."""
    seconds = _amount(text, TIMES, "s, m or h, as in 10s, 5m or 1h")
    if seconds > _amount(most, TIMES) or not (seconds or zero):
        raise wrong(text, f"must be {'' if zero else 'more than 0s and '}at most {most}")
    return seconds


def size(text: str, least: str, most: str) -> int:
    """Octets."""
    octets = int(_amount(text, SIZES, "kB, MB (1000), KiB or MiB (1024), as in 20MiB"))
    if not _amount(least, SIZES) <= octets <= _amount(most, SIZES):
        raise wrong(text, f"must be from {least} to {most}")
    return octets


def _amount(text: str, units: dict[str, int], wanted: str = "") -> float:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-z]*)", text.lower())
    if match is None or match[2] not in units:
        raise wrong(text, f"must be a number and {wanted}")
    return float(match[1]) * units[match[2]]


# Names and addresses


def host_name(text: str) -> str:
    """A host name; without one, that of this machine."""
    name = text or socket.gethostname()
    if not is_host_name(name) or "_" in name:
        raise wrong(name, "must be a host name" + ("" if text else "; this is the one of this machine"))
    return name


def socket_address(text: str) -> Address:
    """Where to listen: a port, and an IP address or nothing before it. Port 0 is any free port."""
    form = "must be like :25, 192.0.2.1:25 or [2001:db8::1]:25"
    try:
        host, written = split_host_port(text)
        port = parse_port(written or "", least=0)
    except ValueError:
        raise wrong(text, form) from None
    try:
        return Address(host and str(canonical(host)), port)
    except ValueError:
        raise wrong(text, f"{form}, an IP address, not a name") from None


def listen_addresses(words: list[str]) -> tuple[Address, ...]:
    """At least one, and none that another one holds already."""
    addresses = each(socket_address, least=1)(words)
    for one, other in permutations(addresses, 2):
        is_everywhere = one.host in ("", "::" if ":" in other.host else "0.0.0.0")
        if is_everywhere and one.port == other.port != 0 and other.host not in EVERYWHERE:
            raise wrong(str(other), f"is part of {one}, and cannot be had twice: leave one of them out")
    return addresses


def database_host(text: str) -> Address:
    """`host` or `host:port`; without a port, port 0."""
    try:
        host, port = split_host_port(text)
        if not (address := parse_ip(host)) and not is_host_name(host.removesuffix(".")):
            raise ValueError("not a host name")
        return Address(address or host, 0 if port is None else parse_port(port))
    except ValueError as fault:
        raise wrong(text, str(fault)) from None


def network(text: str) -> IPv4Network | IPv6Network:
    try:
        interface = ip_interface(text)
    except ValueError:
        raise wrong(text, "must be like 192.0.2.1, 192.0.2.0/24 or 2001:db8::/32") from None
    if int(interface.ip) != int(interface.network.network_address):
        raise wrong(text, f"has bits behind its prefix; did you mean '{interface.network}'?")
    mapped = getattr(interface.ip, "ipv4_mapped", None)
    if mapped and interface.network.prefixlen >= MAPPED_PREFIX:  # such a client is an IPv4 client everywhere in Willi
        return IPv4Network((mapped, interface.network.prefixlen - MAPPED_PREFIX))
    return interface.network


def account(text: str, known: Callable[[str], object]) -> str:
    """A name that pwd.getpwnam or grp.getgrnam knows, or none."""
    try:
        if text:
            known(text)
    except (KeyError, ValueError):  # ValueError: a NUL in it
        raise wrong(text, "this system does not know that name") from None
    return text


# The rest


class FileMissing(ValueError):
    """A file is not there, or not yet, as when its file system is not mounted."""


def readable(path: str) -> str:
    """The path of a file that can be opened; it is not read here."""
    if path:
        try:
            open_file(path).close()
        except OSError as error:
            kind = FileMissing if error.errno == errno.ENOENT else ValueError
            raise kind(f"cannot read {path}: {error.strerror}") from None
    return path


def file_name(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError("is empty" if not path else "has a NUL")
    return path


def extension_names(words: list[str]) -> frozenset[str]:
    for word in words:
        if word.upper() not in EXTENSIONS:
            raise wrong(word, f"must be {enumerated(EXTENSIONS)}")
    chosen = frozenset(word.upper() for word in words)
    if "SMTPUTF8" in chosen and "8BITMIME" not in chosen:
        raise ValueError("SMTPUTF8 cannot be offered without 8BITMIME (RFC 6531 §3.1)")
    return chosen


def delimiters(text: str) -> str:
    if not re.fullmatch(r"[!#-?\[-`{-~A-Za-z]*", text):
        raise wrong(text, "must be ASCII characters without @, blanks and quotation marks")
    return text


def lookup_query(text: str) -> str:
    if "?" not in text:
        raise ValueError("has no ?, which stands for the address or domain to look up")
    if "'?'" in text or '"?"' in text:
        raise ValueError("has quotation marks around the ?, which make it a plain question mark: leave them out")
    return text
