"""What is on this machine: the certificates that clients are shown, the rights of files, and the ports."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import gevent

from ..config import Address, Certificate, Settings
from ..config.settings import paths_of
from ..hosts import EVERYWHERE
from ..mappings.open import others_can_read
from ..net.key_exchange import has_costly_groups
from ..net.tls import ANY_STRENGTH, IGNORE_DATES, CertificateError, CertificateFacts, certificate_facts, show
from ..processes.listeners import CannotBind, Listeners
from ..status.finding import Finding, certificate_level
from ..status.words import time_left
from .finding import faults

NO_ISSUER = (2, 20, 21)  # X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT, ..._LOCALLY, ..._VERIFY_LEAF_SIGNATURE
RENEW = "renew it: a running Willi reads the new file by itself"
PATIENCE = 2.0  # seconds for the program that listens on a port to say something
MAX_GREETING = 200  # octets of what it says that are shown
GO_PROGRAM = "ESMTP Service Ready"  # the end of its greeting
UNIT = Path("/etc/systemd/system/willi.service")
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # by its ProtectHome and PrivateTmp
MAX_METRICS = 1 << 16  # octets in which Willi would have named one of its own

# -- certificates


def check_certificates(settings: Settings) -> Iterator[Finding]:
    """For which names, from when to when, and signed by whom; and what an attacker could make us compute."""
    if not settings.certificates:
        what = "not set: STARTTLS is not offered, mail comes in clear"
        yield Finding("warn", "tls_cert", what, "set tls_cert and tls_key")
        return
    read: list[CertificateFacts] = []
    for pair in settings.certificates:
        try:
            facts = certificate_facts(pair, settings.certificates)
        except CertificateError as error:
            yield from faults(str(error))
            continue
        read.append(facts)
        yield _check_dates(pair.cert, f"for {', '.join(facts.names) or 'no name'}", facts)
        yield from _check_chain(pair, facts)
    domain = settings.domain.lower()
    if read and not {domain, f"*.{domain.partition('.')[2]}"} & {name for facts in read for name in facts.names}:
        what = f"no certificate is for {settings.domain}: senders that verify (MTA-STS, DANE) do not deliver"
        advice = "name the right file in tls_cert, or have one issued for the names of your MX"
        yield Finding("warn", "tls_cert", what, advice)
    if has_costly_groups():
        what = "OpenSSL agrees to fields over ffdhe3072, by which few clients can take all CPU (CVE-2002-20001)"
        yield Finding("warn", "tls_cert", what, "set Groups in openssl.cnf, as in X25519:P-256:P-384")


def seconds_left(facts: CertificateFacts) -> float:
    """Until the certificate ends; below 0 if it has."""
    return (facts.expires - datetime.now(timezone.utc)).total_seconds()


def _check_dates(file: str, name: str, facts: CertificateFacts) -> Finding:
    left = seconds_left(facts)
    text = f"{name}, until {facts.expires:%Y-%m-%d} ({time_left(left)})"
    if facts.begins > datetime.now(timezone.utc):
        text += f", but not before {facts.begins:%Y-%m-%d %H:%M} UTC"
        return Finding("wrong", file, text, "until then keep the old one; or is the clock of this machine wrong?")
    level = certificate_level(left)
    return Finding(level, file, text, RENEW if level != "ok" else "")


def _check_chain(pair: Certificate, facts: CertificateFacts) -> Iterator[Finding]:
    """The certificates behind the first one in its file: are they in force, and do they lead to an authority?"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pair.cert)
    behind = {one.subject: one for one in map(CertificateFacts, context.get_ca_certs()) if one.decoded != facts.decoded}
    for authority in behind.values():
        finding = _check_dates(pair.cert, f"the certificate of {authority.subject} in it", authority)
        if finding.level != "ok" and authority.subject != authority.issuer:  # of a root, clients look at their own copy
            yield finding
    if _lacks_issuer(pair):
        top = facts
        while top.issuer in behind:
            top = behind.pop(top.issuer)
        what = f"its chain ends at {top.issuer}, which is neither in the file nor known to this system"
        advice = "append the certificates between yours and the root (fullchain.pem), unless that is a root of your own"
        yield Finding("warn", pair.cert, f"{what}: senders that verify do not deliver", advice)


def _lacks_issuer(pair: Certificate) -> bool:
    """Whether a client that knows what this system knows cannot tell who has signed it."""
    paths = ssl.get_default_verify_paths()
    if not paths.cafile and not (paths.capath and any(Path(paths.capath).iterdir())):
        return False  # it knows no authority at all
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.set_ciphers(ANY_STRENGTH)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags(IGNORE_DATES)
    try:
        client.load_default_certs()
        server.load_cert_chain(pair.cert, pair.key)  # without a question: certificate_facts has read it
        show(server, client)
    except ssl.SSLCertVerificationError as error:
        return error.verify_code in NO_ISSUER
    return False


# -- files


def check_files(settings: Settings) -> Iterator[Finding]:
    """Secrets that others can read, files that others can write, and those that the workers cannot read."""
    anybody = "every user of this machine can"
    for file, key in paths_of(settings):
        if key.is_secret and others_can_read(file):
            yield Finding("warn", file, f"{anybody} read this secret", f"chmod o= {file}")
    if any(getattr(one, "password", "") for one in settings.mappings) and others_can_read(settings.path):
        advice = f"chmod o= {settings.path}, or use password_file"
        yield Finding("warn", settings.path, f"{anybody} read the password in it", advice)
    for file in sorted({settings.path, *(file for file, _ in paths_of(settings))}):
        with suppress(OSError):
            mode = Path(file).stat().st_mode
            if stat.S_ISREG(mode) and mode & stat.S_IWOTH:
                yield Finding("wrong", file, f"{anybody} change it, and with it where mail goes", f"chmod o-w {file}")
    for file in sorted({file for file, _ in paths_of(settings)} if UNIT.exists() else ()):
        for directory in HIDDEN:
            if Path(os.path.realpath(file)).is_relative_to(directory):
                what = f"systemd hides {directory} from the service, which finds no such file or may not read it"
                yield Finding("warn", file, what, "move it to /opt/willi/etc, or see ProtectHome in the unit")


def check_rights(settings: Settings) -> Iterator[Finding]:
    """Of the files that the workers read when they are no longer root."""
    if os.geteuid() != 0:
        return
    if not settings.user:
        what = "not set: a Willi that root starts stays root; and what root can read here, the service perhaps cannot"
        advice = "set user, or check as the user of the service: runuser -u willi -g willi -- willi.py check"
        yield Finding("warn", "user", what, advice)
        return
    account = pwd.getpwnam(settings.user)
    group = grp.getgrnam(settings.group).gr_gid if settings.group else account.pw_gid
    groups = os.getgrouplist(settings.user, group)
    for file in sorted({file for file, key in paths_of(settings) if not key.is_watched and Path(file).exists()}):
        test = subprocess.run(["test", "-r", file], user=account.pw_uid, group=group, extra_groups=groups, check=False)
        if test.returncode != 0:
            advice = f"let that user read it, and enter its directory: namei -l {file}"
            yield Finding("wrong", file, f"{settings.user} (user) may not read it, and will have to", advice)


# -- ports


def check_ports(settings: Settings, quick: bool = False) -> Iterator[Finding]:
    """Whether each address can be had, or Willi has it already.

    quick: what is wrong would stop a start. A port that is taken may be that of the Go program, whose place Willi
        takes, or of a Willi that greets only behind a PROXY header; and a status that cannot be had is tried again.
    """
    for address in settings.listen:
        yield _check_port("listen", address, quick)
    if not (status := settings.status_listen):
        return
    finding = _check_port("status_listen", status)
    if quick and finding.level == "wrong":
        finding = replace(finding, level="warn", what=f"{finding.what}: there would be no status for now")
    yield finding
    same_port = [one for one in settings.listen if one.port == status.port != 0]
    if not quick and any(one.host == status.host or {one.host, status.host} & EVERYWHERE.keys() for one in same_port):
        yield Finding("wrong", "status_listen", f"{status} is in listen, too", "take another port")


def _check_port(setting: str, address: Address, quick: bool = False) -> Finding:
    """Listen there for a moment, as the master does."""
    try:
        listeners = Listeners()
        listeners.open([address], patience=0)
        listeners.close()
        return Finding("ok", setting, f"{address} is free")
    except CannotBind as error:
        fault, code = str(error), getattr(error.__cause__, "errno", 0)
    if code not in (errno.EADDRINUSE, errno.EACCES):
        advice = "name an address of this machine: ip address" if code == errno.EADDRNOTAVAIL else ""
        return Finding("wrong", setting, fault, advice)
    said = _ask_program(setting, address)
    if said is None and code == errno.EACCES:
        what = f"{address} is free (below port 1024: this user may not open it, the service may)"
        return Finding("ok", setting, what)
    if said and ("willi_" in said or said.endswith("ESMTP Willi")):
        return Finding("ok", setting, f"Willi listens on {address} already")
    what = f"{address} belongs to another program, which says {repr(said[:MAX_GREETING]) if said else 'nothing'}"
    advice = f"see which: ss -ltnp 'sport = :{address.port}'; stop it, and keep it from starting again, or take another"
    is_foreign = said is not None and said.startswith("220 ") and not said.endswith(GO_PROGRAM)
    return Finding("warn" if quick and not is_foreign else "wrong", setting, what, f"{advice} address")


def _ask_program(setting: str, address: Address) -> str | None:
    """What the program that listens there greets with or, for a status, says of itself; None: there is no program."""
    said = None
    whole = gevent.Timeout(PATIENCE, TimeoutError)  # the socket's own limit is for each read
    with whole, suppress(OSError), socket.create_connection((address.here.host, address.port), PATIENCE) as connection:
        said = ""
        if setting == "status_listen":
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                said = answer.read(MAX_METRICS).decode("utf-8", "replace")
        else:
            said = connection.recv(MAX_GREETING).decode("utf-8", "replace").partition("\r\n")[0]
            connection.sendall(b"QUIT\r\n")
    return said
