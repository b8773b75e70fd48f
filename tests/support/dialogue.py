"""Dialogue files: what a strange client says, and what it must hear. Easy to write for whoever has just met one.

    # A comment. The first one says what the dialogue is about.
    S: 220 *                         Willi's whole next reply, its lines joined by " / "; * stands for anything
    S: (closed)                      Willi closes the connection
    C: MAIL FROM:<ann@a.example>     the client sends this line and CRLF; \\x00 and the like stand for octets
    U: MAIL FROM:<ann@a.example>     the upstream hears this command

C: lines that follow each other go out in one write. All U: lines together, in their order, are all the upstream may
have heard, apart from what Willi says on its own account (EHLO, QUIT ...); without one it must have heard nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream

CLOSED = "(closed)"
OF_WILLI_ITSELF = (b"EHLO", b"HELO", b"STARTTLS", b"XCLIENT", b"RSET", b"QUIT")


@dataclass(frozen=True)
class Step:
    """One line of a dialogue."""

    number: int  # in the file
    who: str  # S, C or U
    text: str

    @property
    def octets(self) -> bytes:
        """The text with its escapes as octets; what is not ASCII is UTF-8."""
        return re.sub(rb"\\x([0-9a-fA-F]{2})", lambda found: bytes.fromhex(found[1].decode()), self.text.encode())


def parse_dialogue(path: Path) -> list[Step]:
    """Raises AssertionError with the line for what is not in the format."""
    steps = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() == "" or line.startswith("#"):
            continue
        found = re.fullmatch(r"([SCU]):(?: (.*))?", line)
        assert found, f"{path}:{number}: not S:, C:, U: or a comment: {line}"
        steps.append(Step(number, found[1], found[2] or ""))
    return steps


def run_dialogue(path: Path, client: Client, upstream: ScriptedUpstream) -> None:
    """Play the client's part on a new connection and compare what is heard on both sides."""
    steps = parse_dialogue(path)
    group = b""
    for step in steps:
        if step.who == "C":
            group += step.octets + b"\r\n"
        elif step.who == "S":
            client.send(group)
            group = b""
            _expect(client, step, path)
    client.send(group)
    client.close()
    upstream.wait_for_ends()
    heard = [line for line in upstream.commands if line.split(b" ")[0].upper() not in OF_WILLI_ITSELF]
    assert heard == [step.octets for step in steps if step.who == "U"], f"{path}: what the upstream heard"


def _expect(client: Client, step: Step, path: Path) -> None:
    if step.text == CLOSED:
        client.expect_eof()
        return
    reply = str(client.read_reply())
    pattern = ".*".join(map(re.escape, step.text.split("*")))
    assert re.fullmatch(pattern, reply), f"{path}:{step.number}: expected {step.text!r}, got {reply!r}"
