"""docs/monitoring: promtool takes the files, they name only what exists, and each recipe answers its question."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.loopback import HOST, ROOT, free_port, need
from tests.support.status import Status
from tests.support.talk import BOB, EHLO, deliver, greeted, reply, say
from tests.support.upstream import VERDICT, Delay, ScriptedUpstream

DIRECTORY = ROOT / "docs" / "monitoring"
PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
SUFFIXES = ("_bucket", "_sum", "_count")  # of a histogram
PROMETHEUS_OWN = {"instance", "job", "le"}


def promtool(*arguments: str | Path) -> str:
    """What it says; it must be content."""
    need("promtool")
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, cwd=DIRECTORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documented() -> dict[str, set[str]]:
    """The metrics of the page, and their labels."""
    rows = re.findall(r"^\| `(willi_\w+)` \|([^|]*)\|", PAGE, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


METRICS = documented()


def metric_of(name: str) -> str:
    """The metric of a sample."""
    for suffix in SUFFIXES:
        if name.removesuffix(suffix) in METRICS:
            return name.removesuffix(suffix)
    return name


# -- the files


def test_prometheus_takes_the_scrape_configuration_and_the_alerts():
    assert "1 rule files found" in promtool("check", "config", "prometheus.yml")
    assert "6 rules found" in promtool("check", "rules", "alerts.yml")


def test_the_alerts_come_when_they_should_and_not_before():
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")
    rules = (DIRECTORY / "alerts.yml").read_text(encoding="utf-8")
    tests = (DIRECTORY / "alerts_test.yml").read_text(encoding="utf-8")
    alerts = re.findall(r"alert: (\w+)", rules)
    assert alerts == re.findall(r"^\| `(Willi\w+)` \|", PAGE, re.MULTILINE)
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\n\s+exp_alerts:", tests), f"nothing shows that {alert} comes"
        assert re.search(rf"alertname: {alert}}}", tests), f"nothing shows when {alert} does not come"


def expressions_of_dashboard() -> list[str]:
    """All queries, with Grafana's variables replaced by what they may become."""
    found: list[str] = []

    def look(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(value for key, value in node.items() if key == "expr")
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            look(inner)

    look(json.loads((DIRECTORY / "grafana-dashboard.json").read_text(encoding="utf-8")))
    return [one.replace("$__rate_interval", "5m").replace("$instance", ".*") for one in found]


def test_prometheus_takes_every_expression_of_the_dashboard(tmp_path: Path):
    expressions = expressions_of_dashboard()
    assert len(expressions) > 20
    assert [one for one in expressions if "$" in one] == []
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # YAML, too
    assert f"{len(expressions)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


def test_panels_lie_beside_each_other():
    panels = json.loads((DIRECTORY / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def used(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric of an expression, and the labels that are asked of it."""
    for name, selector in re.findall(r"\b(willi_\w+)(?:\{([^}]*)\})?", expression):
        yield metric_of(name), set(re.findall(r"(\w+)=", selector))


def grouped(expression: str) -> set[str]:
    """The labels by which it adds up."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"\b(?:by|without|on) \(([^)]*)\)", expression))))


def expressions_of_alerts() -> list[str]:
    text = (DIRECTORY / "alerts.yml").read_text(encoding="utf-8")
    found = re.findall(r"expr: (?:>-\n)?((?:.|\n)*?)\n\s+for:", text)
    assert len(found) == 6
    return found


@pytest.mark.parametrize("expression", [*expressions_of_alerts(), *expressions_of_dashboard()])
def test_an_expression_names_only_metrics_and_labels_that_are_documented(expression: str):
    known: set[str] = set(PROMETHEUS_OWN)
    for name, labels in used(expression):
        assert name in METRICS
        assert labels <= METRICS[name] | PROMETHEUS_OWN
        known |= METRICS[name]
    assert grouped(expression) <= known


def test_willi_has_exactly_what_is_documented_and_promtool_likes_it(
    start_willi: StartWilli, start_upstream: StartUpstream
):
    need("promtool")
    status = Status(free_port())
    upstream = start_upstream()
    csv = f"pattern;server;tls_verify\nb.example;{upstream.server}\ndown.example;{HOST}:{free_port()}\n"
    willi = start_willi(csv=csv, status_listen=status.setting, max_connections_per_ip=2)
    willi.tolerate("Upstream failed")
    with greeted(willi) as client:
        deliver(client, BOB)
        assert say(client, b"MAIL FROM:<>", b"RCPT TO:<joe@down.example>")[1].startswith("451")
    status.wait_for(2, "willi_session_duration_seconds_count")  # with the probe
    exposed = status.get("/metrics").body
    assert set(re.findall(r"^# HELP (\S+)", exposed, re.MULTILINE)) == METRICS.keys()
    samples = status.samples()
    labelled = {metric_of(name): set(dict(labels)) for name, series in samples.items() for labels in series}
    assert {name: labels - PROMETHEUS_OWN for name, labels in labelled.items()} == {
        name: METRICS[name] for name in labelled
    }
    done = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- the recipes

RECIPES = dict(re.findall(r"^### (.+)\n(?:\n(?!    ).+(?:\n.+)*\n)*\n    (.+)$", PAGE, re.MULTILINE))


FROM_JOURNAL, FROM_FILE, FROM_SYSLOG, TO_JSON = re.findall(r"^```bash\n(.+)\n```$", PAGE, re.MULTILINE)


class Log:
    """A log of the real Willi: what was asked of it, and three ways to read it."""

    def __init__(self, willi: Willi, upstreams: dict[str, str], directory: Path) -> None:
        self.upstreams = upstreams
        self.sid = willi.lines(msg="Message accepted")[0]["sid"]
        self.hours = Counter(line["t"][:13] for line in willi.lines(msg="Message accepted"))
        self.from_file = FROM_FILE.replace("/var/log/willi.log", str(willi.log_file))
        bare = [line.partition(" ")[2] for line in willi.text.splitlines()]  # as others get it, who know the time
        entries = [{"__REALTIME_TIMESTAMP": "1764151200999999", "MESSAGE": line} for line in bare]
        (directory / "journal.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        journalctl = directory / "journalctl"
        journalctl.write_text(f'#!/bin/sh\n[ "$*" = "-u willi -o json" ] && cat {directory}/journal.json\n')
        journalctl.chmod(0o755)
        self.from_journal = f"PATH={directory}:$PATH\n{FROM_JOURNAL}"
        mail_log = directory / "mail.log"
        stamps = "2025-11-26T10:00:00.999999+00:00 mx1"
        mail_log.write_text("".join(f"{stamps} postfix/smtpd[7]: x\n{stamps} willi[8]: {line}\n" for line in bare))
        self.from_syslog = FROM_SYSLOG.replace("/var/log/mail.log", str(mail_log))

    def ask(self, title: str, read: str) -> list[str]:
        """What a recipe answers, with blanks in place of tabs. read: the function that knows where the log is."""
        command = RECIPES[title].replace("1WKQGJHCKL", self.sid).replace("630A5212AF3", "1234")
        command = command.replace("ann@example.org", "bob@b.example")
        script = f"set -euo pipefail\n{read}\n{TO_JSON}\n{command}\n"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return [" ".join(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture
def log(start_willi: StartWilli, start_upstream: StartUpstream, tmp_path: Path) -> Log:
    """Three messages to b.example, one to slow.example, and all that can go wrong."""
    need("jq", "bash")
    quick, slow = start_upstream(), start_upstream()
    quick.answers[b"RCPT TO:<nobody@b.example>"] = reply('550 5.1.1 no "nobody" = here')
    down = f"{HOST}:{free_port()}"
    csv = f"pattern;server;tls_verify\nb.example;{quick.server}\nslow.example;{slow.server}\ndown.example;{down}\n"
    willi = start_willi(csv=csv, max_connections_per_ip=2)
    willi.tolerate("Upstream failed")
    talk(willi, slow)
    return Log(willi, {"quick": quick.server, "slow": slow.server, "down": down}, tmp_path)


def talk(willi: Willi, slow: ScriptedUpstream) -> None:
    """From 127.0.0.1 mail that is taken, from .2 mail that is not, from .3 too many connections.

    slow: takes longer than the other one has.
    """
    with greeted(willi) as client:
        deliver(client, BOB, b"RCPT TO:<Ben@B.Example>")
        deliver(client, b"RCPT TO:<ben@b.example>")
        deliver(client, b"RCPT TO:<Bob@b.example>")
        willi.wait_for_log(msg="Message accepted", count=3)
        longest = max(float(line["duration"]) for line in willi.lines(msg="Message accepted"))
        slow.answers[VERDICT] = Delay(longest + 0.5)
        deliver(client, b"RCPT TO:<sue@slow.example>")
    with greeted(willi, source="127.0.0.2") as client:
        recipients = (b"nobody@b.example", b"ann@x.example", b"bob@X.example", b"joe@down.example")
        codes = [say(client, b"MAIL FROM:<>", b"RCPT TO:<%s>" % one, b"RSET")[1][:3] for one in recipients]
        assert codes == ["550", "554", "554", "451"]
    held = [willi.connect(source="127.0.0.3") for _ in range(2)]
    with Client(willi.port, source="127.0.0.3") as third:
        assert third.read_reply().code == 421
    for client in held:
        assert client.command(EHLO).code == 250
        client.close()
    willi.wait_for_log(msg="Connection refused")
    willi.wait_for_log(msg="Message rejected", count=4)


def test_each_recipe_answers_its_question(log: Log):
    quick, slow, down = log.upstreams.values()
    when = r"\S+T\S+"
    ok = "250 2.0.0 ok, queued as 1234"
    expected = {
        "What became of all mail to one recipient?": [f"{when} Message accepted ann@a.example {quick} {ok}"] * 2,
        "What else happened in that connection?": [f"t={when} lvl=info msg=.*"] * 4,
        "Which message has this queue number?": [f't={when} lvl=info msg="Message accepted" .* reply="{ok}" .*'] * 4,
        "Who is refused most?": ["4 127.0.0.2"],
        "Why, and by whom?": [
            "2 internal 554 5.7.1", f"1 upstream {quick} 550 5.1.1", f"1 internal {down} 451 4.4.1",
        ],
        "Which upstream is slow?": [rf"{slow} 1 ([1-9]|0\.[5-9])\S* \S+", rf"{quick} 3 [0-9.]+ [0-9.]+"],
        "Which upstream failed, and why?": [f"1 {down}: Connection refused"],
        "For which domains do we refuse to relay?": ["2 x.example"],
        "Which domains get the most mail?": ["b.example 3 63", "slow.example 1 21"],
        "How many messages an hour?": [f"{number} {hour}" for hour, number in log.hours.items()],
        "Who still sends in clear?": ["4 127.0.0.1"],
        "Whom did a limit turn away?": ["1 127.0.0.3 421 4.7.0 Too many connections from your address"],
        "What needs you?": [f't={when} lvl=error msg="Upstream failed" .*'],
    }  # fmt: skip
    assert list(RECIPES) == list(expected)
    for title, lines in expected.items():
        said = log.ask(title, log.from_file)
        assert len(said) == len(lines), (title, said)
        for line in lines:
            assert any(re.fullmatch(line, one) for one in said), (title, line, said)
    assert log.ask("Which upstream is slow?", log.from_file)[0].startswith(slow)


def test_the_journal_and_syslog_are_asked_the_same_way(log: Log):
    for read in (log.from_journal, log.from_syslog):
        for title in ("What became of all mail to one recipient?", "Who is refused most?", "Which upstream is slow?"):
            answers = [log.ask(title, one) for one in (read, log.from_file)]
            said, from_file = ([re.sub(r"^\S+T\S+ ", "", line) for line in answer] for answer in answers)
            assert said == from_file != []
        assert log.ask("How many messages an hour?", read) == ["4 2025-11-26T10"]
