"""The mappings that the file asks for, in its order. A new kind is one file beside this one, and a line in `KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as ByKey
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from .. import log
from ..config import CsvSettings, MysqlSettings, Settings, StaticSettings
from ..routing.route import Answer, HeldTable, Mapping, MappingError, MappingFacts, Route
from .cache import CachedMapping
from .csv_file import Aside, CsvFile, at_once
from .known_rows import KnownRows
from .mysql import Database

READABLE_BY_OTHERS = 0o004  # of a file's mode; the service needs that of the group


@dataclass(frozen=True)
class Surroundings:
    """What a worker gives its mappings; `check` and `lookup` need none of it."""

    pause: Callable[[], None] = lambda: None  # called now and then while a large file is read, to let others run
    aside: Callable[[], Aside] = lambda: at_once  # makes what does the work with one file
    held: ByKey[str, HeldTable] = field(default_factory=dict)  # the tables of other workers, by mapping
    known_rows: ByKey[Any, KnownRows] = field(default_factory=dict)  # what the workers share, by settings


def open_mappings(settings: Settings, surroundings: Surroundings | None = None) -> list[Mapping]:
    """Make them; they still have to be loaded. A database need not be there. Raises MappingError."""
    return [KINDS[type(one)](one, surroundings or Surroundings()) for one in settings.mappings]


class Static:
    """One route for every recipient: the catch-all at the end of the mappings."""

    def __init__(self, settings: StaticSettings) -> None:
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


def _csv(settings: CsvSettings, around: Surroundings) -> Mapping:
    name = f"csv:{settings.file}"
    return CsvFile(
        name, settings.file, settings.policy, around.pause, settings.where, around.aside(), around.held.get(name)
    )


def _mysql(settings: MysqlSettings, around: Surroundings) -> Mapping:
    name = f"mysql:{settings.name}"
    if others_can_read(settings.password_file):
        log.warn("Every user of this machine can read the password file", mapping=name, error=settings.password_file)
    try:
        return CachedMapping(settings, Database(settings, name), around.known_rows.get(settings))
    except ValueError as fault:
        raise MappingError(f"{name}: {fault}") from None


KINDS: dict[type[Any], Callable[[Any, Surroundings], Mapping]] = {
    StaticSettings: lambda settings, _: Static(settings),
    CsvSettings: _csv,
    MysqlSettings: _mysql,
}


def others_can_read(path: str) -> bool:
    """Whether every user of this machine may. Of a file that is not there, nobody."""
    try:
        return bool(path) and bool(Path(path).stat().st_mode & READABLE_BY_OTHERS)
    except OSError:
        return False
