"""What the workers count, in memory that all processes share.

Each worker has a row that it alone writes, and everybody reads all rows: no lock, so that a
worker that is killed in the middle of anything stops nobody. Its row is cleared, and what it
counted has gone with it.
"""

from __future__ import annotations

import mmap
from time import monotonic

CELLS = 1 << 14  # a power of two
HASHES = 4  # of 14 bits, out of the 64 of hash()
WINDOW = 10.0  # seconds
WINDOWS = 7  # the current one, and six before it: at least a minute
RATE_WINDOW = WINDOW * (WINDOWS - 1)  # seconds

Cells = tuple[int, ...]


def cells_of(client: str) -> Cells:
    """Where a client is counted. Python's hash has a secret key, which the workers inherit from the master."""
    number = hash(client)
    return tuple(depth * CELLS + ((number >> (16 * depth)) & (CELLS - 1)) for depth in range(HASHES))


class Sketch:
    """How often each of any number of clients is there, in memory of a fixed size (a count-min sketch).

    A client is counted in four cells, which it shares with others by chance; the lowest of the four is
    its count. So it is never counted less than it should. It is counted more if other clients fill all
    of its cells: with 5,000 connections and 50 for each client at most 100 cells of 16,384 can be full, and
    a client is refused for others with a probability of 1 to 700 million.
    """

    def __init__(self, memory: memoryview, columns: int) -> None:
        """columns: of each cell; each has one writer."""
        self._table = memory.cast("I")
        self._columns = columns

    @staticmethod
    def octets(columns: int) -> int:
        """The memory that is needed."""
        return CELLS * HASHES * columns * 4

    def add(self, cells: Cells, column: int, number: int) -> None:
        """Count a client in (1) or out (-1)."""
        for cell in cells:
            self._table[cell * self._columns + column] += number

    def count(self, cells: Cells) -> int:
        """Of one client, over all columns."""
        table, columns = self._table, self._columns
        return min(sum(table[cell * columns : (cell + 1) * columns]) for cell in cells)

    def clear(self, column: int) -> None:
        """Forget what was counted in one column."""
        self._table[column :: self._columns] = memoryview(bytes(CELLS * HASHES * 4)).cast("I")


class Scoreboard:
    """The rows of all workers; made by the master before it forks."""

    def __init__(self, rows: int) -> None:
        """rows: the most workers that can be there at the same time, those that drain included."""
        self.rows = rows
        numbers = rows * 16
        sketches = [Sketch.octets(rows), Sketch.octets(rows * WINDOWS)]
        memory = memoryview(mmap.mmap(-1, numbers + sum(sketches)))  # of the kernel, and all zero
        self._beats = memory[: rows * 8].cast("d")
        self._totals = memory[rows * 8 : numbers].cast("Q")
        self._open = Sketch(memory[numbers : numbers + sketches[0]], rows)
        self._recent = Sketch(memory[numbers + sketches[0] :], rows * WINDOWS)

    @property
    def total(self) -> int:
        """The connections of all workers."""
        return sum(self._totals)

    def open_of(self, client: Cells) -> int:
        """The connections of one client."""
        return self._open.count(client)

    def recent_of(self, client: Cells) -> int:
        """How many connections of one client have come in the last minute, or up to 11 seconds more."""
        return self._recent.count(client)

    def last_beat(self, row: int) -> float:
        """When the worker last showed that it is alive (`monotonic`, which all processes share)."""
        return self._beats[row]

    def clear(self, row: int) -> None:
        """The worker is gone: so is all that it counted."""
        self._beats[row] = monotonic()
        self._totals[row] = 0
        self._open.clear(row)
        for window in range(WINDOWS):
            self._recent.clear(row * WINDOWS + window)


class Row:
    """The part of one worker: the only one who writes it."""

    def __init__(self, board: Scoreboard, number: int) -> None:
        self.board = board
        self._number = number
        self._window = int(monotonic() / WINDOW)

    def beat(self) -> None:
        """Show that this worker is alive, and forget old connections. To be called every second."""
        self.board._beats[self._number] = monotonic()
        self._turn()

    def add(self, number: int) -> None:
        """Count a connection in (1) or out (-1)."""
        self.board._totals[self._number] += number

    def add_open(self, client: Cells, number: int) -> None:
        """Count a connection of a client in (1) or out (-1)."""
        self.board._open.add(client, self._number, number)

    def add_recent(self, client: Cells, number: int) -> None:
        """Note that a client has come (1), or take that back (-1) at once."""
        self._turn()
        self.board._recent.add(client, self._column(self._window), number)

    def _turn(self) -> None:
        """Each window begins empty."""
        now = int(monotonic() / WINDOW)
        for window in range(max(self._window + 1, now - WINDOWS + 1), now + 1):
            self.board._recent.clear(self._column(window))
        self._window = now

    def _column(self, window: int) -> int:
        return self._number * WINDOWS + window % WINDOWS
