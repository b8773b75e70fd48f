"""What all databases share: the question, the answer, and why there is none. It loads the driver of none of them."""

from __future__ import annotations

import re
from typing import Protocol

from ..routing.route import HostFacts, Route

NOBODY = "nobody.invalid"  # what `check` asks for

_TOKEN = re.compile(
    r"""'(?:[^'\\]|\\.|'')*' | "(?:[^"\\]|\\.|"")*" | `[^`]*` | --\s[^\n]* | \#[^\n]* | /\*(?!!).*?\*/ | \? """,
    re.VERBOSE | re.DOTALL,
)


class Source(Protocol):
    """Where the answers come from: a `Database` or a `SqliteFile`."""

    def ask(self, key: str) -> Route | None: ...
    def inspect_hosts(self) -> tuple[HostFacts, ...]: ...
    def close(self) -> None: ...


class Down(Exception):
    """The database gave no answer; the text says why, for each host.

    not_there: a host has answered that something is not there that user, database or query name.
    """

    def __init__(self, text: str, not_there: bool = False) -> None:
        super().__init__(text)
        self.not_there = not_there


class NotNow(Down):
    """The server has answered that it has no answer now."""


class TooSlow(NotNow):
    """The server gave up this query: that may be a matter of this key."""


class OwnLack(Down):
    """We have no descriptor, memory or thread for a connection, which says nothing about the server."""


def statement_of(query: str) -> tuple[str, int]:
    """The query as PyMySQL wants it, and the number of its parameters.

    A `?` in quotation marks or in a comment is none. Raises ValueError if there is no other.
    """
    parameters = 0
    parts, at = [], 0
    for token in _TOKEN.finditer(query):
        if token[0] == "?":
            parts += [query[at : token.start()].replace("%", "%%"), "%s"]
            at = token.end()
            parameters += 1
    if not parameters:
        raise ValueError("query: has no ? outside quotation marks, which stands for the address or domain to look up")
    return "".join([*parts, query[at:].replace("%", "%%")]), parameters
