"""Milliseconds of an epoch of small resident images outside the training steps and outside the network: blocks of augmented
images, the beginning of an epoch, an evaluation without its forward passes.

    python -m tests.benchmarks.epoch_parts [--images 10847] [--test-images 10000] [--size 32] [--batch 128] [--rounds 15]

The numbers of images are those of CIFAR-100-LT 0.01. Wall time until the device has finished, and CPU time of all threads,
which other work on the machine disturbs less; medians. On a GPU also how often an evaluation waits for the device, and a
ratio: epochs whose blocks are made ahead, over the same made on demand, without steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time
from types import SimpleNamespace

import numpy as np
import torch

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.evaluation.evaluate import evaluate
from reslt.loading.batches import Loader, OrderedBatches, ShuffledBatches
from reslt.loading.loaders import images_per_batch, resident_batch
from reslt.loading.resident import Augmentation, ResidentLoader
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import default_device, in_turn, machine, synchronize

CLASSES, BRANCHES = (10, 100, 1000), 3
KINDS = {"crop, flip": {}, "crop, flip, cifar10": {"aa": "cifar10"}}


class GivenLogits(torch.nn.Module):
    """A network that computes nothing: the logits of a batch are given."""

    def __init__(self, images: int, classes: int, device: torch.device):
        super().__init__()
        self.logits_per_image = (BRANCHES,)
        self.logits = torch.randn(BRANCHES, images, classes, device=device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[:, : len(images)]


@dataclass(frozen=True)
class Bench:
    """Images and batches of a training and a test list."""

    images: int
    test_images: int
    size: int  # pixels a side
    batch_size: int
    device: torch.device

    def training(self, kind: str) -> ResidentLoader:
        """A loader of shuffled batches of random pixels."""
        settings = self._settings(**KINDS[kind])
        batches = ShuffledBatches(np.arange(self.images), BatchShard(self.batch_size), seed=0)
        return ResidentLoader(
            *_listed(self.images, 10, self.size), batches, settings, self.device, Augmentation(settings)
        )

    def evaluation(self, classes: int) -> ResidentLoader:
        """A loader of test images, in the batches that the suite chooses."""
        on_cpu = self.device.type == "cpu"
        size = images_per_batch(self.batch_size, self.size, on_cpu)
        size = size if on_cpu else resident_batch(self.test_images, size, self.size, classes)
        batches = OrderedBatches(0, self.test_images, size, is_filled=not on_cpu)
        return ResidentLoader(*_listed(self.test_images, classes, self.size), batches, self._settings(), self.device)

    def _settings(self, **changes) -> ImageSettings:
        c = Config.of(crop="pad", crop_padding=4, img_size=self.size, batch_size=self.batch_size, **changes)
        return ImageSettings(self.size, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0, c.augment)


def _listed(images: int, classes: int, size: int) -> tuple[SimpleNamespace, np.ndarray]:
    """A list of random labels, and its pixels."""
    draws = np.random.default_rng(0)
    listed = SimpleNamespace(labels=torch.from_numpy(draws.integers(0, classes, images)), file="test.txt")
    return listed, draws.integers(0, 256, (images, 3, size, size), np.uint8)


def epoch_of(loader: Loader) -> Callable[[], int]:
    """One epoch of batches that nothing uses, each time the next."""
    numbers = iter(range(1 << 30))

    def run() -> int:
        return sum(len(labels) for window in loader.windows(next(numbers)) for _, labels in window)

    return run


def beginning_of(loader: Loader) -> Callable[[], int]:
    """The first batch of an epoch that nobody expected."""
    numbers = iter(range(0, 1 << 30, 2))
    return lambda: len(next(loader.windows(next(numbers)))[0][1])


def block_of(loader: ResidentLoader) -> Callable[[], int]:
    """One block, all of whose images are augmented in the calling thread."""
    return lambda: next(loader._blocks(loader.batches))[0].shape[:2].numel()


def evaluation_of(b: Bench, classes: int) -> Callable[[], int]:
    """An evaluation of the test images."""
    loader = b.evaluation(classes)
    alone = SimpleNamespace(
        device=b.device,
        is_main_process=False,
        num_processes=1,
        autocast=lambda: torch.autocast(b.device.type, enabled=False),
        reduce=lambda tensor, reduction: tensor,
    )
    network = GivenLogits(loader.batches.batch_size, classes, b.device)
    return lambda: int(evaluate(network, loader, alone, classes).images.sum())


def milliseconds(run: Callable[[], int], rounds: int, device: torch.device) -> tuple[int, float, float]:
    """-> images of a call; medians of its wall and CPU milliseconds."""
    run(), run()
    wall, cpu = [], []
    for _ in range(rounds):
        synchronize(device)
        begun, begun_cpu = perf_counter(), process_time()
        images = run()
        synchronize(device)
        wall.append(perf_counter() - begun), cpu.append(process_time() - begun_cpu)
    return images, 1000 * float(np.median(wall)), 1000 * float(np.median(cpu))


def waits_of(run: Callable[[], int]) -> int:
    """The number of times that a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def parts(b: Bench) -> Iterator[tuple[str, Callable[[], int]]]:
    """Each part of an epoch."""
    for kind in KINDS:
        loader = b.training(kind)
        yield f"block: {kind}", block_of(loader)
        yield f"first batch of an epoch: {kind}", beginning_of(loader)
        yield f"epoch of batches: {kind}", epoch_of(loader)
    for classes in CLASSES:
        yield f"evaluation: {classes:,} classes, {BRANCHES} branches", evaluation_of(b, classes)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the table; return the ratio, if there is one."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=10_847, help="of the training list")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=128, help="of training")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    b, rows = Bench(given.images, given.test_images, given.size, given.batch, default_device()), []
    print(machine())
    print(f"{'':<50} {'images':>8} {'wall ms':>9} {'CPU ms':>9}")
    for name, run in parts(b):
        images, wall, cpu = milliseconds(run, given.rounds, b.device)
        waits = f"   waits {waits_of(run)}" if b.device.type == "cuda" and name.startswith("evaluation") else ""
        print(f"{name:<50} {images:>8,} {wall:>9.2f} {cpu:>9.2f}{waits}", flush=True)
    if b.device.type == "cuda":
        loaders = {side: b.training("crop, flip, cifar10") for side in ("ahead", "on demand")}
        loaders["on demand"].ahead = None
        turns = in_turn({side: epoch_of(loader) for side, loader in loaders.items()}, given.rounds, b.device)
        print("", *turns.table("epochs of batches, without steps", "on demand", {}), sep="\n", flush=True)
        rows.append(turns.row("ahead", "on demand", name="blocks ahead / on demand, without steps"))
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
