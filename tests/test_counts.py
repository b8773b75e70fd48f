"""What a worker counts, and how it gets to the status process: nothing is lost on the way, nothing counted twice."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from types import SimpleNamespace

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib.config import Address, Settings
from willi_lib.mappings.static import Static
from willi_lib.processes.limits import Limits
from willi_lib.processes.scoreboard import Row as ScoreboardRow
from willi_lib.processes.scoreboard import Scoreboard
from willi_lib.routing.route import Route, Server
from willi_lib.status import counts as module
from willi_lib.status import reporter
from willi_lib.status.counts import (
    BOUNDS,
    CONNECT_SECONDS,
    CONNECTS,
    LOST,
    MAX_EVENTS,
    MAX_HOSTS,
    MAX_TEXT,
    MESSAGES,
    OPENED,
    OTHER,
    SESSION_SECONDS,
    SESSIONS,
    Counts,
    HostState,
    Row,
)
from willi_lib.status.reports import MAX_ANY, MAX_DATAGRAM, Links, packed, parse, send, send_counts

HOST = "mail.example:25"


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links()
    yield links
    for end in vars(links).values():
        end.close()


def received(reader: socket.socket) -> list[Row]:
    """The rows of all datagrams that are there."""
    rows: list[Row] = []
    while True:
        try:
            rows += parse(reader.recv(MAX_ANY)).get("rows", [])
        except BlockingIOError:
            return rows


def numbers(rows: list[Row]) -> dict[tuple[str, ...], float]:
    """The counters among the rows, added up."""
    found: Counter[tuple[str, ...]] = Counter()
    for kind, *row in rows:
        if kind == module.NUMBER:
            found[tuple(row[1:])] += row[0]
    return dict(found)


def states(rows: list[Row]) -> dict[str, HostState]:
    return {row[1]: HostState(*row[2:]) for row in rows if row[0] == module.HOST}


# Counting


def test_what_is_taken_is_not_taken_again():
    counts = Counts()
    counts.add(SESSIONS)
    counts.add(SESSIONS)
    counts.add(MESSAGES, "accepted", "csv:/x")
    assert numbers(counts.take()) == {(SESSIONS,): 2, (MESSAGES, "accepted", "csv:/x"): 1}
    assert counts.take() == []


@pytest.mark.parametrize("name", BOUNDS)
def test_a_duration_at_a_bound_belongs_below_it_and_a_longer_one_above(name: str):
    for number, bound in enumerate(BOUNDS[name]):
        counts = Counts()
        counts.took(bound, name)
        counts.took(bound * 1.0001, name)
        [[_, row, key]] = counts.take()
        assert key == name
        assert row[number : number + 2] == [1, 1]
        assert sum(row[:-1]) == 2
        assert row[-1] == pytest.approx(bound * 2.0001)


def test_only_the_last_events_are_kept_with_the_words_of_the_log():
    counts = Counts()
    for number in range(MAX_EVENTS + 5):
        counts.event("rejected", {"sid": f"S{number}", "from": "ann@a.example", "error": None, "bytes": number})
    rows = counts.take()
    assert len(rows) == MAX_EVENTS
    assert rows[0][2:] == ["rejected", "S5", "", "ann@a.example", "", "", "", "", "", 5, 0.0]
    assert rows[-1][3] == f"S{MAX_EVENTS + 4}"


def test_long_words_are_cut():
    counts = Counts()
    counts.event("rejected", {"to": "x" * MAX_TEXT, "error": "y" * (MAX_TEXT + 1)})
    [row] = counts.take()
    assert "x" * MAX_TEXT in row
    assert "y" * MAX_TEXT + "..." in row


def test_what_is_counted_together_becomes_all_the_numbers_that_it_stands_for():
    counts = Counts()
    counts.message("accepted", "csv:a", HOST, recipients=3, octets=100)
    counts.message("accepted", "csv:a", HOST, recipients=1, octets=10)
    counts.message("failed", "csv:a", "", recipients=1, octets=0, whole=False)
    counts.opened(HOST, 0.25, "TLSv1.3", "accepted")
    counts.looked_up(0.5, "csv:a", "hit")
    counts.looked_up(0.5, "csv:a", "miss")
    counts.session_ended(2.0, "none")
    rows = counts.take()
    assert numbers(rows) == {
        ("verdicts", "accepted"): 2,
        ("verdicts", "failed"): 1,
        ("messages", "accepted", "csv:a"): 2,
        ("recipients", "accepted", "csv:a"): 4,
        ("recipients", "failed", "csv:a"): 1,
        ("octets", "csv:a"): 110,
        ("upstream_messages", HOST, "accepted"): 2,
        ("upstream_octets", HOST): 110,
        ("upstream_connects", HOST, "opened"): 1,
        ("upstream_greetings", HOST): 1,
        ("upstream_greeting_seconds", HOST): 0.25,
        ("tls", "upstream", "TLSv1.3"): 1,
        ("tls", "client", "none"): 1,
        ("xclient", "accepted"): 1,
        ("lookups", "csv:a", "hit"): 1,
        ("lookups", "csv:a", "miss"): 1,
    }
    durations = {tuple(row[2:]): (sum(row[1][:-1]), row[1][-1]) for row in rows if row[0] == module.DURATION}
    assert durations == {
        ("session_duration_seconds",): (1, 2.0),
        ("upstream_connect_duration_seconds",): (1, 0.25),
        ("lookup_duration_seconds", "csv:a"): (2, 1.0),
    }


def test_a_million_hosts_are_no_more_than_a_few_hundred_rows():
    counts = Counts()
    for number in range(MAX_HOSTS + 50):
        counts.opened(f"mx{number}.example:25", 0.1, "none", "off")
        counts.lost(f"mx{number}.example:25", "lost")
    rows = counts.take()
    found = numbers(rows)
    assert found[CONNECTS, OTHER, OPENED] == 50
    assert found[LOST, OTHER] == 50
    assert len({key[1] for key in found if key[0] == CONNECTS}) == MAX_HOSTS + 1
    assert len(states(rows)) == MAX_HOSTS
    assert sum(sum(row[1][:-1]) for row in rows if row[0] == module.DURATION and row[2] == CONNECT_SECONDS) == 250


def test_a_host_that_is_reached_again_is_not_failing(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", lambda: now[0])
    counts = Counts()
    counts.not_opened(HOST, "refused")
    now[0] = 101.0
    counts.not_opened(HOST, "no answer")
    assert states(counts.take()) == {HOST: HostState(0.0, 100.0, 101.0, "no answer")}
    counts.not_opened(HOST, "no answer")
    now[0] = 102.0
    counts.opened(HOST, 0.1, "none", "off")
    assert states(counts.take()) == {HOST: HostState(102.0, 0.0, 101.0, "no answer")}


@pytest.mark.parametrize(
    ("one", "other", "since"),
    [
        (HostState(), HostState(0, 5, 9, "x"), 5),
        (HostState(3, 5, 9, "x"), HostState(7, 0, 0, ""), 9),  # it was reached in between, and failed again
        (HostState(3, 5, 6, "x"), HostState(7, 0, 0, ""), 0),
        (HostState(3, 5, 6, "x"), HostState(0, 4, 4, "x"), 4),
        (HostState(7, 0, 2, "x"), HostState(0, 5, 6, "y"), 0),  # told late
    ],
)
def test_what_two_workers_have_met_is_put_in_order(one: HostState, other: HostState, since: float):
    for first, second in ((one, other), (other, one)):
        merged = HostState(*vars(first).values())
        merged.merge(second)
        assert merged.failing_since == since
        assert merged.reached == max(one.reached, other.reached)


# On the way


def test_all_that_was_counted_arrives(links: Links):
    counts = Counts()
    counts.add(SESSIONS, number=3)
    counts.took(0.2, SESSION_SECONDS)
    counts.event("accepted", {"to": "grün@example.org", "bytes": 7, "duration": 0.5})
    assert send_counts(links.to_reports, counts)
    number, duration, event = received(links.reports)
    assert number == [module.NUMBER, 3, SESSIONS]
    assert (sum(duration[1][:-1]), duration[1][-1], duration[2:]) == (1, 0.2, [SESSION_SECONDS])
    assert event[2:] == ["accepted", "", "", "", "grün@example.org", "", "", "", "", 7, 0.5]
    assert counts.take() == []


def test_what_nobody_takes_stays_and_arrives_later(links: Links):
    counts = Counts()
    sent = 0
    for _ in range(1000):
        counts.add(SESSIONS)
        sent += 1
        if not send_counts(links.to_reports, counts):
            break
    else:
        raise AssertionError("a reader that does not read takes all of it")
    counts.add(SESSIONS)
    first = numbers(received(links.reports))[SESSIONS,]
    assert send_counts(links.to_reports, counts)
    assert first + numbers(received(links.reports))[SESSIONS,] == sent + 1


@given(rounds=st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=12))
def test_nothing_is_lost_or_told_twice_however_slow_the_reader(rounds: list[tuple[int, bool]]):
    links, counts = Links(), Counts()
    told: list[Row] = []
    expected: Counter[tuple[str, ...]] = Counter()
    try:
        for hosts, reads in rounds:
            for number in range(hosts):
                counts.lost(f"{'x' * 200}{number}", "y" * 400)
                expected[LOST, "", ""] += 1
            send_counts(links.to_reports, counts)
            if reads:
                told += received(links.reports)
        while not send_counts(links.to_reports, counts):
            told += received(links.reports)
        told += received(links.reports)
    finally:
        for end in vars(links).values():
            end.close()
    assert sum(numbers(told).values()) == sum(expected.values())


def test_hosts_that_come_back_leave_no_room_for_more():
    counts = Counts()
    for number in range(3 * MAX_HOSTS):
        counts.message("accepted", "csv:a", f"mx{number}.example:25", recipients=1, octets=1)
        if number % MAX_HOSTS == MAX_HOSTS - 1:
            counts.put_back(counts.take())
    found = numbers(counts.take())
    hosts = {key[1] for key in found if key[0] == "upstream_messages"}
    assert len(hosts) == MAX_HOSTS + 1
    assert found["upstream_messages", OTHER, "accepted"] == 2 * MAX_HOSTS


def test_a_worker_has_a_report_that_fits_however_much_there_is_to_tell(links: Links, monkeypatch):
    names = [f"{number}.{'x' * 60}.example" for number in range(200)]
    facts = SimpleNamespace(names=names, expires=datetime.now(timezone.utc))
    monkeypatch.setattr(reporter, "certificate_facts", lambda pair: facts)
    files = tuple(f"{number}.pem" for number in range(200))
    settings = Settings(
        path="willi.conf", mappings=(), tls_cert=files, tls_key=files, status_listen=Address("127.0.0.1", 8025)
    )
    mappings = [Static(f"static:{'x' * 200}{number}", Route((Server("a"),))) for number in range(1000)]
    limits = Limits(ScoreboardRow(Scoreboard(1, rates=False), 0), 1, 1, 0)
    telling = gevent.spawn(reporter.Reporter(settings, mappings, limits, Counts(), links).report, lambda: 7)
    gevent.sleep(0)
    telling.kill()
    told = parse(links.reports.recv(MAX_ANY))["worker"]
    assert told["sessions"] == 7
    assert [table["name"] for table in told["tables"]] == [mapping.name for mapping in mappings[: len(told["tables"])]]
    assert min(len(told["tables"]), len(told["certificates"])) > 1


def test_what_comes_back_stays_in_order():
    counts = Counts()
    for number in range(3):
        counts.event("accepted", {"bytes": number})
    rows = counts.take()
    counts.event("accepted", {"bytes": 3})
    counts.put_back(rows)
    assert [row[-2] for row in counts.take()] == [0, 1, 2, 3]


def test_a_datagram_has_its_limit():
    rows: list[Row] = [[module.NUMBER, 1, "x" * 1000, str(number)] for number in range(100)]
    parts = list(packed(rows))
    assert [row for part in parts for row in part] == rows
    assert len(parts) == 4
    assert all(sum(len(row[2]) for row in part) < MAX_DATAGRAM for part in parts)


def test_a_report_that_cannot_be_sent_does_no_harm(links: Links):
    assert not send(links.to_reports, {"x": "x" * (1 << 20)})


@pytest.mark.parametrize("octets", [b"", b"\xff", b"[1]", b"7", b"{", b"null"])
def test_what_is_no_report_is_an_empty_one(octets: bytes):
    assert parse(octets) == {}
