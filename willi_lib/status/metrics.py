"""The totals in the form that Prometheus reads: each row of the table in counts.py."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from .. import VERSION
from . import counts
from .counts import COUNTER, FOR_PAGE, OTHER, TABLE, Metric
from .overview import down_since, sessions
from .totals import Totals

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

Samples = Iterable[tuple[tuple[str, ...], float | None]]  # values of the labels, number; None: there is none


def exposition(totals: Totals, now: float) -> bytes:
    """What /metrics answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(totals, now))
    return generate_latest(registry)


class Collector:
    """All metrics at one moment."""

    def __init__(self, totals: Totals, now: float) -> None:
        self._totals = totals
        self._now = now

    def collect(self) -> Iterator[Family]:
        """As prometheus-client asks for them."""
        for metric in TABLE.values():
            if metric.kind == counts.HISTOGRAM:
                yield self._histogram(metric)
            elif metric.kind != FOR_PAGE:
                yield self._numbers(metric)

    def _numbers(self, metric: Metric) -> Family:
        kind = CounterMetricFamily if metric.kind == COUNTER else GaugeMetricFamily
        family = kind(metric.full_name, metric.text, labels=metric.labels)
        if metric in READ:
            samples = READ[metric](self._totals, self._now)
        else:
            zeros = dict.fromkeys([(value,) for value in metric.values] if metric.labels else [()], 0.0)
            samples = {**zeros, **self._totals.numbers[metric]}.items()
        for labels, number in samples:
            if number is not None:
                family.add_metric(labels, float(number))
        return family

    def _histogram(self, metric: Metric) -> Family:
        """Each bucket with all that are shorter, as Prometheus has them."""
        family = HistogramMetricFamily(metric.full_name, metric.text, labels=metric.labels)
        bounds = [*(str(float(bound)) for bound in metric.bounds), "+Inf"]
        for labels, row in self._totals.durations[metric].items():
            family.add_metric(labels, list(zip(bounds, accumulate(row[:-1]), strict=True)), row[-1])
        return family


def _single(read: Callable[[Totals], float | None]) -> Callable[[Totals, float], Samples]:
    """Of a metric without labels."""
    return lambda totals, now: [((), read(totals))]


def _limit(name: str) -> Callable[[Totals, float], Samples]:
    return _single(lambda totals: totals.master.limits.get(name, 0))


def _mapping(field: str) -> Callable[[Totals, float], Samples]:
    return lambda totals, now: [((one.name,), getattr(one, field)) for one in totals.mappings()]


def _down_since(totals: Totals, now: float) -> Samples:
    return [((name,), down_since(totals, name, now)) for name in totals.busiest_hosts() if name != OTHER]


# What is not counted, but read: the samples of a metric.
READ: dict[Metric, Callable[[Totals, float], Samples]] = {
    counts.SESSIONS_OPEN: _single(sessions),
    counts.CONNECTIONS: _single(lambda totals: totals.master.connections),
    counts.LIMIT_CONNECTIONS: _limit("max_connections"),
    counts.LIMIT_PER_IP: _limit("max_connections_per_ip"),
    counts.LIMIT_RATE: _limit("max_connection_rate"),
    counts.UPSTREAM_UP: lambda totals, now: [(name, since is None) for name, since in _down_since(totals, now)],
    counts.DOWN_SINCE: _down_since,
    counts.PATTERNS: _mapping("patterns"),
    counts.LOADED_AT: _mapping("loaded_at"),
    counts.DATABASE_UP: _mapping("database_up"),
    counts.EXPIRES: lambda totals, now: [((one.file,), one.expires) for one in totals.certificates()],
    counts.WORKERS: lambda totals, now: [
        ((state,), totals.master.number(state)) for state in ("starting", "serving", "draining")
    ],
    counts.WORKERS_WANTED: _single(lambda totals: totals.master.wanted),
    counts.RELOADS: lambda totals, now: [
        (("ok",), totals.master.reloads), (("failed",), totals.master.reloads_failed)
    ],
    counts.LAST_RELOAD: _single(lambda totals: totals.master.last_reload),
    counts.STARTED: _single(lambda totals: totals.master.started),
    counts.BUILD: lambda totals, now: [((VERSION, platform.python_version()), 1)],
}  # fmt: skip
