"""The page: page.html filled in, and page.css. Only the status process imports this, and with it Jinja2."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..text import visible
from . import charts, overview, words
from .overview import Overview
from .reports import Asked

REFRESH = 10  # seconds
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def _shown(value: object) -> object:
    """Of each value in the template, before it is escaped. Markup: of a macro, whose values have been here already."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) else visible(str(value))


_environment = Environment(
    autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_environment.filters = vars(overview) | vars(words) | _environment.filters  # {{ size | number }}
_page = _environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def render(shown: Overview, asked: Asked | None) -> str:
    """The whole document. asked: what the form was asked; with an empty address the page only stands still."""
    return _page.render(overview=shown, asked=asked, hour=charts.last_hour(shown.minutes), refresh=REFRESH)
