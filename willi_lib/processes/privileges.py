"""Who a process is once it has read what only root may."""

from __future__ import annotations

import os
import pwd
from grp import getgrnam

from ..config import Settings


def drop_privileges(settings: Settings) -> None:
    """Become `user` and `group`, for good. Does nothing if Willi was not started as root, or shall stay it."""
    if os.geteuid() != 0 or not settings.user:
        return
    account = pwd.getpwnam(settings.user)
    group = getgrnam(settings.group).gr_gid if settings.group else account.pw_gid
    os.initgroups(settings.user, group)
    os.setgid(group)
    os.setuid(account.pw_uid)
