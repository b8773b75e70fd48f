"""The master and its workers: what they share, who is replaced, how they end."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import OWN_INTERPRETER, PIPES_HANG, PYTHON, Willi, in_a_hurry, run_willi, write_config
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port, wait_until
from tests.support.promise import greeted, in_data
from tests.support.talk import QUEUED, content, deliver
from tests.support.upstream import ScriptedUpstream
from willi_lib.config.cpus import usable_cpus

PTRACE_SEIZE = 0x4206
DIED = "Worker ended by itself"
GOODBYE = "421 4.3.2 Service is shutting down, try again"
TOO_MANY = "421 4.3.2 Too many connections, try again later"
TOO_MANY_FROM_YOU = "421 4.7.0 Too many connections from your address"
TOO_FAST = "421 4.7.0 Too many connections from your address in a minute"


def status_of(pid: int, name: str) -> str:
    """A line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().split("\n")
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


def is_there(pid: int) -> bool:
    """And no zombie."""
    try:
        return status_of(pid, "State")[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def connections_of(pid: int, port: int) -> int:
    """How many connections to this port of ours a process has."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            own.add(str(descriptor.readlink()))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().split("\n")[1:-1]]
    established = [f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return len(own.intersection(established))


def served_by(willi: Willi, pid: int) -> Client:
    """A client of this very worker: the others are stopped while it connects."""
    others = [other for other in willi.workers if other != pid]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    wait_until(lambda: all(status_of(other, "State")[0] == "T" for other in others), "stopped workers")
    try:
        return greeted(willi)
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)


@pytest.fixture
def two(start_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    """A Willi of two workers."""
    willi = start_willi(server=upstream.server, workers=2, max_connections_per_ip=1000)
    assert len(willi.workers) == 2
    return willi


def test_every_worker_serves(two: Willi, upstream: ScriptedUpstream):
    for pid in two.workers:
        client = served_by(two, pid)
        assert deliver(client) == QUEUED
    assert len(upstream.messages) == 2


def test_auto_is_a_worker_for_each_cpu_that_willi_may_use(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, workers="auto")
    assert len(willi.workers) == usable_cpus()
    assert willi.lines(msg="Ready")[0]["workers"] == str(len(willi.workers))


def test_the_master_holds_no_client_and_no_gevent(start_willi: StartWilli, upstream: ScriptedUpstream):
    two = start_willi(server=upstream.server, workers=2, prefix=OWN_INTERPRETER)
    clients = [served_by(two, pid) for pid in two.workers]
    assert connections_of(two.process.pid, two.port) == 0
    assert len(clients) == 2
    mapped = Path(f"/proc/{two.process.pid}/maps").read_text()
    assert "gevent" not in mapped and "greenlet" not in mapped
    assert all("gevent" in Path(f"/proc/{pid}/maps").read_text() for pid in two.workers)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_logrotate_sends_to_other_programs_ends_none(number: int, fresh_willi: Willi):
    processes = [fresh_willi.process.pid, *fresh_willi.workers]
    for pid in processes:
        os.kill(pid, number)
    fresh_willi.probe()
    assert [fresh_willi.process.pid, *fresh_willi.workers] == processes


def test_ps_and_pgrep_show_what_each_process_is(start_willi: StartWilli, upstream: ScriptedUpstream):
    status = f"{HOST}:{free_port()}"
    willi = start_willi(server=upstream.server, workers=2, status_listen=status, prefix=OWN_INTERPRETER)
    willi.reload()
    wait_until(lambda: len(willi.children) == 3, "the end of the old workers")
    names = {pid: willi.name_of(pid) for pid in (willi.process.pid, *willi.children)}
    assert sorted(names.values()) == ["willi-master", "willi-status", "willi-worker", "willi-worker"]
    for pid, name in names.items():
        shown = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
        if name == "willi-master":
            assert shown.endswith(f"willi.py -c {willi.config}")
        else:
            assert shown == f"{name} willi.py -c {willi.config}"


@pytest.mark.parametrize("name", ["willi-worker", "w" * 200])
def test_a_name_has_no_more_room_than_the_command_line_had(name: str):
    program = "import sys; from willi_lib.processes import fork as p; p.name_process(sys.argv[1]); input()"
    command = [PYTHON, "-c", program, name, "last"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, env={"LONG": "x" * 100}) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(name.encode()), "its name")
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert Willi.name_of(process.pid) == name[:15]
        assert len(shown) == len("\0".join([*command, ""]).encode())
        assert Path(f"/proc/{process.pid}/environ").read_bytes().startswith(b"LONG=xxx")
        process.communicate(b"\n")
    assert process.returncode == 0


def test_workers_are_user_and_the_master_stays_root(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, workers=2, user="nobody")
    assert status_of(willi.process.pid, "Uid").split() == ["0"] * 4
    for pid in willi.workers:
        assert status_of(pid, "Uid").split() == ["65534"] * 4
        assert status_of(pid, "Gid").split() == ["65534"] * 4
        assert status_of(pid, "CapEff") == "0000000000000000"


# The death of a worker


def test_a_worker_that_dies_is_replaced(two: Willi, upstream: ScriptedUpstream):
    two.tolerate(DIED)
    victim, survivor = two.workers
    client = served_by(two, survivor)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(two.workers) == 2 and victim not in two.workers, "two workers again")
    assert two.lines(msg=DIED) == [
        {"lvl": "error", "msg": DIED, "pid": str(victim), "error": "ended with signal 9",
         "t": two.lines(msg=DIED)[0]["t"]}
    ]  # fmt: skip
    assert deliver(client) == QUEUED
    newcomer = next(pid for pid in two.workers if pid != survivor)
    assert deliver(served_by(two, newcomer)) == QUEUED


def test_a_worker_told_to_end_drains_and_is_replaced_meanwhile(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, drain_timeout="5m", workers=1)
    willi.tolerate("Worker ends by itself")
    pid = willi.workers[0]
    client = in_data(willi)
    os.kill(pid, signal.SIGTERM)
    willi.wait_for_log(msg="Draining")
    assert deliver(greeted(willi)) == QUEUED  # by another one
    assert is_there(pid)
    assert content(client) == QUEUED
    assert str(client.read_reply()) == GOODBYE
    wait_until(lambda: len(willi.workers) == 1 and pid not in willi.workers, "one worker again")
    assert willi.lines(lvl="error") == willi.lines(msg="Worker ends by itself", pid=str(pid))


def test_clients_wait_while_the_only_worker_is_replaced(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, workers=1)
    willi.tolerate(DIED)
    os.kill(willi.workers[0], signal.SIGKILL)
    assert deliver(greeted(willi)) == QUEUED


def test_workers_that_die_at_once_are_replaced_ever_more_slowly(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, workers=1)
    willi.tolerate(DIED)
    for count in range(1, 4):
        os.kill(willi.workers[0], signal.SIGKILL)
        willi.wait_for_log(msg="Worker replaced", count=count)
    times = {msg: [int(line["t"][17:19]) for line in willi.lines(msg=msg)] for msg in (DIED, "Worker replaced")}
    gaps = [(after - before) % 60 for before, after in zip(times[DIED], times["Worker replaced"], strict=True)]
    assert all(gap >= delay - 1 for gap, delay in zip(gaps, (1, 2, 4), strict=True)), gaps  # stamps are whole seconds


def test_a_worker_is_replaced_although_its_authorities_cannot_be_read_any_more(
    start_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority, tmp_path: Path
):
    authorities = tmp_path / "ca.pem"
    authorities.write_bytes(certificates.ca.read_bytes())
    willi = start_willi(server=upstream.server, workers=1, upstream_tls_ca=str(authorities))
    willi.tolerate(DIED)
    willi.tolerate("Reload failed")
    authorities.unlink()
    os.kill(willi.workers[0], signal.SIGKILL)
    willi.wait_for_log(msg="Worker replaced")
    assert deliver(greeted(willi)) == QUEUED


def test_a_replacement_that_cannot_start_says_why_and_is_tried_again(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    prefix = in_a_hurry(**{"files.CALM": 0.5, "csv_file.RETRY": 0.5})
    willi = start_willi(csv=f"pattern;server\nb.example;{upstream.server}\n", workers=2, prefix=prefix)
    willi.tolerate(DIED)
    willi.tolerate("the old table stays")
    willi.tolerate("Cannot replace a worker")
    good = willi.csv.read_text()
    willi.csv.write_text("pattern;server\nb.example;;;\n")
    os.kill(willi.workers[0], signal.SIGKILL)
    fault = willi.wait_for_log(msg="Cannot replace a worker", seconds=60)
    assert fault["error"].startswith(f"{willi.csv}:2: ")
    assert deliver(greeted(willi)) == QUEUED  # the other worker has its old table
    willi.csv.write_text(good)
    wait_until(lambda: len(willi.workers) == 2, "two workers again", 90)


def test_workers_do_not_hang_while_nobody_runs(start_willi: StartWilli, upstream: ScriptedUpstream):
    """As when the machine is suspended, or a virtual one is moved: master and workers were stopped."""
    prefix = in_a_hurry(**{"child.HANG_TIMEOUT": 6.0, "master.TICK": 0.3})
    willi = start_willi(server=upstream.server, workers=2, prefix=prefix)
    everyone = [willi.process.pid, *willi.workers]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    threading.Event().wait(8)
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)
    threading.Event().wait(1)
    assert willi.workers == everyone[1:]
    willi.probe()


def test_a_worker_that_hangs_is_killed_and_replaced_while_others_start_and_drain(
    start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path
):
    """There is no row left for its replacement before it has ended."""
    prefix = in_a_hurry(**{"child.HANG_TIMEOUT": 6.0, "child.LONG_LIFE": 0.5, **PIPES_HANG})
    willi = start_willi(server=upstream.server, workers=1, drain_timeout="1h", prefix=prefix)
    willi.tolerate("Worker hangs, it is killed")
    willi.tolerate("Reload failed")
    clients = []
    for _ in range(2):
        clients.append(in_data(willi))
        willi.reload()
    serving = willi.workers[-1]
    os.mkfifo(tmp_path / "map.csv")  # whose reader waits
    slow = {"type": "csv", "file": str(tmp_path / "map.csv")}
    willi.change({"mappings": {"slow": slow, "all": {"type": "static", "server": upstream.server}}})
    willi.signal(signal.SIGHUP)
    wait_until(lambda: len(willi.workers) == 4, "a worker that starts")
    os.kill(serving, signal.SIGSTOP)
    willi.wait_for_log(msg="Worker hangs, it is killed", pid=str(serving))
    wait_until(lambda: len(willi.workers) == 4 and serving not in willi.workers, "a replacement")
    assert willi.process.poll() is None
    for client in clients:
        assert content(client) == QUEUED
    assert "Traceback" not in willi.text


# The death of the master


def test_without_their_master_workers_finish_what_has_begun_and_end(two: Willi, upstream: ScriptedUpstream):
    workers = two.workers
    two.tolerate("The master is dead")
    busy = [in_data_at(two, pid) for pid in workers]
    idle = served_by(two, workers[0])
    os.kill(two.process.pid, signal.SIGKILL)
    assert two.wait() == -signal.SIGKILL
    assert str(idle.read_reply()) == GOODBYE
    for client in busy:
        assert content(client) == QUEUED
        assert str(client.read_reply()) == GOODBYE
    wait_until(lambda: not any(map(is_there, workers)), "the end of the workers")
    assert len(upstream.messages) == 2
    with pytest.raises(ConnectionError):
        two.connect()


def test_a_worker_that_drains_while_its_master_dies_says_no_more(two: Willi):
    """The master has not read that the worker leaves: that resets the connection between them."""
    two.tolerate("The master is dead")
    leaving, serving = two.workers
    client = in_data_at(two, leaving)
    os.kill(two.process.pid, signal.SIGSTOP)
    os.kill(leaving, signal.SIGTERM)
    two.wait_for_log(msg="Draining")
    os.kill(two.process.pid, signal.SIGKILL)
    two.wait()
    assert content(client) == QUEUED
    wait_until(lambda: not is_there(leaving) and not is_there(serving), "the end of the workers")
    assert "Traceback" not in two.text


def in_data_at(willi: Willi, pid: int) -> Client:
    client = served_by(willi, pid)
    for command, code in ((b"MAIL FROM:<ann@a.example>", 250), (b"RCPT TO:<bob@b.example>", 250), (b"DATA", 354)):
        assert client.command(command).code == code
    return client


def test_a_new_master_may_start_while_the_workers_of_a_dead_one_drain(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, drain_timeout="5m", workers=2)
    willi.tolerate("The master is dead")
    client = in_data(willi)
    os.kill(willi.process.pid, signal.SIGKILL)
    willi.wait()
    willi.wait_for_log(msg="Draining", count=2)
    willi.start()
    assert deliver(greeted(willi)) == QUEUED
    assert content(client) == QUEUED


def test_a_worker_that_still_starts_ends_with_its_master(tmp_path: Path):
    """It reads a table that never comes; it must not keep the listening socket for ever."""
    os.mkfifo(tmp_path / "map.csv")
    process, children = start_by_hand(tmp_path, tmp_path / "map.csv", in_a_hurry(**PIPES_HANG))
    workers = [int(pid) for pid in wait_until(lambda: children.read_text().split(), "a worker")]
    process.kill()
    process.wait(60)
    wait_until(lambda: not any(map(is_there, workers)), "the end of the worker")


def start_by_hand(directory: Path, table: Path, launcher: Sequence[str] = ()) -> tuple[subprocess.Popen[bytes], Path]:
    """Without waiting until it is ready: the process, and the file that lists its children."""
    config = write_config(
        directory / "willi.conf",
        {"listen": f"{HOST}:{free_port()}", "workers": 2, "mappings": {"csv": {"type": "csv", "file": str(table)}}},
    )
    with (directory / "log").open("wb") as log:
        command = [*launcher, PYTHON, str(ROOT / "willi.py"), "-c", str(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    return process, Path(f"/proc/{process.pid}/task/{process.pid}/children")


def test_a_worker_that_is_replaced_after_an_upgrade_has_the_libraries_of_its_master(
    start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path
):
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    (other / "gevent").mkdir(parents=True)
    (other / "gevent" / "__init__.py").write_text("raise ImportError('of another release')\n")
    os.utime(other, (1, 1))  # Python trusts its memory of a directory that seems not to have changed
    current = tmp_path / "current"
    current.symlink_to(ours)
    willi = start_willi(server=upstream.server, workers=1, environment={"PYTHONPATH": str(current)})
    willi.tolerate(DIED)
    current.unlink()
    current.symlink_to(other)
    os.kill(willi.workers[0], signal.SIGKILL)
    willi.wait_for_log(msg="Worker replaced")
    assert deliver(greeted(willi)) == QUEUED


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_is_one_signal(
    number: signal.Signals, start_willi: StartWilli, upstream: ScriptedUpstream
):
    """As from a terminal, or from systemd with KillMode=control-group: the workers get it twice, and still drain."""
    willi = start_willi(server=upstream.server, drain_timeout="5m", workers=2)
    client = in_data(willi)
    for pid in (*willi.workers, willi.process.pid):
        os.kill(pid, number)
    willi.wait_for_log(msg="Draining", count=2)
    assert content(client) == QUEUED
    assert str(client.read_reply()) == GOODBYE
    assert willi.wait() == 0
    assert willi.lines(msg="Stopped")


def test_a_hangup_of_the_whole_group_is_one_reload(two: Willi):
    workers = two.workers
    for pid in workers:
        os.kill(pid, signal.SIGHUP)
    two.reload()
    wait_until(lambda: len(two.workers) == 2 and not set(two.workers) & set(workers), "two new workers")
    assert len(two.lines(msg="Reloaded")) == 1


def test_a_second_signal_ends_all_processes_at_once(two: Willi, upstream: ScriptedUpstream):
    workers = two.workers
    client = in_data(two)
    client.send(b"half of it\r\n")
    two.signal(signal.SIGTERM)
    two.wait_for_log(msg="Draining", count=2)
    two.signal(signal.SIGTERM)
    assert two.wait(60) == 0
    assert not any(map(is_there, workers))
    wait_until(lambda: upstream.wait_for_ends(), "the upstream's side")
    assert upstream.messages == []


def test_a_connection_that_owes_its_proxy_header_is_not_reset(start_willi: StartWilli, upstream: ScriptedUpstream):
    """It is told 421 when its header has come, and not before."""
    willi = start_willi(server=upstream.server, workers=2, proxy_protocol_hosts=HOST, probe=False)
    client = willi.connect(greeting=False)
    wait_until(lambda: sum(connections_of(pid, willi.port) for pid in willi.workers) == 1, "accepted")
    willi.signal(signal.SIGTERM)
    willi.wait_for_log(msg="Draining", count=2)
    client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 25\r\n")
    assert client.read_reply().code == 220
    assert str(client.read_reply()) == GOODBYE
    client.expect_eof()
    assert willi.wait() == 0


# Starting


@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_worker_cannot_use_is_told_once_and_no_process_is_left(workers: int, tmp_path: Path):
    (tmp_path / "map.csv").write_text("pattern;server\nb.example;;;\n")
    config = write_config(
        tmp_path / "willi.conf",
        {"listen": f"{HOST}:{free_port()}", "workers": workers,
         "mappings": {"csv": {"type": "csv", "file": "map.csv"}}},
    )  # fmt: skip
    result = run_willi("-c", config)
    assert result.returncode == 1
    assert result.stdout.count('msg="Cannot start"') == 1
    assert f"{tmp_path}/map.csv:2:" in result.stdout


def test_sigterm_while_workers_still_start_ends_it(tmp_path: Path):
    os.mkfifo(tmp_path / "map.csv")
    process, children = start_by_hand(tmp_path, tmp_path / "map.csv", in_a_hurry(**PIPES_HANG))
    workers = wait_until(lambda: children.read_text().split(), "workers")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "msg=Ready" not in (tmp_path / "log").read_text()
    assert not any(is_there(int(pid)) for pid in workers)


def test_a_worker_that_is_killed_while_it_starts_is_no_fault_of_the_configuration(tmp_path: Path):
    """systemd restarts what ends with 4, and not what ends with 1."""
    os.mkfifo(tmp_path / "map.csv")
    process, children = start_by_hand(tmp_path, tmp_path / "map.csv", in_a_hurry(**PIPES_HANG))
    workers = wait_until(lambda: children.read_text().split(), "workers")
    os.kill(int(workers[0]), signal.SIGKILL)
    assert process.wait(60) == 4
    assert 'msg="Cannot start" error="worker ended with signal 9"' in (tmp_path / "log").read_text()
    wait_until(lambda: not any(is_there(int(pid)) for pid in workers), "the end of the others")


@pytest.mark.parametrize(("end", "status"), [
    (lambda _master, other: os.kill(other, signal.SIGKILL), 4),
    (lambda master, _other: master.send_signal(signal.SIGTERM), 0),
], ids=["another worker cannot start", "SIGTERM"])  # fmt: skip
def test_a_killed_worker_that_does_not_end_keeps_no_master(end: Callable[..., None], status: int, tmp_path: Path):
    """As one that waits for a dead disk. Here it has a tracer, without which its end does not come to the master."""
    os.mkfifo(tmp_path / "map.csv")
    process, children = start_by_hand(tmp_path, tmp_path / "map.csv", in_a_hurry(**PIPES_HANG))
    wait_until(lambda: len(children.read_text().split()) == 2, "two workers")
    traced, other = map(int, children.read_text().split())
    if ctypes.CDLL(None).ptrace(PTRACE_SEIZE, traced, None, None) != 0:
        process.kill()
        pytest.skip("this system allows no ptrace")
    try:
        end(process, other)
        assert process.wait(60) == status
        assert f'msg="A process that was killed does not end" pid={traced}' in (tmp_path / "log").read_text()
    finally:
        process.kill()
        os.waitpid(traced, 0)


def test_a_start_that_fails_for_a_missing_file_is_one_that_systemd_tries_again(tmp_path: Path, certificates: Authority):
    """Its file system may not be mounted yet. 1 is not tried again: there is a mistake in the configuration."""
    pair = certificates.issue("mx.willi.example")
    table = tmp_path / "map.csv"
    settings = {"listen": f"{HOST}:{free_port()}", "tls_cert": str(pair.cert), "tls_key": str(tmp_path / "key.pem")}

    def start() -> subprocess.CompletedProcess[str]:
        mappings = {"csv": {"type": "csv", "file": str(table)}}
        return run_willi("-c", write_config(tmp_path / "willi.conf", {**settings, "mappings": mappings}))

    done = start()
    assert (done.returncode, f"tls_key: cannot read {tmp_path}/key.pem: No such" in done.stderr) == (4, True)
    settings["max_errors"] = "many"
    assert start().returncode == 1
    del settings["max_errors"]
    settings["tls_key"] = str(pair.key)
    done = start()
    assert (done.returncode, f"file: cannot read {table}: No such file" in done.stdout) == (4, True)
    assert done.stdout.count('msg="Cannot start"') == 1
    for text in ("", "pattern;server\nb.example;;;"):  # it is just being written, or the disk was full
        table.write_text(text)
        assert start().returncode == 4
    table.write_text("pattern;server\nb.example;;;\n")
    assert start().returncode == 1
    assert "RestartPreventExitStatus=1 2\n" in (ROOT / "etc" / "willi.service").read_text()


def test_a_parent_that_ignored_the_death_of_children_changes_nothing(tmp_path: Path):
    launcher = [sys.executable, "-c", "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
                "os.execv(sys.argv[1], sys.argv[1:])"]  # fmt: skip
    (tmp_path / "map.csv").write_text("pattern;server\nb.example;;;\n")
    process, _ = start_by_hand(tmp_path, tmp_path / "map.csv", launcher=launcher)
    assert process.wait(60) == 1
    assert f"{tmp_path}/map.csv:2: " in (tmp_path / "log").read_text()


def test_a_closed_stdout_is_not_taken_for_a_client(start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path):
    """Log lines were written to whatever connection had got its number: into the message of somebody else."""
    config = write_config(
        tmp_path / "willi.conf",
        {"listen": f"{HOST}:{(port := free_port())}", "domain": "willi.example", "workers": 1,
         "mappings": {"all": {"type": "static", "server": upstream.server, "tls_verify": False}}},
    )  # fmt: skip
    command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", PYTHON, str(ROOT / "willi.py"), "-c", str(config)]
    process = subprocess.Popen(command)
    try:

        def is_served() -> bool:
            with suppress(ConnectionError), Client(port) as client:
                return client.read_reply().code == 220
            return False

        wait_until(is_served, "a greeting")
        process.send_signal(signal.SIGHUP)  # new workers, in which the lowest number is free
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        old = children.read_text()
        wait_until(lambda: children.read_text() != old and len(children.read_text().split()) == 1, "a new worker")
        for pid in (process.pid, *map(int, children.read_text().split())):
            assert [str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)] == ["/dev/null"] * 3
        with Client(port) as client:
            client.read_reply()
            client.command(b"EHLO c.example")
            assert deliver(client) == QUEUED
        assert upstream.messages[0].content == b"Subject: x\r\n\r\nhello\r\n"
    finally:
        process.terminate()
        assert process.wait(60) == 0


# Limits hold for all workers together


def refusal(willi: Willi, source: str = "") -> str | None:
    """What a connection hears that is not let in."""
    client = willi.connect(source=source, greeting=False)
    answer = client.read_reply()
    return None if answer.code == 220 else str(answer)


def test_max_connections_holds_across_workers_and_a_dead_one_does_not_count(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(
        server=upstream.server, workers=2, max_connections=6, max_connections_per_ip=100,
        probe=False,  # which could still be counted
    )  # fmt: skip
    willi.tolerate(DIED)
    victim = willi.workers[0]
    clients = [willi.connect() for _ in range(6)]
    shares = [connections_of(pid, willi.port) for pid in willi.workers]
    assert sum(shares) == 6
    assert refusal(willi) == TOO_MANY
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(willi.workers) == 2 and victim not in willi.workers, "two workers again")
    clients += [willi.connect() for _ in range(shares[0])]
    assert refusal(willi) == TOO_MANY
    assert len(clients) == 6 + shares[0]


def test_the_rate_of_a_client_holds_across_workers(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, workers=2, max_connection_rate=5)
    answers = []
    for _ in range(8):
        with willi.connect(greeting=False) as client:
            answers.append(str(client.read_reply()))
    assert answers == ["220 willi.example ESMTP Willi"] * 5 + [TOO_FAST] * 3


def test_the_connections_of_a_client_are_counted_across_workers(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, workers=2, max_connections_per_ip=5)
    clients = [willi.connect() for _ in range(5)]
    assert refusal(willi) == TOO_MANY_FROM_YOU
    assert refusal(willi, source="127.0.0.2") is None
    for client in clients:
        client.close()
    wait_until(lambda: refusal(willi) is None, "room for one more")


# systemd


def test_systemd_hears_of_start_reload_and_stop(start_willi: StartWilli, upstream: ScriptedUpstream, tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        willi = start_willi(server=upstream.server, workers=2, environment=environment)
        stored = systemd.recvmsg(4096, socket.CMSG_SPACE(4))
        assert stored[0] == f"FDSTORE=1\nFDNAME=listen {HOST} {willi.port}".encode()
        descriptors = socket.CMSG_LEN(4)
        assert len(stored[1][0][2]) == descriptors - socket.CMSG_LEN(0)
        os.close(int.from_bytes(stored[1][0][2], "little"))

        words: queue.SimpleQueue[str] = queue.SimpleQueue()  # the kernel keeps no more than ten
        hearing = threading.Thread(target=hear, args=(systemd, words), daemon=True)
        hearing.start()

        def next_word() -> str:
            return next(word for word in iter(lambda: words.get(timeout=PATIENCE), "") if word != "WATCHDOG=1")

        assert next_word() == f"READY=1\nSTATUS=2 workers listen on {HOST}:{willi.port}"
        willi.reload({"workers": 1})
        assert next_word().startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert next_word() == f"READY=1\nSTATUS=1 worker listens on {HOST}:{willi.port}"
        willi.tolerate("Reload failed")
        willi.config.write_text("nonsense\n")
        willi.signal(signal.SIGHUP)
        assert next_word().startswith("RELOADING=1\n")
        assert next_word().startswith("READY=1\nSTATUS=Reload failed, nothing has changed: ")
        assert [words.get(timeout=PATIENCE) for _ in range(2)] == ["WATCHDOG=1"] * 2
        willi.stop()
        assert next_word() == "STOPPING=1"
        hearing.join()


def hear(systemd: socket.socket, words: queue.SimpleQueue[str]) -> None:
    """All that is said, up to the last word."""
    word = ""
    while word != "STOPPING=1":
        word = systemd.recv(4096).decode()
        words.put(word)
