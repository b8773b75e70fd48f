"""What nearly every session says, so that a test can say only what it is about."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.client import Client
from tests.support.daemon import Willi
from tests.support.upstream import ScriptedUpstream
from willi_lib.smtp.reply import Reply

EHLO = b"EHLO c.example"
MAIL = b"MAIL FROM:<ann@a.example>"
BOB = b"RCPT TO:<bob@b.example>"
BEN = b"RCPT TO:<ben@b.example>"
CARL = b"RCPT TO:<carl@c.example>"  # of another domain than Bob and Ben

SENDER_KEPT = "250 2.1.0 Ok"  # Willi's own answer to MAIL
OK = "250 2.0.0 ok"  # a scripted upstream's answer to everything
GO_ON = "354 go on"
QUEUED = "250 2.0.0 ok, queued as 1234"
NO_ANSWER = "451 4.4.1 No answer from the server for this recipient, try again"
LOST = "451 4.4.2 Lost the server for this recipient, try again"


def reply(text: str) -> Reply:
    """A reply as a test writes it: "550 5.1.1 no / 5.1.1 sorry"."""
    code, _, rest = text.partition(" ")
    return Reply(int(code), tuple(line.encode() for line in rest.split(" / ")))


def greeted(willi: Willi, hello: bytes = EHLO, source: str = "") -> Client:
    """A client that has said EHLO."""
    client = willi.connect(source=source)
    assert client.command(hello).code == 250
    return client


def say(client: Client, *lines: bytes) -> list[str]:
    """Commands one after the other, each reply awaited."""
    return [str(client.command(line)) for line in lines]


def say_together(client: Client, *lines: bytes) -> list[str]:
    """Commands in one write, and the replies to all of them."""
    return [str(answer) for answer in client.commands(*lines)]


def content(client: Client, octets: bytes = b"Subject: x\r\n\r\nhello\r\n") -> str:
    """A message after 354, and the verdict."""
    client.send(octets + b".\r\n")
    return str(client.read_reply())


def deliver(client: Client, *recipients: bytes, mail: bytes = MAIL) -> str:
    """A whole message to recipients (Bob) that are accepted, and the verdict."""
    answers = say(client, mail, *(recipients or (BOB,)), b"DATA")
    assert answers[0] == SENDER_KEPT and answers[-1].startswith("354"), answers
    return content(client)


def chunk(client: Client, octets: bytes, last: bool = False) -> str:
    """One BDAT command with its octets in the same write."""
    client.send(b"BDAT %d%s\r\n%s" % (len(octets), b" LAST" if last else b"", octets))
    return str(client.read_reply())


def two_domains(first: ScriptedUpstream, second: ScriptedUpstream) -> str:
    """A CSV: b.example is the first one's, c.example the second one's, and nothing else is anybody's."""
    return f"pattern;server;tls_verify\nb.example;{first.server};false\nc.example;{second.server};false\n"


def verbs(lines: Iterable[bytes]) -> list[bytes]:
    """The first words of commands."""
    return [line.split(b" ")[0] for line in lines]
