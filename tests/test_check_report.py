"""willi_lib/check/report.py: the lines of `willi.py check`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.loopback import ROOT

# In a process of its own: willi_lib.check patches the world for gevent.
FAULTS = "import sys; from willi_lib.check.report import Report; Report().faults(sys.argv[1], 'correct that line')"


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("/a b/map.csv: Permission denied", "chgrp willi /a b/map.csv; chmod 640 /a b/map.csv"),
        ("/a/willi.conf: cannot read it: Permission denied", "chgrp willi /a/willi.conf; chmod 640 /a/willi.conf"),
        ("db: password_file: cannot read /a/db: Permission denied", "chgrp willi /a/db; chmod 640 /a/db"),
        ("/a/map.csv:3: no server", "correct that line"),
        ("/a/map.csv: No such file or directory", "correct that line"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_matter_of_its_group_and_mode(fault: str, advice: str):
    command = [sys.executable, "-c", FAULTS, fault]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"wrong  {fault} -> {advice}\n"
