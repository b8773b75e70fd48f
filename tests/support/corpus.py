"""The sessions of the differential tests: what a client says, once to a server and once to Willi in front of it.

A step of a session is one of these:

    b"MAIL FROM:<ann@a.example>"    a command; CRLF is added, and a reply awaited
    Together(step, step, ...)       commands and chunks in one write, and then a reply to each
    Message(octets)                 after a 354 only: these octets as they are, and the verdict
    Chunk(octets, last=True)        BDAT with its octets
    TLS                             STARTTLS and the handshake

QUIT is said at the end of each, unless it hangs up. `tests/support/refusals.py` has whom the servers refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tests.support.talk import BEN, BOB, EHLO, MAIL

CLIENT = "127.0.0.9"  # where clients come from; Willi's own connections come from 127.0.0.1
DOMAINS = ("b.example", "xn--bcher-kva.example")  # which the servers store


class Message(NamedTuple):
    octets: bytes


class Chunk(NamedTuple):
    octets: bytes
    last: bool = False


class Tls(NamedTuple):
    pass


class Together:
    def __init__(self, *steps: bytes | Chunk) -> None:
        self.steps = steps


Step = bytes | Message | Chunk | Together | Tls


@dataclass(frozen=True)
class Session:
    """What one client says.

    needs: the extension without which a server cannot be asked directly.
    repaired: the message as Willi passes it on, if line ends in it are not CRLF or its dots are doubtful (RFC 5321
    §2.3.8). Servers differ there: some see a second message.
    """

    steps: tuple[Step, ...]
    source: str = CLIENT
    needs: str = ""
    repaired: bytes | None = None
    quits: bool = True

    @property
    def smuggles(self) -> bool:
        """Whether some servers see a second message in it."""
        return self.repaired is not None and SMUGGLED in self.repaired


TLS = Tls()
HELO = b"HELO c.example"
DATA = b"DATA"
RSET = b"RSET"
NULL = b"MAIL FROM:<>"
UTF8 = b"MAIL FROM:<ann@a.example> SMTPUTF8"
RCPT_5 = b"RCPT TO:<rcpt-5@b.example>"
RCPT_4 = b"RCPT TO:<rcpt-4@b.example>"
FOREIGN = b"RCPT TO:<carl@c.example>"
HEAD = b"".join(
    line + b"\r\n"
    for line in (
        b"From: Ann <ann@a.example>",
        b"To: Bob <bob@b.example>",
        b"Date: Thu, 26 Nov 2026 12:00:00 +0000",
        b"Message-ID: <1@a.example>",
        b"Subject: hello",
        b"",
    )
)
HELLO = HEAD + b"hello\r\n"
END = Message(HELLO + b".\r\n")


def session(
    *steps: Step, source: str = CLIENT, needs: str = "", repaired: bytes | None = None, quits: bool = True
) -> Session:
    if TLS in steps and not needs:
        needs = "STARTTLS"
    return Session(steps, source, needs, repaired, quits)


def to_bob(octets: bytes, repaired: bytes | None = None) -> Session:
    """A session that sends this message, dots stuffed already, with DATA."""
    return session(EHLO, MAIL, BOB, DATA, Message(octets + b".\r\n"), repaired=repaired)


def in_chunks(*chunks: bytes, mail: bytes = MAIL) -> Session:
    """The same with BDAT."""
    steps = [Chunk(octets, last=number == len(chunks)) for number, octets in enumerate(chunks, 1)]
    return session(EHLO, mail, BOB, *steps, needs="CHUNKING")


def sender(address: str, *after: Step) -> Session:
    """A session from this sender to Bob."""
    mail = b"MAIL FROM:<%s>" % address.encode()
    return session(EHLO, mail, BOB, DATA, END, *after)


def recipient(path: str, mail: bytes = MAIL, needs: str = "") -> Session:
    """A session to this recipient, as RCPT has it."""
    return session(EHLO, mail, b"RCPT TO:" + path.encode(), DATA, END, needs=needs)


SMUGGLED = b"MAIL FROM:<eve@a.example>\r\nRCPT TO:<ben@b.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nboo\r\n"
MANY = [b"RCPT TO:<bob%d@b.example>" % number for number in range(101)]
LONG_ADDRESS = b"RCPT TO:<%s@b.example>" % (b"x" * 64)

SESSIONS: dict[str, Session] = {
    # Plain
    "a plain message": to_bob(HELLO),
    "a plain message from a client that says HELO": session(HELO, MAIL, BOB, DATA, END),
    "a client that says no more than QUIT": session(),
    "a client that looks and leaves": session(EHLO),
    "a client that says EHLO twice": session(EHLO, EHLO, MAIL, BOB, DATA, END),
    "HELO after EHLO": session(EHLO, HELO, MAIL, BOB, DATA, END),
    "EHLO in the middle of a transaction": session(EHLO, MAIL, BOB, EHLO, MAIL, BEN, DATA, END),
    "verbs in lower case": session(
        b"ehlo c.example", b"mail from:<ann@a.example>", b"rcpt to:<bob@b.example>", b"data", END
    ),
    "the null sender": session(EHLO, NULL, BOB, DATA, END),
    "SIZE and BODY": session(EHLO, MAIL + b" SIZE=%d BODY=8BITMIME" % len(HELLO), BOB, DATA, END),
    "BODY=7BIT in lower case": session(EHLO, MAIL + b" body=7bit", BOB, DATA, END),
    "a space after the colon": session(EHLO, b"MAIL FROM: <ann@a.example>", b"RCPT TO: <bob@b.example>", DATA, END),
    "a client that hangs up after EHLO": session(EHLO, quits=False),
    "a client that hangs up after RCPT": session(EHLO, MAIL, BOB, quits=False),
    "a client that quits after RCPT": session(EHLO, MAIL, BOB),
    "an address literal as name": session(b"EHLO [127.0.0.9]", MAIL, BOB, DATA, END),
    # Several messages, RSET
    "two messages": session(EHLO, MAIL, BOB, DATA, END, MAIL, BEN, DATA, END),
    "five messages to the same recipient": session(EHLO, *(5 * (MAIL, BOB, DATA, END))),
    "RSET between two messages": session(EHLO, MAIL, BOB, DATA, END, RSET, MAIL, BEN, DATA, END),
    "RSET after MAIL": session(EHLO, MAIL, RSET, b"MAIL FROM:<amy@a.example>", BOB, DATA, END),
    "RSET after RCPT: the first recipient gets nothing": session(EHLO, MAIL, BOB, RSET, MAIL, BEN, DATA, END),
    "RSET before EHLO": session(RSET, EHLO, MAIL, BOB, DATA, END),
    "NOOP everywhere": session(b"NOOP", EHLO, b"NOOP", MAIL, b"NOOP", BOB, b"NOOP x", DATA, END, b"NOOP"),
    # Recipients
    "several recipients": session(EHLO, MAIL, BOB, BEN, b"RCPT TO:<eva@b.example>", DATA, END),
    "the same recipient twice": session(EHLO, MAIL, BOB, BOB, DATA, END),
    "a hundred recipients": session(EHLO, MAIL, *MANY[:100], DATA, END),
    "a recipient too many for Willi": session(EHLO, MAIL, *MANY, DATA, END),
    "postmaster without a domain": recipient("<postmaster>"),
    "postmaster with a domain": recipient("<Postmaster@b.example>"),
    "a local part without a domain": recipient("<bob>"),
    "upper case in both parts": recipient("<Bob.Jones@B.Example>"),
    "a quoted local part": recipient('<"bob jones"@b.example>'),
    "a quoted local part with an at sign": recipient('<"bob@c.example"@b.example>'),
    "a quoted local part with an escaped quote": recipient('<"bob\\"jones"@b.example>'),
    "a plus in the local part": recipient("<bob+list=a.example@b.example>"),
    "all the special characters that need no quotes": recipient("<!#$&'*+-/=?^_`{|}~@b.example>"),
    "a local part of 64 octets": session(EHLO, MAIL, LONG_ADDRESS, DATA, END),
    "a source route": recipient("<@x.example,@y.example:bob@b.example>"),
    "a domain with its A-label": recipient("<bob@xn--bcher-kva.example>"),
    # Refusals at every step
    "a client whose address is refused": session(EHLO, MAIL, BOB, DATA, END, source="127.0.0.55"),
    "a client whose name is refused": session(b"EHLO refused.example", MAIL, BOB, DATA, END),
    "a client whose name is refused after HELO": session(b"HELO refused.example", MAIL, BOB, DATA, END),
    "a sender who is refused": sender("mail-5@a.example"),
    "a sender who is refused for now": sender("mail-4@a.example"),
    "after a refused sender another one": sender("mail-5@a.example", RSET, MAIL, BOB, DATA, END),
    "a recipient who is refused": session(EHLO, MAIL, RCPT_5, DATA, END),
    "a recipient who is refused for now": session(EHLO, MAIL, RCPT_4, DATA, END),
    "a good recipient after a refused one": session(EHLO, MAIL, RCPT_5, BOB, DATA, END),
    "a refused recipient after a good one": session(EHLO, MAIL, BOB, RCPT_5, RCPT_4, DATA, END),
    "a domain that is not the server's": session(EHLO, MAIL, FOREIGN, DATA, END),
    "a domain that is not the server's, after one that is": session(EHLO, MAIL, BOB, FOREIGN, DATA, END),
    "DATA that is refused": sender("data-5@a.example"),
    "DATA that is refused for now": sender("data-4@a.example"),
    "another message after a refused DATA": sender("data-5@a.example", RSET, MAIL, BOB, DATA, END),
    "a message that is refused": sender("end-5@a.example"),
    "a message that is refused for now": sender("end-4@a.example"),
    "another message after a refused one": sender("end-5@a.example", MAIL, BOB, DATA, END),
    # Words that are wrong, or not for an MX
    "MAIL before EHLO": session(MAIL, EHLO, MAIL, BOB, DATA, END),
    "RCPT before MAIL": session(EHLO, BOB, MAIL, BOB, DATA, END),
    "DATA before MAIL": session(EHLO, DATA, MAIL, BOB, DATA, END),
    "DATA before RCPT": session(EHLO, MAIL, DATA, BOB, DATA, END),
    "MAIL twice": session(EHLO, MAIL, MAIL, BOB, DATA, END),
    "an unknown command": session(EHLO, b"XYZZY", MAIL, BOB, DATA, END),
    "an empty command": session(EHLO, b"", MAIL, BOB, DATA, END),
    "EHLO without a name": session(b"EHLO", EHLO, MAIL, BOB, DATA, END),
    "MAIL without an address": session(EHLO, b"MAIL FROM:", MAIL, BOB, DATA, END),
    "RCPT to the null path": session(EHLO, MAIL, b"RCPT TO:<>", BOB, DATA, END),
    "a broken recipient": session(EHLO, MAIL, b"RCPT TO:<bob@b.example", BOB, DATA, END),
    "an unknown parameter of MAIL": session(EHLO, MAIL + b" FOO=bar", MAIL, BOB, DATA, END),
    "an unknown parameter of RCPT": session(EHLO, MAIL, BOB + b" FOO=bar", BOB, DATA, END),
    "a SIZE that is too big for everybody": session(EHLO, MAIL + b" SIZE=99999999999", MAIL, BOB, DATA, END),
    "a NUL in a command": session(EHLO, MAIL, b"RCPT TO:<bo\0b@b.example>", BOB, DATA, END),
    "an 8-bit address without SMTPUTF8": session(EHLO, MAIL, "RCPT TO:<jörg@b.example>".encode(), BOB, DATA, END),
    "VRFY, EXPN and HELP": session(EHLO, b"VRFY bob@b.example", b"EXPN list", b"HELP", MAIL, BOB, DATA, END),
    "AUTH": session(EHLO, b"AUTH PLAIN AGFubgBzZWNyZXQ=", MAIL, BOB, DATA, END),
    "QUIT with a parameter": session(EHLO, MAIL, BOB, DATA, END, b"QUIT now"),
    # Pipelined
    "a pipelined message": session(EHLO, Together(MAIL, BOB, DATA), END, needs="PIPELINING"),
    "two pipelined messages": session(
        EHLO, Together(MAIL, BOB, DATA), END, Together(MAIL, BEN, DATA), END, needs="PIPELINING"
    ),
    "many recipients in a group": session(EHLO, Together(MAIL, *MANY[:40], DATA), END, needs="PIPELINING"),
    "a group with a refused recipient": session(
        EHLO, Together(MAIL, RCPT_5, BOB, RCPT_4, DATA), END, needs="PIPELINING"
    ),
    "a group with no good recipient": session(EHLO, Together(MAIL, RCPT_5, DATA), END, needs="PIPELINING"),
    "a group with a refused sender": session(
        EHLO, Together(b"MAIL FROM:<mail-5@a.example>", BOB, DATA), END, needs="PIPELINING"
    ),
    "RSET, MAIL, RCPT in a group": session(EHLO, Together(MAIL, BOB, RSET, MAIL, BEN, DATA), END, needs="PIPELINING"),
    # BDAT
    "a message in one chunk": in_chunks(HELLO),
    "a message in three chunks": in_chunks(HELLO[:20], HELLO[20:], b"more\r\n"),
    "an empty last chunk": in_chunks(HELLO, b""),
    "chunks cut inside CRLF": in_chunks(HEAD + b"one\r", b"\ntwo\r\n"),
    "dot lines in a chunk": in_chunks(HEAD + b".\r\n..\r\n.dot\r\n"),
    "a chunk without a last CRLF": in_chunks(HEAD + b"no end of line"),
    "8-bit octets in a chunk": in_chunks(HEAD + bytes(range(0x80, 0x100)) + b"\r\n", mail=MAIL + b" BODY=8BITMIME"),
    "MAIL, RCPT and BDAT in one group": session(EHLO, Together(MAIL, BOB, Chunk(HELLO, last=True)), needs="CHUNKING"),
    "two messages in chunks": session(
        EHLO, MAIL, BOB, Chunk(HELLO, last=True), MAIL, BEN, Chunk(HEAD), Chunk(b"x\r\n", last=True), needs="CHUNKING"
    ),
    "RSET after a chunk": session(
        EHLO, MAIL, BOB, Chunk(HELLO), RSET, MAIL, BEN, Chunk(HELLO, last=True), needs="CHUNKING"
    ),
    "a chunk with no good recipient": session(EHLO, MAIL, RCPT_5, Chunk(HELLO, last=True), needs="CHUNKING"),
    "a refused message in chunks": session(
        EHLO, b"MAIL FROM:<end-5@a.example>", BOB, Chunk(HELLO), Chunk(b"", last=True), needs="CHUNKING"
    ),
    "DATA after a chunk": session(EHLO, MAIL, BOB, Chunk(HELLO), DATA, needs="CHUNKING"),
    # SMTPUTF8
    "SMTPUTF8 for an ASCII envelope": session(EHLO, UTF8, BOB, DATA, END, needs="SMTPUTF8"),
    "a recipient in UTF-8": recipient("<jörg@b.example>", UTF8, needs="SMTPUTF8"),
    "a sender in UTF-8": session(
        EHLO, "MAIL FROM:<jörg@a.example> SMTPUTF8".encode(), BOB, DATA, END, needs="SMTPUTF8"
    ),
    "a header in UTF-8": session(
        EHLO,
        UTF8 + b" BODY=8BITMIME",
        BOB,
        DATA,
        Message("Subject: Grüße\r\n".encode() + HELLO + b".\r\n"),
        needs="SMTPUTF8",
    ),
    # Bodies
    "an empty message": to_bob(b""),
    "a body without headers": to_bob(b"\r\nhello\r\n"),
    "dot lines": to_bob(HEAD + b"..\r\n...\r\n..dot\r\n"),
    "empty lines at the end": to_bob(HELLO + b"\r\n\r\n\r\n"),
    "blanks at the ends of lines": to_bob(HEAD + b"one \r\ntwo\t \r\n \r\n"),
    "lines of 998 octets": to_bob(HEAD + (b"x" * 998 + b"\r\n") * 3),
    "a line of 1,500 octets": to_bob(HEAD + b"x" * 1500 + b"\r\n"),
    "a line of 5,000 octets": to_bob(HEAD + b"x" * 5000 + b"\r\n"),
    "a line of 100,000 octets": to_bob(HEAD + b"x" * 100_000 + b"\r\n"),
    "a header line of 5,000 octets": to_bob(b"X-Long: " + b"x" * 5000 + b"\r\n" + HELLO),
    "8-bit octets": to_bob(HEAD + bytes(range(0x80, 0x100)) + b"\r\n"),
    "control octets": to_bob(HEAD + bytes(set(range(1, 0x20)) - {0x0A, 0x0D}) + b"\x7f\r\n"),
    "a NUL": to_bob(HEAD + b"before\0after\r\n"),
    "From at the beginning of a line": to_bob(HEAD + b"From here on\r\n>From there\r\n"),
    "a megabyte": to_bob(HEAD + (b"0123456789" * 7 + b"\r\n") * 14_500),
    "lines that look like commands": to_bob(HEAD + b"QUIT\r\nRSET\r\nMAIL FROM:<eve@a.example>\r\nDATA\r\n"),
    "a message of dots alone": to_bob(b".." + b"\r\n..\r\n..\r\n"),
    "folded headers": to_bob(b"X-Folded: one\r\n two\r\n\tthree\r\n" + HELLO),
    "Received headers of others": to_bob(b"Received: from x by y; Thu, 26 Nov 2026 11:00:00 +0000\r\n" * 3 + HELLO),
    # Line ends that are none
    "a bare LF": to_bob(HEAD + b"one\ntwo\r\n", repaired=HEAD + b"one\r\ntwo\r\n"),
    "a bare CR": to_bob(HEAD + b"one\rtwo\r\n", repaired=HEAD + b"one two\r\n"),
    "CR CR LF": to_bob(HEAD + b"one\r\r\ntwo\r\n", repaired=HEAD + b"one \r\ntwo\r\n"),
    "LF . LF": to_bob(HEAD + b"one\n.\n" + SMUGGLED, repaired=HEAD + b"one\r\n.\r\n" + SMUGGLED),
    "LF . CRLF": to_bob(HEAD + b"one\n.\r\n" + SMUGGLED, repaired=HEAD + b"one\r\n.\r\n" + SMUGGLED),
    "CRLF . LF": to_bob(HEAD + b"one\r\n.\n" + SMUGGLED, repaired=HEAD + b"one\r\n\r\n" + SMUGGLED),
    "CR . CR": to_bob(HEAD + b"one\r.\r" + SMUGGLED, repaired=HEAD + b"one . " + SMUGGLED),
    "CRLF . CR CRLF": to_bob(HEAD + b"one\r\n.\r\r\n" + SMUGGLED, repaired=HEAD + b"one\r\n \r\n" + SMUGGLED),
    "CRLF . blank CRLF": to_bob(HEAD + b"one\r\n. \r\n" + SMUGGLED, repaired=HEAD + b"one\r\n \r\n" + SMUGGLED),
    "CRLF NUL . CRLF": to_bob(HEAD + b"one\r\n\0.\r\n" + SMUGGLED, repaired=HEAD + b"one\r\n .\r\n" + SMUGGLED),
    "CRLF . NUL CRLF": to_bob(HEAD + b"one\r\n.\0\r\n" + SMUGGLED, repaired=HEAD + b"one\r\n\0\r\n" + SMUGGLED),
    "CRLF . NUL x CRLF": to_bob(HEAD + b"one\r\n.\0x\r\n" + SMUGGLED, repaired=HEAD + b"one\r\n\0x\r\n" + SMUGGLED),
    # STARTTLS
    "a message over TLS": session(EHLO, TLS, EHLO, MAIL, BOB, DATA, END),
    "a message over TLS after HELO": session(EHLO, TLS, HELO, MAIL, BOB, DATA, END),
    "a pipelined message over TLS": session(EHLO, TLS, EHLO, Together(MAIL, BOB, DATA), END),
    "chunks over TLS": session(EHLO, TLS, EHLO, MAIL, BOB, Chunk(HELLO, last=True), needs="CHUNKING"),
    "refusals over TLS": session(EHLO, TLS, EHLO, MAIL, RCPT_5, BOB, DATA, END),
    "TLS after a message in clear": session(EHLO, MAIL, BOB, DATA, END, TLS, EHLO, MAIL, BEN, DATA, END),
    "MAIL after the handshake without EHLO": session(EHLO, TLS, MAIL, EHLO, MAIL, BOB, DATA, END),
    "STARTTLS a second time": session(EHLO, TLS, EHLO, b"STARTTLS", MAIL, BOB, DATA, END),
    "STARTTLS with a parameter": session(EHLO, b"STARTTLS now", MAIL, BOB, DATA, END),
}
