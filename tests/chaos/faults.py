"""Everything that can break, and how it is mended: upstreams, the database, workers, the master, the files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pymysql

from tests.support.daemon import Willi
from tests.support.loopback import ROOT, wait_until
from tests.support.mariadb import Mariadb
from tests.support.postfix import Postfix

SHORT_STOP = (0.2, 2.5)  # seconds that a process stands still, or is gone
PULSE = (0.06, 0.02)  # seconds of standing still and of running, for a process that is slow
DRAIN_TIMEOUT = 4.0  # seconds, of Willi
TIME_TO_START = 60.0  # seconds, on a machine that has other things to do
TIME_TO_DIE = 30.0  # seconds until the workers of a dead master are gone


class Sink:
    """A sink.py: what it has stored stays when it is killed."""

    def __init__(self, directory: Path, address: str, extensions: tuple[str, ...], seed: int) -> None:
        self.store = directory / f"sink-{address}.jsonl"
        self.store.touch()
        self.server = f"{address}:2525"
        self._address = address
        self._command = [
            sys.executable, "-m", "tests.chaos.sink", address, "2525", str(self.store), str(seed), *extensions
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def cut(self, cut: bool) -> None:
        """Nothing reaches it any more. For a new connection that is an error, for one that is there it is silence."""
        verb = "add" if cut else "del"
        subprocess.run(["ip", "route", verb, "blackhole", f"{self._address}/32", "table", "local"], check=True)


class Daemon:
    """Willi, with a master that is started again when it has died, as systemd would do."""

    def __init__(self, willi: Willi, show: Callable[[Path], None]) -> None:
        """show: is told of each new log, for whoever has to look at it when the test has failed."""
        self.willi = willi
        self._show = show
        self.logs = [willi.log_file]
        self.orphans: list[str] = []

    def start(self) -> None:
        """Into a log of its own: a long one costs much to look at."""
        self.willi.change_log(self.willi.directory / f"willi{len(self.logs) + 1}.log")
        self.logs.append(self.willi.log_file)
        self._show(self.willi.log_file)
        self.willi.start(TIME_TO_START)

    def kill_master(self, workers_too: bool) -> None:
        """Workers whose master is dead end by themselves, if systemd does not end them first."""
        workers = self.willi.workers
        self.willi.process.kill()
        self.willi.process.wait()
        for worker in workers if workers_too else ():
            send(worker, signal.SIGKILL)
        try:
            wait_until(lambda: not any(map(_is_alive, workers)), "the end of the workers of a dead master", TIME_TO_DIE)
        except AssertionError as error:
            self.orphans.append(str(error))

    def stop_master(self) -> None:
        self.willi.signal(signal.SIGTERM)
        assert self.willi.wait(TIME_TO_DIE) == 0


class Chaos:
    """Breaks one thing after the other, as long as it is told. Whatever it breaks, it mends."""

    def __init__(
        self, daemon: Daemon, sinks: list[Sink], postfix: Postfix, mariadb: Mariadb, tables: list[str], seed: int
    ) -> None:
        """tables: texts for the CSV file. All are right; faulty ones are made of them."""
        self.counts: Counter[str] = Counter()
        self._daemon = daemon
        self._sinks = sinks
        self._postfix = postfix
        self._mariadb = mariadb
        self._tables = tables
        self._draw = random.Random(seed)
        self._pause = threading.Event()  # never set

    @property
    def outside(self) -> list[Callable[[], None]]:
        """What breaks around Willi."""
        return [
            self.sink_killed, self.sink_killed, self.sink_stands_still, self.sink_is_slow, self.sink_is_cut_off,
            self.postfix_stands_still, self.postfix_loses_its_sessions,
            self.database_killed, self.database_stands_still, self.database_loses_connections,
            self.table_written, self.table_broken,
        ]  # fmt: skip

    @property
    def inside(self) -> list[Callable[[], None]]:
        """What breaks of Willi itself, or is done to it."""
        return [
            self.worker_killed, self.worker_killed, self.worker_killed, self.worker_stands_still, self.worker_is_slow,
            self.master_killed, self.master_stands_still, self.master_stopped,
            self.reloaded, self.reloaded, self.reload_refused,
        ]  # fmt: skip

    def run(self, until: Callable[[], bool], faults: list[Callable[[], None]]) -> None:
        while not until():
            self._pause.wait(self._draw.uniform(0.1, 0.8))
            fault = self._draw.choice(faults)
            self.counts[fault.__name__] += 1
            fault()

    def _wait(self) -> None:
        self._pause.wait(self._draw.uniform(*SHORT_STOP))

    def _still(self, *pids: int) -> None:
        for pid in pids:
            send(pid, signal.SIGSTOP)
        self._wait()
        for pid in pids:
            send(pid, signal.SIGCONT)

    def _slow(self, pid: int) -> None:
        for _ in range(25):
            send(pid, signal.SIGSTOP)
            self._pause.wait(PULSE[0])
            send(pid, signal.SIGCONT)
            self._pause.wait(PULSE[1])

    # Upstreams

    def sink_killed(self) -> None:
        sink = self._draw.choice(self._sinks)
        sink.kill()
        self._wait()
        sink.start()

    def sink_stands_still(self) -> None:
        self._still(self._draw.choice(self._sinks).process.pid)

    def sink_is_slow(self) -> None:
        self._slow(self._draw.choice(self._sinks).process.pid)

    def sink_is_cut_off(self) -> None:
        sink = self._draw.choice(self._sinks)
        sink.cut(True)
        self._wait()
        sink.cut(False)

    def _processes_of_postfix(self, name: str = "") -> list[int]:
        master = int((self._postfix.home / "queue/pid/master.pid").read_text())
        return [pid for pid in _children(master) if name in _name(pid)]

    def postfix_stands_still(self) -> None:
        self._still(*self._processes_of_postfix())

    def postfix_loses_its_sessions(self) -> None:
        for pid in self._processes_of_postfix("smtpd"):
            send(pid, signal.SIGKILL)

    # The database and the table

    def database_killed(self) -> None:
        self._mariadb.kill()
        self._wait()
        self._mariadb.start()

    def database_stands_still(self) -> None:
        with self._mariadb.hanging():
            self._wait()

    def database_loses_connections(self) -> None:
        with suppress(pymysql.MySQLError):  # it is only just coming up
            self._mariadb.kill_connections("routes1")

    def table_written(self) -> None:
        self._daemon.willi.replace_csv(self._draw.choice(self._tables))

    def table_broken(self) -> None:
        text = self._draw.choice(self._tables)
        self._daemon.willi.replace_csv(text[: self._draw.randrange(40, len(text))] + "\nno;semicolons;here;at;all\n")
        self._wait()
        self.table_written()

    # Willi

    def worker_killed(self) -> None:
        for worker in self._some_worker():
            send(worker, signal.SIGKILL)

    def worker_stands_still(self) -> None:
        self._still(*self._some_worker())

    def worker_is_slow(self) -> None:
        for worker in self._some_worker():
            self._slow(worker)

    def _some_worker(self) -> list[int]:
        workers = self._daemon.willi.workers
        return [self._draw.choice(workers)] if workers else []

    def master_killed(self) -> None:
        self._daemon.kill_master(workers_too=self._draw.random() < 0.5)
        self._daemon.start()

    def master_stands_still(self) -> None:
        self._still(self._daemon.willi.process.pid)

    def master_stopped(self) -> None:
        self._daemon.stop_master()
        self._daemon.start()

    def reloaded(self) -> None:
        self._daemon.willi.change({"max_recipients": self._draw.randint(50, 100)})
        self._daemon.willi.signal(signal.SIGHUP)

    def reload_refused(self) -> None:
        good = self._daemon.willi.config.read_text()
        self._daemon.willi.config.write_text(good + "\nnonsense = 1\n")
        self._daemon.willi.signal(signal.SIGHUP)
        self._wait()
        self._daemon.willi.change({})


def send(pid: int, number: signal.Signals) -> None:
    """A signal, if there is still somebody to get it."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _name(pid: int) -> str:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""
