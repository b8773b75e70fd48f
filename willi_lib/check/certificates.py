"""The certificates that are shown to clients: whom they are for, from when to when, and who has signed them."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from willi_lib.config import Certificate, Settings
from willi_lib.net.key_exchange import has_costly_groups
from willi_lib.net.tls import ANY_STRENGTH, IGNORE_DATES, CertificateError, CertificateFacts, certificate_facts, show
from willi_lib.status.words import time_left

from .report import Report

WARN_DAYS = 14  # before a certificate ends
NO_ISSUER = (2, 20, 21)  # X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT, ..._LOCALLY, ..._VERIFY_LEAF_SIGNATURE
RENEW = "renew it: a running Willi reads the new file by itself"


def days_left(expires: datetime) -> int:
    """Whole days until then; below 0 if it is over."""
    return (expires - datetime.now(timezone.utc)).days


def look_at_certificates(settings: Settings, report: Report) -> None:
    """Those shown to clients, and what an attacker could make us compute."""
    if not settings.certificates:
        report.warn("tls_cert", "not set: STARTTLS is not offered, mail comes in clear", "set tls_cert and tls_key")
        return
    known: list[CertificateFacts] = []
    for pair in settings.certificates:
        try:
            facts = certificate_facts(pair, settings.certificates)
        except CertificateError as error:
            report.faults(str(error))
            continue
        known.append(facts)
        _look_at_dates(pair.cert, facts, report)
        _look_at_chain(pair, facts, report)
    domain = settings.domain.lower()
    names = {name for facts in known for name in facts.names}
    if known and not names & {domain, f"*.{domain.partition('.')[2]}"}:
        what = f"no certificate is for {settings.domain}: senders that verify (MTA-STS, DANE) do not deliver"
        report.warn("tls_cert", what, "name the right file in tls_cert, or have one issued for the names of your MX")
    if has_costly_groups():
        what = "OpenSSL agrees to fields over ffdhe3072, by which few clients can take all CPU (CVE-2002-20001)"
        report.warn("tls_cert", what, "set Groups in openssl.cnf, as in X25519:P-256:P-384")


def _look_at_dates(file: str, facts: CertificateFacts, report: Report) -> None:
    now = datetime.now(timezone.utc)
    left = time_left((facts.expires - now).total_seconds())
    text = f"for {', '.join(facts.names) or 'no name'}, until {facts.expires:%Y-%m-%d} ({left})"
    if facts.begins > now:
        text += f", but not before {facts.begins:%Y-%m-%d %H:%M} UTC"
        report.wrong(file, text, "until then keep the old one; or is the clock of this machine wrong?")
    elif facts.expires < now:
        report.wrong(file, text, RENEW)
    elif days_left(facts.expires) < WARN_DAYS:
        report.warn(file, text, RENEW)
    else:
        report.ok(file, text)


def _look_at_chain(pair: Certificate, facts: CertificateFacts, report: Report) -> None:
    """Those behind the certificate in its file: are they good today, and do they lead to an authority?"""
    now = datetime.now(timezone.utc)
    chain = list(_authorities_in(pair.cert, facts))
    for authority in chain:
        if authority.subject == authority.issuer:
            continue  # a root: clients look at their own copy
        what = f"the certificate of {authority.subject} in it"
        if authority.expires < now:
            report.wrong(pair.cert, f"{what} ended on {authority.expires:%Y-%m-%d}", "put the issuer's new chain there")
        elif authority.begins > now:
            report.wrong(pair.cert, f"{what} is not good before {authority.begins:%Y-%m-%d}", "is the clock wrong?")
        elif days_left(authority.expires) < WARN_DAYS:
            report.warn(pair.cert, f"{what} ends on {authority.expires:%Y-%m-%d}", RENEW)
    if _lacks_issuer(pair):
        top, by_subject = facts, {authority.subject: authority for authority in chain}
        while top.issuer in by_subject:
            top = by_subject.pop(top.issuer)
        what = f"its chain ends at {top.issuer}, which is neither in the file nor known to this system"
        advice = "append the certificates between yours and the root (fullchain.pem), unless that is a root of your own"
        report.warn(pair.cert, f"{what}: senders that verify do not deliver", advice)


def _authorities_in(file: str, leaf: CertificateFacts) -> Iterator[CertificateFacts]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(file)
    for decoded in context.get_ca_certs():
        if decoded != leaf.decoded:
            yield CertificateFacts(decoded)


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
