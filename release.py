#!/usr/bin/env python3
"""Build the release tarball, and install it on another host. `make release` and `make install` call this.

The same commit gives the same octets, whoever builds it, where and when: `git archive` of what is committed, with the
version in it, and exactly those wheels whose checksums wheels.sha256 lists.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RELEASE = ROOT / "release"
LOCK = ROOT / "wheels.sha256"  # as sha256sum writes it

# What a host needs.
PACKED = (
    "willi.py", "willi_lib", "etc", "docs", "install.sh", "requirements.txt", "README.md", "CHANGES.md",
    "SECURITY.md", "CONTRIBUTING.md", "LICENSE", "Containerfile",
)  # fmt: skip
VERSION_FILE = "willi_lib/__init__.py"
VERSION_LINE = re.compile(r'^VERSION = "([^"\n]+)"$', re.MULTILINE)

# The wheels that a tarball carries, by machine and CPython. Others get theirs from the network.
# gevent has none for 3.10 on aarch64.
TARGETS = {"x86_64": ("3.10", "3.11", "3.12", "3.13", "3.14"), "aarch64": ("3.11", "3.12", "3.13", "3.14")}
PLATFORMS = ("manylinux_2_28", "manylinux2014")  # glibc 2.28: Debian 10, Ubuntu 18.10 and later
BUILT = "docopt"  # the only one that its author publishes without a wheel
BUILT_BY = "setuptools==80.9.0"  # it writes its own version into the wheel
MAX_NAMES = 5  # of files that are not committed; git status shows them all

# gzip itself: that of git or Python is another one on some systems, and writes other octets.
GZIP = "tar.tar.gz.command=env --unset=GZIP gzip -9 --no-name"
PIP_SECONDS = 600  # one call of pip; it has its own limits for each answer of the network
SSH_FAILED = 255  # ssh's own exit status; any other is that of the command
SSH_LIMITS = ("-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")


class Failed(Exception):
    """There is no release, and the text says why."""


def run(*command: str | Path, seconds: float = 300) -> bytes:
    """The standard output of a command. Raises Failed, with its last word."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=seconds)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is missing: install it first") from None
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Failed(f"{shlex.join(map(str, command))} ended with {done.returncode}: {said}")
    return done.stdout


def pip(python: Path, *arguments: str | Path) -> None:
    """Run pip for what it gets from the network. Raises Failed."""
    try:
        run(python, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments, seconds=PIP_SECONDS)
    except Failed as failure:
        said = str(failure).rpartition(": ")[2]
        raise Failed(
            f"The libraries cannot be fetched ({said}). Run this again where the network is, or put the wheels that"
            f" {LOCK.name} names into {os.environ.get('WILLI_WHEELS', 'release/wheels')}"
        ) from None


def git(*arguments: str) -> bytes:
    """What git prints, whatever its user may have set."""
    plain = ("core.autocrlf=false", "core.attributesFile=/dev/null", "log.showSignature=false", "tar.umask=0022", GZIP)
    return run("git", *(option for setting in plain for option in ("-c", setting)), *arguments)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The commit


def refuse_changes() -> None:
    """Raises Failed if the tree is not what is committed: the tarball would lack what its builder sees."""
    if changes := git("status", "--porcelain", "--untracked-files=all").decode().splitlines():
        names = [change[3:] for change in changes]
        named = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if names[MAX_NAMES:] else "")
        raise Failed(
            f"Only what is committed can be released. Commit these, or put them aside with"
            f" git stash --include-untracked: {named}"
        )


def find_version(of_source: str) -> str:
    """That of the last tag: 2.0.0, or 2.0.0-5-g0123456789ab five commits later. Without a tag that of the source."""
    # A fixed length of the hash: git's own choice depends on how many objects a clone has.
    described = git("describe", "--tags", "--match=v[0-9]*", "--always", "--abbrev=12", "HEAD").decode().strip()
    version = described[1:] if described.startswith("v") else f"{of_source}+g{described}"
    if not re.fullmatch(r"[0-9][0-9A-Za-z.+~-]*", version):
        raise Failed(f"{version!r} cannot be a version")
    return version


# The wheels


def wheels(cache: Path) -> list[Path]:
    """Exactly the wheels of wheels.sha256, fetched if they are not in the cache already. Raises Failed."""
    cache.mkdir(parents=True, exist_ok=True)
    directory = os.open(cache, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)  # others may build at the same time; the kernel forgets it when we end
    lock = [line.split("  ") for line in LOCK.read_text(encoding="ascii").splitlines()]

    def differing() -> list[Path]:
        return [
            cache / name
            for checksum, name in lock
            if not ((cache / name).exists() and sha256(cache / name) == checksum)
        ]

    if wrong := differing():
        print("Fetching the wheels ...", flush=True)
        for path in wrong:
            path.unlink(missing_ok=True)
        fetch(cache)
    if wrong := differing():
        lines = [f"{path.name}: {'another one' if path.exists() else 'not to be had'}" for path in wrong]
        advice = "If requirements.txt has changed: make lock"
        raise Failed("\n".join(["These wheels are not those of wheels.sha256:", *lines, advice]))
    os.close(directory)
    return [cache / name for _, name in lock]


def fetch(directory: Path) -> None:
    """Download the wheels of requirements.txt for all targets, and build the one that cannot be downloaded."""
    with tempfile.TemporaryDirectory(prefix="willi-release-") as scratch:
        venv.create(f"{scratch}/venv", with_pip=True)
        python = Path(scratch, "venv/bin/python")
        pip(python, "install", BUILT_BY)
        # Without a cache: pip would take the wheel that some other setuptools has built.
        how = ["--no-cache-dir", "--no-deps", f"--no-binary={BUILT}", "--no-build-isolation", "--use-pep517"]
        where = ["--constraint=requirements.txt", f"--wheel-dir={scratch}"]
        pip(python, "wheel", *how, *where, BUILT)
        for built in Path(scratch).glob("*.whl"):
            repack(built, directory / built.name)
        for target in targets():
            where = [f"--find-links={directory}", f"--dest={directory}", "--requirement=requirements.txt"]
            pip(python, "download", "--only-binary=:all:", *target, *where)


def targets() -> Iterator[list[str]]:
    """Each target as options of `pip download`."""
    for machine, versions in TARGETS.items():
        platforms = [f"--platform={name}_{machine}" for name in PLATFORMS]
        yield from (["--implementation=cp", f"--python-version={version}", *platforms] for version in versions)


def repack(source: Path, target: Path) -> None:
    """Copy a wheel, without what depends on its builder: times, umask, the order of a directory, zlib."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in sorted(old.namelist()):
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.create_system = 3  # Unix, for the mode
            entry.external_attr = 0o100644 << 16
            new.writestr(entry, old.read(name))


def lock() -> None:
    """Choose the wheels again, and write wheels.sha256."""
    with tempfile.TemporaryDirectory(prefix="willi-lock-") as scratch:
        fetch(Path(scratch))
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(Path(scratch).glob("*.whl"))]
    LOCK.write_text("".join(lines), encoding="ascii")
    print(f"{LOCK.name}: {len(lines)} wheels")


# The tarball


def build() -> Path:
    """Make release/willi-<version>.tar.gz and release/SHA256SUMS from HEAD. Raises Failed."""
    refuse_changes()
    source = git("show", f"HEAD:{VERSION_FILE}").decode()
    found = VERSION_LINE.findall(source)
    if len(found) != 1:
        raise Failed(f"{VERSION_FILE} has no line VERSION, or several")
    version = find_version(*found)
    packed = wheels(Path(os.environ.get("WILLI_WHEELS", RELEASE / "wheels")))
    top = f"willi-{version}"
    with tempfile.TemporaryDirectory(prefix="willi-release-") as scratch:
        stamped = Path(scratch, Path(VERSION_FILE).name)
        stamped.write_text(VERSION_LINE.sub(f'VERSION = "{version}"', source), encoding="utf-8")
        added = [f"--prefix={top}/willi_lib/", f"--add-file={stamped}", f"--prefix={top}/wheels/"]
        added += [f"--add-file={wheel}" for wheel in packed]
        committed = ["HEAD", "--", *PACKED, f":(exclude){VERSION_FILE}"]
        compressed = git("archive", "--format=tar.gz", *added, f"--prefix={top}/", *committed)
    tarball = RELEASE / f"{top}.tar.gz"
    write(tarball, compressed)
    write(RELEASE / "SHA256SUMS", f"{sha256(tarball)}  {tarball.name}\n".encode())
    return tarball


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_bytes(content)
    half.replace(path)


# Another host

# Standard input is the tarball. If it is cut off on the way, gzip sees it and nothing stays.
RECEIVE = """
set -e
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
trap 'exit 1' HUP INT TERM
tar -xzpf - -C "$directory"
trap - EXIT
echo "$directory"
"""
# By way of sh: /tmp may be mounted noexec.
INSTALL = """
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
trap '$sudo rm -rf {directory}' EXIT
trap 'exit 1' HUP INT TERM
cd {directory}/{name} && $sudo sh ./install.sh
"""


def install(host: str) -> None:
    """Build the release, send it to a host and run its install.sh there as root. Raises Failed."""
    if not re.fullmatch(r"[^-\s]\S*", host):
        raise Failed("Install where? make install TARGET_HOST=root@mx1.example.org (or a user who may use sudo)")
    tarball = build()
    # ssh alone, not scp too: they name their options differently, so that SSH_OPTIONS could not be for both.
    ssh = ["ssh", *shlex.split(os.environ.get("SSH_OPTIONS", "")), *SSH_LIMITS]  # the first value counts
    print(f"Sending {tarball.name} to {host} ...", flush=True)
    directory = over_ssh([*ssh, "--", host, in_sh(RECEIVE)], tarball)
    if not re.fullmatch(r"/[\w./-]+", directory):
        raise Failed(f"{host} answered {directory!r}, not the name of a directory")
    command = INSTALL.format(directory=directory, name=tarball.name.removesuffix(".tar.gz"))
    terminal = ["-t"] if sys.stdin.isatty() else []  # for the password that sudo asks for
    status = subprocess.run([*ssh, *terminal, "--", host, in_sh(command)], check=False).returncode
    if status == SSH_FAILED:
        raise Failed(f"The connection to {host} failed; {directory} may still be there.")
    if status:
        raise Failed(f"install.sh on {host} failed: exit status {status}")


def in_sh(script: str) -> str:
    """The script as a command for whatever shell the user has there."""
    return f"exec sh -c {shlex.quote(script)}"


def over_ssh(command: Sequence[str], tarball: Path) -> str:
    """Send a file; the last line of the answer. Raises Failed. ssh has its own limit for a silent network."""
    with tarball.open("rb") as file:
        sent = subprocess.run(command, stdin=file, stdout=subprocess.PIPE, check=False)
    if sent.returncode:
        raise Failed(f"{tarball.name} was not sent")
    return sent.stdout.decode(errors="replace").strip().rpartition("\n")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make release/willi-<version>.tar.gz and release/SHA256SUMS")
    commands.add_parser("lock", help="after a change of requirements.txt: write wheels.sha256 again")
    commands.add_parser("install", help="build, and run install.sh on a host").add_argument("host")
    arguments = parser.parse_args()
    try:
        if arguments.command == "lock":
            lock()
        elif arguments.command == "install":
            install(arguments.host)
        else:
            print(build().relative_to(ROOT))
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
