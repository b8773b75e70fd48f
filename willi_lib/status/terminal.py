"""`willi.py top`: the status page in a terminal, drawn from /status.json as it comes.

The texts are as others have said them: only `drawn` makes of a line what the terminal gets, gives it the colour of its
mark, and makes visible what cannot be seen. No control sequence that a client has sent gets through.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
import sys
import termios
import tty
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, SimpleNamespace

from ..config import Settings
from ..hosts import Address
from ..text import can_draw, visible, wants_colours
from . import overview as state
from . import words
from .charts import last_hour
from .finding import Level
from .overview import Overview
from .totals import MINUTES

EVERY = 2.0  # seconds
PATIENCE = 5.0  # seconds for a whole answer
MOST_OCTETS = 8 << 20  # of an answer; the usual one has some 40 kB
WIDE = 120  # columns, where the terminal does not say

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the alternate screen, without a cursor
COLOURS = {
    "": "", "ok": "\x1b[32m", "warn": "\x1b[33m", "wrong": "\x1b[1;31m", "quiet": "\x1b[2m",
    "well": "\x1b[1;30;42m", "ill": "\x1b[1;37;41m",
}  # fmt: skip
PLAIN = "\x1b[0m"
MARKS = {"sessions": "", "accepted": "ok", "rejected": "warn", "refused": "warn", "failed": "wrong"}  # of the charts
BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"

# Titles and widths of the tables in columns; below 0 for what stands at the right, 0 for what has the rest of the line
HOSTS = {"UPSTREAM": 28, "STATE": 13, "CONNECT": -8, "ACCEPTED": -11, "REJECTED": -11, "TRAFFIC": -9, "LAST ERROR": 0}
MAPPINGS = {
    "MAPPING": 28, "STATE": 10, "PATTERNS": -9, "LOOK-UPS": -11, "HITS": -6, "ERRORS": -7, "TIME": -8, "LAST ERROR": 0,
}  # fmt: skip
LIMITS = {"LIMIT": 28, "IN USE": -22, "TURNED AWAY": -13}
CERTIFICATES = {"CERTIFICATE": 34, "ENDS": 20, "NAMES": 0}
EVENTS = {"TIME": 9, "SESSION": 12, "WHAT": 21, "FROM AND TO": 0, "REPLY": 0, "CLIENT, UPSTREAM": 0}

Line = tuple[str, str]  # text, and its mark: a key of COLOURS
Row = tuple[Level, tuple[str, ...]]  # of a table: how good it is, and its cells


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
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not can_draw(sys.stdout, os.environ):
        print("\n".join(line.rstrip() for line in drawn(overview, shutil.get_terminal_size((WIDE, 0)).columns)))
        return 0
    with suppress(KeyboardInterrupt), _screen():  # Ctrl-C is the usual end
        _watch(address, overview)
    return 0


def fetch(address: Address) -> Overview:
    """Ask for /status.json. Raises Unanswered."""
    where = f"http://{address.here}/status.json"
    connection = http.client.HTTPConnection(address.here.host, address.port, timeout=PATIENCE)
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
        overview: Overview = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
        drawn(overview, WIDE)  # what can be drawn once can be drawn again
        return overview
    except Exception as error:  # all that drawing what is no overview may raise
        raise Unanswered(
            f"{where}: {words.shorten(str(error), 200)}\n"
            "Another program answers there, or another version of Willi: restart it, or choose another status_listen."
        ) from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """For the whole block, however slowly the octets come. Raises TimeoutError."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# The terminal


def _watch(address: Address, overview: Overview) -> None:
    """Draw and ask again, until q or Ctrl-C. Without an answer the last overview stays, and says so."""
    keyboard = [sys.stdin] if sys.stdin.isatty() else []
    fault = ""
    while True:
        width, height = shutil.get_terminal_size()
        lines = drawn(overview, width, height, fault, wants_colours(sys.stdout, os.environ))
        # Each line is cleared before it is written: after the last column this would take a character away.
        cleared = ["\x1b[K" + line for line in [*lines, *[""] * (height - len(lines))]]
        sys.stdout.write("\x1b[H" + "\r\n".join(cleared))
        sys.stdout.flush()
        ready, _, _ = select.select(keyboard, [], [], EVERY)
        if ready and os.read(sys.stdin.fileno(), 1) == b"q":
            return
        try:
            overview, fault = fetch(address), ""
        except Unanswered as error:
            fault = str(error).splitlines()[0]


@contextmanager
def _screen() -> Iterator[None]:
    """The alternate screen, and keys that are not shown; all is as before at the end, however it comes."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard is not None else None
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would leave the shell in our screen
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


# Lines


def drawn(
    overview: Overview, width: int, height: int | None = None, fault: str = "", colour: bool = False
) -> list[str]:
    """The lines as the terminal gets them. height: at most so many. fault: why there is no newer overview."""
    bars = BARS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BARS
    lines = [(cut(visible(text), width), mark) for text, mark in view(overview, height, fault, bars)]
    return [f"{COLOURS[mark]}{text}{PLAIN}" if colour and mark and text else text for text, mark in lines]


def view(overview: Overview, height: int | None = None, fault: str = "", bars: str = BARS) -> list[Line]:
    """The lines, at most `height`; None: all of them. fault: why there is no newer overview."""
    # The lines that belong together, and how many of them there must and may be if there is little room.
    blocks: list[tuple[list[Line], int, int]] = [
        (_head(overview, fault), 3, 3),
        (_problems(overview), 5, 16),
        (_hour(overview, bars), 6, 6),
        (_table(HOSTS, _hosts(overview)), 4, 10),
        (_table(MAPPINGS, _mappings(overview)), 3, 8),
        (_table(LIMITS, _limits(overview)), 0, 6),
        (_table(CERTIFICATES, _certificates(overview)), 0, 6),
        (_table(EVENTS, _events(overview)), 8, 1000),
    ]
    if height is None:
        return [line for lines, _, _ in blocks for line in lines]
    room = height - sum(min(len(lines), least) for lines, least, _ in blocks)
    shown: list[Line] = []
    for lines, least, most in blocks:
        least = min(len(lines), least)
        more = min(len(lines) - least, most - least, max(room, 0))
        count = least + more
        if count > 1:  # a title alone says nothing
            room -= more
            hidden = sum(1 for text, _ in lines[count - 1 :] if text) if count < len(lines) else 0
            shown += [*lines[: count - 1], (f"  … {hidden} more", "quiet")] if hidden else lines[:count]
    return shown[:height]


def _head(overview: Overview, fault: str) -> list[Line]:
    now = overview.now
    since = f"up {words.duration(now - overview.started)}, workers {overview.workers} of {overview.workers_wanted}"
    name = f"Willi {overview.version}  {words.shorten(overview.domain, 60)}"
    first = f" {state.headline(overview)}  {name}  {words.clock(now, now)} UTC  {since}"
    lines = [(first, "ill" if overview.problems else "well"), ("", "")]
    if fault:
        lines.insert(1, (f" No newer answer: {fault} ", "ill"))
    return lines


def _problems(overview: Overview) -> list[Line]:
    lines: list[Line] = [(f"  {problem.subject}: {problem.what}", problem.level) for problem in overview.problems]
    lines += [(f"  {hint}", "warn") for hint in state.advice(overview)]
    return [*lines, ("", "")] if lines else []


def _hour(overview: Overview, bars: str) -> list[Line]:
    hour = last_hour(overview.minutes)
    notes = {
        "sessions": f"{words.number(overview.sessions)} open now",
        "rejected": f"{words.number(hour['rejected'].sums['upstream'])} by upstreams",
    }
    lines = []
    for name, chart in hour.items():
        text = f"{chart.name.lower():12}{words.number(chart.sum):>7} {_spark(chart.counts, bars)} {notes.get(name, '')}"
        lines.append((text, MARKS[name] if chart.sum else ""))
    return [*lines, ("", "")]


def _spark(counts: Sequence[int], bars: str) -> str:
    """The last hour in a line, a character for each minute."""
    highest = max(counts, default=0)
    steps = len(bars) - 1
    return "".join(bars[-(-count * steps // highest)] if count else bars[0] for count in counts).rjust(MINUTES)


# Tables


def _table(titles: Mapping[str, int], rows: Iterable[Row]) -> list[Line]:
    lines = [("".join(map(_cell, titles, titles.values())), "quiet")]
    for level, cells in rows:
        lines.append(("".join(map(_cell, cells, titles.values())), "" if level == "ok" else level))
    return [*lines, ("", "")] if len(lines) > 1 else []


def _cell(text: str, width: int) -> str:
    """Exactly so many columns; a blank at the end, or two before the rest of the line, are among them."""
    if width == 0:
        return f"  {text}" if text else ""
    if width < 0:
        return f"{text:>{-width}}"
    text = cut(visible(text), width - 1)
    return text + " " * (width - columns(text))


def _hosts(overview: Overview) -> Iterator[Row]:
    for host in overview.hosts:
        level, text = state.host_state(host, overview.now)
        at = f"{words.clock(host.last_error_at, overview.now)} " if host.last_error_at is not None else ""
        yield level, (
            host.name, text, words.duration(host.connect_seconds), words.number(host.accepted),
            words.number(host.rejected), words.size(host.octets), at + host.last_error,
        )  # fmt: skip


def _mappings(overview: Overview) -> Iterator[Row]:
    for mapping in overview.mappings:
        level, text = state.mapping_state(mapping)
        yield level, (
            mapping.name, text, words.number(mapping.patterns), words.number(mapping.lookups),
            words.share(mapping.hits, mapping.lookups), words.number(mapping.errors),
            words.duration(mapping.lookup_seconds), mapping.last_error,
        )  # fmt: skip


def _limits(overview: Overview) -> Iterator[Row]:
    for limit in overview.limits:
        level, used = state.limit_state(limit)
        yield level, (limit.name, used, words.number(limit.refused))


def _certificates(overview: Overview) -> Iterator[Row]:
    for certificate in overview.certificates:
        level, text = state.certificate_state(certificate, overview.now)
        yield level, (certificate.file, text, ", ".join(certificate.names))


def _events(overview: Overview) -> Iterator[Row]:
    for event in overview.events:
        reply, reason = state.reply_and_reason(event)
        way = "" if event.kind == "refused" else f"{event.sender or '<>'} → {event.recipients}"
        others = (event.client, event.upstream, words.shorten(reason, 100))
        yield state.event_level(event), (
            words.clock(event.at, overview.now)[-8:], event.sid, f"{event.kind} {state.refused_by(event)}",
            words.shorten(way, 50), words.shorten(reply, 80), "  ".join(filter(None, others)),
        )  # fmt: skip


# Columns of a terminal


def columns(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_column, text))


def _column(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    if columns(text) <= width:
        return text
    kept, used = [], 1  # the dots
    for character in text:
        used += _column(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + "…" if width > 0 else ""
