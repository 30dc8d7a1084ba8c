"""Photos per second in prediction and with timm: the same files, the same transform, one core.

    python -m tests.benchmarks.predict [--model tf_efficientnet_lite0] [--images 24] [--rounds 5] [--workers 0]

The files are JPEGs of 1600 x 1200 pixels, quality 90, 4:2:0, made from scikit-learn's two photos in a temporary folder. Both
sides resize and crop as in the model's evaluation, and end in a normalized float batch on the CPU. In each round, timm's
rate is that of the faster of its two ways to normalize, image by image or batch by batch. The whole prediction adds the
model, with random weights, and the five most probable classes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from timm.data import ImageDataset, create_loader, resolve_model_data_config

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.data.paths import ImageRoot
from reslt.deploy.trained_model import TrainedModel
from reslt.loading.photos import PhotoBatches, PhotoFiles
from tests.benchmarks.photos import write_photos
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import Side, in_turn, machine
from tests.builders import CPU

WIDTH, HEIGHT, TOPK = 1600, 1200, 5
LOADING_BAR = 1.25
OURS, TIMM, BY_BATCH, BY_IMAGE = "this suite", "timm", "timm, batch by batch", "timm, image by image"
Batches = Iterable[tuple[torch.Tensor, object]]


def our_batches(folder: Path, paths: list[str], settings: ImageSettings, batch_size: int, workers: int) -> Batches:
    """Return the batches of `python -m reslt.predict`."""
    return PhotoBatches(PhotoFiles(paths, ImageRoot(folder), settings), settings, CPU, batch_size, workers)


def timms_batches(folder: Path, settings: ImageSettings, batch_size: int, workers: int, by_batch: bool) -> Batches:
    """Return the batches of timm. `by_batch`: whether its prefetcher normalizes them, batch by batch, not image by image."""
    return create_loader(
        ImageDataset(str(folder)),
        (3, settings.size, settings.size),
        batch_size,
        is_training=False,
        interpolation=settings.interpolation,
        crop_pct=settings.crop_pct,
        mean=settings.mean,
        std=settings.std,
        num_workers=workers,
        use_prefetcher=by_batch,
        device=CPU,
    )


def side_of(batches: Batches, predict: Callable[[torch.Tensor], object] | None) -> Side:
    """Return a function that passes over all photos once."""

    @torch.inference_mode()
    def run() -> int:
        images = 0
        for batch, _ in batches:
            if predict is not None:
                predict(batch)
            images += len(batch)
        return images

    return run


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratios."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm model, for its transform and prediction")
    parser.add_argument("--img-size", type=int, help="pixels per side; unset: the model's own")
    parser.add_argument("--images", type=int, default=24, help="photos, an even number; two batches")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; each side has a turn in each")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of either loader; 0: none")
    given = parser.parse_args(arguments)
    if given.images < 2 or given.images % 2 or given.rounds < 1 or given.workers < 0:
        parser.error("--images must be even and at least 2, --rounds at least 1, --workers at least 0")
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        print(f"{machine()}, {given.workers} workers", flush=True)
        network = timm.create_model(given.model).eval()
        augment = Config.of(img_size=given.img_size).augment
        settings = ImageSettings.of(augment, resolve_model_data_config(network))
        model = TrainedModel(network, {"class_names": None, "num_classes": network.num_classes})
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            paths = write_photos(folder, given.images, WIDTH, HEIGHT, "jpg", 2)
            common = settings, given.images // 2, given.workers
            batches = {OURS: our_batches(folder, paths, *common)}
            batches |= {name: timms_batches(folder, *common, name == BY_BATCH) for name in (BY_BATCH, BY_IMAGE)}
            predict = {name: lambda images: network(images).softmax(1).topk(TOPK) for name in batches}
            predict[OURS] = lambda images: model.ranked(model.logits(images), TOPK)
            of_size = f"{WIDTH} x {HEIGHT} to {settings.size}, {settings.interpolation}"
            for title, predicts, bar in (
                (f"{of_size}: decode, transform, collate", {}, LOADING_BAR),
                (f"{of_size}: predict with {given.model}", predict, None),
            ):
                sides = {name: side_of(batches[name], predicts.get(name)) for name in batches}
                turns = in_turn(sides, given.rounds, CPU).with_fastest(TIMM, [BY_BATCH, BY_IMAGE])
                print("", *turns.table(title, TIMM, {} if bar is None else {OURS: bar}), sep="\n", flush=True)
                rows.append(turns.row(OURS, TIMM, bar, title))
    finally:
        torch.set_num_threads(threads)
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
