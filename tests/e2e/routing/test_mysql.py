"""Routes from a real MariaDB through real sessions, while it is well, slow, restarted and gone."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import Setting, Willi, in_a_hurry, run_willi, write_config
from tests.support.loopback import HOST, free_port, wait_until
from tests.support.mariadb import MOST_TIME, PASSWORD, QUERY, Mariadb
from tests.support.talk import (
    BOB,
    GO_ON,
    MAIL,
    OK,
    QUEUED,
    SENDER_KEPT,
    content,
    deliver,
    greeted,
    say,
    say_together,
)
from tests.support.upstream import ScriptedUpstream
from willi_lib.mappings.cache import NO_ROW

NO_ROUTE = "554 5.7.1 Relay access denied"
CANNOT_LOOK_UP = "451 4.3.0 Cannot look up this address now"
RELOAD_WAITS = "Reload waits for a database, since new workers would remember no answers"
ANSWERS_LOST = "Reload while a database is down, remembered answers are lost"
ROWS = 100_000  # bench/mysql.py has a million

StartWithDatabase = Callable[..., Willi]


@pytest.fixture
def routed(start_willi: StartWilli, mariadb: Mariadb) -> StartWithDatabase:
    """Start Willi with a database of these rows: routed(row, ..., database="", willi={}, **settings of the mapping)."""

    def start(*rows: object, database: str = "", willi: dict[str, Setting] | None = None, **settings: Setting) -> Willi:
        name = database or mariadb.table(*rows)  # type: ignore[arg-type]
        return start_willi(mappings={"db": mariadb.mapping(name, **settings)}, **{"max_errors": 1000, **(willi or {})})

    return start


def rcpt(client: Client, recipient: str) -> str:
    """The answer to one recipient in a transaction of its own."""
    answers = say(client, MAIL + b" SMTPUTF8", b"RCPT TO:<" + recipient.encode() + b">", b"RSET")
    assert answers[0] == SENDER_KEPT
    return answers[1]


def is_routed(client: Client) -> bool:
    return rcpt(client, "new@b.example") == OK


# What is found


def test_a_message_goes_where_its_row_says(
    routed: StartWithDatabase, upstream: ScriptedUpstream, start_upstream: StartUpstream
):
    other = start_upstream()
    willi = routed(
        ("b.example", upstream.server, False),
        ("bob@b.example", other.server, False),
        ("none@b.example", None, None),
        ("empty@b.example", "", True),
        ("nowhere.example", None, None),
        willi={"recipient_delimiter": "+"},
    )
    with greeted(willi) as client:
        assert deliver(client, b"RCPT TO:<ann@b.example>") == QUEUED
        assert deliver(client, b"RCPT TO:<Bob+Lists@B.Example>") == QUEUED
        assert deliver(client, b"RCPT TO:<none@b.example>") == QUEUED
        assert deliver(client, b"RCPT TO:<empty@b.example>") == QUEUED
        assert rcpt(client, "ann@c.example") == NO_ROUTE
        assert rcpt(client, "ann@nowhere.example") == NO_ROUTE
    assert [len(server.messages) for server in (upstream, other)] == [3, 1]
    assert willi.wait_for_log(msg="Message accepted")["mapping"] == "mysql:db"


@pytest.mark.parametrize("charset", ["latin1", "utf8mb3", "utf8mb4"])
def test_a_hostile_address_finds_its_own_row_or_none(
    charset: str, mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    known = ["o'brien", "100%", "%s", "back'slash", "what?", "a=b", "`id`"]
    rows = [(f"{local}@b.example", upstream.server, False) for local in known]
    willi = routed(database=mariadb.table(*rows, ("c.example", upstream.server, False), charset=charset))
    unknown = ["ann", "' or '1'='1", "'; drop table routes; -- ", "%", "a_b", "😀", "日本", "jürgen", "\\", "\x1b["]
    with greeted(willi) as client:
        for local in known:
            assert rcpt(client, f"{local}@b.example") == OK
        for local in unknown:
            quoted = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
            expected = NO_ROUTE if local.isprintable() else "501"
            assert rcpt(client, f"{quoted}@b.example").startswith(expected), local
            assert rcpt(client, f"{quoted}@c.example").startswith(OK if local.isprintable() else "501"), local
    assert len(mariadb.query("SHOW TABLES FROM " + str(willi.settings["mappings"]["db"]["database"]))) == 1  # type: ignore[call-overload,index]


def test_a_faulty_row_is_a_451_that_the_log_explains(routed: StartWithDatabase, upstream: ScriptedUpstream):
    willi = routed(("b.example", "mx:25:26", True), ("c.example", upstream.server, False))
    willi.tolerate("the row for 'b.example'")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == CANNOT_LOOK_UP
        assert rcpt(client, "bob@c.example") == OK
    line = willi.wait_for_log(msg="Lookup failed", lvl="error")
    assert line["error"].startswith("mysql:db: the row for 'b.example': 'mx:25:26': ")


def test_a_query_with_a_third_column_is_a_451_and_a_later_mapping_is_not_asked(
    start_willi: StartWilli, mariadb: Mariadb, upstream: ScriptedUpstream
):
    mapping = mariadb.mapping(mariadb.table(), query="SELECT server, tls_verify, pattern FROM routes WHERE pattern = ?")
    willi = start_willi(mappings={"db": mapping}, server=upstream.server)
    willi.tolerate("the query must return the columns server and, if you like, tls_verify")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == CANNOT_LOOK_UP
    assert upstream.connections == []


# Who asks


def test_a_hundred_sessions_that_want_the_same_recipient_make_one_query_for_each_key(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    willi = routed(
        ("b.example", upstream.server, False),
        query="SELECT server, tls_verify FROM routes WHERE pattern = ? OR SLEEP(0.2)",
        willi={"max_connections_per_ip": 200},
        timeout="5s",
    )
    clients = [greeted(willi) for _ in range(100)]
    before = mariadb.count_queries()
    for client in clients:
        client.send(MAIL + b"\r\n" + BOB + b"\r\n")
    assert {str(client.read_reply()) for client in clients} == {SENDER_KEPT}
    assert {str(client.read_reply()) for client in clients} == {OK}
    assert mariadb.count_queries() - before == 2
    for client in clients:
        client.close()


def test_each_recipient_of_a_group_has_the_time_for_its_own_look_up(
    routed: StartWithDatabase, upstream: ScriptedUpstream
):
    """All look-ups together take longer than the first RCPT may, though each of them is quick enough."""
    willi = routed(
        ("b.example", upstream.server, False),
        query="SELECT server FROM routes WHERE pattern = ? OR SLEEP(0.5)",
        willi={"mixed_recipients": "defer", "upstream_timeout": "5s"},
    )
    recipients = [b"RCPT TO:<%d@b.example>" % number for number in range(14)]
    with greeted(willi) as client:
        assert say_together(client, MAIL, *recipients, b"DATA") == [SENDER_KEPT, *[OK] * 14, GO_ON]
        assert content(client) == QUEUED


def test_a_look_up_that_takes_too_long_costs_its_own_recipient_and_no_other(
    routed: StartWithDatabase, upstream: ScriptedUpstream
):
    willi = routed(
        ("b.example", upstream.server, False),
        query="SELECT server FROM routes WHERE pattern = ? OR (? = 'slow@b.example' AND SLEEP(4))",
        willi={"mixed_recipients": "defer", "upstream_timeout": "2s"},
        timeout="20s",
    )
    willi.tolerate("Lookup failed")
    with greeted(willi) as client:
        answers = say(client, MAIL, BOB, b"RCPT TO:<slow@b.example>", b"RCPT TO:<ben@b.example>", b"DATA")
        assert answers == [SENDER_KEPT, OK, CANNOT_LOOK_UP, OK, GO_ON]
        assert content(client) == QUEUED
    assert len(upstream.connections) == 1


def test_clients_that_hang_up_while_the_database_is_slow_use_up_no_connection(
    routed: StartWithDatabase, upstream: ScriptedUpstream
):
    willi = routed(
        ("b.example", upstream.server, False),
        query="SELECT server FROM routes WHERE pattern = ? AND SLEEP(0.2) = 0",
        pool_size=2,
        timeout="5s",
    )
    for number in range(10):
        client = greeted(willi)
        client.send(MAIL + b"\r\nRCPT TO:<%d@%d.example>\r\n" % (number, number))
        client.reset()
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK


def test_a_stop_does_not_wait_for_the_database(mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream):
    willi = routed(("b.example", upstream.server, False), timeout="1h", willi={"drain_timeout": "1s"})
    with greeted(willi) as client, mariadb.hanging():
        assert say(client, MAIL) == [SENDER_KEPT]
        client.send(BOB + b"\r\n")
        willi.stop()
        assert client.read_reply().code in (421, 451)


# When it is not well


def test_an_automatic_reload_waits_for_the_database_and_sighup_says_what_is_lost(
    mariadb: Mariadb, start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, tmp_path: Path
):
    pem = tmp_path / "pem"

    def renew(host: str) -> None:
        """Certificate and key in one file: two could be read when only one of them is new."""
        pair = certificates.issue(host)
        (tmp_path / "new").write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
        (tmp_path / "new").replace(pem)

    renew("old.example")
    mapping = mariadb.mapping(mariadb.table(("b.example", upstream.server, False)))
    prefix = in_a_hurry(**{"files.INTERVAL": 0.2, "files.RETRY": 1.0})
    willi = start_willi(mappings={"db": mapping}, prefix=prefix, tls_cert=str(pem), tls_key=str(pem))
    willi.tolerate("Database is down")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
    workers = willi.workers
    try:
        mariadb.stop()
        renew("new.example")
        why = willi.wait_for_log(lvl="warn", msg=RELOAD_WAITS, count=2, seconds=60)["error"]
        assert why.startswith("mysql:db: ") and "Connection refused" in why
        with greeted(willi) as client:
            assert rcpt(client, "bob@b.example") == OK, "it is remembered"
        wait_until(lambda: willi.workers == workers, "the old worker alone")
        mariadb.start()
        willi.wait_for_log(msg="Reloaded", seconds=60)
        mariadb.stop()
        willi.signal(signal.SIGHUP)
        assert willi.wait_for_log(lvl="warn", msg=ANSWERS_LOST, seconds=60)["mapping"] == "mysql:db"
        willi.wait_for_log(msg="Reloaded", count=2, seconds=60)
    finally:
        if not mariadb.running:
            mariadb.start()


MISTAKES: dict[str, dict[str, Setting]] = {
    "You have an error in your SQL syntax": {"query": "SELECT server FRM routes WHERE pattern = ?"},
    "not: pattern, server, tls_verify": {"query": "SELECT * FROM routes WHERE pattern = ?"},
    "Unknown column 'servr'": {"query": "SELECT servr FROM routes WHERE pattern = ?"},
    "doesn't exist (1146)": {"query": "SELECT server FROM route WHERE pattern = ?"},
    "Access denied for user 'willi'@'127.0.0.1' (using password: YES) (1045)": {"password": "wrong"},
    "Unknown database 'nowhere' (1049)": {"database": "nowhere"},
}


def test_a_reload_fails_if_the_database_answers_that_its_settings_are_wrong(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    name = mariadb.table(("b.example", upstream.server, False))
    willi = routed(database=name)
    willi.tolerate("Reload failed")
    workers = willi.workers
    for number, (why, mistake) in enumerate(MISTAKES.items(), 1):
        write_config(willi.config, {**willi.settings, "mappings": {"db": mariadb.mapping(name, **mistake)}})
        willi.signal(signal.SIGHUP)
        failed = willi.wait_for_log(lvl="error", msg="Reload failed, nothing has changed", count=number)
        assert failed["error"].startswith("mysql:db: ") and why in failed["error"]
    wait_until(lambda: willi.workers == workers, "the old worker alone")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK


def test_a_new_password_in_its_file_needs_no_signal(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream, tmp_path: Path
):
    account = "rotated@'127.0.0.1'"
    file = tmp_path / "password"
    file.write_text("old\n")
    mariadb.query(f"CREATE USER {account} IDENTIFIED BY 'old'")
    mariadb.query(f"GRANT SELECT ON *.* TO {account}")
    willi = routed(
        ("b.example", upstream.server, False),
        willi={"prefix": in_a_hurry(**{"files.INTERVAL": 0.2, "files.RETRY": 1.0, "files.CALM": 1.0})},
        user="rotated", password="", password_file=str(file), cache_ttl="0s", stale_ttl="0s",
    )  # fmt: skip
    for text in ("mysql:db", RELOAD_WAITS):
        willi.tolerate(text)
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
    file.write_text("new\n")  # before the database knows it: the old workers go on
    willi.wait_for_log(msg=RELOAD_WAITS, seconds=60)
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
    mariadb.query(f"ALTER USER {account} IDENTIFIED BY 'new'")
    willi.wait_for_reload()
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK


def test_a_database_that_hangs_stops_nobody_who_does_not_need_it(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream, certificates: Authority
):
    """In clear and over TLS, side by side, since each waits for the time limit."""
    row = ("b.example", upstream.server, False)
    willis = [routed(row, timeout="10s"), routed(row, timeout="10s", tls_ca=str(certificates.ca))]
    clients = [[greeted(willi) for _ in range(3)] for willi in willis]
    for known, _, _ in clients:
        assert rcpt(known, "bob@b.example") == OK
    with mariadb.hanging():
        for known, unknown, _ in clients:
            assert say(unknown, MAIL) == [SENDER_KEPT]
            unknown.send(b"RCPT TO:<new@b.example>\r\n")
            assert deliver(known) == QUEUED
            assert not unknown.has_octets(), "it went on while the other one waited"
            for _ in range(20):
                assert deliver(known) == QUEUED
        for _, unknown, late in clients:
            assert str(unknown.read_reply()) == CANNOT_LOOK_UP
            for number in range(50):  # it is known to hang: nobody waits again, or this would take too long
                assert rcpt(late, f"{number}@b.example") == CANNOT_LOOK_UP
    for willi, (_, _, late) in zip(willis, clients, strict=True):
        wait_until(partial(is_routed, late), "the first answer after it was back")
        assert len(willi.lines(msg="Database is down")) == 1
        willi.tolerate("mysql:db")


def test_what_is_known_goes_on_and_the_log_tells_the_outage_once(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    willi = routed(("b.example", upstream.server, False), cache_ttl="1s", stale_ttl="1h")
    willi.tolerate("mysql:db")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        assert rcpt(client, "bob@c.example") == NO_ROUTE
        mariadb.stop()
        try:
            wait_until(lambda: rcpt(client, "new@b.example") == CANNOT_LOOK_UP, "an unknown recipient")
            wait_until(lambda: rcpt(client, "bob@c.example") == CANNOT_LOOK_UP, "the end of a definite no")
            for _ in range(5):
                assert deliver(client) == QUEUED
        finally:
            mariadb.start()
        wait_until(lambda: rcpt(client, "bob@c.example") == NO_ROUTE, "the database again")
        assert rcpt(client, "new@b.example") == OK
    told = [line for line in willi.log if "atabase" in line["msg"]]
    assert [line["lvl"] for line in told] == ["error", "warn", "info"]
    assert {line["mapping"] for line in told} == {"mysql:db"}
    assert told[0]["msg"] == "Database is down" and "Connection refused" in told[0]["error"]
    assert told[1]["msg"] == "Using remembered answers of the database"
    assert re.fullmatch(r"Database is back after \d+\.\d s", told[2]["msg"])
    assert willi.lines(msg="Lookup failed") == [], "not for every client"


def test_what_is_known_goes_on_while_the_server_gives_up_its_queries(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    name = mariadb.table(("bob@b.example", upstream.server, False), ("new@b.example", upstream.server, False))
    mariadb.query(f"CREATE TABLE {name}.pause (seconds FLOAT)")
    query = (
        f"SET STATEMENT max_statement_time = {MOST_TIME} FOR SELECT server, tls_verify FROM routes"
        " WHERE pattern = ? AND SLEEP(IFNULL((SELECT MAX(seconds) FROM pause), 0)) = 0"
    )
    willi = routed(database=name, query=query, cache_ttl="0s")
    willi.tolerate("max_statement_time exceeded")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        mariadb.query(f"INSERT INTO {name}.pause VALUES (5)")
        with mariadb.most_time(0.1):
            assert deliver(client) == QUEUED
            assert rcpt(client, "new@b.example") == CANNOT_LOOK_UP
    assert "max_statement_time exceeded" in willi.wait_for_log(msg="Lookup failed", lvl="error")["error"]
    assert willi.lines(msg="Database is down") == []


class Traffic:
    """Clients that ask for ever new recipients; `answers` are times and replies."""

    def __init__(self, willi: Willi, clients: int) -> None:
        self.answers: list[tuple[float, str]] = []
        self.faults: list[BaseException] = []
        self._numbers = itertools.count()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(willi,)) for _ in range(clients)]

    def _run(self, willi: Willi) -> None:
        try:
            with greeted(willi) as client:
                while not self._end.wait(0.01):
                    answer = rcpt(client, f"{next(self._numbers)}@b.example")
                    self.answers.append((monotonic(), answer))
        except BaseException as fault:  # noqa: BLE001 -- raised again at the end, in the test
            self.faults.append(fault)

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._end.set()
            for thread in self._threads:
                thread.join()
        assert self.faults == []

    def wait_for_more(self, number: int, answer: str) -> None:
        before = self.count(answer)
        wait_until(lambda: self.count(answer) >= before + number, f"{number} more {answer}", 60)

    def count(self, answer: str) -> int:
        return Counter(answer for _, answer in list(self.answers))[answer]


def test_a_table_that_is_emptied_and_filled_again_bounces_no_mail(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    rows = [(f"{letter}.example", upstream.server, False) for letter in "bc"]
    name = mariadb.table(*rows)
    willi = routed(database=name, willi={"workers": 1}, cache_ttl="0s")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
        mariadb.query(f"TRUNCATE TABLE {name}.routes")
        assert rcpt(client, "bob@b.example") == CANNOT_LOOK_UP
        assert rcpt(client, "bob@c.example") == CANNOT_LOOK_UP, "no row for it has been seen yet"
        with mariadb.connect() as connection, connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO {name}.routes VALUES (%s, %s, %s)", rows)
        assert rcpt(client, "bob@b.example") == OK
        assert rcpt(client, "bob@c.example") == OK
        assert rcpt(client, "bob@d.example") == NO_ROUTE
    assert willi.wait_for_log(lvl="warn", mapping="mysql:db")["error"] == "b.example"


@pytest.mark.parametrize("change", ["reload", "replacement"])
def test_a_new_worker_says_no_definite_no_from_a_table_that_is_empty_for_a_moment(
    change: str, mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    rows = [(f"{letter}.example", upstream.server, False) for letter in "bc"]
    name = mariadb.table(*rows)
    willi = routed(database=name, cache_ttl="0s")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
    mariadb.query(f"TRUNCATE TABLE {name}.routes")
    if change == "reload":
        willi.reload()
    else:
        willi.tolerate("Worker ended by itself")
        [pid] = willi.workers
        os.kill(pid, signal.SIGKILL)
        willi.wait_for_log(msg="Worker replaced")
    with greeted(willi) as client:
        assert rcpt(client, "bob@c.example") == CANNOT_LOOK_UP
        with mariadb.connect() as connection, connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO {name}.routes VALUES (%s, %s, %s)", rows)
        assert rcpt(client, "bob@c.example") == OK
        assert rcpt(client, "bob@d.example") == NO_ROUTE


def test_a_new_worker_says_no_definite_no_for_a_row_that_others_have_found_in_a_table_that_is_half_filled(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    rows = [(f"{letter}.example", upstream.server, False) for letter in "bc"]
    name = mariadb.table(*rows)
    willi = routed(database=name, cache_ttl="0s")
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
        assert rcpt(client, "bob@c.example") == OK
    mariadb.query(f"DELETE FROM {name}.routes WHERE pattern = 'b.example'")
    willi.reload()
    with greeted(willi) as client:
        assert rcpt(client, "bob@c.example") == OK
        assert rcpt(client, "bob@b.example") == CANNOT_LOOK_UP
        assert rcpt(client, "bob@d.example") == NO_ROUTE
        mariadb.query(f"INSERT INTO {name}.routes VALUES ('b.example', '{upstream.server}', false)")
        assert rcpt(client, "bob@b.example") == OK
    assert willi.wait_for_log(lvl="warn", mapping="mysql:db")["error"] == "b.example"


def test_an_empty_table_bounces_no_mail_at_the_start_and_a_later_mapping_serves(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream, start_willi: StartWilli
):
    name = mariadb.table()
    willi = routed(database=name)
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == CANNOT_LOOK_UP
        mariadb.query(f"INSERT INTO {name}.routes VALUES ('b.example', '{upstream.server}', false)")
        assert rcpt(client, "bob@c.example") == CANNOT_LOOK_UP, "no row has been found yet"
        assert rcpt(client, "bob@b.example") == OK
        assert rcpt(client, "bob@c.example") == NO_ROUTE
    assert len(willi.lines(msg=NO_ROW)) == 1
    rest = {"type": "static", "server": upstream.server, "tls_verify": "no"}
    willi = start_willi(mappings={"db": mariadb.mapping(mariadb.table()), "rest": rest})
    with greeted(willi) as client:
        assert rcpt(client, "bob@c.example") == OK


PROCEDURE = "CREATE OR REPLACE PROCEDURE {{0}}.route(p VARCHAR(255)) SELECT {} FROM {{0}}.routes WHERE pattern = p"


@pytest.mark.parametrize(
    ("query", "spoil", "repair"),
    [
        (QUERY, "RENAME TABLE {0}.routes TO {0}.old", "RENAME TABLE {0}.old TO {0}.routes"),
        (
            QUERY,
            "ALTER TABLE {0}.routes CHANGE server target TEXT", "ALTER TABLE {0}.routes CHANGE target server TEXT",
        ),
        (
            "SELECT server FROM routes FORCE INDEX (`PRIMARY`) WHERE pattern = ?",
            "ALTER TABLE {0}.routes DROP PRIMARY KEY", "ALTER TABLE {0}.routes ADD PRIMARY KEY (pattern)",
        ),
        ("CALL route(?)", PROCEDURE.format("*"), PROCEDURE.format("server")),
    ],
    ids=["table", "column", "index", "columns"],
)  # fmt: skip
def test_what_is_known_goes_on_while_the_database_is_not_as_the_query_needs_it(
    query: str, spoil: str, repair: str, mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    name = mariadb.table(("b.example", upstream.server, None))
    mariadb.query(PROCEDURE.format("server").format(name))
    willi = routed(database=name, query=query, cache_ttl="0s")
    willi.tolerate("mysql:db")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
        mariadb.query(spoil.format(name))
        assert deliver(client) == QUEUED
        assert rcpt(client, "bob@c.example") == CANNOT_LOOK_UP
        mariadb.query(repair.format(name))
        wait_until(lambda: rcpt(client, "bob@c.example") == NO_ROUTE, "the table again")
        assert deliver(client) == QUEUED
    assert len(willi.lines(msg="Database is down")) == 1


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_in_the_middle_of_traffic_costs_nothing_but_451s_that_soon_end(
    end: str, mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    willi = routed(("b.example", upstream.server, False))
    willi.tolerate("mysql:db")
    traffic = Traffic(willi, clients=10)
    with traffic.running():
        traffic.wait_for_more(100, OK)
        (mariadb.stop if end == "stop" else mariadb.kill)()
        traffic.wait_for_more(50, CANNOT_LOOK_UP)
        mariadb.start()
        back = monotonic()
        traffic.wait_for_more(200, OK)
    assert {answer for _, answer in traffic.answers} == {OK, CANNOT_LOOK_UP}
    last = max(at for at, answer in traffic.answers if answer == CANNOT_LOOK_UP)
    assert last - back < 40, "it is tried again every five seconds"
    assert len(willi.lines(msg="Database is down")) <= 2
    assert willi.text.count("Database is back") == len(willi.lines(msg="Database is down"))


def test_killed_connections_cost_no_recipient(mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream):
    name = mariadb.table(("b.example", upstream.server, False))
    willi = routed(database=name)
    traffic = Traffic(willi, clients=5)
    with traffic.running():
        for _ in range(5):
            traffic.wait_for_more(20, OK)
            mariadb.kill_connections(name)
        traffic.wait_for_more(20, OK)
    assert {answer for _, answer in traffic.answers} == {OK}
    assert len(mariadb.connections(name)) <= 5


def test_the_next_host_takes_over(mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream):
    willi = routed(("b.example", upstream.server, False), host=[f"{HOST}:{free_port()}", mariadb.host])
    with greeted(willi) as client:
        assert deliver(client) == QUEUED


def test_willi_starts_without_its_database(mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream):
    name = mariadb.table(("b.example", upstream.server, False))
    mariadb.stop()
    try:
        willi = routed(database=name)
        willi.tolerate("mysql:db")
        with greeted(willi) as client:
            assert rcpt(client, "bob@b.example") == CANNOT_LOOK_UP
            mariadb.start()
            wait_until(lambda: rcpt(client, "bob@b.example") == OK, "the database")
    finally:
        if not mariadb.running:
            mariadb.start()


def test_at_its_end_willi_takes_leave_of_the_database(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream
):
    name = mariadb.table(("b.example", upstream.server, False))
    willi = routed(database=name)
    with greeted(willi) as client:
        assert rcpt(client, "bob@b.example") == OK
    assert len(mariadb.connections(name)) == 1
    aborted = mariadb.query("SHOW GLOBAL STATUS LIKE 'Aborted_clients'")
    willi.stop()
    wait_until(lambda: mariadb.connections(name) == [], "the end of its connection")
    assert mariadb.query("SHOW GLOBAL STATUS LIKE 'Aborted_clients'") == aborted


# Very many rows


def test_a_table_of_very_many_rows(
    mariadb: Mariadb, routed: StartWithDatabase, upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
):
    name = mariadb.table()
    mariadb.query(
        f"INSERT INTO {name}.routes SELECT CONCAT('user', seq, '@b.example'), %s, FALSE FROM {name}.seq_1_to_{ROWS}",
        upstream.server,
    )
    willi = routed(database=name, timeout="5s")
    with greeted(willi) as client:
        for number in (1, 77_777, ROWS):
            assert rcpt(client, f"User{number}@b.example") == OK
        began = monotonic()
        for number in range(2, 502):
            assert rcpt(client, f"user{number}@b.example") == OK
        cold = 500 / (monotonic() - began)
        assert rcpt(client, f"user{ROWS + 1}@b.example") == NO_ROUTE
        assert rcpt(client, "😀@b.example") == NO_ROUTE
    with capsys.disabled():
        print(f"\n{ROWS:,} rows, one client: {cold:,.0f} transactions a second with a new recipient each", end="")


def test_a_pattern_with_a_dot_before_it_is_for_all_names_below(routed: StartWithDatabase, upstream: ScriptedUpstream):
    willi = routed((".b.example", upstream.server, False), willi={"subdomains": True})
    with greeted(willi) as client:
        assert [rcpt(client, f"ann@{name}.example") for name in ("x.b", "x.y.b", "b")] == [OK, OK, NO_ROUTE]


# check and lookup


@pytest.fixture
def config(tmp_path: Path, mariadb: Mariadb, upstream: ScriptedUpstream) -> Callable[..., Path]:
    """A configuration file with a database in which b.example is known."""

    def write(**settings: Setting) -> Path:
        rows = (("b.example", upstream.server, False), ("nowhere.example", None, None))
        mapping = mariadb.mapping(mariadb.table(*rows), **settings)
        listen = f"{HOST}:{free_port()}"
        return write_config(
            tmp_path / "willi.conf",
            {"listen": listen, "domain": "willi.example", "dns_timeout": "0.3s", "mappings": {"db": mapping}},
        )

    return write


def test_lookup_shows_each_key_with_its_time_and_whether_it_was_remembered(
    config: Callable[..., Path], upstream: ScriptedUpstream
):
    done = run_willi("lookup", "-c", config(), "ann@b.example", "bob@b.example", "ann@c.example")
    assert done.returncode == 1
    assert re.sub(r"\(\d+\.\d ms", "(TIME ms", done.stdout).splitlines() == [
        "ann@b.example",
        "  mysql:db  ann@b.example  -  (TIME ms)",
        f"  mysql:db  b.example  {upstream.server}  (TIME ms)",
        f"  route: {upstream.server}, tls_verify = false",
        "bob@b.example",
        "  mysql:db  bob@b.example  -  (TIME ms)",
        f"  mysql:db  b.example  {upstream.server} (from the cache)  (TIME ms)",
        f"  route: {upstream.server}, tls_verify = false",
        "ann@c.example",
        "  mysql:db  ann@c.example  -  (TIME ms)",
        "  mysql:db  c.example  -  (TIME ms)",
        "  no mapping matches, the client gets 554 5.7.1 Relay access denied",
    ]


def test_lookup_says_why_there_is_no_answer(config: Callable[..., Path]):
    port = free_port()
    done = run_willi("lookup", "-c", config(host=f"{HOST}:{port}"), "ann@b.example")
    assert done.returncode == 1
    assert f"  mysql:db  ann@b.example  failed: {HOST}:{port}: Can't connect" in done.stdout
    assert "the search ends here, the client gets 451 4.3.0" in done.stdout


def test_check_shows_version_and_columns(config: Callable[..., Path], mariadb: Mariadb, certificates: Authority):
    done = run_willi("check", "-c", config(tls_ca=str(certificates.ca)))
    version = str(mariadb.query("SELECT VERSION()")[0][0])
    assert (
        f"ok     mysql:db: {mariadb.host}: {version}, TLSv1.3, certificate verified, columns server, tls_verify\n"
        in done.stdout
    )
    assert done.returncode == 0
    done = run_willi("check", "-c", config(unix_socket=str(mariadb.socket)))
    assert f"ok     mysql:db: {mariadb.socket}: {version}, no TLS, columns server, tls_verify\n" in done.stdout


def test_check_says_what_is_wrong_with_the_database(tmp_path: Path, mariadb: Mariadb):
    name = mariadb.table()
    mappings = {f"db{number}": mariadb.mapping(name, **mistake) for number, mistake in enumerate(MISTAKES.values())}
    path = tmp_path / "willi.conf"
    done = run_willi(
        "check",
        "-c",
        write_config(path, {"listen": f"{HOST}:{free_port()}", "dns_timeout": "0.3s", "mappings": mappings}),
    )
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert len(wrong) == len(MISTAKES)
    for number, (why, line) in enumerate(zip(MISTAKES, wrong, strict=True)):
        assert line.startswith(f"wrong  mysql:db{number}: ") and why in line


def test_a_query_without_a_place_for_the_pattern_is_wrong(config: Callable[..., Path]):
    done = run_willi("check", "-c", config(query="SELECT '?, ' FROM routes"))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert line.startswith("wrong  mysql:db: ") and "query: has no ? outside quotation marks" in line


def test_every_host_is_checked(config: Callable[..., Path], mariadb: Mariadb):
    port = free_port()
    done = run_willi("check", "-c", config(host=[mariadb.host, f"{HOST}:{port}"]))
    assert done.returncode == 1
    assert f"ok     mysql:db: {mariadb.host}: " in done.stdout
    assert f"wrong  mysql:db: {HOST}:{port}: Can't connect" in done.stdout


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_a_password_file_that_everybody_can_read_is_warned_of(
    mode: int, mariadb: Mariadb, config: Callable[..., Path], routed: StartWithDatabase, tmp_path: Path
):
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    file.chmod(mode)
    done = run_willi("check", "-c", config(password="", password_file=str(file)))
    assert f"ok     mysql:db: {mariadb.host}: " in done.stdout
    warning = f"warn   {file}: every user of this machine can read this secret -> chmod o= {file}\n"
    assert (warning in done.stdout) == (mode == 0o604)  # in 640 the group is that of the service
    willi = routed(password="", password_file=str(file))
    warned = willi.lines(msg="Every user of this machine can read the password file", lvl="warn", error=str(file))
    assert len(warned) == (mode == 0o604)


@pytest.mark.parametrize("content", ["", "\n", "two\nlines\n"])
def test_a_password_file_is_one_line(content: str, config: Callable[..., Path], tmp_path: Path):
    file = tmp_path / "password"
    file.write_text(content)
    done = run_willi("-c", config(password="", password_file=str(file)))
    assert done.returncode == 1
    assert f"password_file: {file} must be one line, the password" in done.stdout


def test_the_old_connection_setting_is_recognised(config: Callable[..., Path]):
    done = run_willi("check", "-c", config(connection="root:password@tcp(db:3306)/mail?tls=true"))
    assert done.returncode == 1
    assert "connection: is now written as host, port, user, password, database and tls_ca" in done.stderr
