"""The cost of a classifier and its loss for many classes, compared with the backbone's step.

    python -m tests.benchmarks.classes [--classes 1000 8142 100000] [--batch N] [--width 2048] [--branches 3] [--rounds R]

The classifier sees the (K N, D) pooled features of K branches. As in training, ResLT's loss, the backward pass and an SGD
update of its weights follow: in bf16 autocast on a GPU, in float32 on a CPU, where CPU time is counted. The backbone is a
plain ResNet-50 at 224 pixels with one class. Memory is the peak of the classifier's step on a GPU; formulas are in
docs/scale.md."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from reslt.config.schema import Config
from tests.benchmarks.turns import default_device, machine, synchronize
from tests.builders import backbone_of, loss_of


def step_of(network: Callable, loss_fn: Callable, parameters, device: torch.device) -> Callable[[], None]:
    """Return a function that does one training step: forward, loss, backward, update."""
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_fn(network())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def classifier_step(classes: int, batch: int, width: int, branches: int, device: torch.device) -> Callable[[], None]:
    """Return the step of a linear classifier of K branches with ResLT's loss. Features get gradients too."""
    linear = torch.nn.Linear(width, classes, device=device)
    features = torch.randn(branches * batch, width, device=device, requires_grad=True)
    counts = np.maximum(500 * 500.0 ** -np.linspace(0, 1, classes), 1).astype(np.int64)
    loss_fn = loss_of(Config.of(branches=branches), counts).to(device)
    labels = torch.randint(classes, (batch,), device=device)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return loss_fn(logits, labels)

    return step_of(lambda: linear(features).view(branches, batch, classes), loss, linear.parameters(), device)


def backbone_step(batch: int, device: torch.device) -> Callable[[], None]:
    """Return the step of a ResNet-50 with one class at 224 pixels."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = backbone_of(Config.of(model="resnet50", method="ce"), 1).to(device, memory_format=layout)
    images = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=layout)
    return step_of(lambda: model(images), lambda logits: logits.float().mean(), model.parameters(), device)


def milliseconds(step: Callable[[], None], rounds: int, device: torch.device) -> float:
    """Return the median time of a step, after one that does not count; on a CPU, the CPU time."""
    clock, found = time.perf_counter if device.type == "cuda" else time.process_time, []
    for _ in range(rounds + 1):
        synchronize(device)
        start = clock()
        step()
        synchronize(device)
        found.append(1e3 * (clock() - start))
    return statistics.median(found[1:])


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Print the table; return {classes: milliseconds of the classifier's step}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 8142, 100_000], help="numbers of classes")
    parser.add_argument("--batch", type=int, help="images per step; unset: 256, on a CPU 16")
    parser.add_argument("--width", type=int, default=2048, help="width of the features")
    parser.add_argument("--branches", type=int, default=3, help="number of branches")
    parser.add_argument("--rounds", type=int, help="steps that count; unset: 20, on a CPU 3")
    parser.add_argument("--no-backbone", action="store_true", help="measure the classifier alone")
    given = parser.parse_args(arguments)
    device = default_device()
    on_gpu = device.type == "cuda"
    batch, rounds = given.batch or (256 if on_gpu else 16), given.rounds or (20 if on_gpu else 3)
    print(machine())
    backbone = None if given.no_backbone else milliseconds(backbone_step(batch, device), rounds, device)
    if backbone is not None:
        print(f"backbone's step, batch {batch}: {backbone:.1f} ms")
    print(f"{'classes':>9}{'classifier and loss':>22}{'of the backbone':>18}{'parameters':>13}{'peak memory':>14}")
    found = {}
    for classes in given.classes:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found[classes] = milliseconds(
            classifier_step(classes, batch, given.width, given.branches, device), rounds, device
        )
        share = "" if backbone is None else f"{found[classes] / backbone:.1%}"
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
        parameters = classes * (given.width + 1) / 1e6
        print(f"{classes:>9,}{found[classes]:>19.1f} ms{share:>18}{parameters:>11.1f} M{peak:>14}", flush=True)
    return found


if __name__ == "__main__":
    main()
