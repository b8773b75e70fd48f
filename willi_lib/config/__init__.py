"""The file -> frozen Settings. `etc/willi.conf.example` says what the keys mean.

values    what is written -> a value: times, sizes, addresses, networks ...
settings  the table: every key, its default, unit and range, once
reader    `load`: the file against the table; it collects every fault before it gives up
"""

from ..hosts import Address
from .reader import ConfigError, load
from .settings import Certificate, CsvSettings, MysqlSettings, Settings, SqliteSettings, StaticSettings

__all__ = [
    "Address", "Certificate", "ConfigError", "CsvSettings", "MysqlSettings", "Settings", "SqliteSettings",
    "StaticSettings", "load",
]  # fmt: skip
