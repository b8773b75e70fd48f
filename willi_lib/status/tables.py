"""The tables of the page: upstreams, mappings, limits, certificates, and the last messages and refusals."""

from __future__ import annotations

from collections.abc import Sequence

from . import charts, words
from .markup import Content, Markup, element
from .overview import CertificateState, Event, Host, Limit, Overview, Table
from .parts import MOST, NAME, badge, duration, error, said, section, table, time


def hosts(overview: Overview) -> Markup:
    columns = [
        ("Host", ""), ("State", ""), ("Connect", "number"), ("Accepted", "number"), ("Rejected", "number"),
        ("Traffic", "number"), ("Connections", "number"), ("Failures", "number"), ("Last error", "long"),
    ]  # fmt: skip
    rows = [_host(host, overview.now) for host in overview.hosts]
    more = f"{words.several(overview.hosts_left_out, 'host')} with less traffic not shown"
    return section(
        "hosts", "Upstreams", table("The upstream hosts, the busiest first", "hosts", columns, rows),
        "No upstream has been talked to yet." if not rows else more if overview.hosts_left_out else None,
    )  # fmt: skip


def _host(host: Host, now: float) -> Sequence[Content]:
    return (
        element("code", said(host.name, NAME)),
        badge("good" if host.up else "bad", words.host_state(host, now)),
        duration(host.connect_seconds),
        words.number(host.accepted),
        words.number(host.rejected),
        words.size(host.octets),
        words.number(host.connections),
        words.number(host.failures),
        error(host.last_error, host.last_error_at, now),
    )


def tables(overview: Overview) -> Markup:
    columns = [
        ("Mapping", ""), ("State", ""), ("Patterns", "number"), ("Read", "number"), ("Look-ups", "number"),
        ("Hits", "number"), ("Errors", "number"), ("Time", "number"), ("Cache", "number"), ("Last error", "long"),
    ]  # fmt: skip
    rows = [_mapping(mapping, overview.now) for mapping in overview.tables]
    return section("tables", "Mappings", table("The mappings, in the order they are asked", "tables", columns, rows))


def _mapping(mapping: Table, now: float) -> Sequence[Content]:
    mark, state = words.table_state(mapping)
    cache: Content = None
    if mapping.cache_entries is not None:
        cache = words.number(mapping.cache_entries)
        if mapping.cache_hits is not None:
            cache = [cache, element("small", f" {words.share(mapping.cache_hits, mapping.lookups)}")]
    return (
        element("code", said(mapping.name, NAME)),
        badge(mark, state),
        words.number(mapping.patterns) if mapping.patterns is not None else None,
        time(mapping.loaded_at, now) if mapping.loaded_at is not None else None,
        words.number(mapping.lookups),
        [words.number(mapping.hits), element("small", f" {words.share(mapping.hits, mapping.lookups)}")],
        words.number(mapping.errors),
        duration(mapping.lookup_seconds),
        cache,
        error(mapping.last_error, None, now),
    )


def limits(overview: Overview) -> Markup:
    columns = [("Limit", ""), ("In use", "number"), ("", "gauge"), ("Turned away", "number")]

    def row(limit: Limit) -> Sequence[Content]:
        mark = words.limit_mark(limit)
        used = f"{words.number(limit.used)} of {words.number(limit.most)}"
        gauge = charts.bar(limit.used, limit.most, mark)
        return element("code", limit.name), used, gauge, words.number(limit.refused)

    rows = [row(limit) for limit in overview.limits]
    return section("limits", "Limits", table("How near the limits are", "limits", columns, rows))


def certificates(overview: Overview) -> Markup:
    columns = [("Certificate", ""), ("Names", "long"), ("Ends", "")]

    def row(certificate: CertificateState) -> Sequence[Content]:
        state = words.certificate_state(certificate, overview.now)
        mark = words.certificate_mark(certificate, overview.now)
        names = certificate.fault or ", ".join(certificate.names)
        return element("code", said(certificate.file, NAME)), said(names), badge(mark, state)

    rows = [row(certificate) for certificate in overview.certificates]
    empty = None if rows else "There is none: STARTTLS is not offered, and mail comes in clear."
    shown = table("The certificates that clients are shown", "certificates", columns, rows)
    return section("certificates", "Certificates", shown, empty)


def events(overview: Overview) -> Markup:
    columns = [
        ("Time", ""), ("What", ""), ("From, to", "long"), ("Client", "long"), ("Upstream", ""), ("Reply", "long"),
    ]  # fmt: skip
    rows = [_event(event, overview.now) for event in overview.events]
    shown = table("The last messages and refusals, the newest first", "events", columns, rows)
    return section("events", "Last messages and refusals", shown, None if rows else "Nothing has come yet.")


def _event(event: Event, now: float) -> Sequence[Content]:
    reply, reason = words.answer(event)
    client = element("div", said(event.client, NAME))
    facts = element("small", words.size(event.octets)) if event.octets else None
    return (
        [time(event.at, now), element("small", words.duration(event.seconds)) if event.seconds else None],
        [badge(words.event_mark(event), event.kind), element("small", words.refuser(event), class_="who")],
        None
        if event.kind == "refused"
        else [
            element("div", element("bdi", words.shorten(event.sender, MOST) or "<>")),
            element("div", said(event.recipients), class_="to"),
        ],
        [client, element("small", said(event.sid, NAME))],
        [element("div", said(event.upstream, NAME)), facts] if event.upstream else None,
        [element("div", said(reply)), element("small", said(reason)) if reason else None],
    )
