"""The totals in the form that Prometheus reads: each row of the table in counts.py."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from .. import VERSION
from . import counts
from .counts import TABLE, Metric
from .overview import down_since, sessions
from .totals import Labels, Totals

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def exposition(totals: Totals, now: float) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(totals, now))
    return generate_latest(registry)


class Collector:
    def __init__(self, totals: Totals, now: float) -> None:
        self._totals = totals
        self._read: defaultdict[Metric, dict[Labels, float]] = defaultdict(dict)
        for metric, labels, number in read(totals, now):
            if number is not None:
                self._read[metric][labels] = float(number)

    def collect(self) -> Iterator[Family]:
        """As prometheus-client asks for them."""
        for metric in TABLE.values():
            if metric.kind == counts.HISTOGRAM:
                yield self._histogram(metric)
            elif metric.kind != counts.FOR_PAGE:
                yield self._numbers(metric)

    def _numbers(self, metric: Metric) -> Family:
        kind = GaugeMetricFamily if metric.kind == counts.GAUGE else CounterMetricFamily
        family = kind(metric.full_name, metric.text, labels=metric.labels)
        zeros = {}
        if metric.kind == counts.COUNTER:
            zeros = dict.fromkeys([(value,) for value in metric.values] if metric.labels else [()], 0.0)
        for labels, number in {**zeros, **self._totals.numbers[metric], **self._read[metric]}.items():
            family.add_metric(labels, number)
        return family

    def _histogram(self, metric: Metric) -> Family:
        """Each bucket with all that are shorter, as Prometheus has them."""
        family = HistogramMetricFamily(metric.full_name, metric.text, labels=metric.labels)
        bounds = [*(str(float(bound)) for bound in metric.bounds), "+Inf"]
        for labels, row in self._totals.durations[metric].items():
            family.add_metric(labels, list(zip(bounds, accumulate(row[:-1]), strict=True)), row[-1])
        return family


def read(totals: Totals, now: float) -> Iterator[tuple[Metric, Labels, float | None]]:
    """What is not counted, but read; None: there is no such number."""
    master = totals.master
    yield counts.SESSIONS_OPEN, (), sessions(totals)
    yield counts.CONNECTIONS, (), master.connections
    yield counts.LIMIT_CONNECTIONS, (), master.limits.get("max_connections", 0)
    yield counts.LIMIT_PER_IP, (), master.limits.get("max_connections_per_ip", 0)
    yield counts.LIMIT_RATE, (), master.limits.get("max_connection_rate", 0)
    for name in totals.busiest_hosts():
        if name != counts.OTHER:
            since = down_since(totals, name, now)
            yield counts.UPSTREAM_UP, (name,), since is None
            yield counts.DOWN_SINCE, (name,), since
    for mapping in totals.mappings():
        yield counts.PATTERNS, (mapping.name,), mapping.patterns
        yield counts.LOADED_AT, (mapping.name,), mapping.loaded_at
        yield counts.DATABASE_UP, (mapping.name,), mapping.database_up
    for certificate in totals.certificates():
        yield counts.EXPIRES, (certificate.file,), certificate.expires
    for state in ("starting", "serving", "draining"):
        yield counts.WORKERS, (state,), master.number(state)
    yield counts.WORKERS_WANTED, (), master.wanted
    yield counts.RELOADS, ("ok",), master.reloads
    yield counts.RELOADS, ("failed",), master.reloads_failed
    yield counts.LAST_RELOAD, (), master.last_reload
    yield counts.STARTED, (), master.started
    yield counts.BUILD, (VERSION, platform.python_version()), 1
