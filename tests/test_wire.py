"""wire.py on real sockets: the peer is a plain socket, a thread with Python's ssl, or the openssl command."""

from __future__ import annotations

import gc
import socket
import ssl
import subprocess
import time
from _socket import socket as RawSocket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import gevent
import pytest

from tests.support.certificates import Authority, Pair
from tests.support.loopback import HOST, PATIENCE, wait_until
from willi_lib.net import replies as replies_module
from willi_lib.net import wire as module
from willi_lib.net.deadline import Deadline, TimeLimit, WireError
from willi_lib.net.replies import read_reply, read_verdict
from willi_lib.net.wire import BadFraming, LineTooLong, PeerGone, TlsFailed, Wire
from willi_lib.smtp.reply import BadReply, Reply
from willi_lib.smtp.syntax import MAX_COMMAND_LINE

SHORT = 0.05  # seconds of a limit that is to strike
NEXT = b"NOOP\r\n"


class Ends:
    """Makes connections: a Wire and the plain, blocking socket of its peer."""

    def __init__(self, ends: ExitStack) -> None:
        self._ends = ends
        self._threads = ends.enter_context(ThreadPoolExecutor())
        self.deadline = Deadline()
        ends.callback(self.deadline.close)

    def __call__(self, kind: int = socket.SOCK_STREAM, **options: Any) -> tuple[Wire, socket.socket]:
        """A pair of unix sockets; SOCK_SEQPACKET keeps the writes apart."""
        ours, peer = socket.socketpair(socket.AF_UNIX, kind)
        return self.wire(ours, **options), self._peer(peer)

    def tcp(self) -> tuple[Wire, socket.socket]:
        with socket.create_server((HOST, 0)) as listener:
            peer = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.wire(ours), self._peer(peer)

    def thread(self, work: Callable[[], object]) -> Future[object]:
        """The peer's part, where it has to block."""
        return self._threads.submit(work)

    def tls(self, pair: Pair, wire: Wire, peer: socket.socket) -> ssl.SSLSocket:
        """Shake hands as a server; the client is Python's."""
        done = self.thread(lambda: lenient().wrap_socket(peer))
        with self.deadline.limit(PATIENCE, "handshake"):
            wire.start_tls(pair.server_context(), server_side=True)
        secure = done.result(PATIENCE)
        assert isinstance(secure, ssl.SSLSocket)
        self._ends.callback(secure.close)
        return secure

    def wire(self, ours: socket.socket, **options: Any) -> Wire:
        raw = RawSocket(fileno=ours.detach())
        raw.setblocking(False)
        wire = Wire(raw, self.deadline, **options)
        self._ends.callback(wire.close)
        return wire

    def _peer(self, peer: socket.socket) -> socket.socket:
        self._ends.callback(peer.close)
        peer.settimeout(PATIENCE)
        return peer


@pytest.fixture
def connect() -> Iterator[Ends]:
    """No test waits longer than PATIENCE."""
    with ExitStack() as stack:
        ends = Ends(stack)
        with ends.deadline.limit(PATIENCE, "the test"):
            yield ends


@pytest.fixture(scope="module")
def pair(certificates: Authority) -> Pair:
    return certificates.issue("mx.example")


def lenient() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def drip(peer: socket.socket, octets: bytes) -> gevent.Greenlet[..., None]:
    """Send one octet in each turn of the loop: whoever waits sees each alone."""

    def send() -> None:
        with suppress(OSError):
            for position in range(len(octets)):
                peer.sendall(octets[position : position + 1])
                gevent.idle()

    return gevent.spawn(send)


def over_and_over(work: Callable[[], object], turn: Callable[[], object] = gevent.idle) -> gevent.Greenlet[..., None]:
    """Do it in every turn of the loop."""

    def run() -> None:
        while True:
            work()
            turn()

    return gevent.spawn(run)


def send_one_by_one(peer: socket.socket, *pieces: bytes) -> None:
    """Each in a turn of the loop."""

    def run() -> None:
        for piece in pieces:
            peer.sendall(piece)
            gevent.idle()

    gevent.spawn(run)


def whole(peer: socket.socket, octets: bytes) -> None:
    peer.sendall(octets)


def octet_by_octet(peer: socket.socket, octets: bytes) -> None:
    drip(peer, octets)


def all_but_the_last_octet(peer: socket.socket, octets: bytes) -> None:
    """So that the last CRLF comes in two reads."""
    peer.sendall(octets[:-1])
    drip(peer, octets[-1:])


def with_the_next_command_attached(peer: socket.socket, octets: bytes) -> None:
    peer.sendall(octets + NEXT)


WAYS = [whole, octet_by_octet, all_but_the_last_octet, with_the_next_command_attached]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def feed(request: pytest.FixtureRequest) -> Callable[[socket.socket, bytes], None]:
    way: Callable[[socket.socket, bytes], None] = request.param
    return way


# Lines


@pytest.mark.parametrize("line", [b"", b"QUIT", b" ", b"\0\xff\x85 \t", b"RCPT TO:<ann@a.example>", b"x" * 2046])
def test_a_line_ends_with_crlf_and_is_returned_without_it(connect, feed, line):
    wire, peer = connect()
    feed(peer, line + b"\r\n")
    assert wire.read_line() == line
    if feed is with_the_next_command_attached:
        assert wire.buffered()
        assert wire.read_line() == b"NOOP"
    assert not wire.buffered()


@pytest.mark.parametrize("limit", [2, 3, 512, MAX_COMMAND_LINE])
def test_a_line_as_long_as_the_limit_is_read_and_a_longer_one_is_dropped(connect, feed, limit):
    wire, peer = connect()
    feed(peer, b"x" * (limit - 2) + b"\r\n")
    assert wire.read_line(limit) == b"x" * (limit - 2)
    if feed is with_the_next_command_attached:
        assert wire.read_line() == b"NOOP"
    feed(peer, b"x" * (limit - 1) + b"\r\n")
    with pytest.raises(LineTooLong):
        wire.read_line(limit)
    if feed is with_the_next_command_attached:
        assert wire.read_line() == b"NOOP"
    assert not wire.buffered()


@pytest.mark.parametrize("length", [2047, 2048, 2049, 16383, 16384, 16385, 100_000])
def test_a_long_line_is_read_to_its_end_and_the_next_line_is_right(connect, length):
    wire, peer = connect()
    sender = connect.thread(lambda: peer.sendall(b"x" * length + b"\r\nQUIT\r\n"))
    with pytest.raises(LineTooLong):
        wire.read_line()
    assert wire.read_line() == b"QUIT"
    sender.result(PATIENCE)


def test_a_long_line_is_not_kept(connect):
    wire, peer = connect()
    sender = connect.thread(lambda: peer.sendall(b"x" * 5_000_000 + b"\r\n"))
    sizes: list[int] = []
    watcher = over_and_over(lambda: sizes.append(len(wire._buffer)))
    with pytest.raises(LineTooLong):
        wire.read_line()
    watcher.kill()
    sender.result(PATIENCE)
    assert max(sizes) <= MAX_COMMAND_LINE + module.COMMAND_READ


def test_the_crlf_of_a_long_line_may_come_in_two_reads(connect):
    wire, peer = connect()
    peer.sendall(b"x" * 3000)
    send_one_by_one(peer, b"x" * 3000 + b"\r", b"\nQUIT\r\n")
    with pytest.raises(LineTooLong):
        wire.read_line()
    assert wire.read_line() == b"QUIT"


@pytest.mark.parametrize("octets", [
    b"\n", b"QUIT\n", b"QUIT\n\r\n", b"\rQUIT\r\n", b"QU\nIT\r\n", b"QU\rIT\r\n", b"QUIT\r\r\n", b"\r\r\n", b"\n\r\n",
    b"\r\0\r\n", b"QUIT\r \n\r\n",
])  # fmt: skip
def test_cr_or_lf_alone_is_never_an_end_nor_part_of_a_line(connect, feed, octets):
    wire, peer = connect()
    feed(peer, octets)
    with pytest.raises(BadFraming, match="bare CR or LF"):
        wire.read_line()


def test_a_cr_at_the_end_of_what_came_may_still_become_a_line_end(connect):
    wire, peer = connect()
    peer.sendall(b"QUIT\r")
    send_one_by_one(peer, b"\n")
    assert wire.read_line() == b"QUIT"
    peer.sendall(b"QUIT\r")
    send_one_by_one(peer, b"X")
    with pytest.raises(BadFraming):
        wire.read_line()


def test_complete_lines_can_be_seen_before_they_are_read(connect):
    wire, peer = connect()
    peer.sendall(b"MAIL\r\nRCPT 1\r\n\r\nRCPT 2\r\nDAT")
    assert wire.read_line() == b"MAIL"
    assert wire.peek_lines() == [b"RCPT 1", b"", b"RCPT 2"]
    assert wire.peek_lines() == [b"RCPT 1", b"", b"RCPT 2"]
    assert [wire.read_line() for _ in range(3)] == [b"RCPT 1", b"", b"RCPT 2"]
    assert wire.peek_lines() == []
    peer.sendall(b"A\r\n")
    assert wire.read_line() == b"DATA"
    assert wire.peek_lines() == []


def test_of_very_many_lines_only_the_next_ones_are_seen(connect):
    """A look at all of them for each recipient would be quadratic."""
    wire, peer = connect()
    peer.sendall(b"NOOP\r\n")
    assert wire.read_some() == b"NOOP\r\n"
    wire.unread(b"RCPT\r\n" * module.COMMAND_READ)
    assert wire.peek_lines() == [b"RCPT"] * (module.COMMAND_READ // 6)
    assert [wire.read_line() for _ in range(module.COMMAND_READ)] == [b"RCPT"] * module.COMMAND_READ


def test_no_line_is_seen_in_half_of_a_line_end(connect):
    wire, peer = connect()
    peer.sendall(b"ab\r\ncd")
    assert wire.read_some(3) == b"ab\r"
    assert wire.peek_lines() == []
    assert wire.read_some() == b"\ncd"


def test_the_trace_sees_each_line_and_each_write(connect):
    seen: list[tuple[str, bytes]] = []
    wire, peer = connect(trace=lambda direction, octets: seen.append((direction, octets)))
    peer.sendall(b"EHLO c.example\r\nQUIT\r\n")
    wire.read_line()
    wire.write(b"250 mx.example\r\n")
    wire.read_line()
    wire.send(b"content")
    assert seen == [("<", b"EHLO c.example"), (">", b"250 mx.example\r\n"), ("<", b"QUIT")]


# The peer's end


def test_the_end_of_the_connection_is_an_end_also_inside_a_line(connect):
    for octets in (b"", b"QUI", b"QUIT\r", b"x" * 5000):
        wire, peer = connect()
        peer.sendall(octets)
        peer.close()
        with pytest.raises(PeerGone, match="connection closed"):
            wire.read_line()


def test_lines_before_the_end_of_the_connection_are_still_read(connect):
    wire, peer = connect()
    peer.sendall(b"QUIT\r\nRS")
    peer.close()
    assert wire.read_line() == b"QUIT"
    with pytest.raises(PeerGone):
        wire.read_line()


def test_a_reset_has_the_words_of_the_system(connect):
    wire, peer = connect.tcp()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    with pytest.raises(PeerGone, match="Connection reset by peer"):
        wire.read_line()
    with pytest.raises(PeerGone):
        wire.send(b"250 Ok\r\n")


# Octets


def test_content_comes_as_it_is_and_at_the_most_as_much_as_asked(connect):
    wire, peer = connect()
    peer.sendall(b"BDAT 5\r\na\nb\r\0rest\r\n")
    assert wire.read_line() == b"BDAT 5"
    assert wire.read_some(3) == b"a\nb"
    assert wire.read_some(2) == b"\r\0"
    assert wire.read_some(100) == b"rest\r\n"
    peer.sendall(b"more")
    assert wire.read_some(1) == b"m"
    assert wire.buffered()
    assert wire.read_some() == b"ore"
    assert not wire.buffered()


def test_what_is_given_back_comes_again_before_all_else(connect):
    wire, peer = connect()
    peer.sendall(b"content\r\n.\r\nRSET\r\nQU")
    assert wire.read_some() == b"content\r\n.\r\nRSET\r\nQU"
    wire.unread(b"RSET\r\nQU")
    assert wire.peek_lines() == [b"RSET"]
    assert wire.read_some(1) == b"R"
    wire.unread(b"R")
    wire.unread(b"")
    peer.sendall(b"IT\r\n")
    assert [wire.read_line(), wire.read_line()] == [b"RSET", b"QUIT"]


def test_a_big_message_comes_whole_in_large_pieces(connect):
    content = bytes(range(256)) * 40_000
    wire, peer = connect.tcp()
    sender = connect.thread(lambda: peer.sendall(content))
    pieces: list[bytes] = []
    while sum(map(len, pieces)) < len(content):
        pieces.append(wire.read_some())
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= module.LARGEST_BODY_READ
    sender.result(PATIENCE)


def test_pending_tells_octets_and_the_end_from_nothing_and_does_not_wait(connect):
    wire, peer = connect()
    assert not wire.pending()
    peer.sendall(b"421 4.3.2 Going down\r\n")
    assert wire.pending() and wire.pending()
    assert read_reply(wire) == Reply(421, (b"4.3.2 Going down",))
    assert not wire.pending()
    peer.close()
    assert wire.pending()


# Replies


@pytest.mark.parametrize(("octets", "reply"), [
    (b"250 Ok\r\n", Reply(250, (b"Ok",))),
    (b"250\r\n", Reply(250, (b"",))),
    (b"250 \r\n", Reply(250, (b"",))),
    (b"250-mx\r\n250-SIZE\r\n250 8BITMIME\r\n", Reply(250, (b"mx", b"SIZE", b"8BITMIME"))),
    (b"550-5.1.1 no \xff\0\r\n550 5.1.1 bye\r\n", Reply(550, (b"5.1.1 no \xff?", b"5.1.1 bye"))),
    (b"250-" + b"x" * 4090 + b"\r\n250 y\r\n", Reply(250, (b"x" * 4090, b"y"))),
    (b"250-x\r\n" * 199 + b"250 y\r\n", Reply(250, (b"x",) * 199 + (b"y",))),
])  # fmt: skip
def test_a_reply_is_read_with_all_its_lines(connect, feed, octets, reply):
    wire, peer = connect()
    feed(peer, octets)
    assert read_reply(wire) == reply


@pytest.mark.parametrize("octets", [
    b"\r\n", b"Ok\r\n", b"45\r\n", b"3\r\n", b"2500 Ok\r\n", b"250_Ok\r\n", b"199 Ok\r\n", b"600 Ok\r\n",
    b" 250 Ok\r\n",
    b"250-a\r\nb\r\n",
    b"250 " + b"x" * 4091 + b"\r\n",
    b"250-x\r\n" * 200,
])  # fmt: skip
def test_what_is_no_reply_is_refused(connect, feed, octets):
    wire, peer = connect()
    feed(peer, octets)
    with pytest.raises(BadReply):
        read_reply(wire)


@pytest.mark.parametrize("line", [b"2", b"250-" + b"x" * 1000 + b"\r\n", b"250-\r\n"], ids=["a line", "lines", "empty"])
def test_a_reply_without_end_is_refused_as_soon_as_it_is_too_long(connect, line):
    """What a peer still sends is not waited for."""
    wire, peer = connect()
    feeding = connect.thread(lambda: peer.sendall(line * (500_000 // len(line))))
    with pytest.raises(BadReply, match="a reply"), wire.deadline.limit(PATIENCE, "one reply"):
        read_reply(wire)
    wire.close()
    feeding.exception(PATIENCE)


@pytest.mark.parametrize(("octets", "verdict"), [
    (b"250-a\r\n250 b\r\n", (Reply(250, (b"a", b"b")), True)),
    (b"250 a\nb\r\n", (Reply(250, (b"a", b"b")), False)),
    (b"250 a\r\r\n", (Reply(250, (b"a",)), False)),
    (b"250-a\r\nb\r\n", (Reply(250, (b"a", b"b")), False)),
    (b"550 " + b"x" * 5000 + b"\r\n", (Reply(550, (b"x" * 506,)), False)),
    (b"\r\n250 a\r\n", (Reply(250, (b"a",)), False)),
    (b"\n250 a\r\n", (Reply(250, (b"a",)), False)),
    (b" 250 a\r\n", (Reply(250, (b"a",)), False)),
    (b"Ok\r\n250 a\r\n", (Reply(250, (b"a",)), False)),
    (b"warning\n\r\n2500\r\n550-a\r\n550 b\r\n", (Reply(550, (b"a", b"b")), False)),
])  # fmt: skip
def test_a_verdict_whose_code_can_be_read_counts(connect, octets, verdict):
    wire, peer = connect()
    peer.sendall(octets)
    assert read_verdict(wire) == verdict


@pytest.mark.parametrize("octets", [b"250 2.0.0 queued", b"250-2.0.0 queued\r\n", b"250"])
@pytest.mark.parametrize("end", ["close", "silence"])
def test_a_verdict_whose_end_does_not_come_counts(connect, monkeypatch, octets, end):
    monkeypatch.setattr(replies_module, "REST_OF_VERDICT", SHORT)
    wire, peer = connect()
    peer.sendall(octets)
    if end == "close":
        peer.close()
    reply, in_order = read_verdict(wire)
    assert (reply.code, in_order) == (250, False)


def test_until_the_code_of_a_verdict_is_there_it_may_take_the_whole_time_of_a_verdict(connect, monkeypatch):
    monkeypatch.setattr(replies_module, "REST_OF_VERDICT", 0.0)
    wire, peer = connect()
    peer.sendall(b"2")
    sending = connect.thread(lambda: (wait_until(wire.buffered, "the first octet"), peer.sendall(b"50 Ok\r\n")))
    reply, _ = read_verdict(wire)
    assert reply.code == 250
    sending.exception(PATIENCE)


@pytest.mark.parametrize("line", [b"warning\r\n", b"\r\n", b"25 \n"])
def test_a_verdict_may_come_long_after_a_line_that_is_none(connect, monkeypatch, line):
    monkeypatch.setattr(replies_module, "REST_OF_VERDICT", 0.0)
    wire, peer = connect()
    seen: list[bytes] = []
    wire.trace = lambda _, octets: seen.append(octets)
    peer.sendall(line)
    sending = connect.thread(lambda: (wait_until(lambda: seen, "the first line"), peer.sendall(b"250 Ok\r\n")))
    assert read_verdict(wire) == (Reply(250, (b"Ok",)), False)
    sending.exception(PATIENCE)


@pytest.mark.parametrize("octets", [b"25", b"Ok\r\n", b"Ok\r\n25", b"x\r\n" * 300 + b"250 Ok\r\n", b"x" * 5000])
def test_what_has_no_code_is_no_verdict(connect, octets):
    wire, peer = connect()
    peer.sendall(octets)
    peer.close()
    with pytest.raises((BadReply, WireError)):
        read_verdict(wire)


# Time


def test_a_limit_ends_a_wait_and_says_of_what(connect):
    wire, _ = connect()
    began = time.monotonic()
    with pytest.raises(TimeLimit, match="waiting for a command"), wire.deadline.limit(SHORT, "waiting for a command"):
        wire.read_line()
    assert SHORT <= time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize("work", [Wire.read_line, read_reply], ids=["line", "reply"])
def test_a_peer_that_sends_one_octet_at_a_time_hits_the_limit(connect, work):
    wire, peer = connect()
    dripping = drip(peer, b"2" * 10_000_000)
    with pytest.raises(TimeLimit), wire.deadline.limit(SHORT, "one line"):
        work(wire)
    dripping.kill()


def test_a_peer_whose_line_or_reply_never_ends_hits_the_limit(connect):
    wire, peer = connect()
    flood = over_and_over(lambda: peer.sendall(b"x" * 1000))
    with pytest.raises(TimeLimit), wire.deadline.limit(SHORT, "one line"):
        wire.read_line()
    flood.kill()


def test_the_nearer_of_two_limits_strikes_and_the_outer_one_stays_in_force(connect):
    wire, _ = connect()
    began = time.monotonic()
    with pytest.raises(TimeLimit, match="outer"), wire.deadline.limit(3 * SHORT, "outer"):
        with pytest.raises(TimeLimit, match="inner"), wire.deadline.limit(SHORT, "inner"):
            wire.read_line()
        assert not wire.deadline.overdue() or time.monotonic() - began >= 3 * SHORT
        wire.read_line()


def test_an_inner_limit_that_is_further_away_changes_nothing(connect):
    wire, _ = connect()
    outer, inner = wire.deadline.limit(SHORT, "outer"), wire.deadline.limit(PATIENCE, "inner")
    with pytest.raises(TimeLimit, match="outer"), outer, inner:
        wire.read_line()


def test_an_outer_limit_that_strikes_inside_an_inner_one_strikes_again_at_the_next_wait(connect):
    wire, _ = connect()
    with pytest.raises(TimeLimit, match="outer"), wire.deadline.limit(SHORT, "outer"):
        with pytest.raises(TimeLimit, match="outer"), wire.deadline.limit(PATIENCE, "inner"):
            wire.read_line()
        assert wire.deadline.overdue()
        with wire.deadline.limit(PATIENCE, "a second attempt"):
            wire.read_line()


def test_a_limit_that_has_passed_strikes_at_the_next_wait_only(connect):
    wire, peer = connect()
    peer.sendall(NEXT * 2)
    assert wire.read_line() == b"NOOP"
    with wire.deadline.until(time.monotonic() - 1, "the past"):
        assert wire.read_line() == b"NOOP"
        with pytest.raises(TimeLimit, match="the past"):
            wire.read_line()


def test_a_limit_that_was_kept_never_strikes_in_a_later_block(connect):
    wire, peer = connect()
    for _ in range(20):
        peer.sendall(NEXT)
        with wire.deadline.limit(1.0, "an old one"):  # what is there is read in milliseconds
            assert wire.read_line() == b"NOOP"
    gevent.spawn_later(1.2, peer.sendall, NEXT)
    with wire.deadline.limit(PATIENCE, "a new one"):
        assert wire.read_line() == b"NOOP"
    gevent.spawn_later(2 * SHORT, peer.sendall, NEXT)
    assert wire.read_line() == b"NOOP"


def test_limits_of_one_session_do_not_strike_in_another(connect):
    def session(seconds: float) -> str:
        deadline = Deadline()
        try:
            with deadline.limit(seconds, f"{seconds}"):
                gevent.sleep(PATIENCE)
        except TimeLimit as limit:
            return str(limit)
        finally:
            deadline.close()
        return ""

    seconds = [SHORT * number / 10 for number in range(1, 30)]
    sessions = [gevent.spawn(session, number) for number in seconds]
    assert [one.get() for one in sessions] == [f"timed out {number}" for number in seconds]


def timers() -> int:
    """Timers that the loop still counts."""
    gc.collect()
    return sum(type(thing).__name__ == "timer" and thing.active for thing in gc.get_objects())


def test_a_closed_clock_leaves_no_timer_behind():
    before = timers()
    deadline = Deadline()
    for _ in range(1000):
        with (
            deadline.limit(1000, "outer"),
            deadline.limit(100, "inner"),
            deadline.until(time.monotonic() + 10, "innermost"),
        ):
            pass
    assert timers() == before + 1  # one for all of them
    deadline.close()
    deadline.close()
    assert timers() == before


def test_an_interruption_reaches_the_session_where_it_waits_unless_it_has_come_to_do_something_else(connect):
    class Ending(Exception):
        pass

    wire, peer = connect()
    wire.deadline.interrupt(Ending(), unless=lambda: False)
    with pytest.raises(Ending):
        wire.read_line()
    wire.deadline.interrupt(Ending(), unless=lambda: True)
    gevent.spawn(peer.sendall, NEXT)
    assert wire.read_line() == b"NOOP"


# Writing


def test_replies_go_out_in_one_write_when_the_next_command_is_awaited(connect):
    wire, peer = connect(socket.SOCK_SEQPACKET)
    peer.sendall(NEXT * 3)
    for number in range(3):
        assert wire.read_line() == b"NOOP"
        wire.write(b"250 %d\r\n" % number)
    peer.sendall(NEXT)
    assert wire.read_line() == b"NOOP"
    assert peer.recv(1000) == b"250 0\r\n250 1\r\n250 2\r\n"


def test_replies_that_nobody_fetches_yet_are_not_piled_up(connect):
    wire, peer = connect(socket.SOCK_SEQPACKET)
    reply = b"250 " + b"x" * 994 + b"\r\n"
    for _ in range(66):
        wire.write(reply)
    assert len(peer.recv(1_000_000)) == 66_000 > module.MAX_PENDING_OUTPUT
    peer.setblocking(False)
    wire.write(reply)
    with pytest.raises(BlockingIOError):
        peer.recv(1000)
    wire.flush()
    assert peer.recv(2000) == reply
    wire.flush()
    with pytest.raises(BlockingIOError):
        peer.recv(1000)


def test_held_replies_can_be_sent_without_their_owner(connect):
    wire, peer = connect()
    assert not wire.holds_output()
    wire.write(b"250 Ok\r\n")
    assert wire.holds_output()
    wire.send_held()
    assert not wire.holds_output()
    assert peer.recv(1000) == b"250 Ok\r\n"


@pytest.mark.parametrize("secured", [False, True], ids=["clear", "TLS"])
def test_held_replies_that_the_kernel_does_not_take_go_out_later_in_order(connect, pair, secured):
    wire, peer = connect.tcp()
    if secured:
        peer = connect.tls(pair, wire, peer)
    expected = b""
    twice = False
    while not twice:  # until the peer's window is full; the kernel may find room after it had none
        if not wire.holds_output():
            reply = b"250 %07d " % len(expected) + b"x" * 50_000 + b"\r\n"
            wire.write(reply)
            expected += reply
        wire.send_held()
        held = wire.holds_output()
        wire.send_held()
        twice = held and wire.holds_output()
    received = connect.thread(lambda: read_exactly(peer, len(expected) + 8))
    wire.write(b"250 Ok\r\n")
    wire.flush()
    with connect.deadline.limit(PATIENCE, "the peer"):
        while not received.done():
            gevent.idle()
    assert received.result() == expected + b"250 Ok\r\n"


def test_the_rest_of_held_replies_goes_out_before_the_peer_is_waited_for(connect, pair):
    """Under TLS it is encrypted already. There is a bound to that, too."""
    wire, peer = connect.tcp()
    peer = connect.tls(pair, wire, peer)
    reply = b"250 " + b"x" * 50_000 + b"\r\n"
    written = 0
    while not wire._output:  # until the kernel takes no more
        wire.write(reply)
        wire.send_held()
        written += len(reply)
    assert wire._clear_out and wire._clear_out.pending < 2 * len(reply)
    wire._output, written = b"", written - len(reply)  # so that only the encrypted rest is left

    def read_and_answer() -> bytes:
        received = read_exactly(peer, written)
        peer.sendall(NEXT)
        return received

    received = connect.thread(read_and_answer)
    with connect.deadline.limit(PATIENCE, "the peer"):
        assert wire.read_line() == NEXT.strip()
    assert received.result(PATIENCE) == reply * (written // len(reply))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("last_words", [b"", b"QUIT\r\n"], ids=["goodbye", "QUIT"])
def test_a_peer_that_has_closed_its_side_has_hung_up_unless_it_said_something(connect, pair, version, last_words):
    wire, peer = connect.tcp()
    context = lenient()
    context.minimum_version = context.maximum_version = version
    done = connect.thread(lambda: context.wrap_socket(peer))
    wire.start_tls(pair.server_context(), server_side=True)
    secure = done.result(PATIENCE)
    assert isinstance(secure, ssl.SSLSocket)
    secure.settimeout(0)
    if last_words:
        secure.send(last_words)
    else:
        with suppress(ssl.SSLWantReadError):
            secure.unwrap()
    assert not wire.has_hung_up()
    socket.socket.shutdown(secure, socket.SHUT_WR)
    if last_words:
        assert not wire.has_hung_up()
        assert wire.read_line() == last_words.strip()
    wait_until(wire.has_hung_up, "the end")


def read_exactly(peer: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (octets := peer.recv(min(65536, size - len(received)))):
        received += octets
    return received


@pytest.mark.parametrize("secured", [False, True], ids=["clear", "TLS"])
def test_held_replies_to_a_peer_that_has_gone_are_the_owners_affair(connect, pair, secured):
    wire, peer = connect.tcp()
    if secured:
        connect.tls(pair, wire, peer).close()
    peer.close()
    wire.write(b"250 Ok\r\n")
    wire.send_held()  # the first one makes the peer's kernel reset the connection
    wire.write(b"250 Ok\r\n")
    wire.send_held()
    wire.write(b"250 Ok\r\n")
    with pytest.raises(PeerGone):
        wire.read_line()


def test_content_goes_out_behind_the_lines_that_were_kept_back(connect):
    wire, peer = connect()
    wire.write(b"BDAT 4\r\n")
    wire.send(b"abcd")
    assert peer.recv(1000) == b"BDAT 4\r\nabcd"


def test_a_peer_that_does_not_read_hits_the_limit_and_fills_no_memory(connect):
    wire, _ = connect()
    reply = b"250 " + b"x" * 994 + b"\r\n"
    written = 0
    with pytest.raises(TimeLimit, match="sending"), wire.deadline.limit(SHORT, "sending"):
        for _ in range(100_000):
            wire.write(reply)
            written += len(reply)
    assert written < 10_000_000
    assert sum(map(len, wire._output)) <= module.MAX_PENDING_OUTPUT


def test_a_peer_that_reads_slowly_gets_everything_in_order(connect):
    content = bytes(range(256)) * 10_000
    wire, peer = connect()
    sending = gevent.spawn(wire.send, content)
    received = b""
    peer.setblocking(False)
    while len(received) < len(content):
        with suppress(BlockingIOError):
            received += peer.recv(10_000)
        gevent.idle()
    assert received == content
    sending.get()


def test_a_peer_that_reads_one_octet_at_a_time_hits_the_limit(connect):
    wire, peer = connect()
    reading = over_and_over(lambda: peer.recv(1))
    with pytest.raises(TimeLimit), wire.deadline.limit(SHORT, "sending"):
        wire.send(b"x" * 50_000_000)
    reading.kill()


def test_nothing_follows_a_reply_that_was_cut_off(connect):
    wire, peer = connect()
    with pytest.raises(TimeLimit), wire.deadline.limit(SHORT, "sending"):
        wire.send(b"250 Ok\r\n" * 1_000_000)
    wire.write(b"421 4.4.2 Timeout, closing connection\r\n")
    wire.hang_up()
    received = b"".join(iter(lambda: peer.recv(100_000), b""))
    assert received == (b"250 Ok\r\n" * 1_000_000)[: len(received)]


def test_a_peer_that_does_not_read_hits_the_write_timeout_of_its_wire_if_no_limit_is_nearer(connect):
    wire, _ = connect(write_timeout=SHORT)
    with pytest.raises(TimeLimit, match="sending"):
        wire.send(b"x" * 10_000_000)


def test_writing_to_a_peer_that_has_gone_is_a_wire_error(connect):
    wire, peer = connect()
    peer.close()
    with pytest.raises(PeerGone):
        wire.send(b"250 Ok\r\n")


# TLS


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_as_a_server_it_talks_tls_with_the_standard_library(connect, pair, certificates, version):
    def client() -> tuple[str | None, bytes]:
        context = certificates.client_context()
        context.maximum_version = version
        with context.wrap_socket(peer, server_hostname="mx.example") as secure:
            secure.sendall(b"EHLO c.example\r\n")
            return secure.version(), secure.recv(1000)

    wire, peer = connect()
    talk = connect.thread(client)
    wire.start_tls(pair.server_context(), server_side=True)
    assert wire.read_line() == b"EHLO c.example"
    wire.write(b"250 mx.example\r\n")
    wire.flush()
    assert talk.result(PATIENCE) == (wire.tls_version, b"250 mx.example\r\n")
    assert wire.tls_version == version.name.replace("_", ".")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_as_a_client_it_talks_tls_with_the_standard_library(connect, pair, certificates, version):
    def server() -> bytes:
        context = pair.server_context()
        context.maximum_version = version
        with context.wrap_socket(peer, server_side=True) as secure:
            secure.sendall(b"220 mx.example\r\n")
            answer: bytes = secure.recv(1000)
            return answer

    wire, peer = connect()
    talk = connect.thread(server)
    assert wire.tls_version is None
    wire.start_tls(certificates.client_context(), server_side=False, server_name="mx.example")
    assert read_reply(wire) == Reply(220, (b"mx.example",))
    wire.send(b"QUIT\r\n")
    assert talk.result(PATIENCE) == b"QUIT\r\n"
    assert wire.tls_version == version.name.replace("_", ".")


@pytest.mark.parametrize("name", ["mx.example", "other.example", "127.0.0.1"])
def test_a_client_that_verifies_talks_only_to_whom_the_certificate_names(connect, pair, certificates, name):
    def server() -> None:
        with suppress(ssl.SSLError):
            pair.server_context().wrap_socket(peer, server_side=True)

    wire, peer = connect()
    connect.thread(server)
    shake_hands = (certificates.client_context(), False, name)
    if name == "mx.example":
        wire.start_tls(*shake_hands)
        assert wire.tls_version
    else:
        with pytest.raises(TlsFailed, match=f"TLS handshake: .* mismatch, certificate is not valid for '{name}'"):
            wire.start_tls(*shake_hands)
        assert wire.tls_version is None


@pytest.mark.parametrize("name", ["", ".example", "a..example", "x" * 64 + ".example", "a\0b.example"])
def test_a_name_that_tls_cannot_ask_for_is_a_failed_handshake_and_no_bug(connect, certificates, name):
    wire, _ = connect()
    with pytest.raises(TlsFailed, match="TLS handshake: "):
        wire.start_tls(certificates.client_context(), server_side=False, server_name=name)


def test_lines_come_over_tls_whole_octet_by_octet_and_many_at_once(connect, pair):
    wire, peer = connect.tcp()
    secure = connect.tls(pair, wire, peer)
    secure.sendall(b"EHLO c.example\r\n")
    assert wire.read_line() == b"EHLO c.example"
    drip(secure, b"MAIL FROM:<>\r\n" + b"x" * 3000 + b"\r\nRSET\r\n")
    assert wire.read_line() == b"MAIL FROM:<>"
    with pytest.raises(LineTooLong):
        wire.read_line()
    assert wire.read_line() == b"RSET"
    for number in range(100):  # a record each
        secure.sendall(b"NOOP %d\r\n" % number)
    assert [wire.read_line() for _ in range(100)] == [b"NOOP %d" % number for number in range(100)]
    secure.sendall(b"bare\nLF\r\n")
    with pytest.raises(BadFraming):
        wire.read_line()


def test_a_big_message_comes_and_goes_over_tls_octet_for_octet(connect, pair):
    content = bytes(range(256)) * 12_345
    wire, peer = connect.tcp()
    secure = connect.tls(pair, wire, peer)

    def echo() -> bool:
        secure.sendall(content)
        received = b""
        while len(received) < len(content):
            received += secure.recv(100_000)
        return received == content

    talk = connect.thread(echo)
    received = b""
    while len(received) < len(content):
        piece = wire.read_some()
        assert len(piece) <= module.LARGEST_BODY_READ
        received += piece
    assert received == content
    wire.send(content)
    assert talk.result(PATIENCE) is True


def test_pending_sees_octets_and_the_end_under_tls_too(connect, pair):
    wire, peer = connect.tcp()
    secure = connect.tls(pair, wire, peer)
    assert not wire.pending()
    secure.sendall(b"250 Ok\r\n")
    wait_until(wire.pending, "octets")
    assert read_reply(wire) == Reply(250, (b"Ok",))
    assert not wire.pending()
    connect.thread(lambda: secure.unwrap())
    wait_until(wire.pending, "close_notify")


def test_plain_text_that_came_along_with_starttls_is_thrown_away(connect, pair):
    wire, peer = connect()
    peer.sendall(b"STARTTLS\r\nMAIL FROM:<eve@a.example>\r\nRCPT TO")
    assert wire.read_line() == b"STARTTLS"
    assert wire.buffered()
    secure = connect.tls(pair, wire, peer)
    assert not wire.buffered()
    secure.sendall(b":<bob@b.example>\r\n")
    assert wire.read_line() == b":<bob@b.example>"


def test_plain_text_after_the_answer_to_starttls_breaks_the_handshake(connect, pair):
    wire, peer = connect()
    peer.sendall(b"EHLO eve.example\r\n")
    with pytest.raises(TlsFailed, match="TLS handshake: "):
        wire.start_tls(pair.server_context(), server_side=True)


@pytest.mark.parametrize("garbage", [
    b"\0" * 1000, b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x15\x03\x03\x00\x02\x02\x28",
])  # fmt: skip
def test_garbage_in_the_handshake_is_a_wire_error(connect, pair, garbage):
    for server_side, context in ((True, pair.server_context()), (False, lenient())):
        wire, peer = connect()
        peer.sendall(garbage)
        with pytest.raises(TlsFailed, match="TLS handshake: "):
            wire.start_tls(context, server_side)


def test_who_fails_the_handshake_is_told_why(connect, pair):
    wire, peer = connect()
    peer.sendall(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00")  # a ClientHello without anything
    with pytest.raises(TlsFailed):
        wire.start_tls(pair.server_context(), server_side=True)
    assert peer.recv(1000)[:1] == b"\x15"  # an alert


def test_a_slow_handshake_hits_the_limit(connect, pair):
    wire, peer = connect()
    hello, answer = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        lenient().wrap_bio(answer, hello).do_handshake()
    dripping = drip(peer, hello.read()[:-1])
    with pytest.raises(TimeLimit, match="TLS handshake"), wire.deadline.limit(SHORT, "TLS handshake"):
        wire.start_tls(pair.server_context(), server_side=True)
    dripping.kill()


def test_the_end_of_the_connection_in_the_handshake_is_a_wire_error(connect, pair):
    wire, peer = connect()
    peer.sendall(b"\x16\x03\x01")
    peer.close()
    with pytest.raises(PeerGone, match="in the TLS handshake"):
        wire.start_tls(pair.server_context(), server_side=True)


@pytest.mark.parametrize("polite", [True, False], ids=["with close_notify", "without"])
def test_the_end_under_tls_is_an_end_with_and_without_close_notify(connect, pair, polite):
    wire, peer = connect.tcp()
    secure = connect.tls(pair, wire, peer)
    secure.sendall(b"RSET\r\nQU")
    if polite:
        saying = connect.thread(lambda: suppress(OSError, ssl.SSLError).__enter__() or secure.unwrap())
    else:
        secure.shutdown(socket.SHUT_WR)
    assert wire.read_line() == b"RSET"
    with pytest.raises(PeerGone, match="connection closed"):
        wire.read_line()
    if polite:
        wire.hang_up()
        saying.result(PATIENCE)


def test_an_end_that_comes_along_with_the_last_octets_is_an_end_though_tcp_stays_open(connect, pair):
    wire, peer = connect.tcp()
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = lenient().wrap_bio(received, to_send)

    def shake_hands() -> None:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.sendall(to_send.read())
                received.write(peer.recv(65536))
        peer.sendall(to_send.read())

    done = connect.thread(shake_hands)
    wire.start_tls(pair.server_context(), server_side=True)
    done.result(PATIENCE)
    client.write(b"RSET\r\nQU")
    with suppress(ssl.SSLWantReadError):  # our close_notify
        client.unwrap()
    peer.sendall(to_send.read())
    assert wire.read_line() == b"RSET"
    with connect.deadline.limit(PATIENCE, "the end"), pytest.raises(PeerGone, match="connection closed"):
        wire.read_line()
    assert wire.pending()


def test_a_broken_record_is_a_wire_error(connect, pair):
    wire, peer = connect.tcp()
    secure = connect.tls(pair, wire, peer)
    with socket.socket(fileno=secure.detach()) as plain:
        plain.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)
        with pytest.raises(TlsFailed, match="TLS: "):
            wire.read_line()


def test_a_key_update_is_answered(connect, pair):
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        client = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"{HOST}:{port}", "-msg", "-tls1_3"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ours, _ = listener.accept()
    wire = connect.wire(ours)
    keys, screen = client.stdin, client.stdout
    assert keys and screen

    def press(line: bytes) -> None:
        keys.write(line)
        keys.flush()

    def watch() -> bytes:
        said = b""
        for line in screen:
            if b"KeyUpdate" in line and b"KeyUpdate" not in said:
                press(b"hello\n")  # in one go with the K it would be taken for text
            said += line
        return said

    try:
        wire.start_tls(pair.server_context(), server_side=True)
        press(b"K\n")
        watching = connect.thread(watch)
        assert wire.read_some() == b"hello\n"
        wire.send(b"250 Ok\r\n")
        wire.hang_up()
        keys.close()
        said = watching.result(PATIENCE)
        assert isinstance(said, bytes)
    finally:
        client.kill()
        client.wait()
    assert said.count(b"KeyUpdate") == 2  # its own and ours
    assert b"250 Ok" in said


def test_who_always_has_octets_at_hand_lets_those_run_who_wait_for_theirs(connect, monkeypatch):
    """And the clocks: they are seen in the same turn of the loop, and gevent.sleep(0) is none."""
    monkeypatch.setattr(module, "FAIR_TIME", 0.0)
    wire, peer = connect()
    other, other_peer = connect()
    waiting, waking = gevent.spawn(other.read_line), gevent.Greenlet(lambda: "awake")
    gevent.idle()
    other_peer.sendall(NEXT)
    waking.start_later(0)
    peer.sendall(b"x" * 2 * module.FIRST_BODY_READ)
    assert wire.read_some() == b"x" * module.FIRST_BODY_READ
    assert 0 < len(wire.read_some()) < module.FIRST_BODY_READ  # so that its next turn is a shorter one
    assert (waiting.value, waking.value) == (b"NOOP", "awake")


def test_who_has_many_lines_at_hand_lets_those_run_who_wait_for_theirs(connect, monkeypatch):
    """However few they are: it is the time that counts."""
    monkeypatch.setattr(module, "FAIR_TIME", 0.0)
    wire, peer = connect()
    other, other_peer = connect()
    waiting = gevent.spawn(other.read_line)
    gevent.idle()
    peer.sendall(NEXT * 2)
    assert wire.read_line() == b"NOOP"
    other_peer.sendall(NEXT)
    assert wire.read_line() == b"NOOP"
    assert waiting.value == b"NOOP"


def test_a_session_over_tls_that_never_has_to_wait_lets_the_others_run(connect, pair, monkeypatch):
    monkeypatch.setattr(module, "FAIR_TIME", 0.0)
    wire, peer = connect()
    secure = connect.tls(pair, wire, peer)
    secure.sendall(b"x" * 5 * module.COMMAND_READ + b"\r\n")
    turns: list[None] = []
    other = over_and_over(lambda: turns.append(None), lambda: gevent.sleep(0))
    with pytest.raises(LineTooLong):
        wire.read_line()
    assert turns
    other.kill()


# The end


def test_hanging_up_sends_what_was_kept_back(connect):
    wire, peer = connect.tcp()
    wire.write(b"221 2.0.0 Bye\r\n")
    wire.hang_up()
    assert peer.recv(1000) == b"221 2.0.0 Bye\r\n"
    assert peer.recv(1000) == b""
    wire.close()


def test_closing_sends_nothing_more(connect):
    wire, peer = connect.tcp()
    wire.write(b".\r\n")
    wire.close()
    assert peer.recv(1000) == b""


def test_what_is_done_with_a_closed_connection_is_a_wire_error(connect):
    """A wait for its descriptor would end the process, with all that others have said."""
    for work in (Wire.read_line, read_verdict, Wire.read_some, lambda wire: wire.send(b"x" * 10)):
        wire, peer = connect()
        peer.sendall(b"250-Ok\r\n\r\n250-")
        read_verdict(wire)
        wire.close()
        assert wire.pending() and not wire.buffered()
        with pytest.raises(PeerGone):
            work(wire)


def test_hanging_up_says_goodbye_to_tls(connect, pair):
    wire, peer = connect.tcp()
    secure = connect.tls(pair, wire, peer)
    wire.write(b"221 2.0.0 Bye\r\n")
    wire.hang_up()
    assert secure.recv(1000) == b"221 2.0.0 Bye\r\n"
    assert secure.recv(1000) == b""  # close_notify: without it Python would raise


@pytest.mark.parametrize("secured", [False, True], ids=["clear", "TLS"])
def test_the_last_words_reach_a_peer_that_still_sends(connect, pair, secured):
    wire, peer = connect.tcp()
    if secured:
        peer = connect.tls(pair, wire, peer)

    def client() -> bytes:
        with suppress(ConnectionError):
            peer.sendall(b"x" * 600_000)
        received = b""
        while octets := peer.recv(1000):
            received += octets
        return received

    talk = connect.thread(client)
    wire.read_some(1)
    wire.write(b"421 4.4.2 Timeout, closing connection\r\n")
    wire.hang_up(linger=True)
    assert talk.result(PATIENCE) == b"421 4.4.2 Timeout, closing connection\r\n"
