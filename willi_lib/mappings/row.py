"""The route in a row of a database, whichever database that is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..routing.route import LookupFailed, Policy, Route, parse_servers, parse_tls_verify

MAX_TEXT = 10_000  # octets or characters of a value; some hundred hosts
MAX_ROUTES = 10_000  # different routes kept as one object each


class WrongColumns(Exception):
    """The query returns other columns than those of a route, as `SELECT *` of a table that was altered."""


def route_of(
    policy: Policy, mapping: str, key: str, names: Sequence[str], row: Sequence[object] | None
) -> Route | None:
    """None if there is no row, or no server in it. Raises LookupFailed, WrongColumns."""
    columns = [name.lower() for name in names]
    if sorted(columns) not in (["server"], ["server", "tls_verify"]):
        found = ", ".join(names) or "none"
        text = f"the query must return the columns server and, if you like, tls_verify, not: {found}"
        raise WrongColumns(text) if names else LookupFailed(text)  # a procedure may give nothing for some keys
    values = dict(zip(columns, row or (), strict=False))
    try:
        server, tls_verify = _text(values.get("server")), _text(values.get("tls_verify"))
        return _route(server, parse_tls_verify(tls_verify or "true"), policy, mapping) if server else None
    except ValueError as fault:
        raise LookupFailed(f"the row for {key!r}: {fault}") from None


@lru_cache(MAX_ROUTES)
def _route(server: str, tls_verify: bool, policy: Policy, mapping: str) -> Route:
    """Equal routes are one object, which saves memory. Raises ValueError."""
    return Route(parse_servers(server), tls_verify, policy, mapping)


def _text(value: object) -> str:
    """Whatever the type of the column; empty for NULL. Raises ValueError."""
    if value is None:
        return ""
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT:  # as of a column that holds something else
        raise ValueError(f"has more than {MAX_TEXT} octets")
    if isinstance(value, bytes):  # BIT, BINARY or BLOB
        return str(value[0]) if value in (b"\0", b"\1") else value.decode().strip()
    return str(value).strip()
