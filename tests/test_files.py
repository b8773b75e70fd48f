"""Files that willi.conf names: what is no file keeps nothing waiting, and a change is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from willi_lib import files
from willi_lib.config import Certificate, ConfigError, MysqlSettings, load
from willi_lib.files import CALM, FileWatch, open_file
from willi_lib.mappings.mysql import Database
from willi_lib.net.tls import CertificateError, certificate_facts, client_context
from willi_lib.routing.route import Policy

LOOK, RETRY = 5.0, 60.0  # seconds


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """Which has no writer."""
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path / "pipe")


def test_a_pipe_a_device_and_a_directory_are_errors_at_once(pipe: str, tmp_path: Path):
    for path, why in ((pipe, "not a regular file"), ("/dev/zero", "not a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=why) as failure:
            open_file(path)
        assert failure.value.filename in (path, str(path))


def test_a_file_that_is_too_large_is_not_read_as_a_whole(tmp_path: Path):
    """A disk image, or a table, in the place of willi.conf or a key."""
    file = tmp_path / "willi.conf"
    file.touch()
    os.truncate(file, 1 << 36)
    with pytest.raises(ConfigError, match="cannot read it: has more than 4 MiB"):
        load(str(file))


def named_by(key: str, pipe: str) -> object:
    """A willi.conf that names the pipe."""
    file = Path(pipe).with_name("willi.conf")
    file.write_text(f"{key} = {pipe}\n[mappings]\n[[all]]\ntype = static\nserver = mx.example\n")
    return load(str(file))


def database(**files: str) -> Database:
    return Database(MysqlSettings(name="db", policy=Policy(), query="SELECT ?", **files), "mysql:db")  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [
    lambda pipe: named_by("tls_cert", pipe),
    lambda pipe: named_by("tls_key", pipe),
    lambda pipe: named_by("upstream_tls_ca", pipe),
    lambda pipe: certificate_facts(Certificate(pipe, pipe)),
    lambda pipe: client_context(True, pipe),
    lambda pipe: database(tls_ca=pipe),
    lambda pipe: database(password_file=pipe),
], ids=["tls_cert", "tls_key", "upstream_tls_ca", "pair", "authorities", "tls_ca", "password_file"])  # fmt: skip
def test_a_pipe_keeps_no_reader_waiting(read: Callable[[str], object], pipe: str):
    """Neither when willi.conf is read, nor in a process that starts later and finds it in the place of a file."""
    with pytest.raises((ConfigError, CertificateError, ValueError), match="not a regular file"):
        read(pipe)


# Changes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stands still; call it to let seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(files, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def replace(file: Path, content: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(content)
    while new.stat().st_ctime_ns == new.stat().st_mtime_ns:  # until the kernel's clock ticks
        new.chmod(0o600)
    new.replace(file)


def watch_of(*paths: Path) -> tuple[FileWatch, list[str]]:
    """They have been read."""
    watch, names = FileWatch(LOOK, RETRY), list(map(str, paths))
    watch.note(names)
    watch.were_read()
    return watch, names


def test_of_several_files_those_that_have_changed_are_named_until_they_are_read(tmp_path: Path, clock):
    cert, key = tmp_path / "cert", tmp_path / "key"
    for file in (cert, key):
        file.write_text("old")
    watch, names = watch_of(cert, key)
    assert not watch.look(names)
    replace(key, "new")
    assert not watch.look(names), "the next look is not due"
    clock(LOOK)
    assert not watch.look(names), "another look has to find it the same"
    clock(LOOK)
    assert watch.look(names) and watch.changed == [str(key)]
    watch.note(names)
    watch.were_read()
    clock(LOOK)
    assert not watch.look(names) and watch.changed == []


def test_files_that_could_not_be_used_are_tried_again_later_and_at_once_when_they_change(tmp_path: Path, clock):
    file = tmp_path / "cert"
    file.write_text("old")
    watch, names = watch_of(file)
    watch.failed()
    clock(RETRY)
    assert not watch.look(names), "what failed was nothing of these files"
    replace(file, "half")
    clock(LOOK)
    assert not watch.look(names)
    for seconds in (LOOK, RETRY):
        clock(seconds - 0.1)
        assert not watch.look(names)
        clock(LOOK)
        assert watch.look(names)
        watch.failed()
    replace(file, "whole")
    clock(LOOK)
    assert not watch.look(names)
    clock(LOOK)
    assert watch.look(names)


def test_a_file_that_is_written_in_place_must_rest(tmp_path: Path, clock):
    file = tmp_path / "cert"
    file.write_text("old")
    watch, names = watch_of(file)
    file.write_text("new")
    assert not watch.look(names) and watch.is_being_written
    clock(CALM)
    assert watch.look(names) and not watch.is_being_written


def test_a_renamed_file_does_not_end_the_rest_of_another_one(tmp_path: Path, clock):
    """The certificate was read when half of it was written, because its key had been renamed."""
    cert, key = tmp_path / "cert", tmp_path / "key"
    for file in (cert, key):
        file.write_text("old")
    watch, names = watch_of(cert, key)
    cert.write_text("half")
    assert not watch.look(names)
    replace(key, "new")
    clock(LOOK)
    assert not watch.look(names)
    clock(CALM - LOOK - 0.1)
    watch.note(names)
    assert watch.is_being_written
    clock(LOOK)
    assert watch.look(names) and not watch.is_being_written


def test_another_list_of_files_is_no_change(tmp_path: Path, clock):
    first, second = tmp_path / "first", tmp_path / "second"
    watch, _ = watch_of(first)
    for path in (second, first):
        clock(LOOK)
        assert not watch.look([str(path)])
