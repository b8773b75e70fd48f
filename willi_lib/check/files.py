"""Who may read and write the files that willi.conf names."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

from willi_lib.config import CsvSettings, MysqlSettings, Settings
from willi_lib.mappings.open import others_can_read

from .report import Report

OTHERS_READ = 0o004  # of a file's mode
OTHERS_WRITE = 0o002


def look_at_files(settings: Settings, report: Report) -> None:
    """Secrets that others can read, files that others can write, and those that the workers cannot read."""
    for key in settings.tls_key:
        if _mode(key) & OTHERS_READ:
            report.warn(key, "every user of this machine can read this private key", f"chmod o= {key}")
    databases = [mapping for mapping in settings.mappings if isinstance(mapping, MysqlSettings)]
    for database in databases:
        file = database.password_file
        if others_can_read(file):
            report.warn(f"mysql:{database.name}", f"every user of this machine can read {file}", f"chmod o= {file}")
    if any(database.password for database in databases) and _mode(settings.path) & OTHERS_READ:
        advice = f"chmod o= {settings.path}, or use password_file"
        report.warn(settings.path, "every user of this machine can read the password in it", advice)
    for file in sorted(set(_all_files(settings))):
        if _mode(file) & OTHERS_WRITE:
            what = "every user of this machine can change it, and with it where mail goes"
            report.wrong(file, what, f"chmod o-w {file}")
    _look_at_rights(settings, report)


def _all_files(settings: Settings) -> Iterator[str]:
    """Everything that is read, the file itself included."""
    yield settings.path
    yield from settings.tls_cert
    yield from settings.tls_key
    for mapping in settings.mappings:
        yield mapping.policy.upstream_tls_ca
        if isinstance(mapping, CsvSettings):
            yield mapping.file
        elif isinstance(mapping, MysqlSettings):
            yield from (mapping.password_file, mapping.tls_ca)


def _mode(file: str) -> int:
    """Of a file that is not there: nobody may do anything with it."""
    try:
        return Path(file).stat().st_mode if file else 0
    except OSError:
        return 0


def _look_at_rights(settings: Settings, report: Report) -> None:
    """The files that the workers read again when they are no longer root."""
    if os.geteuid() != 0:
        return
    if not settings.user:
        what = "not set: a Willi that root starts stays root; and what root can read here, the service perhaps cannot"
        advice = "set user, or check as the user of the service: runuser -u willi -g willi -- willi.py check"
        report.warn("user", what, advice)
        return
    account = pwd.getpwnam(settings.user)
    group = grp.getgrnam(settings.group).gr_gid if settings.group else account.pw_gid
    groups = os.getgrouplist(settings.user, group)
    files = {mapping.file for mapping in settings.mappings if isinstance(mapping, CsvSettings)}
    for file in filter(os.path.exists, sorted(files)):
        test = subprocess.run(["test", "-r", file], user=account.pw_uid, group=group, extra_groups=groups, check=False)
        if test.returncode != 0:
            advice = f"let that user read it, and enter its directory: namei -l {file}"
            report.wrong(file, f"{settings.user} (user) may not read it, and will have to", advice)
