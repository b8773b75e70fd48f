"""The mapping `sqlite` on real files, which other processes write, lock, replace and break meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gevent
import pytest

from tests.support.daemon import parse_logfmt
from tests.support.descriptors import Descriptors
from tests.support.loopback import PATIENCE, ROOT
from willi_lib.config import load
from willi_lib.mappings import sqlite as module
from willi_lib.mappings.known_rows import KnownRows
from willi_lib.mappings.open import open_mappings
from willi_lib.mappings.surroundings import Surroundings
from willi_lib.routing.route import LookupFailed, Mapping, MappingError, NoRoute
from willi_lib.routing.search import find_route

QUERY = "SELECT server, tls_verify FROM routes WHERE pattern = ?"
COLUMNS = "pattern TEXT PRIMARY KEY, server TEXT, tls_verify BOOLEAN"
LOCKED = "database is locked"

Open = Callable[..., Mapping]

# What another program does with the file $1 when it has said that it is ready, until it is told to end.
HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2].split(";"):
    connection.execute(statement)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    with gevent.Timeout(PATIENCE):
        yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return table(tmp_path / "routes.db", {"b.example": "mx1"})


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Open]:
    opened: list[Mapping] = []

    def open_(query: str = QUERY, name: str = "routes.db", shared: bool = False) -> Mapping:
        """shared: as by a worker, which knows what other workers have found."""
        config = tmp_path / "willi.conf"
        config.write_text(
            f"domain = mx.w.example\n[mappings]\n[[t]]\ntype = sqlite\nfile = {name}\nquery = '''{query}'''\n"
        )
        settings = load(str(config))
        known = {settings.mappings[0]: KnownRows()} if shared else {}
        opened.extend(open_mappings(settings, Surroundings(known_rows=known)))
        return opened[-1]

    yield open_
    for mapping in opened:
        mapping.close()


def table(path: Path, routes: dict[str, str], wal: bool = False) -> Path:
    """A new file with these rows."""
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {'wal' if wal else 'delete'}")
    connection.execute(f"CREATE TABLE routes ({COLUMNS})")
    connection.executemany("INSERT INTO routes (pattern, server) VALUES (?, ?)", routes.items())
    connection.commit()
    connection.close()
    return path


def change(path: Path, statement: str) -> None:
    """By a program that comes and goes."""
    connection = sqlite3.connect(path, timeout=PATIENCE)
    connection.execute(statement)
    connection.commit()
    connection.close()


class Other:
    """A program that has the file open and has run a statement."""

    def __init__(self, path: Path, statement: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), statement], **pipes)  # type: ignore[call-overload]
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE)

    def crash(self) -> None:
        self._process.kill()


def server(mapping: Mapping, recipient: str = "ann@b.example") -> str:
    return str(find_route([mapping], recipient))


def failure(mapping: Mapping, recipient: str = "ann@b.example") -> LookupFailed:
    with pytest.raises(LookupFailed) as failed:
        find_route([mapping], recipient)
    return failed.value


def logged(capfd: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    lines = map(parse_logfmt, capfd.readouterr().out.splitlines())
    return [(line["lvl"], line["msg"]) for line in lines]


def facts(mapping: Mapping) -> str:
    [host] = mapping.facts(thorough=True).hosts
    return host.text or f"fault: {host.fault}"


# Rows


def test_a_row_is_a_route_by_address_or_domain(file: Path, open_file: Open):
    change(file, "INSERT INTO routes VALUES ('eve@b.example', 'mx2:26, mx3', 'no'), ('c.example', NULL, NULL)")
    mapping = open_file()
    assert server(mapping) == "mx1:25"
    route = find_route([mapping], "Eve@B.example")
    assert (str(route), route.tls_verify, route.mapping) == ("mx2:26,mx3:25", False, "sqlite:t")
    for nobody in ("ann@c.example", "ann@d.example"):
        with pytest.raises(NoRoute):
            find_route([mapping], nobody)


@pytest.mark.parametrize(
    "key", ["o'brien@x.example", '"a\\"b"@x.example', "what?@x.example", "100%@x.example", "Ω@x.example"]
)
def test_no_key_breaks_out_of_the_query(file: Path, open_file: Open, key: str):
    mapping = open_file()
    with pytest.raises(NoRoute):
        find_route([mapping], key)
    connection = sqlite3.connect(file)
    connection.execute("INSERT INTO routes VALUES (?, 'mx9', 1)", (key.lower(),))
    connection.commit()
    assert server(mapping, key) == "mx9:25"


def test_every_question_mark_is_the_key_unless_it_is_quoted(file: Path, open_file: Open):
    query = "SELECT server FROM routes WHERE (pattern = ? OR ? = 'x.example') AND 'a?' <> 'b?' -- why?"
    assert server(open_file(query)) == "mx1:25"
    assert server(open_file(query), "ann@x.example") == "mx1:25"


def test_a_query_without_a_question_mark_outside_of_quotation_marks_cannot_be_used(file: Path, open_file: Open):
    with pytest.raises(MappingError, match=r"sqlite:t: query: has no \? outside quotation marks"):
        open_file("SELECT server FROM routes WHERE pattern = 'a?b'")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("'mx 1', 1", "'mx 1': not a host name"),
        ("'mx1', 'perhaps'", "tls_verify must be true or false"),
        ("zeroblob(10001), 1", "has more than 10000 octets"),
        ("CAST(x'ff' AS TEXT), 1", "can't decode byte 0xff"),
    ],
)
def test_a_row_that_cannot_be_understood_fails_for_its_key_only(file: Path, open_file: Open, row: str, why: str):
    change(file, f"INSERT INTO routes VALUES ('bad.example', {row})")
    mapping = open_file()
    assert why in str(failure(mapping, "ann@bad.example"))
    assert server(mapping) == "mx1:25"
    assert mapping.facts().database_up


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT * FROM routes WHERE pattern = ?", "must return the columns server and, if you like, tls_verify"),
        ("SELECT server FROM roots WHERE pattern = ?", "no such table: roots"),
        ("SELECT server FROM routes WHERE pattern = ? AND", "incomplete input"),
        ("SELECT server FROM routes WHERE pattern = ?; SELECT 1", "one statement at a time"),
        ("DELETE FROM routes WHERE pattern = ?", "readonly database"),
        ("SELECT server FROM routes WHERE pattern = ?7", "bindings"),
        ("ATTACH ? AS other", "not authorized"),
        ("VACUUM INTO ?", "authorization denied"),
    ],
)
def test_a_query_that_cannot_be_used_is_said_once_and_stops_a_reload(
    file: Path, open_file: Open, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    query: str, why: str,
):  # fmt: skip
    monkeypatch.chdir(file.parent)
    mapping = open_file(query)
    assert why in facts(mapping)
    for _ in range(3):
        assert why in str(failure(mapping))
    assert {one.name for one in file.parent.iterdir()} == {"routes.db", "willi.conf"}
    assert logged(capfd) == [("error", "Database is down")]
    with pytest.raises(MappingError, match="sqlite:t: ") as refused:
        mapping.load(reload=True)
    assert not refused.value.passing


# Changes


@pytest.mark.parametrize("wal", [False, True])
def test_the_next_look_up_sees_what_another_program_has_written(tmp_path: Path, open_file: Open, wal: bool):
    file = table(tmp_path / "routes.db", {"b.example": "mx1"}, wal)
    mapping = open_file()
    for number in range(5):
        change(file, f"UPDATE routes SET server = 'mx{number}'")  # a program that opens the file each time
        assert server(mapping) == f"mx{number}:25"
    with Other(file, "UPDATE routes SET server = 'mx8'"):  # one that keeps it open
        assert server(mapping) == "mx8:25"
        change(file, "UPDATE routes SET server = 'mx9'")
        assert server(mapping) == "mx9:25"
    assert server(mapping) == "mx9:25"


def test_the_next_look_up_sees_a_file_that_replaced_the_old_one(file: Path, open_file: Open):
    mapping = open_file()
    for number in range(3):
        assert server(mapping) == (f"mx{number}:25" if number else "mx1:25")
        new = table(file.with_name("new.db"), {"b.example": f"mx{number + 1}"}, wal=number == 1)
        new.replace(file)
    link = file.with_name("link.db")
    link.symlink_to(file)
    assert server(open_file(name="link.db")) == "mx3:25"


def test_a_file_that_another_one_was_copied_into_is_not_read_from_old_pages(file: Path, open_file: Open):
    """SQLite alone would not notice: the two have the same change counter."""
    mapping = open_file()
    assert server(mapping) == "mx1:25"
    shutil.copyfile(table(file.with_name("new.db"), {"b.example": "mx2"}), file)
    assert server(mapping) == "mx2:25"


@pytest.mark.parametrize("wal", [False, True])
def test_look_ups_create_no_file_and_leave_none_open(tmp_path: Path, open_file: Open, wal: bool):
    file = table(tmp_path / "routes.db", {"b.example": "mx1"}, wal)
    octets = file.read_bytes()
    mapping = open_file()
    assert server(mapping) == "mx1:25"
    failure(open_file(name="missing.db"))
    assert {one.name for one in tmp_path.iterdir()} == {"routes.db", "willi.conf"}
    assert file.read_bytes() == octets
    mapping.close()
    assert not [one for one in Path("/proc/self/fd").iterdir() if str(one.resolve()).startswith(str(tmp_path))]


def test_what_a_killed_program_has_committed_counts(tmp_path: Path, open_file: Open):
    file = table(tmp_path / "routes.db", {"b.example": "mx1"}, wal=True)
    mapping = open_file()
    with Other(file, "UPDATE routes SET server = 'mx2'") as other:
        other.crash()
    assert server(mapping) == "mx2:25"
    (tmp_path / "routes.db-shm").unlink()
    assert "open it once with a program that may write" in str(failure(open_file()))
    assert not (tmp_path / "routes.db-shm").exists()


def test_what_a_killed_program_has_not_committed_is_not_read(file: Path, open_file: Open):
    """Its journal says how the file was; only a program that may write can put that back."""
    change(file, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) "
           "INSERT INTO routes SELECT i || '.example', 'mx1', 1 FROM n")  # fmt: skip
    mapping = open_file()
    with Other(file, "PRAGMA cache_size = 1; BEGIN; UPDATE routes SET server = 'mx2'") as other:
        other.crash()
    assert file.with_name("routes.db-journal").exists()
    assert "attempt to write a readonly database" in str(failure(mapping))
    change(file, "UPDATE routes SET server = 'mx3' WHERE pattern = 'b.example'")
    assert server(open_file()) == "mx3:25"
    assert server(open_file(), "ann@7.example") == "mx1:25"


def test_a_file_that_a_program_has_open_in_wal_mode_is_not_read_as_one_that_cannot_change(
    tmp_path: Path, open_file: Open
):
    """Although its -wal is empty just now. SQLite would not notice that the program writes it into the file."""
    file = table(tmp_path / "routes.db", {"b.example": "mx1"}, wal=True)
    with Other(file, "UPDATE routes SET server = 'mx2'; PRAGMA wal_checkpoint(TRUNCATE)"):
        assert file.with_name("routes.db-wal").stat().st_size == 0
        assert server(open_file()) == "mx2:25"
        opened = {str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()}
        assert f"{file}-shm" in opened


def test_the_wal_of_a_file_that_was_replaced_is_not_taken_for_that_of_the_new_one(tmp_path: Path, open_file: Open):
    """By SQLite it is: c.example would be in no row, and get 554."""
    file = table(tmp_path / "routes.db", {"b.example": "mx1"}, wal=True)
    mapping = open_file()
    with Other(file, "PRAGMA wal_autocheckpoint = 0; UPDATE routes SET server = 'mx2'"):
        assert server(mapping) == "mx2:25"
        table(tmp_path / "new.db", {"b.example": "mx3", "c.example": "mx3"}).replace(file)
        assert "the -wal of another file" in str(failure(mapping, "ann@c.example"))
    assert "the -wal of another file" in facts(open_file())
    for name in ("routes.db-wal", "routes.db-shm"):
        (tmp_path / name).unlink()
    assert server(open_file(), "ann@c.example") == "mx3:25"


@pytest.mark.parametrize("asked_by", ["a session", "check"])
def test_what_another_program_puts_right_at_once_is_no_outage(
    file: Path, open_file: Open, capfd: pytest.CaptureFixture[str], asked_by: str
):
    """As it is for milliseconds when a program that writes in WAL mode begins or ends."""
    fill = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
    change(file, f"{fill} INSERT INTO routes SELECT i || '.example', 'mx1', 1 FROM n")
    with Other(file, "PRAGMA cache_size = 1; BEGIN; UPDATE routes SET server = 'mx2'") as other:
        other.crash()
    gevent.spawn_later(0.1, change, file, "UPDATE routes SET server = 'mx3' WHERE pattern = 'b.example'")
    mapping = open_file()
    assert "rows in routes: 5,001" in facts(mapping) if asked_by == "check" else server(mapping) == "mx3:25"
    assert logged(capfd) == []


# Faults


def test_a_short_lock_is_waited_for_and_a_long_one_is_said_once(
    file: Path, open_file: Open, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    mapping = open_file()
    with Other(file, "BEGIN EXCLUSIVE"):
        monkeypatch.setattr(module, "LOCK_TIME", PATIENCE)
        waiting = gevent.spawn(server, mapping)
        gevent.idle()
        assert not waiting.ready(), "a program writes, as for a commit"
    assert waiting.get() == "mx1:25"
    assert logged(capfd) == []
    monkeypatch.setattr(module, "LOCK_TIME", 0.05)
    with Other(file, "BEGIN EXCLUSIVE"):
        assert [LOCKED in str(failure(mapping)) for _ in range(3)] == [True] * 3
        assert failure(mapping).logged
        assert "fault: " in facts(mapping) and LOCKED in facts(mapping)
        assert not mapping.facts().database_up
        with pytest.raises(MappingError) as refused:
            mapping.load(reload=True)
        assert refused.value.passing, "the reload need not fail for that"
    assert logged(capfd) == [("error", "Database is down")]


def damage(file: Path) -> None:
    octets = file.read_bytes()
    file.write_bytes(octets[:200] + b"\xff" * (len(octets) - 200))


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (Path.unlink, "No such file or directory"),
        (lambda file: file.write_bytes(b""), "no such table: routes"),
        (lambda file: file.write_bytes(b"pattern;server\nb.example;mx1\n" * 50), "file is not a database"),
        (damage, "malformed"),
        (directory, "Is a directory"),
        (pipe, "not a regular file"),
    ],
    ids=["missing", "empty", "no database", "damaged", "directory", "pipe"],
)
def test_a_broken_file_is_a_failure_and_one_line_until_it_is_whole(
    file: Path, open_file: Open, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object], why: str,
):  # fmt: skip
    monkeypatch.setattr("willi_lib.mappings.cache.QUICK_RETRY", 0.0)
    mapping = open_file()
    assert server(mapping) == "mx1:25"
    spoil(file)
    for _ in range(3):
        assert why in str(failure(mapping))
    assert why in mapping.facts().last_error
    assert logged(capfd) == [("error", "Database is down")]
    assert facts(mapping).startswith("fault: ") and why in facts(mapping)
    if file.is_dir():
        file.rmdir()
    table(file.with_name("new.db"), {"b.example": "mx2"}).replace(file)
    assert server(mapping) == "mx2:25"
    [(level, message)] = logged(capfd)
    assert (level, message.partition(" after")[0]) == ("info", "Database is back")


def test_a_file_that_this_user_may_not_read_is_a_failure(file: Path, open_file: Open):
    mapping = open_file()
    assert server(mapping) == "mx1:25"
    file.chmod(0)
    if os.geteuid() == 0:
        file.parent.chmod(0o755)
        os.seteuid(65534)
    try:
        assert "Permission denied" in str(failure(mapping))
    finally:
        os.seteuid(os.getuid())


def test_a_query_without_an_index_is_ended_before_it_holds_the_worker_up(file: Path, open_file: Open):
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    mapping = open_file(f"{endless} SELECT server FROM n, routes WHERE pattern = ? || i")
    assert "is there an index on the pattern?" in str(failure(mapping))
    assert "is there an index on the pattern?" in facts(mapping)


def test_no_descriptor_left_is_no_fault_of_the_file(file: Path, open_file: Open, capfd: pytest.CaptureFixture[str]):
    mapping = open_file()
    with Descriptors():
        why = str(failure(mapping))
    assert "Too many open files" in why
    assert server(mapping) == "mx1:25"
    assert logged(capfd) == []


def test_a_table_that_is_being_filled_is_no_definite_no(file: Path, open_file: Open):
    """Promise 6, with the rows that the workers know."""
    mapping = open_file(shared=True)
    failure(mapping, "ann@c.example")  # it has shown no row yet
    assert server(mapping) == "mx1:25"
    with pytest.raises(NoRoute):
        find_route([mapping], "ann@c.example")
    change(file, "DELETE FROM routes")
    assert "was there, and is missing" in str(failure(mapping))
    failure(mapping, "ann@c.example")


# What `check` says


def test_check_names_columns_and_rows(file: Path, open_file: Open):
    change(file, "INSERT INTO routes VALUES ('c.example', 'mx1', 1)")
    assert facts(open_file()) == f"SQLite {sqlite3.sqlite_version}, columns server, tls_verify, rows in routes: 2"


def test_check_says_that_a_table_is_empty(file: Path, open_file: Open):
    change(file, "DELETE FROM routes")
    assert facts(open_file()) == f"fault: {module.NO_ROWS}"


def test_check_counts_a_large_table_up_to_a_limit(file: Path, open_file: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_ROWS", 1)
    assert facts(open_file()).endswith("rows in routes: 1 or more")


@pytest.mark.parametrize(
    ("query", "is_wrong"),
    [
        (QUERY, False),
        (f"SELECT * FROM ({QUERY} LIMIT 1);", False),
        (QUERY.replace("pattern", "lower(pattern)"), True),
        (f"{QUERY} OR ',' || pattern LIKE '%,' || ?", True),
    ],
)
def test_check_says_if_a_large_table_lacks_an_index(
    file: Path, open_file: Open, monkeypatch: pytest.MonkeyPatch, query: str, is_wrong: bool
):
    assert "rows in routes: 1" in facts(open_file(query))
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    assert facts(open_file(query)).startswith(f"fault: {module.NO_INDEX}" if is_wrong else "SQLite ")


MANUAL = (
    (ROOT / "docs" / "configure.md")
    .read_text(encoding="utf-8")
    .partition("## Tables in SQLite")[2]
    .partition("\n## ")[0]
)


def test_what_the_manual_makes_of_a_csv_file_has_its_patterns(tmp_path: Path, open_file: Open):
    [create] = re.findall(r"CREATE TABLE (?:.|\n)*?ROWID;", MANUAL)
    [update] = re.findall(r'"(UPDATE .*)"', MANUAL)
    change(tmp_path / "routes.db", create)
    with closing(sqlite3.connect(tmp_path / "routes.db")) as connection:  # as sqlite3 imports its lines
        rows = [("Ann@B.Example", "mx1"), ("c.example \t", " mx2 "), ("\td.example.", "mx3"), ("d.example", "mx3")]
        connection.executemany("INSERT INTO upstream_servers (pattern, server) VALUES (?, ?)", rows)
        connection.commit()
    change(tmp_path / "routes.db", update)
    mapping = open_file("SELECT server, tls_verify FROM upstream_servers WHERE pattern = ?")
    found = [server(mapping, key) for key in ("ann@b.example", "c.example", "d.example")]
    assert found == ["mx1:25", "mx2:25", "mx3:25"]


def test_the_table_of_the_manual_finds_patterns_in_any_case(tmp_path: Path, open_file: Open):
    [create] = re.findall(r"CREATE TABLE (?:.|\n)*?ROWID;", MANUAL)
    [query] = re.findall(r'query = "(.*)"', MANUAL)
    change(tmp_path / "routes.db", create)
    change(tmp_path / "routes.db", "INSERT INTO upstream_servers (pattern, server) VALUES ('Ann@B.Example', 'mx1')")
    mapping = open_file(query)
    assert server(mapping, "ann@b.example") == "mx1:25"
    with closing(sqlite3.connect(tmp_path / "routes.db")) as connection:
        assert "SEARCH" in str(connection.execute(f"EXPLAIN QUERY PLAN {query}", ("x",)).fetchall())
