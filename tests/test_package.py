"""The package as other programs meet it: its names, documented module paths, and an installation without a checkout."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_dataset

import reslt

PROJECT = Path(__file__).resolve().parents[1]
PAGES = "".join(
    file.read_text(encoding="utf-8") for file in [PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))]
)


def test_import_reslt_loads_no_torch_until_a_name_needs_it():
    code = "import sys, reslt; reslt.list_methods(); reslt.list_recipes(); reslt.load_dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_every_name_that_the_package_offers_is_there():
    for name in reslt.__all__:
        assert callable(getattr(reslt, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reslt.nothing


def test_the_page_about_python_lists_every_name():
    rows = re.findall(r"^\| (`.*?`) \|", (PROJECT / "docs/python.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)\(", " ".join(rows))) == sorted(reslt.__all__)


def test_create_model_takes_the_flags_by_name():
    model = reslt.create_model("cifar_resnet20", 10, branch="bn", branches=4, experts=2)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (2, 4, 1, 10)
    with pytest.raises(TypeError, match="unexpected setting 'brunch'"):
        reslt.create_model("cifar_resnet20", 10, brunch="bn")


def test_shot_accuracy_is_a_mean_over_classes_per_group_and_over_images_for_all():
    """Class 0 (many): 1 of 2 right, class 1 (medium): 1 of 1, class 2 (few): 0 of 1."""
    found = reslt.shot_accuracy([0, 1, 1, 0], [0, 0, 1, 2], images_per_class=[200, 50, 5])
    assert found == {"many": 50.0, "medium": 100.0, "few": 0.0, "all": 50.0}


@pytest.mark.parametrize("module", sorted({"reslt.checkpoint", *re.findall(r"python -m (reslt[\w.]*)", PAGES)}))
def test_a_documented_command_answers(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_documented_imports_work():
    of_version_0_1 = [("reslt.models.fold", "load_folded")]
    for module, name in [*of_version_0_1, *re.findall(r"from (reslt[\w.]*) import (\w+)", PAGES)]:
        assert hasattr(importlib.import_module(module), name), (module, name)
    for module in {"reslt.models.cifar_resnet", *re.findall(r"`?import (reslt\.[\w.]+)", PAGES)}:
        importlib.import_module(module)


def test_the_package_the_changelog_and_the_citation_state_one_version():
    tomllib = pytest.importorskip("tomllib")
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    released = re.search(r"^## (\S+) \((\S+)\)$", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert (version, citation["date-released"]) == released.groups()
    assert citation["version"] == version


def test_every_room_is_packaged():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = [f"reslt.{file.parent.name}" for file in (PROJECT / "reslt").glob("*/__init__.py")]
    assert sorted(listed) == sorted(["reslt", *rooms, "reslt.data_lists"])


def test_an_installed_package_prepares_and_reads_a_dataset_without_a_checkout(tmp_path):
    """The benchmarks' descriptions come with it; lists are written to ./data_lists."""
    pytest.importorskip("setuptools", minversion="70.1")  # builds wheels by itself
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"
    subprocess.run(
        ["sh", "-c", f"mkdir {source} && cp -r pyproject.toml README.md requirements.txt reslt data_lists {source}"],
        cwd=PROJECT,
        check=True,
    )
    done = subprocess.run([*install, "--target", site, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    make_dataset(work / "data_lists" / "mine")
    code = (
        "import reslt; print(reslt.__file__); print(len(reslt.list_recipes()));"
        "print(reslt.load_dataset('mine').num_classes);"
        "from reslt.prepare.subsets import make_if_embedded; make_if_embedded('digits_lt');"
        "print(reslt.load_dataset('digits_lt').folder)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RESLT_")} | {"PYTHONPATH": str(site)}
    shown = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    file, recipes, classes, digits = shown.stdout.split()
    assert Path(file).is_relative_to(site)
    assert (int(recipes), int(classes)) == (len(reslt.list_recipes()), 3)
    assert Path(digits) == work / "data_lists" / "digits_lt"
    package = {path.relative_to(PROJECT) for path in (PROJECT / "reslt").rglob("*") if path.suffix in (".yaml", ".j2")}
    assert all((site / path).is_file() for path in package)
