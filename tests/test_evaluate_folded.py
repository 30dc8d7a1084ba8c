"""evaluate.py with folded branches: the same tables as branch by branch, and what it says about it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, make_dataset
from safetensors.torch import load_file

from reslt.loading.loaders import images_per_batch
from reslt.models.experts import Experts
from reslt.models.fold import BranchRows, FoldedResLT
from reslt.models.reslt import ResLT

RUNS = {
    "bn": (),
    "conv": ("--branch", "conv"),
    "conv, evaluated pooled": ("--branch", "conv", "--eval-branch-at", "pooled", "--channels-last"),
    "experts": ("--experts", 2),
    "ce": ("--method", "ce"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", test_images=20)


@pytest.fixture
def trained(data, tmp_path, run_script):
    """trained(name of RUNS) -> folder of a run of one epoch."""

    def train(name: str) -> Path:
        where = ("--output", tmp_path, "--experiment", "run")
        outcome = run_script("train", "--data", data, *TINY_FLAGS, "--epochs", 1, *RUNS[name], *where)
        assert outcome.code == 0, outcome.err
        return tmp_path / "run"

    return train


@pytest.fixture
def evaluated(tmp_path, run_script, monkeypatch):
    """evaluated(run, flags) -> what evaluate.py printed, result.json, per_class.csv, the module, the batch size."""
    from reslt.evaluation import evaluate as engine

    taken, original = [], engine.evaluate

    def spy(model, loader, *arguments):
        taken.append((model, loader.batches.batch_size))
        return original(model, loader, *arguments)

    monkeypatch.setattr(engine, "evaluate", spy)

    def evaluate(run: Path, *flags):
        out = tmp_path / "out"
        outcome = run_script("evaluate", "--ckpt", run, "--output", out, *flags)
        assert outcome.code == 0, outcome.err
        return (
            outcome.out,
            json.loads((out / "result.json").read_text()),
            (out / "per_class.csv").read_text(),
            *taken[-1],
        )

    return evaluate


@pytest.mark.parametrize(
    ("name", "flags", "kind", "how"),
    [
        ("bn", (), BranchRows, "folded into the classifier, a row per branch and class"),
        ("bn", ("--tau", 0.7, "--eval-branch-at", "pooled"), BranchRows, "folded into the classifier, a row per"),
        ("conv", (), FoldedResLT, "BN folded; branches pooled, then the classifier on each"),
        (
            "conv, evaluated pooled",
            ("--tau", 1),
            FoldedResLT,
            "BN folded; branches pooled, then the classifier on each",
        ),
        ("experts", (), Experts, "2 experts, each one's head: folded into the classifier, a row per branch and class"),
        ("experts", ("--use-experts", 1), Experts, "1 experts, each one's head: folded into the classifier"),
        ("ce", (), ResLT, None),
    ],
)
def test_both_ways_of_evaluating_find_the_same_hits_in_every_row(trained, evaluated, name, flags, kind, how):
    run = trained(name)
    messages, result, per_class, model, _ = evaluated(run, *flags)
    assert type(model) is kind
    said = [line for line in messages.splitlines() if line.startswith("branches: ")]
    assert [line.startswith(f"branches: {how}") and line.endswith("(--no-fold: as trained)") for line in said] == (
        [True] if how else []
    )
    one_by_one, *files, unfolded, _ = evaluated(run, *flags, "--no-fold")
    assert type(unfolded) is (Experts if name == "experts" else ResLT)
    assert (unfolded.experts[0] if name == "experts" else unfolded).backbone.fc.weight.shape[0] == 3  # the classes
    assert "branches:" not in one_by_one
    assert files[:2] == [result, per_class]
    rows = {"ce": 1, "experts": 1 + 3 + (2 if not flags else 0)}.get(name, 1 + 3)
    assert len(result["tables"]["standard"]) == rows


def test_folded_branches_take_low_precision(trained, evaluated):
    """bf16 has 8 bits: an image whose two best logits are closer than that may change sides; few do."""
    run = trained("bn")
    messages, result, *_ = evaluated(run, "--mixed-precision", "bf16")
    assert "branches: folded into the classifier" in messages
    _, exact, *_ = evaluated(run, "--no-fold")
    assert result["all"] == pytest.approx(exact["all"], abs=100 * 6 / 60)  # of 60 images


def test_the_weights_written_beside_an_evaluation_do_not_depend_on_how_it_was_done(trained, evaluated, tmp_path):
    run, written = trained("bn"), []
    for flags in ((), ("--no-fold",)):
        file = tmp_path / f"{len(flags)}.safetensors"
        messages, *_ = evaluated(run, *flags, "--fold", file)
        assert f"{file}: folded into the classifier, at no extra cost; the file holds the plain timm model" in messages
        written.append(load_file(file))
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_a_batch_is_as_large_as_told_else_chosen_by_the_training_batch(trained, evaluated):
    """The training batch is 8; four of them on a GPU."""
    run = trained("ce")
    assert evaluated(run, "--batch-size", 5)[-1] == 5
    assert evaluated(run)[-1] == (4 * 8 if torch.cuda.is_available() else 8)


@pytest.mark.parametrize(
    ("training_batch", "img_size", "on_cpu", "images"),
    [
        (128, 32, False, 512),
        (128, 32, True, 128),
        (16, 224, False, 64),
        (256, 224, False, 256),
        (2048, 224, False, 256),  # of eight processes, and evaluated by one
        (128, 448, True, 64),
        (2, 8192, False, 1),
    ],
)
def test_a_batch_has_no_more_pixels_than_256_images_of_224(training_batch, img_size, on_cpu, images):
    assert images_per_batch(training_batch, img_size, on_cpu) == images
