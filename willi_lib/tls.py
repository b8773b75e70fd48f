"""TLS contexts: ours for clients (several certificates, chosen by SNI) and those for upstreams."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from .config import Certificate

VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}
ANY_STRENGTH = "DEFAULT:@SECLEVEL=0"  # what TLS before 1.2 and short keys need from OpenSSL 3
IGNORE_DATES = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name


class CertificateError(Exception):
    """A certificate or key that cannot be used; the text names the file."""


def server_context(certificates: Sequence[Certificate], oldest: str) -> ssl.SSLContext | None:
    """The context for STARTTLS of clients; the first pair serves whoever names no host or an unknown one.

    oldest: a key of VERSIONS. None: there is no certificate, so STARTTLS is not offered.
    Raises CertificateError.
    """
    if not certificates:
        return None
    contexts = [_one_server_context(pair, oldest) for pair in certificates]
    by_name = {
        name: context
        for pair, context in reversed(list(zip(certificates, contexts, strict=True)))
        for name in certificate_facts(pair).names
    }

    def choose(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> None:
        wanted = (name or "").lower()
        chosen = by_name.get(wanted) or by_name.get("*." + wanted.partition(".")[2])
        if chosen:
            tls.context = chosen

    if len(contexts) > 1:
        contexts[0].sni_callback = choose
    return contexts[0]


def _one_server_context(pair: Certificate, oldest: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSIONS[oldest]
    context.options |= ssl.OP_NO_RENEGOTIATION
    if oldest in ("1.0", "1.1"):
        context.set_ciphers(ANY_STRENGTH)
    context.num_tickets = 1  # of two, as measured: a handshake costs up to 9 % less
    try:
        context.load_cert_chain(pair.cert, pair.key)
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(f"{pair.cert}, {pair.key}: {getattr(error, 'reason', None) or error}") from None
    return context


def client_context(verify: bool, ca_file: str = "") -> ssl.SSLContext:
    """The context for an upstream.

    verify: certificate and name are checked, against `ca_file` or the system's CAs. If
        not, the CAs are not even loaded: looking for an unknown issuer among them
        costs half a handshake.
    Raises CertificateError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if verify else ssl.TLSVersion.TLSv1
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers(ANY_STRENGTH)
        return context
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs()
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(f"{ca_file}: {getattr(error, 'reason', None) or error}") from None
    return context


class CertificateFacts:
    """What an administrator wants to know of a certificate."""

    def __init__(self, decoded: Mapping[str, object]) -> None:
        alternatives = decoded.get("subjectAltName", ())
        assert isinstance(alternatives, tuple)
        self.names = [name.lower() for kind, name in alternatives if kind == "DNS"]
        if not self.names:  # an old one, with a common name only
            subject = decoded.get("subject", ())
            assert isinstance(subject, tuple)
            self.names = [value.lower() for rdn in subject for key, value in rdn if key == "commonName"]
        self.expires = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(decoded["notAfter"])), timezone.utc)


def certificate_facts(pair: Certificate) -> CertificateFacts:
    """Read a certificate by showing it to ourselves: the ssl module decodes only what a peer presents.

    Raises CertificateError.
    """
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server_side.set_ciphers(ANY_STRENGTH)
    client_side.set_ciphers(ANY_STRENGTH)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | IGNORE_DATES)
    try:
        server_side.load_cert_chain(pair.cert, pair.key)
        client_side.load_verify_locations(pair.cert)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_side.wrap_bio(to_client, to_server)
        server = server_side.wrap_bio(to_server, to_client, server_side=True)
        for side in (client, server, client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:  # it is the other one's turn
                continue
        return CertificateFacts(client.getpeercert() or {})
    except ssl.SSLCertVerificationError as error:  # it may not be used by a server
        raise CertificateError(f"{pair.cert}: {error.verify_message}") from None
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(f"{pair.cert}, {pair.key}: {getattr(error, 'reason', None) or error}") from None
