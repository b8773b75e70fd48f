"""`demo.py`, as `make demo` starts it: what it shows, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import show_on_failure
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port, wait_until

LAST_LINE = "Ctrl-C ends the demo"
SUBJECT = "Sm\N{LATIN SMALL LETTER O WITH DIAERESIS}rg\x1b[31m\x85"


class Demo:
    """A running demo.py, its output in a file, its temporary folder in one of ours."""

    def __init__(self, directory: Path, arguments: Sequence[str] = (), port: int | str | None = None) -> None:
        self.port = free_port() if port is None else port
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.output = directory / "output"
        places = {"WILLI_DEMO_PORT": str(self.port), "TMPDIR": str(self.temporary)}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "demo.py"), *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **places},
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        def is_there() -> bool:
            assert text in self.text or self.process.poll() is None, f"ended without {text!r}"
            return text in self.text

        wait_until(is_there, text, seconds=60)

    @property
    def willi(self) -> int:
        """The process id of its Willi."""
        return int(re.findall(r"msg=Ready .*pid=(\d+)", self.text)[0])

    def wait(self) -> int:
        """The exit status; nothing is left then."""
        status = self.process.wait(60)
        assert list(self.temporary.iterdir()) == []
        if "msg=Ready" in self.text:
            with pytest.raises(ProcessLookupError):
                os.kill(self.willi, 0)
        return status

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture
def start_demo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    with ExitStack() as ends:

        def start(*arguments: str, port: int | str | None = None) -> Demo:
            demo = Demo(tmp_path, arguments, port)
            show_on_failure(request, "demo.py", demo.output)
            ends.callback(demo.end)
            return demo

        yield start


def test_it_shows_three_messages_and_ends(start_demo: Callable[..., Demo]):
    demo = start_demo("--once")
    assert demo.wait() == 0
    *_, east, west, north = re.split(r"^\d\. ", demo.text, flags=re.MULTILINE)
    for part, name in ((east, "east"), (west, "west")):
        assert part.startswith(f"A mail to ann@{name}.example\n")
        [port] = re.findall(rf"^  {name}\.example;{HOST}:(\d+);false$", demo.text, re.MULTILINE)
        assert f"routed to {HOST}:{port}, which is {name}\n" in part
        assert f"from <eva@client.example> to <ann@{name}.example>\n" in part
        assert f"250 2.0.0 {name} has it, number 1\n" in part
        assert "5.7.1" not in part
    assert "\n              554 5.7.1 Relay access denied\n" in north
    assert "received" not in north
    assert north.endswith("\nAll three went as they should.\n")


def test_without_a_terminal_there_are_no_colours(start_demo: Callable[..., Demo]):
    demo = start_demo("--once")
    assert demo.wait() == 0
    assert "\033" not in demo.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_it_shows_a_mail_sent_by_hand_and_ends_when_asked(start_demo: Callable[..., Demo], number: signal.Signals):
    demo = start_demo()
    demo.wait_for(LAST_LINE)
    assert f" {HOST}:{demo.port} " in demo.text or f" {HOST} {demo.port}\n" in demo.text
    before = len(demo.text)
    with smtplib.SMTP(HOST, int(demo.port), "me.example", PATIENCE) as client:
        client.sendmail("me@me.example", ["bob@west.example"], f"Subject: {SUBJECT}\n\nhello\n".encode())
    demo.wait_for("to=bob@west.example")
    shown = demo.text[before:]
    assert "  west    received" in shown
    assert "from <me@me.example> to <bob@west.example>" in shown
    assert "Subject: Smörg?[31m?\n" in shown, "nobody's mail speaks to the terminal"
    demo.process.send_signal(number)
    assert demo.wait() == 0


def test_a_port_in_use_is_told_with_a_way_out(start_demo: Callable[..., Demo]):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        demo = start_demo(port=port)
        assert demo.wait() == 1
    assert f"\nWilli cannot have port {port}: cannot listen on {HOST}:{port}: Address already in use.\n" in demo.text
    assert re.search(r"\nChoose another port, for example: WILLI_DEMO_PORT=\d+ make demo\n$", demo.text)


def test_a_port_that_is_none_is_refused(start_demo: Callable[..., Demo]):
    demo = start_demo(port="smtp")
    assert demo.wait() == 1
    assert demo.text == "\nWILLI_DEMO_PORT must be a port, not 'smtp'.\n"


def test_it_says_so_if_willi_dies(start_demo: Callable[..., Demo]):
    demo = start_demo()
    demo.wait_for(LAST_LINE)
    os.kill(demo.willi, signal.SIGKILL)
    assert demo.wait() == 1
    assert "\nWilli has ended" in demo.text


def test_a_reader_that_goes_away_ends_it(tmp_path: Path):
    places = {"WILLI_DEMO_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "demo.py")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **places},
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert list(tmp_path.iterdir()) == []
