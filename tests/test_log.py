"""Log lines: nothing that a client, an upstream or a resolver says can break or forge one."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.daemon import parse_logfmt
from willi_lib import log

FORGERIES = [
    "\n",
    "a\r\nlvl=error msg=forged",
    'x" msg=forged y="',
    'x\\" msg=forged',
    "\\",
    '\\"',
    "=",
    "a=b",
    " lvl=info",
    "",
    " ",
    '"',
    '"quoted"',
    "\x1b[2J\x1b[31mred",
    "\x9b31m",  # C1's CSI
    "\0\x07\x08\x7f",
    "\u2028lvl=error\u2029\x85\x0b\x0c\x1c",
    "\u202egro.elpmaxe\u2066",  # turns the direction of what follows
    "\ufeff\u200b\xad",
    "\ud800\udfff",
    "\U000e0041\U0010ffff",
    "bücher@bücher.example",
    "true",
]


@pytest.fixture
def lines(monkeypatch):
    """What is written: all of it, level and line, and the lowest level let through."""
    written: list[str] = []
    monkeypatch.setattr(log, "_sink", log._Sink())
    log._sink.threshold = log.LEVELS["debug"]
    log._sink.write = lambda _level, line: written.append(line)
    return written


def only(lines: list[str]) -> str:
    (line,) = lines
    lines.clear()
    return line


@pytest.mark.parametrize("value", FORGERIES)
def test_a_value_is_read_back_as_it_was_and_stays_one_printable_line(lines, value):
    log.info(value, sid="A", client=value)
    line = only(lines)
    assert parse_logfmt(line) == {"lvl": "info", "msg": value, "sid": "A", "client": value}
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode()


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda key: key not in ("lvl", "msg")),
                       st.text(st.characters(), max_size=150)), st.text(st.characters(), max_size=150))  # fmt: skip
@example({"a": "\\u0041\\x41"}, "\\n")
def test_any_fields_are_read_back_from_one_printable_line(fields, message):
    line = " ".join([f"msg={log.quote(message)}", *(f"{key}={log.quote(value)}" for key, value in fields.items())])
    assert parse_logfmt(line) == {"msg": message, **fields}
    assert line.isprintable()


@pytest.mark.parametrize(("value", "text"), [
    ("plain", "plain"), ("a@b.example:25", "a@b.example:25"), ("<>", "<>"), ("250 Ok", '"250 Ok"'), ("", '""'),
    (True, "true"), (False, "false"), (0, "0"), (-1, "-1"), (1.23456, "1.235"), (0.0, "0.000"),
])  # fmt: skip
def test_a_value_is_quoted_only_if_it_must_be(value, text):
    assert log.quote(value) == text


def test_a_field_without_a_value_is_left_out(lines):
    log.info("Message accepted", error=None, reply="")
    assert only(lines) == 'lvl=info msg="Message accepted" reply=""'


@pytest.mark.parametrize("character", ["x", "\n", "é"])
def test_a_long_value_is_cut(lines, character):
    log.info("m", at_the_limit=character * 1000, beyond=character * 1001)
    fields = parse_logfmt(only(lines))
    assert fields["at_the_limit"] == character * 1000
    assert fields["beyond"] == character * 1000 + "..."


def test_nobody_escapes_the_cut_by_the_word_traceback(lines):
    log.info("m", address="Traceback" + "x" * 100_000)
    assert len(only(lines)) < 1100


def test_a_bug_is_logged_with_its_whole_traceback_on_one_line(lines):
    def deep(levels: int) -> None:
        if not levels:
            raise ValueError("at the bottom\nlvl=info msg=forged")
        [deep][0](levels - 1)  # what the traceback shows of this line makes it long

    try:
        deep(2)
    except ValueError:
        log.bug("Internal error", sid="A")
    fields = parse_logfmt(only(lines))
    assert fields["lvl"] == "error" and fields["msg"] == "Internal error" and fields["sid"] == "A"
    assert fields["traceback"].startswith("Traceback (most recent call last):\n")
    assert fields["traceback"].endswith("ValueError: at the bottom\nlvl=info msg=forged\n")


@pytest.mark.parametrize("level", log.LEVELS)
def test_lines_below_the_level_are_not_written(lines, level):
    log._sink.threshold = log.LEVELS[level]
    for write in (log.debug, log.info, log.warn, log.error):
        write("m")
    from_here_on = list(log.LEVELS)[log.LEVELS[level] :]
    assert lines == [f"lvl={name} msg=m" for name in from_here_on]
    assert [log.enabled(name) for name in log.LEVELS] == [name in from_here_on for name in log.LEVELS]


def test_a_dialogue_is_traced_line_by_line_at_debug_level_only(lines):
    trace = log.tracer("A", "client")
    assert trace
    trace("<", b"EHLO \xff\x1b\n")
    trace(">", b"250-mx\r\n250 SIZE\r\n")
    assert [parse_logfmt(line) for line in lines] == [
        {"lvl": "debug", "msg": "client <", "sid": "A", "line": "EHLO \\xff\x1b"},
        {"lvl": "debug", "msg": "client >", "sid": "A", "line": "250-mx"},
        {"lvl": "debug", "msg": "client >", "sid": "A", "line": "250 SIZE"},
    ]
    log._sink.threshold = log.LEVELS["info"]
    assert log.tracer("A", "client") is None


# Where lines go


@pytest.fixture
def fresh(monkeypatch):
    """No line was lost so far, and what the test sets up goes with it."""
    monkeypatch.setattr(log, "_sink", log._Sink())


def test_on_stdout_a_line_has_the_time_unless_the_journal_puts_it(fresh, monkeypatch, capfd):
    monkeypatch.setattr(log, "_HAS_JOURNAL", False)
    log.set_up("info", "stdout")
    log.info("Ready\n")
    line = capfd.readouterr().out
    assert re.fullmatch(r't=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} lvl=info msg="Ready\\n"\n', line)
    monkeypatch.setattr(log, "_HAS_JOURNAL", True)
    log.info("Ready")
    assert capfd.readouterr().out == "lvl=info msg=Ready\n"


def test_lost_lines_are_counted_and_reported_when_the_log_works_again(fresh, monkeypatch, capfd):
    monkeypatch.setattr(log, "_HAS_JOURNAL", True)
    log.set_up("info", "stdout")
    working = os.dup(1)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)  # nobody reads there
    for number in range(3):
        log.info("lost", number=number)
    log.debug("not written anyway")
    os.dup2(working, 1)
    log.info("heard")
    log.info("again")
    for descriptor in (working, writer):
        os.close(descriptor)
    assert capfd.readouterr().out == 'lvl=error msg="Log lines lost" lines=3\nlvl=info msg=heard\nlvl=info msg=again\n'


@pytest.fixture
def syslog(fresh, monkeypatch, tmp_path):
    """A syslog daemon's socket, where log.py looks for it."""
    monkeypatch.setattr(log, "SYSLOG_SOCKET", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(log.SYSLOG_SOCKET)
        daemon.setblocking(False)
        yield daemon


@pytest.mark.parametrize(("level", "priority"), [("debug", 23), ("info", 22), ("warn", 20), ("error", 19)])
def test_to_syslog_a_line_is_a_datagram_of_facility_mail(syslog, level, priority):
    log.set_up("debug", "syslog")
    getattr(log, level)("Hanging up", client="a\nb")
    expected = f'<{priority}>willi[{os.getpid()}]: lvl={level} msg="Hanging up" client="a\\nb"'
    assert syslog.recv(10_000) == expected.encode()


def test_a_syslog_daemon_that_was_restarted_is_found_again(syslog):
    log.set_up("info", "syslog")
    log.info("before")
    syslog.close()
    Path(log.SYSLOG_SOCKET).unlink()
    log.info("lost")
    log.info("lost")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(log.SYSLOG_SOCKET)
        log.info("after")
        received = [daemon.recv(10_000).decode().partition(": ")[2] for _ in range(2)]
    assert received == ['lvl=error msg="Log lines lost" lines=2', "lvl=info msg=after"]


def test_a_syslog_daemon_that_does_not_keep_up_stops_nobody(syslog):
    log.set_up("info", "syslog")
    for number in range(10_000):
        log.info("m", number=number)
    received = 0
    try:
        while True:
            syslog.recv(10_000)
            received += 1
    except BlockingIOError:
        pass
    assert log._sink.lost == 10_000 - received > 0
    log.info("heard")
    assert syslog.recv(10_000).decode().endswith(f'msg="Log lines lost" lines={10_000 - received}')
