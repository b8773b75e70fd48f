"""The totals in the form that Prometheus reads."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from willi_lib import VERSION
from willi_lib.status import counts
from willi_lib.status.counts import OTHER

from . import view
from .hosts import HostTotals
from .totals import Totals

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "willi_"

COUNTERS = {  # the text, and the labels
    counts.SESSIONS: ("SMTP sessions that began.", ()),
    counts.REFUSED: ("Connections and sessions that Willi turned away.", ("reason",)),
    counts.MESSAGES: ("Messages by what became of them, as in the log.", ("verdict", "mapping")),
    counts.RECIPIENTS: ("Recipients by what became of them, as in the log.", ("verdict", "mapping")),
    counts.OCTETS: ("Octets of messages, accepted or not.", ("mapping",)),
    counts.TLS: ("Sessions and upstream connections by TLS version; none is clear text.", ("side", "version")),
    counts.XCLIENT: ("Upstream connections by what became of XCLIENT.", ("outcome",)),
    counts.LOOKUPS: ("Look-ups of recipients.", ("mapping", "outcome")),
    counts.CACHE_HITS: ("Keys that were answered from the memory of a database mapping.", ("mapping",)),
}
HOST_COUNTERS = {
    counts.CONNECTS: ("Connections to upstream hosts.", ("host", "outcome")),
    counts.LOST: ("Upstream connections that failed inside a transaction.", ("host",)),
    counts.HOST_MESSAGES: ("Messages and refused recipients by what became of them.", ("host", "verdict")),
    counts.HOST_OCTETS: ("Octets of messages.", ("host",)),
}
HISTOGRAMS = {
    counts.SESSION_SECONDS: ("Duration of SMTP sessions.", ()),
    counts.CONNECT_SECONDS: ("From connecting to an upstream to its greeting.", ()),
    counts.VERDICT_SECONDS: ("From the end of a message to the upstream's verdict.", ()),
    counts.LOOKUP_SECONDS: ("Look-ups of a recipient in one mapping.", ("mapping",)),
}
# What is there before anything has happened: a rate sees the first time, too.
ALWAYS: dict[str, list[tuple[str, ...]]] = {
    counts.SESSIONS: [()],
    counts.REFUSED: [
        (reason,) for reason in (*view.LIMITS, "max_errors", "draining", "proxy_header")
    ],
    counts.XCLIENT: [(outcome,) for outcome in ("accepted", "refused", "client_refused", "not_offered", "off")],
}


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

    def collect(self) -> Iterator[Metric]:
        """As prometheus-client asks for them."""
        yield from self._counters()
        yield from self._histograms()
        yield from self._hosts()
        yield from self._tables()
        yield from self._processes()
        yield from self._limits()

    def _counters(self) -> Iterator[Metric]:
        for name, (text, labels) in COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=labels)
            found = dict.fromkeys(ALWAYS.get(name, []), 0.0)
            found |= {key[1:]: value for key, value in self._totals.numbers.items() if key[0] == name}
            for values, value in found.items():
                if len(values) == len(labels):
                    family.add_metric(values, value)
            yield family

    def _histograms(self) -> Iterator[Metric]:
        for name, (text, labels) in HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
            for key, row in self._totals.durations.items():
                if key[0] == name and len(key) == 1 + len(labels):
                    family.add_metric(key[1:], list(_buckets(name, row)), row[-1])
            yield family

    def _hosts(self) -> Iterator[Metric]:
        hosts = self._totals.hosts
        everybody: list[tuple[str, HostTotals]] = [*hosts.busiest(), (OTHER, hosts.others)]
        for name, (text, labels) in HOST_COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=labels)
            for host, totals in everybody:
                for key, value in totals.numbers.items():
                    if key[0] == name and len(key) == len(labels):
                        family.add_metric((host, *key[1:]), value)
            yield family
        down = {name: view.down_since(host, self._now) for name, host in hosts.busiest()}
        yield _gauge(
            "upstream_up", "1: the last try to reach this host succeeded.",
            ("host",), (((host,), float(since is None)) for host, since in down.items()),
        )  # fmt: skip
        yield _gauge(
            "upstream_down_since_seconds", "Unix time since which this host is down; none if it is up.",
            ("host",), (((host,), since) for host, since in down.items() if since is not None),
        )  # fmt: skip

    def _tables(self) -> Iterator[Metric]:
        tables = self._totals.tables()
        for name, field, text in (
            ("mapping_patterns", "patterns", "Patterns of a CSV mapping."),
            ("mapping_loaded_timestamp_seconds", "loaded_at", "When a CSV mapping was read."),
            ("database_up", "database_up", "1: the database of a mapping answers."),
        ):
            samples = [((facts["name"],), float(facts[field])) for facts in tables if facts.get(field) is not None]
            yield _gauge(name, text, ("mapping",), samples)
        yield _gauge(
            "certificate_expiry_timestamp_seconds", "When a certificate of tls_cert ends.",
            ("file",), (((one.file,), one.expires) for one in self._totals.certificates()),
        )  # fmt: skip

    def _processes(self) -> Iterator[Metric]:
        master = self._totals.master
        states = [((state,), float(master.number(state))) for state in ("starting", "serving", "draining")]
        yield _gauge("sessions_open", "SMTP sessions that are open.", (), [((), float(view.sessions(self._totals)))])
        yield _gauge("workers", "Workers by state.", ("state",), states)
        yield _gauge("workers_wanted", "Workers that should serve.", (), [((), float(master.wanted))])
        reloads = CounterMetricFamily(PREFIX + "reloads", "Reloads of the configuration.", labels=("outcome",))
        reloads.add_metric(("ok",), master.reloads)
        reloads.add_metric(("failed",), master.reloads_failed)
        yield reloads
        last = [] if master.last_reload is None else [((), master.last_reload)]
        yield _gauge("last_reload_timestamp_seconds", "When the configuration was last read again.", (), last)
        yield _gauge("start_time_seconds", "When the master was started.", (), [((), master.started)])
        build = ("version", "python")
        yield _gauge("build_info", "What runs.", build, [((VERSION, platform.python_version()), 1.0)])

    def _limits(self) -> Iterator[Metric]:
        yield _gauge("connections", "Connections that are open.", (), [((), float(self._totals.master.connections))])
        for name in view.LIMITS:
            most = self._totals.master.limits.get(name, 0)
            short = name.removeprefix("max_")
            yield _gauge(f"limit_{short}", f"The setting {name}; 0 is no limit.", (), [((), float(most))])


def _gauge(
    name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _buckets(name: str, row: list[float]) -> Iterator[tuple[str, float]]:
    """Each with all that are shorter, as Prometheus has them."""
    total = 0.0
    for bound, number in zip((*map(str, map(float, counts.BOUNDS[name])), "+Inf"), row[:-1], strict=True):
        total += number
        yield bound, total
