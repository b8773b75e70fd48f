"""What a client may say next: the stages of its session, and the commands that are missing before others."""

from __future__ import annotations

from enum import IntEnum, auto

from ..smtp import reply as replies
from ..smtp.reply import Reply


class Stage(IntEnum):
    """What the client may say next."""

    START = auto()  # no EHLO yet
    HANDSHAKE = auto()  # STARTTLS was answered with 220
    GREETED = auto()
    SENDER = auto()  # MAIL was answered with 250, no recipient was accepted yet
    RECIPIENT = auto()  # at least one recipient was accepted
    CONTENT = auto()  # DATA was answered with 354
    CHUNKS = auto()  # BDAT has begun
    FAILED = auto()  # the upstream failed in this transaction


ANY = frozenset(Stage) - {Stage.HANDSHAKE, Stage.CONTENT}  # the stages in which commands are read
IDLE = frozenset((Stage.START, Stage.GREETED))  # no transaction
ENVELOPE = frozenset((Stage.SENDER, Stage.RECIPIENT, Stage.FAILED))

_OUT_OF_SEQUENCE = {
    (Stage.GREETED, b"RCPT"): replies.MAIL_FIRST,
    (Stage.GREETED, b"DATA"): replies.MAIL_FIRST,
    (Stage.SENDER, b"MAIL"): replies.NESTED_MAIL,
    (Stage.RECIPIENT, b"MAIL"): replies.NESTED_MAIL,
    (Stage.CHUNKS, b"MAIL"): replies.NESTED_MAIL,
    (Stage.CHUNKS, b"DATA"): replies.DATA_AFTER_BDAT,
}


def out_of_sequence(stage: Stage, verb: bytes) -> Reply:
    """The answer to a command that may not come in this stage."""
    if stage is Stage.START:
        return replies.HELO_FIRST
    return _OUT_OF_SEQUENCE.get((stage, verb), replies.BAD_SEQUENCE)
