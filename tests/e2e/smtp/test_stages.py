"""Every command in every stage of a session: what is answered, and where that leads."""

from __future__ import annotations

import pytest

from tests.conftest import StartWilli
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.talk import BEN, BOB, EHLO, GO_ON, LOST, MAIL, NO_ANSWER, OK, QUEUED, SENDER_KEPT
from tests.support.upstream import Close, ScriptedUpstream
from willi_lib.proxy.session import VERBS
from willi_lib.proxy.stage import Stage

DEAD = b"RCPT TO:<dead@b.example>"  # at this one the upstream hangs up
COMMANDS = {
    b"EHLO": b"EHLO d.example\r\n",
    b"HELO": b"HELO d.example\r\n",
    b"STARTTLS": b"STARTTLS\r\n",
    b"XCLIENT": b"XCLIENT ADDR=192.0.2.1\r\n",
    b"MAIL": b"MAIL FROM:<eve@a.example>\r\n",
    b"RCPT": BEN + b"\r\n",
    b"DATA": b"DATA\r\n",
    b"BDAT": b"BDAT 6 LAST\r\nQUIT\r\n",  # the chunk is never taken for a command
    b"RSET": b"RSET\r\n",
    b"NOOP": b"NOOP\r\n",
    b"VRFY": b"VRFY bob@b.example\r\n",
    b"EXPN": b"EXPN staff\r\n",
    b"AUTH": b"AUTH PLAIN AGFubgBzZWNyZXQ=\r\n",
    b"HELP": b"HELP\r\n",
    b"QUIT": b"QUIT\r\n",
}

FEATURES = "STARTTLS / PIPELINING / SIZE 20971520 / ENHANCEDSTATUSCODES / 8BITMIME / SMTPUTF8 / CHUNKING"
NO_EHLO = "503 5.5.1 Send EHLO first"
NO_MAIL = "503 5.5.1 Need MAIL command"
NO_RCPT = "503 5.5.1 Need RCPT command"
NESTED = "503 5.5.1 Nested MAIL command"
ORDER = "503 5.5.1 Bad sequence of commands"
BDAT_BEGAN = "503 5.5.1 DATA after BDAT, send RSET first"
NOT_YOU = "550 5.7.0 XCLIENT is not allowed from your address"
CLOSED = "closed"

# What may be said at any time: the answer, and the stage after it (None: the same)
ALWAYS: dict[bytes, tuple[str, Stage | None]] = {
    b"EHLO": (f"250 willi.example / {FEATURES}", Stage.GREETED),
    b"HELO": ("250 willi.example", Stage.GREETED),
    b"RSET": ("250 2.0.0 Ok", Stage.GREETED),
    b"NOOP": ("250 2.0.0 Ok", None),
    b"VRFY": ("252 2.5.2 Cannot VRFY user, but will take a message for him", None),
    b"EXPN": ("502 5.5.1 Command not implemented", None),
    b"AUTH": ("502 5.5.1 Command not implemented", None),
    b"HELP": ("214 2.0.0 See RFC 5321; ask postmaster for help", None),
}
EXPECTED: dict[Stage, dict[bytes, tuple[str, Stage | None]]] = {
    Stage.START: {
        **ALWAYS,
        b"STARTTLS": (NO_EHLO, None),
        b"XCLIENT": (NOT_YOU, None),
        b"MAIL": (NO_EHLO, None),
        b"RCPT": (NO_EHLO, None),
        b"DATA": (NO_EHLO, None),
        b"BDAT": (NO_EHLO, None),
        b"RSET": ("250 2.0.0 Ok", None),
    },
    Stage.GREETED: {
        **ALWAYS,
        b"STARTTLS": ("220 2.0.0 Ready to start TLS", Stage.HANDSHAKE),
        b"XCLIENT": (NOT_YOU, None),
        b"MAIL": (SENDER_KEPT, Stage.SENDER),
        b"RCPT": (NO_MAIL, None),
        b"DATA": (NO_MAIL, None),
        b"BDAT": (NO_MAIL, None),
    },
    Stage.SENDER: {
        **ALWAYS,
        b"STARTTLS": (ORDER, None),
        b"XCLIENT": (ORDER, None),
        b"MAIL": (NESTED, None),
        b"RCPT": (OK, Stage.RECIPIENT),
        b"DATA": (NO_RCPT, None),
        b"BDAT": (NO_RCPT, Stage.GREETED),
    },
    Stage.RECIPIENT: {
        **ALWAYS,
        b"STARTTLS": (ORDER, None),
        b"XCLIENT": (ORDER, None),
        b"MAIL": (NESTED, None),
        b"RCPT": (OK, None),
        b"DATA": (GO_ON, Stage.CONTENT),
        b"BDAT": (OK, Stage.GREETED),
    },
    Stage.CHUNKS: {
        **ALWAYS,
        b"STARTTLS": (ORDER, None),
        b"XCLIENT": (ORDER, None),
        b"MAIL": (NESTED, None),
        b"RCPT": (ORDER, None),
        b"DATA": (BDAT_BEGAN, None),
        b"BDAT": (OK, Stage.GREETED),
    },
    Stage.FAILED: {
        **ALWAYS,
        b"STARTTLS": (ORDER, None),
        b"XCLIENT": (ORDER, None),
        b"MAIL": (SENDER_KEPT, Stage.SENDER),
        b"RCPT": (NO_ANSWER, None),
        b"DATA": (LOST, None),
        b"BDAT": (LOST, None),
    },
}
WAY_TO = {
    Stage.START: [],
    Stage.GREETED: [EHLO],
    Stage.SENDER: [EHLO, MAIL],
    Stage.RECIPIENT: [EHLO, MAIL, BOB],
    Stage.CHUNKS: [EHLO, MAIL, BOB, b"BDAT 3\r\nabc"],
    Stage.FAILED: [EHLO, MAIL, DEAD],
    Stage.CONTENT: [EHLO, MAIL, BOB, b"DATA"],
    Stage.HANDSHAKE: [EHLO, b"STARTTLS"],
}
# The answers to DATA tell in which stage it was said
STAGE_BY_DATA = {
    NO_EHLO: Stage.START,
    NO_MAIL: Stage.GREETED,
    NO_RCPT: Stage.SENDER,
    GO_ON: Stage.RECIPIENT,
    BDAT_BEGAN: Stage.CHUNKS,
    LOST: Stage.FAILED,
}


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream, certificates: Authority) -> Willi:
    pair = certificates.issue("willi.example")
    upstream.answers[DEAD] = Close()
    willi = share_willi(server=upstream.server, tls_cert=str(pair.cert), tls_key=str(pair.key))
    willi.tolerate("connection closed")
    return willi


def brought_to(stage: Stage, willi: Willi) -> Client:
    client = willi.connect()
    for line in WAY_TO[stage]:
        if line.startswith(b"BDAT"):
            client.send(line)
            assert str(client.read_reply()) == OK
        else:
            client.command(line)
    return client


def answer_to(client: Client, octets: bytes) -> str:
    client.send(octets)
    return str(client.read_reply())


def stage_of(client: Client) -> Stage | str:
    """The stage, found out by what happens to DATA."""
    client.send(b"DATA\r\n")
    try:
        return STAGE_BY_DATA[str(client.read_reply())]
    except ConnectionError:
        return CLOSED


def test_the_table_has_every_command_in_every_stage():
    dumb = {Stage.CONTENT, Stage.HANDSHAKE}  # where nothing is a command
    assert set(COMMANDS) == set(VERBS)
    assert set(WAY_TO) == set(Stage)
    assert set(EXPECTED) == set(Stage) - dumb
    for expected in EXPECTED.values():
        assert set(expected) | {b"QUIT"} == set(VERBS)


@pytest.mark.parametrize("stage", EXPECTED, ids=lambda stage: stage.name)
def test_each_command_is_answered_as_the_stage_demands(stage: Stage, willi: Willi):
    heard: dict[bytes, tuple[str, Stage | str]] = {}
    for verb in EXPECTED[stage]:
        with brought_to(stage, willi) as client:
            answer = answer_to(client, COMMANDS[verb])
            heard[verb] = answer, (Stage.CONTENT if answer == GO_ON else stage_of(client))
    expected = {
        # Clear text after the 220 to STARTTLS is no handshake: the connection ends.
        verb: (answer, CLOSED if then is Stage.HANDSHAKE else then or stage)
        for verb, (answer, then) in EXPECTED[stage].items()
    }
    assert heard == expected


@pytest.mark.parametrize("stage", EXPECTED, ids=lambda stage: stage.name)
def test_quit_ends_the_session_in_every_stage(stage: Stage, willi: Willi, upstream: ScriptedUpstream):
    with brought_to(stage, willi) as client:
        assert answer_to(client, b"QUIT\r\n") == "221 2.0.0 Bye"
        client.expect_eof()
    upstream.wait_for_ends()
    assert upstream.messages == []


@pytest.mark.parametrize("verb", VERBS, ids=bytes.decode)
def test_no_command_is_one_inside_a_message(verb: bytes, willi: Willi, upstream: ScriptedUpstream):
    with brought_to(Stage.CONTENT, willi) as client:
        assert answer_to(client, COMMANDS[verb] + b".\r\n") == QUEUED
        assert stage_of(client) is Stage.GREETED
    assert upstream.wait_for_message().content == COMMANDS[verb]


@pytest.mark.parametrize("stage", [Stage.CONTENT, Stage.HANDSHAKE], ids=lambda stage: stage.name)
def test_a_client_that_hangs_up_here_is_let_go(stage: Stage, willi: Willi, upstream: ScriptedUpstream):
    brought_to(stage, willi).close()
    upstream.wait_for_ends()
    assert upstream.messages == []
    willi.probe()


def test_no_command_is_one_in_place_of_a_handshake(willi: Willi):
    for command in COMMANDS.values():
        with brought_to(Stage.HANDSHAKE, willi) as client:
            client.send(command)
            alert = client.read_to_end()
            assert alert == b"" or alert.startswith(b"\x15\x03"), "a TLS alert or nothing"


def test_a_stage_is_not_left_by_what_was_refused(willi: Willi):
    with brought_to(Stage.RECIPIENT, willi) as client:
        for line in (b"EHLO", b"HELO", b"RSET x", b"DATA x", b"QUIT x", b"RCPT TO:", b"MAIL FROM:", b"BOGUS"):
            assert client.command(line).permanent, line
        assert stage_of(client) is Stage.RECIPIENT
