"""One route for every recipient: the catch-all at the end of the mappings."""

from __future__ import annotations

from dataclasses import replace

from willi_lib.routing import Route


class Static:
    """A mapping that matches everything."""

    def __init__(self, name: str, route: Route) -> None:
        """name: for the log, "static:NAME"; the route gets it too."""
        self.name = name
        self.route = replace(route, mapping=name)

    def find(self, key: str) -> Route | None:
        """The route, whatever the key."""
        return self.route
