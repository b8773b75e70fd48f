"""All that was reported, added up: what the status process knows. Pure, but for the time that it is told."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import counts
from .counts import Event, HostState, Metric
from .reports import CertificateState, MappingState, MasterReport, WorkerReport

FRESH = 5.0  # seconds after which a report is stale
FORGET = 60.0  # seconds after which a worker that has ended is forgotten: none of its reports is still on the way
MINUTE = 60.0  # seconds
MINUTES = 60

Labels = tuple[str, ...]  # the values


class LastHour:
    """What is added up minute by minute, numbers by their names."""

    def __init__(self) -> None:
        self._minutes: dict[float, defaultdict[str, float]] = {}  # by their beginning

    def add(self, now: float, **numbers: float) -> None:
        minute = self._minutes.setdefault(now // MINUTE * MINUTE, defaultdict(float))
        for name, number in numbers.items():
            minute[name] += number
        if len(self._minutes) > MINUTES:  # also those to come, of a clock that was fast
            shown = {began for began, _ in self.minutes(now)}
            self._minutes = {began: counted for began, counted in self._minutes.items() if began in shown}

    def minutes(self, now: float) -> Iterator[tuple[float, Mapping[str, float]]]:
        """The last 60 with their beginning, the oldest first, those in which nothing was counted too."""
        for ago in reversed(range(MINUTES)):
            began = now // MINUTE * MINUTE - MINUTE * ago
            yield began, self._minutes.get(began, {})

    def mean(self, now: float) -> float | None:
        """Of the durations: `seconds` by `number`; None: there were none."""
        minutes = [minute for _, minute in self.minutes(now) if minute]
        number = sum(minute["number"] for minute in minutes)
        return sum(minute["seconds"] for minute in minutes) / number if number else None


@dataclass
class Worker:
    report: WorkerReport
    first_turn: int  # of its reports
    at: float = 0.0  # when it said so
    values: dict[tuple[str, ...], Any] = field(default_factory=dict)  # the value of each row


class Totals:
    def __init__(self, since: float = 0.0) -> None:
        """since: monotonic. What older workers have counted before their first report is not counted here."""
        self.numbers: defaultdict[Metric, dict[Labels, float]] = defaultdict(dict)
        self.durations: defaultdict[Metric, dict[Labels, list[float]]] = defaultdict(dict)
        self.hour = LastHour()  # sessions, refused, and the verdicts
        self.hosts: dict[str, HostState] = {}
        self.events: deque[Event] = deque(maxlen=counts.MAX_EVENTS)  # the newest last
        self.master = MasterReport()
        self.master_at = 0.0
        self.workers: dict[tuple[int, float], Worker] = {}  # in the order in which they last reported
        self._means: defaultdict[tuple[Metric, Labels], LastHour] = defaultdict(LastHour)
        self._since = since
        self._peaks: deque[tuple[float, dict[str, int]]] = deque(maxlen=10_000)  # and when they were reported

    # -- reading

    def number(self, metric: Metric, *labels: str) -> int:
        """The sum of a counter over all labels that follow these."""
        series = self.numbers[metric]
        if len(labels) == len(metric.labels):
            return int(series.get(labels, 0))
        return int(sum(number for key, number in series.items() if key[: len(labels)] == labels))

    def mean(self, metric: Metric, label: str, now: float) -> float | None:
        """Of the durations of the last hour; None: there were none."""
        mean = self._means.get((metric, (label,)))
        return mean.mean(now) if mean else None

    def peak(self, limit: str, now: float) -> int:
        """The most that one client had of it in the last minute."""
        return max((peaks.get(limit, 0) for at, peaks in self._peaks if now - MINUTE < at <= now), default=0)

    def busiest_hosts(self) -> list[str]:
        """The upstream hosts, the busiest first; last of all OTHER, if there are any others."""
        return sorted(self.hosts, key=lambda name: (name == counts.OTHER, -self.number(counts.CONNECTS, name), name))

    def present(self, wanted: str = "") -> list[Worker]:
        """The workers that have reported and are in this state, or in any, by the word of the master."""
        known = {pid for pid, state in self.master.workers.items() if wanted in ("", state)}
        return [worker for worker in self.workers.values() if str(worker.report.pid) in known]

    def fresh_workers(self, now: float) -> list[Worker]:
        """Those that serve and have reported lately."""
        return [worker for worker in self.present("serving") if worker.at > now - FRESH]

    def mappings(self) -> list[MappingState]:
        """As the workers that serve have told them; of a database what was seen last."""
        merged: dict[str, MappingState] = {}
        for report in self._serving_reports():
            for mapping in report.mappings:
                known = merged.setdefault(mapping.name, mapping)
                if mapping.seen > known.seen or (mapping.loaded_at or 0.0) > (known.loaded_at or 0.0):
                    merged[mapping.name] = mapping
        return list(merged.values())

    def certificates(self) -> tuple[CertificateState, ...]:
        """As the workers have read them."""
        return next((tuple(report.certificates) for report in self._serving_reports() if report.certificates), ())

    def _serving_reports(self) -> list[WorkerReport]:
        """Of the workers that serve; if none serves, of the last one that did."""
        return [worker.report for worker in self.present("serving") or list(self.workers.values())[-1:]]

    # -- adding up

    def add_report(self, report: dict[str, Any], now: float) -> None:
        """Add a report. What is of another version's making may raise anything."""
        if "worker" in report:
            self._add_worker(WorkerReport.parse(**report["worker"]), now)
        if "master" in report:
            self.master, self.master_at = MasterReport(**report["master"]), now
            self.workers = {
                name: worker for name, worker in self.workers.items()
                if str(worker.report.pid) in self.master.workers or worker.at > now - FORGET
            }  # fmt: skip
            for state in self.hosts.values():
                state.cut_at(now)

    def _add_worker(self, report: WorkerReport, now: float) -> None:
        identity = report.pid, report.began
        worker = self.workers.pop(identity, None) or Worker(report, first_turn=report.turn)
        worker.report, worker.at = report, now
        self.workers[identity] = worker
        self._peaks.append((now, report.peaks))
        is_past = report.began < self._since and report.turn == worker.first_turn
        for name, labels, value in report.rows:
            key = (name, *labels)
            before = worker.values.get(key)
            if name == counts.EVENT:
                self.events.append(Event(**value))
            elif value != before:
                worker.values[key] = value
                if name == counts.HOST:
                    self._note_host(labels[0], HostState(**value), now)
                else:
                    self._add(name, tuple(labels), value, value if is_past else before, now)

    def _note_host(self, name: str, state: HostState, now: float) -> None:
        if self._host(name) != counts.OTHER:
            state.cut_at(now)
            self.hosts[name].merge(state)

    def _host(self, name: str) -> str:
        """The name under which a host is counted: it never changes, so that no number goes back."""
        if name not in self.hosts and len(self.hosts) >= counts.MAX_HOSTS:
            name = counts.OTHER
        self.hosts.setdefault(name, HostState())
        return name

    def _add(self, name: str, labels: Labels, value: Any, before: Any, now: float) -> None:
        """before: what is counted of it already; None: nothing."""
        metric = counts.TABLE.get(name)
        if metric is None or len(labels) != len(metric.labels):
            return  # of another version's making
        if metric.labels[:1] == ("host",):
            labels = (self._host(labels[0]), *labels[1:])
        if not isinstance(value, list):
            self._add_number(metric, labels, value - (before or 0), now)
        elif len(value) == len(metric.bounds) + 2:
            more = [after - known for after, known in zip(value, before or [0] * len(value), strict=True)]
            self._add_durations(metric, labels, more, now)

    def _add_number(self, metric: Metric, labels: Labels, number: float, now: float) -> None:
        self.numbers[metric][labels] = self.numbers[metric].get(labels, 0) + number
        if metric is counts.SESSIONS:
            self.hour.add(now, sessions=number)
        elif metric is counts.REFUSED:
            self.hour.add(now, refused=number)
        elif metric is counts.VERDICTS:
            self.hour.add(now, **{labels[0]: number})

    def _add_durations(self, metric: Metric, labels: Labels, row: list[float], now: float) -> None:
        before = self.durations[metric].get(labels, [0] * len(row))
        self.durations[metric][labels] = [a + b for a, b in zip(before, row, strict=True)]
        self._means[metric, labels].add(now, number=sum(row[:-1]), seconds=row[-1])
