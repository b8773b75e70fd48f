"""Jobs that must not end, whatever they raise."""

from __future__ import annotations

import pytest

from willi_lib import log
from willi_lib.net import jobs


@pytest.mark.parametrize("fault", [MemoryError, RuntimeError])
def test_a_job_that_raises_goes_on_later(fault: type[Exception], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "PAUSE", 0.01)
    monkeypatch.setattr(log, "bug", lambda _message: None)
    turns = []

    def job() -> None:
        turns.append(0)
        if len(turns) < 3:
            raise fault

    jobs.keep_going(job)
    assert len(turns) == 3
