"""The learning rate of every epoch, compared with the literal formulas, and the parameters that are decayed."""

import math

import pytest
import torch
from builders import optimizer_of
from torch._subclasses.fake_tensor import FakeTensorMode

from reslt.config.schema import DEFAULTS, Config
from reslt.training.optim import create_scheduler


def rates(config: Config) -> list[float]:
    optimizer = optimizer_of(config, torch.nn.Linear(2, 2))
    scheduler = create_scheduler(config.optim, optimizer)
    seen = []
    for epoch in range(config.optim.epochs):
        scheduler.step(epoch)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_the_cifar_schedule_is_that_of_the_released_code():
    """lr (1/3 (1-f) + f), f = (e+1)/5, for epochs 0-4; then lr; a tenth from epoch 160, a hundredth from epoch 180."""
    config = Config.of(
        epochs=200, lr=0.1, sched="multistep", decay_milestones=(160, 180), warmup_epochs=5, warmup_lr=0.1 / 3
    )
    expected = []
    for e in range(200):
        f = (e + 1) / 5
        expected.append(0.1 * (1 / 3 * (1 - f) + f) if e < 5 else 0.1 if e < 160 else 0.01 if e < 180 else 0.001)
    assert rates(config) == pytest.approx(expected, rel=1e-12)


def test_the_imagenet_lt_schedule_is_that_of_the_released_code():
    """lr (e+1)/5 for e < 5; then lr/2 (1 + cos(pi (e-4)/(180-4)))."""
    config = Config.of(epochs=180, lr=0.1, sched="cosine", warmup_epochs=5)
    expected = [0.1 * (e + 1) / 5 if e < 5 else 0.05 * (1 + math.cos(math.pi * (e - 4) / 176)) for e in range(180)]
    assert rates(config) == pytest.approx(expected, rel=1e-12)


def test_the_inaturalist_schedule_has_no_warm_up():
    """lr/2 (1 + cos(pi e/E))"""
    config = Config.of(epochs=200, lr=0.1, sched="cosine", warmup_epochs=0)
    assert rates(config) == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 200)) for e in range(200)], rel=1e-12)


def test_min_lr_is_the_floor_of_a_cosine_and_decay_rate_the_factor_of_a_milestone():
    config = Config.of(epochs=10, lr=1.0, sched="cosine", warmup_epochs=0, min_lr=0.1)
    assert rates(config) == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * e / 10)) for e in range(10)])
    config = Config.of(epochs=6, lr=1.0, sched="multistep", decay_milestones=(2, 4), decay_rate=0.5, warmup_epochs=1)
    assert rates(config) == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("sched", ["cosine", "multistep"])
def test_a_run_shorter_than_its_warm_up_follows_the_warm_up(sched):
    config = Config.of(epochs=2, lr=1.0, sched=sched, decay_milestones=(160,), warmup_epochs=5)
    assert rates(config) == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_with_weight_decay_on_every_parameter(nesterov):
    """BatchNorm's scales and biases decay too; our SGD and torch.optim.SGD take the same three steps."""

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())

    ours, theirs = network(), network()
    config = Config.of(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    optimizers = [
        optimizer_of(config, ours),
        torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01),
    ]
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("opt", ["sgd", "SGD", "sgdw", "lookahead_sgd"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterov_is_on_only_if_it_is_requested(opt, nesterov):
    optimizer = optimizer_of(Config.of(opt=opt, nesterov=nesterov, lr=0.01), torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]["nesterov"] == nesterov


@pytest.mark.parametrize("opt", ["adamw", "momentum", "lamb"])
def test_other_optimizers_of_timm_are_created_by_name(opt):
    optimizer = optimizer_of(Config.of(opt=opt, lr=0.01), torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]["weight_decay"] == DEFAULTS["weight_decay"]


@pytest.mark.parametrize(
    ("device", "opt", "is_fused"), [("cuda", "sgd", True), ("cpu", "sgd", False), ("cuda", "adamw", False)]
)
def test_sgd_is_fused_on_a_gpu_without_a_loss_scaler(device, opt, is_fused):
    """The parameters are fake tensors: they name a device but have no values."""
    with FakeTensorMode():
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(2, 2, device=device))
        optimizer, with_scaler = (optimizer_of(Config.of(opt=opt, mixed_precision=p), model) for p in ("bf16", "fp16"))
    assert bool(optimizer.param_groups[0].get("fused")) == is_fused
    assert not with_scaler.param_groups[0].get("fused")
