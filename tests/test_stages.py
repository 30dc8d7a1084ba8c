"""Stages: how they resolve, the parts that they train, and runs that are stopped within one."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate import Accelerator
from builders import loss_of, model_of
from conftest import TINY_FLAGS, at_update, make_dataset
from safetensors.torch import load_file

from reslt.config.checks import batch_faults
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.config.stages import stage_at, stage_faults, stages_of, total_epochs
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.evaluation.metrics import ClassHits
from reslt.training.optim import create_optimizer, create_scheduler
from reslt.training.setup import Training
from reslt.training.step import TrainStep
from reslt.training.trained_parts import check_parts, train_only

STEPS = 3  # per epoch of `tiny`: 28 images in batches of 8
NETWORK = {"model": "cifar_resnet20", "model_kwargs": {"channels": (8, 16, 32)}, "img_size": 16, "branch": "bn"}


def config_of(*stages: dict, **more) -> Config:
    return Config.of(**{"method": "ce", "epochs": 10, "lr": 0.1, "stages": stages, **more})


class TestResolving:
    def test_a_stage_that_changes_only_the_loss_or_mixing_continues_schedule_and_optimizer(self):
        config = config_of({"start": 0.8, "class_weights": "inverse", "mixup": 0.0}, mixup=1.0, sched="multistep")
        first, second = stages_of(config)
        assert (first.begin, first.end, first.schedule_begin, first.is_fresh) == (0, 8, 0, True)
        assert (second.begin, second.end, second.schedule_begin, second.is_fresh) == (8, 10, 0, False)
        assert second.config == config.changed(class_weights="inverse", mixup=0.0)
        assert (first.train, second.train, second.reinit, second.bn) == ({"all": 1.0}, {"all": 1.0}, (), "train")

    def test_an_appended_stage_is_fresh_with_a_cosine_of_its_own_epochs(self):
        config = config_of(
            {"epochs": 4, "train": ["classifier"], "reinit": ["classifier"], "sampler": "balanced", "bn": "eval"},
            sched="multistep", decay_milestones=(5,), warmup_epochs=3, warmup_lr=0.01,
        )  # fmt: skip
        _, second = stages_of(config)
        assert (second.begin, second.end, second.schedule_begin, second.is_fresh) == (10, 14, 10, True)
        assert (second.train, second.reinit, second.bn) == ({"classifier": 1.0}, ("classifier",), "eval")
        own = {"sampler": "balanced", "sched": "cosine", "warmup_epochs": 0, "warmup_lr": 0.0, "decay_milestones": ()}
        assert second.config == config.changed(epochs=4, **own)
        assert (total_epochs(config), config.optim.epochs) == (14, 10)

    def test_a_later_stage_continues_the_one_before_it_or_begins_from_the_runs_settings(self):
        config = config_of(
            {"start": 0.5, "train": {"classifier": 0.2}, "lr": 0.02, "bn": "eval", "class_weights": "inverse"},
            {"start": 0.8, "smoothing": 0.1},
            {"epochs": 2},
        )
        _, second, third, fourth = stages_of(config)
        spans = [(stage.begin, stage.end, stage.schedule_begin) for stage in (second, third, fourth)]
        assert spans == [(5, 8, 5), (8, 10, 5), (10, 12, 10)]
        assert third.config == second.config.changed(smoothing=0.1)  # the schedule of 5 epochs from the 5th on
        assert (third.config.optim.epochs, third.train, third.bn) == (5, {"classifier": 0.2}, "eval")
        assert fourth.config == config.changed(epochs=2, sched="cosine", warmup_epochs=0)
        assert (fourth.train, fourth.bn, fourth.config.method.class_weights) == ({"all": 1.0}, "train", "uniform")

    @pytest.mark.parametrize("key", ["lr", "sched", "warmup_epochs", "weight_decay", "train", "reinit"])
    def test_a_stage_that_states_optimization_or_parts_is_fresh(self, key):
        value = {"sched": "cosine", "warmup_epochs": 1, "train": "classifier", "reinit": "classifier"}.get(key, 0.01)
        second = stages_of(config_of({"start": 0.8, key: value}))[1]
        assert (second.is_fresh, second.schedule_begin, second.config.optim.epochs) == (True, 8, 2)
        assert second.reinit == (("classifier",) if key == "reinit" else ())

    def test_sharpness_aware_steps_continue_the_optimizer_and_end_with_a_fresh_stage(self):
        stages = stages_of(config_of({"start": 0.5, "sam": 0.1}, {"start": 0.8, "smoothing": 0.1}, {"epochs": 2}))
        assert [stage.config.optim.sam for stage in stages] == [0.0, 0.1, 0.1, 0.0]
        assert [stage.is_fresh for stage in stages] == [True, False, False, True]

    def test_the_moving_average_restarts_with_the_optimizer_unless_the_stage_states_otherwise(self):
        stated = [{"start": 0.2}, {"start": 0.4, "ema": "restart"}, {"start": 0.6}, {"epochs": 1}]
        stages = stages_of(config_of(*stated, {"epochs": 1, "ema": "continue"}))
        assert [stage.ema for stage in stages] == ["restart", "continue", "restart", "continue", "restart", "continue"]

    def test_every_epoch_belongs_to_one_stage(self):
        stages = stages_of(config_of({"start": 0.8, "smoothing": 0.1}, {"epochs": 2}))
        assert [stage_at(stages, epoch).number for epoch in (0, 7, 8, 9, 10, 11, 12)] == [1, 1, 2, 2, 3, 3, 3]

    def test_stage2_flags_replace_epochs_and_rate_of_the_second_stage(self):
        appended = {"epochs": 4, "train": ["classifier"]}
        for changes, epochs, lr in (({}, 4, 0.1), ({"stage2_epochs": 7}, 7, 0.1), ({"stage2_lr": 0.3}, 4, 0.3)):
            second = stages_of(config_of(appended, {"epochs": 1}, **changes))[1]
            assert (second.end - second.begin, second.config.optim.epochs, second.config.optim.lr) == (
                epochs,
                epochs,
                lr,
            )
        for epochs in range(1, 10):
            second = stages_of(config_of({"start": 0.8, "smoothing": 0.1}, stage2_epochs=epochs))[1]
            assert (second.begin, second.end) == (10 - epochs, 10)

    def test_the_deferred_stages_of_200_epochs_begin_at_epoch_160(self):
        for method in ("ce_drw", "ce_drs", "ldam_drw"):
            config = Config.of(method=method, epochs=200)
            assert stages_of(config)[1].begin == 160

    def test_with_zero_epochs_appended_stages_begin_at_once(self):
        stages = stages_of(config_of({"epochs": 4}, epochs=0))
        assert (stage_at(stages, 0).number, stages[-1].end) == (2, 4)


FAULTS = [
    ({"start": 0.5, "smothing": 0.1}, "stage 2: unknown key 'smothing' (did you mean smoothing?)"),
    ({"smoothing": 0.1}, "stage 2: give either start, a share of --epochs, or epochs, which are appended"),
    ({"start": 0.5, "epochs": 3}, "stage 2: give either start, a share of --epochs, or epochs, which are appended"),
    ({"start": 1.0}, "stage 2: start: 1.0 is not a share of the epochs between 0 and 1"),
    ({"start": "half"}, "stage 2: start: 'half' is not a share of the epochs between 0 and 1"),
    ({"start": True}, "stage 2: start: True is not a share of the epochs between 0 and 1"),
    ({"epochs": 0}, "stage 2: epochs: 0 is not a whole number from 1"),
    ({"epochs": 2.5}, "stage 2: epochs: 2.5 is not a whole number from 1"),
    (
        {"epochs": 2, "train": ["clasifier"]},
        "stage 2: train: 'clasifier' is not one of all, classifier, scales, branches, attention, centroids, router (did you mean "
        "classifier?)",
    ),
    ({"epochs": 2, "train": []}, "stage 2: train: no part is named; leave it out to train all"),
    (
        {"epochs": 2, "train": None},
        "stage 2: train: 'None' is not one of all, classifier, scales, branches, attention, centroids, router",
    ),
    (
        {"epochs": 2, "train": {"classifier": 0}},
        "stage 2: train: each part's factor of the learning rate must be a number above 0",
    ),
    (
        {"epochs": 2, "train": {"classifier": math.inf}},
        "stage 2: train: each part's factor of the learning rate must be a number above 0",
    ),
    (
        {"epochs": 2, "train": ["scales"]},
        "stage 2: train: scales: the model has none without --head scaled; choose it, or another part",
    ),
    (
        {"epochs": 2, "train": ["branches"]},
        "stage 2: train: branches: the model has none without --network reslt or bbn; choose it, or another part",
    ),
    (
        {"epochs": 2, "train": ["router"]},
        "stage 2: train: router: the model has none without --router-topk; give it, or name another part",
    ),
    ({"epochs": 2, "reinit": ["all"]}, "stage 2: reinit: 'all' is not one of classifier, centroids"),
    ({"epochs": 2, "bn": "frozen"}, "stage 2: bn: 'frozen' is not one of train, eval"),
    ({"epochs": 2, "ema": True}, "stage 2: ema: True is not one of restart, continue"),
    (
        {"start": 0.5, "ema": "restart"},
        "stage 2: ema: there is no moving average without model_ema (--model-ema); state it beside the stages, or leave ema out",
    ),
    ({"start": 0.5, "sam": -0.1}, "stage 2: sam: -0.1 is below 0"),
    ({"start": 0.5, "smoothing": 2}, "stage 2: smoothing: 2.0 is above 1"),
    ({"start": 0.5, "lr": None}, "stage 2: lr: no value given"),
    ({"start": 0.5, "sampler": "none"}, "stage 2: sampler: no value given"),
    ({"start": 0.5, "cost": ["ce"]}, "stage 2: cost: ['ce'] is not text"),
    (
        {"epochs": 3, "sched": "multistep"},
        "stage 2: sched: multistep requires decay_milestones, counted from the stage's first epoch",
    ),
    (
        {"epochs": 3, "sched": "multistep", "decay_milestones": [2, 1]},
        "stage 2: decay_milestones: [2, 1] are not in ascending order; sort them",
    ),
    ({"epochs": 3, "focal_gamma": 2}, "stage 2: focal_gamma: no part of this stage uses it; leave it out"),
    (
        {"start": 0.5, "class_weights": "effective", "sampler_beta": 0.9},
        "stage 2: sampler_beta: no part of this stage uses it; leave it out",
    ),
    ({"epochs": 3, "decay_milestones": [1]}, "stage 2: decay_milestones: they require sched: multistep; state it too"),
]


@pytest.mark.parametrize(("stage", "message"), FAULTS)
def test_a_fault_of_a_stage_is_reported_once_with_its_place(stage, message):
    assert stage_faults(config_of(stage)) == [f"stages: {message}"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            config_of({"start": 0.8}, {"start": 0.5}),
            "stages: stage 3: start: 0.5 is not after the start of the stage before it; sort the stages",
        ),
        (
            config_of({"epochs": 2}, {"start": 0.5}),
            "stages: stage 3: start: 0.5 is not after the start of the stage before it; sort the stages",
        ),
        (
            config_of({"start": 0.5, "smoothing": 0.1}, stage2_epochs=10),
            "stage2_epochs: 10 are not fewer than the 10 --epochs, which contain them",
        ),
        (
            config_of({"start": 0.5}, {"start": 0.8}, stage2_epochs=1),
            "stage2_epochs: a third stage begins within --epochs too; state the start of both in a recipe",
        ),
        (
            config_of(head="scaled"),
            "head: no stage trains the scales of a scaled head; use --method lws, or a recipe with such a stage",
        ),
        (
            config_of({"start": 0.5, "reinit": ["classifier"]}, epochs=0, init_from="run"),
            "epochs: 0 leaves no epochs for a stage that initializes a part again after a share of them; give more epochs",
        ),
    ],
)
def test_a_fault_of_stages_together_is_reported_once(config, message):
    assert stage_faults(config) == [message]


def test_with_zero_epochs_the_initial_weights_count_as_trained_by_the_stages_within_them(tmp_path):
    """A warning reports them; the appended stage is trained."""
    flags = ["--data", str(tmp_path), "--method", "ride_router", "--init-from", str(tmp_path), "--epochs", "0"]
    resolved = resolve(flags)
    assert "stage 2 has none of the 0 --epochs; give more to train it" in resolved.warnings
    assert [(stage.begin, stage.end) for stage in stages_of(resolved.config)] == [(0, 0), (0, 0), (0, 5)]


def test_every_fault_of_a_recipes_stages_is_reported_at_once_and_a_wrong_shape_alone(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce\nstages: [{start: 2}, {epochs: 1, bn: off}]\n")
    with pytest.raises(UserError, match=r"2 errors[^$]*stage 2: start: 2 is not[^$]*stage 3: bn: False is not"):
        resolve(["--recipe", str(recipe)])
    for text in ("stages: later", "stages: [crt]"):
        recipe.write_text(f"method: ce\n{text}\n")
        with pytest.raises(UserError, match=r"^stages \(recipe .*\): .* is not a list of mappings$"):
            resolve(["--recipe", str(recipe)])


def test_a_stage_that_mixes_images_needs_whole_pairs_for_every_part():
    config = config_of({"start": 0.5, "mixup": 0.2}, batch_size=6, grad_accum_steps=2)
    assert "mixing pairs images" in batch_faults(config, 1)[0]
    assert batch_faults(config.changed(stages=()), 1) == []


def test_a_stage_without_an_epoch_is_reported():
    warnings = resolve(["--method", "ce_drw", "--epochs", "2", "--warmup-epochs", "0"]).warnings
    assert warnings == ["stage 2 has none of the 2 --epochs; give more to train it"]
    assert resolve(["--method", "ce_drw", "--epochs", "3", "--warmup-epochs", "0"]).warnings == []


class TestTrainedParts:
    def model(self, **more) -> torch.nn.Module:
        torch.manual_seed(0)
        return model_of(Config.of(**NETWORK, **more), 3)

    def trained(self, model, train: dict) -> set[str]:
        train_only(model, train)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    def test_only_the_named_parts_require_gradients(self):
        model = self.model(method="reslt", head="scaled")
        every = {name for name, _ in model.named_parameters()}
        head = {"backbone.fc.weight", "backbone.fc.bias"}
        assert self.trained(model, {"classifier": 1.0}) == head
        assert self.trained(model, {"scales": 1.0}) == {"backbone.fc.scales"}
        assert self.trained(model, {"branches": 1.0}) == {"branches.weight", "branches.bias"}
        assert self.trained(model, {"all": 1.0}) == every - {"backbone.fc.scales"}
        assert self.trained(model, {"all": 1.0, "scales": 1.0}) == every

    def test_the_parts_of_every_expert_are_trained(self):
        model = self.model(method="reslt", experts=2)
        assert self.trained(model, {"classifier": 1.0, "branches": 1.0}) == {
            f"experts.{e}.{name}"
            for e in (0, 1)
            for name in ("backbone.fc.weight", "backbone.fc.bias", "branches.weight", "branches.bias")
        }

    def test_gradients_of_the_previous_stage_are_cleared(self):
        """Clipping would count them, and a resumed run has none."""
        model = self.model(method="ce")
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        train_only(model, {"classifier": 1.0})
        assert all(p.grad is None for p in model.parameters())

    def test_a_part_that_the_model_lacks_is_reported_before_the_first_step(self):
        stages = stages_of(config_of({"epochs": 1, "train": ["branches"]}))
        with pytest.raises(UserError, match="stages: train: the model has no branches; name another part"):
            check_parts(self.model(method="ce"), stages)
        kwargs = {"embed_dim": 48, "depth": 1, "num_heads": 2}
        two = model_of(
            Config.of(model="deit_tiny_distilled_patch16_224", model_kwargs=kwargs, img_size=32, method="ce"), 3
        )
        for stage in ({"epochs": 1, "train": ["classifier"]}, {"epochs": 1, "reinit": ["classifier"]}):
            with pytest.raises(UserError, match="has no single classifier; choose a model with one linear classifier"):
                check_parts(two, stages_of(config_of(stage)))

    def test_parts_have_factors_of_the_scheduled_rate(self):
        """MiSLAS: the classifier at 0.2 of the scales' rate; a cosine over 4 epochs."""
        config = Config.of(**NETWORK, method="mislas", epochs=2, lr=0.1, stage2_epochs=4)
        model, stage = model_of(config, 3), stages_of(config)[1]
        optimizer = create_optimizer(stage.config.optim, train_only(model, stage.train))
        scheduler = create_scheduler(stage.config.optim, optimizer)
        sizes = {sum(p.numel() for p in group["params"]): group for group in optimizer.param_groups}
        assert sizes.keys() == {3 * 32 + 3, 3}
        for epoch in range(4):
            scheduler.step(epoch)
            rate = 0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2
            assert sizes[3]["lr"] == pytest.approx(rate)
            assert sizes[99]["lr"] == pytest.approx(0.2 * rate)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_wraps_the_model_once_in_every_stage(precision):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = Config.of(**NETWORK, method="crt", epochs=1)
    model = model_of(config, 3)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    training = Training(model, config.optim, config.run, accelerator, BatchShard(8), normalize=lambda x: x)
    depths, kinds = [], []
    for stage in stages_of(config):
        training.enter(stage, loss_of(stage.config, np.array([9, 5, 2])))
        forward, depth = training.prepared.forward, 0
        while hasattr(forward, "__wrapped__"):
            forward, depth = forward.__wrapped__, depth + 1
        depths.append(depth)
        kinds.append(training.prepared(torch.zeros(2, 3, 16, 16)).dtype)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert depths[0] == depths[1]
    assert (depths[0] > 0) == (precision == "bf16")
    assert kinds == [torch.float32] * 2


@pytest.mark.parametrize(
    ("stage", "is_resumed", "restarts"),
    [
        ({"start": 0.5, "sam": 0.1}, False, False),
        ({"start": 0.5, "sam": 0.1, "ema": "restart"}, False, True),
        ({"start": 0.5, "sam": 0.1, "ema": "restart"}, True, False),
        ({"epochs": 1, "sam": 0.1, "ema": "continue"}, False, False),
    ],
)
def test_a_stage_has_steps_and_a_moving_average_of_its_own_if_it_states_so(stage, is_resumed, restarts):
    """The model has changed since the average started; a stage that is resumed leaves the average to the checkpoint."""
    config = config_of(stage, **NETWORK, model_ema=True)
    model, alone = model_of(config, 3), Accelerator(cpu=True)
    training = Training(model, config.optim, config.run, alone, BatchShard(8), normalize=lambda x: x)
    first, second = stages_of(config)
    training.enter(first, loss_of(first.config, np.array([9, 5, 2])))
    assert training.step.sam == 0.0
    with torch.no_grad():
        model.backbone.fc.weight.add_(1)
    training.enter(second, loss_of(second.config, np.array([9, 5, 2])), is_resumed=is_resumed)
    average = training.state.ema.module.backbone.fc.weight
    assert torch.equal(average, model.backbone.fc.weight) == restarts
    assert training.step.sam == 0.1


def flags(data: Path, output: Path, *more) -> list:
    return ["--data", data, "--output", output, "--experiment", "run", *TINY_FLAGS, *more]


def trained(run_script, data: Path, output: Path, *more) -> Path:
    outcome = run_script("train", *flags(data, output, *more))
    assert outcome.code == 0, outcome.err
    return output / "run"


def tensors(run: Path, checkpoint: str, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / f"{part}.safetensors")


def changed(run: Path, before: str, after: str, part: str = "model") -> set[str]:
    """Return the names of the tensors that differ between two checkpoints."""
    a, b = tensors(run, before, part), tensors(run, after, part)
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def recipe(folder: Path, **settings) -> tuple[str, Path]:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    return "--recipe", file


HEAD = {"backbone.fc.weight", "backbone.fc.bias"}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", ["crt", "lws"])
def test_a_second_stage_leaves_all_frozen_tensors_as_they_are(tiny, tmp_path, run_script, method, bn):
    """They stay bit for bit; BatchNorm's statistics change only with bn: train."""
    train = {"crt": "classifier", "lws": "scales"}[method]
    stage = {"epochs": 2, "train": [train], "sampler": "balanced4", "bn": bn}
    stated = recipe(tmp_path, method=method, stages=[stage | ({"reinit": ["classifier"]} if method == "crt" else {})])
    run = trained(run_script, tiny, tmp_path, *stated, "--clip-grad", "0.1")
    moved = changed(run, "2-6", "4-12")
    learned = {name for name in moved if not name.endswith(STATISTICS)}
    assert learned == {"crt": HEAD, "lws": {"backbone.fc.scales"}}[method]
    statistics = {name for name in tensors(run, "2-6") if name.endswith(STATISTICS)}
    assert moved - learned == (statistics if bn == "train" else set())
    if method == "lws":
        assert tensors(run, "2-6")["backbone.fc.scales"].tolist() == [1.0] * 3


def test_a_classifier_is_reinitialized_as_a_function_of_the_seed_alone(tiny, tmp_path, run_script, monkeypatch):
    """The weights are read at the first step of the second stage, in runs of different lengths."""
    seen = []

    def update(self, window, step, original=TrainStep.update):
        if sum(p.requires_grad for p in self.model.parameters()) == 2 and self not in [of_step for of_step, _ in seen]:
            seen.append((self, self.model.backbone.fc.weight.detach().clone()))
        return original(self, window, step)

    monkeypatch.setattr(TrainStep, "update", update)
    for i, more in enumerate((("--epochs", 1), ("--epochs", 2), ("--epochs", 1, "--seed", 1))):
        trained(run_script, tiny, tmp_path / str(i), "--method", "crt", "--stage2-epochs", 1, *more)
    first, longer, other = (weight for _, weight in seen)
    assert torch.equal(first, longer)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 1 / math.sqrt(32)  # torch's initialization of a linear layer with 32 inputs


def test_a_stage_that_changes_the_loss_continues_optimizer_schedule_and_average(tiny, tmp_path, run_script):
    """With an unchanged loss, a second stage changes nothing; with class weights or a sampler, nothing before it changes."""
    more = ("--epochs", 5, "--model-ema", "--model-ema-decay", "0.5", "--mixup", 0.2)
    plain = trained(run_script, tiny, tmp_path / "plain", "--method", "ce", *more)
    stages = [{"start": 0.8, "class_weights": "uniform"}]
    same = trained(run_script, tiny, tmp_path / "same", *recipe(tmp_path, method="ce", stages=stages), *more)
    deferred = [trained(run_script, tiny, tmp_path / name, "--method", name, *more) for name in ("ce_drw", "ce_drs")]
    for part in ("model", "optimizer", "ema"):
        last = tensors(plain, "5-15", part)
        assert all(torch.equal(last[name], tensor) for name, tensor in tensors(same, "5-15", part).items())
        before = tensors(plain, "4-12", part)
        for run in deferred:
            assert all(torch.equal(before[name], tensor) for name, tensor in tensors(run, "4-12", part).items())
            assert any(not torch.equal(last[name], tensor) for name, tensor in tensors(run, "5-15", part).items())
    for run in deferred:
        assert rates(run) == rates(plain)
        assert [state(run, checkpoint)["stage"] for checkpoint in ("4-12", "5-15")] == [1, 2]


def test_the_best_epoch_is_chosen_within_the_last_stage(tiny, tmp_path, run_script):
    """Epochs before it do not count, whatever they achieve on the validation list: their weights are another method's."""
    flags = ("--method", "crt", "--epochs", 3, "--stage2-epochs", 1, "--stage2-lr", "1e-9", "--val-from-train", 0.4)
    run = trained(run_script, tiny, tmp_path, *flags)
    assert (run / "checkpoints/best").read_text() == "4-8\n"


def rates(run: Path) -> list[float]:
    return pd.read_csv(run / "summary.csv")["lr"].tolist()


def state(run: Path, checkpoint: str) -> dict:
    return json.loads((run / "checkpoints" / checkpoint / "state.json").read_text())


def test_every_stage_has_its_own_learning_rate_schedule(tiny, tmp_path, run_script):
    """Stage 1: two epochs of warm-up to 0.1, then a cosine whose peak is the warm-up's last epoch. Stage 2: a warm-up from
    0.02 to 0.4 in two epochs, then steps of 0.5 after three and four epochs."""
    stage = {
        "epochs": 5, "train": ["classifier"], "lr": 0.4, "warmup_epochs": 2, "warmup_lr": 0.02, "sched": "multistep",
        "decay_milestones": [3, 4], "decay_rate": 0.5,
    }  # fmt: skip
    run = trained(
        run_script, tiny, tmp_path, *recipe(tmp_path, method="ce", stages=[stage]), "--epochs", 5, "--lr", "0.1",
        "--warmup-epochs", 2,
    )  # fmt: skip
    first = [0.05, 0.1, *(0.1 * (1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3))]
    second = [0.02 + 0.38 / 2, 0.4, 0.4, 0.2, 0.1]
    assert rates(run) == pytest.approx(first + second, rel=1e-6)


def test_the_moving_average_restarts_with_a_fresh_stage(tiny, tmp_path, run_script):
    """With a decay of 1 it keeps the weights from the start of the stage: for frozen parts these are also the final ones,
    for the new classifier they are within its initial bounds."""
    more = ("--method", "crt", "--stage2-epochs", 2, "--model-ema", "--model-ema-decay", "1", "--stage2-lr", 5)
    run = trained(run_script, tiny, tmp_path, *more)
    average, model = tensors(run, "4-12", "ema"), tensors(run, "4-12")
    parameters = {name for name in model if not name.endswith(STATISTICS)}
    assert {name for name in parameters if not torch.equal(average[name], model[name])} == HEAD
    assert average["backbone.fc.weight"].abs().max() <= 1 / math.sqrt(32)
    earlier, at_boundary = tensors(run, "2-6", "ema"), tensors(run, "2-6")
    assert any(not torch.equal(earlier[name], at_boundary[name]) for name in parameters - HEAD)


def final_bytes(run: Path) -> dict[str, bytes]:
    last = run / "checkpoints" / (run / "checkpoints/last").read_text().strip()
    files = [*last.glob("*.safetensors"), run / "checkpoints/last", run / "per_class.csv"]
    return {file.name: file.read_bytes() for file in files}


def die() -> None:
    raise MemoryError("killed")


EVERYTHING = ("--model-ema", "--model-ema-decay", "0.5", "--drop", "0.3", "--clip-grad", "0.5")
INTERRUPTED = {
    "appended": ("--method", "crt", "--stage2-epochs", 2, *EVERYTHING),
    "on the host, 2 micro-batches": (
        "--method", "mislas", "--stage2-epochs", 2, "--grad-accum-steps", 2, "--data-on-device", "off", "--sam", 0.1,
        *EVERYTHING,
    ),
    "deferred": ("--recipe", "deferred.yaml", "--epochs", 4, "--mixup", 0.2, *EVERYTHING),
    "centroids": ("--method", "oltr", "--stage2-epochs", 2, *EVERYTHING),
    "random costs": ("--method", "seql", "--seql-threshold", 0.5, "--epochs", 4, *EVERYTHING),
}  # fmt: skip
DEFERRED = {"start": 0.5, "class_weights": "effective", "sam": 0.1, "ema": "restart"}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """({case: the folder of its uninterrupted run}, filled by the tests; their dataset)"""
    return {}, make_dataset(tmp_path_factory.mktemp("stages") / "d")


@pytest.mark.parametrize(
    ("case", "moment"),
    [
        *((case, "within the second stage") for case in INTERRUPTED),
        ("appended", "at the boundary"),
        ("deferred", "at the boundary"),
        ("centroids", "at the boundary"),
        ("appended", "at its evaluation"),
    ],
)
def test_a_run_that_is_stopped_before_or_in_its_second_stage_ends_with_the_same_bytes(
    tmp_path, run_script, monkeypatch, whole_runs, case, moment
):
    """The run has 2 + 2 epochs. It is stopped before the eighth step, killed before the seventh, or stopped while the second
    epoch is evaluated."""
    wholes, data = whole_runs
    more, evaluations = INTERRUPTED[case], []
    if case == "deferred":
        (tmp_path / "deferred.yaml").write_text(yaml.safe_dump({"method": "ce", "stages": [DEFERRED]}))
        monkeypatch.chdir(tmp_path)
    if case not in wholes:
        wholes[case] = trained(run_script, data, data.parent / case, *more)

    def stop_at_the_second(self, *arguments, original=ClassHits.update):
        evaluations.append(1)
        if len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        if moment == "at the boundary":
            at_update(patched, 2 * STEPS, die)
            with pytest.raises(MemoryError):
                run_script("train", *flags(data, tmp_path, *more))
        else:
            if moment == "within the second stage":
                at_update(patched, 2 * STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            else:
                patched.setattr(ClassHits, "update", stop_at_the_second)
            assert run_script("train", *flags(data, tmp_path, *more)).code == 143
    resumed = run_script("train", *flags(data, tmp_path, *more, "--resume", "auto"))
    assert resumed.code == 0, resumed.err
    assert ("resuming in epoch 3, after 2 of its steps" in resumed.out) == (moment == "within the second stage")
    assert final_bytes(tmp_path / "run") == final_bytes(wholes[case])
    assert rates(tmp_path / "run") == rates(wholes[case])


def test_a_run_does_not_resume_in_another_stage_than_it_was_stopped_in(tiny, tmp_path, run_script, monkeypatch):
    more = ("--method", "crt", "--stage2-epochs", 2)
    with monkeypatch.context() as patched:
        at_update(patched, 2 * STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_script("train", *flags(tiny, tmp_path, *more)).code == 143
    longer = flags(tiny, tmp_path, *more, "--epochs", 3, "--resume", "auto")
    refused = run_script("train", *longer)
    assert (refused.code, "epochs: 2 -> 3" in refused.err) == (2, True)
    refused = run_script("train", *longer, "--force-resume")
    assert refused.code == 2
    assert (
        "was written in stage 2, but with these settings epoch 3 belongs to stage 1; give the old --epochs and stages"
    ) in refused.err
    assert run_script("train", *flags(tiny, tmp_path, *more, "--resume", "auto")).code == 0


def test_two_stages_train_in_bf16_and_are_printed(tiny, tmp_path, run_script):
    more = ("--method", "mislas", "--stage2-epochs", 1, "--stage2-lr", 0.2, "--mixed-precision", "bf16")
    outcome = run_script("train", *flags(tiny, tmp_path, *more))
    assert outcome.code == 0, outcome.err
    learned = {name for name in changed(tmp_path / "run", "2-6", "3-9") if not name.endswith(STATISTICS)}
    assert learned == HEAD | {"backbone.fc.scales"}
    line = next(line for line in outcome.out.splitlines() if line.startswith("stage 2"))
    assert "epoch 3; trains classifier (lr x 0.2), scales; " in line
    assert "sampler balanced; cost label_aware; " in line
    assert "lr 0.2, cosine" in line
