"""The mapping `mysql` without a database: what it remembers, whom it lets wait, what it says of an outage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event

from tests.support.daemon import parse_logfmt
from tests.support.loopback import PATIENCE
from willi_lib.config import MysqlSettings
from willi_lib.mappings import cache as module
from willi_lib.mappings import known_rows
from willi_lib.mappings.cache import NO_ROW, CachedMapping
from willi_lib.mappings.known_rows import KnownRows
from willi_lib.mappings.mysql import Database
from willi_lib.mappings.row import WrongColumns, route_of
from willi_lib.mappings.source import Down, OwnLack, TooSlow, statement_of
from willi_lib.routing.route import Answer, HostFacts, LookupFailed, Policy, Route, parse_servers

TIMEOUT = 1.0  # seconds for a recipient
QUERY = "SELECT server FROM routes WHERE pattern = ?"
EVERYTHING: list[dict[str, str]] = []  # that was logged


@pytest.fixture(autouse=True)
def _limited(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing waits for ever; and `lookup`s may say a moment after TIMEOUT why they failed."""
    Watched.capfd = capfd
    EVERYTHING.clear()
    monkeypatch.setattr(module, "GRACE", 0.3)
    with gevent.Timeout(PATIENCE):
        yield


class Table:
    """What stands in for the database: routes, a fault, or no answer until `release` is set."""

    def __init__(self, **routes: str) -> None:
        self.routes = {key.replace("_", "@") if "_" in key else key: to(server) for key, server in routes.items()}
        self.fault: Exception | None = None
        self.release = Event()
        self.release.set()
        self.slow: set[str] = set()
        self.asked: list[str] = []

    def ask(self, key: str) -> Route | None:
        self.asked.append(key)
        if key in self.slow:
            gevent.sleep(TIMEOUT / 2)
            raise Down("it is slow")
        if not self.release.wait(TIMEOUT):
            raise Down("it hangs")
        if self.fault:
            raise self.fault
        return self.routes.get(key)

    def inspect_hosts(self) -> tuple[HostFacts, ...]:
        return ()

    def close(self) -> None:
        pass


def settings(query: str = QUERY, **others: Any) -> MysqlSettings:
    return MysqlSettings(name="t", policy=Policy(), query=query, **others)


class Watched:
    """A mapping over a table, and what it logged."""

    capfd: pytest.CaptureFixture[str]

    def __init__(
        self, table: Table, cache_ttl: float = 60.0, cache_size: int = 1000, stale_ttl: float = 60.0,
        rows: KnownRows | None = None, timeout: float = TIMEOUT,
    ) -> None:  # fmt: skip
        made = settings(timeout=timeout, cache_ttl=cache_ttl, cache_size=cache_size, stale_ttl=stale_ttl)
        self.mapping = CachedMapping("mysql:t", made, table, rows or KnownRows())
        self.mapping.name = f"mysql:{id(self)}"

    def find(self, *keys: str) -> list[Answer]:
        """The answers up to the first match, as `search` takes them."""
        answers = []
        for answer in self.mapping.find(keys):
            answers.append(answer)
            if answer.route:
                break
        return answers

    def fails(self, *keys: str) -> LookupFailed:
        with pytest.raises(LookupFailed) as failure:
            self.find(*keys)
        return failure.value

    @property
    def logged(self) -> list[tuple[str, str, str | None]]:
        """Level, message and error of each line."""
        EVERYTHING.extend(map(parse_logfmt, self.capfd.readouterr().out.splitlines()))
        mine = [line for line in EVERYTHING if line["mapping"] == self.mapping.name]
        return [(line["lvl"], line["msg"], line.get("error")) for line in mine]

    @property
    def levels(self) -> list[str]:
        return [level for level, _, _ in self.logged]


def to(servers: str, tls_verify: bool = True) -> Route:
    return Route(parse_servers(servers), tls_verify)


def turn_the_loop() -> None:
    """Let all others run that need not wait for a timer or a socket."""
    for _ in range(5):
        gevent.sleep(0)


def together(number: int, work: Callable[[], object]) -> list[object]:
    """Do it in so many greenlets; what each returned or raised."""
    greenlets = [gevent.spawn(work) for _ in range(number)]
    gevent.joinall(greenlets)
    return [greenlet.value if greenlet.successful() else greenlet.exception for greenlet in greenlets]


@pytest.fixture
def table() -> Table:
    return Table(b="mx1", bob_b="mx2")


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The mapping's clock: call it to let seconds pass."""
    passed = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: monotonic() + passed[0])
    return lambda seconds: passed.__setitem__(0, passed[0] + seconds)


# What is remembered


def test_keys_are_asked_in_their_order_and_not_beyond_the_match(table: Table):
    watched = Watched(table)
    assert watched.find("ann@b", "b") == [Answer(None, "asked"), Answer(to("mx1"), "asked")]
    assert watched.find("bob@b", "b") == [Answer(to("mx2"), "asked")]
    assert table.asked == ["ann@b", "b", "bob@b"]


def test_hits_and_misses_are_remembered(table: Table):
    watched = Watched(table)
    watched.find("ann@b", "b")
    assert watched.find("ann@b", "b") == [Answer(None, "cache"), Answer(to("mx1"), "cache")]
    assert table.asked == ["ann@b", "b"]


def test_an_answer_is_asked_for_again_after_cache_ttl(table: Table, time):
    watched = Watched(table, cache_ttl=60)
    watched.find("b")
    time(59.9)
    assert watched.find("b") == [Answer(to("mx1"), "cache")]
    table.routes["b"] = to("mx9")
    time(0.2)
    assert watched.find("b") == [Answer(to("mx9"), "asked")]


def test_without_cache_ttl_the_database_is_always_asked(table: Table):
    watched = Watched(table, cache_ttl=0)
    watched.find("b")
    assert watched.find("b") == [Answer(to("mx1"), "asked")]


def test_the_answer_that_nobody_wanted_longest_is_forgotten_first(table: Table):
    watched = Watched(table, cache_size=2)
    for key in ("b", "x", "b", "y"):
        watched.find(key)
    assert watched.find("b")[0].origin == "cache"
    assert watched.find("x")[0].origin == "asked"


def test_a_flood_of_unknown_recipients_does_not_drive_out_their_domain(table: Table):
    watched = Watched(table, cache_size=10)
    for number in range(100):
        watched.find(f"{number}@b", "b")
    assert table.asked.count("b") == 1


def test_a_key_that_is_longer_than_any_takes_no_memory(table: Table):
    """A client could fill it with a hundred thousand of them."""
    watched = Watched(table)
    table.routes["a" * 2000] = table.routes["b"]
    for key in ("a" * 2000, "b"):
        watched.find(key)
        watched.find(key)
    assert table.asked == ["a" * 2000, "a" * 2000, "b"]


def test_a_hundred_sessions_with_the_same_key_make_one_query(table: Table):
    watched = Watched(table)
    table.release.clear()
    asking = [gevent.spawn(watched.find, "b") for _ in range(100)]
    turn_the_loop()
    table.release.set()
    assert [one.get() for one in asking] == [[Answer(to("mx1"), "asked")]] * 100
    assert table.asked == ["b"]


def test_a_session_that_is_ended_leaves_the_query_to_the_others(table: Table):
    watched = Watched(table)
    table.release.clear()
    first = gevent.spawn(watched.find, "b")
    second = gevent.spawn(watched.find, "b")
    gevent.sleep(0)
    first.kill()
    table.release.set()
    assert second.get() == [Answer(to("mx1"), "asked")]
    assert table.asked == ["b"]


# Failures


def test_a_faulty_query_or_row_is_a_failure_with_its_text_and_no_outage(table: Table):
    watched = Watched(table)
    table.fault = LookupFailed("no such table")
    assert [(str(failure), failure.logged) for failure in (watched.fails("b"), watched.fails("b"))] == [
        ("no such table", False)
    ] * 2
    assert watched.levels == []
    table.fault = None
    assert watched.find("b") == [Answer(to("mx1"), "asked")]


def test_a_faulty_row_is_not_covered_by_what_is_remembered(table: Table, time):
    watched = Watched(table)
    watched.find("b")
    time(61)
    table.fault = LookupFailed("the row is wrong")
    assert str(watched.fails("b")) == "the row is wrong"


def test_a_bug_is_raised_in_each_session_that_asked_with_its_traceback(table: Table):
    """As a new exception: one that is raised again and again grows by its frames."""
    watched = Watched(table)
    table.fault = ZeroDivisionError("bug")

    def find() -> None:
        with pytest.raises(RuntimeError, match=r"(?s)in ask.*ZeroDivisionError: bug") as raised:
            watched.find("b")
        errors.append(raised.value)

    errors: list[RuntimeError] = []
    together(5, find)
    assert len({id(error) for error in errors}) == 5
    assert watched.levels == []


def test_the_time_limit_is_for_all_keys_of_a_recipient():
    class Slow(Table):
        def ask(self, key: str) -> Route | None:
            gevent.sleep(TIMEOUT * 0.45)
            return None

    watched = Watched(Slow())
    assert str(watched.fails("a+x@b", "a@b", "b", "c")) == f"no answer within {TIMEOUT:g} s"


# Outages


def test_an_outage_is_told_once_at_its_beginning_and_once_at_its_end(table: Table, time):
    watched = Watched(table)
    table.fault = Down("refused")
    for _ in range(10):
        failure = watched.fails("b")
        assert (str(failure), failure.logged) == ("refused", True)
        time(6)
    assert watched.logged == [("error", "Database is down", "refused")]
    table.fault = None
    watched.find("b")
    watched.find("bob@b")
    assert watched.levels == ["error", "info"]
    assert watched.logged[1][1].startswith("Database is back after 6")


def test_while_it_is_down_one_session_waits_every_five_seconds(table: Table, time):
    watched = Watched(table)
    table.release.clear()
    watched.fails("b")
    assert len(table.asked) == 1
    for number in range(50):
        assert watched.fails(f"{number}@b").logged
    assert len(table.asked) == 1
    time(5)
    failures = together(50, lambda: watched.find("b"))
    assert {str(failure) for failure in failures} <= {"it hangs", "no answer within 1 s"}
    assert len(table.asked) == 2


def test_the_next_try_is_five_seconds_after_the_end_of_the_last_one_however_long_that_took(
    table: Table, time, monkeypatch
):
    asked = []

    def hang(key: str) -> Route | None:
        asked.append(key)
        time(10)
        raise Down("it hangs")

    monkeypatch.setattr(table, "ask", hang)
    watched = Watched(table)
    for tries in (1, 2):
        watched.fails("b")
        for number in range(10):
            watched.fails(f"{number}@b")
        assert len(asked) == tries
        time(5)


def test_a_failure_that_costs_no_time_is_tried_again_after_a_second(table: Table, time):
    watched = Watched(table)
    table.fault = Down("refused")
    watched.fails("b")
    time(0.9)
    watched.fails("b")
    assert len(table.asked) == 1
    time(0.2)
    table.fault = None
    assert watched.find("b") == [Answer(to("mx1"), "asked")]


def test_sessions_with_the_same_key_do_not_wait_with_the_one_that_tries(table: Table, time):
    watched = Watched(table)
    table.release.clear()
    watched.fails("b")
    time(5)
    trying = gevent.spawn(watched.find, "b")
    gevent.sleep(0)
    watched.fails("b")
    assert not trying.ready()
    table.release.set()
    assert trying.get() == [Answer(to("mx1"), "asked")]


def test_those_who_wait_are_let_go_when_it_is_known_to_be_down(table: Table, monkeypatch):
    known = Event()

    def ask(key: str) -> None:
        (known if key == "b" else Event()).wait()
        raise Down("it hangs")

    monkeypatch.setattr(table, "ask", ask)
    watched = Watched(table, timeout=2 * PATIENCE)
    waiting = [gevent.spawn(watched.fails, key) for key in ("b", "bob@b")]
    turn_the_loop()
    known.set()
    assert [str(one.get()) for one in waiting] == ["it hangs"] * 2, "though its own time is not over"


def test_a_single_slow_key_among_answers_is_no_outage(table: Table):
    watched = Watched(table)
    table.slow.add("slow@b")
    slow = gevent.spawn(watched.fails, "slow@b")
    gevent.sleep(0)
    watched.find("b")
    failure = slow.get()
    assert (str(failure), failure.logged) == ("it is slow", False)
    assert watched.levels == []


def test_a_query_that_the_server_gives_up_is_no_outage_and_a_known_route_serves(table: Table, time):
    watched = Watched(table)
    watched.find("ann@b", "b")
    time(61)
    table.fault = TooSlow("max_statement_time exceeded")
    assert watched.find("ann@b", "b") == [Answer(None, "stale"), Answer(to("mx1"), "stale")]
    failure = watched.fails("new@b")
    assert (str(failure), failure.logged) == ("max_statement_time exceeded", False)
    assert watched.levels == []
    time(3600)
    assert str(watched.fails("b")) == "max_statement_time exceeded"


def test_a_query_that_the_server_gives_up_ends_an_outage(table: Table, time):
    watched = Watched(table)
    table.fault = Down("refused")
    watched.fails("b")
    time(6)
    table.fault = TooSlow("max_statement_time exceeded")
    watched.fails("b")
    assert watched.levels == ["error", "info"]


def test_what_we_lack_ourselves_is_no_outage_and_a_known_route_serves(table: Table, time):
    watched = Watched(table)
    watched.find("b")
    time(61)
    table.fault = OwnLack("Too many open files")
    assert watched.find("b") == [Answer(to("mx1"), "stale")]
    failure = watched.fails("new@b")
    assert (str(failure), failure.logged) == ("Too many open files", False), "for the log"
    assert watched.logged == []
    table.fault = None
    assert watched.find("new@b", "b") == [Answer(None, "asked"), Answer(to("mx1"), "asked")]


def test_a_known_route_serves_while_the_database_is_down_and_that_is_told_once(table: Table, time):
    watched = Watched(table, stale_ttl=3600)
    watched.find("ann@b", "b")
    time(61)
    table.fault = Down("refused")
    for _ in range(3):
        assert watched.find("ann@b", "b") == [Answer(None, "stale"), Answer(to("mx1"), "stale")]
    assert watched.logged == [
        ("error", "Database is down", "refused"),
        ("warn", "Using remembered answers of the database", None),
    ]


def test_a_known_route_does_not_wait_while_the_database_is_down_and_still_finds_out_that_it_is_back(table: Table, time):
    watched = Watched(table, stale_ttl=3600)
    watched.find("b")
    time(61)
    table.release.clear()
    watched.find("b")
    time(6)
    finding = gevent.spawn(watched.find, "b")
    turn_the_loop()
    assert finding.ready(), "no timer had to strike"
    assert finding.get() == [Answer(to("mx1"), "stale")]
    table.release.set()
    turn_the_loop()
    assert watched.levels == ["error", "warn", "info"]
    assert watched.find("b") == [Answer(to("mx1"), "cache")]


def test_after_stale_ttl_nothing_serves(table: Table, time):
    watched = Watched(table, stale_ttl=3600)
    watched.find("b")
    time(3659)
    table.fault = Down("refused")
    assert watched.find("b") == [Answer(to("mx1"), "stale")]
    time(2)
    watched.fails("b")


def test_an_old_no_never_becomes_a_definite_one(table: Table, time):
    watched = Watched(table)
    watched.find("b")
    assert watched.find("ann@c", "c") == [Answer(None, "asked")] * 2
    time(61)
    table.fault = Down("refused")
    assert str(watched.fails("ann@c", "c")) == "the database is down, and no route is remembered"
    assert watched.fails("ann@c", "c").logged


def test_a_fresh_no_is_definite_even_while_the_database_is_down(table: Table):
    watched = Watched(table)
    watched.find("b")
    watched.find("ann@c", "c")
    table.fault = Down("refused")
    watched.fails("x")
    assert watched.find("ann@c", "c") == [Answer(None, "cache")] * 2


# A table that is emptied and filled again


def test_a_row_that_was_there_and_is_missing_is_no_definite_no_for_a_minute(table: Table, time):
    watched = Watched(table)
    watched.find("b")
    row = table.routes.pop("b")
    time(61)
    for _ in range(2):
        failure = watched.fails("b")
        assert (str(failure), failure.logged) == ("the row for 'b' was there, and is missing", True)
        time(20)
    assert [(level, error) for level, _, error in watched.logged] == [("warn", "b")]
    table.routes["b"] = row
    assert watched.find("b") == [Answer(row, "asked")]
    del table.routes["b"]
    time(61)
    watched.fails("b")
    time(61)
    assert watched.find("b") == [Answer(None, "unsure")], "the table may still be empty"
    watched.find("bob@b")
    assert watched.find("b") == [Answer(None, "asked")]
    assert watched.find("b") == [Answer(None, "cache")]


def test_from_an_emptied_table_comes_no_definite_no_for_what_is_asked_for_the_first_time(table: Table, time):
    watched = Watched(table)
    watched.find("b")
    rows, table.routes = table.routes, {}
    for _ in range(2):
        assert str(watched.fails("ann@c", "c")) == "the row for 'b' was there, and is missing"
    table.routes = {**rows, "c": to("mx3")}
    assert watched.find("ann@c", "c")[-1] == Answer(to("mx3"), "asked"), "what the empty table said is forgotten"
    assert watched.find("d") == [Answer(None, "asked")]


def test_a_no_is_confirmed_once_and_not_beyond_the_end_of_the_last_row_itself(table: Table, time):
    watched = Watched(table)
    watched.find("b")
    table.asked.clear()
    for origin in ("asked", "cache", "cache"):
        assert watched.find("c") == [Answer(None, origin)]
    assert table.asked == ["c", "b"]
    table.routes.clear()
    watched.fails("d")
    time(61)
    assert watched.find("d") == [Answer(None, "unsure")]


def test_a_worker_that_has_found_no_row_is_as_careful_as_the_one_that_has(table: Table, time):
    known = KnownRows()
    watched, other = Watched(table, rows=known), Watched(table, rows=known)
    watched.find("b")
    rows, table.routes = table.routes, {}
    for _ in range(2):
        assert str(other.fails("ann@c", "c")) == "the row for 'b' was there, and is missing"
        assert str(other.fails("b")) == "the row for 'b' was there, and is missing"
        time(20)
    assert [(level, error) for level, _, error in other.logged] == [("warn", "b")]
    time(61)
    assert other.find("c") == [Answer(None, "unsure")], "a row is missing, and none has been found since"
    table.routes = rows
    watched.find("b")
    assert other.find("c") == [Answer(None, "asked")]


def test_before_the_database_has_shown_a_row_a_no_is_not_definite_and_not_remembered(table: Table):
    watched = Watched(table)
    for _ in range(2):
        assert watched.find("ann@c", "c") == [Answer(None, "asked"), Answer(None, "unsure")]
    assert [(level, text) for level, text, _ in watched.logged] == [("warn", NO_ROW)]
    watched.find("b")
    assert watched.find("ann@c", "c") == [Answer(None, "asked")] * 2


def test_a_row_that_another_worker_has_seen_since_confirms_a_no_without_a_query(table: Table):
    known = KnownRows()
    watched, other = Watched(table, rows=known), Watched(table, rows=known)
    watched.find("b")
    other.find("c")
    watched.find("bob@b")
    table.asked.clear()
    assert other.find("c") == [Answer(None, "cache")]
    assert table.asked == []


def test_a_row_that_only_another_worker_has_found_is_no_definite_no_in_a_half_filled_table(table: Table, time):
    """The row that was found last is there again, the other one not yet."""
    rows = KnownRows()
    watched, other = Watched(table, rows=rows), Watched(table, rows=rows)
    watched.find("b")
    watched.find("bob@b")
    row = table.routes.pop("b")
    for _ in range(2):
        assert str(other.fails("ann@b", "b")) == "the row for 'b' was there, and is missing"
        time(20)
    table.routes["b"] = row
    assert other.find("ann@b", "b")[-1] == Answer(row, "asked")
    del table.routes["b"]
    time(61)
    other.fails("b")
    time(61)
    watched.find("bob@b")
    assert other.find("b") == [Answer(None, "asked")]
    assert watched.find("b") == [Answer(None, "asked")], "one worker believes it for all"


def test_the_last_row_is_the_one_that_was_found_last():
    rows = KnownRows()
    assert rows.last() == ("", 0.0)
    rows.note("münchen.example", 12.5)
    assert rows.last() == ("münchen.example", 12.5)
    rows.forget_last("b.example")
    assert rows.last() == ("münchen.example", 12.5)
    rows.note("x" * 2000, 13.0)
    assert rows.last() == ("münchen.example", 12.5), "a key that has no room is not noted"
    rows.note("b.example", 14.0)
    rows.forget_last("b.example")
    assert rows.last()[0] == ""


def test_while_two_writes_at_once_have_left_half_a_last_row_no_definite_no_is_said(table: Table):
    rows = KnownRows()
    watched = Watched(table, rows=rows)
    watched.find("bob@b")
    rows._last[13:14] = b"\xff"
    assert watched.find("c") == [Answer(None, "unsure")]
    watched.find("b")
    assert watched.find("c") == [Answer(None, "asked")]


def test_all_rows_that_workers_have_found_are_known_and_when_they_were_missed_first(monkeypatch: pytest.MonkeyPatch):
    rows = KnownRows()
    assert rows.missing_since("b.example") is None
    rows.note("b.example", 12.5)
    rows.note("c.example", 12.5)
    rows.note_missing("b.example", 13.5)
    assert [rows.missing_since(key) for key in ("b.example", "c.example", "d.example")] == [13.0, 0.0, None]
    rows.note("b.example", 14.0)
    assert rows.missing_since("b.example") == 0.0
    monkeypatch.setattr(known_rows, "SLOTS", 1)
    rows.note("e.example", 15.0)
    assert [rows.missing_since(key) for key in ("c.example", "e.example")] == [None, 0.0], "the newer one is known"


def test_a_no_that_cannot_be_confirmed_is_a_failure(table: Table):
    watched = Watched(table)
    watched.find("b")
    table.slow.add("b")
    assert str(watched.fails("c")) == "it is slow"


# The query


@pytest.mark.parametrize(
    ("query", "statement", "parameters"),
    [
        ("SELECT server FROM t WHERE p = ?", "SELECT server FROM t WHERE p = %s", 1),
        ("SELECT s FROM t WHERE p = ? OR q = ?", "SELECT s FROM t WHERE p = %s OR q = %s", 2),
        ("SELECT s FROM t WHERE p = ? AND q LIKE '%x'", "SELECT s FROM t WHERE p = %s AND q LIKE '%%x'", 1),
        ("SELECT 10 % 3 FROM t WHERE p = ? % 2", "SELECT 10 %% 3 FROM t WHERE p = %s %% 2", 1),
        ("SELECT '%s', s FROM t WHERE p=?", "SELECT '%%s', s FROM t WHERE p=%s", 1),
        ("SELECT 'what?' FROM t WHERE p=?", "SELECT 'what?' FROM t WHERE p=%s", 1),
        ("SELECT 'it''s?', 'it\\'s?' FROM t WHERE p=?", "SELECT 'it''s?', 'it\\'s?' FROM t WHERE p=%s", 1),
        ('SELECT "what?" FROM `t?` WHERE p=?', 'SELECT "what?" FROM `t?` WHERE p=%s', 1),
        ("SELECT s -- why?\nFROM t /* ? */ WHERE p=? # ?", "SELECT s -- why?\nFROM t /* ? */ WHERE p=%s # ?", 1),
    ],
)
def test_only_a_question_mark_outside_quotation_marks_stands_for_the_key(query, statement, parameters):
    assert statement_of(query) == (statement, parameters)


@pytest.mark.parametrize("query", ["SELECT server FROM t", "SELECT 'what?'", "SELECT 1 /* ? */"])
def test_a_query_without_one_is_refused(query):
    with pytest.raises(ValueError, match=r"has no \? outside quotation marks"):
        Database(settings(query), "mysql:t")


def test_a_tls_ca_that_is_no_certificate_is_refused(tmp_path):
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    with pytest.raises(ValueError, match=f"tls_ca: {file}: has no certificate in PEM, which begins with"):
        Database(settings(tls_ca=str(file)), "mysql:t")


def test_a_password_is_not_shown():
    assert "secret" not in repr(settings(password="secret"))


# Its rows


def route(columns: str, *row: object) -> Route | None:
    return route_of(Policy(), "mysql:t", "b.example", columns.split(), row or None)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ("server", ("mx1",), to("mx1")),
        ("server tls_verify", ("mx1:26, mx2", "no"), to("mx1:26,mx2", False)),
        ("tls_verify server", (0, "mx1"), to("mx1", False)),
        ("SERVER Tls_Verify", ("mx1", 1), to("mx1")),
        ("server tls_verify", ("mx1", None), to("mx1")),
        ("server tls_verify", ("mx1", ""), to("mx1")),
        ("server tls_verify", ("mx1", b"\0"), to("mx1", False)),
        ("server tls_verify", (b"mx1", b"\1"), to("mx1")),
        ("server tls_verify", (b"mx1", b"False"), to("mx1", False)),
        ("server tls_verify", (" mx1 ", " TRUE "), to("mx1")),
        ("server tls_verify", (None, 1), None),
        ("server tls_verify", ("", 1), None),
        ("server tls_verify", ("  ", "maybe"), None),
        ("server", (), None),
    ],
)
def test_a_row_is_a_route_by_the_names_of_its_columns(columns, row, expected):
    assert route(columns, *row) == expected


@pytest.mark.parametrize(
    ("columns", "row", "why"),
    [
        ("server tls_verify", ("mx1", "maybe"), "the row for 'b.example': 'maybe': tls_verify must be true or false"),
        ("server tls_verify", ("mx1", 2), "the row for 'b.example': '2': tls_verify must be true or false"),
        ("server", ("mx1:0",), "the row for 'b.example': 'mx1:0': the port must be 1 to 65535"),
        ("server", (b"\xff",), "the row for 'b.example': 'utf-8' codec can't decode"),
        ("server tls_verify", (7, 1), "the row for 'b.example': '7': not a host name"),
        ("server tls_verify port", (), "not: server, tls_verify, port"),
        ("server port", ("mx1", 25), "not: server, port"),
        ("tls_verify", (1,), "not: tls_verify"),
        ("server server", ("mx1", "mx2"), "not: server, server"),
        ("", (), "not: none"),
    ],
)
def test_what_is_no_route_is_a_failure_with_a_reason(columns, row, why):
    with pytest.raises((LookupFailed, WrongColumns)) as failure:
        route(columns, *row)
    assert why in str(failure.value)


def test_equal_routes_are_one_object():
    first, second = (route_of(Policy(), "mysql:t", key, ["server"], ["mx"]) for key in "ab")
    assert first is second
    assert first and first.mapping == "mysql:t"
