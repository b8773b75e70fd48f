"""The same as the page, as lines of a terminal.

A line is a list of pieces, text and mark. They are what others have said, as it was said: who draws them makes visible
what cannot be seen, and gives a mark its colour.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from willi_lib.text import visible

from . import words
from .overview import Event, Host, Overview, Table

BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"

Piece = tuple[str, str]  # text, and its mark: good, warn, bad, quiet, title, well, ill or nothing
Line = Sequence[Piece]


@dataclass(frozen=True)
class Block:
    """Lines that belong together, and how many of them there must and may be if there is little room."""

    lines: Sequence[Line]
    least: int
    most: int


def view(overview: Overview, height: int | None = None, fault: str = "", bars: str = BARS) -> list[Line]:
    """The lines, at most `height`; None: all of them. fault: why there is no newer overview."""
    blocks = [
        Block(_head(overview, fault), 3, 3),
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
    text = cut(visible(text), width - 1)
    return text + " " * (width - columns(text))


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
