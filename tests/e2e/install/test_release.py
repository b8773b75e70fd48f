"""`make release` and `make install`: what is in the tarball, that it is always the same, and what a host receives."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

import release as builder
from tests.conftest import show_on_failure
from tests.support.examples import THOROUGH
from tests.support.loopback import ROOT, free_port, need
from tests.support.release import WHEELS, commit, environment, git, make, tarball_of
from tests.support.release import release as make_release
from tests.support.sshd import OPERATOR, Sshd
from willi_lib import VERSION

PYTHONS = [("x86_64", "3.10"), ("x86_64", "3.11"), ("x86_64", "3.12"), ("x86_64", "3.13"), ("x86_64", "3.14"),
           ("aarch64", "3.11"), ("aarch64", "3.12"), ("aarch64", "3.13"), ("aarch64", "3.14")]  # fmt: skip
NOBODY = 65534
COMMIT_TIME = 981173106  # of tests.support.release.GIT
OFFLINE = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def release() -> Path:
    """A tarball of this tree with the tag v2.1.0."""
    return make_release()


@pytest.fixture(scope="module")
def tree(release: Path) -> Path:
    """The tree that `release` was built in. It stays as it is: take a clone to change it."""
    return release.parents[1]


@pytest.fixture
def clone(tree: Path, tmp_path: Path) -> Path:
    """A fresh clone of that tree."""
    git(tree, "clone", "--quiet", str(tree), str(tmp_path / "clone"))
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def unpacked(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its one directory, unpacked."""
    directory = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["tar", "-xzf", str(release)], cwd=directory, check=True, timeout=60)
    [top] = directory.iterdir()
    return top


def without_wheels(clone: Path) -> None:
    """Commit that a release needs none: to pack them takes most of the time of `make release`."""
    commit(clone, "wheels.sha256", "")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(tarball: Path, directory: Path) -> None:
    """As users do."""
    directory.mkdir()
    subprocess.run(["tar", "--extract", "--file", str(tarball), "--directory", str(directory)], check=True)


def locked(tree: Path) -> dict[str, str]:
    """The checksum of each wheel that may be in a release of this tree."""
    lines = [line.split() for line in (tree / "wheels.sha256").read_text(encoding="ascii").splitlines()]
    return {name: checksum for checksum, name in lines}


# What is in it


def test_it_is_one_directory_of_what_a_host_needs(unpacked: Path):
    assert unpacked.name == "willi-2.1.0"
    needed = {"willi.py", "willi_lib", "etc", "install.sh", "requirements.txt", "README.md", "CHANGES.md"}
    needed |= {"SECURITY.md", "CONTRIBUTING.md", "Containerfile", "wheels"}
    optional = {name for name in ("docs", "LICENSE") if (ROOT / name).exists()}
    assert {path.name for path in unpacked.iterdir()} == needed | optional
    assert (unpacked / "install.sh").read_bytes().startswith(b"#!/bin/sh\n"), "`make install` runs it with sh"


def test_its_files_are_the_committed_ones(tree: Path, unpacked: Path):
    files = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    listed = {Path(name) for name in git(tree, "ls-files").splitlines()}
    tops = {path.name for path in unpacked.iterdir()}
    assert {path for path in files if path.parts[0] != "wheels"} == {path for path in listed if path.parts[0] in tops}
    for path in files & listed - {Path("willi_lib/__init__.py")}:
        assert (unpacked / path).read_bytes() == (tree / path).read_bytes(), path
        assert os.access(unpacked / path, os.X_OK) == os.access(tree / path, os.X_OK), path


def test_nothing_in_it_tells_who_built_it_where_and_when(release: Path):
    with tarfile.open(release) as archive:
        entries = archive.getmembers()
    assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries} == {(0, 0, "root", "root")}
    assert {entry.mtime for entry in entries} == {COMMIT_TIME}
    assert {(entry.type, entry.mode) for entry in entries} == {
        (tarfile.DIRTYPE, 0o755), (tarfile.REGTYPE, 0o755), (tarfile.REGTYPE, 0o644),
    }  # fmt: skip
    parents = {str(parent) for entry in entries for parent in Path(entry.name).parents} - {".", "willi-2.1.0/wheels"}
    assert parents == {entry.name for entry in entries if entry.isdir()}, "or their mode is that of the umask there"
    # RFC 1952 §2.3: no name in the header (FLG), and no time (MTIME).
    assert release.read_bytes()[3:8] == bytes(5)


def test_its_wheels_are_those_of_the_list(tree: Path, unpacked: Path):
    assert {path.name: digest(path) for path in (unpacked / "wheels").iterdir()} == locked(tree)


def test_the_list_has_exactly_the_versions_of_the_requirements(tree: Path):
    def same(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    required = re.findall(r"^([\w.-]+)==(\S+)$", (tree / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    listed = {(same(name.split("-")[0]), name.split("-")[1]) for name in locked(tree)}
    assert listed == {(same(name), version) for name, version in required}


@pytest.mark.parametrize(("machine", "version"), PYTHONS)
def test_its_wheels_are_all_that_a_host_needs(unpacked: Path, tmp_path: Path, machine: str, version: str):
    target = [f"--platform=manylinux_2_28_{machine}", f"--platform=manylinux2014_{machine}", "--implementation=cp"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={version}"]
    places = ["--find-links=wheels", "--requirement=requirements.txt", f"--dest={tmp_path}"]
    subprocess.run([*command, *target, *places], cwd=unpacked, env=environment(**OFFLINE), check=True, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in (unpacked / "wheels").iterdir()}


def test_the_checksums_are_right(release: Path):
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=release.parent, stdout=subprocess.PIPE, check=True, timeout=60, text=True)
    assert done.stdout == "willi-2.1.0.tar.gz: OK\n"


# Its version


def module_of(tarball: Path) -> str:
    """willi_lib/__init__.py in a tarball."""
    with tarfile.open(tarball) as archive:
        module = archive.extractfile(f"{tarball.name.removesuffix('.tar.gz')}/willi_lib/__init__.py")
        assert module
        return module.read().decode()


def test_the_version_is_that_of_the_tag_or_else_of_the_source_with_the_hash(clone: Path):
    without_wheels(clone)
    git(clone, "tag", "of-something-else")
    hash_of_it = git(clone, "rev-parse", "--short=12", "HEAD")
    tarball = tarball_of(clone)
    assert tarball.name == f"willi-2.1.0-1-g{hash_of_it}.tar.gz"
    assert f'\nVERSION = "2.1.0-1-g{hash_of_it}"\n' in module_of(tarball)
    git(clone, "tag", "--delete", "v2.1.0")
    assert tarball_of(clone).name == f"willi-{VERSION}+g{hash_of_it}.tar.gz"
    assert make(clone, "clean").returncode == 0
    assert not (clone / "release").exists()


def test_a_tag_that_is_no_version_is_refused(clone: Path):
    git(clone, "tag", "--delete", "v2.1.0")
    git(clone, "tag", "v2.1.0/x")
    done = make(clone, "release")
    assert done.returncode != 0
    assert "'2.1.0/x' cannot be a version\n" in done.stdout


def test_a_source_without_a_version_is_refused(clone: Path):
    commit(clone, "willi_lib/__init__.py", "")
    done = make(clone, "release")
    assert done.returncode != 0
    assert "willi_lib/__init__.py has no line VERSION, or several\n" in done.stdout


# Only what is committed


@pytest.mark.parametrize("name", ["willi.py", "willi_lib/forgotten.py"])
def test_a_tree_with_changes_is_refused_in_one_line_with_the_remedy(clone: Path, name: str):
    with (clone / name).open("a", encoding="utf-8") as file:
        file.write("# not committed\n")
    done = make(clone, "release")
    assert done.returncode != 0
    remedy = "Only what is committed can be released. Commit these, or put them aside with git stash"
    assert done.stdout.splitlines()[0] == f"{remedy} --include-untracked: {name}"
    assert not (clone / "release").exists()
    git(clone, "stash", "--include-untracked")
    assert git(clone, "status", "--porcelain") == ""


def test_of_many_changed_files_some_are_named(clone: Path):
    for number in range(7):
        (clone / f"note{number}").touch()
    done = make(clone, "release")
    assert done.stdout.splitlines()[0].endswith(": note0, note1, note2, note3, note4 and 2 more")


def test_without_network_one_line_says_what_to_do(clone: Path, tmp_path: Path):
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/", "PIP_RETRIES": "0"}
    done = make(clone, "release", WILLI_WHEELS=str(tmp_path / "cache"), **nowhere)
    assert done.returncode != 0
    fetching, says, *makes_own = done.stdout.splitlines()
    assert fetching == "Fetching the wheels ..."
    assert says.startswith("The libraries cannot be fetched (No matching distribution found for setuptools")
    assert says.endswith(f"put the wheels that wheels.sha256 names into {tmp_path}/cache")
    assert all(line.startswith("make: ") for line in makes_own)


# The same octets


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="willi-release-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_another_user_elsewhere_builds_the_same(public: Path, tree: Path, release: Path):
    """His umask, his time zone, his locale and his git, which turns line ends into CRLF; and files that git ignores."""
    need("git", root=True)
    shutil.copytree(WHEELS, public / "wheels")
    place = public / "another place"
    git(tree, "clone", "--quiet", str(tree), str(place))
    stray = "release/wheels/stray-1-py3-none-any.whl"
    for name in ("willi.conf", "willi_lib/stray.pyc", "etc/__pycache__/stray", stray):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("password = secret\n", encoding="ascii")
    shutil.copy(place / stray, public / "wheels")
    for path in (place, *place.rglob("*")):
        os.utime(path, (0, 0), follow_symlinks=False)
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    settings = public / "gitconfig"
    settings.write_text("[core]\nautocrlf = true\nabbrev = 7\n[log]\nshowSignature = true\n", encoding="ascii")
    his = {"HOME": str(public), "GIT_CONFIG_GLOBAL": str(settings), "WILLI_WHEELS": str(public / "wheels")}
    done = subprocess.run(
        ["/usr/bin/python3", "release.py", "build"], cwd=place, user=NOBODY, group=NOBODY, extra_groups=[], umask=0o077,
        env=environment(TZ="Asia/Kathmandu", LC_ALL="tr_TR.UTF-8", GZIP="-1", **his),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "release/willi-2.1.0.tar.gz\n")
    assert digest(place / "release" / "willi-2.1.0.tar.gz") == digest(release)
    assert (place / "release" / "SHA256SUMS").read_bytes() == (release.parent / "SHA256SUMS").read_bytes()


def for_one_python(clone: Path) -> None:
    """Commit that a release needs the wheels for one Python: to fetch them for nine takes nine times as long."""
    source = (clone / "release.py").read_text(encoding="utf-8")
    commit(clone, "release.py", re.sub(r"(?m)^TARGETS = .*$", 'TARGETS = {"x86_64": ("3.11",)}', source))
    lines = (clone / "wheels.sha256").read_text(encoding="ascii").splitlines(keepends=True)
    commit(clone, "wheels.sha256", "".join(line for line in lines if re.search("-none-any|-cp311-.*x86_64", line)))


def test_without_a_cache_the_wheels_are_the_same_and_no_others_are_taken(clone: Path, tmp_path: Path):
    """First one checksum is changed, as if the index gave another wheel. A wheel in the cache is damaged, too."""
    if not THOROUGH:
        for_one_python(clone)
    cache = tmp_path / "cache"
    cache.mkdir()
    damaged = next(name for name in locked(clone) if name.startswith("greenlet-"))
    (cache / damaged).write_bytes((WHEELS / damaged).read_bytes()[:-1])
    alone = {"WILLI_WHEELS": str(cache), "TZ": "Asia/Kathmandu", "LC_ALL": "C", "PIP_NO_CACHE_DIR": "1"}
    lock = (clone / "wheels.sha256").read_text(encoding="ascii")
    checksum = locked(clone)["docopt-0.6.2-py2.py3-none-any.whl"]
    commit(clone, "wheels.sha256", lock.replace(checksum, checksum[::-1]))
    done = make(clone, "release", **alone)
    assert done.returncode != 0
    assert "not those of wheels.sha256:\ndocopt-0.6.2-py2.py3-none-any.whl: another one\n" in done.stdout
    assert not list(clone.glob("release/*"))

    git(clone, "reset", "--quiet", "--hard", "HEAD^")
    unpack(tarball_of(clone, **alone), tmp_path / "unpacked")
    assert {path.name: digest(path) for path in (tmp_path / "unpacked").rglob("*.whl")} == locked(clone)


# Another host


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sshd]:
    need("sshd", "ssh", "ssh-keygen", "sudo", "unshare", "mount", root=True)
    with ExitStack() as ends:
        (tmp_path / "sshd").mkdir()
        sshd = Sshd(tmp_path / "sshd")
        show_on_failure(request, "sshd", sshd.log_file)
        ends.callback(sshd.stop)
        yield sshd


# What its install.sh sees is kept in a folder, since nothing of it may stay on the host.
RECORDING = """#!/bin/sh
set -e
id -u >{record}/user
pwd >{record}/directory
cp -a . {record}/files
exit "$(cat {record}/status)"
"""


def contents(directory: Path) -> Mapping[str, tuple[int, str]]:
    """The mode and the checksum of each file."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mode, digest(path)) for path in files}


def test_install_runs_install_sh_there_as_root_and_a_failure_of_it_is_one_of_install(
    host: Sshd, clone: Path, tmp_path: Path
):
    record = tmp_path / "record"
    commit(clone, "install.sh", RECORDING.format(record=record))  # it does nothing else
    without_wheels(clone)
    for user, status in (("root", "0"), (OPERATOR, "3")):
        record.mkdir()
        (record / "status").write_text(status)
        done = make(clone, "install", f"TARGET_HOST={user}@127.0.0.1", f"SSH_OPTIONS={host.options}")
        assert (done.returncode != 0) == (status != "0"), done.stdout
        assert (f"install.sh on {user}@127.0.0.1 failed: exit status 3\n" in done.stdout) == (status != "0")
        assert (record / "user").read_text() == "0\n"
        [tarball] = (clone / "release").glob("*.tar.gz")
        unpack(tarball, tmp_path / f"unpacked by {user}")
        name = tarball.name.removesuffix(".tar.gz")
        assert re.fullmatch(rf"/srv/tmp\.\w+/{re.escape(name)}\n", (record / "directory").read_text())
        assert contents(record / "files") == contents(tmp_path / f"unpacked by {user}" / name)
        assert host.left() == []
        shutil.rmtree(record)


def test_a_host_that_does_not_answer_is_told(clone: Path):
    need("ssh")
    without_wheels(clone)
    options = f"-F none -o BatchMode=yes -p {free_port()}"
    done = make(clone, "install", "TARGET_HOST=root@127.0.0.1", SSH_OPTIONS=options)
    assert done.returncode != 0
    assert re.search(r"Connection refused\r?\nwilli-2\.1\.0-1-g\w+\.tar\.gz was not sent\n", done.stdout), done.stdout


@pytest.mark.parametrize("target", ["", "-oProxyCommand=false", "mx1 mx2"])
def test_install_asks_where(clone: Path, target: str):
    done = make(clone, "install", f"TARGET_HOST={target}")
    assert done.returncode != 0
    assert "Install where? make install TARGET_HOST=root@mx1.example.org" in done.stdout
    assert not (clone / "release").exists()


def test_of_a_tarball_that_is_cut_off_on_the_way_nothing_stays(release: Path, tmp_path: Path):
    receive = ["sh", "-c", builder.RECEIVE]
    sent = release.read_bytes()
    there = environment(TMPDIR=str(tmp_path))
    assert subprocess.run(receive, input=sent[:-1], env=there, timeout=60, check=False).returncode != 0
    assert list(tmp_path.iterdir()) == []
    subprocess.run(receive, input=sent, env=there, stdout=subprocess.DEVNULL, timeout=60, check=True)
    assert len(list(tmp_path.glob("*/willi-2.1.0/willi.py"))) == 1
