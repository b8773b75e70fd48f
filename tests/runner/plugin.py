"""pytest's hooks for `limits`, for workers that die, and for what `python -m tests.runner` must know."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

from tests.runner import limits

DIRECTORY = "WILLI_TEST_RUN"  # the variable that names the directory of this run, if the runner made one
LIMITS = pytest.StashKey[limits.Limits]()
# Begun last, one of these would run alone at the end, while other processes have nothing to do. The first one that
# needs a Debian makes it for all; those that come meanwhile would wait for it.
LONGEST = (
    "test_chaos.py", "test_install.py", "test_reload.py", "test_mysql.py",  # only one of these waits for a Debian
    "test_load.py", "test_upgrade.py", "test_page_in_browser.py", "test_processes.py", "test_interoperation.py",
    "test_with_systemd.py", "test_promise_8.py", "test_release.py", "test_check.py", "test_status.py",
)  # fmt: skip


def run_directory() -> Path:
    """Of this run, for all its processes: what is in it is removed at its end."""
    if DIRECTORY not in os.environ:  # pytest without `python -m tests.runner`
        os.environ[DIRECTORY] = tempfile.mkdtemp(prefix="willi-run-")
        Path(os.environ[DIRECTORY]).chmod(0o755)
        atexit.register(shutil.rmtree, os.environ[DIRECTORY], ignore_errors=True)
    return Path(os.environ[DIRECTORY])


def kept_directory() -> Path:
    """For what pytest keeps of its last three runs, of this user and this checkout alone.

    pytest closes its directory to other users at each start; some tests open it, and a run in another checkout must
    not close it under them.
    """
    checkout = hashlib.sha256(str(Path(__file__).resolve().parents[2]).encode()).hexdigest()[:8]
    directory = Path(tempfile.gettempdir()) / f"willi-tests-{os.getuid()}-{checkout}"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    return directory


KEPT = "PYTEST_DEBUG_TEMPROOT"  # pytest's variable for it
if KEPT not in os.environ:
    os.environ[KEPT] = str(kept_directory())


def stacks_file() -> Path | None:
    """Where this pytest writes its stacks: stacks-gw1-PID, if it belongs to a run."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    return Path(os.environ[DIRECTORY]) / f"stacks-{worker}-{os.getpid()}" if DIRECTORY in os.environ else None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("willi")
    group.addoption("--shuffle-files", type=int, metavar="SEED", help="run the files in another order")
    group.addoption("--limit", type=float, default=limits.LIMIT, help="seconds for a phase of a test")
    group.addoption("--grace", type=float, default=limits.GRACE, help="seconds after which its process is ended")


@pytest.hookimpl(trylast=True)  # after pytest's own faulthandler
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        run_directory()  # the same for all of them
    path = stacks_file()
    if path:
        stacks: Any = path.open("w")
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
    else:
        stacks = config.stash[fault_handler_stderr_fd_key]
    config.stash[LIMITS] = limits.start(stacks, config.getoption("limit"), config.getoption("grace"))
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(path.parent))
    if config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(Distribution())


def pytest_unconfigure(config: pytest.Config) -> None:
    if LIMITS in config.stash:
        config.stash[LIMITS].stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with item.config.stash[LIMITS].limit():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with item.config.stash[LIMITS].limit():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with item.config.stash[LIMITS].limit():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    if fixturedef.scope == "function":
        return (yield)
    with request.config.stash[LIMITS].limit(limits.SHARED_ERROR):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Six thousand tests are made, and none of that is garbage: to look for some takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("shuffle_files")
    if seed is None:
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    else:
        files = sorted({item.path for item in items})
        random.Random(seed).shuffle(files)
        places = {path: place for place, path in enumerate(files)}
        items.sort(key=lambda item: places[item.path])


class Record:
    """Writes down which tests have begun and ended: `open_tests` reads it if the run is over its end."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / "record").open("w", buffering=1)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._file.write(f"+ {time.monotonic()} {nodeid}\n")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._file.write(f"- {time.monotonic()} {nodeid}\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        self.pytest_runtest_logfinish(crashitem)


def open_tests(directory: Path) -> tuple[dict[str, float], int]:
    """Tests that have not ended, with the seconds since they began; and how many have ended."""
    running: dict[str, float] = {}
    ended = 0
    record = directory / "record"
    for line in record.read_text().splitlines() if record.exists() else ():
        sign, began, nodeid = line.split(" ", 2)
        if sign == "+":
            running[nodeid] = time.monotonic() - float(began)
        else:
            running.pop(nodeid, None)
            ended += 1
    return running, ended


class Distribution:
    """What the controlling process does about its workers."""

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if config.getoption("dist") != "loadfile":
            return None
        from tests.runner.scheduler import Files

        return Files(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: object) -> None:
        """Show the stacks that the process left behind."""
        worker = report.node.gateway.id
        for path in Path(os.environ.get(DIRECTORY, "/nonexistent")).glob(f"stacks-{worker}-*"):
            if text := path.read_text(errors="backslashreplace"):
                report.sections.append((f"stacks of {worker}, which has died", text))
