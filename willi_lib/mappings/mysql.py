"""Any of several MySQL or MariaDB hosts: connections to them, one query, and the route in its row.

The pool is a list and a semaphore, made for greenlets that run into time limits. It never
waits for the network while others wait for the pool (DBUtils connects, pings and rolls
back under its lock, so that one host that hangs stops everybody), and a connection comes
back only after its answer has been read to the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic

import gevent
import pymysql
from gevent import ssl
from gevent.lock import BoundedSemaphore

from ..config import MysqlSettings
from ..files import open_file, read_file
from ..hosts import Address
from ..routing.route import HostFacts, LookupFailed, Policy, Route, parse_servers, parse_tls_verify

HOST_REST = 60.0  # seconds a host that failed is tried last, as for an upstream
MAX_IDLE = 60.0  # seconds a connection is kept unused: firewalls forget it after some minutes and tell nobody
POLL_INTERVAL = 0.05  # seconds between looks for a free connection when the server takes no more of them
MAX_ROUTES = 10_000  # different routes kept as one object each
# What to do, by the words of PyMySQL, which has neither of its optional packages, and of Python.
REMEDIES = {
    "'cryptography' package": "logging in with sha2 needs tls_ca or unix_socket",
    "'pynacl' package": "Willi cannot log in with ed25519; have the account IDENTIFIED VIA mysql_native_password",
    "not configured (2059)": "Willi cannot log in by that plugin; have the account use mysql_native_password or"
    " caching_sha2_password",
    "can't start new thread": "the system gives Willi no more threads; look at its memory, TasksMax and `ulimit -u`",
}
NOBODY = "nobody.invalid"  # what `check` asks for

# After these a new connection may well get an answer: 1047 a Galera node that is not ready, 1053 shutdown, 1152 to 1184
# network, 1317 and 1927 killed, 2000 to 2999 lost, also in the words of a router or proxy in between, 3169 killed,
# 4031 closed by the server for having been idle.
CONNECTION_ERRORS = frozenset((1047, 1053, 1152, 1158, 1159, 1160, 1161, 1184, 1317, 1927, 3169, 4031))
DRIVER_ERRORS = range(2000, 3000)  # PyMySQL's own, too: it is unknown what is still to come on this connection
# The server gave up this query: lock waits and deadlocks, max_statement_time of MariaDB, max_execution_time of MySQL.
GAVE_UP_ERRORS = frozenset((1205, 1213, 1689, 1969, 3024, 3058, 3572))
# The server, not the key, is why there is no answer now, so that another server may have one: files that cannot be
# read, full disks, no memory, threads, connections or files left, damaged tables, tables that are being changed, limits
# of the account, read-only, offline or not yet a member of its group. 1105: Vitess, of a shard without a primary.
NOT_NOW_ERRORS = frozenset((
    1012, 1015, 1016, 1018, 1020, 1021, 1023, 1024, 1026, 1028, 1030, 1034, 1035, 1037, 1038, 1039, 1040, 1041, 1077,
    1078, 1079, 1080, 1105, 1114, 1129, 1135, 1180, 1194, 1195, 1203, 1206, 1223, 1226, 1290, 1296, 1297, 1412, 1429,
    1430, 1431, 1432, 1461, 1615, 1637, 1696, 1712, 1728, 1812, 1814, 1815, 1836, 1877, 3032, 3100, 3101, 3168, 3170,
))  # fmt: skip
# The account, the table, a column, an index, a procedure or the right to it is not there, or another one than the query
# needs, whatever the key: it may be restored or altered. 1045 and 1449: of the definer of a view or procedure, too.
NOT_THERE_ERRORS = frozenset((
    1044, 1045, 1049, 1052, 1054, 1142, 1143, 1146, 1176, 1305, 1318, 1356, 1370, 1449, 1698, 1735, 1747, 1932,
))  # fmt: skip
PROXY_ERRORS = range(9000, 10000)  # of ProxySQL (9001: no server within its time) and of TiDB
# Said when the characters of a key do not exist in the character set of the column: illegal mix, cannot convert.
UNKNOWN_CHARACTER_ERRORS = frozenset((1267, 1270, 1271, 3854))


class Down(Exception):
    """The database gave no answer; the text says why, for each host.

    not_there: a host has answered that something is not there that user, database or query name.
    """

    def __init__(self, text: str, not_there: bool = False) -> None:
        super().__init__(text)
        self.not_there = not_there


class NotNow(Down):
    """The server has answered that it has no answer now."""


class TooSlow(NotNow):
    """The server gave up this query: that may be a matter of this key."""


class _Lost(Exception):
    """A connection ended before the answer came."""


@dataclass
class _Connection:
    host: Address
    driver: pymysql.Connection[pymysql.cursors.Cursor]
    idle_since: float = 0.0


class Database:
    """One query, asked on any of the hosts."""

    def __init__(self, settings: MysqlSettings, mapping: str) -> None:
        """mapping: the name that routes bear.

        Raises ValueError: a query without `?`, or a tls_ca or password_file that cannot be used.
        """
        self._settings = settings
        self._mapping = mapping
        self._hosts = (Address("", 0),) if settings.unix_socket else settings.hosts
        self._password = _password(settings)
        self._statement, self._parameters = statement_of(settings.query)
        self._compares_once = self._parameters == 1 and bool(_EQUALITY.search(settings.query))
        self._tls = _client_context(settings) if settings.tls_ca else None
        self._slots = BoundedSemaphore(settings.pool_size)
        self._idle: list[_Connection] = []  # the one that was used last is the last
        self._open = 0  # connections, idle ones included
        self._failed: dict[Address, float] = {}  # and when
        self._answered: dict[Address, float] = {}  # and when last

    def ask(self, key: str) -> Route | None:
        """The route in the first row for this key, within `timeout`. Raises Down, TooSlow, LookupFailed.

        To be called in a greenlet that nobody else ends.
        """
        seconds = self._settings.timeout
        deadline = monotonic() + seconds
        if not self._slots.acquire(timeout=seconds):
            raise Down(f"no free connection within {seconds:g} s")
        try:
            return self._ask_hosts(key, deadline)
        finally:
            self._slots.release()

    def _ask_hosts(self, key: str, deadline: float) -> Route | None:
        """Ask on an idle connection or a new one, host after host. A lost connection is tried again once.

        Hosts that failed come last. The time that is left is divided among those that have not been tried.
        """
        untried = sorted(self._hosts, key=self._rests)
        faults: list[str] = []
        lost = slow = answered = not_there = False
        while (seconds := deadline - monotonic()) > 0 and (untried or not answered):
            connection = self._take_idle(untried[:1] or self._hosts)
            if connection is None and not untried:
                if not self._open:
                    break
                gevent.sleep(POLL_INTERVAL)  # a server that takes no more connections still answers on the others'
                continue
            host = connection.host if connection else untried[0]
            if host in self._failed:
                self._failed[host] = monotonic()  # one tries whether it is back, the others need not wait
            try:
                return self._ask_host(host, connection, key, seconds / max(1, len(untried)))
            except (_Lost, Down) as why:
                faults.append(f"{self._name_of(host)}: {why}")
                if isinstance(why, _Lost) and not lost:
                    lost = True
                    continue
                not_there = not_there or (isinstance(why, Down) and why.not_there)
                slow = slow or isinstance(why, TooSlow)
                answered = answered or isinstance(why, NotNow)
                if not isinstance(why, TooSlow):
                    self._failed[host] = monotonic()
            untried = [other for other in untried if other != host]
        raise (TooSlow if slow else Down)("; ".join(faults), not_there)

    def _ask_host(self, host: Address, connection: _Connection | None, key: str, seconds: float) -> Route | None:
        """Ask on this connection, or on a new one. Raises Down, _Lost, LookupFailed."""
        began = monotonic()
        try:
            with gevent.Timeout(seconds):
                return self._ask_on(connection or self._connect(host), key)
        except (_Lost, NotNow) as why:
            if not isinstance(why, TooSlow):
                self._close_idle(host)
            raise
        except gevent.Timeout:
            if self._answered.get(host, 0.0) < began:  # else it is a matter of this key
                self._close_idle(host)
            raise Down(f"no answer within {seconds:.1f} s") from None

    def _ask_on(self, connection: _Connection, key: str) -> Route | None:
        """Ask on this connection, and put it back if it may be used again. Raises NotNow, _Lost, LookupFailed."""
        usable = False
        try:
            names, row = _execute(connection, self._statement, (key,) * self._parameters)
            usable = True
        except pymysql.MySQLError as error:
            number = _number(error)
            if not connection.driver.open or number in CONNECTION_ERRORS or number in DRIVER_ERRORS:
                raise _Lost(_text(error)) from None
            if number in NOT_NOW_ERRORS or number in NOT_THERE_ERRORS or number in PROXY_ERRORS:
                raise NotNow(_text(error), number in NOT_THERE_ERRORS) from None
            usable = number >= 1000
            if number in GAVE_UP_ERRORS:
                raise TooSlow(_text(error)) from None
            if number in UNKNOWN_CHARACTER_ERRORS and not key.isascii() and self._compares_once:
                return None  # no row can have this key; of several comparisons, another one might have found it
            raise LookupFailed(_text(error)) from None
        finally:
            if usable:
                self._put(connection)
            else:
                self._close(connection)
        return route_of(self._settings.policy, self._mapping, key, names, row)

    # -- connections

    def close(self) -> None:
        """Take leave of the server on all connections that nobody uses."""
        while self._idle:
            self._close(self._idle.pop())

    def _connect(self, host: Address) -> _Connection:
        """Raises Down."""
        settings = self._settings
        try:
            driver = pymysql.connect(
                host=host.host or "localhost",
                port=host.port,
                unix_socket=settings.unix_socket or None,
                user=settings.user or None,
                password=self._password,
                database=settings.database or None,
                charset="utf8mb4",
                ssl=self._tls,
                ssl_disabled=self._tls is None,
                autocommit=True,  # else the first query would freeze what all later ones see
                init_command="SET SESSION sql_select_limit = 1",  # whatever the query would return: one row
                connect_timeout=settings.timeout,
                read_timeout=settings.timeout,  # these three only back up the time limits of our own
                write_timeout=settings.timeout,
                program_name="willi",
            )
        except (pymysql.MySQLError, OSError) as error:
            raise Down(_remedy(_text(error)), _number(error) in NOT_THERE_ERRORS) from None
        except RuntimeError as error:
            raise Down(_remedy(str(error))) from None
        except Exception as error:  # noqa: BLE001 -- PyMySQL reads a greeting without looking where it ends
            raise Down(f"no greeting of a database: {error!r}") from None
        self._open += 1
        return _Connection(host, driver)

    def _take_idle(self, hosts: Sequence[Address]) -> _Connection | None:
        """The one that was used last, to one of these hosts."""
        while self._idle and self._idle[0].idle_since < monotonic() - MAX_IDLE:
            self._close(self._idle.pop(0))
        for connection in reversed(self._idle):
            if connection.host in hosts:
                self._idle.remove(connection)
                return connection
        return None

    def _put(self, connection: _Connection) -> None:
        connection.idle_since = self._answered[connection.host] = monotonic()
        self._failed.pop(connection.host, None)
        self._idle.append(connection)

    def _close(self, connection: _Connection) -> None:
        self._open -= 1
        with suppress(pymysql.MySQLError):  # it was closed already
            connection.driver.close()

    def _close_idle(self, host: Address) -> None:
        """They are not better than the one that has just failed."""
        dead = [connection for connection in self._idle if connection.host == host]
        self._idle = [connection for connection in self._idle if connection.host != host]
        for connection in dead:
            self._close(connection)

    def _rests(self, host: Address) -> bool:
        return monotonic() - self._failed.get(host, -HOST_REST) < HOST_REST

    def _name_of(self, host: Address) -> str:
        """As an administrator calls it."""
        return str(host) if host.host else self._settings.unix_socket

    # -- for `check`

    def inspect_hosts(self) -> tuple[HostFacts, ...]:
        """Connect to each, have the server prepare the query, and run it."""
        return tuple(map(self._inspect, self._hosts))

    def _inspect(self, host: Address) -> HostFacts:
        name, seconds = self._name_of(host), self._settings.timeout
        try:
            with gevent.Timeout(seconds, Down(f"no answer within {seconds:g} s")):
                connection = self._connect(host)
                try:
                    version = _execute(connection, "SELECT VERSION()")[1]
                    tls = _execute(connection, "SHOW SESSION STATUS LIKE 'Ssl_version'")[1]
                    _execute(connection, "PREPARE willi FROM %s", (self._settings.query,))
                    names, row = _execute(connection, self._statement, (NOBODY,) * self._parameters)
                finally:
                    self._close(connection)
            route_of(self._settings.policy, self._mapping, NOBODY, names, row)
        except pymysql.MySQLError as error:
            return HostFacts(name, host.host, fault=_text(error))
        except (Down, LookupFailed) as fault:
            return HostFacts(name, host.host, fault=str(fault), answered=isinstance(fault, LookupFailed | NotNow))
        text = f"{version[0] if version else '?'}, {f'{tls[1]}, certificate verified' if tls and tls[1] else 'no TLS'}"
        return HostFacts(name, host.host, str(tls[1]) if tls else "", f"{text}, columns {', '.join(names)}")


def _execute(
    connection: _Connection, statement: str, values: tuple[str, ...] = ()
) -> tuple[list[str], tuple[object, ...] | None]:
    """The names of the columns and the first row."""
    with connection.driver.cursor() as cursor:
        cursor.execute(statement, values)
        return [column[0] for column in cursor.description or ()], cursor.fetchone()


def _password(settings: MysqlSettings) -> bytes:
    """Raises ValueError."""
    if not settings.password_file:
        return settings.password.encode()
    try:
        password = read_file(settings.password_file).rstrip(b"\r\n")
    except OSError as error:
        raise ValueError(f"password_file: cannot read {settings.password_file}: {error.strerror}") from None
    if not password or b"\n" in password:
        raise ValueError(f"password_file: {settings.password_file} must be one line, the password")
    return password


def _client_context(settings: MysqlSettings) -> ssl.SSLContext:
    """gevent's context, as the standard one would block every session. Raises ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = not settings.unix_socket
    try:
        open_file(settings.tls_ca).close()
        context.load_verify_locations(settings.tls_ca)
    except OSError as error:
        raise ValueError(f"tls_ca: {settings.tls_ca}: {getattr(error, 'reason', None) or error.strerror}") from None
    return context


def _text(error: Exception) -> str:
    """`message (number)`, or what there is."""
    number, *text = error.args or ("",)
    return f"{text[0]} ({number})" if text else str(error) or type(error).__name__


def _number(error: Exception) -> int:
    """Of the server or the driver; 0: none."""
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0


def _remedy(text: str) -> str:
    """What a failed connection says, and what to do if that is not in it."""
    return next((f"{text}: {remedy}" for words, remedy in REMEDIES.items() if words in text), text)


# The query and its rows

_EQUALITY = re.compile(r"=\s*(?:\w+\s*\(\s*)*\?|\?\s*=")  # as in `pattern = LOWER(?)`, not `? IN (a, b)`
_TOKEN = re.compile(
    r"""'(?:[^'\\]|\\.|'')*' | "(?:[^"\\]|\\.|"")*" | `[^`]*` | --\s[^\n]* | \#[^\n]* | /\*(?!!).*?\*/ | \? """,
    re.VERBOSE | re.DOTALL,
)


def statement_of(query: str) -> tuple[str, int]:
    """The query as PyMySQL wants it, and the number of its parameters.

    A `?` in quotation marks or in a comment is none. Raises ValueError if there is no other.
    """
    parameters = 0
    parts, at = [], 0
    for token in _TOKEN.finditer(query):
        if token[0] == "?":
            parts += [query[at : token.start()].replace("%", "%%"), "%s"]
            at = token.end()
            parameters += 1
    if not parameters:
        raise ValueError("query: has no ? outside quotation marks, which stands for the address or domain to look up")
    return "".join([*parts, query[at:].replace("%", "%%")]), parameters


def route_of(
    policy: Policy, mapping: str, key: str, names: Sequence[str], row: Sequence[object] | None
) -> Route | None:
    """None if there is no row, or no server in it. Raises LookupFailed, and NotNow for other columns."""
    columns = [name.lower() for name in names]
    if sorted(columns) not in (["server"], ["server", "tls_verify"]):
        found = ", ".join(names) or "none"
        text = f"the query must return the columns server and, if you like, tls_verify, not: {found}"
        if not names:  # a procedure may give nothing for some keys, and rows for others
            raise LookupFailed(text)
        raise NotNow(text, not_there=True)  # of a `SELECT *` whose table has been altered, say
    values = dict(zip(columns, row or (), strict=False))
    try:
        server, tls_verify = _column_text(values.get("server")), _column_text(values.get("tls_verify"))
        return _route(server, parse_tls_verify(tls_verify or "true"), policy, mapping) if server else None
    except ValueError as fault:
        raise LookupFailed(f"the row for {key!r}: {fault}") from None


@lru_cache(MAX_ROUTES)
def _route(server: str, tls_verify: bool, policy: Policy, mapping: str) -> Route:
    """Equal routes are one object, which saves memory. Raises ValueError."""
    return Route(parse_servers(server), tls_verify, policy, mapping)


def _column_text(value: object) -> str:
    """Text, whatever the type of the column; empty for NULL. Raises ValueError."""
    if value is None:
        return ""
    if isinstance(value, bytes):  # BIT, BINARY or BLOB
        return str(value[0]) if value in (b"\0", b"\1") else value.decode().strip()
    return str(value).strip()
