"""--import: a module outside the package registers a method and a timm model; no module that only a file names is
imported."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY_FLAGS, make_dataset, outcome_of
from safetensors.torch import load_file, save_file

from reslt.config.imports import load_imports
from reslt.config.methods import METHODS, Method, register_method
from reslt.config.resolve import resolve
from reslt.core.errors import UserError
from reslt.models.fold import load_folded
from reslt.reproduce.__main__ import parse_arguments
from reslt.reproduce.rows import Selection, flag_names, parse_varied
from reslt.runs import checkpoint

OUTSIDE = """
from timm.models import register_model
from reslt import register_method
from reslt.config.methods import Method
from reslt.models.cifar_resnet import cifar_resnet20

@register_model
def outside_net(pretrained=False, **kwargs):
    return cifar_resnet20(pretrained=pretrained, **kwargs)

register_method("outside", Method("smoothed", network="plain", defaults={"smoothing": 0.25}))
"""
HINT = "the run was trained with --import their_parts: if you trust this code, give the flag again"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with modules the current one; afterwards, undo this and forget the registered methods."""
    folder, before, path, methods = tmp_path_factory.mktemp("outside"), os.getcwd(), list(sys.path), dict(METHODS)
    (folder / "outside_parts.py").write_text(OUTSIDE)
    (folder / "their_parts.py").write_text("raise SystemExit('executed')\n")
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path
    METHODS.clear()
    METHODS.update(methods)


@pytest.fixture
def run(folder, run_script) -> Path:
    """Return a run with the outside model and method, trained once for all tests that read it."""
    if not (folder / "output").exists():
        data, parts = make_dataset(folder / "d"), ("--import", "outside_parts", "--method", "outside")
        flags = ("--data", data, "--experiment", "run", *TINY_FLAGS, "--epochs", "1", "--model", "outside_net")
        outcome = run_script("train", *flags, *parts)
        assert outcome.code == 0, outcome.err
    return folder / "output/run"


def stored(folder: Path, **config) -> checkpoint.Checkpoint:
    """Return a checkpoint of a run with these settings."""
    state = {"epochs_done": 1, "steps_done": 1, "optimizer": {"state": {}, "param_groups": []}, "scaler": None}
    written = folder / f"checkpoint-{len(list(folder.iterdir()))}"
    checkpoint.write(written, {"model": {}}, state | {"config": config, "num_classes": 3})
    return checkpoint.load(written)


def test_a_module_outside_the_package_registers_a_model_and_a_method(run):
    described = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert (described["model"], described["method"], described["smoothing"]) == ("outside_net", "outside", 0.25)
    assert described["imports"] == ["outside_parts"]
    assert "outside" in (run / "train.log").read_text()


def test_a_run_is_evaluated_with_the_flag_and_its_folded_file_names_the_module(run, run_script, tmp_path):
    file = tmp_path / "folded.safetensors"
    outcome = run_script("evaluate", "--ckpt", run, "--import", "outside_parts", "--output", tmp_path, "--fold", file)
    assert outcome.code == 0, outcome.err
    trained, evaluated = (json.loads((results / "result.json").read_text()) for results in (run, tmp_path))
    assert evaluated["tables"] == trained["tables"]
    assert load_folded(file)[1]["imports"] == ["outside_parts"]


def test_a_run_resumes_without_the_flag_as_long_as_its_parts_are_known(run, run_script):
    flags = ("--data", "d", "--experiment", "run", *TINY_FLAGS, "--epochs", "1", "--model", "outside_net")
    outcome = run_script("train", *flags, "--method", "outside", "--resume", "auto")
    assert outcome.code == 0, outcome.err
    assert "resuming with changed settings: imports: ['outside_parts'] -> []" in outcome.err


def test_help_lists_the_methods_that_the_module_registers(run, capsys):
    printed = outcome_of(resolve, ("--import", "outside_parts", "--help"), capsys)
    assert "outside: smoothed" in " ".join(printed.out.split())


@pytest.mark.parametrize("unknown", [{"method": "nowhere"}, {"model": "nowhere_net"}])
def test_the_error_of_an_unknown_part_in_a_stored_run_names_the_flag_and_imports_nothing(folder, unknown):
    with pytest.raises(UserError, match=HINT) as refused:
        stored(folder, imports=["their_parts"], **unknown).config()
    assert next(iter(unknown.values())) in str(refused.value)
    assert "their_parts" not in sys.modules
    assert stored(folder, imports=["their_parts"]).config().run.imports == ("their_parts",)  # all parts are known


@pytest.mark.parametrize("recorded", ["their_parts", {"a": 1}, [1, None], ["a\x1b[2J" + "b" * 500] * 50])
def test_recorded_imports_never_make_a_message_long_or_unprintable(folder, recorded):
    with pytest.raises(UserError) as refused:
        stored(folder, imports=recorded, model="nowhere_net").config()
    assert len(str(refused.value)) < 2000 + len(str(folder))
    assert "\x1b" not in str(refused.value)


def test_the_error_of_a_run_resumed_without_the_flag_names_it(folder, run_script):
    run = folder / "output/theirs"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("config: {imports: [their_parts]}\n")
    for flags in (("--resume", str(run)), ("--resume", "auto", "--experiment", "theirs")):
        with pytest.raises(UserError, match=f"'nowhere' is not one of .*\n{HINT}"):
            resolve([*flags, "--method", "nowhere"])
    outcome = run_script("train", "--resume", run, "--model", "nowhere_net")
    assert outcome.code == 2
    assert "timm has no model 'nowhere_net'" in outcome.err
    assert HINT in outcome.err


def test_a_recipe_and_an_info_yaml_cannot_import(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("imports: [their_parts]\n")
    (tmp_path / "other.yaml").write_text("import: their_parts\n")
    for name, key in (("mine", "imports"), ("other", "import")):
        with pytest.raises(UserError, match=rf"{name}\.yaml: {key}: a file cannot set it; .* flag, --import$"):
            resolve(["--recipe", str(tmp_path / f"{name}.yaml")])
    data = make_dataset(tmp_path / "d")
    (data / "info.yaml").write_text("defaults: {imports: [their_parts]}\n")
    with pytest.raises(UserError, match=r"info\.yaml: imports: a file cannot set it"):
        resolve(["--data", str(data)])
    selection = Selection([(str(tmp_path / "mine.yaml"), {"figure": 1, "sweep": {"imports": ["their_parts"]}})])
    with pytest.raises(UserError, match="sweep: imports: a file cannot set it"):
        selection.rows([0], "output", [], {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "raises_late",
            "def f():\n    return 1 / 0\n\nf()\n",
            r"raises_late\.py:2: ZeroDivisionError: division by zero$",
        ),
        ("needs_more", "import os\nimport nothing_such\n", r"needs_more\.py:2: ModuleNotFoundError: No module named"),
        ("open_bracket", "x = (\n", r"open_bracket\.py:1: SyntaxError: '\(' was never closed$"),
        ("exits", "raise SystemExit(3)\n", r"exits\.py:1: SystemExit: 3$"),
        (
            "duplicate",
            "import reslt\nreslt.register_method('ce', None)\n",
            r"duplicate\.py:2: a method 'ce' exists already; reg",
        ),
        ("wordy", "raise ValueError('x' * 9999)\n", r"wordy\.py:1: ValueError: x{297}\.\.\.$"),
    ],
)
def test_a_module_that_fails_is_named_with_its_line(folder, name, text, message):
    (folder / f"{name}.py").write_text(text)
    for given in (name, f"{name}.py"):
        with pytest.raises(UserError, match=rf"^--import {given}: .*{message}"):
            load_imports([given])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_parts", "there is no such module, neither installed nor in "),
        ("no.such.parts", "there is no such module, neither installed nor in "),
        ("no_such.py", "there is no such file"),
        ("a b", "it is neither the name of a module nor a file"),
        ("../parts", "it is neither the name of a module nor a file"),
    ],
)
def test_a_missing_module_is_named(folder, run_script, name, reason):
    outcome = run_script("train", "--import", name)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: --import {name}: {reason}")


def test_a_file_is_imported_only_once_and_replaces_no_module(folder):
    (folder / "json.py").write_text("import outside_count\noutside_count.n += 1\n")
    (folder / "outside_count.py").write_text("n = 0\n")
    load_imports(["outside_count", "json.py", "json.py", str(folder / "json.py")])
    assert sys.modules["outside_count"].n == 1
    assert sys.modules["json"] is json


def test_reproduce_imports_first_and_passes_the_flag_on(run):
    _, flags = parse_arguments(["--table", "5", "--import", "outside_parts", "--epochs", "1"])
    assert flags == ["--epochs", "1", "--import", "outside_parts"]
    assert flag_names(flags) == ["epochs", "imports"]
    assert parse_varied(["method=ce,outside"]) == {"method": ["ce", "outside"]}
    with pytest.raises(UserError, match="--vary imports: all runs share --import"):
        parse_varied(["imports=their_parts"])


def test_a_method_is_registered_only_once_and_under_a_valid_folder_name(monkeypatch):
    monkeypatch.delitem(METHODS, "newcomer", raising=False)
    with pytest.raises(
        UserError, match=r"'newcomer' is not one of .*; if a module of yours registers it, give --import"
    ):
        resolve(["--method", "newcomer"])
    monkeypatch.setitem(METHODS, "newcomer", Method("new", network="plain"))
    assert resolve(["--method", "newcomer"]).config.method.method == "newcomer"
    with pytest.raises(UserError, match="a method 'newcomer' exists already"):
        register_method("newcomer", Method("newer", network="plain"))
    with pytest.raises(UserError, match="must consist of letters"):
        register_method("../mine", Method("x", network="plain"))


def test_a_folded_file_of_an_unknown_model_names_the_module(run, run_script, tmp_path):
    file, flags = tmp_path / "folded.safetensors", ("--import", "outside_parts", "--output", tmp_path)
    assert run_script("evaluate", "--ckpt", run, *flags, "--fold", file).code == 0
    described = load_folded(file)[1] | {"model": "nowhere_net", "imports": ["their_parts"]}
    save_file(load_file(file), file, metadata={"format": "pt", "reslt": json.dumps(described)})
    with pytest.raises(
        UserError, match=f"timm has no model 'nowhere_net'.*\n{HINT}.*in Python: import the module first"
    ):
        load_folded(file)
