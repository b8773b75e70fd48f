"""Promise 5: the message arrives identical, octet by octet, but for line ends that are not CRLF."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from tests.conftest import StartPostfix, StartWilli
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.examples import examples
from tests.support.postfix import Postfix
from tests.support.promise import greeted, rcpt, sent
from tests.support.talk import BOB, MAIL, chunk
from tests.support.upstream import ScriptedUpstream

HEADER = b"Subject: x\r\n\r\n"
EVERY_OCTET = bytes(octet for octet in range(256) if octet not in b"\r\n")
BODIES = {
    "dots": b".\r\n..\r\n...\r\n.x\r\n..x\r\n. \r\n .\r\n.\0\r\n.\0x\r\n\0x.\r\n.\t\r\n. .\r\n\r\n.\r\n",
    "almost ends": b"\r\n.\r\n.\r\n\r\n..\r\n.\r\n",
    "commands": b"QUIT\r\nRSET\r\n.\r\nMAIL FROM:<eve@a.example>\r\nDATA\r\n.\r\n",
    "NUL": b"\0\r\na\0b\r\n\0\0\0\r\n" * 10,
    "8-bit": bytes(range(128, 256)) + b"\r\n" + "Grüße, привет, 你好\r\n".encode(),
    "every octet": EVERY_OCTET * 3 + b"\r\n",
    "every octet at the start and the end of a line": b"\r\n".join(bytes([o, 120, o]) for o in EVERY_OCTET) + b"\r\n",
    "long lines": b"x" * 998 + b"\r\n" + b"y" * 1001 + b"\r\n" + b"." * 70_000 + b"\r\n" + b" " * 5000 + b"\r\n",
    "empty lines": b"\r\n" * 5000,
    "blanks at the ends of lines": b" \r\n\t\r\n x \r\n" * 100,
    "From and Received lines": b"From ann@a.example Mon Jan  1\r\n>From x\r\nReceived: by me\r\n",
}
BOUNDARIES = [1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20]  # octets; buffers are that large
SIZES = [boundary + more for boundary in BOUNDARIES for more in (-3, -2, -1, 0, 1, 2)]
LARGE = settings(max_examples=2, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])


def stuffed(octets: bytes) -> bytes:
    """As it has to go after DATA (RFC 5321 §4.5.2)."""
    return octets.replace(b"\r\n.", b"\r\n..").replace(b".", b"..", octets.startswith(b"."))


def stored(octets: bytes) -> bytes:
    """As Postfix stores it; a last line end is added where there is none."""
    return (octets if octets.endswith(b"\r\n") else octets + b"\r\n").replace(b"\r\n", b"\n")


def by_data(client: Client, recipient: str, octets: bytes) -> str:
    return sent(client, recipient, stuffed(octets))


def by_bdat(client: Client, recipient: str, octets: bytes) -> str:
    assert [client.command(line).code for line in (MAIL, rcpt(recipient))] == [250, 250]
    return chunk(client, octets, last=True)


def by_three_chunks(client: Client, recipient: str, octets: bytes) -> str:
    """Cut where it hurts: within a line end, and before a dot."""
    assert [client.command(line).code for line in (MAIL, rcpt(recipient))] == [250, 250]
    first = octets.find(b"\r\n") + 1
    second = max(first, octets.find(b"\n.", first) + 1)
    for piece in (octets[:first], octets[first:second]):
        if piece:  # Postfix takes no empty ones
            assert chunk(client, piece).startswith("250 ")
    return chunk(client, octets[second:], last=True)


Way = Callable[[Client, str, bytes], str]
WAYS: dict[str, Way] = {"DATA": by_data, "BDAT": by_bdat, "three chunks": by_three_chunks}
# With the `chunking` of the upstream, which changes nothing for DATA.
PATHS = pytest.mark.parametrize(
    ("way", "chunking"),
    [("DATA", True), ("BDAT", True), ("BDAT", False), ("three chunks", False)],
    indirect=["chunking"],
)


def some_text(seed: int, size: int) -> bytes:
    """Lines of nearly any octets and lengths, many with dots in the wrong places; the size is met exactly."""
    chosen = random.Random(seed)
    pool = chosen.randbytes(1 << 16).translate(bytes.maketrans(b"\r\n", b".."))
    lines = []
    left = size
    while left > 0:
        length = min(left, chosen.choice((2, 3, 4, 5, 62, 80, 1000, 4000)))
        start = chosen.randrange(len(pool) - length)
        octets = pool[start : start + length]
        if length < 10:  # a line of NULs and a dot does not stay as it is: see test_promise_9.py
            octets = octets.replace(b"\0", b"x")
        lines.append((b"." * chosen.randrange(3) + octets)[: length - 2] + b"\r\n")
        left -= length if left - length != 1 else length - 1
    return b"".join(lines)[-size:]


# Against Postfix


def assert_postfix_stores(upstream: Postfix, willi: Willi, way: str, bodies: dict[str, bytes]) -> None:
    """Each body, sent in this way to a recipient of its own."""
    with greeted(willi) as client:
        for number, (name, body) in enumerate(bodies.items()):
            recipient = f"octets-{number}-{way.replace(' ', '-').lower()}@b.example"
            assert WAYS[way](client, recipient, HEADER + body).startswith("250 2.0.0 Ok"), name
            assert upstream.wait_for_message(recipient).content == stored(HEADER + body), name


@pytest.mark.parametrize("way", WAYS)
def test_postfix_stores_what_the_client_sent(way: str, share_willi: StartWilli, postfix: Postfix):
    assert_postfix_stores(postfix, share_willi(server=postfix.server), way, BODIES)


def test_postfix_without_chunking_stores_what_came_in_chunks(start_willi: StartWilli, start_postfix: StartPostfix):
    upstream = start_postfix(domains=("b.example",), settings={"smtpd_discard_ehlo_keywords": "chunking"})
    willi = start_willi(server=upstream.server)
    for way in ("BDAT", "three chunks"):
        assert_postfix_stores(upstream, willi, way, BODIES)


@pytest.mark.parametrize("way", ["BDAT", "three chunks"])
def test_a_missing_last_line_end_is_postfixs_to_add(way: str, share_willi: StartWilli, postfix: Postfix):
    willi = share_willi(server=postfix.server)
    bodies = {"text": b"no line end", "a dot": b"x\r\n.", "a dot and CRLF before": b"\r\n\r\n."}
    recipients = iter(f"unfinished-{way[:2].lower()}-{number}@b.example" for number in range(9))
    with greeted(willi) as client:
        for body in bodies.values():
            recipient = next(recipients)
            assert WAYS[way](client, recipient, HEADER + body).startswith("250 2.0.0 Ok")
            assert postfix.wait_for_message(recipient).content == stored(HEADER + body)


def test_postfix_stores_five_megabytes(share_willi: StartWilli, postfix: Postfix):
    octets = HEADER + some_text(seed=5, size=5_000_000)
    with greeted(share_willi(server=postfix.server)) as client:
        for way in WAYS:
            recipient = f"five-megabytes-{way[0].lower()}@b.example"
            assert WAYS[way](client, recipient, octets).startswith("250 2.0.0 Ok")
            assert postfix.wait_for_message(recipient).content == stored(octets)


# Against a server that shows every octet


@pytest.fixture(params=[True, False], ids=["CHUNKING", "no CHUNKING"])
def chunking(request: pytest.FixtureRequest, upstream: ScriptedUpstream) -> bool:
    """Whether the upstream has it."""
    if not request.param:
        upstream.extensions = (b"PIPELINING", b"8BITMIME")
    return bool(request.param)


def assert_arrives(client: Client, way: str, octets: bytes, upstream: ScriptedUpstream) -> None:
    assert WAYS[way](client, "bob@b.example", octets).startswith("250 ")
    message = upstream.messages[-1]
    assert len(message.content) == len(octets)
    assert message.content == octets


@pytest.mark.parametrize("way", WAYS)
def test_any_body_arrives_identical(way: str, chunking: bool, willi: Willi, upstream: ScriptedUpstream):
    client = greeted(willi)
    for body in BODIES.values():
        assert_arrives(client, way, body, upstream)
    assert len(upstream.messages) == len(BODIES)


@PATHS
def test_sizes_around_those_of_buffers_arrive_identical(
    way: str, chunking: bool, willi: Willi, upstream: ScriptedUpstream
):
    """Lines of dots, so that each boundary falls upon something that matters."""
    dots = b".\r\n..\r\n\r\n...\r\n" * (1 << 17)
    client = greeted(willi)
    for size in SIZES:
        octets = dots[: size - 4].removesuffix(b"\r") + b"x.\r\n"
        assert_arrives(client, way, octets.rjust(size, b"."), upstream)


def test_every_cut_of_the_clients_writes_gives_the_same(willi: Willi, upstream: ScriptedUpstream):
    octets = b".\r\n..\r\n\r\n.x\r\n\0\r\n .\r\n.\r\n\r\n"
    wire = stuffed(octets) + b".\r\n"
    client = greeted(willi)
    for cut in range(1, len(wire)):
        assert [client.command(line).code for line in (MAIL, BOB, b"DATA")] == [250, 250, 354]
        client.send(wire[:cut])
        client.send(wire[cut:])
        assert client.read_reply().code == 250
        assert upstream.messages[-1].content == octets, cut


def test_one_octet_a_write_gives_the_same(chunking: bool, willi: Willi, upstream: ScriptedUpstream):
    octets = b"".join(BODIES[name] for name in ("dots", "almost ends", "commands"))
    client = greeted(willi)
    assert [client.command(line).code for line in (MAIL, BOB, b"DATA")] == [250, 250, 354]
    client.send_slowly(stuffed(octets) + b".\r\n")
    assert client.read_reply().code == 250
    assert [client.command(line).code for line in (MAIL, BOB)] == [250, 250]
    client.send_slowly(b"BDAT %d\r\n%sBDAT 0 LAST\r\n" % (len(octets), octets))
    assert [client.read_reply().code for _ in range(2)] == [250, 250]
    assert [message.content for message in upstream.messages] == [octets, octets]


def test_chunks_for_chunks_are_any_octets_whatever(willi: Willi, upstream: ScriptedUpstream):
    """Their length says where they end, so that nothing need be repaired."""
    octets = bytes(range(256)) + b"\n.\n\r.\r\n.\r\r\n.\r\n\0.\r\nno line end"
    assert_arrives(greeted(willi), "three chunks", octets, upstream)
    assert_arrives(greeted(willi), "BDAT", octets, upstream)


@LARGE
@given(seed=st.integers(0, 2**32))
@PATHS
def test_five_megabytes_of_anything_arrive_identical(
    way: str, chunking: bool, seed: int, willi: Willi, upstream: ScriptedUpstream
):
    with greeted(willi) as client:
        assert_arrives(client, way, some_text(seed, 5_000_000), upstream)
    for connection in upstream.connections:
        connection.wait_for_end()
    upstream.connections.clear()  # five megabytes each


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(octets=st.lists(st.sampled_from([b"\r\n", b".", b" ", b"\0", b"x", b"\xe4"]), max_size=30).map(b"".join))
def test_any_few_octets_arrive_identical_in_any_way(
    octets: bytes, chunking: bool, willi: Willi, upstream: ScriptedUpstream
):
    """But for a line of NUL and a dot, which one reader or another takes for the end: see test_promise_9.py."""
    assume(not re.search(rb"(?:\A|\r\n)[ \0]*\0[ \0]*\.[ \0]*\r\n", octets + b"\r\n"))
    with greeted(willi) as client:
        for way in WAYS:
            assert_arrives(client, way, octets + b"\r\n", upstream)
