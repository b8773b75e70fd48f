"""body.py against a slow reference that looks at one octet at a time, and against lenient readers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from willi_lib.smtp.body import END_OF_DATA, MAX_HELD, DataReader, Stuffer

NEXT_COMMAND = b"MAIL FROM:<eve@a.example>\r\n.\r\n"

# The reference


def strict(octets: bytes) -> tuple[bytes, int | None]:
    """What RFC 5321 §4.5.2 makes of DATA: the content, line ends unrepaired, and where the end is over."""
    content = bytearray()
    at_line_start = True
    position = 0
    while position < len(octets):
        if at_line_start and octets[position] == ord("."):
            if octets[position : position + 3] == b".\r\n":
                return bytes(content), position + 3
            position += 1
            at_line_start = False
            continue
        content.append(octets[position])
        at_line_start = octets[max(position - 1, 0) : position + 1] == b"\r\n"
        position += 1
    return bytes(content), None


def repaired(content: bytes) -> bytes:
    out = bytearray()
    for position, octet in enumerate(content):
        before, after = content[position - 1 : position], content[position + 1 : position + 2]
        if octet == ord("\r") and after != b"\n":
            out += b" "
        elif octet == ord("\n") and before != b"\r":
            out += b"\r\n"
        else:
            out.append(octet)
    return bytes(out)


def passed_on(content: bytes) -> bytes:
    """The same, and a space for a NUL before a dot, where nothing else is in the line but what some reader skips."""
    lone_dot = rb"(?:\A|(?<=\r\n))[\x00-\x09\x0b\x0c\x0e-\x20]*\.(?=[\x00-\x09\x0b\x0c\x0e-\x20]*\r\n)"
    return re.sub(lone_dot, lambda found: found[0].replace(b"\0", b" "), repaired(content))


SEPARATORS = [rb"\r\n", rb"\n", rb"\r\n|\n", rb"\r\n|\r|\n", rb"\r*\n", rb"\r\r\n|\r\n|\r|\n"]
SKIPS: list[Callable[[bytes], bytes]] = [
    lambda line: line,
    lambda line: line.replace(b"\0", b""),
    lambda line: line.rstrip(b" \t"),
    lambda line: line.lstrip(b" \t"),
    lambda line: line.strip(),
    lambda line: line.strip(bytes(range(33))),
    lambda line: line.replace(b"\0", b"").strip(),
    lambda line: line.translate(None, bytes(range(33))),
    lambda line: line.partition(b"\0")[0],
    lambda line: line.partition(b"\0")[0].strip(),
]


def lenient_ends(wire: bytes) -> list[bytes]:
    """The lines that some reader takes for the end of the data."""
    return [
        line for separator in SEPARATORS for line in re.split(separator, wire) for skip in SKIPS if skip(line) == b"."
    ]


def test_the_lenient_readers_see_what_they_should():
    for octets in SMUGGLING:
        assert lenient_ends(b"a" + octets), octets
    assert not lenient_ends(b"a\r\n..\r\n. a\r\n. .\0\r\n \r\n\0a.\r\n")
    assert lenient_ends(b"a\r\n.\0a\r\n") and lenient_ends(b"a\r\n.\0.\r\n")


# Ways to feed


def data_reader(chunks: Iterable[bytes], reject: bool = False) -> tuple[DataReader, bytes]:
    """Feed a DataReader as the session does; what it never got to see belongs to `rest`."""
    reader = DataReader(reject)
    out, left = b"", iter(chunks)
    while not reader.done and (chunk := next(left, None)) is not None:
        out += reader.feed(chunk)
    reader.rest += b"".join(left)
    return reader, out


def stuffed(chunks: Iterable[bytes], reject: bool = False) -> tuple[Stuffer, bytes]:
    stuffer = Stuffer(reject)
    out = b"".join([stuffer.feed(chunk) for chunk in chunks])
    return stuffer, out + stuffer.finish()


def octet_by_octet(octets: bytes) -> list[bytes]:
    return [octets[i : i + 1] for i in range(len(octets))]


def split_at(octets: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(octets)) for cut in cuts), len(octets)]
    return [octets[start:end] for start, end in pairwise(edges)]


def every_way(octets: bytes) -> Iterator[list[bytes]]:
    """Whole, octet by octet, and cut at every one and every two places."""
    yield [octets]
    yield octet_by_octet(octets)
    for cuts in [*combinations(range(1, len(octets)), 1), *combinations(range(1, len(octets)), 2)]:
        yield split_at(octets, cuts)


def check_data(octets: bytes, chunks: list[bytes]) -> bytes:
    """Everything that DataReader promises, for one message in one way of being fed. Returns what goes upstream."""
    content, over = strict(octets)
    reader, out = data_reader(chunks)
    assert reader.done == (over is not None)
    decoded, early_end = strict(out)
    assert early_end is None
    assert not lenient_ends(b"\r\n" + out)
    if over is None:
        assert reader.rest == b""
        assert passed_on(content).startswith(decoded)
        assert len(passed_on(content)) - len(decoded) <= MAX_HELD
    else:
        assert reader.rest == octets[over:]
        assert decoded == passed_on(content)
        assert reader.octets == len(decoded)
        assert reader.malformed == (repaired(content) != content)
        assert out == b"" or out.endswith(b"\r\n")
    return out


def check_stuffer(content: bytes, chunks: list[bytes]) -> bytes:
    stuffer, out = stuffed(chunks)
    expected = repaired(content)
    if expected and not expected.endswith(b"\r\n"):
        expected += b"\r\n"
    expected = passed_on(expected)
    assert strict(out + END_OF_DATA) == (expected, len(out) + 3)
    assert not lenient_ends(b"\r\n" + out)
    assert stuffer.malformed == (repaired(content) != content)
    return out


PIECES = [b"\r", b"\n", b"\r\n", b".", b".", b" ", b"\0", b"\t", b"a", b"\r\n.", b"\r\n.\r\n", b"\x0c", b"\xff"]
octet_strings = st.lists(st.sampled_from(PIECES), max_size=24).map(b"".join)
cut_lists = st.lists(st.integers(0, 60), max_size=6)


@settings(max_examples=examples(1000))
@given(octet_strings, cut_lists)
@example(b"\r\n.\n", [])
@example(b".\r\r\n", [])
@example(b"\r\r\n.\r\n", [1])
def test_data_keeps_its_promises_however_it_arrives(message: bytes, cuts: list[int]):
    octets = message + b"\r\n.\r\n" + NEXT_COMMAND
    ways = [[octets], octet_by_octet(octets), split_at(octets, cuts)]
    assert len({check_data(octets, chunks) for chunks in ways}) == 1


@settings(max_examples=examples(300))
@given(octet_strings, cut_lists)
def test_data_that_is_never_ended_keeps_its_promises(octets: bytes, cuts: list[int]):
    for chunks in ([octets], octet_by_octet(octets), split_at(octets, cuts)):
        check_data(octets, chunks)


@settings(max_examples=examples(1000))
@given(octet_strings, cut_lists)
def test_stuffing_keeps_its_promises_however_the_content_arrives(content: bytes, cuts: list[int]):
    ways = [[content], octet_by_octet(content), split_at(content, cuts)]
    assert len({check_stuffer(content, chunks) for chunks in ways}) == 1


def test_every_short_message_keeps_its_promises():
    for length in range(6):
        for octets in map(bytes, product(b"\r\n. a", repeat=length)):
            check_data(octets + b"\r\n.\r\nx", [octets + b"\r\n.\r\nx"])
            check_data(octets + b"\r\n.\r\nx", octet_by_octet(octets + b"\r\n.\r\nx"))
            check_stuffer(octets, octet_by_octet(octets))


@settings(max_examples=examples(300))
@given(octet_strings, cut_lists)
def test_what_was_stuffed_comes_out_of_a_reader_as_it_is(content: bytes, cuts: list[int]):
    _, wire = stuffed(split_at(content, cuts))
    reader, out = data_reader([wire + END_OF_DATA])
    assert (out, reader.malformed) == (wire, False)


@settings(max_examples=examples(300))
@given(octet_strings, cut_lists)
def test_reject_mode_finds_the_same_end_and_lets_nothing_malformed_out(message: bytes, cuts: list[int]):
    octets = message + b"\r\n.\r\n" + NEXT_COMMAND
    normal, octets_out = data_reader([octets])
    for chunks in ([octets], octet_by_octet(octets), split_at(octets, cuts)):
        reader, out = data_reader(chunks, reject=True)
        assert (reader.done, reader.rest, reader.malformed) == (normal.done, normal.rest, normal.malformed)
        assert octets_out.startswith(out)
        assert reader.malformed or out == octets_out


# Smuggling, by its octets

SMUGGLING = [
    b"\n.\n",
    b"\n.\r",
    b"\r.\n",
    b"\r.\r",
    b"\n.\r\n",
    b"\r.\r\n",
    b"\r\n.\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
    b"\r\n. \r\n",
    b"\r\n.\t\r\n",
    b"\r\n .\r\n",
    b"\r\n \0.\0 \r\n",
    b"\r\n\x0b.\x0c\r\n",
    b"\n\0.\n",
]


@pytest.mark.parametrize("octets", SMUGGLING)
def test_a_smuggled_end_ends_nothing(octets: bytes):
    message = b"a" + octets + b"RSET\r\n.\r\nQUIT\r\n"
    assert len({check_data(message, chunks) for chunks in every_way(message)}) == 1
    reader, _ = data_reader([message])
    assert reader.rest == b"QUIT\r\n"


@pytest.mark.parametrize("octets", [*SMUGGLING, b"\r\n.\r\n", b"\r\r\n.\r\n"])
def test_content_of_a_chunk_cannot_end_the_data(octets: bytes):
    content = b"a" + octets + b"RSET\r\n"
    assert len({check_stuffer(content, chunks) for chunks in every_way(content)}) == 1


@pytest.mark.parametrize("octets", [b"\r\n.\r\n", b"\r\r\n.\r\n"])
def test_only_crlf_dot_crlf_ends_the_data(octets: bytes):
    message = b"a" + octets + b"QUIT\r\n"
    for chunks in every_way(message):
        check_data(message, chunks)
        assert data_reader(chunks)[0].rest == b"QUIT\r\n"


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        (b"a\nb\r\n", b"a\r\nb\r\n"),
        (b"a\rb\r\n", b"a b\r\n"),
        (b"a\r\r\n", b"a \r\n"),
        (b"a\n.b\r\n", b"a\r\n..b\r\n"),
        (b"a\n.\r\n", b"a\r\n..\r\n"),
        (b"\n.\r\n", b"\r\n..\r\n"),
        (b"a\r\n.\nb\r\n", b"a\r\n\r\nb\r\n"),
        (b"a\r\n. \r\n", b"a\r\n \r\n"),
        (b". \r\n", b" \r\n"),
        (b" .\r\n", b". .\r\n"),
        (b"a\r\n\0.\r\n", b"a\r\n. .\r\n"),
        (b"a\r\n.\0.\r\n", b"a\r\n. .\r\n"),
        (b"a\r\n.\0b\r\n", b"a\r\n\0b\r\n"),
        (b"a\r\n.\0.b\r\n", b"a\r\n\0.b\r\n"),
        (b"a\r\n .\0b\r\n", b"a\r\n. .\0b\r\n"),
        (b".\0b\r\n\0b\r\n", b"\0b\r\n\0b\r\n"),
        (b"a\r\n.\0\r\n", b"a\r\n\0\r\n"),
        (b"a\r\n.\r\r\n", b"a\r\n \r\n"),
        (b"a\n. \r\n", b"a\r\n.. \r\n"),
        (b"a\r\n.a\r\n", b"a\r\n.a\r\n"),
        (b"..\r\n. .\r\n...\r\n. a\r\n", b"..\r\n. .\r\n...\r\n. a\r\n"),
    ],
)
def test_a_line_goes_upstream_like_this(sent: bytes, passed_on: bytes):
    for chunks in every_way(sent + END_OF_DATA):
        assert data_reader(chunks)[1] == passed_on


# Exact values


@pytest.mark.parametrize(
    ("sent", "octets"),
    [
        (b"", 0),
        (b"\r\n", 2),
        (b"a\r\n", 3),
        (b"..\r\n", 3),
        (b"...\r\n..a\r\n", 8),
        (b"a\nb\r\n", 6),
        (b"a\rb\r\n", 5),
        (b"a\n.b\r\n", 7),
        (b". \r\n", 3),
        (b" .\r\n", 4),
        (b".a\r\n", 3),
    ],
)
def test_the_size_is_counted_without_stuffing_dots_and_the_final_line(sent: bytes, octets: int):
    for chunks in every_way(sent + END_OF_DATA):
        assert data_reader(chunks)[0].octets == octets


def test_a_dot_line_first_of_all_is_an_empty_message():
    for chunks in every_way(b".\r\nQUIT\r\n"):
        reader, out = data_reader(chunks)
        assert (out, reader.done, reader.rest, reader.octets) == (b"", True, b"QUIT\r\n", 0)


def test_no_content_needs_no_line_end():
    assert stuffed([])[1] == stuffed([b"", b""])[1] == b""


def test_a_missing_last_line_end_is_added():
    assert stuffed([b"a"])[1] == b"a\r\n"
    assert stuffed([b"a\r\n"])[1] == b"a\r\n"
    assert stuffed([b"a\n"])[1] == b"a\r\n"
    assert stuffed([b"a\r"])[1] == b"a \r\n"
    assert stuffed([b"."])[1] == b"..\r\n"
    assert stuffed([b" ."])[1] == b". .\r\n"


def test_a_line_that_goes_on_in_the_next_chunk_is_one_line():
    assert stuffed([b"a", b".b\r", b"\n", b".", b"c"])[1] == b"a.b\r\n..c\r\n"


def test_malformed_octets_are_not_passed_on_when_they_are_to_be_rejected():
    reader = DataReader(reject_bare_newline=True)
    assert reader.feed(b"a\r\n") == b"a\r\n"
    assert reader.feed(b"b\nc") == b""
    assert reader.malformed
    assert reader.feed(b"d\r\n.\r\nQUIT\r\n") == b""
    assert (reader.done, reader.rest) == (True, b"QUIT\r\n")


def test_malformed_content_is_not_passed_on_when_it_is_to_be_rejected():
    stuffer = Stuffer(reject_bare_newline=True)
    assert stuffer.feed(b"a\r\n") == b"a\r\n"
    assert stuffer.feed(b"b\nc") == b""
    assert stuffer.malformed
    assert stuffer.feed(b"d\r\n") + stuffer.finish() == b""


def test_what_follows_the_end_is_not_judged():
    reader, _ = data_reader([b"a\r\n.\r\nb\n.\r"])
    assert (reader.malformed, reader.octets, reader.rest) == (False, 3, b"b\n.\r")


# Long messages, long lines


@pytest.mark.parametrize(
    "chunk", [b"Subject: a\r\n\r\n..a\r\n b.\r\n", b"a" * 70000, b"a\r\n.b", bytes(range(14, 256))]
)
def test_octets_in_order_are_passed_on_as_the_same_object(chunk: bytes):
    reader = DataReader()
    assert reader.feed(chunk) is chunk
    assert reader.feed(chunk) is chunk


def test_every_octet_value_arrives():
    message = bytes(octet for octet in range(256) if octet not in b"\r\n") * 300 + b"\r\n"
    for chunks in ([message, END_OF_DATA], split_at(message + END_OF_DATA, range(0, 77000, 7))):
        assert data_reader(chunks)[1] == message


@pytest.mark.parametrize("line", [b".\n", b". \r\n", b" .\r\n", b"..\r\n", b".\0\r\n", b" .\0x\r\n", b"\n", b"\r"])
@pytest.mark.parametrize("kind", [DataReader, Stuffer])
def test_no_line_costs_a_call_of_a_function(kind: type[DataReader] | type[Stuffer], line: bytes):
    """All others wait meanwhile, and a client may send nothing but lines that are to be spelled otherwise."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    reader, before = kind(), sys.getprofile()
    sys.setprofile(count)
    try:
        reader.feed(line * 10_000)
    finally:
        sys.setprofile(before)
    assert calls < 100


@pytest.mark.parametrize("octet", [b"\0", b" ", b"\r", b".", b"\n", b"\r\n", b"a", b".\n"])
def test_what_is_held_back_is_bounded(octet: bytes):
    reader, stuffer = DataReader(), Stuffer()
    times = 3 * MAX_HELD // len(octet)
    assert sum(len(reader.feed(octet)) for _ in range(times)) >= times * len(octet) - MAX_HELD - 1
    assert sum(len(stuffer.feed(octet)) for _ in range(times)) >= times * len(octet) - MAX_HELD - 1


OVERLONG = [b"\0" * MAX_HELD, b" " * MAX_HELD, b"\r" * MAX_HELD, b"\0" * (2 * MAX_HELD + 7), b"."]
long_lines = st.lists(st.sampled_from([*PIECES, *OVERLONG]), max_size=8).map(b"".join)
long_cuts = st.lists(st.integers(0, 5 * MAX_HELD), max_size=6)


@settings(max_examples=examples(300))
@given(long_lines, long_cuts)
def test_lines_too_long_to_be_held_never_look_like_an_end(message: bytes, cuts: list[int]):
    octets = message + b"\r\n.\r\n" + NEXT_COMMAND
    for chunks in ([octets], split_at(octets, cuts), split_at(octets, range(0, len(octets), 100))):
        reader, out = data_reader(chunks)
        content, over = strict(octets)
        assert over is not None and reader.rest == octets[over:]
        assert not lenient_ends(b"\r\n" + out)
        assert reader.octets == len(strict(out)[0])
        check_up_to_overlong_blanks(strict(out)[0], passed_on(content))
    for chunks in ([message], split_at(message, cuts)):
        out = stuffed(chunks)[1]
        assert not lenient_ends(b"\r\n" + out)


def check_up_to_overlong_blanks(decoded: bytes, expected: bytes) -> None:
    """Only after MAX_HELD blanks a dot may have become two, or NULs before a dot spaces."""
    for line, wanted in zip(decoded.split(b"\r\n"), expected.split(b"\r\n"), strict=True):
        blanks = re.match(rb"[\x00-\x20]*\.?[\x00-\x20]*", wanted)
        overlong = blanks is not None and len(blanks[0]) >= MAX_HELD
        assert line == wanted or (overlong and without_dots(line) == without_dots(wanted))


def without_dots(line: bytes) -> bytes:
    """Nor with a difference between NUL and space."""
    return line.translate(None, b".").replace(b"\0", b" ")


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 5000,
        b"\0" * MAX_HELD,
        b"." + b"\0" * 5000,
        b"\0" * 5000 + b". a",
        b" " * 600 + b"." + b"\0" * 600 + b".",
        b"." + b"\0" * 5000 + b"a",
        b" " * 5000 + b"a",
        b"." * 5000,
    ],
)
def test_lines_too_long_to_be_held_arrive_identical(line: bytes):
    octets = line + b"\r\n.\r\n"
    for size in (1, 999, 1000, 1001, 4096, 65536):
        check_data(octets, split_at(octets, range(0, len(octets), size)))


def test_a_lone_dot_after_more_blanks_than_can_be_held_is_doubled():
    _, out = data_reader([b"\0" * (MAX_HELD + 1), b".\r\n.\r\n"])
    assert out == b"\0" * (MAX_HELD + 1) + b"..\r\n"
    _, out = data_reader([b"\0" * MAX_HELD, b".\r\n.\r\n"])
    assert out == b"." + b" " * MAX_HELD + b".\r\n"


@pytest.mark.parametrize("line", [b"\0" * MAX_HELD + b".", b"\0" * 600 + b"." + b"\0" * 600])
def test_nuls_before_a_dot_are_spaces_if_there_are_more_than_can_be_held(line: bytes):
    before, _, after = line.partition(b".")
    _, out = data_reader([line, b"a\r\n.\r\n"])
    assert out == b"." + b" " * len(before) + b"." + after + b"a\r\n"


@pytest.mark.parametrize("rest", [b".\0a", b" . \0a", b".\0 .", b".\0"])
def test_a_dot_before_a_nul_is_doubled_after_more_blanks_than_can_be_held(rest: bytes):
    blanks = b" " * (MAX_HELD + 1)
    _, out = data_reader([blanks, rest + b"\r\n.\r\n"])
    assert out == blanks + b"." + rest + b"\r\n" and not lenient_ends(out)
    _, out = stuffed([blanks, rest])
    assert out == blanks + b"." + rest + b"\r\n" and not lenient_ends(out)
