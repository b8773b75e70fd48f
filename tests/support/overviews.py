"""Overviews as a status process makes them: one of a quiet day, one of a bad night, one full of malice."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TypeVar

from willi_lib.status import overview as advice
from willi_lib.status.counts import Event
from willi_lib.status.finding import RENEW, Finding
from willi_lib.status.overview import Host, Limit, Minute, Overview
from willi_lib.status.reports import Asked, AskedStep, CertificateState, MappingState

NOW = 1795701802.0  # 2026-11-26 14:03:22 UTC
DAY = 86400
CSV, DATABASE = "csv:/opt/willi/etc/upstream_servers.csv", "mysql:database"
QUEUED = "250 2.0.0 Ok: queued as {:X}"
UNKNOWN = "550 5.1.1 <{}>: Recipient address rejected: User unknown in virtual mailbox table"
NO_ANSWER = "451 4.4.1 No answer from the server for this recipient, try again"

# What a client, its name in the DNS, an upstream or a database may say.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "</td></tr></table><h1>owned</h1>",
    "javascript:alert(4)",
    "&lt;b&gt; &amp; &#x3c;",
    "a\u202egpj.exe@b.example",
    "line\r\nt=2026 lvl=error msg=forged",
    "\x1b[2J\x1b]0;owned\x07\x00\x9b31m",
    "שלום@דוגמה.example",
    "z" + "\u0321\u0348" * 40 + "algo",
    "漢字" * 60,
    "W" * 900,
    "\udcff\U000e0041\u200b\ufeff\u2028",
    "]]> --> <!-- <![CDATA[",
)  # fmt: skip

T = TypeVar("T")


def healthy() -> Overview:
    """A quiet afternoon."""
    return Overview(
        now=NOW, version="2.1.0", domain="mx1.example.org", pid=812, started=NOW - 19 * DAY - 14_000,
        listen=("192.0.2.25:25", "[2001:db8::25]:25"), problems=(), workers=4, workers_wanted=4, workers_draining=0,
        reloads=3, reloads_failed=0, last_reload=NOW - 3 * DAY, last_reload_error="", sessions=37,
        sessions_total=1_904_311, accepted_total=1_211_872, rejected_total=402_118, failed_total=212,
        octets_total=71_204_551_020, minutes=tuple(_minute(number) for number in range(60)), hosts=_hosts(),
        mappings=_mappings(), certificates=_certificates(), limits=_limits(),
        events=tuple(_event(number) for number in range(50)),
    )  # fmt: skip


def troubled() -> Overview:
    """Three in the morning: a server, the database and a worker are gone, and more."""
    calm = healthy()
    lost = replace(
        calm.hosts[1], up=False, down_since=NOW - 760, failures=318,
        last_error="mail2.example.org:25: Connection refused", last_error_at=NOW - 4,
    )  # fmt: skip
    csv, database = calm.mappings
    database = replace(
        database, database_up=False, errors=44, last_error="db1.example.org:3306: Can't connect: timed out"
    )
    minutes = tuple(
        replace(minute, accepted=minute.accepted // 3, failed=(number * 7) % 5, rejected_by_willi=18 + number % 9,
                refused=number % 13)
        if number > 46 else minute
        for number, minute in enumerate(calm.minutes)
    )  # fmt: skip
    first = calm.certificates[0]
    return replace(
        calm, workers=3, workers_draining=1, reloads_failed=1, sessions=4_960, failed_total=530, minutes=minutes,
        last_reload_error="/opt/willi/etc/willi.conf:12: read_timeot: unknown key; did you mean 'read_timeout'?",
        problems=(
            Finding("wrong", "workers", "only 3 of 4 serve", advice.READ_LOG),
            Finding("wrong", "reload", "the last one failed: /opt/willi/etc/willi.conf:12: read_timeot: unknown key",
                    advice.RELOAD_AGAIN),
            Finding("wrong", DATABASE, "database is down: db1.example.org:3306: Can't connect: timed out",
                    advice.REPAIR_DATABASE),
            Finding("wrong", "mail2.example.org:25", "the upstream is down: Connection refused",
                    advice.LOOK_AT_UPSTREAM),
            Finding("warn", first.file, "certificate: 5 days left", RENEW),
            Finding("warn", "max_connections", "4,960 of 5,000 are in use", advice.RAISE_LIMIT),
        ),
        hosts=(calm.hosts[0], lost, *calm.hosts[2:]), mappings=(csv, database),
        certificates=(
            replace(first, expires=NOW + 5.4 * DAY),
            replace(calm.certificates[1], expires=NOW - 3 * DAY),
        ),
        limits=(replace(calm.limits[0], used=4_960), replace(calm.limits[1], used=50, refused=912), *calm.limits[2:]),
        events=tuple(_bad_event(event) if number % 3 == 0 else event for number, event in enumerate(calm.events)),
    )  # fmt: skip


def hostile() -> Overview:
    """Each text that somebody else has chosen is malice, as far as that is possible."""
    bad = troubled()
    return replace(
        bad, domain=HOSTILE[1], version=HOSTILE[0], last_reload_error=HOSTILE[0], listen=HOSTILE[:2],
        problems=tuple(Finding("wrong", text, text, text) for text in HOSTILE),
        hosts=tuple(poisoned(bad.hosts[0], number) for number in range(len(HOSTILE))),
        mappings=tuple(poisoned(bad.mappings[1], number) for number in range(len(HOSTILE))),
        certificates=tuple(replace(poisoned(bad.certificates[0], number), names=HOSTILE) for number in range(3)),
        events=tuple(poisoned(bad.events[number % 3], number, at=NOW - number) for number in range(50)),
    )  # fmt: skip


def empty() -> Overview:
    """A Willi that has just started, and that nobody has talked to."""
    return replace(
        healthy(), started=NOW - 0.5, sessions=0, sessions_total=0, accepted_total=0, rejected_total=0, failed_total=0,
        octets_total=0, reloads=0, last_reload=None, minutes=(), hosts=(), certificates=(), events=(),
    )  # fmt: skip


def asked(address: str = "Sales+Autumn@example.org") -> Asked:
    """An answer with a hit."""
    steps = (
        AskedStep(CSV, "sales+autumn@example.org", "-", None),
        AskedStep(CSV, "sales@example.org", "-", None),
        AskedStep(CSV, "example.org", "-", None),
        AskedStep(DATABASE, "sales+autumn@example.org", "-", 0.0011),
        AskedStep(DATABASE, "sales@example.org", "mail2.example.org:25", 0.0008),
    )
    return Asked(address, steps, "route: mail2.example.org:25, tls_verify = true")


def poisoned(value: T, number: int, **changes: object) -> T:
    """The same with malice in each of its texts; `kind` only says which of ours it is."""
    texts = [field.name for field in fields(value) if field.type == "str" and field.name != "kind"]  # type: ignore[arg-type]
    malice = {name: HOSTILE[(number + place) % len(HOSTILE)] for place, name in enumerate(texts)}
    return replace(value, **{**malice, **changes})  # type: ignore[type-var]


def _minute(number: int) -> Minute:
    wave = 1 + 0.5 * math.sin(number / 7) + 0.25 * math.sin(number * 1.7)
    return Minute(
        began=NOW - NOW % 60 - 60 * (59 - number), sessions=int(74 * wave), refused=3 if number in (17, 18, 41) else 0,
        accepted=int(46 * wave), rejected_by_upstream=int(9 * wave * (1 + math.sin(number * 2.3))),
        rejected_by_willi=int(5 * wave * (1 + math.cos(number * 1.3))), failed=1 if number in (9, 41) else 0,
    )  # fmt: skip


def _hosts() -> tuple[Host, ...]:
    return (
        Host("mail1.example.org:25", True, None, 18_412, 3, 731_004, 201_118, 44_100_200_300, 0.0031, "", None),
        Host("mail2.example.org:25", True, None, 9_120, 12, 402_991, 99_120, 22_012_000_000, 0.0044,
             "mail2.example.org:25: connecting: more than 20 s", NOW - 2 * DAY),
        Host("mx.partner.example:25", True, None, 2_311, 0, 77_877, 1_892, 5_092_350_720, 0.0412, "", None),
        Host("[2001:db8:0:17::2]:2525", True, None, 0, 0, 0, 0, 0, None, "", None),
    )  # fmt: skip


def _mappings() -> tuple[MappingState, ...]:
    return (
        MappingState(
            CSV, "csv", patterns=10_412, loaded_at=NOW - 5_400, lookups=1_611_902, hits=1_120_400,
            lookup_seconds=0.000004,
        ),
        MappingState(
            DATABASE, "mysql", database_up=True, seen=NOW - 1, cache_entries=8_211, lookups=491_502, hits=91_472,
            cache_hits=412_332, lookup_seconds=0.0009,
        ),
    )  # fmt: skip


def _certificates() -> tuple[CertificateState, ...]:
    return (
        CertificateState("/etc/ssl/mail/mx1.pem", ("mx1.example.org", "mx.example.org"), NOW + 61.5 * DAY),
        CertificateState("/etc/ssl/mail/mx1.example.com.pem", ("mx1.example.com",), NOW + 19.2 * DAY),
    )


def _limits() -> tuple[Limit, ...]:
    return (
        Limit("max_connections", 37, 5_000, 0),
        Limit("max_connections_per_ip", 12, 50, 9),
        Limit("max_connection_rate", 31, 120, 0),
    )


def _event(number: int) -> Event:
    people = ("ann", "bob", "carol.van.der.berg", "sales+autumn", "d.o'neil", "postmaster")
    senders = ("eva@client.example", "news@lists.client.example", "", "no-reply@shop.example", "m.müller@büro.example")
    to = f"{people[number % 6]}@example.{'org' if number % 4 else 'com'}"
    base = Event(
        at=NOW - 1.7 - number * 11.3, kind="accepted", sid=f"{0x1A3F9C2B7D + number * 7919:010X}",
        client=f"203.0.113.{7 + number * 3}:{40_000 + number * 131}", sender=senders[number % 5], recipients=to,
        upstream=("mail1.example.org:25", "mail2.example.org:25", "mx.partner.example:25")[number % 3],
        reply=QUEUED.format(0x630A5212AF3 + number * 104_729), error="", error_src="",
        octets=2_200 + (number * 7919) % 190_000, seconds=0.04 + (number % 7) * 0.031,
    )  # fmt: skip
    if number % 5 == 1:
        text = UNKNOWN.format(to)
        return replace(base, kind="rejected", reply=text, error=text, error_src="upstream", octets=0, seconds=0.003)
    if number % 11 == 4:
        text = "554 5.7.1 Relay access denied"
        return replace(base, kind="rejected", upstream="", reply=text, error=text, error_src="internal", octets=0)
    if number % 17 == 6:
        text = "421 4.7.0 Too many connections from your address"
        return replace(
            base, kind="refused", sender="", recipients="", upstream="", reply=text, error=text, error_src="internal",
            octets=0, seconds=0.0,
        )  # fmt: skip
    return base


def _bad_event(event: Event) -> Event:
    why = "mail2.example.org:25: Connection refused"
    return replace(
        event, kind="rejected", upstream="mail2.example.org:25", reply=NO_ANSWER, error=why, error_src="internal",
        octets=0, seconds=0.002, recipients=event.recipients or "ann@example.org",
    )  # fmt: skip
