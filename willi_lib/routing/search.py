"""The one door from a recipient to its route: the keys, the order of the mappings, and where the search ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .keys import keys_of
from .route import LookupFailed, Mapping, NoRoute, Origin, Route

UNSURE = "the table is empty, or is being written"


class Step(NamedTuple):
    """One key asked in one mapping: a route, a failure, or neither."""

    mapping: str
    key: str
    is_last: bool  # the mapping is not asked for another key
    route: Route | None
    origin: Origin = ""
    failure: LookupFailed | None = None


def find_route(
    mappings: Sequence[Mapping], recipient: str, delimiter: str = "",
    observe: Callable[[Step], None] = lambda _step: None, subdomains: bool = False,
) -> Route:  # fmt: skip
    """The first match, so that an earlier mapping's domain beats a later one's address.

    delimiter, subdomains: see `keys_of`. observe: called after each key.

    Raises NoRoute, or LookupFailed from the first mapping that fails: the search ends
    there, since a later, more general mapping might send the mail elsewhere.
    """
    keys = keys_of(recipient, delimiter, subdomains)
    unsure = ""
    for mapping in mappings:
        answers = mapping.find(keys)
        for key in keys:
            try:
                route, origin = next(answers)
            except LookupFailed as failure:
                observe(Step(mapping.name, key, True, None, failure=failure))
                raise LookupFailed(f"{mapping.name}: {failure}", failure.logged) from None
            observe(Step(mapping.name, key, route is not None or key is keys[-1], route, origin))
            if route is not None:
                return route
            if origin == "unsure":
                unsure = unsure or mapping.name
    if unsure:
        raise LookupFailed(f"{unsure}: {UNSURE}", logged=True)
    raise NoRoute(recipient)
