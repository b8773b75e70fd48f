#!/usr/bin/env python3
"""Willi at work: two upstream servers for two domains, Willi in front of them, three messages.

It shows what was routed where, what each upstream received and what the client was told, and then waits for mail
that you send by hand, until Ctrl-C. With --once it ends after the three messages; the exit status is 1 if one of them
did not go as it should. WILLI_DEMO_PORT is the port of Willi, 2525 if it is not set.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

try:
    from aiosmtpd.controller import Controller
except ImportError:
    sys.exit("The demo needs the virtual environment: start it with `make demo`.")

ROOT = Path(__file__).resolve().parent
HOST = "127.0.0.1"
PATIENCE = 15.0  # seconds for what takes a tenth of one
CANNOT_LISTEN = 3  # exit status of Willi
SYSTEMD = ("JOURNAL_STREAM", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")  # would be about us, not about our Willi

BOLD, DIM, RED, GREEN, CYAN, MAGENTA = "1", "2", "31", "32", "36", "35"
COLOURED = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")

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


Events = SimpleQueue[Callable[[], None]]  # what the main thread does next; a signal handler may call its `put`


class Failed(Exception):
    """The demo cannot go on, or did not show what it should."""


class WilliEnded(Failed):
    """The demo did not ask it to."""


class AskedToEnd(Exception):
    """By Ctrl-C, a signal, or because nothing reads what the demo shows."""


def ask_to_end(*_: object) -> None:
    raise AskedToEnd


def say(text: str = "", colour: str = "") -> None:
    """Print one line. What a stranger sent cannot do more to the terminal than be read."""
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    try:
        print(f"\033[{colour}m{text}\033[0m" if colour and COLOURED else text, flush=True)
    except OSError:  # a closed pipe, or a terminal that was shut
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise AskedToEnd from None


def row(name: str, text: str, colour: str = "") -> None:
    say(f"  {name:<7} {text}", colour)


@dataclass(eq=False)
class Upstream:
    """A mail server for one domain, which takes everything."""

    name: str
    colour: str
    events: Events
    port: int = 0
    received: list[Any] = field(default_factory=list)  # envelopes of aiosmtpd

    def start(self) -> Controller:
        with socket.create_server((HOST, 0)) as free:
            self.port = free.getsockname()[1]
        # With the name that Willi has it would look like a loop.
        controller = Controller(self, hostname=HOST, port=self.port, server_hostname=f"mail.{self.name}.example")
        controller.start()
        return controller

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 -- aiosmtpd's name
        self.received.append(envelope)
        self.events.put(partial(self.show, envelope))
        return f"250 2.0.0 {self.name} has it, number {len(self.received)}"

    def show(self, envelope: Any) -> None:
        content = envelope.original_content
        subject = re.search(rb"(?im)\A(?:.+\r\n)*?subject:[ \t]*(.*?)\r$", content)
        row(self.name, f"received {len(content)} octets", self.colour)
        row("", f"    from <{envelope.mail_from}> to <{'>, <'.join(envelope.rcpt_tos)}>", self.colour)
        if subject:
            row("", f"    Subject: {subject[1].decode('utf-8', 'replace')}", self.colour)


class Demo:
    """Everything is shown in the main thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.events: Events = SimpleQueue()
        self.upstreams = [Upstream("east", CYAN, self.events), Upstream("west", MAGENTA, self.events)]
        self.last_line = ""
        self.last_error = ""

    def run(self, once: bool) -> None:
        """Raises Failed, AskedToEnd."""
        with ExitStack() as ends:
            for upstream in self.upstreams:
                ends.callback(upstream.start().stop)
            config = self.write_files(Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="willi-demo-"))))
            self.start_willi(config, ends)
            for number, name in enumerate(("east", "west", "north"), 1):
                say(f"\n{number}. A mail to ann@{name}.example", BOLD)
                self.send(name, f"ann@{name}.example")
            say("\nAll three went as they should.", GREEN)
            if not once:
                self.wait_for_mail()

    def write_files(self, folder: Path) -> Path:
        """willi.conf and its CSV; both are shown."""
        rows = [f"{upstream.name}.example;{HOST}:{upstream.port};false\n" for upstream in self.upstreams]
        files = {
            "willi.conf": CONFIG.format(host=HOST, port=self.port),
            "upstream_servers.csv": "pattern;server;tls_verify\n" + "".join(rows),
        }
        say(f"Willi listens on {HOST}:{self.port}. Two mail servers stand behind it, one for each domain.", BOLD)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            say(f"\n{folder / name}", BOLD)
            for line in text.splitlines():
                say(f"  {line}")
        return folder / "willi.conf"

    def start_willi(self, config: Path, ends: ExitStack) -> None:
        """The real one, until it is ready. Ctrl-C does not reach it: the demo ends it."""
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "willi.py"), "-c", str(config)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="backslashreplace", start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in SYSTEMD},
        )  # fmt: skip
        reader = threading.Thread(target=self.read_log, args=(process,))
        ends.callback(stop, process, reader)
        reader.start()
        say("\nThe log of Willi", BOLD)
        try:
            self.show_until("msg=Ready")
        except WilliEnded:
            if process.wait(PATIENCE) != CANNOT_LISTEN:
                raise
            another = min(max(self.port, 2525), 65534) + 1
            raise Failed(
                f"Willi cannot have port {self.port}: {self.last_error}.\n"
                f"Choose another port, for example: WILLI_DEMO_PORT={another} make demo"
            ) from None

    def read_log(self, process: subprocess.Popen[str]) -> None:
        """In a thread, until Willi closes its end of the pipe."""
        assert process.stdout
        with process.stdout as log:
            for line in log:
                self.events.put(partial(self.show_line, line.rstrip("\n")))
        self.events.put(self.willi_has_ended)

    def willi_has_ended(self) -> None:
        raise WilliEnded(f"Willi has ended: {self.last_error}")

    def send(self, name: str, recipient: str) -> None:
        """One message. Raises Failed if it does not arrive at the upstream of this name, or elsewhere."""
        content = MESSAGE.format(sender=SENDER, recipient=recipient)
        before = {upstream: len(upstream.received) for upstream in self.upstreams}
        try:
            answer = talk(self.port, recipient, content)
        except (OSError, smtplib.SMTPException) as error:
            raise Failed(f"The client failed: {error!r}") from None
        self.show_until(f"to={recipient}")
        arrived = [
            (one.name, mail.mail_from, mail.rcpt_tos, mail.original_content)
            for one in self.upstreams
            for mail in one.received[before[one] :]
        ]
        if arrived:
            due = 250, f"2.0.0 {name} has it, number 1".encode()
            good = arrived == [(name, SENDER, [recipient], content.replace("\n", "\r\n").encode())] and answer == due
        else:
            good = name == "north" and answer == NO_ROUTE
        if not good:
            raise Failed(f"This is not what should happen to a mail to {recipient}.")

    def wait_for_mail(self) -> None:
        """Show whatever comes, until AskedToEnd or Failed."""
        say("\nNow you. Type this in another terminal:", BOLD)
        say(f"  swaks --server {HOST}:{self.port} --from me@me.example --to bob@west.example", GREEN)
        say("Every mail is shown here. Ctrl-C ends the demo and removes its files.\n")
        while True:
            self.events.get()()

    def show_until(self, text: str) -> None:
        """Show what happens up to a log line with this text. Raises Failed, AskedToEnd."""
        while text not in self.last_line.split():
            try:
                self.events.get(timeout=PATIENCE)()
            except Empty:
                raise Failed(f"Not in Willi's log after {PATIENCE:g} seconds: {text}") from None

    def show_line(self, line: str) -> None:
        """A line of Willi's log, and what it means if it is about a mail."""
        self.last_line = line
        row("log", line, DIM)
        fields = dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^" ]*)', line))
        self.last_error = fields.get("error", line).strip('"')
        if not fields.get("msg", "").startswith('"Message '):
            return
        recipient, server, why = (fields.get(name, "").strip('"') for name in ("to", "upstream", "error"))
        name = next((one.name for one in self.upstreams if server == f"{HOST}:{one.port}"), server)
        if not why:
            row("willi", f"{recipient}: routed to {server}, which is {name}", GREEN)
        else:
            row("willi", f"{recipient}: {f'not taken by {name}' if server else 'not routed'}: {why}", RED)


def stop(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    reader.join()


def talk(port: int, recipient: str, content: str) -> tuple[int, bytes]:
    """The whole dialogue for one message; the last answer before QUIT. Raises OSError, smtplib.SMTPException."""
    with smtplib.SMTP(HOST, port, "client.example", PATIENCE) as client:
        steps: dict[str, Callable[[], tuple[int, bytes]]] = {
            "EHLO client.example": client.ehlo,
            f"MAIL FROM:<{SENDER}>": lambda: client.mail(SENDER),
            f"RCPT TO:<{recipient}>": lambda: client.rcpt(recipient),
            "DATA, and the message": lambda: client.data(content),
        }
        for command, send in steps.items():
            code, text = send()
            first, *more = text.decode("utf-8", "replace").splitlines() or [""]
            extensions = f"  (and {len(more)} extensions)" if more else ""
            row("client", command)
            row("", f"    {code} {first}{extensions}", GREEN if code < 400 else RED)
            if code >= 400:
                break
    return code, text


def port_wanted() -> int:
    """Raises Failed."""
    text = os.environ.get("WILLI_DEMO_PORT") or "2525"
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Failed(f"WILLI_DEMO_PORT must be a port, not {text!r}.")
    return int(text)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="end after the three messages")
    once = parser.parse_args().once
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a Subject may have letters that this terminal has not
    try:
        demo = Demo(port_wanted())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: demo.events.put(ask_to_end))
        demo.run(once)
    except AskedToEnd:
        say("\nThe demo has ended; nothing of it is left.")
        return 1 if once else 0  # --once has promised an outcome
    except Failed as failure:
        say(f"\n{failure}", RED)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
