"""`willi.py lookup`: what a session would find for an address, key by key."""

from __future__ import annotations

from collections.abc import Sequence

from willi_lib import log
from willi_lib.config import Settings
from willi_lib.mappings.csv_file import CsvError, CsvFile
from willi_lib.mappings.mysql import Mysql
from willi_lib.mappings.open import MappingError, open_mappings
from willi_lib.net.resolver import Resolver
from willi_lib.proxy.lookup import show
from willi_lib.routing.route import Mapping
from willi_lib.text import visible

from .report import GOOD, WRONG


def lookup(settings: Settings, addresses: Sequence[str]) -> int:
    """Show what a session would find for each address; 0 if each has a route."""
    log.silence()
    Resolver(settings.dns_timeout).serve_all_sockets()
    try:
        mappings = open_mappings(settings)
        for mapping in mappings:
            if isinstance(mapping, CsvFile):
                mapping.load()
    except (MappingError, CsvError) as error:
        print("\n".join(map(visible, str(error).split("\n"))))
        return WRONG
    worst = max([_lookup_one(settings, mappings, address) for address in addresses])
    for mapping in mappings:
        if isinstance(mapping, Mysql):
            mapping.close()
    return worst


def _lookup_one(settings: Settings, mappings: Sequence[Mapping], address: str) -> int:
    steps, result = show(mappings, settings, address)
    print(visible(address))
    for mapping, key, answer, seconds in steps:
        time = f"  ({seconds * 1000:.1f} ms)" if seconds is not None else ""
        print(visible(f"  {mapping}  {key}  {answer}{time}"))
    print(visible(f"  {result}"))
    return GOOD if result.startswith("route: ") else WRONG
