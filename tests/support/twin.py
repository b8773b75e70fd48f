"""This machine a second time, with other packages: mail servers that Debian installs only in place of each other.

A twin has all files of the machine until it changes one, and the change is its own. It shares the network. Its
processes are numbered apart, and end with it, however the tests end. For root, on Debian.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.loopback import PATIENCE, need

INSTALLING = 240.0  # seconds; five are usual
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# $1: a directory of ours, at the same place in the twin; it has `files`, for what the twin changes, which is in memory.
HOLDER = """\
files=$1/files
mount -t tmpfs tmpfs "$files"
mkdir "$files/upper" "$files/work" "$files/root"
mount -t overlay -o "lowerdir=/,upperdir=$files/upper,workdir=$files/work" overlay "$files/root"
mount --rbind /dev "$files/root/dev"
mount -t proc proc "$files/root/proc"
mkdir -p "$files/root$1"
mount --bind "$1" "$files/root$1"
exec chroot "$files/root" sh -c 'echo up; exec sleep infinity'
"""
INSTALL = """\
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d  # no service is started
chmod 755 /usr/sbin/policy-rc.d
rm -f /var/lib/man-db/auto-update  # half of the time would go into an index of manual pages
install() { apt-get -qq -o Acquire::Retries=3 install --yes --no-install-recommends "$@"; }
# The machine may know packages that are gone by now, or may just install others.
install "$@" || { dpkg --configure -a && apt-get -qq -o Acquire::Retries=3 update && install "$@"; }
"""


class Twin:
    """Files and processes. `home` is a directory that the twin and we both see at the same place."""

    def __init__(self, *packages: str) -> None:
        """packages: installed in it, and in it alone."""
        need("unshare", "nsenter", "mount", "apt-get", root=True)
        self.home = Path(tempfile.mkdtemp(prefix="willi-twin-"))
        self.home.chmod(0o755)
        (self.home / "files").mkdir()
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*alone, "sh", "-euc", HOLDER, "sh", str(self.home)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
        try:
            self._pid = self._first_process()
            self.run("sh", "-euc", INSTALL, "sh", *packages, seconds=INSTALLING)
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
