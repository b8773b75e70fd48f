"""What ps, pgrep and top call this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

ARG_START, ARG_END = 48, 49  # fields of /proc/PID/stat, see proc(5)


def name_process(name: str, in_command: bool = True) -> None:
    """name: for pgrep and top, at most 15 octets. in_command: also for `ps aux`, in the place of the interpreter.

    Where there is no /proc, or the kernel does not let us, nothing changes.
    """
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)
        if not in_command:
            return
        _, program, *rest = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        title = b"\0".join([name.encode(), program.rpartition(b"/")[2], *rest])
        fields = ["", "", *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]
        start, room = int(fields[ARG_START - 1]), int(fields[ARG_END - 1]) - int(fields[ARG_START - 1])
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(title[: room - 1].ljust(room, b"\0"))
