"""The same as the page, as lines of a terminal.

A line is a list of pieces, text and mark. The texts are as others have said them: terminal.py makes visible what cannot
be seen, and gives a mark its colour.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from willi_lib.text import visible

from . import words
from .charts import last_hour
from .means import MINUTES
from .overview import Event, Overview

LEVELS = {"sessions": "", "accepted": "ok", "rejected": "warn", "refused": "warn", "failed": "wrong"}
BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"

Piece = tuple[str, str]  # text, and its mark: ok, warn, wrong, quiet, title, well, ill or nothing
Line = Sequence[Piece]
Row = Sequence[Piece | str]  # of a table


def view(overview: Overview, height: int | None = None, fault: str = "", bars: str = BARS) -> list[Line]:
    """The lines, at most `height`; None: all of them. fault: why there is no newer overview."""
    # The lines that belong together, and how many of them there must and may be if there is little room.
    blocks: list[tuple[Sequence[Line], int, int]] = [
        (_head(overview, fault), 3, 3),
        (_problems(overview), 5, 16),
        (_hour(overview, bars), 6, 6),
        (_hosts(overview), 4, 10),
        (_tables(overview), 3, 8),
        (_limits(overview), 0, 6),
        (_certificates(overview), 0, 6),
        (_events(overview), 8, 1000),
    ]
    if height is None:
        return [line for lines, _, _ in blocks for line in lines]
    room = height - sum(min(len(lines), least) for lines, least, _ in blocks)
    shown: list[Line] = []
    for lines, least, most in blocks:
        least = min(len(lines), least)
        more = min(len(lines) - least, most - least, max(room, 0))
        if least + more > 1:  # a title alone says nothing
            room -= more
            shown += _first(lines, least + more)
    return shown[:height]


def _first(lines: Sequence[Line], count: int) -> Sequence[Line]:
    """The first of them; the last line says how many more there are."""
    if count >= len(lines):
        return lines
    hidden = sum(1 for line in lines[count - 1 :] if line)
    return [*lines[: count - 1], [(f"  … {hidden} more", "quiet")]]


def _head(overview: Overview, fault: str) -> list[Line]:
    now = overview.now
    since = f"up {words.duration(now - overview.started)}, workers {overview.workers} of {overview.workers_wanted}"
    state = (f" {words.headline(overview)} ", "ill" if overview.problems else "well")
    name, domain = (f" Willi {overview.version}  ", "quiet"), (words.shorten(overview.domain, 60), "title")
    first = [state, name, domain, (f"  {words.clock(now, now)} UTC  {since}", "quiet")]
    return [first, [(f" No newer answer: {fault} ", "ill")], []] if fault else [first, []]


def _problems(overview: Overview) -> list[Line]:
    problems: list[Line] = [[(f"  {problem}", problem.level)] for problem in overview.problems]
    problems += ([(f"  {hint}", "warn")] for hint in words.advice(overview))
    return [*problems, []] if problems else []


def _hour(overview: Overview, bars: str) -> list[Line]:
    """A row for each chart of the page."""
    hour = last_hour(overview.minutes)
    notes = {
        "sessions": f"{words.number(overview.sessions)} open now",
        "rejected": f"{words.number(hour['rejected'].sums['upstream'])} by upstreams",
    }
    lines: list[Line] = [
        [(f"{chart.name.lower():12}{words.number(chart.sum):>7} ", "title"), (_spark(chart.counts, bars), LEVELS[name]),
         (f" {notes.get(name, '')}", "quiet")]
        for name, chart in hour.items()
    ]  # fmt: skip
    return [*lines, []]


def _spark(counts: Sequence[int], bars: str) -> str:
    """The last hour in a line, a character for each minute."""
    highest = max(counts, default=0)
    steps = len(bars) - 1
    return "".join(bars[-(-count * steps // highest)] if count else bars[0] for count in counts).rjust(MINUTES)


# Tables


def _table(titles: Sequence[str], widths: Sequence[int], rows: Sequence[Row]) -> list[Line]:
    """widths: in columns; below 0 for what stands at the right, 0 for what has the rest of the line."""
    if not rows:
        return []
    lines = [[(title, "quiet") for title in titles], *([_piece(cell) for cell in row] for row in rows)]
    return [*([(_cell(text, w), mark) for (text, mark), w in zip(line, widths, strict=True)] for line in lines), []]


def _piece(cell: Piece | str) -> Piece:
    return (cell, "") if isinstance(cell, str) else cell


def _cell(text: str, width: int) -> str:
    """Exactly so many columns; a blank at the end, or two before the rest of the line, are among them."""
    if width == 0:
        return f"  {text}" if text else ""
    if width < 0:
        return f"{text:>{-width}}"
    text = cut(visible(text), width - 1)
    return text + " " * (width - columns(text))


def _hosts(overview: Overview) -> list[Line]:
    titles = ("UPSTREAM", "STATE", "CONNECT", "ACCEPTED", "REJECTED", "TRAFFIC", "LAST ERROR")
    now = overview.now
    rows: list[Row] = []
    for host in overview.hosts:
        level, state = words.host_state(host, now)
        at = f"{words.clock(host.last_error_at, now)} " if host.last_error_at is not None else ""
        rows.append([
            (host.name, "" if host.up else level), (state, level),
            words.duration(host.connect_seconds), words.number(host.accepted), words.number(host.rejected),
            words.size(host.octets), (at + host.last_error, "quiet" if host.up else level),
        ])  # fmt: skip
    return _table(titles, (28, 13, -8, -11, -11, -9, 0), rows)


def _tables(overview: Overview) -> list[Line]:
    titles = ("MAPPING", "STATE", "PATTERNS", "LOOK-UPS", "HITS", "ERRORS", "TIME", "LAST ERROR")
    rows: list[Row] = []
    for table in overview.tables:
        level, state = words.table_state(table)
        rows.append([
            table.name, (state, level), words.number(table.patterns), words.number(table.lookups),
            words.share(table.hits, table.lookups), words.number(table.errors), words.duration(table.lookup_seconds),
            (table.last_error, "quiet"),
        ])  # fmt: skip
    return _table(titles, (28, 10, -9, -11, -6, -7, -8, 0), rows)


def _limits(overview: Overview) -> list[Line]:
    rows: list[Row] = []
    for limit in overview.limits:
        level, used = words.limit_state(limit)
        rows.append([limit.name, (used, level), words.number(limit.refused)])
    return _table(("LIMIT", "IN USE", "TURNED AWAY"), (28, -22, -13), rows)


def _certificates(overview: Overview) -> list[Line]:
    rows: list[Row] = []
    for certificate in overview.certificates:
        level, state = words.certificate_state(certificate, overview.now)
        rows.append([certificate.file, (state, level), certificate.fault or ", ".join(certificate.names)])
    return _table(("CERTIFICATE", "ENDS", "NAMES"), (34, 20, 0), rows)


def _events(overview: Overview) -> list[Line]:
    titles = ("TIME", "SESSION", "WHAT", "FROM AND TO", "REPLY", "CLIENT, UPSTREAM")
    return _table(titles, (9, 12, 21, 0, 0, 0), [_event(event, overview.now) for event in overview.events])


def _event(event: Event, now: float) -> Row:
    reply, reason = words.answer(event)
    way = "" if event.kind == "refused" else f"{event.sender or '<>'} → {event.recipients}"
    level = words.event_level(event)
    return [
        (words.clock(event.at, now)[-8:], "quiet"), (event.sid, "quiet"),
        (f"{event.kind} {words.refuser(event)}", level), words.shorten(way, 50), (words.shorten(reply, 80), level),
        ("  ".join(filter(None, (event.client, event.upstream, words.shorten(reason, 100)))), "quiet"),
    ]  # fmt: skip


# Columns of a terminal


def columns(text: str) -> int:
    """How many columns of a terminal it takes."""
    return len(text) if text.isascii() else sum(map(_column, text))


def _column(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """At most so many columns."""
    if columns(text) <= width:
        return text
    kept, used = [], 1  # the dots
    for character in text:
        used += _column(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + "…" if width > 0 else ""
