"""How `willi.py check` says what it has found: a line each, or JSON; and how far it is, on a terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from ..status.finding import Finding
from ..text import can_draw, visible, wants_colours

GOOD, WRONG = 0, 1
COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "wrong": "\x1b[1;31m"}  # green, yellow, bold red
PLAIN = "\x1b[0m"
CLEAR_LINE = "\r\x1b[K"
UNREADABLE = re.compile(r"(/[^:]+): (?:cannot read it: )?Permission denied$")  # a file that the service must read


def report(findings: Iterable[Finding], as_json: bool = False) -> int:
    """Print each as it comes, or all of them as JSON; the exit status follows from the worst."""
    found: list[Finding] = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            level = f"{finding.level:6}"
            if wants_colours(sys.stdout, os.environ):
                level = f"{COLOURS[finding.level]}{level}{PLAIN}"
            advice = f" -> {finding.advice}" if finding.advice else ""
            show_progress("")
            print(f"{level} {visible(f'{finding}{advice}')}", flush=True)
    show_progress("")
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    return WRONG if any(finding.level == "wrong" for finding in found) else GOOD


def show_progress(text: str) -> None:
    """Put this in place of the last one, below the findings, if stderr is a terminal; an empty text takes it away."""
    if can_draw(sys.stderr, os.environ):
        print(CLEAR_LINE + text, end="", file=sys.stderr, flush=True)


def faults(text: str, advice: str = "") -> Iterator[Finding]:
    """Each line is wrong, and names its subject itself: `file:line: why`."""
    for line in text.split("\n"):
        subject, _, what = line.partition(": ")
        unreadable = UNREADABLE.search(line)
        yield Finding("wrong", subject, what, _how_to_open(unreadable[1]) if unreadable else advice)


def _how_to_open(file: str) -> str:
    """The advice for a file that this user may not read. Below a closed directory its mode is no help (certbot)."""
    for directory in reversed(Path(os.path.realpath(file)).parents):
        if directory.exists() and not os.access(directory, os.X_OK):
            what = f"{directory} is closed to this user: name a copy beside willi.conf, with group willi and mode 640"
            return f"{what}; /opt/willi/willi.service has the hook for certbot"
    return f"chgrp willi {file}; chmod 640 {file}"
