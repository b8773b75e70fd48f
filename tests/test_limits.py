"""Connections and rates per client: at the limit, and one beyond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib import limits as module
from willi_lib.limits import Limits, client_of
from willi_lib.smtp import reply as replies


@pytest.fixture
def minutes(monkeypatch):
    """A clock that the test turns: minutes(1.5)."""
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def turn(number: float) -> None:
        now[0] += 60 * number

    return turn


def test_one_connection_more_than_allowed_is_refused_and_not_counted():
    limits = Limits(2, 100, 0)
    assert [limits.enter() for _ in range(3)] == [None, None, replies.TOO_MANY_CONNECTIONS]
    assert limits.total == 2
    limits.leave()
    assert limits.enter() is None


def test_one_connection_more_than_allowed_for_one_client_is_refused_and_others_are_not():
    limits = Limits(100, 2, 0)
    assert [limits.enter_address("192.0.2.1") for _ in range(3)] == [None, None, replies.TOO_MANY_CONNECTIONS_FROM_YOU]
    assert limits.enter_address("192.0.2.2") is None
    limits.leave_address("192.0.2.1")
    assert limits.enter_address("192.0.2.1") is None
    assert limits.enter_address("192.0.2.1") == replies.TOO_MANY_CONNECTIONS_FROM_YOU


def test_a_client_that_has_gone_leaves_nothing_behind():
    limits = Limits(100, 2, 0)
    for number in range(200):
        limits.enter_address(f"192.0.2.{number}")
        limits.leave_address(f"192.0.2.{number}")
        limits.enter_address("192.0.3.1")
    assert dict(limits._open) == {"192.0.3.1": 2}


def test_a_rate_of_nothing_is_no_limit():
    limits = Limits(100, 1000, 0)
    assert {limits.enter_address("192.0.2.1") for _ in range(500)} == {None}


def test_the_rate_is_that_of_any_minute(minutes):
    limits = Limits(100, 1000, 3)
    assert [limits.enter_address("192.0.2.1") for _ in range(4)] == [None, None, None, replies.TOO_FAST]
    assert limits.enter_address("192.0.2.2") is None
    minutes(0.99)
    assert limits.enter_address("192.0.2.1") == replies.TOO_FAST
    minutes(0.01)
    assert [limits.enter_address("192.0.2.1") for _ in range(4)] == [None, None, None, replies.TOO_FAST]


def test_who_is_refused_for_its_rate_is_not_counted(minutes):
    limits = Limits(100, 1, 1)
    assert limits.enter_address("192.0.2.1") is None
    limits.leave_address("192.0.2.1")
    assert [limits.enter_address("192.0.2.1") for _ in range(3)] == [replies.TOO_FAST] * 3
    minutes(1)
    assert limits.enter_address("192.0.2.1") is None


def test_who_is_refused_for_its_open_connections_does_not_use_up_its_rate(minutes):
    limits = Limits(100, 1, 2)
    assert limits.enter_address("192.0.2.1") is None
    assert limits.enter_address("192.0.2.1") == replies.TOO_MANY_CONNECTIONS_FROM_YOU
    limits.leave_address("192.0.2.1")
    assert limits.enter_address("192.0.2.1") is None


def test_clients_of_the_last_minute_are_forgotten(minutes):
    limits = Limits(10_000, 10, 5)
    for number in range(1000):
        limits.enter_address(f"10.0.{number // 250}.{number % 250}")
    minutes(1.1)
    limits.enter_address("192.0.2.1")
    assert list(limits._recent) == ["192.0.2.1"]


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
    limits = Limits(100, 2, 0)
    inside = [address for address in addresses if limits.enter_address(address) is None]
    counts = {client: [client_of(address) for address in inside].count(client) for client in map(client_of, inside)}
    assert dict(limits._open) == counts
    assert all(count <= 2 for count in counts.values())
    for address in inside:
        limits.leave_address(address)
    assert not limits._open
