"""What a mapping of a test has besides `name` and `find`."""

from __future__ import annotations

from collections.abc import Sequence

from willi_lib.routing.route import MappingFacts


class InMemory:
    """Nothing to load, nothing to close."""

    def load(self, reload: bool = False) -> bool:
        return False

    def close(self) -> None:
        pass

    def files(self) -> Sequence[str]:
        return ()

    def facts(self, thorough: bool = False) -> MappingFacts:
        return MappingFacts()
