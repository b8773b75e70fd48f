"""`willi.py` as a person uses it: usage, exit codes and `lookup`. For `check` see test_check.py."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import textwrap
from pathlib import Path

import pytest

from tests.support.check import configure
from tests.support.daemon import run_willi, write_config
from tests.support.loopback import HOST, ROOT
from willi_lib import VERSION

GOOD, WRONG, USAGE, CANNOT_LISTEN, FAILED = range(5)
ONE_TABLE = "--diff needs one mapping with type = csv, or one whose file has the same name as the old one"


def test_version_and_help():
    assert run_willi("--version").stdout == f"willi {VERSION}\n"
    assert "willi.py lookup [-c FILE] [--json] (--from FILE | ADDRESS...)" in run_willi("--help").stdout


@pytest.mark.parametrize(("arguments", "wrong"), [
    (["serve"], "there is no command 'serve'"),
    (["chekc"], "there is no command 'chekc', did you mean 'check'"),
    (["--quick", "chekc"], "there is no command 'chekc', did you mean 'check'"),
    (["ch\u200beck"], r"there is no command 'ch\u200beck', did you mean 'check'"),
    (["check", "--\x1b[2J"], r"check has no option --\x1b[2J"),
    (["lookup"], "lookup needs an address"),
    (["lookup", "-c", "x.conf"], "lookup needs an address"),
    (["lookup", "--json"], "lookup needs an address"),
    (["lookup", "--from"], "--from must be there once, with a file behind it"),
    (["lookup", "--diff", "old.csv", "a@b.example"], "lookup takes addresses, or --from, or --diff"),
    (["lookup", "--frm=x", "a@b.example"], "lookup has no option --frm=x, did you mean '--from'"),
    (["check", "x"], "check takes no 'x'"),
    (["-c", "x.conf", "top", "x"], "top takes no 'x'"),
    (["-x"], "willi.py has no option -x"),
    (["check", "--quik"], "check has no option --quik, did you mean '--quick'"),
    (["top", "--json"], "top has no option --json"),
    (["--json"], "willi.py has no option --json"),
    (["lookup", "--diff", "old", "--json"], "lookup --diff has no option --json"),
    (["-c"], "-c must be there once, with a file behind it"),
    (["-c", "a", "-c", "b"], "-c must be there once, with a file behind it"),
    (["--debug", "--debug"], "an option is there twice"),
])  # fmt: skip
def test_wrong_usage_is_2_and_names_the_wrong_word(arguments: list[str], wrong: str):
    done = run_willi(*arguments)
    assert done.returncode == USAGE
    assert done.stderr.splitlines()[0] == f"willi.py: {wrong}; see willi.py --help"
    assert "Usage:" in done.stderr


def test_a_missing_file_is_named(tmp_path: Path):
    done = run_willi("-c", tmp_path / "none.conf")
    assert done.returncode == WRONG
    assert f"{tmp_path}/none.conf: cannot read it: No such file or directory" in done.stderr


@pytest.mark.parametrize("command", [[], ["check"], ["lookup", "a@b.example"]])
def test_a_wrong_file_is_told_with_all_its_faults(tmp_path: Path, command: list[str]):
    path = configure(tmp_path, "b.example;127.0.0.1\n", more="raed_timeout = 5m\nmax_errors = many")
    done = run_willi(*command[:1], "-c", path, *command[1:])
    assert done.returncode == WRONG
    assert done.stdout == ""
    assert [line.removeprefix(str(path)) for line in done.stderr.splitlines()] == [
        ":4: raed_timeout: unknown key; did you mean 'read_timeout'?",
        ":5: max_errors: 'many': must be a whole number from 1 to 1000000",
    ]


def test_a_bad_csv_line_refuses_to_start(tmp_path: Path):
    path = configure(tmp_path, "b.example;127.0.0.1\nc.example\n")
    done = run_willi("-c", path)
    assert done.returncode == WRONG
    assert f"{tmp_path}/map.csv:3: no server: a line is pattern;server;tls_verify" in done.stdout
    checked = run_willi("check", "-c", path)
    assert checked.returncode == WRONG
    assert f"wrong  {tmp_path}/map.csv:3: no server" in checked.stdout


def test_a_port_in_use_is_3(tmp_path: Path):
    with socket.create_server((HOST, 0)) as taken:
        path = configure(tmp_path, "b.example;127.0.0.1\n")
        path.write_text(path.read_text().replace("listen = ", f"listen = {HOST}:{taken.getsockname()[1]}, "))
        done = run_willi("-c", path)
    assert done.returncode == CANNOT_LISTEN
    assert "Address already in use" in done.stdout


def test_lookup_shows_each_key_and_the_route(tmp_path: Path):
    path = configure(
        tmp_path,
        "b.example;mx1.b.example,mx2.b.example:2525;false\neva@c.example;[2001:db8::1]:25\n",
        more="recipient_delimiter = +",
    )
    done = run_willi("lookup", "-c", path, "Ann+News@B.example", "udo@c.example")
    assert done.returncode == WRONG  # one of them has none
    name = f"csv:{tmp_path}/map.csv"
    assert [re.sub(r"  \([0-9.]+ ms.*\)$", "", line).strip() for line in done.stdout.splitlines()] == [
        "Ann+News@B.example",
        f"{name}  ann+news@b.example  -",
        f"{name}  ann@b.example  -",
        f"{name}  b.example  mx1.b.example:25,mx2.b.example:2525",
        "route: mx1.b.example:25,mx2.b.example:2525, tls_verify = false",
        "udo@c.example",
        f"{name}  udo@c.example  -",
        f"{name}  c.example  -",
        "no mapping matches, the client gets 554 5.7.1 Relay access denied",
    ]
    assert run_willi("lookup", "-c", path, "eva@c.example").returncode == GOOD
    assert run_willi("lookup", "-c", path, "<eva@c.example>").returncode == GOOD


def test_lookup_of_octets_that_are_no_text_is_answered(tmp_path: Path):
    path = configure(tmp_path, "b.example;127.0.0.1\n")
    done = run_willi("lookup", "-c", path, os.fsdecode(b"\x1b[31m\xff@b.example"))
    assert done.returncode == WRONG
    assert done.stdout.startswith("\\x1b[31m\\udcff@b.example\n  refused: ")
    assert done.stderr == ""


def test_letters_that_the_terminal_does_not_have_are_no_reason_to_stop(tmp_path: Path):
    path = configure(tmp_path, "b.example;127.0.0.1\n")
    done = run_willi("lookup", "-c", path, "jörg@b.example", environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == GOOD
    assert done.stdout.startswith("j\\xf6rg@b.example\n")


def test_lookup_says_what_is_no_address(tmp_path: Path):
    path = configure(tmp_path, "b.example;127.0.0.1\n")
    done = run_willi("lookup", "-c", path, "ann b@c")
    assert done.returncode == WRONG
    assert "501 5.1.3 Bad recipient address syntax" in done.stdout


def test_lookup_reads_addresses_from_a_file_or_stdin_and_answers_in_json_lines(tmp_path: Path):
    path = configure(tmp_path, "b.example;mx1.b.example;false\nann@b.example;mx2\n")
    asked = b"\xef\xbb\xbfAnn@b.example\r\n\n  udo@b.example  \neve@c.example\na b\nj\xf6rg@c.example"
    (tmp_path / "addresses").write_bytes(asked)
    from_file = run_willi("lookup", "-c", path, "--json", "--from", tmp_path / "addresses")
    with (tmp_path / "addresses").open("rb") as stdin:
        from_stdin = run_willi("lookup", "-c", path, "--json", "--from", "-", stdin=stdin)
    assert from_file.stdout == from_stdin.stdout
    assert (from_file.returncode, from_file.stderr) == (WRONG, "")
    first, second, *others = map(json.loads, from_file.stdout.splitlines())
    mapping, route = f"csv:{tmp_path}/map.csv", "mx1.b.example:25"
    assert first == {
        "address": "Ann@b.example", "route": "mx2:25", "tls_verify": True, "mapping": mapping, "key": "ann@b.example",
        "result": "route: mx2:25, tls_verify = true",
    }  # fmt: skip
    assert (second["address"], second["route"], second["tls_verify"]) == ("udo@b.example", route, False)
    assert [one["route"] for one in others] == [None] * 3
    assert "554 5.7.1" in others[0]["result"]
    text = run_willi("lookup", "-c", path, "--from", tmp_path / "addresses").stdout
    assert text.startswith(f"Ann@b.example\n  {mapping}  ann@b.example  mx2:25\n  route: mx2:25, tls_verify = true\n")
    (tmp_path / "addresses").write_text("ann@b.example\n")
    assert run_willi("lookup", "-c", path, "--from", tmp_path / "addresses").returncode == GOOD


def test_lookup_of_many_addresses_takes_a_tenth_of_a_millisecond_each(tmp_path: Path):
    """Of CPU time, which other processes do not count in; ten times that is allowed."""
    number = 20_000
    path = configure(tmp_path, "".join(f"d{at}.example;mx{at % 9}\n" for at in range(1000)))
    (tmp_path / "addresses").write_text("".join(f"user{at}@d{at % 1100}.example\n" for at in range(number)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_willi("lookup", "-c", path, "--json", "--from", tmp_path / "addresses")
    assert len(done.stdout.splitlines()) == number
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < number * 0.001


@pytest.mark.parametrize(
    ("name", "why"), [("none", "No such file or directory"), ("/", "Is a directory"), ("", "No such file or directory")]
)
def test_a_file_of_addresses_that_cannot_be_read_is_named(tmp_path: Path, name: str, why: str):
    done = run_willi("lookup", "-c", configure(tmp_path, "b.example;mx1\n"), "--from", name)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr == f"willi.py: {name or 'input or output'}: {why}\n"


# lookup --diff


def compared(path: Path, old: Path) -> tuple[int, list[str]]:
    done = run_willi("lookup", "-c", path, "--diff", old)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_diff_shows_what_goes_elsewhere_and_what_only_is_written_otherwise_is_the_same(tmp_path: Path):
    old = tmp_path / "old.csv"
    old.write_text(
        "pattern;server;tls_verify\nsame.example;mx1\nann@same.example;MX1:25;true\nmoved.example;mx1\n"
        "unverified.example;mx1\ngone.example;mx1\nbob@gone.example;mx2\n.parent.example;mx1\nx.parent.example;mx1\n"
    )
    new = (
        "ben+x@Same.example;mx1;yes\nsame.example;mx1:25\nmoved.example;mx1,mx2\nunverified.example;mx1;false\n"
        "new.example;mx1\n.parent.example;mx2\n"
    )
    path = configure(tmp_path, new, more="subdomains = yes\nrecipient_delimiter = +\n")
    status, lines = compared(path, old)
    assert (status, lines) == (WRONG, [
        ".parent.example  mx1:25 -> mx2:25",
        "gone.example  mx1:25 -> -",
        "bob@gone.example  mx2:25 -> -",
        "moved.example  mx1:25 -> mx1:25,mx2:25",
        "new.example  - -> mx1:25",
        "unverified.example  mx1:25 -> mx1:25 (tls_verify = false)",
        "x.parent.example  mx1:25 -> mx2:25",
        "patterns that go elsewhere: 7 of 10",
    ])  # fmt: skip
    assert compared(path, tmp_path / "map.csv") == (GOOD, ["patterns that go elsewhere: 0 of 6"])


def test_diff_says_what_the_manual_shows(tmp_path: Path):
    [table] = re.findall(r"^```\npattern;.*?\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [shown] = re.findall(r"lookup --diff \S+\n((?:    .*\n)+)", (ROOT / "docs/configure.md").read_text())
    old = tmp_path / "old.csv"
    old.write_text("pattern;server\n" + "".join(f"{name};mail.example.org\n" for name in (
        "example.org", "example.com", "gone.example",
    )))  # fmt: skip
    assert compared(configure(tmp_path, table), old) == (WRONG, textwrap.dedent(shown).splitlines())


def test_diff_needs_to_know_the_mapping_and_to_read_both_tables(tmp_path: Path):
    path = configure(tmp_path, "b.example;mx1\n", mappings="[[more]]\ntype = csv\nfile = more.csv\n")
    (tmp_path / "more.csv").write_text("pattern;server\nc.example;mx1\n")
    (tmp_path / "old.csv").write_text("pattern;server\nc.example;mx2\n")
    assert compared(path, tmp_path / "old.csv") == (WRONG, [f"{path}: {ONE_TABLE}"])
    (tmp_path / "yesterday").mkdir()
    old = (tmp_path / "old.csv").rename(tmp_path / "yesterday/more.csv")
    assert compared(path, old) == (WRONG, ["c.example  mx2:25 -> mx1:25", "patterns that go elsewhere: 1 of 1"])
    old.write_text("pattern;server\nc.example;\n")
    assert compared(path, old) == (WRONG, [f"{old}:2: no server: a line is pattern;server;tls_verify"])
    old.unlink()
    assert compared(path, old) == (WRONG, [f"{old}: No such file or directory"])
    assert run_willi("lookup", "-c", path, "--diff", "").returncode == WRONG
    static = tmp_path / "static.conf"
    static.write_text("domain = mx.example\n[mappings]\n[[all]]\ntype = static\nserver = mx1\n")
    assert compared(static, tmp_path / "map.csv") == (WRONG, [f"{static}: {ONE_TABLE}"])


# What the manual shows


@pytest.mark.parametrize("page", ["README.md", "docs/configure.md"])
def test_lookup_says_what_the_manual_shows(tmp_path: Path, page: str):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [table] = re.findall(r"^```\n(pattern;.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (tmp_path / "upstream_servers.csv").write_text(table, encoding="utf-8")
    mapping = {"type": "csv", "file": "upstream_servers.csv"}
    path = write_config(tmp_path / "willi.conf", {"recipient_delimiter": "+", "mappings": {"file": mapping}})
    shown = re.findall(r"^    \$ willi\.py lookup (\S+)\n((?:    .*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    for address, answer in shown:
        done = run_willi("lookup", "-c", path, address)
        assert done.stdout == textwrap.dedent(answer).replace("/opt/willi/etc", str(tmp_path))
    assert len(shown) == 1
