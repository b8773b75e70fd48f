"""The page: what a postmaster wants to know at three in the morning, on one sheet.

`render` is pure. It says nothing in HTML of its own: `element` makes all of it and escapes every text (see markup.py).
There is no script: the browser asks again every 10 seconds, but not while an answer or a pause is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote

from . import charts, tables, words
from .charts import Layer
from .markup import Content, Markup, document, element
from .overview import Asked, Minute, Overview
from .parts import MOST, NAME, duration, said, table, time
from .style import STYLE as STYLE

REFRESH = 10  # seconds
PAUSE = "/?address="  # an empty question: the same page, and it stands still
COLOURS = {"good": "1f7a4d", "bad": "c0352b"}  # of the icon in the browser's tab


def render(overview: Overview, asked: Asked | None) -> str:
    """The whole document. asked: what the form was asked; with an empty address the page only stands still."""
    mark = "bad" if overview.problems else "good"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("title", f"{words.headline(overview)}: {overview.domain}"),
        element("meta", name="viewport", content="width=device-width"),
        element("meta", name="color-scheme", content="light dark"),
        None if asked else element("meta", http_equiv="refresh", content=f"{REFRESH}; url=/"),
        element("link", rel="icon", href=_icon(COLOURS[mark])),
        element("link", rel="stylesheet", href="/style.css"),
    )
    main = element(
        "main",
        _state(overview, mark),
        _answer(asked) if asked and asked.address else None,
        _last_hour(overview),
        tables.hosts(overview),
        tables.tables(overview),
        element("div", tables.limits(overview), tables.certificates(overview), class_="pair"),
        _facts(overview),
        tables.events(overview),
    )
    return document(head, element("body", _header(overview, asked), main), lang="en")


def _header(overview: Overview, asked: Asked | None) -> Markup:
    state = (
        ("Paused at ", time(overview.now, overview.now), " UTC. ", element("a", "Go on", href="/"))
        if asked
        else (time(overview.now, overview.now), " UTC, every 10 s. ", element("a", "Pause", href=PAUSE))
    )
    field = element(
        "input", id="address", name="address", type="text", inputmode="email", maxlength=320,
        placeholder="user@example.org", value=asked.address if asked else None, autocomplete="off",
        autocapitalize="off", spellcheck="false", autofocus="autofocus" if asked and not asked.address else None,
    )  # fmt: skip
    label = element("label", "Where does mail go for", for_="address")
    form = element("form", label, field, element("button", "Look up", type="submit"), action="/", method="get")
    return element(
        "header",
        element("h1", element("span", "Willi", class_="brand"), " ", said(overview.domain, NAME)),
        element("p", state, class_="clock"),
        form,
    )


def _state(overview: Overview, mark: str) -> Markup:
    problems = [element("li", said(str(problem), 2 * MOST)) for problem in overview.problems]
    hints = [element("li", said(hint, 2 * MOST)) for hint in words.advice(overview)]
    return element(
        "section",
        element("h2", words.headline(overview), id="state"),
        element("ul", problems) if problems else None,
        element("div", element("h3", "What to do"), element("ul", hints)) if hints else None,
        class_=f"state {mark}",
        aria_labelledby="state",
    )


def _answer(asked: Asked) -> Markup:
    """What `lookup` says, key by key."""
    rows = [
        (
            element("code", said(step.mapping)),
            element("code", said(step.key)),
            "no match" if step.answer == "-" else element("code", said(step.answer)),
            duration(step.seconds),
        )
        for step in asked.steps
    ]
    columns = [("Mapping", ""), ("Key", ""), ("Answer", ""), ("Time", "number")]
    good = asked.result.startswith("route:")
    return element(
        "section",
        element("h2", "Where mail goes for ", element("code", said(asked.address)), id="answer"),
        element("p", element("strong", said(asked.result, 2 * MOST)), class_=f"result {'good' if good else 'warn'}"),
        table("Each key that was asked in each mapping, in order", "answer", columns, rows),
        class_="panel",
        aria_labelledby="answer",
    )


def _last_hour(overview: Overview) -> Markup:
    return element(
        "section",
        element("h2", "Last hour", id="hour"),
        element("div", _tiles(overview), class_="tiles"),
        aria_labelledby="hour",
    )


def _tiles(overview: Overview) -> list[Markup]:
    def of(count: Callable[[Minute], int]) -> list[int]:
        return [count(minute) for minute in overview.minutes]

    began = [minute.began for minute in overview.minutes]
    by_upstream, by_willi = of(lambda m: m.rejected_by_upstream), of(lambda m: m.rejected_by_willi)
    sessions, accepted = of(lambda m: m.sessions), of(lambda m: m.accepted)
    refused, failed = of(lambda m: m.refused), of(lambda m: m.failed)
    split: list[Content] = [
        element("span", f"{words.number(sum(by_upstream))} by upstreams", class_="key upstream"),
        " ",
        element("span", f"{words.number(sum(by_willi))} by Willi", class_="key own"),
    ]
    open_now = f"open now; {words.number(sum(sessions))} began"
    rejections = [Layer("by upstreams", "upstream", by_upstream), Layer("by Willi", "own", by_willi)]
    return [
        _tile("Sessions", overview.sessions, open_now, began, [Layer("began", "calm", sessions)]),
        _tile("Accepted", sum(accepted), "messages", began, [Layer("accepted", "fine", accepted)]),
        _tile("Rejected", sum(by_upstream) + sum(by_willi), split, began, rejections),
        _tile("Turned away", sum(refused), "connections", began, [Layer("turned away", "own", refused)]),
        _tile("Failed", sum(failed), "messages without a verdict", began, [Layer("failed", "wrong", failed)]),
    ]


def _tile(name: str, figure: int, note: Content, began: Sequence[float], layers: Sequence[Layer]) -> Markup:
    highest = max(map(sum, zip(*(layer.counts for layer in layers), strict=True)), default=0)
    return element(
        "div",
        element("h3", name),
        element("p", words.number(figure), class_="figure"),
        element("p", note, class_="note"),
        charts.minutes(name, began, layers),
        element("p", element("span", "60 min ago"), element("span", f"at most {words.number(highest)} a minute"),
                class_="axis", aria_hidden="true"),
        class_="tile",
    )  # fmt: skip


def _facts(overview: Overview) -> Markup:
    now = overview.now
    workers = f"{overview.workers} of {overview.workers_wanted}"
    if overview.workers_draining:
        workers += f", {overview.workers_draining} draining"
    reloads: list[Content] = [words.number(overview.reloads)]
    if overview.last_reload is not None:
        reloads += [", last ", time(overview.last_reload, now)]
    if overview.reloads_failed:
        reloads.append(f", {words.number(overview.reloads_failed)} failed")
    if overview.last_reload_error:
        reloads += [": ", said(overview.last_reload_error)]
    totals: list[tuple[str, Content]] = [
        ("Sessions", words.number(overview.sessions_total)),
        ("Accepted", words.number(overview.accepted_total)),
        ("Rejected", words.number(overview.rejected_total)),
        ("Failed", words.number(overview.failed_total)),
        ("Traffic", words.size(overview.octets_total)),
        ("Workers", workers),
        ("Reloads", reloads),
        ("Listens at", said(", ".join(overview.listen))),
        ("Version", [said(overview.version), f", pid {overview.pid}"]),
    ]
    since = element("h2", "Since ", time(overview.started, now), " UTC", id="facts")
    up = element("p", f"up {words.duration(now - overview.started)}", class_="aside")
    pairs = [element("div", element("dt", name), element("dd", fact)) for name, fact in totals]
    return element("section", since, up, element("dl", pairs), class_="facts", aria_labelledby="facts")


def _icon(colour: str) -> str:
    """A disc."""
    circle = f'<circle cx="8" cy="8" r="7" fill="#{colour}"/>'
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{circle}</svg>'
    return "data:image/svg+xml," + quote(picture, safe="")
