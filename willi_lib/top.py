"""`willi.py top`: the status page in a terminal.

A line is a list of pieces, text and mark. Only `_drawn` turns it into octets for a terminal, and it makes visible what
cannot be seen: no control sequence that a client has sent gets through.
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
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from .config import Settings
from .config.values import Address
from .status import plain, words
from .status.overview import Event, Host, Overview, Table

EVERY = 2.0  # seconds
PATIENCE = 5.0  # seconds for a whole answer
MOST_OCTETS = 8 << 20  # of an answer; the usual one has some 40 kB
WIDE = 120  # columns, where the terminal does not say
HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens everywhere is found here

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the alternate screen, without a cursor
COLOURS = {
    "": "", "good": "\x1b[32m", "warn": "\x1b[33m", "bad": "\x1b[1;31m", "quiet": "\x1b[2m", "title": "\x1b[1m",
    "well": "\x1b[1;30;42m", "ill": "\x1b[1;37;41m",
}  # fmt: skip
PLAIN = "\x1b[0m"
BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"

Piece = tuple[str, str]  # text, and a key of COLOURS
Line = Sequence[Piece]


class Unanswered(Exception):
    """There is no overview, and why; what to do is in the text."""


@dataclass(frozen=True)
class Block:
    """Lines that belong together, and how many of them there must and may be if there is little room."""

    lines: Sequence[Line]
    least: int
    most: int


def top(settings: Settings) -> int:
    """Show the status until Ctrl-C, or once if stdout is no terminal; the exit status."""
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
    if not sys.stdout.isatty():
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
            f"{where}: {words.visible(str(error)) or type(error).__name__}\n"
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
    colour = "NO_COLOR" not in os.environ
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
        shown = _cut(words.visible(text), width)
        width -= _columns(shown)
        drawn.append(f"{COLOURS[mark]}{shown}{PLAIN}" if colour and mark and shown else shown)
    return "".join(drawn)


def _columns(text: str) -> int:
    """How many columns of a terminal it takes."""
    return len(text) if text.isascii() else sum(map(_column, text))


def _column(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, width: int) -> str:
    """At most so many columns."""
    if _columns(text) <= width:
        return text
    kept, used = [], 1  # the dots
    for character in text:
        used += _column(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + "…" if width > 0 else ""


# What is shown


def view(overview: Overview, height: int | None = None, fault: str = "", bars: str = BARS) -> list[Line]:
    """The lines, at most `height`; None: all of them. fault: why there is no newer overview."""
    blocks = [
        Block(_head(overview, fault), 2, 3),
        Block(_problems(overview), 5, 16),
        Block(_hour(overview, bars), 6, 6),
        Block(_hosts(overview), 4, 10),
        Block(_tables(overview), 3, 8),
        Block(_limits(overview), 0, 6),
        Block(_certificates(overview), 0, 6),
        Block(_events(overview), 8, 1000),
    ]
    if height is None:
        return [line for block in blocks for line in block.lines]
    room = height - sum(min(len(block.lines), block.least) for block in blocks)
    lines: list[Line] = []
    for block in blocks:
        least = min(len(block.lines), block.least)
        more = min(len(block.lines) - least, block.most - least, max(room, 0))
        count = least + more if least + more > 1 else 0  # a title alone says nothing
        room -= max(count - least, 0)
        lines += _part(block.lines, count)
    return lines[:height]


def _part(lines: Sequence[Line], count: int) -> Sequence[Line]:
    """The first of them; the last line says how many more there are."""
    if count >= len(lines) or count < 2:
        return lines[:count]
    hidden = sum(1 for line in lines[count - 1 :] if line)
    return [*lines[: count - 1], [(f"  … {hidden} more", "quiet")]]


def _head(overview: Overview, fault: str) -> list[Line]:
    now = overview.now
    since = f"up {words.duration(now - overview.started)}, workers {overview.workers} of {overview.workers_wanted}"
    state = (f" {words.headline(overview)} ", "ill" if overview.problems else "well")
    name, domain = (f" Willi {overview.version}  ", "quiet"), (words.shorten(overview.domain, 60), "title")
    lines: list[Line] = [[state, name, domain, (f"  {words.clock(now, now)} UTC  {since}", "quiet")]]
    if fault:
        lines.append([(f" No newer answer: {fault} ", "ill")])
    return [*lines, []]


def _problems(overview: Overview) -> list[Line]:
    if not overview.problems:
        return []
    problems = [[(f"  {problem}", "bad")] for problem in overview.problems]
    return [*problems, *([(f"  {hint}", "warn")] for hint in words.advice(overview)), []]


def _hour(overview: Overview, bars: str) -> list[Line]:
    """A row for each chart of the page."""
    minutes = overview.minutes
    rejected = [minute.rejected_by_upstream + minute.rejected_by_willi for minute in minutes]
    rows = [
        ("sessions", "", [minute.sessions for minute in minutes], f"{words.number(overview.sessions)} open now"),
        ("accepted", "good", [minute.accepted for minute in minutes], ""),
        ("rejected", "warn", rejected, f"{sum(minute.rejected_by_upstream for minute in minutes):,} by upstreams"),
        ("turned away", "warn", [minute.refused for minute in minutes], ""),
        ("failed", "bad", [minute.failed for minute in minutes], ""),
    ]
    lines: list[Line] = [
        [(f"{name:12}{words.number(sum(counts)):>7} ", "title"), (_spark(counts, bars), mark), (f" {note}", "quiet")]
        for name, mark, counts, note in rows
    ]
    return [*lines, []]


def _spark(counts: Sequence[int], bars: str) -> str:
    """The last hour in a line, a character for each minute."""
    highest = max(counts, default=0)
    steps = len(bars) - 1
    return "".join(bars[-(-count * steps // highest)] if count else bars[0] for count in counts).rjust(60)


def _hosts(overview: Overview) -> list[Line]:
    if not overview.hosts:
        return []
    title = f"{'UPSTREAM':28}{'STATE':13}{'CONNECT':>8} {'ACCEPTED':>10} {'REJECTED':>10} {'TRAFFIC':>8}  LAST ERROR"
    more: list[Line] = [[(f"  … {overview.hosts_left_out} more", "quiet")]] if overview.hosts_left_out else []
    return [[(title, "quiet")], *(_host(host, overview.now) for host in overview.hosts), *more, []]


def _host(host: Host, now: float) -> Line:
    connect = words.duration(host.connect_seconds) if host.connect_seconds is not None else ""
    at = f"{words.clock(host.last_error_at, now)} " if host.last_error_at is not None else ""
    return [
        (_cell(host.name, 28), "" if host.up else "bad"),
        (_cell(words.host_state(host, now), 13), "good" if host.up else "bad"),
        (f"{connect:>8} {host.accepted:>10,} {host.rejected:>10,} {words.size(host.octets):>8}  ", ""),
        (at + host.last_error, "quiet" if host.up else "bad"),
    ]


def _tables(overview: Overview) -> list[Line]:
    title = f"{'MAPPING':28}{'STATE':10}{'PATTERNS':>9} {'LOOK-UPS':>10} {'HITS':>5} {'ERRORS':>6} {'TIME':>7}"
    return [[(title + "  LAST ERROR", "quiet")], *map(_table, overview.tables), []]


def _table(table: Table) -> Line:
    mark, state = words.table_state(table)
    patterns = words.number(table.patterns) if table.patterns is not None else ""
    time = words.duration(table.lookup_seconds) if table.lookup_seconds is not None else ""
    counts = f"{table.lookups:>10,} {words.share(table.hits, table.lookups):>5} {table.errors:>6,}"
    return [
        (_cell(table.name, 28), ""),
        (_cell(state, 10), mark),
        (f"{patterns:>9} {counts} {time:>7}  ", ""),
        (table.last_error, "quiet"),
    ]


def _limits(overview: Overview) -> list[Line]:
    title = f"{'LIMIT':28}{'IN USE':>22} {'TURNED AWAY':>12}"
    return [
        [(title, "quiet")],
        *(
            [
                (_cell(limit.name, 28), ""),
                (f"{f'{limit.used:,} of {limit.most:,}':>22} ", words.limit_mark(limit)),
                (f"{limit.refused:>12,}", ""),
            ]
            for limit in overview.limits
        ),
        [],
    ]


def _certificates(overview: Overview) -> list[Line]:
    if not overview.certificates:
        return []
    now = overview.now
    return [
        [(f"{'CERTIFICATE':34}{'ENDS':22}NAMES", "quiet")],
        *(
            [
                (_cell(certificate.file, 34), ""),
                (_cell(words.certificate_state(certificate, now), 22), words.certificate_mark(certificate, now)),
                (certificate.fault or ", ".join(certificate.names), ""),
            ]
            for certificate in overview.certificates
        ),
        [],
    ]


def _events(overview: Overview) -> list[Line]:
    title = f"{'TIME':9}{'SESSION':12}{'WHAT':22}FROM AND TO, REPLY, CLIENT, UPSTREAM"
    return [[(title, "quiet")], *(_event(event, overview.now) for event in overview.events)]


def _event(event: Event, now: float) -> Line:
    reply, reason = words.answer(event)
    what = f"{event.kind} {words.refuser(event)}"
    way = "" if event.kind == "refused" else f"{event.sender or '<>'} → {event.recipients}"
    rest = filter(None, (event.client, event.upstream, words.shorten(reason, 100)))
    return [
        (_cell(words.clock(event.at, now)[-8:], 9), "quiet"),
        (_cell(event.sid, 12), "quiet"),
        (_cell(what, 22), words.event_mark(event)),
        (words.shorten(way, 50) + "  " if way else "", ""),
        (words.shorten(reply, 80), words.event_mark(event)),
        ("  " + "  ".join(rest), "quiet"),
    ]


def _cell(text: str, width: int) -> str:
    """Exactly so many columns, a blank at the end included."""
    text = _cut(words.visible(text), width - 1)
    return text + " " * (width - _columns(text))
