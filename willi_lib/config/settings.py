"""The table of keys: each field made by `key` is a key of the file, with its default, unit and range."""

# ruff: noqa: RUF009 -- `key` returns a dataclass field

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ..hosts import Address
from ..routing import route
from ..routing.route import Policy, Server, parse_servers, parse_tls_verify
from ..text import is_true
from . import values
from .values import EXTENSIONS, each

T = TypeVar("T")
QUOTE = 'quote the whole value, as in "a, b"'
POLICY = Policy()

LogLevel = Literal["debug", "info", "warn", "error"]
LogTarget = Literal["stdout", "syslog"]
TlsVersion = Literal["1.0", "1.1", "1.2", "1.3"]
MixedRecipients = Literal["first", "defer"]
BareNewline = Literal["normalize", "reject"]
MappingType = Literal["static", "csv", "sqlite", "mysql"]


@dataclass(frozen=True)
class Key:
    """What the file may say for one field."""

    default: str | None  # as it would be written; None: has to be written
    parse: Callable[..., Any]  # of the text, or of the words of a list
    limits: dict[str, Any]  # its other arguments
    is_list: bool = False
    is_path: bool = False  # relative to the directory of the file
    is_watched: bool = False  # its file is read at a start only: a change needs new workers
    is_secret: bool = False

    def value(self, written: str | list[str], directory: Path) -> Any:
        """Raises ValueError(what is wrong)."""
        if isinstance(written, list) and not self.is_list:
            raise ValueError(f"has a comma, but is no list: {QUOTE}")
        words = [written] if isinstance(written, str) else written
        if self.is_list:  # its words may also stand in one pair of quotation marks
            words = [word.strip() for text in words for word in text.split(",") if word.strip()]
        if self.is_path:
            words = [word and str(directory / word) for word in words]
        return self.parse(words if self.is_list else words[0], **self.limits)


def key(
    default: str | None, parse: Callable[..., T],
    is_secret: bool = False, is_list: bool = False, is_path: bool = False, is_watched: bool = False, **limits: Any,
) -> T:  # fmt: skip
    """A dataclass field for a `Key`; a type checker sees what its parser returns."""
    this = Key(default, parse, limits, is_list, is_path or is_watched, is_watched, is_secret)
    optional: Any = {} if default is None else {"default_factory": lambda: this.value(default, Path())}
    declared: T = field(repr=not is_secret, metadata={"key": this}, **optional)
    return declared


def keys_of(settings: type) -> dict[str, Key]:
    return {this.name: this.metadata["key"] for this in fields(settings) if "key" in this.metadata}


@dataclass(frozen=True)
class Certificate:
    cert: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    path: str
    loglevel: LogLevel = key("info", values.one_of, words=LogLevel)
    log: LogTarget = key("stdout", values.one_of, words=LogTarget)
    listen: tuple[Address, ...] = key(":25", values.listen_addresses, is_list=True)
    domain: str = key("", values.host_name)
    user: str = key("", values.account, known=pwd.getpwnam)
    group: str = key("", values.account, known=grp.getgrnam)
    workers: int = key("auto", values.worker_count)
    tls_cert: tuple[str, ...] = key("", each(values.readable), is_watched=True, is_list=True)
    tls_key: tuple[str, ...] = key("", each(values.readable), is_watched=True, is_secret=True, is_list=True)
    tls_min_version: TlsVersion = key("1.2", values.one_of, words=TlsVersion)
    read_timeout: float = key("5m", values.duration, most="1h")
    write_timeout: float = key("5m", values.duration, most="1h")
    connect_timeout: float = key("20s", values.duration, most="1h")
    upstream_timeout: float = key("4m", values.duration, most="1h")
    data_timeout: float = key("10m", values.duration, most="1h")
    dns_timeout: float = key("3s", values.duration, most="1h")
    drain_timeout: float = key("60s", values.duration, most="1h")
    max_message_bytes: int = key("20MiB", values.size, least="1kB", most="4096MiB")
    max_recipients: int = key("100", values.count, least=1, most=100_000)
    max_connections: int = key("5000", values.count, least=1, most=1_000_000)
    max_connections_per_ip: int = key("50", values.count, least=1, most=1_000_000)
    max_connection_rate: int = key("0", values.count, least=0, most=1_000_000)
    max_errors: int = key("20", values.count, least=1, most=1_000_000)
    recipient_delimiter: str = key("", values.delimiters)
    subdomains: bool = key("no", is_true)
    mixed_recipients: MixedRecipients = key("first", values.one_of, words=MixedRecipients)
    bare_newline: BareNewline = key("normalize", values.one_of, words=BareNewline)
    extensions: frozenset[str] = key(", ".join(EXTENSIONS), values.extension_names, is_list=True)
    strict_8bitmime: bool = key("no", is_true)
    kept_upstreams: int = key("4", values.count, least=1, most=100)
    upstream_tls: route.UpstreamTls = key(POLICY.upstream_tls, values.one_of, words=route.UpstreamTls)
    upstream_tls_ca: str = key(POLICY.upstream_tls_ca, values.readable, is_watched=True)
    xclient: route.Xclient = key(POLICY.xclient, values.one_of, words=route.Xclient)
    send_proxy: route.SendProxy = key(POLICY.send_proxy, values.one_of, words=route.SendProxy)
    server_order: route.ServerOrder = key(POLICY.server_order, values.one_of, words=route.ServerOrder)
    proxy_protocol_hosts: tuple[IPv4Network | IPv6Network, ...] = key("", each(values.network), is_list=True)
    xclient_hosts: tuple[IPv4Network | IPv6Network, ...] = key("", each(values.network), is_list=True)
    status_listen: Address | None = key("", lambda text: values.socket_address(text) if text else None)
    mappings: tuple[MappingSettings, ...]

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        return tuple(map(Certificate, self.tls_cert, self.tls_key))


@dataclass(frozen=True)
class StaticSettings:
    name: str
    policy: Policy
    server: tuple[Server, ...] = key(None, parse_servers)
    tls_verify: bool = key("true", parse_tls_verify)


@dataclass(frozen=True)
class CsvSettings:
    name: str
    policy: Policy
    where: str  # `willi.conf:12`, the line that names the file
    file: str = key(None, values.file_name, is_path=True)


@dataclass(frozen=True, kw_only=True)
class SqliteSettings:
    name: str
    policy: Policy
    file: str = key(None, values.file_name, is_path=True)
    query: str = key(None, values.lookup_query)
    timeout: ClassVar[float] = 2.0  # seconds, of which nearly all is waiting for a program that writes
    cache_ttl: ClassVar[float] = 0.0  # it is asked each time
    cache_size: ClassVar[int] = 1000
    stale_ttl: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class MysqlSettings:
    name: str
    policy: Policy
    host: tuple[Address, ...] = key("localhost", each(values.database_host, least=1), is_list=True)
    port: int = key("3306", values.count, least=1, most=65535)
    unix_socket: str = key("", str, is_path=True)
    user: str = key("", str)
    password: str = key("", str, is_secret=True)
    password_file: str = key("", values.readable, is_watched=True, is_secret=True)
    database: str = key("", str)
    tls_ca: str = key("", values.readable, is_watched=True)
    pool_size: int = key("5", values.count, least=1, most=1000)
    timeout: float = key("5s", values.duration, most="1h")
    query: str = key(None, values.lookup_query)
    cache_ttl: float = key("60s", values.duration, most="24h", zero=True)
    cache_size: int = key("100000", values.count, least=1, most=10_000_000)
    stale_ttl: float = key("1h", values.duration, most="168h", zero=True)

    @property
    def hosts(self) -> tuple[Address, ...]:
        return tuple(Address(host.host, host.port or self.port) for host in self.host)


MappingSettings = StaticSettings | CsvSettings | SqliteSettings | MysqlSettings


def paths_of(settings: Settings) -> Iterator[tuple[str, Key]]:
    """All files that it names, with their keys."""
    sections: list[tuple[Any, dict[str, Key]]] = [(settings, TOP_KEYS)]
    for mapping in settings.mappings:
        sections += [(mapping, keys_of(type(mapping))), (mapping.policy, POLICY_KEYS)]
    for section, keys in sections:
        for name, this in keys.items():
            value = getattr(section, name) if this.is_path else ""
            yield from ((path, this) for path in (value if this.is_list else [value]) if path)


TYPES: dict[str, type[MappingSettings]] = {
    "static": StaticSettings, "csv": CsvSettings, "sqlite": SqliteSettings, "mysql": MysqlSettings,
}  # fmt: skip
TYPE = Key(None, values.one_of, {"words": MappingType})
TOP_KEYS = keys_of(Settings)
POLICY_KEYS = {this.name: TOP_KEYS[this.name] for this in fields(Policy)}  # for all mappings, or for one of them
MAPPING_KEYS = {kind: {"type": TYPE} | keys_of(settings) | POLICY_KEYS for kind, settings in TYPES.items()}
ALL_KEYS = set(TOP_KEYS).union(*MAPPING_KEYS.values())
