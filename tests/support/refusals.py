"""What the servers of the differential tests refuse: the same at each of them, in words of its own choice."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """Where in the session, for good or for now, and whom."""

    at: str  # connect, ehlo, mail, rcpt, data or end (of the message)
    code: int
    whom: str  # an address, a HELO name, a recipient (rcpt) or a sender (all others)

    @property
    def words(self) -> str:
        """Enhanced code and text."""
        return f"{self.code // 100}.7.1 {self.at}: not {self.whom}"


REFUSALS = (
    Refusal("connect", 554, "127.0.0.55"),
    Refusal("ehlo", 550, "refused.example"),
    Refusal("mail", 550, "mail-5@a.example"),
    Refusal("mail", 451, "mail-4@a.example"),
    Refusal("rcpt", 550, "rcpt-5@b.example"),
    Refusal("rcpt", 451, "rcpt-4@b.example"),
    Refusal("data", 550, "data-5@a.example"),
    Refusal("data", 451, "data-4@a.example"),
    Refusal("end", 550, "end-5@a.example"),
    Refusal("end", 451, "end-4@a.example"),
)
