"""`willi.py check`: how it speaks, and what it finds on this machine. For upstreams see test_check_upstreams.py."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.support.certificates import Authority, Pair
from tests.support.check import GOOD, NOBODY, WRONG, Finding, about, bad, configure, findings, lines
from tests.support.daemon import PYTHON, Willi, run_willi
from tests.support.dns import DnsServer, Fault
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port, need, wait_until
from tests.support.talk import reply
from tests.support.upstream import GREETING, Hold, ScriptedUpstream

GREEN, RED = "\x1b[32m", "\x1b[1;31m"
# `willi.py check`, and then how often it has opened the table.
COUNT_READS = """\
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
sys.argv = ["willi.py", "check", "-c", sys.argv[1]]
import willi
willi.main()
print(len([file for file in opened if file.endswith("/map.csv")]))
"""
# In a container root may inherit all, whatever its bounding set is.
WITHOUT_RIGHTS = ["unshare", "--net", "setpriv", "--inh-caps", "-all", "--bounding-set", "-net_bind_service"]


def test_check_of_a_good_file(tmp_path: Path, certificates: Authority, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    pair = certificates.issue("mx.willi.example", "*.willi.example")
    path = configure(tmp_path, "# none yet\n", f"tls_cert = {pair.cert}\ntls_key = {pair.key}")
    said = lines(path)
    assert said[0] == f"ok     {path}: mappings: 1, domain mx.willi.example"
    [certificate] = [line for line in said if str(pair.cert) in line]
    assert ": for mx.willi.example, *.willi.example, until " in certificate
    assert certificate.endswith(" -> renew it: a running Willi reads the new file by itself")  # made for a week
    what = "0 patterns: recipients that no other mapping has get 451"
    assert f"warn   csv:{tmp_path}/map.csv: {what} -> add a line for each domain: pattern;server;tls_verify" in said
    assert all(re.match("(ok    |warn  |wrong ) .+: .+", line) for line in said)


def test_a_table_that_may_be_cut_off_is_warned_of(tmp_path: Path):
    path = configure(tmp_path, f"b.example;{HOST}:{free_port()}\nc.example;{HOST}")
    what = "no line end at its end: if a part of it is missing, the recipients in that part get 554"
    [said] = [line for line in lines(path) if "line end" in line]
    assert said.startswith(f"warn   csv:{tmp_path}/map.csv: {what} -> ")
    (tmp_path / "map.csv").write_text((tmp_path / "map.csv").read_text() + "\n")
    assert not [line for line in lines(path) if "line end" in line]


def test_a_table_is_read_once(tmp_path: Path):
    path = configure(tmp_path, f"b.example;{HOST}:{free_port()}\n")
    done = subprocess.run(
        [PYTHON, "-c", COUNT_READS, path], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "1"


# -- how it speaks


def test_json_says_the_same_as_the_lines(tmp_path: Path):
    path = configure(tmp_path, f"b.example;{HOST}:{free_port()}\n", "read_timeout = 1s")
    done = run_willi("check", "-c", path, "--json")
    assert (done.returncode, done.stderr) == (WRONG, "")
    entries = json.loads(done.stdout)
    assert {tuple(entry) for entry in entries} == {("level", "subject", "what", "advice")}
    manual = (ROOT / "docs" / "configure.md").read_text(encoding="utf-8")
    assert [key for key in entries[0] if f'"{key}"' not in manual] == []
    said = [line for line in lines(path) if " DNS: " not in line]  # which says how long it took
    assert len(said) > 3
    assert said == [
        f"{one['level']:6} {one['subject']}: {one['what']}" + (f" -> {one['advice']}" if one["advice"] else "")
        for one in entries
        if one["subject"] != "DNS"
    ]


def test_json_of_a_file_that_cannot_be_read(tmp_path: Path):
    path = configure(tmp_path, "b.example;127.0.0.1\n", "raed_timeout = 5m\nmax_errors = many")
    for quick in ([], ["--quick"]):
        done = run_willi("check", *quick, "--json", "-c", path)
        assert (done.returncode, done.stderr) == (WRONG, "")
        assert json.loads(done.stdout) == [
            {
                "level": "wrong", "subject": f"{path}:4", "advice": "",
                "what": "raed_timeout: unknown key; did you mean 'read_timeout'?",
            },
            {
                "level": "wrong", "subject": f"{path}:5", "advice": "",
                "what": "max_errors: 'many': must be a whole number from 1 to 1000000",
            },
        ]  # fmt: skip


def on_a_terminal(path: Path, stream: str, **environment: str) -> str:
    """What a terminal gets that is this stream of a check."""
    ours, theirs = pty.openpty()
    command = [PYTHON, str(ROOT / "willi.py"), "check", "-c", str(path)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs}
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(command, env=inherited | {"TERM": "xterm"} | environment, **streams)  # type: ignore[call-overload]
    os.close(theirs)
    octets = b""
    try:
        while chunk := os.read(ours, 65536):
            octets += chunk
    except OSError:  # EIO: the other side is closed
        pass
    os.close(ours)
    process.wait(PATIENCE)
    return octets.decode()


def test_levels_have_colours_on_a_terminal_only(tmp_path: Path):
    path = configure(tmp_path, f"b.example;{HOST}:{free_port()}\n")
    coloured = on_a_terminal(path, "stdout")
    assert f"{GREEN}ok    \x1b[0m {path}: " in coloured
    assert f"{RED}wrong \x1b[0m {HOST}:" in coloured
    assert "\x1b" not in on_a_terminal(path, "stdout", NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(path, "stdout", TERM="dumb")
    assert "\x1b" not in "".join(lines(path))


def test_a_terminal_is_shown_how_many_upstreams_are_done_until_all_are(tmp_path: Path):
    path = configure(tmp_path, "".join(f"d{n}.example;{HOST}:{n}\n" for n in range(1, 5)))
    drawn = on_a_terminal(path, "stderr").split("\r\x1b[K")
    assert [text for text in drawn if text] == [f"{done}/4 upstreams" for done in range(5)]
    assert drawn[-1] == ""  # cleared
    assert on_a_terminal(path, "stderr", TERM="dumb") == ""
    assert run_willi("check", "-c", path).stderr == ""


def test_who_has_seen_enough_gets_no_traceback(tmp_path: Path, upstream: ScriptedUpstream):
    waiting = upstream.answers[GREETING] = Hold()
    path = configure(tmp_path, f"b.example;{upstream.server}\n", "connect_timeout = 60s")
    path.write_text(path.read_text().replace("connect_timeout = 20s", ""))
    command = [PYTHON, "-u", str(ROOT / "willi.py"), "check", "-c", str(path)]
    for leave, status in (("Ctrl-C", -signal.SIGINT), ("head", 4)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout and process.stderr
        with process, process.stdout as stdout, process.stderr as stderr:
            assert waiting.reached.wait(PATIENCE)
            waiting.reached.clear()
            if leave == "Ctrl-C":
                process.send_signal(signal.SIGINT)
            else:
                stdout.close()
                waiting.release()
            assert stderr.read() == b""
            assert process.wait(PATIENCE) == status


# -- --quick


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


@pytest.mark.parametrize("command", [["check", "--quick"], ["lookup", "ann@b.example"]])
def test_a_database_that_is_down_hides_no_route_before_it_and_stops_no_start(tmp_path: Path, command: list[str]):
    down = f'[[db]]\ntype = mysql\nhost = {HOST}\nport = {free_port()}\nquery = "SELECT ?"\n'
    path = configure(tmp_path, "b.example;127.0.0.1\n", mappings=down)
    done = run_willi(*command, "-c", path)
    assert done.returncode == GOOD, done.stdout
    assert "mysql:db" not in done.stdout


def test_a_quick_check_names_what_would_keep_willi_from_starting(tmp_path: Path, certificates: Authority):
    pair, other = certificates.issue("mx.example"), certificates.expired("mx.example")
    path = configure(tmp_path, "b.example;127.0.0.1;perhaps\nc.example\n")
    done = run_willi("check", "--quick", "-c", path)
    assert done.returncode == WRONG
    assert re.findall(r"^wrong  (\S+: )", done.stdout, re.MULTILINE) == [f"{tmp_path}/map.csv:{n}: " for n in (2, 3)]
    path = configure(tmp_path, "b.example;127.0.0.1\n", more=f"tls_cert = {pair.cert}\ntls_key = {other.key}")
    done = run_willi("check", "--quick", "-c", path)
    said = f"wrong  {other.key}: tls_key is not the key of the certificate in tls_cert {pair.cert}; compare "
    assert done.returncode == WRONG and done.stdout.startswith(said)


def test_a_key_with_a_passphrase_is_named_and_nobody_is_asked_for_it(tmp_path: Path, certificates: Authority):
    need("setsid", "openssl")
    pair, locked = certificates.issue("mx.example"), tmp_path / "locked.key"
    lock = ["openssl", "pkey", "-aes128", "-passout", "pass:secret", "-in", str(pair.key), "-out", str(locked)]
    subprocess.run(lock, check=True, capture_output=True)
    path = configure(tmp_path, "", more=f"tls_cert = {pair.cert}\ntls_key = {locked}")
    ours, theirs = os.openpty()  # the command's own terminal, where OpenSSL would ask
    for arguments in (["check", "--quick"], ["check"], []):
        command = ["setsid", "--ctty", "--wait", PYTHON, str(ROOT / "willi.py"), *arguments, "-c", str(path)]
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == WRONG
        assert f"{locked}: tls_key has a passphrase" in done.stdout and f"openssl pkey -in {locked}" in done.stdout
    os.set_blocking(ours, False)
    with pytest.raises(BlockingIOError):
        os.read(ours, 100)
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("address", ["192.0.2.77:25", "[2001:db8::77]:25"])
def test_a_quick_check_tries_the_addresses(tmp_path: Path, address: str):
    path = listening_on(configure(tmp_path, "b.example;127.0.0.1\n"), address)
    done = run_willi("check", "--quick", "-c", path)
    assert done.returncode == WRONG
    assert done.stdout.startswith(f"wrong  listen: cannot listen on {address}: Cannot assign requested address -> ")
    assert "would start" not in done.stdout


@pytest.mark.parametrize(("greeting", "status", "level"), [
    (b"220 mx.example ESMTP Postfix\r\n", WRONG, "wrong"),
    (b"220 mx.example ESMTP Service Ready\r\n", GOOD, "warn"),  # the Go program, whose place Willi takes
    (b"421 mx.example too busy\r\n", GOOD, "warn"),
], ids=["another program", "the Go program", "busy"])  # fmt: skip
def test_a_quick_check_fails_for_a_port_that_another_program_has(
    greeting: bytes, status: int, level: str, tmp_path: Path, willi: Willi, upstream: ScriptedUpstream
):
    """The init script stops the running Willi when this check has found nothing."""
    upstream.answers[GREETING] = greeting
    ours = listening_on(configure(tmp_path, "b.example;127.0.0.1\n"), f"{HOST}:{willi.port}")
    assert run_willi("check", "--quick", "-c", ours).stdout == f"ok     {ours}: Willi would start\n"
    path = listening_on(ours, upstream.server)
    done = run_willi("check", "--quick", "-c", path)
    said = greeting.decode().strip()
    assert done.returncode == status
    assert f"{level:<6} listen: {upstream.server} belongs to another program, which says '{said}'" in done.stdout


def test_a_status_port_that_is_taken_keeps_willi_from_no_start(tmp_path: Path, upstream: ScriptedUpstream):
    path = configure(tmp_path, "b.example;127.0.0.1\n", f"status_listen = {upstream.server}")
    done = run_willi("check", "--quick", "-c", path)
    warning, verdict = done.stdout.splitlines()
    assert warning.startswith(f"warn   status_listen: {upstream.server} belongs to another program, ")
    assert ": there would be no status for now -> " in warning
    assert (done.returncode, verdict) == (GOOD, f"ok     {path}: Willi would start")


# -- postmaster


@pytest.mark.parametrize(("table", "has_route"), [
    ("b.example;127.0.0.1\n", False),
    ("postmaster@b.example;127.0.0.1\n", False),
    ("postmaster@mx.willi.example;127.0.0.1\n", True),
    ("mx.willi.example;127.0.0.1\n", True),
])  # fmt: skip
def test_a_postmaster_without_a_route_is_told(tmp_path: Path, table: str, has_route: bool):
    [found] = about(findings(configure(tmp_path, table)), "postmaster")
    if has_route:
        assert found == Finding("ok", "postmaster", "postmaster@mx.willi.example goes to 127.0.0.1:25", "")
    else:
        assert found.level == "warn"
        assert found.what.startswith("mail to postmaster@mx.willi.example, where others report trouble, gets 554")


def test_a_mapping_for_all_has_a_postmaster(tmp_path: Path):
    path = configure(tmp_path, "", mappings="[[all]]\ntype = static\nserver = 127.0.0.1\n")
    [found] = about(findings(path), "postmaster")
    assert found.level == "ok"


# -- files


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that others may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def unreadable(path: Path) -> list[str]:
    """The files of which check says that the workers may not read them."""
    return [one.subject for one in findings(path) if one.what == "nobody (user) may not read it, and will have to"]


@pytest.mark.parametrize(("mode", "good"), [(0o644, True), (0o640, False), (0o604, True), (0o600, False)])
def test_check_by_root_finds_files_that_the_workers_may_not_read(
    open_directory: Path, certificates: Authority, mode: int, good: bool
):
    need(root=True)
    authority = open_directory / "ca.pem"  # which they read as root
    authority.write_bytes(certificates.ca.read_bytes())
    authority.chmod(0o600)
    path = configure(open_directory, "", f"user = nobody\nupstream_tls_ca = {authority}")
    table = open_directory / "map.csv"
    table.chmod(mode)
    assert unreadable(path) == ([] if good else [str(table)])


def test_a_group_that_may_read_is_enough(open_directory: Path):
    need(root=True)
    path = configure(open_directory, "", "user = nobody\ngroup = daemon")
    file = open_directory / "map.csv"
    file.chmod(0o640)
    assert unreadable(path) == [str(file)]
    shutil.chown(file, group="daemon")
    assert unreadable(path) == []


def test_check_names_a_certificate_that_is_no_use(tmp_path: Path, certificates: Authority):
    old, other = certificates.expired("mx.willi.example"), certificates.issue("mx.willi.example")
    path = configure(tmp_path, "", f"tls_cert = {old.cert}\ntls_key = {old.key}")
    expired = about(findings(path), str(old.cert))[0]
    assert expired.level == "wrong" and expired.what.startswith("for mx.willi.example, until ")
    assert "(expired " in expired.what and "renew it" in expired.advice
    path = configure(tmp_path, "", f"tls_cert = {old.cert}\ntls_key = {other.key}")
    [mismatched] = about(findings(path), str(other.key))
    assert mismatched.level == "wrong" and "is not the key of the certificate" in mismatched.what
    started = run_willi("-c", path)
    assert started.returncode == WRONG
    assert "is not the key of the certificate" in started.stdout


def about_file(tmp_path: Path, pair: Pair, *behind: Path) -> list[Finding]:
    """What check says of a file with a certificate and those behind it."""
    file = tmp_path / "served.pem"
    file.write_bytes(b"".join(one.read_bytes() for one in (pair.cert, *behind)))
    return about(findings(configure(tmp_path, "", f"tls_cert = {file}\ntls_key = {pair.key}")), str(file))


def test_check_sees_the_whole_chain(tmp_path: Path, certificates: Authority, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    directories = {days: tmp_path / str(days) for days in (90, 7, -1)}
    for directory in directories.values():
        directory.mkdir()
    good, ending, ended = (
        Authority(directory, certificates, begins=-9, ends=days) for days, directory in directories.items()
    )
    pairs = [authority.issue("mx.willi.example") for authority in (good, ending, ended)]
    assert about_file(tmp_path, pairs[0], good.ca, certificates.ca)[1:] == []
    assert about_file(tmp_path, pairs[0], good.ca)[1:] == []
    [_, missing] = about_file(tmp_path, pairs[0])
    assert missing.level == "warn" and "its chain ends at CN=Willi tests below" in missing.what
    assert "fullchain.pem" in missing.advice
    [_, soon] = about_file(tmp_path, pairs[1], ending.ca)
    name = "the certificate of CN=Willi tests below in it"
    assert soon.level == "warn" and re.fullmatch(rf"{name}, until \S+ \(\d days left\)", soon.what)
    [_, over] = about_file(tmp_path, pairs[2], ended.ca)
    assert over.level == "wrong" and re.fullmatch(rf"{name}, until \S+ \(expired .* ago\)", over.what)


def test_check_sees_an_authority_of_tomorrow_in_the_chain(
    tmp_path: Path, certificates: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    (tmp_path / "authority").mkdir()
    coming = Authority(tmp_path / "authority", certificates, begins=1, ends=90)
    said = r"the certificate of CN=Willi tests below in it, until .*, but not before .* UTC"
    found = about_file(tmp_path, coming.issue("mx.willi.example"), coming.ca)
    assert [one.level for one in found if re.fullmatch(said, one.what)] == ["wrong"]


def test_check_sees_a_certificate_of_tomorrow(tmp_path: Path, certificates: Authority):
    tomorrow = about_file(tmp_path, certificates.not_yet_valid("mx.willi.example"))[0]
    assert tomorrow.level == "wrong" and ", but not before " in tomorrow.what


def test_a_self_signed_certificate_has_its_chain(tmp_path: Path, certificates: Authority):
    assert about_file(tmp_path, certificates.self_signed("mx.willi.example"))[1:] == []


def test_authorities_that_cannot_be_read_are_wrong(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("no PEM\n")
    path = configure(tmp_path, "", f"upstream_tls_ca = {tmp_path}/ca.pem")
    [authorities] = about(findings(path), f"{tmp_path}/ca.pem")
    assert authorities.level == "wrong" and authorities.what.startswith("upstream_tls_ca: ")
    quick = run_willi("check", "--quick", "-c", path)
    assert quick.returncode == WRONG and f"{tmp_path}/ca.pem: upstream_tls_ca: " in quick.stdout
    started = run_willi("-c", path)
    assert started.returncode == WRONG and "upstream_tls_ca: " in started.stdout


def test_a_certificate_for_other_names_is_warned_of(tmp_path: Path, certificates: Authority):
    names = {"mx.willi.example": "", "*.willi.example": "", "willi.example": "warn", "*.mx.willi.example": "warn"}
    for name, level in names.items():
        pair = certificates.issue(name)
        found = about(findings(configure(tmp_path, "", f"tls_cert = {pair.cert}\ntls_key = {pair.key}")), "tls_cert")
        assert "".join(one.level for one in found) == level, name
        assert all("no certificate is for mx.willi.example" in one.what for one in found)


def test_check_and_top_tell_the_same_days(
    tmp_path: Path, certificates: Authority, start_willi: StartWilli, upstream: ScriptedUpstream
):
    pair = certificates.issue("mx.willi.example")
    address = f"{HOST}:{free_port()}"
    tls = {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
    willi = start_willi(server=upstream.server, status_listen=address, **tls)
    by_top = wait_until(lambda: re.findall(r"\d+ days? left", run_willi("top", "-c", willi.config).stdout), "its days")
    certificate = about(findings(willi.config), str(pair.cert))[0]
    assert set(by_top) == {"6 days left"} and "(6 days left)" in certificate.what


def test_one_is_told_as_one(tmp_path: Path):
    path = configure(tmp_path, f"b.example;{HOST}:1;no\n")
    assert about(findings(path), f"csv:{tmp_path}/map.csv")[0].what == "1 pattern"
    path = configure(tmp_path, f"b.example;{HOST}:1\nc.example;{HOST}:1\n")
    assert about(findings(path), f"csv:{tmp_path}/map.csv")[0].what == "2 patterns"


def test_root_is_told_that_it_is_not_the_service(open_directory: Path):
    need(root=True)
    [problem] = about(findings(configure(open_directory, "")), "user")
    assert problem.level == "warn" and "runuser" in problem.advice
    assert about(findings(configure(open_directory, "", "user = nobody")), "user") == []


def test_secrets_that_others_can_read_and_files_that_others_can_change(tmp_path: Path, certificates: Authority):
    issued = certificates.issue("mx.willi.example")
    key = tmp_path / "mx.key"
    shutil.copy(issued.key, key)
    database = '[[db]]\ntype = mysql\nhost = 127.0.0.1\nport = 1\npassword = secret\nquery = "SELECT ?"\n'
    path = configure(tmp_path, "", f"tls_cert = {issued.cert}\ntls_key = {key}", database)
    table = tmp_path / "map.csv"
    for file, mode in ((key, 0o640), (path, 0o640), (table, 0o644)):
        file.chmod(mode)
    assert [one for one in findings(path) if one.advice.startswith("chmod")] == []
    for file, mode in ((key, 0o644), (path, 0o644), (table, 0o646)):
        file.chmod(mode)
    said = {(one.level, one.subject): one.advice for one in findings(path) if one.advice.startswith("chmod")}
    assert said == {
        ("warn", str(key)): f"chmod o= {key}",
        ("warn", str(path)): f"chmod o= {path}, or use password_file",
        ("wrong", str(table)): f"chmod o-w {table}",
    }


# -- ports


def listening_on(path: Path, *addresses: str) -> Path:
    """The same file, with other addresses in `listen`."""
    path.write_text(re.sub(r"(?m)^listen = .*", f"listen = {', '.join(addresses)}", path.read_text()))
    return path


def test_a_port_is_free_or_belongs_to_another_program(tmp_path: Path, upstream: ScriptedUpstream):
    free = f"{HOST}:{free_port()}"
    path = listening_on(configure(tmp_path, ""), free, upstream.server, "192.0.2.77:25")
    first, taken, foreign = about(findings(path), "listen")
    assert first == Finding("ok", "listen", f"{free} is free", "")
    greeting = "says '220 upstream.example ESMTP'"
    assert (taken.level, taken.what) == ("wrong", f"{upstream.server} belongs to another program, which {greeting}")
    assert f"ss -ltnp 'sport = :{upstream.port}'" in taken.advice
    assert foreign.level == "wrong" and "192.0.2.77:25: Cannot assign requested address" in foreign.what


def test_one_address_is_enough_to_keep_willi_from_all(tmp_path: Path, upstream: ScriptedUpstream):
    path = listening_on(configure(tmp_path, ""), f"0.0.0.0:{upstream.port}")
    [taken] = about(findings(path), "listen")
    assert taken.level == "wrong" and "belongs to another program, which says '220 " in taken.what


def test_the_port_of_a_running_willi_is_as_it_should_be(upstream: ScriptedUpstream, start_willi: StartWilli):
    willi = start_willi(server=upstream.server)
    [heard] = about(findings(willi.config), "listen")
    assert heard == Finding("ok", "listen", f"Willi listens on {HOST}:{willi.port} already", "")


def test_the_right_to_open_port_25_is_the_service_s(tmp_path: Path):
    need("unshare", "setpriv", root=True)
    path = listening_on(configure(tmp_path, ""), ":25")
    [found] = about(findings(path, WITHOUT_RIGHTS), "listen")
    assert found.level == "ok" and ":25 is free (below port 1024: this user may not" in found.what


def test_the_status_page_needs_a_port_of_its_own(tmp_path: Path):
    port = free_port()
    path = listening_on(configure(tmp_path, "", f"status_listen = {HOST}:{port}"), f":{port}")
    [problem] = bad(about(findings(path), "status_listen"))
    assert problem.level == "wrong" and "is in listen, too" in problem.what


# -- DNS


def test_the_resolver_and_the_domain(tmp_path: Path, dns: DnsServer):
    path = configure(tmp_path, "", dns_timeout="20s")
    [domain] = about(findings(path, dns.prefix), "domain")
    assert domain.level == "warn" and domain.what == "mx.willi.example has no address in the DNS"
    dns.zone["mx.willi.example"] = {"A": ["192.0.2.25"], "AAAA": ["2001:db8::25"]}
    found = findings(path, dns.prefix)
    [domain], [resolver] = about(found, "domain"), about(found, "DNS")
    assert domain == Finding("ok", "domain", "mx.willi.example is 192.0.2.25, 2001:db8::25", "")
    assert resolver.level == "ok" and re.fullmatch(r"the resolver answers \(\d+ ms\)", resolver.what)


@pytest.mark.parametrize(("server", "level"), [(f"{HOST}:1", "warn"), ("mail.b.example", "wrong")])
def test_a_resolver_that_is_silent(tmp_path: Path, dns: DnsServer, server: str, level: str):
    dns.zone["mx.willi.example"] = dns.zone["mail.b.example"] = Fault.SILENCE
    [resolver] = about(findings(configure(tmp_path, f"b.example;{server}\n"), dns.prefix), "DNS")
    assert resolver.level == level and "/etc/resolv.conf" in resolver.advice


def test_many_hosts_behind_a_silent_resolver_are_one_finding(tmp_path: Path, dns: DnsServer):
    hosts = [f"mail{number}.b.example" for number in range(7)]
    dns.zone |= dict.fromkeys(["mx.willi.example", *hosts], Fault.SILENCE)
    path = configure(tmp_path, "".join(f"d{number}.example;{host}\n" for number, host in enumerate(hosts)))
    found = findings(path, dns.prefix)
    [upstreams] = about(found, "upstreams")
    named = ", ".join(f"{host}:25" for host in hosts[:5])
    assert upstreams.what == f"not tried, since no name server answers (7): {named}, ..."
    assert "/etc/resolv.conf" in upstreams.advice
    assert not [one for one in found if one.subject.startswith("mail")]


def test_an_odd_line_in_resolv_conf_is_passed_over(tmp_path: Path, dns: DnsServer):
    dns.zone["mx.willi.example"] = {"A": ["192.0.2.25"]}
    dns.resolv_conf.write_text("search a..b\nnameserver 192.0.2.1,192.0.2.2\n" + dns.resolv_conf.read_text())
    [resolver] = about(findings(configure(tmp_path, "", dns_timeout="20s"), dns.prefix), "DNS")
    assert resolver.level == "ok"


# -- settings

STRANGE = {
    # lines: subjects that are warned of, with a word of the advice
    """loglevel = error
tls_min_version = 1.3
read_timeout = 299s
write_timeout = 179s
upstream_timeout = 301s
data_timeout = 599s
drain_timeout = 9s
max_message_bytes = 65535
max_recipients = 99
max_connections = 50
status_listen = :8025
proxy_protocol_hosts = 198.51.0.0/16""": {
        "loglevel": "info", "tls_min_version": "1.2", "read_timeout": "5m", "write_timeout": "5m",
        "upstream_timeout": "4m", "data_timeout": "10m", "drain_timeout": "60s", "max_message_bytes": "20MiB",
        "max_recipients": "100", "max_connections_per_ip": "below", "status_listen": "127.0.0.1",
        "proxy_protocol_hosts": "your own",
    },
    """loglevel = debug
tls_min_version = 1.0
upstream_timeout = 1s
drain_timeout = 61s
max_connections = 1000000
xclient_hosts = 2001:db8::/48
upstream_tls = never
upstream_tls_ca = {ca}
send_proxy = v2
xclient = require""": {
        "loglevel": "info", "tls_min_version": "1.2", "connect_timeout": "20s", "drain_timeout": "TimeoutStopSec",
        "max_connections": "LimitNOFILE", "xclient_hosts": "your own", "[[people]]": "xclient = try",
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", STRANGE)
def test_settings_that_break_a_promise(tmp_path: Path, certificates: Authority, settings: str):
    limited = ["sh", "-c", 'ulimit -n 4096; exec "$@"', "sh"]
    found = findings(configure(tmp_path, "", settings.format(ca=certificates.ca)), limited)
    warned = {one.subject: one.advice for one in found if one.level == "warn"}
    assert [subject for subject, word in STRANGE[settings].items() if word not in warned.get(subject, "")] == []


def test_the_defaults_and_the_limits_of_good_values_are_not_warned_of(tmp_path: Path):
    good = (
        "loglevel = info\nread_timeout = 5m\nwrite_timeout = 3m\nupstream_timeout = 5m\ndata_timeout = 10m\n"
        "drain_timeout = 10s\nmax_recipients = 100\nmax_connections = 51\nstatus_listen = 127.0.0.1:0\n"
        "xclient_hosts = 10.0.0.0/8, 198.51.100.0/24, 2001:db8::/64, 192.0.2.1\n"
    )
    for settings in ("max_connections = 100", good):
        found = findings(configure(tmp_path, "", settings))
        subjects = {one.subject for one in bad(found)}
        here = {"domain", "DNS", "user"}  # may be so on the machine of the test
        assert subjects - here == {"tls_cert", f"csv:{tmp_path}/map.csv"}  # no certificate, and empty


def test_nobody_may_let_the_world_speak_for_others(tmp_path: Path):
    networks = ["0.0.0.0/0", "128.0.0.0/1", "::/0", "2000::/3"]
    settings = ("xclient_hosts", "proxy_protocol_hosts")
    more = "".join(f"{setting} = 192.0.2.1, {', '.join(networks)}\n" for setting in settings)
    found = findings(configure(tmp_path, "", more))
    for setting in settings:
        said = [(one.level, one.what.partition(" is the world")[0]) for one in about(found, setting)]
        assert said == [("wrong", network) for network in networks]


def test_a_catch_all_before_other_mappings(tmp_path: Path, upstream: ScriptedUpstream):
    upstream.answers[NOBODY] = reply("550 5.1.1 no")
    server = f"type = static\nserver = {upstream.server}\n"
    found = findings(configure(tmp_path, "", mappings=f"[[all]]\n{server}[[rest]]\n{server}"))
    [problem] = bad(about(found, "static:all"))
    assert problem.level == "warn" and "static:rest is never asked" in problem.what
    assert bad(about(found, "static:rest")) == []


def test_routes_without_verification_are_counted_unless_they_stay_at_home(tmp_path: Path):
    path = configure(
        tmp_path, "a.example;192.0.2.1:1;no\nb.example;192.0.2.1:1\nc.example;10.0.0.1:1;no\nd.example;192.0.2.1:1;no\n"
    )
    path.write_text(path.read_text().replace("connect_timeout = 20s", "connect_timeout = 0.1s"))
    [problem] = bad(about(findings(path), f"csv:{tmp_path}/map.csv"))
    assert problem.level == "warn" and "1 of 3 routes have tls_verify = false" in problem.what


class Metrics(BaseHTTPRequestHandler):
    """What the status of a Willi says to Prometheus, and nothing about it in our output."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(b'# TYPE willi_build_info gauge\nwilli_build_info{version="2.0.0"} 1.0\n')

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_the_status_of_a_running_willi_is_known_by_its_metrics(tmp_path: Path):
    with HTTPServer((HOST, 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"{HOST}:{server.server_port}"
            path = configure(tmp_path, "", f"status_listen = {address}")
            [heard] = about(findings(path), "status_listen")
        finally:
            server.shutdown()
            thread.join()
    assert heard == Finding("ok", "status_listen", f"Willi listens on {address} already", "")


def test_a_port_that_only_waits_is_told(tmp_path: Path):
    with socket.create_server((HOST, 0)) as silent:
        path = listening_on(configure(tmp_path, ""), f"{HOST}:{silent.getsockname()[1]}")
        [taken] = about(findings(path), "listen")
    assert taken.level == "wrong" and "belongs to another program, which says nothing" in taken.what


def test_whoever_drips_on_the_status_port_holds_nobody_up(tmp_path: Path):
    over = threading.Event()

    def drip(server: socket.socket) -> None:
        while not over.is_set():
            with suppress(OSError), server.accept()[0] as connection:
                while not over.wait(0.2):
                    connection.sendall(b"x")

    with socket.create_server((HOST, 0)) as server:
        server.settimeout(1)
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        path = configure(tmp_path, "", f"status_listen = {HOST}:{server.getsockname()[1]}")
        [taken] = about(findings(path), "status_listen")
        over.set()
        thread.join(PATIENCE)
    assert taken.level == "wrong" and "which says nothing" in taken.what
