"""Notices that a file of a certificate or password is another one than those who serve have read."""

from __future__ import annotations

import ssl
from time import monotonic

from ..config import MysqlSettings, Settings
from ..net.file_signature import file_signature

INTERVAL = 5.0  # seconds between looks
RETRY = 60.0  # seconds until what did not work is tried again


class CertificateFiles:
    """Certificates, keys, authorities, and passwords of databases."""

    def __init__(self) -> None:
        self._served = ""  # what those who serve have read
        self._tried = ""  # what was read last, with success or not
        self._seen = ""  # at the last look
        self._next_look = self._next_try = 0.0

    def will_be_read(self, settings: Settings) -> None:
        """New workers are about to start, and will read the files as they are now, or newer."""
        self._tried = self._seen = _signature(settings)
        self._next_look, self._next_try = monotonic() + INTERVAL, monotonic() + RETRY

    def are_served(self) -> None:
        """They could, and have taken over."""
        self._served = self._tried

    def have_changed(self, settings: Settings) -> bool:
        """Whether to reload. settings: of those who serve.

        Not while somebody writes them: two looks must see the same. And after a reload that failed, not at
        once: one of its files, or anything else that the file names, may not be as it should yet.
        """
        if monotonic() < self._next_look:
            return False
        self._next_look = monotonic() + INTERVAL
        before, self._seen = self._seen, _signature(settings)
        if before != self._seen or self._seen == self._served:
            return False
        return self._seen != self._tried or monotonic() >= self._next_try


def _signature(settings: Settings) -> str:
    """Differs when one of the files does."""
    files = [*settings.tls_cert, *settings.tls_key]
    files += [mapping.policy.upstream_tls_ca for mapping in settings.mappings]  # its own, or that of all
    databases = [mapping for mapping in settings.mappings if isinstance(mapping, MysqlSettings)]
    files += [file for one in databases for file in (one.tls_ca, one.password_file)]
    of_system = ssl.get_default_verify_paths()
    files += [of_system.cafile or "", of_system.capath or ""]
    return " ".join(map(file_signature, filter(None, files)))
