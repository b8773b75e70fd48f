"""The rows that workers have found in a database, in memory that they share.

The master makes it before it forks and keeps it over a reload, so that each worker, also one that is new or idle, knows
what the others have found: that such a row is missing is no definite "no such row" yet.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from hashlib import blake2b

SIZE = 1024  # octets for the last row; a key has at most 64 characters, an @ and 255 more
HEAD = struct.Struct("II")  # length and checksum of what follows
SEEN = struct.Struct("d")  # and then the key
TRIES = 3  # a write by another worker takes less than a microsecond
SLOTS = 1 << 20  # 8 MiB, of which only the pages that are used take memory


class KnownRows:
    """There is no lock, so that a worker that is killed while it writes stops no other.

    What two workers write in the same moment may fail the checksum: then no last row is known until one is found
    again. Of other rows there is no more than 4 octets of a hash each: the newer one of two in the same slot is known.
    """

    def __init__(self) -> None:
        self._last = mmap.mmap(-1, SIZE)
        self._slots = memoryview(mmap.mmap(-1, SLOTS * 8)).cast("Q")  # hash << 32 | seconds (monotonic): missing since

    def last(self) -> tuple[str, float]:
        """The row that was found last: its key, empty if none is known, and when (monotonic)."""
        for _ in range(TRIES):
            octets = self._last[:]
            length, checksum = HEAD.unpack_from(octets)
            content = octets[HEAD.size : HEAD.size + length]
            if len(content) >= SEEN.size and zlib.crc32(content) == checksum:
                return content[SEEN.size :].decode(), SEEN.unpack_from(content)[0]
        return "", 0.0

    def note(self, key: str, now: float) -> None:
        """A worker has found this row."""
        slot, mark = _place(key)
        self._slots[slot] = mark
        self._note_last(key, now)

    def missing_since(self, key: str) -> float | None:
        """Seconds (monotonic); 0: it is not missing; None: no worker has found it."""
        slot, mark = _place(key)
        found = self._slots[slot]
        return float(found & 0xFFFFFFFF) if found & ~0xFFFFFFFF == mark else None

    def note_missing(self, key: str, now: float) -> None:
        """A worker has not found it again."""
        slot, mark = _place(key)
        self._slots[slot] = mark | int(now)

    def forget_last(self, key: str) -> None:
        """If it is this one: it is believed to be gone."""
        if self.last()[0] == key:
            self._note_last("", 0.0)

    def _note_last(self, key: str, now: float) -> None:
        content = SEEN.pack(now) + key.encode()
        octets = HEAD.pack(len(content), zlib.crc32(content)) + content
        if len(octets) <= SIZE:
            self._last[: len(octets)] = octets


def _place(key: str) -> tuple[int, int]:
    """The number of its slot, and what stands there in the upper half: never 0, which is an empty slot."""
    digest = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
    return digest % SLOTS, (digest & ~0xFFFFFFFF) or 1 << 32
