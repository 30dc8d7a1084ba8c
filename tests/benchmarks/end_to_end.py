"""Training from real files: the share of the bare step's rate that it reaches.

    python -m tests.benchmarks.end_to_end [--decode device] [--workers N] [--steps N] [--rounds N]

The images are made in a temporary folder: small PNGs for the CIFAR ResNet-32, decoded by worker processes, and again kept
in the device's memory; on a GPU also 500 x 375 JPEGs for ResNeXt-50 at 224 pixels (bf16, channels-last, compiled). The bare
step takes the same batch of noise again and again. Both sides do the same number of steps, on a GPU those of an epoch of
CIFAR-100-LT 0.01 and of ImageNet-LT, including the wait for an epoch's first batch. On a CPU the workers take cores from the
step, so that the share shows the cost of decoding, not the time of waiting."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config

from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.data.datasets import load_dataset
from reslt.training.compiled import compile_model
from reslt.training.cuda_graph import step_kind
from tests.benchmarks.photos import write_dataset
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import Side, default_device, in_turn, machine
from tests.builders import loading_of, loss_of, model_of, optimizer_of, settings_of

CLASSES = 10
FILES = 256  # each listed several times
BARE, TRAINING = "bare step", "training"
EPOCH_STEPS = {"small": 84, "large": 452}  # 10,847 images in batches of 128, 115,846 in batches of 256
BAR = 0.95  # for large images on a GPU


@contextmanager
def sides_of(config: Config, device: torch.device) -> Iterator[tuple[dict[str, Side], str]]:
    """Yield the bare step and training from the files, each for the steps of an epoch, and how the images are loaded."""
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision, cpu=device.type == "cpu")
    dataset = load_dataset(config.data.data)
    model = model_of(config, dataset.num_classes).to(device)
    model.to(memory_format=torch.channels_last if config.run.channels_last else torch.preserve_format)
    images = settings_of(config, resolve_model_data_config(model.backbone))
    batch_size, shard = config.optim.batch_size, BatchShard(config.optim.batch_size)
    loading = loading_of(dataset, config, images, device, shard)
    pipeline = loading.pipeline()
    loader = loading.training(pipeline)
    loss_fn, optimizer = loss_of(config, dataset.images_per_class).to(device), optimizer_of(config, model)
    if config.run.torchcompile:
        compile_model(model)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    kind = step_kind(config.run.cuda_graph, accelerator, optimizer, shard.micro_batches, pipeline.is_resident)
    step = kind(prepared, loss_fn, optimizer, accelerator, shard, loader.normalize, config.run.seed)
    noise = torch.randint(0, 256, (batch_size, 3, images.size, images.size), dtype=torch.uint8, device=device)
    window = [(noise, torch.arange(batch_size, device=device) % CLASSES)]
    epochs = count()

    def bare() -> int:
        for number in range(len(loader)):
            step.update(window, number)
        return len(loader) * batch_size

    def training() -> int:
        steps = [step.update(window, number) for number, window in enumerate(loader.windows(next(epochs)))]
        return len(steps) * batch_size

    yield {BARE: bare, TRAINING: training}, str(pipeline)


def measure(name: str, config: Config, device: torch.device, rounds: int, bar: float | None = None) -> Row:
    """Print both rates; return the share."""
    with sides_of(config, device) as (sides, pipeline):
        turns = in_turn(sides, rounds, device)
    bars = {} if bar is None else {TRAINING: bar}
    print("", *turns.table(name, BARE, bars), f"  {pipeline}", sep="\n", flush=True)
    return turns.row(TRAINING, BARE, bar, name)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the shares."""
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = command_line(__doc__)
    parser.add_argument("--workers", type=int, default=16, help="worker processes; at most one per CPU core")
    parser.add_argument("--decode", choices=("host", "device"), default="host", help="where JPEGs are decoded")
    parser.add_argument("--steps", type=int, help="steps per turn; unset: an epoch's, on a CPU 2")
    parser.add_argument("--batch", type=int, default=128, help="batch size for small images")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; each side has a turn in each")
    given = parser.parse_args(arguments)
    steps = {name: given.steps or (steps if on_gpu else 2) for name, steps in EPOCH_STEPS.items()}
    print(machine())
    precision = dict(mixed_precision="bf16" if on_gpu else "no", channels_last=on_gpu, workers=given.workers, lr=1e-3)
    rows = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        # Decoded images would be kept, and these are not used again
        mock.patch.dict(os.environ, RESLT_CACHE=str(Path(temporary) / "cache")),
    ):
        small = write_dataset(
            Path(temporary) / "small", steps["small"] * given.batch, 32, 32, "png", CLASSES, files=FILES
        )
        cifar = Config.of(
            data=str(small),
            model="cifar_resnet32",
            branch="bn",
            batch_size=given.batch,
            crop="pad",
            img_size=32,
            **precision,
        )
        for where in ("off", "on"):
            name = f"CIFAR ResNet-32, --data-on-device {where}"
            rows.append(measure(name, cifar.changed(data_on_device=where), device, given.rounds))
        if on_gpu:
            large = write_dataset(
                Path(temporary) / "large", steps["large"] * 256, 500, 375, "jpg", CLASSES, files=FILES
            )
            config = Config.of(
                data=str(large),
                model="resnext50_32x4d",
                batch_size=256,
                torchcompile=True,
                decode=given.decode,
                **precision,
            )
            rows.append(measure(f"ResNeXt-50, --decode {given.decode}", config, device, given.rounds, BAR))
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
