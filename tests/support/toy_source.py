"""A kind of mapping that Willi does not have, in place of `static`: the prefix of a command that knows it.

All that Willi has to be told is a line of `KINDS`: its settings, and what makes a mapping of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import time

from tests.support.daemon import PYTHON
from tests.support.loopback import ROOT
from willi_lib.config import StaticSettings
from willi_lib.mappings import open as sources
from willi_lib.mappings.surroundings import Surroundings
from willi_lib.routing.route import Answer, MappingError, MappingFacts, Route

PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = sys.argv[2:]
from tests.support.toy_source import register
register()
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PREFIX = [PYTHON, "-c", PROGRAM]


class DomainFile:
    """The server is for one domain, which stands in the file that DOMAIN_FILE names."""

    def __init__(self, settings: StaticSettings, _: Surroundings) -> None:
        self.name = f"toy:{settings.name}"
        self._route = Route(settings.server, settings.tls_verify, settings.policy, self.name)
        self._file = Path(os.environ["DOMAIN_FILE"])
        self._domain = ""
        self._loaded_at: float | None = None
        self._fault = ""

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        for key in keys:
            yield Answer(self._route if key == self._domain else None)

    def load(self, reload: bool = False) -> bool:
        try:
            domain = self._file.read_text().strip()
        except OSError as error:
            self._fault = f"{self._file}: {error.strerror}"
            raise MappingError(self._fault) from None
        is_new = domain != self._domain
        if is_new:
            self._domain, self._loaded_at, self._fault = domain, time(), ""
        return is_new

    def close(self) -> None:
        pass

    def files(self) -> Sequence[str]:
        return (str(self._file),)

    def facts(self, thorough: bool = False) -> MappingFacts:
        return MappingFacts((self._route,), patterns=1, loaded_at=self._loaded_at, last_error=self._fault)


def register() -> None:
    sources.KINDS[StaticSettings] = DomainFile
