"""All that was reported, added up: what the status process knows. Pure, but for the time that it is told."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import counts
from .counts import HostState, Metric
from .last_hour import MINUTE, LastHour
from .overview import CertificateState, Event, Minute
from .reports import MasterReport, TableReport, WorkerReport, worker_report

FRESH = 5.0  # seconds after which a report is stale
FORGET = 60.0  # seconds after which a worker that has ended is forgotten: none of its reports is still on the way

Labels = tuple[str, ...]  # the values


@dataclass
class Worker:
    """What one worker has said."""

    report: WorkerReport
    first_turn: int  # of its reports
    at: float = 0.0  # when it said so
    said: dict[tuple[str, ...], Any] = field(default_factory=dict)  # the value of each row


class Totals:
    """What all reports together say."""

    def __init__(self, since: float = 0.0) -> None:
        """since: monotonic. What older workers have counted before their first report is not counted here."""
        self.numbers: defaultdict[Metric, dict[Labels, float]] = defaultdict(dict)
        self.durations: defaultdict[Metric, dict[Labels, list[float]]] = defaultdict(dict)
        self.means: defaultdict[tuple[Metric, Labels], LastHour] = defaultdict(LastHour)
        self.hosts: dict[str, HostState] = {}
        self.events: deque[Event] = deque(maxlen=counts.MAX_EVENTS)  # the newest last
        self.master = MasterReport()
        self.master_at = 0.0
        self.workers: dict[tuple[int, float], Worker] = {}  # in the order in which they last reported
        self._since = since
        self._hour = LastHour()  # what the charts show
        self._peaks: deque[tuple[float, dict[str, int]]] = deque(maxlen=10_000)  # and when they were reported

    # -- reading

    def minutes(self, now: float) -> tuple[Minute, ...]:
        """The last 60, those in which nothing happened too; the oldest first."""
        return tuple(
            Minute(began, **{name: int(number) for name, number in counted.items()})
            for began, counted in self._hour.minutes(now)
        )

    def number(self, metric: Metric, *labels: str) -> int:
        """The sum of a counter over all labels that follow these."""
        series = self.numbers[metric]
        if len(labels) == len(metric.labels):
            return int(series.get(labels, 0))
        return int(sum(number for key, number in series.items() if key[: len(labels)] == labels))

    def mean(self, metric: Metric, label: str, now: float) -> float | None:
        """Of the durations of the last hour; None: there were none."""
        mean = self.means.get((metric, (label,)))
        return mean.mean(now) if mean else None

    def peak(self, limit: str, now: float) -> int:
        """The most that one client had of it in the last minute."""
        return max((peaks.get(limit, 0) for at, peaks in self._peaks if now - MINUTE < at <= now), default=0)

    def busiest_hosts(self) -> list[str]:
        """The upstream hosts, the busiest first; last of all OTHER, if there are any others."""
        return sorted(self.hosts, key=lambda name: (name == counts.OTHER, -self.number(counts.CONNECTS, name), name))

    def present(self, *states: str) -> list[Worker]:
        """The workers that have reported and are in one of these states, by the word of the master; or in any."""
        known = {pid for pid, state in self.master.workers.items() if not states or state in states}
        return [worker for worker in self.workers.values() if str(worker.report.pid) in known]

    def fresh_workers(self, now: float) -> list[Worker]:
        """Those that serve and have reported lately."""
        return [worker for worker in self.present("serving") if worker.at > now - FRESH]

    def tables(self) -> list[TableReport]:
        """The mappings, as the workers that serve have told them; of a database what was seen last."""
        merged: dict[str, TableReport] = {}
        for report in self._told(lambda report: report.tables):
            for table in report.tables:
                known = merged.setdefault(table.name, table)
                if table.seen > known.seen or (table.loaded_at or 0.0) > (known.loaded_at or 0.0):
                    merged[table.name] = table
        return list(merged.values())

    def certificates(self) -> tuple[CertificateState, ...]:
        """As the workers have read them."""
        told = self._told(lambda report: report.certificates)
        return tuple(told[0].certificates) if told else ()

    def _told(self, what: Callable[[WorkerReport], object]) -> list[WorkerReport]:
        """Of those that serve and have said something of this; if none serves, of the last one that did."""
        workers = self.present("serving") or list(self.workers.values())[-1:]
        return [worker.report for worker in workers if what(worker.report)]

    # -- adding up

    def take_in(self, report: dict[str, Any], now: float) -> None:
        """Add a report. What is of another version's making may raise anything."""
        if "worker" in report:
            self._hear_worker(worker_report(**report["worker"]), now)
        if "master" in report:
            self.master, self.master_at = MasterReport(**report["master"]), now
            self.workers = {
                name: worker for name, worker in self.workers.items()
                if str(worker.report.pid) in self.master.workers or worker.at > now - FORGET
            }  # fmt: skip
            for state in self.hosts.values():
                state.not_after(now)

    def _hear_worker(self, report: WorkerReport, now: float) -> None:
        name = report.pid, report.began
        worker = self.workers.pop(name, None) or Worker(report, first_turn=report.turn)
        worker.report, worker.at = report, now
        self.workers[name] = worker
        self._peaks.append((now, report.peaks))
        is_past = report.began < self._since and report.turn == worker.first_turn
        for kind, key, value in report.rows:
            row = (kind, *key)
            before, worker.said[row] = worker.said.get(row), value
            if value != before:
                self._add(kind, key, value, value if is_past else before, now)

    def _add(self, kind: str, key: list[str], value: Any, before: Any, now: float) -> None:
        """before: what is known of it already; None: nothing."""
        if kind == counts.EVENT:
            self.events.append(Event(**value))
            return
        name, *labels = key
        if kind == counts.HOST:
            self._note(name, HostState(**value), now)
            return
        metric = counts.TABLE.get(name)
        if metric is None or len(labels) != len(metric.labels):
            return  # of another version's making
        if metric.labels[:1] == ("host",):
            labels[0] = self._host(labels[0])
        if kind == counts.NUMBER:
            self._add_number(metric, tuple(labels), value - (before or 0), now)
        elif len(value) == len(metric.bounds) + 2:
            more = [after - known for after, known in zip(value, before or [0] * len(value), strict=True)]
            self._add_duration(metric, tuple(labels), more, now)

    def _host(self, name: str) -> str:
        """The name under which a host is counted: it never changes, so that no number goes back."""
        if name not in self.hosts and len(self.hosts) >= counts.MAX_HOSTS:
            name = counts.OTHER
        self.hosts.setdefault(name, HostState())
        return name

    def _note(self, name: str, state: HostState, now: float) -> None:
        if self._host(name) != counts.OTHER:
            state.not_after(now)
            self.hosts[name].merge(state)

    def _add_number(self, metric: Metric, labels: Labels, number: float, now: float) -> None:
        self.numbers[metric][labels] = self.numbers[metric].get(labels, 0) + number
        if metric is counts.GREETING_SECONDS:
            self.means[metric, labels].add(now, seconds=number)
        elif metric is counts.CONNECTS and labels[1] == counts.OPENED:
            self.means[counts.GREETING_SECONDS, labels[:1]].add(now, number=number)
        elif metric in (counts.SESSIONS, counts.REFUSED):
            self._hour.add(now, **{"sessions" if metric is counts.SESSIONS else "refused": number})
        elif metric is counts.VERDICTS:
            self._hour.add(now, **{labels[0]: number})

    def _add_duration(self, metric: Metric, labels: Labels, row: list[float], now: float) -> None:
        before = self.durations[metric].get(labels, [0] * len(row))
        self.durations[metric][labels] = [a + b for a, b in zip(before, row, strict=True)]
        self.means[metric, labels].add(now, number=sum(row[:-1]), seconds=row[-1])
