"""The real OpenSMTPD, in a Debian of its own: own configuration, spool, mailbox and log, loopback only, no DNS."""

from __future__ import annotations

import re
import smtplib
from collections.abc import Mapping, Sequence

from tests.support.loopback import HOST, PATIENCE, free_port, wait_until
from tests.support.postfix import Stored
from tests.support.refusals import REFUSALS
from tests.support.twin import Twin

PACKAGE = "opensmtpd"
# Headers that it adds if they are missing.
ADDED = re.compile(rb"^Date: .* \(UTC\)\n|^Message-ID: <[0-9a-f]{16}@mx\.example>\n", re.MULTILINE)
PHASES = {
    "connect": ["connect"], "ehlo": ["ehlo", "helo"], "mail": ["mail-from"], "rcpt": ["rcpt-to"], "data": ["data"],
    "end": ["commit"],
}  # fmt: skip
CONDITIONS = {
    "connect": "src", "ehlo": "helo", "mail": "mail-from", "rcpt": "rcpt-to", "data": "mail-from", "end": "mail-from",
}  # fmt: skip


class OpenSmtpd:
    """A running instance. Messages for `domains` go to its mailbox, those for `relays` to a port of this machine.

    Who comes to `proxy_port` must say in a PROXY header who he is. STARTTLS is not offered: Debian 12's OpenSMTPD
    (6.8.0p2 with OpenSSL 3) ends every handshake with "missing private key".
    """

    def __init__(
        self, domains: Sequence[str] = (), relays: Mapping[str, int] | None = None, source: str = HOST
    ) -> None:
        """source: where relayed mail comes from."""
        self._twin = Twin(PACKAGE)
        self.home = self._twin.home
        self.port, self.proxy_port = free_port(), free_port()
        self.log_file = self.home / "smtpd.log"
        (self.home / "mailbox").mkdir()
        try:
            self._write_configuration(domains, relays or {}, source)
            self._twin.run("useradd", "--create-home", "box")
            self._twin.run("chown", "box", str(self.home / "mailbox"))
            self._process = self._twin.start("smtpd", "-d", "-v", log_file=self.log_file)
            wait_until(self._is_up, "OpenSMTPD's greeting")
        except BaseException:
            self.stop()
            raise

    @property
    def server(self) -> str:
        """As a route names it."""
        return f"{HOST}:{self.proxy_port}"

    def _write_configuration(self, domains: Sequence[str], relays: Mapping[str, int], source: str) -> None:
        lines, options = [], "hostname mx.example filter all"
        names = []
        for number, refusal in enumerate(REFUSALS):
            for phase in PHASES[refusal.at]:
                names.append(f"refusal{number}-{phase}")
                lines.append(
                    f"filter {names[-1]} phase {phase} match {CONDITIONS[refusal.at]} "
                    f'{{ "{refusal.whom}" }} reject "{refusal.code} {refusal.words}"'
                )
        lines += [
            'smtp max-message-size "100M"',
            'table catch-all { "@" = "box" }',
            f"filter all chain {{ {', '.join(names)} }}",
            f"listen on {HOST} port {self.port} {options}",
            f"listen on {HOST} port {self.proxy_port} proxy-v2 {options}",
            f'action "store" maildir "{self.home}/mailbox" virtual <catch-all>',
            *(
                f'action "{domain}" relay host "smtp://{HOST}:{port}" src {source} helo mx.example'
                for domain, port in relays.items()
            ),
            *(f'match from any for domain "{domain}" action "store"' for domain in domains),
            *(f'match from any for domain "{domain}" action "{domain}"' for domain in relays),
        ]
        (self.home / "smtpd.conf").write_text("\n".join(lines) + "\n")
        self._twin.run("sh", "-c", f"cp {self.home}/smtpd.conf /etc/smtpd.conf")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self.log_file.read_text()
        try:
            with self.client():
                return True
        except (ConnectionError, smtplib.SMTPException):
            return False

    def client(self) -> smtplib.SMTP:
        """A client of this OpenSMTPD itself: to send through it."""
        return smtplib.SMTP(HOST, self.port, local_hostname="c.example", timeout=PATIENCE)

    def stored(self) -> list[Stored]:
        """What lies in the mailbox now."""
        return [_parse(path.read_bytes()) for path in (self.home / "mailbox" / "new").glob("*")]

    def is_idle(self) -> bool:
        """Whether nothing waits to be delivered. What does is tried at once, also if it has failed before."""
        if self._twin.run("smtpctl", "show", "queue").strip() == "":
            return True
        self._twin.run("smtpctl", "schedule", "all")
        return False

    def close(self) -> None:
        """For contextlib.closing."""
        self.stop()

    def stop(self) -> None:
        """End it and remove its files."""
        self._twin.stop()
        if hasattr(self, "_process"):
            self._process.wait(PATIENCE)


def _parse(octets: bytes) -> Stored:
    """Take off what this OpenSMTPD put on top: Return-Path if there is one, Delivered-To, then a folded Received."""
    found = re.match(rb"(?:Return-Path: <?(.*?)>?\n)?Delivered-To: (.*)\n(Received: .*\n(?:[ \t].*\n)*)", octets)
    assert found, f"not what OpenSMTPD stores: {octets[:500]!r}"
    sender, recipient, received = ((part or b"").decode() for part in found.groups())
    return Stored(sender, recipient, " ".join(received.split()), ADDED.sub(b"", octets[found.end() :]))
