"""The walls of the house: which room may import which, read from the syntax tree of every module.

A room is a folder or a module directly under `llmprune`, or a folder at the top that is installed there, such as
`eval/`. Imports inside functions count, and so do those for type checkers: knowledge is knowledge, whenever it is
loaded.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folders at the top of the repository that are installed as rooms of llmprune.
MAPPED = {"eval": "llmprune.eval", "triton_kernels": "llmprune.triton_kernels"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

# room: the other rooms that it may import, as in docs/architecture.md.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "distributed": {"errors"},
    "options": set(),
    "config_file": {"config"},
    "results": set(),
    "machine": {"errors"},
    "sparsity": {"errors"},
    "triton_kernels": set(),
    "methods": {"errors", "sparsity", "triton_kernels"},
    "data": {"errors"},
    "model": {"errors", "results"},
    "walk": {"errors", "model", "results", "sparsity", "data", "distributed"},
    "recipe": {"errors", "sparsity", "methods"},
    "config": {"errors", "sparsity", "methods", "recipe", "data"},
    "pipeline": {
        "errors",
        "results",
        "config",
        "recipe",
        "walk",
        "methods",
        "sparsity",
        "model",
        "machine",
        "distributed",
    },
    "report": {"errors", "results"},
    "checkpoint": {"errors", "results", "config", "sparsity", "model", "report"},
    "eval": {"errors", "results", "data", "model", "machine", "options"},
    "runtime": {"errors", "sparsity", "model", "machine", "triton_kernels"},
}
# The rows that follow stand on everything before them, and nothing before them knows what a person sees.
MAY_IMPORT["job"] = set(MAY_IMPORT)
MAY_IMPORT["plan"] = set(MAY_IMPORT)
MAY_IMPORT["display"] = {"checkpoint", "errors", "job", "report", "results"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# The package's own `__init__` and `__main__` open on everything; nothing may come in through them.
DOORS = {"llmprune", "__main__"}

# Rooms that know tensors only: besides Python's own modules they may import these.
TENSORS_ONLY = {room: {"torch", "llmprune"} for room in ("sparsity", "methods", "recipe")}
TENSORS_ONLY["triton_kernels"] = {"torch", "triton", "llmprune"}


@dataclass(frozen=True)
class Module:
    """One source file: its name as users import it, and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        """`llmprune.walk.lockstep` lies in the room `walk`; the package's own `__init__` in the room "llmprune"."""
        return self.name.split(".")[1] if "." in self.name else "llmprune"

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def _module_name(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *parts]).removesuffix(".__init__")


def _modules() -> list[Module]:
    found = []
    for folder, package in {"llmprune": "llmprune", **MAPPED}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name = _module_name(package, ROOT / folder, path)
            found.append(Module(name, path, ast.parse(text), text.count("\n")))
    return found


MODULES = _modules()


def imports(module: Module) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything the module imports, at any depth, relative imports made absolute.

    `from a.b import c` gives `a.b.c`: c may be a module or a name in one, and the room is the same. After
    `import llmprune` it is each `llmprune.c` that counts.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = module.package.split(".")
                start = start[: len(start) - (node.level - 1)]
                base = ".".join([*start, base]).rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llmprune":
            yield f"llmprune.{node.attr}", node.lineno


def wall_breaches(module: Module) -> list[str]:
    """The module's imports of rooms that the table does not allow it."""
    allowed = MAY_IMPORT[module.room] | {module.room, "__version__"}
    ours = [(name, line) for name, line in imports(module) if name.startswith("llmprune.")]
    return [
        f"{module.path.relative_to(ROOT)}:{line} imports {name}; {module.room} may import {sorted(allowed)}"
        for name, line in ours
        if name.split(".")[1] not in allowed
    ]


def each(modules: list[Module]) -> pytest.MarkDecorator:
    """One test a module, named after it."""
    return pytest.mark.parametrize("module", modules, ids=lambda module: module.name)


def test_every_room_is_in_the_table() -> None:
    rooms = {module.room for module in MODULES} - DOORS
    assert rooms <= set(MAY_IMPORT), f"give {sorted(rooms - set(MAY_IMPORT))} a row in MAY_IMPORT"
    top_level = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"llmprune"}
    assert top_level <= set(MAPPED), f"give {sorted(top_level - set(MAPPED))} a row in MAPPED"


@each([module for module in MODULES if module.room not in DOORS])
def test_a_room_imports_only_what_it_may(module: Module) -> None:
    assert not wall_breaches(module)


@each(MODULES)
def test_mapped_rooms_are_imported_by_their_installed_name(module: Module) -> None:
    bare = [(name, line) for name, line in imports(module) if name.split(".")[0] in MAPPED]
    assert not bare, f"write llmprune.{bare[0][0]}: the bare name is a second copy of the module"


@pytest.mark.parametrize("room", TENSORS_ONLY)
def test_tensor_rooms_know_tensors_only(room: str) -> None:
    allowed = TENSORS_ONLY[room] | sys.stdlib_module_names
    foreign = [
        f"{module.path.relative_to(ROOT)}:{line} imports {name}"
        for module in MODULES
        if module.room == room
        for name, line in imports(module)
        if name.split(".")[0] not in allowed
    ]
    assert not foreign


def test_no_circle_between_rooms() -> None:
    """The table itself allows no way back: whoever changes it cannot close a circle by accident."""
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        ready = [room for room, needs in waiting.items() if needs - {room} <= set(order)]
        assert ready, f"these rooms import each other in a circle: {sorted(waiting)}"
        order += ready
        waiting = {room: needs for room, needs in waiting.items() if room not in ready}


@each(MODULES)
def test_a_file_is_short(module: Module) -> None:
    assert module.lines <= MAX_FILE_LINES, f"{module.lines} lines: a room that wants dividing"


@each(MODULES)
def test_a_function_fits(module: Module) -> None:
    functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {f"{node.name} (line {node.lineno})": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert not {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES}


@each([module for module in MODULES if module.path.name != "__init__.py"])  # a package may be a docstring alone
def test_a_module_says_what_is_public(module: Module) -> None:
    names = {target.id for node in module.tree.body for target in _targets(node) if isinstance(target, ast.Name)}
    assert "__all__" in names
    futures = [name for name, _ in imports(module) if name == "__future__.annotations"]
    assert futures, "begin with `from __future__ import annotations`"


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


PLANTED = [
    ("import llmprune.cli", "sparsity", True),
    ("from llmprune import cli", "walk", True),
    ("import llmprune\n\nversion = llmprune.__version__", "walk", False),
    ("import llmprune\n\nllmprune.prune()", "walk", True),
    ("from llmprune import __version__", "checkpoint", False),
    ("from llmprune.errors import UserError", "methods", False),
    ("from ..walk import lockstep", "methods", True),
    ("from . import masks", "sparsity", False),
    ("def late():\n    from llmprune.model import load", "data", True),
]


@pytest.mark.parametrize(("source", "room", "breach"), PLANTED)
def test_the_check_finds_planted_breaches(source: str, room: str, breach: bool) -> None:
    path = ROOT / "llmprune" / room / "planted.py"
    module = Module(f"llmprune.{room}.planted", path, ast.parse(source), 1)
    assert bool(wall_breaches(module)) == breach
