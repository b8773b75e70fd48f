"""A small network: hosts with addresses and a /run of their own, joined by one switch. For root, on Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.loopback import PATIENCE, wait_until

CLONE_NEWNET = 0x40000000  # linux/sched.h
# Who holds a host. When we close its stdin, or are no more, it ends the host's processes and itself. $1: a resolv.conf.
HOLDER = """\
mount -t tmpfs tmpfs /run
mount --bind "$1" /etc/resolv.conf
echo up
read -r _ || :
for process in /proc/[0-9]*; do
    if [ "$process/ns/net" -ef /proc/self/ns/net ] && [ "$process" != "/proc/$$" ]; then
        kill -KILL "${process#/proc/}" || :
    fi
done
"""
INTERFACE = "eth0"
RESOLVER = "127.0.53.1"  # on each host its own, if it has one: the address of the first DnsServer made inside of it

_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """One segment, on which every host reaches every address without a router."""

    def __init__(self, directory: Path) -> None:
        """directory: for a file that stays as long as the network."""
        self._resolver = directory / "resolv.conf"
        self._resolver.write_text(f"nameserver {RESOLVER}\n")
        self.hosts: list[Host] = []
        self._switch = Host(self._resolver)
        self._switch.run("ip", "link", "add", "switch", "type", "bridge", "mcast_snooping", "0")
        self._switch.run("ip", "link", "set", "switch", "up")

    def host(self, *addresses: str) -> Host:
        """A new host with these addresses (192.0.2.1/24)."""
        host = Host(self._resolver)
        self.hosts.append(host)
        port = self._port(host)
        peer = ("type", "veth", "peer", "name", INTERFACE, "netns", str(host.pid))
        self._switch.run("ip", "link", "add", port, *peer)
        self._switch.run("ip", "link", "set", port, "master", "switch", "up")
        for address in addresses:
            host.run("ip", "address", "add", address, "dev", INTERFACE, *(["nodad"] if ":" in address else []))
        host.run("ip", "link", "set", INTERFACE, "up")
        return host

    def unplug(self, host: Host) -> None:
        """Nothing leaves this host any more and nothing reaches it, and nobody is told."""
        self._switch.run("ip", "link", "set", self._port(host), "nomaster")

    def plug(self, host: Host) -> None:
        """Connect it again."""
        self._switch.run("ip", "link", "set", self._port(host), "master", "switch")

    def _port(self, host: Host) -> str:
        return f"port{self.hosts.index(host)}"

    def stop(self) -> None:
        """End every host, and whatever runs on it."""
        for host in (*self.hosts, self._switch):
            host.stop()


class Host:
    """A network namespace and a /run for its own programs. All other files are the machine's."""

    def __init__(self, resolver: Path) -> None:
        command = ["unshare", "--net", "--mount", "sh", "-euc", HOLDER, "sh", str(resolver)]
        self._holder = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
        self.pid = self._holder.pid
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"up\n", "no namespaces on this machine"
        self._namespace = Path(f"/proc/{self.pid}/ns/net").stat().st_ino
        assert self._namespace != Path("/proc/self/ns/net").stat().st_ino, "crash() would end the machine's processes"
        self.run("ip", "link", "set", "lo", "up")

    @property
    def prefix(self) -> list[str]:
        """Put before a command: it runs on this host, and keeps its process id."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--"]

    def run(self, *command: str) -> str:
        """Run a command on this host to its end: what it printed."""
        done = subprocess.run(
            [*self.prefix, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def path(self, name: str) -> Path:
        """A file of this host's /run, for those who are not on it."""
        return Path(f"/proc/{self.pid}/root{name}")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes in the block are this host's, also afterwards."""
        home_path, path = Path("/proc/thread-self/ns/net"), Path(f"/proc/{self.pid}/ns/net")
        with home_path.open("rb") as home, path.open("rb") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def has_address(self, address: str) -> bool:
        return f" {address}/" in self.run("ip", "-oneline", "address", "show", "dev", INTERFACE)

    def route(self, network: str) -> None:
        """Hosts of this network are on the same segment."""
        self.run("ip", "route", "add", network, "dev", INTERFACE)

    def crash(self) -> None:
        """SIGKILL to everything that runs on this host; none of it sees another one die."""
        self._signal_all(signal.SIGSTOP)
        wait_until(lambda: not self._signal_all(signal.SIGKILL), "the end of a host's processes")

    def stop(self) -> None:
        self.crash()
        self._holder.communicate(timeout=PATIENCE)

    def _signal_all(self, number: signal.Signals) -> bool:
        """Whether there was anything to be signalled."""
        found = False
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if int(directory.name) != self.pid and (directory / "ns/net").stat().st_ino == self._namespace:
                    os.kill(int(directory.name), number)
                    found = True
        return found


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
