"""The code keeps to the map in CONTRIBUTING.md: what may import what, who prints, and how long a file and a function are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN, BUILDER = "sentence_transformers_inf", "dataset_builder"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Import:
    """``from module import name``, or ``import module``."""

    module: str
    name: str | None
    line: int
    lazy: bool
    """Inside a function or under ``TYPE_CHECKING``."""

    @property
    def target(self) -> str:
        """What is imported, as long as it may be a module: a submodule cannot be told from a name by its syntax."""
        return self.module if self.name is None else f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Source:
    """A file of the two packages."""

    path: Path
    name: str
    tree: ast.Module

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"

    @property
    def room(self) -> str:
        return room_of(self.name)


def read_table(header: str) -> list[list[str]]:
    """The cells of the table in CONTRIBUTING.md whose first line is ``header``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text[text.index(header) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


MAY_IMPORT = {code(room)[0]: code(targets) for room, _, targets in read_table("| room | what lives there | may import |")}
LAZILY = {(code(room)[0], code(target)[0]): reason for room, target, reason in read_table("| from | to | reason |")}


def read_sources() -> list[Source]:
    sources = []
    for package in (PLUGIN, BUILDER):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            sources.append(Source(path, name, ast.parse(path.read_text(encoding="utf-8"))))
    return sources


SOURCES = read_sources()


def room_of(module: str) -> str:
    first, _, rest = module.partition(".")
    return first if first != PLUGIN else rest.partition(".")[0] or "__init__"


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """All imports in a tree, at whatever depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (Import(str(node.module), alias.name, node.lineno, lazy) for alias in node.names)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, lazy or guarded or function)


def inner_imports(source: Source) -> Iterator[Import]:
    """Imports from the two packages."""
    return (each for each in imports(source.tree) if each.module.partition(".")[0] in (PLUGIN, BUILDER))


def allowed(source: Source, each: Import) -> bool:
    # ``from sentence_transformers_inf import modules`` names the room last
    target = each.target if each.module == PLUGIN else each.module
    if target == PLUGIN or target.startswith(f"{PLUGIN}.__"):
        return source.room == "__init__"
    room = room_of(target)
    if room == source.room:
        return True
    if each.lazy and (source.room, room) in LAZILY:
        return True
    names = [f"{PLUGIN}.{name}" for name in MAY_IMPORT[source.room]]
    return any(f"{each.target}.".startswith(f"{name}.") for name in names)


def test_the_map_has_every_room_and_no_other():
    rooms = {source.room for source in SOURCES}
    assert set(MAY_IMPORT) == rooms
    assert {name.partition(".")[0] for targets in MAY_IMPORT.values() for name in targets} <= rooms
    assert {room for arrow in LAZILY for room in arrow} <= rooms


def test_the_rooms_have_an_order():
    """Rooms that import each other could not be understood one at a time."""
    open_rooms = {room: {name.partition(".")[0] for name in targets} for room, targets in MAY_IMPORT.items()}
    while leaves := [room for room, targets in open_rooms.items() if not targets & open_rooms.keys()]:
        for room in leaves:
            del open_rooms[room]
    assert not open_rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_the_map_allows(room):
    sources = [source for source in SOURCES if source.room == room]
    breaches = [
        f"{source.at(each.line)} imports {each.target}"
        for source in sources
        for each in inner_imports(source)
        if not allowed(source, each)
    ]
    assert not breaches


def test_the_plugin_never_imports_the_builder():
    plugin = [source for source in SOURCES if source.room != BUILDER]
    breaches = [source.at(each.line) for source in plugin for each in inner_imports(source) if BUILDER in each.target]
    assert not breaches


def test_imports_upward_are_lazy_and_needed():
    used = {
        (source.room, room_of(each.target))
        for source in SOURCES
        for each in inner_imports(source)
        if each.lazy and (source.room, room_of(each.target)) in LAZILY
    }
    assert used == set(LAZILY)
    assert all(LAZILY.values())


def test_only_the_command_lines_print_and_parse():
    breaches = []
    for source in SOURCES:
        if source.room == "cli" or source.name.startswith(f"{BUILDER}.cli"):
            continue
        for each in imports(source.tree):
            if each.module.partition(".")[0] in ("typer", "rich", "argparse", "click"):
                breaches.append(f"{source.at(each.line)} imports {each.module}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                breaches.append(f"{source.at(node.lineno)} prints")
    assert not breaches


def test_only_one_file_prints():
    """There every text is made harmless for a terminal; ``tqdm.write`` is the builder's, beside its bar."""
    breaches = []
    for source in SOURCES:
        if source.name == f"{PLUGIN}.cli.display":
            continue
        breaches += [source.at(each.line) for each in imports(source.tree) if each.module.partition(".")[0] == "rich"]
        for node in ast.walk(source.tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write", "os.write"):
                breaches.append(f"{source.at(node.lineno)} calls {called}")
            if called == "tqdm.write" and "visible(" not in ast.unparse(node):
                breaches.append(f"{source.at(node.lineno)} writes a text as it is")
    assert not breaches


def test_no_module_takes_private_names_of_another():
    breaches = []
    for source in SOURCES:
        ours = {each.name for each in inner_imports(source) if each.name is not None}
        modules = ours & {other.name.rpartition(".")[2] for other in SOURCES}
        for each in imports(source.tree):
            if any(re.match(r"_[^_]", part) for part in each.target.split(".")):
                breaches.append(f"{source.at(each.line)} imports {each.target}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and ast.unparse(node.value) in modules:
                breaches.append(f"{source.at(node.lineno)} takes {ast.unparse(node)}")
    assert not breaches


@pytest.mark.parametrize("package", [PLUGIN, BUILDER])
def test_no_file_is_too_long(package):
    lengths = {source.at(1): len(source.path.read_text(encoding="utf-8").splitlines()) for source in of(package)}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


@pytest.mark.parametrize("package", [PLUGIN, BUILDER])
def test_no_function_is_too_long(package):
    lengths = {
        f"{source.at(node.lineno)} {node.name}": int(node.end_lineno or 0) - _first_statement(node).lineno + 1
        for source in of(package)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


def _first_statement(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    """Where a function's body begins, after its docstring."""
    return node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]


def of(package: str) -> list[Source]:
    return [source for source in SOURCES if source.name.partition(".")[0] == package]


def test_the_builder_and_reading_records_do_without_pytorch():
    """Each of a build's processes would take five seconds more to start, and 400 MB."""
    code = """
import sys
import dataset_builder.cli, dataset_builder.export, dataset_builder.run, sentence_transformers_inf.corpora
assert not {"torch", "transformers", "sentence_transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)
