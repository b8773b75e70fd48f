"""HTML by construction: text cannot become markup by accident.

There are two kinds of content. A `str` is text, always, and is escaped here. `Markup` is finished HTML, and only this
module makes it (tests/test_page.py holds that). So whatever a client, an upstream or a database has said is text
wherever it is put, and nobody can forget to escape it:

    element("td", event.sender, title=event.sid)    <td title="...">...</td>

What cannot be seen (controls, newlines, turned directions) is made visible on the way. Names of elements and attributes
come from the two lists below. They have no script, no style and no handler, and a link cannot leave this page: the
Content-Security-Policy is the second line, not the first. What comes out is also well-formed XML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from willi_lib.text import visible

ELEMENTS = {
    "a", "bdi", "body", "caption", "code", "dd", "div", "dl", "dt", "form", "g", "h1", "h2", "h3", "head",
    "header", "html", "input", "label", "li", "line", "link", "main", "meta", "p", "rect", "section", "small", "span",
    "strong", "svg", "table", "tbody", "td", "th", "thead", "time", "title", "tr", "ul", "button",
}  # fmt: skip
EMPTY = {"input", "link", "meta"}  # in HTML these cannot have an end
ATTRIBUTES = {
    "action", "aria-hidden", "aria-label", "aria-labelledby", "autocapitalize", "autocomplete", "autofocus", "charset",
    "class", "content", "data-label", "datetime", "for", "height", "href", "http-equiv", "id", "inputmode", "lang",
    "maxlength", "method", "name", "placeholder", "preserveAspectRatio", "rel", "role", "scope", "spellcheck", "title",
    "type", "value", "viewBox", "width", "x", "x1", "x2", "y", "y1", "y2",
}  # fmt: skip
LINKS = {"action", "href"}
OWN = re.compile(r"/[a-z?=.]*|#[a-z]+|data:image/svg\+xml,[\w%.-]+")  # the last one is the icon


@dataclass(frozen=True)
class Markup:
    """Finished HTML."""

    html: str


Content = Markup | str | int | None | Iterable["Content"]
Value = str | int | float | None


def element(tag: str, *content: Content, **attributes: Value) -> Markup:
    """One element. Attributes as `class_` and `aria_label`; one that is None is left away.

    Raises ValueError for a name that is not in the lists, and for a link that leaves the page.
    """
    if tag not in ELEMENTS:
        raise ValueError(f"no element: {tag}")
    start = tag + "".join(_attribute(name, value) for name, value in attributes.items() if value is not None)
    if tag in EMPTY:
        return Markup(f"<{start} />")
    return Markup(f"<{start}>{_html(content)}</{tag}>")


def document(*content: Content, **attributes: Value) -> str:
    """The whole of it, from its first octet."""
    return f"<!DOCTYPE html>\n{element('html', *content, **attributes).html}\n"


def _attribute(keyword: str, value: Value) -> str:
    name = keyword.rstrip("_").replace("_", "-")
    if name not in ATTRIBUTES:
        raise ValueError(f"no attribute: {name}")
    text = str(value)
    if name in LINKS and not OWN.fullmatch(text):
        raise ValueError(f"leaves the page: {text}")
    return f' {name}="{_text(text)}"'


def _html(content: Content) -> str:
    if isinstance(content, Markup):
        return content.html
    if content is None:
        return ""
    if isinstance(content, str | int):
        return _text(str(content))
    return "".join(map(_html, content))


def _text(text: str) -> str:
    return escape(visible(text), quote=True)
