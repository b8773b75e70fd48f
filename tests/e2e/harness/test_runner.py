"""The runner of these tests: what hangs fails alone, what dies costs one test, and the whole has an end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runner.limits import allow
from tests.runner.plugin import LONGEST
from tests.support.loopback import ROOT, wait_until

SECONDS = 240  # for an inner run; ten are usual
SHORT = ("--limit=2", "--grace=4")
FILES = ("--numprocesses=4", "--dist=loadfile", "--max-worker-restart=100")


@dataclass(frozen=True)
class Run:
    """An inner run that has ended."""

    status: int
    said: str

    def lines(self, beginning: str) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith(beginning)]

    @property
    def counts(self) -> str:
        """The last line but for the time: "1 failed, 2 passed"."""
        return self.said.splitlines()[-1].strip("= ").partition(" in ")[0]

    def outcomes(self, file: str) -> dict[str, str]:
        """PASSED, FAILED or ERROR of each test of this file, by the summary of -rA."""
        words = [line.split() for line in self.said.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR "))]
        tests = [(outcome, *test.split("::")) for outcome, test, *_ in words]
        return {name: outcome for outcome, path, name in tests if path == file}


def start(directory: Path, files: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Run these files as ours are run."""
    (directory / "conftest.py").write_text('pytest_plugins = ("tests.runner.plugin",)\n')
    (directory / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    for name, text in files.items():
        (directory / name).write_text(text)
    allow(SECONDS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(directory), "COLUMNS": "200"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runner", *arguments, "-p", "no:cacheprovider", "--quiet"], cwd=directory,
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(directory: Path, files: dict[str, str], *arguments: str) -> Run:
    """The same to its end."""
    with start(directory, files, *arguments) as runner:
        said = runner.communicate(timeout=SECONDS)[0]
    assert not list(directory.glob("willi-run-*")), "the directory of a run is removed"
    return Run(runner.returncode, said)


def ended(directory: Path) -> list[str]:
    """The tests of a run that has not ended."""
    lines = [line for path in directory.glob("willi-run-*/record") for line in path.read_text().splitlines()]
    return [line for line in lines if line.startswith("- ")]


def processes(mark: Path) -> list[str]:
    """The command lines that name this file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(mark) in words:
            found.append(words)
    return found


WAITS = {
    "lock": "threading.Event().wait()",
    "loop": "while True: pass",
    "lenient": "while True:\n        try: threading.Event().wait()\n        except Exception: pass",
    "gevent": "gevent.sleep(600)",
    "greenlet": "gevent.spawn(busy).join()",
    "child": "subprocess.run(['sleep', '600'])",
}
HANGS = """\
import gevent, pytest, subprocess, threading
def busy():
    while True: pass
def hang_about():
    {wait}
@pytest.fixture
def slow():
    hang_about()
def test_hangs():
    hang_about()
def test_of_a_fixture_that_hangs(slow): pass
def test_after(): pass
"""


SHARED_HANGS = """\
import pytest, threading
@pytest.fixture(scope="session")
def slow():
    print("waiting")
    threading.Event().wait()
def test_one(slow): pass
def test_two(slow): pass
def test_three(): pass
"""
TAKES_LONG = """\
import pytest, threading
from tests.runner.limits import allow
def wait(seconds): threading.Event().wait(seconds)
@pytest.fixture(scope="module")
def first(): wait(1.2)
@pytest.fixture(scope="module")
def second(): wait(1.2)
def test_one(first, second): pass
def test_two():
    allow(60)
    wait(2.5)
"""
DEATHS = {
    "exit": "os._exit(0)",
    "kill": "os.kill(os.getpid(), 9)",
    "fault": "ctypes.string_at(0)",
    "deaf": "\n    while True:\n        try: threading.Event().wait()\n        except BaseException: pass",
}
GOOD = """\
import ctypes, os, pytest, threading
@pytest.mark.parametrize("number", range(4))
def test_good(number): pass
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of all that hangs, dies and takes long, since most of it waits."""
    files = {f"test_{name}.py": HANGS.format(wait=wait) for name, wait in WAITS.items()}
    files |= {f"test_{number}.py": GOOD for number in range(6)}
    for name, death in DEATHS.items():
        files[f"test_{name}.py"] = f"{GOOD}def test_dies(): {death}\ndef test_after(): pass\n"
    files |= {"test_shared.py": SHARED_HANGS, "test_long.py": TAKES_LONG}
    return run(tmp_path_factory.mktemp("run"), files, "-rA", *SHORT, *FILES)


def test_a_test_that_hangs_fails_alone_and_shows_where(done: Run):
    for name in WAITS:
        assert done.outcomes(f"test_{name}.py") == {
            "test_hangs": "FAILED", "test_of_a_fixture_that_hangs": "ERROR", "test_after": "PASSED"
        }, done.said  # fmt: skip
    assert done.said.count("it hangs. All stacks:") >= 2 * len(WAITS), done.said
    assert done.said.count("in hang_about") >= 2 * len(WAITS), done.said


def test_a_shared_fixture_that_hangs_is_tried_once(done: Run):
    expected = {"test_one": "ERROR", "test_two": "ERROR", "test_three": "PASSED"}
    assert done.outcomes("test_shared.py") == expected, done.said


def test_the_time_of_a_shared_fixture_is_not_that_of_the_test_and_what_is_allowed_may_take_long(done: Run):
    assert done.outcomes("test_long.py") == {"test_one": "PASSED", "test_two": "PASSED"}, done.said


def test_a_worker_that_dies_costs_the_test_that_it_had(done: Run):
    """Late, and so that it had ended other files: there pytest-xdist's own distribution stands for ever."""
    good = {f"test_good[{number}]": "PASSED" for number in range(4)}
    for name in DEATHS:
        assert done.outcomes(f"test_{name}.py") == {**good, "test_dies": "FAILED", "test_after": "PASSED"}, done.said
    for number in range(6):
        assert done.outcomes(f"test_{number}.py") == good, done.said
    assert done.said.count("which has died") >= 2, "the stacks of a segmentation fault, and of what cannot be ended"
    assert (done.status, done.counts) == (1, "10 failed, 53 passed, 8 errors"), done.said


def test_a_run_over_its_end_is_stopped(tmp_path: Path):
    done = run(tmp_path, {"test_one.py": "import threading\ndef test(): threading.Event().wait()\n"}, "--minutes=0.02")
    assert done.status == 124, done.said
    assert "have not ended within 0.02 minutes" in done.said and "0 tests have ended" in done.said


def test_a_run_that_is_stopped_says_what_is_open_and_leaves_nothing(tmp_path: Path):
    mark = tmp_path / "mark"
    (tmp_path / "daemon.py").write_text(f"import os, signal\nos.setsid()\nopen({str(mark)!r}, 'w')\nsignal.pause()\n")
    text = (
        "import subprocess, threading\n"
        "def test_good(): pass\n"
        "def test_open():\n"
        f"    subprocess.Popen(['python3', 'daemon.py', {str(mark)!r}])\n"
        "    threading.Event().wait()\n"
    )
    files = {"test_one.py": text, "test_two.py": "def test_good(): pass\n"}
    with start(tmp_path, files, *FILES) as runner:
        wait_until(mark.exists, "test_open has begun", SECONDS)
        wait_until(lambda: len(ended(tmp_path)) == 2, "the others have ended", SECONDS)
        runner.terminate()
        said = runner.communicate(timeout=SECONDS)[0]
    assert runner.returncode == 128 + 15, said
    assert "2 tests have ended" in said
    still_open = [line.split()[-1] for line in said.splitlines() if line.startswith("still open")]
    assert still_open == ["test_one.py::test_open"], said
    assert "in test_open" in said, "its stack"
    wait_until(lambda: not processes(mark), "the end of all processes")


def test_a_run_that_is_over_leaves_no_process(tmp_path: Path):
    mark = tmp_path / "mark"
    text = f"import subprocess\ndef test_good(): subprocess.Popen(['sh', '-c', 'sleep 600; : {mark}'])\n"
    done = run(tmp_path, {"test_one.py": text})
    assert done.status in (0, 1), done.said
    wait_until(lambda: not processes(mark), "the end of all processes")


def test_the_order_of_the_files_is_that_of_the_seed(tmp_path: Path):
    files = {f"test_{letter}.py": "def test_good(): pass\n" for letter in "abcdefgh"}
    done = run(tmp_path, files, "--shuffle-files=1", "--verbose", "--verbose")
    expected = sorted(files)
    random.Random(1).shuffle(expected)
    assert [line.split("::")[0] for line in done.lines("test_")] == expected != sorted(files)


def test_the_files_that_take_longest_begin_first(tmp_path: Path):
    assert all(list((ROOT / "tests").rglob(name)) for name in LONGEST), "a file has another name now"
    files = dict.fromkeys(("test_a.py", LONGEST[1], "test_z.py", LONGEST[0]), "def test_good(): pass\n")
    done = run(tmp_path, files, "--verbose", "--verbose")
    begun = [line.split("::")[0] for line in done.lines("test_")]
    assert begun == [LONGEST[0], LONGEST[1], "test_a.py", "test_z.py"]
