"""The same sessions once to a real server and once through Willi: replies and stored messages agree.

What may differ is in tests/support/differences.py and docs/interoperation.md, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.conftest import StartPostfix, StartWilli, show_on_failure
from tests.support.certificates import Authority, Pair
from tests.support.client import Client
from tests.support.corpus import DOMAINS, SESSIONS, Session
from tests.support.daemon import Setting, Willi
from tests.support.differences import ALL, DIFFERENCES, EXIM, LACKING, OPENSMTPD, POSTFIX, Difference
from tests.support.differential import REPAIRED, Exchange, Server, Way, exchanges, features, one_by_one, play_all
from tests.support.exim import Exim
from tests.support.loopback import HOST, need
from tests.support.opensmtpd import OpenSmtpd
from tests.support.postfix import Postfix
from tests.support.refusals import REFUSALS

XCLIENT: Mapping[str, Setting] = {}
PROXY: Mapping[str, Setting] = {"send_proxy": "v2"}  # neither Debian's Exim nor OpenSMTPD knows XCLIENT


def inline(at: str) -> str:
    """The refusals at this stage as a table of Postfix's."""
    rows = (f"{{ {refusal.whom} = {refusal.code} {refusal.words} }}" for refusal in REFUSALS if refusal.at == at)
    return f"inline:{{ {' '.join(rows)} }}"


def postfix_settings() -> dict[str, str]:
    """Willi's host is nobody special, but for XCLIENT (docs/configure.md, "What the upstream must allow")."""
    return {
        "mynetworks": "192.0.2.1/32",
        "smtpd_authorized_xclient_hosts": HOST,
        "smtpd_helo_required": "yes",
        "smtpd_delay_reject": "no",
        "smtpd_client_restrictions": f"check_client_access {inline('connect')}",
        "smtpd_helo_restrictions": f"check_helo_access {inline('ehlo')}",
        "smtpd_sender_restrictions": f"check_sender_access {inline('mail')}",
        "smtpd_recipient_restrictions": f"check_recipient_access {inline('rcpt')}, reject_unauth_destination",
        "smtpd_data_restrictions": f"check_sender_access {inline('data')}",
        "smtpd_end_of_data_restrictions": f"check_sender_access {inline('end')}",
    }


@dataclass
class Comparison:
    """Both ways of all sessions with one server."""

    name: str
    lacking: frozenset[str]  # extensions
    direct: Way  # without the sessions that need what is lacking
    through: Way

    @cached_property
    def seen(self) -> set[Difference]:
        """All documented differences that were met."""
        return {found for name in self.direct.outcomes for _, found in self.differences(name) if found}

    def differences(self, session: str) -> Iterator[tuple[Exchange, Difference | None]]:
        """Where the replies differ, and the reason, up to where the sessions part."""
        for exchange in exchanges(self.direct.outcomes[session], self.through.outcomes[session]):
            if exchange.direct == exchange.through and exchange.said != REPAIRED:
                continue
            found = next((d for d in DIFFERENCES if self.name in d.servers and d.explains(exchange)), None)
            yield exchange, found
            if found and found.parts:
                return


def start_server(name: str, pair: Pair) -> tuple[Server, int, str, Mapping[str, Setting]]:
    """The server, its own port, its name in a route, and what Willi must know of it."""
    if name == POSTFIX:
        need("postfix", root=True)
        postfix = Postfix("mx.example", DOMAINS, pair, postfix_settings())
        return postfix, postfix.port, postfix.server, XCLIENT
    if name == EXIM:
        exim = Exim(DOMAINS, pair, proxies=HOST)
        return exim, exim.port, exim.server, PROXY
    opensmtpd = OpenSmtpd(DOMAINS)
    return opensmtpd, opensmtpd.port, opensmtpd.server, PROXY


def can_be_asked(server: str, session: Session, lacking: frozenset[str]) -> bool:
    """Whether the server can be asked without Willi. OpenSMTPD 6.8.0 now and then crashes when a smuggler hangs up."""
    return session.needs not in lacking and not (server == OPENSMTPD and session.smuggles)


@pytest.fixture(scope="module", params=ALL)
def comparison(
    request: pytest.FixtureRequest, certificates: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Comparison]:
    pair = certificates.issue("mx.example", "localhost", HOST)
    directory: Path = tmp_path_factory.mktemp("interoperation")
    with ExitStack() as ends:
        server, port, route, known = start_server(request.param, pair)
        ends.callback(server.stop)
        show_on_failure(request, request.param, server.log_file)
        show_on_failure(request, "Willi", directory / "willi.log")
        mappings: dict[str, Setting] = {"all": {"type": "static", "server": route, "tls_verify": False}}
        tls = {"tls_cert": str(pair.cert), "tls_key": str(pair.key)}
        willi = Willi(directory, {"domain": "mx.willi.example", **tls, **known, "mappings": mappings})
        ends.callback(willi.end)
        lacking = frozenset(LACKING) - features(port)
        comparable = {n: s if "PIPELINING" not in lacking else one_by_one(s) for n, s in SESSIONS.items()}
        asked = {n: s for n, s in comparable.items() if can_be_asked(request.param, s, lacking - {"PIPELINING"})}
        yield Comparison(request.param, lacking, play_all(asked, port, server), play_all(SESSIONS, willi.port, server))


@pytest.mark.parametrize("session", SESSIONS)
def test_replies_agree_but_for_the_documented_differences(comparison: Comparison, session: str):
    """And the Received header, which says who the client is."""
    if session in comparison.direct.outcomes:
        unexplained = [exchange for exchange, difference in comparison.differences(session) if difference is None]
        assert unexplained == []
    else:
        assert not can_be_asked(comparison.name, SESSIONS[session], comparison.lacking)


@pytest.mark.parametrize("session", SESSIONS)
def test_the_same_is_stored(comparison: Comparison, session: str):
    """Octet by octet, and once for each recipient."""
    through = comparison.through.outcomes[session]
    direct = comparison.direct.outcomes.get(session)
    if direct and not any(found and found.parts for _, found in comparison.differences(session)):
        assert through.stored == direct.stored
        assert len(through.received) == len(direct.received)
    else:
        as_sent = SESSIONS[session].repaired
        assert len(through.stored) == len(through.sent)
        for messages, sent in zip(through.stored, through.sent, strict=True):
            stored = (sent if as_sent is None else as_sent).replace(b"\r\n", b"\n")
            stored += b"" if stored.endswith(b"\n") else b"\n"
            if comparison.name == OPENSMTPD:  # for which a line ends at a NUL
                stored = re.sub(rb"\0.*", b"", stored)
            assert messages
            assert [content for _, _, content in messages] == [stored] * len(messages)


def test_nothing_is_stored_that_no_reply_has_told_of(comparison: Comparison):
    assert comparison.through.strays == []


def test_every_documented_difference_is_met_with_the_servers_that_it_names(comparison: Comparison):
    documented = {difference.name: difference for difference in DIFFERENCES if comparison.name in difference.servers}
    unseen = documented.keys() - {difference.name for difference in comparison.seen}
    assert {difference.name for difference in comparison.seen} <= documented.keys()
    assert [name for name in unseen if not documented[name].some_versions] == []


def test_what_the_server_lacks_is_what_the_page_says(comparison: Comparison):
    assert comparison.lacking == (frozenset(LACKING) if comparison.name == OPENSMTPD else frozenset())


def test_the_corpus_is_as_large_as_it_should_be(comparison: Comparison):
    assert len(comparison.through.outcomes) >= 60
    assert sum(map(len, (outcome.stored for outcome in comparison.through.outcomes.values()))) >= 60


# docs/interoperation.md, "What a server cannot judge any more"

EARLY = b"EHLO c.example\r\nMAIL FROM:<ann@a.example>\r\nRCPT TO:<early@b.example>\r\nDATA\r\n"


def test_a_server_behind_willi_does_not_see_how_a_client_pipelines(
    start_willi: StartWilli, start_postfix: StartPostfix
):
    # Since Postfix 3.9 the second one is on by default, and such a client is hung up on.
    strict = {"smtpd_data_restrictions": "reject_unauth_pipelining", "smtpd_forbid_unauth_pipelining": "no"}
    postfix = start_postfix("mx.example", ("b.example",), settings=strict)
    willi = start_willi(server=postfix.server)
    for port, code, words in ((postfix.port, 503, "pipelining"), (willi.port, 354, "")):
        with Client(port) as client:
            client.send(EARLY)
            answers = [client.read_reply() for _ in range(5)]
            assert [answer.code for answer in answers] == [220, 250, 250, 250, code]
            assert words in str(answers[-1])
