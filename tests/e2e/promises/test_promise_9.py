"""Promise 9: no client can speak in another's name, and no lenient upstream sees a second message."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.conftest import StartPostfix, StartUpstream, StartWilli
from tests.support.certificates import Pair
from tests.support.daemon import Setting, Willi
from tests.support.promise import greeted, in_envelope, rcpt, sent
from tests.support.talk import BOB, EHLO, MAIL, QUEUED, SENDER_KEPT, chunk, content, say
from tests.support.upstream import ScriptedUpstream

# protocol.md calls these by their octets; whoever takes one for the end of the message sees two messages.
SEQUENCES = [
    b"\n.\n", b"\n.\r", b"\r.\n", b"\r.\r", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r\n\0.\r\n",
    b"\r\n.\r\r\n", b"\r\r\n.\r\r\n", b"\n\n.\n\n", b"\n\r.\n\r", b"\r\n\r.\r\n", b"\r\n.\n\r\n",
    b"\r\n.\0\r\n", b"\0\r\n.\0\r\n", b"\r\0\n.\r\0\n", b"\r\n. \r\n", b"\r\n .\r\n", b"\r\n.\t\r\n",
    b"\r\n \t.\t \r\n",
    b"\r\n.\x0b\r\n", b"\r\n\x0c.\r\n", b"\n. \n", b"\n\0.\n", b"\r .\r", b"\r\n\0\0.\0\0\r\n", b"\r\n.\x1a\r\n",
    b"\r\n.\0x\r\n", b"\r\n.\0.\r\n", b"\n.\0x\n", b"\r\n.\t\0x\r\n",
    b"\r\n\xff.\r\n", b"\r\n..\n", b"\n..\n", b"\n..\r\n", b"\r\n..\r\n", b"\n.\n.\n", b"\r\n.\r.\r\n",
]  # fmt: skip
SECOND = (
    b"MAIL FROM:<admin@bank.example>\r\nRCPT TO:<bob@b.example>\r\nDATA\r\n"
    b"From: admin@bank.example\r\nSubject: smuggled\r\n\r\nbelieve me\r\n"
)
FIRST = b"Subject: first\r\n\r\nhello"
BLANKS = rb"[ \t\x0b\x0c]*"
OTHERS = rb"[\x00-\x09\x0b\x0c\x0e-\x20]*"

# Each finds its ends of the message in octets that begin behind a line end.
READERS = {
    "of the RFC": rb"(?:\A|\r\n)\.\r\n",
    "LF": rb"(?:\A|\n)\.\r?\n",
    "LF, any number of CR": rb"(?:\A|\n)\r*\.\r*\n",
    "CR, LF or both": rb"(?:\A|\r\n|\r|\n)\.(?:\r\n|\r|\n)",
    "CR": rb"(?:\A|\r)\n?\.\r\n?",
    "NUL is the end of the line": rb"(?:\A|\n)\.(?:\x00[^\n]*)?\r?\n",
    "NUL dropped": rb"(?:\A|\n)\0*\.\0*\r?\0*\n",
    "blanks after the dot": rb"(?:\A|\n)\." + BLANKS + rb"\r?\n",
    "blanks before the dot": rb"(?:\A|\n)" + BLANKS + rb"\.\r?\n",
    "blanks around the dot": rb"(?:\A|\r\n|\r|\n)" + BLANKS + rb"\." + BLANKS + rb"(?:\r\n|\r|\n)",
    "all control octets dropped": rb"(?:\A|[\r\n])" + OTHERS + rb"\." + OTHERS + rb"(?:\r\n|\r|\n)",
}


def assert_one_message(octets: bytes) -> None:
    """No reader sees an end before the last octets, and nothing but CRLF ends a line."""
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", octets), f"CR or LF alone: {octets!r}"
    for name, end in READERS.items():
        first = re.search(end, octets)
        assert first and first.end() == len(octets), f"{name}: an end at {first and first.span()} of {octets!r}"


def repaired(content: bytes) -> bytes:
    """What must arrive: each bare LF has become CRLF, each bare CR a space, and a NUL before a lone dot."""
    lines = re.sub(rb"\r\n|\r|\n", lambda found: b" " if found[0] == b"\r" else b"\r\n", content)
    lone_dot = rb"(?:\A|(?<=\r\n))" + OTHERS + rb"\.(?=" + OTHERS + rb"\r\n)"
    return re.sub(lone_dot, lambda found: found[0].replace(b"\0", b" "), lines)


def unstuffed(octets: bytes) -> bytes:
    """The content of octets that were sent after DATA; only CRLF ends a line."""
    return re.sub(rb"(?:\A|(?<=\r\n))\.", b"", octets)


@pytest.fixture
def attacked(share_willi: StartWilli, upstream: ScriptedUpstream) -> Iterator[Willi]:
    """Willi before an upstream without CHUNKING; afterwards every message that it was sent is looked at."""
    upstream.extensions = (b"PIPELINING", b"8BITMIME")
    yield share_willi(server=upstream.server)
    assert upstream.messages
    for message in upstream.messages:
        assert_one_message(message.wire)
        assert message.sender == b"ann@a.example"


def test_no_sequence_smuggles_a_message_through_data(attacked: Willi, upstream: ScriptedUpstream):
    """A reader of the RFC and Willi agree on where it ends: after the second message's dot."""
    client = greeted(attacked)
    for number, sequence in enumerate(SEQUENCES):
        octets = FIRST + sequence + SECOND
        assert sent(client, "bob@b.example", octets) == QUEUED, sequence
        assert len(upstream.messages) == number + 1, sequence
        assert upstream.messages[-1].content == repaired(unstuffed(octets)), sequence


def test_no_sequence_smuggles_a_message_at_the_start_or_the_end(attacked: Willi, upstream: ScriptedUpstream):
    client = greeted(attacked)
    starts = [start + SECOND for sequence in SEQUENCES for start in (sequence, sequence.lstrip(b"\r\n"))]
    starts = [octets for octets in starts if not octets.startswith(b".\r\n")]  # which is the end indeed
    all_octets = starts + [FIRST + sequence + b"\r\n" for sequence in SEQUENCES]
    for octets in all_octets:
        assert sent(client, "bob@b.example", octets) == QUEUED, octets
    assert len(upstream.messages) == len(all_octets)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_cut_between_reads_smuggles_a_message(size: int, attacked: Willi, upstream: ScriptedUpstream):
    """The octets of a sequence arrive apart."""
    client = greeted(attacked)
    for sequence in SEQUENCES:
        assert [reply.split(" ")[0] for reply in say(client, MAIL, BOB, b"DATA")] == ["250", "250", "354"]
        octets = b"x" + sequence + b"x\r\n.\r\n"
        for position in range(0, len(octets), size):
            client.send(octets[position : position + size])
        assert str(client.read_reply()) == QUEUED, sequence
    assert len(upstream.messages) == len(SEQUENCES)


def test_no_sequence_smuggles_a_message_through_chunks(attacked: Willi, upstream: ScriptedUpstream):
    """In a chunk even CRLF . CRLF is content."""
    client = greeted(attacked)
    sequences = [*SEQUENCES, b"\r\n.\r\n", b"\r\n.\r\n.\r\n"]
    for sequence in sequences:
        assert say(client, MAIL, BOB)[0] == SENDER_KEPT
        octets = FIRST + sequence + SECOND + b".\r\n"
        assert chunk(client, octets, last=True) == QUEUED, sequence
        assert upstream.messages[-1].content == repaired(octets), sequence
    assert len(upstream.messages) == len(sequences)


def test_no_cut_between_chunks_smuggles_a_message(attacked: Willi, upstream: ScriptedUpstream):
    client = greeted(attacked)
    for sequence in [*SEQUENCES, b"\r\n.\r\n"]:
        assert say(client, MAIL, BOB)[0] == SENDER_KEPT
        octets = b"x" + sequence + b"x"
        for position in range(len(octets)):
            assert chunk(client, octets[position : position + 1]) == "250 2.0.0 1 octets received"
        assert chunk(client, b"", last=True) == QUEUED


def test_pairs_of_sequences_smuggle_nothing(attacked: Willi, upstream: ScriptedUpstream):
    """What one of them leaves behind must not complete the next."""
    client = greeted(attacked)
    for first in SEQUENCES:
        octets = b"".join(b"x" + first + second for second in SEQUENCES)
        octets = re.sub(rb"(?<=\r\n)\.(?=\r\n)", b"..", octets)  # where two of them make up a real end
        assert sent(client, "bob@b.example", octets + b"x\r\n") == QUEUED


def test_a_lenient_postfix_stores_one_message(start_willi: StartWilli, start_postfix: StartPostfix):
    """It takes LF for a line end and believes its proxy; whatever came in, it is one message."""
    settings = {"smtpd_forbid_bare_newline": "no", "smtpd_forbid_unauth_pipelining": "no"}
    postfix = start_postfix(domains=("b.example",), settings=settings)
    discarding = {**settings, "smtpd_discard_ehlo_keywords": "chunking"}
    without_chunking = start_postfix(domains=("b.example",), settings=discarding)
    for upstream, way in ((postfix, "DATA"), (without_chunking, "BDAT")):
        willi = start_willi(server=upstream.server)
        with greeted(willi) as client:
            for sequence in SEQUENCES:
                if way == "DATA":
                    verdict = sent(client, "carl@b.example", FIRST + sequence + SECOND)
                else:
                    say(client, MAIL, rcpt("carl@b.example"))
                    verdict = chunk(client, FIRST + sequence + SECOND, last=True)
                assert verdict.startswith("250 2.0.0 Ok: queued as "), (sequence, verdict)
        for number in range(len(SEQUENCES)):
            upstream.wait_for_message("carl@b.example", number)
        stored = upstream.stored()
        assert len(stored) == len(SEQUENCES)
        assert {message.sender for message in stored} == {"ann@a.example"}
        assert all(b"smuggled" in message.content for message in stored)


def test_what_is_refused_for_its_line_ends_smuggles_nothing(start_willi: StartWilli, upstream: ScriptedUpstream):
    willi = start_willi(server=upstream.server, bare_newline="reject")
    client = greeted(willi)
    for sequence in SEQUENCES:
        bare = re.search(rb"\r(?!\n)|(?<!\r)\n", sequence)
        verdict = sent(client, "bob@b.example", FIRST + sequence + SECOND)
        assert verdict == ("550 5.5.2 Message has a bare CR or LF" if bare else QUEUED), sequence
        assert say(client, b"NOOP") == ["250 2.0.0 Ok"]
    for message in upstream.messages:
        assert_one_message(message.wire)
    assert b"MAIL FROM:<admin@bank.example>" not in upstream.commands


# STARTTLS


@pytest.fixture
def secure(share_willi: StartWilli, upstream: ScriptedUpstream, postfix_certificate: Pair) -> Willi:
    return share_willi(server=upstream.server, tls_cert=postfix_certificate.cert, tls_key=postfix_certificate.key)


@pytest.mark.parametrize(
    "injected", [b"EHLO eve.example\r\n", MAIL + b"\r\n" + BOB + b"\r\n", b"NOOP\r\n" * 100, b"QU"]
)
def test_clear_text_behind_starttls_is_never_executed(injected: bytes, secure: Willi, upstream: ScriptedUpstream):
    client = greeted(secure)
    client.send(b"STARTTLS\r\n" + injected)
    assert client.read_reply().code == 220
    client.handshake()
    client.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.read_reply()
    client.socket.settimeout(60)
    assert say(client, MAIL) == ["503 5.5.1 Send EHLO first"], "what was said in clear is forgotten"
    client.command(EHLO)
    assert say(client, b"RCPT TO:<bob@b.example>") == ["503 5.5.1 Need MAIL command"]
    assert upstream.connections == []


def test_clear_text_of_an_upstream_behind_its_220_is_never_believed(
    start_willi: StartWilli, start_upstream: StartUpstream, postfix_certificate: Pair
):
    """The response injection of NO STARTTLS: these would be the answers to EHLO, MAIL and so on inside TLS."""
    upstream = start_upstream(tls=postfix_certificate.server_context())
    upstream.answers[b"STARTTLS"] = b"220 go ahead\r\n250-evil.example\r\n250 XCLIENT ADDR\r\n250 ok\r\n250 ok\r\n"
    willi = start_willi(server=upstream.server, upstream_tls="always")
    willi.tolerate("Upstream failed")
    client = greeted(willi)
    assert say(client, MAIL, BOB)[1].startswith("451 4.4.1 ")
    assert [line.split(b" ")[0] for line in upstream.commands] == [b"EHLO", b"STARTTLS"]


# Other names


@pytest.mark.parametrize("hosts", ["", "192.0.2.0/24, 127.0.0.2, ::1"])
def test_xclient_from_strangers_does_not_count(hosts: str, start_willi: StartWilli, upstream: ScriptedUpstream):
    upstream.extensions = (*upstream.extensions, b"XCLIENT NAME ADDR PORT PROTO HELO")
    willi = start_willi(server=upstream.server, xclient_hosts=hosts)
    client = greeted(willi)
    assert not any(line.startswith(b"XCLIENT") for line in client.command(EHLO).lines)
    denied = "550 5.7.0 XCLIENT is not allowed from your address"
    assert say(client, b"XCLIENT ADDR=192.0.2.1 NAME=bank.example HELO=bank.example") == [denied]
    assert say(client, MAIL, BOB) == [SENDER_KEPT, "250 2.0.0 ok"]
    told = [line for line in upstream.commands if line.startswith(b"XCLIENT")]
    assert told and all(b"192.0.2.1" not in line and b"bank" not in line for line in told)
    assert b"ADDR=127.0.0.1" in told[-1]


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 25\r\n",
        b"PROXY TCP6 2001:db8::1 2001:db8::2 1 25\r\n",
        b"PROXY UNKNOWN\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\0\1\0\x19",
    ],
)
@pytest.mark.parametrize("hosts", ["", "192.0.2.0/24, 127.0.0.2"])
def test_a_proxy_header_from_strangers_does_not_count(
    hosts: str, header: bytes, start_willi: StartWilli, upstream: ScriptedUpstream
):
    upstream.extensions = (*upstream.extensions, b"XCLIENT NAME ADDR PORT PROTO HELO")
    willi = start_willi(server=upstream.server, proxy_protocol_hosts=hosts)
    client = willi.connect(greeting=False)
    client.send(header)
    assert client.read_reply().code == 220
    assert client.read_to_end() == b"421 4.7.0 No PROXY header is expected from your address\r\n"
    assert upstream.connections == []


# Injection by way of an argument

CONTROLS = [b"\r", b"\n", b"\0", b"\t", b"\x1b", b"\x7f", b"\x0b", b"\x85", b"\xa0"]
OUR_VERBS = {b"EHLO", b"HELO", b"XCLIENT", b"MAIL", b"RCPT", b"RSET", b"QUIT"}


@pytest.mark.parametrize("control", CONTROLS, ids=repr)
@pytest.mark.parametrize(
    "line",
    [
        b"EHLO c.example%sMAIL FROM:<eve@a.example>",
        b"HELO c.example%sMAIL FROM:<eve@a.example>",
        b"MAIL FROM:<ann@a.example%sRCPT TO:<eve@b.example>",
        b"MAIL FROM:<ann@a.example>%sRCPT TO:<eve@b.example>",
        b'MAIL FROM:<"%sRSET"@a.example>',
        b"MAIL FROM:<ann@a.example> SIZE=1%sRSET",
        b"RCPT TO:<bob@b.example%sDATA>",
        b"RCPT TO:<bob@b.example>%sDATA",
        b'RCPT TO:<"%s>"@b.example>',
        b"RCPT TO:<@a.example%s:bob@b.example>",
        b"DATA%sx",
        b"BDAT 1 LA%sST",
    ],
    ids=repr,
)
def test_no_argument_adds_a_command_upstream(line: bytes, control: bytes, shared: tuple[Willi, ScriptedUpstream]):
    """An octet that some upstream takes for the end of a line, or of a string, does not get there."""
    willi, upstream = shared
    upstream.connections.clear()
    client = in_envelope(willi) if line[:4] in (b"RCPT", b"DATA", b"BDAT") else greeted(willi)
    client.send(line % control + b"\r\n")
    answer = client.read_reply()
    assert 500 <= answer.code <= 555 or control > b"\x7f", "8-bit is looked at where it goes upstream only"
    client.close()
    upstream.wait_for_ends()
    for heard in upstream.commands:
        assert control not in heard
        assert heard.split(b" ")[0] in OUR_VERBS
        assert b"eve" not in heard


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Willi, ScriptedUpstream]]:
    """One pair for many cases."""
    upstream = ScriptedUpstream()
    mappings: dict[str, Setting] = {"all": {"type": "static", "server": upstream.server, "tls_verify": False}}
    willi = Willi(tmp_path_factory.mktemp("willi"), {"mappings": mappings})
    yield willi, upstream
    willi.end()
    upstream.stop()


@pytest.mark.parametrize(
    "path",
    [
        b'<"bob> NOTIFY=NEVER"@b.example>', b'<"a\\"b"@b.example>', b"<@x.example,@y.example:bob@b.example>",
        b'<"RCPT TO:<eve@b.example>"@b.example>', b"<bob@[127.0.0.1]>", b"bob@b.example", b" <bob@b.example>",
        b"<postmaster>", b"<bob@b.example> NOTIFY=NEVER", b"<bob@b.example> X", b"<bob@b.example>X",
        b"<<bob@b.example>>",
        b"<bob@b.example><eve@b.example>", b"<bob@b.example", b"<>", b"<b ob@b.example>",
        b"<bob@b.example,eve@b.example>",
        b"<bob@b.example;eve@b.example>", b"<bob@b.exa(x)mple>", b"<" + b"x" * 1000 + b"@b.example>",
    ],
)  # fmt: skip
def test_what_goes_upstream_is_one_path_and_nothing_behind_it(path: bytes, shared: tuple[Willi, ScriptedUpstream]):
    willi, upstream = shared
    upstream.connections.clear()
    with greeted(willi) as client:
        assert say(client, MAIL) == [SENDER_KEPT]
        reply = client.command(b"RCPT TO:" + path)
    upstream.wait_for_ends()
    heard = [line for line in upstream.commands if line.startswith(b"RCPT")]
    if reply.code == 250:
        assert len(heard) == 1 and re.fullmatch(rb'RCPT TO:<(?:"(?:[^"\\]|\\.)*"|[^<>" ]+)(?:@[^<>" ]+)?>', heard[0])
    else:
        assert 500 <= reply.code <= 555
        assert heard == []


def test_content_behind_a_refused_data_is_no_way_in(willi: Willi, upstream: ScriptedUpstream):
    """A client that does not wait for 354 has only itself to hurt: its commands run in its own name."""
    upstream.answers[b"RCPT"] = b"550 5.1.1 no\r\n"
    client = greeted(willi)
    client.send(MAIL + b"\r\n" + BOB + b"\r\nDATA\r\nSubject: x\r\n\r\nQUIT\r\n.\r\n")
    codes = [client.read_reply().code for _ in range(6)]
    assert codes == [250, 550, 554, 500, 500, 221]
    client.expect_eof()
    assert upstream.messages == []


def test_a_message_in_a_chunk_is_content(willi: Willi, upstream: ScriptedUpstream):
    """Also for an upstream with CHUNKING, which is told its length."""
    client = in_envelope(willi)
    octets = FIRST + b"\r\n.\r\n" + SECOND + b".\r\nQUIT\r\n"
    assert chunk(client, octets, last=True) == "250 2.0.0 ok"
    assert [message.content for message in upstream.messages] == [octets]
    assert say(client, b"RSET", MAIL, BOB, b"DATA")[3] == "354 go on"
    assert content(client) == QUEUED


def test_a_data_line_that_is_refused_for_its_length_is_not_sent_ahead(willi: Willi, upstream: ScriptedUpstream):
    """Else the chunk behind it would be content after the upstream's 354, and could end that message itself."""
    forged = b"\r\n.\r\nRSET\r\nMAIL FROM:<boss@bank.example>\r\nRCPT TO:<ann@b.example>\r\nDATA\r\nforged\r\n.\r\n"
    client = greeted(willi)
    client.send(
        MAIL + b"\r\n" + BOB + b"\r\nDATA" + b" " * 2050 + b"\r\n" + b"BDAT %d LAST\r\n%s" % (len(forged), forged)
    )
    assert [str(client.read_reply()) for _ in range(4)] == [
        SENDER_KEPT, "250 2.0.0 ok", "500 5.5.2 Line too long", "250 2.0.0 ok"
    ]  # fmt: skip
    assert [message.content for message in upstream.messages] == [forged]
    assert b"DATA" not in upstream.commands
