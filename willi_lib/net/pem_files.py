"""What is in a file of tls_cert or tls_key, and what to do if it is not what it should be."""

from __future__ import annotations

import re
import ssl
import tempfile
from pathlib import Path

from ..files import read_file

CERTIFICATE, KEY, LOCKED_KEY, REQUEST, PUBLIC_KEY, PKCS7 = "certificate", "key", "locked", "request", "public", "pkcs7"
DER_CERTIFICATE, DER_KEY, PKCS12, EMPTY = "der certificate", "der key", "pkcs12", "empty"

_ADVICE = {  # {new}: a file that does not exist yet
    "tls_cert": {
        EMPTY: "is empty",
        KEY: "is a private key: tls_cert takes the certificate, and tls_key this file",
        LOCKED_KEY: "is a private key: tls_cert takes the certificate",
        REQUEST: "is a request for a certificate: name the file that the authority has issued for it",
        PUBLIC_KEY: "is a public key: name the certificate",
        PKCS7: "is a PKCS#7 file, PEM is needed: openssl pkcs7 -print_certs -in {file} -out {new}",
        PKCS12: "is a PKCS#12 file, PEM is needed: openssl pkcs12 -in {file} -nokeys -out {new}",
        DER_CERTIFICATE: "is in DER, PEM is needed: openssl x509 -inform DER -in {file} -out {new}",
        DER_KEY: "is a private key in DER: tls_cert takes the certificate",
    },
    "tls_key": {
        EMPTY: "is empty",
        LOCKED_KEY: "has a passphrase, and Willi never asks for one: openssl pkey -in {file} -out {new}, and chmod 640",
        CERTIFICATE: "is a certificate: tls_key takes its private key, and tls_cert this file",
        REQUEST: "is a request for a certificate: name the private key that it was made with",
        PUBLIC_KEY: "is a public key: name the private key",
        PKCS7: "is a PKCS#7 file, which has no private key",
        PKCS12: "is a PKCS#12 file, PEM is needed: openssl pkcs12 -in {file} -nocerts -nodes -out {new}, and chmod 640",
        DER_CERTIFICATE: "is a certificate in DER: tls_key takes the private key",
        DER_KEY: "is in DER, PEM is needed: openssl pkey -inform DER -in {file} -out {new}, and chmod 640",
    },
}
_OTHERWISE = {
    "tls_cert": "has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----",
    "tls_key": "has no private key in PEM, which begins with -----BEGIN PRIVATE KEY----- or the like",
}


def fault_of(cert: str, key: str) -> str:
    """What is wrong with the two files, by what they contain; empty: nothing. Raises OSError, which names the file."""
    in_cert, in_key = contents(read_file(cert)), contents(read_file(key))
    if KEY in in_cert and CERTIFICATE in in_key and CERTIFICATE not in in_cert and KEY not in in_key:
        return f"{cert}: tls_cert is the private key, and tls_key {key} the certificate: exchange the two"
    for setting, file, found, wanted in (("tls_cert", cert, in_cert, CERTIFICATE), ("tls_key", key, in_key, KEY)):
        if wanted not in found:
            advice = _ADVICE[setting]
            text = next((advice[one] for one in advice if one in found), _OTHERWISE[setting])
            return f"{file}: {setting} {text.format(file=file, new=_new_name(file))}"
    return ""


def _new_name(file: str) -> str:
    new = Path(file).with_suffix(".pem")
    return str(new if not new.exists() else new.with_suffix(".new.pem"))


def contents(octets: bytes) -> set[str]:
    """What can be recognised."""
    labels = [label.decode() for label in re.findall(rb"-----BEGIN ([A-Z0-9 ]+)-----", octets)]
    if not octets.strip():
        return {EMPTY}
    if not labels:
        return {_kind_of_der(octets)} if octets[:1] == b"\x30" else set()
    found = set()
    for label in labels:
        if label.endswith("PRIVATE KEY"):
            locked = label.startswith("ENCRYPTED") or b"\nProc-Type: 4,ENCRYPTED" in octets
            found.add(LOCKED_KEY if locked else KEY)
        elif label.endswith("CERTIFICATE"):
            found.add(CERTIFICATE)
        elif label.endswith("CERTIFICATE REQUEST"):
            found.add(REQUEST)
        elif label in ("PUBLIC KEY", "PKCS7"):
            found.add(PUBLIC_KEY if label == "PUBLIC KEY" else PKCS7)
    return found


def _kind_of_der(octets: bytes) -> str:
    """By the first element inside of the outermost one."""
    length_octets = octets[1] & 0x7F if len(octets) > 1 and octets[1] & 0x80 else 0
    inside = octets[2 + length_octets :]
    if inside.startswith(b"\x02\x01\x03"):
        return PKCS12
    if inside.startswith((b"\x02\x01\x00", b"\x02\x01\x01")):
        return DER_KEY
    return PKCS7 if inside.startswith(b"\x06\x09") else DER_CERTIFICATE


def mismatch(cert: str, key: str, other_keys: list[str]) -> str:
    """What to say of a key that does not belong to the certificate. other_keys: those of other certificates."""
    text = f"{key}: tls_key is not the key of the certificate in tls_cert {cert}"
    for other in other_keys:
        if fits(cert, other):
            return f"{text}; that is {other}: name certificates and keys in the same order"
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
