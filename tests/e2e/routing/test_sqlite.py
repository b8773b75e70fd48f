"""Routes from a SQLite file through real sessions, while other programs write, lock and replace it."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import StartWilli
from tests.support.check import Finding, about, configure, findings
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import free_port, wait_until
from tests.support.status import Status
from tests.support.talk import MAIL, OK, QUEUED, deliver, greeted, say
from tests.support.upstream import ScriptedUpstream
from willi_lib.status.overview import REPAIR_DATABASE

QUERY = "SELECT server, tls_verify FROM routes WHERE pattern = ?"
CANNOT_LOOK_UP = "451 4.3.0 Cannot look up this address now"
DOWN = "Database is down"

Start = Callable[..., Willi]


@pytest.fixture
def file(tmp_path: Path, upstream: ScriptedUpstream) -> Path:
    return make(tmp_path / "routes.db", upstream.server)


@pytest.fixture
def start(start_willi: StartWilli, file: Path) -> Start:
    def start_(**settings: object) -> Willi:
        table = {"type": "sqlite", "file": str(file), "query": QUERY}
        return start_willi(mappings={"table": table}, workers=1, **settings)

    return start_


def make(path: Path, server: str) -> Path:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("CREATE TABLE routes (pattern TEXT PRIMARY KEY, server TEXT, tls_verify BOOLEAN)")
    connection.execute("INSERT INTO routes VALUES ('b.example', ?, 0)", (server,))
    connection.commit()
    connection.close()
    return path


def rcpt(client: Client, recipient: bytes = b"bob@b.example") -> str:
    return say(client, MAIL, b"RCPT TO:<" + recipient + b">", b"RSET")[1]


def test_mail_goes_by_the_rows_that_are_there_now(start: Start, file: Path, upstream: ScriptedUpstream):
    willi = start()
    assert deliver(greeted(willi)) == QUEUED
    client = greeted(willi)
    assert rcpt(client, b"eve@new.example").startswith("554 5.7.1")
    with sqlite3.connect(file) as connection:
        connection.execute("INSERT INTO routes VALUES ('new.example', ?, 0)", (upstream.server,))
        connection.commit()
        assert rcpt(client, b"eve@new.example") == OK
    connection.close()


def test_a_missing_file_is_a_451_and_one_line_and_its_return_is_seen(
    start: Start, file: Path, upstream: ScriptedUpstream
):
    status = Status(free_port())
    willi = start(status_listen=status.setting)
    willi.tolerate(DOWN)
    client = greeted(willi)
    assert rcpt(client) == OK
    file.unlink()
    assert [rcpt(client) for _ in range(5)] == [CANNOT_LOOK_UP] * 5
    status.wait_for(0, "willi_database_up", mapping="sqlite:table")
    status.wait_for(5, "willi_lookups_total", mapping="sqlite:table", outcome="error")
    [mapping] = status.overview()["mappings"]
    assert (mapping["kind"], mapping["last_error"]) == ("sqlite", f"{file}: No such file or directory")
    [problem] = [one for one in status.overview()["problems"] if one["subject"] == "sqlite:table"]
    assert problem["advice"] == REPAIR_DATABASE
    assert "sqlite:table" in status.lookup("bob@b.example")
    make(file.with_name("new.db"), upstream.server).replace(file)
    wait_until(lambda: rcpt(client) == OK, "the new file")
    errors = [(line["msg"], line["mapping"]) for line in willi.log if line["lvl"] == "error"]
    assert errors == [(DOWN, "sqlite:table")]


def test_willi_starts_without_the_file_but_no_reload_takes_one_that_is_not_there(start: Start, file: Path):
    file.rename(file.with_name("elsewhere"))
    willi = start()
    willi.tolerate(DOWN)
    willi.tolerate("Reload failed")
    assert rcpt(greeted(willi)) == CANNOT_LOOK_UP
    willi.signal(signal.SIGHUP)
    failed = willi.wait_for_log(msg="Reload failed, nothing has changed")
    assert failed["error"] == f"sqlite:table: {file}: No such file or directory"


def test_check_names_columns_and_rows_or_what_is_wrong(tmp_path: Path, file: Path):
    section = f'[[table]]\ntype = sqlite\nfile = {file}\nquery = "{QUERY}"\n'
    subject = f"sqlite:table: {file}"
    text = f"SQLite {sqlite3.sqlite_version}, columns server, tls_verify, rows in routes: 1"
    assert about(findings(configure(tmp_path, "", mappings=section)), subject) == [Finding("ok", subject, text, "")]
    wrong = section.replace("server,", "host,")
    [finding] = about(findings(configure(tmp_path, "", mappings=wrong)), subject)
    assert (finding.level, finding.what) == ("wrong", "no such column: host")
