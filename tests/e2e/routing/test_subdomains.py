"""Patterns with a dot before them, and what `willi.py` says of them. For MySQL see test_mysql.py."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from tests.conftest import StartWilli
from tests.support.check import configure
from tests.support.daemon import run_willi
from tests.support.talk import MAIL, OK, greeted, say
from tests.support.upstream import ScriptedUpstream

NO_ROUTE = "554 5.7.1 Relay access denied"


def test_a_file_has_patterns_for_the_names_below(start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path):
    with sqlite3.connect(tmp_path / "routes.db") as connection:
        connection.execute("CREATE TABLE routes (pattern TEXT PRIMARY KEY, server TEXT, tls_verify BOOLEAN)")
        connection.execute("INSERT INTO routes VALUES ('.sqlite.example', ?, 0)", (upstream.server,))
    connection.close()
    query = "SELECT server, tls_verify FROM routes WHERE pattern = ?"
    willi = start_willi(
        csv=f"pattern;server;tls_verify\n.csv.example;{upstream.server};false\n",
        mappings={
            "sqlite": {"type": "sqlite", "file": str(tmp_path / "routes.db"), "query": query},
        },
        subdomains=True,
        workers=1,
    )

    def answer(domain: str) -> str:
        with greeted(willi) as client:
            return say(client, MAIL, b"RCPT TO:<ann@%s>" % domain.encode())[1]

    for kind in ("csv", "sqlite"):
        assert [answer(f"{name}.{kind}.example") for name in ("a", "B.a")] == [OK, OK]
    for kind in ("csv", "sqlite"):
        assert answer(f"{kind}.example") == NO_ROUTE, "the pattern is for the names below only"


def test_lookup_asks_the_exact_domain_first_and_then_the_longest_pattern(tmp_path: Path):
    table = ".example.org;mx1\n.sub.example.org;mx2\nsub.example.org;mx3\n"
    path = configure(tmp_path, table, more="subdomains = yes\n")
    done = run_willi("lookup", "-c", path, "ann@a.sub.example.org", "ann@sub.example.org", "ann@x.y.example.org")
    name = f"csv:{tmp_path}/map.csv"
    assert done.stdout.splitlines() == [
        "ann@a.sub.example.org",
        f"  {name}  ann@a.sub.example.org  -",
        f"  {name}  a.sub.example.org  -",
        f"  {name}  .sub.example.org  mx2:25",
        "  route: mx2:25, tls_verify = true",
        "ann@sub.example.org",
        f"  {name}  ann@sub.example.org  -",
        f"  {name}  sub.example.org  mx3:25",
        "  route: mx3:25, tls_verify = true",
        "ann@x.y.example.org",
        f"  {name}  ann@x.y.example.org  -",
        f"  {name}  x.y.example.org  -",
        f"  {name}  .y.example.org  -",
        f"  {name}  .example.org  mx1:25",
        "  route: mx1:25, tls_verify = true",
    ]


def test_without_the_setting_such_a_pattern_is_an_error_that_names_it(tmp_path: Path):
    done = run_willi("check", "--quick", "-c", configure(tmp_path, "*.example.org;mx1\n"))
    assert "for all names below example.org write .example.org and set subdomains = yes" in done.stdout
    assert done.returncode == 1
