"""The meaning of a model's outputs: class names, results of other evaluations, one run per folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_FLAGS, make_dataset
from PIL import Image

from reslt.api import load_run
from reslt.core.errors import UserError
from reslt.core.log import logged_to
from reslt.models.fold import load_folded
from reslt.runs.report_command import main
from reslt.runs.summary import Summary
from reslt.training.state import EpochStats

# ---- Classes of a model and of data: names are stored with runs and compared whenever a model meets data ----

FLAGS = [*TINY_FLAGS, "--epochs", "4", "--lr", "0.2"]  # so that four of the six classes are learned
NAMES = ["0", "1", "2", "3", "4", "5"]
ORDER = [4, 2, 5, 0, 3, 1]  # the same classes in another order: class k is class ORDER[k] of the run
RENAMED = ["five", "four", "one", "three", "two", "zero"]  # the same photos in folders of other names, in their order
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
    """A folder with the dataset `digits` and copies whose classes have other names or indices."""
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
    (root / "some/train.txt").unlink()  # the folder has only test images
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
    """Return the class that the run's module predicts for each image of a test list, and the list's labels."""
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
def test_labels_are_matched_by_name_or_by_index_which_the_title_states(
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
    assert table["training_images"].tolist() == [30, 24, 18, 12, 8, 6]  # those of the run, for any evaluated list
    assert table["test_images"].tolist() == np.bincount(meant, minlength=6).tolist()

    _, described = load_folded(folded)
    assert (described["class_names"], described["images_per_class"]) == (NAMES, [30, 24, 18, 12, 8, 6])
    assert (run / "result.json").read_bytes() == before
    if data == "ordered":
        assert result["all"] == json.loads(before)["all"]
        assert result["tables"] == json.loads(before)["tables"]


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        ("renamed", (), "which has 'five', 'four', 'one' and 3 more, and lacks '0', '1', '2' and 3 more"),
        ("more", (), "which has 'four', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...', and lacks '4', '5'"),
        ("some", ("--classes-by-index",), "was trained on 6 classes, but {data} has 3"),
    ],
)
def test_other_classes_are_refused_with_a_few_names_of_both_sides(world, run, run_script, data, flags, message):
    content = sorted(run.iterdir())
    outcome = run_script("evaluate", "--ckpt", run, "--data", world / data, *flags)
    assert outcome.code == 2
    assert message.format(data=world / data) in outcome.err
    assert "--classes-by-index" in outcome.err or flags
    assert sorted(run.iterdir()) == content


@pytest.mark.parametrize(
    ("change", "accuracy_is_kept", "message"),
    [
        ("nothing", True, None),
        ("labels", False, "train.txt and test.txt of {digits} differ from training: the numbers are right only if"),
        ("labels and names", True, None),
        ("more training images of a class", True, "shot groups are those of the run's training counts"),
        ("no names", True, "has no class names: classes are matched by index; train.txt is that of the run"),
    ],
)
def test_lists_that_changed_after_training_are_noticed(
    world, run, run_script, tmp_path, change, accuracy_is_kept, message
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
    if message is None:
        assert "warning" not in outcome.err
    else:
        assert outcome.err.count("warning") == 1
        assert message.format(digits=digits) in outcome.err


def test_names_in_another_order_over_the_same_training_list_are_refused(world, run, run_script, tmp_path):
    """The images of a label are still those of training, so its new name is wrong, and so is matching by name."""
    before = json.loads((run / "result.json").read_text())
    describe_classes(world / "digits", [NAMES[c] for c in ORDER])
    try:
        refused = run_script("evaluate", "--ckpt", run, "--output", tmp_path)
        outcome = run_script("evaluate", "--ckpt", run, "--output", tmp_path, "--classes-by-index")
    finally:
        describe_classes(world / "digits", NAMES)
    assert refused.code == 2
    assert "in which label 0 is '0', but its info.yaml now names it '4'; restore its class_names" in refused.err
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "result.json").read_text())["tables"] == before["tables"]


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


def test_a_loaded_run_describes_its_classes(run):
    _, described = load_run(run)
    assert described["class_names"] == NAMES
    assert described["images_per_class"] == [30, 24, 18, 12, 8, 6]


def test_a_run_of_an_earlier_version_is_evaluated_by_index_with_one_warning(tmp_path, run_script, monkeypatch):
    shutil.copytree(Path(__file__).parents[1] / "earlier_version/run", tmp_path / "kept/run")
    info = make_dataset(tmp_path / "kept/tiny") / "info.yaml"
    info.write_text("image_root: images\nclass_names: [auk, gull, tern]\n")
    monkeypatch.chdir(tmp_path / "kept")
    folded = tmp_path / "folded.safetensors"
    outcome = run_script("evaluate", "--ckpt", "run", "--fold", folded)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("warning") == 1
    assert "the run has no class names: classes are matched by index; train.txt is that of the run" in outcome.err

    assert load_folded(folded)[1]["class_names"] == ["auk", "gull", "tern"]  # the training list is the same


# ---- Results of other evaluations, reports ----


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        (("--tau", "0.5"), "-digits-test-tau=0.5"),
        (("--eval-branch-at", "pooled", "--tau", "1"), "-digits-test-tau=1-eval_branch_at=pooled"),
        (("--classes-by-index",), "-digits-test-classes=index"),
        (("--bad-images", "skip"), "-digits-test-bad_images=skip"),
        (("--data-dir", "a b"), "-digits-test-data_dir=a_b"),
        (("--ckpt", "{run}/checkpoints/1-12"), "-digits-test-1-12"),
        (("--data", "{world}/digits", "--which", "last"), ""),
        (("--use-experts", "1", "--batch-size", "7", "--workers", "0"), ""),
        ((), ""),
    ],
)
def test_only_the_runs_own_evaluation_rewrites_its_result(world, run, run_script, monkeypatch, flags, suffix):
    monkeypatch.chdir(world)
    shutil.copytree(world / "digits/images", world / "a b", dirs_exist_ok=True)
    before = {name: (run / name).read_text() for name in ("result.json", "per_class.csv")}
    flags = [flag.format(world=world, run=run) for flag in flags]
    outcome = run_script("evaluate", *(() if "--ckpt" in flags else ("--ckpt", run)), *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith(f"\nresult{suffix}.json and per_class{suffix}.csv are in {run}\n")
    assert (run / f"result{suffix}.json").is_file()
    result, of_training = (json.loads(text) for text in ((run / "result.json").read_text(), before["result.json"]))
    assert {**result, "use_experts": None} == {**of_training, "use_experts": None}
    assert result.keys() >= {"last", "best_on_test", "paper"}
    assert (run / "per_class.csv").read_text() == before["per_class.csv"]


def test_a_dataset_of_the_same_name_in_another_folder_replaces_no_result(world, run, run_script, tmp_path):
    """Two folders named `birds` list half of the test images and all of them."""
    for place in ("half", "whole"):
        shutil.copytree(world / "digits", tmp_path / place / "birds", ignore=shutil.ignore_patterns("images"))
    file = tmp_path / "half/birds/test.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::2]))
    for place in ("half", "whole", "half", "whole"):
        assert run_script("evaluate", "--ckpt", run, "--data", tmp_path / place / "birds").code == 0
    images = {f.name: json.loads(f.read_text())["images"] for f in run.glob("result-birds*.json")}
    assert images.pop("result-birds-test.json") == 24
    assert list(images.values()) == [48]


def test_a_run_without_a_result_gets_one_only_from_its_own_evaluation(world, run, run_script, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("result*", "per_class*"))
    assert run_script("evaluate", "--ckpt", cut, "--data", world / "ordered").code == 0
    assert not (cut / "result.json").exists()
    assert run_script("evaluate", "--ckpt", cut).code == 0
    assert "last" not in json.loads((cut / "result.json").read_text())
    (cut / "checkpoints/last").write_text("1-12\n")
    assert run_script("evaluate", "--ckpt", cut).code == 0
    assert json.loads((cut / "result.json").read_text())["epoch"] == 1
    shutil.copy(run / "result.json", cut)  # the result of training, at epoch 4
    assert run_script("evaluate", "--ckpt", cut).code == 0
    assert json.loads((cut / "result.json").read_text())["epoch"] == 4
    assert json.loads((cut / "result-digits-test-1-12.json").read_text())["epoch"] == 1


@pytest.fixture
def reported(tmp_path, capsys):
    """reported({path: changes of a result}) -> the report of these runs or result files."""

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
                "list_digest": "a" * 64,
                "train_digest": "a" * 64,
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
    ("changes", "message"),
    [
        ({"split": "val"}, "list (test, val)"),
        ({"data": "gulls"}, "data (birds, gulls)"),
        ({"images": 80}, "number of images (90, 80)"),
        ({"classes": "by index"}, "classes (by name, by index)"),
        ({"epoch": 4}, "epoch (5, 4)"),
        ({"model": "n"}, "model (m, n)"),
        ({"method": "reslt"}, "method (ce, reslt)"),
        ({"tau": 0.5}, "tau (none, 0.5)"),
        ({"mixed_precision": "bf16"}, "mixed_precision (none, bf16)"),
        ({"list_digest": "b" * 64}, f"content of the list ({'a' * 40}, {'b' * 40})"),
        ({"train_digest": "b" * 64}, f"content of the training list ({'a' * 40}, {'b' * 40})"),
        ({"config": {"lr": 0.2}}, "lr: 0.1 -> 0.2"),
    ],
)
def test_results_that_are_not_comparable_are_not_averaged_and_the_difference_is_named(reported, changes, message):
    text = reported({"r-seed0": {}, "r-seed1": changes})
    assert "mean" not in text
    assert f"r: not averaged, since the results differ in {message}\n" in text
    assert "r-seed1" in text.splitlines()[2]


def test_another_evaluation_of_an_averaged_run_has_a_row_of_its_own_without_a_note(reported):
    text = reported({"r-seed0": {}, "r-seed1": {}, "r-seed0/result-birds-test-tau=0.5.json": {"tau": 0.5}})
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "r-seed0", "r-seed1", "r-seed0 (tau 0.5)", "r: mean of 2", "r: standard deviation"
    ]  # fmt: skip


def test_two_results_of_one_run_are_not_averaged(reported):
    assert "mean" not in reported({"r-seed0": {}, "r-seed0/result-birds-test-copy.json": {}})


def test_epochs_that_validation_chose_are_averaged(reported):
    """Both runs have ended, each with another best epoch."""
    assert "r: mean of 2" in reported({"r-seed0": {"last": {}}, "r-seed1": {"last": {}, "epoch": 3}})


@pytest.mark.parametrize(
    "changes",
    [{"tables": {}}, {"tables": {"standard": {"ce": {"many": "x"}}}}, {"tables": [1]}, {"epoch": "x"}, {"split": 3}],
)
def test_a_damaged_result_is_named(reported, tmp_path, capsys, changes):
    with pytest.raises(SystemExit) as ended:
        reported({"a": {}, "b": changes})
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/b: its ")


def test_tables_side_by_side_state_their_lists_if_these_differ(reported):
    places = {"a": {}, "a/result-gulls-val.json": {"data": "gulls", "split": "val"}}
    first = reported(places, "--side-by-side").splitlines()[0]
    assert [label.strip() for label in first.split("|")] == ["a, birds, test list", "a, gulls, val list"]
    assert reported({"a": {}}, "--side-by-side").splitlines()[0] == "a"


# ---- A run folder contains one run ----


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_run_does_not_start_in_a_folder_with_checkpoints_of_another(tiny, tmp_path, run_script, flags):
    (tmp_path / "run/checkpoints/9-27").mkdir(parents=True)
    where = ("--output", tmp_path, "--experiment", "run")
    outcome = run_script("train", "--data", tiny, *TINY_FLAGS, *where, *flags)
    assert outcome.code == 2
    assert f"{tmp_path}/run contains checkpoints, but no config.yaml" in outcome.err
    assert "--experiment NAME" in outcome.err
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints", "9-27"]


SUMMARY = "epoch,lr,train_loss,val_all\n1,0.1,2.5,10.0\n2,0.1,2.25,\n3,0.05,2.0,30.0\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "summary.csv: the file is empty"),
        (b"\n", "summary.csv: the file is empty"),
        (b"\x00\xff\x89PNG", "summary.csv: not a text file"),
        (SUMMARY.splitlines(keepends=True)[0].encode(), "summary.csv: there is no row below the columns"),
        (b"name,price\n1,2\n", "summary.csv:1: 'name' is not a column"),
        (b"lr,train_loss\n1,2\n", "summary.csv:1: the column epoch is missing"),
        (SUMMARY.replace("2,0.1,2.25,\n", "2,0.\n").encode(), "summary.csv:3: '2,0.' is incomplete"),
        (
            SUMMARY.replace("2,0.1,2.25,\n", "").encode(),
            "summary.csv:3: '3,0.05,2.0,30.0' is incomplete, or not the row",
        ),
        (SUMMARY.replace("2.25", "2.25\x00").encode(), "summary.csv:3: "),
        (SUMMARY[:-10].encode(), "summary.csv:4: '3,0.05' is incomplete"),  # this epoch would not be evaluated again
        (SUMMARY[:-2].encode(), "summary.csv:4: '3,0.05,2.0,30.' is incomplete"),  # the value may have been 30.5
    ],
)
def test_a_damaged_summary_is_refused_with_its_line(tmp_path, content, message):

    (tmp_path / "summary.csv").write_bytes(content)
    with pytest.raises(UserError) as refused:
        Summary(tmp_path, epochs_done=3)
    assert str(refused.value).startswith(f"{tmp_path}/{message}")
    assert "restore the file" in str(refused.value)


@pytest.mark.parametrize(
    ("epochs_done", "is_last_repeated", "epochs"),
    [(3, True, [1, 2]), (2, False, [1, 2]), (2, True, [1, 2]), (1, False, [1])],
)
def test_a_summary_cut_in_its_last_line_is_read_if_that_row_is_not_needed(
    tmp_path, epochs_done, is_last_repeated, epochs
):

    (tmp_path / "summary.csv").write_text(SUMMARY[:-2])
    read = Summary(tmp_path, epochs_done, is_last_repeated=is_last_repeated)
    assert [row["epoch"] for row in read.rows] == epochs
    assert read.column("val_all") == {1: 10.0}


def test_a_summary_that_lacks_epochs_is_continued_with_empty_rows_and_a_warning(tmp_path):

    (tmp_path / "summary.csv").write_text("\n".join(SUMMARY.split("\n")[:2]) + "\n")
    with logged_to(tmp_path / "log"):
        read = Summary(tmp_path, epochs_done=3)
        read.add(3, 0.1, EpochStats(1.0, 50.0, 10.0, 0.0), {})
        continued = Summary(tmp_path, epochs_done=4)
    assert (tmp_path / "log").read_text().count("it ends at epoch 1, though 3 epochs are trained") == 1
    assert [row["epoch"] for row in continued.rows] == [1, 2, 3, 4]
    assert continued.column("val_all") == {1: 10.0}
    assert continued.column("train_loss") == {1: 2.5, 4: 1.0}


def test_a_run_whose_summary_was_cut_off_writes_the_last_row_again(world, run, run_script, tmp_path):
    cut = tmp_path / "run"
    shutil.copytree(run, cut)
    (cut / "summary.csv").write_bytes((run / "summary.csv").read_bytes()[:-5])
    resumed = run_script("train", "--data", world / "digits", *FLAGS, "--resume", cut)
    assert resumed.code == 0, resumed.err
    assert "summary.csv:5" not in resumed.err
    rows, before = (pd.read_csv(folder / "summary.csv") for folder in (cut, run))
    columns = ["epoch", "lr", "train_loss", "test_few", "test_all"]
    assert rows[columns].round(6).to_dict() == before[columns].round(6).to_dict()
