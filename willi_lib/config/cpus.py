"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus() -> int:
    """By its affinity, and by the quota of its control groups (`docker run --cpus`, CPUQuota= of systemd)."""
    return math.ceil(min(len(os.sched_getaffinity(0)), cpu_quota(Path("/proc/self"))))


def cpu_quota(process: Path) -> float:
    """The smallest quota of its groups, in CPUs; infinity if there is none. process: its directory in /proc."""
    quotas = [math.inf]
    try:
        for group, top in _groups(process):
            levels = [group, *group.parents]
            quotas += [quota for level in levels[: levels.index(top) + 1] for quota in _quota(level)]
    except (OSError, ValueError):
        pass  # no /proc, no control groups, or others than we know: then there is only the affinity
    return min(quotas)


def _groups(process: Path) -> Iterator[tuple[Path, Path]]:
    """The directories of its groups that control CPUs, each with the highest one that can be seen."""
    paths = {}
    for line in (process / "cgroup").read_text().splitlines():  # cgroups(7): 4:cpu,cpuacct:/path, or 0::/path
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths[bool(controllers)] = path
    for line in (process / "mountinfo").read_text().splitlines():  # proc(5)
        place, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        is_first_version = kind == "cgroup" and "cpu" in options.split(",")
        if is_first_version in paths and (is_first_version or kind == "cgroup2"):
            root, mounted = place.split(" ")[3:5]
            path = os.path.relpath(paths[is_first_version], root)  # of a container: its root is the group itself
            yield Path(mounted) / ("" if path.startswith("..") else path), Path(mounted)


def _quota(group: Path) -> Iterator[float]:
    """Of one level, if it has one: cpu.max is "max 100000" or "150000 100000", cpu.cfs_quota_us may be -1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        files = [group / name for name in names]
        if all(file.exists() for file in files):
            quota, period = " ".join(file.read_text() for file in files).split()
            if quota.isdigit() and int(quota) and int(period):
                yield int(quota) / int(period)
