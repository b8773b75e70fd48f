"""Clocks that jump: the wall clock is set, or the machine stands still for a while. Limits go by neither."""

from __future__ import annotations

import ast
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from math import inf
from pathlib import Path
from time import monotonic

import pytest

from tests.conftest import StartWilli
from tests.e2e.processes.test_processes import status_of
from tests.support.clock import WallClock
from tests.support.daemon import Willi
from tests.support.loopback import PATIENCE, ROOT, wait_until
from tests.support.promise import in_data
from tests.support.talk import BOB, EHLO, GO_ON, MAIL, OK, QUEUED, SENDER_KEPT, content, deliver, greeted, say
from tests.support.upstream import VERDICT, Hold, ScriptedUpstream

A_DAY = 24 * 3600  # seconds
JUMPS = pytest.mark.parametrize("seconds", [A_DAY, -A_DAY], ids=["ahead", "back"])
TOO_SLOW = "421 4.4.2 Timeout, closing connection"
TOO_FAST = "421 4.7.0 Too many connections from your address in a minute"
WALL_CLOCK = {"time.time", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow", "datetime.today"}

KEEP_TIME = (
    "smtp", "net/wire.py", "net/deadline.py", "net/resolver.py", "proxy/upstream.py", "proxy/connector.py",
    "proxy/transaction.py", "proxy/relay.py",
    "proxy/session.py", "mappings/cache.py", "mappings/mysql.py", "processes/limits.py", "processes/scoreboard.py",
    "processes/admission.py", "processes/worker.py", "processes/child.py", "files.py",
)  # fmt: skip


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


def is_about(stamp: str, seconds: int) -> bool:
    """Whether this time in the log is that of a clock so far ahead, within a minute."""
    there = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return abs(datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S%z") - there) < timedelta(minutes=1)


@JUMPS
def test_a_jump_of_the_wall_clock_ends_no_session(
    seconds: int, clock: WallClock, start_willi: StartWilli, upstream: ScriptedUpstream
):
    """Idle, within a message, waiting for a verdict, and with a kept connection to the upstream."""
    upstream.answers[VERDICT] = [held := Hold()]
    willi = start_willi(server=upstream.server, environment=clock.environment)
    waiting = in_data(willi)
    waiting.send(b"Subject: waiting\r\n.\r\n")
    assert held.reached.wait(60)
    idle, writing, kept = greeted(willi), in_data(willi), greeted(willi)
    writing.send(b"Subject: half\r\n")
    assert deliver(kept) == QUEUED
    assert is_about(willi.wait_for_log(msg="Message accepted")["t"], 0)
    clock.jump(seconds)
    assert deliver(kept) == QUEUED
    assert is_about(willi.wait_for_log(msg="Message accepted", count=2)["t"], seconds), "the log must follow"
    held.release()
    assert str(waiting.read_reply()) == QUEUED
    assert content(writing) == QUEUED
    assert say(idle, b"NOOP", MAIL, BOB, b"DATA") == ["250 2.0.0 Ok", SENDER_KEPT, OK, GO_ON]
    assert content(idle) == QUEUED
    assert len(upstream.connections) == 4, "the kept one was used again"
    assert willi.lines(msg="Hanging up") == []
    durations = [float(line["duration"]) for line in willi.lines(msg="Message accepted")]
    assert all(0 <= duration < 60 for duration in durations), durations


@JUMPS
def test_after_a_jump_of_the_wall_clock_limits_and_rates_go_on(
    seconds: int, clock: WallClock, start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi, other = (
        start_willi(server=upstream.server, environment=clock.environment, max_connection_rate=3, **{limit: "2s"})
        for limit in ("read_timeout", "upstream_timeout")
    )
    silent = willi.connect(source="127.0.0.2")
    clock.jump(seconds)
    assert str(silent.read_reply()) == TOO_SLOW, "one that began before"
    silent.expect_eof()
    late = willi.connect(source="127.0.0.2")
    assert str(late.read_reply()) == TOO_SLOW, "and one that began after it"
    willi.connect(source="127.0.0.2").close()
    assert str(willi.connect(source="127.0.0.2", greeting=False).read_reply()) == TOO_FAST
    upstream.answers[BOB] = Hold()
    other.tolerate("Upstream failed")
    with greeted(other) as client:
        assert say(client, MAIL, BOB)[1].startswith("451 4.4.1 ")


@JUMPS
def test_after_a_jump_of_the_wall_clock_a_new_table_is_read(
    seconds: int, clock: WallClock, start_willi: StartWilli, upstream: ScriptedUpstream
):
    head = "pattern;server;tls_verify\n"
    willi = start_willi(csv=f"{head}other.example;{upstream.server};false\n", environment=clock.environment)
    clock.jump(seconds)
    willi.replace_csv(f"{head}b.example;{upstream.server};false\n")
    willi.wait_for_log(msg="CSV file read again")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED


@pytest.mark.parametrize("workers", [2])
@JUMPS
def test_a_jump_of_the_wall_clock_costs_no_worker(
    workers: int, seconds: int, clock: WallClock, start_willi: StartWilli, upstream: ScriptedUpstream
):
    """Their signs of life are not older for it; a reload, later, is one as ever."""
    willi = start_willi(server=upstream.server, environment=clock.environment, workers=workers)
    before = willi.workers
    clock.jump(seconds)
    threading.Event().wait(2.5)  # two ticks of the master
    assert willi.workers == before
    willi.reload()
    wait_until(lambda: len(willi.workers) == workers, "the end of the old workers")
    assert deliver(greeted(willi)) == QUEUED


def test_no_limit_and_no_cache_goes_by_the_wall_clock():
    """What is not asked cannot mislead."""
    for name in KEEP_TIME:
        path = ROOT / "willi_lib" / name
        for module in path.rglob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK), module
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert {alias.name for alias in node.names} <= {"monotonic"}, module


# The whole machine stands still


@contextmanager
def standing_still(willi: Willi, seconds: float) -> Iterator[None]:
    """As when a virtual machine is moved or saved: all processes stop, time does not. Then they go on."""
    everyone = [willi.process.pid, *willi.workers]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(status_of(pid, "State")[0] == "T" for pid in everyone), "stopped processes")
    yield
    threading.Event().wait(seconds)
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)


def test_who_has_spoken_while_willi_stood_still_is_not_told_that_it_was_too_slow(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    """What came in the meantime is there before the limit is looked at; who was silent all the time has had it."""
    willi = start_willi(server=upstream.server, read_timeout="2s", data_timeout="2s", workers=2)
    willi.tolerate("data_timeout")  # of one that came too early, see below
    with ExitStack() as still:
        began = -inf
        while monotonic() - began >= 2:  # a limit could have been over before Willi stood still
            still.close()
            began = monotonic()
            upstream.answers[VERDICT] = [held := Hold()]
            speaking, waiting, writing, silent = greeted(willi), in_data(willi), in_data(willi), greeted(willi)
            waiting.send(b"Subject: waiting\r\n.\r\n")
            assert held.reached.wait(PATIENCE)
            still.enter_context(standing_still(willi, 3))
        held.release()
        speaking.send(b"NOOP\r\n")
        writing.send(b"Subject: x\r\n.\r\n")
    assert str(speaking.read_reply()) == "250 2.0.0 Ok"
    assert str(writing.read_reply()) == QUEUED
    assert str(waiting.read_reply()) == QUEUED, "or the client would send again what is stored"
    assert str(silent.read_reply()) == TOO_SLOW
    assert str(speaking.read_reply()) == TOO_SLOW, "limits go on"
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert say(willi.connect(), EHLO)[0].startswith("250 ")
