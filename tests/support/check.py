"""`willi.py check` on a file out of the test, and its findings as values."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import PYTHON, run_willi, willi_environment
from tests.support.loopback import HOST, ROOT, free_port

NOBODY = b"RCPT TO:<relay-test@willi-check.invalid>"  # what the stranger asks an upstream for
GOOD, WRONG = 0, 1


@dataclass(frozen=True)
class Finding:
    """One of the list that --json prints."""

    level: str
    subject: str
    what: str
    advice: str


def configure(directory: Path, csv: str, more: str = "", mappings: str = "", dns_timeout: str = "0.3s") -> Path:
    """A willi.conf with one CSV mapping. more: lines above [mappings]; mappings: sections behind the CSV's.

    dns_timeout: so short where a test does not need the machine's DNS, which is silent on some.
    """
    (directory / "map.csv").write_text("pattern;server;tls_verify\n" + csv)
    path = directory / "willi.conf"
    path.write_text(
        f"domain = mx.willi.example\nlisten = {HOST}:{free_port()}\nconnect_timeout = 20s\n{more}\n"
        f"dns_timeout = {dns_timeout}\n[mappings]\n[[people]]\ntype = csv\nfile = map.csv\n{mappings}"
    )
    return path


def findings(path: Path, prefix: Sequence[str] = ()) -> list[Finding]:
    """What `check --json` says; it must say nothing else, and its exit status must fit."""
    words = ["check", "--json", "-c", str(path)]
    if prefix:
        command = [*prefix, PYTHON, str(ROOT / "willi.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=willi_environment())
    else:
        done = run_willi(*words)
    assert done.stderr == ""
    found = [Finding(**entry) for entry in json.loads(done.stdout)]
    assert done.returncode == (WRONG if any(one.level == "wrong" for one in found) else GOOD)
    return found


def lines(path: Path) -> list[str]:
    """What `check` says to somebody who reads it from a pipe."""
    return run_willi("check", "-c", path).stdout.splitlines()


def about(found: Sequence[Finding], subject: str) -> list[Finding]:
    """Those of one subject."""
    return [one for one in found if one.subject == subject]


def bad(found: Sequence[Finding]) -> list[Finding]:
    """Those that are not ok."""
    return [one for one in found if one.level != "ok"]
