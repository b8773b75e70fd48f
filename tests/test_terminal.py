"""`willi.py top`: in a real terminal (a pty) and out of one, against a real HTTP server."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support import overviews
from tests.support.daemon import PYTHON, run_willi, write_config
from tests.support.loopback import HOST, ROOT, free_port, wait_until
from tests.support.status_server import StatusServer
from willi_lib.hosts import Address
from willi_lib.status import terminal as top
from willi_lib.text import visible

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTHS = (20, 80, 132)


@pytest.fixture
def server() -> Iterator[StatusServer]:
    """Shows the bad night until the test says otherwise."""
    server = StatusServer(overviews.troubled())
    yield server
    server.stop()


def configure(directory: Path, listen: str) -> Path:
    sections = {"all": {"type": "static", "server": "mail.example.org"}}
    return write_config(
        directory / "willi.conf",
        {"listen": f"{HOST}:{free_port()}", "domain": "mx.example.org", "status_listen": listen, "mappings": sections},
    )


def shown(overview, width: int, height: int | None = None, colour: bool = False) -> list[str]:
    return top.drawn(overview, width, height, colour=colour)


@pytest.mark.parametrize("make", [overviews.healthy, overviews.troubled, overviews.hostile, overviews.empty])
def test_what_the_status_process_writes_is_drawn_as_what_it_means(server: StatusServer, make):
    server.overview = make()
    assert shown(top.fetch(Address(HOST, server.port)), 200) == shown(server.overview, 200)


OTHER_ANSWERS = [
    b"", b"[]", b"{}", b"null", b'{"now": NaN}', b"[" * 100_000, b"\xff", json.dumps({"now": "x"}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("text", OTHER_ANSWERS)
def test_anything_else_is_of_another_program(server: StatusServer, text: bytes):
    server.answers["/status.json"] = text
    with pytest.raises(top.Unanswered, match="Another program answers there"):
        top.fetch(Address(HOST, server.port))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sessions", '"1"'), ("now", "1e999"), ("now", "9" * 400), ("minutes", "{}"), ("minutes", "[[]]"),
        ("problems", "[1]"), ("problems", '"x"'), ("domain", "null"), ("hosts", '[{"name": "x"}]'),
        ("sessions", "9" * 5000), ("started", "NaN"),
    ],
)  # fmt: skip
def test_an_overview_with_a_value_that_cannot_be_drawn_is_none(server: StatusServer, name: str, value: str):
    good = {**asdict(overviews.healthy()), name: "HERE"}
    server.answers["/status.json"] = json.dumps(good).replace('"HERE"', value).encode()
    with pytest.raises(top.Unanswered, match="Another program answers there"):
        top.fetch(Address(HOST, server.port))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [overviews.healthy, overviews.troubled, overviews.hostile, overviews.empty])
def test_no_line_is_wider_than_the_terminal_and_none_bears_a_control(make, width: int):
    for line in shown(make(), width):
        assert top.columns(line) <= width
        assert line == visible(line)
        assert line.isprintable()


@pytest.mark.parametrize("height", [1, 5, 24, 50])
def test_there_are_no_more_lines_than_the_terminal_has(height: int):
    for overview in (overviews.healthy(), overviews.troubled(), overviews.hostile()):
        assert len(top.view(overview, height)) <= height


def test_a_small_terminal_shows_the_trouble_and_the_last_messages():
    text = "\n".join(shown(overviews.troubled(), 80, 24))
    assert "6 problems need you" in text
    assert "mail2.example.org:25: the upstream is down" in text
    assert "SESSION" in text
    assert "more" in text


@pytest.mark.parametrize("height", [3, 24, 60])
def test_that_there_is_no_newer_answer_is_said_on_top(height: int):
    second = top.view(overviews.troubled(), height, "Connection refused")[1]
    assert second == (" No newer answer: Connection refused ", "ill")


def test_all_of_it_is_shown_where_there_is_room():
    overview = overviews.troubled()
    text = "\n".join(shown(overview, 400))
    for problem in overview.problems:
        assert str(problem) in text and problem.advice in text
    for event in overview.events:
        assert event.sid in text
    for limit in overview.limits:
        assert limit.name in text
    for said in ("down 12 min", "db1.example.org:3306: Can't connect", "4,960 of 5,000", "2,433"):
        assert said in text


def test_only_marks_are_coloured_and_never_what_a_client_has_sent():
    coloured = shown(overviews.hostile(), 200, colour=True)
    left = [ESCAPE.sub("", line) for line in coloured]
    assert left == shown(overviews.hostile(), 200)
    assert set(ESCAPE.findall("".join(coloured))) <= {*ESCAPE.findall("".join(top.COLOURS.values())), top.PLAIN}


def test_the_last_hour_is_a_line_of_sixty_with_the_highest_at_the_top():
    assert top._spark([0] * 58 + [1, 100], top.BARS) == " " * 58 + "▁█"
    assert top._spark([], top.BARS) == " " * 60


def test_without_a_terminal_it_prints_once_and_ends(server: StatusServer, tmp_path: Path):
    done = run_willi("top", "-c", configure(tmp_path, f"{HOST}:{server.port}"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "mx1.example.org" in done.stdout
    assert "\x1b" not in done.stdout
    assert server.asked == ["/status.json"]


def test_a_locale_without_unicode_is_no_fault(server: StatusServer, tmp_path: Path):
    config = configure(tmp_path, f"{HOST}:{server.port}")
    command = [PYTHON, str(ROOT / "willi.py"), "top", "-c", str(config)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"#@#" in done.stdout  # the chart
    assert done.stdout.isascii()


def test_without_status_listen_it_says_what_to_set(tmp_path: Path):
    done = run_willi("top", "-c", configure(tmp_path, ""))
    assert (done.returncode, done.stdout) == (1, "")
    assert "status_listen is not set" in done.stderr
    assert "status_listen = 127.0.0.1:8025" in done.stderr


def test_when_nobody_answers_it_says_where_and_what_to_do(tmp_path: Path):
    port = free_port()
    done = run_willi("top", "-c", configure(tmp_path, f"{HOST}:{port}"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"http://{HOST}:{port}/status.json: [Errno 111] Connection refused" in done.stderr
    assert "Does Willi run" in done.stderr


def test_another_program_at_that_address_is_told_as_such(server: StatusServer, tmp_path: Path):
    server.answers["/status.json"] = b'{"\\u001b[2J": 1}'
    done = run_willi("top", "-c", configure(tmp_path, f"{HOST}:{server.port}"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Another program answers there" in done.stderr
    assert "\x1b" not in done.stderr


@contextmanager
def served(answer: Callable[[], None]) -> Iterator[None]:
    """The answers come from a thread, which has ended at the end."""
    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("octets", [b"", b"HTTP/1.1 200 OK\r\n"], ids=["silent", "stops in the middle"])
def test_a_server_that_does_not_go_on_is_given_up(octets: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(top, "PATIENCE", 0.3)
    with socket.create_server((HOST, 0)) as silent:

        def answer() -> None:
            with closing(silent.accept()[0]) as connection:
                connection.sendall(octets)
                connection.settimeout(60)
                while connection.recv(1000):
                    pass

        with served(answer), pytest.raises(top.Unanswered, match=r"no answer within|timed out"):
            top.fetch(Address(HOST, silent.getsockname()[1]))


def test_an_answer_that_drips_is_given_up_although_no_octet_is_late(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(top, "PATIENCE", 0.5)
    given_up = threading.Event()
    with socket.create_server((HOST, 0)) as server:

        def answer() -> None:
            with closing(server.accept()[0]) as connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(500):
                    connection.sendall(b"x")
                    if given_up.wait(0.02):
                        return

        with served(answer):
            with pytest.raises(top.Unanswered, match=r"no answer within 0\.5 s"):
                top.fetch(Address(HOST, server.getsockname()[1]))
            given_up.set()


def test_who_listens_everywhere_is_asked_here(server: StatusServer):
    for host in ("", "0.0.0.0"):
        assert top.fetch(Address(host, server.port)).domain == server.overview.domain


# In a terminal


class Terminal:
    """A pty with `willi.py top` in it; `screen` is all that was written."""

    def __init__(self, config: Path, columns: int, rows: int, kind: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [PYTHON, str(ROOT / "willi.py"), "top", "-c", str(config)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
            env={**environment, "PYTHONIOENCODING": "utf-8", "TERM": kind},
        )  # fmt: skip
        os.set_blocking(self.master, False)
        self.octets = b""

    @property
    def screen(self) -> str:
        while True:
            try:
                self.octets += os.read(self.master, 65536)
            except BlockingIOError:
                return self.octets.decode("utf-8", "replace")

    def shows(self, text: str) -> None:
        wait_until(lambda: text in self.screen, f"{text!r} on the terminal", 60)

    def ended(self) -> int:
        wait_until(lambda: (self.screen, self.process.poll())[1] is not None, "the end of top", 60)
        return self.process.returncode


@contextmanager
def terminal(config: Path, columns: int = 100, rows: int = 30, kind: str = "xterm") -> Iterator[Terminal]:
    opened = Terminal(config, columns, rows, kind)
    try:
        yield opened
    finally:
        if opened.process.poll() is None:
            opened.process.kill()
        opened.process.wait(60)
        os.close(opened.master)
        os.close(opened.slave)


@pytest.mark.parametrize("end", ["q", signal.SIGINT, signal.SIGTERM])
def test_the_terminal_is_as_before_at_the_end(server: StatusServer, tmp_path: Path, end: str | signal.Signals):
    with terminal(configure(tmp_path, f"{HOST}:{server.port}")) as opened:
        opened.shows("mail2.example.org:25: the upstream is down")
        if isinstance(end, str):
            os.write(opened.master, end.encode())
        else:
            os.kill(opened.process.pid, end)
        assert opened.ended() == (128 + end if end is signal.SIGTERM else 0)
        screen = opened.screen
        assert screen.startswith(top.ENTER)
        assert screen.endswith(top.LEAVE)
        assert "Traceback" not in screen
        assert termios.tcgetattr(opened.slave) == opened.before


def test_a_dumb_terminal_gets_it_once_and_no_control_sequence(server: StatusServer, tmp_path: Path):
    with terminal(configure(tmp_path, f"{HOST}:{server.port}"), kind="dumb") as opened:
        assert opened.ended() == 0
        assert "mail2.example.org:25: the upstream is down" in opened.screen
        assert opened.screen.replace("\r\n", "").isprintable()


def test_it_asks_again_and_fits_the_terminal(server: StatusServer, tmp_path: Path):
    with terminal(configure(tmp_path, f"{HOST}:{server.port}"), columns=72, rows=20) as opened:
        opened.shows("6 problems need you")
        server.overview = replace(overviews.healthy(), domain="later.example")
        opened.shows("later.example")
        pictures = opened.screen.removeprefix(top.ENTER).split("\x1b[H")[1:]
        for picture in pictures:
            rows = ESCAPE.sub("", picture).replace("\r", "").split("\n")
            assert len(rows) == 20
            assert max(map(top.columns, rows)) <= 72


def test_it_waits_for_a_willi_that_is_gone_for_a_while(server: StatusServer, tmp_path: Path):
    with terminal(configure(tmp_path, f"{HOST}:{server.port}")) as opened:
        opened.shows("6 problems need you")
        server.answers["/status.json"] = b"gone"
        opened.shows("No newer answer: ")
        assert "mail2.example.org:25: the upstream is down" in opened.screen
        del server.answers["/status.json"]
        server.overview = replace(overviews.healthy(), domain="back.example")
        opened.shows("back.example")
        assert opened.process.poll() is None


def test_what_a_client_has_sent_does_not_control_the_terminal(server: StatusServer, tmp_path: Path):
    server.overview = overviews.hostile()
    with terminal(configure(tmp_path, f"{HOST}:{server.port}"), columns=160, rows=200) as opened:
        opened.shows("problems need you")
        opened.shows("SESSION")
        os.write(opened.master, b"q")
        assert opened.ended() == 0  # so that the screen does not end within a control sequence
        screen = opened.screen
        assert "\x07" not in screen and "\x9b" not in screen and "\u202e" not in screen
        assert set(ESCAPE.findall(screen)) <= {
            *ESCAPE.findall("".join(top.COLOURS.values()) + top.ENTER + top.LEAVE), top.PLAIN, "\x1b[H", "\x1b[K",
        }  # fmt: skip
        assert "\x1b" not in ESCAPE.sub("", screen)
