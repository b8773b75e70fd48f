"""What is in a file of certificates or a key, and what to do if it is not what it should be."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..files import read_file

BROKEN_PEM = "one is cut off, or its lines are not as they were: each -----BEGIN and -----END is a line of its own"

_DER = rb"\A\x30(?:[\x00-\x7f]|\x81.|\x82..|\x83...)"  # a sequence and its length; what stands in it tells the kind
_KINDS = {
    "certificate": rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----",
    "key": rb"-----BEGIN (?!ENCRYPTED)(?:[A-Z0-9]+ )*PRIVATE KEY-----(?!\s+Proc-Type: 4,ENCRYPTED)",
    "locked key": rb"BEGIN ENCRYPTED PRIVATE KEY-----|PRIVATE KEY-----\s+Proc-Type: 4,ENCRYPTED",
    "request": rb"-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----",
    "public key": rb"-----BEGIN PUBLIC KEY-----",
    "PKCS#7": rb"-----BEGIN PKCS7-----|" + _DER + rb"\x06\x09",
    "PKCS#12": _DER + rb"\x02\x01\x03",
    "DER key": _DER + rb"\x02\x01[\x00\x01]",
    "DER certificate": _DER + rb"\x30",
    "empty file": rb"\A\s*\Z",
}
_ADVICE = {  # {new}: a file that does not exist yet
    "tls_cert": {
        "key": "is a private key: tls_cert takes the certificate, and tls_key this file",
        "locked key": "is a private key: tls_cert takes the certificate",
        "request": "is a request for a certificate: name the file that the authority has issued for it",
        "public key": "is a public key: name the certificate",
        "PKCS#7": "is a PKCS#7 file, PEM is needed: openssl pkcs7 -print_certs -in {file} -out {new}",
        "PKCS#12": "is a PKCS#12 file, PEM is needed: openssl pkcs12 -in {file} -nokeys -out {new}",
        "DER key": "is a private key in DER: tls_cert takes the certificate",
        "DER certificate": "is in DER, PEM is needed: openssl x509 -inform DER -in {file} -out {new}",
        "empty file": "is empty",
        "": "has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----",
    },
    "tls_key": {
        "locked key": "has a passphrase, and Willi never asks for one:"
        " openssl pkey -in {file} -out {new}, and chmod 640",
        "certificate": "is a certificate: tls_key takes its private key, and tls_cert this file",
        "request": "is a request for a certificate: name the private key that it was made with",
        "public key": "is a public key: name the private key",
        "PKCS#7": "is a PKCS#7 file, which has no private key",
        "PKCS#12": "is a PKCS#12 file, PEM is needed:"
        " openssl pkcs12 -in {file} -nocerts -nodes -out {new}, and chmod 640",
        "DER key": "is in DER, PEM is needed: openssl pkey -inform DER -in {file} -out {new}, and chmod 640",
        "DER certificate": "is a certificate in DER: tls_key takes the private key",
        "empty file": "is empty",
        "": "has no private key in PEM, which begins with -----BEGIN PRIVATE KEY----- or the like",
    },
}
_OF_AUTHORITIES = _ADVICE["tls_cert"] | dict.fromkeys(
    ("key", "locked key", "DER key"), "is a private key: name the certificate of the authority"
)


def fault_of(cert: str, key: str) -> str:
    """What is wrong with the two files, by what they contain; empty: nothing. Raises OSError, which names the file."""
    in_cert, in_key = _contents(cert), _contents(key)
    if "key" in in_cert - in_key and "certificate" in in_key - in_cert:
        return f"{cert}: tls_cert is the private key, and tls_key {key} the certificate: exchange the two"
    for setting, file, found, wanted in (
        ("tls_cert", cert, in_cert, "certificate"), ("tls_key", key, in_key, "key"),
    ):  # fmt: skip
        if wanted not in found:
            return f"{file}: {setting} {_advice(_ADVICE[setting], file, found)}"
    return ""


def fault_of_authorities(file: str, error: OSError) -> str:
    """Why OpenSSL could not load them."""
    if isinstance(error, ssl.SSLError):
        with suppress(OSError):
            found = _contents(file)
            return BROKEN_PEM if "certificate" in found else _advice(_OF_AUTHORITIES, file, found)
    return error.strerror or str(error)


def _advice(table: Mapping[str, str], file: str, found: set[str]) -> str:
    text = next(text for kind, text in table.items() if kind in found)
    new = Path(file).with_suffix(".pem")
    return text.format(file=file, new=new.with_suffix(".new.pem") if new.exists() else new)


def _contents(file: str) -> set[str]:
    """The kinds that can be recognised. Raises OSError."""
    octets = read_file(file)
    return {"", *(kind for kind, pattern in _KINDS.items() if re.search(pattern, octets, re.DOTALL))}


def mismatch(cert: str, key: str, other_keys: list[str]) -> str:
    """What to say of a key that does not belong to the certificate. other_keys: those of other certificates."""
    text = f"{key}: tls_key is not the key of the certificate in tls_cert {cert}"
    for other in other_keys:
        if fits(cert, other):
            return f"{text}; that is {other}: name certificates and keys in the same order"
    import tempfile  # not before: it takes long to load, and most certificates have nothing wrong

    blocks = re.findall(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", read_file(cert), re.DOTALL)
    for block in blocks[1:]:
        with tempfile.NamedTemporaryFile(suffix=".pem") as alone:
            alone.write(block + b"\n")
            alone.flush()
            if fits(alone.name, key):
                return f"{cert}: tls_cert begins with another certificate than that of {key}: put that one first"
    return f"{text}; compare openssl x509 -noout -pubkey -in {cert} and openssl pkey -pubout -in {key}"


def fits(cert: str, key: str) -> bool:
    """Whether it is the key of the first certificate in the file."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_passphrase)
    except (OSError, ValueError):
        return False
    return True


def no_passphrase() -> str:
    """In place of a question on the terminal."""
    raise ValueError("has a passphrase")
