"""Reads a file against the table of keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from willi_lib.routing.route import Policy
from willi_lib.text import refuse_invisible, visible

from .lines import EQUALS, SECTIONS, Entry, Fault, Section, parse
from .settings import ALL_KEYS, MAPPING_KEYS, POLICY_KEYS, TOP_KEYS, TYPE, TYPES, Key, MappingSettings, Settings
from .values import enumerated

OLD_FILE = (
    "this is a file of the old Willi, with 'key: value'; now it is 'key = value', and each mapping is a section"
    " [[name]] below a line [mappings], as willi.conf.example shows"
)
NO_MAPPING = (
    "there is no mapping, so that every recipient would be refused; write the three lines [[file]],"
    " type = csv and file = upstream_servers.csv below a line [mappings], or see willi.conf.example"
)
MAY_HAVE_INVISIBLE = ("password",)  # characters


class ConfigError(Exception):
    """The file cannot be used; one line for each of its faults, with what it quotes made visible."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = [visible(fault) for fault in faults]
        super().__init__("\n".join(self.faults))


def load(path: str) -> Settings:
    """Read and check a configuration file. Raises ConfigError with all its faults."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
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
        self.faults: list[Fault] = []

    def settings(self) -> Settings:
        """Raises ConfigError."""
        top = self.parse()
        values, lines = self.read_keys(top.entries, TOP_KEYS)
        self.check_top(values, lines)
        policy = Policy(**{name: values[name] for name in POLICY_KEYS if name in values})
        mappings = self.read_mappings(top, policy)
        if not self.faults:
            with self.blame(len(self.lines), "domain"):  # the one default that can be wrong
                return Settings(path=self.path, mappings=tuple(mappings), **values)
        raise self.error()

    def error(self) -> ConfigError:
        """All faults so far."""
        in_order = sorted(self.faults, key=itemgetter(0))
        return ConfigError([f"{self.path}:{line}: {name}: {why}" for line, name, why in in_order])

    def fault(self, line: int, name: str, why: str) -> None:
        self.faults.append((line, name, why))

    @contextmanager
    def blame(self, line: int, name: str) -> Iterator[None]:
        """A ValueError in the block is a fault of that key."""
        try:
            yield
        except ValueError as why:
            self.fault(line, name, str(why))

    def parse(self) -> Section:
        """Raises ConfigError if it is hopeless."""
        for number, line in enumerate(self.lines, 1):
            if re.match(r"""\s*["']?mappings["']?\s*:""", line):
                self.fault(number, "mappings", OLD_FILE)
                raise self.error()
        top, faults = parse(self.lines)
        self.faults += faults
        if top is None:
            raise self.error()
        return top

    def read_keys(self, entries: list[Entry], known: dict[str, Key]) -> tuple[dict[str, Any], dict[str, int]]:
        """The values that are right, and the lines of all keys."""
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name, line, written, doubt in entries:
            with self.blame(line, name.partition(":")[0]):
                claim(lines, name, line)
                if name not in known:
                    raise ValueError(unknown(name, known))
                if doubt:
                    raise ValueError(doubt)
                if name not in MAY_HAVE_INVISIBLE:
                    refuse_invisible(written if isinstance(written, str) else ",".join(written))
                values[name] = known[name].value(written, self.directory)
        return values, lines

    def check_top(self, values: dict[str, Any], lines: dict[str, int]) -> None:
        """The keys that belong together. One that is written and has no value is a fault already."""
        certs, private_keys = (len(values.get(name, ())) for name in ("tls_cert", "tls_key"))
        if certs != private_keys and {"tls_cert", "tls_key"} & lines.keys() <= values.keys():
            line = lines.get("tls_key") or lines["tls_cert"]
            self.fault(line, "tls_key", f"must be as many files as tls_cert: {private_keys}, not {certs}")
        if values.get("group") and not values.get("user", "user" in lines):
            self.fault(lines["group"], "group", "needs user as well: only then are the workers somebody else")

    def read_mappings(self, top: Section, policy: Policy) -> list[MappingSettings]:
        """The mappings in the order of the file. policy: of those that say nothing else."""
        found: list[MappingSettings] = []
        lines: dict[str, int] = {}
        for section in top.sections:
            if section.name != "mappings":
                self.fault(section.line, f"[{section.name}]", SECTIONS)
                continue
            with self.blame(section.line, "[mappings]"):
                claim(lines, "[mappings]", section.line)
            self.read_keys(section.entries, {})
            for mapping in section.sections:
                with self.blame(mapping.line, f"[[{mapping.name}]]"):
                    claim(lines, f"[[{mapping.name}]]", mapping.line)
                found += self.read_mapping(mapping, policy)
        if lines.keys() <= {"[mappings]"} and all(section.name == "mappings" for section in top.sections):
            self.fault(lines.get("[mappings]", len(self.lines)), "[mappings]", NO_MAPPING)
        return found

    def read_mapping(self, section: Section, policy: Policy) -> list[MappingSettings]:
        """The mapping; nothing if there is a fault in the file."""
        for inner in section.sections:
            self.fault(inner.line, f"[[[{inner.name}]]]", SECTIONS)
        types = [entry for entry in section.entries if entry.name == "type"]
        if not types:
            self.fault(section.line, "type", f"is missing; must be {enumerated(list(TYPES))}")
        kind = self.read_keys(types[:1], {"type": TYPE})[0].get("type")
        if kind is None:
            return []
        values, lines = self.read_keys(section.entries, MAPPING_KEYS[kind])
        self.check_pairs(values, lines)
        self.check_missing(values, MAPPING_KEYS[kind], section)
        if self.faults:
            return []
        del values["type"]
        if kind == "csv":
            values["where"] = f"{self.path}:{lines['file']}"
        own_policy = replace(policy, **{name: values.pop(name) for name in POLICY_KEYS if name in values})
        return [TYPES[kind](name=section.name, policy=own_policy, **values)]

    def check_missing(self, values: dict[str, Any], known: dict[str, Key], section: Section) -> None:
        """What a mapping has to have; a key that is there, but wrong, is a fault already."""
        wrong = {name for line, name, _ in self.faults if line > section.line}
        for name, key in known.items():
            if key.default is None and name not in values.keys() | wrong:
                self.fault(section.line, name, f"is missing in [[{section.name}]]")

    def check_pairs(self, values: dict[str, Any], lines: dict[str, int]) -> None:
        """The keys of a database that exclude each other."""
        if values.get("password") and values.get("password_file"):
            self.fault(lines["password_file"], "password_file", "cannot be used together with password")
        if values.get("unix_socket") and "host" in lines:
            self.fault(lines["unix_socket"], "unix_socket", "cannot be used together with host")


def claim(lines: dict[str, int], name: str, line: int) -> None:
    """Note the line of a name. Raises ValueError if the name is taken."""
    if name in lines:
        raise ValueError(f"is in line {lines[name]} already")
    lines[name] = line


def unknown(name: str, known: dict[str, Key]) -> str:
    """What is wrong with a key that is not among the known ones."""
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
    nearest = difflib.get_close_matches(name.lower(), known or ALL_KEYS, 1)
    return f"unknown key; did you mean '{nearest[0]}'?" if nearest else "unknown key"
