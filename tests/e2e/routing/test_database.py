"""`Database` against a real MariaDB: characters, columns, the pool, several hosts."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.server
import gevent.socket
import pymysql.connections
import pytest

from tests.support.certificates import Authority
from tests.support.descriptors import Descriptors
from tests.support.dns import DnsServer
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port
from tests.support.mariadb import MOST_TIME, PASSWORD, QUERY, USER, Mariadb
from willi_lib.config import MysqlSettings
from willi_lib.hosts import Address
from willi_lib.mappings.mysql import Connection, Database
from willi_lib.mappings.source import Down, OwnLack, TooSlow
from willi_lib.net.resolver import Resolver
from willi_lib.routing.route import LookupFailed, Policy, Route, parse_servers

Open = Callable[..., Database]
USE_NATIVE = "have the account IDENTIFIED VIA mysql_native_password"

HOSTILE = [
    "o'brien@b.example",
    '"a\\"b"@b.example',
    "back\\slash@b.example",
    "back\\'slash@b.example",
    "100%@b.example",
    "%s@b.example",
    "%(x)s@b.example",
    "a_b@b.example",
    "' or '1'='1@b.example",
    "'; drop table routes; -- @b.example",
    "what?@b.example",
    "nul\0@b.example",
    "line\n@b.example",
    "\x1a@b.example",
    "jürgen@b.example",
    "Ω@b.example",
    "日本@b.example",
    "😀@b.example",
    "x" * 500 + "@b.example",
]


@pytest.fixture(autouse=True)
def _in_gevent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Willi's processes replace all sockets; here PyMySQL's are enough. And nothing waits for ever."""
    monkeypatch.setattr(pymysql.connections, "socket", gevent.socket)
    with gevent.Timeout(PATIENCE * 2):
        yield


@pytest.fixture
def open_database(mariadb: Mariadb) -> Open:
    def open_(name: str, query: str = QUERY, **settings: Any) -> Database:
        defaults = {
            "host": (Address(HOST, mariadb.port),), "user": USER, "password": PASSWORD, "database": name,
            "timeout": PATIENCE / 2,
        }  # fmt: skip
        made = MysqlSettings(name="t", policy=Policy(), query=query, **{**defaults, **settings})
        return Database(made, "mysql:t")

    return open_


def to(server: str, tls_verify: bool = True) -> Route:
    return Route(parse_servers(server), tls_verify)


def together(*works: Callable[[], object]) -> list[object]:
    greenlets = [gevent.spawn(work) for work in works]
    gevent.joinall(greenlets)
    return [greenlet.value if greenlet.successful() else greenlet.exception for greenlet in greenlets]


def open_connections(database: Database) -> tuple[int, int]:
    """All of them, and the idle ones; with nothing under way they must be the same."""
    return sum(host.open for host in database._hosts), len(idle_connections(database))


def idle_connections(database: Database) -> list[Connection]:
    return [connection for host in database._hosts for connection, _ in host.idle.queue]


# Keys and rows


@pytest.mark.parametrize("charset", ["latin1", "utf8mb3", "utf8mb4", "ascii"])
def test_no_key_breaks_out_of_the_query_or_matches_another_row(mariadb: Mariadb, open_database: Open, charset: str):
    database = open_database(mariadb.table(("ann@b.example", "mx1", True), charset=charset))
    for key in HOSTILE:
        assert database.ask(key) is None, key
    assert database.ask("ann@b.example") == to("mx1")
    assert open_connections(database) == (1, 1), "not one of them cost a connection"


@pytest.mark.parametrize(("charset", "strange"), [("latin1", "jürgen"), ("utf8mb3", "日本"), ("utf8mb4", "😀")])
def test_a_key_is_found_in_any_character_set_that_has_its_characters(
    mariadb: Mariadb, open_database: Open, charset: str, strange: str
):
    keys = [f"{strange}@b.example", "o'brien@b.example", "back\\slash@b.example", "100%@b.example", "what?@b.example"]
    database = open_database(mariadb.table(*((key, f"mx{at}", False) for at, key in enumerate(keys)), charset=charset))
    assert [database.ask(key) for key in keys] == [to(f"mx{at}", False) for at in range(len(keys))]


def test_every_question_mark_is_the_key(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True), ("what?", "mx2", True))
    query = "SELECT server FROM routes WHERE pattern = ? AND '100%' LIKE '%\\%' AND (? = ? OR pattern = 'what?')"
    assert open_database(name, query).ask("b.example") == to("mx1")
    assert open_database(name, query).ask("o'brien") is None


def test_of_several_rows_only_the_first_is_sent(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(*((f"{number}.example", f"mx{number}", True) for number in range(100)))
    database = open_database(name, "SELECT server FROM routes WHERE pattern <> ? ORDER BY pattern DESC")
    assert database.ask("x") == to("mx99")
    connection = idle_connections(database)[-1]
    assert connection.affected_rows() == 1


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT server FRM routes WHERE pattern = ?", "You have an error in your SQL syntax"),
        ("SET @x = ?", "not: none"),
        ("SELECT 'mx' AS server, 'perhaps' AS tls_verify FROM routes WHERE ? <> ''", "'perhaps': tls_verify must be"),
    ],
)
def test_a_query_that_gives_no_route_says_why_and_costs_no_connection(
    mariadb: Mariadb, open_database: Open, query: str, why: str
):
    database = open_database(mariadb.table(("b.example", "mx1", True)), query)
    for _ in range(3):
        with pytest.raises(LookupFailed) as failure:
            database.ask("b.example")
        assert why in str(failure.value)
    assert open_connections(database) == (1, 1)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT * FROM routes WHERE pattern = ?", "not: pattern, server, tls_verify"),
        ("SELECT 1 AS server, 'perhaps' AS tls_verify, ? AS server", "not: server, tls_verify, server"),
    ],
)
def test_other_columns_than_a_route_has_are_a_matter_of_the_table_and_of_no_key(
    mariadb: Mariadb, open_database: Open, query: str, why: str
):
    with pytest.raises(Down, match=f"{why}$") as failure:
        open_database(mariadb.table(("b.example", "mx1", True)), query).ask("b.example")
    assert failure.value.not_there


def test_a_stored_procedure_will_do(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True), ("c.example", "mx2", True))
    mariadb.query(
        f"CREATE PROCEDURE {name}.route(p VARCHAR(255)) SELECT server FROM {name}.routes WHERE pattern = p"
    )  # fmt: skip
    database = open_database(name, "CALL route(?)")
    assert [database.ask(key) for key in ("b.example", "x", "c.example")] == [to("mx1"), None, to("mx2")]


def test_what_another_connection_changes_is_seen(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name)
    assert database.ask("b.example") == to("mx1")
    mariadb.query(f"UPDATE {name}.routes SET server = 'mx2'")
    assert database.ask("b.example") == to("mx2")


# The pool


def test_connections_are_used_again_and_never_more_than_pool_size(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, "SELECT server FROM routes WHERE pattern = ? AND SLEEP(0.02) = 0", pool_size=3)
    assert together(*[lambda: database.ask("b.example")] * 20) == [to("mx1")] * 20
    assert open_connections(database) == (3, 3)
    assert len(mariadb.connections(name)) == 3


def test_killed_connections_are_replaced_without_a_failure(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, pool_size=4)
    for _ in range(3):
        assert together(*[lambda: database.ask("b.example")] * 4) == [to("mx1")] * 4
        mariadb.kill_connections(name)
    assert database.ask("b.example") == to("mx1")
    assert open_connections(database) == (1, 1), "with one all others were thrown away"


def test_a_query_that_is_killed_is_tried_once_more(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    query = "SELECT server FROM routes WHERE pattern = ? AND SLEEP(1) = 0"
    database = open_database(name, query)
    asking = gevent.spawn(database.ask, "b.example")
    wait_for_state(mariadb, name, "User sleep")
    mariadb.kill_connections(name)
    assert asking.get() == to("mx1")
    assert open_connections(database) == (1, 1)


def wait_for_state(mariadb: Mariadb, database: str, state: str) -> None:
    """Until a connection that uses this database does that."""
    query = "SELECT id FROM information_schema.processlist WHERE db = %s AND state = %s"
    while not mariadb.query(query, database, state):
        gevent.sleep(0.01)


def hasten(database: Database, seconds: float) -> None:
    """Give each further question that much time."""
    database._settings = replace(database._settings, timeout=seconds)


def test_nobody_ever_gets_the_answer_to_another_key(mariadb: Mariadb, open_database: Open):
    """Connections are killed and run into time limits all the while. The limit follows what this machine can do."""
    name = mariadb.table(*((f"{number}.example", f"mx{number}", True) for number in range(200)))
    query = "SELECT server FROM routes WHERE pattern = ? AND SLEEP(RAND() * 0.03) = 0"
    database = open_database(name, query, pool_size=8)
    seconds = 0.04

    def kill() -> None:
        for _ in range(50):
            mariadb.kill_connections(name)
            gevent.sleep(0.01)

    killing = gevent.spawn(kill)
    right = late = 0
    while not killing.ready() or right <= 50 or late <= 50:
        hasten(database, seconds)
        answers = together(*[partial(database.ask, f"{number}.example") for number in range(40)])
        downs = 0
        for number, answer in enumerate(answers):
            downs += isinstance(answer, Down)
            assert isinstance(answer, Down) or answer == to(f"mx{number}")
        late, right = late + downs, right + len(answers) - downs
        seconds *= 1.5 if downs > 30 else 0.75 if downs < 10 else 1.0
    assert open_connections(database) == (len(idle_connections(database)),) * 2
    assert len(idle_connections(database)) <= 8


def test_a_slow_query_ends_at_the_time_limit_and_loses_no_slot(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True), ("slow.example", "mx2", True))
    query = "SELECT server FROM routes WHERE pattern = ? AND (pattern <> 'slow.example' OR SLEEP(300) = 0)"
    database = open_database(name, query, pool_size=1, timeout=2.0)
    for _ in range(2):
        with pytest.raises(Down, match=r"^127\.0\.0\.1:\d+: no answer within 2\.0 s$"):
            database.ask("slow.example")
        assert database.ask("b.example") == to("mx1")
    assert open_connections(database) == (1, 1)


def test_a_query_that_the_server_gives_up_is_asked_once_of_each_host_and_costs_no_connection(
    mariadb: Mariadb, open_database: Open
):
    name = mariadb.table(("b.example", "mx1", True), ("slow.example", "mx2", True))
    query = (
        f"SET STATEMENT max_statement_time = {MOST_TIME} FOR"
        " SELECT server FROM routes WHERE pattern = ? AND (pattern <> 'slow.example' OR SLEEP(300) = 0)"
    )
    host = Address(HOST, mariadb.port)
    database = open_database(name, query, host=(host, Address("localhost", mariadb.port)))
    with mariadb.most_time(0.1), pytest.raises(TooSlow) as failure:
        database.ask("slow.example")
    why = "Query execution was interrupted (max_statement_time exceeded) (1969)"
    assert str(failure.value) == f"{host}: {why}; localhost:{mariadb.port}: {why}"
    assert open_connections(database) == (2, 2)
    assert database.ask("b.example") == to("mx1")
    assert open_connections(database) == (2, 2)


def test_waiting_for_a_connection_counts(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    lock = f"{name}-lock"
    query = f"SELECT server FROM routes WHERE pattern = ? AND GET_LOCK('{lock}', {PATIENCE:g})"
    database = open_database(name, query, pool_size=1)
    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT GET_LOCK(%s, 0)", (lock,))
        first = gevent.spawn(database.ask, "b.example")
        wait_for_state(mariadb, name, "User lock")
        hasten(database, 0.5)
        answers = together(*[lambda: database.ask("b.example")] * 9)
    assert all(isinstance(answer, Down) for answer in answers)
    assert first.get() == to("mx1"), "which was asked with more time"


def test_a_slow_key_among_answers_does_not_mark_its_host_as_failed(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True), ("slow.example", "mx2", True))
    query = "SELECT server FROM routes WHERE pattern = ? AND (pattern <> 'slow.example' OR SLEEP(300) = 0)"
    database = open_database(name, query)
    hasten(database, 2.0)
    slow = gevent.spawn(database.ask, "slow.example")
    gevent.sleep(0)
    hasten(database, PATIENCE / 2)
    while not slow.ready():
        assert database.ask("b.example") == to("mx1")
        gevent.sleep(0.01)
    assert isinstance(slow.exception, Down)
    assert not any(host.rests() for host in database._hosts)


def test_a_server_that_takes_no_more_connections_still_answers_on_those_it_has(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, "SELECT server FROM routes WHERE pattern = ? AND SLEEP(0.02) = 0", pool_size=5)
    assert database.ask("b.example") == to("mx1")
    try:
        mariadb.query(f"ALTER USER {USER}@'127.0.0.1' WITH MAX_USER_CONNECTIONS 1")
        assert together(*[lambda: database.ask("b.example")] * 10) == [to("mx1")] * 10
        assert open_connections(database) == (1, 1)
    finally:
        mariadb.query(f"ALTER USER {USER}@'127.0.0.1' WITH MAX_USER_CONNECTIONS 0")


def test_a_connection_that_was_idle_for_long_is_not_trusted(
    mariadb: Mariadb, open_database: Open, monkeypatch: pytest.MonkeyPatch
):
    database = open_database(mariadb.table(("b.example", "mx1", True)))
    database.ask("b.example")
    first = idle_connections(database)[0].thread_id()
    database.ask("b.example")
    assert idle_connections(database)[0].thread_id() == first
    monkeypatch.setattr("willi_lib.mappings.mysql.MAX_IDLE", -1.0)
    database.ask("b.example")
    assert idle_connections(database)[0].thread_id() != first
    assert open_connections(database) == (1, 1)


# Hosts


@pytest.fixture
def mute() -> Iterator[Address]:
    """It takes connections and says nothing."""
    with socket.create_server((HOST, 0)) as listener:
        yield Address(HOST, listener.getsockname()[1])


@pytest.fixture
def dead() -> Address:
    return Address(HOST, free_port())


def test_a_host_that_is_back_is_asked_again_although_another_one_answers(
    mariadb: Mariadb, open_database: Open, dead: Address, monkeypatch: pytest.MonkeyPatch
):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, host=(dead, Address(HOST, mariadb.port)))
    assert database.ask("b.example") == to("mx1")
    asked = gevent.event.Event()
    server = gevent.server.StreamServer((dead.host, dead.port), lambda *_: asked.set())
    server.start()
    try:
        assert database.ask("b.example") == to("mx1")
        assert not asked.is_set(), "it rests"
        monkeypatch.setattr("willi_lib.mappings.mysql.HOST_REST", 0.0)
        assert database.ask("b.example") == to("mx1")
        assert asked.wait(PATIENCE)
    finally:
        server.stop()


SIGNAL = """CREATE PROCEDURE {name}.route(p VARCHAR(255)) BEGIN
    IF (SELECT number FROM {name}.trouble) > 0 THEN
        UPDATE {name}.trouble SET number = number - 1;
        SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {error}, MESSAGE_TEXT = 'not now';
    END IF;
    SELECT server FROM {name}.routes WHERE pattern = p;
END"""


@pytest.fixture
def troubled(mariadb: Mariadb, open_database: Open) -> Callable[..., Database]:
    """Answers with this error so many times."""

    def open_(error: int, times: int, **access: object) -> Database:
        name = mariadb.table(("b.example", "mx1", True))
        mariadb.query(f"CREATE TABLE {name}.trouble (number INT) SELECT {times} AS number")
        mariadb.query(SIGNAL.format(name=name, error=error))
        return open_database(name, "CALL route(?)", **access)

    return open_


@pytest.mark.parametrize(
    "error",
    [
        1021, 1030, 1041, 1045, 1052, 1054, 1142, 1146, 1176, 1194, 1203, 1205, 1213, 1226, 1290, 1318, 1449, 1735,
        1747, 2003, 3024, 3032, 9001,
    ],
)  # fmt: skip
def test_not_now_is_no_answer_and_the_next_host_is_asked(
    mariadb: Mariadb, troubled: Callable[..., Database], error: int
):
    times = 2 if error == 2003 else 1  # a lost connection is tried once more
    hosts = (Address(HOST, mariadb.port), Address("localhost", mariadb.port))
    assert troubled(error, times, host=hosts).ask("b.example") == to("mx1")
    alone = troubled(error, times)
    with pytest.raises(Down, match=rf"not now \({error}\)"):
        alone.ask("b.example")
    assert alone.ask("b.example") == to("mx1")


def test_an_invisible_character_in_a_row_is_a_failure_that_names_it(mariadb: Mariadb, open_database: Open):
    database = open_database(mariadb.table(("b.example", "mx\u200b.example", True)))
    with pytest.raises(LookupFailed, match=r"the row for 'b\.example': .*U\+200B ZERO WIDTH SPACE"):
        database.ask("b.example")


def test_an_error_of_the_query_itself_is_not_taken_for_not_now(troubled: Callable[..., Database]):
    database = troubled(1064, 1)
    with pytest.raises(LookupFailed, match=r"not now \(1064\)"):
        database.ask("b.example")
    assert open_connections(database) == (1, 1)


def test_an_account_with_ed25519_is_told_what_to_do(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    mariadb.query("INSTALL SONAME 'auth_ed25519'")
    try:
        mariadb.query("CREATE USER modern@'127.0.0.1' IDENTIFIED VIA ed25519 USING PASSWORD('x')")
        with pytest.raises(Down) as failure:
            open_database(name, user="modern", password="x").ask("b.example")
        assert str(failure.value).endswith(": Willi cannot log in with ed25519; " + USE_NATIVE)
    finally:
        mariadb.query("DROP USER IF EXISTS modern@'127.0.0.1'")
        mariadb.query("UNINSTALL SONAME 'auth_ed25519'")


def test_a_lack_of_threads_is_called_what_it_is():
    """In a process whose memory has no room for the stack of another thread, which the look-up of a name needs."""
    without_threads = ["prlimit", "--as=2000000000", "--stack=4000000000"]
    code = f"""
from gevent import monkey
monkey.patch_all(ssl=False)
from willi_lib.routing.route import Policy
from willi_lib.hosts import Address
from willi_lib.config import MysqlSettings
from willi_lib.mappings.mysql import Database
from willi_lib.mappings.source import Down
try:
    settings = MysqlSettings(name="t", policy=Policy(), host=(Address("localhost", 1),), query={QUERY!r})
    Database(settings, "mysql:t").ask("b.example")
except Down as error:
    print(error)
"""
    command = [*without_threads, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.startswith("localhost:1: can't start new thread: the system gives Willi no more threads")


@pytest.mark.parametrize("first", ["mute", "dead"])
def test_the_next_host_is_asked_when_one_fails_and_the_failed_one_last_for_a_while(
    first: str, mariadb: Mariadb, open_database: Open, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    bad, good = request.getfixturevalue(first), Address(HOST, mariadb.port)
    database = open_database(mariadb.table(("b.example", "mx1", True)), host=(bad, good), timeout=6.0)
    assert database.ask("b.example") == to("mx1")
    for connection in idle_connections(database):
        connection.close()
    hasten(database, PATIENCE / 2)
    monkeypatch.setattr(database._hosts[0], "ask", asked_too_early)
    assert database.ask("b.example") == to("mx1")


def asked_too_early(*_: object) -> Route | None:
    pytest.fail("the host that has failed is asked before the other one")


def test_when_all_hosts_fail_each_says_why(mariadb: Mariadb, open_database: Open, mute: Address, dead: Address):
    database = open_database("x", host=(dead, mute, Address(HOST, mariadb.port)), timeout=6.0)
    with pytest.raises(Down) as failure:
        database.ask("b.example")
    refused, silent, unknown = str(failure.value).split("; ")
    assert refused.startswith(f"{dead}: ") and "Connection refused" in refused
    assert silent.startswith(f"{mute}: no answer within 3.0 s")
    assert unknown == f"{mariadb.host}: Unknown database 'x' (1049)"
    assert open_connections(database) == (0, 0)


def test_a_host_that_hangs_within_a_query_is_left_for_the_next_one(
    mariadb: Mariadb, open_database: Open, certificates: Authority, monkeypatch: pytest.MonkeyPatch
):
    name = mariadb.table(("b.example", "mx1", True))
    other = Mariadb(certificates.issue("localhost", "127.0.0.1"))
    try:
        assert other.table(("b.example", "mx2", True)) == "routes1"
        mariadb.query("CREATE DATABASE IF NOT EXISTS routes1")
        other.query(f"CREATE DATABASE IF NOT EXISTS {name}")
        other.query(f"CREATE TABLE IF NOT EXISTS {name}.routes AS SELECT * FROM routes1.routes")
        hosts = (Address(HOST, other.port), Address(HOST, mariadb.port))
        database = open_database(name, host=hosts)
        assert database.ask("b.example") == to("mx2")
        with other.hanging():
            hasten(database, 6.0)
            assert database.ask("b.example") == to("mx1")
            hasten(database, PATIENCE / 2)
            monkeypatch.setattr(database._hosts[0], "ask", asked_too_early)
            assert database.ask("b.example") == to("mx1")
    finally:
        other.remove()


@pytest.mark.parametrize("host", [HOST, "db.example"])
def test_a_lack_of_descriptors_marks_no_host_as_failed(
    mariadb: Mariadb, open_database: Open, host: str, monkeypatch: pytest.MonkeyPatch
):
    """The name of a host cannot be looked up without one, either."""
    dns = DnsServer()
    dns.zone["db.example"] = {"A": [HOST]}
    resolver = Resolver(PATIENCE / 2, (dns.address, dns.port))
    monkeypatch.setattr(gevent.get_hub(), "resolver", gevent.get_hub().resolver)  # as it was, afterwards
    resolver.serve_all_sockets()
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, host=(Address(host, mariadb.port),))
    with Descriptors(), pytest.raises(OwnLack, match=f"^{host}:{mariadb.port}: Can't connect to MySQL server"):
        database.ask("b.example")
    assert not any(host.rests() for host in database._hosts)
    assert database.ask("b.example") == to("mx1")
    with Descriptors():
        assert database.ask("b.example") == to("mx1"), "on the connection that is there"
        assert together(*[lambda: database.ask("b.example")] * 5) == [to("mx1")] * 5, "one after the other"
    dns.stop()


def test_the_socket_will_do(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, unix_socket=str(mariadb.socket))
    assert database.ask("b.example") == to("mx1")
    assert database.inspect_hosts()[0].name == str(mariadb.socket)


# TLS


def test_with_tls_ca_the_connection_is_encrypted_and_the_host_verified(
    mariadb: Mariadb, open_database: Open, certificates: Authority
):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, tls_ca=str(certificates.ca))
    assert database.ask("b.example") == to("mx1")
    assert database.inspect_hosts()[0].tls.startswith("TLSv1.")
    plain = open_database(name)
    assert plain.inspect_hosts()[0].tls == ""


def test_a_certificate_of_another_authority_is_a_failure(mariadb: Mariadb, open_database: Open, tmp_path: Path):
    database = open_database("x", tls_ca=str(Authority(tmp_path).ca))
    with pytest.raises(Down, match="certificate verify failed"):
        database.ask("b.example")


def test_a_certificate_for_another_name_is_a_failure(mariadb: Mariadb, open_database: Open, certificates: Authority):
    database = open_database("x", host=(Address("127.1", mariadb.port),), tls_ca=str(certificates.ca))
    with pytest.raises(Down, match="certificate verify failed"):
        database.ask("b.example")


def test_a_query_that_hangs_within_tls_stops_nobody_else(
    mariadb: Mariadb, open_database: Open, certificates: Authority
):
    name = mariadb.table(("b.example", "mx1", True))
    database = open_database(name, tls_ca=str(certificates.ca))
    database.ask("b.example")
    hasten(database, 2.0)
    with mariadb.hanging():
        asking = gevent.spawn(database.ask, "b.example")
        turns = 0
        while not asking.ready():
            gevent.sleep(0.005)
            turns += 1
        assert turns > 10
        assert isinstance(asking.exception, Down)
    hasten(database, PATIENCE / 2)
    assert database.ask("b.example") == to("mx1")


def test_a_key_that_one_of_several_comparisons_cannot_take_is_no_miss(mariadb: Mariadb, open_database: Open):
    """The other comparison might have found its row: a miss would be a 554, or another mapping's route."""
    name = mariadb.table(("😀@b.example", "mx1", True), charset="utf8mb4")
    query = (
        "SELECT server FROM routes WHERE pattern = ? UNION SELECT server FROM routes"
        " WHERE CONVERT(pattern USING latin1) COLLATE latin1_swedish_ci = ?"
    )
    with pytest.raises(LookupFailed):
        open_database(name, query).ask("😀@b.example")


def test_a_key_in_a_list_of_columns_of_several_character_sets_is_no_miss(mariadb: Mariadb, open_database: Open):
    name = mariadb.table(("😀@b.example", "mx1", True), charset="utf8mb4")
    latin = "CONVERT(pattern USING latin1) COLLATE latin1_swedish_ci"
    with pytest.raises(LookupFailed):
        open_database(name, f"SELECT server FROM routes WHERE ? IN ({latin}, {latin})").ask("😀@b.example")
    assert open_database(name, f"SELECT server FROM routes WHERE {latin} = LOWER(?)").ask("😀@b.example") is None


@pytest.mark.parametrize(
    "greeting", [b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00", b"\x00\x00\x00\x00", b"\x01\x00\x00\x00\xfe"]
)
def test_a_host_that_is_no_database_is_passed_over(mariadb: Mariadb, open_database: Open, greeting: bytes):
    name = mariadb.table(("b.example", "mx1", True))

    def answer(client: socket.socket, _address: object) -> None:
        client.sendall(greeting)

    server = gevent.server.StreamServer((HOST, 0), answer)
    server.start()
    try:
        hosts = (Address(HOST, int(server.server_port or 0)), Address(HOST, mariadb.port))
        assert open_database(name, host=hosts).ask("b.example") == to("mx1")
        with pytest.raises(Down):
            open_database(name, host=hosts[:1]).ask("b.example")
    finally:
        server.stop()
