"""pytest-xdist's --dist loadfile, but for what it does when a worker dies."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class Files(LoadFileScheduling):  # type: ignore[misc]
    """One worker runs all tests of a file.

    When a worker dies, the original (3.8.0) gives all its files to the others again: also the test that killed it,
    which kills the next one, and those files of which nothing is left to be done. Who gets such a file is sent no test,
    never answers, and is given nothing more: the run stands for ever. And while the next process still looks for its
    tests, the death of another one has it sent some, which ends the run. And a process keeps the last test that it has
    until it has another one, or knows that there is none: a replacement that was sent one test stood for ever.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        """Returns the test at which the worker died."""
        workload = self.assigned_work.pop(node)
        rest = {name: {test: False for test, done in tests.items() if not done} for name, tests in workload.items()}
        rest = {name: tests for name, tests in rest.items() if tests}
        if not rest:
            return None
        name, tests = next(iter(rest.items()))
        died_at: str = next(iter(tests))
        del tests[died_at]
        if not tests:
            del rest[name]
        self.workqueue.update(rest)
        for name in reversed(rest):
            self.workqueue.move_to_end(name, last=False)
        for other in self.nodes:
            self._reschedule(other)
        return died_at

    def _reschedule(self, node: WorkerController) -> None:
        if node in self.registered_collections:  # otherwise its turn comes when it knows its tests
            super()._reschedule(node)
            while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                self._assign_work_unit(node)
            if not self.workqueue and not node.shutting_down:
                node.shutdown()  # when it has run what it has
