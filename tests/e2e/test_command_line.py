"""`willi.py` as a person uses it: usage, exit codes, `check` and `lookup`."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import StartUpstream
from tests.support.certificates import Authority
from tests.support.daemon import PYTHON, run_willi
from tests.support.dns import DnsServer
from tests.support.loopback import HOST, ROOT, free_port, need
from tests.support.postfix import Postfix
from tests.support.upstream import GREETING, Silence
from willi_lib import VERSION
from willi_lib.smtp.reply import Reply

GOOD, WRONG, USAGE, CANNOT_LISTEN = range(4)


def configure(directory: Path, csv: str, more: str = "", mappings: str = "") -> Path:
    """A willi.conf with one CSV mapping."""
    (directory / "map.csv").write_text("pattern;server;tls_verify\n" + csv)
    path = directory / "willi.conf"
    path.write_text(
        f"domain = mx.willi.example\nlisten = {HOST}:{free_port()}\nconnect_timeout = 1s\n{more}\n"
        f"[mappings]\n[[people]]\ntype = csv\nfile = map.csv\n{mappings}"
    )
    return path


def test_version_and_help():
    assert run_willi("--version").stdout == f"willi {VERSION}\n"
    assert "willi.py lookup [-c FILE] ADDRESS..." in run_willi("--help").stdout


@pytest.mark.parametrize("arguments", [["serve"], ["lookup"], ["check", "x"], ["-x"], ["-c"]])
def test_wrong_usage_is_2(arguments: list[str]):
    done = run_willi(*arguments)
    assert done.returncode == USAGE
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


def test_lookup_says_what_is_no_address(tmp_path: Path):
    path = configure(tmp_path, "b.example;127.0.0.1\n")
    done = run_willi("lookup", "-c", path, "ann b@c")
    assert done.returncode == WRONG
    assert "501 5.1.3 Bad recipient address syntax" in done.stdout


def test_check_of_a_good_file(tmp_path: Path, postfix: Postfix, certificates: Authority):
    pair = certificates.issue("mx.willi.example", "*.willi.example")
    path = configure(tmp_path, f"b.example;{postfix.server};false\n", f"tls_cert = {pair.cert}\ntls_key = {pair.key}")
    done = run_willi("check", "-c", path)
    assert done.returncode == GOOD, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"ok     {path}: mappings: 1, domain mx.willi.example"
    assert "for mx.willi.example, *.willi.example, until " in lines[1]
    assert lines[2] == f"ok     csv:{tmp_path}/map.csv: 1 patterns"
    assert lines[3].startswith(f"ok     {postfix.server}: TLSv1.3, certificate not verified, XCLIENT accepted")


def test_a_quick_check_connects_to_nothing_and_says_whether_willi_would_start(
    tmp_path: Path, start_upstream: StartUpstream, certificates: Authority
):
    upstream = start_upstream()
    expired = certificates.expired("mx.example")  # Willi starts with it: that a certificate is too old is for `check`
    more = f"tls_cert = {expired.cert}\ntls_key = {expired.key}"
    path = configure(tmp_path, f"b.example;{upstream.server}\nc.example;{HOST}:1\n", more=more)
    done = run_willi("check", "--quick", "-c", path)
    assert (done.returncode, done.stdout) == (GOOD, f"ok     {path}: Willi would start\n")
    assert upstream.connections == []


def test_a_quick_check_names_what_would_keep_willi_from_starting(tmp_path: Path, certificates: Authority):
    pair, other = certificates.issue("mx.example"), certificates.expired("mx.example")
    path = configure(tmp_path, "b.example;127.0.0.1;perhaps\nc.example\n")
    done = run_willi("check", "--quick", "-c", path)
    assert done.returncode == WRONG
    assert re.findall(r"^wrong  (\S+: )", done.stdout, re.MULTILINE) == [f"{tmp_path}/map.csv:{n}: " for n in (2, 3)]
    path = configure(tmp_path, "b.example;127.0.0.1\n", more=f"tls_cert = {pair.cert}\ntls_key = {other.key}")
    done = run_willi("check", "--quick", "-c", path)
    assert (done.returncode, done.stdout) == (WRONG, f"wrong  {pair.cert}, {other.key}: KEY_VALUES_MISMATCH\n")


def test_check_of_upstreams_that_are_down_refuse_or_are_silent(tmp_path: Path, start_upstream: StartUpstream):
    down = free_port()
    refusing = start_upstream()
    refusing.answers[GREETING] = Reply(554, (b"5.7.1 go away",))
    silent = start_upstream()
    silent.answers[GREETING] = Silence()
    good = start_upstream()
    ports = [down, refusing.port, silent.port, good.port]
    path = configure(tmp_path, "".join(f"d{port}.example;{HOST}:{port};false\n" for port in ports))
    done = run_willi("check", "-c", path)
    assert done.returncode == WRONG
    found = {line.split(":")[1]: line for line in done.stdout.splitlines() if f" {HOST}:" in line}
    assert found[str(down)] == f"wrong  {HOST}:{down}: Connection refused"
    assert found[str(refusing.port)] == f"wrong  {HOST}:{refusing.port}: greeting: 554 5.7.1 go away"
    assert found[str(silent.port)].startswith(f"wrong  {HOST}:{silent.port}: timed out connecting (connect_timeout)")
    assert found[str(good.port)].startswith(f"ok     {HOST}:{good.port}: no STARTTLS, no XCLIENT")


def test_check_talks_to_every_address_of_every_host(tmp_path: Path, start_upstream: StartUpstream, dns: DnsServer):
    good, refusing = start_upstream(), start_upstream()
    refusing.answers[GREETING] = Reply(554, (b"5.7.1 go away",))
    port = good.port
    dns.zone["several.example"] = {"A": [HOST, "127.0.0.2", "127.0.0.3"]}
    dns.zone["down.example"] = {"A": ["127.0.0.4", "127.0.0.5"]}
    dns.zone["b.example"] = dns.zone["c.example"] = {"MX": ["10 away.example.", "20 down.example."]}
    dns.zone["null.example"] = {"MX": ["0 ."]}
    path = configure(
        tmp_path,
        f"a.example;several.example:{port};no\naa.example;several.example:{port};no\n"
        f"d.example;{HOST}:{refusing.port},down.example:{port};no\n"
        "b.example;mx:b.example;no\nc.example;mx:c.example;no\nn.example;mx:null.example;no\n",
    )
    done = run_with(dns, "check", "-c", path)
    assert done.returncode == WRONG
    assert sorted(done.stdout.splitlines()[3:]) == sorted(
        [
            f"ok     several.example:{port} [{HOST}]: no STARTTLS, no XCLIENT: it sees our address as the client's",
            f"warn   several.example:{port} [127.0.0.2]: Connection refused",
            f"warn   several.example:{port} [127.0.0.3]: Connection refused",
            f"wrong  {HOST}:{refusing.port}: greeting: 554 5.7.1 go away",
            f"wrong  down.example:{port} [127.0.0.4]: Connection refused",
            f"wrong  down.example:{port} [127.0.0.5]: Connection refused",
            "wrong  down.example:25 [127.0.0.4]: Connection refused",
            "wrong  down.example:25 [127.0.0.5]: Connection refused",
            "wrong  away.example:25: no address for away.example: Name or service not known",
            "wrong  null.example takes no mail (null MX)",
        ]
    )


def run_with(dns: DnsServer, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`willi.py` that knows no other resolver."""
    command = [*dns.prefix, PYTHON, str(ROOT / "willi.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that others may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize(("mode", "good"), [(0o644, True), (0o640, False), (0o604, True), (0o600, False)])
def test_check_by_root_finds_files_that_the_workers_may_not_read(
    open_directory: Path, start_upstream: StartUpstream, certificates: Authority, mode: int, good: bool
):
    need(root=True)
    authority = open_directory / "ca.pem"
    authority.write_bytes(certificates.ca.read_bytes())
    line = f"b.example;{start_upstream().server};no\n"
    path = configure(open_directory, line, f"user = nobody\nupstream_tls_ca = {authority}")
    files = [authority, open_directory / "map.csv"]
    for file in files:
        file.chmod(mode)
    done = run_willi("check", "-c", path)
    expected = [] if good else [f"wrong  {file}: nobody (user) may not read it, and will have to" for file in files]
    assert [line for line in done.stdout.splitlines() if line.startswith("wrong")] == expected
    assert done.returncode == (GOOD if good else WRONG)


def test_a_group_that_may_read_is_enough(open_directory: Path, start_upstream: StartUpstream):
    need(root=True)
    path = configure(open_directory, f"b.example;{start_upstream().server};no\n", "user = nobody\ngroup = daemon")
    file = open_directory / "map.csv"
    file.chmod(0o640)
    assert run_willi("check", "-c", path).returncode == WRONG
    shutil.chown(file, group="daemon")
    assert run_willi("check", "-c", path).returncode == GOOD


def test_check_names_a_certificate_that_is_no_use(tmp_path: Path, certificates: Authority):
    old, other = certificates.expired("mx.willi.example"), certificates.issue("mx.willi.example")
    expired = run_willi("check", "-c", configure(tmp_path, "", f"tls_cert = {old.cert}\ntls_key = {old.key}"))
    assert expired.returncode == WRONG
    assert f"wrong  {old.cert}: for mx.willi.example, until " in expired.stdout
    path = configure(tmp_path, "", f"tls_cert = {old.cert}\ntls_key = {other.key}")
    mismatched = run_willi("check", "-c", path)
    assert f"wrong  {old.cert}, {other.key}: KEY_VALUES_MISMATCH" in mismatched.stdout
    started = run_willi("-c", path)
    assert started.returncode == WRONG
    assert "KEY_VALUES_MISMATCH" in started.stdout
