"""Promises 1, 2, 3, 6 and 8 while everything breaks: CHAOS_SECONDS (300) of it, with CHAOS_SEED; see `make chaos`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.clients import Book, Entry, Fate, Sender, Traffic
from tests.chaos.faults import DRAIN_TIMEOUT, Chaos, Daemon, Sink
from tests.conftest import LOGS
from tests.runner.limits import allow
from tests.support.certificates import Authority, Pair
from tests.support.daemon import Setting, Willi, in_a_hurry, parse_logfmt
from tests.support.loopback import HOST, need, wait_until
from tests.support.mariadb import Mariadb
from tests.support.network import Host
from tests.support.postfix import Postfix

SECONDS = float(os.environ.get("CHAOS_SECONDS", "300"))
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 30))
CALM = 0.2  # of the time, at the end: Willi's own processes live, so that one sees what the rest leaves in them
SENDERS = 8
WORKERS = 3
MORE_MEMORY = 30 << 20  # octets that a worker may grow; a leak of a KiB for each session of an hour's chaos is more
MORE_DESCRIPTORS = 12  # than a new worker has: a few to the database and to name servers
MOST_TOLD = 100  # faults that are printed
TIME_TO_DELIVER = 60.0  # seconds for Postfix to have all in its mailbox
DOMAINS = (
    "one.example", "two.example", "many.example", "moved.example", "mail.example", "db.example", "dbmail.example",
)  # fmt: skip
ALL_EXTENSIONS = ("PIPELINING", "8BITMIME", "SIZE 100000000", "CHUNKING", "SMTPUTF8")
TIMES: dict[str, Setting] = {
    "drain_timeout": f"{DRAIN_TIMEOUT:g}s", "read_timeout": "20s", "write_timeout": "10s", "connect_timeout": "2s",
    "upstream_timeout": "6s", "data_timeout": "10s", "dns_timeout": "1s",
}  # fmt: skip

Stores = Mapping[str, Counter[tuple[str, str]]]


class Site:
    """A network of its own with nothing but lo, and in it all the servers. Every thread that is made here is in it."""

    def __init__(self, directory: Path, certificates: Authority, ends: ExitStack, show: Callable[[Path], None]) -> None:
        """show: see Daemon."""
        resolver = directory / "resolv.conf"
        resolver.write_text("")
        host = Host(resolver)
        ends.callback(host.stop)
        ends.enter_context(host.inside())
        pair = certificates.issue("willi.example", HOST)
        self.sinks = [Sink(directory, "127.0.1.1", ALL_EXTENSIONS, SEED), Sink(directory, "127.0.1.2", (), SEED + 1)]
        for sink in self.sinks:
            ends.callback(sink.kill)
        # To it Willi is one client with very many connections.
        limits = {"smtpd_client_connection_count_limit": "0", "in_flow_delay": "0"}
        self.postfix = Postfix("mx.example", ("mail.example", "dbmail.example"), settings=limits)
        ends.callback(self.postfix.stop)
        self.mariadb = Mariadb(pair)
        ends.callback(self.mariadb.remove)
        self.tables = [self._table(sink.server) for sink in self.sinks]
        self.willi = self._start_willi(directory / "willi", pair)
        self.daemon = Daemon(self.willi, show)
        ends.callback(self.end_willi)

    def _start_willi(self, directory: Path, pair: Pair) -> Willi:
        directory.mkdir()
        table = directory / "upstream_servers.csv"
        table.write_text(self.tables[0])
        database = self.mariadb.table(
            ("db.example", self.sinks[0].server, False), ("dbmail.example", self.postfix.server, False)
        )
        settings: dict[str, Setting] = {
            **TIMES, "tls_cert": str(pair.cert), "tls_key": str(pair.key), "workers": WORKERS, "mappings": {
                "csv": {"type": "csv", "file": str(table)},
                "database": self.mariadb.mapping(database, timeout="1s", cache_ttl="1s", stale_ttl="2s"),
            },
        }  # fmt: skip
        return Willi(directory, settings, prefix=in_a_hurry(**{"child.LONGEST_DELAY": 2.0}))

    def _table(self, moved: str) -> str:
        one, two = (sink.server for sink in self.sinks)
        return (
            "pattern;server;tls_verify\n"
            f"one.example;{one};false\ntwo.example;{two};false\nmany.example;{one},{two};false\n"
            f"moved.example;{moved};false\nmail.example;{self.postfix.server};false\n"
        )

    def end_willi(self) -> None:
        if self.willi.process.poll() is None:
            self.willi.kill()

    def processes(self) -> list[int]:
        """All that are Willi's, wherever they stand in the tree."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.willi.config).encode() in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def stores(self) -> dict[str, Counter[tuple[str, str]]]:
        """By mark: how often which content lies in which place."""
        found: dict[str, Counter[tuple[str, str]]] = {}
        for sink in self.sinks:
            for line in sink.store.read_text().splitlines():
                record = json.loads(line)
                found.setdefault(record["mark"], Counter())[sink.server, record["digest"]] += 1
        for message in self.postfix.stored():
            content = message.content.replace(b"\n", b"\r\n")
            mark = content.partition(b"\r\n")[0].removeprefix(b"Subject: ").decode()
            digest = hashlib.sha256(content).hexdigest()
            found.setdefault(mark, Counter())[self.postfix.server, digest] += 1
        return found


@pytest.fixture
def site(request: pytest.FixtureRequest, certificates: Authority, tmp_path: Path) -> Iterator[Site]:
    need("postfix", "mariadbd", "mariadb-install-db", "ip", "unshare", "nsenter", root=True)
    with ExitStack() as ends:
        logs = request.node.stash.setdefault(LOGS, {})

        def show(log: Path) -> None:
            logs["Willi's last log"] = log

        made = Site(tmp_path, certificates, ends, show)
        show(made.willi.log_file)
        logs["Postfix"] = made.postfix.log_file
        yield made


def test_every_250_is_one_message_and_every_message_one_250_whatever_breaks(site: Site):
    print(f"\nchaos: {SECONDS:g} s, seed {SEED}", flush=True)
    allow(SECONDS + 600)
    book, began = Book(), time.monotonic()
    chaos = Chaos(site.daemon, site.sinks, site.postfix, site.mariadb, site.tables, SEED)
    usual = {pid: _descriptors(pid) for pid in site.willi.workers}
    senders = [Sender(f"m{n}", site.willi.port, DOMAINS, book, f"{SEED} {n}") for n in range(SENDERS)]
    with Traffic(senders):
        chaos.run(lambda: time.monotonic() - began > SECONDS * (1 - CALM), chaos.outside + chaos.inside)
        site.daemon.stop_master()  # no reload of before is still under way
        site.daemon.start()
        book.calm = True
        memory = {pid: _memory(pid) for pid in site.willi.workers}
        chaos.run(lambda: time.monotonic() - began > SECONDS, chaos.outside)
    faults = list(book.faults)
    faults += check_messages(book.entries, _settled_stores(site), book.counts)
    faults += check_leftovers(site, memory, max(map(len, usual.values())))
    faults += check_end(site)
    _print(book.counts, chaos.counts)
    for fault in faults[:MOST_TOLD]:
        print(f"chaos: {fault}")
    assert not faults, f"seed {SEED}: {len(faults)} faults, see above"
    assert book.counts["messages accepted"] > SECONDS, "hardly any traffic"


def _settled_stores(site: Site) -> Stores:
    """When Postfix has delivered all that it took."""
    site.postfix.flush()
    wait_until(lambda: not site.postfix.queue(), "an empty queue of Postfix", TIME_TO_DELIVER)
    return site.stores()


def check_messages(entries: Mapping[str, Entry], stores: Stores, counts: Counter[str]) -> list[str]:
    """What is wrong with what is stored, compared with what the clients were told."""
    faults = [f"{mark}: nobody has sent it, {stores[mark]}" for mark in stores.keys() - entries.keys()]
    for mark, entry in entries.items():
        copies = stores.get(mark, Counter())
        least, most = LIMITS[entry.fate](entry)
        if not least <= copies.total() <= most:
            faults.append(f"{mark}: {entry}, and stored {copies.total()} times: {copies}")
        if any(digest != entry.digest for _, digest in copies):
            faults.append(f"{mark}: {entry}, and something else is stored: {copies}")
        if entry.fate is not Fate.ACCEPTED and copies:
            counts[f"stored without a 250: the client was told {entry.code or 'nothing'}"] += 1
    return faults


def _window(entry: Entry) -> tuple[int, int]:
    """Its end was sent, and the upstream's 250 may have been lost: no SMTP server can avoid that."""
    return (0, 1) if entry.code in (0, 421, 451) else (0, 0)


LIMITS = {
    Fate.ACCEPTED: lambda _: (1, 1),
    Fate.DEFERRED: _window,
    Fate.UNKNOWN: _window,
    Fate.UNFINISHED: lambda _: (0, 0),
    Fate.NOT_BEGUN: lambda _: (0, 0),
}


def check_leftovers(site: Site, memory: Mapping[int, int], usual: int) -> list[str]:
    """After the last session: what the workers that saw the end still hold."""
    faults = [f"Willi has lost a worker in the calm: {pid}" for pid in memory if pid not in site.willi.workers]
    for pid in memory.keys() & set(site.willi.workers):
        try:
            wait_until(lambda pid=pid: not _sessions(pid, site.willi.port), f"no connection of {pid}", 60)  # type: ignore[misc]
        except AssertionError as error:
            faults.append(f"{error}: {_sessions(pid, site.willi.port)}")
        if len(_descriptors(pid)) > usual + MORE_DESCRIPTORS:
            faults.append(f"descriptors of {pid}: {usual} at the start, now {_descriptors(pid)}")
        if _memory(pid) > memory[pid] + MORE_MEMORY:
            faults.append(f"memory of {pid}: {memory[pid]} octets before, now {_memory(pid)}")
    return faults


def check_end(site: Site) -> list[str]:
    """Stop it: nothing stays behind, and the logs tell of no fault of ours."""
    faults = list(site.daemon.orphans)
    site.daemon.stop_master()
    faults += [f"process {pid} is left over" for pid in site.processes()]
    for log in site.daemon.logs:
        with log.open(encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                fields = parse_logfmt(line.rstrip("\n"))
                if "traceback" in fields or fields["msg"] == "Internal error":
                    faults.append(line)
    return faults


def _descriptors(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(path.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def _sessions(pid: int, port: int) -> list[str]:
    """Its TCP connections with clients and upstreams: not the listening ones, nor those to the database."""
    inodes = {name[8:-1] for name in _descriptors(pid) if name.startswith("socket:[")}
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote, state = fields[1], fields[2], fields[3]
        with_client = local.endswith(f":{port:04X}")
        with_sink = remote.endswith(f":{2525:04X}")
        if fields[9] in inodes and state != "0A" and (with_client or with_sink):
            found.append(line)
    return found


def _memory(pid: int) -> int:
    """Resident, in octets."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _print(*counts: Counter[str]) -> None:
    for count in counts:
        for what, number in sorted(count.items()):
            print(f"chaos: {number:8} {what}")
    sys.stdout.flush()
