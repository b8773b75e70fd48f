"""A whole session in this process: a client and upstreams that keep to nothing, on socket pairs, and what must hold."""

from __future__ import annotations

import json
import re
import socket
import ssl
import tempfile
from _socket import socket as RawSocket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gevent

from tests.fuzz.client_end import ClientEnd
from tests.fuzz.clients import LINE_TOO_LONG, Reader, Sent, Story, split_replies
from tests.fuzz.lenient import as_passed_on
from tests.fuzz.upstreams import CLOSE, REFUSE, RESET, USUAL, HostileUpstream, Plan, Stored
from tests.support.certificates import Authority
from tests.support.daemon import Setting, parse_logfmt, write_config
from tests.support.mapping import InMemory
from willi_lib import config, log
from willi_lib.config import Settings
from willi_lib.net.deadline import Deadline
from willi_lib.net.resolver import Resolver
from willi_lib.net.tls import server_context, upstream_contexts
from willi_lib.net.wire import PeerGone, Wire
from willi_lib.proxy import connector
from willi_lib.proxy import upstream as upstream_module
from willi_lib.proxy.connector import Connector
from willi_lib.proxy.context import SessionContext
from willi_lib.proxy.session import Session
from willi_lib.proxy.upstream import Client
from willi_lib.routing.route import Answer, LookupFailed, Policy, Route, parse_servers
from willi_lib.smtp import reply as replies
from willi_lib.smtp.reply import Reply
from willi_lib.status.counts import Counts

LONGEST = 40.0  # seconds for a session of which each wait has a limit far below
PATIENCE, IMPATIENCE = 10.0, 0.01  # seconds of Willi's own limits; the second where a script wants to see them strike
AT_ONCE, TOGETHER, IN_TURN, OCTETS = "at once", "together", "in turn", "octets"  # how the client's pieces come
FINISH, HANG_UP, STAY, DRAIN, STOP = "finish", "hang up", "stay", "drain", "stop"  # what comes after them
HANDSHAKE = b"(TLS handshake)"  # a piece of a script: the client does its part of it, if it was told to
CLIENT = ("192.0.2.1", 4711)

KEYWORD_OR_WHOLE = re.compile(f"{USUAL}|{CLOSE}|{RESET}|{REFUSE}|(?s:.*)(?:\r\n|^)(?!...-)[^\n]*\r\n")

OWN = {value.octets for value in vars(replies).values() if isinstance(value, Reply)}
OWN_TEXT = re.compile(rb"220 willi\.example ESMTP Willi\r\n|250[- ]willi\.example\r\n(?:250[- ].*\r\n)*"
                      rb"|250 2\.0\.0 \d+ octets received\r\n")  # fmt: skip

VARIANTS: dict[str, dict[str, Setting]] = {
    "usual": {},
    "reject": {"bare_newline": "reject"},
    "small": {"max_message_bytes": "1kB", "max_recipients": 2, "max_errors": 3},
    "defer": {"mixed_recipients": "defer", "recipient_delimiter": "+"},
    "bare": {"extensions": [], "xclient": "no"},
    "strict": {"strict_8bitmime": True, "xclient": "require", "upstream_tls": "always"},
    "proxy": {"send_proxy": "v1"},
    "trusted": {"xclient_hosts": CLIENT[0]},
}


@dataclass(frozen=True)
class Script:
    """What both sides do. `upstream`: answers in the order of the questions, the greeting of each connection too.

    slow: they come after the worker has looked at all its sessions.
    """

    client: tuple[bytes, ...]
    pace: str = AT_ONCE
    end: str = FINISH
    upstream: tuple[str, ...] = ()
    features: tuple[str, ...] = ("PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "CHUNKING")
    variant: str = "usual"
    debug: bool = False
    slow: bool = False

    def to_json(self) -> str:
        fields = {**vars(self), "client": [piece.decode("latin-1") for piece in self.client]}
        return json.dumps(fields, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Script:
        fields: dict[str, Any] = json.loads(text)
        pieces = tuple(piece.encode("latin-1") for piece in fields.pop("client"))
        for key in ("upstream", "features"):
            fields[key] = tuple(fields[key])
        return Script(pieces, **fields)

    @property
    def is_patient(self) -> bool:
        """No limit of Willi's is meant to strike: nobody is silent, or says half a reply."""
        return self.end != STAY and all(KEYWORD_OR_WHOLE.fullmatch(answer) for answer in self.upstream)


class Table(InMemory):
    """Routes: b.example has one host, c.example two, broken.example an answer that nobody knows."""

    name = "table"

    def __init__(self, policy: Policy) -> None:
        self._routes = {
            "b.example": Route(parse_servers("192.0.2.25"), False, policy, self.name),
            "c.example": Route(parse_servers("192.0.2.26, 192.0.2.27:26"), False, policy, self.name),
        }

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        for key in keys:
            if key == "broken.example":
                raise LookupFailed("broken")
            yield Answer(self._routes.get(key))


@lru_cache
def tls_context() -> ssl.SSLContext:
    with tempfile.TemporaryDirectory() as directory:
        pair = Authority(Path(directory)).issue("willi.example")
        made = server_context([config.Certificate(str(pair.cert), str(pair.key))], "1.2")
    assert made
    return made


@lru_cache
def settings_of(variant: str, patient: bool) -> Settings:
    base: dict[str, Setting] = {"domain": "willi.example", **VARIANTS[variant]}
    base["mappings"] = {"all": {"type": "static", "server": "192.0.2.25"}}  # not used: see Table
    with tempfile.TemporaryDirectory() as directory:
        settings = config.load(str(write_config(Path(directory) / "willi.conf", base)))
    seconds = PATIENCE if patient else IMPATIENCE
    return replace(
        settings, read_timeout=seconds, write_timeout=seconds, connect_timeout=seconds, upstream_timeout=seconds,
        data_timeout=seconds,
    )  # fmt: skip


@lru_cache
def resolver() -> Resolver:
    made = Resolver(1.0, ("127.0.0.1", 9))  # nobody is there, and nobody need be
    for address in (CLIENT[0], "192.0.2.9"):
        made._names.put(address, "c.example", 1e9)
    return made


class Player:
    """Plays one script and looks at what came of it."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._plan = Plan(deque(script.upstream), script.features, script.slow)
        self._log: list[str] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a piece is a recv
        self._client = ClientEnd(ours)
        self._raw = RawSocket(fileno=theirs.detach())
        self._raw.setblocking(False)
        self._session: Session | None = None

    def play(self) -> Story:
        with gevent.Timeout(LONGEST, AssertionError("the session does not end")):
            running = gevent.spawn(self._run)
            worker = gevent.spawn(self._look_at_session) if self._script.slow else None
            self._talk()
            running.join()
            gevent.killall([worker] if worker else [])
        gevent.idle()  # the upstreams hear that it is over
        assert running.successful(), running.exception
        for fault in self._plan.faults:
            raise fault
        for upstream in self._plan.upstreams:
            assert upstream.left or upstream.ended, "an upstream connection is left open"
            upstream.end()
        return self._check()

    def _run(self) -> None:
        settings = settings_of(self._script.variant, self._script.is_patient)
        context = SessionContext(
            settings, [Table(settings.mappings[0].policy)],
            Connector(settings, upstream_contexts(settings), resolver()), resolver(), tls_context(), Counts(),
        )  # fmt: skip
        wire = Wire(self._raw, Deadline(), log.tracer("SID", "client"), settings.write_timeout)
        client = Client(*CLIENT, own=lambda: ("192.0.2.2", 25))
        self._session = Session("SID", context, wire, client, may_xclient=bool(settings.xclient_hosts))
        self._session.run()

    def _look_at_session(self) -> None:
        """What a worker does every now and then; here in each turn."""
        while True:
            gevent.idle()
            if self._session and not self._session.ending:
                if self._session.wire.holds_output():
                    self._session.wire.send_held()
                if self._script.end == HANG_UP and self._session.wire.tls_version is None:  # no TCP here
                    self._session.look_at_client()
            for upstream in self._plan.upstreams:
                upstream.say_late()

    def connect(self, _address: object, _port: int) -> RawSocket:
        if self._plan.answers and self._plan.answers[0] == REFUSE:
            self._plan.next()
            raise PeerGone("Connection refused")
        upstream = HostileUpstream(self._plan)
        gevent.get_hub().loop.run_callback(upstream.greet)
        return upstream.theirs

    def tell(self, _level: str, line: str) -> None:
        self._log.append(line)

    # The client

    def _talk(self) -> None:
        for piece in self._pieces():
            if piece == HANDSHAKE:
                gevent.idle()
                self._hear(wait=False)
                self._client.shake_hands()
                continue
            if self._script.pace in (IN_TURN, OCTETS):
                gevent.idle()
            if not self._client.send(piece):  # Willi has hung up
                break
        self._end()

    def _pieces(self) -> Iterator[bytes]:
        """As the pace wants them. A handshake stays what it is."""
        groups: list[list[bytes]] = [[]]
        for piece in self._script.client:
            if piece == HANDSHAKE:
                groups.append([])
            elif piece:
                groups[-1].append(piece)
        for number, group in enumerate(groups):
            if number:
                yield HANDSHAKE
            octets = b"".join(group)
            if self._script.pace == TOGETHER and group:
                yield octets
            elif self._script.pace == OCTETS:
                yield from [octets[i : i + 1] for i in range(len(octets))]
            elif self._script.pace != TOGETHER:
                yield from group

    def _end(self) -> None:
        end = self._script.end
        if end in (DRAIN, STOP):
            gevent.idle()
            assert self._session
            tell = self._session.drain if end == DRAIN else self._session.stop
            tell()
            gevent.idle()
        if end == HANG_UP:
            gevent.idle()
            self._hear(wait=False)
        else:
            if end != STAY:
                self._client.finish()
            self._hear(wait=True)
        self._client.close()

    def _hear(self, wait: bool) -> None:
        """wait: to the end; else what is there."""
        while self._client.hear(wait):
            pass

    # What must hold

    def _check(self) -> Story:
        self._check_log()
        story = Story()
        for number, phase in enumerate(self._client.phases):
            tls = re.search(rb"(?:^|\n)220 2\.0\.0 Ready to start TLS\r\n", phase.heard)
            heard = phase.heard[: tls.end()] if tls else phase.heard  # an alert may follow it
            self._check_replies(split_replies(heard))
            story = story.then(Reader(phase.said, heard, greeted=number > 0).read())
        if self._script.end == FINISH and self._script.is_patient and not self._was_cut_off(heard):
            assert not story.open, f"no answer to {story.open!r}"
        self._check_commands(story)
        if all(upstream.honest for upstream in self._plan.upstreams):
            self._check_messages(story)
        return story

    @staticmethod
    def _was_cut_off(heard: bytes) -> bool:
        last = split_replies(heard)[-1:] or [b""]
        last_words = b"421", b"221", b"220 2.0.0 Ready", b"500 5.5.2 Bare", b"501 5.5.4 Syntax: BDAT", LINE_TOO_LONG
        return last[0].startswith(last_words)

    def _check_log(self) -> None:
        for line in self._log:
            fields = parse_logfmt(line)
            assert line.isprintable() and "traceback" not in fields and fields["msg"] != "Internal error", line

    def _check_replies(self, heard: list[bytes]) -> None:
        """Each is one of ours, or an upstream has said it in this session, a 552 to MAIL perhaps."""
        said = _normal(b"".join(self._plan.said))
        for reply in heard:
            heard_from = _normal(reply) in said or _normal(re.sub(rb"(?m)^554", b"552", reply)) in said
            heard_from = heard_from or any(_is_readable_as(octets, reply) for octets in self._plan.said)
            assert reply in OWN or OWN_TEXT.fullmatch(reply) or heard_from, f"who said {reply!r}?"

    def _check_commands(self, story: Story) -> None:
        """No sender or recipient goes upstream that the client has not named, in a command of its own."""
        spoken = b"\n".join(story.commands + story.unheard)
        if self._script.end in (HANG_UP, STOP):  # replies may have been lost, by which commands are told from content
            spoken += b"".join(phase.said for phase in self._client.phases)
        for upstream in self._plan.upstreams:
            for command in upstream.commands if upstream.honest else ():
                if command.startswith((b"MAIL", b"RCPT")):
                    path = command[command.index(b"<") + 1 : command.rindex(b">")]
                    assert path in spoken, f"{command!r} was never said: {story.commands}"

    def _check_messages(self, story: Story) -> None:
        """What an upstream has whole, the client has sent whole; and each 250 is of the one that has it."""
        finished = list(story.messages)
        for upstream in self._plan.upstreams:
            for stored in upstream.stored:
                twin = next((sent for sent in finished if _is_the_same(sent, stored)), None)
                if twin is not None:
                    finished.remove(twin)
                else:
                    assert self._may_not_know(stored), f"{stored} is of no message of {story.messages}"
        for sent in finished:
            assert not sent.verdict.startswith(b"2"), f"nobody has {sent}"

    def _may_not_know(self, stored: Stored) -> bool:
        """The client has finished it, but something cut the verdict off: the one window that SMTP has."""
        cut_off = not self._script.is_patient or self._script.end in (HANG_UP, STOP)
        lines = re.split(rb"[\r\n]+", stored.content)  # which may lie in several chunks
        said = b"".join(phase.said for phase in self._client.phases)
        return cut_off and all(line.strip(b" ") in said for line in lines)


def _normal(octets: bytes) -> bytes:
    """Replies with the blank that may be missing after a code, and only the last line's code, which is what counts."""
    printable = re.sub(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", b"?", octets)
    return re.sub(rb"(?m)^\d{3}-", b"-", re.sub(rb"(?m)^(\d{3})\r$", rb"\1 \r", printable))


def _is_readable_as(octets: bytes, reply: bytes) -> bool:
    """Whether a badly framed verdict has this code and each line of this text."""
    printable = re.sub(rb"[\0-\x08\x0b-\x1f\x7f]", b"?", octets)
    texts = [line[4:] for line in reply.split(b"\r\n")]
    return reply[:3] in re.findall(rb"(?m)^\d{3}", octets) and all(text in printable for text in texts)


def _is_the_same(sent: Sent, stored: Stored) -> bool:
    if sent.envelope != stored.envelope:
        return False
    if stored.verdict[:1] in (b"2", b"4", b"5") and not re.search(rb"(?m)^22[01](?: .*)?\r$", stored.verdict):
        if _normal(sent.verdict) != _normal(stored.verdict):
            return False
    elif not sent.verdict.startswith(b"451"):  # it said nothing, or what is no verdict
        return False
    if stored.chunked:
        return sent.chunked and sent.content == stored.content
    wanted = as_passed_on(sent.content)
    return stored.content == wanted or (sent.chunked and stored.content == wanted + b"\r\n")


class _Told(log._Stdout):
    """A log whose lines the player gets."""

    def __init__(self, player: Player) -> None:
        super().__init__()
        self._player = player

    def octets(self, level: str, line: str) -> bytes:
        self._player.tell(level, line)
        return b""

    def send(self, octets: bytes) -> None:
        """It has it already."""


@contextmanager
def _in_place_of(player: Player, threshold: int) -> Iterator[None]:
    """Upstreams are the player's, and so is the log."""
    sink, connect = log._sink, connector._connect
    before = sink.target, sink.threshold
    sink.target, sink.threshold = _Told(player), threshold
    connector._connect = player.connect  # type: ignore[assignment]
    patience = upstream_module.LAST_WORDS_TIMEOUT
    if not player._script.is_patient:
        upstream_module.LAST_WORDS_TIMEOUT = IMPATIENCE
    try:
        yield
    finally:
        connector._connect = connect
        upstream_module.LAST_WORDS_TIMEOUT = patience
        sink.target, sink.threshold = before


def check_session(script: Script) -> Story:
    """Play it. Raises AssertionError at a fault."""
    player = Player(script)
    with _in_place_of(player, log.LEVELS["debug" if script.debug else "info"]):
        return player.play()
