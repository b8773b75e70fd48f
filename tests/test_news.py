"""What the log says of CSV files, when several workers tell of the same ones."""

from __future__ import annotations

import pytest

from willi_lib.processes.news import OLD_STAYS, Message, News
from willi_lib.routing.route import HeldTable

FIRST, SECOND = 101, 102  # workers
MISSING: Message = {"mapping": "csv", "faults": ["t.csv: No such file"], "text": OLD_STAYS}


def table(changed: int) -> Message:
    return {"mapping": "csv", "held": HeldTable((1, 2, 3, changed, changed), 7, ends_a_line=True)}


def told(capfd: pytest.CaptureFixture[str]) -> str:
    """The messages of the log since the last look, by their first letters: _f_ault or _r_ead again."""
    lines = capfd.readouterr().out.splitlines()
    return "".join("f" if OLD_STAYS in line else "r" if "CSV file read again" in line else "?" for line in lines)


@pytest.fixture
def news() -> News:
    news = News({})
    news.take(table(1), FIRST)
    news.take(table(1), SECOND)
    return news


def test_a_fault_and_its_end_are_logged_once_for_all_workers(news, capfd):
    for message in (MISSING, MISSING, table(2), MISSING):
        news.take(message, FIRST)
        news.take(message, SECOND)
    assert told(capfd) == "frf"


def test_a_slow_worker_that_tells_of_the_table_before_the_fault_does_not_end_it(news, capfd):
    news.take(table(2), FIRST)
    news.take(MISSING, FIRST)
    news.take(table(2), SECOND)  # which it had opened before the file was removed
    news.take(MISSING, SECOND)
    news.take(MISSING, FIRST)
    assert told(capfd) == "rf"


def test_a_file_that_cannot_be_read_for_a_while_and_is_the_same_again_ends_the_fault(news, capfd):
    for message in (MISSING, table(1), MISSING):
        news.take(message, FIRST)
    assert told(capfd) == "frf"
