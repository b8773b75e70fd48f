"""`make bench`, short: what it prints and writes, and that it believes no proxy."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import show_on_failure
from tests.runner.limits import allow
from tests.support.loopback import ROOT, need, wait_until

SHORT = ("--rounds", "1", "--size", "0.05", "plain")
LOST = "50 messages were sent and taken; at the upstream arrived 0 of them unchanged, and"
# A proxy that takes all messages, and passes none on.
LIAR = """\
#!{python}
RCPT = b"{rcpt}"
import re, socketserver, sys
class Session(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"220 liar.example\\r\\n")
        in_message = False
        for line in self.rfile:
            verb = b"" if in_message else line[:4]
            if verb or line == b".\\r\\n":
                codes = {{b"RCPT": RCPT, b"DATA": b"354", b"QUIT": b"221"}}
                self.wfile.write(codes.get(verb, b"250") + b" well\\r\\n")
                in_message = verb == b"DATA"
class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 100
    daemon_threads = allow_reuse_address = True
port = re.search(r"bind 127.0.0.1:(\\d+)", open(sys.argv[-1]).read())[1]
Server(("127.0.0.1", int(port)), Session).serve_forever()
"""
# A relay to the upstream that turns one word of each message into another.
FORGER = """\
#!{python}
import re, socket, socketserver, sys, threading
text = open(sys.argv[-1]).read()
here, there = (int(port) for port in re.findall(r"127.0.0.1:(\\d+)", text))
def copy(source, target):
    while octets := source.recv(65536):
        target.sendall(octets.replace(b"Hello.", b"Adieu."))
    target.shutdown(socket.SHUT_WR)
class Session(socketserver.BaseRequestHandler):
    def handle(self):
        upstream = socket.create_connection(("127.0.0.1", there))
        threading.Thread(target=copy, args=(upstream, self.request), daemon=True).start()
        copy(self.request, upstream)
class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 100
    daemon_threads = allow_reuse_address = True
Server(("127.0.0.1", here), Session).serve_forever()
"""


class Bench:
    """A run of it, its output in files, its results and its temporary folder in ours."""

    def __init__(self, directory: Path, arguments: Sequence[str]) -> None:
        allow(240)
        self.temporary, self.results = directory / "tmp", directory / "results"
        self.output, self.progress = directory / "output", directory / "progress"
        for needed in (self.temporary, self.results):
            needed.mkdir()
        with self.output.open("wb") as output, self.progress.open("wb") as progress:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench", "--results", str(self.results), *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=progress, cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.temporary), "PATH": f"{directory}:{os.environ['PATH']}"},
            )  # fmt: skip

    def wait(self) -> int:
        """The exit status; nothing is left then: no file, and no process that was told one of ours."""
        status = self.process.wait(200)
        assert list(self.temporary.iterdir()) == []
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
        assert [line for line in lines if os.fsencode(self.temporary) in line] == []
        return status

    @property
    def told(self) -> str:
        return self.progress.read_text(encoding="utf-8")


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Bench]]:
    """What is put in here is ended."""
    started: list[Bench] = []
    for name in ("output", "progress"):
        show_on_failure(request, "bench", tmp_path / name)
    yield started
    for bench in started:
        if bench.process.poll() is None:
            bench.process.terminate()
            bench.process.wait(60)


def start(run: list[Bench], directory: Path, *arguments: str) -> Bench:
    run.append(Bench(directory, arguments))
    return run[0]


def pretend(directory: Path, text: str) -> None:
    """The first haproxy of the PATH is this script."""
    program = directory / "haproxy"
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)


def test_a_run_gives_a_table_and_json_and_a_picture(run: list[Bench], tmp_path: Path):
    need("nginx", "haproxy", "openssl")
    bench = start(run, tmp_path, *SHORT)
    assert bench.wait() == 0
    results = json.loads((bench.results / "results.json").read_text(encoding="utf-8"))
    plain = results["scenarios"]["plain"]["figures"]
    assert {"Willi", "nginx", "HAProxy", "direct"} <= plain.keys()
    for name in ("Willi", "nginx", "HAProxy"):
        assert plain[name]["cost"]["median"] > 0
        assert 0 < plain[name]["p50"] <= plain[name]["p99"]
    assert plain["direct"]["cost"] is None
    ratio = plain["Willi"]["cost"]["median"] / plain["nginx"]["cost"]["median"]
    assert plain["Willi"]["ratios"]["nginx"]["median"] == pytest.approx(ratio)
    assert {"Willi", "Python", "gevent", "nginx", "haproxy"} <= results["versions"].keys()
    assert results["machine"]["cpus"] == len(os.sched_getaffinity(0))

    table = bench.output.read_text(encoding="utf-8")
    cost = f"{plain['Willi']['cost']['median']:#.3g}"
    assert re.search(rf"^plain +CPU ms a session +{cost} .* {ratio:.2f} \(", table, re.MULTILINE)
    assert results["date"] in table and results["machine"]["kernel"] in table

    picture = ElementTree.parse(bench.results / "results.svg").getroot()
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Willi", "nginx", "HAProxy"} <= set(words)
    assert f"{cost}, {ratio:.2f} x nginx" in words
    assert "prefers-color-scheme: dark" in (bench.results / "results.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("proxy", "failure"),
    [
        ("#!/bin/sh\necho no such thing\nexit 3\n", "HAProxy ended at its start with status 3:\nno such thing\n"),
        (
            LIAR.format(python=sys.executable, rcpt="250"),
            f"plain, HAProxy: {LOST} 0 in all",
        ),
        (
            LIAR.format(python=sys.executable, rcpt="452"),
            "plain, HAProxy: a session failed: '452 well' where 250 should have come",
        ),
    ],
    ids=["does not start", "loses messages", "refuses recipients"],
)
def test_a_proxy_that_fails_is_a_failure_and_gives_no_results(run: list[Bench], tmp_path: Path, proxy, failure):
    need("openssl")
    pretend(tmp_path, proxy)
    bench = start(run, tmp_path, "--proxies", "Willi,HAProxy", *SHORT)
    assert bench.wait() == 1
    assert f"\nFAILED: {failure}" in bench.told
    assert list(bench.results.iterdir()) == []
    assert bench.output.read_bytes() == b""


def test_a_message_that_is_changed_is_a_failure(run: list[Bench], tmp_path: Path):
    need("openssl")
    pretend(tmp_path, FORGER.format(python=sys.executable))
    bench = start(run, tmp_path, "--proxies", "HAProxy", *SHORT)
    assert bench.wait() == 1
    assert f"\nFAILED: plain, HAProxy: {LOST} 50 in all" in bench.told


def test_it_leaves_nothing_when_it_is_asked_to_end(run: list[Bench], tmp_path: Path):
    need("openssl")
    bench = start(run, tmp_path, "--proxies", "Willi,direct", "--rounds", "1000000", *SHORT[2:])
    wait_until(lambda: "round 2 " in bench.told, "the second round", seconds=60)
    bench.process.send_signal(signal.SIGTERM)
    assert bench.wait() == 128 + signal.SIGTERM
    assert list(bench.results.iterdir()) == []


def test_an_unknown_scenario_is_refused_with_the_names_of_all(run: list[Bench], tmp_path: Path):
    bench = start(run, tmp_path, "plane")
    assert bench.wait() == 2
    assert "not here: plane; there are plain, tlsc, ten, big, bigtext, one, idle, idletls\n" in bench.told
