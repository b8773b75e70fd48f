"""Asking the mappings: for a session, counted and timed, and for an administrator, key by key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from ..config import Settings
from ..routing.route import LookupFailed, Mapping, NoRoute, Route
from ..routing.search import Step, find_route
from ..smtp import reply as replies
from ..smtp.reply import Rejected
from ..smtp.syntax import Path, parse_rcpt
from ..status.counts import CACHE_HITS, Counts
from ..status.reports import Asked, AskedStep

REMEMBERED = {"cache": " (from the cache)", "stale": " (from the cache, since the database is down)"}


def route_of(mappings: Sequence[Mapping], settings: Settings, recipient: Path, counts: Counts) -> Route:
    """Raises NoRoute, LookupFailed. A bare postmaster is the postmaster of our own domain."""
    began = monotonic()

    def count(step: Step) -> None:
        nonlocal began
        if step.origin == "cache":
            counts.add(CACHE_HITS, step.mapping)
        if step.is_last:
            now = monotonic()
            counts.looked_up(now - began, step.mapping, _outcome(step))
            began = now

    return _find(mappings, settings, recipient, count)


def _find(mappings: Sequence[Mapping], settings: Settings, recipient: Path, observe: Callable[[Step], None]) -> Route:
    whole = recipient.address if recipient.domain else f"{recipient.address}@{settings.domain}"
    return find_route(mappings, whole, settings.recipient_delimiter, observe, settings.subdomains)


def _outcome(step: Step) -> str:
    if step.failure is not None:
        return "error"
    if step.route is None:
        return "miss"
    return "stale" if step.origin == "stale" else "hit"


def show(mappings: Sequence[Mapping], settings: Settings, address: str) -> Asked:
    """What a session would find for an address, key by key. Nothing is counted."""
    steps: list[AskedStep] = []
    began = monotonic()

    def note(step: Step) -> None:
        nonlocal began
        answer = f"failed: {step.failure}" if step.failure else f"{step.route or '-'}{REMEMBERED.get(step.origin, '')}"
        is_slow = step.origin not in ("", "unsure") or step.failure  # not a table in memory
        steps.append(AskedStep(step.mapping, step.key, answer, monotonic() - began if is_slow else None))
        began = monotonic()

    route = None
    path = address[1:-1] if address.startswith("<") and address.endswith(">") else address  # as copied from a log
    try:
        recipient = parse_rcpt(b"TO:<" + path.encode("utf-8", "replace") + b">", smtputf8=True)
        route = _find(mappings, settings, recipient, note)
        result = f"route: {route}, tls_verify = {'true' if route.tls_verify else 'false'}"
    except Rejected as refusal:
        result = f"refused: {refusal.reply}"
    except NoRoute:
        result = f"no mapping matches, the client gets {replies.NO_ROUTE}"
    except LookupFailed as failure:
        is_unsure = not steps or not steps[-1].answer.startswith("failed: ")
        why = f"no mapping matches; {failure}:" if is_unsure else "the search ends here,"
        result = f"{why} the client gets {replies.LOOKUP_FAILED}"
    return Asked(address, tuple(steps), result, route)
