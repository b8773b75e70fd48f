"""`willi.py top`: the status page in a terminal.

Only `_drawn` turns a line into what the terminal gets, and it makes visible what cannot be seen: no control sequence
that a client has sent gets through.
"""

from __future__ import annotations

import http.client
import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..config import Settings
from ..hosts import Address
from ..text import visible, wants_colours
from . import plain, words
from .lines import ASCII_BARS, BARS, Line, columns, cut, view
from .overview import Overview

EVERY = 2.0  # seconds
PATIENCE = 5.0  # seconds for a whole answer
MOST_OCTETS = 8 << 20  # of an answer; the usual one has some 40 kB
WIDE = 120  # columns, where the terminal does not say
HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens everywhere is found here

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the alternate screen, without a cursor
COLOURS = {
    "": "", "ok": "\x1b[32m", "warn": "\x1b[33m", "wrong": "\x1b[1;31m", "quiet": "\x1b[2m", "title": "\x1b[1m",
    "well": "\x1b[1;30;42m", "ill": "\x1b[1;37;41m",
}  # fmt: skip
PLAIN = "\x1b[0m"


class Unanswered(Exception):
    """There is no overview, and why; what to do is in the text."""


def top(settings: Settings) -> int:
    """Show the status until Ctrl-C, or once if stdout is no terminal that can be drawn on; the exit status."""
    address = settings.status_listen
    if address is None or not address.port:
        print(f"{settings.path}: status_listen is not set (or has port 0), so there is no status to show.\n"
              "Set it, such as status_listen = 127.0.0.1:8025, and reload Willi.", file=sys.stderr)  # fmt: skip
        return 1
    try:
        overview = fetch(address)
    except Unanswered as error:
        print(error, file=sys.stderr)
        return 1
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":  # such as a shell inside Emacs
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        width = shutil.get_terminal_size((WIDE, 0)).columns
        print("\n".join(_drawn(line, width, colour=False).rstrip() for line in view(overview, bars=_bars())))
        return 0
    with suppress(KeyboardInterrupt):  # the usual end
        _watch(address, overview)
    return 0


def fetch(address: Address) -> Overview:
    """Ask for /status.json. Raises Unanswered."""
    host = HERE.get(address.host, address.host)
    where = f"http://{Address(host, address.port)}/status.json"
    connection = http.client.HTTPConnection(host, address.port, timeout=PATIENCE)
    try:
        with _time_limit(PATIENCE):
            connection.request("GET", "/status.json")
            response = connection.getresponse()
            text = response.read(MOST_OCTETS)
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(
            f"{where}: {visible(str(error)) or type(error).__name__}\n"
            "Does Willi run, and was it reloaded since status_listen was set? Its log says so."
        ) from error
    finally:
        connection.close()
    try:
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}")
        return plain.parse(text)
    except ValueError as error:
        raise Unanswered(
            f"{where}: {words.shorten(str(error), 200)}\n"
            "Another program answers there, or another version of Willi: restart it, or choose another status_listen."
        ) from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """For the whole block, however slowly the octets come. Raises TimeoutError."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The terminal


def _watch(address: Address, overview: Overview) -> None:
    """Draw and ask again, until q or Ctrl-C. When nobody answers, the last overview stays, and says so."""
    fault = ""
    with _screen():
        while True:
            _draw(overview, fault)
            if _key(EVERY) == "q":
                return
            try:
                overview, fault = fetch(address), ""
            except Unanswered as error:
                fault = str(error).splitlines()[0]


@contextmanager
def _screen() -> Iterator[None]:
    """The alternate screen, and keys that are not shown; all is as before at the end, however it comes."""
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard is not None else None
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would leave the shell in our screen
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if keyboard is not None:
            tty.setcbreak(keyboard)
        sys.stdout.write(ENTER)
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        if keyboard is not None and before is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _key(seconds: float) -> str:
    """The key that is pressed within this time, or nothing."""
    keyboard = [sys.stdin.fileno()] if sys.stdin.isatty() else []
    ready, _, _ = select.select(keyboard, [], [], seconds)
    return os.read(ready[0], 1).decode("ascii", "replace") if ready else ""


def _draw(overview: Overview, fault: str) -> None:
    width, height = shutil.get_terminal_size()
    lines = view(overview, height, fault, _bars())
    colour = wants_colours(sys.stdout, os.environ)
    # Each line is cleared before it is written: after the last column this would take a character away.
    drawn = ["\x1b[K" + _drawn(line, width, colour) for line in lines]
    drawn += ["\x1b[K"] * (height - len(lines))
    sys.stdout.write("\x1b[H" + "\r\n".join(drawn))
    sys.stdout.flush()


def _bars() -> str:
    """What this terminal can show."""
    return BARS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BARS


def _drawn(line: Line, width: int, colour: bool) -> str:
    """The line as the terminal gets it, at most `width` columns."""
    drawn = []
    for text, mark in line:
        shown = cut(visible(text), width)
        width -= columns(shown)
        drawn.append(f"{COLOURS[mark]}{shown}{PLAIN}" if colour and mark and shown else shown)
    return "".join(drawn)
