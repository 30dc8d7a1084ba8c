"""train.py and evaluate.py from end to end on a tiny dataset: their files and tables, and their errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from conftest import TINY_FLAGS, last_checkpoint, make_dataset
from safetensors.torch import load_file

from reslt.augment.mixing import Mixing
from reslt.core.batch_shard import BatchShard
from reslt.core.signals import StopRequests
from reslt.evaluation import evaluate as engine
from reslt.loading.batches import ShuffledBatches
from reslt.methods.losses import FusionLoss
from reslt.methods.predictors import Predictor
from reslt.models import create
from reslt.training import accelerator as device
from reslt.training.compiled import compile_model
from reslt.training.epoch import Pace, train_epoch
from reslt.training.state import Progress
from reslt.training.step import TrainStep
from reslt.training.watch import Watch

PROJECT = Path(__file__).resolve().parents[1]
ONLY_THE_LOCK = [".run.lock"]  # the file that stays beside the folder of a run that leaves nothing else


def flags(data: Path, output: Path, *more) -> list:
    return ["--data", data, "--output", output, "--experiment", "run", *TINY_FLAGS, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(last_checkpoint(run) / "model.safetensors")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def everything_kept(run: Path) -> dict[str, bytes]:
    """Return weights, average and optimizer of the last checkpoint, and both pointers, as bytes."""
    files = [*last_checkpoint(run).glob("*.safetensors"), run / "checkpoints/last", run / "checkpoints/best"]
    return {file.name: file.read_bytes() for file in files}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_run_writes_its_files_and_evaluate_repeats_its_numbers(tiny, tmp_path, run_script):
    trained = run_script("train", *flags(tiny, tmp_path))
    run = tmp_path / "run"
    assert trained.code == 0, trained.err
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.yaml", "per_class.csv", "result.json", "summary.csv", "train.log",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1-3", "2-6", "last"]
    summary = pd.read_csv(run / "summary.csv")
    assert summary["epoch"].tolist() == [1, 2]
    assert {"lr", "train_loss", "test_many", "test_medium", "test_few", "test_all"} <= set(summary.columns)
    described = yaml.safe_load((run / "config.yaml").read_text())
    assert described["config"]["alpha"] == 0.9
    assert set(described["versions"]) >= {"torch", "timm", "accelerate"}
    result = json.loads((run / "result.json").read_text())
    assert result["all"] == pytest.approx(summary["test_all"].iloc[-1], abs=1e-3)
    assert result["best_on_test"]["all"] == pytest.approx(summary["test_all"].max(), abs=1e-3)
    assert "reslt (fused)" in trained.out
    assert "branch 3" in trained.out
    assert "the paper's protocol, best epoch on test" in trained.out
    assert "no validation list" in trained.err

    evaluated = run_script("evaluate", "--ckpt", run, "--output", tmp_path / "again")
    assert evaluated.code == 0, evaluated.err
    repeated = json.loads((tmp_path / "again/result.json").read_text())
    assert repeated["tables"] == result["tables"]
    assert (tmp_path / "again/per_class.csv").read_text() == (run / "per_class.csv").read_text()


STRONG = ("--aa", "cifar10", "--reprob", "0.3", "--mixup", "0.4", "--cutmix", "1.0", "--logit-adjust", "1")
AVERAGED = ("--model-ema", "--model-ema-decay", "0.5")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--method", "proco", *AVERAGED, "--drop", "0.3", "--opt", "adamw", "--data-on-device", "off"),
        (*STRONG, "--experts", "2", "--mixup-mode", "elem"),
    ],
)
def test_a_run_resumed_at_an_epoch_boundary_keeps_the_same_bytes(tmp_path, run_script, more):
    """A run of three epochs is compared with one that loses its last two epochs and resumes: weights, moving average,
    optimizer, the choice of the best epoch, and the summary."""
    data = make_dataset(tmp_path / "d", splits=("val", "test"))
    for name in ("whole", "cut"):
        trained = run_script("train", *flags(data, tmp_path / name, *more, "--epochs", "3", "--sched", "cosine"))
        assert trained.code == 0, trained.err
    run = tmp_path / "cut/run"
    for name in ("2-6", "3-9"):
        shutil.rmtree(run / "checkpoints" / name)
    for pointer in ("last", "best"):
        (run / "checkpoints" / pointer).write_text("1-3\n")
    again = flags(data, tmp_path / "cut", *more, "--epochs", "3", "--sched", "cosine", "--resume", "auto")
    resumed = run_script("train", *again)
    assert resumed.code == 0, resumed.err
    assert "resuming in epoch 2, after 0 of its steps" in resumed.out
    assert "epoch 1  lr" not in resumed.out
    assert "epoch 2  lr" in resumed.out
    assert everything_kept(tmp_path / "whole/run") == everything_kept(run)
    timings = ["images_per_second", "waiting"]
    ours, theirs = (
        pd.read_csv(tmp_path / f"{name}/run/summary.csv").drop(columns=timings) for name in ("whole", "cut")
    )
    pd.testing.assert_frame_equal(ours, theirs)


def test_a_finished_run_that_is_resumed_prints_its_table_again(tiny, tmp_path, run_script):
    first = run_script("train", *flags(tiny, tmp_path))
    again = run_script("train", *flags(tiny, tmp_path), "--resume", "auto")
    assert again.code == 0
    assert "all of its epochs are trained" in again.out
    table = r"reslt \(fused\).*"
    assert re.search(table, first.out).group() == re.search(table, again.out).group()


@pytest.mark.parametrize("more", [("--color-jitter", "0.4", "--drop", "0.5"), STRONG], ids=["plain", "strong"])
def test_the_number_of_workers_changes_no_bit(tiny, tmp_path, run_script, more):
    """Samples do not depend on the worker that draws them; mixing and dropout are drawn in the main process."""
    host = ("--data-on-device", "off")
    assert run_script("train", *flags(tiny, tmp_path / "0", *more, *host)).code == 0
    two = run_script("train", *flags(tiny, tmp_path / "2", *more, *host, "--workers", "2"))
    assert two.code == 0, two.err
    assert_same(weights(tmp_path / "0/run"), weights(tmp_path / "2/run"))


def test_training_accuracy_is_that_of_the_fused_prediction():
    """The images of two batches of four are their logits of two branches. In the first batch, 3 sums have their maximum at
    the label, in the second 2. The learning rate is too small to change a weight."""

    class Stored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            return self.scale * images.movedim(1, 0)

    main = torch.eye(3)[[0, 1, 2, 0]]
    residual = torch.zeros(2, 4, 3)
    residual[0, 3, 1], residual[1, 0, 2], residual[1, 1, 2] = 2, 2, 2  # these three overrule the main branch

    class Batches:
        def __len__(self):
            return 2

        def windows(self, epoch, first_step):
            for batch in range(2):
                yield [(torch.stack([main, residual[batch]], dim=1), torch.tensor([0, 1, 2, 0]))]

    model, alone = Stored(), Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    train_step = TrainStep(model, FusionLoss(), optimizer, alone, BatchShard(4), normalize=lambda x: x, seed=0)
    stats = train_epoch(train_step, Batches(), Progress(), Watch(alone, StopRequests()), Pace(1))
    assert stats.accuracy == pytest.approx(100 * 5 / 8)


def test_training_accuracy_is_not_reported_if_images_are_mixed(tiny, tmp_path, run_script):
    for name, more in (("plain", ()), ("mixed", ("--mixup", 0.2))):
        trained = run_script("train", *flags(tiny, tmp_path / name, *more))
        assert trained.code == 0, trained.err
        is_reported = pd.read_csv(tmp_path / f"{name}/run/summary.csv")["train_accuracy"].notna().tolist()
        assert is_reported == [name == "plain"] * 2
        assert ("  train " in trained.out) == (name == "plain")


def test_the_rows_of_the_paper_are_printed_beside_the_result(tiny, tmp_path, run_script):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("paper:\n- {table: 2, few: 30.5, all: 41.5}\n- {figure: 4, all: 40.0}\n- {figure: 6}\n")
    trained = run_script("train", "--recipe", recipe, *flags(tiny, tmp_path, "--epochs", 1))
    assert trained.code == 0, trained.err
    messages = [line for line in trained.out.splitlines() if line.startswith("the paper, ")]
    assert messages == ["the paper, table 2:  few 30.5  all 41.5", "the paper, figure 4:  all 40.0"]


def test_each_step_of_a_run_draws_its_own_mixing(tiny, tmp_path, run_script, monkeypatch):
    """Two epochs of three batches are steps 0 to 5; resuming the second epoch repeats 3 to 5."""
    steps, original = [], Mixing.draw
    monkeypatch.setattr(Mixing, "draw", lambda self, step, *a: steps.append(step) or original(self, step, *a))
    assert run_script("train", *flags(tiny, tmp_path, "--cutmix", 1)).code == 0
    shutil.rmtree(tmp_path / "run/checkpoints/2-6")
    assert run_script("train", *flags(tiny, tmp_path, "--cutmix", 1, "--resume", "auto")).code == 0
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_sigterm_before_training_leaves_no_run(tiny, tmp_path, run_script, monkeypatch):
    """The exit code is the shell's 128 + 15, and the previous handler is restored."""
    monkeypatch.setattr(create, "create_model", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    outcome = run_script("train", *flags(tiny, tmp_path / "out"))
    assert outcome.code == 143
    assert names_in(tmp_path / "out") == ONLY_THE_LOCK
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_seed_gives_other_weights(tiny, tmp_path, run_script):
    for seed in (0, 1):
        assert run_script("train", *flags(tiny, tmp_path / str(seed), "--seed", seed)).code == 0
    first, second = (weights(tmp_path / f"{seed}/run")["backbone.conv1.weight"] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_best_is_chosen_on_the_validation_list_and_test_is_evaluated_at_the_end(tmp_path, run_script):
    data = make_dataset(tmp_path / "d", splits=("val", "test"))
    trained = run_script("train", *flags(data, tmp_path, "--epochs", "4", "--checkpoint-hist", "1"))
    assert trained.code == 0, trained.err
    run = tmp_path / "run"
    summary = pd.read_csv(run / "summary.csv")
    assert "test_all" not in summary  # the test list is not used during training
    best_epoch = int(summary["epoch"][summary["val_all"].idxmax()])
    assert (run / "checkpoints/best").read_text().startswith(f"{best_epoch}-")
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir()) == sorted(
        {f"{best_epoch}-{3 * best_epoch}", "4-12"}
    )
    result = json.loads((run / "result.json").read_text())
    assert (result["split"], result["epoch"]) == ("test", best_epoch)
    assert "paper's protocol" not in trained.out
    for which, epoch in (("last", 4), ("best", best_epoch)):
        evaluated = run_script("evaluate", "--ckpt", run, "--which", which, "--split", "val")
        assert f"val list (15 images), epoch {epoch}" in evaluated.out
        assert f"all {summary['val_all'][epoch - 1]:.1f}" in trained.out


def test_a_dataset_without_an_evaluation_list_trains_and_cannot_be_evaluated(tmp_path, run_script):
    data = make_dataset(tmp_path / "d", splits=())
    trained = run_script("train", *flags(data, tmp_path, "--method", "ce"))
    assert trained.code == 0, trained.err
    assert (tmp_path / "run/checkpoints/last").exists()
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "run")
    assert evaluated.code == 2
    assert "neither test.txt nor val.txt: there is nothing to evaluate" in evaluated.err
    assert "nothing is evaluated" in trained.err


def test_evaluate_takes_tau_and_the_pooled_order_and_folds(tiny, tmp_path, run_script):
    assert run_script("train", *flags(tiny, tmp_path)).code == 0
    out = tmp_path / "folded.safetensors"
    evaluated = run_script(
        "evaluate", "--ckpt", tmp_path / "run", "--tau", "0.7", "--eval-branch-at", "pooled", "--fold", out
    )  # fmt: skip
    assert evaluated.code == 0, evaluated.err
    assert "tau 0.7, eval_branch_at pooled" in evaluated.out
    assert "the file contains the plain timm model" in evaluated.out
    model = timm.create_model("cifar_resnet20", channels=(8, 16, 32), num_classes=3, checkpoint_path=str(out))
    assert model.fc.bias.abs().sum() > 0  # the branches' shifts; the classifier's own bias was dropped
    result = json.loads((tmp_path / "run/result-tiny-test-tau=0.7-eval_branch_at=pooled.json").read_text())
    assert (result["tau"], result["eval_branch_at"]) == (0.7, "pooled")


def test_tau_acts_in_every_evaluation_and_not_on_the_weights_that_are_trained(tiny, tmp_path, run_script, monkeypatch):
    """With tau 1, rows have norm 1 and there is no bias, in the evaluations of train.py and of evaluate.py. With `--tau
    none`, the trained head predicts."""
    seen, original = [], engine.evaluate

    def spy(model, *arguments):
        assert model.backbone.fc.bias.abs().sum() > 0
        (predictor,) = [given for given in arguments if isinstance(given, Predictor)]
        seen.append(predictor.heads)
        return original(model, *arguments)

    monkeypatch.setattr(engine, "evaluate", spy)
    outcome = run_script("train", *flags(tiny, tmp_path, "--tau", 1.0))
    assert outcome.code == 0, outcome.err
    assert "test list (15 images), epoch 2, tau 1.0" in outcome.out
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "run")
    assert "epoch 2, tau 1.0" in evaluated.out
    assert len(seen) == 3
    for (head,) in seen:
        assert head.weight.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
        assert not head.bias.any()
    plain = run_script("evaluate", "--ckpt", tmp_path / "run", "--tau", "none")
    assert "tau 1.0" not in plain.out
    assert seen[3] is None


def test_another_dataset_is_evaluated_on_its_own_images(tiny, tmp_path, run_script):
    """Both datasets have the same relative paths; the run's --data-dir must not be used for the other one's."""
    more = ("--data-dir", tiny / "images")
    assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1, *more)).code == 0
    other = make_dataset(tmp_path / "other")
    victim = other / "images/test/1/2.png"
    victim.write_bytes(victim.read_bytes()[:200])
    outcome = run_script("evaluate", "--ckpt", tmp_path / "run", "--data", other)
    assert outcome.code == 2
    assert str(victim) in outcome.err


def test_evaluate_uses_exactly_the_weights_that_the_path_names(tiny, tmp_path, run_script):
    assert run_script("train", *flags(tiny, tmp_path, "--model-ema", "--model-ema-decay", "1")).code == 0
    last = tmp_path / "run/checkpoints/2-6"
    results = {}
    for name in (last / "model.safetensors", last / "ema.safetensors", last, tmp_path / "run/checkpoints/last"):
        out = tmp_path / f"out-{name.name}"
        assert run_script("evaluate", "--ckpt", name, "--output", out).code == 0
        results[name.name] = (out / "per_class.csv").read_text()
    assert results["model.safetensors"] != results["ema.safetensors"]
    assert results["2-6"] == results["last"] == results["ema.safetensors"]


@pytest.mark.parametrize("chosen", [None, "/elsewhere"])
def test_compiled_code_is_cached_in_our_folder_unless_the_user_has_chosen_one(tmp_path, monkeypatch, chosen):
    monkeypatch.setenv("RESLT_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen or "")
    if chosen is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    model = torch.nn.Linear(2, 2)
    compile_model(model)  # which compiles at its first call, not here
    assert model._compiled_call_impl is not None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (chosen or str(tmp_path / "compiled"))


def test_the_model_may_be_compiled_with_an_average_and_half_precision(tiny, tmp_path, run_script, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    more = ("--torchcompile", "--model-ema", "--mixed-precision", "bf16")
    trained = run_script("train", *flags(tiny, tmp_path, *more, "--epochs", 1))
    assert trained.code == 0, trained.err
    assert compiled


def test_clip_grad_bounds_the_step(tiny, tmp_path, run_script):
    """Each of the three steps of SGD without momentum moves by at most lr times the clipped norm, 0.05 x 1e-6."""
    start = run_script("train", *flags(tiny, tmp_path / "0", "--epochs", 1, "--lr", "1e-12", "--weight-decay", 0))
    moved = run_script(
        "train", *flags(tiny, tmp_path / "1", "--epochs", 1, "--weight-decay", 0, "--clip-grad", "1e-6", "--momentum", 0)
    )  # fmt: skip
    assert start.code == moved.code == 0
    before, after = weights(tmp_path / "0/run"), weights(tmp_path / "1/run")
    names = [name for name in before if "running" not in name and "num_batches" not in name]
    distance = sum((before[name] - after[name]).square().sum() for name in names).sqrt()
    assert distance < 3 * 0.05 * 1e-6 * 1.5  # the factor 1.5 allows for float32


def test_a_timm_model_with_conv_branches_trains_with_the_transforms_of_large_images(tiny, tmp_path, run_script):
    trained = run_script(
        "train", "--data", tiny, "--output", tmp_path, "--experiment", "run", "--model", "resnet18", "--epochs", 1,
        "--model-kwargs", "layers=(1,1,1,1)", "zero_init_last=False", "--img-size", 32, "--batch-size", 8, "--workers", 0,
        "--color-jitter", "0.4", "0.4", "0.4", "--channels-last", "--clip-grad", 1, "--limit-train", 16, "--smoothing", 0.1,
        "--mixed-precision", "bf16", "--branch", "conv",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "conv branches on the map" in trained.out


class TestMistakes:
    """A user's mistake ends with exit code 2 and one message that names place, value and remedy, and leaves no run."""

    def refused(self, run_script, script, *arguments) -> str:
        outcome = run_script(script, *arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        messages = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
        assert len(messages) == 1, outcome.err
        assert messages[0].startswith("error: ")
        return messages[0]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: (d / "images/train/1/3.png").unlink(), r"train\.txt:20: there is no image .*3\.png"),
            (lambda d: (d / "train.txt").unlink(), r"train\.txt does not exist"),
            (lambda d: (d / "test.txt").write_text("test/0/0.png 5\n"), r"test\.txt:1: label 5 is outside 0\.\.2"),
            (lambda d: (d / "train.txt").write_text("train/0/0.png\n"), r"train\.txt:1: no label"),
            (
                lambda d: (d / "train.txt").write_text("train/0/0.png 0\ntrain/2/0.png 2\n"),
                r"class 1 has no training image",
            ),
            (lambda d: (d / "info.yaml").write_text("defaults: {alhpa: 1}"), r"info\.yaml: unknown key 'alhpa'"),
            (lambda d: (d / "images").rename(d / "moved"), r"image root .* is not a folder.*--data-dir"),
        ],
    )
    def test_an_error_in_the_data_is_reported_before_a_run_begins(self, tiny, tmp_path, run_script, damage, message):
        damage(tiny)
        assert re.search(message, self.refused(run_script, "train", *flags(tiny, tmp_path / "out")))
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("on_device", ["on", "off"])
    def test_a_truncated_image_ends_the_run_and_leaves_nothing(self, tiny, tmp_path, run_script, workers, on_device):
        victim = tiny / "images/train/2/1.png"
        victim.write_bytes(victim.read_bytes()[:300])
        more = ("--workers", workers, "--batch-size", 28, "--data-on-device", on_device)
        outcome = run_script("train", *flags(tiny, tmp_path / "out", *more))
        assert outcome.code == 2
        assert re.search(r"error: .*train\.txt:26: .*1\.png: not a readable image .*; repair", outcome.err)
        assert "Traceback" not in outcome.err
        assert names_in(tmp_path / "out") == ONLY_THE_LOCK

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--model", "resnet5"], "timm has no model 'resnet5'"),
            (["--opt", "sdg"], "--opt sdg"),
            (["--branch-sizes", "5", "1"], r"branch_sizes \[5, 1\]: 3 branches over 3 classes"),
            (["--batch-size", "100"], "fewer than --batch-size 100"),
            (["--mixed-precision", "fp16"], "--mixed-precision fp16"),
            (["--eval-split", "val"], r"val\.txt does not exist"),
        ],
    )
    def test_a_setting_that_only_torch_or_the_data_can_refute_is_refused(
        self, tiny, tmp_path, run_script, more, message
    ):
        assert re.search(message, self.refused(run_script, "train", *flags(tiny, tmp_path / "out", *more)))

    def test_a_run_of_the_same_name_is_replaced_only_with_overwrite(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        before = weights(tmp_path / "run")
        outcome = run_script("train", *flags(tiny, tmp_path, "--epochs", 1, "--seed", 1))
        assert outcome.code == 2
        assert "continue it with --resume auto, replace it with --overwrite" in outcome.err
        assert_same(before, weights(tmp_path / "run"))
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1, "--seed", 1, "--overwrite")).code == 0

    def test_an_overwriting_run_that_fails_restores_the_old_run(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        before = weights(tmp_path / "run")
        assert run_script("train", *flags(tiny, tmp_path, "--overwrite", "--lr", "1e30")).code == 2
        assert_same(before, weights(tmp_path / "run"))
        assert names_in(tmp_path) == [*ONLY_THE_LOCK, "run", "tiny"]

    def test_resuming_with_another_seed_is_refused(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        outcome = run_script("train", *flags(tiny, tmp_path, "--epochs", 1, "--seed", 1, "--resume", "auto"))
        assert outcome.code == 2
        assert "seed: 0 -> 1" in outcome.err
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["config"]["seed"] == 0

    def test_resuming_on_another_number_of_classes_is_refused(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        make_dataset(tiny, counts=(16, 8, 4, 3))
        outcome = run_script("train", *flags(tiny, tmp_path, "--epochs", 1, "--resume", "auto"))
        assert outcome.code == 2
        assert "classes: 3 -> 4" in outcome.err

    def test_resuming_when_no_checkpoint_is_valid_is_refused(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        (tmp_path / "run/checkpoints/1-3/model.safetensors").write_bytes(b"")
        outcome = run_script("train", *flags(tiny, tmp_path, "--epochs", 1, "--resume", "auto"))
        assert outcome.code == 2
        assert "no checkpoint of" in outcome.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tau", "nan"], r"tau \(--tau\): 'nan' is not a number"),
            (["--fold", "x.bin"], r"--fold x\.bin: .*\.safetensors"),
            (["--split", "val"], r"has no val\.txt"),
            (["--which", "best"], "no best checkpoint"),
            (["--ckpt", "README.md"], "the authors' files: evaluate.py --format released"),
            (["--batch-size", "0"], r"batch_size \(--batch-size\): 0 is below"),
            (["--out"], r"unrecognized arguments: --out \(did you mean --output\?\); `"),
        ],
    )
    def test_an_invalid_flag_of_evaluate_is_refused(self, tiny, tmp_path, run_script, arguments, message):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        assert re.search(message, self.refused(run_script, "evaluate", "--ckpt", tmp_path / "run", *arguments))

    def test_a_flag_of_evaluate_that_the_runs_method_does_not_use_is_refused(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1, "--method", "ce")).code == 0
        message = self.refused(run_script, "evaluate", "--ckpt", tmp_path / "run", "--eval-branch-at", "pooled")
        assert "--eval-branch-at: --network plain does not use it (--network reslt does)" in message

    def test_a_dataset_with_another_number_of_classes_is_refused(self, tiny, tmp_path, run_script):
        assert run_script("train", *flags(tiny, tmp_path, "--epochs", 1)).code == 0
        other = make_dataset(tmp_path / "other", counts=(9, 5, 3, 2))
        message = self.refused(run_script, "evaluate", "--ckpt", tmp_path / "run", "--data", other)
        assert re.search(r"trained on 3 classes, but .*other has 4; .*--data", message)

    def test_a_missing_checkpoint_is_reported(self, tmp_path, run_script):
        assert "there is no checkpoint" in self.refused(run_script, "evaluate", "--ckpt", tmp_path / "none")

    def test_a_loss_that_is_not_finite_stops_the_run(self, tiny, tmp_path, run_script):
        """The first step moves the weights so far that the second step's loss is not finite. Its images are all named."""
        outcome = run_script("train", *flags(tiny, tmp_path / "out", "--lr", "1e30"))
        assert outcome.code == 2
        message, *files = outcome.err[outcome.err.index("error: ") :].splitlines()
        assert re.match(
            r"error: epoch 1, step 2 of 3, learning rate 1e\+30: the loss is (nan|inf)\. .*--clip-grad", message
        )
        lines = (tiny / "train.txt").read_text().splitlines()
        second = ShuffledBatches(np.arange(28), BatchShard(8), seed=0).order(0)[1]
        wanted = {f"{tiny / 'train.txt'}:{i + 1} {lines[i].rpartition(' ')[0]}" for i in second}
        assert {file.strip() for file in files} == wanted
        assert names_in(tmp_path / "out") == ONLY_THE_LOCK

    @pytest.mark.parametrize(
        ("more", "processes", "message"),
        [
            (["--batch-size", "9"], 2, r"batch_size: 9 images .* 2 processes x 1 --grad-accum-steps.*; give 8 or 10"),
            (["--grad-accum-steps", "3"], 1, r"8 images .* 1 process x 3 --grad-accum-steps.*; give 6 or 9"),
            (["--batch-size", "10", "--mixup", "0.2"], 2, r"mixing pairs images.*; give 8 or 12"),
            (["--batch-size", "4", "--grad-accum-steps", "2"], 2, r"with at least 2 images each; give 8"),
        ],
    )
    def test_a_batch_that_cannot_be_divided_evenly_is_refused(
        self, tiny, tmp_path, run_script, monkeypatch, more, processes, message
    ):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert re.search(message, self.refused(run_script, "train", *flags(tiny, tmp_path, *more)))

    def test_an_accelerate_launch_that_starts_one_process_instead_of_two_is_refused(
        self, tiny, tmp_path, run_script, monkeypatch
    ):
        """`accelerate launch --cpu --num_processes 2` gives its only process this environment."""
        for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
            monkeypatch.setenv(name, value)
        message = self.refused(run_script, "train", *flags(tiny, tmp_path))
        assert "accelerate launch --multi_gpu --num_processes 2" in message

    @pytest.mark.parametrize("plugin", ["fsdp", "deepspeed", "megatron_lm", "parallelism_config"])
    def test_an_accelerate_launch_that_divides_the_model_is_refused(
        self, tiny, tmp_path, run_script, monkeypatch, plugin
    ):
        monkeypatch.setenv(f"ACCELERATE_USE_{plugin.upper()}", "true")
        message = self.refused(run_script, "train", *flags(tiny, tmp_path))
        assert f"accelerate launch --use_{plugin} (ACCELERATE_USE_{plugin.upper()}=true): checkpoints" in message

    def test_processes_that_are_not_connected_are_refused(self, tiny, tmp_path, run_script, monkeypatch):
        """WORLD_SIZE is set alone, as a script may do; then Accelerate runs one process in spite of it."""

        def refuses(**_):
            raise ValueError("environment variable MASTER_ADDR expected, but not set")

        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(device, "PartialState", refuses)
        message = self.refused(run_script, "train", *flags(tiny, tmp_path))
        assert "WORLD_SIZE is 2, but the processes cannot connect: environment variable MASTER_ADDR" in message
        assert "accelerate launch --multi_gpu --num_processes 2 train.py" in message
        monkeypatch.setattr(device, "PartialState", lambda **_: SimpleNamespace(num_processes=1))
        message = self.refused(run_script, "train", *flags(tiny, tmp_path))
        assert "WORLD_SIZE is 2, but Accelerate runs 1" in message

    def test_batch_norm_over_processes_without_gpus_is_refused(self, tiny, tmp_path, run_script):
        assert "--sync-bn: it requires GPUs" in self.refused(run_script, "train", *flags(tiny, tmp_path, "--sync-bn"))

    def test_the_command_itself_ends_with_2_and_prints_only_the_errors(self):
        ended = subprocess.run(
            [sys.executable, "train.py", "--alpha", "2", "--nonsense"], cwd=PROJECT, capture_output=True, text=True
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: 2 errors in the configuration:")
        assert ended.stdout == ""
