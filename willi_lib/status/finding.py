"""What a finding is, and when a certificate is one: for the status (page, `top`, /status.json) and for `check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ENDS_SOON = 14 * 86400.0  # seconds before a certificate ends: a program that renews it has done so by then
RENEW = "Renew the certificate in place: a running Willi takes the new file within 10 seconds."

Level = Literal["ok", "warn", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. The fields are the keys of `check --json` and of the problems in /status.json."""

    level: Level  # warn: it works, and may not be what was meant, or not for long
    subject: str  # a file, a setting, a mapping or a host
    what: str
    advice: str = ""  # what to do next

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


def certificate_level(seconds_left: float) -> Level:
    if seconds_left <= 0:
        return "wrong"
    return "warn" if seconds_left < ENDS_SOON else "ok"
