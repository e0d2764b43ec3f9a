"""The rooms of the library: their size, and which of them may import which."""

import ast
import pathlib
import subprocess
import sys

import pytest

import fishleg_jax

ROOT = pathlib.Path(fishleg_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# From the ground up; a room imports those before it, and a file of a room any file of that room.
FLOORS = [
    {"_branch", "_jit", "_text", "_batch", "_files", "_random"},
    {"_tree", "_tiles", "_devices", "_checks", "_jaxpr", "_prunable", "_chunks", "_labels"},
    {"_likelihood", "likelihoods", "_convolutions", "model", "_same_model"},
    {
        "_output_space",
        "per_example",
        "fisher",
        "_curvature",
        "rematerialise",
        "_conjugate_gradients",
    },
    {"inverse"},
    {"memory", "pruning"},
    {"bases", "compaction", "export", "low_rank", "mismatch", "storage", "training"},
]
PRUNING = [
    {"_paired", "_tables", "_soundness", "costs", "leaves", "schedules", "scores"},
    {"target_types"},
    {"masks", "targets", "report"},
    {"compensation"},
    {"selection"},
    {"update"},
    {"one_shot"},
    {"gradual"},
    {"apply", "trust"},
]


def parts(path):
    """Dotted name of a file below the library, as a tuple; for a package that of its folder."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


MODULES = {parts(path): path for path in FILES}


def imported(path):
    """Dotted names of the library's modules that a file imports, at whatever depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fishleg_jax"):
            base = tuple(node.module.split("."))[1:]
            for alias in node.names:
                full = (*base, alias.name)
                yield full if full in MODULES else base


def floor_of(name, floors):
    """The number of the floor on which a room lies."""
    found = [i for i, floor in enumerate(floors) if name in floor]
    assert len(found) == 1, f"{name} must lie on one floor of tests/test_architecture.py"
    return found[0]


@pytest.mark.parametrize("name", [n for n in MODULES if n], ids=".".join)
def test_a_room_imports_only_rooms_below_it(name):
    for other in imported(MODULES[name]):
        if not other or other[0] == name[0]:
            continue
        assert floor_of(other[0], FLOORS) <= floor_of(name[0], FLOORS), f"{name} imports {other}"
    if name[0] != "pruning" or len(name) == 1:
        return
    for other in imported(MODULES[name]):
        if len(other) > 1 and other[0] == "pruning" and other[1] != name[1]:
            high, low = floor_of(name[1], PRUNING), floor_of(other[1], PRUNING)
            assert low <= high, f"{name} imports {other}"


def test_no_imports_in_a_circle():
    graph = {name: set(imported(path)) for name, path in MODULES.items()}
    done, open_now = set(), []

    def visit(name):
        assert name not in open_now, f"a circle: {open_now[open_now.index(name) :]}"
        if name in done:
            return
        open_now.append(name)
        for other in graph[name]:
            visit(other)
        done.add(open_now.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("folder", ["fishleg_jax", "tests", "experiments", "findings", "docs"])
def test_nothing_escapes_the_formatter(folder):
    found = sorted((ROOT.parent / folder).rglob("*.py"))
    assert found
    for path in found:
        for escape in ("skip", "off"):
            assert f"fmt: {escape}" not in path.read_text(), path


def test_flax_is_not_imported():
    program = (
        "import sys\nfrom fishleg_jax import *\n"
        "print([m for m in sys.modules if m.startswith('flax')])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert printed.strip() == "[]"


def test_the_tree_of_the_architecture_page_is_complete():
    page = (ROOT.parent / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
    library = page.partition("```text\n")[2].partition("\nexperiments/")[0]
    for path in FILES:
        if path.parent in (ROOT, ROOT / "inverse", ROOT / "pruning"):
            shown = path.name if path.name != "__init__.py" else f"{path.parent.name}/"
        else:  # its line names the folder, and what is in it
            shown = f"{path.parent.name}/"
        assert f" {shown}" in library or library.startswith(shown), path
