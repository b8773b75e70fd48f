"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus() -> int:
    """By its affinity, and by the quota of its control groups (`docker run --cpus`, CPUQuota= of systemd)."""
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return math.ceil(min(len(os.sched_getaffinity(0)), quota))


def cpu_quota(groups: Path, mounted: Path) -> float:
    """The smallest quota of its groups and of all above them, in CPUs; infinity if there is none.

    groups: the file that names them. mounted: where they are.
    """
    quotas = [math.inf]
    try:
        for line in groups.read_text().splitlines():  # cgroups(7): 4:cpu,cpuacct:/path, or 0::/path of version 2
            _, controllers, path = line.split(":", 2)
            if not controllers:
                quotas += _quotas(mounted, path)
            elif "cpu" in controllers.split(","):
                quotas += _quotas(mounted / controllers, path)
    except (OSError, ValueError):
        pass  # no control groups, or others than we know: then there is only the affinity
    return min(quotas)


def _quotas(top: Path, path: str) -> Iterator[float]:
    """Of each level from that path up to the top."""
    group = top / path.lstrip("/")
    if ".." in group.parts or not group.is_dir():  # seen from a container, in which the top is the group itself
        group = top
    levels = [group, *group.parents]
    for level in levels[: levels.index(top) + 1]:
        # cpu.max is "max 100000" or "150000 100000"; cpu.cfs_quota_us may be -1.
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            files = [level / name for name in names]
            if all(file.exists() for file in files):
                quota, period = " ".join(file.read_text() for file in files).split()
                if quota.isdigit() and int(quota) and int(period):
                    yield int(quota) / int(period)
