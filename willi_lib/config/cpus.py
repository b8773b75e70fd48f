"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path


def usable_cpus() -> int:
    """By its affinity, and by the quota of its control groups (`docker run --cpus`, CPUQuota= of systemd)."""
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return math.ceil(min(len(os.sched_getaffinity(0)), quota))


def cpu_quota(groups: Path, mounted: Path) -> float:
    """The smallest quota of its control group and of all above it (cgroups(7), version 2), in CPUs; inf: none.

    groups: the file that names the group. mounted: where the groups are.
    """
    quotas = [math.inf]
    try:
        named = re.search("^0::/(.*)$", groups.read_text(), re.MULTILINE)
        if named is None:
            return math.inf
        group = mounted / named[1]
        if ".." in group.parts or not group.is_dir():  # seen from a container, in which the top is the group itself
            group = mounted
        for level in (group, *group.parents):
            file = level / "cpu.max"  # "max 100000" or "150000 100000"; the top has none
            quota, period = file.read_text().split() if file.exists() else ("max", "")
            if quota != "max":
                quotas.append(int(quota) / int(period))
            if level == mounted:
                break
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no control groups, or others than we know: then there is only the affinity
    return min(quotas)
