"""The work of the main process for one training step, besides the device's: microseconds of CPU time of its main thread.

    python -m tests.benchmarks.host [--batches 128 4096] [--rounds 7] [--images 437513] [--classes 8142]

The time for the order of an epoch is divided by the epoch's steps; its list is as long and as long-tailed as iNaturalist's.
The step trains a stand-in model, a sum over one pixel, so that only Python, autograd and the launch of a few operations are
left of it. On a GPU the same lines include the launch of kernels, but not their work. Each line is the median of the
rounds."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator

from reslt.augment.mixing import create_mixing
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.core.seeding import derive_seed
from reslt.core.signals import StopRequests
from reslt.loading.batches import ShuffledBatches
from reslt.methods.losses import FusionLoss
from reslt.methods.pairs import Pairing
from reslt.methods.registry import create_sampler
from reslt.training.epoch import Pace, train_epoch
from reslt.training.state import Progress
from reslt.training.step import TrainStep, seed_dropout
from reslt.training.watch import Watch
from tests.benchmarks.turns import machine

SAMPLERS = ("balanced", "sqrt", "effective", "progressive", "reversed", "balanced4")
KINDS = {"mixup": {"mixup": 0.2}, "CutMix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0}}
STEPS = 32  # per measurement
Measured = Callable[[], int]  # does some steps and returns their number


class StandIn(torch.nn.Module):
    """A model that costs next to nothing: (N, 3, 1, 1) images -> (3, N, 3) branch logits."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.scale * images.flatten(1)).expand(3, -1, -1)


class Ready:
    """A loader whose batches cost nothing."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return STEPS

    def windows(self, epoch: int, first_step: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        for _ in range(first_step, STEPS):
            yield [self.batch]


def long_tail(images: int, classes: int) -> np.ndarray:
    """Return (images,) shuffled labels. Class counts fall by a factor of 500, as iNaturalist's do."""
    weights = 500.0 ** -np.linspace(0, 1, classes)
    generator = np.random.default_rng(0)
    return generator.permutation(
        np.r_[np.arange(classes), generator.choice(classes, images - classes, p=weights / weights.sum())]
    )


def sides(batch: int, labels: np.ndarray, classes: int) -> Iterator[tuple[str, Measured]]:
    """Yield the name of each cost, and a function that incurs it."""
    shard, device = BatchShard(batch), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = ShuffledBatches(np.arange(len(labels)), shard, seed=0)

    def times(action: Callable[[int], object]) -> Measured:
        def measured() -> int:
            for step in range(STEPS):
                action(step)
            return STEPS

        return measured

    def of_epoch(action: Callable[[], object]) -> Measured:
        def measured() -> int:
            action()
            return batches.steps

        return measured

    yield "order of an epoch: instance", of_epoch(lambda: batches.order(1))
    for name in SAMPLERS:
        stage = stages_of(Config.of(sampler=name))[0]
        sampler = create_sampler(stage, labels, classes)
        yield f"order of an epoch: {name}", of_epoch(lambda sampler=sampler: sampler.order(0, 1))
    yield "order, and keys for workers", of_epoch(lambda: [None for _ in batches])

    for kind, settings in KINDS.items():
        for mode in ("batch", "pair", "elem"):
            mixing = create_mixing(Config.of(mixup_mode=mode, **settings).augment, classes, 0)
            yield (
                f"mixing: {kind}, {mode}",
                times(lambda step, mixing=mixing: mixing.draw(step, batch, 224, 224)[shard.positions[0]].to(device)),
            )
    pairing = Pairing(classes, epochs=200, steps=100)
    yield "pairing", times(lambda step: pairing.draw(step, batch, 224, 224)[shard.positions[0]].to(device))

    accelerator = Accelerator(cpu=device.type == "cpu")
    model = StandIn().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    step = TrainStep(model, FusionLoss(), optimizer, accelerator, shard, normalize=lambda images: images, seed=0)
    window = torch.ones(batch, 3, 1, 1, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    loss = torch.ones((), device=device)
    watch = Watch(accelerator, StopRequests())

    def look(number: int) -> None:
        watch.begin(number)
        watch.after(number, loss)

    def watched() -> int:
        watch.begin(0)
        for number in range(STEPS):
            watch.after(number, loss)
        return STEPS

    def epoch() -> int:
        train_epoch(step, Ready(window), Progress(), watch, Pace(STEPS))
        return STEPS

    yield "seeds of a step", times(lambda number: seed_dropout(derive_seed(0, number, 0), torch.device("cpu")))
    yield "inputs of a step", times(lambda number: step.inputs([window], number))
    yield "watch: a look", times(look)
    yield "watch: a step, looks among them", watched
    yield "update, stand-in model", times(lambda number: step.update([window], number))
    yield "epoch's loop: update, watch, sums, bar", epoch


def microseconds(measured: Measured, rounds: int) -> float:
    """Return the median microseconds per step over the rounds, after one that does not count."""
    measured()
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        steps = measured()
        found.append(1e6 * (time.thread_time() - start) / steps)
    return statistics.median(found)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Print the table; return {name of a cost: microseconds for each batch size}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 4096], help="sizes of the global batch")
    parser.add_argument("--images", type=int, default=437_513, help="images of the list")
    parser.add_argument("--classes", type=int, default=8142, help="classes of the list")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each cost")
    given = parser.parse_args(arguments)
    labels, table = long_tail(given.images, given.classes), {}
    for batch in given.batches:
        for name, measured in sides(batch, labels, given.classes):
            table.setdefault(name, []).append(microseconds(measured, given.rounds))
    print(machine())
    print(f"{'microseconds per step, batch':<44}" + "".join(f"{batch:>10,}" for batch in given.batches))
    for name, columns in table.items():
        print(f"{name:<44}" + "".join(f"{column:>10,.1f}" for column in columns))
    return table


if __name__ == "__main__":
    main()
