"""A small Debian with a mail server that cannot be installed beside Postfix. It shares the network with us.

A twin starts with the files of the run's Debian, and what it changes is its own: nothing of this machine is in it. Its
processes are numbered apart, and end with it, however the tests end. For root, on Debian.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.runner.limits import allow
from tests.support.loopback import PATIENCE, need
from tests.support.machine import KEPT, PATH, debian

INSTALLING = 240.0  # seconds; five are usual

# $1: a directory of ours, at the same place in the twin; it has `files`, for what the twin changes, which is in memory.
# $2: the Debian.
HOLDER = """\
files=$1/files
mount -t tmpfs tmpfs "$files"
mkdir "$files/upper" "$files/work" "$files/root"
mount -t overlay -o "lowerdir=$2,upperdir=$files/upper,workdir=$files/work" overlay "$files/root"
mount --rbind /dev "$files/root/dev"
mount -t proc proc "$files/root/proc"
mkdir -p "$files/root$1"
mount --bind "$1" "$files/root$1"
exec chroot "$files/root" sh -c 'echo up; exec sleep infinity'
"""
INSTALL = """\
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d  # no service is started
chmod 755 /usr/sbin/policy-rc.d
dpkg --install "$1"/*.deb
"""


class Twin:
    """Files and processes. `home` is a directory that the twin and we both see at the same place."""

    def __init__(self, package: str = "") -> None:
        """package: one of MAIL_SERVERS, installed in it."""
        need("unshare", "nsenter", "mount", root=True)
        system = debian()
        allow(INSTALLING)
        self.home = Path(tempfile.mkdtemp(prefix="willi-twin-"))
        self.home.chmod(0o755)
        (self.home / "files").mkdir()
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*alone, "sh", "-euc", HOLDER, "sh", str(self.home), str(system)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
        try:
            self._pid = self._first_process()
            if package:
                self.run("sh", "-euc", INSTALL, "sh", f"{KEPT}/{package}", seconds=INSTALLING)
        except BaseException:
            self.stop()
            raise

    def _first_process(self) -> int:
        """As we number it: the only child of `unshare`."""
        assert self._holder.stdout
        said = self._holder.stdout.readline()
        assert said == "up\n", f"no twin on this machine: {said}{self._holder.stdout.read()}"
        return int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text())

    @property
    def prefix(self) -> list[str]:
        """Put before a command: it runs in the twin, as root."""
        inside = ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--root", "--wd=/", "--"]
        environment = [f"PATH={PATH}", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
        return [*inside, "env", "-i", "-C", "/", *environment]

    def run(self, *command: str, seconds: float = PATIENCE) -> str:
        """Run a command in the twin to its end, which must be good: what it printed."""
        done = subprocess.run(
            [*self.prefix, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="backslashreplace", timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, *command: str, log_file: Path) -> subprocess.Popen[bytes]:
        """Start a program that stays in the foreground."""
        with log_file.open("ab") as log:
            return subprocess.Popen(
                [*self.prefix, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """End everything in it, and forget its files."""
        self._holder.kill()
        self._holder.communicate(timeout=PATIENCE)
        shutil.rmtree(self.home, ignore_errors=True)
