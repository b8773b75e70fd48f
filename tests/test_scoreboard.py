"""The memory that the workers share: what is counted there, also by real processes, and what a death takes away."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_limits import board_of
from willi_lib.processes import scoreboard as module
from willi_lib.processes.scoreboard import CELLS, HASHES, WINDOW, Row, Scoreboard, cells_of

MINUTE = 60.0
ANN, BOB = cells_of("192.0.2.1"), cells_of("192.0.2.2")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns: clock(90.0) seconds on."""
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def turn(seconds: float) -> None:
        now[0] += seconds

    return turn


def test_the_connections_of_all_workers_are_counted_together():
    board = board_of(3)
    first, second = Row(board, 0), Row(board, 2)
    for row in (first, second, second):
        row.add(1)
        row.add_open(ANN, 1)
    second.add_open(BOB, 1)
    assert (board.total, board.open_of(ANN), board.open_of(BOB)) == (3, 3, 1)
    second.add(-1)
    second.add_open(ANN, -1)
    assert (board.total, board.open_of(ANN), board.open_of(BOB)) == (2, 2, 1)


def test_who_comes_back_to_the_row_of_a_dead_worker_begins_at_nothing():
    board = board_of(1)
    Row(board, 0).add_open(ANN, 1)
    Row(board, 0).clear()
    Row(board, 0).give()
    assert board.open_of(ANN) == 0


def test_what_a_dead_worker_counted_is_gone_and_nothing_else():
    board = board_of(2)
    alive, dead = Row(board, 0), Row(board, 1)
    for row in (alive, dead):
        row.add(1)
        row.add_open(ANN, 1)
        row.add_recent(ANN)
    Row(board, 1).clear()
    assert (board.total, board.open_of(ANN), board.recent_of(ANN)) == (1, 1, 1)


def test_a_connection_counts_for_a_minute_and_not_for_much_longer(clock):
    board = board_of(1)
    row = Row(board, 0)
    clock(WINDOW - 1000 % WINDOW - 0.5)  # to the end of a window, and then to its beginning: the two extremes
    row.add_recent(ANN)
    clock(MINUTE - 0.01)
    row.beat()
    assert board.recent_of(ANN) == 1
    clock(1)
    row.beat()
    assert board.recent_of(ANN) == 0
    row.add_recent(ANN)
    clock(MINUTE)
    row.beat()
    assert board.recent_of(ANN) == 1
    clock(WINDOW)
    row.beat()
    assert board.recent_of(ANN) == 0


def test_a_worker_that_slept_forgets_all_windows_it_missed(clock):
    board = board_of(2)
    row = Row(board, 1)
    for _ in range(module.WINDOWS):
        row.add_recent(ANN)
        clock(WINDOW)
    clock(100 * WINDOW)
    row.add_recent(BOB)
    assert (board.recent_of(ANN), board.recent_of(BOB)) == (0, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.booleans())))
def test_a_client_is_never_counted_less_than_it_should(steps):
    board = board_of(3)
    rows = [Row(board, number) for number in range(3)]
    true: Counter[tuple[int, int]] = Counter()
    for worker, client, enters in steps:
        if not enters and not true[worker, client]:
            continue
        rows[worker].add_open(cells_of(f"192.0.2.{client}"), 1 if enters else -1)
        true[worker, client] += 1 if enters else -1
    for client in range(41):
        assert board.open_of(cells_of(f"192.0.2.{client}")) >= sum(true[worker, client] for worker in range(3))


def test_among_five_thousand_connections_nobody_is_taken_for_somebody_else():
    """Fifty each, from a hundred clients: the worst that the default limits allow."""
    board = board_of(2)
    row = Row(board, 0)
    for number in range(100):
        row.add_open(cells_of(f"10.0.0.{number}"), 50)
    strangers = [cells_of(f"10.{number >> 8}.{number & 255}.1") for number in range(256, 20_000)]
    assert max(map(board.open_of, strangers)) < 50


def test_memory_is_there_only_where_it_was_used():
    """A board for 256 workers with a rate is 4 GB of addresses; almost nothing of it is memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    board = Scoreboard(1024, rates=True)
    Row(board, 7).give()
    Row(board, 7).add_open(ANN, 1)
    Row(board, 7).clear()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB


def test_the_cells_of_a_client_are_one_of_each_quarter():
    assert [cell // CELLS for cell in ANN] == list(range(HASHES))
    assert cells_of("192.0.2.1") == ANN != BOB


KILLED_WORKERS = """\
import os, signal
from tests.support.loopback import wait_until
from tests.test_scoreboard import ANN, Row, board_of

board = board_of(2)
mine = Row(board, 0)
mine.add(5)
mine.add_open(ANN, 5)
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        signal.alarm(90)
        theirs = Row(board, 1)
        while True:
            theirs.add(1)
            theirs.add_open(ANN, 1)
    wait_until(lambda: board.open_of(ANN) > 100, "a worker that counts")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    Row(board, 1).clear()
    Row(board, 1).give()
    assert (board.total, board.open_of(ANN)) == (5, 5), (board.total, board.open_of(ANN))
"""


def test_a_worker_killed_at_any_moment_stops_nobody():
    """A real process that counts as fast as it can, killed; its row is cleared and the sum is right.

    In a process of its own, since the one that runs the tests has threads, and must not fork.
    """
    command = [sys.executable, "-c", KILLED_WORKERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
