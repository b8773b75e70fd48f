"""Releases as anyone builds them: `make release` in a fresh clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.runner.limits import allow
from tests.support.loopback import ROOT, need
from tests.support.once import once

VERSION = "2.1.0"  # of `release`
WHEELS = ROOT / "release" / "wheels"  # of all releases that the tests build: fetched once
SECONDS = 900  # for a command that may have to fetch the wheels; thirty are usual

# Whatever this machine's user has set, and always the same commit for the same tree.
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
       for what, value in (("NAME", "A"), ("EMAIL", "a@a.example"), ("DATE", "2001-02-03T04:05:06Z"))},
}  # fmt: skip


def environment(**changes: str) -> dict[str, str]:
    """Ours, without what the make and the git above these tests have left in it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GIT_"))}
    return {**ours, **GIT, "WILLI_WHEELS": str(WHEELS), "PYTHON": sys.executable, **changes}


def git(tree: Path, *arguments: str) -> str:
    """What git prints about a repository."""
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=tree, env=environment(), stdout=subprocess.PIPE, check=True, timeout=60, text=True
    ).stdout.strip()


def commit_tree(directory: Path) -> Path:
    """A new repository in `directory` with one commit: our tree as it stands, but for what .gitignore names."""
    directory.mkdir(parents=True)
    git(directory, "init", "--quiet", "--initial-branch=main")
    git(ROOT, f"--git-dir={directory}/.git", f"--work-tree={ROOT}", "add", "--all")
    git(directory, "commit", "--quiet", "--message=the tree")
    git(directory, "reset", "--quiet", "--hard")
    return directory


def commit(tree: Path, name: str, content: str) -> None:
    """Commit one file, new or changed."""
    (tree / name).write_text(content, encoding="utf-8")
    git(tree, "add", name)
    git(tree, "commit", "--quiet", f"--message={name}")


def make(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make in a tree. Its environment has the variables; its output is in stdout."""
    allow(SECONDS + 10)
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=tree, env=environment(**variables), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, check=False, text=True,
    )  # fmt: skip


def tarball_of(tree: Path, **variables: str) -> Path:
    """The tarball that `make release` makes in this tree. AssertionError with make's output if it makes none."""
    done = make(tree, "release", **variables)
    assert done.returncode == 0, done.stdout
    return tree / done.stdout.splitlines()[-1]


def release() -> Path:
    """The tarball of our tree as it stands, of this run: directory/release/willi-2.1.0.tar.gz, built in `directory`."""
    need("git", "make", "gzip", "sha256sum")
    return once("release", _build) / "tree" / "release" / f"willi-{VERSION}.tar.gz"


def _build(directory: Path) -> None:
    tree = commit_tree(directory / "tree")
    git(tree, "tag", f"v{VERSION}")
    tarball_of(tree)
