"""A new kind of mapping needs one file and one line in open.py: all of Willi knows it then."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.conftest import StartWilli
from tests.support.daemon import PYTHON
from tests.support.loopback import PATIENCE, ROOT, free_port, wait_until
from tests.support.status import Status
from tests.support.talk import MAIL, QUEUED, deliver, greeted, say
from tests.support.toy_source import PREFIX
from tests.support.upstream import ScriptedUpstream

TO_OLD, TO_NEW = b"RCPT TO:<bob@old.example>", b"RCPT TO:<bob@new.example>"


def test_a_new_source_serves_is_read_again_and_shown(
    start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path
):
    file, status = tmp_path / "domain", Status(free_port())
    environment = {"DOMAIN_FILE": str(file)}
    file.write_text("old.example")
    toy = {"type": "static", "server": upstream.server, "tls_verify": False}
    willi = start_willi(
        mappings={"toy": toy}, workers=1, status_listen=status.setting, prefix=PREFIX, environment=environment
    )
    assert deliver(greeted(willi), TO_OLD) == QUEUED
    assert say(greeted(willi), MAIL, TO_NEW)[-1].startswith("554 5.7.1")

    def willi_says(command: str, *words: str) -> str:
        arguments = [*PREFIX, PYTHON, str(ROOT / "willi.py"), command, "-c", str(willi.config), *words]
        done = subprocess.run(
            arguments, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        return done.stdout + done.stderr

    assert f"toy:toy  old.example  {upstream.server}" in willi_says("lookup", "ann@old.example")
    assert "ok     toy:toy: 1 pattern\n" in willi_says("check")

    def tables() -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(status.get("/status.json").body)["mappings"]
        return found

    wait_until(tables, "a report")
    assert [(table["name"], table["kind"], table["patterns"]) for table in tables()] == [("toy:toy", "toy", 1)]

    file.write_text("new.example")
    wait_until(lambda: say(greeted(willi), MAIL, TO_NEW)[-1].startswith("250"), "the new domain")
    willi.tolerate("CSV file not read")
    file.unlink()
    wait_until(lambda: "No such file" in str(tables()), "the fault")
    assert "No such file or directory" in willi_says("check", "--quick")
    assert deliver(greeted(willi), TO_NEW) == QUEUED
