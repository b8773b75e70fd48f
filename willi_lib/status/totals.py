"""All that was reported, added up: what the status process knows. Pure, but for the time that it is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from willi_lib.status import counts
from willi_lib.status.counts import Key, Row
from willi_lib.status.reports import Report

from .hosts import Hosts
from .means import MINUTE, MINUTES, HourMean
from .overview import CertificateState, Event, Minute

FRESH = 5.0  # seconds after which a report is stale
MINUTE_ROW = "m"  # the kind of a row of a hand-over


@dataclass
class Master:
    """What the master says of itself and its workers."""

    at: float = 0.0  # when it said so
    pid: int = 0
    started: float = 0.0
    domain: str = ""
    listen: Sequence[str] = ()
    wanted: int = 0  # workers
    workers: dict[str, str] = field(default_factory=dict)  # the name of the state by pid
    reloads: int = 0
    reloads_failed: int = 0
    last_reload: float | None = None
    last_reload_error: str = ""
    stopping: bool = False
    connections: int = 0
    limits: dict[str, int] = field(default_factory=dict)

    def number(self, *states: str) -> int:
        """How many workers are in one of these states."""
        return sum(state in states for state in self.workers.values())


@dataclass
class Worker:
    """What a worker has said last."""

    at: float
    pid: int
    sessions: int = 0
    tables: list[dict[str, Any]] = field(default_factory=list)
    certificates: list[list[Any]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)


class Totals:
    """What all reports together say."""

    def __init__(self, now: float) -> None:
        self.began = now
        self.numbers: dict[Key, float] = {}
        self.durations: dict[Key, list[float]] = {}
        self.means: dict[Key, HourMean] = {}
        self.hosts = Hosts()
        self.events: deque[Event] = deque(maxlen=counts.MAX_EVENTS)  # the newest last
        self.master = Master()
        self.workers: dict[int, Worker] = {}
        self._minutes: dict[float, Minute] = {}  # by their beginning
        self._peaks: deque[tuple[float, dict[str, int]]] = deque(maxlen=10_000)  # and when they were reported

    # -- reading

    def minutes(self, now: float) -> tuple[Minute, ...]:
        """The last 60, those in which nothing happened too; the oldest first."""
        this = now // MINUTE * MINUTE
        starts = [this - MINUTE * ago for ago in reversed(range(MINUTES))]
        return tuple(self._minutes.get(start) or Minute(start) for start in starts)

    def number(self, name: str, *labels: str) -> float:
        """The sum of a counter over all labels that follow these."""
        prefix = (name, *labels)
        return sum(number for key, number in self.numbers.items() if key[: len(prefix)] == prefix)

    def peak(self, limit: str, now: float) -> int:
        """The most that one client had of it in the last minute."""
        return max((peaks.get(limit, 0) for at, peaks in self._peaks if now - MINUTE < at <= now), default=0)

    def fresh_workers(self, now: float) -> list[Worker]:
        """Those that serve, by the word of the master, and have reported lately."""
        serving = {int(pid) for pid, state in self.master.workers.items() if state == "serving"}
        return [worker for pid, worker in self.workers.items() if pid in serving and worker.at > now - FRESH]

    def tables(self) -> list[dict[str, Any]]:
        """The mappings, as the workers that serve have told them; of a database what was seen last."""
        merged: dict[str, dict[str, Any]] = {}
        for worker in self._told(lambda worker: worker.tables):
            for table in worker.tables:
                known = merged.setdefault(table["name"], table)
                newer = table.get("seen", 0.0) > known.get("seen", 0.0)
                if newer or (table.get("loaded_at") or 0.0) > (known.get("loaded_at") or 0.0):
                    merged[table["name"]] = table
        return list(merged.values())

    def certificates(self) -> tuple[CertificateState, ...]:
        """As the workers have read them."""
        for worker in self._told(lambda worker: worker.certificates):
            return tuple(CertificateState(file, tuple(names), *rest) for file, names, *rest in worker.certificates)
        return ()

    def _told(self, what: Callable[[Worker], object]) -> list[Worker]:
        """Who serves and has said something of this; if nobody serves, who did so last."""
        serving = [worker for pid, worker in self.workers.items() if self.master.workers.get(str(pid)) == "serving"]
        return [worker for worker in serving or list(self.workers.values())[-1:] if what(worker)]

    # -- adding up

    def take_in(self, report: Report, now: float) -> None:
        """Add a report. What is of another version's making may raise anything."""
        self.add_rows(report.get("rows", ()), now)
        self.add_rows(report.get("handover", ()), now, past=True)
        if "worker" in report:
            self._hear_worker(Worker(**{"at": now, **report["worker"]}), is_old="at" in report["worker"])
        if "master" in report and not ("at" in report["master"] and self.master.at):
            self.master = Master(**{"at": now, **report["master"]})
            self.workers = {pid: worker for pid, worker in self.workers.items() if str(pid) in self.master.workers}

    def _hear_worker(self, worker: Worker, is_old: bool) -> None:
        """is_old: another status process has heard that."""
        known = self.workers.pop(worker.pid, None)
        self.workers[worker.pid] = known if known and is_old else worker
        self._peaks.append((worker.at, worker.peaks))

    def add_rows(self, rows: Iterable[Row], now: float, past: bool = False) -> None:
        """past: they are all that another status process knew, not what has just happened."""
        for kind, *row in rows:
            if kind == counts.NUMBER:
                self._add_number(row[0], tuple(row[1:]), now, past)
            elif kind == counts.DURATION:
                self._add_duration(row[0], tuple(row[1:]), now, past)
            elif kind == counts.HOST:
                self.hosts.note(row[0], counts.HostState(*row[1:]), now)
            elif kind == counts.EVENT:
                self.events.append(Event(*row))
            elif kind == MINUTE_ROW:
                self._add_minute(Minute(*row), now)

    def _add_number(self, number: float, key: Key, now: float, past: bool) -> None:
        if key[0] in counts.OF_HOSTS:
            self.hosts.add(key, number, now, past)
            return
        self.numbers[key] = self.numbers.get(key, 0) + number
        changed = key[1] if key[0] == counts.VERDICTS else _MINUTE_FIELDS.get(key[0])
        if changed in _MINUTE_NUMBERS and not past:
            self._add_minute(replace(Minute(now // MINUTE * MINUTE), **{changed: int(number)}), now)

    def _add_minute(self, minute: Minute, now: float) -> None:
        known = self._minutes.get(minute.began)
        if known:
            sums = {name: getattr(known, name) + getattr(minute, name) for name in _MINUTE_NUMBERS}
            minute = replace(known, **sums)
        self._minutes[minute.began] = minute
        if len(self._minutes) > MINUTES:  # also those to come, of a clock that was fast
            began = {shown.began for shown in self.minutes(now)}
            self._minutes = {start: one for start, one in self._minutes.items() if start in began}

    def _add_duration(self, row: list[float], key: Key, now: float, past: bool) -> None:
        if len(row) != len(counts.BOUNDS.get(key[0], ())) + 2:
            return  # of another version's making
        counts.add_duration(self.durations, key, row)
        if not past:
            self.means.setdefault(key, HourMean()).add(sum(row[:-1]), row[-1], now)

    # -- handing over

    def last_words(self) -> list[Report]:
        """How things were, and when, for whoever has not heard anything newer."""
        return [{"master": asdict(self.master)}, *({"worker": asdict(worker)} for worker in self.workers.values())]

    def rows(self) -> list[Row]:
        """All of it, for the status process that comes after this one."""
        return [
            *counts.number_rows(self.numbers),
            *counts.duration_rows(self.durations),
            *self.hosts.rows(),
            *([MINUTE_ROW, *asdict(minute).values()] for minute in self._minutes.values()),
            *([counts.EVENT, *asdict(event).values()] for event in self.events),
        ]


_MINUTE_NUMBERS = [one.name for one in fields(Minute) if one.name != "began"]
_MINUTE_FIELDS = {counts.SESSIONS: "sessions", counts.REFUSED: "refused"}
