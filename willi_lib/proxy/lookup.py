"""Asking the mappings: for a session, counted and timed, and for somebody who wants to see each key."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

from ..config import Settings
from ..routing.route import LookupFailed, Mapping, NoRoute, Route, Step, ask, conclude, keys_of, search
from ..smtp import reply as replies
from ..smtp.reply import Reject
from ..smtp.syntax import Path, parse_rcpt
from ..status.counts import CACHE_HITS, Counts

REMEMBERED = {"cache": " (from the cache)", "stale": " (from the cache, since the database is down)"}

Shown = tuple[list[list[Any]], str]  # for each key: mapping, key, answer, seconds; and the result


def route_of(mappings: Sequence[Mapping], settings: Settings, recipient: Path, counts: Counts) -> Route:
    """Raises NoRoute, LookupFailed. A bare postmaster is the postmaster of our own domain."""
    address = _whole(recipient, settings)
    keys = keys_of(address, settings.recipient_delimiter)
    steps: list[Step] = []
    for mapping in mappings:
        began = monotonic()
        for step in ask(mapping, keys):
            steps.append(step)
            if step.origin == "cache":
                counts.add(CACHE_HITS, mapping.name)
        counts.looked_up(monotonic() - began, mapping.name, _outcome(steps[-1]))
        if steps[-1].is_last:
            break
    return conclude(steps, address)


def _whole(recipient: Path, settings: Settings) -> str:
    return recipient.address if recipient.domain else f"{recipient.address}@{settings.domain}"


def _outcome(step: Step) -> str:
    if step.failure is not None:
        return "error"
    if step.route is None:
        return "miss"
    return "stale" if step.origin == "stale" else "hit"


def show(mappings: Sequence[Mapping], settings: Settings, address: str) -> Shown:
    """What a session would find for an address, key by key. Nothing is counted."""
    if address.startswith("<") and address.endswith(">"):  # as copied from a log or a header
        address = address[1:-1]
    try:
        recipient = parse_rcpt(b"TO:<" + address.encode("utf-8", "replace") + b">", smtputf8=True)
    except Reject as refusal:
        return [], f"refused: {refusal.reply}"
    steps: list[Step] = []
    shown: list[list[Any]] = []
    began = monotonic()
    for step in search(mappings, _whole(recipient, settings), settings.recipient_delimiter):
        is_slow = step.origin not in ("", "unsure") or step.failure is not None  # not a table in memory
        steps.append(step)
        shown.append([step.mapping, step.key, _answer(step), monotonic() - began if is_slow else None])
        began = monotonic()
    return shown, _result(steps)


def _answer(step: Step) -> str:
    if step.failure is not None:
        return f"failed: {step.failure}"
    return f"{step.route or '-'}{REMEMBERED.get(step.origin, '')}"


def _result(steps: Sequence[Step]) -> str:
    try:
        route = conclude(steps, "")
    except NoRoute:
        return f"no mapping matches, the client gets {replies.NO_ROUTE}"
    except LookupFailed as failure:
        if steps[-1].failure:
            return f"the search ends here, the client gets {replies.LOOKUP_FAILED}"
        return f"no mapping matches; {failure}: the client gets {replies.LOOKUP_FAILED}"
    return f"route: {route}, tls_verify = {'true' if route.tls_verify else 'false'}"
