"""The CSV mapping: what is accepted, what is refused and how, and reading again."""

from __future__ import annotations

import csv
import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.descriptors import Descriptors
from tests.test_routing import ADDRESSES, DOMAINS, Table
from willi_lib import files
from willi_lib.config import CsvSettings
from willi_lib.files import CALM
from willi_lib.mappings import csv_file as module
from willi_lib.mappings.csv_file import CUT_OFF, MAX_FAULTS, MAX_LINE, MAX_OCTETS, PAUSE_LINES, RETRY, CsvFile
from willi_lib.mappings.surroundings import Surroundings
from willi_lib.routing.keys import fold_pattern
from willi_lib.routing.route import LookupFailed, MappingError, NoRoute, Policy, Route, parse_servers
from willi_lib.routing.search import UNSURE, find_route

POLICY = Policy()
HEADER = "pattern;server;tls_verify\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "map.csv"


def made(file: Path | str, policy: Policy = POLICY, where: str = "", **around: Any) -> CsvFile:
    """The mapping of this file, not loaded yet."""
    return CsvFile(CsvSettings("map", policy, where, str(file)), Surroundings(**around))


def patterns(mapping: CsvFile) -> int | None:
    return mapping.facts().patterns


def read(file: Path, content: str | bytes, pause: Callable[[], None] = lambda: None) -> CsvFile:
    """The mapping of a file with this content, loaded."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    mapping = made(file, pause=pause)
    mapping.read()
    return mapping


def find(mapping: CsvFile, key: str) -> Route | None:
    (answer,) = mapping.find([key])
    return answer.route


def faults(file: Path, content: str | bytes) -> tuple[str, ...]:
    """What is wrong with this content, without the directory."""
    with pytest.raises(MappingError) as failure:
        read(file, content)
    assert str(failure.value) == "\n".join(failure.value.faults)
    return tuple(fault.replace(f"{file.parent}/", "") for fault in failure.value.faults)


def to(servers: str, tls_verify: bool = True) -> Route:
    return Route(parse_servers(servers), tls_verify)


Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The mapping's clock stands still; call it to let seconds pass."""
    now = [1000.0]
    for clock_user in (files, module):
        monkeypatch.setattr(clock_user, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def looks(mapping: CsvFile, clock: Clock, seconds: float = 60.0) -> float | None:
    """Look every two seconds, as a worker does; how long it takes until the mapping wants to be loaded."""
    for number in range(int(seconds / 2) + 1):
        if mapping.changed():
            return number * 2.0
        clock(2.0)
    return None


# What is accepted


def test_the_example_of_the_first_willi_is_understood(file):
    mapping = read(
        file,
        HEADER + "somedomain.com;mail.somedomain.com\n"
        "user@somedomain.com;mail.other.org:25;false\n"
        "otherdomain.net;mail.other.org:5025;true\n"
        "\n"
        "# Comments and empty lines are ignored\n",
    )
    assert patterns(mapping) == 3
    assert find(mapping, "somedomain.com") == to("mail.somedomain.com")
    assert find(mapping, "user@somedomain.com") == to("mail.other.org:25", False)
    assert find(mapping, "otherdomain.net") == to("mail.other.org:5025")
    assert find(mapping, "other@somedomain.com") is None


def test_a_route_has_the_policy_and_the_name_of_its_mapping(file):
    file.write_text(HEADER + "b.example;mx\n")
    mapping = made(file, Policy(xclient="require"))
    mapping.read()
    route = find(mapping, "b.example")
    assert route == Route(parse_servers("mx"), True, Policy(xclient="require"))
    assert route.mapping == f"csv:{file}"


@pytest.mark.parametrize(
    "content",
    [
        HEADER + "b.example;mx",
        HEADER + " b.example ; mx ; true \n",
        HEADER + "\t\n   \n#\n  # b.example;mx2\nb.example;mx\n#",
        "\n# first a comment\n" + HEADER + "b.example;mx\n",
        "pattern;server\nb.example;mx\n",
        "Pattern ; Server ; TLS_Verify\nb.example;mx\n",
        HEADER.replace("\n", "\r\n") + "b.example;mx;true\r\n\r\n# comment\r\n",
        "\ufeff" + HEADER + "b.example;mx\n",
        "\ufeff# comment\n" + HEADER + "b.example;mx\n",
        HEADER + "B.Example.;MX.\n",
        HEADER + "b.example;mx:25;\n",
        HEADER + "b.example;mx;true;;\n",
        HEADER + 'b.example;"mx";"true"\n',
        '"pattern";"server";"tls_verify"\n"b.example"; "mx"\n',
        HEADER + "b.example;mx\nb.example;mx:25;true\nB.EXAMPLE;MX;yes\n",
    ],
)
def test_the_form_of_a_line_is_a_matter_of_taste(file, content):
    mapping = read(file, content)
    assert patterns(mapping) == 1
    assert find(mapping, "b.example") == to("mx")


@pytest.mark.parametrize("field", ["", "true", "TRUE", "T", "1", "yes"])
def test_tls_verify_is_on_in_many_words_and_without_any(file, field):
    assert find(read(file, HEADER + f"b.example;mx;{field}\n"), "b.example") == to("mx", True)


@pytest.mark.parametrize("field", ["false", "False", "f", "0", "no"])
def test_tls_verify_is_off_in_many_words(file, field):
    assert find(read(file, HEADER + f"b.example;mx;{field}\n"), "b.example") == to("mx", False)


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("Bob@EXAMPLE.org", "bob@example.org"),
        ("bob@münchen.example", "bob@xn--mnchen-3ya.example"),
        ("jürgen@b.example", "jürgen@b.example"),
        ('"bob@b.example"', "bob@b.example"),
        ('"a b"@b.example', '"a b"@b.example'),
        ('"""a b""@b.example"', '"a b"@b.example'),
        ('"""a;b""@b.example"', '"a;b"@b.example'),
        ('"bob"@b.example', "bob@b.example"),
        ("postmaster", "postmaster"),
        ("[192.0.2.1]", "[192.0.2.1]"),
    ],
)
def test_a_pattern_is_stored_as_the_key_that_it_stands_for(file, field, key):
    mapping = read(file, HEADER + field + ";mx\n")
    assert patterns(mapping) == 1
    assert find(mapping, key) == to("mx")


def test_several_servers_stand_in_one_field(file):
    mapping = read(file, HEADER + "b.example;mx1, [2001:db8::1]:26 ,mx:b.example;no\n")
    assert find(mapping, "b.example") == to("mx1,[2001:db8::1]:26,mx:b.example", False)


def test_equal_routes_are_one_object(file):
    mapping = read(file, HEADER + "a.example;mx\nb.example;MX:25 ; yes\nc.example;mx\nd.example;mx;no\n")
    routes = {id(find(mapping, f"{name}.example")) for name in "abcd"}
    assert len(routes) == 2


@pytest.mark.parametrize(
    "content",
    [
        HEADER + ";;\nb.example;mx;true\n;;\n;\n ; ; \n",
        HEADER + '"";"";""\nb.example;mx;true\n"";\n',
        ";;\n" + HEADER + "b.example;mx;true\n",
        "pattern;server;tls_verify;\nb.example;mx;true;\n;;;\n",
        "pattern;server;;\r\nb.example;mx;;\r\n;;;\r\n",
        'Pattern;"Server";TLS_Verify ; ;\nb.example;mx;TRUE;;\n',
        HEADER + '# a comment;;\n"# one; with the separator";;\nb.example;mx;true\n',
    ],
)
def test_rows_as_a_spreadsheet_writes_them_are_read(file, content):
    mapping = read(file, content)
    assert patterns(mapping) == 1
    assert find(mapping, "b.example") == to("mx")


def test_a_header_alone_is_an_empty_mapping(file):
    mapping = read(file, HEADER)
    assert patterns(mapping) == 0
    assert find(mapping, "b.example") is None


@given(st.dictionaries(ADDRESSES | DOMAINS, st.sampled_from(["mx1", "mx2"]), max_size=10))
def test_what_a_csv_writer_writes_is_found_again(tmp_path_factory, patterns):
    routes = {fold_pattern(pattern): server for pattern, server in patterns.items()}
    text = io.StringIO()
    writer = csv.writer(text, delimiter=";")
    writer.writerow(["pattern", "server", "tls_verify"])
    writer.writerows([pattern, routes[fold_pattern(pattern)], "false"] for pattern in patterns if pattern[0] != "#")
    mapping = read(tmp_path_factory.getbasetemp() / "roundtrip.csv", text.getvalue())
    for pattern in patterns:
        if pattern[0] != "#":
            assert find(mapping, fold_pattern(pattern)) == to(routes[fold_pattern(pattern)], False)


# What is refused


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("b.example", "no server: a line is pattern;server;tls_verify"),
        ("b.example;", "no server: a line is pattern;server;tls_verify"),
        ("b.example; ;true", "no server: a line is pattern;server;tls_verify"),
        ("b.example,mx", "'b.example,mx': neither an address nor a domain; fields are separated by ;"),
        ("b.example,mx,true", "'b.example,mx,true': neither an address nor a domain; fields are separated by ;"),
        ("b.example,mx;true", "'b.example,mx': neither an address nor a domain"),
        ("b.example;mx;true;x", "more than three fields: a line is pattern;server;tls_verify"),
        ("b.example;mx;maybe", "'maybe': tls_verify must be true or false"),
        ("b.example;mx1;mx2", "'mx2': tls_verify must be true or false"),
        ("b.example;mx:0", "'mx:0': the port must be 1 to 65535"),
        ("b.example;mx1,", "'mx1,': a server is missing"),
        ("b.example;mx 1", "'mx 1': not a host name"),
        (";mx", "'': neither an address nor a domain"),
        ("@b.example;mx", "'@b.example': a whole domain is written without @"),
        ("*@b.example;mx", "'*@b.example': a whole domain is written without *@"),
        ("b example;mx", "'b example': neither an address nor a domain"),
        ("b.\0example;mx", "'b.\\x00example': neither an address nor a domain"),
        ('"b.example;mx', "'\"b.example': neither an address nor a domain"),
        ('b.example;"mx', "'\"mx': not a host name"),
        ('"a b@c.example";mx', "'a b@c.example': neither an address nor a domain"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(file, line, why):
    assert faults(file, HEADER + "# comment\nok.example;mx\n" + line + "\n") == (f"map.csv:4: {why}",)


@pytest.mark.parametrize("line", ["b.example\u200b;mx", "b.example;mx\u200b.example", "\u200bb.example;mx"])
def test_an_invisible_character_is_named_with_its_line(file, line):
    (fault,) = faults(file, HEADER + "ok.example;mx\n" + line + "\n")
    assert fault.startswith("map.csv:3: ")
    assert fault.endswith(": has the invisible character U+200B ZERO WIDTH SPACE: delete it")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("“b.example”;mx", "U+201C LEFT DOUBLE QUOTATION MARK"),
        ("ann@b.example’;mx", "U+2019 RIGHT SINGLE QUOTATION MARK"),
        ("b.example;mx–1.b.example", "U+2013 EN DASH"),
        ("b.example;mx:mx‑1.b.example", "U+2011 NON-BREAKING HYPHEN"),
        ("b.example;«mx»", "U+00AB LEFT-POINTING DOUBLE ANGLE QUOTATION MARK"),
    ],
)
def test_what_a_word_processor_makes_of_quotes_and_hyphens_is_named_with_its_line(file, line, code):
    (fault,) = faults(file, HEADER + "ok.example;mx\n" + line + "\n")
    assert fault.startswith("map.csv:3: ")
    assert fault.endswith(f": has {code}, which no domain has: write it in ASCII, or leave it out")


def test_a_line_that_is_not_utf_8_is_named(file):
    content = HEADER.encode() + b"ok.example;mx\nm\xfcnchen.example;mx\n"
    assert faults(file, content) == ("map.csv:3: not UTF-8",)


def test_a_quoted_field_does_not_go_on_in_the_next_line(file):
    assert faults(file, HEADER + 'b.example;"mx\n"\n') == (
        "map.csv:2: '\"mx': not a host name",
        "map.csv:3: '\"': neither an address nor a domain",
    )


def test_a_pattern_with_two_routes_is_named_with_both_lines(file):
    lines = "# comment\na.example;mx1\na.example;mx1\n\nB.example;mx1\nc.example;mx1\nb.EXAMPLE;mx1;no\nb.example;mx2\n"
    assert faults(file, HEADER + lines) == (
        "map.csv:8: 'b.EXAMPLE' again, but not with the route of line 6",
        "map.csv:9: 'b.example' again, but not with the route of line 6",
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("b.example;mx\n", ":1: must be the header pattern;server;tls_verify, not 'b.example;mx'"),
        ("# comment\n\npattern,server\n", ":3: must be the header pattern;server;tls_verify, not 'pattern,server'"),
        ("server;pattern\n", ":1: must be the header pattern;server;tls_verify, not 'server;pattern'"),
        ("\ufeff\ufeff" + HEADER, ":1: must be the header pattern;server;tls_verify, not '\\ufeff" + HEADER[:-1] + "'"),
        ("", ": empty, without even the header pattern;server;tls_verify"),
        ("\n# pattern;server\n", ": empty, without even the header pattern;server;tls_verify"),
        ("pattern;server\n".encode("utf-16"), ":1: not UTF-8, but UTF-16: save the file as `CSV UTF-8`"),
    ],
)
def test_a_file_without_its_header_is_refused(file, content, fault):
    assert faults(file, content) == (f"map.csv{fault}",)


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_no_more_faults_are_told_than_somebody_reads(file, more):
    bad = "b.example\n" * (MAX_FAULTS - 1)
    one = "no server: a line is pattern;server;tls_verify"
    expected = [f"map.csv:{number}: {one}" for number in range(2, MAX_FAULTS + 1)]
    if more:
        expected += [f"map.csv:{MAX_FAULTS + 1}: {one}", f"map.csv: not read further after {MAX_FAULTS} faults"]
    assert list(faults(file, HEADER + bad + "b.example\n" * more)) == expected


def test_a_long_field_is_not_told_in_full(file):
    (fault,) = faults(file, HEADER + "b" * 100_000 + ";mx\n")
    assert fault == f"map.csv:2: '{'b' * 80}': neither an address nor a domain"


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing.csv", "No such file or directory"), (".", "Is a directory"), ("map.csv/x", "Not a directory")],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_systems_reason(file, name, why):
    file.touch()
    path = f"{file.parent}/{name}"
    with pytest.raises(MappingError) as failure:
        made(path).read()
    assert str(failure.value) == f"{path}: {why}"


def test_a_file_that_is_too_large_is_not_even_read(file, clock):
    """The memory of this process has no room for it; a worker would be killed."""
    mapping = read(file, HEADER + "b.example;mx1\n")
    rename(file, HEADER)
    os.truncate(file, MAX_OCTETS + 1)
    assert looks(mapping, clock) is not None
    tracemalloc.start()
    with pytest.raises(MappingError, match="has more than 256 MiB") as failure:
        mapping.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(failure.value).startswith(f"{file}: ")
    assert not failure.value.passing
    assert peak < MAX_OCTETS
    assert find(mapping, "b.example") == to("mx1"), "the old table stays"
    assert looks(mapping, clock) is None, "it is not tried again"


@pytest.mark.parametrize("before", ["", HEADER + "b.example;mx1\n"])
def test_of_a_file_that_is_one_long_line_no_copies_are_made(file, before):
    """An archive or an image of a disk in its place, which would take a worker's memory and seconds of its time."""
    octets = 10 * MAX_LINE
    file.write_text(before)
    os.truncate(file, octets)
    tracemalloc.start()
    with pytest.raises(MappingError) as failure:
        made(file).read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = before.count("\n") + 1
    assert failure.value.faults == (f"{file}:{line}: more than 1,000,000 octets in a line: is this another file?",)
    assert not failure.value.missing
    assert peak < octets * 2.3, "the file, and its line"


def test_a_small_file_takes_little_memory_to_be_read(file):
    """Also where a limit counts what is allocated and not used, as RLIMIT_AS does."""
    mapping = read(file, HEADER + "b.example;mx1\n")
    tracemalloc.start()
    mapping.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("make", [make_pipe, link_to_device])
def test_what_is_no_regular_file_is_an_error_at_once_and_a_file_in_its_place_is_read(file, make):
    """To open a pipe would wait for a writer, and longer than the pipe has its name."""
    new = made(file)
    serving = read(file, HEADER + "b.example;mx\n")
    file.unlink()
    make(file)
    for mapping, passing in ((new, False), (serving, True)):
        with pytest.raises(MappingError, match=r"map\.csv: not a regular file") as failure:
            mapping.read()
        assert failure.value.passing == passing, "at a start it is a mistake in willi.conf"
    file.unlink()
    file.write_text(HEADER + "c.example;mx\n")
    serving.changed()
    serving.read()
    assert [find(serving, key) for key in ("b.example", "c.example")] == [None, to("mx")]


def test_before_the_first_load_nothing_is_known_rather_than_refused(file):
    with pytest.raises(LookupFailed) as failure:
        find(made(file), "b.example")
    assert str(failure.value) == "not read yet"


# Reading again


def test_a_file_that_stays_has_not_changed(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    assert looks(mapping, clock) is None


def rewrite(file: Path, content: str) -> None:
    file.write_text(content)


def rename(file: Path, content: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(content)
    while new.stat().st_ctime_ns == new.stat().st_mtime_ns:  # until the kernel's clock ticks
        new.chmod(0o600)
    new.replace(file)


def recreate(file: Path, content: str) -> None:
    os.link(file, file.with_suffix(".old"))  # so that its inode is not used again
    file.unlink()
    file.write_text(content)


def rename_with_the_old_time(file: Path, content: str) -> None:
    before = file.stat()
    new = file.with_suffix(".new")
    new.write_text(content)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(file)


def link_to_another(file: Path, content: str) -> None:
    (file.parent / "elsewhere").write_text(content)
    link = file.with_suffix(".new")
    link.symlink_to("elsewhere")
    link.replace(file)


def rewrite_with_the_old_time(file: Path, content: str) -> None:
    before = file.stat()
    file.write_text(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("write", "seconds"),
    [
        (rename, 2),
        (rename_with_the_old_time, 2),
        (recreate, CALM),
        (link_to_another, CALM),
        (rewrite, CALM),
        (rewrite_with_the_old_time, CALM),
    ],
)
def test_a_new_content_is_noticed_and_replaces_the_old_one(file, clock, write, seconds):
    mapping = read(file, HEADER + "a.example;mx1\nb.example;mx1\n")
    write(file, HEADER + "b.example;mx2\nc.example;mx2\n")
    assert looks(mapping, clock) == seconds
    mapping.read()
    assert patterns(mapping) == 2
    assert find(mapping, "a.example") is None
    assert find(mapping, "b.example") == to("mx2")
    assert looks(mapping, clock) is None


def append(file: Path, line: str) -> None:
    with file.open("a") as more:
        more.write(line + "\n")


def test_a_file_that_is_written_slowly_is_read_when_it_is_complete(file, clock):
    mapping = read(file, HEADER + "".join(f"b{number}.example;mx1\n" for number in range(4)))
    file.write_text(HEADER)
    for number in range(4):
        assert looks(mapping, clock, CALM - 2) is None
        append(file, f"b{number}.example;mx2")
    assert looks(mapping, clock) == CALM
    mapping.read()
    assert patterns(mapping) == 4


def test_a_file_that_is_made_anew_and_written_slowly_is_read_when_it_is_complete(file, clock):
    mapping = read(file, HEADER + "a.example;mx1\nb.example;mx1\n")
    os.link(file, file.with_suffix(".old"))  # so that its inode is not used again
    file.unlink()
    file.write_text(HEADER + "a.example;mx2\n")
    assert looks(mapping, clock, CALM - 2) is None
    append(file, "b.example;mx2")
    assert looks(mapping, clock) == CALM


def test_calm_is_counted_from_the_last_change_and_to_the_second(file, clock):
    mapping = read(file, HEADER + "a.example;mx1\n")
    append(file, "b.example;mx1")
    assert not mapping.changed()
    clock(CALM - 0.1)
    assert not mapping.changed()
    append(file, "c.example;mx1")
    assert not mapping.changed()
    clock(CALM - 0.1)
    assert not mapping.changed()
    clock(0.1)
    assert mapping.changed()


def test_a_renamed_file_does_not_wait_for_the_calm_of_the_one_before(file, clock):
    mapping = read(file, HEADER + "a.example;mx1\n")
    append(file, "b.example;mx1")
    assert not mapping.changed()
    rename(file, HEADER + "c.example;mx1\n")
    assert looks(mapping, clock) == 2


def test_a_bad_line_keeps_the_old_table_and_is_told_once(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    file.write_text(HEADER + "b.example;mx2\nc.example;mx2:\n")
    assert looks(mapping, clock) == CALM
    with pytest.raises(MappingError) as failure:
        mapping.read()
    assert str(failure.value) == f"{file}:3: 'mx2:': the port must be 1 to 65535"
    assert find(mapping, "b.example") == to("mx1")
    assert patterns(mapping) == 1
    assert looks(mapping, clock) is None
    file.write_text(HEADER + "b.example;mx2\n")
    assert looks(mapping, clock) == CALM
    mapping.read()
    assert find(mapping, "b.example") == to("mx2")


def test_a_file_that_vanishes_keeps_the_old_table_and_may_return(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    file.unlink()
    for seconds in (2, RETRY, RETRY):
        assert looks(mapping, clock) == seconds
        with pytest.raises(MappingError) as failure:
            mapping.read()
        assert str(failure.value) == f"{file}: No such file or directory"
        assert failure.value.passing
        assert find(mapping, "b.example") == to("mx1")
    file.write_text(HEADER + "b.example;mx2\n")
    assert looks(mapping, clock) == CALM
    mapping.read()
    assert find(mapping, "b.example") == to("mx2")


def test_a_file_that_is_gone_for_a_moment_is_not_missed(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    moved = file.rename(file.with_suffix(".old"))
    assert not mapping.changed()
    moved.rename(file)
    assert not mapping.changed()


class Disturbed(io.BufferedReader):
    """A file of which somebody changes the name or the content right after it has been read."""

    deed: Callable[[], None]

    def read(self, size: int | None = -1) -> bytes:
        octets = super().read(size)
        self.deed()
        return octets


def load_meanwhile(mapping: CsvFile, deed: Callable[[], None]) -> None:
    """Load; the deed falls between reading and looking whether that was all."""

    def open_disturbed(path: Path, _mode: str) -> Disturbed:
        patch.undo()
        file = Disturbed(io.FileIO(path))
        file.deed = deed
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_disturbed)
        mapping.read()


def test_a_file_renamed_while_its_predecessor_is_read_is_the_next_to_be_read(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    load_meanwhile(mapping, lambda: rename(file, HEADER + "b.example;mx2\n"))
    assert find(mapping, "b.example") == to("mx1")
    assert looks(mapping, clock) == 2
    mapping.read()
    assert find(mapping, "b.example") == to("mx2")


def test_a_file_written_while_it_is_read_keeps_the_old_table_and_is_read_when_it_rests(file, clock):
    mapping = read(file, HEADER + "a.example;mx1\nb.example;mx1\n")
    rename(file, HEADER + "a.example;mx2\n")
    assert looks(mapping, clock) == 2
    with pytest.raises(MappingError) as failure:
        load_meanwhile(mapping, lambda: append(file, "b.example;mx2"))
    assert str(failure.value) == f"{file}: written while it was read"
    assert find(mapping, "b.example") == to("mx1")
    assert looks(mapping, clock) == CALM
    mapping.read()
    assert find(mapping, "b.example") == to("mx2")


def test_a_long_reading_pauses_and_the_old_table_answers_to_its_end(file, clock):
    answers: list[Route | None] = []
    mapping = read(file, HEADER + "b.example;mx1\n", pause=lambda: answers.append(find(mapping, "b.example")))
    file.write_text(HEADER + "b.example;mx2\n" + "# comment\n" * 3 * PAUSE_LINES)
    assert looks(mapping, clock) == CALM
    mapping.read()
    assert answers == [to("mx1")] * 3
    assert find(mapping, "b.example") == to("mx2")


def test_a_file_that_has_become_empty_does_not_replace_a_table(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    file.write_text(HEADER)
    assert looks(mapping, clock) == CALM
    with pytest.raises(MappingError, match="no patterns any more"):
        mapping.read()
    assert patterns(mapping) == 1
    assert looks(mapping, clock) is None


def test_a_file_that_is_truncated_between_look_and_load_is_not_read(file, clock):
    mapping = read(file, HEADER + "a.example;mx1\nb.example;mx1\n")
    rename(file, HEADER + "a.example;mx2\nb.example;mx2\n")
    assert looks(mapping, clock) == 2
    file.write_text(HEADER + "a.example;mx3\n")
    with pytest.raises(MappingError) as failure:
        mapping.read()
    assert str(failure.value) == f"{file}: written while it was read"
    assert find(mapping, "b.example") == to("mx1")
    assert looks(mapping, clock) == CALM


def test_a_file_that_could_not_be_read_just_now_is_tried_again(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\n")
    rename(file, HEADER + "b.example;mx2\n")
    for seconds in (2, RETRY):
        assert looks(mapping, clock) == seconds
        with Descriptors(), pytest.raises(MappingError) as failure:
            mapping.read()
        assert (str(failure.value), failure.value.passing) == (f"{file}: Too many open files", True)
        assert find(mapping, "b.example") == to("mx1")
    assert looks(mapping, clock) == RETRY
    mapping.read()
    assert find(mapping, "b.example") == to("mx2")


def test_too_little_memory_leaves_the_old_table_and_is_tried_again(file, clock):
    def run_out() -> None:
        raise MemoryError

    mapping = read(file, HEADER + "b.example;mx1\n", pause=run_out)
    rename(file, HEADER + "b.example;mx2\n" + "# comment\n" * PAUSE_LINES)
    for seconds in (2, RETRY):
        assert looks(mapping, clock) == seconds
        with pytest.raises(MappingError) as failure:
            mapping.read()
        assert (str(failure.value), failure.value.passing) == (f"{file}: not enough memory to read it", True)
    assert find(mapping, "b.example") == to("mx1")


def test_a_file_that_lost_patterns_and_its_last_line_end_may_be_cut_off(file, clock):
    whole = HEADER + "".join(f"{letter}.example;mx1.example.org\n" for letter in "bcd")
    mapping = read(file, whole)
    for starts in (lambda: mapping, lambda: follow(file, mapping)):  # in a worker that serves, and in one that starts
        file.write_text(whole[:-30])  # within the line of c.example
        seen = starts()
        assert looks(seen, clock) == CALM
        with pytest.raises(MappingError) as failure:
            seen.read()
        assert (str(failure.value), failure.value.passing) == (f"{file}: {CUT_OFF}", False)
        assert find(mapping, "d.example") == to("mx1.example.org")
        file.write_text(whole)
        assert looks(mapping, clock) == CALM
        mapping.read()


def test_a_file_that_never_ended_with_a_line_end_may_lose_patterns(file, clock):
    mapping = read(file, HEADER + "b.example;mx1\nc.example;mx1")
    file.write_text(HEADER + "b.example;mx1")
    assert looks(mapping, clock) == CALM
    mapping.read()
    assert find(mapping, "c.example") is None


@pytest.mark.parametrize("hidden", ["# old\rb.example;mx1", "# old\r\rb.example;mx1", "c.example;mx1\rb.example;mx1"])
def test_a_carriage_return_hides_no_line(file, hidden):
    with pytest.raises(MappingError, match=":2: has a carriage return that ends no line"):
        read(file, HEADER + hidden + "\r\n")


# What is no definite "no"


def test_an_empty_table_never_says_a_definite_no(file):
    full = Table("full", {"c.example": to("mx2")})
    empty = read(file, HEADER)
    with pytest.raises(LookupFailed) as failure:
        find_route([empty, full], "ann@b.example")
    assert (str(failure.value), failure.value.logged) == (f"csv:{file}: {UNSURE}", True)
    assert find_route([empty, full], "ann@c.example") == to("mx2")


def test_a_first_table_whose_file_is_still_written_leaves_no_recipient_to_a_later_mapping(file, clock):
    catch_all = Table("all", {"b.example": to("mx9")})
    mapping = read(file, HEADER + "a.example;mx1\n")
    append(file, "b.example;mx1")
    assert not mapping.changed()
    with pytest.raises(LookupFailed, match="its file is being written"):
        find_route([mapping, catch_all], "ann@b.example")


def test_a_first_table_whose_file_is_still_written_says_no_definite_no_before_it_is_read_again(file, clock):
    mapping = read(file, HEADER + "a.example;mx1\n")
    with pytest.raises(NoRoute):
        find_route([mapping], "ann@b.example")
    append(file, "c.example;mx1")
    assert not mapping.changed()
    with pytest.raises(LookupFailed):
        find_route([mapping], "ann@b.example")
    assert find_route([mapping], "ann@a.example") == to("mx1")
    assert looks(mapping, clock) == CALM
    mapping.read()
    with pytest.raises(NoRoute):
        find_route([mapping], "ann@b.example")


# A worker that starts beside others


def follow(file: Path, held: CsvFile) -> CsvFile:
    """As such a worker would."""
    table = held.facts().table
    assert table
    return made(file, held={held.name: table})


def test_a_file_that_others_hold_is_read_at_once(file, clock):
    mapping = follow(file, read(file, HEADER + "b.example;mx1\n"))
    assert looks(mapping, clock) == 0
    mapping.read()
    assert find(mapping, "b.example") == to("mx1")


@pytest.mark.parametrize(("write", "seconds"), [(rename, 2), (rewrite, CALM)])
def test_a_file_that_others_hold_is_waited_for_as_they_do(file, clock, write, seconds):
    mapping = follow(file, read(file, HEADER + "b.example;mx1\n"))
    write(file, HEADER + "b.example;mx2\n")
    assert looks(mapping, clock) == seconds
    with pytest.raises(LookupFailed):
        find(mapping, "b.example")
    mapping.read()
    assert find(mapping, "b.example") == to("mx2")


def test_an_empty_file_is_not_taken_beside_those_that_hold_a_full_one(file, clock):
    mapping = follow(file, read(file, HEADER + "b.example;mx1\n"))
    rename(file, HEADER)
    assert looks(mapping, clock) == 2
    with pytest.raises(MappingError, match="no patterns any more") as failure:
        mapping.read()
    assert not failure.value.passing
    with pytest.raises(LookupFailed):
        find(mapping, "b.example")


def test_a_file_that_has_vanished_is_waited_for_beside_those_that_hold_it(file, clock):
    mapping = follow(file, read(file, HEADER + "b.example;mx1\n"))
    file.unlink()
    assert looks(mapping, clock) == 2
    with pytest.raises(MappingError) as failure:
        mapping.read()
    assert failure.value.passing


@pytest.mark.parametrize(
    ("content", "may_follow"),
    [
        ("", True), ("pattern;ser", True), (f"{HEADER}b.example;127.0", True), ("# made by a script", True),
        ("\n", False), (f"{HEADER}b.example;127.0\n", False), (f"{HEADER}b.example;127.0\nc.example;127.0", False),
    ],
)  # fmt: skip
def test_the_rest_of_a_file_that_ends_in_the_middle_of_a_line_may_follow(file, content, may_follow):
    file.write_text(content)
    with pytest.raises(MappingError) as failure:
        made(file).read()
    assert (failure.value.missing, failure.value.passing) == (may_follow, False)


def test_a_missing_file_is_told_with_the_line_that_names_it(file):
    with pytest.raises(MappingError) as failure:
        made(file, where="/etc/willi.conf:7").read()
    assert str(failure.value) == f"/etc/willi.conf:7: file: cannot read {file}: No such file or directory"
    assert not failure.value.passing
