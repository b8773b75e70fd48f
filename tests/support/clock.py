"""A wall clock that a test can set, for one process and its children: libfaketime. Their monotonic clock goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

LIBRARY = "usr/lib/*/faketime/libfaketimeMT.so.1"  # Debian's package libfaketime


class WallClock:
    """As long as nobody jumps it is the machine's."""

    def __init__(self, directory: Path) -> None:
        """directory: for the file that tells the time."""
        found = sorted(Path("/").glob(LIBRARY))
        if not found:
            pytest.skip("needs libfaketime: see tests/e2e/packages.txt")
        self._file = directory / "clock"
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """From now on it is so far ahead of the machine's."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)
