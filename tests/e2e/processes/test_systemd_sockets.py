"""Listening sockets that systemd hands over: of a socket unit, or those it has kept during a restart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.conftest import StartWilli
from tests.support.client import Client
from tests.support.daemon import PYTHON, Setting, Willi, write_config
from tests.support.loopback import HOST, ROOT, free_port, wait_until
from tests.support.promise import greeted
from tests.support.talk import QUEUED, deliver
from tests.support.upstream import ScriptedUpstream

# What systemd does: sockets from descriptor 3 on, and variables that say so. Arguments: names with colons, then for
# each the family, host and port; --; the program.
LAUNCHER = """
import os, socket, sys
names, *places = sys.argv[1:sys.argv.index("--")]
sockets = []
for place in places:
    family, host, port, listens = place.split()
    made = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == "6":
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((host, int(port)))
    if listens == "yes":
        made.listen()
    sockets.append(made)
copies = [os.dup2(made.fileno(), 100 + number, inheritable=False) for number, made in enumerate(sockets)]
for number, copy in enumerate(copies):
    os.dup2(copy, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(copies)), LISTEN_FDNAMES=names)
program = sys.argv[sys.argv.index("--") + 1:]
os.execv(program[0], program)
"""


def launcher(names: str, *places: str) -> list[str]:
    return [sys.executable, "-c", LAUNCHER, names, *places, "--"]


@contextmanager
def notifications(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(60)
        yield systemd


def start(
    directory: Path, upstream: ScriptedUpstream, listen: str, prefix: list[str],
    settings: Mapping[str, Setting] = MappingProxyType({}), **environment: str,
) -> Willi:  # fmt: skip
    mappings: dict[str, Setting] = {"all": {"type": "static", "server": upstream.server, "tls_verify": False}}
    return Willi(directory, {"listen": listen, "workers": 2, **settings, "mappings": mappings}, prefix, environment)


def test_the_sockets_of_a_socket_unit_are_used_and_not_listen(tmp_path: Path, upstream: ScriptedUpstream):
    given, not_used = free_port(), free_port()
    willi = start(tmp_path, upstream, f"{HOST}:{not_used}", launcher("willi.socket", f"4 {HOST} {given} yes"))
    try:
        assert willi.lines(msg="Ready")[0]["listen"] == f"{HOST}:{given}"
        willi.port = given
        for _ in range(2):
            assert deliver(greeted(willi)) == QUEUED
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, not_used), 5)
            willi.reload()
    finally:
        willi.stop()


def test_kept_sockets_are_used_again_and_those_not_wanted_are_given_back(tmp_path: Path, upstream: ScriptedUpstream):
    """The connections that came in between wait in them; a new address is bound besides."""
    kept, given_up, fresh = free_port(), free_port(), free_port()
    names = f"listen {HOST} {kept}:listen {HOST} {given_up}"
    prefix = launcher(names, f"4 {HOST} {kept} yes", f"4 {HOST} {given_up} yes")
    with notifications(tmp_path / "notify") as systemd:
        listen = f"{HOST}:{kept}, {HOST}:{fresh}"
        willi = start(tmp_path / "willi", upstream, listen, prefix, NOTIFY_SOCKET=str(tmp_path / "notify"))
        try:
            words = [systemd.recv(4096).decode() for _ in range(3)]
            assert words[0] == f"FDSTOREREMOVE=1\nFDNAME=listen {HOST} {given_up}"
            assert words[1] == f"FDSTORE=1\nFDNAME=listen {HOST} {fresh}"
            assert words[2].startswith("READY=1\n")
            for willi.port in (kept, fresh):
                willi.probe()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, given_up), 5)
        finally:
            willi.stop()


@pytest.mark.parametrize("missing", ["tls_cert", "a table", "a library"])
def test_who_cannot_start_has_no_clients_wait_in_kept_sockets(missing: str, tmp_path: Path):
    """systemd tries again, perhaps for days."""
    kept, fresh = free_port(), free_port()
    settings: dict[str, Setting] = {"tls_cert": "missing", "tls_key": "missing"} if missing == "tls_cert" else {}
    table: dict[str, Setting] = {"type": "csv", "file": "missing"}
    listen = f"{HOST}:{kept}, {HOST}:{fresh}"
    config = write_config(tmp_path / "willi.conf", {"listen": listen, **settings, "mappings": {"table": table}})
    prefix = launcher(f"listen {HOST} {kept}", f"4 {HOST} {kept} yes")
    with notifications(tmp_path / "notify") as systemd:
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        python = [PYTHON, "-S"] if missing == "a library" else [PYTHON]
        command = [*prefix, *python, str(ROOT / "willi.py"), "-c", str(config)]
        assert subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode == 4
        words = [systemd.recv(4096).decode() for _ in range(3 if missing == "a table" else 1)]
    addresses = [kept, fresh] if missing == "a table" else [kept]
    assert words[-len(addresses) :] == [f"FDSTOREREMOVE=1\nFDNAME=listen {HOST} {port}" for port in addresses]


@pytest.mark.parametrize(("kept", "wanted"), [("0.0.0.0", HOST), (HOST, "0.0.0.0")])
def test_a_kept_socket_is_not_in_the_way_of_a_new_one(
    kept: str, wanted: str, tmp_path: Path, upstream: ScriptedUpstream
):
    port = free_port()
    willi = start(tmp_path, upstream, f"{wanted}:{port}", launcher(f"listen {kept} {port}", f"4 {kept} {port} yes"))
    try:
        willi.port = port
        willi.probe()
    finally:
        willi.stop()


def test_a_unix_socket_is_an_error(tmp_path: Path):
    config = write_config(tmp_path / "willi.conf", {"mappings": {"a": {"type": "static", "server": "127.0.0.1"}}})
    program = (
        "import os, socket, sys; made = socket.socket(socket.AF_UNIX); made.bind(sys.argv[1]); made.listen()\n"
        "os.dup2(os.dup2(made.fileno(), 100), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    willi = [PYTHON, str(ROOT / "willi.py"), "-c", str(config)]
    command = [sys.executable, "-c", program, str(tmp_path / "socket"), *willi]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3
    assert "from LISTEN_FDS is not a listening TCP socket" in result.stdout


def test_a_kept_socket_of_ipv6_is_known_again(tmp_path: Path, upstream: ScriptedUpstream):
    port = free_port()
    with notifications(tmp_path / "notify") as systemd:
        prefix = launcher(f"listen __1 {port}", f"6 ::1 {port} yes")
        willi = start(tmp_path / "willi", upstream, f"[::1]:{port}", prefix, NOTIFY_SOCKET=str(tmp_path / "notify"))
        try:
            assert systemd.recv(4096).startswith(b"READY=1\n")  # nothing was bound, nothing given back
            with Client(port, host="::1") as client:
                assert client.read_reply().code == 220
        finally:
            willi.stop()


def test_an_ipv4_client_of_a_socket_for_both_families_keeps_its_address(tmp_path: Path, upstream: ScriptedUpstream):
    port = free_port()
    willi = start(tmp_path, upstream, ":1", launcher("willi.socket", f"6 :: {port} yes"))
    try:
        willi.port = port
        client = greeted(willi)
        assert deliver(client) == QUEUED
        assert willi.wait_for_log(msg="Message accepted")["client"] == client.address
        assert client.address.startswith(HOST)
    finally:
        willi.stop()


def test_an_ipv4_client_of_a_socket_for_both_families_is_in_the_networks_of_ipv4(
    tmp_path: Path, upstream: ScriptedUpstream
):
    """In xclient_hosts, and what max_connections_per_ip turns away is logged as IPv4, too."""
    port = free_port()
    launch = launcher("willi.socket", f"6 :: {port} yes")
    willi = start(tmp_path, upstream, ":1", launch, {"xclient_hosts": "127.0.0.5", "max_connections_per_ip": 1})
    try:
        willi.port = port
        with willi.connect(source="127.0.0.5") as client:
            assert client.command(b"XCLIENT ADDR=192.0.2.7").code == 220
        with willi.connect(source="127.0.0.6"), willi.connect(source="127.0.0.6", greeting=False) as second:
            assert second.read_reply().code == 421
        assert willi.wait_for_log(msg="Connection refused")["client"] == "127.0.0.6"
    finally:
        willi.stop()


def test_a_socket_that_does_not_listen_is_an_error(tmp_path: Path):
    config = write_config(tmp_path / "willi.conf", {"mappings": {"a": {"type": "static", "server": "127.0.0.1"}}})
    command = [*launcher("odd", f"4 {HOST} 0 no"), PYTHON, str(ROOT / "willi.py"), "-c", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3
    assert "the socket 'odd' from LISTEN_FDS is not a listening TCP socket" in result.stdout


def test_variables_for_another_process_are_nothing_to_willi(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, environment={"LISTEN_PID": "1", "LISTEN_FDS": "1"})
    assert wait_until(lambda: deliver(greeted(willi)), "an answer") == QUEUED
