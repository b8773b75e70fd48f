"""`willi.py lookup`: where the mail for addresses goes, and which mail another table sends elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence

from .. import log
from ..config import Settings
from ..mappings.csv_file import CsvFile
from ..mappings.open import open_new_and_old
from ..net.resolver import Resolver
from ..proxy.lookup import show
from ..routing.keys import keys_of
from ..routing.route import MappingError
from ..status.reports import Asked
from ..text import visible
from .finding import GOOD, WRONG
from .mappings import load_mappings

MAX_LINE = 10_000  # characters; what is behind them is a line of its own


def lookup(settings: Settings, addresses: Iterable[str], as_json: bool = False) -> int:
    """Show what a session would find for each address, as JSON a line each; 0 if each has a route."""
    log.silence()
    Resolver(settings.dns_timeout).serve_all_sockets()
    mappings, unusable = load_mappings(settings)
    if unusable:
        print("\n".join(visible(str(finding)) for finding in unusable), file=sys.stderr if as_json else sys.stdout)
        return WRONG
    status = GOOD
    for address in addresses:
        asked = show(mappings, settings, address)
        print(_as_json(asked) if as_json else _as_text(asked))
        status = status if asked.route else WRONG
    for mapping in mappings:
        mapping.close()
    return status


def addresses_in(file: str) -> Iterator[str]:
    """One a line; - is stdin. Raises OSError."""
    with open(0 if file == "-" else file, encoding="utf-8-sig", errors="surrogateescape") as opened:  # noqa: PTH123
        for line in iter(lambda: opened.readline(MAX_LINE), ""):
            if address := line.strip():
                yield address


def _as_text(asked: Asked) -> str:
    lines = [asked.address]
    for name, key, answer, seconds in asked.steps:
        lines.append(f"  {name}  {key}  {answer}" + (f"  ({seconds * 1000:.1f} ms)" if seconds is not None else ""))
    return "\n".join(map(visible, [*lines, f"  {asked.result}"]))


def _as_json(asked: Asked) -> str:
    """The last step is the one that counts."""
    mapping, key = asked.steps[-1][:2] if asked.steps else ("", "")
    return json.dumps({
        "address": asked.address, "route": str(asked.route) if asked.route else None,
        "tls_verify": asked.route.tls_verify if asked.route else None, "mapping": mapping, "key": key,
        "result": asked.result,
    })  # fmt: skip


def compare(settings: Settings, old_file: str) -> int:
    """Show the patterns whose mail goes elsewhere by the table of `settings` than by an old one; 0 if there is none."""
    log.silence()
    try:
        new, old = open_new_and_old(settings, old_file)
        new.load()
        old.load()
    except MappingError as error:
        print("\n".join(map(visible, error.faults)), file=sys.stderr)
        return WRONG
    patterns = sorted(old.patterns() | new.patterns(), key=lambda pattern: pattern.split("@")[::-1])
    differ = 0
    for pattern in patterns:
        keys = _keys_below(pattern, settings)
        before, after = (_shown(table, keys) for table in (old, new))
        if before != after:
            print(visible(f"{pattern}  {before} -> {after}"))
            differ += 1
    print(f"patterns that go elsewhere: {differ:,} of {len(patterns):,}")
    return WRONG if differ else GOOD


def _keys_below(pattern: str, settings: Settings) -> tuple[str, ...]:
    """The pattern, and what is asked for after it."""
    somebody = pattern if "@" in pattern else f"x@x{pattern}" if pattern.startswith(".") else f"x@{pattern}"
    keys = keys_of(somebody, settings.recipient_delimiter, settings.subdomains)
    return keys[keys.index(pattern) :]


def _shown(table: CsvFile, keys: Sequence[str]) -> str:
    route = next((answer.route for answer in table.find(keys) if answer.route), None)
    return f"{route or '-'}{'' if route is None or route.tls_verify else ' (tls_verify = false)'}"
