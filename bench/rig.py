"""The measured processes: private instances on free loopback ports, their CPU time and their memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .traffic import HOST, greets

ROOT = Path(__file__).resolve().parents[1]
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
TICKS = os.sysconf("SC_CLK_TCK")
TIME_TO_START, TIME_TO_STOP = 20.0, 10.0  # seconds for what takes less than one
SYSTEMD = ("JOURNAL_STREAM", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")  # would be about us
NGINX_MODULE = Path("/usr/lib/nginx/modules/ngx_mail_module.so")  # elsewhere it is built in


class RigFailed(Exception):
    """A process did not start, or ended."""


@dataclass(frozen=True)
class Place:
    """What a proxy is told: its own directory, where it listens, where its upstream is. lines: of Willi's table."""

    directory: Path
    port: int
    upstream: int
    auth: int
    descriptors: int
    certificate: Path
    key: Path
    lines: int

    def write(self, name: str, text: str) -> str:
        """A file in the directory; its path."""
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        return str(path)


def willi(place: Place, workers: int = 1) -> list[str]:
    """As installed, with its log, but for the limits that a single client host would meet."""
    others = "".join(f"d{number}.example;192.0.2.{number % 250}\n" for number in range(place.lines - 1))
    place.write("table.csv", f"pattern;server;tls_verify\nbench.example;{HOST}:{place.upstream};false\n{others}")
    config = place.write("willi.conf", f"""\
listen = {HOST}:{place.port}
domain = willi.example
workers = {workers}
max_message_bytes = 64MiB
max_connections = {place.descriptors // 2}
max_connections_per_ip = {place.descriptors // 2}
tls_cert = {place.certificate}
tls_key = {place.key}

[mappings]
[[table]]
type = csv
file = table.csv
""")  # fmt: skip
    return [sys.executable, str(ROOT / "willi.py"), "-c", config]


def two_willis(place: Place) -> list[str]:
    """Willi with two workers."""
    return willi(place, workers=2)


def nginx(place: Place) -> list[str]:
    """Its mail proxy, one worker. TLS 1.3 as in Debian's nginx.conf, and as Willi; alone, 1.22 would take TLS 1.2.

    Who answers its question for the upstream (auth_http) is not counted.
    """
    config = place.write("nginx.conf", f"""\
{f"load_module {NGINX_MODULE};" if NGINX_MODULE.exists() else ""}
daemon off;
worker_processes 1;
worker_rlimit_nofile {place.descriptors};
pid {place.directory}/nginx.pid;
error_log {place.directory}/error.log error;
events {{ worker_connections {place.descriptors}; }}
mail {{
  server_name nginx.example;
  auth_http {HOST}:{place.auth}/auth;
  proxy_pass_error_message on;
  xclient on;
  ssl_protocols TLSv1.2 TLSv1.3;
  ssl_certificate {place.certificate};
  ssl_certificate_key {place.key};
  smtp_capabilities PIPELINING "SIZE 67108864" 8BITMIME ENHANCEDSTATUSCODES;
  server {{
    listen {HOST}:{place.port} backlog=4096;
    protocol smtp;
    smtp_auth none;
    starttls on;
  }}
}}
""")  # fmt: skip
    return [find("nginx"), "-p", str(place.directory), "-c", config]


def haproxy(place: Place) -> list[str]:
    """HAProxy as a TCP relay of one thread: it parses nothing, knows one upstream and no STARTTLS."""
    config = place.write("haproxy.cfg", f"""\
global
  nbthread 1
  maxconn {place.descriptors // 2 - 100}
defaults
  mode tcp
  timeout connect 10s
  timeout client 300s
  timeout server 300s
listen smtp
  bind {HOST}:{place.port} backlog 4096
  server sink {HOST}:{place.upstream}
""")  # fmt: skip
    return [find("haproxy"), "-db", "-f", config]


def floor(place: Place) -> list[str]:
    """What Python and gevent cost at the least; see floor.py."""
    return [sys.executable, "-m", "bench.floor", str(place.port), str(place.upstream)]


@dataclass(frozen=True)
class Kind:
    """A row of the table. command: None is the upstream itself, without a proxy."""

    command: Callable[[Place], list[str]] | None
    needs: str = ""
    tls: bool = False


KINDS = {
    "Willi": Kind(willi, tls=True),
    "Willi-2": Kind(two_willis, tls=True),
    "nginx": Kind(nginx, "nginx", tls=True),
    "HAProxy": Kind(haproxy, "haproxy"),
    "floor": Kind(floor),
    "direct": Kind(None),
}


def find(program: str) -> str:
    """Its path, in /usr/sbin too; "" if it is not there."""
    return shutil.which(program, path=PATH) or ""


# -- processes


@contextmanager
def running(
    command: list[str], log: Path, stdin: int = subprocess.DEVNULL, stdout: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A session of processes that is gone afterwards, whatever happens. Its stderr, and stdout, go to the log."""
    environment = {name: value for name, value in os.environ.items() if name not in SYSTEMD}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=stdout or output, stderr=output, text=True, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(TIME_TO_STOP)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Upstream:
    """The upstream: see traffic.Sink, which this process runs."""

    def __init__(self, smtp_port: int, http_port: int) -> None:
        self.smtp_port = smtp_port
        self.http_port = http_port

    @classmethod
    @contextmanager
    def started(cls, directory: Path) -> Iterator[Upstream]:
        """It ends with us, since its stdin does. Raises RigFailed."""
        command, log = [sys.executable, "-m", "bench.traffic"], directory / "upstream.log"
        with running(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            if not (ports := process.stdout.readline()):
                raise RigFailed(f"the upstream ended at its start:\n{log.read_text(errors='replace')[-2000:]}")
            yield cls(*json.loads(ports))

    def received(self) -> dict[int, int]:
        """How many messages of which checksum came since the last call."""
        with urllib.request.urlopen(f"http://{HOST}:{self.http_port}/received", timeout=TIME_TO_STOP) as answer:
            return {int(checksum): count for checksum, count in json.load(answer).items()}


@dataclass(frozen=True)
class Cpu:
    """Seconds. total is exact to less than a millisecond; user and system are what the kernel's ticks saw."""

    total: float
    user: float
    system: float

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.total - other.total, self.user - other.user, self.system - other.system)


class Proxy:
    """A running proxy, or the upstream itself in its place (no process: no CPU, no memory)."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[str] | None = None) -> None:
        self.name = name
        self.port = port
        self._process = process

    @classmethod
    @contextmanager
    def started(cls, name: str, upstream: Upstream, directory: Path, descriptors: int, lines: int) -> Iterator[Proxy]:
        """Start it and wait until it takes mail. The certificate is in the directory. Raises RigFailed."""
        command = KINDS[name].command
        if not command:
            yield cls(name, upstream.smtp_port)
            return
        own = Path(tempfile.mkdtemp(dir=directory))
        certificate, key = directory / "cert.pem", directory / "key.pem"
        place = Place(own, free_port(), upstream.smtp_port, upstream.http_port, descriptors, certificate, key, lines)
        with running(command(place), own / "log") as process:
            proxy = cls(name, place.port, process)
            try:
                proxy._wait_until_ready()
            except RigFailed as failure:
                raise RigFailed(f"{name} {failure}:\n{(own / 'log').read_text(errors='replace')[-2000:]}") from None
            yield proxy

    def _wait_until_ready(self) -> None:
        assert self._process
        deadline = time.monotonic() + TIME_TO_START
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RigFailed(f"ended at its start with status {self._process.returncode}")
            if greets(self.port):
                return
            time.sleep(0.05)
        raise RigFailed(f"did not greet us within {TIME_TO_START:g} s")

    def cpu(self) -> Cpu:
        """Of the whole tree of processes, with those that have ended."""
        total, user, system = 0.0, 0, 0
        for process, stat in self._tree():
            own, ended = [int(field) for field in stat[11:13]], [int(field) for field in stat[13:15]]
            total += time.clock_gettime(~process << 3 | 2) + sum(ended) / TICKS  # clock_getcpuclockid(3): nanoseconds
            user, system = user + own[0] + ended[0], system + own[1] + ended[1]
        return Cpu(total, user / TICKS, system / TICKS)

    def memory(self) -> int:
        """PSS of the tree in KiB: its own pages, and its part of the shared ones. Not the kernel's socket buffers."""
        texts = [Path(f"/proc/{process}/smaps_rollup").read_text() for process, _ in self._tree()]
        return sum(int(kib) for text in texts for kib in re.findall(r"^Pss: +(\d+) kB", text, re.MULTILINE))

    def _tree(self) -> list[tuple[int, list[str]]]:
        """Process ids, and what /proc/<pid>/stat says from the state on (proc(5))."""
        if not self._process:
            return []
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                stats[int(path.parent.name)] = path.read_text().rpartition(") ")[2].split()
        tree = [self._process.pid]
        for process in tree:  # which grows while we look at it
            tree += [child for child, stat in stats.items() if int(stat[1]) == process]
        return [(process, stats[process]) for process in tree if process in stats]


def free_port() -> int:
    """A TCP port that nobody has at this moment."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def make_certificate(directory: Path) -> None:
    """cert.pem and key.pem: P-256, as most have today."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", directory / "key.pem", "-out", directory / "cert.pem", "-days", "2", "-subj", "/CN=mx.example"],
        check=True, capture_output=True, timeout=TIME_TO_START,
    )  # fmt: skip
