"""When a child that has died is replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from willi_lib.processes import child
from willi_lib.processes.child import LONGEST_DELAY, Backoff


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stands still; call it to let seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(child, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_children_that_soon_die_are_replaced_later_and_later(clock):
    backoff = Backoff()
    for seconds in (1, 2, 4, 8, 16, 32, LONGEST_DELAY, LONGEST_DELAY):
        backoff.died(lived=3.0)
        clock(seconds - 0.1)
        assert not backoff.is_over()
        clock(0.1)
        assert backoff.is_over()


def test_several_that_soon_die_together_are_replaced_as_early_as_one(clock):
    """Eight workers that the kernel killed for their memory were replaced after a minute."""
    backoff = Backoff()
    for seconds in (1.0, 2.0):
        for _ in range(8):
            backoff.died(lived=3.0)
        clock(seconds)
        assert backoff.is_over()


def test_one_that_has_lived_for_long_is_replaced_at_once(clock):
    backoff = Backoff()
    backoff.died(lived=3.0)
    backoff.died(lived=61.0)
    assert backoff.is_over()
