"""SIGHUP and changed certificates: the new workers take over, nobody is refused, and what is wrong changes nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from time import monotonic

import pytest

from tests.conftest import StartUpstream, StartWilli
from tests.runner.limits import allow
from tests.support.certificates import Authority, Pair
from tests.support.client import Client
from tests.support.daemon import PIPES_HANG, Willi, in_a_hurry
from tests.support.examples import THOROUGH, examples
from tests.support.loopback import HOST, ROOT, free_port, wait_until
from tests.support.promise import greeted, in_data, in_envelope
from tests.support.talk import BOB, MAIL, NO_ANSWER, OK, QUEUED, chunk, content, deliver, say
from tests.support.upstream import Ended, ScriptedUpstream

LOOKUP_FAILED = "451 4.3.0 Cannot look up this address now"
NO_ROUTE = "554 5.7.1 Relay access denied"
GOODBYE = "421 4.3.2 Service is shutting down, try again"
FAILED = "Reload failed, nothing has changed"


def wait_for_new_workers(willi: Willi, old: list[int], number: int = 1) -> None:
    """All of the old ones have gone."""
    wait_until(lambda: len(willi.workers) == number and not set(willi.workers) & set(old), "new workers only")


@pytest.fixture
def willi(start_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    return start_willi(server=upstream.server)


# What a reload changes


def test_a_changed_setting_counts_for_new_clients(willi: Willi):
    old = willi.workers
    willi.reload({"domain": "other.example", "max_message_bytes": "1MiB"})
    wait_for_new_workers(willi, old)
    client = willi.connect(greeting=False)
    assert str(client.read_reply()) == "220 other.example ESMTP Willi"
    assert b"SIZE 1048576" in client.command(b"EHLO c.example").lines


def test_a_changed_route_counts_for_new_clients(
    willi: Willi, upstream: ScriptedUpstream, start_upstream: StartUpstream
):
    other = start_upstream()
    willi.reload({"mappings": {"all": {"type": "static", "server": other.server}}})
    assert deliver(greeted(willi)) == QUEUED
    assert (len(upstream.messages), len(other.messages)) == (0, 1)


def test_the_number_of_workers_changes(willi: Willi):
    for number in (5, 2):
        old = willi.workers
        willi.reload({"workers": number})
        wait_for_new_workers(willi, old, number)
        assert willi.lines(msg="Reloaded")[-1]["workers"] == str(number)
        willi.probe()


def test_loglevel_changes_in_master_and_workers(willi: Willi):
    old = willi.workers
    willi.change({"loglevel": "warn"})
    willi.signal(signal.SIGHUP)
    wait_for_new_workers(willi, old)
    lines = len(willi.log)
    assert deliver(greeted(willi)) == QUEUED
    old = willi.workers
    willi.change({"loglevel": "info"})
    willi.signal(signal.SIGHUP)
    willi.wait_for_log(msg="Reloaded")
    wait_for_new_workers(willi, old)
    assert [line["msg"] for line in willi.log[lines:] if line["lvl"] == "info"] == ["Reloaded"]
    assert deliver(greeted(willi)) == QUEUED
    willi.wait_for_log(msg="Message accepted")


def test_an_address_is_added_and_another_one_is_given_up(willi: Willi):
    first, second = willi.port, free_port()
    willi.reload({"listen": [f"{HOST}:{first}", f"{HOST}:{second}"]})
    willi.probe()
    willi.port = second
    willi.probe()
    old = willi.workers
    willi.reload({"listen": f"{HOST}:{second}"})
    willi.probe()
    wait_for_new_workers(willi, old)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, first), 5)


# What an old worker does


@pytest.mark.parametrize("stage", ["RCPT", "DATA", "BDAT"])
def test_a_transaction_goes_on_to_its_end_in_the_old_worker(stage: str, willi: Willi, upstream: ScriptedUpstream):
    client = in_envelope(willi) if stage != "DATA" else in_data(willi)
    if stage == "BDAT":
        assert chunk(client, b"Subject: x\r\n\r\n") == OK
    willi.reload({"domain": "other.example"})
    if stage == "BDAT":
        assert chunk(client, b"hello\r\n", last=True) == OK
    else:
        assert stage == "DATA" or client.command(b"DATA").code == 354
        assert content(client) == QUEUED
    assert str(client.read_reply()) == GOODBYE
    client.expect_eof()
    assert len(upstream.messages) == 1
    assert upstream.wait_for_ends() == [Ended.QUIT]


def test_an_idle_client_of_an_old_worker_is_told_421_and_the_next_one_is_served(willi: Willi):
    idle = greeted(willi)
    willi.reload()
    assert str(idle.read_reply()) == GOODBYE
    idle.expect_eof()
    assert deliver(greeted(willi)) == QUEUED


def test_old_workers_are_still_counted(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, drain_timeout="5m", workers=2, max_connections_per_ip=3)
    clients = [in_envelope(willi) for _ in range(3)]
    willi.reload()
    with willi.connect(greeting=False) as client:
        assert str(client.read_reply()) == "421 4.7.0 Too many connections from your address"
    clients[0].command(b"RSET")
    assert str(clients[0].read_reply()) == GOODBYE
    clients[0].close()
    wait_until(lambda: accepted(willi), "room for one more")


def accepted(willi: Willi) -> bool:
    with willi.connect(greeting=False) as client:
        return client.read_reply().code == 220


def test_a_reload_waits_when_too_many_old_workers_drain(start_willi: StartWilli, upstream: ScriptedUpstream):
    """The file that counts in the end is the last one."""
    willi = start_willi(server=upstream.server, workers=1, drain_timeout="1h")
    clients = []
    for number in range(3):
        clients.append(in_envelope(willi))
        willi.reload({"domain": f"n{number}.example"})
    willi.change({"domain": "last.example"})
    willi.signal(signal.SIGHUP)
    willi.wait_for_log(msg="Reload waits for workers that still start or drain")
    assert len(willi.workers) == 4
    assert accepted(willi)
    clients[0].command(b"QUIT")
    willi.wait_for_reload(4)
    with willi.connect(greeting=False) as client:
        assert str(client.read_reply()) == "220 last.example ESMTP Willi"
    for client in clients[1:]:
        client.command(b"QUIT")


# What is wrong changes nothing


def still_serves(willi: Willi, workers: list[int]) -> None:
    wait_until(lambda: willi.workers == workers, "the end of the new workers, and the old ones")
    willi.probe()


def test_a_broken_file_changes_nothing(willi: Willi):
    willi.tolerate(FAILED)
    workers = willi.workers
    good = willi.config.read_text()
    willi.config.write_text(good + "\n[[more]]\ntype = statc\nsever = x\n")
    willi.signal(signal.SIGHUP)
    line = good.count("\n") + 3
    assert willi.wait_for_log(msg=FAILED)["error"].startswith(f"{willi.config}:{line}: type: 'statc'")
    still_serves(willi, workers)
    willi.config.unlink()
    willi.signal(signal.SIGHUP)
    willi.wait_for_log(msg=FAILED, error=f"{willi.config}: cannot read it: No such file or directory")
    still_serves(willi, workers)
    willi.config.write_text(good)
    willi.reload()


def test_a_broken_csv_file_changes_nothing(start_willi: StartWilli, upstream: ScriptedUpstream):
    prefix = in_a_hurry(**{"files.CALM": 0.5})
    willi = start_willi(csv=f"pattern;server\nb.example;{upstream.server};false\n", workers=2, prefix=prefix)
    for text in (FAILED, "the old table stays"):
        willi.tolerate(text)
    workers = willi.workers
    willi.csv.write_text("pattern;server\nb.example;host;perhaps\n")
    willi.signal(signal.SIGHUP)
    assert willi.wait_for_log(msg=FAILED, seconds=60)["error"].startswith(f"{willi.csv}:2: ")
    assert deliver(greeted(willi)) == QUEUED
    still_serves(willi, workers)


def test_a_broken_certificate_changes_nothing(
    start_willi: StartWilli, upstream: ScriptedUpstream, postfix_certificate: Pair, tmp_path: Path
):
    cert, key = copied(postfix_certificate, tmp_path)
    willi = start_willi(server=upstream.server, tls_cert=cert, tls_key=key)
    willi.tolerate(FAILED)
    workers = willi.workers
    Path(key).write_text("nonsense")
    willi.signal(signal.SIGHUP)
    assert key in willi.wait_for_log(msg=FAILED)["error"]
    client = greeted(willi)
    assert client.starttls().code == 220
    still_serves(willi, workers)


def test_an_address_that_is_taken_changes_nothing(willi: Willi):
    willi.tolerate(FAILED)
    workers = willi.workers
    with socket.create_server((HOST, 0)) as other:
        taken, free = other.getsockname()[1], free_port()
        willi.change({"listen": [f"{HOST}:{free}", f"{HOST}:{taken}"]})
        willi.signal(signal.SIGHUP)
        fault = willi.wait_for_log(msg=FAILED)["error"]
        assert fault == f"cannot listen on {HOST}:{taken}: Address already in use"
    still_serves(willi, workers)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, free), 5)


def test_a_reload_from_all_addresses_to_one_of_them_says_that_a_restart_is_needed(willi: Willi):
    willi.tolerate(FAILED)
    willi.change({"listen": f"0.0.0.0:{willi.port}"})
    willi.signal(signal.SIGHUP)
    fault = f"cannot listen on 0.0.0.0:{willi.port}: Address already in use"
    remedy = f"Willi has {HOST}:{willi.port}, and must be restarted for this change"
    assert willi.wait_for_log(msg=FAILED)["error"] == f"{fault}; {remedy}"


# Tables


HEAD = "pattern;server;tls_verify\n"
CALM = 2.0  # seconds that a file must rest, where a test writes on and on
NO_TABLE = "CSV file not read by a new worker, which answers 451 without its table"
TABLE_FAULT = "CSV file not read, the old table stays"
ANN = b"RCPT TO:<ann@z.example>"  # whose line is the last one


@pytest.fixture
def tabled(start_willi: StartWilli, upstream: ScriptedUpstream) -> Callable[[float], Willi]:
    """One worker, a table of two lines, and quick looks; calm: files.CALM."""

    def start(calm: float) -> Willi:
        route = f"127.0.0.1:{upstream.port};false\n"
        prefix = in_a_hurry(**{"files.CALM": calm, "csv_file.RETRY": 0.5, "csv_file.START_PATIENCE": 2 * calm})
        willi = start_willi(csv=f"{HEAD}b.example;{route}z.example;{route}", workers=1, prefix=prefix)
        for text in (FAILED, TABLE_FAULT, NO_TABLE, "Worker ended by itself", "Cannot replace"):
            willi.tolerate(text)
        return willi

    return start


def make_empty(willi: Willi) -> None:
    willi.replace_csv(HEAD)


def truncate(willi: Willi) -> None:
    willi.csv.write_text(HEAD)


def halve(willi: Willi) -> None:
    willi.replace_csv(willi.csv.read_text().partition("z.example")[0] + "z.exa")


def remove(willi: Willi) -> None:
    willi.csv.unlink()


def close_directory(willi: Willi) -> None:
    willi.csv.rename(willi.csv.with_suffix(".away"))
    willi.csv.mkdir()


def replace_worker(willi: Willi) -> None:
    (old,) = willi.workers
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: len(willi.workers) == 1 and willi.workers != [old], "another worker", 60)


def answer(willi: Willi, recipient: bytes) -> str:
    with willi.connect() as client:
        client.command(b"EHLO c.example")
        client.command(MAIL)
        return str(client.command(recipient))


@pytest.mark.parametrize("spoil", [make_empty, truncate, halve, remove, close_directory])
def test_a_new_worker_takes_no_table_that_is_worse_than_the_one_that_serves(
    spoil: Callable[[Willi], None], tabled: Callable[[float], Willi]
):
    willi = tabled(0.5)
    whole = willi.csv.read_text()
    spoil(willi)
    willi.wait_for_log(msg=TABLE_FAULT, seconds=60)
    assert answer(willi, ANN) == "250 2.0.0 ok"
    willi.signal(signal.SIGHUP)
    willi.wait_for_log(msg=FAILED, seconds=60)
    assert answer(willi, ANN) == "250 2.0.0 ok"
    replace_worker(willi)
    assert answer(willi, ANN) == LOOKUP_FAILED  # of the only worker nothing is left
    if willi.csv.is_dir():
        willi.csv.rmdir()
    willi.replace_csv(whole)
    wait_until(lambda: answer(willi, ANN) == "250 2.0.0 ok", "the whole table", 60)
    wait_until(lambda: answer(willi, b"RCPT TO:<ann@c.example>") == NO_ROUTE, 'a definite "no"', 60)


@pytest.mark.parametrize("start", [lambda willi: willi.signal(signal.SIGHUP), replace_worker], ids=["reload", "kill"])
def test_a_new_worker_waits_for_a_file_that_is_being_written(
    start: Callable[[Willi], None], tabled: Callable[[float], Willi]
):
    willi = tabled(CALM)
    whole = willi.csv.read_text()
    first, last = whole[: whole.index("z.example")], whole[whole.index("z.example") :]
    with willi.csv.open("w") as file:
        file.write(first)
        file.flush()
        start(willi)
        for _ in range(6):
            file.write("# still writing\n")
            file.flush()
            written = monotonic()
            told = answer(willi, ANN)[:3]
            assert told in ("250", "451") or monotonic() - written >= CALM, "less than CALM between two writes"
            threading.Event().wait(0.4)
        file.write(last)
    wait_until(lambda: answer(willi, ANN) == "250 2.0.0 ok", "the whole table", 60)


@pytest.mark.parametrize("start", [lambda _willi: None, replace_worker], ids=["serving", "kill"])
def test_a_table_whose_file_hangs_stops_no_worker(
    start: Callable[[Willi], None], start_willi: StartWilli, upstream: ScriptedUpstream
):
    """As on a dead file server: here it is a pipe that has no writer."""
    line = f"b.example;{upstream.server};false\n"
    hurry = {"files.CALM": 0.5, "csv_file.RETRY": 0.5, "csv_file.FILE_TIMEOUT": 2.0, "csv_file.START_PATIENCE": 4.0}
    willi = start_willi(csv=HEAD + line, workers=1, prefix=in_a_hurry(**hurry, **PIPES_HANG))
    for text in (TABLE_FAULT, NO_TABLE, "Worker ended by itself"):
        willi.tolerate(text)
    os.mkfifo(willi.csv.with_suffix(".fifo"))
    willi.csv.with_suffix(".fifo").rename(willi.csv)
    error = willi.wait_for_log(msg=TABLE_FAULT, seconds=60)["error"]
    assert error.endswith(": its file system does not answer")
    start(willi)
    for _ in range(10):
        assert answer(willi, BOB) == (OK if start is not replace_worker else LOOKUP_FAILED)
    with willi.csv.open("wb"):  # the server is back
        willi.csv.unlink()
        willi.csv.write_text(HEAD + line)
    wait_until(lambda: answer(willi, BOB) == OK, "the table", 60)


def test_each_fault_of_a_table_is_logged_once_by_all_workers_together(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    prefix = in_a_hurry(**{"csv_file.RETRY": 0.5})
    willi = start_willi(csv=f"{HEAD}b.example;{upstream.server};false\n", workers=3, prefix=prefix)
    willi.tolerate(TABLE_FAULT)
    willi.replace_csv(f"{HEAD}b.example;;\nc.example;a b\n")
    willi.wait_for_log(msg=TABLE_FAULT, count=2)
    willi.replace_csv(f"{HEAD}b.example;mx.example\n")
    willi.wait_for_log(msg="CSV file read again")
    willi.csv.unlink()
    willi.wait_for_log(msg=TABLE_FAULT, count=3)
    threading.Event().wait(3.0)  # some more tries of all three
    errors = [line["error"] for line in willi.lines(msg=TABLE_FAULT)]
    line = [number for number, text in enumerate(willi.config.read_text().splitlines(), 1) if "file =" in text]
    assert errors == [
        f"{willi.csv}:2: no server: a line is pattern;server;tls_verify",
        f"{willi.csv}:3: 'a b': not a host name",
        f"{willi.config}:{line[0]}: file: cannot read {willi.csv}: No such file or directory",
    ]
    assert len(willi.lines(msg="CSV file read again")) == 1


# Certificates


def copied(pair: Pair, directory: Path) -> tuple[str, str]:
    """Files of the test's own, to be changed."""
    return str(shutil.copy(pair.cert, directory / "cert.pem")), str(shutil.copy(pair.key, directory / "key.pem"))


def certificate_of(willi: Willi) -> bytes:
    """What a client is shown."""
    with greeted(willi) as client:
        assert client.starttls().code == 220
        assert isinstance(client.socket, ssl.SSLSocket)
        return client.socket.getpeercert(binary_form=True) or b""


def test_a_renewed_certificate_needs_no_signal(
    start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, postfix_certificate: Pair,
    tmp_path: Path,
):  # fmt: skip
    """The certificate first and the key seconds later, as some tools do it: what does not fit yet is not fatal."""
    cert, key = copied(postfix_certificate, tmp_path)
    prefix = in_a_hurry(**{"files.INTERVAL": 0.2})
    willi = start_willi(server=upstream.server, tls_cert=cert, tls_key=key, prefix=prefix)
    willi.tolerate(FAILED)
    old = certificate_of(willi)
    renewed = certificates.issue("renewed.example")
    for new, name in ((renewed.cert, cert), (renewed.key, key)):
        Path(shutil.copy(new, tmp_path / "new")).replace(name)
    willi.wait_for_reload()
    lines = willi.lines(msg="A certificate or password has changed")
    named = {file for line in lines for file in line["files"].split(",")}
    assert {key} <= named <= {cert, key}
    assert certificate_of(willi) not in (old, b"")


def test_a_certificate_whose_reload_failed_for_another_reason_is_not_forgotten(
    start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, postfix_certificate: Pair,
    tmp_path: Path,
):  # fmt: skip
    cert, key = copied(postfix_certificate, tmp_path)
    prefix = in_a_hurry(**{"files.INTERVAL": 0.2, "files.RETRY": 1.0})
    willi = start_willi(
        csv=f"pattern;server\nb.example;{upstream.server};false\n", tls_cert=cert, tls_key=key, prefix=prefix
    )
    for text in (FAILED, "the old table stays"):
        willi.tolerate(text)
    old, table = certificate_of(willi), willi.csv.read_text()
    willi.replace_csv("pattern;server\nb.example;;\n")
    renewed = certificates.issue("renewed-too.example")
    for new, name in ((renewed.cert, cert), (renewed.key, key)):
        Path(shutil.copy(new, tmp_path / "new")).replace(name)
    willi.wait_for_log(msg=FAILED, error=f"{willi.csv}:2: no server: a line is pattern;server;tls_verify")
    willi.replace_csv(table)
    willi.wait_for_reload()
    assert certificate_of(willi) not in (old, b"")


def test_a_changed_certificate_beside_a_broken_file_is_tried_once_a_minute(
    start_willi: StartWilli, upstream: ScriptedUpstream, postfix_certificate: Pair, tmp_path: Path
):
    cert, key = copied(postfix_certificate, tmp_path)
    prefix = in_a_hurry(**{"files.INTERVAL": 0.2, "files.RETRY": 5.0})
    willi = start_willi(server=upstream.server, workers=1, tls_cert=cert, tls_key=key, prefix=prefix)
    willi.tolerate(FAILED)
    good = willi.config.read_text()
    willi.config.write_text(good + "nonsense = 1\n")
    (tmp_path / "new").write_text(Path(cert).read_text() + "\n")  # alone: a second file would be a second change
    (tmp_path / "new").replace(cert)
    willi.wait_for_log(msg=FAILED, count=2, seconds=60)
    first, second = (datetime.fromisoformat(line["t"][:19]) for line in willi.lines(msg=FAILED)[:2])
    assert (second - first).total_seconds() >= 4.0  # stamps are whole seconds, and the master looks once a second
    willi.config.write_text(good)
    willi.wait_for_log(msg="Reloaded", seconds=60)


def test_changed_authorities_of_the_system_are_read_again(
    start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, tmp_path: Path
):
    bundle = tmp_path / "ca-certificates.crt"
    bundle.write_bytes(certificates.ca.read_bytes())
    prefix = in_a_hurry(**{"files.INTERVAL": 0.2, "files.CALM": 1.0})
    environment = {"SSL_CERT_FILE": str(bundle)}
    willi = start_willi(server=upstream.server, workers=1, prefix=prefix, environment=environment)
    bundle.write_text("")
    willi.tolerate(FAILED)
    assert "the authorities of this system" in willi.wait_for_log(msg=FAILED)["error"]  # and those before stay
    bundle.write_bytes(certificates.ca.read_bytes() * 2)
    willi.wait_for_log(msg="Reloaded", seconds=60)


@pytest.mark.parametrize("where", ["a file", "a directory"])
def test_a_reload_verifies_by_the_authorities_that_are_there_now(
    where: str, start_willi: StartWilli, start_upstream: StartUpstream, certificates: Authority, tmp_path: Path
):
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    upstream = start_upstream(tls=other.issue(HOST).server_context())
    (tmp_path / "certs").mkdir()
    authorities = tmp_path / "certs" / "0123abcd.0"
    authorities.write_bytes(certificates.ca.read_bytes())
    of_system = {"SSL_CERT_FILE": str(tmp_path / "none"), "SSL_CERT_DIR": str(tmp_path / "certs")}
    willi = start_willi(
        workers=1, mappings={"all": {"type": "static", "server": upstream.server}}, upstream_tls="require",
        upstream_tls_ca=str(authorities) if where == "a file" else "",
        environment=of_system if where == "a directory" else {},
    )  # fmt: skip
    willi.tolerate("Upstream failed")
    assert say(greeted(willi), MAIL, BOB)[1] == NO_ANSWER
    authorities.write_bytes(other.ca.read_bytes())
    willi.reload()
    assert say(greeted(willi), MAIL, BOB)[1] == OK
    willi.reload({"upstream_tls_ca": str(certificates.ca)})
    assert say(greeted(willi), MAIL, BOB)[1] == NO_ANSWER


@pytest.mark.parametrize("where", ["willi.conf", "a mapping", "a database", "a directory"])
def test_authorities_are_watched_wherever_they_are_named(
    where: str, start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, tmp_path: Path
):
    directory = tmp_path / "authorities"
    directory.mkdir()
    authorities = directory / "ca.pem"
    authorities.write_bytes(certificates.ca.read_bytes())
    named = {"upstream_tls_ca": str(authorities)}
    route = {"type": "static", "server": upstream.server, **(named if where == "a mapping" else {})}
    database = {"type": "mysql", "host": f"{HOST}:{free_port()}", "tls_ca": str(authorities), "query": "SELECT ?"}
    willi = start_willi(
        prefix=in_a_hurry(**{"files.INTERVAL": 0.2}),
        mappings={"all": route, **({"db": database} if where == "a database" else {})},
        environment={"SSL_CERT_DIR": str(directory)} if where == "a directory" else {},
        **(named if where == "willi.conf" else {}),
    )
    willi.tolerate("mysql:db")  # which is down
    renewed = tmp_path / "renewed.pem"
    renewed.write_bytes(certificates.ca.read_bytes() * 2)
    renewed.replace(authorities)
    assert willi.wait_for_log(msg="A certificate or password has changed")["files"]


def test_a_changed_path_of_a_certificate_is_one_reload(
    start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, postfix_certificate: Pair
):
    prefix = in_a_hurry(**{"files.INTERVAL": 0.2})
    cert, key = postfix_certificate.cert, postfix_certificate.key
    willi = start_willi(server=upstream.server, workers=1, tls_cert=str(cert), tls_key=str(key), prefix=prefix)
    renewed = certificates.issue("another-path.example")
    willi.reload({"tls_cert": str(renewed.cert), "tls_key": str(renewed.key)})
    threading.Event().wait(1.5)  # some looks
    assert len(willi.lines(msg="Reloaded")) == 1
    assert willi.lines(msg="A certificate or password has changed") == []


# Addresses and limits


def test_an_address_that_was_taken_out_may_come_back_at_once(
    start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path
):
    willi = start_willi(server=upstream.server, environment={"RUNTIME_DIRECTORY": str(tmp_path)})
    first, second = willi.port, free_port()
    both = [f"{HOST}:{first}", f"{HOST}:{second}"]
    for _ in range(3):
        willi.change({"listen": both})
        willi.signal(signal.SIGHUP)
        willi.change({"listen": f"{HOST}:{first}"})
        willi.signal(signal.SIGHUP)
        willi.change({"listen": both})
        assert outcome_of(ask_for_reload(tmp_path, willi.process.pid)) == (0, ""), "the last reload"
        assert willi.lines(msg=FAILED) == []
    for willi.port in (first, second):
        willi.probe()


def test_a_reload_to_more_workers_that_fails_leaves_the_limits_as_they_were(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, workers=1, max_connections=4)
    for text in (FAILED, "Worker ended by itself"):
        willi.tolerate(text)
    good = dict(willi.settings)
    willi.change({"workers": 3, "mappings": {"csv": {"type": "csv", "file": "/nowhere.csv"}}})
    willi.signal(signal.SIGHUP)
    willi.wait_for_log(msg=FAILED)
    willi.change(good)
    clients = [greeted(willi) for _ in range(2)]
    for client in clients:
        assert client.command(MAIL).code == 250
    willi.reload()
    assert [accepted(willi) for _ in range(2)] == [True] * 2
    more = [willi.connect() for _ in range(2)]
    assert not accepted(willi)
    assert len(more) == 2


# What `systemctl reload` and the init script learn of it


def ask_for_reload(directory: Path, pid: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", str(ROOT / "willi_lib" / "processes" / "reload.py"), str(pid)],
        env={**os.environ, "RUNTIME_DIRECTORY": str(directory)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def outcome_of(asking: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and words."""
    _, words = asking.communicate(timeout=60)
    return asking.returncode, words


def test_a_reload_that_failed_is_told_to_the_one_that_asked_for_it(start_willi, upstream: ScriptedUpstream, tmp_path):
    willi = start_willi(server=upstream.server, environment={"RUNTIME_DIRECTORY": f"{tmp_path}:/var/empty"})
    assert outcome_of(ask_for_reload(tmp_path, willi.process.pid)) == (0, "")
    willi.tolerate(FAILED)
    willi.change({"read_timeot": "5m"})
    status, words = outcome_of(ask_for_reload(tmp_path, willi.process.pid))
    assert status == 1
    assert "read_timeot: unknown key; did you mean 'read_timeout'?" in words
    # This one is found by the new workers only.
    del willi.settings["read_timeot"]
    willi.change({"mappings": {"lost": {"type": "csv", "file": "lost.csv"}}})
    status, words = outcome_of(ask_for_reload(tmp_path, willi.process.pid))
    assert status == 1
    assert "lost.csv" in words
    willi.change({"mappings": {"all": {"type": "static", "server": upstream.server}}})
    assert outcome_of(ask_for_reload(tmp_path, willi.process.pid)) == (0, "")


def test_reload_does_not_wait_without_its_runtime_directory(start_willi, upstream: ScriptedUpstream, tmp_path: Path):
    willi = start_willi(server=upstream.server)
    gone = tmp_path / "gone"
    outcome = outcome_of(ask_for_reload(gone, willi.process.pid))
    assert outcome == (1, f"{gone} is missing: only the log says what becomes of this reload\n")
    willi.wait_for_log(msg="Reloaded")


def test_each_of_many_that_ask_for_a_reload_at_once_has_its_answer(start_willi, upstream: ScriptedUpstream, tmp_path):
    """The kernel makes one signal of several, and some come while a reload is under way."""
    willi = start_willi(server=upstream.server, environment={"RUNTIME_DIRECTORY": str(tmp_path)})
    asking = [ask_for_reload(tmp_path, willi.process.pid) for _ in range(10)]
    assert [outcome_of(one) for one in asking] == [(0, "")] * 10
    assert len(willi.lines(msg="Reloaded")) <= 10


def test_who_asks_a_willi_that_has_ended_for_a_reload_is_told_so(tmp_path):
    with subprocess.Popen(["/bin/true"]) as ended:
        pass
    assert outcome_of(ask_for_reload(tmp_path, ended.pid)) == (1, "Willi does not run, or is being stopped\n")


# Under load


class Visitors:
    """Clients that come all the time, one after the other in each of several threads, and what they were told."""

    def __init__(self, willi: Willi, threads: int) -> None:
        self.accepted: list[bytes] = []  # the messages that were answered 250
        self.sent_away: list[bytes] = []  # the commands that were answered 421
        self._port = willi.port
        self._done = threading.Event()
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(threads)
        self._work = [self._pool.submit(self._come) for _ in range(threads)]

    def end(self) -> None:
        """Let them finish. Raises what went wrong in a thread."""
        self._done.set()
        for work in self._work:
            work.result(60)
        self._pool.shutdown()

    def _come(self) -> None:
        while not self._done.is_set():
            with Client(self._port) as client:
                self._visit(client, b"Subject: %d\r\n\r\nhello\r\n" % next(self._numbers))

    def _visit(self, client: Client, message: bytes) -> None:
        """A refused or reset connection, or a 421 in place of the greeting or within a transaction, is an error."""
        assert client.read_reply().code == 220
        for command, wanted in (
            (b"EHLO c.example", 250), (MAIL, 250), (BOB, 250), (b"DATA", 354), (message + b".", 250), (b"QUIT", 221),
        ):  # fmt: skip
            answer = client.command(command)
            if str(answer) == GOODBYE:
                self.sent_away.append(command)
                return
            assert answer.code == wanted, f"{answer} to {command!r}"
            if command.endswith(b"."):
                self.accepted.append(message)


def memory_of(pid: int) -> int:
    """KiB that are the process's own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_reloads_under_load_lose_nobody(start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path):
    """Not one client is refused, reset, or told 421 inside a transaction; and nothing grows."""
    allow(400)
    willi = start_willi(
        server=upstream.server, workers=2, max_connections_per_ip=1000, environment={"RUNTIME_DIRECTORY": str(tmp_path)}
    )
    willi.reload()
    wait_until(lambda: len(willi.workers) == 2, "two workers")
    descriptors, memory = descriptors_of(willi.process.pid), memory_of(willi.process.pid)
    visitors = Visitors(willi, threads=4 if THOROUGH else 2)

    def have_reloaded() -> bool:
        """Asked for again and again, also while it is under way."""
        willi.signal(signal.SIGHUP)
        return willi.text.count("msg=Reloaded ") > examples(20)

    wait_until(have_reloaded, "four reloads, or twenty", 300)
    assert outcome_of(ask_for_reload(tmp_path, willi.process.pid)) == (0, ""), "the last one"
    wait_until(lambda: len(visitors.accepted) > 100, "a hundred messages")
    visitors.end()
    assert {command[:4] for command in visitors.sent_away} <= {b"EHLO", b"MAIL", b"QUIT"}
    assert sorted(message.content for message in upstream.messages) == sorted(visitors.accepted)
    wait_until(lambda: len(willi.workers) == 2, "two workers, all others have gone")
    wait_until(lambda: descriptors_of(willi.process.pid) <= descriptors, "no descriptor more than before")
    assert memory_of(willi.process.pid) - memory < 1024
