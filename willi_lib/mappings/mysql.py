"""Any of several MySQL or MariaDB hosts: connections to them, one query, and the route in its row.

The pool never waits for the network while others wait for the pool (DBUtils connects, pings and rolls back under its
lock, so that one host that hangs stops all sessions), and a connection comes back only after its answer has been read
to the end.
"""

from __future__ import annotations

import re
from contextlib import suppress
from time import monotonic
from typing import TypeAlias

import gevent
import pymysql
from gevent import ssl
from gevent.lock import BoundedSemaphore
from gevent.queue import Empty, LifoQueue

from ..config import MysqlSettings
from ..files import open_file, read_file
from ..hosts import Address
from ..net.own_lack import is_own_lack
from ..net.pem_files import fault_of_authorities
from ..routing.route import HostFacts, LookupFailed, Route
from .row import WrongColumns, route_of
from .source import NOBODY, Down, NotNow, OwnLack, TooSlow, statement_of

HOST_REST = 60.0  # seconds a host that failed is tried last, as for an upstream
MAX_IDLE = 60.0  # seconds a connection is kept unused: firewalls forget it after some minutes and tell no one
# What to do, by the words of PyMySQL, which has neither of its optional packages, and of Python.
REMEDIES = {
    "'cryptography' package": "logging in with sha2 needs tls_ca or unix_socket",
    "'pynacl' package": "Willi cannot log in with ed25519; have the account IDENTIFIED VIA mysql_native_password",
    "not configured (2059)": "Willi cannot log in by that plugin; have the account use mysql_native_password or"
    " caching_sha2_password",
    "can't start new thread": "the system gives Willi no more threads; look at its memory, TasksMax and `ulimit -u`",
}

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
TOO_MANY_CONNECTIONS = frozenset((1040, 1203, 1226))  # for the server, or for the account


class _Lost(Down):
    """A connection ended before the answer came."""


class _TooMany(Down):
    """The server takes no more connections."""


Connection: TypeAlias = "pymysql.Connection[pymysql.cursors.Cursor]"


class _Query:
    """What is asked, on any connection."""

    def __init__(self, settings: MysqlSettings, mapping: str) -> None:
        """Raises ValueError: it has no `?`."""
        self._policy, self._mapping = settings.policy, mapping
        self._statement, self._parameters = statement_of(settings.query)
        self._compares_once = self._parameters == 1 and bool(_EQUALITY.search(settings.query))

    def ask(self, connection: Connection, key: str) -> tuple[Route | None, list[str]]:
        """The route in the first row, and the names of the columns. Raises Down, LookupFailed."""
        try:
            names, row = _execute(connection, self._statement, (key,) * self._parameters)
            return route_of(self._policy, self._mapping, key, names, row), names
        except WrongColumns as why:
            raise NotNow(str(why), not_there=True) from None
        except pymysql.MySQLError as error:
            # No row can have such a key; but of several comparisons, another one might have found it.
            if _number(error) in UNKNOWN_CHARACTER_ERRORS and not key.isascii() and self._compares_once:
                return None, []
            raise _failure(error, connection.open) from None


class _Host:
    """One server: its connections, and whether it answers."""

    def __init__(self, address: Address, settings: MysqlSettings, password: bytes, tls: ssl.SSLContext | None) -> None:
        self._address = address
        self._settings = settings
        self._password = password
        self._tls = tls
        self.name = str(address) if address.host else settings.unix_socket
        self.idle: LifoQueue[tuple[Connection, float]] = LifoQueue()  # and since when
        self.open = 0  # connections, idle ones included
        self._failed = self._answered = float("-inf")  # when last; `_failed` is none after an answer

    def rests(self) -> bool:
        return monotonic() - self._failed < HOST_REST

    def ask(self, query: _Query, key: str, seconds: float) -> Route | None:
        """Raises Down, LookupFailed. A lost connection is tried again once."""
        began = monotonic()
        if self._failed > 0:
            self._failed = began  # one session tries whether it is back, the others need not wait
        try:
            with gevent.Timeout(seconds):
                try:
                    return self._ask_on(self._connection(), query, key)
                except _Lost:
                    self.close_idle()  # they are no better
                    return self._ask_on(self._connection(), query, key)
        except (TooSlow, OwnLack):
            raise
        except Down:
            self._note_failed()
            raise
        except gevent.Timeout:
            if self._answered < began:  # else it is a matter of this key
                self._note_failed()
            raise Down(f"no answer within {seconds:.1f} s") from None

    def _note_failed(self) -> None:
        self._failed = monotonic()
        self.close_idle()

    def _connection(self) -> Connection:
        """One that is idle, or a new one, or, if there can be no more, the next one that becomes idle. Raises Down."""
        with suppress(Empty):
            connection, since = self.idle.get_nowait()
            if since > monotonic() - MAX_IDLE:
                return connection
            self._close(connection)  # those below have been idle for longer
            self.close_idle()
        try:
            return self._connect()
        except (_TooMany, OwnLack):
            if not self.open:
                raise
            return self.idle.get()[0]

    def _ask_on(self, connection: Connection, query: _Query, key: str) -> Route | None:
        """The connection comes back to the pool if it may be used again. Raises Down, LookupFailed."""
        usable = True
        try:
            return query.ask(connection, key)[0]
        except BaseException as failure:
            usable = isinstance(failure, TooSlow | LookupFailed)
            raise
        finally:
            if usable:
                self._answered, self._failed = monotonic(), float("-inf")
                self.idle.put((connection, self._answered))
            else:
                self._close(connection)

    def _connect(self) -> Connection:
        """Raises Down."""
        settings = self._settings
        try:
            connection = pymysql.connect(
                host=self._address.host or "localhost",
                port=self._address.port,
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
        except Exception as error:  # noqa: BLE001 -- PyMySQL reads a greeting without looking where it ends
            raise _refusal(error) from None
        self.open += 1
        return connection

    def _close(self, connection: Connection) -> None:
        self.open -= 1
        with suppress(pymysql.MySQLError):  # it was closed already
            connection.close()

    def close_idle(self) -> None:
        while not self.idle.empty():
            self._close(self.idle.get()[0])

    def inspect(self, query: _Query) -> HostFacts:
        """Connect and run the query, for `check`."""
        seconds, host = self._settings.timeout, self._address.host
        try:
            with gevent.Timeout(seconds, Down(f"no answer within {seconds:g} s")):
                connection = self._connect()
                try:
                    version = _execute(connection, "SELECT VERSION()")[1]
                    tls = _execute(connection, "SHOW SESSION STATUS LIKE 'Ssl_version'")[1]
                    names = query.ask(connection, NOBODY)[1]
                finally:
                    self._close(connection)
        except (pymysql.MySQLError, Down, LookupFailed) as fault:
            answered = not isinstance(fault, Down) or isinstance(fault, NotNow)
            return HostFacts(self.name, host, fault=_text(fault), answered=answered)
        protection = f"{tls[1]}, certificate verified" if tls and tls[1] else "no TLS"
        text = f"{version[0] if version else '?'}, {protection}, columns {', '.join(names)}"
        return HostFacts(self.name, host, str(tls[1]) if tls else "", text)


class Database:
    """One query, asked on any of the hosts."""

    def __init__(self, settings: MysqlSettings, mapping: str) -> None:
        """mapping: the name that routes bear.

        Raises ValueError: a query without `?`, or a tls_ca or password_file that cannot be used.
        """
        self._settings = settings
        self._query = _Query(settings, mapping)
        password = _password(settings)
        tls = _client_context(settings) if settings.tls_ca else None
        addresses = (Address("", 0),) if settings.unix_socket else settings.hosts
        self._hosts = [_Host(address, settings, password, tls) for address in dict.fromkeys(addresses)]
        self._slots = BoundedSemaphore(settings.pool_size)

    def ask(self, key: str) -> Route | None:
        """The route in the first row for this key, within `timeout`. Raises Down, TooSlow, OwnLack, LookupFailed.

        Hosts that failed come last. The time that is left is divided among those that have not been tried.
        To be called in a greenlet that nothing else ends.
        """
        seconds = self._settings.timeout
        deadline = monotonic() + seconds
        if not self._slots.acquire(timeout=seconds):
            raise Down(f"no free connection within {seconds:g} s")
        try:
            hosts = sorted(self._hosts, key=_Host.rests)
            faults: list[tuple[_Host, Down]] = []
            for untried, host in zip(range(len(hosts), 0, -1), hosts, strict=True):
                try:
                    if (seconds := deadline - monotonic()) <= 0:
                        raise Down("no time was left for it")
                    return host.ask(self._query, key, seconds / untried)
                except Down as why:
                    faults.append((host, why))
        finally:
            self._slots.release()
        kind = next((kind for kind in (OwnLack, TooSlow) if any(isinstance(why, kind) for _, why in faults)), Down)
        raise kind("; ".join(f"{host.name}: {why}" for host, why in faults), any(why.not_there for _, why in faults))

    def inspect_hosts(self) -> tuple[HostFacts, ...]:
        """Each, as it answers just now."""
        return tuple(host.inspect(self._query) for host in self._hosts)

    def close(self) -> None:
        """Take leave of the servers on all connections that are not in use."""
        for host in self._hosts:
            host.close_idle()


def _execute(
    connection: Connection, statement: str, values: tuple[str, ...] = ()
) -> tuple[list[str], tuple[object, ...] | None]:
    """The names of the columns and the first row."""
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        return [column[0] for column in cursor.description or ()], cursor.fetchone()


def _failure(error: pymysql.MySQLError, is_open: bool) -> Down | LookupFailed:
    """What the failure of a query means. Of an error without a number, it is unknown what is still to come."""
    number, text = _number(error), _text(error)
    if not is_open or number < 1000 or number in CONNECTION_ERRORS or number in DRIVER_ERRORS:
        return _Lost(text)
    if number in NOT_NOW_ERRORS or number in NOT_THERE_ERRORS or number in PROXY_ERRORS:
        return NotNow(text, number in NOT_THERE_ERRORS)
    return TooSlow(text) if number in GAVE_UP_ERRORS else LookupFailed(text)


def _refusal(error: Exception) -> Down:
    """What the failure of a connection means."""
    if not isinstance(error, pymysql.MySQLError | OSError | RuntimeError | MemoryError):
        return Down(f"no greeting of a database: {error!r}")
    text = _text(error)
    text = next((f"{text}: {remedy}" for words, remedy in REMEDIES.items() if words in text), text)
    if is_own_lack(getattr(error, "original_exception", error)):
        return OwnLack(text)
    number = _number(error)
    return _TooMany(text) if number in TOO_MANY_CONNECTIONS else Down(text, number in NOT_THERE_ERRORS)


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
        raise ValueError(f"tls_ca: {settings.tls_ca}: {fault_of_authorities(settings.tls_ca, error)}") from None
    return context


def _text(error: Exception) -> str:
    """`message (number)`, or what there is."""
    number, *text = error.args or ("",)
    return f"{text[0]} ({number})" if text else str(error) or type(error).__name__


def _number(error: Exception) -> int:
    """Of the server or the driver; 0: none."""
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0


_EQUALITY = re.compile(r"=\s*(?:\w+\s*\(\s*)*\?|\?\s*=")  # as in `pattern = LOWER(?)`, not `? IN (a, b)`
