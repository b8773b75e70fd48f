"""Arrows point one way: who may import whom, read out of the source itself.

A module that is not in the table has no place in the house yet: give it one, here and in the design.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loopback import ROOT

# The lower floor knows nothing of the upper one; on one floor modules may know each other.
FLOORS = [
    {"smtp"},  # these two know only themselves
    {"routing"},
    {"config", "log", "text", "systemd", "reload", "scoreboard", "limits", "memory", "tls", "counts"}
    | {"reports", "privileges", "process_name", "file_signature", "key_exchange", "pem_files", "patch"},
    {"jobs", "dns", "mappings", "mapping_watch", "news", "upstream", "listeners", "child", "certificate_files"},
    {"relay", "lookup"},
    {"dispatch"},
    {"service", "session_log"},
    {"session"},
    {"status", "reporter"},
    {"check", "top", "worker"},
    {"master"},
]
KNOW_ONLY_THEMSELVES = {"smtp", "routing"}
PURE = {
    "smtp.body", "smtp.syntax", "smtp.reply", "smtp.proxy_protocol", "routing", "status.overview", "status.plain",
    "status.markup", "status.charts", "status.parts", "status.tables", "status.page", "status.style", "status.lines",
}  # fmt: skip
WORLD = {
    "_socket", "asyncio", "datetime", "dns", "gevent", "logging", "os", "random", "select", "selectors", "socket",
    "ssl", "subprocess", "sys", "syslog", "threading", "time",
}  # fmt: skip
# `dns` asks c-ares by way of gevent; `check` is a process of its own and patches it as the worker does.
KNOW_GEVENT = {
    "smtp.wire", "dns", "routing.mysql", "routing.database", "mapping_watch", "jobs", "check", "worker", "reporter",
    "status", "patch",
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


def imports(name: str, path: Path, of: ast.AST | None = None) -> Iterator[str]:
    """The dotted names of all imports, those inside functions too; ours begin with "willi_lib."."""
    package = ["willi_lib", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(of or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from .smtp import reply` may name a module, `from .log import info` a function: both readings.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def floor(component: str) -> int:
    for number, members in enumerate(FLOORS):
        if component in members:
            return number
    raise AssertionError(f"willi_lib/{component} has no floor in tests/test_layout.py")


def ours(name: str) -> Iterator[str]:
    """The components of willi_lib that this module imports: "smtp", "config" ..."""
    for imported in imports(name, MODULES[name]):
        if imported.startswith("willi_lib.") and imported != "willi_lib.VERSION":  # a text, no module
            yield imported.split(".")[1]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_knows_nothing_of_the_floors_above(name: str):
    component = name.split(".")[0]
    above = {other for other in ours(name) if floor(other) > floor(component)}
    assert above == set()
    if component in KNOW_ONLY_THEMSELVES:
        assert set(ours(name)) <= {component}


@pytest.mark.parametrize("name", sorted(PURE & MODULES.keys()))
def test_a_pure_module_does_not_touch_the_world(name: str):
    assert {imported.split(".")[0] for imported in imports(name, MODULES[name])} & WORLD == set()


@pytest.mark.parametrize("name", MODULES)
def test_only_a_few_modules_know_gevent(name: str):
    if name in KNOW_GEVENT or name.split(".")[0] in KNOW_GEVENT:
        return
    assert [imported for imported in imports(name, MODULES[name]) if imported.split(".")[0] == "gevent"] == []


def at_import(path: Path, name: str) -> set[str]:
    """What is imported as soon as the module is: not what stands inside a function."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    outside = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {imported for node in outside for imported in imports(name, path, node)}


def bring_gevent(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The modules through which importing this one would import gevent."""
    loaded = at_import(MODULES[name], name)
    guilty = {name} if any(imported.split(".")[0] == "gevent" for imported in loaded) else set()
    for other in MODULES.keys() - seen - {name}:
        if any(imported == f"willi_lib.{other}" or imported.startswith(f"willi_lib.{other}.") for imported in loaded):
            guilty |= bring_gevent(other, seen | {name})
    return guilty


def test_the_master_never_imports_gevent():
    """A hub in the parent would be inherited by every child. Only the child imports the worker, inside a function."""
    if "master" in MODULES:
        assert bring_gevent("master") == set()


def test_the_command_line_imports_no_gevent():
    program = ROOT / "willi.py"
    if program.exists():
        loaded = at_import(program, "willi")
        direct = {name for name in MODULES if any(i.startswith(f"willi_lib.{name}") for i in loaded)}
        assert {guilty for name in direct for guilty in bring_gevent(name)} == set()
        assert not any(imported.split(".")[0] == "gevent" for imported in loaded)
