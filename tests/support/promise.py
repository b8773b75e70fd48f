"""What the tests of the promises share: clients on their way through a transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.support import talk
from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.raw import Peer, RawUpstream
from tests.support.upstream import Ended, ScriptedUpstream

T = TypeVar("T")
PAGE = 4096  # octets


def rcpt(recipient: str) -> bytes:
    return b"RCPT TO:<%s>" % recipient.encode()


def greeted(willi: Willi, tls: bool = False) -> Client:
    """A client that has said EHLO, over TLS if so wished."""
    client = talk.greeted(willi)
    if tls:
        assert client.starttls().code == 220
        assert client.command(talk.EHLO).code == 250
    return client


def in_envelope(willi: Willi, recipient: str = "bob@b.example", tls: bool = False) -> Client:
    """A client whose MAIL and RCPT were answered 250."""
    client = greeted(willi, tls)
    assert client.command(talk.MAIL).code == 250
    answer = client.command(rcpt(recipient))
    assert answer.code == 250, answer
    return client


def in_data(willi: Willi, recipient: str = "bob@b.example", tls: bool = False) -> Client:
    """The same, and DATA was answered 354."""
    client = in_envelope(willi, recipient, tls)
    answer = client.command(b"DATA")
    assert answer.code == 354, answer
    return client


def sent(client: Client, recipient: str, octets: bytes) -> str:
    """A whole message of these octets, dots stuffed already, and the verdict. Any upstream's 250s and 354 will do."""
    codes = [client.command(line).code for line in (talk.MAIL, rcpt(recipient), b"DATA")]
    assert codes == [250, 250, 354]
    return talk.content(client, octets)


def meet(willi: Willi, upstream: RawUpstream, *extensions: bytes) -> tuple[Client, Peer]:
    """Both ends, after MAIL and RCPT."""
    client = talk.greeted(willi)
    assert client.command(talk.MAIL).code == 250
    client.send(talk.BOB + b"\r\n")
    peer = upstream.accept()
    peer.take_envelope(*extensions)
    assert str(client.read_reply()) == "250 2.1.5 ok"
    return client, peer


def meet_in_data(willi: Willi, upstream: RawUpstream) -> tuple[Client, Peer]:
    """Both ends, after 354."""
    client, peer = meet(willi, upstream)
    client.send(b"DATA\r\n")
    peer.answer(b"DATA", b"354 go on\r\n")
    assert client.read_reply().code == 354
    return client, peer


def all_at_once(work: Callable[[T], None], cases: Iterable[T]) -> None:
    """Run the cases side by side, since each waits for a time limit. Raises what the first of them raises."""
    listed = list(cases)
    with ThreadPoolExecutor(max_workers=len(listed)) as pool:
        for _ in pool.map(work, listed):
            pass


def assert_nothing_was_finished(upstream: ScriptedUpstream, content: bytes) -> None:
    """Each connection to the upstream was dropped inside of the message, which is this one, without QUIT."""
    upstream.wait_for_ends()
    assert upstream.messages == []
    for connection in upstream.connections:
        assert connection.unfinished is not None, f"no message at all: {connection.commands}"
        assert content.startswith(connection.unfinished), connection.unfinished
        assert connection.ended in (Ended.EOF, Ended.RESET)


def resident(willi: Willi) -> int:
    """Octets of memory that the workers, who hold all clients, have in use at this moment."""
    assert willi.workers
    texts = [Path(f"/proc/{pid}/statm").read_text(encoding="ascii") for pid in willi.workers]
    return sum(int(text.split()[1]) for text in texts) * PAGE
