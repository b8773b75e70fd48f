"""The real HAProxy and the real keepalived, on hosts of a network, with the files of docs/scaling."""

from __future__ import annotations

import csv
import re
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.loopback import PATIENCE, ROOT, wait_until
from tests.support.network import Host

HAPROXY_CFG = ROOT / "docs" / "scaling" / "haproxy.cfg"
KEEPALIVED_CONF = ROOT / "docs" / "scaling" / "keepalived.conf"
ADMIN_SOCKET = "/run/haproxy/admin.sock"


class Program:
    """Something that runs in the foreground on a host and logs to a file, once it is started."""

    def __init__(self, host: Host, log_file: Path, command: Sequence[str]) -> None:
        self.host = host
        self.log_file = log_file
        self._command = [*host.prefix, *command]

    def start(self) -> None:
        """Also again, after `kill`."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="backslashreplace")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Keepalived(Program):
    """Without its part for IPVS, which Willi has no use for."""

    def __init__(self, host: Host, log_file: Path) -> None:
        command = ["keepalived", "--vrrp", "--dont-fork", "--log-console", "--use-file", str(KEEPALIVED_CONF)]
        super().__init__(host, log_file, command)


class HAProxy(Program):
    """One process. Asked and told by its admin socket, as an administrator does."""

    def __init__(self, host: Host, log_file: Path) -> None:
        host.path("/run/haproxy").mkdir()  # as the Debian package's unit does
        self._socket = host.path(ADMIN_SOCKET)
        super().__init__(host, log_file, ["haproxy", "-db", "-f", str(HAPROXY_CFG)])

    def ask(self, command: str) -> str:
        """One command, and all that it answers."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(PATIENCE)
            admin.connect(str(self._socket))
            admin.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: admin.recv(65536), b"")).decode()

    def servers(self) -> dict[str, dict[str, str]]:
        """Its servers with their statistics: status, scur (sessions at this moment), stot, check_status ..."""
        rows = csv.DictReader(self.ask("show stat").removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")}

    def status(self, server: str) -> str:
        """UP, DOWN, DRAIN ..., also with the number of checks on the way (UP 1/2)."""
        return self.servers()[server]["status"]

    def sessions(self, server: str) -> int:
        """How many clients it has there at this moment."""
        return int(self.servers()[server]["scur"])

    def server_of(self, client: str) -> str:
        """Where this client (192.0.2.1:4711) was sent to."""
        sessions = self.ask("show sess")
        found = re.search(rf"src={re.escape(client)} .*? srv=(\S+)", sessions)
        assert found, f"{client} is not in {sessions}"
        return found[1]

    def wait_until_up(self, *servers: str, seconds: float = PATIENCE) -> None:
        """Until all of them are sent clients."""
        wait_until(lambda: all(self._is_up(server) for server in servers), f"HAProxy has {servers} UP", seconds)

    def wait_until_down(self, server: str, seconds: float = PATIENCE) -> None:
        wait_until(lambda: self.status(server) == "DOWN", f"HAProxy has {server} DOWN", seconds)

    def _is_up(self, server: str) -> bool:
        with suppress(OSError):  # it is not ready itself
            return self.status(server) == "UP"
        return False
