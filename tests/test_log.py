"""Log lines: nothing that a client, an upstream or a resolver says can break or forge one."""

from __future__ import annotations

import os
import re
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
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


class Lines(log._Stdout):
    """A target that keeps the lines as they are."""

    def __init__(self, written: list[str]) -> None:
        super().__init__()
        self.written = written

    def octets(self, _level: str, line: str) -> bytes:
        return line.encode()

    def send(self, octets: bytes) -> None:
        self.written.append(octets.decode())


@pytest.fixture
def lines(monkeypatch):
    """What is written: all of it, level and line, and the lowest level let through."""
    written: list[str] = []
    monkeypatch.setattr(log, "_sink", log._Sink())
    log._sink.threshold = log.LEVELS["debug"]
    log._sink.target = Lines(written)
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
    log.info("m", at_the_limit=character * 1000)
    log.info("m", beyond=character * 1001)
    assert parse_logfmt(lines[0])["at_the_limit"] == character * 1000
    assert parse_logfmt(lines[1])["beyond"] == character * 1000 + "..."


@pytest.mark.parametrize("character", ["x", "\n", "é", "\\", "\u0085", "\U000e0041", "\U0001f600", "\ud800"])
@pytest.mark.parametrize("values", [1, 3, 16])
def test_no_line_is_longer_than_a_pipe_takes_whole(lines, character, values):
    fields = {f"client_field_{number}": character * 1000 for number in range(values)}
    log.info("m" + character * 1000, **fields, sid="AAAAAAAAAA", to="bob@b.example," * 70)
    line = only(lines)
    assert len(line.encode()) <= log.MAX_LINE - log.MAX_PREFIX < log.MAX_LINE <= select.PIPE_BUF
    fields = parse_logfmt(line)
    assert fields["sid"] == "AAAAAAAAAA"
    assert len(fields) == values + 4


def test_the_recipients_are_cut_last(lines):
    to = "bob@b.example," * 70
    log.info("m", reply="\n" * 1000, error="\u0085" * 1000, to=to)
    assert parse_logfmt(only(lines))["to"] == to


@pytest.mark.parametrize("where", ["stdout", "syslog"])
def test_the_prefix_counts_too(where):
    target = log._Stdout() if where == "stdout" else log._Syslog()
    assert len(target.octets("error", "x" * (log.MAX_LINE - log.MAX_PREFIX))) <= log.MAX_LINE < select.PIPE_BUF


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


def test_of_a_long_traceback_the_end_stays(lines):
    def deep(levels: int) -> None:
        if not levels:
            raise ValueError("at the bottom")
        try:
            deep(levels - 1)
        except ValueError as error:
            raise ValueError("é" * 100) from error

    try:
        deep(30)
    except ValueError:
        log.bug("Internal error")
    line = only(lines)
    assert len(line.encode()) < log.MAX_LINE
    assert parse_logfmt(line)["traceback"].endswith("ValueError: " + "é" * 100 + "\n")


@pytest.mark.parametrize("level", log.LEVELS)
def test_lines_below_the_level_are_not_written(lines, level):
    log._sink.threshold = log.LEVELS[level]
    for write in (log.debug, log.info, log.warn, log.error):
        write("m")
    from_here_on = list(log.LEVELS)[log.LEVELS[level] :]
    assert lines == [f"lvl={name} msg=m" for name in from_here_on]


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


@pytest.fixture
def stdout(fresh) -> Iterator[Callable[[int], int]]:
    """Puts another descriptor in the place of stdout."""
    before = os.dup(1)
    try:
        yield lambda descriptor: os.dup2(descriptor, 1)
    finally:
        os.dup2(before, 1)
        os.close(before)


def words(octets: bytes) -> list[str]:
    """The lines without their times."""
    lines = octets.decode().split("\n")
    assert lines.pop() == ""
    return [re.sub(r"^t=\S+ ", "", line) for line in lines]


def read_all(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    octets = b""
    with suppress(BlockingIOError):
        while more := os.read(descriptor, 65536):
            octets += more
    return octets


@pytest.mark.parametrize("journal", ["", "1:2", "nonsense", "stdout"])
def test_on_stdout_a_line_has_the_time_unless_stdout_is_the_journal(fresh, monkeypatch, capfd, journal):
    status = os.fstat(1)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}" if journal == "stdout" else journal)
    log.info("Ready\n")
    time = "" if journal == "stdout" else r"t=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} "
    assert re.fullmatch(time + r'lvl=info msg="Ready\\n"\n', capfd.readouterr().out)


def test_lost_lines_are_counted_and_reported_when_the_log_works_again(capfd, stdout):
    working = os.dup(1)
    reader, writer = os.pipe()
    os.close(reader)
    stdout(writer)  # nobody reads there
    for number in range(3):
        log.info("lost", number=number)
    log.debug("not written anyway")
    log._sink.stdout = log._sink.target = log._Stdout()
    stdout(working)
    log.info("heard")
    log.info("again")
    for descriptor in (working, writer):
        os.close(descriptor)
    assert words(capfd.readouterr().out.encode()) == [
        'lvl=error msg="Log lines lost" lines=3', "lvl=info msg=heard", "lvl=info msg=again",
    ]  # fmt: skip


def pipe() -> tuple[int, int]:
    return os.pipe()


def stream() -> tuple[int, int]:
    """As systemd connects a service with the journal."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("make", [pipe, stream])
def test_a_reader_that_hangs_costs_lines_and_no_time(stdout, make):
    reader, writer = make()
    stdout(writer)
    for number in range(10_000):
        log.info("m", number=number)
    lost = log._sink.lost
    assert os.get_blocking(writer)  # it is not ours alone
    assert log._sink.flush() is False
    octets = b""
    while not log._sink.flush():
        octets += read_all(reader)
    log.info("heard")
    octets += read_all(reader)
    os.close(reader)
    os.close(writer)
    received = words(octets)
    assert received == [
        *(f"lvl=info msg=m number={number}" for number in range(10_000 - lost)),
        f'lvl=error msg="Log lines lost" lines={lost}',
        "lvl=info msg=heard",
    ]
    assert 0 < lost < 10_000


def test_a_reader_that_is_only_slow_loses_no_line(stdout):
    reader, writer = os.pipe()
    stdout(writer)
    number, octets = 0, b""
    while not log._sink._waiting:
        log.info("m", number=number)
        number += 1
    for more in range(log.MAX_WAITING - 1):
        log.info("m", number=number + more)
    while not log._sink.flush():
        octets += read_all(reader)
    octets += read_all(reader)
    os.close(reader)
    os.close(writer)
    assert words(octets) == [f"lvl=info msg=m number={one}" for one in range(number + log.MAX_WAITING - 1)]


def test_several_processes_share_a_pipe_and_a_hanging_reader_stops_none(stdout):
    reader, writer = os.pipe()
    stdout(writer)
    log.info("first", process=0)
    long = "\x1b" * 900  # four times as long in the log
    children = []
    for process in range(1, 5):
        pid = os.fork()
        if not pid:
            for number in range(100):
                log.info("m", process=process, number=number, long=long)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    received = [parse_logfmt(line) for line in words(read_all(reader))]
    os.close(reader)
    os.close(writer)
    assert received[0] == {"lvl": "info", "msg": "first", "process": "0"}
    assert received[1:] and all(line["long"] == long for line in received[1:])


@pytest.mark.parametrize("flags", [os.O_APPEND, 0])
def test_a_full_disk_leaves_no_half_a_line(stdout, tmp_path, flags):
    descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | flags)
    stdout(descriptor)
    log.info("m", number=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(1).st_size * 5 // 2, limits[1]))
    try:
        for number in range(1, 5):
            log.info("m", number=number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with (tmp_path / "log").open("ab") as other:
        other.write(b"lvl=info msg=other\n")
    os.lseek(1, 0, os.SEEK_END)
    log.info("heard")
    os.close(descriptor)
    assert words((tmp_path / "log").read_bytes()) == [
        "lvl=info msg=m number=0", "lvl=info msg=m number=1", "lvl=info msg=other",
        'lvl=error msg="Log lines lost" lines=3', "lvl=info msg=heard",
    ]  # fmt: skip


@pytest.fixture
def syslog(fresh, monkeypatch, tmp_path):
    """A syslog daemon's socket, where log.py looks for it."""
    monkeypatch.setattr(log, "SYSLOG_SOCKET", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(log.SYSLOG_SOCKET)
        daemon.setblocking(False)
        yield daemon


def datagrams(daemon: socket.socket) -> list[str]:
    """What has come, without what stands before each line."""
    lines = []
    with suppress(BlockingIOError):
        while True:
            lines.append(daemon.recv(10_000).decode().partition(": ")[2])
    return lines


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
    received = datagrams(syslog)
    lost = log._sink.lost
    assert lost == 10_000 - len(received) - log.MAX_WAITING > 0
    while not log._sink.flush():
        received += datagrams(syslog)
    log.info("heard")
    received += datagrams(syslog)
    assert len(received) == 10_000 - lost + 2
    assert received[-2:] == [f'lvl=error msg="Log lines lost" lines={lost}', "lvl=info msg=heard"]


def test_without_a_syslog_daemon_lines_are_counted(syslog):
    log.set_up("info", "syslog")
    Path(log.SYSLOG_SOCKET).rename(log.SYSLOG_SOCKET + ".later")
    log.info("lost")
    assert log._sink.lost == 1
    Path(log.SYSLOG_SOCKET + ".later").rename(log.SYSLOG_SOCKET)
    log.flush()
    assert datagrams(syslog) == ['lvl=error msg="Log lines lost" lines=1']
