"""The row that a database has shown last, in memory that all workers share: while it is there, a "no such row" counts.

The master makes it before it forks and keeps it over a reload, so that a worker that has found no row itself, as a new
or idle one, is as careful as the others with a table that is empty for a moment.
"""

from __future__ import annotations

import mmap
import struct
import zlib

SIZE = 1024  # octets; a key has at most 64 characters, an @ and 255 more
HEAD = struct.Struct("II")  # length and checksum of what follows
SEEN = struct.Struct("d")  # and then the key
TRIES = 3  # a write by another worker takes less than a microsecond


class LastRow:
    """There is no lock, so that a worker that is killed while it writes stops no other.

    What two workers write in the same moment may fail the checksum: then no row is known until one is found again.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SIZE)

    def read(self) -> tuple[str, float]:
        """The key, empty if none is known, and when its row was last found (monotonic)."""
        for _ in range(TRIES):
            octets = self._memory[:]
            length, checksum = HEAD.unpack_from(octets)
            content = octets[HEAD.size : HEAD.size + length]
            if len(content) >= SEEN.size and zlib.crc32(content) == checksum:
                return content[SEEN.size :].decode(), SEEN.unpack_from(content)[0]
        return "", 0.0

    def note(self, key: str, seen: float) -> None:
        """A worker has found this row."""
        content = SEEN.pack(seen) + key.encode()
        octets = HEAD.pack(len(content), zlib.crc32(content)) + content
        if len(octets) <= SIZE:
            self._memory[: len(octets)] = octets

    def forget(self, key: str) -> None:
        """This row is believed to be gone."""
        if self.read()[0] == key:
            self.note("", 0.0)
