"""A private sshd on loopback: its own keys, users, /run and temporary folder, in a mount namespace of its own."""

from __future__ import annotations

import shlex
import socket
import subprocess
from pathlib import Path

from tests.support.loopback import HOST, free_port, wait_until

OPERATOR = "willi-operator"  # may use sudo, and is known in the namespace only
CONFIGURATION = """\
ListenAddress {host}:{port}
HostKey {home}/host_key
AuthorizedKeysFile /run/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
SetEnv TMPDIR={remote_tmp}
"""
# /srv is the temporary folder there, mounted as on hardened hosts.
START = """\
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
cp {home}/key.pub /run/authorized_keys
mount -t tmpfs -o mode=1777,noexec,nosuid tmpfs /srv
for file in passwd shadow sudoers; do mount --bind {home}/$file /etc/$file; done
exec /usr/sbin/sshd -D -e -f {home}/sshd_config
"""


class Sshd:
    """Root and OPERATOR may log in with `options`; nothing of the machine's own configuration counts or changes."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.log_file = home / "sshd.log"
        for name in ("host_key", "key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
            subprocess.run(command, check=True, timeout=60)
        known = f"[{HOST}]:{self.port} {(home / 'host_key.pub').read_text()}"
        (home / "known_hosts").write_text(known, encoding="ascii")
        write_users(home)
        settings = CONFIGURATION.format(host=HOST, port=self.port, home=home, remote_tmp="/srv")
        (home / "sshd_config").write_text(settings, encoding="ascii")
        self.options = shlex.join([
            "-F", "none", "-p", str(self.port), "-i", str(home / "key"), "-o", "IdentitiesOnly=yes",
            "-o", f"UserKnownHostsFile={home}/known_hosts", "-o", "BatchMode=yes",
        ])  # fmt: skip
        with self.log_file.open("wb") as log:
            command = ["unshare", "--mount", "--propagation=private", "sh", "-c", START.format(home=home)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self.listens, "sshd listens")

    def listens(self) -> bool:
        assert self.process.poll() is None, self.log_file.read_text()
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((HOST, self.port)) == 0

    def left(self) -> list[str]:
        """What is in its temporary folder."""
        return [path.name for path in Path(f"/proc/{self.process.pid}/root/srv").iterdir()]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def write_users(home: Path) -> None:
    """The users of the namespace: this machine's, root's password neither set nor locked, and OPERATOR."""
    users = Path("/etc/passwd").read_text(encoding="utf-8")
    (home / "passwd").write_text(f"{users}{OPERATOR}:x:64000:65534::/:/bin/bash\n", encoding="utf-8")
    others = [line for line in Path("/etc/shadow").read_text(encoding="utf-8").splitlines() if line[:5] != "root:"]
    lines = ["root:*:20000:0:99999:7:::", *others, f"{OPERATOR}:*:20000:0:99999:7:::", ""]
    (home / "shadow").write_text("\n".join(lines), encoding="utf-8")
    (home / "sudoers").write_text(f"root ALL=(ALL) ALL\n{OPERATOR} ALL=(root) NOPASSWD: ALL\n", encoding="ascii")
    for name, mode in (("passwd", 0o644), ("shadow", 0o600), ("sudoers", 0o440)):
        (home / name).chmod(mode)
