"""The code's shape: imports point down, files stay small, the project names nothing outside itself."""

import ast
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# From the bottom up: a file may import those above it in this list, no other.
ORDER = [
    "errors",
    "files",
    "signals",
    "shares",
    "config",
    "validation",
    "sources",
    "lists",
    "groups",
    "introsort",
    "paths",
    "bad_images",
    "datasets",
    "transfers",
    "resample",
    "decode",
    "images",
    "policies",
    "auto_augment",
    "mixing",
    "workers",
    "batches",
    "pixel_cache",
    "device_data",
    "device_decode",
    "loader",
    "models",
    "models.cifar_resnet",
    "models.branches",
    "models.reslt",
    "models.experts",
    "models.cost",
    "models.create",
    "models.fold",
    "losses",
    "optim",
    "metrics",
    "train_state",
    "tables",
    "report",
    "released",
    "checkpoint",
    "device",
    "run_folder",
    "watch",
    "train_step",
    "cuda_graph",
    "engine",
    "prepare",
    "prepare.folder",
    "prepare.subsets",
    "prepare.published",
    "prepare.layout",
    "prepare.plot",
    "prepare.repeats",
    "prepare.check",
    "prepare.own",
    "prepare.shrink",
    "prepare.__main__",
    "reproduce",
    "reproduce.rows",
    "reproduce.progress",
    "reproduce.jobs",
    "reproduce.table",
    "reproduce.standing",
    "reproduce.figure",
    "reproduce.rate",
    "reproduce.plan",
    "reproduce.__main__",
]


def module_files() -> dict[str, Path]:
    files = {}
    for path in sorted((PROJECT / "reslt").rglob("*.py")):
        name = path.relative_to(PROJECT / "reslt").with_suffix("").as_posix().replace("/", ".")
        files[name.removesuffix(".__init__")] = path
    del files["__init__"]
    return files


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "reslt":
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n.removeprefix("reslt.") for n in names if n.removeprefix("reslt.") in ORDER}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("reslt.") for a in node.names if a.name.startswith("reslt.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def test_the_order_names_every_file():
    assert sorted(ORDER) == sorted(module_files())


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_files_below_it(module):
    below = set(ORDER[: ORDER.index(module)])
    assert imported(module_files()[module]) <= below


def test_nothing_imports_an_entry_point():
    for path in module_files().values():
        tops = {
            n.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for n in node.names
        }
        assert not tops & {"train", "evaluate"}, path


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "signals",
        "shares",
        "config",
        "validation",
        "sources",
        "lists",
        "groups",
        "paths",
        "bad_images",
        "datasets",
    ],
)
def test_the_lowest_files_load_without_torch(module):
    import sys

    code = f"import sys, reslt.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_no_file_outgrows_its_room():
    for path in [*module_files().values(), PROJECT / "train.py", PROJECT / "evaluate.py"]:
        assert len(path.read_text().splitlines()) <= 310, path


def test_no_dataset_name_stands_in_the_code_but_for_prepare_and_the_default():
    names = [p.name.split("_lt")[0] for p in (PROJECT / "data_lists").iterdir() if p.is_dir()]
    for module, path in module_files().items():
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        data_names = {s for s in strings if isinstance(s, str) and s.split("_lt")[0] in names}
        allowed = {"digits_lt", "cifar10"}  # the latter is an AutoAugment policy's name too: --aa cifar10
        assert module.split(".")[0] == "prepare" or data_names <= allowed, (module, data_names)
