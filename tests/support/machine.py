"""Whole Debian systems in containers, each with its own files, network and processes. For root, on Debian.

A layer is a directory of files: the first one, `debian`, is a small Debian, and each further one is what a machine has
changed. A machine runs on layers, and what it changes becomes a layer of its own.

The small Debian is made once for all tests of a run. It keeps the packages of mail servers that Debian installs only in
place of each other, for tests/support/twin.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.runner.limits import allow
from tests.runner.plugin import run_directory
from tests.support.loopback import need, wait_until
from tests.support.network import Host
from tests.support.once import MAKING, once

PACKAGES = ("python3", "python3-venv", "systemd-sysv", "logrotate", "libcap2-bin")
MAIL_SERVERS = ("exim4-daemon-heavy", "opensmtpd")  # Exim's light one does not know the PROXY protocol
KEPT = "/var/cache/willi"  # a directory for each of them, with all packages that it needs
FETCH = (  # $1: the root
    f'mkdir -p "$1{KEPT}/{{package}}/partial" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq --yes '
    f'--no-install-recommends -o "Dir::Cache::Archives=$1{KEPT}/{{package}}/" -o APT::Sandbox::User=root '
    "-o Acquire::Retries=3 install --download-only {package}"
)
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
BOOTING = 90.0  # seconds; less than one is usual
RUNNING = 240.0  # seconds for one command
JOURNAL_TO_CONSOLE = "[Journal]\nForwardToConsole=yes\nMaxLevelConsole=info\n"

# $1: directory with `root` and `work`, $2: lower layers, $3: the layer to write; then directories of control groups,
# a --, and the command. In control groups of its own the machine leaves nothing in those of the tests.
START = """\
mount -t overlay -o "lowerdir=$2,upperdir=$3,workdir=$1/work" overlay "$1/root"
shift 3
while [ "$1" != -- ]; do
    mkdir -p "$1"
    echo 1 >"$1/cgroup.procs"
    shift
done
shift
exec "$@"
"""


class Layers:
    """Keeps the directories. They are not below pytest's own, which is closed to other users and kept for a while."""

    def __init__(self) -> None:
        need("mmdebstrap", "systemd-nspawn", "apt-get", "unshare", "nsenter", "setpriv", "ip", root=True)
        self.home = Path(tempfile.mkdtemp(prefix="willi-machines-"))
        self.home.chmod(0o755)

    def directory(self, name: str) -> Path:
        """A new, empty one."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.home))
        path.chmod(0o755)
        return path

    @contextmanager
    def change(
        self, layer: Path, *below: Path, boot: bool = False, binds: Mapping[Path, str] | None = None
    ) -> Iterator[Machine]:
        """A machine; `layer`, an empty directory, keeps what the block does with it."""
        machine = Machine(self, below, layer, boot, binds)
        try:
            yield machine
        finally:
            machine.stop()

    def remove(self) -> None:
        shutil.rmtree(self.home)


def debian() -> Path:
    """A small Debian of this machine's release, from where this machine has its packages. No test changes it."""
    need("mmdebstrap", "apt-get", root=True)
    return once("debian", _make_debian)


def _make_debian(path: Path) -> None:
    command = [
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}",
        "--dpkgopt=force-unsafe-io",
        *(f"--customize-hook={FETCH.format(package=package)}" for package in MAIL_SERVERS),
    ]  # fmt: skip
    _run([*command, _codename(), str(path), "-"], "\n".join(_sources()), MAKING)
    console = path / "etc/systemd/journald.conf.d/console.conf"
    console.parent.mkdir()
    console.write_text(JOURNAL_TO_CONSOLE)
    (path / "etc/resolv.conf").write_text("")


def _codename() -> str:
    words = Path("/etc/os-release").read_text().split()
    return next(word.partition("=")[2].strip('"') for word in words if word.startswith("VERSION_CODENAME="))


def _sources() -> Iterator[str]:
    """Lines of a sources.list: those of this machine that are for its release, and not for some other software."""
    fields = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Identifier: Packages"]
    codename = _codename()
    for line in sorted(set(_run(fields).splitlines())):
        uri, release, component = line.split()
        if release in (codename, f"{codename}-updates", f"{codename}-security"):
            yield f"deb {uri} {release} {component}"


def _run(command: Sequence[str], text: str = "", seconds: float = RUNNING) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Machine:
    """A running system, with a network of its own that has nothing but lo. `boot`: systemd runs in it.

    It ends with its tests, however they end: its first process is killed by the kernel with the one that started it.
    """

    def __init__(
        self, layers: Layers, below: Sequence[Path], layer: Path | None = None, boot: bool = False,
        binds: Mapping[Path, str] | None = None,
    ) -> None:  # fmt: skip
        """below: the layers, the first one at the bottom. binds: directories of ours, and where it can read them."""
        self.pid = 0
        self._directory = layers.directory("machine")
        for name in ("root", "work"):
            (self._directory / name).mkdir()
        resolver = self._directory / "resolv.conf"
        resolver.write_text("")
        self.console = self._directory / "console.log"
        name = f"{run_directory().name}-{self._directory.name}"  # the runner removes what is left of such a name
        self._groups = [group / name for group in _control_groups()]
        self.host = Host(resolver)
        try:
            self._start(":".join(map(str, reversed(below))), layer or layers.directory("layer"), boot, binds or {})
        except BaseException:
            self.stop()
            raise

    def _start(self, lower: str, layer: Path, boot: bool, binds: Mapping[Path, str]) -> None:
        container = [
            "systemd-nspawn", "--quiet", f"--directory={self._directory / 'root'}", "--register=no", "--keep-unit",
            "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--settings=no",
            *(f"--bind-ro={ours}:{theirs}" for ours, theirs in binds.items()),
            *(["--boot"] if boot else ["--as-pid2", "sh", "-c", "echo up; exec sleep infinity"]),
        ]  # fmt: skip
        start = ["sh", "-euc", START, "sh", str(self._directory), lower, str(layer), *map(str, self._groups), "--"]
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*self.host.prefix, *alone, *start, *container]
        # In a container of systemd-nspawn it is set, and then the first line of ours is that it cannot be reached.
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        with self.console.open("wb") as console:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment
            )
        wait_until(self._has_booted if boot else self._is_up, "the end of a machine's start", BOOTING)

    def _is_up(self) -> bool:
        self._find_first_process()
        return "up" in self.console.read_text().splitlines()

    def _has_booted(self) -> bool:
        """All that is to be started at boot has been, with or without success."""
        self._find_first_process()
        return self.pid != 0 and self.ask("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def _find_first_process(self) -> None:
        """As we number it. For a moment it is one that only prepares the machine."""
        assert self._process.poll() is None, self.console.read_text()
        self.pid = next((leader for nspawn in _children(self._process.pid) for leader in _children(nspawn)), 0)

    # What happens inside

    def ask(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command as root, to its end, whatever its exit status."""
        allow(RUNNING + 10)
        return subprocess.run(
            ["nsenter", f"--target={self.pid}", "--all", "--", "env", "--ignore-environment", f"PATH={PATH}",
             *(f"{name}={value}" for name, value in (environment or {}).items()), *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RUNNING, check=False,
        )  # fmt: skip

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """The same for a command that must succeed: what it printed."""
        done = self.ask(*command, environment=environment)
        assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def path(self, name: str) -> Path:
        """A file of the machine, for us."""
        return Path(f"/proc/{self.pid}/root{name}")

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """A file of root's on the machine."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def processes(self, of: str) -> list[str]:
        """The command lines that contain this text."""
        lines = []
        for directory in self.path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError):  # it has just ended
                lines.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [line for line in lines if of in line]

    def stop(self) -> None:
        """Kill everything in it."""
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()
        self.host.stop()
        for group in self._groups:
            wait_until(lambda group=group: _remove(group), f"the end of {group}")  # type: ignore[misc]


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _control_groups() -> list[Path]:
    """Where systemd keeps its own: in one hierarchy, or in that of its name and a second one."""
    top = Path("/sys/fs/cgroup")
    return [top] if (top / "cgroup.procs").exists() else [top / "systemd", top / "unified"]


def _remove(group: Path) -> bool:
    """Whether it is gone, with those below it: the kernel keeps them as long as a process is in one."""
    for directory, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):
            Path(directory).rmdir()
    return not group.exists()
