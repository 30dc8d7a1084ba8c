"""Accuracies computed by hand, and how they are reported."""

import json
import math
import resource
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_dataset

from reslt.config.schema import Config
from reslt.core.files import write_atomically
from reslt.core.log import logger
from reslt.data.datasets import load_dataset
from reslt.evaluation import metrics
from reslt.evaluation.metrics import ClassHits
from reslt.evaluation.outputs import Outputs
from reslt.evaluation.tables import Evaluation, per_class, write_results
from reslt.methods.predictors import AS_TRAINED
from reslt.runs import summary as summary_module
from reslt.runs.console import conclude, describe_augmentation
from reslt.runs.report import comparison, side_by_side
from reslt.runs.summary import Summary, best_on_test
from reslt.training.state import EpochStats


def one_hot_logits(predictions: list[list[int]], classes: int) -> torch.Tensor:
    """Return (K, N, C) logits of (K, N) predicted classes; branch k has the weight 10^-k, so that the fused argmax is
    that of the first branch."""
    weights = torch.tensor([1.0, 0.1, 0.01])[: len(predictions), None, None]
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes) * weights


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    """Return an evaluation with 2 of 4 hits for class 0 (30 training images), 1 of 1 for class 1 (3 training images), and no
    test image for class 2 (2 training images)."""
    dataset = load_dataset(str(make_dataset(tmp_path / "d", counts=(30, 3, 2))))
    hits = ClassHits((3,), 3, torch.device("cpu"))
    hits.update(one_hot_logits([[0, 1, 0], [0, 0, 0], [2, 2, 2]], 3), torch.tensor([0, 0, 0]))
    hits.update(one_hot_logits([[1, 1], [1, 0], [0, 1]], 3), torch.tensor([1, 0]))
    return Evaluation(hits.accuracies(), dataset, "test", Config.of().method, {"epoch": 3})


def test_accuracies_are_counted_per_class_and_branch(evaluation):
    accuracies = evaluation.accuracies
    np.testing.assert_array_equal(accuracies.per_class[0], [50, 100, np.nan])
    np.testing.assert_array_equal(accuracies.per_class[1], [50, 100, np.nan])
    np.testing.assert_array_equal(accuracies.per_class[2], [100, 100, np.nan])
    np.testing.assert_array_equal(accuracies.per_class[3], [0, 0, np.nan])
    np.testing.assert_allclose(accuracies.all, [60, 60, 100, 0])
    np.testing.assert_allclose(accuracies.class_mean, [75, 75, 100, 0])


def test_the_fused_prediction_is_that_of_the_summed_logits():
    """Branch 1 gives class 0 the logit 2; branches 2 and 3 give class 1 the logit 1.5 each, together 3."""
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.5]], [[0.0, 1.5]]])
    hits = ClassHits((3,), 2, torch.device("cpu"))
    hits.update(logits, torch.tensor([1]))
    assert hits.accuracies().hits[:, 1].tolist() == [1, 0, 1, 1]


def test_a_group_is_the_mean_of_its_tested_classes_and_an_empty_one_is_na(evaluation):
    table = evaluation.tables()["standard"]
    assert list(table.columns) == ["many", "medium", "few", "all", "class_mean"]
    assert table.index.tolist()[0] == "reslt (fused)"
    assert table.iloc[0].tolist()[1:] == [50, 100, 60, 75]
    assert np.isnan(table.iloc[0]["many"])
    text = evaluation.text()
    assert "n/a" in text
    assert (
        "many: n/a, the standard split (by count, many_above 100, few_below 20) leaves this group without a class"
        in text
    )


def test_result_json_contains_null_for_a_group_without_classes(evaluation, tmp_path):
    write_results(tmp_path / "run", evaluation, {"paper": {"table": 5}})
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tables"]["standard"]["reslt (fused)"] == {
        "many": None,
        "medium": 50,
        "few": 100,
        "all": 60,
        "class_mean": 75,
    }
    assert (result["all"], result["class_mean"], result["images"], result["epoch"]) == (60, 75, 5, 3)
    frame = pd.read_csv(tmp_path / "run/per_class.csv")
    assert frame["training_images"].tolist() == [30, 3, 2]
    assert frame["test_images"].tolist() == [4, 1, 0]
    assert frame["accuracy_branch_3"].tolist()[:2] == [0, 0]
    assert list(frame.columns)[:4] == ["class", "training_images", "test_images", "accuracy"]


def test_the_table_per_class_contains_the_class_names(evaluation):
    named = replace(evaluation, dataset=replace(evaluation.dataset, class_names=("gull", "tern", "auk")))
    assert per_class(named)["name"].tolist() == ["gull", "tern", "auk"]


def test_the_plain_model_has_one_row(tmp_path):
    dataset = load_dataset(str(make_dataset(tmp_path / "d")))
    hits = ClassHits((1,), 3, torch.device("cpu"))
    hits.update(one_hot_logits([[0, 1]], 3), torch.tensor([0, 1]))
    evaluation = Evaluation(hits.accuracies(), dataset, "test", Config.of(method="ce").method)
    assert evaluation.tables()["standard"].index.tolist() == ["ce"]


def test_a_resumed_summary_keeps_earlier_epochs_and_finds_the_best(evaluation, tmp_path):
    stats = EpochStats(loss=1.0, accuracy=50.0, images_per_second=10.0, waiting=0.1)
    summary = Summary(tmp_path)
    for epoch in range(4):
        summary.add(epoch, 0.1 / 3, stats, {"test": evaluation} if epoch in (1, 3) else {})
    resumed = Summary(tmp_path, epochs_done=3)
    assert resumed.rows[0]["lr"] == 0.1 / 3  # the file has all digits
    assert [row["epoch"] for row in resumed.rows] == [1, 2, 3]
    assert resumed.best("test_all")["epoch"] == 2  # the earliest of equally good ones
    assert resumed.best("val_all") is None
    line = resumed.add(3, 0.1, stats, {"test": evaluation})
    assert line.startswith("epoch 4  lr 0.1  loss 1.0000")
    assert line.endswith("many n/a  medium 50.0  few 100.0  all 60.0  class mean 75.0")
    assert (resumed.column("test_all"), resumed.column("val_all")) == ({2: 60.0, 4: 60.0}, {})
    assert (resumed.has(4), resumed.has(5)) == (True, False)
    other = Summary(tmp_path, epochs_done=1, is_written=False)
    other.add(1, 0.1, stats, {})
    assert len(Summary(tmp_path, epochs_done=9).rows) == 4  # only the main process writes the file


def test_a_row_is_appended_unless_the_file_has_to_be_rewritten(evaluation, tmp_path, monkeypatch):
    """The file is written as a whole the first time, for a new column, and after somebody else changed or removed it."""
    stats, rewritten = EpochStats(loss=1.0, accuracy=50.0, images_per_second=10.0, waiting=0.1), []
    monkeypatch.setattr(summary_module, "write_atomically", lambda *a: (rewritten.append(len(summary.rows)), write(*a)))
    write, summary = write_atomically, Summary(tmp_path)
    for epoch in range(8):
        summary.add(epoch, 0.1, stats, {"test": evaluation} if epoch in (2, 3) else {})
        if epoch == 4:
            (tmp_path / "summary.csv").unlink()
        if epoch == 6:
            (tmp_path / "summary.csv").write_text("epoch,lr\n")
    assert rewritten == [1, 3, 6, 8]
    frame = pd.read_csv(tmp_path / "summary.csv")
    assert frame["epoch"].tolist() == list(range(1, 9))
    assert frame["test_all"].dropna().to_dict() == {2: 60.0, 3: 60.0}
    assert Summary(tmp_path, epochs_done=8).column("lr") == dict.fromkeys(range(1, 9), 0.1)


def test_a_disk_that_is_full_within_a_row_leaves_the_earlier_rows_intact(tmp_path):
    """Only five more bytes fit. With the next row, all rows are written again."""
    stats, summary = EpochStats(loss=1.0, accuracy=50.0, images_per_second=10.0, waiting=0.1), Summary(tmp_path)
    summary.add(0, 0.1, stats, {})
    before, (soft, hard) = (tmp_path / "summary.csv").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
        summary.add(1, 0.1, stats, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "summary.csv").read_bytes() == before
    summary.add(2, 0.1, stats, {})
    assert [row["epoch"] for row in Summary(tmp_path, epochs_done=3).rows] == [1, 2, 3]


def test_runs_are_compared_with_mean_and_standard_deviation_over_seeds(evaluation, tmp_path):
    for seed in (0, 1):
        write_results(tmp_path / f"r-seed{seed}", evaluation)
    write_results(tmp_path / "other", evaluation)
    text = comparison([tmp_path / "r-seed0", tmp_path / "r-seed1", tmp_path / "other"])
    assert "r: mean of 2" in text
    assert "r: standard deviation" in text
    assert text.count("60.00") == 4
    lines = side_by_side([tmp_path / "other", tmp_path / "r-seed0"]).splitlines()
    assert len(lines) == 6
    assert all(" | " in line for line in lines)
    write_results(tmp_path / "part", replace(evaluation, settings=evaluation.settings | {"use_experts": 2}))
    assert side_by_side([tmp_path / "part"]).splitlines()[0] == "part (use_experts 2)"


@pytest.fixture
def balanced(evaluation) -> Evaluation:
    """Return an evaluation with 1 of 2 hits for class 0, 2 of 2 for class 1, and no test image for class 2."""
    hits = ClassHits((1,), 3, torch.device("cpu"))
    hits.update(one_hot_logits([[0, 2, 1, 1]], 3), torch.tensor([0, 0, 1, 1]))
    return replace(evaluation, accuracies=hits.accuracies(), method=Config.of(method="ce").method)


def test_the_class_mean_is_reported_only_if_it_differs_from_the_mean_over_images(evaluation, balanced, tmp_path):
    """In the unbalanced list, 3 of 5 images are 60 %, and the mean of 50 % and 100 % is 75 %. In the balanced one, both
    are 75 %."""
    header, fused = evaluation.text().splitlines()[1:3]
    assert header.split() == ["many", "medium", "few", "all", "class", "mean"]
    assert fused.split()[-2:] == ["60.0", "75.0"]
    assert evaluation.fused()["test_class_mean"] == 75
    assert balanced.text().splitlines()[1].split() == ["many", "medium", "few", "all"]
    assert "test_class_mean" not in balanced.fused()
    write_results(tmp_path / "a", evaluation)
    write_results(tmp_path / "b", balanced)
    text = comparison([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert "class mean" in text[0]
    assert text[1].split()[-3:-1] == ["60.00", "75.00"]
    assert text[2].split()[-3:-1] == ["75.00", "75.00"]
    assert "class mean" not in comparison([tmp_path / "b"])
    assert "class mean" in side_by_side([tmp_path / "a"])


def test_the_report_has_the_class_mean_of_a_result_from_an_earlier_version(evaluation, tmp_path):
    """Its tables lack that column, so that the result's own value is used."""
    write_results(tmp_path, evaluation)
    result = json.loads((tmp_path / "result.json").read_text())
    del result["tables"]["standard"]["reslt (fused)"]["class_mean"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert comparison([tmp_path]).splitlines()[1].split()[-3:-1] == ["60.00", "75.00"]


@pytest.fixture
def in_both_splits(evaluation) -> Evaluation:
    """Return an evaluation whose paper's split has class 0 in many, 1 in medium and 2 in few: 50, 100, n/a."""
    splits = evaluation.dataset.splits | {"paper": {"by": "rank", "many": 1, "medium": 1, "few": 1}}
    return replace(evaluation, dataset=replace(evaluation.dataset, splits=splits))


def test_the_papers_protocol_shows_the_groups_of_both_splits(in_both_splits, tmp_path, monkeypatch):
    """In the standard split, class 0 (30 images) is medium and class 1 (3 images) is few; by rank, they are many and
    medium."""
    stats = EpochStats(loss=1.0, accuracy=50.0, images_per_second=10.0, waiting=0.1)
    Summary(tmp_path).add(0, 0.1, stats, {"test": in_both_splits})
    best = best_on_test(Summary(tmp_path, epochs_done=1))
    groups = [best[f"{prefix}{shot}"] for prefix in ("", "paper_") for shot in ("many", "medium", "few")]
    assert [None if np.isnan(value) else value for value in groups] == [None, 50, 100, 50, 100, None]
    assert (best["all"], best["paper_all"], best["class_mean"]) == (60, 60, 75)
    printed = []
    monkeypatch.setattr(logger, "info", printed.append)
    conclude(
        tmp_path,
        [in_both_splits],
        Summary(tmp_path, epochs_done=1),
        [{"table": 8, "many": 68.5, "all": 70.2, "split": "standard"}],
    )
    lines = "".join(printed).partition("the paper's protocol, best epoch on test (epoch 1):")[2].splitlines()
    assert lines[0].endswith("  many n/a  medium 50.0  few 100.0  all 60.0  class mean 75.0")
    assert lines[1] == "in the shot split of the paper:  many 50.0  medium 100.0  few n/a  all 60.0"
    assert "the paper, table 8:  many 68.5  all 70.2  (standard split)" in lines
    stored = json.loads((tmp_path / "result.json").read_text())["best_on_test"]
    assert (stored["few"], stored["paper_few"], stored["paper_many"]) == (100, None, 50)


def test_a_summary_of_an_earlier_version_has_a_best_epoch_without_a_class_mean(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,test_many,test_medium,test_few,test_all\n1,1,2,3,4\n2,,,,\n")
    assert best_on_test(Summary(tmp_path, 2)) == {"epoch": 1, "many": 1, "medium": 2, "few": 3, "all": 4}
    assert best_on_test(Summary(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "random resized crop, flip 0.5"),
        (
            {"crop": "pad", "hflip": 0.0, "color_jitter": (0.4, 0.4, 0.4)},
            "4 px padding and crop, color jitter 0.4 0.4 0.4",
        ),
        (
            {"aa": "cifar10", "color_jitter": (0.4,), "mixup": 0.2, "reprob": 0.25},
            "random resized crop, flip 0.5, AutoAugment cifar10, erasing 0.25 (pixel), mixup 0.2",
        ),
        ({"cutout": 16, "cutout_fill": "mean"}, "random resized crop, flip 0.5, Cutout 16 (mean)"),
        (
            {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.5, "mixup_mode": "elem"},
            "random resized crop, flip 0.5, mixup 0.8, CutMix 1, mixed with probability 0.5 per elem",
        ),
    ],
)
def test_the_first_lines_of_a_run_describe_the_augmentation(changes, expected):
    assert describe_augmentation(Config.of(**changes).augment) == expected


def test_the_rows_of_experts_are_their_mean_the_mean_of_each_branch_and_each_expert():
    """One image has class 1. The branches of expert 1 are 3 0 0 and 0 1 0, with sum 3 1 0; those of expert 2 are 0 4 0 and
    0 0 3.5, with sum 0 4 3.5. The mean of the sums is 1.5 2.5 1.75, that of branch 1 is 1.5 2 0, and that of branch 2 is
    0 0.5 1.75."""
    logits = torch.tensor([[[3.0, 0, 0], [0, 1, 0]], [[0, 4, 0], [0, 0, 3.5]]])[:, :, None]  # (E, K, N, C)
    hits = ClassHits((2, 2), 3, torch.device("cpu"))
    hits.update(logits, torch.tensor([1]))
    assert hits.accuracies().hits[:, 1].tolist() == [1, 1, 0, 0, 1]


def test_the_best_epoch_on_an_unbalanced_list_has_the_highest_class_mean(tmp_path, evaluation):
    """The score of the evaluation is (50 + 100) / 2, not 3 of 5 images = 60. Epochs of earlier versions, which recorded no
    class mean, are compared by top-1."""
    assert evaluation.accuracies.score == 75
    summary = Summary(tmp_path)
    summary.rows = [
        {"epoch": 1, "val_all": 60.0, "val_class_mean": 40.0},
        {"epoch": 2, "val_all": 50.0, "val_class_mean": 45.0},
    ]
    assert summary.scores("val") == {1: 40, 2: 45}
    del summary.rows[0]["val_class_mean"]
    assert summary.scores("val") == {1: 60, 2: 50}


@pytest.mark.parametrize("at_once", [1, 3 * 2 * 4 + 1, 1 << 20])
def test_counts_do_not_depend_on_how_many_batches_are_counted_at_once(monkeypatch, at_once):
    """Three batches have two branches and four classes; the last batch has one image. Among equal logits, the first class
    is predicted. An image counts as not finite if a logit of any branch is."""
    monkeypatch.setattr(metrics, "VALUES_AT_ONCE", at_once)
    hits = ClassHits((2,), 4, torch.device("cpu"))
    tie, inf = torch.tensor([[1.0, 2, 2, 0]]), math.inf
    first = torch.stack([torch.cat([tie, tie, tie]), torch.zeros(3, 4)])
    hits.update(first, torch.tensor([1, 2, 1]))  # fused and branch 1: class 1; branch 2: class 0
    second = torch.zeros(2, 3, 4)
    second[0, 0, 3], second[1, 1, 2], second[:, 2, 1] = 5, -inf, inf  # class 3; 0 and 0; 1
    hits.update(second, torch.tensor([3, 0, 1]))
    hits.update(torch.zeros(2, 1, 4), torch.tensor([0]))
    found = hits.accuracies()
    assert found.images.tolist() == [2, 4 - 1, 1, 1]
    assert found.hits.tolist() == [[2, 3, 0, 1], [2, 3, 0, 1], [2, 1, 0, 0]]
    assert found.not_finite == 2


def test_only_a_few_batches_are_kept_until_they_are_counted_however_small_they_are():
    """The labels of a batch may be an open file, and a process may have only 1,024 of them."""
    hits, alive = ClassHits((1,), 2, torch.device("cpu")), []
    outputs = Outputs(SimpleNamespace(logits_per_image=(1,)), 2, AS_TRAINED)
    for _ in range(200):
        labels, logits = torch.tensor([0]), torch.tensor([[[1.0, 0]]])
        alive.append(weakref.ref(labels))
        hits.update(logits, labels)
        outputs.add(logits, [], labels)
    assert sum(label() is not None for label in alive) <= 65
    assert hits.accuracies().hits.tolist() == [[200, 0]]


def test_counting_hits_does_not_wait_for_the_device(monkeypatch):
    """Tensors of the meta device have no values, so that reading one raises."""
    monkeypatch.setattr(metrics, "VALUES_AT_ONCE", 100)
    hits = ClassHits((3, 2), 5, torch.device("meta"), temperature=2.0)
    for images in (2, 4, 1):
        hits.update(torch.empty(3, 2, images, 5, device="meta"), torch.empty(images, dtype=torch.int64, device="meta"))
    assert hits.counts.shape == (6 * 5 + 5 + 1 + 1 + 2 * 3 * 15,)
