"""Whether there is memory for one more connection, where the system has set a limit to it (RLIMIT_AS and the like).

Asked before a connection is let in, so that those who are in keep enough to go on: a greenlet that finds no memory
for its stack ends the process. Where the kernel kills processes instead (MemoryMax of systemd), the master replaces
the worker.
"""

from __future__ import annotations

import mmap

HEADROOM = 16 << 20  # octets that must still be to be had; all sessions together may need them
EVERY = 32  # connections between two looks: they take less than a sixteenth of it


class Memory:
    """What one worker knows of it."""

    def __init__(self) -> None:
        self._most: int | None = None  # connections, while memory is short

    @property
    def is_short(self) -> bool:
        """Whether the last look found too little."""
        return self._most is not None

    def allows(self, connections: int) -> bool:
        """Whether there is room for one more, besides so many.

        If not, a quarter of them must go, or memory come back: what they leave is the allocator's, and
        mostly cannot be seen from outside. A few are always let in: serving nobody would be no better.
        """
        if self._most is None and (connections % EVERY or not connections):
            return True
        if _is_there(HEADROOM):
            self._most = None
        elif self._most is None:
            self._most = max(EVERY, connections * 3 // 4)
        return self._most is None or connections < self._most


def _is_there(octets: int) -> bool:
    """Address space that is not touched costs nothing."""
    try:
        mmap.mmap(-1, octets, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return False
    return True
