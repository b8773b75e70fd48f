"""Descriptors and memory that run out: clients wait or are told 451, the log says why, and later all is as before."""

from __future__ import annotations

import re
import resource
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from tests.conftest import StartWilli
from tests.support.daemon import Willi, in_a_hurry
from tests.support.loopback import wait_until
from tests.support.promise import meet_in_data
from tests.support.raw import Meanwhile, RawUpstream
from tests.support.talk import QUEUED, deliver, greeted
from tests.support.upstream import ScriptedUpstream

MEGABYTE = 1 << 20
PAUSED = "No connection can be accepted"
INTERNAL_ERROR = "451 4.3.0 Internal error, try again"
ENOUGH = {"max_connections": 5000, "max_connections_per_ip": 5000}


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def leave_memory(pid: int, octets: int) -> None:
    """So much more may the process have."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmSize:\s+(\d+) kB", status)
    assert found
    resource.prlimit(pid, resource.RLIMIT_AS, ((int(found[1]) << 10) + octets, resource.RLIM_INFINITY))


def assert_as_before(willi: Willi, worker: int, open_before: int) -> None:
    """The same process serves, and has kept no descriptor."""
    wait_until(lambda: descriptors(worker) <= open_before, "the descriptors of those who have gone")
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    assert willi.workers == [worker]
    assert "Traceback" not in willi.text


def test_without_descriptors_new_clients_wait_and_no_descriptor_is_lost(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    willi = start_willi(server=upstream.server, **ENOUGH)
    [worker] = willi.workers
    before = descriptors(worker)
    highest = max(int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir())
    for _ in range(3):
        with greeted(willi) as inside, ExitStack() as ends:
            assert deliver(inside) == QUEUED
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 30, highest + 30))
            pauses = len(willi.lines(msg=PAUSED))
            clients = [ends.enter_context(willi.connect(greeting=False)) for _ in range(40)]
            assert willi.wait_for_log(msg=PAUSED, count=pauses + 1)["error"].endswith("Too many open files")
            assert clients[0].read_reply().code == 220
            assert deliver(inside) == QUEUED
            for client in clients[:20]:
                client.close()
            assert clients[-1].read_reply().code == 220
        assert_as_before(willi, worker, before)


def test_while_there_are_no_descriptors_the_log_is_not_flooded(start_willi: StartWilli, upstream: ScriptedUpstream):
    """As where the whole machine has none left."""
    willi = start_willi(server=upstream.server, **ENOUGH)
    [worker] = willi.workers
    before, limit = descriptors(worker), resource.prlimit(worker, resource.RLIMIT_NOFILE)
    began = monotonic()
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, limit[1]))
    with willi.connect(greeting=False) as client:
        willi.wait_for_log(msg=PAUSED, count=2)
        assert len(willi.lines(msg=PAUSED)) <= monotonic() - began + 1, "one in a second"
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limit)
        assert client.read_reply().code == 220
    assert_as_before(willi, worker, before)


def test_a_message_for_which_there_is_no_memory_ends_with_451_and_is_not_finished_upstream(
    start_willi: StartWilli, raw: RawUpstream
):
    """Upstreams that do not read: each message waits with the octets that were read of it last."""
    willi = start_willi(server=raw.server, **ENOUGH)
    willi.tolerate("MemoryError")
    [worker] = willi.workers
    pairs = [meet_in_data(willi, raw) for _ in range(100)]
    leave_memory(worker, MEGABYTE)
    sending = [Meanwhile(client, b"x" * 998 * 8000) for client, _ in pairs]
    why = "internal error: MemoryError()"
    lines = [willi.wait_for_log(msg="Message rejected", error=why, count=n) for n in (1, 5)]
    assert lines[0]["reply"] == INTERNAL_ERROR
    assert lines[0]["error_src"] == "internal"
    ended = {line["client"] for line in willi.lines(msg="Message rejected", error=why)}
    refused = [(client, peer) for client, peer in pairs if client.address in ended]
    for client, peer in refused:
        assert str(client.read_reply()) == INTERNAL_ERROR
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


def test_too_little_memory_for_a_changed_table_leaves_the_old_one_and_it_is_read_later(
    start_willi: StartWilli, upstream: ScriptedUpstream
):
    """The file has more octets than are left: one large piece is refused, and the small ones of the others are not."""
    head = f"pattern;server\nb.example;{upstream.server}\n"
    willi = start_willi(csv=head, prefix=in_a_hurry(**{"csv_file.RETRY": 1.0}))
    willi.tolerate("CSV file not read, the old table stays")
    (worker,) = willi.workers
    leave_memory(worker, 20 * MEGABYTE)
    rows = (f"user{number:060}@b{number}.example;127.0.0.1:{number % 60000 + 1}\n" for number in range(250_000))
    table = head + "".join(rows)
    assert len(table) > 20 * MEGABYTE
    willi.replace_csv(table)
    fault = willi.wait_for_log(msg="CSV file not read, the old table stays", seconds=60)
    assert fault["error"] == f"{willi.csv}: not enough memory to read it"
    with greeted(willi) as client:
        assert deliver(client) == QUEUED
    resource.prlimit(worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert willi.wait_for_log(msg="CSV file read again", seconds=90)["patterns"] == "250001"
    assert willi.workers == [worker]
