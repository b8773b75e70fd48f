"""etc/willi.service in the eyes of systemd itself. test_install.py has it do its work."""

from __future__ import annotations

import subprocess

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
