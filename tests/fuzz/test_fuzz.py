"""Strangers' octets against the pure modules and whole sessions: some here, any number by `make fuzz`."""

from __future__ import annotations

import re
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.fuzz.dialogue import HANDSHAKE, IN_TURN, Script, check_session
from tests.fuzz.inputs import MOST_GENES, Genes, Target, targets
from tests.fuzz.lenient import early_end
from tests.fuzz.parsers import check_body, check_proxy_header, check_reply, check_syntax
from tests.fuzz.runner import Failure, run
from tests.runner.limits import allow
from tests.support.examples import examples
from willi_lib.net.wire import Wire
from willi_lib.proxy.relay import Relay
from willi_lib.proxy.session import Session
from willi_lib.proxy.upstream import Upstream
from willi_lib.smtp import body, proxy_header, reply, syntax
from willi_lib.smtp.reply import Reply

TARGETS = targets()
INPUTS = {"syntax": 2_000, "body": 600, "reply": 2_000, "proxy_protocol": 1_000, "session": 100}
SEED = 1  # a failure must come again at the next run; `make fuzz` takes others

EHLO, MAIL, BOB = b"EHLO c.example\r\n", b"MAIL FROM:<ann@a.example>\r\n", b"RCPT TO:<bob@b.example>\r\n"
IN_DATA = (EHLO, MAIL, BOB, b"DATA\r\n")
A_MESSAGE = Script((*IN_DATA, b"hello\r\n.\r\n", b"QUIT\r\n"))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_many_inputs_break_no_promise(target: Target):
    allow(400)
    count = run(target, INPUTS[target.name], SEED)
    assert count.inputs == INPUTS[target.name]
    assert count.descriptors <= 0


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@hypothesis.settings(max_examples=examples(200), suppress_health_check=list(HealthCheck))
@given(genes=st.binary(max_size=MOST_GENES))
def test_inputs_that_hypothesis_chooses_break_no_promise(target: Target, genes: bytes):
    target.check(target.make(Genes(genes)))


def test_the_same_genes_make_the_same_input():
    for target in TARGETS.values():
        genes = bytes(range(7, 47))
        assert target.make(Genes(genes)) == target.make(Genes(genes))
        assert target.make(Genes(b"")) is not None


def test_a_script_is_kept_as_json():
    for script in TARGETS["session"].seeds:
        assert Script.from_json(script.to_json()) == script


# What the fuzzer would notice: each of these is a fault that Willi might have.


@pytest.mark.parametrize("content", [
    b"a\n.\nb", b"a\n.\r\nb", b"a\r\n.\nb", b"a\r.\rb", b"a\r\n.\rb", b"a\r\n. \r\nb", b"a\r\n\t.\r\nb",
    b"a\r\n\0.\0\r\nb", b".\r\n", b"a\r\r\n.\r\r\n", b"a\r\n.\0b\r\n", b"a\r\n \t. \0.\r\n",
])  # fmt: skip
def test_the_lenient_reader_sees_an_end(content: bytes):
    assert early_end(content) is not None


@pytest.mark.parametrize("content", [b"", b"..\r\n", b"a.\r\n", b"a\r\n.b\r\n", b". .\r\n", b".", b"a\r\n\0.\0b\r\n"])
def test_the_lenient_reader_sees_no_end_where_there_is_none(content: bytes):
    assert early_end(content) is None


def test_a_body_that_is_passed_on_as_it_is_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body, "_SKIPPED_BEHIND_DOT", re.compile(b"never"))
    with pytest.raises(AssertionError):
        check_body(b"a\r\n. \r\nb")


def test_a_control_octet_that_is_let_through_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(syntax, "_CONTROL", re.compile(b"never"))
    monkeypatch.setattr(syntax, "_LOCAL_PART", b".*")
    monkeypatch.setattr(syntax, "_PATH", re.compile(rb"(?s)(?P<path><.*>)(?P<bare>)?(?P<parameters>)?"))
    monkeypatch.setattr(syntax, "_make_path", lambda octets, *_: syntax.Path(octets.decode()[1:-1], "b.example"))
    with pytest.raises(AssertionError):
        check_syntax(b"RCPT TO:<a\nb@b.example>")


def test_a_reply_that_is_read_in_two_ways_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reply, "_WHOLE_REPLY", re.compile(rb"250 [^\n]*\n"))
    reply.first_reply.cache_clear()
    with pytest.raises(AssertionError):
        check_reply(b"250 a\n")
    reply.first_reply.cache_clear()


def test_a_proxy_header_without_a_limit_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proxy_header, "MAX_V1_LINE", 1000)
    with pytest.raises(AssertionError):
        check_proxy_header(b"PROXY UNKNOWN " + b"x" * 200)


def test_an_internal_error_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def fail(_session: Session, _argument: bytes) -> Reply:
        raise RuntimeError

    monkeypatch.setitem(_verbs(), b"NOOP", (fail, _verbs()[b"NOOP"][1]))
    with pytest.raises(AssertionError, match="Internal error"):
        check_session(Script((b"NOOP\r\n",)))


def _verbs() -> dict[bytes, Any]:
    from willi_lib.proxy import session

    return session.VERBS


def test_a_250_that_nobody_has_said_is_noticed(monkeypatch: pytest.MonkeyPatch):
    check_session(A_MESSAGE)
    monkeypatch.setattr(Upstream, "finish", lambda *_: Reply(250, (b"2.0.0 kept, I hope",)))
    with pytest.raises(AssertionError, match="who said"):
        check_session(A_MESSAGE)


def test_a_message_that_is_not_passed_on_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Upstream, "finish", lambda *_: Reply(250, (b"2.0.0 Ok",)))  # as Willi says to NOOP
    with pytest.raises(AssertionError, match="nobody has"):
        check_session(A_MESSAGE)


def test_an_unfinished_message_that_is_finished_upstream_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def finish_it(upstream: Upstream) -> None:
        upstream.wire.send(b"\r\n.\r\n")
        upstream.wire.close()

    monkeypatch.setattr(Upstream, "drop", finish_it)
    with pytest.raises(AssertionError, match="is of no message"):
        check_session(Script((*IN_DATA, b"hello\r\n")))


def test_a_smuggled_message_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body._Lines, "_clean", lambda _lines, data, lone_dots: data)
    with pytest.raises(AssertionError, match="a lenient reader sees an end"):
        check_session(Script((*IN_DATA, b"a\n.\nMAIL FROM:<eve@a.example>\r\n.\r\n")))


def test_a_command_without_an_answer_is_noticed(monkeypatch: pytest.MonkeyPatch):
    write = Session.write

    def write_all_but_one(session: Session, answer: Reply) -> None:
        if answer is not reply.HELP:
            write(session, answer)

    monkeypatch.setattr(Session, "write", write_all_but_one)
    with pytest.raises(AssertionError, match="no answer to"):
        check_session(Script((EHLO, b"HELP\r\n")))


def test_a_connection_that_is_left_open_is_noticed(monkeypatch: pytest.MonkeyPatch):
    left: list[Upstream] = []
    monkeypatch.setattr(Upstream, "quit", lambda upstream: left.append(upstream))
    with pytest.raises(AssertionError, match="left open"):
        check_session(A_MESSAGE)
    for upstream in left:
        upstream.drop()


def test_clear_text_that_outlives_starttls_is_noticed(monkeypatch: pytest.MonkeyPatch):
    start_tls = Wire.start_tls

    def keep_what_came_along(wire: Wire, *arguments: Any, **options: Any) -> None:
        kept = b"\r\n".join([*wire.peek_lines(), b""])
        start_tls(wire, *arguments, **options)
        wire.unread(kept)

    script = Script((EHLO, b"STARTTLS\r\nNOOP\r\n", HANDSHAKE, EHLO), pace=IN_TURN)
    assert len(check_session(script).commands) == 3
    monkeypatch.setattr(Wire, "start_tls", keep_what_came_along)
    with pytest.raises(AssertionError):
        check_session(script)


def test_a_failing_input_is_made_small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Relay, "_check", lambda *_, **__: 1 / 0)
    with pytest.raises(Failure) as failure:
        run(TARGETS["session"].__class__("session", TARGETS["session"].make, check_session, ()), 1000, SEED)
    assert len(re.findall("[0-9a-f]{2}", str(failure.value).split("genes ")[1].split(":")[0])) < MOST_GENES / 2
