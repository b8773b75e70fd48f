#!/usr/bin/env python3
"""Willi at work: two upstream servers for two domains, Willi in front of them, three messages.

Usage: demo.py [--once]

It shows what was routed where, what each upstream received and what the client was told, and then waits for mail
that you send by hand, until Ctrl-C. With --once it ends after the three messages; the exit status is 1 if one of them
did not go as it should. WILLI_DEMO_PORT is the port of Willi, 2525 if it is not set.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

try:
    from aiosmtpd.controller import Controller
except ImportError:
    sys.exit("The demo needs the virtual environment: start it with `make demo`.")

ROOT = Path(__file__).resolve().parent
HOST = "127.0.0.1"
PATIENCE = 15.0  # seconds for what takes a tenth of one
SYSTEMD = ("JOURNAL_STREAM", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")  # would be about us, not about our Willi

BOLD, DIM, RED, GREEN, CYAN, MAGENTA = "1", "2", "31", "32", "36", "35"
SENDER = "eva@client.example"
NO_ROUTE = (554, b"5.7.1 Relay access denied")

CONFIG = """\
listen = {host}:{port}
domain = willi.example
drain_timeout = 2s

[mappings]
[[file]]
type = csv
file = upstream_servers.csv
"""
MESSAGE = """\
From: {sender}
To: {recipient}
Subject: Hello {recipient}

A mail of the demo. The next line is a lone dot, which must not end it:
.
Good-bye.
"""


# -- the terminal


class Screen:
    """Lines on stdout, in colour if that is a terminal and NO_COLOR is not set."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = terminal and not os.environ.get("NO_COLOR")
        self.gone = False
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a Subject may have letters that this terminal has not

    def say(self, text: str = "", colour: str = "") -> None:
        """Print one line. A reader that has gone away is no reason to leave a process behind."""
        try:
            print(self.paint(text, colour), flush=True)
        except OSError:  # a closed pipe, or a terminal that was shut
            self.gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def paint(self, text: str, colour: str) -> str:
        """The text in that colour; what a stranger sent cannot do more to the terminal than be read."""
        text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
        return f"\033[{colour}m{text}\033[0m" if colour and self._colour else text


# -- what happens, in the order in which it is shown


@dataclass(frozen=True)
class Mail:
    """A message that an upstream has received."""

    upstream: Upstream
    sender: str
    recipients: tuple[str, ...]
    content: bytes


@dataclass(frozen=True)
class LogLine:
    """Willi has written a line."""

    text: str


@dataclass(frozen=True)
class WilliEnded:
    """And will write no more."""


@dataclass(frozen=True)
class Asked:
    """Somebody wants us to end: Ctrl-C, SIGTERM."""


Event = Mail | LogLine | WilliEnded | Asked
Events = SimpleQueue[Event]  # whose `put` a signal handler may call


class Failed(Exception):
    """The demo cannot go on, or did not show what it should."""


class AskedToEnd(Exception):
    """Not a fault."""


# -- the actors


@dataclass(eq=False)
class Upstream:
    """A mail server for one domain: it takes everything, and shows it."""

    name: str
    colour: str
    events: Events
    port: int = 0
    received: list[Mail] = field(default_factory=list)

    @property
    def domain(self) -> str:
        return f"{self.name}.example"

    async def handle_RCPT(  # noqa: N802 -- aiosmtpd's name
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        """Take every recipient."""
        envelope.rcpt_tos.append(address)
        return f"250 2.1.5 {self.name} knows {address}"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 -- aiosmtpd's name
        """Take every message."""
        mail = Mail(self, envelope.mail_from, tuple(envelope.rcpt_tos), envelope.original_content)
        self.received.append(mail)
        self.events.put(mail)
        return f"250 2.0.0 {self.name} has it, number {len(self.received)}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """It calls itself mail.<domain>: with the name that Willi has, it would look like a loop."""
        with socket.create_server((HOST, 0)) as free:
            self.port = free.getsockname()[1]
        server = Controller(self, hostname=HOST, port=self.port, server_hostname=f"mail.{self.domain}")
        server.start()
        try:
            yield
        finally:
            server.stop()


@contextmanager
def running_willi(config: Path, events: Events) -> Iterator[subprocess.Popen[str]]:
    """The real thing. Ctrl-C does not reach it, so that it is we who end it."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "willi.py"), "-c", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name not in SYSTEMD},
    )
    reader = threading.Thread(target=read_log, args=(process, events))
    reader.start()
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()


def read_log(process: subprocess.Popen[str], events: Events) -> None:
    """Until Willi closes its end of the pipe."""
    assert process.stdout
    with process.stdout:
        for line in process.stdout:
            events.put(LogLine(line.rstrip("\n")))
    events.put(WilliEnded())


@dataclass
class Client:
    """A mail client that notes what it is told."""

    port: int
    told: list[tuple[str, int, bytes]] = field(default_factory=list)  # command, code, text

    def send(self, recipient: str, content: str) -> tuple[int, bytes]:
        """The whole dialogue for one message; the last answer before QUIT. Raises OSError, smtplib.SMTPException."""
        with smtplib.SMTP(HOST, self.port, "client.example", PATIENCE) as server:
            self.note("EHLO client.example", server.ehlo())
            self.note(f"MAIL FROM:<{SENDER}>", server.mail(SENDER))
            answer = self.note(f"RCPT TO:<{recipient}>", server.rcpt(recipient))
            if answer[0] == 250:
                answer = self.note("DATA, and the message", server.data(content))
        return answer

    def note(self, command: str, answer: tuple[int, bytes]) -> tuple[int, bytes]:
        self.told.append((command, *answer))
        return answer


# -- the play


class Demo:
    """Everything is shown from here, in one thread: the others only report what happened."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.events: Events = SimpleQueue()
        self.screen = Screen()
        self.last_error = ""
        self.upstreams = [Upstream("east", CYAN, self.events), Upstream("west", MAGENTA, self.events)]

    def run(self, once: bool) -> None:
        """Raises Failed, AskedToEnd."""
        with ExitStack() as running:
            for upstream in self.upstreams:
                running.enter_context(upstream.running())
            config = self.write_files(Path(running.enter_context(tempfile.TemporaryDirectory(prefix="willi-demo-"))))
            willi = running.enter_context(running_willi(config, self.events))
            self.wait_until_ready(willi)
            for number, name in enumerate(("east", "west", "north"), 1):
                self.show_one(number, f"ann@{name}.example")
            self.say("\nAll three went as they should.", GREEN)
            if not once:
                self.wait_for_mail()

    def say(self, text: str = "", colour: str = "") -> None:
        self.screen.say(text, colour)
        if self.screen.gone:
            raise AskedToEnd

    def row(self, who: str, text: str, colour: str = "") -> None:
        self.say(f"  {who:<7} {text}", colour)

    def write_files(self, folder: Path) -> Path:
        """willi.conf and its CSV; both are shown."""
        table = ["pattern;server;tls_verify"]
        table += [f"{upstream.domain};{HOST}:{upstream.port};false" for upstream in self.upstreams]
        (folder / "upstream_servers.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
        (folder / "willi.conf").write_text(CONFIG.format(host=HOST, port=self.port), encoding="utf-8")
        self.say(f"Willi listens on {HOST}:{self.port}. Two mail servers stand behind it, one for each domain.", BOLD)
        for name in ("willi.conf", "upstream_servers.csv"):
            self.say(f"\n{folder / name}", BOLD)
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                self.say(f"  {line}")
        return folder / "willi.conf"

    def wait_until_ready(self, willi: subprocess.Popen[str]) -> None:
        self.say("\nThe log of Willi", BOLD)
        try:
            self.show_until("msg=Ready")
        except WilliGone as gone:
            if willi.wait(PATIENCE) != 3:
                raise
            raise Failed(
                f"Willi cannot have port {self.port}: {gone.last_error}.\n"
                f"Choose another port, for example: WILLI_DEMO_PORT={min(max(self.port, 2525), 65534) + 1} make demo"
            ) from None

    def show_one(self, number: int, recipient: str) -> None:
        """Send a message; show and verify what became of it."""
        upstream = next((one for one in self.upstreams if recipient.endswith(f"@{one.domain}")), None)
        content = MESSAGE.format(sender=SENDER, recipient=recipient)
        before = {one: len(one.received) for one in self.upstreams}
        client = Client(self.port)
        self.say(f"\n{number}. A mail to {recipient}", BOLD)
        try:
            outcome = client.send(recipient, content)
        except (OSError, smtplib.SMTPException) as error:
            raise Failed(f"The client failed: {error!r}") from None
        for command, code, text in client.told:
            self.row("client", command)
            first, *more = text.decode("utf-8", "replace").splitlines() or [""]
            self.row("", f"    {code} {first}" + (f"  (and {len(more)} extensions)" if more else ""), colour_of(code))
        self.show_until(f"to={recipient}")
        new = [mail for one in self.upstreams for mail in one.received[before[one] :]]
        self.verify(upstream, recipient, content, outcome, new)

    def verify(
        self, upstream: Upstream | None, recipient: str, content: str, outcome: tuple[int, bytes], new: list[Mail]
    ) -> None:
        """Raises Failed."""
        if upstream is None:
            good = outcome == NO_ROUTE and not new
        else:
            octets = content.replace("\n", "\r\n").encode()
            own_words = f"2.0.0 {upstream.name} has it, number {len(upstream.received)}".encode()
            good = outcome == (250, own_words) and new == [Mail(upstream, SENDER, (recipient,), octets)]
        if not good:
            raise Failed(f"This is not what should happen to a mail to {recipient}.")

    def wait_for_mail(self) -> None:
        """Show whatever comes, until somebody has enough."""
        self.say("\nNow you. Type this in another terminal:", BOLD)
        for line in try_lines(self.port):
            self.say(f"  {line}", GREEN)
        self.say("Every mail is shown here. Ctrl-C ends the demo and removes its files.\n")
        while True:
            self.show(self.events.get())

    # What happened

    def show_until(self, text: str) -> None:
        """Show what happens up to a log line with this text. Raises Failed, AskedToEnd."""
        while True:
            try:
                event = self.events.get(timeout=PATIENCE)
            except Empty:
                raise Failed(f"Not in Willi's log after {PATIENCE:g} seconds: {text}") from None
            self.show(event)
            if isinstance(event, LogLine) and text in event.text.split():
                return

    def show(self, event: Event) -> None:
        """Raises Failed, AskedToEnd."""
        if isinstance(event, Mail):
            self.show_mail(event)
        elif isinstance(event, LogLine):
            self.show_line(event.text)
        elif isinstance(event, WilliEnded):
            raise WilliGone(self.last_error)
        else:
            raise AskedToEnd

    def show_line(self, line: str) -> None:
        """A line of Willi's log, and what it means if it is about a mail."""
        self.row("log", line, DIM)
        fields = dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^" ]*)', line))
        self.last_error = fields.get("error", line).strip('"')
        if not fields.get("msg", "").startswith('"Message '):
            return
        recipient, server, why = (fields.get(name, "").strip('"') for name in ("to", "upstream", "error"))
        upstream = next((one.name for one in self.upstreams if server == f"{HOST}:{one.port}"), server)
        if not why:
            self.row("willi", f"{recipient}: routed to {server}, which is {upstream}", GREEN)
        else:
            self.row("willi", f"{recipient}: {f'not taken by {upstream}' if server else 'not routed'}: {why}", RED)

    def show_mail(self, mail: Mail) -> None:
        """Envelope and subject."""
        upstream = mail.upstream
        subject = re.search(rb"(?im)\A(?:.+\r\n)*?subject:[ \t]*(.*?)\r$", mail.content)
        self.row(upstream.name, f"received {len(mail.content)} octets", upstream.colour)
        self.row("", f"    from <{mail.sender}> to {', '.join(f'<{one}>' for one in mail.recipients)}", upstream.colour)
        if subject:
            self.row("", f"    Subject: {subject[1].decode('utf-8', 'replace')}", upstream.colour)


class WilliGone(Failed):
    """It was not we who ended it."""

    def __init__(self, last_error: str) -> None:
        super().__init__(f"Willi has ended: {last_error}")
        self.last_error = last_error


def colour_of(code: int) -> str:
    return GREEN if code < 400 else RED


def try_lines(port: int) -> list[str]:
    """One line, and for telnet what to type next."""
    if shutil.which("telnet") and not shutil.which("swaks"):
        dialogue = ["EHLO me.example", "MAIL FROM:<me@me.example>", "RCPT TO:<bob@west.example>", "DATA", "Hello!", "."]
        return [f"telnet {HOST} {port}", *(f"    {line}" for line in dialogue)]
    line = f"swaks --server {HOST}:{port} --from me@me.example --to bob@west.example"
    return [line] if shutil.which("swaks") else [line, "(swaks is not installed here: the package is called swaks)"]


def port_wanted() -> int:
    """Raises Failed."""
    text = os.environ.get("WILLI_DEMO_PORT") or "2525"
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Failed(f"WILLI_DEMO_PORT must be a port, not {text!r}.")
    return int(text)


def usage() -> NoReturn:
    print(__doc__)
    sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)


def main() -> int:
    """The exit status."""
    if sys.argv[1:] not in ([], ["--once"]):
        usage()
    once = sys.argv[1:] == ["--once"]
    screen = Screen()
    try:
        demo = Demo(port_wanted())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: demo.events.put(Asked()))
        demo.run(once)
    except AskedToEnd:
        screen.say("\nThe demo has ended; nothing of it is left.")
        return 1 if once else 0  # --once has promised an outcome
    except Failed as failure:
        screen.say(f"\n{failure}", RED)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
