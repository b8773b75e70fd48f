"""One route for every recipient: the catch-all at the end of the mappings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat

from willi_lib.routing.route import Answer, MappingFacts, Route


class Static:
    """A mapping that matches everything."""

    def __init__(self, name: str, route: Route) -> None:
        """name: for the log, "static:NAME"; the route gets it too."""
        self.name = name
        self.route = replace(route, mapping=name)

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        """The route, whatever the keys."""
        return repeat(Answer(self.route), len(keys))

    def load(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def files(self) -> Sequence[str]:
        return ()

    def facts(self, thorough: bool = False) -> MappingFacts:
        return MappingFacts(routes=(self.route,), takes_all=True)
