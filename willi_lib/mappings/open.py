"""The mappings that the file asks for, in its order."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as ByKey
from pathlib import Path

from ..config import CsvSettings, MysqlSettings, Settings, StaticSettings
from ..routing.route import HeldTable, Mapping, Route
from ..routing.route import MappingError as MappingError
from .csv_file import Aside, CsvFile, at_once
from .database import Access, Database
from .last_row import LastRow
from .mysql import Mysql, Notice
from .static import Static

READABLE_BY_OTHERS = 0o004  # of a file's mode; the service needs that of the group


def open_mappings(
    settings: Settings,
    pause: Callable[[], None] = lambda: None,
    tell: Callable[[Notice], None] = lambda _notice: None,
    aside: Callable[[], Aside] = lambda: at_once,
    last_rows: ByKey[MysqlSettings, LastRow] | None = None,
    held: ByKey[str, HeldTable] | None = None,
) -> list[Mapping]:
    """Make them; a CSV file still has to be loaded. A database need not be there.

    pause: called now and then while a large file is read, to let others run.
    tell: called with what an administrator should hear of a database, now and later.
    aside: makes what does the work with one file.
    last_rows: what the workers share of each database.
    held: the tables of other workers, by mapping.
    Raises MappingError.
    """
    return [_open(mapping, pause, tell, aside, last_rows or {}, held or {}) for mapping in settings.mappings]


def _open(
    mapping: StaticSettings | CsvSettings | MysqlSettings,
    pause: Callable[[], None], tell: Callable[[Notice], None], aside: Callable[[], Aside],
    last_rows: ByKey[MysqlSettings, LastRow], held: ByKey[str, HeldTable],
) -> Mapping:  # fmt: skip
    if isinstance(mapping, StaticSettings):
        name = f"static:{mapping.name}"
        return Static(name, Route(mapping.server, mapping.tls_verify, mapping.policy, name))
    if isinstance(mapping, CsvSettings):
        name = f"csv:{mapping.file}"
        return CsvFile(name, mapping.file, mapping.policy, pause, mapping.where, aside(), held.get(name))
    name = f"mysql:{mapping.name}"
    if others_can_read(mapping.password_file):
        tell(Notice("warn", "Every user of this machine can read the password file", name, mapping.password_file))
    try:
        database = open_database(mapping)
    except ValueError as fault:
        raise MappingError(f"{name}: {fault}") from None
    return Mysql(
        name, database, mapping.timeout, mapping.cache_ttl, mapping.cache_size, mapping.stale_ttl,
        tell, last_rows.get(mapping),
    )  # fmt: skip


def open_database(mapping: MysqlSettings) -> Database:
    """Without a connection yet. Raises ValueError."""
    access = Access(
        hosts=mapping.hosts,
        unix_socket=mapping.unix_socket,
        user=mapping.user,
        password=_password(mapping),
        database=mapping.database,
        tls_ca=mapping.tls_ca,
        pool_size=mapping.pool_size,
        timeout=mapping.timeout,
    )
    return Database(access, mapping.query, mapping.policy, f"mysql:{mapping.name}")


def _password(mapping: MysqlSettings) -> bytes:
    if not mapping.password_file:
        return mapping.password.encode()
    try:
        password = Path(mapping.password_file).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ValueError(f"password_file: cannot read {mapping.password_file}: {error.strerror}") from None
    if not password or b"\n" in password:
        raise ValueError(f"password_file: {mapping.password_file} must be one line, the password")
    return password


def others_can_read(path: str) -> bool:
    """Whether every user of this machine may. Of a file that is not there, nobody."""
    try:
        return bool(path) and bool(Path(path).stat().st_mode & READABLE_BY_OTHERS)
    except OSError:
        return False
