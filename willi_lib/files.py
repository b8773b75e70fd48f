"""Files that an administrator names: no pipe or device in their place is opened, and a change of them is noticed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from time import monotonic
from typing import BinaryIO, NamedTuple

REGULAR = (stat.S_IFREG, stat.S_IFDIR)  # opening a pipe may wait for ever; opening a directory is an error at once
MAX_OCTETS = 4 << 20  # of a configuration, a certificate or a password
CALM = 10.0  # seconds a file that is written in place must rest: half of it could look whole
INTERVAL = 5.0  # seconds between looks
RETRY = 60.0  # seconds until what did not work is tried again


def open_file(path: str | Path) -> BinaryIO:
    """For reading. Raises OSError, also for what is no regular file."""
    path = Path(path)
    if stat.S_IFMT(path.stat().st_mode) not in REGULAR:
        raise OSError(errno.ESPIPE, "not a regular file", str(path))
    return path.open("rb")


def read_file(path: str | Path) -> bytes:
    """All of it. Raises OSError as `open_file`, also for what is too large for a file of ours."""
    with open_file(path) as file:
        octets = file.read(MAX_OCTETS + 1)
    if len(octets) > MAX_OCTETS:
        raise OSError(errno.EFBIG, f"has more than {MAX_OCTETS >> 20} MiB: is it another file?", str(path))
    return octets


class Stamp(NamedTuple):
    """Differs when the file does. A write sets both times to the same value."""

    device: int
    inode: int
    size: int
    written: int  # nanoseconds
    changed: int  # also by rename, chmod and the like; it cannot be set back

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class FileWatch:
    """Files that are read together: when to read them, because one is another one than was read.

    A new file that took its name by a rename is complete, and read if the next look finds it the same. One that is
    written in place may be half of what it will be: it is read when it has rested for `CALM`.
    """

    def __init__(self, interval: float, retry: float, look_at: Callable[[str], os.stat_result] = os.stat) -> None:
        """interval: seconds between looks; earlier ones find nothing. retry: see `failed`."""
        self.seen: dict[str, Stamp | None] = {}  # at the last look; None: there is no such file
        self.changed: list[str] = []  # since they were read
        self._interval = interval
        self._retry = retry
        self._look_at = look_at
        self._next_look = 0.0
        self._is_read = False
        self._calm_at: dict[str, float] = {}  # when each file that has changed will have rested
        self._retry_at = 0.0

    def note(self, files: Iterable[str]) -> bool:
        """See how the files are now, as before they are read; whether that is another way than before."""
        is_new = False
        for file in files:
            now = self._stamp(file)
            before = self.seen.setdefault(file, now)
            if now != before:
                is_new = True
                rest = 0.0 if now is None or _was_renamed(before, now) else CALM
                self._calm_at[file] = monotonic() + rest
                self.changed = list(dict.fromkeys((*self.changed, file)))
                self.seen[file] = now
        if is_new:
            self._is_read, self._retry_at = False, 0.0
        return is_new

    def look(self, files: Iterable[str]) -> bool:
        """Whether to read the files."""
        if monotonic() < self._next_look:
            return False
        self._next_look = monotonic() + self._interval
        if self.note(files) or self._is_read or self.is_being_written:
            return False
        return monotonic() >= self._retry_at

    @property
    def is_being_written(self) -> bool:
        """Whether one of the files has not rested for long enough."""
        return any(monotonic() < calm_at for calm_at in self._calm_at.values())

    def were_read(self) -> None:
        self._is_read, self.changed = True, []

    def failed(self, retry: bool = True) -> None:
        """The files that were noted last could not be used: they are read again when they change.

        retry: or after that time, since something else may have been wrong.
        """
        self._retry_at = monotonic() + self._retry if retry else inf

    def _stamp(self, file: str) -> Stamp | None:
        try:
            return Stamp.of(self._look_at(file))
        except OSError:
            return None  # reading it will say why


def _was_renamed(before: Stamp | None, now: Stamp) -> bool:
    """Whether another file has taken the name, and has not been written to since.

    A file that was removed and is created again is another one, too; but its times are equal.
    """
    other = before is None or (before.device, before.inode) != (now.device, now.inode)
    return other and now.changed != now.written
