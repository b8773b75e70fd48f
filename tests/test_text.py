"""Text as it may be shown."""

from __future__ import annotations

import os

import pytest

from willi_lib.text import can_draw, wants_colours


@pytest.mark.parametrize(("environ", "draws", "colours"), [
    ({}, True, True),
    ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
    ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
    ({"TERM": "xterm", "NO_COLOR": "0"}, True, False),
    ({"TERM": "dumb"}, False, False),
])  # fmt: skip
def test_colours_are_for_a_terminal_unless_no_color_is_set_and_not_empty(environ, draws, colours):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        assert (can_draw(terminal, environ), wants_colours(terminal, environ)) == (draws, colours)
    os.close(master)


def test_a_file_has_no_colours(tmp_path):
    with (tmp_path / "out").open("w") as file:
        assert not can_draw(file, {}) and not wants_colours(file, {})
