"""What a process gives its mappings beside their settings."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as ByKey
from dataclasses import dataclass, field
from typing import Any

from ..routing.route import HeldTable
from .known_rows import KnownRows

Aside = Callable[[Callable[[], Any]], Any]  # does work that may hang, as with a file on a dead server. Raises OSError


def at_once(work: Callable[[], Any]) -> Any:
    """Where nothing else would have to wait."""
    return work()


@dataclass(frozen=True)
class Surroundings:
    """Those of a worker; `check` and `lookup` need none of it but the setting."""

    pause: Callable[[], None] = lambda: None  # called now and then while a large file is read, to let others run
    aside: Callable[[], Aside] = lambda: at_once  # makes what does the work with one file
    held: ByKey[str, HeldTable] = field(default_factory=dict)  # the tables of other workers, by mapping
    known_rows: ByKey[Any, KnownRows] = field(default_factory=dict)  # what the workers share, by settings
    subdomains: bool = False  # the setting: patterns may have a leading dot
