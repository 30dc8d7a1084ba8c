"""--val-from-train: the images that are set aside as a validation list, and runs that use it."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY_FLAGS, last_checkpoint, make_dataset

from reslt.config.resolve import resolve
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.data.set_aside import drawn, number_set_aside
from reslt.reproduce.plan import TrainingList
from reslt.runs.report import comparison

BAD_IMAGES = "list,line,path,reason\ntrain.txt,1,train/0/0.png,truncated\n"


def lines_of(folder: Path, **settings) -> dict[str, list[str]]:
    """Return {list: lines of `line path label`}."""
    lists = load_dataset(str(folder), **settings).lists
    return {
        name: [f"{images.line(i)} {images.path(i)} {images.labels[i]}" for i in range(len(images))]
        for name, images in lists.items()
    }


@pytest.mark.parametrize(
    ("share", "numbers"),
    [
        # of classes with 1, 2, 3, 4, 5, 15, 100 images
        (0.1, [0, 0, 1, 1, 1, 2, 10]),  # 1.5 is rounded to 2; of 3, at least one
        (0.5, [0, 0, 1, 2, 2, 8, 50]),  # 2.5 to 2, 7.5 to 8
        (0.99, [0, 0, 1, 2, 3, 13, 98]),  # two remain
        (0.001, [0, 0, 1, 1, 1, 1, 1]),
    ],
)
def test_a_class_of_three_or_more_images_sets_aside_a_rounded_share_and_keeps_two(share, numbers):
    assert number_set_aside(np.array([1, 2, 3, 4, 5, 15, 100]), share).tolist() == numbers


def test_training_and_validation_lists_together_are_the_file_with_its_line_numbers(tmp_path):
    folder = make_dataset(tmp_path / "d", counts=(10, 5, 3, 2))
    (folder / "train.txt").write_text(
        "\n" + (folder / "train.txt").read_text()
    )  # a blank line, so images start at line 2
    whole, split = lines_of(folder), lines_of(folder, val_from_train=0.3)
    assert sorted(split["train"] + split["val"]) == sorted(whole["train"])
    assert split["test"] == whole["test"]
    dataset = load_dataset(str(folder), val_from_train=0.3)
    assert dataset.images_per_class.tolist() == [7, 3, 2, 2]  # 3.0, 1.5 -> 2, 0.9 -> 1 of 3, none of 2
    assert np.bincount(dataset.lists["val"].labels).tolist() == [3, 2, 1]
    place = dataset.lists["val"].place(0)
    number = int(place.rpartition(":")[2])
    assert place == f"{folder / 'train.txt'}:{number}"
    text = (folder / "train.txt").read_text().splitlines()[number - 1]
    assert text == f"{dataset.lists['val'].path(0)} 0"


def test_shot_groups_count_only_images_that_are_trained_on(tmp_path):
    """21 images are medium-shot by the standard rule (20..100), and few-shot after 4 are set aside."""
    folder = make_dataset(tmp_path / "d", counts=(21, 3), test_images=1, side=2)
    assert load_dataset(str(folder)).shot_groups["standard"]["medium"].tolist() == [True, False]
    assert load_dataset(str(folder), val_from_train=0.2).shot_groups["standard"]["few"].all()


def test_the_draw_depends_only_on_list_and_seed():
    labels = np.repeat(np.arange(20), 10)
    first = drawn(labels, 20, 0.3, seed=0)
    assert first.sum() == 60
    assert (first == drawn(labels, 20, 0.3, seed=0)).all()
    assert (first != drawn(labels, 20, 0.3, seed=1)).any()
    assert (drawn(labels, 20, 0.5, seed=0) & first).sum() == 60  # a larger share adds images
    by_position = np.mean([drawn(labels, 20, 0.3, seed).reshape(20, 10).mean(0) for seed in range(200)], axis=0)
    np.testing.assert_allclose(by_position, 0.3, atol=0.04)  # standard error of each of ten: 0.007


def test_the_draw_never_changes_between_versions():
    """Stored runs rely on it. Of twelve numbers of PCG64, those of images 11, 3, 2 and 1 are the lowest."""
    assert np.flatnonzero(drawn(np.zeros(12, np.int32), 1, 0.34, seed=0)).tolist() == [1, 2, 3, 11]


def test_a_million_images_are_split_without_a_loop():
    labels = np.random.default_rng(0).integers(0, 50_000, 1_000_000).astype(np.int32)
    start = time.process_time()
    assert 90_000 < drawn(labels, 50_000, 0.1, seed=0).sum() < 110_000
    assert time.process_time() - start < 2


def test_bad_images_are_left_out_before_the_draw(tmp_path):
    folder = make_dataset(tmp_path / "d", counts=(4, 3))
    (folder / "bad_images.csv").write_text(BAD_IMAGES)
    for seed in range(4):
        split = lines_of(folder, val_from_train=0.5, seed=seed, bad_images="skip")
        assert (len(split["train"]), len(split["val"])) == (4, 2)  # one of the three images that each class still has
        assert not any("train/0/0.png" in line for line in split["train"] + split["val"])


def test_a_dataset_with_a_validation_list_or_without_a_class_of_three_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--val-from-train 0\.2: .*val\.txt exists, .* drop the flag"):
        load_dataset(str(make_dataset(tmp_path / "val", splits=("val",))), val_from_train=0.2)
    with pytest.raises(UserError, match=r"no class of .*train\.txt has 3 images"):
        load_dataset(str(make_dataset(tmp_path / "few", counts=(2, 2))), val_from_train=0.2)
    with pytest.raises(UserError, match=r"--eval-split val: .*; --val-from-train sets a part"):
        load_dataset(str(make_dataset(tmp_path / "test"))).eval_splits("val")


@pytest.mark.parametrize(("value", "reason"), [("0", "is not above 0"), ("1", "is not below 1"), ("x", "not a number")])
def test_a_share_is_between_zero_and_one(value, reason):
    with pytest.raises(UserError, match=rf"val_from_train \(--val-from-train\): .*{reason}"):
        resolve(["--val-from-train", value])


def test_a_plan_counts_the_images_that_remain(tmp_path):
    training = TrainingList(str(make_dataset(tmp_path / "d", counts=(10, 5, 3, 2))))
    assert (training.images(), training.images(0.3)) == (20, 14)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("set_aside") / "d", counts=(16, 8, 6))


@pytest.fixture
def trained(data, run_script):
    """trained(seed) -> folder of a run with a quarter set aside, and what it printed; trained once for all tests."""

    def train(seed: int) -> tuple[Path, str]:
        run = data.parent / f"runs/d-seed{seed}"
        if not run.exists():
            where = ("--output", run.parent, "--experiment", run.name, "--seed", seed)
            outcome = run_script("train", "--data", data, *where, *TINY_FLAGS, "--val-from-train", "0.25")
            assert outcome.code == 0, outcome.err
            (data.parent / f"out{seed}.txt").write_text(outcome.out)
        return run, (data.parent / f"out{seed}.txt").read_text()

    return train


def test_a_run_chooses_its_best_epoch_on_the_images_set_aside_and_reports_test(trained):
    """The classes have 16, 8 and 6 images; 4, 2 and 2 (1.5, rounded to even) are set aside."""
    run, out = trained(0)
    assert "22 training images, 3 classes with 12..4 each" in out
    assert "8 images of 3 classes set aside for validation" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["config"]["val_from_train"] == 0.25
    summary = pd.read_csv(run / "summary.csv")
    best = int((run / "checkpoints/best").read_text().partition("-")[0])
    assert best == summary["epoch"][summary["val_class_mean"].argmax()]
    assert json.loads((run / "result.json").read_text())["split"] == "test"
    state = json.loads((last_checkpoint(run) / "state.json").read_text())
    assert state["images_per_class"] == [12, 6, 4]


def test_evaluate_finds_the_same_images_again(trained, run_script, tmp_path):
    run, _ = trained(0)
    evaluated = run_script("evaluate", "--ckpt", run, "--which", "last", "--split", "val", "--output", tmp_path)
    assert evaluated.code == 0, evaluated.err
    assert "train.txt is that of the run" in evaluated.err
    result = json.loads((tmp_path / "result.json").read_text())
    digest = json.loads((run / "checkpoints/2-4/state.json").read_text())["lists"]["val"]
    assert (result["images"], result["list_digest"]) == (8, digest[:12])
    assert result["all"] == pytest.approx(pd.read_csv(run / "summary.csv")["val_all"].iloc[-1], abs=1e-3)


def test_another_dataset_is_not_split(trained, run_script, tmp_path):
    other = make_dataset(tmp_path / "other", splits=("val", "test"))
    outcome = run_script("evaluate", "--ckpt", trained(0)[0], "--data", other, "--split", "val", "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "other, val list (15 images)" in outcome.out


def test_a_changed_training_list_is_refused_if_the_images_set_aside_are_needed(trained, run_script, data, tmp_path):
    run, listed = trained(0)[0], (data / "train.txt").read_text()
    try:
        (data / "train.txt").write_text(listed.replace("train/0/3.png 0\n", ""))
        refused = run_script("evaluate", "--ckpt", run, "--split", "val", "--output", tmp_path)
        others = [
            run_script("evaluate", "--ckpt", run, *flags, "--output", tmp_path)
            for flags in (["--calibrate"], ["--sweep", "tau=0,1"])
        ]
        on_test = run_script("evaluate", "--ckpt", run, "--output", tmp_path)
    finally:
        (data / "train.txt").write_text(listed)
    for outcome in (refused, *others):
        assert outcome.code == 2
        assert re.search(r"train\.txt: the images that .* set aside .* cannot be found again", outcome.err)
    assert on_test.code == 0
    assert "train.txt of" in on_test.err


def test_a_run_resumes_only_with_the_same_share(trained, run_script, data):
    run, _ = trained(0)
    again = ("train", "--data", data, "--output", run.parent, "--experiment", run.name, *TINY_FLAGS, "--resume", "auto")
    assert "all of its epochs are trained" in run_script(*again, "--val-from-train", "0.25").out
    for other in ((), ("--val-from-train", "0.5")):
        refused = run_script(*again, *other)
        assert refused.code == 2
        assert "val_from_train: 0.25 -> " in refused.err


def test_seeds_are_averaged_although_each_sets_other_images_aside(trained):
    runs = [trained(seed)[0] for seed in (0, 1)]
    lists = [json.loads((run / "checkpoints/2-4/state.json").read_text())["lists"] for run in runs]
    assert lists[0]["train"] != lists[1]["train"]
    assert "d: mean of 2" in comparison(runs)
