"""Arrows point one way: who may import whom, read out of the source itself.

A module that is not in the table has no place in the house yet: give it one, here and in the design.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.loopback import ROOT

# A room knows the rooms before it, and itself. All know the log.
ROOMS = ["log", "smtp", "routing", "config", "net", "mappings", "status", "proxy", "processes", "check"]
KNOW_ONLY_THEMSELVES = {"smtp", "routing"}  # and two modules that are as pure as they
ROOM_OF = {"text": "log", "hosts": "log", "files": "log"}
PURE = {
    "text", "hosts",
    "smtp.body", "smtp.syntax", "smtp.reply", "smtp.proxy_header", "smtp.xclient",
    "routing.route", "routing.keys", "routing.search",
    "status.overview",
    "status.finding", "status.charts", "status.page",
}  # fmt: skip
WORLD = {
    "_socket", "asyncio", "datetime", "dns", "gevent", "logging", "os", "random", "select", "selectors", "socket",
    "ssl", "subprocess", "sys", "syslog", "threading", "time",
}  # fmt: skip
# `check` is a process of its own and patches it as the worker does.
KNOW_GEVENT = {
    "net", "mappings.mysql", "mappings.cache", "mappings.sqlite", "processes.admission",
    "processes.in_child", "processes.mapping_watch", "processes.status_process", "processes.worker", "check",
    "status.reporter", "status.web",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """All of willi_lib: "session", "smtp.body", "routing" (its __init__.py) ..."""
    found = {}
    for path in sorted((ROOT / "willi_lib").rglob("*.py")):
        parts = path.relative_to(ROOT / "willi_lib").with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    del found[""]  # willi_lib/__init__.py itself
    return found


MODULES = modules()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, path: Path, of: ast.AST | None = None) -> Iterator[str]:
    """The dotted names of all imports, those inside functions too; ours begin with "willi_lib."."""
    package = ["willi_lib", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(of or tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from .smtp import reply` may name a module, `from .log import info` a function: both readings.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    first = name.split(".")[0]
    return ROOM_OF.get(first, first)


def ours(name: str) -> set[str]:
    """The rooms that this module imports from: "smtp", "config" ..."""
    found = {i for i in imports(name, MODULES[name]) if i.startswith("willi_lib.") and i != "willi_lib.VERSION"}
    return {room_of(imported.removeprefix("willi_lib.")) for imported in found}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_knows_only_the_rooms_before_its_own(name: str):
    assert room_of(name) in ROOMS, f"willi_lib/{name} has no room: give it one, here and in the design"
    before = ROOMS[: ROOMS.index(room_of(name)) + 1]
    assert ours(name) <= set(before)
    if room_of(name) in KNOW_ONLY_THEMSELVES:
        assert ours(name) <= {room_of(name), "log"}
        assert not any(imported.startswith("willi_lib.log") for imported in imports(name, MODULES[name]))


@pytest.mark.parametrize("name", sorted(PURE & MODULES.keys()))
def test_a_pure_module_does_not_touch_the_world(name: str):
    assert {imported.split(".")[0] for imported in imports(name, MODULES[name])} & WORLD == set()


@pytest.mark.parametrize("name", MODULES)
def test_only_a_few_modules_know_gevent(name: str):
    if name in KNOW_GEVENT or name.split(".")[0] in KNOW_GEVENT:
        return
    assert [imported for imported in imports(name, MODULES[name]) if imported.split(".")[0] == "gevent"] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_file_and_a_function_can_be_read_as_a_whole(name: str):
    assert MODULES[name].read_text(encoding="utf-8").count("\n") <= 500
    functions = [node for node in ast.walk(tree_of(MODULES[name])) if isinstance(node, ast.FunctionDef)]
    assert [each.name for each in functions if (each.end_lineno or 0) - each.lineno >= 45] == []


@cache
def at_import(path: Path, name: str) -> set[str]:
    """What is imported as soon as the module is: not what stands inside a function."""
    outside = [node for node in tree_of(path).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {imported for node in outside for imported in imports(name, path, node)}


def bring(library: str, name: str) -> set[str]:
    """The modules through which importing this one would import the library."""
    loaded, left = set(), {name}
    while left:
        loaded |= left
        found = {imported for one in left for imported in at_import(MODULES[one], one)}
        left = {other for other in MODULES if any(f"{i}.".startswith(f"willi_lib.{other}.") for i in found)} - loaded
    return {one for one in loaded if any(i.split(".")[0] == library for i in at_import(MODULES[one], one))}


def test_the_master_never_imports_gevent():
    """A hub in the parent would be inherited by every child. Only the child imports the worker, inside a function."""
    assert bring("gevent", "processes.master") == set()


def test_the_command_line_imports_no_gevent():
    program = ROOT / "willi.py"
    if program.exists():
        loaded = at_import(program, "willi")
        direct = {name for name in MODULES if any(i.startswith(f"willi_lib.{name}") for i in loaded)}
        assert {guilty for name in direct for guilty in bring("gevent", name)} == set()
        assert not any(imported.split(".")[0] == "gevent" for imported in loaded)


def test_only_where_there_is_a_mysql_database_its_driver_is_loaded():
    assert (
        bring("pymysql", "mappings.open") | bring("pymysql", "mappings.sqlite") | bring("pymysql", "mappings.cache")
        == set()
    )
    assert bring("pymysql", "mappings.mysql") == {"mappings.mysql"}


def test_no_test_brings_gevent_into_the_place_of_threads():
    """The processes of the runner talk to each other by threads: with greenlets in their place the whole run ends."""
    patching = {name for name, path in MODULES.items() if "willi_lib.net.patch" in at_import(path, name)}
    assert "check" in patching
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "__main__.py"]
    guilty = {
        f"{path.relative_to(ROOT)}: {imported}"
        for path in tests for imported in at_import(path, "") for name in patching
        if f"{imported}.".startswith(f"willi_lib.{name}.")
    }  # fmt: skip
    assert guilty == set()


@pytest.mark.parametrize("name", ["processes.master", "processes.worker", "check", "status.terminal"])
def test_only_the_status_process_has_the_template_of_the_page(name: str):
    assert bring("jinja2", name) | bring("markupsafe", name) == set()
    assert bring("jinja2", "processes.status_process") == {"status.page"}


# docs/developing.md, "The house"

DEVELOPING = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
HOUSE = DEVELOPING.partition("\n## The house\n")[2].partition("\n## ")[0]
DRAWN_FILES = re.findall(r"^    ((?:  )?)([a-z_]+(?:\.py|\.html|/)) ", HOUSE, re.MULTILINE)


def drawn_arrows() -> set[tuple[str, str]]:
    chains = re.findall(r"^    +(\w+ -> .+)$", HOUSE, re.MULTILINE)
    return {pair for chain in chains for pair in pairwise(chain.split(" -> "))}


def arrows_of_the_imports() -> set[tuple[str, str]]:
    """Those between rooms, without those that others lead to anyway; the log's are not drawn."""
    knows = {room: set[str]() for room in ROOMS[1:]}
    for name in MODULES:
        if room_of(name) in knows:
            knows[room_of(name)] |= ours(name) - {"log", room_of(name)}
    for room in ROOMS[1:]:  # each after those that it knows: with all that they know
        knows[room] = knows[room].union(*(knows[other] for other in knows[room]))
    return {
        (room, other)
        for room, others in knows.items()
        for other in others
        if not any(other in knows[between] for between in others)
    }


def test_the_drawing_has_the_arrows_of_the_imports():
    assert drawn_arrows() == arrows_of_the_imports()


def test_the_drawing_has_every_room_and_only_files_that_exist():
    room, drawn = "", []
    for indent, name in DRAWN_FILES:
        room = room if indent else name if name.endswith("/") else ""
        drawn.append(room + name if indent else name)
    assert [name for name in drawn if not (ROOT / "willi_lib" / name).exists()] == []
    assert len(drawn) == len(set(drawn))
    at_the_top = {path.name for path in (ROOT / "willi_lib").glob("*.py")} - {"__init__.py"}
    rooms = [f"{room}/" for room in ROOMS[1:]]
    assert set(drawn) - {name for name in drawn if "/" in name} == at_the_top
    assert [name for name in drawn if name.endswith("/")] == rooms
    assert {f"{path.parent.name}/" for path in MODULES.values()} == {*rooms, "willi_lib/"}
