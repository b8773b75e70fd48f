"""The mappings that the file asks for, in its order. A new kind is one file beside this one, and a line in `KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from .. import log
from ..config import CsvSettings, MysqlSettings, Settings, SqliteSettings, StaticSettings
from ..routing.route import Answer, Mapping, MappingError, MappingFacts, Route
from .csv_file import CsvFile
from .surroundings import Surroundings

ONE_TABLE = "--diff needs one mapping with type = csv, or one whose file has the same name as the old one"
READABLE_BY_OTHERS = 0o004  # of a file's mode; the service needs that of the group


def open_mappings(settings: Settings, surroundings: Surroundings | None = None) -> list[Mapping]:
    """Make them; they still have to be loaded. A database need not be there. Raises MappingError."""
    around = replace(surroundings or Surroundings(), subdomains=settings.subdomains)
    return [KINDS[type(one)](one, around) for one in settings.mappings]


def open_new_and_old(settings: Settings, old_file: str) -> tuple[CsvFile, CsvFile]:
    """The table of `settings` that an old one is to be compared with, and the old one. Raises MappingError."""
    tables = [one for one in settings.mappings if isinstance(one, CsvSettings)]
    tables = [one for one in tables if len(tables) == 1 or Path(one.file).name == Path(old_file).name]
    if len(tables) != 1:
        raise MappingError(f"{settings.path}: {ONE_TABLE}")
    around = Surroundings(subdomains=settings.subdomains)
    return CsvFile(tables[0], around), CsvFile(replace(tables[0], file=old_file, where=""), around)


class Static:
    """One route for every recipient: the catch-all at the end of the mappings."""

    def __init__(self, settings: StaticSettings, _: Surroundings | None = None) -> None:
        self.name = f"static:{settings.name}"
        self._route = Route(settings.server, settings.tls_verify, settings.policy, self.name)

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        return repeat(Answer(self._route), len(keys))

    def load(self, reload: bool = False) -> bool:
        return False

    def close(self) -> None:
        pass

    def files(self) -> Sequence[str]:
        return ()

    def facts(self, thorough: bool = False) -> MappingFacts:
        return MappingFacts((self._route,), takes_all=True)


# What a database needs, PyMySQL above all, is loaded only where there is one.


def _mysql(settings: MysqlSettings, around: Surroundings) -> Mapping:
    from .mysql import Database

    name = f"mysql:{settings.name}"
    if others_can_read(settings.password_file):
        log.warn("Every user of this machine can read the password file", mapping=name, error=settings.password_file)
    return _cached(name, settings, around, Database)


def _sqlite(settings: SqliteSettings, around: Surroundings) -> Mapping:
    from .sqlite import SqliteFile

    return _cached(f"sqlite:{settings.name}", settings, around, SqliteFile)


def _cached(name: str, settings: Any, around: Surroundings, source: Callable[[Any, str], Any]) -> Mapping:
    from .cache import CachedMapping

    try:
        return CachedMapping(name, settings, source(settings, name), around.known_rows.get(settings))
    except ValueError as fault:
        raise MappingError(f"{name}: {fault}") from None


KINDS: dict[type[Any], Callable[[Any, Surroundings], Mapping]] = {
    StaticSettings: Static,
    CsvSettings: CsvFile,
    SqliteSettings: _sqlite,
    MysqlSettings: _mysql,
}


def others_can_read(path: str) -> bool:
    """Whether every user of this machine may. A file that is not there is readable by none."""
    try:
        return bool(path) and bool(Path(path).stat().st_mode & READABLE_BY_OTHERS)
    except OSError:
        return False
