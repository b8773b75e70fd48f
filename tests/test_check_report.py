"""willi_lib/check/finding.py: the lines of `willi.py check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loopback import ROOT

NOBODY = 65534

# In a process of its own: willi_lib.check patches the world for gevent.
REPORT = (
    "import sys; from willi_lib.check.finding import faults, report; "
    "[report(faults(fault, 'correct that line')) for fault in sys.argv[1:]]"
)
ADVICE = {
    "/a b/map.csv: Permission denied": "chgrp willi /a b/map.csv; chmod 640 /a b/map.csv",
    "/a/willi.conf: cannot read it: Permission denied": "chgrp willi /a/willi.conf; chmod 640 /a/willi.conf",
    "mysql:db: password_file: cannot read /a/db: Permission denied": "chgrp willi /a/db; chmod 640 /a/db",
    "/a/map.csv:3: no server": "correct that line",
    "/a/map.csv: No such file or directory": "correct that line",
}


def reported(*faults: str, program: str = REPORT) -> list[str]:
    command = [sys.executable, "-c", program, *faults]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_a_file_that_cannot_be_read_is_a_matter_of_its_group_and_mode():
    *lines, general = reported(*ADVICE, "/FILE: Permission denied")
    assert lines == [f"wrong  {fault} -> {advice}" for fault, advice in ADVICE.items()]
    manual = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert general.partition(" -> ")[2].replace("/FILE", "FILE") in manual


@pytest.mark.parametrize("by", ["the path", "a link"])
def test_in_a_directory_that_is_closed_the_mode_of_the_file_is_no_help(tmp_path: Path, by: str):
    for directory in (tmp_path, *tmp_path.parents):  # pytest's are for their owner only
        if not directory.stat().st_mode & 0o001:
            directory.chmod(0o755)
    live = tmp_path / "live"
    live.mkdir()
    key = live / "privkey.pem"
    key.touch()
    if by == "a link":
        key = tmp_path / "key.pem"
        key.symlink_to(live / "privkey.pem")
    live.chmod(0)
    become = f"import os; os.getuid() or os.setuid({NOBODY})"
    [line] = reported(f"{key}: Permission denied", program=REPORT.replace("; [report(", f"; {become}; [report("))
    live.chmod(0o700)
    assert f" -> {live} is closed to this user: name a copy beside willi.conf" in line
