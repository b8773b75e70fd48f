"""The text of a file -> its sections and keys, each with its line, and what is no such thing.

configobj knows quotation marks, lists, comments and values of several lines, but not in which line it found them.
So each name is given to it with its line behind an @, which also keeps apart names that are there twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from configobj import ConfigObj, ConfigObjError

SECTIONS = "a section line must be [mappings], or below it [[name]] for each mapping"
QUOTE = 'quote the whole value, as in "a, b"'
EQUALS = "must be written as key = value"
COMMENT = "is empty, since a # begins a comment: quote a value that begins with #"
CUT = "has a #, which begins a comment: quote the value, or put a blank before the #"


Fault = tuple[int, str, str]  # line, name, what is wrong


class Entry(NamedTuple):
    """A key and what is written behind its `=`, a list if there is a comma."""

    name: str
    line: int
    value: str | list[str]
    doubt: str  # or "": a # makes it doubtful that this is the whole value


class Section(NamedTuple):
    """Everything in the order of the file."""

    name: str
    line: int
    entries: list[Entry]
    sections: list[Section]


def parse(lines: list[str]) -> tuple[Section | None, list[Fault]]:
    """The file as a whole, and its faults. None: it is unknown what the lines below the last fault belong to."""
    try:
        return _section("@1", ConfigObj(list(_numbered(lines)), interpolation=False), lines), []
    except ConfigObjError as error:
        faults = []
        for number in (one.line_number for one in error.errors):
            line = lines[number - 1].strip()
            faults.append(_fault(number, line))
            if line.startswith("[") or _opened_quotes(line):
                return None, faults
        return _section("@1", error.config, lines), faults


def _fault(number: int, line: str) -> Fault:
    name, equals, _ = line.partition("=")
    if line.startswith("["):
        return number, line, SECTIONS
    if equals:
        return number, _unquoted(name), QUOTE
    return number, _unquoted(re.split(r"[\s:]", line)[0]), EQUALS


def _numbered(lines: list[str]) -> Iterator[str]:
    """The lines for configobj; line 7 is `name@7 = value` or `[name@7]`."""
    closing = ""  # the quotation marks at the end of a value of several lines
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if closing:
            closing = "" if closing in line else closing
            yield line
        elif line.lstrip().startswith("["):
            match = re.fullmatch(r"(\s*\[+[^\[\]\"'#=]*[^\[\]\"'#=\s])(\s*\]+\s*(?:#.*)?)", line)
            yield f"{match[1]}@{number}{match[2]}" if match else "["  # which is a fault
        elif equals and not line.lstrip().startswith("#"):
            closing = _opened_quotes(line)
            yield f"{_unquoted(name)}@{number} ={value}"
        else:
            yield line


def _section(numbered: str, found: Any, lines: list[str]) -> Section:
    """found: the section as configobj has it."""
    name, line = _name_and_line(numbered)
    entries = []
    for key in found.scalars:
        doubt = _doubt(lines[_name_and_line(key)[1] - 1], found[key], found.inline_comments[key])
        entries.append(Entry(*_name_and_line(key), found[key], doubt))
    return Section(name, line, entries, [_section(inner, found[inner], lines) for inner in found.sections])


def _doubt(line: str, value: str | list[str], comment: str | None) -> str:
    """Whether configobj took part of the value for a comment, as in `password = abc#def`."""
    if not value and line.partition("=")[2].lstrip().startswith("#"):
        return COMMENT
    before = line.rstrip().removesuffix(comment or "")
    return CUT if comment and before != line.rstrip() and before[-1] not in " \t\"'" else ""


def _name_and_line(numbered: str) -> tuple[str, int]:
    name, _, line = numbered.rpartition("@")
    return name.strip(), int(line)


def _opened_quotes(line: str) -> str:
    """The triple quotation marks that the value in this line opens and does not close."""
    value = line.partition("=")[2].strip()
    marks = value[:3]
    return marks if marks in ('"""', "'''") and marks not in value[3:] else ""


def _unquoted(name: str) -> str:
    return name.strip().strip("\"'")
