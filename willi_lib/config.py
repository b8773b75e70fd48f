"""The file -> frozen Settings: every key, default, unit and range, once.

The classes `Settings`, `StaticSettings`, `CsvSettings` and `MysqlSettings` are the table: each field made by
`key` is a key of the file. `load` reads a file against them and collects every fault before it gives up.
`etc/willi.conf.example` says what the keys mean. Inside Willi, times are seconds and sizes are octets.
"""

# ruff: noqa: RUF009 -- `key` returns a dataclass field

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from configobj import ConfigObj, ConfigObjError

from willi_lib.routing import (
    Policy,
    SendProxy,
    Server,
    UpstreamTls,
    Xclient,
    parse_servers,
    parse_tls_verify,
)

T = TypeVar("T")

LogLevel = Literal["debug", "info", "warn", "error"]
LogTarget = Literal["stdout", "syslog"]
TlsVersion = Literal["1.0", "1.1", "1.2", "1.3"]
MixedRecipients = Literal["first", "defer"]
BareNewline = Literal["normalize", "reject"]
MappingType = Literal["static", "csv", "mysql"]
EXTENSIONS = ("SMTPUTF8", "CHUNKING", "8BITMIME")

OLD_FILE = (
    "this is a file of the old Willi, with 'key: value'; now it is 'key = value', and each mapping is a section"
    " [[name]] below a line [mappings], as willi.conf.example shows"
)
NO_MAPPING = (
    "there is no mapping, so that every recipient would be refused; write the three lines [[file]],"
    " type = csv and file = upstream_servers.csv below a line [mappings], or see willi.conf.example"
)
SECTIONS = "a section line must be [mappings], or below it [[name]] for each mapping"
QUOTE = 'quote the whole value, as in "a, b"'
EQUALS = "must be written as key = value"


class ConfigError(Exception):
    """The file cannot be used; one line for each of its faults."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class Address:
    """Host and port; an empty host means all addresses, IPv4 and IPv6."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Certificate:
    """Two PEM files."""

    cert: str
    key: str


# What a value may be: functions from its text to the value. They raise ValueError(what is wrong).


def one_of(literal: Any, **aliases: str) -> Callable[[str], Any]:
    """One of the words of a Literal type, in any case."""
    words = get_args(literal)

    def parse(text: str) -> str:
        word = aliases.get(text.lower(), text.lower())
        if word not in words:
            raise ValueError(f"{text[:80]!r}: must be {enumerated(words)}")
        return word

    return parse


def yes_no(text: str) -> bool:
    if text.lower() not in ("yes", "true", "on", "1", "no", "false", "off", "0"):
        raise ValueError(f"{text[:80]!r}: must be yes or no")
    return text.lower() in ("yes", "true", "on", "1")


def count(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,15}", text) or not least <= int(text) <= most:
            raise ValueError(f"{text[:80]!r}: must be a whole number from {least} to {most}")
        return int(text)

    return parse


def worker_count(text: str) -> int:
    return len(os.sched_getaffinity(0)) if text.lower() == "auto" else count(1, 256)(text)


def duration(most: str, zero: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        seconds = amount(text, TIMES, "s, m or h, as in 10s, 5m or 1h")
        if seconds > amount(most, TIMES) or not (seconds or zero):
            raise ValueError(f"{text[:80]!r}: must be {'' if zero else 'more than 0s and '}at most {most}")
        return seconds

    return parse


def size(least: str, most: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        octets = int(amount(text, SIZES, "kB, MB (1000), KiB or MiB (1024), as in 20MiB"))
        if not amount(least, SIZES) <= octets <= amount(most, SIZES):
            raise ValueError(f"{text[:80]!r}: must be from {least} to {most}")
        return octets

    return parse


TIMES = {"s": 1, "m": 60, "h": 3600}  # in seconds
SIZES = {"": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}  # in octets


def amount(text: str, units: dict[str, int], wanted: str = "") -> float:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-z]*)", text.lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{text[:80]!r}: must be a number and {wanted}")
    return float(match[1]) * units[match[2]]


def host_name(text: str) -> str:
    """A host name; without one, that of this machine."""
    label = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"  # RFC 1123 §2.1
    name = text or socket.gethostname()
    if not re.fullmatch(rf"{label}(\.{label})*", name) or len(name) > 253 or re.fullmatch(r".*\.[0-9]+", name):
        raise ValueError(f"{name[:80]!r}: must be a host name" + ("" if text else "; this is the one of this machine"))
    return name


def host_port(text: str) -> Address:
    """`host`, `host:port`, or the same with an IPv6 address in brackets; without a port, port 0."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/@]*))(?::([0-9]{1,5}))?", text)
    if match is None or int(match[3] or 0) > 65535:
        raise ValueError(f"{text[:80]!r}: must be host:port or [IPv6 address]:port")
    return Address(str(ip_address(match[1])) if match[1] else match[2], int(match[3] or 0))


def socket_address(text: str) -> Address:
    """Where to listen: a port that is written, and an IP address or nothing. Port 0 is any free port."""
    must_be = f"{text[:80]!r}: must be like :25, 192.0.2.1:25 or [2001:db8::1]:25"
    try:
        address = host_port(text)
    except ValueError:
        address = None
    if address is None or not re.search(":[0-9]+$", text):
        raise ValueError(must_be)
    try:
        if address.host:
            ip_address(address.host)
    except ValueError:
        raise ValueError(f"{must_be}, an IP address, not a name") from None
    return address


def database_host(text: str) -> Address:
    address = host_port(text)
    if not address.host:
        raise ValueError(f"{text[:80]!r}: must be host or host:port")
    return address


def network(text: str) -> IPv4Network | IPv6Network:
    try:
        wider = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text[:80]!r}: must be like 192.0.2.1, 192.0.2.0/24 or 2001:db8::/32") from None
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r}: has bits behind its prefix; did you mean '{wider}'?") from None


def extension_names(words: list[str]) -> frozenset[str]:
    chosen = frozenset(word.upper() for word in words)
    for word in words:
        if word.upper() not in EXTENSIONS:
            raise ValueError(f"{word[:80]!r}: must be {enumerated(EXTENSIONS)}")
    if "SMTPUTF8" in chosen and "8BITMIME" not in chosen:
        raise ValueError("SMTPUTF8 cannot be offered without 8BITMIME (RFC 6531 §3.1)")
    return chosen


def delimiters(text: str) -> str:
    if not re.fullmatch(r"[!#-?\[-`{-~A-Za-z]*", text):
        raise ValueError(f"{text[:80]!r}: must be ASCII characters without @, blanks and quotation marks")
    return text


def readable(path: str) -> str:
    """The path of a file that can be opened; it is not read here."""
    if path:
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return path


def account(known: Callable[[str], object]) -> Callable[[str], str]:
    """A name that pwd.getpwnam or grp.getgrnam knows, or none."""

    def parse(text: str) -> str:
        try:
            if text:
                known(text)
        except (KeyError, ValueError):  # ValueError: a NUL in it
            raise ValueError(f"{text[:80]!r}: this system does not know that name") from None
        return text

    return parse


def lookup_query(text: str) -> str:
    if "?" not in text:
        raise ValueError("has no ?, which stands for the address or domain to look up")
    if "'?'" in text or '"?"' in text:
        raise ValueError("has quotation marks around the ?, which make it a plain question mark: leave them out")
    return text


def each(parse: Callable[[str], T], least: int = 0) -> Callable[[list[str]], tuple[T, ...]]:
    def several(words: list[str]) -> tuple[T, ...]:
        if len(words) < least:
            raise ValueError("is empty")
        return tuple(map(parse, words))

    return several


# How a key is declared


@dataclass(frozen=True)
class Key:
    """What the file may say for one field."""

    default: str | None  # as it would be written; None: has to be written
    parse: Callable[[Any], Any]  # of the text, or of the words of a list
    name: str = ""  # in the file, if the field has another one
    is_list: bool = False
    is_path: bool = False  # relative to the directory of the file

    def value(self, written: str | list[str], directory: Path) -> Any:
        """Raises ValueError(what is wrong)."""
        if not self.is_list and isinstance(written, list):
            raise ValueError(f"has a comma, but is no list: {QUOTE}")
        words = split_list(written) if self.is_list else [str(written)]
        if self.is_path:
            words = [word and str(directory / word) for word in words]
        return self.parse(words if self.is_list else words[0])


def key(default: str | None, parse: Callable[[Any], T], *, secret: bool = False, **how: Any) -> T:
    """A dataclass field for a `Key`; a type checker sees what its parser returns."""
    this = Key(default, parse, **how)
    if default is None:
        declared: T = field(metadata={"key": this})
    else:
        declared = field(default_factory=lambda: this.value(default, Path()), repr=not secret, metadata={"key": this})
    return declared


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A configuration file without faults."""

    path: str
    loglevel: LogLevel = key("info", one_of(LogLevel, warning="warn"))
    log: LogTarget = key("stdout", one_of(LogTarget))
    listen: tuple[Address, ...] = key(":25", each(socket_address, least=1), is_list=True)
    domain: str = key("", host_name)
    user: str = key("", account(pwd.getpwnam))
    group: str = key("", account(grp.getgrnam))
    workers: int = key("auto", worker_count)
    tls_cert: tuple[str, ...] = key("", each(readable), is_path=True, is_list=True)
    tls_key: tuple[str, ...] = key("", each(readable), is_path=True, is_list=True)
    tls_min_version: TlsVersion = key("1.2", one_of(TlsVersion))
    read_timeout: float = key("5m", duration("1h"))
    write_timeout: float = key("5m", duration("1h"))
    connect_timeout: float = key("20s", duration("1h"))
    upstream_timeout: float = key("4m", duration("1h"))
    data_timeout: float = key("10m", duration("1h"))
    dns_timeout: float = key("3s", duration("1h"))
    drain_timeout: float = key("60s", duration("1h"))
    max_message_bytes: int = key("20MiB", size("1kB", "4096MiB"))
    max_recipients: int = key("100", count(1, 100_000))
    max_connections: int = key("5000", count(1, 1_000_000))
    max_connections_per_ip: int = key("50", count(1, 1_000_000))
    max_connection_rate: int = key("0", count(0, 1_000_000))
    max_errors: int = key("20", count(1, 1_000_000))
    recipient_delimiter: str = key("", delimiters)
    mixed_recipients: MixedRecipients = key("first", one_of(MixedRecipients))
    bare_newline: BareNewline = key("normalize", one_of(BareNewline))
    extensions: frozenset[str] = key(", ".join(EXTENSIONS), extension_names, is_list=True)
    strict_8bitmime: bool = key("no", yes_no)
    upstream_tls: UpstreamTls = key("auto", one_of(UpstreamTls))
    upstream_tls_ca: str = key("", readable, is_path=True)
    xclient: Xclient = key("try", one_of(Xclient))
    send_proxy: SendProxy = key("no", one_of(SendProxy))
    proxy_protocol_hosts: tuple[IPv4Network | IPv6Network, ...] = key("", each(network), is_list=True)
    xclient_hosts: tuple[IPv4Network | IPv6Network, ...] = key("", each(network), is_list=True)
    status_listen: Address | None = key("", lambda text: socket_address(text) if text else None)
    mappings: tuple[StaticSettings | CsvSettings | MysqlSettings, ...]

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        return tuple(map(Certificate, self.tls_cert, self.tls_key))

    @property
    def policy(self) -> Policy:
        """For every mapping that says nothing else."""
        return Policy(self.upstream_tls, self.upstream_tls_ca, self.xclient, self.send_proxy)


@dataclass(frozen=True)
class StaticSettings:
    """A mapping with `type = static`."""

    name: str
    policy: Policy
    servers: tuple[Server, ...] = key(None, parse_servers, name="server")
    tls_verify: bool = key("true", parse_tls_verify)


@dataclass(frozen=True)
class CsvSettings:
    """A mapping with `type = csv`."""

    name: str
    policy: Policy
    file: str = key(None, str, is_path=True)


@dataclass(frozen=True, kw_only=True)
class MysqlSettings:
    """A mapping with `type = mysql`."""

    name: str
    policy: Policy
    hosts: tuple[Address, ...] = key("localhost", each(database_host, least=1), name="host", is_list=True)
    port: int = key("3306", count(1, 65535))
    unix_socket: str = key("", str, is_path=True)
    user: str = key("", str)
    password: str = key("", str, secret=True)
    password_file: str = key("", readable, is_path=True)
    database: str = key("", str)
    tls_ca: str = key("", readable, is_path=True)
    pool_size: int = key("5", count(1, 1000))
    timeout: float = key("5s", duration("1h"))
    query: str = key(None, lookup_query)
    cache_ttl: float = key("60s", duration("24h", zero=True))
    cache_size: int = key("100000", count(1, 10_000_000))
    stale_ttl: float = key("1h", duration("168h", zero=True))


MappingSettings = StaticSettings | CsvSettings | MysqlSettings
Fields = dict[str, "Field[Any]"]  # by the name in the file


def key_of(this: Field[Any]) -> Key:
    declared: Key = this.metadata["key"]
    return declared


def fields_of(settings: type) -> Fields:
    return {key_of(this).name or this.name: this for this in fields(settings) if "key" in this.metadata}


@dataclass(frozen=True)
class MappingKeys:
    """What every mapping has besides its own keys and those of `Policy`."""

    type: MappingType = key(None, one_of(MappingType, sql="mysql"))


TYPES: dict[str, type[MappingSettings]] = {"static": StaticSettings, "csv": CsvSettings, "mysql": MysqlSettings}
TYPE = key_of(fields_of(MappingKeys)["type"])
TOP_FIELDS = fields_of(Settings)
POLICY_FIELDS = {this.name: TOP_FIELDS[this.name] for this in fields(Policy)}
MAPPING_FIELDS = {kind: fields_of(MappingKeys) | fields_of(own) | POLICY_FIELDS for kind, own in TYPES.items()}
ALL_KEYS = set(TOP_FIELDS).union(*MAPPING_FIELDS.values())


# Reading a file


def load(path: str) -> Settings:
    """Read and check a configuration file. Raises ConfigError with all its faults."""
    try:
        octets = Path(path).read_bytes()
        text = octets.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: cannot read it: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: must be UTF-8"]) from None
    return Reader(path, text).settings()


class Reader:
    """Reads one file. What is wrong becomes a fault, and the reading goes on."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.directory = Path(path).absolute().parent
        self.lines = text.rstrip().split("\n")
        self.faults: list[tuple[int, str]] = []

    def settings(self) -> Settings:
        """Raises ConfigError."""
        top = self.parse()
        values, lines = self.read_keys(top, TOP_FIELDS)
        certs, private_keys = (len(values.get(name, ())) for name in ("tls_cert", "tls_key"))
        if certs != private_keys and {"tls_cert", "tls_key"} & lines.keys() <= values.keys():
            line = lines.get("tls_key") or lines["tls_cert"]
            self.fault(line, "tls_key", f"must be as many files as tls_cert: {private_keys}, not {certs}")
        if values.get("group") and not values.get("user", "user" in lines):  # a wrong user is a fault already
            self.fault(lines["group"], "group", "needs user as well: only then are the workers somebody else")
        policy = Policy(**{name: values[name] for name in POLICY_FIELDS if name in values})
        mappings = self.read_mappings(top, policy)
        self.give_up_if_faulty()
        try:
            return Settings(path=self.path, mappings=mappings, **values)
        except ValueError as why:  # the one default that can be wrong
            raise ConfigError([f"{self.path}:{len(self.lines)}: domain: {why}"]) from None

    def fault(self, line: int, name: str, why: str) -> None:
        self.faults.append((line, f"{name}: {why}"))

    @contextmanager
    def blame(self, line: int, name: str) -> Iterator[None]:
        """A ValueError in the block is a fault of that key."""
        try:
            yield
        except ValueError as why:
            self.fault(line, name, str(why))

    def give_up_if_faulty(self) -> None:
        if self.faults:
            raise ConfigError([f"{self.path}:{line}: {text}" for line, text in sorted(self.faults, key=itemgetter(0))])

    def parse(self) -> Any:
        """The file as configobj sees it, the names of keys and sections with their lines."""
        for number, line in enumerate(self.lines, 1):
            if re.match(r"""\s*["']?mappings["']?\s*:""", line):
                raise ConfigError([f"{self.path}:{number}: mappings: {OLD_FILE}"])
        try:
            return ConfigObj(list(numbered(self.lines)), interpolation=False)
        except ConfigObjError as error:
            for wrong in error.errors:
                self.syntax_fault(wrong.line_number, self.lines[wrong.line_number - 1].strip())
            return error.config

    def syntax_fault(self, number: int, line: str) -> None:
        """Raises ConfigError if it is unknown what the lines below belong to."""
        name, equals, value = line.partition("=")
        if line.startswith("["):
            self.fault(number, line, SECTIONS)
        elif equals:
            self.fault(number, unquoted(name), QUOTE)
        else:
            self.fault(number, unquoted(re.split(r"[\s:]", line)[0]), EQUALS)
        if line.startswith("[") or opened_quotes(value):
            self.give_up_if_faulty()

    def read_keys(self, section: Any, known: Fields) -> tuple[dict[str, Any], dict[str, int]]:
        """The values that are right, by the names of the fields; and the lines, by the names in the file."""
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for written in section.scalars:
            name, line = name_and_line(written)
            with self.blame(line, unquoted(name.partition(":")[0])):
                claim(lines, name, line)
                if name not in known:
                    raise ValueError(unknown(name, known))
                if not section[written] and self.lines[line - 1].partition("=")[2].lstrip().startswith("#"):
                    raise ValueError("is empty, since a # begins a comment: quote a value that begins with #")
                if self.is_cut(line, section.inline_comments[written]):
                    raise ValueError("has a #, which begins a comment: quote the value, or put a blank before the #")
                values[known[name].name] = key_of(known[name]).value(section[written], self.directory)
        return values, lines

    def is_cut(self, number: int, comment: str | None) -> bool:
        """Whether configobj took part of the value for a comment, as in `password = abc#def`."""
        line = self.lines[number - 1].rstrip()
        return bool(comment) and line.endswith(str(comment)) and line[-len(str(comment)) - 1] not in " \t\"'"

    def read_mappings(self, top: Any, policy: Policy) -> tuple[MappingSettings, ...]:
        """The mappings that are right, in the order of the file."""
        found: list[MappingSettings | None] = []
        lines: dict[str, int] = {}
        for section in top.sections:
            name, line = name_and_line(section)
            if name != "mappings":
                self.fault(line, f"[{name}]", SECTIONS)
                continue
            with self.blame(line, "[mappings]"):
                claim(lines, "[mappings]", line)
            self.read_keys(top[section], {})
            for mapping in top[section].sections:
                name, line = name_and_line(mapping)
                with self.blame(line, f"[[{name}]]"):
                    claim(lines, f"[[{name}]]", line)
                found.append(self.read_mapping(name, line, top[section][mapping], policy))
        if not found and all(name_and_line(section)[0] == "mappings" for section in top.sections):
            self.fault(lines.get("[mappings]", len(self.lines)), "[mappings]", NO_MAPPING)
        return tuple(mapping for mapping in found if mapping is not None)

    def read_mapping(self, name: str, line: int, section: Any, policy: Policy) -> MappingSettings | None:
        """None if there is a fault."""
        faults = len(self.faults)
        for inner in section.sections:
            self.fault(name_and_line(inner)[1], f"[[[{name_and_line(inner)[0]}]]]", SECTIONS)
        written = next((name for name in section.scalars if name_and_line(name)[0] == "type"), None)
        if written is None:
            self.fault(line, "type", f"is missing; must be {enumerated(get_args(MappingType))}")
            return None
        kind = ""
        with self.blame(name_and_line(written)[1], "type"):
            kind = TYPE.value(section[written], self.directory)
        if not kind:
            return None
        values, lines = self.read_keys(section, MAPPING_FIELDS[kind])
        self.check_pairs(values, lines)
        complete = self.is_complete(values, MAPPING_FIELDS[kind], name, line)
        if not complete or len(self.faults) > faults:
            return None
        del values["type"]
        own_policy = replace(policy, **{key: values.pop(key) for key in POLICY_FIELDS if key in values})
        settings = TYPES[kind](name=name, policy=own_policy, **values)
        if isinstance(settings, MysqlSettings):
            hosts = tuple(Address(host.host, host.port or settings.port) for host in settings.hosts)
            return replace(settings, hosts=hosts)
        return settings

    def is_complete(self, values: dict[str, Any], known: Fields, name: str, line: int) -> bool:
        """Whether all that a mapping has to have is there; a key that is there, but wrong, is a fault already."""
        missing = [key for key, this in known.items() if key_of(this).default is None and this.name not in values]
        for key in missing:
            if not any(at > line and text.startswith(f"{key}: ") for at, text in self.faults):
                self.fault(line, key, f"is missing in [[{name}]]")
        return not missing

    def check_pairs(self, values: dict[str, Any], lines: dict[str, int]) -> None:
        """The keys of a database that exclude each other."""
        if values.get("password") and values.get("password_file"):
            self.fault(lines["password_file"], "password_file", "cannot be used together with password")
        if values.get("unix_socket") and "host" in lines:
            self.fault(lines["unix_socket"], "unix_socket", "cannot be used together with host")


def numbered(lines: list[str]) -> Iterator[str]:
    """The lines with `@` and its line behind the name of each key and section: configobj tells no lines."""
    closing = ""  # the quotation marks at the end of a value of several lines
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if closing:
            closing = "" if closing in line else closing
            yield line
        elif line.lstrip().startswith("["):
            match = re.fullmatch(r"(\s*\[+[^\[\]\"'#=]*[^\[\]\"'#=\s])(\s*\]+\s*(?:#.*)?)", line)
            yield f"{match[1]}@{number}{match[2]}" if match else "["  # which is a fault
        elif equals and not line.lstrip().startswith("#"):
            closing = opened_quotes(value)
            yield f"{unquoted(name)}@{number} ={value}"
        else:
            yield line


def name_and_line(name: str) -> tuple[str, int]:
    """The two parts of what `numbered` made."""
    name, _, line = name.rpartition("@")
    return name.strip(), int(line)


def opened_quotes(value: str) -> str:
    """The triple quotation marks that a value opens and does not close."""
    marks = value.strip()[:3]
    return marks if marks in ('"""', "'''") and marks not in value.strip()[3:] else ""


def unquoted(name: str) -> str:
    return name.strip().strip("\"'")


def claim(lines: dict[str, int], name: str, line: int) -> None:
    """Note the line of a name. Raises ValueError if the name is taken."""
    if name in lines:
        raise ValueError(f"is in line {lines[name]} already")
    lines[name] = line


def unknown(name: str, known: Fields) -> str:
    """What is wrong with a key that is not among the known ones."""
    if ":" in name:
        return EQUALS
    if name == "mappings":
        return "is a section: write [mappings]"
    if name == "connection":
        return "is now written as host, port, user, password, database and tls_ca"
    if name in TOP_FIELDS:
        return "belongs to the top of the file, above [mappings]"
    if name in ALL_KEYS and known in (TOP_FIELDS, {}):
        return "belongs to a mapping, below its line [[name]]"
    if name in ALL_KEYS:
        return f"only for type = {enumerated([kind for kind in TYPES if name in MAPPING_FIELDS[kind]])}"
    nearest = difflib.get_close_matches(name.lower(), known or ALL_KEYS, 1)
    return f"unknown key; did you mean '{nearest[0]}'?" if nearest else "unknown key"


def split_list(written: str | list[str]) -> list[str]:
    """The words of a list, in one pair of quotation marks or not."""
    words = written.split(",") if isinstance(written, str) else written
    return [word.strip() for word in words if word.strip()]


def enumerated(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
