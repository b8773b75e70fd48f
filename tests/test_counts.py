"""What a worker counts, and how it gets to the status process: how much so far, so that no lost report matters."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from time import monotonic
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import pytest

from tests.support.loopback import PATIENCE
from willi_lib.config import Address, Settings, StaticSettings
from willi_lib.mappings.open import Static
from willi_lib.routing.route import Policy, Server
from willi_lib.status import counts as module
from willi_lib.status import reporter
from willi_lib.status.counts import (
    CONNECT_SECONDS,
    CONNECTS,
    LOST,
    MAX_EVENTS,
    MAX_HOSTS,
    MAX_TEXT,
    MESSAGES,
    OPENED,
    OTHER,
    REFUSED,
    SESSION_SECONDS,
    SESSIONS,
    TABLE,
    Counts,
    Event,
    HostState,
    Row,
)
from willi_lib.status.reports import MAX_DATAGRAM, Asked, AskedStep, Links, packed, receive, send

HOST = "mail.example:25"


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links()
    yield links
    for end in vars(links).values():
        end.close()


def received(reader: socket.socket) -> list[dict[str, Any]]:
    """The reports of a worker that are there."""
    reports = []
    while True:
        try:
            reports.append(receive(reader)["worker"])
        except BlockingIOError:
            return reports


def numbers(rows: list[Row]) -> dict[tuple[str, ...], float]:
    """The counters among the rows."""
    return {(name, *labels): value for name, labels, value in rows if isinstance(value, int | float)}


def durations(rows: list[Row]) -> dict[tuple[str, ...], list[float]]:
    return {(name, *labels): value for name, labels, value in rows if isinstance(value, list)}


def states(rows: list[Row]) -> dict[str, HostState]:
    return {labels[0]: HostState(**value) for name, labels, value in rows if name == module.HOST}


def events(rows: list[Row]) -> list[Event]:
    return [Event(**value) for name, _, value in rows if name == module.EVENT]


# Counting


def test_rows_say_how_much_so_far():
    counts = Counts()
    counts.add(SESSIONS, number=2)
    counts.add(MESSAGES, "accepted", "csv:/x")
    counts.took(0.2, SESSION_SECONDS)
    for _ in range(2):
        assert numbers(counts.rows()) == {("sessions",): 2, ("messages", "accepted", "csv:/x"): 1}
    counts.add(SESSIONS)
    counts.took(0.3, SESSION_SECONDS)
    rows = counts.rows()
    assert numbers(rows)["sessions",] == 3
    [row] = durations(rows).values()
    assert sum(row[:-1]) == 2
    assert row[-1] == pytest.approx(0.5)


HISTOGRAMS = [metric for metric in TABLE.values() if metric.kind == module.HISTOGRAM]


@pytest.mark.parametrize("metric", HISTOGRAMS, ids=lambda metric: metric.name)
def test_a_duration_at_a_bound_belongs_below_it_and_a_longer_one_above(metric: module.Metric):
    for number, bound in enumerate(metric.bounds):
        counts = Counts()
        counts.took(bound, metric)
        counts.took(bound * 1.0001, metric)
        [(key, row)] = durations(counts.rows()).items()
        assert key == (metric.name,)
        assert row[number : number + 2] == [1, 1]
        assert sum(row[:-1]) == 2
        assert row[-1] == pytest.approx(bound * 2.0001)


def test_only_the_last_events_are_reported_once_with_the_words_of_the_log():
    counts = Counts()
    for number in range(MAX_EVENTS + 5):
        counts.event("rejected", {"sid": f"S{number}", "from": "ann@a.example", "error": None, "bytes": number})
    found = events(counts.rows())
    assert [event.sid for event in found] == [f"S{number}" for number in range(5, MAX_EVENTS + 5)]
    assert found[0] == Event(found[0].at, "rejected", "S5", "", "ann@a.example", "", "", "", "", "", 5, 0.0)
    assert events(counts.rows()) == []


def test_long_words_are_cut():
    counts = Counts()
    counts.event("rejected", {"to": "x" * MAX_TEXT, "error": "y" * (MAX_TEXT + 1)})
    counts.lost(HOST, "z" * (MAX_TEXT + 1))
    rows = counts.rows()
    [event] = events(rows)
    assert (event.recipients, event.error) == ("x" * MAX_TEXT, "y" * MAX_TEXT + "...")
    assert states(rows)[HOST].error == "z" * MAX_TEXT + "..."


def test_what_is_counted_together_becomes_all_the_numbers_that_it_stands_for():
    counts = Counts()
    counts.message("accepted", "csv:a", HOST, recipients=3, octets=100)
    counts.message("accepted", "csv:a", HOST, recipients=1, octets=10)
    counts.message("failed", "csv:a", "", recipients=1, octets=0, whole=False)
    counts.opened(HOST, 0.25, "TLSv1.3", "accepted")
    counts.looked_up(0.5, "csv:a", "hit")
    counts.looked_up(0.5, "csv:a", "miss")
    counts.session_ended(2.0, "none")
    rows = counts.rows()
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
        ("tls", "upstream", "TLSv1.3"): 1,
        ("tls", "client", "none"): 1,
        ("xclient", "accepted"): 1,
        ("lookups", "csv:a", "hit"): 1,
        ("lookups", "csv:a", "miss"): 1,
    }
    assert {key: (sum(row[:-1]), row[-1]) for key, row in durations(rows).items()} == {
        ("session_duration_seconds",): (1, 2.0),
        ("upstream_connect_duration_seconds",): (1, 0.25),
        ("upstream_greeting_seconds", HOST): (1, 0.25),
        ("lookup_duration_seconds", "csv:a"): (2, 1.0),
    }


def test_a_million_hosts_are_no_more_than_a_few_hundred_rows():
    counts = Counts()
    for number in range(MAX_HOSTS + 50):
        counts.opened(f"mx{number}.example:25", 0.1, "none", "off")
        counts.lost(f"mx{number}.example:25", "lost")
    rows = counts.rows()
    found = numbers(rows)
    assert found[CONNECTS.name, OTHER, OPENED] == 50
    assert found[LOST.name, OTHER] == 50
    assert len({key[1] for key in found if key[0] == CONNECTS.name}) == MAX_HOSTS + 1
    assert len(states(rows)) == MAX_HOSTS
    assert sum(durations(rows)[CONNECT_SECONDS.name,][:-1]) == 250


def test_a_host_that_is_reached_again_is_not_failing(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", lambda: now[0])
    counts = Counts()
    counts.not_opened(HOST, "refused")
    now[0] = 101.0
    counts.not_opened(HOST, "no answer")
    assert states(counts.rows()) == {HOST: HostState(0.0, 100.0, 101.0, "no answer")}
    counts.not_opened(HOST, "no answer")
    now[0] = 102.0
    counts.opened(HOST, 0.1, "none", "off")
    assert states(counts.rows()) == {HOST: HostState(102.0, 0.0, 101.0, "no answer")}


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


def reporter_of(
    counts: Counts, links: Links, files: tuple[str, ...] = (), mappings: int = 0, steps: tuple[AskedStep, ...] = ()
) -> reporter.Reporter:
    settings = Settings(
        path="willi.conf", mappings=(), tls_cert=files, tls_key=files, status_listen=Address("127.0.0.1", 8025)
    )
    tables = [Static(StaticSettings(f"{'x' * 200}{number}", Policy(), (Server("a"),))) for number in range(mappings)]
    peaks = {"max_connections_per_ip": 3}
    return reporter.Reporter(settings, tables, counts, links, lambda: peaks, lambda _: Asked("", steps, "asked"))


def report_once(worker: reporter.Reporter) -> None:
    """What it reports at once, with seven open sessions."""
    telling = gevent.spawn(worker.report, lambda: 7)
    gevent.sleep(0)
    telling.kill()


def test_all_that_was_counted_arrives(links: Links):
    counts = Counts()
    counts.add(SESSIONS, number=3)
    counts.took(0.2, SESSION_SECONDS)
    counts.event("accepted", {"to": "grün@example.org", "bytes": 7, "duration": 0.5})
    report_once(reporter_of(counts, links))
    [report] = received(links.reports)
    assert (report["pid"], report["began"], report["sessions"]) == (os.getpid(), counts.began, 7)
    assert report["peaks"] == {"max_connections_per_ip": 3}
    assert numbers(report["rows"]) == {("sessions",): 3}
    assert durations(report["rows"])[SESSION_SECONDS.name,][-1] == 0.2
    [event] = events(report["rows"])
    assert (event.recipients, event.octets, event.seconds) == ("grün@example.org", 7, 0.5)


def test_a_lost_report_is_made_up_for_by_the_next_one(links: Links, monkeypatch):
    monkeypatch.setattr(reporter, "PATIENCE", 0.0)
    counts = Counts()
    worker = reporter_of(counts, links)
    while send(links.to_reports, worker={}):
        pass
    counts.add(REFUSED, "draining")
    report_once(worker)
    assert not any(received(links.reports)), "a reader that does not read takes all of it"
    counts.add(REFUSED, "draining")
    report_once(worker)
    [report] = received(links.reports)
    assert numbers(report["rows"]) == {("sessions_refused", "draining"): 2}


def test_the_last_report_waits_for_a_reader_that_is_slow_and_not_for_ever(links: Links, monkeypatch):
    monkeypatch.setattr(reporter, "PATIENCE", 60.0)  # two seconds are short on a loaded machine
    while send(links.to_reports, worker={}):
        pass
    counts = Counts()
    counts.add(SESSIONS)
    worker = reporter_of(counts, links)
    finishing = gevent.spawn(worker.finish)
    gevent.sleep(0)
    assert not finishing.ready()
    received(links.reports)
    finishing.get(timeout=60)
    [report] = received(links.reports)
    assert numbers(report["rows"]) == {("sessions",): 1}
    monkeypatch.setattr(reporter, "PATIENCE", 0.0)
    while send(links.to_reports, worker={}):
        pass
    gevent.spawn(worker.finish).get(timeout=60)


def test_a_worker_has_a_report_that_fits_however_much_there_is_to_tell(links: Links, monkeypatch):
    names = [f"{number}.{'x' * 60}.example" for number in range(200)]
    facts = SimpleNamespace(names=names, expires=datetime.now(timezone.utc))
    monkeypatch.setattr(reporter, "certificate_facts", lambda pair: facts)
    monkeypatch.setattr(reporter, "PATIENCE", 60.0)  # two seconds are short on a loaded machine
    counts = Counts()
    for number in range(MAX_HOSTS):
        counts.lost(f"{'y' * 200}{number}", "ü" * 400)
    worker = reporter_of(counts, links, files=tuple(f"{number}.pem" for number in range(200)), mappings=1000)
    telling = gevent.spawn(worker.finish)
    reports: list[dict[str, Any]] = []
    with gevent.Timeout(60):
        while not telling.ready():
            reports += received(links.reports)
            gevent.sleep(0)
    reports += received(links.reports)
    assert [mapping["name"][-1] for mapping in reports[0]["mappings"][:2]] == ["0", "1"]
    assert min(len(reports[0]["mappings"]), len(reports[0]["certificates"])) > 1
    assert {report["turn"] for report in reports} == {0}
    rows = [row for report in reports for row in report["rows"]]
    assert len(numbers(rows)) == len(states(rows)) == MAX_HOSTS


def test_an_answer_with_the_keys_of_very_many_mappings_is_sent_as_far_as_it_fits(links: Links):
    steps = tuple(AskedStep("csv:/t.csv", "x" * 100, "-", None) for _ in range(10_000))
    answering = gevent.spawn(reporter_of(Counts(), links, steps=steps).answer_questions)
    send(links.to_questions, number=7, address="ann@b.example", asked_at=monotonic())
    with gevent.Timeout(PATIENCE):
        gevent.socket.wait_read(links.reports.fileno())
    answering.kill()
    number, some, result = receive(links.reports)["answer"]
    assert (number, result) == (7, "asked")
    assert 100 < len(some) < len(steps)


def test_a_datagram_has_its_limit():
    rows: list[Row] = [["x" * 1000, [str(number)], 1] for number in range(100)]
    parts = list(packed(rows))
    assert [row for part in parts for row in part] == rows
    assert len(parts) == 4
    assert list(packed([])) == [[]]
    assert all(sum(len(row[0]) for row in part) < MAX_DATAGRAM for part in parts)


def test_a_report_that_cannot_be_sent_does_no_harm(links: Links):
    assert not send(links.to_reports, x="x" * (1 << 20))


@pytest.mark.parametrize("octets", [b"", b"\xff", b"[1]", b"7", b"{", b"null"])
def test_what_is_no_report_is_an_empty_one(links: Links, octets: bytes):
    links.to_reports.send(octets)
    assert receive(links.reports) == {}
