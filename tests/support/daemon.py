"""The real willi.py as a process of its own, with a configuration from the test and its log in a file."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from configobj import ConfigObj

from tests.support import forked
from tests.support.client import Client
from tests.support.examples import THOROUGH
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port, wait_until

PYTHON = os.environ.get("WILLI_PYTHON", sys.executable)
PROBE_ADDRESS = "127.255.255.254"  # limits per address do not see the probe of start_willi
LEFT_OPEN = 5.0  # seconds for what a test left open, when it is over
TIME_TO_STOP = PATIENCE + 15  # seconds from SIGTERM; a running transaction may take its drain_timeout

Setting = str | int | float | bool | Sequence[str] | Mapping[str, "Setting"]

_FIELD = re.compile(r'([A-Za-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^" ]*)(?: |$)')
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


def parse_logfmt(line: str) -> dict[str, str]:
    """The fields of one line. Raises AssertionError if it is not logfmt from end to end, or names a field twice."""
    fields: dict[str, str] = {}
    position = 0
    while position < len(line):
        found = _FIELD.match(line, position)
        assert found, f"not logfmt at character {position}: {line!r}"
        key, value = found.groups()
        assert key not in fields, f"{key} twice: {line!r}"
        fields[key] = _ESCAPE.sub(_unescape, value[1:-1]) if value.startswith('"') else value
        position = found.end()
    return fields


def _unescape(escape: re.Match[str]) -> str:
    octet, character, far_character, letter = escape.groups()
    return chr(int(octet or character or far_character, 16)) if letter is None else _LETTERS.get(letter, letter)


def write_config(path: Path, settings: Mapping[str, Setting]) -> Path:
    """A willi.conf; a mapping inside `settings` becomes a section."""
    config = ConfigObj(_plain(settings), interpolation=False, encoding="utf-8")
    config.filename = str(path)
    config.write()
    return path


def _plain(value: Setting) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bool):
        return "yes" if value else "no"
    return list(value) if isinstance(value, list | tuple) else str(value)


def run_willi(
    *arguments: str | Path, stdin: BinaryIO | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `willi.py` with these arguments to its end: for check, lookup, and files that are refused.

    environment: besides ours; with it Willi is not forked.
    """
    words = [str(argument) for argument in arguments]
    variables = {**willi_environment(), **(environment or {})}
    if environment or THOROUGH:
        command = [PYTHON, str(ROOT / "willi.py"), *words]
        return subprocess.run(
            command, stdin=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False, env=variables
        )
    kind = forked.CHECK if words[:1] in (["check"], ["lookup"]) else forked.DAEMON
    return forked.run(kind, words, variables, PATIENCE, stdin)


OWN_INTERPRETER = ("env",)  # a prefix: Willi is started as users start it, not forked

# A pipe without a writer stands in for a file on a dead server, if Willi takes it for a file.
PIPES_HANG: dict[str, object] = {"files.REGULAR": (stat.S_IFREG, stat.S_IFIFO)}


def in_a_hurry(**constants: object) -> list[str]:
    """A prefix for the command: changes constants, as `master.TICK`, in the program. An unknown one ends it."""
    modules = ["from willi_lib.processes import child, master", "from willi_lib import files"]
    lines = ["import runpy, sys", *modules, "from willi_lib.mappings import csv_file"]
    program = "\n".join([*lines, *(f"{name}; {name} = {value}" for name, value in constants.items()), ""])
    run = "sys.argv = sys.argv[2:]; sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"
    return [PYTHON, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}{run}"]


def willi_environment() -> dict[str, str]:
    """Ours, with one authority only, and without what would make the daemon believe that systemd started it."""
    ours = {k: v for k, v in os.environ.items() if k not in ("JOURNAL_STREAM", "NOTIFY_SOCKET", "LISTEN_FDS")}
    return {**_one_authority(), **ours}


@cache
def _one_authority() -> dict[str, str]:
    """OpenSSL's variable for a file with the first authority of this system: all of them take a tenth of a start."""
    from tests.runner.plugin import run_directory  # not before pytest has loaded it as its plugin

    system = Path(ssl.get_default_verify_paths().openssl_cafile)
    if not system.exists():  # they are in a directory, and read one by one
        return {}
    first, end, _ = system.read_text(encoding="utf-8").partition("-----END CERTIFICATE-----\n")
    file = run_directory() / f"authority-{os.getpid()}.pem"
    file.write_text(first + end, encoding="utf-8")
    return {"SSL_CERT_FILE": str(file)}


class Willi:
    """A running daemon. `directory` keeps its file, its CSV and its log."""

    def __init__(
        self, directory: Path, settings: Mapping[str, Setting], prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None, options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """settings: as in willi.conf; `listen` is a free loopback port unless given.

        prefix: put before the command. environment: besides ours. options: of the command line. With one of the first
        two it is an interpreter of its own, else see forked.py.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        defaults: dict[str, Setting] = {
            "listen": f"{HOST}:{self.port}", "domain": "willi.example", "workers": 1,
        }  # fmt: skip
        self.settings: dict[str, Setting] = {**defaults, **settings}
        self.config = write_config(directory / "willi.conf", self.settings)
        self.log_file = directory / "willi.log"
        self.tolerated: list[str] = []
        self._log_begins = self._log_read = 0  # octets
        self._lines: list[dict[str, str]] = []  # of what was read
        self._reading = threading.Lock()
        self._environment = {**willi_environment(), **(environment or {})}
        self._arguments = ["-c", str(self.config), *options]
        self._prefix = prefix
        self._may_be_forked = not (prefix or environment or THOROUGH)
        self.start()

    def _start(self, log: BinaryIO) -> subprocess.Popen[bytes] | forked.Forked:
        with Path(os.devnull).open("rb") as nothing:
            if self._may_be_forked:
                standard = nothing.fileno(), log.fileno(), log.fileno()
                return forked.Forked(forked.DAEMON, self._arguments, standard, self._environment)
            command = [*self._prefix, PYTHON, str(ROOT / "willi.py"), *self._arguments]
            return subprocess.Popen(command, stdin=nothing, stdout=log, stderr=log, env=self._environment)

    def start(self, seconds: float = PATIENCE) -> None:
        """Also for a second time, after stop() or a kill: the log goes on in the same file.

        seconds: until it must be ready.
        """
        ready = len(self.lines(msg="Ready")) if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = self._start(log)
        try:
            wait_until(lambda: self._is_up(ready), "a line with msg=Ready in Willi's log", seconds)
        except AssertionError:
            self.kill()
            raise

    def _is_up(self, ready: int) -> bool:
        assert self.process.poll() is None, f"willi.py ended with {self.process.returncode}:\n{self.text}"
        return len(self.lines(msg="Ready")) > ready

    def probe(self) -> None:
        """A whole session without a message, from an address of its own."""
        with Client(self.port, source=PROBE_ADDRESS) as client:
            assert client.read_reply().code == 220
            assert client.command(b"QUIT").code == 221
            client.expect_eof()

    @property
    def csv(self) -> Path:
        """The file of the CSV mapping that start_willi(csv=...) wrote."""
        return self.directory / "upstream_servers.csv"

    def replace_csv(self, text: str) -> None:
        """As an administrator should: a new file, renamed. It is read within five seconds."""
        new = self.csv.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        while new.stat().st_ctime_ns == new.stat().st_mtime_ns:  # else it could be one that is written in place
            new.chmod(0o644)
        new.replace(self.csv)

    # Processes

    @property
    def workers(self) -> list[int]:
        """The pids of the workers, those that drain included."""
        return [pid for pid in self.children if self.name_of(pid) == "willi-worker"]

    @staticmethod
    def name_of(pid: int) -> str:
        """As ps and top show it; empty if it has gone."""
        try:
            return Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return ""

    @property
    def children(self) -> list[int]:
        """The pids of the master's children."""
        pid = self.process.pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []

    @property
    def sockets(self) -> int:
        """How many the workers have, for clients, upstreams and themselves."""
        count = 0
        for pid in self.workers:
            with suppress(FileNotFoundError):  # it has ended
                for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(FileNotFoundError):  # this one has, and the others count all the same
                        count += str(descriptor.readlink()).startswith("socket:")
        return count

    def reload(self, settings: Mapping[str, Setting] | None = None) -> None:
        """Change some settings, send SIGHUP, and wait until only the new workers take clients."""
        self.change(settings or {})
        reloads, draining = self.lines(msg="Reloaded"), len(self.lines(msg="Draining"))
        old = int([*self.lines(msg="Ready"), *reloads][-1]["workers"])
        self.signal(signal.SIGHUP)
        self.wait_for_log(msg="Reloaded", count=len(reloads) + 1, seconds=PATIENCE)
        self.wait_for_log(msg="Draining", count=draining + old)

    def wait_for_reload(self, count: int = 1) -> None:
        """Wait until so many reloads since the start are over, and only the new workers take clients.

        "Reloaded" alone is too early: a worker that has just been told to drain may still accept one.
        """
        self.wait_for_log(msg="Reloaded", count=count)
        before = [*self.lines(msg="Ready"), *self.lines(msg="Reloaded")][:count]
        self.wait_for_log(msg="Draining", count=sum(int(line["workers"]) for line in before))

    def change(self, settings: Mapping[str, Setting]) -> None:
        """Have a new file, with some settings changed."""
        self.settings.update(settings)
        write_config(self.config.with_suffix(".new"), self.settings).replace(self.config)

    # Clients

    def connect(self, source: str = "", greeting: bool = True) -> Client:
        """A raw client; `greeting`: whose 220 was read already."""
        client = Client(self.port, source=source)
        if greeting:
            reply = client.read_reply()
            assert reply.code == 220, reply
        return client

    def client(self, source: str = "") -> smtplib.SMTP:
        """The standard library's client; HELO name c.example."""
        return smtplib.SMTP(
            HOST, self.port, local_hostname="c.example", timeout=PATIENCE,
            source_address=(source, 0) if source else None,
        )  # fmt: skip

    # The log

    @property
    def text(self) -> str:
        return self.log_file.read_bytes()[self._log_begins :].decode(errors="backslashreplace")

    def forget_log(self) -> None:
        """What it has so far, and what it may have, is of another test."""
        self._begin_log(self.log_file.stat().st_size)
        self.tolerated = []

    def change_log(self, file: Path) -> None:
        """The next start writes there; the lines of the old file are no longer read."""
        self.log_file = file
        self._begin_log(0)

    def _begin_log(self, octets: int) -> None:
        with self._reading:
            self._log_begins = self._log_read = octets
            self._lines = []

    @property
    def log(self) -> list[dict[str, str]]:
        """All complete lines, each as its fields. What is not logfmt (a traceback) is an AssertionError."""
        with self._reading:  # a test may wait in several threads; and it asks so often that only what is new is read
            with self.log_file.open("rb") as file:
                file.seek(self._log_read)
                *lines, rest = (octets := file.read()).split(b"\n")
            self._lines += [parse_logfmt(line.decode(errors="backslashreplace")) for line in lines]
            self._log_read += len(octets) - len(rest)
            return [line.copy() for line in self._lines]

    def lines(self, **fields: str) -> list[dict[str, str]]:
        """Those lines that have all these fields."""
        return [line for line in self.log if fields.items() <= line.items()]

    def wait_for_log(self, seconds: float = PATIENCE, count: int = 1, **fields: str) -> dict[str, str]:
        """Wait for the line (or the count-th one) with these fields, and return it."""
        wait_until(lambda: len(self.lines(**fields)) >= count, f"log line {count} with {fields}", seconds)
        return self.lines(**fields)[count - 1]

    # The end

    def tolerate(self, text: str) -> None:
        """Error lines that contain this text are what the test is about."""
        self.tolerated.append(text)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = TIME_TO_STOP) -> int:
        """The exit code, when it has ended."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        """SIGTERM; it must end with 0 and must not have logged an error that the test did not tolerate."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            code = self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still there {TIME_TO_STOP:g} s after SIGTERM") from None
        assert code == 0, f"exit code {code}"
        self.check_log()

    def end(self) -> None:
        """Stop it unless the test has, and look at its log either way; what is still open is waited for briefly."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.wait(LEFT_OPEN)
            self.stop()  # a second signal ends all sessions
        else:
            self.check_log()

    def check_log(self) -> None:
        """Only logfmt in it, and no error that the test did not tolerate."""
        for line in self.log:
            if line.get("lvl") == "error" or "traceback" in line:
                assert any(text in str(line) for text in self.tolerated), f"an error in Willi's log: {line}"

    def kill(self) -> None:
        """SIGKILL to the master and its children, for tests and for clearing away."""
        children = self.children
        self.process.kill()
        self.process.wait()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
