"""The checks of the chaos test see what they should: each of these would be a broken promise."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.chaos.clients import Entry, Fate, message
from tests.chaos.test_chaos import check_messages

DIGEST = "d1"
ONCE, TWICE = Counter({("a:25", DIGEST): 1}), Counter({("a:25", DIGEST): 1, ("b:25", DIGEST): 1})


def entry(fate: Fate, code: int = 0) -> Entry:
    return Entry("one.example", DIGEST, fate, code)


@pytest.mark.parametrize(("told", "copies"), [
    (entry(Fate.ACCEPTED, 250), Counter()), (entry(Fate.ACCEPTED, 250), TWICE),
    (entry(Fate.ACCEPTED, 250), Counter({("a:25", DIGEST): 2})),
    (entry(Fate.ACCEPTED, 250), Counter({("a:25", "d2"): 1})),
    (entry(Fate.DEFERRED, 452), ONCE), (entry(Fate.DEFERRED, 451), TWICE), (entry(Fate.UNKNOWN), TWICE),
    (entry(Fate.UNFINISHED), ONCE), (entry(Fate.NOT_BEGUN), ONCE), (entry(Fate.NOT_BEGUN, 451), ONCE),
])  # fmt: skip
def test_a_message_that_is_lost_doubled_changed_or_unfinished_is_a_fault(told: Entry, copies: Counter[tuple[str, str]]):
    assert check_messages({"m": told}, {"m": copies}, Counter()) != []


@pytest.mark.parametrize(("told", "copies"), [
    (entry(Fate.ACCEPTED, 250), ONCE), (entry(Fate.DEFERRED, 452), Counter()), (entry(Fate.DEFERRED, 451), ONCE),
    (entry(Fate.DEFERRED, 421), ONCE), (entry(Fate.UNKNOWN), ONCE), (entry(Fate.UNKNOWN), Counter()),
    (entry(Fate.UNFINISHED), Counter()),
])  # fmt: skip
def test_a_message_that_is_where_it_should_be_is_none(told: Entry, copies: Counter[tuple[str, str]]):
    assert check_messages({"m": told}, {"m": copies}, Counter()) == []


def test_what_nobody_has_sent_is_a_fault():
    assert check_messages({}, {"m": ONCE}, Counter()) != []


def test_the_window_is_counted():
    counts: Counter[str] = Counter()
    check_messages({"m": entry(Fate.DEFERRED, 451)}, {"m": ONCE}, counts)
    assert counts == {"stored without a 250: the client was told 451": 1}


def test_a_message_bears_its_mark_at_both_ends():
    content = message("m1-7", random.Random(1))
    assert content.startswith(b"Subject: m1-7\r\n") and content.endswith(b"end of m1-7\r\n")
