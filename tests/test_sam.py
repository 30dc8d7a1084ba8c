"""Sharpness-aware minimization: steps computed on paper, and steps of networks compared with plain steps."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import loss_of, mixing_of, model_of, optimizer_of
from torch import nn

from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.training.step import TrainStep

COUNTS = np.array([9, 5, 2])
BASE = Config.of(
    model="cifar_resnet20", model_kwargs={"channels": (4, 8, 8)}, branch="bn", batch_size=8, lr=0.1, nesterov=True
)


class Quadratic(nn.Module):
    """A model that returns 1.5 a^2 + 2 b^2 for any images; its gradient is (3 a, 4 b)."""

    def __init__(self, a: float = 1.0, b: float = 1.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([a])), nn.Parameter(torch.tensor([b]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """-> (1, N, 1)"""
        return (1.5 * self.a**2 + 2 * self.b**2).expand(1, len(images), 1)


class MeanOfFour(nn.Module):
    """A loss that averages the logits of a window of 4 images, in one or several micro-batches."""

    draws = 0

    def denominators(self, targets):
        return torch.tensor([4.0])

    def forward(self, logits, targets, denominators=None):
        return logits.sum() / 4


def quadratic_step(model: Quadratic, micro_batches: int = 1, accelerator=None, **settings) -> TrainStep:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator, shard = accelerator or Accelerator(cpu=True), BatchShard(4, micro_batches=micro_batches)
    return TrainStep(model, MeanOfFour(), optimizer, accelerator, shard, lambda x: x, 0, **settings)


def window_of(step: TrainStep) -> list:
    parts = step.shard.micro_batches
    return [(torch.zeros(4 // parts, 1, 1, 1), torch.zeros(4 // parts, dtype=torch.int64))] * parts


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_equals_one_computed_by_hand(micro_batches):
    """At (1, 1) the gradient is (3, 4) with norm 5. With rho 0.5, the step uses the gradient at (1.3, 1.4), (3.9, 5.6);
    the reported loss is that at (1, 1), 3.5. Clipped to a norm of 0.1, the gradient is 0.1 (3.9, 5.6) / sqrt(3.9^2 +
    5.6^2)."""
    model = Quadratic()
    step = quadratic_step(model, micro_batches, sam=0.5)
    loss, _ = step.update(window_of(step), 0)
    torch.testing.assert_close(torch.cat([model.a, model.b]), torch.tensor([1 - 0.39, 1 - 0.56]))
    assert loss.item() == pytest.approx(3.5)

    clipped = Quadratic()
    step = quadratic_step(clipped, micro_batches, sam=0.5, clip_grad=0.1)
    step.update(window_of(step), 0)
    norm = (3.9**2 + 5.6**2) ** 0.5
    torch.testing.assert_close(
        torch.cat([clipped.a, clipped.b]), torch.tensor([1 - 0.1 * 0.39 / norm, 1 - 0.1 * 0.56 / norm])
    )


def test_a_frozen_parameter_neither_moves_nor_counts_in_the_norm():
    """The gradient 3 of a alone has norm 3, so the step uses the gradient at a + rho, which is 3 * 1.5."""
    model = Quadratic()
    model.b.requires_grad_(False)
    step = quadratic_step(model, sam=0.5)
    step.update(window_of(step), 0)
    assert (model.a.item(), model.b.item()) == (pytest.approx(1 - 0.45), 1.0)


def test_without_a_gradient_nothing_moves_and_rho_0_is_a_plain_step():
    model = Quadratic(0.0, 0.0)
    step = quadratic_step(model, sam=0.5)
    step.update(window_of(step), 0)
    assert (model.a.item(), model.b.item()) == (0.0, 0.0)
    off = quadratic_step(Quadratic(), sam=0.0)
    off.update(window_of(off), 0)
    assert off.sharpness is None
    assert off.model.a.item() == pytest.approx(1 - 0.3)


class Scaled:
    """An accelerator and an optimizer with fp16's loss scaler."""

    device, num_processes = torch.device("cpu"), 1

    def __init__(self, model: nn.Module, scale: float):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.plain = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def no_sync(self, model):
        return nullcontext()

    def reduce(self, tensor, how):
        return tensor

    def zero_grad(self, set_to_none):
        self.plain.zero_grad(set_to_none=set_to_none)

    def step(self):
        self.scaler.step(self.plain)
        self.scaler.update()


@pytest.mark.parametrize(("scale", "weights"), [(2.0**16, (0.61, 0.44)), (2.0**127, (1.0, 1.0))])
def test_a_loss_scaler_does_not_change_the_direction_and_an_overflow_skips_the_step(scale, weights):
    """3 * 2^127 is infinite in float32: the weights stay unchanged, and the scale is halved."""
    model = Quadratic()
    scaled = Scaled(model, scale)
    step = quadratic_step(model, accelerator=scaled, sam=0.5)
    step.optimizer = scaled
    step.update(window_of(step), 0)
    torch.testing.assert_close(torch.cat([model.a, model.b]), torch.tensor(weights))
    assert scaled.scaler.get_scale() == (scale / 2 if weights == (1.0, 1.0) else scale)


def step_of(config: Config, micro_batches: int = 1, loss_kind=lambda loss: loss, **settings) -> TrainStep:
    torch.manual_seed(0)
    model, mixing = model_of(config, 3), mixing_of(config, 3)
    shard = BatchShard(config.optim.batch_size, micro_batches=micro_batches, paired=mixing is not None)
    loss, optimizer, alone = loss_kind(loss_of(config, COUNTS)), optimizer_of(config, model), Accelerator(cpu=True)
    return TrainStep(
        model, loss, optimizer, alone, shard, lambda x: x.float() / 64 - 2, 5, mixing, sam=config.optim.sam, **settings
    )


def batch(micro_batches: int = 1) -> list:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 0, 2, 1, 0, 2])
    return list(zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True))


@pytest.mark.parametrize(
    ("changes", "micro_batches"),
    [
        ({"drop": 0.5, "mixup": 0.4, "mixup_mode": "elem"}, 1),
        ({"drop": 0.5}, 2),
        ({"method": "seql", "seql_threshold": 0.5}, 1),
    ],
    ids=["mixing and dropout", "micro-batches", "random costs"],
)
def test_the_second_gradient_is_a_plain_gradient_of_the_same_draws_at_moved_weights(changes, micro_batches):
    """Two other networks compute plain gradients: one at the initial weights, and one at weights that the test moves. The
    network with SAM ends with the second gradient and its initial weights."""
    config = BASE.changed(**changes, sam=0.3)
    step, here, there = (
        step_of(each, micro_batches) for each in (config, config.changed(sam=0.0), config.changed(sam=0.0))
    )
    before = copy.deepcopy(step.model.state_dict())
    for one in (step, here, there):
        one.train_mode()
        one.window = one.inputs(batch(micro_batches), 3)
    totals, plain = step.gradients(step.window), here.gradients(here.window)
    assert [t.item() for t in totals] == [t.item() for t in plain]
    norm = sum(p.grad.double().square().sum() for p in here.model.parameters()).sqrt()
    with torch.no_grad():
        for moved, p in zip(there.model.parameters(), here.model.parameters(), strict=True):
            moved.add_(p.grad * (0.3 / norm).float())
    there.gradients(there.window)
    wanted, found = (torch.cat([p.grad.flatten() for p in one.model.parameters()]) for one in (there, step))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - torch.cat([p.grad.flatten() for p in here.model.parameters()])).norm() > 0.1 * wanted.norm()
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


class Counting(nn.Module):
    """A loss that counts the batches it sees in training."""

    draws = 0

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss, self.batches, self.track_running_stats = loss, 0, True

    def forward(self, *inputs):
        self.batches += self.training and self.track_running_stats
        return self.loss(*inputs)


@pytest.mark.parametrize("settings", [{}, {"keeps_statistics": True}], ids=["train", "eval"])
@pytest.mark.parametrize("network", ["resnet", "timm's BatchNorm and activation in one"])
def test_statistics_are_bit_equal_to_those_of_the_first_pass(network, settings):
    """This is true of BatchNorm, of a deconfounded head and of a loss. A BatchNorm in evaluation mode is not changed."""
    models = {"resnet": {}, "timm's BatchNorm and activation in one": {"model": "lcnet_035", "model_kwargs": {}}}
    config = BASE.changed(method="causal", head_groups=1, img_size=32, **models[network])
    steps = plain, sharp = [step_of(config.changed(sam=rho), loss_kind=Counting, **settings) for rho in (0.0, 0.3)]
    seen = []
    for step in steps:
        step.train_mode()
        norms = [m for m in step.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) > 3
        norms[-1].register_forward_hook(lambda m, *_: seen.append((m.training, m.track_running_stats)))
        step.gradients(step.inputs(batch(), 0))
        assert step.loss_fn.batches == 1
        assert all(m.track_running_stats for m in (*norms, step.loss_fn, step.model.backbone.get_classifier()))
    buffers = [dict(step.model.named_buffers()) for step in steps]
    assert all(torch.equal(buffers[0][name], tensor) for name, tensor in buffers[1].items())
    direction = next(name for name in buffers[0] if name.endswith(("fc.running_mean", "classifier.running_mean")))
    assert buffers[0][direction].any()
    counted = {int(tensor) for name, tensor in buffers[1].items() if name.endswith("num_batches_tracked")}
    in_training = not settings
    assert counted == {int(in_training)}
    assert seen == [(in_training, True)] * 2 + [(in_training, not in_training)]
    assert plain.sharpness is None
    assert sharp.sharpness is not None
