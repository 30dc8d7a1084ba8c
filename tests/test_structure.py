"""The architecture: rooms in order, imports that only point up, and code that names no dataset."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# From top to bottom: a room may import itself and those before it in this list, no other.
ROOMS = [
    "core",
    "config",
    "data",
    "augment",
    "loading",
    "models",
    "methods",
    "evaluation",
    "training",
    "runs",
    "deploy",
    "prepare",
    "reproduce",
]
WITHOUT_TORCH = ("core", "config", "data")


def files_of(room: str) -> list[Path]:
    return sorted((PROJECT / "reslt" / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if len(parts := name.split(".")) > 1 and parts[0] == "reslt"}


def test_every_folder_with_code_is_a_room():
    folders = {path.parent.name for path in (PROJECT / "reslt").glob("*/__init__.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room):
    above = set(ROOMS[: ROOMS.index(room) + 1])
    for path in files_of(room):
        assert imported_rooms(path) <= above, path


def test_nothing_imports_an_entry_point():
    for path in (PROJECT / "reslt").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not modules & {"train", "evaluate"}, path


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_the_top_rooms_load_without_torch(room):
    modules = ", ".join(f"reslt.{room}.{path.stem}" for path in files_of(room) if path.stem != "__init__")
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_no_dataset_is_named_in_the_code_except_in_prepare_and_as_the_default():
    names = [p.name.split("_lt")[0] for p in (PROJECT / "data_lists").iterdir() if p.is_dir()]
    for room in ROOMS:
        for path in files_of(room):
            constants = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
            data_names = {s for s in constants if isinstance(s, str) and s.split("_lt")[0] in names}
            allowed = {"digits_lt", "cifar10"}  # the latter is an AutoAugment policy's name too: --aa cifar10
            assert room == "prepare" or data_names <= allowed, path
