"""TLS contexts: ours for clients (several certificates, chosen by SNI) and those for upstreams."""

from __future__ import annotations

import hashlib
import re
import ssl
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..config import Certificate, Settings
from ..files import open_file, read_file
from .key_exchange import limit_key_exchange
from .pem_files import BROKEN_PEM, fault_of, fault_of_authorities, mismatch, no_passphrase

VERSIONS = {
    "1.0": ssl.TLSVersion.MINIMUM_SUPPORTED,  # SSL 3 is not among them: Python rules it out by an option
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}
ANY_STRENGTH = "DEFAULT:@SECLEVEL=0"  # what TLS before 1.2 and short keys need from OpenSSL 3
HASHED_NAME = re.compile(r"[0-9a-f]{8}\.[0-9]+")  # of a certificate in a directory of authorities (c_rehash(1))
IGNORE_DATES = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name
WRONG_KEY = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")  # the last one: of another kind
KEY_KINDS = (  # the algorithm of the key in a certificate, as it is encoded there
    (bytes.fromhex("06072a8648ce3d0201"), "ECDSA"),
    (bytes.fromhex("06092a864886f70d010101"), "RSA"),
)

UpstreamContexts = Mapping[tuple[bool, str], ssl.SSLContext]  # by tls_verify and upstream_tls_ca


class CertificateError(Exception):
    """A certificate or key that cannot be used; the text names the file."""


def _context(protocol: int, oldest: str, any_strength: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of 1.1: the administrator knows what it is asked for
        context.minimum_version = VERSIONS[oldest]
    if any_strength:
        context.set_ciphers(ANY_STRENGTH)
    limit_key_exchange(context)
    return context


# For clients


@dataclass(frozen=True)
class ServerTls:
    """The context for clients, made before the fork: all workers share the keys of its session tickets."""

    context: ssl.SSLContext | None  # None: there is no certificate, so STARTTLS is not offered
    made_of: tuple[object, ...] = ()


def server_tls(settings: Settings, before: ServerTls | None = None) -> ServerTls:
    """The one before if its files and settings are the same, so that sessions go on to be resumed.

    Raises CertificateError.
    """
    try:
        digests = [hashlib.sha256(read_file(file)).digest() for file in (*settings.tls_cert, *settings.tls_key)]
    except OSError as error:
        raise CertificateError(f"{error.filename}: {error.strerror}") from None
    made_of = (settings.certificates, settings.tls_min_version, *digests)
    if before and before.made_of == made_of:
        return before
    return ServerTls(server_context(settings.certificates, settings.tls_min_version), made_of)


def server_context(certificates: Sequence[Certificate], oldest: str) -> ssl.SSLContext | None:
    """The context for STARTTLS of clients; the first pair serves clients that name no host or an unknown one.

    Pairs for the same name serve together if their keys are of different kinds, such as ECDSA and RSA.
    oldest: a key of VERSIONS. None: there is no certificate.
    Raises CertificateError.
    """
    if not certificates:
        return None
    facts = {pair: certificate_facts(pair, certificates) for pair in certificates}

    def one_of_each_kind(pairs: Iterable[Certificate]) -> tuple[Certificate, ...]:
        kinds: dict[str, Certificate] = {}
        for pair in pairs:
            kinds.setdefault(facts[pair].kind, pair)
        return tuple(kinds.values())

    def pairs_for(name: str) -> list[Certificate]:
        return [pair for one in (name, _wildcard_of(name)) for pair in certificates if one in facts[pair].names]

    first = certificates[0]
    by_name = {name: one_of_each_kind(pairs_for(name)) for pair in certificates for name in facts[pair].names}
    default = one_of_each_kind([first, *(pair for name in facts[first].names for pair in pairs_for(name))])
    contexts = {pairs: _one_server_context(pairs, oldest) for pairs in {default, *by_name.values()}}

    def choose(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> None:
        wanted = (name or "").lower().removesuffix(".")
        chosen = by_name.get(wanted) or by_name.get(_wildcard_of(wanted))
        if chosen:
            tls.context = contexts[chosen]

    if len(contexts) > 1:
        contexts[default].sni_callback = choose
    return contexts[default]


def _wildcard_of(name: str) -> str:
    return "*." + name.partition(".")[2]


def _one_server_context(pairs: Iterable[Certificate], oldest: str) -> ssl.SSLContext:
    """pairs: with keys of different kinds; OpenSSL takes the one that the client can use."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, oldest, any_strength=oldest in ("1.0", "1.1"))
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 1  # of two, as measured: a handshake costs up to 9 % less
    for pair in pairs:
        _load(context, pair)
    return context


def _load(context: ssl.SSLContext, pair: Certificate, others: Iterable[Certificate] = ()) -> None:
    """others: whose key it might be. Raises CertificateError."""
    try:
        fault = fault_of(pair.cert, pair.key)
        if fault:
            raise CertificateError(fault)
        context.load_cert_chain(pair.cert, pair.key, no_passphrase)
    except ssl.SSLError as error:
        if error.reason in WRONG_KEY:
            raise CertificateError(mismatch(pair.cert, pair.key, [other.key for other in others])) from None
        raise CertificateError(f"{pair.cert}, {pair.key}: {error.reason or BROKEN_PEM}") from None
    except OSError as error:
        raise CertificateError(f"{error.filename or f'{pair.cert}, {pair.key}'}: {error.strerror}") from None
    except ValueError as error:
        raise CertificateError(f"{pair.key}: tls_key {error}") from None


# For upstreams


@dataclass(frozen=True)
class UpstreamTls:
    """The contexts for upstreams, made before the fork: a worker is replaced though a file has gone."""

    contexts: UpstreamContexts
    made_of: tuple[object, ...]


def upstream_tls(settings: Settings, before: UpstreamTls | None = None) -> UpstreamTls:
    """The one before if its authorities are the same: others take memory. Raises CertificateError."""
    files = {mapping.policy.upstream_tls_ca for mapping in settings.mappings}
    digests: list[bytes] = []
    for file in sorted(path for name in files for path in _files_of_authorities(name)):
        with suppress(OSError):  # `client_context` says so, or passes over it
            digests.append(hashlib.sha256(read_file(file)).digest())
    made_of = (files, *digests)
    return before if before and before.made_of == made_of else UpstreamTls(upstream_contexts(settings), made_of)


def _files_of_authorities(file: str) -> list[str]:
    """file: empty for those of the system, which may be in a directory."""
    of_system = ssl.get_default_verify_paths()
    if file or of_system.cafile or not of_system.capath:
        return [file or of_system.cafile or ""]
    return [str(path) for path in Path(of_system.capath).glob("*")]


def upstream_contexts(settings: Settings) -> UpstreamContexts:
    """All that the mappings may need. Raises CertificateError."""
    files = {mapping.policy.upstream_tls_ca for mapping in settings.mappings}
    return {(verify, file): client_context(verify, file) for file in files for verify in (True, False)}


def client_context(verify: bool, ca_file: str = "") -> ssl.SSLContext:
    """The context for an upstream.

    verify: certificate and name are checked, against `ca_file` or the system's CAs. If
        not, the CAs are not even loaded: looking for an unknown issuer among them
        costs half a handshake.
    Raises CertificateError.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, "1.2" if verify else "1.0", any_strength=not verify)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    of_system = ssl.get_default_verify_paths()
    file, directory = (ca_file, None) if ca_file else (of_system.cafile, of_system.capath)
    try:
        if file:
            open_file(file).close()
        if file or directory:  # not load_default_certs: it says nothing if it cannot read them, and leaves an empty set
            context.load_verify_locations(file, directory)
        if directory and not file:
            _load_directory(context, directory)
    except OSError as error:
        setting = "upstream_tls_ca" if ca_file else "the authorities of this system"
        raise CertificateError(f"{file or directory}: {setting}: {fault_of_authorities(file or '', error)}") from None
    return context


def _load_directory(context: ssl.SSLContext, directory: str) -> None:
    """OpenSSL by itself opens them within a handshake: if we lack a descriptor then, the upstream seems to be at fault.

    Raises OSError.
    """
    for file in Path(directory).iterdir():
        with suppress(ssl.SSLError, FileNotFoundError, PermissionError):  # OpenSSL passes over these, too
            if HASHED_NAME.fullmatch(file.name):
                context.load_verify_locations(file)


class CertificateFacts:
    """What an administrator wants to know of a certificate."""

    def __init__(self, decoded: Mapping[str, object], kind: str = "") -> None:
        """decoded: as by SSLSocket.getpeercert. kind: of its key, such as ECDSA or RSA."""
        self.decoded = decoded
        alternatives = decoded.get("subjectAltName", ())
        assert isinstance(alternatives, tuple)
        self.names = [name.lower() for kind, name in alternatives if kind == "DNS"]
        if not self.names:  # an old one, with a common name only
            subject = decoded.get("subject", ())
            assert isinstance(subject, tuple)
            self.names = [value.lower() for rdn in subject for key, value in rdn if key == "commonName"]
        self.begins, self.expires = (_date(str(decoded[key])) for key in ("notBefore", "notAfter"))
        self.subject, self.issuer = (_words(decoded.get(key, ())) for key in ("subject", "issuer"))
        self.kind = kind


def _words(name: object) -> str:
    """A distinguished name, as C=US, O=Let's Encrypt, CN=E7."""
    assert isinstance(name, tuple)
    short = {"countryName": "C", "organizationName": "O", "organizationalUnitName": "OU", "commonName": "CN"}
    return ", ".join(f"{short.get(key, key)}={value}" for rdn in name for key, value in rdn)


def _date(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), timezone.utc)


def certificate_facts(pair: Certificate, others: Iterable[Certificate] = ()) -> CertificateFacts:
    """Read a certificate by showing it to ourselves: the ssl module decodes only what a peer presents.

    others: the other pairs that are configured, for advice. Raises CertificateError.
    """
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server_side.set_ciphers(ANY_STRENGTH)
    client_side.set_ciphers(ANY_STRENGTH)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | IGNORE_DATES)
    try:
        _load(server_side, pair, others)
        client_side.load_verify_locations(pair.cert)
        client = show(server_side, client_side)
        der = client.getpeercert(binary_form=True) or b""
        kind = next((kind for encoded, kind in KEY_KINDS if encoded in der), "other")
        return CertificateFacts(client.getpeercert() or {}, kind)
    except ssl.SSLCertVerificationError as error:  # it may not be used by a server
        raise CertificateError(f"{pair.cert}: {error.verify_message}") from None
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(f"{pair.cert}, {pair.key}: {getattr(error, 'reason', None) or error}") from None


def show(server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> ssl.SSLObject:
    """The client's end of a handshake in memory. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):  # it is the other one's turn
            side.do_handshake()
    return client
