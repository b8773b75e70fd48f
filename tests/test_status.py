"""What the status process makes of the reports: sums, hosts, problems, metrics, and answers by HTTP."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack, suppress
from email.message import Message
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent import socket
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.support.loopback import PATIENCE
from willi_lib.config import Address, Settings
from willi_lib.status import counts, metrics, overview, reports, web
from willi_lib.status.counts import ACCEPTED, MAX_HOSTS, TABLE, Counts, HostState
from willi_lib.status.overview import Host, Minute
from willi_lib.status.reports import Asked, CertificateState, Links
from willi_lib.status.totals import FRESH, MINUTE, LastHour, Totals
from willi_lib.status.web import HttpRequest, Serving

NOW = 1_800_000_000.0  # the beginning of a minute
DAY = 86400.0
HOUR = 3600.0


def master(**facts: Any) -> dict[str, Any]:
    """A report of a master that is well."""
    return {
        "master": {
            "pid": 1, "started": NOW - 100, "domain": "mx.example", "listen": ["127.0.0.1:25"], "wanted": 1,
            "workers": {"2": "serving"}, "limits": {"max_connections": 100}, **facts,
        }
    }  # fmt: skip


def worker(own: Counts | None = None, **facts: Any) -> dict[str, Any]:
    """A report of a worker that is well. own: what it has counted."""
    counted = {"began": own.began, "rows": own.rows()} if own else {}
    report = dataclasses.replace(reports.WorkerReport(2), **{**counted, **facts})
    told: dict[str, Any] = json.loads(json.dumps({"worker": report}, default=vars))
    return told


def certificate(expires: float) -> CertificateState:
    return CertificateState("/c.pem", ("a",), expires)


@pytest.fixture
def totals() -> Totals:
    """Of a Willi that is well."""
    totals = Totals()
    totals.add_report(master(), NOW)
    totals.add_report(worker(), NOW)
    return totals


def problems(totals: Totals, now: float = NOW) -> list[str]:
    return [str(finding) for finding in overview.problems(totals, now)]


def minutes_of(totals: Totals, now: float) -> tuple[Minute, ...]:
    return overview.overview(totals, now).minutes


def host_of(totals: Totals, now: float) -> Host:
    [host] = overview.overview(totals, now).hosts
    return host


# Sums


def test_reports_of_all_workers_add_up(totals: Totals):
    for _ in range(3):
        own = Counts()
        for _ in range(2):
            own.add(counts.MESSAGES, ACCEPTED, "csv:a")
            own.took(0.3, counts.SESSION_SECONDS)
            totals.add_report(worker(own), NOW)
            totals.add_report(worker(own), NOW)  # nothing new
    assert totals.number(counts.MESSAGES) == totals.number(counts.MESSAGES, ACCEPTED) == 6
    assert totals.number(counts.MESSAGES, "failed") == 0
    [row] = totals.durations[counts.SESSION_SECONDS].values()
    assert sum(row[:-1]) == 6
    assert row[-1] == pytest.approx(1.8)


def test_what_a_worker_counted_stays_when_it_is_gone(totals: Totals):
    own = Counts()
    own.add(counts.SESSIONS, number=5)
    totals.add_report(worker(own), NOW)
    for second in range(100):
        totals.add_report(master(workers={"3": "serving"}), NOW + second)
    assert totals.workers == {}
    next_one = Counts()
    next_one.add(counts.SESSIONS)
    totals.add_report(worker(next_one), NOW + 100)  # its number may be the same
    assert totals.number(counts.SESSIONS) == 6


def test_another_status_process_begins_at_zero_and_misses_nothing_after_that():
    old = Counts()
    totals = Totals(since=monotonic())
    new = Counts()
    for own, pid in ((old, 2), (new, 3)):
        for turn in range(3):
            own.add(counts.SESSIONS, number=10)
            own.took(0.3, counts.VERDICT_SECONDS)
            own.add(counts.REFUSED, f"in turn {turn}")
            first, second = own.rows()[:2], own.rows()[2:]
            totals.add_report(worker(own, pid=pid, turn=turn, rows=first), NOW)
            totals.add_report(worker(own, pid=pid, turn=turn, rows=second), NOW)
    assert totals.number(counts.SESSIONS) == 20 + 30
    assert sum(totals.durations[counts.VERDICT_SECONDS][()][:-1]) == 2 + 3
    assert [totals.number(counts.REFUSED, f"in turn {turn}") for turn in range(3)] == [1, 2, 2]
    assert minutes_of(totals, NOW)[-1].sessions == 50


def test_minutes_are_the_last_sixty_with_those_in_which_nothing_happened(totals: Totals):
    own = Counts()
    for minute in (0, 1, 59, 60):
        own.add(counts.SESSIONS)
        own.add(counts.VERDICTS, "failed", number=2)
        totals.add_report(worker(own), NOW + minute * MINUTE)
    minutes = minutes_of(totals, NOW + 60 * MINUTE + 59)
    assert [minute.began for minute in minutes] == [NOW + minute * MINUTE for minute in range(1, 61)]
    assert [number for number, minute in enumerate(minutes, 1) if minute.sessions] == [1, 59, 60]
    assert all(minute.failed == 2 * minute.sessions for minute in minutes)


def test_a_mean_forgets_what_is_older_than_an_hour():
    hour = LastHour()
    hour.add(NOW, number=2, seconds=10.0)
    hour.add(NOW + 30 * MINUTE, number=1, seconds=2.0)
    assert hour.mean(NOW + 30 * MINUTE) == 4.0
    assert hour.mean(NOW + 60 * MINUTE) == 2.0
    assert hour.mean(NOW + 90 * MINUTE) is None


def test_a_clock_that_is_set_back_leaves_no_gap_and_nothing_that_is_to_come(totals: Totals):
    hour = LastHour()
    hour.add(NOW + DAY, number=1, seconds=9.0)
    own = Counts()
    for minute in range(70):
        own.add(counts.SESSIONS)
        totals.add_report(worker(own), NOW + DAY + minute * MINUTE)
    totals.add_report(worker(peaks={"max_connections_per_ip": 7}), NOW + DAY)
    for minute in range(3):
        hour.add(NOW + minute * MINUTE, number=1, seconds=2.0)
        own.add(counts.SESSIONS)
        totals.add_report(worker(own), NOW + minute * MINUTE)
    assert [minute.sessions for minute in minutes_of(totals, NOW + 2 * MINUTE)][-4:] == [0, 1, 1, 1]
    assert totals.peak("max_connections_per_ip", NOW + 2 * MINUTE) == 0
    assert hour.mean(NOW + 2 * MINUTE) == 2.0


@pytest.mark.parametrize(
    ("before", "after", "up"),
    [
        (HostState(NOW + DAY), HostState(0, NOW + 1, NOW + 1, "refused"), False),
        (HostState(0, NOW + DAY, NOW + DAY, "refused"), HostState(NOW + 1), True),
    ],
)
def test_a_clock_that_is_set_back_does_not_hide_how_a_host_is_now(
    totals: Totals, before: HostState, after: HostState, up: bool
):
    note(totals, "a:25", before, NOW + DAY)
    totals.add_report(master(), NOW)
    note(totals, "b:25", after, NOW + 1)
    for second in (1, 2):  # the first worker still says what it has seen
        note(totals, "a:25", before, NOW + second)
        note(totals, "a:25", after, NOW + second, pid=3)
    assert {host.name: host.up for host in overview.overview(totals, NOW + 2).hosts} == {"a:25": up, "b:25": up}


def test_sessions_are_those_of_workers_that_are_there_the_draining_ones_too(totals: Totals):
    totals.add_report(master(workers={"2": "serving", "3": "draining"}), NOW)
    totals.add_report(worker(sessions=4), NOW)
    totals.add_report(worker(pid=3, sessions=5), NOW)
    assert overview.overview(totals, NOW).sessions == 9
    totals.add_report(master(workers={"2": "serving"}), NOW)
    assert overview.overview(totals, NOW).sessions == 4


# Hosts


def note(totals: Totals, name: str, state: HostState, now: float, pid: int = 2) -> None:
    """A worker tells that."""
    totals.add_report(worker(pid=pid, rows=[[counts.HOST, [name], vars(state)]]), now)


def test_hosts_beyond_the_limit_are_one_and_keep_their_name(totals: Totals):
    own, other = Counts(), Counts()
    for number in range(MAX_HOSTS):
        own.opened(f"mx{number}", 0.1, "none", "off")
        other.opened(f"mx{number + MAX_HOSTS - 20}", 0.1, "none", "off")
    for _ in range(3):
        own.opened(f"mx{MAX_HOSTS}", 0.1, "none", "off")
        other.opened(f"mx{MAX_HOSTS}", 0.1, "none", "off")
        other.lost("mx0", "no")  # which has a name, but not in this worker
        totals.add_report(worker(own), NOW)
        totals.add_report(worker(other, pid=3), NOW)
    names = totals.busiest_hosts()
    assert set(names) == {*(f"mx{number}" for number in range(MAX_HOSTS)), counts.OTHER}
    assert names[-1] == counts.OTHER
    assert totals.number(counts.CONNECTS) == 2 * MAX_HOSTS + 6
    found = samples(totals)
    assert found["willi_upstream_connects_total{host=other,outcome=opened}"] == MAX_HOSTS - 20 + 6
    assert found["willi_upstream_lost_total{host=other}"] == 3
    assert "willi_upstream_up{host=other}" not in found


def test_a_host_is_down_until_a_worker_reaches_it_or_none_has_tried_for_long(totals: Totals):
    note(totals, "a:25", HostState(0, NOW - 60, NOW, "Connection refused"), NOW)
    host = host_of(totals, NOW)
    assert (host.up, host.down_since, host.last_error) == (False, NOW - 60, "Connection refused")
    assert problems(totals) == ["a:25: the upstream is down: Connection refused"]
    assert overview.down_since(totals, "a:25", NOW + HOUR) is None
    note(totals, "a:25", HostState(reached=NOW + 1), NOW + 1, pid=3)
    host = host_of(totals, NOW + 1)
    assert (host.up, host.down_since, host.last_error_at) == (True, None, NOW)


# Problems


def test_a_willi_that_is_well_has_none(totals: Totals):
    assert problems(totals) == []


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (master(workers={}), "workers: none serves"),
        (master(wanted=2), "workers: only 1 of 2 serve"),
        (master(workers={"2": "serving", "3": "serving"}), "workers: 1 has not reported for some seconds, of 2"),
        (master(stopping=True), "Willi: is being stopped"),
        (master(last_reload_error="willi.conf:2: no"), "reload: the last one failed: willi.conf:2: no"),
        (master(connections=80), "max_connections: 80 of 100 are in use"),
        (worker(certificates=[certificate(NOW + 13.2 * DAY)]), "/c.pem: certificate: 13 days left"),
        (worker(certificates=[certificate(NOW - 1)]), "/c.pem: certificate: expired 1.0 s ago"),
        (
            worker(mappings=[{"name": "csv:/x", "kind": "csv", "patterns": 1, "last_error": "/x:2: no"}]),
            "csv:/x: not read again: /x:2: no",
        ),
        (
            worker(mappings=[{"name": "mysql:x", "kind": "mysql", "database_up": False, "last_error": "no"}]),
            "mysql:x: database is down: no",
        ),
    ],
)
def test_what_is_wrong_is_told(totals: Totals, report: dict[str, Any], problem: str):
    totals.add_report(report, NOW)
    assert problems(totals) == [problem]


@pytest.mark.parametrize("report", [master(connections=79), worker(certificates=[certificate(NOW + 14 * DAY + 1)])])
def test_what_is_just_well_is_no_problem(totals: Totals, report: dict[str, Any]):
    totals.add_report(report, NOW)
    assert problems(totals) == []


def test_silence_is_a_problem(totals: Totals):
    assert problems(totals, NOW + FRESH + 1) == ["master: has said nothing for some seconds"]


def test_many_hosts_that_are_down_are_a_few_lines(totals: Totals):
    for number in range(8):
        note(totals, f"mx{number}", HostState(0, NOW, NOW, "no"), NOW)
        if number == 5:
            assert problems(totals)[-1] == "upstreams: 1 more is down"
    assert len(problems(totals)) == 6
    assert problems(totals)[-1] == "upstreams: 3 more are down"


def test_of_a_database_what_was_seen_last_is_shown(totals: Totals):
    def table(pid: int, **facts: Any) -> dict[str, Any]:
        return worker(pid=pid, mappings=[{"name": "mysql:x", "kind": "mysql", **facts}])

    totals.add_report(master(workers={"2": "serving", "3": "serving"}, wanted=2), NOW)
    totals.add_report(table(2, database_up=False, seen=5.0), NOW)
    totals.add_report(table(3, database_up=True, seen=0.0), NOW)  # it has not asked yet
    assert [one.database_up for one in overview.overview(totals, NOW).mappings] == [False]
    totals.add_report(table(3, database_up=True, seen=6.0), NOW)
    assert [one.database_up for one in overview.overview(totals, NOW).mappings] == [True]


# Metrics


def samples(totals: Totals) -> dict[str, float]:
    """By name and labels as they are written."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition(totals, NOW).decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            series = f"{sample.name}{{{labels}}}"
            assert series not in found, series
            found[series] = sample.value
    return found


def test_no_two_metrics_clash_in_openmetrics(totals: Totals):
    """There a counter has its name without _total, too. The parser complains about two of the same name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics.Collector(totals, NOW))
    families = list(openmetrics.text_string_to_metric_families(as_openmetrics(registry).decode()))
    assert {"willi_sessions", "willi_sessions_open"} <= {family.name for family in families}


def test_buckets_are_cumulative_as_prometheus_wants_them(totals: Totals):
    own = Counts()
    for seconds in (0.0005, 0.0005, 0.02, 1000.0):
        own.took(seconds, counts.LOOKUP_SECONDS, "csv:a")
        totals.add_report(worker(own), NOW)
    found = samples(totals)
    name = "willi_lookup_duration_seconds"
    buckets = {"0.0001": 0, "0.0005": 2, "0.001": 2, "0.01": 2, "0.05": 3, "5.0": 3, "+Inf": 4}
    assert {bound: found[f"{name}_bucket{{le={bound},mapping=csv:a}}"] for bound in buckets} == buckets
    assert found[f"{name}_count{{mapping=csv:a}}"] == 4
    assert found[f"{name}_sum{{mapping=csv:a}}"] == pytest.approx(1000.021)


def test_every_row_of_the_table_is_shown_once_it_has_a_value_and_no_other(totals: Totals):
    own = Counts()
    for metric in TABLE.values():
        if metric.kind == counts.HISTOGRAM:
            own.took(0.1, metric, *metric.labels)
        elif metric.kind == counts.COUNTER and metric is not counts.RELOADS:
            own.add(metric, *metric.labels)
    table = {"name": "csv:a", "kind": "csv", "patterns": 1, "loaded_at": NOW, "database_up": True}
    totals.add_report(worker(own, mappings=[table], certificates=[certificate(NOW)]), NOW)
    totals.add_report(master(last_reload=NOW), NOW)
    note(totals, "a:25", HostState(0, NOW - 5, NOW, "no"), NOW)
    shown = {metric.full_name for metric in TABLE.values() if metric.kind != counts.FOR_PAGE}
    names = {name.partition("{")[0] for name in samples(totals)}
    suffixes = {f"{name}{suffix}": name for name in shown for suffix in ("_bucket", "_sum", "_count")}
    assert {suffixes.get(name, name) for name in names} == shown


def test_a_counter_is_there_before_it_counts_if_its_labels_are_known(totals: Totals):
    found = samples(totals)
    assert found["willi_sessions_total{}"] == found["willi_sessions_refused_total{reason=max_errors}"] == 0
    assert found["willi_xclient_total{outcome=off}"] == 0


def test_a_report_of_another_version_does_no_harm_to_the_metrics(totals: Totals):
    rows = [["unknown", ["x"], 1], ["sessions", ["too many"], 1], ["session_duration_seconds", [], [1, 2]]]
    totals.add_report(worker(rows=rows), NOW)
    found = samples(totals)
    assert found["willi_sessions_total{}"] == 0
    assert not any("unknown" in name or "too many" in name for name in found)


def test_a_host_that_is_down_has_a_time_and_others_have_none(totals: Totals):
    note(totals, "a:25", HostState(0, NOW - 5, NOW, "no"), NOW)
    note(totals, "b:25", HostState(NOW), NOW)
    found = samples(totals)
    assert (found["willi_upstream_up{host=a:25}"], found["willi_upstream_up{host=b:25}"]) == (0, 1)
    assert [name for name in found if "down_since" in name] == ["willi_upstream_down_since_seconds{host=a:25}"]


# HTTP


@pytest.fixture
def served(totals: Totals, monkeypatch):
    """The port of a server in this process."""
    monkeypatch.setattr(web, "TIME_LIMIT", PATIENCE)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    application = web.Application(totals, lambda address: Asked(address, (), "asked"))
    [server] = web.make_servers([listener], application)
    server.start()
    yield port
    server.close()


def said(port: int, *pieces: bytes) -> bytes:
    """All that comes back, up to the end of the connection."""
    with gevent.Timeout(PATIENCE), socket.create_connection(("127.0.0.1", port)) as client:
        for piece in pieces:
            client.sendall(piece)
        octets = b""
        with suppress(ConnectionResetError):  # it has not read all that was said
            while more := client.recv(65536):
                octets += more
        return octets


@pytest.fixture
def half_request(served: int, monkeypatch):
    """Opens a connection that the server has accepted and that says no more."""
    accepted: list[socket.socket] = []
    read_request = web.read_request

    def read(connection: socket.socket) -> HttpRequest | None:
        accepted.append(connection)
        return read_request(connection)

    monkeypatch.setattr(web, "TIME_LIMIT", 60.0)
    monkeypatch.setattr(web, "read_request", read)
    with ExitStack() as opened:

        def connect() -> socket.socket:
            before = len(accepted)
            client = opened.enter_context(socket.create_connection(("127.0.0.1", served)))
            client.sendall(b"GET / HTT")
            with gevent.Timeout(PATIENCE):
                while len(accepted) == before:
                    gevent.sleep(0.01)
            return client

        yield connect


def is_open(client: socket.socket) -> bool:
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(1)
    return True


def test_a_slow_request_is_hung_up_on(served: int, monkeypatch):
    monkeypatch.setattr(web, "TIME_LIMIT", 0.3)
    assert said(served, b"GET / HTT") == b""


def test_nobody_waits_for_a_slow_request(served: int, half_request):
    slow = half_request()
    assert said(served, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
    assert is_open(slow)


def test_one_connection_too_many_ends_the_oldest(served: int, half_request, monkeypatch):
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 2)
    oldest, other = half_request(), half_request()
    assert said(served, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
    with gevent.Timeout(PATIENCE):
        assert oldest.recv(1) == b""
    assert is_open(other)


def test_a_connection_is_for_one_request(served: int):
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = said(served, request + request)
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_a_request_has_its_limit(served: int):
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 900) for number in range(40))
    for parts in ((b"Host: evil\r\n", headers), (headers, b"Host: evil\r\n"), (b"Host: localhost\r\n", headers)):
        assert b"200 OK" not in said(served, b"GET /metrics HTTP/1.1\r\n", *parts, b"\r\n")


def test_a_body_is_not_waited_for_longer_than_the_limit(served: int):
    request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    assert said(served, request).startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize("body", [b"", b"\r\n", b"ZZ\r\n", b"-1\r\n", b"3\r\nabcd", b"0\r\n\xff\r\n\r\n", b"5\r\nabc"])
def test_a_body_that_is_nonsense_is_no_matter_for_the_log(served: int, capfd, body: bytes):
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert said(served, request + body).startswith(b"HTTP/1.1 200")
    assert capfd.readouterr() == ("", "")


def test_who_asks_for_an_address_has_no_more_time_than_the_connection():
    settings = Settings(path="willi.conf", mappings=(), status_listen=Address("127.0.0.1", 8025))
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        Serving(settings, [], Links(), since=0.0)._ask("bob@b.example")


def ask(totals: Totals, path: str, query: str = "") -> tuple[str, str]:
    """Status and body of the bare application."""
    application = web.Application(totals, lambda address: Asked(address, (), f"asked {address}"))
    headers = Message()
    headers["Host"] = "localhost"
    answer = application.answer(HttpRequest("GET", f"{path}?{query}", headers))
    return f"{answer.status.value} {answer.status.phrase}", str(answer.body)


@pytest.fixture
def clock(monkeypatch):
    """It is NOW."""
    now = [NOW]
    monkeypatch.setattr(web, "time", lambda: now[0])
    return now


def test_ready_means_a_worker_serves_says_so_and_is_not_to_end(totals: Totals, clock: list[float]):
    assert ask(totals, "/readyz") == ("200 OK", "ok\n")
    totals.add_report(master(stopping=True), NOW)
    assert ask(totals, "/readyz") == ("503 Service Unavailable", "Willi is being stopped\n")
    totals.add_report(master(workers={"2": "draining"}), NOW)
    assert ask(totals, "/readyz") == ("503 Service Unavailable", "no worker serves\n")
    assert ask(totals, "/healthz") == ("503 Service Unavailable", "no worker serves\n")
    totals.add_report(master(), NOW)
    clock[0] += FRESH + 1
    assert ask(totals, "/readyz") == ("503 Service Unavailable", "the last reports of the workers are too old\n")
    assert ask(totals, "/healthz") == ("200 OK", "ok\n")


def test_an_address_is_asked_for_as_it_was_typed(totals: Totals, clock: list[float]):
    assert "asked b+c@x.example" in ask(totals, "/", "address=b%2Bc%40x.example+")[1]
    assert "asked" not in ask(totals, "/", "address=")[1]
    assert "asked" not in ask(totals, "/", "other=x")[1]
    assert "asked bob@x.example" in ask(totals, "/", "&".join(["a=b"] * 1000 + ["address=bob@x.example"]))[1]


def test_a_bug_is_told_to_the_log_alone(totals: Totals, clock: list[float], capfd):
    totals.master = dataclasses.replace(totals.master, limits=None)  # type: ignore[arg-type]
    assert ask(totals, "/status.json") == ("500 Internal Server Error", "internal error\n")
    assert "traceback=" in capfd.readouterr().out
