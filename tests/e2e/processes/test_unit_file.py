"""etc/willi.service in the eyes of systemd itself. install/test_with_systemd.py has it do its work."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.loopback import ROOT, need

UNIT = ROOT / "etc" / "willi.service"
PYTHON = "/opt/willi/venv/bin/python"
MOST_EXPOSED = 20  # tenths, of ten points


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    need("systemd-analyze")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    copy = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    assert PYTHON in text
    copy.write_text(text.replace(PYTHON, "/bin/true"), encoding="utf-8")  # a program that is there
    done = analyze("verify", "--man=no", str(copy))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_hardened():
    done = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", str(UNIT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level for willi.service" in done.stdout


def test_the_journal_of_a_busy_host_drops_no_line():
    """journald's usual limit for a service is 10,000 lines in 30 s."""
    [limit] = re.findall(r"^LogRateLimitIntervalSec=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert limit == "0"


@pytest.mark.parametrize(("renewed", "copied"), [("mx.example.org", True), ("www.example.org", False)])
def test_the_hook_for_certbot_copies_one_certificate_only(tmp_path: Path, renewed: str, copied: bool):
    text = UNIT.read_text(encoding="utf-8")
    [lines] = re.findall(r"^(#     #!/bin/sh\n(?:#     .*\n)+)", text, re.MULTILINE)
    etc, live = tmp_path / "etc", tmp_path / "live"
    etc.mkdir()
    (live / renewed).mkdir(parents=True)
    for name in ("privkey.pem", "fullchain.pem"):
        (live / renewed / name).write_text(renewed)
    hook = lines.replace("#     ", "").replace("/opt/willi/etc/", f"{etc}/").replace("/etc/letsencrypt/live", str(live))
    hook = hook.replace("-o root -g willi ", "")  # there is no such group here
    run = ["sh", "-euc", hook]
    subprocess.run(run, env={"PATH": "/usr/bin:/bin", "RENEWED_LINEAGE": str(live / renewed)}, check=True, timeout=60)
    assert sorted(path.name for path in etc.iterdir()) == (["fullchain.pem", "privkey.pem"] if copied else [])
