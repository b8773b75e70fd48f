"""The real Exim, in a Debian of its own: own configuration, spool, mailbox and log, loopback only, no DNS."""

from __future__ import annotations

import re
import shutil
import smtplib
from collections.abc import Mapping, Sequence

from tests.support.certificates import Pair
from tests.support.loopback import HOST, PATIENCE, free_port, wait_until
from tests.support.postfix import Stored
from tests.support.refusals import REFUSALS
from tests.support.twin import Twin

PACKAGE = "exim4-daemon-heavy"

CONFIGURATION = """\
primary_hostname = {name}
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
spool_directory = {home}/spool
log_file_path = {home}/log/%s
pid_file_path = {home}/spool/pid
keep_environment =
smtp_accept_max = 0
message_size_limit = 100M
# Nothing is looked up.
host_lookup =
rfc1413_query_timeout = 0s
# Who comes from this address must say in a PROXY header who he is.
hosts_proxy = {proxies}
{tls}
acl_smtp_connect = check_connect
acl_smtp_helo = check_ehlo
acl_smtp_mail = check_mail
acl_smtp_rcpt = check_rcpt
acl_smtp_predata = check_data
acl_smtp_data = check_end

begin acl
{acls}
begin routers
store:
  driver = accept
  domains = {domains}
  transport = store
send:
  driver = manualroute
  route_list = {routes}
  self = send
  transport = send

begin transports
store:
  driver = appendfile
  maildir_format
  directory = {home}/mailbox
  create_directory
  user = nobody
  group = nogroup
  return_path_add
  envelope_to_add
send:
  driver = smtp
  allow_localhost
  interface = {source}
  tls_try_verify_hosts =
  tls_verify_hosts =
  tls_verify_cert_hostnames =
  hosts_try_dane =

begin retry
* * F,1h,2s

begin rewrite
begin authenticators
"""
CONDITIONS = {
    "connect": "hosts = {}", "ehlo": "condition = ${{if eq{{$sender_helo_name}}{{{}}}}}", "mail": "senders = {}",
    "rcpt": "recipients = {}", "data": "senders = {}", "end": "senders = {}",
}  # fmt: skip


class Exim:
    """A running instance. Messages for `domains` go to its mailbox, those for `relays` to a port of this machine."""

    def __init__(
        self, domains: Sequence[str] = (), tls: Pair | None = None, proxies: str = "",
        relays: Mapping[str, int] | None = None, source: str = HOST,
    ) -> None:  # fmt: skip
        """tls: offer STARTTLS with it. proxies: who sends a PROXY header. source: where relayed mail comes from."""
        self._twin = Twin(PACKAGE)
        self.home = self._twin.home
        self.port = free_port()
        self.log_file = self.home / "log" / "main"
        for name in ("spool", "log", "mailbox"):
            (self.home / name).mkdir()
        try:
            self._write_configuration(domains, tls, proxies, relays or {}, source)
            self._twin.run("chown", "Debian-exim:Debian-exim", str(self.home / "spool"), str(self.home / "log"))
            self._twin.run("chown", "nobody", str(self.home / "mailbox"))
            self._process = self._twin.start("exim4", "-bdf", "-q1s", log_file=self.home / "stderr.log")
            wait_until(self._is_up, "Exim's greeting")
        except BaseException:
            self.stop()
            raise

    @property
    def server(self) -> str:
        """As a route names it."""
        return f"{HOST}:{self.port}"

    def _write_configuration(
        self, domains: Sequence[str], tls: Pair | None, proxies: str, relays: Mapping[str, int], source: str
    ) -> None:
        lines = [f"tls_advertise_hosts = {'*' if tls else ''}"]
        if tls:
            for name, path in (("certificate", tls.cert), ("privatekey", tls.key)):
                shutil.copy(path, self.home / f"{name}.pem")
                self._twin.run("chown", "Debian-exim", str(self.home / f"{name}.pem"))
                lines.append(f"tls_{name} = {self.home}/{name}.pem")
        text = CONFIGURATION.format(
            name="mx.example", port=self.port, home=self.home, proxies=proxies, tls="\n".join(lines),
            acls=_acls([*domains, *relays]), domains=" : ".join(domains), source=source,
            routes="; ".join(f"{domain} {HOST}::{port} byname" for domain, port in relays.items()),
        )  # fmt: skip
        (self.home / "exim.conf").write_text(text)
        self._twin.run("sh", "-c", f"cp {self.home}/exim.conf /etc/exim4/exim4.conf")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, (self.home / "stderr.log").read_text()
        try:
            with self.client():
                return True
        except (ConnectionError, smtplib.SMTPException):
            return False

    def client(self) -> smtplib.SMTP:
        """A client of this Exim itself: to send through it."""
        return smtplib.SMTP(HOST, self.port, local_hostname="c.example", timeout=PATIENCE)

    def stored(self) -> list[Stored]:
        """What lies in the mailbox now."""
        return [_parse(path.read_bytes()) for path in (self.home / "mailbox" / "new").glob("*")]

    def is_idle(self) -> bool:
        """Whether nothing waits to be delivered."""
        return self._twin.run("exim4", "-bpc").strip() == "0"

    def close(self) -> None:
        """For contextlib.closing."""
        self.stop()

    def stop(self) -> None:
        """End it and remove its files."""
        self._twin.stop()
        if hasattr(self, "_process"):
            self._process.wait(PATIENCE)


def _acls(domains: Sequence[str]) -> str:
    lines = []
    for name, condition in CONDITIONS.items():
        lines.append(f"check_{name}:")
        for refusal in REFUSALS:
            if refusal.at == name:
                lines.append("  deny" if refusal.code >= 500 else "  defer")
                lines.append(f"    message = {refusal.code} {refusal.words}")
                lines.append(f"    {condition.format(refusal.whom)}")
        if name == "rcpt" and domains:
            lines.append("  deny")
            lines.append("    message = relay not permitted")
            lines.append(f"    !domains = {' : '.join(domains)}")
        lines.append("  accept")
    return "\n".join(lines)


def _parse(octets: bytes) -> Stored:
    """Take off what this Exim put on top: Return-path, Envelope-to and Received, folded if they are long."""
    found = re.match(rb"Return-path: <(.*)>\nEnvelope-to: (.*\n(?:[ \t].*\n)*)(Received: .*\n(?:[ \t].*\n)*)", octets)
    assert found, f"not what Exim stores: {octets[:500]!r}"
    sender, recipients, received = (" ".join(part.decode().split()) for part in found.groups())
    return Stored(sender, recipients, received, octets[found.end() :])
