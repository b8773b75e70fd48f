"""What the documents promise is what the code does."""

from __future__ import annotations

import re

import pytest

from tests.support.loopback import ROOT
from willi_lib import config

EXAMPLE = (ROOT / "etc" / "willi.conf.example").read_text(encoding="utf-8")
MAPPING = "[mappings]\n[[all]]\ntype = static\nserver = mail.example.org\n"
TOP, _, MAPPINGS = EXAMPLE.partition("\n[mappings]\n")


def shown(text: str) -> dict[str, str]:
    """The keys behind a # and their values; a comment has a blank behind its #."""
    return dict(re.findall(r"^#(\w+) = ?(.*)$", text, re.MULTILINE))


def blocks() -> dict[str, str]:
    """The mappings of the example by type, without the comments among them."""
    sections = re.split(r"^#(?=\[\[)", MAPPINGS, flags=re.MULTILINE)[1:]
    plain = ["\n".join(re.findall(r"^#?(\[\[.*|\w+ =.*)$", section, re.MULTILINE)) for section in sections]
    return {shown(section)["type"]: text for section, text in zip(sections, plain, strict=True)}


def load(tmp_path, text: str) -> config.Settings:
    path = tmp_path / "willi.conf"
    path.write_text(text, encoding="utf-8")
    return config.load(str(path))


def test_the_example_shows_every_key_with_its_default_in_the_order_of_the_table():
    defaults = {name: config.key_of(field).default for name, field in config.TOP_FIELDS.items()}
    assert shown(TOP) == defaults
    assert list(shown(TOP)) == list(defaults)


@pytest.mark.parametrize("kind", config.TYPES)
def test_the_example_shows_every_key_of_a_mapping_with_its_default(kind):
    fields = config.fields_of(config.TYPES[kind])
    section = next(part for part in re.split(r"^#\[\[", MAPPINGS, flags=re.MULTILINE) if f"#type = {kind}\n" in part)
    written = shown(section)
    assert written.keys() == fields.keys() | {"type"}
    required = {name for name, field in fields.items() if config.key_of(field).default is None}
    for name in fields.keys() - required:
        assert written[name] == config.key_of(fields[name]).default, name


def test_the_example_without_changes_lacks_a_mapping_and_nothing_else(tmp_path):
    with pytest.raises(config.ConfigError) as error:
        load(tmp_path, EXAMPLE)
    line = EXAMPLE.split("\n").index("[mappings]") + 1
    assert error.value.faults == [f"{tmp_path}/willi.conf:{line}: [mappings]: {config.NO_MAPPING}"]


@pytest.mark.parametrize("name", shown(TOP))
def test_a_line_of_the_example_changes_nothing_without_its_hash(tmp_path, name):
    uncommented = TOP.replace(f"\n#{name} =", f"\n{name} =")
    assert uncommented != TOP
    assert load(tmp_path, f"{uncommented}\n{MAPPING}") == load(tmp_path, MAPPING)


@pytest.mark.parametrize("kind", config.TYPES)
def test_a_mapping_of_the_example_has_the_defaults_without_its_hashes(tmp_path, kind):
    whole = blocks()[kind]
    required = "\n".join(
        line
        for line in whole.split("\n")
        if line.startswith("[[") or config.key_of(config.MAPPING_FIELDS[kind][line.split(" =")[0]]).default is None
    )
    assert load(tmp_path, f"[mappings]\n{whole}\n") == load(tmp_path, f"[mappings]\n{required}\n")
