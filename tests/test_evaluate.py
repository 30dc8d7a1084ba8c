"""evaluate.py: a folded file predicts as the table reports, and batches have the requested size."""

import io
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from builders import eval_loader_of
from conftest import make_dataset, train_once

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.data.datasets import load_dataset
from reslt.evaluation import evaluate as engine
from reslt.loading.loaders import images_per_batch, resident_batch
from reslt.models.fold import load_folded

RUNS = {
    "bn": (),
    "bf16": ("--mixed-precision", "bf16"),
    "conv": ("--branch", "conv"),
    "conv, evaluated pooled": ("--branch", "conv", "--eval-branch-at", "pooled", "--channels-last"),
    "experts": ("--experts", 2),
    "ce": ("--method", "ce"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", counts=(24, 16, 8), test_images=20)


@pytest.fixture
def trained(data, run_script):
    """Return the folder of a run in RUNS by name, trained once for four epochs for all tests that read it."""
    return lambda name: train_once(run_script, data, name, "--epochs", 4, *RUNS[name])


@pytest.fixture
def evaluated(tmp_path, run_script):
    """Return a function that evaluates a run and returns the output, result.json and per_class.csv."""

    def evaluate(run: Path, *flags) -> tuple[str, dict, str]:
        out = tmp_path / "out"
        outcome = run_script("evaluate", "--ckpt", run, "--output", out, *flags)
        assert outcome.code == 0, outcome.err
        return outcome.out, json.loads((out / "result.json").read_text()), (out / "per_class.csv").read_text()

    return evaluate


@torch.inference_mode()
def accuracies_of_folded(file: Path, data: Path) -> list[float]:
    """Return the accuracy in percent per class of the test list, computed with only the file's module and description."""
    module, described = load_folded(file)
    names = ("img_size", "mean", "std", "interpolation", "crop_pct")
    config = Config.of(data=str(data), workers=0)
    settings = ImageSettings(*(described[name] for name in names), config.augment)
    batches = list(eval_loader_of(load_dataset(str(data)), "test", config, settings).epoch(0))
    labels = torch.cat([labels for _, labels in batches])
    hits = torch.cat([module(images).argmax(1) for images, _ in batches]) == labels
    return [100 * hits[labels == c].double().mean().item() for c in range(described["num_classes"])]


@pytest.mark.parametrize(
    ("name", "flags", "rows", "how"),
    [
        ("bn", (), 4, "folded into the classifier, at no extra cost; the file contains the plain timm model"),
        (
            "bn",
            ("--tau", 0.7, "--eval-branch-at", "pooled"),
            4,
            "folded into the classifier, at no extra cost; the file contains the plain timm model",
        ),
        (
            "conv",
            (),
            4,
            "BN folded; branches added before the classifier; reslt.models.fold.load_folded reads the file",
        ),
        ("conv, evaluated pooled", ("--tau", 1), 4, "BN folded; branches added before the classifier"),
        ("experts", (), 1 + 3 + 2, "2 experts, each head: folded into the classifier, at no extra cost"),
        ("experts", ("--use-experts", 1), 1 + 3, "1 expert, each head: folded into the classifier"),
        ("ce", (), 1, "the plain model: there is nothing to fold; the file contains the plain timm model"),
    ],
)
def test_a_folded_file_predicts_as_the_evaluation_does(trained, evaluated, data, tmp_path, name, flags, rows, how):
    file = tmp_path / "folded.safetensors"
    printed, result, per_class = evaluated(trained(name), *flags, "--fold", file)
    assert f"{file}: {how}" in printed
    assert len(result["tables"]["standard"]) == rows  # fused, branches, experts
    fused = pd.read_csv(io.StringIO(per_class))["accuracy"].tolist()
    assert accuracies_of_folded(file, data) == pytest.approx(fused, abs=0.005)  # per_class.csv has two decimals
    assert sum(fused) > 100  # more than one class is predicted


def test_no_fold_is_accepted_and_changes_nothing(trained, evaluated):
    run = trained("bn")
    assert evaluated(run, "--no-fold") == evaluated(run)


def test_low_precision_changes_few_predictions(trained, evaluated):
    """bf16 has 8 significant bits. The prediction of an image may change if its two highest logits are closer than that;
    here at most 6 of 60 images may."""
    run = trained("bn")
    _, result, _ = evaluated(run, "--mixed-precision", "bf16")
    _, exact, _ = evaluated(run)
    assert result["all"] == pytest.approx(exact["all"], abs=100 * 6 / 60)


def test_evaluating_a_half_precision_run_on_a_cpu_replaces_the_runs_own_results(trained, run_script, tmp_path):
    """Without flags, the results have the names that reports read."""
    run = shutil.copytree(trained("bf16"), tmp_path / "run")
    found = {path.name for path in run.iterdir()}
    assert "precision no" in run_script("evaluate", "--ckpt", run).out
    assert {path.name for path in run.iterdir()} == found
    run_script("evaluate", "--ckpt", run, "--mixed-precision", "no")
    assert [path.name for path in run.glob("result-*")] == ["result-tiny-test-mixed_precision=no.json"]


def test_a_batch_has_the_requested_size_or_one_derived_from_the_training_batch(trained, evaluated, monkeypatch):
    """The training batch has 8 images, and a batch on a GPU four times as many."""
    run, sizes, original = trained("ce"), [], engine.evaluate

    def spy(model, loader, *arguments):
        sizes.append(loader.batches.batch_size)
        return original(model, loader, *arguments)

    monkeypatch.setattr(engine, "evaluate", spy)
    evaluated(run, "--batch-size", 5)
    evaluated(run)
    assert sizes == [5, 4 * 8 if torch.cuda.is_available() else 8]


@pytest.mark.parametrize(
    ("training_batch", "img_size", "on_cpu", "images"),
    [
        (128, 32, False, 512),
        (128, 32, True, 128),
        (16, 224, False, 64),
        (256, 224, False, 256),
        (2048, 224, False, 256),  # trained by eight processes, evaluated by one
        (128, 448, True, 64),
        (2, 8192, False, 1),
    ],
)
def test_a_batch_has_at_most_the_pixels_of_256_images_of_size_224(training_batch, img_size, on_cpu, images):
    assert images_per_batch(training_batch, img_size, on_cpu) == images


@pytest.mark.parametrize(
    ("images", "least", "img_size", "classes", "size"),
    [
        (10_000, 512, 32, 100, 3334),  # three batches of at most 4,096; the last one lacks two images
        (797, 128, 32, 10, 797),
        (5000, 256, 224, 100, 250),  # 20 batches of at most 256, the least size
        (5000, 64, 224, 1000, 82),  # 61 batches of at most 83: 4 Mi pixels
        (36_500, 512, 32, 100_000, 335),  # 109 batches of at most 335: 32 Mi logits
        (0, 512, 32, 10, 1),  # more processes than images
    ],
)
def test_resident_images_are_evaluated_in_few_equal_batches_on_a_gpu(images, least, img_size, classes, size):
    assert resident_batch(images, least, img_size, classes) == size
