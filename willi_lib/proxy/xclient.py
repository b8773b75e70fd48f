"""Telling an upstream who the client is, by XCLIENT (Postfix's XCLIENT_README)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .. import log
from ..smtp import reply as replies
from ..smtp.reply import UPSTREAM, Rejected, Reply
from ..smtp.xclient import UNAVAILABLE, lines
from .upstream import Client, NextMayTake, Upstream, UpstreamFailed, is_not_from_us

TOLD = (220, 250)  # answers to XCLIENT that say that the upstream knows the client now
BAD_VALUE = (501, 504)  # answers to XCLIENT that say that a value is not taken

# Postfix's words, and nothing besides: what an upstream says of a client may have any words in it.
_NOT_AUTHORIZED = re.compile(rb"(?:5\.7\.\d+ )?(?:Error: )?insufficient authorization\.?", re.IGNORECASE)


def send_xclient(upstream: Upstream, client: Client, sid: str, was_offered: bool) -> bool:
    """Tell the upstream who the client is. False: it was not told, and `xclient` allows that.

    was_offered: by the first EHLO, before STARTTLS.
    Raises Rejected, UpstreamFailed.
    """
    offer = _xclient_offer(upstream, client, sid, was_offered)
    if offer is None:
        return False
    upstream.xclient_offer = offer
    listed = offer.upper().split()
    name = client.name() if "NAME" in listed else ""  # which may have to wait for DNS
    if upstream.wire.pending():
        raise UpstreamFailed(f"{upstream.server}: spoke out of turn, or hung up, before XCLIENT")
    required = upstream.route.policy.xclient == "require"
    half_told = False
    asked: list[list[tuple[str, str]]] = []
    for attempt in _attempts(client, name, may_hide_address=not required):
        attributes = [attribute for attribute in attempt if attribute[0] in listed]
        if attributes in asked:
            continue
        asked.append(attributes)
        answer, half = _ask_all(upstream, lines(attributes))
        half_told |= half
        if answer is None or answer.code not in BAD_VALUE:
            break
    if answer is None:
        return False
    if answer.code not in TOLD:
        return _judge_refusal(upstream, client, answer, half_told, sid)
    upstream.xclient = "accepted"
    upstream.address_told = not client.address or ("ADDR", UNAVAILABLE) not in attributes
    if not upstream.address_told:
        fields = {"sid": sid, "client": str(client), "upstream": str(upstream.server)}
        log.warn("XCLIENT: the upstream does not take this address, and was told none", **fields)
    return True


def _xclient_offer(upstream: Upstream, client: Client, sid: str, was_offered: bool) -> str | None:
    """What the upstream lists behind XCLIENT; None: it does not offer it. Raises Rejected if that must not be."""
    offer = upstream.features.get("XCLIENT")
    fault = ""
    if "ADDR" not in (offer or "").upper().split():
        upstream.xclient = "not_offered"
        fault = "not offered" if offer is None else f"no ADDR in {offer!r}"
    elif not client.address:
        fault = "the address of the client is not known"
    if fault and upstream.route.policy.xclient == "require":
        raise _xclient_needed(upstream, sid, fault)
    if offer is None and was_offered and not upstream.knows_client:
        raise _xclient_needed(upstream, sid, "offered before STARTTLS, and not any more")
    return offer


def _attempts(client: Client, name: str, may_hide_address: bool) -> Iterator[list[tuple[str, str]]]:
    """All attributes, in the order to send them: ADDR ends our authority.

    Then with less and less that it may not like: HELO and NAME are what a client chooses, and a server
    without IPv6 takes no IPv6 address. None of that may make our own address of the client's.
    """
    helo = [("PROTO", "ESMTP" if client.esmtp else "SMTP"), ("HELO", client.helo)]
    address = f"IPV6:{client.address}" if ":" in client.address else client.address or UNAVAILABLE
    known = [("PORT", str(client.port or UNAVAILABLE)), ("ADDR", address)]
    yield [*helo, ("NAME", name), *known]
    unknown = [("PORT", UNAVAILABLE), ("ADDR", UNAVAILABLE)]
    for endpoint in (known, unknown) if may_hide_address else (known,):
        for one in (name, UNAVAILABLE):
            yield [helo[0], ("NAME", one), *endpoint]


def _ask_all(upstream: Upstream, lines: Sequence[bytes]) -> tuple[Reply | None, bool]:
    """Ask one after the other, up to the first that is refused.

    The last answer, which is kept for `check`, and whether others before it were accepted.
    """
    answer, asked = None, 0
    for line in lines:
        answer = upstream.ask(line)
        if answer.code not in TOLD:
            break
        asked += 1
    upstream.xclient_answer = answer
    return answer, 0 < asked < len(lines)


def _judge_refusal(upstream: Upstream, client: Client, answer: Reply, half_told: bool, sid: str) -> bool:
    """False: XCLIENT is refused to us, and the mail may go on without. Raises Rejected, UpstreamFailed."""
    if answer.code < 400:
        raise UpstreamFailed(f"{upstream.server}: XCLIENT: {answer}")
    if is_not_from_us(answer):
        raise upstream.unwelcome("XCLIENT", answer)
    if not _is_about_us(answer):
        upstream.xclient = "client_refused"
        is_required = upstream.route.policy.xclient == "require"
        kind = NextMayTake if is_required and not answer.permanent else Rejected
        raise kind(answer, UPSTREAM)
    upstream.xclient = "refused"
    if upstream.route.policy.xclient == "require" or half_told:
        raise _xclient_needed(upstream, sid, str(answer))
    # Where all that was left of the client's is an IPv4 address, it is not the client that is not taken.
    if answer.code in BAD_VALUE and "." not in client.address and not upstream.knows_client:
        raise _xclient_needed(upstream, sid, str(answer))
    log.error("XCLIENT refused", sid=sid, upstream=str(upstream.server), error=str(answer))
    return False


def _xclient_needed(upstream: Upstream, sid: str, why: str) -> NextMayTake:
    """The refusal of mail that would go on in our own name."""
    log.error("XCLIENT failed, and the mail must not go without", sid=sid, upstream=str(upstream.server), error=why)
    return NextMayTake(replies.XCLIENT_NEEDED)


def _is_about_us(answer: Reply) -> bool:
    """Whether a refusal of XCLIENT says that we may not use it, not that the client is unwelcome."""
    return 500 <= answer.code <= 504 or (
        answer.code == 550 and _NOT_AUTHORIZED.fullmatch(b" ".join(answer.lines)) is not None
    )
