"""Private instances of the real Postfix: own configuration, queue, data and log, loopback only, no DNS."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import smtplib
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.certificates import Pair
from tests.support.loopback import HOST, PATIENCE, free_port, wait_until

MAILBOX_UID = 65534  # nobody: virtual(8) never delivers as root
PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
maillog_file = {home}/mail.log
maillog_file_prefixes = {home}
myhostname = {name}
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
alias_database =
# Nothing is looked up, nothing added, nothing rewritten: what comes in is what is stored.
smtpd_peername_lookup = no
smtp_dns_support_level = disabled
local_header_rewrite_clients =
remote_header_rewrite_domain =
append_dot_mydomain = no
append_at_myorigin = no
notify_classes =
# As an upstream
smtpd_authorized_xclient_hosts = 127.0.0.0/8
smtpd_recipient_restrictions = permit_mynetworks, reject_unauth_destination
smtpd_tls_received_header = yes
smtputf8_enable = yes
virtual_mailbox_domains = {domains}
virtual_mailbox_base = {home}/mailbox
virtual_mailbox_maps = static:all/
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{uid}
virtual_minimum_uid = 100
virtual_mailbox_limit = 0
mailbox_size_limit = 0
message_size_limit = 104857600
# As a sender: a deferred message is tried again soon
minimal_backoff_time = 2s
maximal_backoff_time = 2s
queue_run_delay = 2s
"""

MASTER_CF = """\
{port} inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


@dataclass(frozen=True)
class Stored:
    """One message in the mailbox."""

    sender: str  # of the envelope
    recipient: str
    received: str  # the Received header that this Postfix wrote, unfolded
    content: bytes  # what the client sent; line ends are LF, as Postfix stores them


class Postfix:
    """A running instance. Messages for `domains` go to its mailbox, all others where `settings` say (relayhost)."""

    def __init__(
        self, name: str = "mx.example", domains: tuple[str, ...] = (), tls: Pair | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """tls: offer STARTTLS with it; settings: for main.cf, over those above."""
        # Not below pytest's own directory: that one is closed to Postfix's unprivileged processes.
        self.home = Path(tempfile.mkdtemp(prefix="willi-postfix-"))
        self.port = free_port()
        self.log_file = self.home / "mail.log"
        self._write_files(name, domains, tls, dict(settings or {}))
        command = ["postfix", "-c", str(self.home / "etc"), "start-fg"]
        self._process = subprocess.Popen(
            command, env=PATH, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(self._is_up, "Postfix's greeting", PATIENCE)
        except AssertionError as error:
            log = self.log_file.read_text() if self.log_file.exists() else "no log"
            self.stop()
            raise AssertionError(f"{error}:\n{log}") from None

    @property
    def server(self) -> str:
        """As a route names it."""
        return f"{HOST}:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="backslashreplace")

    def client(self) -> smtplib.SMTP:
        """A client of this Postfix itself: to send through it."""
        return smtplib.SMTP(HOST, self.port, local_hostname="c.example", timeout=PATIENCE)

    def stored(self, recipient: str = "") -> list[Stored]:
        """What lies in the mailbox now, for this recipient if one is named, the oldest first."""
        files = (self.home / "mailbox" / "all" / "new").glob("*")
        messages = [_parse(path.read_bytes()) for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]
        return [message for message in messages if recipient in ("", message.recipient)]

    def wait_for_message(self, recipient: str, number: int = 0) -> Stored:
        """The message of that number (from 0) for this recipient."""
        wait_until(lambda: len(self.stored(recipient)) > number, f"message {number} for {recipient}")
        return self.stored(recipient)[number]

    def queue(self) -> list[dict[str, object]]:
        """What waits, as `postqueue -j` tells it: queue_name, sender, recipients with their delay_reason."""
        lines = self._command("postqueue", "-j").splitlines()
        return [json.loads(line) for line in lines]

    def is_idle(self) -> bool:
        """Whether nothing waits to be delivered."""
        return not self.queue()

    def flush(self) -> None:
        """Try all that was deferred now."""
        self._command("postqueue", "-f")

    def stop(self) -> None:
        """Stop all its processes and remove its files. A second time does nothing."""
        if not self.home.exists():
            return
        pid_file = self.home / "queue" / "pid" / "master.pid"
        if self._process.poll() is None and pid_file.exists():
            master = int(pid_file.read_text())  # it leads a process group of its own
            os.killpg(master, signal.SIGTERM)
            self._process.wait(PATIENCE)  # the start-up script, which waits for master
            with contextlib.suppress(ProcessLookupError):
                os.killpg(master, signal.SIGKILL)  # whoever has not obeyed yet
        else:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def _command(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self.home / "etc"), *arguments]
        return subprocess.run(command, env=PATH, capture_output=True, text=True, check=True).stdout

    def _write_files(self, name: str, domains: tuple[str, ...], tls: Pair | None, settings: dict[str, str]) -> None:
        self.home.chmod(0o755)
        for directory in ("etc", "queue", "data", "mailbox"):
            (self.home / directory).mkdir()
        shutil.chown(self.home / "data", "postfix")
        (self.home / "mailbox" / "all").mkdir()
        for path in (self.home / "mailbox", self.home / "mailbox" / "all"):
            shutil.chown(path, MAILBOX_UID, MAILBOX_UID)
        main_cf = MAIN_CF.format(home=self.home, name=name, domains=" ".join(domains), uid=MAILBOX_UID)
        if tls:
            tls_settings = {"smtpd_tls_cert_file": tls.cert, "smtpd_tls_key_file": tls.key}
            settings = {**{k: str(v) for k, v in tls_settings.items()}, "smtpd_tls_security_level": "may", **settings}
        ours = re.sub(rf"(?m)^({'|'.join(settings) or '-'}) =.*\n", "", main_cf)  # Postfix warns of a name given twice
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (self.home / "etc" / "main.cf").write_text(ours + lines)
        (self.home / "etc" / "master.cf").write_text(MASTER_CF.format(port=f"{HOST}:{self.port}"))

    def _is_up(self) -> bool:
        assert self._process.poll() is None, f"postfix start-fg ended with {self._process.returncode}"
        try:
            with smtplib.SMTP(HOST, self.port, timeout=PATIENCE):
                return True
        except (ConnectionError, smtplib.SMTPException):
            return False


def _parse(octets: bytes) -> Stored:
    """Take off what this Postfix put on top: three headers by virtual(8), then a folded one by smtpd(8)."""
    found = re.match(
        rb"Return-Path: <(.*)>\nX-Original-To: (.*)\nDelivered-To: .*\n(Received: .*\n(?:[ \t].*\n)*)", octets
    )
    assert found, f"not what Postfix stores: {octets[:500]!r}"
    sender, recipient, received = (part.decode() for part in found.groups())
    return Stored(sender, recipient, " ".join(received.split()), octets[found.end() :])
