"""Contexts for clients and for upstreams, tried with both ends in memory."""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
import subprocess
import sys
import warnings
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.support.certificates import Authority, Pair
from tests.support.descriptors import Descriptors
from tests.support.loopback import ROOT
from willi_lib.config import Certificate, Settings
from willi_lib.net import key_exchange
from willi_lib.net.pem_files import BROKEN_PEM
from willi_lib.net.tls import (
    VERSIONS,
    CertificateError,
    certificate_facts,
    client_context,
    server_context,
    server_tls,
)

# The clients of some tests speak old versions; what Willi makes must not be warned of.
pytestmark = pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning:tests")


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


# Files that are something else


def converted(tmp_path: Path, name: str, *arguments: str | Path) -> Path:
    """What the openssl command makes of a file."""
    made = tmp_path / name
    subprocess.run(["openssl", *arguments, "-out", made], check=True, capture_output=True)
    return made


def fault(cert: Path, key: Path, *others: Pair) -> str:
    with pytest.raises(CertificateError) as caught:
        server_context([Certificate(str(cert), str(key)), *map(configured, others)], "1.2")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="session")
def one(certificates: Authority) -> Pair:
    return certificates.issue("mx.example")


def test_a_key_of_another_certificate_is_named_with_what_to_compare(certificates, one):
    other = certificates.issue("mx2.example")
    said = fault(one.cert, other.key)
    assert said.startswith(f"{other.key}: tls_key is not the key of the certificate in tls_cert {one.cert}; compare ")
    assert "openssl x509 -noout -pubkey" in said and "openssl pkey -pubout" in said


def test_keys_in_another_order_than_their_certificates_are_told_so(certificates, one):
    other = certificates.issue("mx2.example")
    said = fault(one.cert, other.key, Pair(other.cert, one.key))
    assert said.endswith(f"; that is {one.key}: name certificates and keys in the same order")


def test_a_key_of_another_kind_is_named(certificates, one):
    rsa = certificates.issue_rsa("mx.example")
    assert "is not the key of the certificate" in fault(one.cert, rsa.key)


def test_certificate_and_key_exchanged(one):
    assert fault(one.key, one.cert) == (
        f"{one.key}: tls_cert is the private key, and tls_key {one.cert} the certificate: exchange the two"
    )


def test_a_chain_that_does_not_begin_with_the_certificate(certificates, one, tmp_path):
    chain = tmp_path / "chain.pem"
    chain.write_bytes(certificates.ca.read_bytes() + one.cert.read_bytes())
    assert fault(chain, one.key) == (
        f"{chain}: tls_cert begins with another certificate than that of {one.key}: put that one first"
    )


@pytest.mark.parametrize(
    "spoil",
    [lambda pem, ca: pem[:-100], lambda pem, ca: pem.rstrip() + ca, lambda pem, ca: pem.replace(b"\n", b"\\n")],
    ids=["cut off", "two in a line", "escaped"],
)
def test_broken_pem_is_told_so(certificates, one, tmp_path, spoil):
    broken = tmp_path / "broken.pem"
    broken.write_bytes(spoil(one.cert.read_bytes(), certificates.ca.read_bytes()))
    assert fault(broken, one.key) == f"{broken}, {one.key}: {BROKEN_PEM}"


@pytest.mark.parametrize("encryption", [("pkey", "-aes128"), ("ec", "-aes128")], ids=["PKCS#8", "traditional"])
def test_a_key_with_a_passphrase(one, tmp_path, encryption):
    key = converted(tmp_path, "locked.key", *encryption, "-passout", "pass:secret", "-in", one.key)
    assert fault(one.cert, key) == (
        f"{key}: tls_key has a passphrase, and Willi never asks for one: "
        f"openssl pkey -in {key} -out {tmp_path}/locked.pem, and chmod 640"
    )


def test_pkcs12(one, tmp_path):
    both = converted(
        tmp_path, "mx.p12", "pkcs12", "-export", "-in", one.cert, "-inkey", one.key, "-passout", "pass:secret"
    )
    assert fault(both, both) == (
        f"{both}: tls_cert is a PKCS#12 file, PEM is needed: openssl pkcs12 -in {both} -nokeys -out {tmp_path}/mx.pem"
    )
    said = fault(one.cert, both)
    assert said.startswith(f"{both}: tls_key is a PKCS#12 file, PEM is needed: openssl pkcs12 -in {both} -nocerts ")


@pytest.mark.parametrize(
    ("which", "command", "said"),
    [
        ("cert", ("x509", "-outform", "DER"), "openssl x509 -inform DER -in "),
        ("key", ("pkey", "-outform", "DER"), "openssl pkey -inform DER -in "),
        ("key", ("ec", "-outform", "DER"), "openssl pkey -inform DER -in "),
        ("cert", ("crl2pkcs7", "-nocrl", "-certfile"), "openssl pkcs7 -print_certs -in "),
        ("key", ("pkey", "-pubout"), "is a public key: name the private key"),
    ],
)
def test_a_file_in_another_form_is_told_with_the_command_that_helps(one, tmp_path, which, command, said):
    source = getattr(one, which)
    made = converted(tmp_path, "other.form", *command, *(() if command[-1] == "-certfile" else ("-in",)), source)
    files = {"cert": one.cert, "key": one.key, which: made}
    told = fault(files["cert"], files["key"])
    assert told.startswith(f"{made}: tls_{which} is ") and said in told


def test_a_request_is_no_certificate(one, tmp_path):
    request = converted(tmp_path, "mx.csr", "req", "-new", "-key", one.key, "-subj", "/CN=mx.example")
    assert fault(request, one.key) == (
        f"{request}: tls_cert is a request for a certificate: name the file that the authority has issued for it"
    )


def test_one_file_may_hold_certificate_and_key(one, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(one.key.read_bytes() + one.cert.read_bytes())
    assert server_context([Certificate(str(both), str(both))], "1.2")


# RSA and ECDSA


def only(kind: str) -> ssl.SSLContext:
    """A client that knows certificates of one kind, or `any`."""
    client = unverified(ssl.TLSVersion.TLSv1_2)
    client.set_ciphers({"RSA": "aRSA", "ECDSA": "aECDSA", "any": "DEFAULT"}[kind])
    return client


@pytest.mark.parametrize("first", ["ECDSA", "RSA"])
@pytest.mark.parametrize("name", ["mx.example", "mx.example.", None, "unknown.example"])
def test_pairs_of_both_kinds_for_one_name_serve_together(certificates, first, name):
    pairs = {"ECDSA": certificates.issue("mx.example", "x.example"), "RSA": certificates.issue_rsa("mx.example")}
    second = next(kind for kind in pairs if kind != first)
    server = serving(pairs[first], certificates.issue("other.example"), pairs[second])
    for kind in ("ECDSA", "RSA"):
        client, _ = shake_hands(server, only(kind), name)
        assert client.getpeercert(binary_form=True) == der(pairs[kind])
    shake_hands(server, only("any"), name)


def test_a_name_that_only_one_of_them_bears_is_served_by_that_one(certificates):
    ecdsa, rsa = certificates.issue("mx.example", "x.example"), certificates.issue_rsa("mx.example", "y.example")
    server = serving(ecdsa, rsa)
    assert shown_to(server, "x.example") == der(ecdsa)
    assert shown_to(server, "y.example") == der(rsa)
    with pytest.raises(ssl.SSLError):
        shake_hands(server, only("RSA"), "x.example")


def test_a_wildcard_of_the_other_kind_helps_out(certificates):
    exact, wildcard = certificates.issue("mx.example"), certificates.issue_rsa("*.example")
    server = serving(exact, wildcard)
    client, _ = shake_hands(server, only("RSA"), "mx.example")
    assert client.getpeercert(binary_form=True) == der(wildcard)
    client, _ = shake_hands(server, only("ECDSA"), "mx.example")
    assert client.getpeercert(binary_form=True) == der(exact)


@pytest.mark.parametrize("name", ["mx2.example.", "MX2.EXAMPLE.", "a.wild.example."])
def test_a_name_with_a_dot_at_its_end_is_the_same_name(certificates, name):
    first, second = certificates.issue("mx.example"), certificates.issue("mx2.example", "*.wild.example")
    assert shown_to(serving(first, second), name) == der(second)


# What is kept over a reload


def settings_with(pair: Pair) -> Settings:
    return Settings(
        path="", domain="mx.example", mappings=(), tls_cert=(str(pair.cert),), tls_key=(str(pair.key),)
    )  # fmt: skip


def test_the_context_is_kept_as_long_as_the_files_are_the_same(certificates, tmp_path):
    first, second = certificates.issue("mx.example"), certificates.issue("mx2.example")
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    for source, target in ((first.cert, pair.cert), (first.key, pair.key)):
        target.write_bytes(source.read_bytes())
    before = server_tls(settings_with(pair))
    pair.cert.touch()
    assert server_tls(settings_with(pair), before) is before
    other_version = dataclasses.replace(settings_with(pair), tls_min_version="1.3")
    assert server_tls(other_version, before).context is not before.context
    for source, target in ((second.cert, pair.cert), (second.key, pair.key)):
        target.write_bytes(source.read_bytes())
    assert server_tls(settings_with(pair), before).context is not before.context


# The key exchange (D(HE)at)


def offering(groups: str, context: ssl.SSLContext) -> ssl.SSLContext:
    """The peer that knows only these."""
    key_exchange._set_groups(context, groups)
    return context


@pytest.mark.parametrize(
    ("group", "agreed"),
    [("X25519", True), ("P-256", True), ("P-521", True), ("ffdhe2048", True), ("ffdhe3072", True), ("ffdhe4096", False),
     ("ffdhe6144", False), ("ffdhe8192", False)],
)  # fmt: skip
def test_costly_groups_are_not_agreed_on_with_clients_or_upstreams(certificates, one, group, agreed):
    ours = client_context(verify=True, ca_file=str(certificates.ca))
    for server, client in (
        (serving(one), offering(group, unverified())),
        (offering(group, one.server_context()), ours),
        (offering(group, one.server_context()), client_context(verify=False)),
    ):
        if agreed:
            assert shake_hands(server, client)[0].version() == "TLSv1.3"
        else:
            with pytest.raises(ssl.SSLError):
                shake_hands(server, client)
    assert not key_exchange.has_costly_groups()


def test_nor_is_dhe_before_tls_1_3(certificates, one):
    contexts = [serving(one, oldest=oldest) for oldest in ("1.0", "1.2")]
    contexts += [client_context(verify=True, ca_file=str(certificates.ca)), client_context(verify=False)]
    for context in contexts:
        ciphers = context.get_ciphers()
        assert "kx-ecdhe" in {cipher["kea"] for cipher in ciphers} and "kx-dhe" not in {c["kea"] for c in ciphers}


def test_no_suite_of_the_systems_is_taken_away_and_the_servers_order_counts(certificates):
    """The alternative to a weak cipher is clear text (RFC 7435)."""
    server = serving(certificates.issue_rsa("mx.example"))
    names = [cipher["name"] for cipher in server.get_ciphers()]
    usual = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).get_ciphers()
    assert names == [cipher["name"] for cipher in usual if cipher["kea"] != "kx-dhe"]
    for_rsa = [name for name in names if name.startswith("ECDHE-RSA-")]
    client = unverified(ssl.TLSVersion.TLSv1_2)
    client.set_ciphers(":".join(reversed(for_rsa)))
    cipher = shake_hands(server, client)[0].cipher()
    assert cipher and cipher[0] == for_rsa[0] != for_rsa[-1]


@pytest.mark.parametrize(
    ("groups", "offered"), [("P-384:X25519", (24, 29)), ("ffdhe8192:P-384:ffdhe2048:X25519", (24, 256, 29))]
)
def test_what_openssl_cnf_chooses_stays_chosen(tmp_path, groups, offered):
    file = tmp_path / "openssl.cnf"
    file.write_text(
        f"openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = choice\n[choice]\nGroups = {groups}\n"
    )
    program = "from willi_lib.net import key_exchange as k, tls; print(k._offered_groups(tls.client_context(False)))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "OPENSSL_CONF": str(file)}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(offered)


def test_nothing_that_willi_makes_is_deprecated(one, certificates):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for oldest in VERSIONS:
            serving(one, oldest=oldest)
        client_context(verify=False)
        client_context(verify=True, ca_file=str(certificates.ca))


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


@pytest.mark.parametrize(
    ("made_of", "said"),
    [
        (lambda _: b"", "is empty"),
        (lambda _: b"no PEM", "has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----"),
        (ssl.PEM_cert_to_DER_cert, "is in DER, PEM is needed: openssl x509 -inform DER -in {} -out {}.new.pem"),
        (lambda pem: pem[:-40].encode(), BROKEN_PEM),
        (lambda _: b"-----BEGIN PRIVATE KEY-----", "is a private key: name the certificate of the authority"),
    ],
)
def test_a_file_of_issuers_that_cannot_be_used_is_told_what_it_is(certificates, tmp_path, made_of, said):
    file, pem = tmp_path / "ca.pem", certificates.ca.read_text()
    file.write_bytes(made_of(pem[pem.index("-----BEGIN CERTIFICATE") :]))
    with pytest.raises(CertificateError) as error:
        client_context(verify=True, ca_file=str(file))
    assert str(error.value) == f"{file}: upstream_tls_ca: {said.format(file, file.with_suffix(''))}"
    assert client_context(verify=False, ca_file=str(file))


def test_a_missing_file_of_issuers_is_named(tmp_path):
    with pytest.raises(CertificateError, match=r"ca\.pem: upstream_tls_ca: No such file or directory"):
        client_context(verify=True, ca_file=str(tmp_path / "ca.pem"))


@pytest.mark.parametrize("content", [b"", b"no PEM"])
def test_authorities_of_the_system_that_cannot_be_read_are_named(tmp_path, monkeypatch, content):
    """The ssl module's own way of loading them would leave an empty set, and say nothing."""
    file = tmp_path / "ca.pem"
    file.write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(CertificateError, match=rf"{file}: the authorities of this system: "):
        client_context(verify=True)


@pytest.mark.parametrize("where", ["a file", "a directory"])
def test_authorities_are_read_at_the_start_and_without_a_descriptor_that_fails(
    certificates, one, tmp_path, monkeypatch, where
):
    """A directory, too, as on Ubuntu 22.04: by itself OpenSSL opens its files in the middle of a handshake."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca) if where == "a file" else str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path if where == "a directory" else tmp_path / "none"))
    name = subprocess.check_output(["openssl", "x509", "-noout", "-hash", "-in", certificates.ca], text=True).strip()
    (tmp_path / f"{name}.0").symlink_to(certificates.ca)
    (tmp_path / f"{name}.1").symlink_to(tmp_path / "removed.pem")
    (tmp_path / f"{name}.2").write_text("no certificate")
    with Descriptors(), pytest.raises(CertificateError, match="the authorities of this system: Too many open files"):
        client_context(verify=True)
    context = client_context(verify=True)
    assert len(context.get_ca_certs()) == 1
    server = serving(one)
    with Descriptors():
        assert shake_hands(server, context)[0].version()
