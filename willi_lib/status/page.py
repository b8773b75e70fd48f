"""The page."""

from __future__ import annotations

from html import escape

from .overview import Asked, Overview

STYLE = ""


def render(overview: Overview, asked: Asked | None) -> str:
    """The whole page as HTML."""
    lines = [f"Willi {overview.version}, {overview.domain}", *(overview.problems or ("All is well",))]
    if asked:
        lines += [asked.address, *(f"{step.mapping}  {step.key}  {step.answer}" for step in asked.steps), asked.result]
    return "<!doctype html><title>Willi</title><pre>" + escape("\n".join(lines)) + "</pre>\n"
