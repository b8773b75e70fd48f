"""`willi.py lookup`: what a session would find for an address, key by key."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from willi_lib import log
from willi_lib.config import Settings
from willi_lib.mappings import MappingError, open_mappings
from willi_lib.routing import Mapping, Step, search
from willi_lib.routing.csv_file import CsvError, CsvFile
from willi_lib.routing.mysql import Mysql
from willi_lib.smtp.reply import Reject
from willi_lib.smtp.syntax import parse_rcpt

from .report import GOOD, WRONG

ORIGINS = {"": "", "asked": "", "cache": ", from the cache", "stale": ", from the cache, since the database is down"}


def lookup(settings: Settings, addresses: Sequence[str]) -> int:
    """Show what a session would find for each address; 0 if each has a route."""
    log.silence()
    try:
        mappings = open_mappings(settings)
        for mapping in mappings:
            if isinstance(mapping, CsvFile):
                mapping.load()
    except (MappingError, CsvError) as error:
        print(error)
        return WRONG
    worst = max([_lookup_one(settings, mappings, address) for address in addresses])
    for mapping in mappings:
        if isinstance(mapping, Mysql):
            mapping.close()
    return worst


def _lookup_one(settings: Settings, mappings: Sequence[Mapping], address: str) -> int:
    print(address)
    try:
        path = parse_rcpt(b"TO:<" + address.encode() + b">", smtputf8=True)
    except Reject as refusal:
        print(f"  refused: {refusal.reply}")
        return WRONG
    recipient = path.address if path.domain else f"{path.address}@{settings.domain}"
    began = monotonic()
    for step in search(mappings, recipient, settings.recipient_delimiter):
        print(f"  {step.mapping}  {step.key}  {_answer(step)}{_origin(step, monotonic() - began)}")
        began = monotonic()
        if step.failure is not None:
            print("  the search ends here, the client gets 451 4.3.0")
            return WRONG
        if step.route:
            print(f"  route: {step.route}, tls_verify = {'true' if step.route.tls_verify else 'false'}")
            return GOOD
    print("  no mapping matches, the client gets 554 5.7.1 Relay access denied")
    return WRONG


def _origin(step: Step, seconds: float) -> str:
    """Where a database's answer comes from, and how long it took."""
    if not step.origin and step.failure is None:
        return ""
    return f"  ({seconds * 1000:.1f} ms{ORIGINS[step.origin]})"


def _answer(step: Step) -> str:
    if step.failure is not None:
        return f"failed: {step.failure}"
    return str(step.route) if step.route else "-"
