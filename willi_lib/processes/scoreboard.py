"""What the workers count, in memory that all processes share.

Each worker has a row that it alone writes, and all read all rows: no lock, so that a worker that is killed in the
middle of anything stops no other. Its row is cleared, and what it counted has gone with it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import lru_cache
from time import monotonic

CELLS = 1 << 16  # of a sketch, for each of the
HASHES = 4  # of 16 bits, out of the 64 of hash()
SKETCH = CELLS * HASHES * 2  # octets
WINDOW = 10.0  # seconds
WINDOWS = 7  # the current one, and six before it: at least a minute

Cells = tuple[int, ...]


@lru_cache(maxsize=1000)  # mostly it is asked twice, when a client comes and when it goes
def cells_of(client: str) -> Cells:
    """Where a client is counted. Python's hash has a secret key, which the workers inherit from the master."""
    number = hash(client)
    return tuple([depth * CELLS + ((number >> (16 * depth)) & (CELLS - 1)) for depth in range(HASHES)])


class Sketches:
    """How often each of any number of clients is there, in memory of a fixed size: count-min sketches, one a writer.

    A client is counted in four cells, which it shares with others by chance; the lowest of the four is its
    count. So it is never counted less than it should. It is counted more only if others fill all four: with
    5,000 connections and 50 for each client, at most 100 of 65,536 cells can be full, and one stranger in
    10^11 is refused for others. With 20,000 connections and 2 for each client it is one in 2,000.
    """

    def __init__(self, number: int) -> None:
        self._memory = mmap.mmap(-1, number * SKETCH)  # all zero, and only there where it was touched
        self._table = memoryview(self._memory).cast("H")

    def add(self, cells: Cells, sketch: int, number: int) -> None:
        """Count a client in (1) or out (-1)."""
        start = sketch * CELLS * HASHES
        for cell in cells:
            self._table[start + cell] += number

    def count(self, cells: Cells, sketches: Sequence[int]) -> int:
        """Of one client, over several of them."""
        table = self._table
        starts = [sketch * CELLS * HASHES for sketch in sketches]
        return min([sum([table[start + cell] for start in starts]) for cell in cells])

    def clear(self, sketch: int, number: int = 1) -> None:
        """Forget what was counted in one, or in several from one on. The kernel takes their memory back."""
        self._memory.madvise(mmap.MADV_REMOVE, sketch * SKETCH, number * SKETCH)


class Scoreboard:
    """The rows of all workers; made by the master before it forks."""

    def __init__(self, rows: int, rates: bool) -> None:
        """rows: the most workers that can be there at the same time, those that drain included.

        rates: whether connections a minute are counted.
        """
        self.rows = rows
        self.rates = rates
        numbers = memoryview(mmap.mmap(-1, rows * 16))
        self.beats = numbers[: rows * 8].cast("d")  # 0: no worker has this row
        self.totals = numbers[rows * 8 :].cast("Q")
        self.open = Sketches(rows)
        self.recent = Sketches(rows * WINDOWS if rates else 1)

    @property
    def total(self) -> int:
        return sum(self.totals)

    def open_of(self, client: Cells) -> int:
        return self.open.count(client, self._used_rows())

    def recent_of(self, client: Cells) -> int:
        """How many connections of one client have come in the last minute, or up to 11 seconds more."""
        rows = self._used_rows()
        return self.recent.count(client, [row * WINDOWS + window for row in rows for window in range(WINDOWS)])

    def _used_rows(self) -> list[int]:
        return [row for row, beat in enumerate(self.beats) if beat]


class Row:
    """The part of one child, which alone writes it; the master only gives and clears it."""

    def __init__(self, board: Scoreboard, number: int) -> None:
        self.board = board
        self.number = number
        self._window = int(monotonic() / WINDOW)

    def give(self) -> None:
        """A child will have this row, which no other has."""
        self.board.beats[self.number] = monotonic()

    def clear(self) -> None:
        """The child is gone: so is all that it counted."""
        board = self.board
        board.beats[self.number] = 0.0
        board.totals[self.number] = 0
        board.open.clear(self.number)
        if board.rates:
            board.recent.clear(self.number * WINDOWS, WINDOWS)

    @property
    def last_beat(self) -> float:
        """When it last showed that it is alive (`monotonic`, which all processes share)."""
        return self.board.beats[self.number]

    def beat(self) -> None:
        """Show that this worker is alive, and forget old connections. To be called every second."""
        self.board.beats[self.number] = monotonic()
        self._turn()

    def add(self, number: int) -> None:
        """Count a connection in (1) or out (-1)."""
        self.board.totals[self.number] += number

    def add_open(self, client: Cells, number: int) -> None:
        """Count a connection of a client in (1) or out (-1)."""
        self.board.open.add(client, self.number, number)

    def add_recent(self, client: Cells) -> None:
        self._turn()
        self.board.recent.add(client, self._sketch(self._window), 1)

    def take_back_recent(self, client: Cells) -> None:
        """The last one that was noted was refused."""
        self.board.recent.add(client, self._sketch(self._window), -1)

    def _turn(self) -> None:
        """Each window begins empty."""
        now = int(monotonic() / WINDOW)
        if self.board.rates:
            for window in range(max(self._window + 1, now - WINDOWS + 1), now + 1):
                self.board.recent.clear(self._sketch(window))
        self._window = now

    def _sketch(self, window: int) -> int:
        return self.number * WINDOWS + window % WINDOWS
