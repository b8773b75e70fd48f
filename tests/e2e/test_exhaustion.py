"""Descriptors and memory that run out: who comes then is told 421, the log says why, and later all is as before."""

from __future__ import annotations

import re
import resource
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import StartWilli
from tests.support.daemon import Willi
from tests.support.loopback import wait_until
from tests.support.promise import meet_in_data
from tests.support.raw import Meanwhile, RawUpstream
from tests.support.talk import QUEUED, deliver, greeted
from tests.support.upstream import ScriptedUpstream

MEGABYTE = 1 << 20
OUT_OF_MEMORY = "421 4.3.0 Out of memory, try again later"
TOO_MANY = "421 4.3.2 Too many connections, try again later"
ENOUGH = {"max_connections": 5000, "max_connections_per_ip": 5000}


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def leave_memory(pid: int, octets: int) -> None:
    """So much more may the process have."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmSize:\s+(\d+) kB", status)
    assert found
    resource.prlimit(pid, resource.RLIMIT_AS, ((int(found[1]) << 10) + octets, resource.RLIM_INFINITY))


def come_until(refusal: str, willi: Willi, ends: ExitStack) -> int:
    """New clients, until one of them hears this; how many were let in before. A refused one is closed properly."""
    for number in range(4000):
        client = ends.enter_context(willi.connect(greeting=False))
        answer = client.read_reply()
        if answer.code != 220:
            assert str(answer) == refusal
            client.expect_eof()
            return number
    raise AssertionError("never refused")


def assert_as_before(willi: Willi, worker: int, open_before: int) -> None:
    """The same process serves, and has kept no descriptor."""
    wait_until(lambda: descriptors(worker) <= open_before, "the descriptors of those who have gone")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert willi.workers == [worker]
    assert "Traceback" not in willi.text


def test_without_descriptors_new_clients_are_told_421_and_no_descriptor_is_lost(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, **ENOUGH)
    [worker] = willi.workers
    before = descriptors(worker)
    highest = max(int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir())
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 30, highest + 30))
    for _ in range(3):
        with ExitStack() as ends:
            assert 20 <= come_until(TOO_MANY, willi, ends) <= 35
            assert willi.wait_for_log(msg="Connection refused, no file descriptors left")["client"] == "127.0.0.1"
        assert_as_before(willi, worker, before)


def test_without_even_the_spare_descriptor_clients_wait_and_the_log_is_not_flooded(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    """As where the whole machine has none left: nobody can be told anything, and trying all the time helps nobody."""
    willi = start_willi(server=upstream.server, **ENOUGH)
    [worker] = willi.workers
    before, limit = descriptors(worker), resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, limit[1]))
    with willi.connect(greeting=False) as client:
        willi.wait_for_log(msg="No connection can be accepted", count=2)
        assert len(willi.lines(lvl="warn")) < 10
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limit)
        assert client.read_reply().code == 220
    assert_as_before(willi, worker, before)


def test_without_memory_new_clients_are_told_421_and_those_who_are_in_go_on(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, **ENOUGH)
    [worker] = willi.workers
    before = descriptors(worker)
    with ExitStack() as ends:
        inside = ends.enter_context(greeted(willi))
        leave_memory(worker, 24 * MEGABYTE)
        assert come_until(OUT_OF_MEMORY, willi, ends) > 100
        line = willi.wait_for_log(msg="Connection refused, no memory left")
        assert int(line["connections"]) > 100
        assert deliver(inside) == QUEUED
        come_until(OUT_OF_MEMORY, willi, ends)
    assert_as_before(willi, worker, before)
    with ExitStack() as ends:
        assert come_until(OUT_OF_MEMORY, willi, ends) > 100, "what the others have left can be used again"
    assert_as_before(willi, worker, before)


def test_a_message_for_which_there_is_no_memory_ends_with_421_and_is_not_finished_upstream(
    start_willi: StartWilli, raw: RawUpstream
):
    """Upstreams that do not read: each message waits with the octets that were read of it last."""
    willi = start_willi(server=raw.server, **ENOUGH)
    [worker] = willi.workers
    pairs = [meet_in_data(willi, raw) for _ in range(100)]
    leave_memory(worker, MEGABYTE)
    sending = [Meanwhile(client, b"x" * 998 * 8000) for client, _ in pairs]
    lines = [willi.wait_for_log(msg="Message rejected", error="out of memory", count=n) for n in (1, 5)]
    assert lines[0]["reply"] == OUT_OF_MEMORY
    assert lines[0]["error_src"] == "internal"
    ended = {line["client"] for line in willi.lines(msg="Message rejected", error="out of memory")}
    refused = [(client, peer) for client, peer in pairs if client.address in ended]
    for client, peer in refused:
        assert str(client.read_reply()) == OUT_OF_MEMORY
        assert b"\r\n.\r\n" not in peer.read_until_dropped()
    for client, peer in pairs:
        client.close()
        peer.close()
    for each in sending:
        each.join()
    resource.prlimit(worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with greeted(willi) as client:
        assert client.command(b"NOOP").code == 250
    assert willi.workers == [worker]
    assert "Traceback" not in willi.text


def test_too_little_memory_for_a_changed_table_leaves_the_old_one_and_it_is_read_later(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    head = f"pattern;server\nb.example;{upstream.server}\n"
    willi = start_willi(csv=head)
    willi.tolerate("CSV file not read, the old table stays")
    (worker,) = willi.workers
    leave_memory(worker, 20 * MEGABYTE)
    rows = (f"user{number}@b{number}.example;127.0.0.1:{number % 60000 + 1}\n" for number in range(250_000))
    willi.replace_csv(head + "".join(rows))
    fault = willi.wait_for_log(msg="CSV file not read, the old table stays", seconds=60)
    assert fault["error"] == f"{willi.csv}: not enough memory to read it"
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    resource.prlimit(worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert willi.wait_for_log(msg="CSV file read again", seconds=90)["patterns"] == "250001"
    assert willi.workers == [worker]
