"""Images per second of the training loader and of timm's: the same files, the same augmentation, one core.

    python -m tests.benchmarks.loader [--images 32] [--rounds 3] [--workers 0]

The files are JPEGs of quality 90, 4:2:0, made from scikit-learn's two photos in a temporary folder. Both sides crop 8 to
100 % of the area to 224 x 224 (bilinear), flip, and end in a normalized float batch on the CPU (in the last table of a size,
in a batch of bytes, as a GPU gets it). In each round, timm's rate is that of the faster of its two ways to normalize, image
by image or batch by batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import torch
from timm.data import ImageDataset, create_loader

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.data.datasets import load_dataset
from tests.benchmarks.photos import write_dataset
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import Side, Turns, in_turn, machine
from tests.builders import CPU, train_loader_of

SIDE, CLASSES = 224, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {(500, 375): 1.0, (1600, 1200): 1.25}  # (width, height): bar for crop and flip alone
KINDS = (("crop, flip", 0.0, False), ("crop, flip, color jitter 0.4", 0.4, False), ("crop, flip, bytes", 0.0, True))
OURS, TIMM, BY_BATCH, BY_IMAGE = "this suite", "timm", "timm, batch by batch", "timm, image by image"


def our_epochs(folder: Path, batch_size: int, workers: int, jitter: float, in_bytes: bool) -> Callable[[int], Iterable]:
    """Return a function: the number of an epoch -> the batches of this suite."""
    config = Config.of(workers=workers, batch_size=batch_size, color_jitter=(jitter,), crop="rrc", data_on_device="off")
    settings = ImageSettings(SIDE, MEAN, STD, interpolation="bilinear", crop_pct=0.875, augment=config.augment)
    loader = train_loader_of(load_dataset(str(folder)), config, settings)
    return loader.windows if in_bytes else loader.epoch


def timms_epochs(
    folder: Path, batch_size: int, workers: int, jitter: float, in_bytes: bool, by_batch: bool
) -> Callable[[int], Iterable]:
    """Return a function: the number of an epoch -> the batches of timm. `by_batch`: whether its prefetcher normalizes them,
    batch by batch, not image by image."""
    loader = create_loader(
        ImageDataset(str(folder)),
        (3, SIDE, SIDE),
        batch_size,
        is_training=True,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        color_jitter=jitter or None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        use_prefetcher=by_batch,
        device=CPU,
    )
    return lambda epoch: loader.loader if in_bytes else loader


def epoch_of(epochs: Callable[[int], Iterable], images: int) -> Side:
    """Return a function that draws the next epoch, of two batches."""
    numbers = count()

    def run() -> int:
        assert sum(1 for _ in epochs(next(numbers))) == 2
        return images

    return run


def compare(
    folder: Path, images: int, rounds: int, workers: int, jitter: float, in_bytes: bool, turn_seconds: float
) -> Turns:
    """Measure both loaders; timm's rate is that of the faster of its ways."""
    given = folder, images // 2, workers, jitter, in_bytes
    sides = {OURS: our_epochs(*given), BY_BATCH: timms_epochs(*given, by_batch=True)}
    if not in_bytes:
        sides[BY_IMAGE] = timms_epochs(*given, by_batch=False)
    turns = in_turn({n: epoch_of(e, images) for n, e in sides.items()}, rounds, CPU, turn_seconds=turn_seconds)
    return turns.with_fastest(TIMM, [name for name in sides if name != OURS])


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratios."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=32, help="files of each size, an even number; two batches")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; each side has a turn in each")
    parser.add_argument("--seconds", type=float, default=0.5, help="approximate duration of a turn; at least an epoch")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of either loader; 0: none")
    given = parser.parse_args(arguments)
    if given.images < 2 * CLASSES or given.images % 2 or given.rounds < 1 or given.workers < 0:
        parser.error(f"--images must be even and at least {2 * CLASSES}, --rounds at least 1, --workers at least 0")
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        print(f"{machine()}, {given.workers} workers", flush=True)
        for (width, height), bar in SIZES.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = write_dataset(Path(temporary), given.images, width, height, "jpg", CLASSES)
                for kind, jitter, in_bytes in KINDS:
                    turns = compare(folder, given.images, given.rounds, given.workers, jitter, in_bytes, given.seconds)
                    title, bars = f"{width} x {height}: {kind}", {OURS: bar} if kind == "crop, flip" else {}
                    print("", *turns.table(title, TIMM, bars), sep="\n", flush=True)
                    rows.append(turns.row(OURS, TIMM, bars.get(OURS), title))
    finally:
        torch.set_num_threads(threads)
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
