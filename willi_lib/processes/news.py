"""What workers tell the master of their CSV files, and what the log says of it: each fact once, not by every worker.

The master needs it, too: a worker that starts must not take a table that is worse than what others hold.
"""

from __future__ import annotations

from collections.abc import Mapping as ByKey
from typing import Any

from .. import log
from ..routing.route import HeldTable, Mapping, MappingError

OLD_STAYS = "CSV file not read, the old table stays"
NO_TABLE = "CSV file not read by a new worker, which answers 451 without its table"
MAX_FAULT = 1000  # characters
MANY_PATTERNS = 100  # of a CSV file: if it loses more than half of so many, the administrator should look

Message = dict[str, Any]


def of_table(mapping: Mapping) -> Message:
    """It was read."""
    return {"mapping": mapping.name, "held": mapping.facts().table}


def of_fault(mapping: Mapping, error: MappingError) -> Message:
    """It could not be read."""
    faults = [fault[:MAX_FAULT] for fault in error.faults]
    return {"mapping": mapping.name, "faults": faults, "text": OLD_STAYS if mapping.facts().loaded_at else NO_TABLE}


class News:
    """Of the workers that have read the same willi.conf."""

    def __init__(self, before: ByKey[str, HeldTable]) -> None:
        """before: the tables of the workers before them."""
        self.tables: dict[str, HeldTable] = {}  # that they hold, by mapping
        self._before = before
        self._faults: dict[str, list[str]] = {}  # by mapping
        self._faulty: dict[str, set[int]] = {}  # by mapping: the workers that have met these faults

    def take(self, message: Message, worker: int) -> None:
        """Note what a worker (its process id) tells of a table, and log it if it is new."""
        mapping = message["mapping"]
        if "faults" in message:
            text, faults = message["text"], message["faults"]
            if self._faults.get(mapping) != [text, *faults]:
                self._faults[mapping], self._faulty[mapping] = [text, *faults], set()
                for fault in faults:
                    log.error(text, mapping=mapping, error=fault)
            self._faulty[mapping].add(worker)
        elif message["held"]:
            version, *others = message["held"]
            self._take_table(mapping, HeldTable(tuple(version), *others), worker)

    def _take_table(self, mapping: str, held: HeldTable, worker: int) -> None:
        known, self.tables[mapping] = self.tables.get(mapping), held
        was_faulty = worker in self._faulty.get(mapping, ())
        if was_faulty or held != known:  # else it is a slow worker, which tells of the file before the fault
            self._faults.pop(mapping, None)
            self._faulty.pop(mapping, None)
        before = (known or self._before.get(mapping) or held).patterns
        shrunk = before >= MANY_PATTERNS and held.patterns < before / 2  # perhaps its end is missing
        if not held.patterns and known != held:
            log.warn("CSV file has no patterns, what no other mapping has is told 451", mapping=mapping)
        elif (known and known.version != held.version) or was_faulty or (shrunk and not known):
            tell = log.warn if shrunk else log.info
            tell("CSV file read again", mapping=mapping, patterns=held.patterns, before=before)
