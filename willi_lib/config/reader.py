"""Reads a file against the table of keys, and collects every fault before it gives up.

configobj knows quotation marks, lists, comments and values of several lines, but not the line of a key: that is looked
for in the text, when there is a fault.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from configobj import ConfigObj, ConfigObjError, DuplicateError

from ..files import read_file
from ..routing.route import Policy
from ..text import refuse_invisible, visible
from .settings import ALL_KEYS, MAPPING_KEYS, POLICY_KEYS, QUOTE, TOP_KEYS, TYPE, TYPES, Key, MappingSettings, Settings
from .values import FileMissing, enumerated

SECTIONS = "a section line must be [mappings], or below it [[name]] for each mapping"
EQUALS = "must be written as key = value"
COMMENT = "is empty, since a # begins a comment: quote a value that begins with #"
CUT = "has a #, which begins a comment: quote the value, or put a blank before the #"
OLD_FILE = (
    "this is a file of the old Willi, with 'key: value'; now it is 'key = value', and each mapping is a section"
    " [[name]] below a line [mappings], as willi.conf.example shows"
)
NO_MAPPING = (
    "there is no mapping, so that every recipient would be refused; write the three lines [[file]],"
    " type = csv and file = upstream_servers.csv below a line [mappings], or see willi.conf.example"
)
MAX_FAULTS = 100  # that are told of one file
MAY_HAVE_INVISIBLE = ("password",)  # characters

Place = tuple[str, ...]  # the section lines above a key, and its name: ("[mappings]", "[[a]]", "file")
MAPPINGS: Place = ("[mappings]",)


class ConfigError(Exception):
    """The file cannot be used; one line for each of its faults, with what it quotes made visible.

    may_pass: all that is wrong is that files which it names are not there, or not yet.
    """

    def __init__(self, faults: list[str], may_pass: bool = False) -> None:
        self.may_pass = may_pass
        self.faults = [visible(fault) for fault in faults]
        super().__init__("\n".join(self.faults))


def load(path: str) -> Settings:
    """Read and check a configuration file. Raises ConfigError with all its faults."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: cannot read it: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: must be UTF-8"]) from None
    return Reader(path, text).settings()


class Reader:
    """Reads one file. What is wrong becomes a fault, and the reading goes on."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.directory = Path(path).absolute().parent
        self.lines = text.rstrip().split("\n")
        self.is_cut = False  # it is unknown to which section the lines below a fault belong: they are not read
        self.faults: list[tuple[int, str, str]] = []  # line, name, what is wrong
        self.missing_files = 0  # of these faults

    def settings(self) -> Settings:
        """Raises ConfigError."""
        for number, line in enumerate(self.lines, 1):
            if re.match(r"""\s*["']?mappings["']?\s*:""", line):
                raise ConfigError([f"{self.path}:{number}: mappings: {OLD_FILE}"])
        top = self.parse(self.lines)
        values = self.read_keys((), top, TOP_KEYS)
        self.check_top(top, values)
        policy = Policy(**{name: values[name] for name in POLICY_KEYS if name in values})
        mappings = self.read_mappings(top, policy)
        if not self.faults:
            with self.blame(("domain",)):  # the one default that can be wrong
                return Settings(path=self.path, mappings=tuple(mappings), **values)
        faults = [f"{self.path}:{line}: {name}: {why}" for line, name, why in sorted(self.faults)[:MAX_FAULTS]]
        if len(self.faults) > MAX_FAULTS:
            faults.append(f"{self.path}: and {len(self.faults) - MAX_FAULTS} more: is it another file?")
        raise ConfigError(faults, may_pass=self.missing_files == len(self.faults))

    # Faults and their lines

    @cached_property
    def places(self) -> dict[int, Place]:
        """By line: the section or key that stands there, or begins above."""
        found: dict[int, Place] = {}
        section: Place = ()
        closing = ""  # the quotation marks at the end of a value of several lines
        for number, line in enumerate(self.lines, 1):
            heading = re.match(r"\s*((?:\[\s*)+)(.*?)\s*\]", line)
            if closing:
                found[number] = found[number - 1]
                closing = "" if closing in line else closing
            elif heading:
                depth = heading[1].count("[")
                section = (*section[: depth - 1], in_brackets(heading[2], depth))
                found[number] = section
            elif not line.lstrip().startswith("#"):
                found[number] = (*section, unquoted(line.partition("=")[0]))
                closing = opened_quotes(line)
        return found

    def line_of(self, place: Place) -> int:
        """The first one if it is there twice; the last line of the file if it is not there at all."""
        return next((number for number, found in self.places.items() if found == place), len(self.lines))

    def fault(self, place: Place, why: str, name: str = "") -> None:
        """name: of the key, if that is not in the file."""
        self.faults.append((self.line_of(place), name or place[-1], why))

    @contextmanager
    def blame(self, place: Place) -> Iterator[None]:
        """A ValueError in the block is a fault of that key."""
        try:
            yield
        except ValueError as why:
            self.missing_files += isinstance(why, FileMissing)
            self.fault(place, str(why), place[-1].partition(":")[0].strip())

    # The text

    def parse(self, lines: list[str]) -> Any:
        try:
            return ConfigObj(lines, interpolation=False)
        except ConfigObjError as error:
            for one in error.errors:
                line = lines[one.line_number - 1]
                if line.lstrip().startswith("[") or opened_quotes(line):
                    self.is_cut = True
                    above = self.parse(lines[: one.line_number - 1])
                    self.add_parse_fault(one)
                    return above
            for one in error.errors:
                self.add_parse_fault(one)
            return error.config

    def add_parse_fault(self, error: ConfigObjError) -> None:
        number, line = error.line_number, error.line.strip()
        name, equals, _ = line.partition("=")
        if isinstance(error, DuplicateError):
            first = self.line_of(self.places[number])
            if first < number:
                self.faults.append((number, self.places[number][-1], f"is in line {first} already"))
            elif self.places[number] != MAPPINGS:  # a key `mappings` above it is the fault
                self.faults.append((number, line, SECTIONS))
        elif line.startswith("["):
            self.faults.append((number, line, SECTIONS))
        elif equals:
            self.faults.append((number, unquoted(name), QUOTE))
        else:
            self.faults.append((number, unquoted(re.split(r"[\s:]", line)[0]), EQUALS))

    # Keys and mappings

    def read_keys(self, place: Place, section: Any, known: dict[str, Key]) -> dict[str, Any]:
        """The values that are right. place: of the section."""
        values: dict[str, Any] = {}
        for name in section.scalars:
            with self.blame((*place, name)):
                written = section[name]
                if name not in known:
                    raise ValueError(unknown(name, known))
                if comment := section.inline_comments[name]:
                    self.refuse_cut(self.lines[self.line_of((*place, name)) - 1], written, comment)
                if name not in MAY_HAVE_INVISIBLE:
                    refuse_invisible(written if isinstance(written, str) else ",".join(written))
                values[name] = known[name].value(written, self.directory)
        return values

    @staticmethod
    def refuse_cut(line: str, value: str | list[str], comment: str) -> None:
        """Raises ValueError if configobj took part of a value for a comment, as in `password = abc#def`."""
        before = line.rstrip().removesuffix(comment.rstrip())
        if not value and before.rstrip().endswith("="):
            raise ValueError(COMMENT)
        if before != line.rstrip() and before[-1] not in " \t\"'":
            raise ValueError(CUT)

    def check_top(self, top: Any, values: dict[str, Any]) -> None:
        """The keys that belong together. One that is written and has no value is a fault already."""
        certs, private_keys = (len(values.get(name, ())) for name in ("tls_cert", "tls_key"))
        written = [name for name in ("tls_key", "tls_cert") if name in top]
        if certs != private_keys and values.keys() >= set(written):
            why = f"must be as many files as tls_cert: {private_keys}, not {certs}"
            self.fault((written[0],), why, "tls_key")
        if values.get("group") and not values.get("user", "user" in top):
            self.fault(("group",), "needs user as well: without it the workers keep the user of the master")

    def read_mappings(self, top: Any, policy: Policy) -> list[MappingSettings]:
        """The mappings in the order of the file. policy: of those that say nothing else."""
        found: list[MappingSettings] = []
        for name in top.sections:
            if name != "mappings":
                self.fault((in_brackets(name, 1),), SECTIONS)
                continue
            self.read_keys(MAPPINGS, top[name], {})
            for mapping in top[name].sections:
                found += self.read_mapping(top[name][mapping], policy)
        sections = set(top.sections)
        if not self.is_cut and sections <= {"mappings"} and not (sections and top["mappings"].sections):
            self.fault(MAPPINGS, NO_MAPPING)
        return found

    def read_mapping(self, section: Any, policy: Policy) -> list[MappingSettings]:
        """The mapping; nothing if there is a fault in the file."""
        place = (*MAPPINGS, in_brackets(section.name, 2))
        for inner in section.sections:
            self.fault((*place, in_brackets(inner, 3)), SECTIONS)
        kind = None
        if "type" in section.scalars:
            with self.blame((*place, "type")):
                kind = TYPE.value(section["type"], self.directory)
        elif not self.is_cut:
            self.fault(place, f"is missing; must be {enumerated(list(TYPES))}", "type")
        if kind is None:
            return []
        values = self.read_keys(place, section, MAPPING_KEYS[kind])
        self.check_mapping(place, section, values, MAPPING_KEYS[kind])
        if self.faults:
            return []
        del values["type"]
        if kind == "csv":
            values["where"] = f"{self.path}:{self.line_of((*place, 'file'))}"
        own_policy = replace(policy, **{name: values.pop(name) for name in POLICY_KEYS if name in values})
        return [TYPES[kind](name=section.name, policy=own_policy, **values)]

    def check_mapping(self, place: Place, section: Any, values: dict[str, Any], known: dict[str, Key]) -> None:
        """What it has to have, and the keys of a database that exclude each other."""
        wrong = {name for line, name, _ in self.faults if line > self.line_of(place)}
        for name, key in known.items():
            if key.default is None and name not in section and name not in wrong and not self.is_cut:
                self.fault(place, f"is missing in {place[-1]}", name)
        if values.get("password") and values.get("password_file"):
            self.fault((*place, "password_file"), "cannot be used together with password")
        if values.get("unix_socket") and "host" in section:
            self.fault((*place, "unix_socket"), "cannot be used together with host")


def in_brackets(name: str, depth: int) -> str:
    return "[" * depth + unquoted(name) + "]" * depth


def unquoted(name: str) -> str:
    return name.strip().strip("\"'")


def opened_quotes(line: str) -> str:
    """The triple quotation marks that the value in this line opens and does not close."""
    value = line.partition("=")[2].strip()
    marks = value[:3]
    return marks if marks in ('"""', "'''") and marks not in value[3:] else ""


def unknown(name: str, known: dict[str, Key]) -> str:
    """What is wrong with a key that is not among the known ones."""
    if name.startswith("["):
        return SECTIONS
    if ":" in name:
        return EQUALS
    if name == "mappings":
        return "is a section: write [mappings]"
    if name == "connection":
        return "is now written as host, port, user, password, database and tls_ca"
    if name in TOP_KEYS:
        return "belongs to the top of the file, above [mappings]"
    if name in ALL_KEYS and known in (TOP_KEYS, {}):
        return "belongs to a mapping, below its line [[name]]"
    if name in ALL_KEYS:
        return f"only for type = {enumerated([kind for kind in TYPES if name in MAPPING_KEYS[kind]])}"
    alike = (difflib.get_close_matches(name.lower(), keys, 1) for keys in (known, ALL_KEYS))
    nearest = next(filter(None, alike), None)
    return f"unknown key; did you mean '{nearest[0]}'?" if nearest else "unknown key"
