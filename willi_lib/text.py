"""Text of a file, a client or an upstream: as it may be shown (log, `check`, `top`, page), and what it may not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TextIO
from unicodedata import category, combining, name

MAX_MARKS = 2  # combining marks on one letter; more of them climb over the lines above
_LETTERS = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
# Printable by Python's tables, and yet nothing is seen: fillers, selectors, the empty braille pattern (Unicode's
# Default_Ignorable_Code_Point, of which str.isprintable() knows only a part).
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_JOINERS = "\u200c\u200d"
_TRUTH = dict.fromkeys(("true", "t", "yes", "on", "1"), True) | dict.fromkeys(("false", "f", "no", "off", "0"), False)
_NEVER_MEANT = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories: controls, marks for the direction and the like, blanks


def visible(text: str) -> str:
    r"""What cannot be seen is escaped: \n, \x1b, \u202e.

    So no control sequence reaches a terminal, no text is turned around or hidden, and two words that look the same
    are the same.
    """
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for character in text:
        marks = marks + 1 if combining(character) else 0
        is_seen = character.isprintable() and marks <= MAX_MARKS and not _UNSEEN.match(character)
        shown.append(character if is_seen else _escape(character))
    return "".join(shown)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x80:
        return _LETTERS.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def refuse_invisible(text: str) -> None:
    """Raises ValueError if what an administrator wrote has a character that is not seen, as copied from a web page.

    It would make another name of it without a word. Joiners belong to some scripts: between two letters that are no
    ASCII they may stand.
    """
    if text.isascii():
        return
    for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False):
        is_unseen = _UNSEEN.match(character) or (category(character) in _NEVER_MEANT and not character.isascii())
        if is_unseen and not (character in _JOINERS and not before.isascii() and not after.isascii()):
            code = f"U+{ord(character):04X} {name(character, '')}".strip()
            raise ValueError(f"{text[:80]!r}: has the invisible character {code}: delete it")


def is_true(text: str, wrong: str = "must be yes or no") -> bool:
    """yes or no, true or false, on or off, t or f, 1 or 0 in any case. Raises ValueError(what is wrong)."""
    truth = _TRUTH.get(text.strip().lower())
    if truth is None:
        raise ValueError(f"{text[:80]!r}: {wrong}")
    return truth


def can_draw(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether it is a terminal that knows control sequences: a shell inside Emacs shows them as letters."""
    return stream.isatty() and environ.get("TERM") != "dumb"


def wants_colours(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """By https://no-color.org: on a terminal, unless NO_COLOR is set and not empty."""
    return can_draw(stream, environ) and not environ.get("NO_COLOR")
