"""The mappings that the file asks for, in its order."""

from __future__ import annotations

from collections.abc import Callable

from .config import CsvSettings, MysqlSettings, Settings, StaticSettings
from .routing import Mapping, Route
from .routing.csv_file import CsvFile
from .routing.static import Static


class MappingError(Exception):
    """A mapping that cannot be used; one line for each fault."""


def open_mappings(settings: Settings, pause: Callable[[], None] = lambda: None) -> list[Mapping]:
    """Make them; a CSV file still has to be loaded.

    pause: called now and then while a large file is read, to let others run.
    Raises MappingError.
    """
    return [_open(mapping, pause) for mapping in settings.mappings]


def _open(mapping: StaticSettings | CsvSettings | MysqlSettings, pause: Callable[[], None]) -> Mapping:
    if isinstance(mapping, StaticSettings):
        name = f"static:{mapping.name}"
        return Static(name, Route(mapping.servers, mapping.tls_verify, mapping.policy, name))
    if isinstance(mapping, CsvSettings):
        return CsvFile(f"csv:{mapping.file}", mapping.file, mapping.policy, pause)
    raise MappingError(f"mapping {mapping.name}: type = mysql is not built yet; use csv or static")
