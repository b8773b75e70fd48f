"""What ps, pgrep and top call this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

ARG_START, ARG_END = 48, 49  # fields of /proc/PID/stat, see proc(5)


def name_process(name: str, title: str = "") -> None:
    """name: for pgrep and top, at most 15 octets. title: in place of the command line that `ps aux` shows.

    Where there is no /proc, or the kernel does not let us, nothing changes.
    """
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)
        fields = ["", "", *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]
        start, room = int(fields[ARG_START - 1]), int(fields[ARG_END - 1]) - int(fields[ARG_START - 1])
        if title and room > 0:
            with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
                memory.seek(start)
                memory.write(title.encode("utf-8", "backslashreplace")[: room - 1].ljust(room, b"\0"))
