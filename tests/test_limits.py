"""Connections and rates per client: at the limit, and one beyond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib.processes import scoreboard as module
from willi_lib.processes.limits import Limits, client_of
from willi_lib.processes.scoreboard import Row, Scoreboard, cells_of
from willi_lib.smtp import reply as replies


def board_of(rows: int) -> Scoreboard:
    """With a worker in each row."""
    board = Scoreboard(rows, rates=True)
    for row in range(rows):
        Row(board, row).give()
    return board


def limits_of(*limits: int, board: Scoreboard | None = None, row: int = 0) -> Limits:
    """Those of one worker; with a board, of several."""
    return Limits(Row(board or board_of(1), row), *limits)


@pytest.fixture
def minutes(monkeypatch):
    """A clock that the test turns: minutes(1.5)."""
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def turn(number: float) -> None:
        now[0] += 60 * number

    return turn


def test_one_connection_more_than_allowed_is_refused_and_not_counted():
    limits = limits_of(2, 100, 0)
    assert [limits.enter() for _ in range(3)] == [None, None, replies.TOO_MANY_CONNECTIONS]
    assert limits._board.total == 2
    limits.leave()
    assert limits.enter() is None


def test_one_connection_more_than_allowed_for_one_client_is_refused_and_others_are_not():
    limits = limits_of(100, 2, 0)
    assert [limits.enter_address("192.0.2.1") for _ in range(3)] == [None, None, replies.TOO_MANY_CONNECTIONS_FROM_YOU]
    assert limits.enter_address("192.0.2.2") is None
    limits.leave_address("192.0.2.1")
    assert limits.enter_address("192.0.2.1") is None
    assert limits.enter_address("192.0.2.1") == replies.TOO_MANY_CONNECTIONS_FROM_YOU


def test_a_client_that_has_gone_leaves_nothing_behind():
    limits = limits_of(100, 2, 0)
    for number in range(200):
        limits.enter_address(f"192.0.2.{number}")
        limits.leave_address(f"192.0.2.{number}")
        limits.enter_address("192.0.3.1")  # of which two stay
    assert limits.enter_address("192.0.3.1") == replies.TOO_MANY_CONNECTIONS_FROM_YOU
    assert limits._board.open_of(cells_of("192.0.2.77")) == 0


def test_a_rate_of_nothing_is_no_limit():
    limits = limits_of(100, 1000, 0)
    assert {limits.enter_address("192.0.2.1") for _ in range(500)} == {None}


def test_the_rate_is_that_of_any_minute(minutes):
    limits = limits_of(100, 1000, 3)
    assert [limits.enter_address("192.0.2.1") for _ in range(4)] == [None, None, None, replies.TOO_FAST]
    assert limits.enter_address("192.0.2.2") is None
    minutes(0.99)
    assert limits.enter_address("192.0.2.1") == replies.TOO_FAST
    minutes(0.2)
    assert [limits.enter_address("192.0.2.1") for _ in range(4)] == [None, None, None, replies.TOO_FAST]


def test_who_is_refused_for_its_rate_is_not_counted(minutes):
    limits = limits_of(100, 1, 1)
    assert limits.enter_address("192.0.2.1") is None
    limits.leave_address("192.0.2.1")
    assert [limits.enter_address("192.0.2.1") for _ in range(3)] == [replies.TOO_FAST] * 3
    minutes(1.2)
    assert limits.enter_address("192.0.2.1") is None


def test_a_window_that_begins_while_a_client_is_refused_leaks_nothing(monkeypatch):
    """The clock that turned between counting in and out made the count of an empty window negative."""
    limits = limits_of(100, 100, 1)
    times = [100.0, 109.99, 109.99, 110.0, 110.0, 110.0, 110.0]
    monkeypatch.setattr(module, "monotonic", lambda: times.pop(0) if len(times) > 1 else times[0])
    assert limits.enter_address("192.0.2.1") is None
    for _ in range(5):
        assert limits.enter_address("192.0.2.1") == replies.TOO_FAST
    assert limits._board.open_of(cells_of("192.0.2.1")) == 1


def test_who_is_refused_for_its_open_connections_does_not_use_up_its_rate(minutes):
    limits = limits_of(100, 1, 2)
    assert limits.enter_address("192.0.2.1") is None
    assert limits.enter_address("192.0.2.1") == replies.TOO_MANY_CONNECTIONS_FROM_YOU
    limits.leave_address("192.0.2.1")
    assert limits.enter_address("192.0.2.1") is None


def test_all_workers_count_together():
    board = board_of(3)
    first, second = (limits_of(3, 2, 0, board=board, row=row) for row in (0, 2))
    assert [first.enter(), second.enter(), first.enter()] == [None] * 3
    assert first.enter() == second.enter() == replies.TOO_MANY_CONNECTIONS
    assert [first.enter_address("192.0.2.1"), second.enter_address("192.0.2.1")] == [None] * 2
    assert first.enter_address("192.0.2.1") == replies.TOO_MANY_CONNECTIONS_FROM_YOU
    second.leave_address("192.0.2.1")
    assert first.enter_address("192.0.2.1") is None
    Row(board, 0).clear()
    assert [second.enter() for _ in range(3)] == [None, None, replies.TOO_MANY_CONNECTIONS]


def test_all_workers_count_the_rate_together():
    board = board_of(2)
    workers = [limits_of(100, 100, 4, board=board, row=row) for row in (0, 1)] * 3
    answers = [worker.enter_address("192.0.2.1") for worker in workers]
    assert answers == [None] * 4 + [replies.TOO_FAST] * 2


@pytest.mark.parametrize(("address", "client"), [
    ("192.0.2.1", "192.0.2.1"),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ("2001:db8:1:2::", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"),
    ("::1", "::/64"),
    ("::ffff:192.0.2.1", "192.0.2.1"),
])  # fmt: skip
def test_a_client_is_an_ipv4_address_or_the_64_of_an_ipv6_address(address, client):
    assert client_of(address) == client


@given(st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"])))
def test_who_was_let_in_is_counted_until_it_leaves(addresses):
    limits = limits_of(100, 2, 0)
    inside = [address for address in addresses if limits.enter_address(address) is None]
    for client in map(client_of, inside):
        count = list(map(client_of, inside)).count(client)
        assert limits._board.open_of(cells_of(client)) == count <= 2
    for address in inside:
        limits.leave_address(address)
    assert not any(limits._board.open_of(cells_of(client_of(address))) for address in inside)
