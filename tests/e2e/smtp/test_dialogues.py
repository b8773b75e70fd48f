"""Every file in tests/dialogues, played against a running Willi. The format: tests/support/dialogue.py."""

from pathlib import Path

import pytest

from tests.support.dialogue import run_dialogue
from tests.support.loopback import ROOT

DIALOGUES = sorted((ROOT / "tests" / "dialogues").glob("*.txt"))


@pytest.mark.parametrize("path", DIALOGUES, ids=lambda path: path.stem)
def test_a_dialogue_goes_as_its_file_says(path: Path, willi, upstream):
    run_dialogue(path, willi.connect(greeting=False), upstream)
