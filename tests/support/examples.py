"""How many inputs hypothesis draws: all in `make test`, a third elsewhere, so that `make check` takes seconds."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("WILLI_THOROUGH") == "1"


def examples(number: int) -> int:
    """For max_examples."""
    return number if THOROUGH else number // 3
