"""What the status process makes of the reports: sums, hosts, problems, metrics, and answers by HTTP."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from typing import Any

import gevent
import pytest
from gevent import socket
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from willi_lib.config import Address, Settings
from willi_lib.status import counts, http, metrics, serving, view
from willi_lib.status.counts import ACCEPTED, CONNECTS, Counts, HostState
from willi_lib.status.hosts import HOUR, MAX_HOSTS, PERIOD, Hosts
from willi_lib.status.means import MINUTE, HourMean
from willi_lib.status.overview import Asked
from willi_lib.status.reports import Links
from willi_lib.status.serving import Serving
from willi_lib.status.totals import FRESH, Totals

NOW = 1_800_000_000.0  # the beginning of a minute
DAY = 86400.0


def master(**facts: Any) -> dict[str, Any]:
    """A report of a master that is well."""
    return {
        "master": {
            "pid": 1, "started": NOW - 100, "domain": "mx.example", "listen": ["127.0.0.1:25"], "wanted": 1,
            "workers": {"2": "serving"}, "limits": {"max_connections": 100}, **facts,
        }
    }  # fmt: skip


def worker(**facts: Any) -> dict[str, Any]:
    """A report of a worker that is well."""
    return {"worker": {"pid": 2, **facts}}


@pytest.fixture
def totals() -> Totals:
    """Of a Willi that is well."""
    totals = Totals(NOW)
    totals.take_in(master(), NOW)
    totals.take_in(worker(), NOW)
    return totals


def problems(totals: Totals, now: float = NOW) -> list[str]:
    return [str(problem) for problem in view.problems(totals, now)]


def counted(count: Any, times: int = 1) -> dict[str, Any]:
    """The report after a worker has counted something."""
    own = Counts()
    for _ in range(times):
        count(own)
    return {"rows": own.take()}


# Sums


def test_reports_of_all_workers_add_up(totals: Totals):
    for _ in range(3):
        totals.take_in(counted(lambda own: own.add(counts.MESSAGES, ACCEPTED, "csv:a"), 2), NOW)
        totals.take_in(counted(lambda own: own.took(0.3, counts.SESSION_SECONDS)), NOW)
    assert totals.number(counts.MESSAGES) == totals.number(counts.MESSAGES, ACCEPTED) == 6
    assert totals.number(counts.MESSAGES, "failed") == 0
    assert totals.durations[counts.SESSION_SECONDS,][-1] == pytest.approx(0.9)


def test_minutes_are_the_last_sixty_with_those_in_which_nothing_happened(totals: Totals):
    for minute in (0, 1, 59, 60):
        totals.take_in(counted(lambda own: own.add(counts.SESSIONS)), NOW + minute * MINUTE)
        totals.take_in(counted(lambda own: own.add(counts.VERDICTS, "failed"), 2), NOW + minute * MINUTE)
    minutes = totals.minutes(NOW + 60 * MINUTE + 59)
    assert [minute.began for minute in minutes] == [NOW + minute * MINUTE for minute in range(1, 61)]
    assert [number for number, minute in enumerate(minutes, 1) if minute.sessions] == [1, 59, 60]
    assert all(minute.failed == 2 * minute.sessions for minute in minutes)


def test_a_mean_forgets_what_is_older_than_an_hour():
    mean = HourMean()
    mean.add(2, 10.0, NOW)
    mean.add(1, 2.0, NOW + 30 * MINUTE)
    assert mean.mean(NOW + 30 * MINUTE) == 4.0
    assert mean.mean(NOW + 60 * MINUTE) == 2.0
    assert mean.mean(NOW + 90 * MINUTE) is None


def test_a_clock_that_is_set_back_leaves_no_gap_and_nothing_that_is_to_come(totals: Totals):
    mean = HourMean()
    mean.add(1, 9.0, NOW + DAY)
    for minute in range(70):
        totals.take_in(counted(lambda own: own.add(counts.SESSIONS)), NOW + DAY + minute * MINUTE)
    totals.take_in(worker(peaks={"max_connections_per_ip": 7}), NOW + DAY)
    for minute in range(3):
        mean.add(1, 2.0, NOW + minute * MINUTE)
        totals.take_in(counted(lambda own: own.add(counts.SESSIONS)), NOW + minute * MINUTE)
    assert [minute.sessions for minute in totals.minutes(NOW + 2 * MINUTE)][-4:] == [0, 1, 1, 1]
    assert totals.peak("max_connections_per_ip", NOW + 2 * MINUTE) == 0
    assert mean.mean(NOW + 2 * MINUTE) == 2.0


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
    totals.hosts.note("a:25", before, NOW + DAY)
    totals.hosts.note("a:25", HostState(), NOW)
    totals.hosts.note("a:25", after, NOW + 1)
    [host] = view.overview(totals, NOW + 1).hosts
    assert host.up == up


def test_names_are_given_after_the_clock_was_set_back():
    hosts = Hosts()
    for number in range(MAX_HOSTS):
        connect(hosts, f"mx{number}", NOW + DAY)
    connect(hosts, "busy", NOW, number=50)
    connect(hosts, "busy", NOW + PERIOD + 1)
    assert "busy" in hosts.named


def test_sessions_are_those_of_workers_that_are_there_the_draining_ones_too(totals: Totals):
    totals.take_in(master(workers={"2": "serving", "3": "draining"}), NOW)
    totals.take_in(worker(sessions=4), NOW)
    totals.take_in({"worker": {"pid": 3, "sessions": 5}}, NOW)
    assert view.overview(totals, NOW).sessions == 9
    totals.take_in(master(workers={"2": "serving"}), NOW)
    assert view.overview(totals, NOW).sessions == 4


def test_all_but_means_outlives_a_hand_over(totals: Totals):
    totals.take_in(counted(lambda own: own.add(counts.VERDICTS, ACCEPTED), 3), NOW - MINUTE)
    totals.take_in(counted(lambda own: own.took(0.3, counts.SESSION_SECONDS)), NOW)
    totals.take_in(counted(lambda own: own.not_opened("a:25", "refused")), NOW)
    totals.take_in(counted(lambda own: own.event("accepted", {"sid": "x", "bytes": 1, "duration": 0.1})), NOW)
    heir = Totals(NOW)
    heir.take_in(counted(lambda own: own.add(counts.VERDICTS, ACCEPTED)), NOW)  # which came in between
    for report in (*totals.last_words(), {"handover": totals.rows()}):
        heir.take_in(report, NOW)
    totals.take_in(counted(lambda own: own.add(counts.VERDICTS, ACCEPTED)), NOW)
    assert view.overview(heir, NOW) == view.overview(totals, NOW)
    assert metrics.exposition(heir, NOW) == metrics.exposition(totals, NOW)


def test_what_is_newer_is_not_changed_by_a_hand_over(totals: Totals):
    heir = Totals(NOW)
    heir.take_in(master(reloads=7), NOW + 1)
    heir.take_in(worker(sessions=8), NOW + 1)
    for report in totals.last_words():
        heir.take_in(report, NOW + 2)
    assert (heir.master.reloads, view.sessions(heir)) == (7, 8)


# Hosts


def connect(hosts: Hosts, name: str, now: float, number: int = 1) -> None:
    hosts.add((CONNECTS, name, "opened"), number, now)


def connections(hosts: Hosts) -> dict[str, float]:
    return {name: sum(host.numbers.values()) for name, host in hosts.named.items()}


def test_hosts_beyond_the_limit_are_one_and_nothing_is_lost():
    hosts = Hosts()
    for number in range(MAX_HOSTS + 20):
        connect(hosts, f"mx{number}", NOW)
    assert len(hosts.named) == MAX_HOSTS
    assert sum(hosts.others.numbers.values()) == 20
    assert hosts.without_name == 20


def test_a_host_with_a_name_has_it_as_long_as_it_is_used():
    hosts = Hosts()
    for number in range(MAX_HOSTS):
        connect(hosts, f"mx{number}", NOW)
    connect(hosts, "late", NOW + HOUR - 1)
    assert "late" not in hosts.named
    for number in range(1, MAX_HOSTS):
        connect(hosts, f"mx{number}", NOW + HOUR)
    connect(hosts, "late", NOW + HOUR + 1)
    assert "late" in hosts.named and "mx0" not in hosts.named


def test_a_busy_host_gets_a_name_and_no_number_goes_back():
    hosts = Hosts()
    for number in range(MAX_HOSTS):
        connect(hosts, f"mx{number}", NOW, number=2)
    connect(hosts, "busy", NOW + 1, number=50)
    before, others = connections(hosts), sum(hosts.others.numbers.values())
    connect(hosts, "busy", NOW + PERIOD + 1, number=3)
    after = connections(hosts)
    assert after["busy"] == 3  # a new series; what was counted with the others stays there
    assert sum(hosts.others.numbers.values()) == others == 50
    assert len(after) == MAX_HOSTS
    assert all(before[name] == number for name, number in after.items() if name != "busy")


def test_what_a_worker_had_no_room_for_is_among_the_others_and_gets_no_name(totals: Totals):
    for number in range(MAX_HOSTS):
        connect(totals.hosts, f"mx{number}", NOW)
    connect(totals.hosts, counts.OTHER, NOW, number=1000)
    connect(totals.hosts, counts.OTHER, NOW + PERIOD + 1, number=1000)
    assert counts.OTHER not in totals.hosts.named
    assert samples(totals)["willi_upstream_connects_total{host=other,outcome=opened}"] == 2000


def test_a_host_is_down_until_somebody_reaches_it_or_nobody_has_tried_for_long(totals: Totals):
    totals.add_rows([[counts.HOST, "a:25", 0, NOW - 60, NOW, "Connection refused"]], NOW)
    [host] = view.overview(totals, NOW).hosts
    assert (host.up, host.down_since, host.last_error) == (False, NOW - 60, "Connection refused")
    assert problems(totals) == ["a:25: the upstream is down: Connection refused"]
    assert view.down_since(totals.hosts.named["a:25"], NOW + HOUR) is None
    totals.hosts.note("a:25", HostState(reached=NOW + 1), NOW)
    [host] = view.overview(totals, NOW + 1).hosts
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
        (worker(certificates=[["/c.pem", ["a"], NOW + 13.2 * DAY, ""]]), "/c.pem: certificate: 13 days left"),
        (worker(certificates=[["/c.pem", ["a"], NOW - 1, ""]]), "/c.pem: certificate: expired 1.0 s ago"),
        (worker(certificates=[["/c.pem", [], 0.0, "gone"]]), "/c.pem: certificate: cannot be read"),
        (
            worker(tables=[{"name": "csv:/x", "kind": "csv", "patterns": 1, "last_error": "/x:2: no"}]),
            "csv:/x: not read again: /x:2: no",
        ),
        (
            worker(tables=[{"name": "mysql:x", "kind": "mysql", "database_up": False, "seen": 1, "last_error": "no"}]),
            "mysql:x: database is down: no",
        ),
    ],
)
def test_what_is_wrong_is_told(totals: Totals, report: dict[str, Any], problem: str):
    totals.take_in(report, NOW)
    assert problems(totals) == [problem]


@pytest.mark.parametrize(
    "report", [master(connections=79), worker(certificates=[["/c.pem", ["a"], NOW + 14 * DAY + 1, ""]])]
)
def test_what_is_just_well_is_no_problem(totals: Totals, report: dict[str, Any]):
    totals.take_in(report, NOW)
    assert problems(totals) == []


def test_silence_is_a_problem(totals: Totals):
    assert problems(totals, NOW + FRESH + 1) == ["master: has said nothing for some seconds"]


def test_many_hosts_that_are_down_are_a_few_lines(totals: Totals):
    for number in range(8):
        totals.hosts.note(f"mx{number}", HostState(0, NOW, NOW, "no"), NOW)
        if number == 5:
            assert problems(totals)[-1] == "upstreams: 1 more is down"
    assert len(problems(totals)) == 6
    assert problems(totals)[-1] == "upstreams: 3 more are down"


def test_of_a_database_what_was_seen_last_is_shown(totals: Totals):
    def table(pid: int, **facts: Any) -> dict[str, Any]:
        return {"worker": {"pid": pid, "tables": [{"name": "mysql:x", "kind": "mysql", "last_error": "", **facts}]}}

    totals.take_in(master(workers={"2": "serving", "3": "serving"}, wanted=2), NOW)
    totals.take_in(table(2, database_up=False, seen=5.0), NOW)
    totals.take_in(table(3, database_up=True, seen=0.0), NOW)  # it has not asked yet
    assert [one.database_up for one in view.overview(totals, NOW).tables] == [False]
    totals.take_in(table(3, database_up=True, seen=6.0), NOW)
    assert [one.database_up for one in view.overview(totals, NOW).tables] == [True]


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
    for seconds in (0.0005, 0.0005, 0.02, 1000.0):
        totals.take_in(counted(lambda own: own.took(seconds, counts.LOOKUP_SECONDS, "csv:a")), NOW)  # noqa: B023
    found = samples(totals)
    name = "willi_lookup_duration_seconds"
    buckets = {"0.0001": 0, "0.0005": 2, "0.001": 2, "0.01": 2, "0.05": 3, "5.0": 3, "+Inf": 4}
    assert {bound: found[f"{name}_bucket{{le={bound},mapping=csv:a}}"] for bound in buckets} == buckets
    assert found[f"{name}_count{{mapping=csv:a}}"] == 4
    assert found[f"{name}_sum{{mapping=csv:a}}"] == pytest.approx(1000.021)


def test_every_counter_of_the_workers_is_a_metric_or_of_the_overview_only():
    shown = metrics.COUNTERS.keys() | metrics.HOST_COUNTERS.keys() | metrics.HISTOGRAMS.keys()
    names = {
        value for name, value in vars(counts).items()
        if name.isupper() and isinstance(value, str) and len(value) > 1
    }  # fmt: skip
    values = {counts.ACCEPTED, counts.REJECTED_BY_UPSTREAM, counts.REJECTED_BY_WILLI, counts.FAILED, counts.OPENED,
              counts.REFUSED_CLIENT, counts.NOT_OPENED, counts.OTHER}  # fmt: skip
    assert names - values - shown == {counts.VERDICTS, counts.GREETINGS, counts.GREETING_SECONDS}


def test_a_report_of_another_version_does_no_harm_to_the_metrics(totals: Totals):
    totals.add_rows([["n", 1, "unknown", "x"], ["n", 1, counts.SESSIONS, "too many"], ["z"]], NOW)
    totals.add_rows([["d", [1, 2], counts.SESSION_SECONDS]], NOW)
    found = samples(totals)
    assert found["willi_sessions_total{}"] == 0
    assert not any("unknown" in name or "too many" in name for name in found)


def test_a_host_that_is_down_has_a_time_and_others_have_none(totals: Totals):
    totals.hosts.note("a:25", HostState(0, NOW - 5, NOW, "no"), NOW)
    totals.hosts.note("b:25", HostState(NOW), NOW)
    found = samples(totals)
    assert (found["willi_upstream_up{host=a:25}"], found["willi_upstream_up{host=b:25}"]) == (0, 1)
    assert [name for name in found if "down_since" in name] == ["willi_upstream_down_since_seconds{host=a:25}"]


# HTTP


@pytest.fixture
def served(totals: Totals, monkeypatch):
    """The port of a server in this process; its time limit is short."""
    monkeypatch.setattr(http, "TIME_LIMIT", 0.3)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    application = http.Application(totals, ["mx.example"], lambda address: Asked(address, (), "asked"))
    [server] = http.make_servers([listener], application)
    server.start()
    yield port
    server.close()


def said(port: int, *pieces: bytes) -> bytes:
    """All that comes back, up to the end of the connection."""
    with gevent.Timeout(10), socket.create_connection(("127.0.0.1", port)) as client:
        for piece in pieces:
            client.sendall(piece)
        octets = b""
        with suppress(ConnectionResetError):  # it has not read all that was said
            while more := client.recv(65536):
                octets += more
        return octets


def test_who_is_slow_is_hung_up_on_and_nobody_else_waits(served: int):
    slow = gevent.spawn(said, served, b"GET / HTT")
    gevent.idle()
    assert said(served, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
    assert not slow.ready()
    assert slow.get() == b""


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


def test_who_hands_over_before_it_serves_does_not_serve_any_more(monkeypatch):
    monkeypatch.setattr(serving, "NEWS_TIMEOUT", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as masters, socket.socket(fileno=os.dup(masters.fileno())) as own:
        settings = Settings(path="willi.conf", mappings=(), status_listen=Address(*masters.getsockname()))
        status = Serving(settings, [own], Links())
        starting = gevent.spawn(status.start)
        gevent.sleep(0)
        status.hand_over()
        starting.get(timeout=60)


def test_who_asks_for_an_address_has_no_more_time_than_the_connection():
    settings = Settings(path="willi.conf", mappings=(), status_listen=Address("127.0.0.1", 8025))
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        Serving(settings, [], Links())._ask("bob@b.example")


def ask(totals: Totals, path: str, query: str = "", **extra: str) -> tuple[str, str]:
    """Status and body of the bare application."""
    answered: list[str] = []
    application = http.Application(totals, ["mx.example"], lambda address: Asked(address, (), f"asked {address}"))
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query, **extra}
    body = application(environ, lambda status, headers: answered.append(status))
    return answered[0], b"".join(body).decode()


@pytest.fixture
def clock(monkeypatch):
    """It is NOW."""
    now = [NOW]
    monkeypatch.setattr(http, "time", lambda: now[0])
    return now


def test_ready_means_a_worker_serves_says_so_and_is_not_to_end(totals: Totals, clock: list[float]):
    assert ask(totals, "/readyz") == ("200 OK", "ok\n")
    totals.take_in(master(stopping=True), NOW)
    assert ask(totals, "/readyz") == ("503 Service Unavailable", "Willi is being stopped\n")
    totals.take_in(master(workers={"2": "draining"}), NOW)
    assert ask(totals, "/readyz") == ("503 Service Unavailable", "no worker serves\n")
    assert ask(totals, "/healthz") == ("503 Service Unavailable", "no worker serves\n")
    totals.take_in(master(), NOW)
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
