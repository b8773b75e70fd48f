"""An overview from what /status.json says."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .overview import Overview


def parse(text: bytes) -> Overview:
    """Raises ValueError if it is anything else."""
    try:
        overview: Overview = _build(Overview, json.loads(text, parse_constant=_refuse))
    except (KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"no overview: {error}") from error
    return overview


def _build(kind: Any, value: Any) -> Any:
    """A value of this type: a class of overview.py, a tuple, int, float, str, bool, or one of them or None."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_build(get_args(kind)[0], item) for item in value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{field.name: _build(hints[field.name], value[field.name]) for field in fields(kind)})
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if type(None) in get_args(kind):
        return None if value is None else _build(get_args(kind)[0], value)
    if kind is float and type(value) in (int, float) and isfinite(value):
        return float(value)
    if kind is int and type(value) is int and value >= 0:  # all of them are counts
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    raise ValueError(f"no overview: {value!r:.80} for {kind}")


def _refuse(constant: str) -> None:
    raise ValueError(f"no overview: {constant}")
