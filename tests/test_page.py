"""The status page: what it says, and that nothing which others have said becomes markup."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ET
from dataclasses import fields, replace
from typing import Any

import pytest

from tests.support import overviews
from tests.support.loopback import ROOT
from tests.support.overviews import HOSTILE, NOW
from willi_lib.status import charts, page, words
from willi_lib.status import overview as state
from willi_lib.status.charts import Chart, Layer
from willi_lib.status.counts import Event
from willi_lib.status.finding import Finding
from willi_lib.status.overview import Host, Limit, Minute, Overview
from willi_lib.status.reports import Asked, AskedStep, CertificateState, MappingState
from willi_lib.status.totals import MINUTES
from willi_lib.text import visible

OVERVIEWS = {
    "healthy": overviews.healthy(), "troubled": overviews.troubled(), "hostile": overviews.hostile(),
    "empty": overviews.empty(),
}  # fmt: skip
MALICE = Asked(HOSTILE[0], tuple(AskedStep(text, text, text, None) for text in HOSTILE), HOSTILE[1])
ALIEN = "<b onclick=\"x('1')\">&\u202e\r\n</b>"  # one of everything
ALIEN_SHOWN = r"&lt;b onclick=&#34;x(&#39;1&#39;)&#34;&gt;&amp;\u202e\r\n&lt;/b&gt;"

# All that the template may make. Nothing of it runs, and nothing of it loads but the icon and /style.css.
ELEMENTS = {
    "a", "bdi", "body", "caption", "code", "dd", "div", "dl", "dt", "form", "g", "h1", "h2", "h3", "head",
    "header", "html", "input", "label", "li", "line", "link", "main", "meta", "p", "rect", "section", "small", "span",
    "strong", "svg", "table", "tbody", "td", "th", "thead", "time", "title", "tr", "ul", "button",
}  # fmt: skip
ATTRIBUTES = {
    "action", "aria-hidden", "aria-label", "aria-labelledby", "autocapitalize", "autocomplete", "autofocus", "charset",
    "class", "content", "data-label", "datetime", "for", "height", "href", "http-equiv", "id", "inputmode", "lang",
    "maxlength", "method", "name", "placeholder", "preserveAspectRatio", "rel", "role", "scope", "spellcheck", "title",
    "type", "value", "viewBox", "width", "x", "x1", "x2", "y", "y1", "y2",
}  # fmt: skip


def parsed(overview: Overview, asked: Asked | None = None) -> ET.Element:
    """The document by a strict parser: whatever is not well-formed raises."""
    return ET.fromstring(page.render(overview, asked))


def text_of(root: ET.Element) -> str:
    return " ".join("".join(root.itertext()).split())


def section(root: ET.Element, name: str) -> str:
    [found] = [node for node in root.iter("section") if node.get("aria-labelledby") == name]
    return " ".join(" ".join(found.itertext()).split())


# Whatever others say is text


@pytest.mark.parametrize("asked", [None, MALICE, overviews.asked()], ids=["no question", "malice", "an answer"])
@pytest.mark.parametrize("overview", OVERVIEWS.values(), ids=OVERVIEWS)
def test_the_document_has_only_our_elements_and_attributes(overview: Overview, asked: Asked | None):
    for node in parsed(overview, asked).iter():
        assert node.tag in ELEMENTS
        assert set(node.keys()) <= ATTRIBUTES
    assert ELEMENTS & {"script", "style", "iframe", "object", "embed", "base", "img", "use", "foreignObject"} == set()
    assert not any(name.startswith("on") or name in ("style", "src", "srcdoc") for name in ATTRIBUTES)


@pytest.mark.parametrize("overview", OVERVIEWS.values(), ids=OVERVIEWS)
def test_nothing_is_loaded_from_elsewhere_and_no_link_leaves_the_page(overview: Overview):
    root = parsed(overview, MALICE)
    links = {node.get(name, "") for node in root.iter() for name in ("href", "action")} - {""}
    assert {link for link in links if not link.startswith("data:image/svg+xml,")} == {"/", "/style.css"}
    assert re.search("url|@import|//", page.STYLE) is None


def test_malice_makes_no_more_elements_than_harmless_text():
    def harmless(overview: Overview) -> Overview:
        calm: dict[str, Any] = {
            field.name: "x" for field in fields(Event) if field.type == "str" and field.name != "kind"
        }
        return replace(
            overview, domain="x", version="x", last_reload_error="x",
            problems=tuple(Finding("wrong", "x", "x", f"x{number}") for number in range(len(overview.problems))),
            hosts=tuple(replace(host, name="x", last_error="x") for host in overview.hosts),
            mappings=tuple(replace(one, name="x", kind="x", last_error="x") for one in overview.mappings),
            certificates=tuple(replace(one, file="x", names=("x",)) for one in overview.certificates),
            events=tuple(replace(event, **calm) for event in overview.events),
        )  # fmt: skip

    # `error` is said once more where it is not the reply; with harmless text both are the same.
    malice = replace(overviews.hostile(), events=tuple(replace(e, error=e.reply) for e in overviews.hostile().events))
    tags = [node.tag for node in parsed(malice).iter()]
    assert tags == [node.tag for node in parsed(harmless(malice)).iter()]


TEXTS = [
    (kind, field.name)
    for kind in (Overview, Finding, Event, Host, MappingState, CertificateState, Limit)
    for field in fields(kind)
    if field.type == "str"
]


@pytest.mark.parametrize(("kind", "name"), TEXTS, ids=[f"{kind.__name__}.{name}" for kind, name in TEXTS])
def test_each_text_is_shown_escaped_wherever_it_is_shown(kind: type, name: str):
    overview = overviews.troubled()
    where = {
        Finding: "problems", Event: "events", Host: "hosts", MappingState: "mappings",
        CertificateState: "certificates", Limit: "limits",
    }  # fmt: skip
    change: dict[str, Any] = {name: ALIEN}
    if kind is not Overview:
        change = {where[kind]: tuple(replace(value, **change) for value in getattr(overview, where[kind]))}
    overview = replace(overview, **change)
    html = page.render(overview, None)
    assert "<b" not in html.replace("<bdi", "").replace("<body", "").replace("<button", "")
    assert "\u202e" not in html and "\r" not in html
    hidden = {(MappingState, "kind"), (Event, "error_src")}  # these are ours; they choose words and are not shown
    assert ((kind, name) in hidden) or ALIEN_SHOWN in html


def test_texts_in_lists_are_escaped_too():
    alien = replace(overviews.healthy(), listen=(ALIEN,), certificates=(CertificateState("f", (ALIEN,), NOW),))
    assert page.render(alien, None).count(ALIEN_SHOWN) == 2


def test_a_question_and_its_answer_are_escaped_in_text_and_in_the_field():
    html = page.render(overviews.healthy(), Asked(ALIEN, (AskedStep(ALIEN, ALIEN, ALIEN, 0.1),), ALIEN))
    assert html.count(ALIEN_SHOWN) == 7
    assert f'value="{ALIEN_SHOWN}"' in html


@pytest.mark.parametrize("text", HOSTILE)
def test_malice_reads_as_it_was_sent_but_for_what_cannot_be_seen(text: str):
    root = parsed(overviews.healthy(), Asked(text, (), ""))
    assert [node.get("value") for node in root.iter("input")] == [visible(text)]
    html = page.render(overviews.healthy(), Asked(text, (), ""))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ud800-\udfff]", html)
    html.encode()


def test_a_very_long_text_is_cut():
    overview = replace(overviews.healthy(), problems=(Finding("wrong", "a", "\u202e" * 100_000, "\u202e" * 100_000),))
    assert len(page.render(overview, None)) < len(page.render(overviews.healthy(), None)) + 4_000


def test_letters_with_a_few_marks_stay_and_towers_of_marks_do_not():
    assert visible("m\u0075\u0308ller") == "m\u0075\u0308ller"
    assert visible("a\u0301\u0302\u0303") == "a\u0301\u0302\\u0303"


def test_nothing_turns_the_escaping_off():
    template = (ROOT / "willi_lib/status/page.html").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
    assert not re.search(r"safe|autoescape|forceescape|tojson|xmlattr|urlize|include|import|extends", code)
    makers = set()
    for path in (ROOT / "willi_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Markup":
                makers.add(path.name)
    assert makers == set()


# What it says


def test_a_good_day_is_green_and_asks_nothing_of_anybody():
    root = parsed(overviews.healthy())
    [state] = [node for node in root.iter("section") if node.get("aria-labelledby") == "state"]
    assert state.get("class") == "state ok"
    assert text_of(state) == "All is well"
    assert root.findtext("head/title") == "All is well: mx1.example.org"
    assert "badge wrong" not in ET.tostring(root, encoding="unicode")


def test_a_bad_night_names_each_problem_and_what_to_do():
    overview = overviews.troubled()
    root = parsed(overview)
    told = section(root, "state")
    assert "6 problems need you" in told
    for problem in overview.problems:
        assert str(problem) in told
    assert told.index("What to do") > told.index(str(overview.problems[-1]))
    hints = state.advice(overview)
    assert len(hints) == 6
    for hint in hints:
        assert hint in told
    assert root.findtext("head/title") == "6 problems need you: mx1.example.org"


def test_an_advice_for_several_problems_is_given_once():
    problems = tuple(Finding("wrong", f"{name}:25", "the upstream is down", "Look at it.") for name in "abc")
    assert state.advice(replace(overviews.healthy(), problems=problems)) == ["Look at it."]
    assert state.advice(overviews.healthy()) == []


def test_the_page_refreshes_itself_unless_something_is_asked():
    def refresh(asked: Asked | None) -> list[str | None]:
        root = parsed(overviews.healthy(), asked)
        return [node.get("content") for node in root.iter("meta") if node.get("http-equiv") == "refresh"]

    assert refresh(None) == ["10; url=/"]
    assert refresh(overviews.asked()) == []
    assert refresh(Asked("", (), "")) == []


def test_an_empty_question_pauses_and_puts_the_cursor_into_the_field():
    paused, running = parsed(overviews.healthy(), Asked("", (), "")), parsed(overviews.healthy())
    assert "Paused at 14:03:22 UTC" in text_of(paused)
    assert "Where mail goes for" not in text_of(paused)
    assert [node.get("autofocus") for node in paused.iter("input")] == ["autofocus"]
    assert [node.get("autofocus") for node in running.iter("input")] == [None]
    assert "/?address=" in [node.get("href") for node in running.iter("a")]


def test_an_answer_shows_each_key_and_the_route():
    answer = section(parsed(overviews.healthy(), overviews.asked()), "answer")
    assert "Where mail goes for Sales+Autumn@example.org" in answer
    assert "route: mail2.example.org:25, tls_verify = true" in answer
    for step in overviews.asked().steps:
        assert step.key in answer
    assert answer.count("no match") == 4
    assert "0.8 ms" in answer


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hour", ["Sessions", "4,960", "open now", "2,433", "565 by upstreams", "501 by Willi", "87", "30"]),
        ("hosts", ["mail2.example.org:25", "down 12 min", "4.4 ms", "402,991", "22.0 GB", "318", "Connection refused"]),
        ("hosts", ["[2001:db8:0:17::2]:2525"]),
        ("mappings", ["csv:/opt/willi/etc/upstream_servers.csv", "in use", "10,412", "12:33:22", "1,120,400", "69 %"]),
        ("mappings", ["mysql:database", "down", "0.9 ms", "8,211", "83 %", "44", "Can't connect: timed out"]),
        ("limits", ["max_connections", "4,960 of 5,000", "max_connections_per_ip", "50 of 50", "912"]),
        ("certificates", ["mx1.pem", "mx1.example.org, mx.example.org", "5 days left", "expired 3 d 0 h ago"]),
        ("facts", ["Nov 07", "up 19 d 3 h", "1,904,311", "71.2 GB", "3 of 4, 1 draining", "1 failed", "2.1.0"]),
        ("events", ["14:03:20", "rejected", "by Willi", "1A3F9C2B7D", "203.0.113.7:40000", "eva@client.example"]),
        ("events", ["451 4.4.1 No answer from the server", "<>", "by upstream", "18.0 kB", "queued as 630A"]),
        ("events", ["refused", "421 4.7.0 Too many connections from your address"]),
    ],
)  # fmt: skip
def test_a_section_says(name: str, said: list[str]):
    text = section(parsed(overviews.troubled()), name)
    for part in said:
        assert part in text


def test_all_events_are_shown_in_their_order():
    overview = overviews.healthy()
    text = section(parsed(overview), "events")
    places = [text.index(event.sid) for event in overview.events]
    assert len(places) == 50
    assert places == sorted(places)


def test_a_question_also_chooses_the_events_of_its_address():
    overview = overviews.healthy()
    chosen = replace(overview.events[3], sender="Zoe@z.example", recipients="ann@a.example,Yan@y.example", sid="MINE")
    overview = replace(overview, events=(*overview.events[:3], chosen, *overview.events[4:]))
    for address in ("zoe@Z.example", "<yan@y.example>", "y.example"):
        text = section(parsed(overview, Asked(address, (), "")), "events")
        assert "MINE" in text and overview.events[0].sid not in text, address
    assert "None of the last 50." in section(parsed(overview, Asked("udo@x.example", (), "")), "events")
    assert overview.events[0].sid in section(parsed(overview, Asked("", (), "")), "events")


def test_a_willi_that_has_just_started_is_told_as_such():
    root = parsed(overviews.empty())
    assert "No upstream has been talked to yet." in section(root, "hosts")
    assert "Nothing has come yet." in section(root, "events")
    assert "STARTTLS is not offered" in section(root, "certificates")
    assert "up 500 ms" in section(root, "facts")


def test_tables_are_made_for_whoever_cannot_see_them():
    root = parsed(overviews.troubled(), overviews.asked())
    tables = list(root.iter("table"))
    assert len(tables) == 6
    for table in tables:
        assert table.findtext("caption")
        assert {head.get("scope") for head in table.findall("thead/tr/th")} == {"col"}
        for row in table.findall("tbody/tr"):
            assert [cell.get("scope") for cell in row.findall("th")] == ["row"]
            assert len(row) == len(table.findall("thead/tr/th"))
    for time in root.iter("time"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time.get("datetime", ""))
    for picture in root.iter("svg"):
        assert picture.get("role") == "img" and picture.get("aria-label")
    names = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(names) == len(set(names))
    assert {node.get("aria-labelledby") for node in root.iter("section")} <= set(names)
    assert [label.get("for") for label in root.iter("label")] == ["address"]


# Charts and words


def test_a_chart_stacks_what_happened_in_a_minute_and_stays_in_its_picture():
    rejections = ((0, 0), (1000, 1), (1, 0))
    minutes = [
        Minute(NOW + 60 * number, rejected_by_upstream=one, rejected_by_willi=other)
        for number, (one, other) in enumerate(rejections)
    ]
    layers = (Layer("rejected_by_upstream", "by upstreams", "upstream"), Layer("rejected_by_willi", "by Willi", "own"))
    chart = Chart("Rejected", minutes, *layers)
    assert chart.label == "Rejected in each of the last 60 minutes: 1,002 in all, at most 1,001 in a minute"
    assert [title for _, title, _ in chart.bars] == ["14:04 1,000 by upstreams, 1 by Willi", "14:05 1 by upstreams"]
    assert [x for x, _, _ in chart.bars] == [58 * charts.STEP, 59 * charts.STEP]
    [(mark, y, height), (upper_mark, upper_y, upper_height)] = chart.bars[0][2]
    assert (mark, upper_mark) == ("upstream", "own")
    assert y + height == charts.HEIGHT
    assert y == pytest.approx(upper_y + upper_height, abs=0.02)
    assert upper_y >= 0
    assert min(height for _, _, parts in chart.bars for _, _, height in parts) >= charts.LEAST


def test_the_page_draws_the_numbers_of_a_chart():
    overview = overviews.troubled()
    [svg] = [node for node in parsed(overview).iter("svg") if node.get("aria-label", "").startswith("Rejected")]
    chart = charts.last_hour(overview.minutes)["rejected"]
    assert svg.get("viewBox") == f"0 0 {MINUTES * charts.STEP} {charts.HEIGHT}"
    assert svg.get("aria-label") == chart.label
    assert [title.text for title in svg.iter("title")] == [title for _, title, _ in chart.bars]
    drawn = [(node.get("x"), node.get("class"), node.get("y"), node.get("height")) for node in svg.iter("rect")]
    assert drawn == [(str(x), *map(str, part)) for x, _, parts in chart.bars for part in parts]
    assert len(drawn) > 60


def test_a_chart_of_nothing_is_a_base_line():
    assert Chart("Failed", [], Layer("failed", "failed", "wrong")).bars == []
    pictures = [node for node in parsed(overviews.empty()).iter("svg") if node.get("class") == "chart"]
    assert [[child.tag for child in picture] for picture in pictures] == [["line"]] * 5


@pytest.mark.parametrize(
    ("used", "most", "width", "level"),
    [(0, 50, 0, "ok"), (39, 50, 78, "ok"), (40, 50, 80, "warn"), (50, 50, 100, "wrong"), (90, 50, 100, "wrong"),
     (1, 5000, 1, "ok"), (3, 0, 0, "ok")],
)  # fmt: skip
def test_a_bar_shows_how_near_a_limit_is(used: int, most: int, width: float, level: str):
    limit = Limit("max_connections", used, most, 0)
    assert state.limit_state(limit) == (level, f"{used} of {most:,}")
    root = parsed(replace(overviews.healthy(), limits=(limit,)))
    [_, filled] = [bar for svg in root.iter("svg") if svg.get("class") == "bar" for bar in svg.iter("rect")]
    assert (float(filled.get("width", "")), filled.get("class")) == (width, level)


def test_a_client_at_its_own_limit_is_no_trouble():
    assert state.limit_state(Limit("max_connections_per_ip", 50, 50, 900)) == ("warn", "50 of 50")


@pytest.mark.parametrize(
    ("up", "error", "expected"),
    [(True, "", ("ok", "up")), (False, "gone", ("wrong", "down")), (None, "", ("ok", "in use")),
     (None, "map.csv:3: no server", ("warn", "old table"))],
)  # fmt: skip
def test_a_mapping_is_in_a_state(up: bool | None, error: str, expected: tuple[str, str]):
    mapping = replace(overviews.healthy().mappings[0], database_up=up, last_error=error)
    assert state.mapping_state(mapping) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 µs"), (0.000004, "4 µs"), (0.0004, "0.4 ms"), (0.031, "31 ms"), (3.42, "3.4 s"), (59, "59 s"),
     (60, "1 min"), (7_800, "2 h 10 min"), (273_600, "3 d 4 h"), (1e9, "11,574 d 1 h")],
)  # fmt: skip
def test_a_duration_reads(seconds: float, text: str):
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("octets", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (123_456, "123 kB"), (1_234_567, "1.2 MB"), (5e9, "5.0 GB"),
     (7.1e15, "7,100.0 TB")],
)  # fmt: skip
def test_a_size_reads(octets: float, text: str):
    assert words.size(int(octets)) == text


@pytest.mark.parametrize(
    ("left", "text", "level"),
    [(-60, "expired 1 min ago", "wrong"), (3_600, "1 h 0 min left", "warn"), (86_400, "1 day left", "warn"),
     (14 * 86_400 - 1, "13 days left", "warn"), (14 * 86_400, "14 days left", "ok")],
)  # fmt: skip
def test_a_certificate_warns_before_it_ends(left: float, text: str, level: str):
    certificate = CertificateState("f", ("n",), NOW + left)
    assert state.certificate_state(certificate, NOW) == (level, text)


@pytest.mark.parametrize("at", [-1e18, 0, 1e18])
def test_a_time_out_of_all_bounds_is_no_fault(at: float):
    assert words.clock(at, NOW)
