"""What decides whether a Willi goes on to the next test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import StartWilli
from tests.support import shared
from tests.support.daemon import Willi
from tests.support.loopback import PATIENCE
from tests.support.shared import SharedWillis
from tests.support.talk import BOB, MAIL, QUEUED, deliver, greeted, say
from tests.support.upstream import GREETING, Close, ScriptedUpstream


@pytest.fixture
def willis() -> Iterator[SharedWillis]:
    made = SharedWillis()
    yield made
    made.end()


@pytest.fixture
def start(start_willi: StartWilli, upstream: ScriptedUpstream) -> Callable[[], Willi]:
    return lambda: start_willi(server=upstream.server)


@pytest.fixture
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Willi that takes its time to close its connections goes on, too."""
    monkeypatch.setattr(shared, "LEFT_OPEN", PATIENCE)


@pytest.mark.usefixtures("no_hurry")
def test_a_willi_that_has_had_mail_goes_on_with_an_empty_log(willis: SharedWillis, start: Callable[[], Willi]):
    first = willis.take("a", start)
    with greeted(first) as client:
        assert deliver(client) == QUEUED
    willis.give_back("a", first)
    assert willis.take("a", start) is first
    assert first.log == []
    assert willis.take("b", start) is not first


def reload(willi: Willi) -> None:
    willi.signal(signal.SIGHUP)
    willi.wait_for_log(msg="Reloaded")


def lose_a_worker(willi: Willi) -> None:
    willi.tolerate("Worker")
    os.kill(willi.workers[0], signal.SIGKILL)


def kill(willi: Willi) -> None:
    willi.tolerate("The master is dead")  # by a worker, if it is not killed before
    willi.kill()


@pytest.mark.parametrize("happen", [reload, lose_a_worker, kill, Willi.stop])
def test_a_willi_to_which_something_has_happened_does_not(
    happen: Callable[[Willi], None], willis: SharedWillis, start: Callable[[], Willi]
):
    first = willis.take("a", start)
    happen(first)
    willis.give_back("a", first)
    assert first.process.poll() is not None
    assert willis.take("a", start) is not first


def test_a_willi_in_which_a_connection_is_left_does_not(willis: SharedWillis, start: Callable[[], Willi]):
    first = willis.take("a", start)
    with greeted(first):
        willis.give_back("a", first)
        assert first.process.poll() is not None


@pytest.mark.usefixtures("no_hurry")
def test_an_error_is_told_by_the_test_that_had_it(
    willis: SharedWillis, start: Callable[[], Willi], upstream: ScriptedUpstream
):
    upstream.answers[GREETING] = Close()
    first = willis.take("a", start)
    for tolerated in (True, False):
        if tolerated:
            first.tolerate("Upstream failed")
        with greeted(first) as client:
            assert say(client, MAIL, BOB)[1].startswith("451 ")
        if tolerated:
            willis.give_back("a", first)
            assert willis.take("a", start) is first
    with pytest.raises(AssertionError, match="Upstream failed"):
        willis.give_back("a", first)
    assert first.process.poll() is not None
    first.tolerate("Upstream failed")  # start_willi looks, too
