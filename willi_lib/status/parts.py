"""The small parts of the page: a section, a table that becomes cards on a phone, a time, a badge."""

from __future__ import annotations

from collections.abc import Sequence

from . import words
from .markup import Content, Markup, element

MOST = 240  # characters of what others have said; the log has all of it
NAME = 100  # of a host, a file

Column = tuple[str, str]  # the name, and the class of its cells


def section(name: str, title: str, *content: Content) -> Markup:
    inner = [element("p", part, class_="aside") if isinstance(part, str) else part for part in content]
    return element("section", element("h2", title, id=name), inner, class_=name, aria_labelledby=name)


def table(caption: str, class_: str, columns: Sequence[Column], rows: Sequence[Sequence[Content]]) -> Markup | None:
    """A table, and on a phone a card for each row: so each cell knows its column's name. Without rows: nothing."""
    if not rows:
        return None
    heads = [element("th", name, scope="col", class_=kind or None) for name, kind in columns]
    body = [element("tr", [_cell(place, columns[place], cell) for place, cell in enumerate(row)]) for row in rows]
    whole = element(
        "table", element("caption", caption), element("thead", element("tr", heads)), element("tbody", body),
        class_=class_,
    )  # fmt: skip
    return element("div", whole, class_="panel")


def _cell(place: int, column: Column, content: Content) -> Markup:
    name, kind = column
    if place == 0:
        return element("th", content, scope="row")
    classes = " ".join(filter(None, (kind, "none" if content is None else "")))
    return element("td", content, class_=classes or None, data_label=name)


def said(text: str, most: int = MOST) -> Markup:
    """What somebody else has said: kept short, and its direction of writing to itself."""
    return element("bdi", words.shorten(text, most))


def badge(mark: str, text: str) -> Markup:
    return element("span", text, class_=f"badge {mark}")


def duration(seconds: float | None) -> Content:
    return words.duration(seconds) if seconds is not None else None


def error(text: str, at: float | None, now: float) -> Content:
    if not text:
        return None
    return [element("small", time(at, now), " ") if at is not None else None, said(text)]


def time(at: float, now: float) -> Markup:
    return element("time", words.clock(at, now), datetime=f"{words.moment(at):%Y-%m-%dT%H:%M:%SZ}")
