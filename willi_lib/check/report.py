"""What `willi.py check` says: one line per finding, or JSON; and how far it is, on a terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from willi_lib.text import can_draw, visible, wants_colours

GOOD, WRONG = 0, 1
COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "wrong": "\x1b[1;31m"}  # green, yellow, bold red
PLAIN = "\x1b[0m"
CLEAR_LINE = "\r\x1b[K"
BAR = 30  # characters
CLOSED = re.compile(r"(/[^:]+): (?:cannot read it: )?Permission denied$")  # a file that the service must read

Level = Literal["ok", "warn", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. The fields are the keys of `--json`."""

    level: Level  # warn: it works, and may not be what was meant
    subject: str  # a file, a setting, a mapping or a host
    what: str
    advice: str = ""  # what to do next


class Notes:
    """What there is to say of one subject: its facts in one line, and each problem in a line of its own."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._facts: list[str] = []
        self._problems: list[Finding] = []

    def fact(self, text: str) -> None:
        """Neither good nor bad by itself."""
        self._facts.append(text)

    def warn(self, what: str, advice: str) -> None:
        """It works, and may not be what was meant."""
        self._problems.append(Finding("warn", self._subject, what, advice))

    def wrong(self, what: str, advice: str) -> None:
        """It must not be."""
        self._problems.append(Finding("wrong", self._subject, what, advice))

    @property
    def findings(self) -> list[Finding]:
        return [Finding("ok", self._subject, ", ".join(self._facts)), *self._problems]


class Report:
    """Prints each finding as it comes, or all of them as JSON at the end; the exit status follows from the worst."""

    def __init__(self, as_json: bool = False) -> None:
        self._findings: list[Finding] = []
        self._json = as_json
        self._colours = wants_colours(sys.stdout, os.environ)
        self._bar = ""  # what stands on the terminal below the findings

    def ok(self, subject: str, what: str) -> None:
        """As it should be."""
        self.add(Finding("ok", subject, what))

    def warn(self, subject: str, what: str, advice: str = "") -> None:
        """It works, and may not be what was meant."""
        self.add(Finding("warn", subject, what, advice))

    def wrong(self, subject: str, what: str, advice: str = "") -> None:
        """It does not work, or must not be."""
        self.add(Finding("wrong", subject, what, advice))

    def faults(self, text: str, advice: str = "") -> None:
        """Each line is wrong, and names its subject itself: `file:line: why`."""
        for line in text.split("\n"):
            subject, _, what = line.partition(": ")
            closed = CLOSED.search(line)
            self.wrong(subject, what, _open_it(closed[1]) if closed else advice)

    def add(self, finding: Finding) -> None:
        """Print it, unless it has to wait for the end."""
        self._findings.append(finding)
        if not self._json:
            self._show("")
            print(_line(finding, self._colours), flush=bool(self._bar))

    @property
    def status(self) -> int:
        """The exit status, by what has been found so far."""
        return WRONG if any(finding.level == "wrong" for finding in self._findings) else GOOD

    def end(self) -> int:
        """The exit status, when all is said."""
        if self._json:
            print(json.dumps([asdict(finding) for finding in self._findings], indent=2))
        return self.status

    @contextmanager
    def progress(self, what: str, steps: int) -> Iterator[Progress]:
        """A bar below the findings while a block runs, if somebody sits there; nothing of it is left."""
        progress = Progress(self, what, steps)
        try:
            yield progress
        finally:
            self._show("")

    def _show(self, bar: str) -> None:
        if bar or self._bar:
            print(CLEAR_LINE + bar, end="", file=sys.stderr, flush=True)
        self._bar = bar


class Progress:
    """How many steps of how many are done."""

    def __init__(self, report: Report, what: str, steps: int) -> None:
        self._report = report
        self._what = what
        self._steps = steps
        self._done = 0
        self._visible = steps > 0 and can_draw(sys.stderr, os.environ)
        self._draw()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        self._draw()

    def _draw(self) -> None:
        if self._visible:
            full = BAR * self._done // self._steps
            self._report._show(f"{'#' * full}{'.' * (BAR - full)} {self._done}/{self._steps} {self._what}")


def say_faults(faults: Iterable[str]) -> int:
    """Faults of a file that cannot even be read, as JSON; the exit status."""
    report = Report(as_json=True)
    for fault in faults:
        report.faults(fault)
    return report.end()


def _open_it(file: str) -> str:
    """The advice for a file that this user may not read. Below a closed directory its mode is no help (certbot)."""
    for directory in reversed(Path(os.path.realpath(file)).parents):
        if directory.exists() and not os.access(directory, os.X_OK):
            what = f"{directory} is closed to this user: name a copy beside willi.conf, with group willi and mode 640"
            return f"{what}; /opt/willi/willi.service has the hook for certbot"
    return f"chgrp willi {file}; chmod 640 {file}"


def _line(finding: Finding, colours: bool) -> str:
    level = f"{finding.level:6}"
    if colours:
        level = f"{COLOURS[finding.level]}{level}{PLAIN}"
    advice = f" -> {finding.advice}" if finding.advice else ""
    return f"{level} {visible(f'{finding.subject}: {finding.what}{advice}')}"
