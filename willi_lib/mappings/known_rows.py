"""The rows that workers have found in a database, in memory that they share.

The master makes it before it forks and keeps it over a reload, so that each worker, also one that is new or idle, knows
what the others have found: that such a row is missing is no definite "no such row" yet.
"""

from __future__ import annotations

import mmap
import struct
from hashlib import blake2b

SIZE = 1024  # octets for the last row; a key has at most 64 characters, an @ and 255 more
HEAD = struct.Struct("dI")  # when it was found (monotonic), and the length of the key that follows
SLOTS = 1 << 20  # 8 MiB, of which only the pages that are used take memory
SECONDS = (1 << 32) - 1  # the half of a slot that says since when the row is missing; the other one is of a hash


class KnownRows:
    """There is no lock, so that a worker that is killed while it writes stops no other.

    What two workers write in the same moment may be a key that does not exist: as long as it is the last one, no "no
    such row" counts. Of two rows that have the same slot, the one that was noted last is known.
    """

    def __init__(self) -> None:
        self._last = mmap.mmap(-1, SIZE)
        self._slots = memoryview(mmap.mmap(-1, SLOTS * 8)).cast("Q")

    def last(self) -> tuple[str, float]:
        """The row that was found last: its key, empty if none is known, and when (monotonic)."""
        octets = self._last[:]
        seen, length = HEAD.unpack_from(octets)
        return octets[HEAD.size : HEAD.size + length].decode("utf-8", "replace"), seen

    def note(self, key: str, now: float) -> None:
        """A worker has found this row."""
        slot, mark = _place(key)
        self._slots[slot] = mark
        self._note_last(key, now)

    def missing_since(self, key: str) -> float | None:
        """Seconds (monotonic); 0: it is not missing; None: no worker has found it."""
        slot, mark = _place(key)
        found = self._slots[slot]
        return float(found & SECONDS) if found & ~SECONDS == mark else None

    def note_missing(self, key: str, now: float) -> None:
        """A worker has not found it again."""
        slot, mark = _place(key)
        self._slots[slot] = mark | int(now)

    def forget_last(self, key: str) -> None:
        """If it is this one: it is believed to be gone."""
        if self.last()[0] == key:
            self._note_last("", 0.0)

    def _note_last(self, key: str, now: float) -> None:
        octets = key.encode()
        if len(octets) <= SIZE - HEAD.size:
            self._last[: HEAD.size + len(octets)] = HEAD.pack(now, len(octets)) + octets


def _place(key: str) -> tuple[int, int]:
    """The number of its slot, and its mark there: never 0, which is an empty slot."""
    digest = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
    return digest % SLOTS, (digest & ~SECONDS) or 1 << 32
