"""Tells whether a file is another one than before."""

from __future__ import annotations

from pathlib import Path


def file_signature(path: str | Path) -> str:
    """Differs when the file is another one, or has been written."""
    try:
        found = Path(path).stat()
    except OSError as error:
        return f"{path}:{error.errno}"
    return f"{path}:{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"
