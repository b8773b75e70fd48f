"""How many inputs hypothesis draws: all with WILLI_THOROUGH=1, as in .ci/run, and a fifth elsewhere, in seconds."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("WILLI_THOROUGH") == "1"


def examples(number: int) -> int:
    """For max_examples."""
    return number if THOROUGH else number // 5
