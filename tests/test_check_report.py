"""willi_lib/check/finding.py: the lines of `willi.py check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loopback import ROOT

NOBODY = 65534

# In a process of its own: willi_lib.check patches the world for gevent.
FAULTS = (
    "import sys; from willi_lib.check.finding import faults, report; report(faults(sys.argv[1], 'correct that line'))"
)


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("/a b/map.csv: Permission denied", "chgrp willi /a b/map.csv; chmod 640 /a b/map.csv"),
        ("/a/willi.conf: cannot read it: Permission denied", "chgrp willi /a/willi.conf; chmod 640 /a/willi.conf"),
        ("mysql:db: password_file: cannot read /a/db: Permission denied", "chgrp willi /a/db; chmod 640 /a/db"),
        ("/a/map.csv:3: no server", "correct that line"),
        ("/a/map.csv: No such file or directory", "correct that line"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_matter_of_its_group_and_mode(fault: str, advice: str):
    command = [sys.executable, "-c", FAULTS, fault]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"wrong  {fault} -> {advice}\n"


def test_the_manual_has_the_same_advice_for_a_file_that_cannot_be_read():
    manual = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, "/FILE: Permission denied"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().partition(" -> ")[2].replace("/FILE", "FILE") in manual


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
    code = FAULTS.replace("; report(", f"; {become}; report(")
    command = [sys.executable, "-c", code, f"{key}: Permission denied"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    live.chmod(0o700)
    assert f" -> {live} is closed to this user: name a copy beside willi.conf" in done.stdout
