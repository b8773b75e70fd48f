"""Notices that a file, such as that of a certificate or password, is another one than those that serve have read."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from time import monotonic

from ..config import MysqlSettings, Settings
from ..net.file_signature import file_signature

INTERVAL = 5.0  # seconds between looks
RETRY = 60.0  # seconds until what did not work is tried again


class FileWatch:
    """Some files that are read together. Which, may change with each call."""

    def __init__(self) -> None:
        self._served: dict[str, str] = {}  # signatures by file: what those that serve have read
        self._tried: dict[str, str] = {}  # what was read last, with success or not
        self._seen: dict[str, str] = {}  # at the last look
        self._next_look = self._next_try = 0.0

    def will_be_read(self, files: Iterable[str]) -> None:
        """They are about to be read, as they are now, or newer."""
        self._tried = self._seen = {file: file_signature(file) for file in files}
        self._next_look, self._next_try = monotonic() + INTERVAL, monotonic() + RETRY

    def were_read(self) -> None:
        """It has worked."""
        self._served = self._tried

    def have_changed(self, files: Iterable[str]) -> bool:
        """Whether to read them again.

        Not while they are being written: two looks must see the same. And after a reading that failed, not at
        once: one of the files, or anything else that belongs to them, may not be as it should yet.
        """
        if monotonic() < self._next_look:
            return False
        self._next_look = monotonic() + INTERVAL
        before, self._seen = self._seen, {file: file_signature(file) for file in files}
        if before != self._seen or self._seen == self._served:
            return False
        return self._seen != self._tried or monotonic() >= self._next_try

    @property
    def changed(self) -> list[str]:
        """The files that are other ones than those that serve have read."""
        return [file for file, signature in self._seen.items() if signature != self._served.get(file)]


def certificate_files(settings: Settings) -> list[str]:
    """Certificates, keys, authorities, and passwords of databases."""
    files = [*settings.tls_cert, *settings.tls_key]
    files += [mapping.policy.upstream_tls_ca for mapping in settings.mappings]  # its own, or that of all
    databases = [mapping for mapping in settings.mappings if isinstance(mapping, MysqlSettings)]
    files += [file for one in databases for file in (one.tls_ca, one.password_file)]
    of_system = ssl.get_default_verify_paths()
    files += [of_system.cafile or "", of_system.capath or ""]
    return [file for file in files if file]
