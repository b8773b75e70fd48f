"""A process without a descriptor."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path


class Descriptors:
    """All that this process may have are taken."""

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(one.name) for one in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, self.limits[1]))
        self.taken = []
        with suppress(OSError):
            while True:
                self.taken.append(os.open(os.devnull, os.O_RDONLY))

    def __exit__(self, *_: object) -> None:
        for descriptor in self.taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)
