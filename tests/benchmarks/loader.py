"""Images a second through the training loader and through timm's: the same files, the same augmentation, one core.

    python -m tests.benchmarks.loader [--images 32] [--rounds 3] [--workers 0]

The files are JPEGs of quality 90, 4:2:0, made from scikit-learn's two photos in a temporary folder: each another part of
one, resized, brighter or darker. Both sides crop 8 to 100 % of the area to 224 x 224, bilinear, flip, and end in a float
batch, normalised, on the CPU (the last line of a size: in bytes, as a GPU gets them). timm's is the faster of its two ways
to normalise, image by image or batch by batch. The sides take turns; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from timm.data import ImageDataset, create_loader

from reslt.config import Config
from reslt.datasets import load_dataset
from reslt.images import ImageSettings
from reslt.loader import train_loader
from tests.benchmarks.lists import machine

SIDE, CLASSES = 224, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {(500, 375): 1.0, (1600, 1200): 1.25}  # width, height -> bar: ours over timm's
EPOCH_PIXELS = 40_000_000  # of files, at least: an epoch of fewer is repeated
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds."""

    ours: float  # images a second
    timms: float  # images a second
    ratio: float  # ours over timm's


def write_photos(folder: Path, size: tuple[int, int], images: int) -> None:
    """A dataset's folder: `images` JPEGs of `size` in class folders, and the list of them."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator, lines = np.random.default_rng(0), []
    for i in range(images):
        photo = photos[i % len(photos)]
        share = generator.uniform(0.7, 1)
        width, height = share * photo.width, share * photo.height
        left, top = generator.uniform(0, photo.width - width), generator.uniform(0, photo.height - height)
        part = photo.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        path = f"{i % CLASSES}/{i}.jpg"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        lit = ImageEnhance.Brightness(part).enhance(generator.uniform(0.8, 1.2))
        lit.save(folder / path, quality=90, subsampling="4:2:0")
        lines.append(f"{path} {i % CLASSES}\n")
    (folder / "train.txt").write_text("".join(lines))
    (folder / "info.yaml").write_text("image_root: .\n")


def our_epochs(folder: Path, batch_size: int, workers: int, jitter: float, in_bytes: bool) -> Callable[[int], Iterable]:
    """Number of an epoch -> its batches."""
    config = Config(data=str(folder), workers=workers, batch_size=batch_size, color_jitter=(jitter,), crop="rrc")
    settings = ImageSettings(SIDE, MEAN, STD, interpolation="bilinear", crop_pct=0.875, config=config)
    loader = train_loader(load_dataset(config.data), settings, CPU)
    return loader.windows if in_bytes else loader.epoch


def timms_epochs(
    folder: Path, batch_size: int, workers: int, jitter: float, in_bytes: bool, by_batch: bool
) -> Callable[[int], Iterable]:
    """The same of timm. `by_batch`: normalised batch by batch, by its prefetcher, not image by image."""
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


def compare(
    folder: Path, images: int, repeats: int, rounds: int, workers: int, jitter: float, in_bytes: bool
) -> Figures:
    """Time both sides in turn, after an epoch that counts for neither; an epoch of `images` is repeated `repeats` times."""
    given = folder, images // 2, workers, jitter, in_bytes
    sides = [our_epochs(*given), timms_epochs(*given, by_batch=True)]
    if not in_bytes:
        sides.append(timms_epochs(*given, by_batch=False))
    for epochs in sides:
        assert sum(1 for _ in epochs(0)) == 2
    ours, timms = [], []
    for turn in range(rounds):
        seconds = [_seconds(epochs, repeats, first=1 + turn * repeats) for epochs in sides]
        ours.append(images * repeats / seconds[0])
        timms.append(images * repeats / min(seconds[1:]))
    ratio = statistics.median(our / timm for our, timm in zip(ours, timms, strict=True))
    return Figures(statistics.median(ours), statistics.median(timms), ratio)


def _seconds(epochs: Callable[[int], Iterable], repeats: int, first: int) -> float:
    start = time.perf_counter()
    for epoch in range(first, first + repeats):
        for _ in epochs(epoch):
            pass
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[tuple[tuple[int, int], str], Figures]:
    """Print the table; return it by size and what is done beside crop and flip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="files of each size, an even number; two batches")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side takes its turn")
    parser.add_argument("--workers", type=int, default=0, help="processes of either loader; 0: this one alone")
    args = parser.parse_args(arguments)
    if args.images < 2 * CLASSES or args.images % 2 or args.rounds < 1 or args.workers < 0:
        parser.error(f"--images must be even and at least {2 * CLASSES}, --rounds at least 1, --workers at least 0")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"{machine()}; one thread, {args.workers} workers", flush=True)
    print(f"{'images/s':<41}{'ours':>9}{'timm':>9}{'ratio':>8}   bar", flush=True)
    table = {}
    try:
        for size, bar in SIZES.items():
            with tempfile.TemporaryDirectory() as temporary:
                write_photos(Path(temporary), size, args.images)
                repeats = max(1, round(EPOCH_PIXELS / (args.images * size[0] * size[1])))
                for name, jitter, in_bytes in (
                    ("crop, flip", 0.0, False),
                    ("crop, flip, color jitter 0.4", 0.4, False),
                    ("crop, flip, bytes", 0.0, True),
                ):
                    figures = compare(
                        Path(temporary), args.images, repeats, args.rounds, args.workers, jitter, in_bytes
                    )
                    table[size, name] = figures
                    row = f"{f'{size[0]} x {size[1]}':<13}{name:<28}{figures.ours:>9.1f}{figures.timms:>9.1f}"
                    shown = f"   {bar:.2f}" if name == "crop, flip" else ""
                    print(f"{row}{figures.ratio:>8.2f}{shown}", flush=True)
    finally:
        torch.set_num_threads(threads)
    return table


if __name__ == "__main__":
    main()
