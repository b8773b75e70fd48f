"""Contexts for clients and for upstreams, tried with both ends in memory."""

from __future__ import annotations

import re
import ssl
import subprocess
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.support.certificates import Pair
from willi_lib.config import Certificate
from willi_lib.tls import CertificateError, certificate_facts, client_context, server_context

pytestmark = pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")  # that is what some are about


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = "mx.example"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends. Raises SSLError, from the end that finds fault."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(3):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert ends[1].version()
    return ends


def configured(pair: Pair) -> Certificate:
    return Certificate(str(pair.cert), str(pair.key))


def serving(*pairs: Pair, oldest: str = "1.2") -> ssl.SSLContext:
    context = server_context([configured(pair) for pair in pairs], oldest)
    assert context
    return context


def unverified(newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = newest
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def shown_to(server: ssl.SSLContext, name: str | None) -> bytes | None:
    """The certificate that a client gets."""
    client, _ = shake_hands(server, unverified(), name)
    return client.getpeercert(binary_form=True)


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(re.sub(r"(?s)\A.*?(?=-----BEGIN CERT)", "", pair.cert.read_text()))


def made_by_openssl(directory: Path, *options: str) -> Pair:
    pair = Pair(directory / "special.pem", directory / "special.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-keyout", pair.key, "-out", pair.cert, *options],
        check=True, capture_output=True,
    )  # fmt: skip
    return pair


# For clients


def test_without_a_certificate_there_is_no_context():
    assert server_context([], "1.2") is None


@pytest.mark.parametrize(("name", "number"), [
    ("mx.example", 0), ("mx2.example", 1), ("MX2.Example", 1), ("also.mx2.example", 1), ("a.wild.example", 2),
    ("wild.example", 0), ("a.b.wild.example", 0), ("unknown.example", 0), ("localhost", 0), ("*.wild.example", 2),
    (None, 0), ("192.0.2.1", 0), ("both.example", 1), ("a.also.wild.example", 3),
])  # fmt: skip
def test_the_certificate_is_chosen_by_the_name_that_the_client_asks_for(certificates, name, number):
    pairs = [
        certificates.issue("mx.example"),
        certificates.issue("mx2.example", "also.mx2.example", "both.example"),
        certificates.issue("*.wild.example", "both.example"),
        certificates.issue("a.also.wild.example"),
    ]
    assert shown_to(serving(*pairs), name) == der(pairs[number])


def test_an_exact_name_beats_a_wildcard_whatever_their_order(certificates):
    wildcard, exact = certificates.issue("*.mx.example"), certificates.issue("a.mx.example")
    assert shown_to(serving(wildcard, exact), "a.mx.example") == der(exact)
    assert shown_to(serving(exact, wildcard), "a.mx.example") == der(exact)
    assert shown_to(serving(wildcard, exact), "b.mx.example") == der(wildcard)


def test_no_context_compresses_or_renegotiates(certificates):
    """OpenSSL 3 does neither by itself; older ones need to be told."""
    pair = certificates.issue("mx.example")
    served = serving(pair)
    assert served.options & ssl.OP_NO_RENEGOTIATION
    for context in (served, client_context(verify=True), client_context(verify=False)):
        assert context.options & ssl.OP_NO_COMPRESSION


@pytest.mark.parametrize(("oldest", "newest_of_client", "agreed"), [
    ("1.2", ssl.TLSVersion.TLSv1_1, None),
    ("1.2", ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
    ("1.3", ssl.TLSVersion.TLSv1_2, None),
    ("1.3", ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
    ("1.1", ssl.TLSVersion.TLSv1, None),
    ("1.1", ssl.TLSVersion.TLSv1_1, "TLSv1.1"),
    ("1.0", ssl.TLSVersion.TLSv1, "TLSv1"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["mx.example", "mx2.example"])
def test_a_version_below_the_oldest_is_refused_by_each_pair(certificates, oldest, newest_of_client, agreed, name):
    server = serving(certificates.issue("mx.example"), certificates.issue("mx2.example"), oldest=oldest)
    if agreed is None:
        with pytest.raises(ssl.SSLError, match=r"VERSION|PROTOCOL"):
            shake_hands(server, unverified(newest_of_client), name)
    else:
        client, _ = shake_hands(server, unverified(newest_of_client), name)
        assert client.version() == agreed


@pytest.mark.parametrize("which", ["cert", "key"])
@pytest.mark.parametrize("content", [None, b"", b"no PEM\xff"])
def test_a_file_that_cannot_be_used_is_named(certificates, tmp_path, which, content):
    good = certificates.issue("mx.example")
    files = {"cert": good.cert, "key": good.key, which: tmp_path / "bad.pem"}
    if content is not None:
        files[which].write_bytes(content)
    pair = Certificate(str(files["cert"]), str(files["key"]))
    for work in (lambda: server_context([configured(good), pair], "1.2"), lambda: certificate_facts(pair)):
        with pytest.raises(CertificateError, match=r"bad\.pem.*: .+"):
            work()


def test_a_key_of_another_certificate_is_refused(certificates):
    one, other = certificates.issue("mx.example"), certificates.issue("mx2.example")
    with pytest.raises(CertificateError, match="KEY_VALUES_MISMATCH"):
        server_context([Certificate(str(one.cert), str(other.key))], "1.2")


# What an administrator wants to know


def test_facts_are_the_names_and_the_end(certificates):
    facts = certificate_facts(configured(certificates.issue("MX.example", "*.Wild.example", "192.0.2.1")))
    assert facts.names == ["mx.example", "*.wild.example"]
    left = facts.expires - datetime.now(timezone.utc)
    assert timedelta(days=6) < left <= timedelta(days=7)


def test_facts_of_a_certificate_that_has_expired_or_that_nobody_trusts_can_be_read(certificates):
    facts = certificate_facts(configured(certificates.expired("mx.example")))
    assert facts.names == ["mx.example"]
    assert facts.expires < datetime.now(timezone.utc)
    assert certificate_facts(configured(certificates.self_signed("mx.example"))).names == ["mx.example"]


@pytest.mark.parametrize(("options", "names"), [
    (("-subj", "/O=Somebody/CN=Old.example"), ["old.example"]),
    (("-subj", "/O=Somebody"), []),
    (("-subj", "/CN=x.example", "-addext", "extendedKeyUsage=clientAuth,serverAuth"), ["x.example"]),
])  # fmt: skip
def test_facts_of_unusual_certificates_can_be_read(certificates, tmp_path, options, names):
    pair = made_by_openssl(tmp_path, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *options)
    assert certificate_facts(configured(pair)).names == names
    assert shown_to(serving(pair), "x.example") == der(pair)


@pytest.mark.parametrize("extension", ["extendedKeyUsage=clientAuth", "keyUsage=critical,keyCertSign"])
def test_a_certificate_that_is_not_for_servers_is_refused(certificates, tmp_path, extension):
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    pair = made_by_openssl(tmp_path, *curve, "-subj", "/CN=x.example", "-addext", extension)
    for work in (lambda: serving(pair), lambda: certificate_facts(configured(pair))):
        with pytest.raises(CertificateError, match=r"special\.pem: .*(purpose|usage)"):
            work()


def test_a_weak_key_serves_if_old_versions_are_wanted(certificates, tmp_path):
    pair = made_by_openssl(tmp_path, "-newkey", "rsa:1024", "-subj", "/CN=old.example")
    assert shown_to(serving(pair, oldest="1.0"), "old.example") == der(pair)
    assert certificate_facts(configured(pair)).names == ["old.example"]
    with pytest.raises(CertificateError, match=r"special\.pem.*: EE_KEY_TOO_SMALL"):
        server_context([configured(pair)], "1.2")


# For upstreams


def test_an_upstream_with_a_certificate_of_a_known_issuer_for_its_name_is_verified(certificates):
    client = client_context(verify=True, ca_file=str(certificates.ca))
    assert shake_hands(serving(certificates.issue("mx.example")), client)[0].getpeercert()


@pytest.mark.parametrize(("kind", "name", "why"), [
    ("issue", "other.example", "Hostname mismatch"),
    ("expired", "mx.example", "certificate has expired"),
    ("self_signed", "mx.example", "self.signed certificate"),
])  # fmt: skip
def test_verification_refuses_whom_it_must_and_without_it_anyone_will_do(certificates, kind, name, why):
    server = serving(getattr(certificates, kind)("mx.example"))
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        shake_hands(server, client_context(verify=True, ca_file=str(certificates.ca)), name)
    assert shake_hands(server, client_context(verify=False), name)[0].version()


def test_an_issuer_that_the_system_does_not_know_is_refused(certificates):
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer certificate"):
        shake_hands(serving(certificates.issue("mx.example")), client_context(verify=True))


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_an_old_upstream_is_taken_unless_it_must_be_verified(certificates, newest):
    server = serving(certificates.issue("mx.example"), oldest="1.0")
    server.maximum_version = newest
    assert shake_hands(server, client_context(verify=False))[0].version()
    with pytest.raises(ssl.SSLError, match=r"VERSION|PROTOCOL"):
        shake_hands(server, client_context(verify=True, ca_file=str(certificates.ca)))


@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_a_file_of_issuers_that_cannot_be_used_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(CertificateError, match=r"ca\.pem: .+"):
        client_context(verify=True, ca_file=str(tmp_path / "ca.pem"))
    assert client_context(verify=False, ca_file=str(tmp_path / "ca.pem"))
