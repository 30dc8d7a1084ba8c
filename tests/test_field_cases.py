"""Small inputs that people have, and attacks that were tried: each with the right outcome, not only the exit code."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import ALONE, TINY_FLAGS, Outcome, make_dataset, outcome_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits, load_sample_images
from torchvision.transforms.functional import pil_to_tensor

from reslt.api import create_model, load_run
from reslt.config.resolve import resolve
from reslt.config.yaml_files import read_yaml
from reslt.core import locks, log
from reslt.core.cache import cache_folder
from reslt.core.command import entry_point
from reslt.core.environment import explained
from reslt.core.errors import UserError
from reslt.core.files import atomic_folder
from reslt.core.locks import locked, sweep
from reslt.core.log import logged_to, logger
from reslt.core.text import csv_cell
from reslt.data.datasets import load_dataset
from reslt.evaluation import tables
from reslt.evaluation.evaluate import NotFiniteError
from reslt.evaluation.metrics import ClassHits
from reslt.loading import pixel_cache
from reslt.loading.image_dataset import ListedImages
from reslt.loading.pixel_cache import pixels
from reslt.loading.workers import Workers
from reslt.models import fold
from reslt.models.create import create_backbone
from reslt.models.fold import load_folded
from reslt.prepare import published, subsets
from reslt.prepare.check import check
from reslt.prepare.folder import new_dataset
from reslt.prepare.from_table import from_csv
from reslt.prepare.own import make_own
from reslt.prepare.photos import Photos
from reslt.runs import checkpoint, convert, summary
from reslt.runs import folder as run_folder
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.folder import find, open_run
from reslt.runs.released import class_order, load_tensors
from reslt.runs.report import read_result
from reslt.runs.run import Run

EARLIER = Path(__file__).parent / "earlier_version"
PROJECT = Path(__file__).resolve().parents[1]

# ---- What a model's outputs mean: class names travel with runs and are compared wherever a model meets data ----

FLAGS = [*TINY_FLAGS, "--epochs", "4", "--lr", "0.2"]  # four of six classes are learned, not all
NAMES = ["0", "1", "2", "3", "4", "5"]
ORDER = [4, 2, 5, 0, 3, 1]  # another order of the same classes: its class k is ORDER[k] of the run
RENAMED = [
    "five",
    "four",
    "one",
    "three",
    "two",
    "zero",
]  # the same photos in folders of other names, as a disk lists them
WORDS = ["zero", "one", "two", "three", "four", "five"]


def describe_classes(folder: Path, names: list[str] | None, **more) -> None:
    named = {} if names is None else {"class_names": names}
    info = {"image_root": str(folder.parent / "digits" / "images"), "defaults": {"branch": "bn"}, **named, **more}
    (folder / "info.yaml").write_text(yaml.safe_dump(info))


def relabel(folder: Path, of_class: dict[int, int], splits=("train", "test")) -> None:
    """Rewrite lists: class c becomes of_class[c]; images of other classes are left out."""
    for split in splits:
        lines = [line.split() for line in (folder / f"{split}.txt").read_text().splitlines()]
        kept = [f"{path} {of_class[int(label)]}\n" for path, label in lines if int(label) in of_class]
        (folder / f"{split}.txt").write_text("".join(kept))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the dataset `digits`, and copies whose classes are named or numbered otherwise."""
    root = tmp_path_factory.mktemp("world")
    digits = make_dataset(root / "digits", counts=(30, 24, 18, 12, 8, 6), test_images=8)
    describe_classes(digits, NAMES)
    names = ["ordered", "renamed", "nameless", "some", "more", "accents"]
    for name in names:
        (root / name).mkdir()
        for split in ("train", "test"):
            shutil.copy(digits / f"{split}.txt", root / name)
    relabel(root / "ordered", {c: k for k, c in enumerate(ORDER)})
    describe_classes(root / "ordered", [NAMES[c] for c in ORDER])
    relabel(root / "renamed", {c: RENAMED.index(word) for c, word in enumerate(WORDS)})
    describe_classes(root / "renamed", RENAMED)
    describe_classes(root / "nameless", None)
    relabel(root / "some", {5: 0, 1: 1, 3: 2}, ["test"])
    (root / "some/train.txt").unlink()  # a folder of test images: there is nothing to train on
    describe_classes(root / "some", ["5", "1", "3"])
    describe_classes(root / "more", [*NAMES[:4], "four", "a" * 50])
    return root


@pytest.fixture
def run(world, run_script) -> Path:
    """A run on `digits`, trained once for all tests."""
    if not (world / "run").exists():
        where = ("--output", world, "--experiment", "run")
        trained = run_script("train", "--data", world / "digits", *FLAGS, *where)
        assert trained.code == 0, trained.err
    return world / "run"


def predictions(run: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class of each image of a test list, and the list's labels, by the run's module alone."""
    from reslt.api import load_run

    model, described = load_run(run)
    mean, std = (torch.tensor(described[name]).view(3, 1, 1) for name in ("mean", "std"))
    lines = [line.split() for line in (data / "test.txt").read_text().splitlines()]
    images = [np.asarray(Image.open(run.parent / "digits/images" / path)) for path, _ in lines]
    with torch.inference_mode():
        logits = model((torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std)
    return logits.argmax(1).numpy(), np.array([int(label) for _, label in lines])


@pytest.mark.parametrize(
    ("data", "flags", "model_class", "how", "title", "warns"),
    [
        ("ordered", (), ORDER, "by name", "classes matched by name", False),
        ("some", (), [5, 1, 3], "by name", "3 of the model's 6 classes, classes matched by name", False),
        ("renamed", ("--classes-by-index",), range(6), "by index", "classes by index", False),
        ("nameless", (), range(6), "by index", "classes by index", True),
    ],
)
def test_labels_count_as_the_class_of_the_same_name_else_of_the_same_index_which_is_marked(
    world, run, run_script, tmp_path, data, flags, model_class, how, title, warns
):
    before = (run / "result.json").read_bytes()
    folded = tmp_path / "folded.safetensors"
    outcome = run_script("evaluate", "--ckpt", run, "--data", world / data, *flags, "--fold", folded)
    assert outcome.code == 0, outcome.err
    suffix = f"-{data}-test" + "-classes=index" * bool(flags)
    result = json.loads((run / f"result{suffix}.json").read_text())
    predicted, labels = predictions(run, world / data)
    meant = np.array(model_class)[labels]
    assert result["all"] == pytest.approx(100 * (predicted == meant).mean())
    assert 0 < (predicted == meant).mean() < 1
    assert result["classes"] == how
    assert outcome.out.splitlines()[0].endswith(f", {title}")
    assert ("classes are matched by index" in outcome.err) == warns
    table = pd.read_csv(run / f"per_class{suffix}.csv", dtype={"name": str})
    assert table["name"].tolist() == NAMES
    assert table["training_images"].tolist() == [30, 24, 18, 12, 8, 6]  # of the run, of whichever list was evaluated
    assert table["test_images"].tolist() == np.bincount(meant, minlength=6).tolist()
    from reslt.models.fold import load_folded

    _, described = load_folded(folded)
    assert (described["class_names"], described["images_per_class"]) == (NAMES, [30, 24, 18, 12, 8, 6])
    assert (run / "result.json").read_bytes() == before
    if data == "ordered":
        assert result["all"] == json.loads(before)["all"]
        assert result["tables"] == json.loads(before)["tables"]


@pytest.mark.parametrize(
    ("data", "flags", "said"),
    [
        ("renamed", (), "which has 'five', 'four', 'one' and 3 more, and lacks '0', '1', '2' and 3 more"),
        ("more", (), "which has 'four', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...', and lacks '4', '5'"),
        ("some", ("--classes-by-index",), "was trained on 6 classes, but {data} has 3"),
    ],
)
def test_other_classes_are_refused_with_a_few_names_of_both_sides(world, run, run_script, data, flags, said):
    content = sorted(run.iterdir())
    outcome = run_script("evaluate", "--ckpt", run, "--data", world / data, *flags)
    assert outcome.code == 2
    assert said.format(data=world / data) in outcome.err
    assert "--classes-by-index" in outcome.err or flags
    assert sorted(run.iterdir()) == content


@pytest.mark.parametrize(
    ("change", "accuracy_is_kept", "said"),
    [
        ("nothing", True, None),
        ("labels", False, "train.txt and test.txt of {digits} differ from training: the numbers are right only if"),
        ("labels and names", True, None),
        ("more training images of a class", True, "shot groups are those of the run's training counts"),
        ("no names", True, "has no class names: classes are matched by index; train.txt is that of the run"),
    ],
)
def test_lists_that_changed_after_training_are_noticed(
    world, run, run_script, tmp_path, change, accuracy_is_kept, said
):
    digits, before = world / "digits", json.loads((run / "result.json").read_text())
    kept = {file: file.read_bytes() for file in digits.glob("*.*")}
    out = tmp_path / "out"
    try:
        if change.startswith("labels"):
            relabel(digits, {c: k for k, c in enumerate(ORDER)})
        if change == "labels and names":
            describe_classes(digits, [NAMES[c] for c in ORDER])
        if change == "no names":
            describe_classes(digits, None)
        if change.startswith("more"):
            with open(digits / "train.txt", "a") as lines:
                lines.writelines(f"test/5/{i}.png 5\n" for i in range(8))
                lines.writelines(f"test/4/{i}.png 5\n" for i in range(8))
        outcome = run_script("evaluate", "--ckpt", run, "--output", out)
    finally:
        for file, content in kept.items():
            file.write_bytes(content)
    assert outcome.code == 0, outcome.err
    result = json.loads((out / "result.json").read_text())
    assert (result["tables"] == before["tables"]) == accuracy_is_kept
    if said is None:
        assert "warning" not in outcome.err
    else:
        assert outcome.err.count("warning") == 1
        assert said.format(digits=digits) in outcome.err


def test_a_run_is_not_resumed_under_other_class_names(world, run, run_script):
    describe_classes(world / "digits", ["0", "1", "2", "6", "9", "5"])
    flags = ("train", "--data", world / "digits", *FLAGS, "--resume", run)
    try:
        refused = run_script(*flags)
    finally:
        describe_classes(world / "digits", NAMES)
    assert refused.code == 2
    assert "class names: 3 '3' -> '6' (and 1 more)" in refused.err
    assert "--force-resume" in refused.err


def test_a_loaded_run_says_what_its_outputs_mean(run):
    from reslt.api import load_run

    _, described = load_run(run)
    assert described["class_names"] == NAMES
    assert described["images_per_class"] == [30, 24, 18, 12, 8, 6]


def test_a_run_of_an_earlier_version_is_evaluated_by_index_with_one_warning(tmp_path, run_script, monkeypatch):
    shutil.copytree(Path(__file__).parent / "earlier_version/run", tmp_path / "kept/run")
    describe_classes_of = make_dataset(tmp_path / "kept/tiny") / "info.yaml"
    describe_classes_of.write_text("image_root: images\nclass_names: [auk, gull, tern]\n")
    monkeypatch.chdir(tmp_path / "kept")
    folded = tmp_path / "folded.safetensors"
    outcome = run_script("evaluate", "--ckpt", "run", "--fold", folded)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("warning") == 1
    assert "the run has no class names: classes are matched by index; train.txt is that of the run" in outcome.err
    from reslt.models.fold import load_folded

    assert load_folded(folded)[1]["class_names"] == ["auk", "gull", "tern"]  # the training list is the same


# ---- Results of other evaluations, reports ----


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        (("--tau", "0.5"), "-digits-test-tau=0.5"),
        (("--eval-branch-at", "pooled", "--tau", "1"), "-digits-test-tau=1-eval_branch_at=pooled"),
        (("--classes-by-index",), "-digits-test-classes=index"),
        (("--bad-images", "skip"), "-digits-test-bad_images=skip"),
        (("--data-dir", "{world}/a b"), "-digits-test-data_dir={plain}_a_b"),
        (("--ckpt", "{run}/checkpoints/1-12"), "-digits-test-1-12"),
        (("--data", "{world}/digits", "--which", "last"), ""),
        (("--use-experts", "1", "--batch-size", "7", "--workers", "0"), ""),
        ((), ""),
    ],
)
def test_only_the_runs_own_evaluation_rewrites_its_result(world, run, run_script, flags, suffix):
    shutil.copytree(world / "digits/images", world / "a b", dirs_exist_ok=True)
    before = {name: (run / name).read_text() for name in ("result.json", "per_class.csv")}
    flags = [flag.format(world=world, run=run) for flag in flags]
    suffix = suffix.format(plain=str(world).replace("/", "_"))
    outcome = run_script("evaluate", *(() if "--ckpt" in flags else ("--ckpt", run)), *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith(f"\nresult{suffix}.json and per_class{suffix}.csv are in {run}\n")
    assert (run / f"result{suffix}.json").is_file()
    result, of_training = (json.loads(text) for text in ((run / "result.json").read_text(), before["result.json"]))
    assert {**result, "use_experts": None} == {**of_training, "use_experts": None}
    assert result.keys() >= {"last", "best_on_test", "paper"}
    assert (run / "per_class.csv").read_text() == before["per_class.csv"]


def test_a_run_without_a_result_gets_one_from_its_own_evaluation_alone(world, run, run_script, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("result*", "per_class*"))
    assert run_script("evaluate", "--ckpt", cut, "--data", world / "ordered").code == 0
    assert not (cut / "result.json").exists()
    assert run_script("evaluate", "--ckpt", cut).code == 0
    assert "last" not in json.loads((cut / "result.json").read_text())
    (cut / "checkpoints/last").write_text("1-12\n")
    assert run_script("evaluate", "--ckpt", cut).code == 0
    assert json.loads((cut / "result.json").read_text())["epoch"] == 1
    shutil.copy(run / "result.json", cut)  # that of training, of epoch 4
    assert run_script("evaluate", "--ckpt", cut).code == 0
    assert json.loads((cut / "result.json").read_text())["epoch"] == 4
    assert json.loads((cut / "result-digits-test-1-12.json").read_text())["epoch"] == 1


@pytest.fixture
def reported(tmp_path, capsys):
    """reported({place: changes of a result}) -> the report of these places, of runs or of result files."""
    from reslt.runs.report import main

    def report(places: dict[str, dict], *flags) -> str:
        for place, changes in places.items():
            file = tmp_path / place if place.endswith(".json") else tmp_path / place / "result.json"
            file.parent.mkdir(exist_ok=True)
            row = {"many": 50.0, "medium": None, "few": 20.0, "all": changes.get("all", 40.0)}
            result = {
                "data": "birds",
                "split": "test",
                "images": 90,
                "classes": "by name",
                "model": "m",
                "method": "ce",
            }
            result |= {"epoch": 5, "tau": None, "tables": {"standard": {"ce": row}}}
            settings = {"lr": 0.1, "seed": 0, "experiment": place} | changes.pop("config", {})
            file.write_text(json.dumps(result | changes))
            (file.parent / "config.yaml").write_text(yaml.safe_dump({"config": settings}))
        capsys.readouterr()
        main([*(str(tmp_path / place) for place in places), *flags])
        return capsys.readouterr().out

    return report


def test_a_report_has_columns_for_data_and_list_and_reads_result_files(reported):
    text = reported(
        {
            "r-seed0": {"all": 40.0},
            "r-seed1": {"all": 44.0},
            "r-seed1/result-gulls-val.json": {"all": 1.5, "data": "gulls", "split": "val"},
        }
    )
    cells = [line.split() for line in text.splitlines()]
    assert cells[0] == ["data", "list", "many", "medium", "few", "all", "best", "on", "test"]
    assert cells[1] == ["r-seed0", "birds", "test", "50.00", "n/a", "20.00", "40.00", "n/a"]
    assert cells[3] == ["r-seed1", "gulls", "val", "50.00", "n/a", "20.00", "1.50", "n/a"]
    assert cells[4] == ["r:", "mean", "of", "2", "birds", "test", "50.00", "n/a", "20.00", "42.00", "n/a"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "val"}, "list (test, val)"),
        ({"data": "gulls"}, "data (birds, gulls)"),
        ({"images": 80}, "number of images (90, 80)"),
        ({"classes": "by index"}, "classes (by name, by index)"),
        ({"epoch": 4}, "epoch (5, 4)"),
        ({"model": "n"}, "model (m, n)"),
        ({"method": "reslt"}, "method (ce, reslt)"),
        ({"tau": 0.5}, "tau (none, 0.5)"),
        ({"config": {"lr": 0.2}}, "lr: 0.1 -> 0.2"),
    ],
)
def test_results_of_different_things_are_not_averaged_and_the_difference_is_named(reported, changes, said):
    text = reported({"r-seed0": {}, "r-seed1": changes})
    assert "mean" not in text
    assert f"r: not averaged, since the results differ in {said}\n" in text
    assert "r-seed1" in text.splitlines()[2]


def test_epochs_that_validation_chose_are_averaged(reported):
    """Both runs ended, and another epoch was the best in each."""
    assert "r: mean of 2" in reported({"r-seed0": {"last": {}}, "r-seed1": {"last": {}, "epoch": 3}})


@pytest.mark.parametrize(
    "changes",
    [{"tables": {}}, {"tables": {"standard": {"ce": {"many": "x"}}}}, {"tables": [1]}, {"epoch": "x"}, {"split": 3}],
)
def test_a_result_that_is_damaged_is_named(reported, tmp_path, capsys, changes):
    with pytest.raises(SystemExit) as ended:
        reported({"a": {}, "b": changes})
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/b: its ")


def test_tables_side_by_side_say_of_which_list_they_are_if_they_differ(reported):
    places = {"a": {}, "a/result-gulls-val.json": {"data": "gulls", "split": "val"}}
    first = reported(places, "--side-by-side").splitlines()[0]
    assert [label.strip() for label in first.split("|")] == ["a, birds, test list", "a, gulls, val list"]
    assert reported({"a": {}}, "--side-by-side").splitlines()[0] == "a"


# ---- A run folder contains one run ----


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_run_does_not_start_among_checkpoints_of_another(tiny, tmp_path, run_script, flags):
    (tmp_path / "run/checkpoints/9-27").mkdir(parents=True)
    where = ("--output", tmp_path, "--experiment", "run")
    outcome = run_script("train", "--data", tiny, *TINY_FLAGS, *where, *flags)
    assert outcome.code == 2
    assert f"{tmp_path}/run contains checkpoints, but no config.yaml" in outcome.err
    assert "--experiment NAME" in outcome.err
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints", "9-27"]


SUMMARY = "epoch,lr,train_loss,val_all\n1,0.1,2.5,10.0\n2,0.1,2.25,\n3,0.05,2.0,30.0\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "summary.csv: the file is empty"),
        (b"\n", "summary.csv: the file is empty"),
        (b"\x00\xff\x89PNG", "summary.csv: not a text file"),
        (b"name,price\n1,2\n", "summary.csv:1: 'name' is not a column"),
        (b"lr,train_loss\n1,2\n", "summary.csv:1: there must be a column epoch"),
        (SUMMARY.replace("2,0.1,2.25,\n", "2,0.\n").encode(), "summary.csv:3: '2,0.' is incomplete"),
        (
            SUMMARY.replace("2,0.1,2.25,\n", "").encode(),
            "summary.csv:3: '3,0.05,2.0,30.0' is incomplete, or not the row",
        ),
        (SUMMARY.replace("2.25", "2.25\x00").encode(), "summary.csv:3: "),
        (SUMMARY[:-10].encode(), "summary.csv:4: '3,0.05' is incomplete"),  # and its epoch is not evaluated again
        (SUMMARY[:-2].encode(), "summary.csv:4: '3,0.05,2.0,30.' is incomplete"),  # it may have been 30.5
    ],
)
def test_a_damaged_summary_is_refused_with_its_line(tmp_path, content, said):
    from reslt.core.errors import UserError
    from reslt.runs.summary import Summary

    (tmp_path / "summary.csv").write_bytes(content)
    with pytest.raises(UserError) as refused:
        Summary(tmp_path, epochs_done=3)
    assert str(refused.value).startswith(f"{tmp_path}/{said}")
    assert "restore the file" in str(refused.value)


@pytest.mark.parametrize(
    ("epochs_done", "is_last_repeated", "epochs"),
    [(3, True, [1, 2]), (2, False, [1, 2]), (2, True, [1, 2]), (1, False, [1])],
)
def test_a_summary_cut_in_its_last_line_is_read_if_that_row_is_not_needed(
    tmp_path, epochs_done, is_last_repeated, epochs
):
    from reslt.runs.summary import Summary

    (tmp_path / "summary.csv").write_text(SUMMARY[:-2])
    read = Summary(tmp_path, epochs_done, is_last_repeated=is_last_repeated)
    assert [row["epoch"] for row in read.rows] == epochs
    assert read.column("val_all") == {1: 10.0}


def test_a_run_whose_summary_was_cut_writes_the_last_row_again(world, run, run_script, tmp_path):
    cut = tmp_path / "run"
    shutil.copytree(run, cut)
    (cut / "summary.csv").write_bytes((run / "summary.csv").read_bytes()[:-5])
    resumed = run_script("train", "--data", world / "digits", *FLAGS, "--resume", cut)
    assert resumed.code == 0, resumed.err
    assert f"{cut}/summary.csv:5: the last line is incomplete and left out" in resumed.err
    rows, before = (pd.read_csv(folder / "summary.csv") for folder in (cut, run))
    columns = ["epoch", "lr", "train_loss", "test_few", "test_all"]
    assert rows[columns].round(6).to_dict() == before[columns].round(6).to_dict()


# ---- Photos: every image accounted for ----

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".heic", ".webp")  # of the images that these tests write
COLORS = itertools.count(1)


def put(root: Path, *paths: str) -> None:
    """Write an image of a color of its own at each path; `ape/{0..2}.png` stands for three."""
    for pattern in paths:
        head, braces, tail = re.fullmatch(r"([^{]*)(?:\{0\.\.(\d+)\})?(.*)", pattern).groups()
        for i in range(int(braces) + 1) if braces else [""]:
            file, color = root / f"{head}{i}{tail}", next(COLORS)
            file.parent.mkdir(parents=True, exist_ok=True)
            png = io.BytesIO()
            Image.new("RGB", (4, 4), (color >> 16, color >> 8 & 255, color & 255)).save(png, "PNG")
            file.write_bytes(png.getvalue())


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def images_on_disk(root: Path) -> int:
    """Image files below a folder and the folders linked into it, each real folder once, hidden ones too."""
    seen, count = set(), 0
    for here, below, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            below.clear()
            continue
        seen.add(real)
        count += sum(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    return count


def balance_of(outcome: Outcome) -> dict:
    """The closing line -> {'found': n, 'taken': n, reasons and places: n}; it must add up."""
    found, taken, left_out, reasons, unseen, places = re.search(
        r"^images: ([\d,]+) found = ([\d,]+) taken \+ ([\d,]+) left out(?: \((.*?)\))? \+ ([\d,]+) not looked at(?: \((.*)\))?$",
        outcome.out,
        re.MULTILINE,
    ).groups()
    parts = {}
    for total, listed in ((left_out, reasons), (unseen, places)):
        named = {part.rpartition(": ")[0]: int(part.rpartition(": ")[2]) for part in (listed or "").split(", ") if part}
        assert sum(named.values()) == int(total)
        parts |= named
    assert int(found) == int(taken) + int(left_out) + int(unseen)
    return {"found": int(found), "taken": int(taken), **parts}


def sizes_of(dataset) -> dict[str, list[int]]:
    """{split: images per class}"""
    return {
        split: np.bincount(images.labels, minlength=dataset.num_classes).tolist()
        for split, images in dataset.lists.items()
    }


def split_folders_with_leftovers(root: Path) -> list:
    put(root, "train/ape/{0..3}.png", "train/bat/{0..2}.png", "val/ape/{0..1}.png", "val/bat/0.png")
    put(root, "train/ape/._0.png", ".cache/{0..4}.png")
    write(root / ".DS_Store", "x")
    return []


def flat_validation(root: Path) -> list:
    put(root, "train/ape/{0..3}.png", "train/bat/{0..2}.png", "val/{0..8}.png", "{0..2}.png")
    write(root / "val.csv", "ImageId,Class\n0.png,ape\n")
    return []


def loose_images(root: Path) -> list:
    put(root, "ape/{0..3}.png", "bat/{0..2}.png", "overview.png", "cover.png")
    return []


def folders_below_classes(root: Path) -> list:
    put(root, "ape/{0..1}.png", "ape/indoor/{0..2}.png", "ape/outdoor/day/{0..1}.png", "bat/{0..2}.png")
    return []


def system_folders(root: Path) -> list:
    put(root, "ape/{0..3}.png", "bat/{0..2}.png", "__MACOSX/ape/._{0..3}.png", ".thumbnails/{0..1}.png")
    put(root, "ape/@eaDir/{0..3}.png", "bat/@eaDir/{0..2}.png")
    return []


def two_tables(root: Path) -> list:
    put(root, "ape/{0..3}.png", "bat/{0..2}.png")
    write(root / "a.csv", "file,label\nape/0.png,x\n")
    write(root / "b.csv", "file,label\nape/0.png,y\n")
    return []


def capital_splits(root: Path) -> list:
    put(root, "Train/ape/{0..3}.png", "Train/bat/{0..2}.png", "Valid/ape/0.png", "Valid/bat/0.png", "Test/{0..5}.png")
    return []


def linked_folder(root: Path) -> list:
    put(root, "ape/{0..3}.png")
    put(root.parent / "elsewhere", "{0..2}.png", "more/{0..1}.png")
    (root / "bat").symlink_to(root.parent / "elsewhere")
    (root / "ape/again").symlink_to(root / "ape")
    return []


def splits_beside_empty_folders(root: Path) -> list:
    put(root, "training/ape/{0..3}.png", "training/bat/{0..2}.png", "testing/ape/0.png", "testing/bat/0.png")
    write(root / "annotations/a.xml", "x")
    return []


def table_of_a_part(root: Path) -> list:
    put(root, "photos/{0..9}.png", "unused/{0..3}.png", "unused/deep/0.png", "0.png")
    write(root / "t.csv", "f,c\n" + "".join(f"photos/{i}.png,{'ab'[i % 2]}\n" for i in range(7)))
    return ["--csv", root / "t.csv", "--image-column", "f", "--label-column", "c"]


def table_of_hidden_images(root: Path) -> list:
    put(root, ".store/{0..4}.png", "{0..1}.png")
    write(root / "t.csv", "f,c\n" + "".join(f".store/{i}.png,{'ab'[i % 2]}\n" for i in range(4)))
    return ["--csv", root / "t.csv", "--image-column", "f", "--label-column", "c"]


def json_with_doubtful_images(root: Path) -> list:
    """Image 5 has two annotations of one category, 6 of two categories, 7 none, 8 is not listed."""
    put(root, "images/{0..8}.png")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(8)],
        "annotations": [
            {"image_id": 10 + i, "category_id": c}
            for i, c in [(0, 7), (1, 7), (2, 7), (3, 3), (4, 3), (5, 3), (5, 3), (6, 3), (6, 7)]
        ],
        "categories": [{"id": 7, "name": "ape"}, {"id": 3, "name": "bat"}, {"id": 4, "name": "cow"}],
    }
    write(root / "train.json", json.dumps(content))
    return ["--json", root / "train.json"]


def metadata_of_one_split(root: Path) -> list:
    put(root, "train/{0..4}.png", "train/unnamed.png", "test/{0..2}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2]}) for i in range(5)]
    write(root / "train/metadata.jsonl", "\n".join(lines))
    return []


@pytest.mark.parametrize(
    ("layout", "sizes", "others"),
    [
        (split_folders_with_leftovers, {"train": [4, 3], "val": [2, 1]}, {"hidden files": 1, ".cache/": 5}),
        (flat_validation, {"train": [4, 3]}, {"val/": 9, "the folder itself": 3}),
        (loose_images, {"train": [4, 3]}, {"the folder itself": 2}),
        (folders_below_classes, {"train": [7, 3]}, {}),
        (system_folders, {"train": [4, 3]}, {"__MACOSX/": 4, ".thumbnails/": 2, "@eaDir/": 7}),
        (two_tables, {"train": [4, 3]}, {}),
        (capital_splits, {"train": [4, 3], "val": [1, 1]}, {"Test/": 6}),
        (linked_folder, {"train": [4, 5]}, {}),
        (splits_beside_empty_folders, {"train": [4, 3], "test": [1, 1]}, {}),
        (table_of_a_part, {"train": [4, 3]}, {"not listed": 3, "unused/": 5, "the folder itself": 1}),
        (table_of_hidden_images, {"train": [2, 2]}, {".store/": 1, "the folder itself": 2}),
        (json_with_doubtful_images, {"train": [3, 3]}, {"several categories": 1, "no annotation": 1, "not listed": 1}),
        (metadata_of_one_split, {"train": [3, 2]}, {"not listed": 1, "test/": 3}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_image_on_disk_is_taken_left_out_or_in_a_place_not_looked_at(
    project, tmp_path, run_prepare, layout, sizes, others
):
    source = tmp_path / "photos"
    arguments = layout(source) or ["--from", source]
    outcome = run_prepare("own", *arguments, "--name", "x", "--no-decode", "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    taken = sum(map(sum, sizes.values()))
    assert balance_of(outcome) == {"found": images_on_disk(source), "taken": taken, **others}
    dataset = load_dataset("x")
    assert sizes_of(dataset) == sizes
    listed = [images.path(i) for images in dataset.lists.values() for i in range(len(images))]
    assert len(set(listed)) == taken
    assert all((source / path).is_file() for path in listed)


def test_images_that_cannot_be_decoded_are_part_of_the_account(project, tmp_path, run_prepare):
    """A JPEG that is cut, and one in HEIC, whose package is not installed: named, counted, and not listed."""
    source = tmp_path / "photos"
    put(source, "ape/{0..3}.png", "bat/{0..2}.png", "bat/loose below/0.png")
    (source / "ape/cut.png").write_bytes((source / "ape/0.png").read_bytes()[:40])
    (source / "bat/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("reslt.augment.decode._heif_is_registered", lambda: False)
        outcome = run_prepare("own", "--from", source, "--name", "x", "--workers", 0, "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    assert balance_of(outcome) == {"found": images_on_disk(source), "taken": 8, "unreadable": 1, "no decoder": 1}
    assert re.search(r"left out: .*bat/phone\.HEIC: a HEIC image, which requires: pip install pillow-heif", outcome.out)
    assert "taken: 1 images in 1 folders below class folders (bat/loose below)" in outcome.out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/{0..3}.png", "test/{0..2}.png"], "test, train look like splits, not classes, and there are no class"),
        (["train/{0..3}.png", "test/0.png", "ape/0.png"], "test, train look like splits, not classes"),
        (["train2017/{0..3}.png", "val2017/{0..2}.png"], "train2017, val2017 look like splits"),
        (["train_images/ape/0.png", "test_images/ape/0.png"], "call them train, val and test"),
        (["val/ape/0.png", "test/ape/0.png"], "look like splits, not classes; call them train"),
        (
            ["train/ape/0.png", "train/bat/0.png", "samples/0.png"],
            "are partly splits and partly not; move samples away",
        ),
        (
            ["ape/train/0.png", "ape/test/0.png", "bat/train/0.png"],
            "the classes contain folders of splits (test, train)",
        ),
        (["photos/ape/0.png", "photos/bat/0.png"], "is only photos; are its folders (ape, bat) the classes? Then give"),
        (
            ["{0..9}.png", "crops/0.png", "masks/0.png"],
            "10 images beside the folders crops, masks, which contain only 2",
        ),
        (["{0..9}.png"], "10 images, but there are no class folders in it; put the images into a folder per class"),
        (["train/ape/0.png", "train/bat/0.png", "val/cow/0.png"], "class 'cow' is not under train/"),
        (["train/ape/0.png", "train/bat/0.png", "val/ape/0.png", "Valid/ape/0.png"], "there are two folders of val"),
        (["ape/0.png", "bat/0.png", "cow/notes.txt"], "cow: the class has no image"),
    ],
)
def test_a_folder_that_states_no_classes_or_several_readings_is_refused(project, tmp_path, run_prepare, files, message):
    put(tmp_path / "photos", *files)
    outcome = run_prepare("own", "--from", tmp_path / "photos", "--name", "x", "--no-decode")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not (project / "data_lists/x").exists()


def test_a_flat_layout_with_a_table_names_the_command_that_reads_it(project, tmp_path, run_prepare):
    """Kaggle's layout: the refusal prints a command, and this command makes the dataset of the table's classes."""
    source = tmp_path / "my photos"
    put(source, "train/ape{0..3}.png", "train/bat{0..2}.png", "test/x{0..4}.png")
    ids = [f"ape{i},ape" for i in range(4)] + [f"bat{i},bat" for i in range(3)]
    write(source / "labels.csv", "\n".join(["id,breed", *ids]))
    refused = run_prepare("own", "--from", source, "--name", "x")
    assert refused.code == 2
    command = shlex.split(re.search(r"^  python -m reslt.prepare (.*)$", refused.err, re.MULTILINE)[1])
    assert command[-1] == "NAME"
    outcome = run_prepare(*command[:-1], "x", "--no-decode", "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == ("ape", "bat")
    assert sizes_of(load_dataset("x")) == {"train": [4, 3]}
    assert "labels.csv: paths without file ending: 7 are .png files" in outcome.out


def test_images_that_a_long_tail_leaves_out_are_counted(project, tmp_path, run_prepare):
    """Of 8 and 8 training images, factor 0.25 keeps 8 and 2."""
    source = tmp_path / "photos"
    put(source, "train/2/{0..7}.png", "train/10/{0..7}.png", "test/2/0.png", "test/10/0.png", "val/{0..4}.png")
    outcome = run_prepare("longtail", "--from", source, "--imb-factor", 0.25, "--name", "x")
    assert outcome.code == 0, outcome.err
    assert balance_of(outcome) == {"found": 23, "taken": 12, "beyond the profile": 6, "val/": 5}
    assert load_dataset("x").class_names == ("2", "10")
    assert sizes_of(load_dataset("x")) == {"train": [8, 2], "test": [1, 1]}


# ---- Photos: tables, JSON, metadata files ----

IMAGES = ["images/{0..5}.png"]
TABLE = ["--image-column", "file", "--label-column", "label"]
OWN = ["--no-decode", "--test-per-class", "0", "--name", "x"]


def table_text(rows: list[list], separator: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue()


LABELED = [["file", "label"], *([f"images/{i}.png", "ape" if i < 4 else "bat"] for i in range(6))]
SPLITS = ["split", "train", "Validation", "test", "train", "training", "dev"]
OF_SPLITS = {"train": [2, 1], "val": [1, 1], "test": [1, 0]}
PER_CLASS = [["image", "cow", "ape"], *([f"images/{i}", float(i > 3), float(i < 4)] for i in range(6))]


@pytest.mark.parametrize(
    ("files", "arguments", "names", "sizes"),
    [
        (
            {"t.csv": table_text([[*row, s] for row, s in zip(LABELED, SPLITS, strict=True)])},
            ["--csv", "t.csv", *TABLE, "--split-column", "split"],
            ("ape", "bat"),
            OF_SPLITS,
        ),
        (
            {
                "train.csv": table_text([LABELED[i] for i in (0, 1, 4, 5)]),
                "lists/val.csv": table_text(
                    [["label", "file"], ["ape", "../images/1.png"], ["bat", "../images/5.png"]]
                ),
                "test.csv": table_text([["file", "label"], ["images/2.png", "ape"]]),
            },
            ["--csv", "train.csv", "--val-csv", "lists/val.csv", "--test-csv", "test.csv", *TABLE],
            ("ape", "bat"),
            OF_SPLITS,
        ),
        (
            {"t.csv": table_text(PER_CLASS)},
            ["--csv", "t.csv", "--image-column", "image", "--label-column", "cow", "ape"],
            ("ape", "cow"),
            {"train": [4, 2]},
        ),
        ({"t.csv": table_text(LABELED, ";")}, ["--csv", "t.csv", *TABLE], ("ape", "bat"), {"train": [4, 2]}),
        ({"t.csv": table_text(LABELED, "|")}, ["--csv", "t.csv", *TABLE], ("ape", "bat"), {"train": [4, 2]}),
        ({"t.csv": table_text(LABELED, "\t")}, ["--csv", "t.csv", *TABLE], ("ape", "bat"), {"train": [4, 2]}),
        (
            {"t.csv": table_text([[row[0].removeprefix("images/"), row[1]] for row in LABELED])},
            ["--csv", "t.csv", *TABLE, "--data-dir", "images"],
            ("ape", "bat"),
            {"train": [4, 2]},
        ),
        (
            {"t.csv": table_text([[row[0].removeprefix("images/").removesuffix(".png"), row[1]] for row in LABELED])},
            ["--csv", "t.csv", *TABLE],
            ("ape", "bat"),
            {"train": [4, 2]},
        ),
    ],
    ids=["split column", "table per split", "one-hot", "semicolons", "bars", "tabs", "data-dir", "ids"],
)
def test_tables_of_every_form_give_their_classes_and_splits(
    project, tmp_path, run_prepare, monkeypatch, files, arguments, names, sizes
):
    put(tmp_path / "photos", *IMAGES)
    for name, text in files.items():
        write(tmp_path / "photos" / name, text)
    monkeypatch.chdir(tmp_path / "photos")
    outcome = run_prepare("own", *arguments, *OWN)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("x")
    assert (dataset.class_names, sizes_of(dataset)) == (names, sizes)
    assert balance_of(outcome)["taken"] == 6
    assert all(dataset.image_root.file(images.path(0)).is_file() for images in dataset.lists.values())
    separators = {";": "semicolons", "|": "vertical bars", "\t": "tabs"}
    for separator, name in separators.items():
        used = separator in next(iter(files.values()))
        assert (f"t.csv: its cells are separated by {name}" in outcome.out) == used


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (
            [["file", "label", "part"], ["images/0.png", "a", "train"], ["images/1.png", "b", "holdout"]],
            [*TABLE, "--split-column", "part"],
            r"row 3: --split-column part says neither train, val nor test but: holdout",
        ),
        (
            [["file", "a", "b"], ["images/0", 1, 0], ["images/1", 1, 1]],
            None,
            r"row 3: 2 of the 2 label columns contain 1",
        ),
        (
            [["file", "a", "b"], ["images/0", 0, 0], ["images/1", 0, 1]],
            None,
            r"row 2: 0 of the 2 label columns contain 1",
        ),
        ([["file", "a", "b"], ["images/0", 0.5, 0.5]], None, r"row 2: column a contains '0\.5'"),
        ([["file", "label"], ["0", "a"], ["7", "b"]], TABLE, r"row 2: there is no image '0' below .*--data-dir"),
        (
            [["file", "label"], ["both", "a"]],
            TABLE,
            r"row 2: 'both' might be both\.jpg, both\.png; write the file ending",
        ),
        (
            [["file", "label"], ["5.png", "a"]],
            TABLE,
            r"row 2: '5\.png' might be in any of 2 folders .*: images, other;",
        ),
        ([["file", "label"], ["images/0", "a"], ["images/0.png", "b"]], TABLE, r"row 3: duplicate image images/0\.png"),
        (
            [["file", "label", "s"], ["images/0", "a", "train"], ["images/1", "b", "train"], ["images/2", "c", "test"]],
            [*TABLE, "--split-column", "s"],
            r"1 classes of test have no training image: c",
        ),
    ],
)
def test_a_table_that_leaves_a_choice_is_refused_with_the_row(project, tmp_path, run_prepare, rows, arguments, message):
    put(tmp_path / "photos", *IMAGES, "other/5.png", "both.png", "both.jpg")
    write(tmp_path / "photos/t.csv", table_text(rows))
    arguments = arguments or ["--image-column", "file", "--label-column", "a", "b"]
    outcome = run_prepare("own", "--csv", tmp_path / "photos/t.csv", *arguments, *OWN)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(message, outcome.err), outcome.err
    assert len(outcome.err) < 500


def coco(images: range, folder: str = "") -> str:
    """0..3 are apes with category 9, 4 and 5 bats with category 2: by name, apes come first."""
    return json.dumps(
        {
            "images": [{"id": f"id{i}", "file_name": f"{folder}{i}.png"} for i in images],
            "annotations": [{"image_id": f"id{i}", "category_id": 9 if i < 4 else 2} for i in images],
            "categories": [{"id": 2, "name": "bat"}, {"id": 9, "name": "ape"}],
        }
    )


def test_json_per_split_is_read_with_classes_by_name(project, tmp_path, run_prepare):
    """COCO's layout: annotations apart from the images, which are in a folder per split."""
    put(tmp_path / "coco", "train2017/{0..5}.png", "val2017/{0..4}.png")
    write(tmp_path / "coco/annotations/train.json", coco(range(6), "train2017/"))
    write(tmp_path / "coco/annotations/val.json", coco(range(5), "val2017/"))
    files = [f"{tmp_path}/coco/annotations/{split}.json" for split in ("train", "val")]
    outcome = run_prepare("own", "--json", files[0], "--val-json", files[1], "--data-dir", tmp_path / "coco", *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == ("ape", "bat")
    assert sizes_of(load_dataset("x")) == {"train": [4, 2], "val": [4, 1]}


@pytest.mark.slow
def test_json_of_many_images_is_read_in_seconds(tmp_path):
    """500,000 images in 30 s would be 3 s for these 50,000; they take about one, existence checks included."""
    from reslt.prepare.from_json import from_json

    n, classes = 50_000, 800
    for c in range(classes):
        (tmp_path / f"{c}").mkdir()
    for i in range(n):
        (tmp_path / f"{i % classes}/{i}.jpg").touch()
    content = {
        "images": [{"id": i, "file_name": f"{i % classes}/{i}.jpg"} for i in range(n)],
        "annotations": [{"image_id": i, "category_id": i % classes} for i in range(n)],
        "categories": [{"id": c, "name": f"species {c}"} for c in range(classes)],
    }
    write(tmp_path / "train.json", json.dumps(content))
    start = process_time()
    photos = from_json({"train": tmp_path / "train.json"})
    assert process_time() - start < 3
    assert sum(map(len, photos.paths["train"])) == n


@pytest.mark.parametrize(
    ("train", "arguments", "names"),
    [
        ("metadata.jsonl", [], ("ape", "bat")),
        ("metadata.csv", [], ("ape", "bat")),
        ("metadata.jsonl", ["--label-column", "count"], ("9", "10")),
    ],
)
def test_metadata_beside_images_states_the_classes_of_each_split(
    project, tmp_path, run_prepare, train, arguments, names
):
    put(tmp_path / "hf", "train/{0..5}.png", "test/{0..1}.png")
    rows = [{"file_name": f"{i}.png", "label": "ape" if i % 2 else "bat", "count": 9 + i % 2} for i in range(6)]
    lines = "\n".join(map(json.dumps, rows))
    write(
        tmp_path / "hf/train" / train,
        lines if train.endswith("jsonl") else table_text([list(rows[0]), *(list(row.values()) for row in rows)]),
    )
    write(tmp_path / "hf/test/metadata.jsonl", "\n".join(map(json.dumps, rows[:2])))
    outcome = run_prepare("own", "--from", tmp_path / "hf", *arguments, *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == names
    assert sizes_of(load_dataset("x")) == {"train": [3, 3], "test": [1, 1]}


@pytest.mark.parametrize(
    ("lines", "arguments", "names"),
    [
        (['{"file_name": "ape/0.png", "text": "x"}', '{"file_name": "bat/0.png", "text": "y"}'], [], ("ape", "bat")),
        (['{"file_name": "ape/0.png", "text": "x"}', '{"file_name": "bat/0.png", "text": "y"}'], ["text"], ("x", "y")),
        (['{"file_name": "ape/0.png", "label": 5}', '{"file_name": "bat/0.png", "label": 7}'], [], ("5", "7")),
    ],
)
def test_metadata_of_class_folders_is_read_if_it_states_labels(project, tmp_path, run_prepare, lines, arguments, names):
    put(tmp_path / "hf", "ape/0.png", "bat/0.png")
    write(tmp_path / "hf/metadata.jsonl", "\n".join(lines))
    arguments = ["--label-column", *arguments] if arguments else []
    outcome = run_prepare("own", "--from", tmp_path / "hf", *arguments, *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "1.png", "kind": "a", "sex": "f"}', "which column is the class? Name it with --label-column"),
        ('{"file_name": "1.png", "label": ["a"]}', "line 2: label is missing, empty or no text"),
        ('{"file_name": "1.png"}', "line 2: label is missing, empty or no text"),
        ('{"file_name": "9.png", "label": "a"}', "line 2: there is no image '9.png'"),
        ('{"file_name": "1.png", "label": ', "line 2: not an object in JSON"),
    ],
)
def test_a_fault_of_metadata_names_its_line(project, tmp_path, run_prepare, line, message):
    put(tmp_path / "hf", "train/{0..2}.png")
    first = (
        '{"file_name": "0.png", "kind": "b", "sex": "m"}' if "kind" in line else '{"file_name": "0.png", "label": "b"}'
    )
    write(tmp_path / "hf/train/metadata.jsonl", f"{first}\n{line}\n")
    outcome = run_prepare("own", "--from", tmp_path / "hf", *OWN)
    assert outcome.code == 2
    assert message in outcome.err


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "x")
    return data.getvalue()


SECRET = "4711-content-of-the-file"
MANY = json.dumps({"images": [{"file_name": f"{SECRET}{i}.png"} for i in range(4000)]})


@pytest.mark.parametrize(
    ("name", "content", "flag", "message"),
    [
        ("t.csv", MANY.encode(), "--csv", "it seems to be JSON; JSON in COCO's form is read with --json FILE"),
        (
            "t.csv",
            f'{{"{SECRET}": 1}}\n{{"a": 2}}\n'.encode(),
            "--csv",
            "it seems to be JSON lines; JSON lines are read",
        ),
        ("t.csv", zipped("[Content_Types].xml"), "--csv", "it seems to be an Excel workbook (.xlsx); save it as CSV"),
        ("t.csv", zipped(SECRET), "--csv", "it seems to be a zip archive; unpack it"),
        ("t.csv", b"\x89PNG\r\n\x1a\n" + SECRET.encode(), "--csv", "it seems to be a PNG image"),
        ("t.csv", SECRET.encode("utf-16"), "--csv", "it seems to be UTF-16 text; save it as UTF-8"),
        ("t.csv", f"<!DOCTYPE html><p>{SECRET}".encode(), "--csv", "it seems to be a web page or XML"),
        ("t.csv", f"file,label\n\xe9{SECRET},a\n".encode("latin-1"), "--csv", "must be UTF-8 text with a header"),
        (
            "t.json",
            f"file,label\n{SECRET},a\n".encode(),
            "--json",
            "it seems to be a table; a table is read with --csv",
        ),
        (
            "t.json",
            MANY.encode(),
            "--json",
            "there is no list 'annotations' in it (it has: images); it must have COCO's",
        ),
        ("t.json", f'{{"{SECRET}": '.encode() + b"[" * 99_999, "--json", "not readable as JSON: "),
        ("t.csv", f"{SECRET * 40_000},b\n1,2\n".encode(), "--csv", "--image-column file: "),
        ("t.csv", (",".join(f"column{i}" for i in range(1000)) + "\n").encode(), "--csv", "and 988 more"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "content",  # an archive contains the time
)
def test_a_file_of_another_kind_is_recognized_and_not_quoted(
    project, tmp_path, run_prepare, name, content, flag, message
):
    (tmp_path / name).write_bytes(content)
    outcome = run_prepare("own", flag, tmp_path / name, *(TABLE if flag == "--csv" else []), *OWN)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count(SECRET) <= 1  # a column name may be shown, cut to 40 characters
    assert len(outcome.err) < 900


def test_a_heic_image_is_decoded_where_its_package_is_installed(tmp_path, monkeypatch):
    """In place of pillow-heif, a module that registers a decoder for PIL: an image of 6 x 4 pixels in one color."""
    import sys
    from types import ModuleType

    from PIL import ImageFile

    from reslt.augment import decode

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode, self.tile = (6, 4), "RGB", []

        def load(self):
            self.im = Image.new("RGB", self.size, (10, 20, 30)).im
            return Image.Image.load(self)

    package = ModuleType("pillow_heif")
    package.register_heif_opener = lambda: Image.register_open("HEIF", Heif, lambda head: head[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    decode._heif_is_registered.cache_clear()
    try:
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
        image = decode.decode(tmp_path / "a.heic")
    finally:
        decode._heif_is_registered.cache_clear()
    assert (image.size, image.getpixel((0, 0))) == ((6, 4), (10, 20, 30))


# ---- Class order and class names ----

NUMBERED = {"12": 1, "2": 2, "1": 3, "10": 2}


def door_of_folders(root: Path) -> list:
    put(root, *(f"{name}/{{0..{n - 1}}}.png" for name, n in NUMBERED.items()))
    return ["--from", root]


def door_of_splits(root: Path) -> list:
    put(root, *(f"train/{name}/{{0..{n - 1}}}.png" for name, n in NUMBERED.items()))
    return ["--from", root]


def door_of_a_table(root: Path) -> list:
    door_of_folders(root)
    rows = [[f"{name}/{i}.png", name] for name, n in NUMBERED.items() for i in range(n)]
    write(root / "t.csv", table_text([["file", "label"], *rows]))
    return ["--csv", root / "t.csv", *TABLE]


def door_of_one_hot_columns(root: Path) -> list:
    door_of_folders(root)
    rows = [
        [f"{name}/{i}.png", *(int(other == name) for other in NUMBERED)]
        for name, n in NUMBERED.items()
        for i in range(n)
    ]
    write(root / "t.csv", table_text([["file", *NUMBERED], *rows]))
    return ["--csv", root / "t.csv", "--image-column", "file", "--label-column", *NUMBERED]


def door_of_json(root: Path) -> list:
    door_of_folders(root)
    paths = [(name, f"{name}/{i}.png") for name, n in NUMBERED.items() for i in range(n)]
    content = {
        "images": [{"id": k, "file_name": path} for k, (_, path) in enumerate(paths)],
        "annotations": [{"image_id": k, "category_id": f"c{name}"} for k, (name, _) in enumerate(paths)],
        "categories": [{"id": f"c{name}", "name": name} for name in NUMBERED],
    }
    write(root / "t.json", json.dumps(content))
    return ["--json", root / "t.json"]


def door_of_metadata(root: Path) -> list:
    door_of_folders(root)
    rows = [{"file_name": f"{name}/{i}.png", "label": int(name)} for name, n in NUMBERED.items() for i in range(n)]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return ["--from", root]


@pytest.mark.parametrize(
    "door",
    [door_of_folders, door_of_splits, door_of_a_table, door_of_one_hot_columns, door_of_json, door_of_metadata],
    ids=lambda door: door.__name__,
)
def test_classes_have_one_order_by_every_door_numbers_by_value(project, tmp_path, run_prepare, door):
    outcome = run_prepare("own", *door(tmp_path / "photos"), *OWN)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("x")
    assert dataset.class_names == ("1", "2", "10", "12")
    assert dataset.images_per_class.tolist() == [3, 2, 2, 1]


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10", "9", "01", "1", "010"], ["01", "1", "9", "010", "10"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["9" * 5000, "8"], ["8", "9" * 5000]),
    ],
)
def test_whole_numbers_are_ordered_by_value_other_names_alphabetically(names, ordered):
    from reslt.prepare.photos import order_classes

    assert order_classes(names) == ordered


YAML_READS_OTHERWISE = ["001", "010", "yes", "no", "null", "~", "0x10", "2001-01-01", "12:30:45", "1_000", "1.50", "+1"]
YAML_READS_AS_TEXT = ["1e3", "08", "None", "é"]


def test_class_names_of_folders_are_read_back_as_they_are(project, tmp_path, run_prepare):
    names = [*YAML_READS_OTHERWISE, *YAML_READS_AS_TEXT, "5", "- a", "#b", "&c", "[d]"]
    put(tmp_path / "photos", *(f"{name}/0.png" for name in names))
    outcome = run_prepare("own", "--from", tmp_path / "photos", *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == tuple(sorted(names))
    written = (project / "data_lists/x/info.yaml").read_text()
    assert [f"- '{name}'" in written for name in YAML_READS_OTHERWISE] == [True] * len(YAML_READS_OTHERWISE)


@pytest.mark.parametrize("name", YAML_READS_OTHERWISE)
def test_an_unquoted_class_name_that_yaml_reads_otherwise_is_refused_with_its_line(tiny, run_prepare, name):
    info = tiny / "info.yaml"
    info.write_text(f"image_root: images\nclass_names:\n- a\n- {name}\n- b\n")
    outcome = run_prepare("check", tiny, "--output", tiny / "out")
    assert outcome.code == 2
    assert re.search(
        rf"info\.yaml:4: .*{re.escape(name)} is read as .*write it in quotes: \"{re.escape(name)}\"", outcome.err
    )
    info.write_text(f"image_root: images\nclass_names: [a, '{name}', b]\n")
    assert load_dataset(str(tiny)).class_names == ("a", name, "b")


@pytest.mark.parametrize("name", [*YAML_READS_AS_TEXT, "5", "-3"])
def test_an_unquoted_class_name_that_is_read_as_written_stays_valid(tiny, name):
    (tiny / "info.yaml").write_text(f"image_root: images\nclass_names: [a, {name}, b]\n")
    assert load_dataset(str(tiny)).class_names == ("a", name, "b")


def test_a_folder_name_in_info_yaml_that_yaml_reads_otherwise_is_refused(tiny, run_prepare):
    (tiny / "info.yaml").write_text("image_root: 007\n")
    outcome = run_prepare("check", tiny, "--output", tiny / "out")
    assert outcome.code == 2
    assert "info.yaml:1: image_root must be a text: 007 is read as 7" in outcome.err


# ---- Growing a dataset, copies ----


def write_scans(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    """Files 0.png, 1.png, ... per class folder: scans of different digits, from the `first` on."""
    scans = iter(load_digits().images[first:])
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        have = len(list((root / name).iterdir()))
        for i in range(have, have + count):
            Image.fromarray((next(scans) * 15).astype(np.uint8)).resize((16, 16)).save(root / name / f"{i}.png")
    return root


def sides_by_content(name: str) -> dict[bytes, str]:
    """{content of a listed image: its list}, read through the dataset."""
    dataset, sides = load_dataset(name), {}
    for split, images in dataset.lists.items():
        for i in range(len(images)):
            content = dataset.image_root.file(images.path(i)).read_bytes()
            assert content not in sides
            sides[content] = split
    return sides


def test_photos_and_a_class_added_later_leave_every_image_on_its_side(project, tmp_path, run_prepare):
    """20, 15 and 10 photos, of which min(10, half) are set aside: 10, 7 and 5. Then 6 more of `ape`, whose 10 stay; and
    6 of `ant`, which comes after the others though its name comes first: 3 of it."""
    photos = write_scans(tmp_path / "photos", {"ape": 20, "bat": 15, "cow": 10})
    assert run_prepare("own", "--from", photos, "--name", "zoo", "--workers", 0).code == 0
    before = sides_by_content("zoo")
    info = project / "data_lists/zoo/info.yaml"
    info.write_text("# ours\n" + info.read_text().replace("defaults:", "shot_split: {by: rank, many: 1, medium: 1, few: 1}"
                    " # three\ndefaults:"))  # fmt: skip
    write_scans(photos, {"ape": 6, "ant": 6}, first=100)

    refused = run_prepare("own", "--from", photos, "--extend", "zoo", "--workers", 0)
    assert refused.code == 2
    assert f"{info}: shot_split: " in refused.err
    assert "the sizes add up to 3, but there are 4 classes" in refused.err
    assert sides_by_content("zoo") == before
    info.write_text(info.read_text().replace("few: 1", "few: 2"))

    outcome = run_prepare("own", "--from", photos, "--extend", "zoo", "--workers", 0)
    assert outcome.code == 0, outcome.err
    assert "45 images are known and keep their side; 12 are new: train 9, test 3" in outcome.out
    assert "new classes, numbered after the others: 1, first 'ant'" in outcome.out
    assert "images: 57 found = 57 taken + 0 left out + 0 not looked at" in outcome.out
    after = sides_by_content("zoo")
    assert {content: after[content] for content in before} == before
    dataset = load_dataset("zoo")
    assert dataset.class_names == ("ape", "bat", "cow", "ant")
    assert np.bincount(dataset.lists["test"].labels).tolist() == [10, 7, 5, 3]
    assert dataset.images_per_class.tolist() == [16, 8, 5, 3]
    assert info.read_text().startswith("# ours\ndescription: train 32, test 25 images of 4 classes\n")
    assert "\nshot_split: {by: rank, many: 1, medium: 1, few: 2} # three\n" in info.read_text()


def photos_in(root: Path) -> Photos:
    names = sorted(p.name for p in root.iterdir())
    files = [[f.relative_to(root).as_posix() for f in sorted((root / name).iterdir())] for name in names]
    return Photos(root, names, {"train": files})


@pytest.mark.parametrize("seed", range(2))
def test_in_20_rounds_of_changes_no_image_ever_changes_side(project, tmp_path, seed):
    """Each round adds, removes, brings back, renames and relabels images, and adds a class now and then; contents are
    random bytes, listed without decoding. Every image is listed once, and no class's index changes."""
    draw, root, gone, ever = random.Random(seed), tmp_path / "photos", [], {}

    def add(content: bytes, to: str) -> None:
        (root / to).mkdir(parents=True, exist_ok=True)
        (root / to / f"{draw.randrange(10**9)}.png").write_bytes(content)

    for name in ("m", "n", "o"):
        for _ in range(draw.randrange(4, 12)):
            add(draw.randbytes(20), name)
    held_out, names = {"test": 4, "val": 2}, ()
    make_own(photos_in(root), "zoo", held_out, seed, decode=False, workers=0)
    for turn in range(20):
        sides = sides_by_content("zoo")
        assert sorted(sides) == sorted(file.read_bytes() for file in root.rglob("*.png"))
        assert {content: ever.get(content, side) for content, side in sides.items()} == sides
        ever |= sides
        dataset = load_dataset("zoo")
        assert dataset.class_names[: len(names)] == names
        names = dataset.class_names

        classes = [p.name for p in root.iterdir()]
        for _ in range(draw.randrange(6)):
            add(draw.randbytes(20), draw.choice(classes))
        for content in draw.sample(gone, len(gone) // 2):
            gone.remove(content)
            add(content, draw.choice(classes))
        if turn % 4 == 0:
            for _ in range(draw.randrange(2, 9)):
                add(draw.randbytes(20), f"{draw.choice('az')}{turn}")
        if turn % 5 == 0:
            move_all = sorted((root / draw.choice(classes)).iterdir())  # the names of a class are dealt out again
            contents = [file.read_bytes() for file in move_all]
            draw.shuffle(contents)
            for file, content in zip(move_all, contents, strict=True):
                file.write_bytes(content)
        for name in classes:
            files = [file for file in sorted((root / name).iterdir()) if ever.get(file.read_bytes()) != "train"]
            kept = [file for file in sorted((root / name).iterdir()) if ever.get(file.read_bytes()) == "train"]
            for file in draw.sample(files, len(files) // 4) + draw.sample(kept, (len(kept) - 1) // 3):
                gone.append(file.read_bytes())
                file.unlink()
        existing = "extend" if turn % 7 else "overwrite"
        if existing == "overwrite":
            names = ()
        make_own(photos_in(root), "zoo", dict.fromkeys(held_out), None, decode=False, workers=0, existing=existing)
    assert len(ever) > 80
    assert set(ever.values()) == {"train", "val", "test"}


def test_a_dataset_without_a_record_of_sides_gets_one_from_its_lists(project, tmp_path, run_prepare):
    photos = write_scans(tmp_path / "photos", {"ape": 20, "bat": 15})
    assert run_prepare("own", "--from", photos, "--name", "zoo", "--no-decode").code == 0
    before = sides_by_content("zoo")
    (project / "data_lists/zoo/sides.csv").unlink()
    shutil.copytree(photos, tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.png"):
        file.rename(file.with_name(f"x{file.name}"))
    outcome = run_prepare("own", "--from", tmp_path / "moved", "--extend", "zoo", "--no-decode")
    assert outcome.code == 0, outcome.err
    assert f"local.yaml: the image root is now {tmp_path / 'moved'}" in outcome.out
    assert sides_by_content("zoo") == before


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            lambda p: shutil.rmtree(p / "bat"),
            ["--extend", "zoo"],
            "class 'bat' has no readable training image; put some",
        ),
        (lambda p: None, ["--extend", "zoos"], r"--extend zoos: .*zoos does not exist; create it with --name zoos"),
        (lambda p: None, ["--name", "zoo"], "already exists; add images to it with --extend zoo"),
        (lambda p: None, ["--extend", "zoo", "--overwrite"], "--overwrite belongs to --name"),
        (lambda p: None, ["--name", "by_hand", "--overwrite"], "by_hand was not made by `own`; move it away"),
        (lambda p: None, ["--extend", "by_hand"], r"by_hand/info\.yaml states no class_names"),
        (
            lambda p: (shutil.rmtree(p), write_scans(p, {"ape": 5, "bat": 5}, first=300)),
            ["--extend", "zoo"],
            r"none of the 20 images that it lists is below .*--name zoo --overwrite",
        ),
        (
            lambda p: (p.parent / "project/data_lists/zoo/sides.csv").write_text("digest,split\n00,train\n"),
            ["--extend", "zoo"],
            r"sides\.csv:2: not the digest of one more image and its split; restore the file",
        ),
    ],
)
def test_a_dataset_that_cannot_be_extended_or_replaced_stays_as_it_is(
    project, tmp_path, run_prepare, change, arguments, message
):
    photos = write_scans(tmp_path / "photos", {"ape": 8, "bat": 8, "cow": 4})
    assert run_prepare("own", "--from", photos, "--name", "zoo", "--no-decode").code == 0
    make_dataset(project / "data_lists/by_hand", counts=(2, 2), test_images=1)
    change(photos)
    if message.startswith("none of"):
        for file in photos.rglob("*.png"):
            file.rename(file.with_name(f"x{file.name}"))
    lists = {file: file.read_bytes() for file in (project / "data_lists").rglob("*.*") if file.is_file()}
    outcome = run_prepare("own", "--from", photos, *arguments, "--no-decode")
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert {file: file.read_bytes() for file in lists} == lists
    assert not list((project / "data_lists").rglob(".new"))


def test_own_takes_one_of_several_copies_and_none_with_two_labels(project, tmp_path, run_prepare):
    """Of 12 + 8 + 6 photos with 3 + 2 + 2 to test: an ape of the test folder is in the training folder too, a bat is
    in the training folder three times, and one photo is both a bat and a cow."""
    root = tmp_path / "photos"
    write_scans(root / "train", {"ape": 12, "bat": 8, "cow": 6})
    write_scans(root / "test", {"ape": 3, "bat": 2, "cow": 2}, first=200)
    shutil.copy(root / "test/ape/1.png", root / "train/ape/same.png")
    for copy in ("4a.png", "4b.png"):
        shutil.copy(root / "train/bat/4.png", root / "train/bat" / copy)
    shutil.copy(root / "train/bat/7.png", root / "train/cow/wrong.png")
    outcome = run_prepare("own", "--from", root, "--name", "zoo", "--workers", 0)
    assert outcome.code == 0, outcome.err
    assert (
        "left out: copies of other images of the same class: 3, first 'train/ape/same.png', with the same content as "
        "'test/ape/1.png'" in outcome.out
    )
    assert (
        "left out: files with the same content as a file of another class: 2, first 'train/bat/7.png' (bat) and "
        "'train/cow/wrong.png' (cow)" in outcome.out
    )
    assert "images: 37 found = 32 taken + 5 left out" in outcome.out
    dataset = load_dataset("zoo")
    assert dataset.images_per_class.tolist() == [12, 7, 6]
    assert np.bincount(dataset.lists["test"].labels).tolist() == [3, 2, 2]
    outcome = run_prepare("check", "zoo", "--decode", "--near-copies", "--workers", 0, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.out


def test_the_side_that_an_image_has_been_on_beats_the_folder_that_it_is_found_in(project, tmp_path, run_prepare):
    root = tmp_path / "photos"
    write_scans(root / "train", {"ape": 6, "bat": 6})
    write_scans(root / "test", {"ape": 2, "bat": 2}, first=200)
    assert run_prepare("own", "--from", root, "--name", "zoo", "--no-decode").code == 0
    before = sides_by_content("zoo")
    (root / "train/ape/3.png").rename(root / "test/ape/moved.png")
    outcome = run_prepare("own", "--from", root, "--extend", "zoo", "--no-decode")
    assert outcome.code == 0, outcome.err
    assert re.search(r"keep the side .*: 1, first 'test/ape/moved\.png', which stays in train\n", outcome.out)
    assert sides_by_content("zoo") == before


def recompress(image: Image.Image, file: Path) -> None:
    image.save(file, "JPEG", quality=60)


def shrunk(image: Image.Image, file: Path) -> None:
    image.resize((image.width // 2, image.height // 2)).save(file, "PNG")


@pytest.mark.parametrize(
    ("copy", "near", "place", "expected"),
    [
        (None, False, "test/0/1.png", [("PROBLEM", "copies in train.txt and test.txt: 1")]),
        (None, False, "train/0/1.png", [("note    ", "copies within train.txt: 1")]),
        (None, False, "train/1/1.png", [("PROBLEM", "copies with two labels: 1")]),
        (
            None,
            False,
            "test/1/1.png",
            [("PROBLEM", "copies in train.txt and test.txt: 1"), ("PROBLEM", "copies with two labels: 1")],
        ),
        (recompress, False, "test/0/1.png", []),
        (recompress, True, "test/0/1.png", [("PROBLEM", "near-copies in train.txt and test.txt: 1")]),
        (shrunk, True, "test/0/1.png", [("PROBLEM", "near-copies in train.txt and test.txt: 1")]),
        (shrunk, True, "train/1/1.png", [("PROBLEM", "near-copies with two labels: 1")]),
        (shrunk, True, "train/0/1.png", [("note    ", "near-copies within train.txt: 1")]),
    ],
)
def test_check_finds_copies_by_content(tmp_path, run_prepare, copy, near, place, expected):
    """Crops of two photos from which nothing is repeated, but train/0/0.png under another name."""
    folder = make_dataset(tmp_path / "d", counts=(3, 2), test_images=2)
    images = folder / "images"
    for n, file in enumerate(sorted(images.rglob("*.png"))):
        pixels = load_sample_images().images[n % 2][(n // 2) * 90 % 300 :, n * 47 % 300 :][:120, :160]
        Image.fromarray(pixels).save(file)
    if copy:
        with Image.open(images / "train/0/0.png") as original:
            copy(original, images / place)
    else:
        shutil.copy(images / "train/0/0.png", images / place)
    flags = ["--decode", "--workers", 0, "--output", tmp_path / "out", *["--near-copies"] * near]
    outcome = run_prepare("check", folder, *flags)
    relation = "looks the same as" if copy else "has the same content as"
    found = re.findall(
        rf"(?m)^(\S+ +)\S+/t\w+\.txt:\d: '{place}' {relation} 'train/0/0\.png' at .*\((.*)\)", outcome.out
    )
    assert [(kind.strip(), group) for kind, group in found] == [(kind.strip(), group) for kind, group in expected]
    assert len(re.findall("copies (?:in|with)", outcome.out)) == len(expected), outcome.out
    assert outcome.code == any(kind == "PROBLEM" for kind, _ in expected)


def test_a_file_that_is_listed_twice_is_no_copy_as_well(tiny, tmp_path, run_prepare):
    with open(tiny / "test.txt", "a") as handle:
        handle.write("train/0/0.png 0\n")
    outcome = run_prepare("check", tiny, "--decode", "--near-copies", "--workers", 0, "--output", tmp_path / "out")
    assert "(duplicates in two lists: 1)" in outcome.out
    assert "copies in" not in outcome.out


def test_a_second_process_does_not_write_a_dataset_at_the_same_time(project, tmp_path, run_prepare):
    photos = write_scans(tmp_path / "photos", {"ape": 4, "bat": 4})
    folder = project / "data_lists/zoo"
    with locked(folder):
        outcome = run_prepare("own", "--from", photos, "--name", "zoo", "--no-decode")
    assert outcome.code == 2
    assert f"another process is using {folder}" in outcome.err
    assert not folder.exists()


def test_different_scans_of_the_same_digits_are_no_near_copies(tmp_path, run_prepare, project):
    photos = write_scans(tmp_path / "photos", {"a": 200, "b": 100})
    assert run_prepare("own", "--from", photos, "--name", "digits", "--no-decode").code == 0
    flags = ["--decode", "--near-copies", "--workers", 0, "--output", tmp_path / "out"]
    assert "copies" not in run_prepare("check", "digits", *flags).out


def test_images_that_take_long_to_decode_are_named_slowest_first(tiny, tmp_path):
    """With a limit of no time at all, every image is slow."""
    (tiny / "images/train/1/0.png").unlink()
    Image.effect_noise((1500, 1500), 50).save(tiny / "images/train/1/0.png")
    found = check(str(tiny), None, True, False, 0, tmp_path / "out", slow_seconds=0)
    assert re.search(
        r"\n?43 images took more than 0 s to decode, the slowest: \S+train\.txt:17 train/1/0\.png \(\d+\.\d s\), ",
        "\n".join(found.remarks),
    )
    assert not any("to decode" in remark for remark in check(str(tiny), None, True, False, 0, tmp_path / "o").remarks)


def test_places_that_cannot_be_written_do_not_cost_the_findings(tiny, tmp_path, run_prepare, caplog):
    """A folder in the place of bad_images.csv, then a file in that of the output folder too."""
    (tiny / "images/train/0/5.png").write_bytes(b"no image")
    (tiny / "bad_images.csv/x").mkdir(parents=True)
    outcome = run_prepare("check", tiny, "--decode", "--workers", 0, "--output", tmp_path / "out")
    assert outcome.code == 1
    assert "train/0/5.png: not an image" in outcome.out
    recorded = tmp_path / "out/tiny-bad_images.csv"
    assert recorded.read_text().splitlines()[1].startswith("train.txt,6,train/0/5.png,")
    assert outcome.err.count("cannot be written") == 1
    assert f"the bad images are in {recorded}" in outcome.err
    (tmp_path / "file").write_text("")
    outcome = run_prepare("check", tiny, "--decode", "--workers", 0, "--output", tmp_path / "file")
    assert outcome.code == 1
    assert "train/0/5.png: not an image" in outcome.out
    assert f"nor can {tmp_path / 'file/tiny-bad_images.csv'}" in outcome.err
    assert "the plot and counts per class are not written" in outcome.err


def test_own_and_shrink_find_out_first_that_lists_cannot_be_written(project, tmp_path, tiny, run_prepare, monkeypatch):
    photos = write_scans(tmp_path / "photos", {"ape": 4, "bat": 4})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESLT_LISTS", str(tmp_path / "file/data_lists"))
    for arguments in (
        ["own", "--from", photos, "--name", "zoo"],
        ["shrink", tiny, "--size", 8, "--output", tmp_path / "s"],
    ):
        outcome = run_prepare(*arguments, "--workers", 0)
        assert outcome.code == 2
        assert f"{tmp_path}/file/" in outcome.err
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "s").exists()


def test_the_command_that_own_prints_holds_what_suits_the_data(project, tmp_path, run_prepare):
    """60 and 4 scans, of which 10 and 2 are tested on: 50 and 2 remain, 25 to 1; batch 4 is the power of two below a
    tenth of 52, and its rate 0.05 * 4 / 128. Two classes give branches two different class sets, not three."""
    photos = write_scans(tmp_path / "photos", {"ape": 60, "bat": 4})
    outcome = run_prepare("own", "--from", photos, "--name", "two words", "--no-decode")
    assert outcome.code == 0, outcome.err
    command = outcome.out.splitlines()[-1]
    flags = "--data 'two words' --model resnet50 --pretrained --batch-size 4 --lr 0.0015625 --branches 2 --logit-adjust 1 --alpha 0.5"
    assert command == f"train with: accelerate launch train.py {flags}"
    config = resolve(shlex.split(flags)).config
    assert (config.model.model, config.model.pretrained, config.optim.batch_size) == ("resnet50", True, 4)
    assert (config.method.branches, config.method.logit_adjust, config.method.alpha) == (2, 1.0, 0.5)
    assert "3 branches, more than the 2 classes: class sets of branches coincide" in outcome.out
    assert "classes tested on fewer than 5 images: 1 of 2, first 'bat' on 2" in outcome.out
    assert yaml.safe_load((project / "data_lists/two words/info.yaml").read_text())["defaults"]["batch_size"] == 4


# ---- Strangers' files: recipes, info.yaml, run folders, checkpoints, folded files ----

EARLIER = Path(__file__).parent / "earlier_version"
EVIL_ARGUMENTS = [  # of timm.create_model and of models, each with what it would reach, as YAML or JSON
    ("checkpoint_path", "evil.pth"),  # a pickle
    ("pretrained_cfg", {"file": "evil.pth", "url": "https://evil.example/x.pth"}),
    ("pretrained_cfg_overlay", {"hf_hub_id": "evil/model"}),
    ("pretrained", True),
    ("cache_dir", "stolen"),
    ("features_only", True),
    ("out_indices", [0]),
    ("block", "os.system"),
    ("act_layer", "../evil.pth"),
    ("layers", {"__class__": "x"}),
    ("never_heard_of", 3),
]


class Pickled:
    """An object whose pickle creates a file when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """An empty working folder with a malicious pickle in it; `guarded()` asserts that nothing read it, wrote a file or
    opened a connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    torch.save({"state_dict": Pickled()}, "evil.pth")
    connected = []

    def refuse(self, address):
        connected.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))
    before = snapshot(tmp_path)

    def untouched() -> None:
        assert connected == []
        assert not (tmp_path / "executed").exists()
        assert {name: digest for name, digest in snapshot(tmp_path).items() if name in before} == before

    return untouched


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stranger_run(folder: Path, **changes) -> Path:
    """A run of an earlier version whose state.json states other settings, with digests that are right."""
    shutil.copytree(EARLIER / "run", folder)
    for place in (folder / "checkpoints").glob("*-*"):
        state = json.loads((place / "state.json").read_text())
        state["config"] |= changes
        (place / "state.json").write_text(json.dumps(state))
        names = [line.split("  ")[1] for line in (place / "SHA256SUMS").read_text().splitlines()]
        sums = [f"{hashlib.sha256((place / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (place / "SHA256SUMS").write_text("".join(sums))
    return folder


def stranger_folded(file: Path, **changes) -> Path:
    """A folded file whose metadata states something else."""
    with safe_open(EARLIER / "reslt_bn.safetensors", "pt") as opened:
        described = json.loads(opened.metadata()["reslt"])
    metadata = {"reslt": json.dumps(described | changes)}
    save_file(load_file(EARLIER / "reslt_bn.safetensors"), file, metadata=metadata)
    return file


def use_recipe(folder: Path, settings: dict, *flags: str):
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": "cifar_resnet20", "data": "digits_lt"} | settings))
    return resolve(["--recipe", "mine.yaml", *flags])


def use_dataset(folder: Path, settings: dict, *flags: str, data: str = "gift"):
    (folder / data).mkdir(exist_ok=True)
    (folder / data / "info.yaml").write_text(yaml.safe_dump({"defaults": {"model": "cifar_resnet20"} | settings}))
    return resolve(["--data", f"./{data}", *flags])


def use_per_model(folder: Path, settings: dict, *flags: str):
    return use_dataset(folder, {"per_model": {"cifar_resnet20": settings}}, *flags)


FILES = {  # source -> (use of a file that states these settings, the file that the message names)
    "recipe": (use_recipe, "mine.yaml"),
    "defaults": (use_dataset, "gift/info.yaml"),
    "per_model": (use_per_model, "gift/info.yaml"),
    "run": (lambda folder, settings: load_run(stranger_run(folder / "run", **settings)), "state.json"),
    "folded": (lambda folder, settings: load_folded(stranger_folded(folder / "f.safetensors", **settings)), "f.safe"),
}


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize(("name", "value"), EVIL_ARGUMENTS, ids=[name for name, _ in EVIL_ARGUMENTS])
def test_a_file_states_no_argument_of_a_model_but_its_architectures(name, value, source, tmp_path, guarded):
    use, file = FILES[source]
    with pytest.raises(UserError) as refused:
        use(tmp_path, {"model_kwargs": {"channels": [4, 8, 16], name: value}})
    assert re.search(
        rf"{file}.*: model_kwargs: '?{name}'?: .*(leave it out|--model-kwargs {name}=VALUE)", str(refused.value)
    )
    assert len(str(refused.value)) < 500
    guarded()


@pytest.mark.parametrize(
    "name", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "features_only", "cache_dir"]
)
def test_arguments_that_load_files_are_refused_even_if_typed(name, tmp_path, guarded):
    with pytest.raises(UserError, match=f"--model-kwargs: {name}: .*leave it out"):
        resolve(["--model-kwargs", f"{name}=evil.pth"])
    with pytest.raises(UserError, match=f"--model-kwargs: {name}: .*leave it out"):
        create_model("resnet18", 10, model_kwargs={name: "evil.pth"})
    guarded()


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("resnet18", {"layers": [1, 1, 1, 1], "stem_type": "deep", "output_stride": 16, "zero_init_last": False}),
        ("resnext50_32x4d", {"cardinality": 8, "base_width": 4, "global_pool": "avgmax"}),
        ("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg", "act_layer": "relu"}),
        ("deit_tiny_patch16_224", {"depth": 1, "init_values": 1e-4, "reg_tokens": 2}),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "window_size": 7, "mlp_ratio": 2.0}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": None}),
        ("efficientnet_b0", {"fix_stem": True, "output_stride": 16}),
        ("regnety_002", {"stem_width": 16, "se_ratio": 0.0}),
        ("mobilenetv3_small_050", {"head_bias": False, "global_pool": "avg"}),
        ("densenet121", {"growth_rate": 8, "block_config": [1, 1, 1, 1]}),
    ],
)
def test_architectures_of_the_usual_families_may_come_from_files(model, arguments, tmp_path, guarded):
    config = use_recipe(tmp_path, {"model": model, "model_kwargs": arguments}).config
    assert config["model_kwargs"] == arguments
    assert create_backbone(config.model, 7).num_classes == 7


def test_a_run_trained_with_an_unusual_argument_says_so_and_loads_if_it_is_typed_again(tmp_path, guarded):
    assert any("--model-kwargs blocks=2" in w for w in resolve(["--model-kwargs", "blocks=2"]).warnings)
    run = stranger_run(tmp_path / "run", model_kwargs={"channels": [4, 8, 16], "odd": 3})
    with pytest.raises(UserError, match=r"if you trust it, type it: --model-kwargs odd=VALUE"):
        load_run(run)
    with pytest.raises(UserError, match=r"cannot be created: .*'odd'"):  # timm's own: it was passed on
        load_run(run, model_kwargs={"odd": 3})
    assert Checkpoint.config(find(run), model_kwargs=["channels=8,8,8", "odd=4"])["model_kwargs"] == {
        "channels": (8, 8, 8),
        "odd": 4,
    }


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize(
    "model",
    ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:.", "evil/resnet18", "resnet18.evil/vit", "../evil.pth"],
)
def test_a_model_is_a_name_that_timm_knows_not_a_place(model, source, tmp_path, guarded):
    use, _ = FILES[source]
    with pytest.raises(UserError, match=f"timm has no model '{re.escape(model)}'"):
        create_backbone(use(tmp_path, {"model": model}).config.model, 10)
    guarded()


@pytest.mark.parametrize("source", ["run", "folded"])
def test_evaluating_reads_no_weights_but_those_of_the_file_itself(source, tmp_path, guarded):
    use, _ = FILES[source]
    asked = {
        "pretrained": True,
        "pretrained_file": "evil.pth",
        "resume": "auto",
        "overwrite": True,
        "log_with": "wandb",
    }
    model, described = use(tmp_path, asked | {"output": "evil.pth", "experiment": "../elsewhere"})
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert described["model"] == "cifar_resnet20"
    guarded()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": "3"}, "its num_classes is '3'"),
        ({"num_classes": 10**12}, "its num_classes is"),
        ({"img_size": None}, "its img_size is 'None'"),
        ({"experts": 2, "method": "ce", "use_experts": "all"}, "its use_experts is 'all'"),
        ({"model_kwargs": {"channels": [4, 8, 32]}}, "its weights do not fit"),
        ({"method": "evil"}, r"method \(.*'evil' is not one of"),
    ],
)
def test_folded_metadata_of_another_kind_is_one_message(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_folded(stranger_folded(tmp_path / "f.safetensors", **changes))


@pytest.mark.parametrize("source", ["recipe", "defaults", "per_model"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output", "elsewhere"),
        ("experiment", "victim"),
        ("overwrite", True),
        ("resume", "auto"),
        ("force_resume", True),
        ("log_with", "wandb"),
        ("data_dir", "/etc"),
        ("data", "digits_lt"),
        ("pretrained_file", "evil.pth"),
    ],
)
def test_a_file_does_not_choose_what_is_replaced_or_read_or_who_is_asked(key, value, source, tmp_path, guarded):
    use, file = FILES[source]
    if source == "recipe" and key in ("data", "pretrained_file"):  # the user named the recipe, which names these
        assert use(tmp_path, {key: value}).config[key] == value
        return
    with pytest.raises(
        UserError, match=rf"{file}: {key}: a file cannot set it; give it as a flag, --{key.replace('_', '-')}"
    ):
        use(tmp_path, {key: value})
    guarded()


def test_evaluate_refuses_a_strangers_run_before_anything_is_read(tmp_path, run_script, guarded):
    run = stranger_run(tmp_path / "run", model_kwargs={"checkpoint_path": "evil.pth"})
    outcome = run_script("evaluate", "--ckpt", run)
    assert outcome.code == 2
    assert "state.json: model_kwargs: checkpoint_path: --pretrained-file names a file of weights" in outcome.err
    guarded()


def test_timm_reads_a_downloaded_pickle_with_weights_only_even_on_its_second_attempt(tmp_path, guarded, monkeypatch):
    """With a file that makes the first attempt raise TypeError, timm asks for all objects; torch refuses them."""
    import timm.models._builder as builder

    first = []

    def download(url, **arguments):
        if not first:
            first.append(url)
            raise TypeError("unexpected keyword argument 'weights_only'")
        return torch.load("evil.pth", weights_only=False)

    monkeypatch.setattr(builder, "load_state_dict_from_url", download)
    monkeypatch.setattr(builder, "_resolve_pretrained_source", lambda cfg: ("url", "https://timm.example/x.pth"))
    with pytest.raises(UserError, match="cannot be created"):
        create_model("resnet18", 10, pretrained=True)
    assert first
    guarded()


@pytest.mark.parametrize(
    "source", ["https://evil.example/lists", "http://raw.githubusercontent.com/x", "file:///etc", "ftp://evil.example",
               "https://raw.githubusercontent.com@evil.example"]
)  # fmt: skip
def test_a_dataset_names_no_host_to_fetch_lists_from(source, project, run_prepare, guarded):
    folder = project / "data_lists/gift"
    folder.mkdir()
    lists = {"train": {"file": "passwd", "lines": 1, "blob": "0" * 40}}
    (folder / "info.yaml").write_text(yaml.safe_dump({"published": {"source": source, "lists": lists}}))
    outcome = run_prepare("gift")
    assert outcome.code == 2
    assert "lists are fetched only from https://raw.githubusercontent.com/" in outcome.err
    guarded()


@pytest.mark.parametrize(
    ("prepare", "is_shown"),
    [("places_lt", True), ("cifar100 --imb-factor 0.01", True), ("own; rm -rf ~", False), ("$(id)", False),
     ("x\nerror: y", False), (["own"], False)],
)  # fmt: skip
def test_a_command_out_of_info_yaml_is_shown_only_if_it_is_harmless_to_paste(prepare, is_shown, tmp_path):
    (tmp_path / "info.yaml").write_text(yaml.safe_dump({"prepare": prepare}))
    with pytest.raises(UserError) as refused:
        load_dataset(str(tmp_path))
    assert (f"python -m reslt.prepare {prepare}" in str(refused.value)) == is_shown
    assert is_shown or "python -m reslt.prepare own --from FOLDER" in str(refused.value)


@pytest.mark.parametrize("what", ["log", "checkpoints"])
def test_a_strangers_run_that_is_resumed_writes_and_deletes_nothing_elsewhere(what, tmp_path, monkeypatch):
    mine, theirs = stranger_run(tmp_path / "mine"), stranger_run(tmp_path / "theirs")
    (tmp_path / "bashrc").write_text("mine\n")
    if what == "log":
        (theirs / "train.log").symlink_to(tmp_path / "bashrc")
    else:
        shutil.rmtree(theirs / "checkpoints")
        (theirs / "checkpoints").symlink_to(mine / "checkpoints")
    before = snapshot(tmp_path)
    with (
        pytest.raises(UserError, match=f"{'train.log' if what == 'log' else 'checkpoints'}: it is a link"),
        open_run(theirs, {}, False, ALONE),
    ):
        pass
    assert snapshot(tmp_path) == before | {str(tmp_path / ".theirs.lock"): b""}


# ---- What --overwrite may delete ----

OURS = [
    "config.yaml", "summary.csv", "train.log", "result.json", "result-other-test.json", "per_class.csv",
    "per_class-other-test.csv", ".123.result.json", "checkpoints/last", "checkpoints/best",
    "checkpoints/1-3/model.safetensors", "checkpoints/1-3/ema.safetensors", "checkpoints/1-3/optimizer.safetensors",
    "checkpoints/1-3/processes.safetensors", "checkpoints/1-3/state.json", "checkpoints/1-3/SHA256SUMS",
    "checkpoints/.99.2-6/model.safetensors", "name/events.out.tfevents.1700000000.host.1.0",
    "name/1700000000.5/hparams.yml", "wandb/run-20260101_101010-abcd/files/x.json", "wandb/debug-internal.log",
]  # fmt: skip


def make_run(folder: Path, names=OURS) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    (folder / "config.yaml").write_text("config: {model: resnet18}\nversions: {torch: '2'}\n")
    return folder


def replace(run: Path) -> None:
    """What --overwrite does, with a run that writes one checkpoint."""
    with open_run(run, {"config": {}}, True, ALONE):
        (run / "checkpoints/5-5").mkdir()


def test_overwriting_removes_all_that_a_run_and_its_trackers_write(tmp_path):
    run = make_run(tmp_path / "run")
    replace(run)
    assert sorted(path.relative_to(run).as_posix() for path in run.rglob("*")) == [
        "checkpoints", "checkpoints/5-5", "config.yaml"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


@pytest.mark.parametrize(
    "other",
    ["notes.txt", "photos/a.jpg", "checkpoints/backup/model.safetensors", "checkpoints/1-3/notes.txt", "checkpoints/x",
     "name/notes.txt", "wandb/notes.txt", "folded.safetensors", "result.json.bak", "name/sub/sub/events.out.tfevents.1"],
)  # fmt: skip
def test_overwriting_stops_at_anything_else_and_names_it(other, tmp_path):
    run = make_run(tmp_path / "run", [*OURS, other])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="--overwrite deletes only what a run writes") as refused:
        replace(run)
    assert other.partition("/")[0] in str(refused.value)
    assert {name: content for name, content in snapshot(tmp_path).items() if "lock" not in name} == before


def test_of_many_other_files_three_are_named_and_the_rest_counted(tmp_path):
    run = make_run(tmp_path / "run", [*OURS, *(f"notes{i:05d}.txt" for i in range(500))])
    with pytest.raises(UserError, match=r"contains notes00000.txt, notes00001.txt, notes00002.txt and 497 more; move"):
        replace(run)


@pytest.mark.parametrize("link", ["train.log", "data", "checkpoints", "checkpoints/1-3"])
def test_overwriting_stops_at_a_link_and_leaves_its_target_alone(link, tmp_path):
    target = make_run(tmp_path / "target")
    run = make_run(tmp_path / "run", ["summary.csv"])
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(target)
    with pytest.raises(UserError, match=f"also contains {link}"):
        replace(run)
    assert (target / "summary.csv").read_text() == "old"


@pytest.mark.parametrize("config", [None, "name: my other project\n", "config: 3\n", "{"])
def test_overwriting_replaces_no_folder_that_is_not_a_run(config, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink() if config is None else (run / "config.yaml").write_text(config)
    before = snapshot(run)
    with pytest.raises(UserError, match="this is not the folder of one"):
        replace(run)
    assert snapshot(run) == before


@pytest.mark.parametrize("which", ["run", "output"])
def test_a_link_to_a_run_stays_a_link(which, tmp_path):
    real = make_run(tmp_path / "disk/run")
    link = tmp_path / "link"
    link.symlink_to(real if which == "run" else real.parent)
    replace(link if which == "run" else link / "run")
    assert link.is_symlink()
    assert sorted(path.name for path in real.iterdir()) == ["checkpoints", "config.yaml"]
    assert sorted(path.name for path in real.parent.iterdir()) == [".run.lock", "run"]


@pytest.mark.parametrize("is_link", [False, True])
def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_back(is_link, tmp_path):
    run = make_run(tmp_path / "disk/run")
    before = snapshot(run)
    if is_link:
        (tmp_path / "link").symlink_to(run)
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "link" if is_link else run, {"config": {}}, True, ALONE):
        1 / 0  # noqa: B018
    assert snapshot(run) == before
    assert not is_link or (tmp_path / "link").is_symlink()


def test_the_runs_of_tensorboard_may_be_overwritten(tmp_path):
    """What Accelerate's tracker and torch write, not what this test takes them to."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    run = make_run(tmp_path / "run", ["summary.csv"])
    writer = tensorboard.SummaryWriter(run / "anything")
    writer.add_scalar("loss", 1.0)
    writer.close()
    replace(run)
    assert not (run / "anything").exists()


# ---- Text from data ----

HOSTILE = {  # what a terminal or a reader would make of a name, and how it is printed
    "\x1b[2J\x1b[31mcat": r"\x1b[2J\x1b[31mcat",
    "cat\x07\x08\x7f": r"cat\x07\x08\x7f",
    "cat\x9b2J": r"cat\x9b2J",
    "cat\u202etac": r"cat\u202etac",
    "\u2066cat\u2069": r"\u2066cat\u2069",
    "cat\rerror: x": r"cat\rerror: x",
    "cat\u2028error": r"cat\u2028error",
    "caf\u00e9 \u5927\u718a\u732b \U0001f98a": "caf\u00e9 \u5927\u718a\u732b \U0001f98a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_command_prints_control_characters(name, capsys, monkeypatch, tmp_path):
    """Printed, logged, warned of, raised as an error of either kind, and written to train.log."""

    @entry_point
    def command(how: str) -> None:
        print(f"class {name}\tits tab, and\nits next line")
        with logged_to(tmp_path / "train.log"):
            logger.info(name)
            logger.warning(name)
        raise UserError(name) if how == "user" else OSError(2, "no such file", name)

    for how in ("user", "system"):
        with pytest.raises(SystemExit):
            command(how)
        out, err = capsys.readouterr()
        shown = HOSTILE[name]
        assert out == f"class {shown}\tits tab, and\nits next line\n{shown}\n"
        assert err == f"warning: {shown}\nerror: {shown}{': no such file' if how == 'system' else ''}\n"
    assert re.sub(r"(?m)^.{23} (INFO|WARNING|ERROR) ", "", (tmp_path / "train.log").read_text()) == f"{shown}\n" * 4


@pytest.mark.parametrize("name", [name for name in (*HOSTILE, "a\nb", "a\tb") if name.isprintable() is False])
def test_class_names_with_control_characters_are_refused_by_every_door(name, tiny, project, run_prepare):
    (tiny / "info.yaml").write_text(yaml.safe_dump({"image_root": "images", "class_names": ["a", "b", name]}))
    with pytest.raises(UserError, match=r"info.yaml: class_names: .* contains a control character") as refused:
        load_dataset(str(tiny))
    assert name not in str(refused.value)
    rows = [{"file": f"train/{c}/{i}.png", "label": c} for c in (0, 1) for i in range(4)]
    table = pd.DataFrame(rows).assign(label=lambda t: t["label"].map({0: "a", 1: name}))
    table.to_csv(tiny / "table.csv", index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
    flags = ("--image-column", "file", "--label-column", "label", "--data-dir", tiny / "images", "--name", "mine")
    outcome = run_prepare("own", "--csv", tiny / "table.csv", *flags, "--no-decode")
    assert outcome.code == 2
    assert "contains a control character" in outcome.err
    assert not (project / "data_lists/mine").exists()


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"), ("+1", "'+1"), ("-1+1", "'-1+1"), ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t'=1"), ("\r=1", "'\r'=1"), ("x;=1", "x;'=1"), ("x\n=1", "x\n'=1"), ("a-b = c@d", "a-b = c@d"),
        ("great auk", "great auk"), ("", ""),
    ],
)  # fmt: skip
def test_a_cell_of_data_is_no_formula_in_any_countrys_spreadsheet(text, cell):
    assert csv_cell(text) == cell


def test_every_csv_file_that_is_written_contains_no_formula_and_bad_images_are_still_recognised(
    tmp_path, run_prepare, run_script
):
    """Class names and file names of formulas: train, evaluate and check write five files."""
    folder = make_dataset(tmp_path / "tiny")
    names = ["=1+1", "@SUM(A1)", "-2"]
    (folder / "images/train/0/=1.png").write_bytes(b"no image")
    (folder / "train.txt").write_text((folder / "train.txt").read_text() + "train/0/=1.png 0\n=x.png 1\n")
    (folder / "images/=x.png").write_bytes(b"none either")
    (folder / "info.yaml").write_text(yaml.safe_dump({"image_root": "images", "class_names": names}))
    outcome = run_prepare("check", folder, "--decode", "--output", tmp_path / "out", "--workers", 0)
    assert outcome.code == 1
    run = stranger_run(tmp_path / "run", data=str(folder))
    flags = ("--workers", 0, "--bad-images", "skip")
    assert run_script("evaluate", "--ckpt", run, "--data", folder, *flags).code == 0
    (per_class,) = run.glob("per_class-*.csv")
    for file in (folder / "bad_images.csv", tmp_path / "out/tiny-images_per_class.csv", per_class):
        cells = [cell for row in csv.reader(file.read_text().splitlines()) for cell in row]
        assert [cell for cell in cells if cell[:1] in tuple("=+@\t\r") or cell == "-2"] == [], file
        assert "'=1+1" in cells or "'=x.png" in cells, file
    dataset = load_dataset(str(folder), bad_images="skip")
    assert dataset.left_out == {"train": ("train/0/=1.png", "=x.png")}
    recorded = (folder / "bad_images.csv").read_text()
    (folder / "bad_images.csv").write_text(recorded.replace("'=x.png", "=x.png"))  # as earlier versions wrote it
    assert load_dataset(str(folder), bad_images="skip").left_out == dataset.left_out


@pytest.mark.parametrize("key", ["image_root", "images"])
def test_places_with_line_breaks_are_refused(key, tmp_path):
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 1\n")
    (tmp_path / "info.yaml").write_text(yaml.safe_dump({key: "x\nerror: forged"}))
    with pytest.raises(UserError) as refused:
        load_dataset(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["data", "model", "opt", "aa", "pretrained_file"])
def test_settings_with_control_characters_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        use_recipe(tmp_path, {name: "digits_lt\nerror: forged\x1b"})
    assert "\x1b" not in str(refused.value)
    assert not re.search("(?m)^error: forged", str(refused.value))


# ---- Two processes at once ----


def at_once(count: int, work) -> list:
    """Call `work(i)` in threads that start together -> results or exceptions, in order. (A lock of `locked` is held by
    one lock object, so threads wait for each other as processes do.)"""
    barrier, outcomes = threading.Barrier(count), [None] * count

    def run(i: int) -> None:
        barrier.wait()
        try:
            outcomes[i] = work(i)
        except Exception as fault:
            outcomes[i] = fault

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: (inode, mtime)}: a file that was replaced, even by the same content, has others."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def two_first_uses(tmp_path_factory) -> tuple[Path, list, int]:
    """A folder of the embedded dataset that two trainings needed at the same moment -> it, their outcomes, images saved."""
    root, saved, save = tmp_path_factory.mktemp("project"), [], Image.Image.save
    (root / "data_lists").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RESLT_LISTS", str(root / "data_lists"))
        patched.setattr(Image.Image, "save", lambda self, *a, **k: saved.append(1) or save(self, *a, **k))
        return root, at_once(2, lambda _: subsets.make_if_embedded("digits_lt")), len(saved)


@pytest.fixture
def digits(two_first_uses, monkeypatch) -> Path:
    monkeypatch.setenv("RESLT_LISTS", str(two_first_uses[0] / "data_lists"))
    return two_first_uses[0] / "data/digits_lt"


def test_two_trainings_that_start_at_the_same_moment_create_the_embedded_dataset_once(digits, two_first_uses):
    _, outcomes, saved = two_first_uses
    assert (outcomes, saved) == ([None, None], 276 + 797)
    dataset = load_dataset("digits_lt")
    assert {split: len(images) for split, images in dataset.lists.items()} == {"train": 276, "test": 797}
    assert len(list(digits.rglob("*.png"))) == saved


def test_no_image_of_the_embedded_dataset_is_replaced_under_a_running_training(digits, run_prepare):
    """Missing and empty ones are added, if a list is missing or the command is given."""
    lost, empty = (sorted(digits.rglob("*.png"))[i] for i in (3, 300))
    for again in (lambda: run_prepare("digits_lt").code or None, lambda: subsets.make_if_embedded("digits_lt")):
        before = state_of(digits)
        lost.unlink()
        empty.write_bytes(b"")
        (digits.parents[1] / "data_lists/digits_lt/train.txt").unlink()
        assert again() is None
        after = state_of(digits)
        assert {path for path in before if before[path] != after[path]} == {
            str(path.relative_to(digits)) for path in (lost, empty)
        }
        assert empty.stat().st_size > 0


def test_folders_of_a_users_own_with_the_name_of_the_embedded_dataset_stay(project, run_prepare):
    lists, images = project / "data_lists/digits_lt", project / "data/digits_lt"
    for folder in (lists, images):
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    (lists / "train.txt").write_text("mine.png 0\n")
    before = state_of(project)
    subsets.make_if_embedded("digits_lt")  # there is no test.txt
    assert state_of(project) == before
    refused = run_prepare("digits_lt")
    assert refused.code == 2
    assert "train.txt: this is not the list of the embedded dataset; rename its folder to keep it" in refused.err
    assert state_of(project) == before


CREATED = {
    "own": ("own", "--from", "{photos}/train", "--no-decode", "--name", "mine"),
    "longtail": ("longtail", "--from", "{photos}", "--imb-factor", 0.5, "--name", "mine"),
    "shrink": ("shrink", "tiny", "--size", 8, "--output", "{work}/small", "--workers", 0, "--name", "mine"),
}


@pytest.mark.parametrize("command", CREATED)
def test_a_dataset_that_another_process_is_creating_is_refused_and_an_existing_one_is_not_replaced(
    command, project, run_prepare, tmp_path
):
    tiny = make_dataset(project / "data_lists/tiny")
    arguments = [str(part).format(photos=tiny / "images", work=tmp_path) for part in CREATED[command]]
    mine = project / "data_lists/mine"
    (mine.parent / ".77-0123abcd.mine").mkdir()  # of a process that was killed
    with locked(mine):
        refused = run_prepare(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert f"another process is using {mine}; wait for it to end, or stop it" in refused.err
    assert not mine.exists()
    assert run_prepare(*arguments).code == 0
    assert [path for path in project.rglob(".*") if path.suffix != ".lock"] == []
    before = state_of(project)
    assert len([path for path in before if path.startswith("data_lists/mine/")]) >= 3
    if command != "shrink":  # which continues
        again = run_prepare(*arguments)
        assert again.code == 2
        assert "mine already exists; " in again.err
    assert state_of(project) == before


def test_of_two_processes_that_create_a_folder_one_ends_with_its_own_content(project):
    def create(i: int) -> None:
        with new_dataset("mine") as folder:
            for name in ("info.yaml", "train.txt"):
                (folder / name).write_text(str(i))

    outcomes = at_once(2, create)
    (lost,) = [outcome for outcome in outcomes if outcome is not None]
    assert isinstance(lost, UserError)
    written = {path.read_text() for path in (project / "data_lists/mine").iterdir()}
    assert written == {str(outcomes.index(None))}


def test_what_waits_says_for_whom_and_goes_on_when_the_other_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.05)
    order = []

    def work(i: int) -> None:
        with locked(tmp_path / "data", waits=True):
            order.append(i)
            time.sleep(0.3)
            order.append(i)

    at_once(2, work)
    assert order in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert caplog.messages == [f"waiting: another process is using {tmp_path / 'data'}"]


def test_a_folder_is_replaced_only_if_that_is_asked_for_and_the_old_one_stays_until_the_new_one_is_there(
    tmp_path, monkeypatch
):
    folder, rename = tmp_path / "1-3", os.rename
    folder.mkdir()
    (folder / "old").write_text("mine")

    def write(**how) -> None:
        with atomic_folder(folder, **how) as temporary:
            (temporary / "new").write_text("")

    with pytest.raises(FileExistsError) as refused:
        write()
    assert refused.value.filename == str(folder)

    def no_new_one(source, target) -> None:
        if Path(target) == folder and (Path(source) / "new").exists():
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    with monkeypatch.context() as failing:
        failing.setattr(os, "rename", no_new_one)
        with pytest.raises(OSError, match="Input/output error"):
            write(replaces=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["1-3", "old"]
    write(replaces=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["1-3", "new"]


def test_of_unfinished_files_only_those_of_killed_processes_are_removed(tmp_path):
    names = [".77.old", ".77-0123abcd.dead", ".77-0123abcd.alive", ".77", "77.mine", ".gitignore", ".mine.lock"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / ".88.folder/deep").mkdir(parents=True)
    with locked(tmp_path / "alive"):
        sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".alive.lock"} - {".77.old", ".77-0123abcd.dead"}


def test_an_image_that_was_replaced_in_the_source_is_shrunk_again(project, run_prepare, tmp_path):
    """By a newer one, and by one with old times, as `cp -p` and archives leave them."""
    tiny = make_dataset(project / "data_lists/tiny")
    command = ("shrink", "tiny", "--size", 8, "--output", tmp_path / "small", "--workers", 0)
    assert run_prepare(*command).code == 0
    newer, older = (tiny / f"images/train/0/{i}.png" for i in range(2))
    before = state_of(tmp_path / "small")
    (tmp_path / "small/train/1/.77-0123abcd.5.png").write_bytes(b"half of it")  # by a process that was killed
    for image, times in ((newer, None), (older, (1e9, 1e9))):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(image)
        os.utime(image, times)
    again = run_prepare(*command)
    assert again.code == 0
    assert f"{28 + 15 - 2} already there" in again.out
    assert "2 shrunk" in again.out
    after = state_of(tmp_path / "small")
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {"train/0/0.png", "train/0/1.png"}
    for path in ("train/0/0.png", "train/0/1.png"):
        assert np.asarray(Image.open(tmp_path / "small" / path)).max() == 9


# ---- Caches ----


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RESLT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(log, "_WARNED", set())
    return tmp_path / "cache"


def listed(folder: Path) -> ListedImages:
    dataset = load_dataset(str(folder))
    return ListedImages(dataset.lists["train"], dataset.image_root, pil_to_tensor, None)


def read_directly(folder: Path) -> np.ndarray:
    """The training images by Pillow alone."""
    paths = [line.split()[0] for line in (folder / "train.txt").read_text().splitlines()]
    return np.stack([np.asarray(Image.open(folder / "images" / path)).transpose(2, 0, 1) for path in paths])


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


DAMAGES = {
    "a pixel": lambda whole: flip(whole, len(whole) - 1000),
    "the last byte": lambda whole: flip(whole, len(whole) - 1),
    "its own digest": lambda whole: flip(whole, 3),
    "truncated": lambda whole: whole[: len(whole) // 2],
    "longer": lambda whole: whole + whole[-768:],
    "zeros, as after a power failure": lambda whole: bytes(len(whole)),
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_decoded_again(damage, tiny, cache):
    wanted = read_directly(tiny)
    assert np.array_equal(pixels(listed(tiny), "as is", 0), wanted)
    (file,) = cache.glob("*.pixels")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(pixels(listed(tiny), "as is", 0), wanted)
    assert file.read_bytes() == whole


def test_truncating_the_cache_under_a_run_changes_nothing(tiny, cache):
    """A mapped file would end the process by SIGBUS."""
    for _ in range(2):  # decoded, then read
        found = pixels(listed(tiny), "as is", 0)
        (file,) = cache.glob("*.pixels")
        whole = file.read_bytes()
        os.truncate(file, 0)
        assert np.array_equal(found, read_directly(tiny))
        file.write_bytes(whole)


def test_a_run_trains_on_the_images_whatever_its_cache_contains(tiny, tmp_path, cache, run_script):
    """Another list's file under this list's name, and one of these images with every pixel inverted."""
    flags = ("--data", tiny, *TINY_FLAGS, "--data-on-device", "on", "--epochs", 1, "--output", tmp_path, "--experiment")
    rows = []
    for name in ("first", "inverted", "exchanged"):
        files = sorted(cache.glob("*.pixels"))
        if name == "inverted":
            for file in files:
                file.write_bytes(file.read_bytes()[:200] + bytes(255 - b for b in file.read_bytes()[200:]))
        if name == "exchanged":
            contents = [file.read_bytes() for file in files]
            for file, content in zip(files, contents[::-1], strict=True):
                file.write_bytes(content)
        trained = run_script("train", *flags, name)
        assert trained.code == 0, trained.err
        with open(tmp_path / name / "summary.csv", newline="") as handle:
            rows += [
                {k: v for k, v in row.items() if k not in ("images_per_second", "waiting")}
                for row in csv.DictReader(handle)
            ]
    assert len(files) == 2  # train, test
    assert rows[0] == rows[1] == rows[2]


def test_two_runs_that_need_the_same_images_decode_them_once(tiny, cache, monkeypatch):
    decoded, decode = [], pixel_cache._decoded

    def counted(*arguments):
        decoded.append(1)
        time.sleep(0.1)
        return decode(*arguments)

    monkeypatch.setattr(pixel_cache, "_decoded", counted)
    for found in at_once(2, lambda _: pixels(listed(tiny), "as is", 0)):
        assert np.array_equal(found, read_directly(tiny))
    assert len(decoded) == 1


def test_without_a_home_folder_images_are_decoded_every_time(tiny, monkeypatch):
    for name in ("RESLT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert cache_folder() is None
    assert np.array_equal(pixels(listed(tiny), "as is", 0), read_directly(tiny))


# ---- What is not essential does not end a run; invariants are checked where numbers are used ----


@pytest.fixture(scope="module")
def run_of_two_epochs(tmp_path_factory) -> Path:
    """work/: tiny/ (a dataset), run/ (trained on it)."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(EARLIER / "run", work / "run")
    make_dataset(work / "tiny")
    return work


def error(number: int, file="") -> OSError:
    return OSError(number, os.strerror(number), str(file))


NOT_ESSENTIAL = {
    "an old checkpoint": "1-3: this old checkpoint cannot be removed: Permission denied",
    "fsync of a folder": "the file system cannot flush a folder to disk (Invalid argument)",
    "summary.csv": "summary.csv: it cannot be written: No space left on device",
    "a tracker": "--log-with: ConnectionError: no network; its record may lack values",
    "the cache": "decoded images cannot be kept there (Not a directory)",
}


def test_what_is_not_essential_costs_one_warning_and_no_result(tiny, tmp_path, run_script, monkeypatch):
    flags = ("--data", tiny, *TINY_FLAGS, "--epochs", 3, "--checkpoint-hist", 1, "--output", tmp_path, "--experiment")
    whole = run_script("train", *flags, "whole")
    monkeypatch.setattr(log, "_WARNED", set())
    fsync = os.fsync

    def no_fsync_of_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise error(errno.EINVAL)
        fsync(descriptor)

    def no_rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise error(errno.EACCES, path)

    def no_tracker(*_, **__):
        raise ConnectionError("no network")

    def no_summary(file, text):
        raise error(errno.ENOSPC, file)

    monkeypatch.setattr(os, "fsync", no_fsync_of_folders)
    monkeypatch.setattr(run_folder.shutil, "rmtree", no_rmtree)
    monkeypatch.setattr("accelerate.Accelerator.log", no_tracker)
    monkeypatch.setattr(summary, "write_atomically", no_summary)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESLT_CACHE", str(tmp_path / "file/cache"))
    hindered = run_script("train", *flags, "hindered")
    assert hindered.code == 0, hindered.err
    for text in NOT_ESSENTIAL.values():
        assert hindered.err.count(text) == 1, text
    assert hindered.err.count("warning: ") == whole.err.count("warning: ") + len(NOT_ESSENTIAL)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "hindered")]
    assert results[1] == results[0]
    kept = sorted(path.name for path in (tmp_path / "hindered/checkpoints").iterdir())
    assert kept == ["1-3", "2-6", "3-9", "last"]


def test_a_result_that_cannot_be_written_is_printed_before_the_error(tiny, tmp_path, run_script, monkeypatch):
    def full(file, text):
        raise error(errno.ENOSPC, file)

    monkeypatch.setattr(tables, "write_atomically", full)
    trained = run_script(
        "train", "--data", tiny, *TINY_FLAGS, "--epochs", 1, "--output", tmp_path, "--experiment", "run"
    )
    assert trained.code == 2
    assert f"{tmp_path / 'run/result.json'}: No space left on device" in trained.err
    assert re.search(r"the last epoch: tiny, test list \(15 images\)[^§]*reslt \(fused\)", trained.out)
    assert "accuracy per class" in trained.out


@pytest.mark.parametrize(
    ("bad", "values", "message"),
    [
        ("classifier", 3e38, r"test\.txt: the model's logits are not finite for 15 of 15 images"),
        ("classifier", float("nan"), r"model\.safetensors: backbone\.fc\.weight is not finite; use another checkpoint"),
        ("running_var", float("inf"), r"model\.safetensors: \S+running_var is not finite; use another checkpoint"),
    ],
)
def test_numbers_that_are_not_finite_end_an_evaluation(bad, values, message, run_of_two_epochs, tmp_path, run_script):
    run = tmp_path / "run"
    shutil.copytree(run_of_two_epochs / "run", run)
    found = find(run)
    tensors = found.tensors("model")
    name = "backbone.fc.weight" if bad == "classifier" else next(name for name in tensors if name.endswith(bad))
    tensors[name].fill_(values)
    checkpoint.write(found.folder, {"model": tensors}, found.state, replaces=True)
    before = state_of(run)
    evaluated = run_script(
        "evaluate", "--ckpt", run, "--data", run_of_two_epochs / "tiny", "--fold", tmp_path / "f.safetensors"
    )
    assert evaluated.code == 2
    assert re.search(message, evaluated.err), evaluated.err
    assert state_of(run) == before
    assert not (tmp_path / "f.safetensors").exists()
    if values != 3e38:  # finite weights are loaded, their logits are the caller's
        with pytest.raises(UserError, match=message):
            load_run(run)


def test_logits_that_are_not_finite_end_a_run_only_after_its_last_epoch(capsys):
    def measure(split: str, epochs_done: int) -> str:
        if split == "val":
            raise NotFiniteError("val.txt: the model's logits are not finite")
        return f"{split} {epochs_done}"

    run = SimpleNamespace(settings={"epochs": 3})
    log.log_to_console()
    assert Run.evaluate(run, measure, ["val", "test"], 2) == {"test": "test 2"}
    assert "warning: val.txt: the model's logits are not finite; training continues" in capsys.readouterr().err
    with pytest.raises(NotFiniteError):
        Run.evaluate(run, measure, ["val", "test"], 3)


def test_images_with_a_logit_that_is_not_finite_are_counted_in_each_branch_and_expert():
    logits = torch.zeros(2, 3, 5, 4)  # E, K, N, C
    logits[0, 0, 1, 2], logits[1, 2, 1, 0], logits[1, 1, 4, 3] = float("nan"), float("inf"), -float("inf")
    hits = ClassHits((2, 3), 4, torch.device("cpu"))
    for given in (logits, logits[:, :, 2:4], logits[:, :, :2]):
        hits.update(given, torch.zeros(given.shape[2], dtype=torch.int64))
    assert int(hits.not_finite) == 2 + 0 + 1


def test_folded_weights_that_compute_other_logits_are_not_written(run_of_two_epochs, tmp_path, run_script, monkeypatch):
    def wrong(classifier, branches):
        classifier.bias.add_(torch.tensor([0.5, 0.0, 0.0]))

    monkeypatch.setattr(fold, "_into_classifier", wrong)
    run, out = run_of_two_epochs / "run", tmp_path / "f.safetensors"
    evaluated = run_script(
        "evaluate", "--ckpt", run, "--data", run_of_two_epochs / "tiny", "--output", tmp_path, "--fold", out
    )
    assert evaluated.code == 2
    assert "the folded weights do not compute the model's logits" in evaluated.err
    assert not out.exists()
    with pytest.raises(UserError, match="do not compute the model's logits"):
        load_run(run)


def test_a_folded_file_with_a_number_that_is_not_finite_is_not_loaded(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    given, file = EARLIER / "reslt_bn.safetensors", tmp_path / "folded.safetensors"
    with safe_open(given, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(given)
    tensors["fc.bias"][1] = float("nan")
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"folded\.safetensors: fc\.bias is not finite"):
        fold.load_folded(file)


REFUSED_OUTPUTS = {
    "weights": ("--fold", "run/checkpoints/2-6/model.safetensors", "inside {run}/checkpoints/2-6, which only"),
    "more weights": ("--fold", "run/checkpoints/2-6/folded.safetensors", "inside {run}/checkpoints/2-6, which only"),
    "among checkpoints": ("--fold", "run/checkpoints/f.safetensors", "inside {run}/checkpoints, which only training"),
    "by a link": (
        "--fold",
        "link/2-6/folded.safetensors",
        "inside {run}/checkpoints/2-6, which only training writes to",
    ),
    "another file": ("--fold", "mine.safetensors", "it exists and is not a file of folded weights; give another name"),
    "results in a checkpoint": ("--output", "run/checkpoints/2-6", "inside {run}/checkpoints/2-6, which only"),
    "results among checkpoints": ("--output", "run/checkpoints/new", "inside {run}/checkpoints, which only"),
    "results of another run": ("--output", "other", "this is another run, whose results would be replaced"),
}


@pytest.mark.parametrize("case", REFUSED_OUTPUTS.values(), ids=REFUSED_OUTPUTS)
def test_an_output_that_would_damage_a_run_is_refused_before_the_evaluation(case, tmp_path, run_script, monkeypatch):
    flag, place, message = case
    for name in ("run", "other"):
        shutil.copytree(EARLIER / "run", tmp_path / name)
    shutil.copyfile(EARLIER / "run/checkpoints/2-6/model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "run/checkpoints")
    before = state_of(tmp_path)
    monkeypatch.setattr("reslt.evaluation.evaluate.evaluate", None)
    refused = run_script("evaluate", "--ckpt", tmp_path / "run", flag, tmp_path / place)
    assert (refused.code, refused.out) == (2, "")
    assert message.format(run=tmp_path / "run") in refused.err
    assert state_of(tmp_path) == before


def test_folded_weights_beside_a_run_may_be_written_again(run_of_two_epochs, tmp_path, run_script):
    out = tmp_path / "folded.safetensors"
    evaluate = (
        "evaluate",
        "--ckpt",
        run_of_two_epochs / "run",
        "--data",
        run_of_two_epochs / "tiny",
        "--output",
        tmp_path,
    )
    for _ in range(2):
        assert run_script(*evaluate, "--fold", out).code == 0
    assert fold.is_folded(out)


def test_a_converted_checkpoint_is_not_written_into_a_run(tmp_path, capsys):
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    before, place = state_of(tmp_path), tmp_path / "run/checkpoints/9-9"
    refused = outcome_of(
        convert.main, ("convert", "no.pth.tar", "--model", "resnet10t", "--data", "x", "--output", place), capsys
    )
    assert refused.code == 2
    assert f"inside {tmp_path / 'run/checkpoints'}, which only training writes to" in refused.err
    assert state_of(tmp_path) == before


# ---- Processes that wait, ranks that differ ----

TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
def test_processes_with_another_learning_rate_each_are_refused_before_training(tiny, tmp_path):
    script = tmp_path / "other.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(PROJECT)!r})
import train
sys.argv += ["--lr", "0.01", "--workers", "1"] if os.environ["RANK"] == "1" else []
train.main()
""")
    command = [*TWO, script, "--data", tiny, "--output", tmp_path / "out", *TINY_FLAGS]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
        "error: the processes of this run were started with different settings "
        "(lr: 0.05 in process 0, 0.01 in process 1); start all of them with the same ones"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "number", "code"), [(0, signal.SIGTERM, 143), (1, signal.SIGINT, 130)])
def test_a_process_that_waits_for_a_frozen_one_is_ended_by_a_signal(tiny, tmp_path, frozen, number, code):
    """Ten seconds later, with a message; Python's own handlers never run there."""
    flags = ["--data", tiny, "--output", tmp_path, "--experiment", "run", *TINY_FLAGS, "--epochs", 100_000]
    with open(tmp_path / "log", "w") as log:
        command = [*map(str, [*TWO, "train.py", *flags])]
        launcher = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
    until = time.monotonic() + 60
    while not (tmp_path / "run/summary.csv").exists() and time.monotonic() < until:
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children()
    ranks = {int(child.environ()["RANK"]): child for child in started if "RANK" in child.environ()}
    try:
        ranks[frozen].send_signal(signal.SIGSTOP)
        time.sleep(1)
        ranks[1 - frozen].send_signal(number)
        begin = time.monotonic()
        while ranks[1 - frozen].is_running() and ranks[1 - frozen].status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - begin < 20
            time.sleep(0.05)
        assert 8 < time.monotonic() - begin < 15
    finally:
        ranks[frozen].kill()
        launcher.wait(40)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    messages = (tmp_path / "log").read_text()
    assert f"error: process {1 - frozen}: ended by {name} while waiting for " in messages
    assert f"exitcode  : {code}" in messages


# ---- Pipes, devices, and faults of the environment ----


def make_odd(place: Path, kind: str) -> None:
    """Put a pipe without a writer, or a link to an endless device, in the place of a file."""
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")


READERS = {  # file below a folder with a run and a dataset -> its reader
    "tiny/info.yaml": lambda f: read_yaml(f / "tiny/info.yaml"),
    "tiny/local.yaml": lambda f: read_yaml(f / "tiny/local.yaml"),
    "tiny/train.txt": lambda f: load_dataset(str(f / "tiny")),
    "tiny/bad_images.csv": lambda f: load_dataset(str(f / "tiny"), bad_images="skip"),
    "table.csv": lambda f: from_csv({"train": f / "table.csv"}, "a", ["b"]),
    "run/checkpoints/2-6/SHA256SUMS": lambda f: load_run(f / "run"),
    "run/checkpoints/2-6/state.json": lambda f: load_run(f / "run"),
    "run/checkpoints/2-6/model.safetensors": lambda f: load_run(f / "run"),
    "run/result.json": lambda f: read_result(f / "run"),
    "run/checkpoints/last": lambda f: load_run(f / "run"),
    "folded.safetensors": lambda f: load_folded(f / "folded.safetensors"),
    "order.txt": lambda f: class_order(f / "order.txt", 3),
    "released.pth.tar": lambda f: load_tensors(f / "released.pth.tar"),
    "weights.pth": lambda f: create_model("resnet18", 3, pretrained_file=str(f / "weights.pth")),
    "copies/a.txt": lambda f: published.prepare("toy", f / "copies"),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices_are_refused_before_they_are_opened(name, kind, tmp_path, project, monkeypatch):
    make_dataset(tmp_path / "tiny")
    stranger_run(tmp_path / "run")
    toy = project / "data_lists/toy"
    toy.mkdir()
    lists = {"train": {"file": "a.txt", "lines": 1, "blob": "0" * 40}}
    (toy / "info.yaml").write_text(yaml.safe_dump({"published": {"source": "https://x", "lists": lists}}))
    make_odd(tmp_path / name, kind)
    opened = []

    def spy(event, arguments):
        if event == "open" and str(arguments[0]) == str(tmp_path / name):
            opened.append(arguments)

    watch_opening(spy)
    with pytest.raises(
        (UserError, OSError),
        match=r"it is a (pipe|device)|not a file but a folder, pipe or device|does not exist|there is no (file|checkpoint)",
    ):
        READERS[name](tmp_path)
    assert opened == []


_spies = []


def watch_opening(spy) -> None:
    """Call `spy` at every audit event from now on, instead of the one before. (Hooks cannot be removed.)"""
    if not _spies:
        sys.addaudithook(lambda event, arguments: event == "open" and _spies[-1](event, arguments))
    _spies[:] = [spy]


class TestEnvironment:
    """One message with a remedy for a fault of the machine; a traceback for what may be a bug."""

    @pytest.mark.parametrize(
        ("fault", "remedy"),
        [
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lower --workers"),
            (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "lower --workers"),
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "--workers 0"),
            (
                RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left"),
                "--shm-size",
            ),
            (RuntimeError("unable to open shared memory object </torch_1_2>: Too many open files (24)"), "ulimit -n"),
            (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
            (OSError(errno.EMFILE, "Too many open files", "a.png"), "ulimit -n"),
            (RuntimeError("Could not determine home directory."), "RESLT_CACHE"),
            (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--grad-accum-steps"),
            (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "--workers"),
            (MemoryError(), "memory is used up"),
            (RuntimeError("can't start new thread"), "ulimit -u"),
            (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
            (OSError(errno.ENOSPC, "No space left on device"), "standard output"),
            (PermissionError(errno.EACCES, "Permission denied", "output"), "output: Permission denied"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_fault_of_the_machine_is_one_line_with_its_remedy(self, fault, remedy):
        message = explained(fault)
        assert remedy in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "fault",
        [
            RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
            RuntimeError("out of resource: shared memory, Required: 123"),  # of a compiled kernel
            ValueError("x"),
            MemoryError("killed"),
            OSError("no number"),
        ],
        ids=str,
    )
    def test_any_other_error_keeps_its_traceback(self, fault):
        assert explained(fault) is None

    def printed(self, body: str, shell: str = "", **environment) -> subprocess.CompletedProcess:
        """The end of a command that has this body."""
        code = f"from reslt.core.command import entry_point\n@entry_point\ndef main():\n    {body}\nmain()"
        command = ["bash", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
        return subprocess.run(command, cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True)

    def test_characters_that_the_terminal_lacks_are_escaped(self):
        ended = self.printed("print('Käse 猫')", PYTHONIOENCODING="ascii")
        assert (ended.returncode, ended.stdout) == (0, "K\\xe4se \\u732b\n")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_results_that_cannot_be_printed_are_an_error_and_messages_a_warning(self):
        ended = self.printed("print('the table')", "> /dev/full")
        assert ended.returncode == 2
        assert ended.stderr == "error: standard output, or another file: No space left on device\n"
        log = "import reslt.core.log as log; log.logger.info('a'); log.logger.info('b')"
        ended = self.printed(log, "> /dev/full")
        assert ended.returncode == 0
        assert ended.stderr == "warning: standard output cannot be written: No space left on device\n"

    def test_closed_standard_streams_take_no_other_files_place(self):
        """Else a file that is opened next would receive what is printed."""
        body = "print('lost'); import os; number = os.open(os.devnull, os.O_RDONLY); os._exit(number)"
        ended = self.printed(body, "<&- >&- 2>&-")
        assert ended.returncode > 2

    def test_a_user_without_a_home_folder_is_asked_for_a_cache(self):
        ended = self.printed("raise RuntimeError('Could not determine home directory.')")
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: this user has no home folder: set RESLT_CACHE")

    @pytest.mark.parametrize("end", [lambda i: os.kill(os.getpid(), signal.SIGKILL), lambda i: lambda: i])
    def test_a_worker_that_is_killed_or_cannot_send_its_batch_is_not_waited_for(self, end, capfd):
        """The second returns a function, which cannot be pickled: the thread that sends it fails."""

        class Ends(torch.utils.data.Dataset):
            def __getitem__(self, i):
                return end(i)

        with pytest.raises(RuntimeError) as raised:
            list(Workers(Ends(), [[0], [1]], workers=1, collate=list))
        assert explained(raised.value).startswith("a worker that decodes images ended")
