"""Calibration: errors computed by hand, temperatures with a closed form, and when a stored temperature applies."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, make_dataset, train_once
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reslt.api import load_run
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.evaluation import calibration
from reslt.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    ConfidenceBins,
    classwise_ece,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities_of,
    reliability,
)
from reslt.evaluation.metrics import ClassAccuracies, ClassHits
from reslt.evaluation.predictions import SavedPredictions
from reslt.evaluation.tables import Evaluation
from reslt.models.fold import load_folded
from reslt.runs.calibration import read_calibration, stored_temperature
from reslt.runs.contents import require_replaceable
from reslt.runs.folder import find
from reslt.runs.report_page import ReportedRun

CPU = torch.device("cpu")
CONFIDENCES, HITS = np.array([0.05, 0.6, 0.65, 1.0]), np.array([False, True, False, True])


def noisy(folder: Path) -> Path:
    """Make a dataset with 7 images per class in val.txt and test.txt; the first two of each class are labeled as the
    next class."""
    make_dataset(folder, (16, 8, 4), test_images=7, splits=("val", "test"))
    for split in ("val", "test"):
        lines = [f"{split}/{c}/{i}.png {(c + (i < 2)) % 3}\n" for c in range(3) for i in range(7)]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return noisy(tmp_path_factory.mktemp("calibration") / "noisy")


@pytest.fixture
def run(data, run_script) -> Path:
    return train_once(run_script, data, "calibrated", "--epochs", 8)


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def error_of(confidences: np.ndarray, hits: np.ndarray) -> float:
    """Return the expected calibration error of 15 bins, computed from its definition."""
    error = 0.0
    for upper in range(1, 16):
        inside = ((upper - 1) / 15 < confidences) & (confidences <= upper / 15)
        if inside.any():
            error += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    return error


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    """The first of two bins of equal width has 0.05 with accuracy 0; the second has 0.6, 0.65 and 1 (mean 0.75) with
    accuracy 2/3."""
    expected = 1 / 4 * 0.05 + 3 / 4 * (0.75 - 2 / 3)
    assert expected_calibration_error(CONFIDENCES, HITS, bins=2) == pytest.approx(expected)
    assert expected_calibration_error(np.array([0.8] * 5), np.array([True] * 4 + [False])) == pytest.approx(0)
    assert math.isnan(expected_calibration_error(np.array([]), np.array([], bool)))


def test_a_reliability_diagram_has_one_row_per_bin_with_nan_if_the_bin_is_empty():
    table = reliability(CONFIDENCES, HITS, bins=4)
    assert table["images"].tolist() == [1, 0, 2, 1]
    np.testing.assert_allclose(table["confidence"], [0.05, np.nan, 0.625, 1])
    np.testing.assert_allclose(table["accuracy"], [0, np.nan, 0.5, 1])


def test_the_class_wise_error_is_the_mean_over_classes(monkeypatch):
    """In two bins, the probabilities of class 0 are 0.9 and 0.8 (labels 0, 1), and 0.4 (label 0); those of class 1 are
    0.1 and 0.2, and 0.6; those of class 2 are all 0."""
    probabilities, labels = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.4, 0.6, 0]]), np.array([0, 1, 0])
    error_of_class_0 = 2 / 3 * abs(0.5 - 0.85) + 1 / 3 * abs(1 - 0.4)
    error_of_class_1 = 2 / 3 * abs(0.5 - 0.15) + 1 / 3 * abs(0 - 0.6)
    expected = pytest.approx((error_of_class_0 + error_of_class_1 + 0) / 3)
    assert classwise_ece(probabilities, labels, bins=2) == expected
    monkeypatch.setattr(calibration, "VALUES_AT_ONCE", 3)  # one class at a time
    assert classwise_ece(probabilities, labels, bins=2) == expected


def test_the_fitted_temperature_turns_confidences_into_the_rate_of_hits():
    """Each class is predicted for 4 images with odds of 9 to 1, and 3 of the predictions are right. The best odds are
    3 to 1, and 9^(1/T) = 3 for T = 2."""
    odds = 2 * math.log(3)
    logits, labels = np.array([[odds, 0]] * 4 + [[0, odds]] * 4, np.float32), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    assert fit_temperature(logits, labels) == pytest.approx(2, rel=1e-4)
    assert fit_temperature(logits * 10 + 100, labels) == pytest.approx(20, rel=1e-4)
    assert negative_log_likelihood(logits, labels, 2) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    np.testing.assert_allclose(probabilities_of(logits, 2)[0], [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(probabilities_of(logits)[0], [0.9, 0.1], rtol=1e-6)


def test_every_class_has_the_same_weight_whatever_its_number_of_images(monkeypatch):
    generator = np.random.default_rng(0)
    logits, labels = 3 * generator.normal(size=(30, 3)), np.repeat([0, 1, 2], 10)
    repeated = np.r_[np.arange(30), np.arange(10), np.arange(10)]  # the images of class 0 occur three times
    temperature = fit_temperature(logits, labels)
    assert fit_temperature(logits[repeated], labels[repeated]) == pytest.approx(temperature, rel=1e-4)
    likelihood = negative_log_likelihood(logits, labels)
    assert negative_log_likelihood(logits[repeated], labels[repeated]) == pytest.approx(likelihood)
    monkeypatch.setattr(calibration, "VALUES_AT_ONCE", 12)  # four rows at a time
    assert fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels)) == pytest.approx(temperature, rel=1e-4)


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([[5.0, 0, 0], [0, 1, 0]], [0, 1], LOWEST),  # all are right
        ([[5.0, 0, 0], [0, 1, 0]], [1, 2], HIGHEST),  # none is
        ([[5.0, 0, 0]], [0], LOWEST),  # one image
        ([[1.0, 1, 1]] * 3, [0, 0, 1], 1),  # all temperatures are equally good
        ([[5.0, 0, -1e30]] * 2, [0, 1], HIGHEST),  # --ncm gives such a score to a class that it never predicts
    ],
)
def test_a_temperature_is_within_its_bounds_if_no_finite_one_is_best(logits, labels, expected):
    assert fit_temperature(np.array(logits, np.float32), np.array(labels)) == expected


def test_errors_from_confidences_summed_over_batches_and_processes_are_those_of_all_images():
    """The first process counts one batch and the second two, at the temperatures 1 and 2.5."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(60, 5, generator=generator)
    labels = torch.randint(5, (60,), generator=generator)
    processes = [ClassHits((1,), 5, CPU, temperature=2.5) for _ in range(2)]
    for rank, begin in zip((0, 1, 1), (0, 20, 40), strict=True):
        processes[rank].update(logits[None, begin : begin + 20], labels[begin : begin + 20])
    processes[0].reduce(lambda own: own + processes[1].counts)
    accuracies = processes[0].accuracies()
    assert accuracies.temperature == 2.5
    for error, temperature in zip(accuracies.calibration_errors, (1, 2.5), strict=True):
        probabilities = (logits / temperature).softmax(1).numpy()
        hits = probabilities.argmax(1) == labels.numpy()
        assert error == pytest.approx(error_of(probabilities.max(1), hits), abs=1e-6)


def test_images_whose_logits_are_not_finite_are_counted_in_some_bin():
    bins = ConfidenceBins((1.0,), torch.zeros(1, *ConfidenceBins.shape))
    bins.update(torch.tensor([[math.nan, 0], [math.inf, 0], [1e38, -1e38]]), torch.tensor([0, 0, 1]))
    assert bins.sums[0, 0].sum() == 3


def test_training_fits_a_temperature_on_the_validation_list_and_reports_both_errors(run, run_script, tmp_path):
    """Both are computed again from the logits that evaluate.py writes for the two lists."""
    result = json.loads((run / "result.json").read_text())
    found = {}
    for split in ("val", "test"):
        flags = ("--split", split, "--logits", tmp_path / f"{split}.safetensors", "--output", tmp_path)
        assert run_script("evaluate", "--ckpt", run, *flags).code == 0
        found[split] = load_file(tmp_path / f"{split}.safetensors")
    temperature = fit_temperature(found["val"]["logits"], found["val"]["labels"])
    assert LOWEST < temperature < HIGHEST
    assert result["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert result["calibrated_on"] == "val"
    for key, divisor in (("ece", 1), ("ece_calibrated", result["temperature"])):
        probabilities = (found["test"]["logits"] / divisor).softmax(1).numpy()
        error = error_of(probabilities.max(1), probabilities.argmax(1) == found["test"]["labels"].numpy())
        assert result[key] == pytest.approx(100 * error, abs=1e-3)
    numbers = f"ECE {result['ece']:.1f} %; {result['ece_calibrated']:.1f} % at temperature {temperature:.3g}"
    assert f"{numbers} (fitted on val, 21 images)\n" in (run / "train.log").read_text()
    assert result["calibration_images"] == 21


@pytest.mark.parametrize(("after", "rises"), [(0.2, True), (0.1004, False), (0.05, False)])
def test_the_summary_explains_why_a_temperature_can_raise_the_ece(data, after, rises):
    accuracies = ClassAccuracies(np.array([[7, 7, 0]]), np.array([7, 7, 7]), None, (0.1, after), 2.5)
    dataset = load_dataset(str(data), images_needed=False)
    method, fitted = Config.of().method, {"calibrated_on": "val", "calibration_images": 1}
    lines = Evaluation.of(accuracies, dataset, "test", method, 1, {}, **fitted).text().splitlines()
    line = f"ECE 10.0 %; {100 * after:.1f} % at temperature 2.5 (fitted on val, 1 image)"
    explained = (
        "The ECE rises: the temperature minimizes the cross-entropy with equal weight for each class, not the ECE."
    )
    assert (lines[lines.index(line) + 1] == explained) == rises
    assert lines.count(explained) == rises


def test_a_finished_run_that_is_resumed_fits_the_same_temperatures_again(copied, data, run_script):
    before = json.loads((copied / "calibration.json").read_text())
    (copied / "calibration.json").unlink()
    settings = ("--output", copied.parent, "--experiment", copied.name, "--resume", "auto", "--data", data)
    outcome = run_script("train", *TINY_FLAGS, "--epochs", 8, *settings)
    assert outcome.code == 0, outcome.err
    assert json.loads((copied / "calibration.json").read_text()) == before


def test_without_a_validation_list_there_is_no_temperature(tmp_path, run_script):
    data = make_dataset(tmp_path / "tiny")
    run = train_once(run_script, data, "test-only", "--epochs", 1)
    result = json.loads((run / "result.json").read_text())
    assert not (run / "calibration.json").exists()
    assert (result["temperature"], result["ece_calibrated"], result["calibrated_on"]) == (None, None, None)
    assert f"\nECE {result['ece']:.1f} %\n" in (run / "train.log").read_text()
    refused = run_script("evaluate", "--ckpt", run, "--calibrate")
    assert refused.code == 2
    assert "has no validation list" in refused.err
    assert "--val-from-train" in refused.err


def test_each_predictor_has_a_temperature_of_its_own(copied, run_script, tmp_path):
    own = stored_temperature(find(copied), find(copied).config().method)
    without = run_script("evaluate", "--ckpt", copied, "--prior-tau", 1, "--output", tmp_path)
    assert "fitted with other settings (prior_tau)" in without.err
    assert json.loads((tmp_path / "result.json").read_text())["temperature"] is None
    fitted = run_script("evaluate", "--ckpt", copied, "--prior-tau", 1, "--calibrate", "--split", "val")
    assert fitted.code == 0, fitted.err
    again = run_script("evaluate", "--ckpt", copied, "--prior-tau", 1, "--calibrate", "--output", tmp_path)
    assert "(fitted on val, 21 images)" in again.out
    stored = json.loads((copied / "calibration.json").read_text())["temperatures"]
    assert [entry["prediction"]["prior_tau"] for entry in stored] == [None] * (len(stored) - 1) + [1.0]
    assert "(fitted on this list itself, 21 images)" in fitted.out
    method = find(copied).config().method
    entry = read_calibration(find(copied), replace(method, prior_tau=1.0))
    assert f"{entry.ece_after:.1f} % at temperature {entry.temperature:.3g}" in fitted.out
    assert f"ECE {entry.ece_before:.1f} % before and {entry.ece_after:.1f} % after" in fitted.out
    assert entry.nll_after < entry.nll_before
    assert stored_temperature(find(copied), method) == own
    assert stored_temperature(find(copied), replace(method, prior_tau=0.0)) == own  # 0 is the same as no prior


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is damaged"),
        ('{"temperatures": [{"temperature": 1.5}]}', "it is damaged"),
        (("temperature", math.inf), "it is damaged"),
        (("temperature", -1.0), "it is damaged"),
        (("temperature", True), "it is damaged"),
        (("temperature", 10**400), "it is damaged"),
        (("list", ["val"]), "it is damaged"),
        (("weights_digest", "0" * 64), "fitted for other weights"),
    ],
)
def test_a_temperature_that_does_not_apply_is_ignored_with_a_warning(copied, content, message, monkeypatch):
    file, warnings = copied / "calibration.json", []
    if isinstance(content, tuple):
        stored = json.loads(file.read_text())
        content = json.dumps({"temperatures": [entry | dict([content]) for entry in stored["temperatures"]]})
    file.write_text(content)
    monkeypatch.setattr("reslt.runs.calibration.logger.warning", warnings.append)
    assert stored_temperature(find(copied), find(copied).config().method) is None
    assert len(warnings) == 1
    assert message in warnings[0]
    assert "--calibrate" in warnings[0]


def test_a_folded_file_contains_the_temperature_and_an_invalid_one_is_refused(copied, run_script, tmp_path):
    file = tmp_path / "folded.safetensors"
    assert run_script("evaluate", "--ckpt", copied, "--fold", file, "--output", tmp_path / "out").code == 0
    temperature = json.loads((copied / "result.json").read_text())["temperature"]
    assert load_folded(file)[1]["temperature"] == load_run(copied)[1]["temperature"] == temperature
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["reslt"])
    for value, is_valid in ((None, True), (0, False), (math.nan, False), ("1", False)):
        save_file(load_file(file), file, {"reslt": json.dumps(described | {"temperature": value})})
        if is_valid:
            assert load_folded(file)[1]["temperature"] is None
        else:
            with pytest.raises(UserError, match="its temperature is"):
                load_folded(file)


def test_the_report_page_uses_a_temperature_fitted_after_the_predictions_were_saved(copied, run_script):
    stored = (copied / "calibration.json").rename(copied / "later.json")
    outcome = run_script("evaluate", "--ckpt", copied, "--save-predictions")
    assert outcome.code == 0, outcome.err
    assert ReportedRun.read(copied).analysis.temperature is None
    stored.rename(copied / "calibration.json")
    fitted = stored_temperature(find(copied), find(copied).config().method)
    reported = ReportedRun.read(copied)
    assert reported.analysis.temperature == fitted is not None
    assert reported.notes() == []
    for_another_predictor = (copied / "calibration.json").read_text().replace('"tta": null', '"tta": "flip"')
    (copied / "calibration.json").write_text(for_another_predictor)
    assert ReportedRun.read(copied).analysis.temperature is None


def test_saved_predictions_match_the_table_and_may_be_overwritten_with_the_run(copied, run_script, data):
    outcome = run_script("evaluate", "--ckpt", copied, "--save-predictions")
    assert outcome.code == 0, outcome.err
    saved = SavedPredictions.read(copied / "predictions.safetensors")
    result = json.loads((copied / "result.json").read_text())
    table = result["tables"]["standard"]
    assert saved.described["row_names"] == list(table)
    assert [100 * np.mean(row == saved.labels) for row in saved.predicted] == pytest.approx(
        [row["all"] for row in table.values()]
    )
    assert (saved.predicted[0] == saved.logits.argmax(1)).all()
    assert saved.lines == (data / "test.txt").read_text().splitlines()
    assert {name: saved.described[name] for name in result} == result
    on_val = run_script("evaluate", "--ckpt", copied, "--split", "val", "--save-predictions")
    assert on_val.code == 0, on_val.err
    assert SavedPredictions.read(copied / "predictions-noisy-val.safetensors").described["split"] == "val"
    require_replaceable(copied)  # --overwrite may delete these files
