"""How many look-ups a second the mapping `mysql` makes: `python -m bench.mysql`.

A private MariaDB with a million rows, in one process of its own, beside the one that asks.
"""

# ruff: noqa: E402

from __future__ import annotations

from gevent import monkey

monkey.patch_all(ssl=False)  # as in Willi's workers

import sys
import tempfile
from pathlib import Path
from time import monotonic

import gevent

from tests.support.certificates import Authority
from tests.support.loopback import HOST
from tests.support.mariadb import PASSWORD, QUERY, USER, Mariadb
from willi_lib.config import MysqlSettings
from willi_lib.hosts import Address
from willi_lib.mappings.cache import CachedMapping
from willi_lib.mappings.mysql import Database
from willi_lib.routing.route import Policy
from willi_lib.routing.search import find_route

ROWS = 1_000_000
COLD, CACHED = 4000, 200_000  # look-ups a measurement


def measure(mapping: CachedMapping, sessions: int, first: int, stop: int, repeat: int = 1) -> float:
    """Look-ups a second, of so many sessions at a time, each recipient `repeat` times."""

    def session(offset: int) -> None:
        for number in range(first + offset, stop, sessions):
            for _ in range(repeat):
                find_route([mapping], f"user{number}@b.example")

    began = monotonic()
    gevent.joinall([gevent.spawn(session, offset) for offset in range(sessions)], raise_error=True)
    return (stop - first) * repeat / (monotonic() - began)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        server = Mariadb(authority.issue(HOST))
        try:
            report(server, str(authority.ca))
        finally:
            server.remove()


def report(server: Mariadb, ca: str) -> None:
    name = server.table()
    began = monotonic()
    server.query(
        f"INSERT INTO {name}.routes SELECT CONCAT('user', seq, '@b.example'), CONCAT('mx', seq % 9, '.example'), NULL"
        f" FROM {name}.seq_1_to_{ROWS}"
    )
    print(f"{ROWS:,} rows filled in within {monotonic() - began:.1f} s", file=sys.stderr)
    first = 1
    for title, tls_ca, socket in (("TCP", "", ""), ("TLS", ca, ""), ("unix socket", "", str(server.socket))):
        for sessions in (1, 5, 100):
            settings = MysqlSettings(
                name="t", policy=Policy(), host=(Address(HOST, server.port),), unix_socket=socket, user=USER,
                password=PASSWORD, database=name, tls_ca=tls_ca, query=QUERY,
            )  # fmt: skip
            mapping = CachedMapping("mysql:t", settings, Database(settings, "mysql:t"))
            measure(mapping, sessions, ROWS - 200, ROWS)  # connect
            cold = measure(mapping, sessions, first, first + COLD)
            print(f"{title:12} {sessions:4} sessions, never asked before: {cold:8,.0f} look-ups a second")
            first += COLD
    cached = measure(mapping, 1, first - COLD, first, CACHED // COLD)
    print(f"{'':12} {1:4} session, from the cache:         {cached:8,.0f} look-ups a second")


if __name__ == "__main__":
    main()
