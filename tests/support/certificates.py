"""A certificate authority for the tests, by the openssl command."""

from __future__ import annotations

import ipaddress
import ssl
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
RSA_KEY = ("-newkey", "rsa:2048", "-nodes")
OF_AUTHORITY = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
# `openssl x509` has -not_before only since OpenSSL 3.4, and takes no negative -days from then on: `openssl ca` takes
# two dates in every version.
CONFIGURATION = """\
[ca]
default_ca = tests
[tests]
database = {directory}/issued
new_certs_dir = {directory}
certificate = {directory}/ca.pem
private_key = {directory}/ca.key
rand_serial = yes
unique_subject = no
default_md = sha256
copy_extensions = copy
policy = any
[any]
commonName = supplied
"""


@dataclass(frozen=True)
class Pair:
    """PEM files of a server."""

    cert: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """For a server in the test's own process."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


class Authority:
    """A root or intermediate certificate (`ca`) and what it signs. A name may be an address."""

    def __init__(self, directory: Path, signed_by: Authority | None = None, begins: int = 0, ends: int = 7) -> None:
        """signed_by: None for a root. begins, ends: days from now."""
        directory.chmod(0o755)  # Postfix reads some of it after giving up root
        self._directory = directory
        self.ca = directory / "ca.pem"
        self._ca_key = directory / "ca.key"
        new = ("req", *EC_KEY, "-keyout", self._ca_key, "-subj", f"/CN=Willi tests{' below' if signed_by else ''}")
        if signed_by:
            _openssl(*new, *OF_AUTHORITY, "-out", directory / "ca.csr")
            signed_by._sign(directory / "ca.csr", self.ca, begins, ends)
        else:
            _openssl(*new, "-x509", "-out", self.ca, "-days", "7", *OF_AUTHORITY[2:])
        self._configuration = directory / "ca.cnf"
        self._configuration.write_text(CONFIGURATION.format(directory=directory))
        (directory / "issued").touch()

    def issue(self, *names: str) -> Pair:
        """A certificate for these names, good for a week."""
        return self._signed("good", names, begins=0, ends=7)

    def expired(self, *names: str) -> Pair:
        """One that was good until yesterday."""
        return self._signed("expired", names, begins=-8, ends=-1)

    def not_yet_valid(self, *names: str) -> Pair:
        """One that is good from tomorrow on."""
        return self._signed("not-yet-valid", names, begins=1, ends=8)

    def issue_rsa(self, *names: str) -> Pair:
        """The same as `issue`, with an RSA key."""
        return self._signed("rsa", names, begins=0, ends=7, key=RSA_KEY)

    def self_signed(self, *names: str) -> Pair:
        """One that nobody trusts."""
        pair = self._pair("self-signed", names)
        if not pair.cert.exists():
            _openssl("req", "-x509", *EC_KEY, "-keyout", pair.key, "-out", pair.cert, "-days", "7", *_subject(names))
        return pair

    def client_context(self) -> ssl.SSLContext:
        """A client's context that trusts this authority only."""
        return ssl.create_default_context(cafile=str(self.ca))

    def _pair(self, kind: str, names: tuple[str, ...]) -> Pair:
        stem = f"{kind}-{'-'.join(names)}".replace(":", "_").replace("*", "any")
        return Pair(self._directory / f"{stem}.pem", self._directory / f"{stem}.key")

    def _signed(self, kind: str, names: tuple[str, ...], begins: int, ends: int, key: tuple[str, ...] = EC_KEY) -> Pair:
        """begins, ends: days from now."""
        pair = self._pair(kind, names)
        if not pair.cert.exists():
            request = pair.cert.with_suffix(".csr")
            _openssl("req", *key, "-keyout", pair.key, "-out", request, *_subject(names))
            self._sign(request, pair.cert, begins, ends)
        return pair

    def _sign(self, request: Path, certificate: Path, begins: int, ends: int) -> None:
        _openssl(
            "ca", "-config", self._configuration, "-batch", "-notext", "-in", request, "-out", certificate,
            "-startdate", _date(begins), "-enddate", _date(ends),
        )  # fmt: skip


def _subject(names: tuple[str, ...]) -> tuple[str, ...]:
    alternatives = ",".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
    return "-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={alternatives}"


def _date(days: int) -> str:
    return (datetime.now(timezone.utc) + timedelta(days=days, minutes=-1)).strftime("%Y%m%d%H%M%SZ")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"openssl {' '.join(map(str, arguments))}: {done.stderr}"
