"""The parts of an epoch of small resident images outside training steps and network: blocks of augmented images, the
beginning of an epoch, an evaluation without its forward passes.

    python -m tests.benchmarks.epoch_parts [--images 10847] [--test-images 10000] [--size 32] [--batch 128] [--rounds 15]

The numbers of images are those of CIFAR-100-LT 0.01. The table shows medians of the wall time until the device has finished,
and of the CPU time of all threads, which other work on the machine disturbs less. On a GPU it also shows how often an
evaluation waits for the device; the ratio is that of the rates of epochs with blocks made ahead and on demand, without
steps."""

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
    """A network that computes nothing and returns given logits."""

    def __init__(self, images: int, classes: int, device: torch.device):
        super().__init__()
        self.logits_per_image = (BRANCHES,)
        self.logits = torch.randn(BRANCHES, images, classes, device=device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[:, : len(images)]


@dataclass(frozen=True)
class Bench:
    """The images and batches of a training and a test list."""

    images: int
    test_images: int
    size: int  # pixels per side
    batch_size: int
    device: torch.device

    def training(self, kind: str) -> ResidentLoader:
        """Return a loader of shuffled batches of random pixels."""
        settings = self._settings(**KINDS[kind])
        batches = ShuffledBatches(np.arange(self.images), BatchShard(self.batch_size), seed=0)
        return ResidentLoader(
            *_listed(self.images, 10, self.size), batches, settings, self.device, Augmentation(settings)
        )

    def evaluation(self, classes: int) -> ResidentLoader:
        """Return a loader of test images, in the batches that the suite chooses."""
        on_cpu = self.device.type == "cpu"
        size = images_per_batch(self.batch_size, self.size, on_cpu)
        size = size if on_cpu else resident_batch(self.test_images, size, self.size, classes)
        batches = OrderedBatches(0, self.test_images, size, is_filled=not on_cpu)
        return ResidentLoader(*_listed(self.test_images, classes, self.size), batches, self._settings(), self.device)

    def _settings(self, **changes) -> ImageSettings:
        config = Config.of(crop="pad", crop_padding=4, img_size=self.size, batch_size=self.batch_size, **changes)
        return ImageSettings(self.size, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0, config.augment)


def _listed(images: int, classes: int, size: int) -> tuple[SimpleNamespace, np.ndarray]:
    """Return a list of random labels, and its pixels."""
    draws = np.random.default_rng(0)
    listed = SimpleNamespace(labels=torch.from_numpy(draws.integers(0, classes, images)), file="test.txt")
    return listed, draws.integers(0, 256, (images, 3, size, size), np.uint8)


def epoch_of(loader: Loader) -> Callable[[], int]:
    """Return a function that draws the next epoch of batches and does not use them."""
    numbers = iter(range(1 << 30))

    def run() -> int:
        return sum(len(labels) for window in loader.windows(next(numbers)) for _, labels in window)

    return run


def beginning_of(loader: Loader) -> Callable[[], int]:
    """Return a function that draws the first batch of an epoch that was not prepared ahead."""
    numbers = iter(range(0, 1 << 30, 2))
    return lambda: len(next(loader.windows(next(numbers)))[0][1])


def block_of(loader: ResidentLoader) -> Callable[[], int]:
    """Return a function that makes one block, in the calling thread."""
    return lambda: next(loader._blocks(loader.batches))[0].shape[:2].numel()


def evaluation_of(bench: Bench, classes: int) -> Callable[[], int]:
    """Return a function that evaluates the test images."""
    loader = bench.evaluation(classes)
    alone = SimpleNamespace(
        device=bench.device,
        is_main_process=False,
        num_processes=1,
        autocast=lambda: torch.autocast(bench.device.type, enabled=False),
        reduce=lambda tensor, reduction: tensor,
    )
    network = GivenLogits(loader.batches.batch_size, classes, bench.device)
    return lambda: int(evaluate(network, loader, alone, classes).images.sum())


def milliseconds(run: Callable[[], int], rounds: int, device: torch.device) -> tuple[int, float, float]:
    """Return the images of a call, and the medians of its wall and CPU milliseconds."""
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
    """Return the number of times that a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def parts(bench: Bench) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the name of each part of an epoch, and a function that does it."""
    for kind in KINDS:
        loader = bench.training(kind)
        yield f"block: {kind}", block_of(loader)
        yield f"first batch of an epoch: {kind}", beginning_of(loader)
        yield f"epoch of batches: {kind}", epoch_of(loader)
    for classes in CLASSES:
        yield f"evaluation: {classes:,} classes, {BRANCHES} branches", evaluation_of(bench, classes)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the table; return the ratio, if there is one."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=10_847, help="training images")
    parser.add_argument("--test-images", type=int, default=10_000, help="test images")
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--batch", type=int, default=128, help="batch size of training")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each part")
    given = parser.parse_args(arguments)
    bench, rows = Bench(given.images, given.test_images, given.size, given.batch, default_device()), []
    print(machine())
    print(f"{'':<50} {'images':>8} {'wall ms':>9} {'CPU ms':>9}")
    for name, run in parts(bench):
        images, wall, cpu = milliseconds(run, given.rounds, bench.device)
        waits = f"   waits {waits_of(run)}" if bench.device.type == "cuda" and name.startswith("evaluation") else ""
        print(f"{name:<50} {images:>8,} {wall:>9.2f} {cpu:>9.2f}{waits}", flush=True)
    if bench.device.type == "cuda":
        loaders = {side: bench.training("crop, flip, cifar10") for side in ("ahead", "on demand")}
        loaders["on demand"].ahead = None
        turns = in_turn({side: epoch_of(loader) for side, loader in loaders.items()}, given.rounds, bench.device)
        print("", *turns.table("epochs of batches, without steps", "on demand", {}), sep="\n", flush=True)
        rows.append(turns.row("ahead", "on demand", name="blocks ahead / on demand, without steps"))
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
