"""Training from real files: which share of the bare step's rate is reached.

    python -m tests.benchmarks.end_to_end [--data NAME|DIR] [--flags ...]

Unset, the images are made for it in a temporary folder: on a GPU 500 x 375 JPEGs for ResNeXt-50 at 224 pixels (bf16,
channels-last, compiled; bar: 0.90), and small PNGs for the CIFAR ResNet-32, from files and from the device's memory. On a CPU the latter
alone. The bare step takes one batch again and again. Both sides in turn in one run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from tests.benchmarks.photos import write_photos
from timm.data import resolve_model_data_config

from reslt.config import Config
from reslt.cuda_graph import step_kind
from reslt.datasets import load_dataset
from reslt.device_data import ResidentLoader
from reslt.images import ImageSettings
from reslt.loader import train_loader
from reslt.losses import create_loss
from reslt.mixing import create_mixing
from reslt.models.create import create_model
from reslt.optim import create_optimizer
from reslt.shares import Share
from tests.benchmarks.turns import default_device, in_turn, machine

CLASSES = 10


def write_dataset(folder: Path, images: int, width: int, height: int) -> Path:
    """A folder of lists and photos, PNG where they are small: `images` lines over some files, each a few times."""
    folder.mkdir(parents=True)
    suffix = "png" if max(width, height) <= 64 else "jpg"
    files = write_photos(folder / "images", min(images, 256), width, height, suffix)
    names = [file.name for file in files]
    lines = [f"{names[i % len(names)]} {i % CLASSES}\n" for i in range(images)]
    (folder / "train.txt").write_text("".join(lines))
    (folder / "info.yaml").write_text("image_root: images\n")
    return folder


@contextmanager
def run_of(c: Config, device: torch.device, steps: int) -> Iterator[tuple[Callable[[], int], Callable[[], int], str]]:
    """-> (the bare step, training from the files, where the images are); each does `steps` steps."""
    accelerator = Accelerator(mixed_precision=c.mixed_precision, cpu=device.type == "cpu")
    dataset = load_dataset(c.data)
    model = create_model(c, dataset.num_classes).to(device)
    model.to(memory_format=torch.channels_last if c.channels_last else torch.preserve_format)
    images = ImageSettings.of(c, resolve_model_data_config(model.backbone))
    mixing = create_mixing(c, dataset.num_classes)
    share = Share(c.batch_size, paired=mixing is not None)
    loader = train_loader(dataset, images, device, share)
    loss_fn, optimizer = create_loss(c, dataset.images_per_class).to(device), create_optimizer(c, model)
    if c.torchcompile:
        model.compile()
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    kind = step_kind(c, accelerator, optimizer, isinstance(loader, ResidentLoader))
    step = kind(prepared, loss_fn, optimizer, accelerator, share, loader.normalize, c.seed, mixing, c.clip_grad)
    one = next(loader.windows(0))
    epoch = 0

    def bare() -> int:
        for number in range(steps):
            step.update(one, number)
        return steps * c.batch_size

    def from_files() -> int:
        nonlocal epoch
        done, epoch = 0, epoch + 1
        for window in loader.windows(epoch):
            step.update(window, done)
            done += 1
            if done == steps:
                break
        return done * c.batch_size

    yield bare, from_files, loader.where


def measure(name: str, c: Config, device: torch.device, steps: int, rounds: int, bar: str = "") -> str:
    """A line: both rates and the share."""
    with run_of(c, device, steps) as (bare, from_files, where):
        turns = in_turn({"bare": bare, "files": from_files}, rounds, device, warm_up=3)
    share, low, high = turns.ratio("files", "bare")
    rates = f"{turns.rate('bare'):9,.0f} {turns.rate('files'):9,.0f} img/s"
    return f"{name:34} {rates}   {share:.3f} ({low:.3f}..{high:.3f})  {bar}\n{'':34} images are {where}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--workers", type=int, default=16, help="at most one per CPU core")
    parser.add_argument("--decode", choices=("host", "device"), default="host", help="of the JPEGs")
    parser.add_argument("--steps", type=int, help="in one turn; unset: 40, on a CPU 2")
    parser.add_argument("--rounds", type=int, default=5, help="of which each side has a turn")
    given = parser.parse_args(arguments)
    device = default_device()
    on_gpu = device.type == "cuda"
    steps = given.steps or (40 if on_gpu else 2)
    print(machine(device))
    print(f"{'':34} {'bare step':>9} {'training':>9}         share (quartiles)")
    precision = dict(mixed_precision="bf16" if on_gpu else "no", channels_last=on_gpu, workers=given.workers, lr=1e-3)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        small = write_dataset(folder / "small", steps * 128, 32, 32)
        cifar = Config(
            data=str(small), model="cifar_resnet32", branch="bn", batch_size=128, crop="pad", img_size=32, **precision
        )
        for where in ("off", "on"):
            c = replace(cifar, data_on_device=where)
            print(measure(f"CIFAR ResNet-32, on device: {where}", c, device, steps, given.rounds))
        if on_gpu:
            large = write_dataset(folder / "large", steps * 256, 500, 375)
            c = Config(
                data=str(large),
                model="resnext50_32x4d",
                batch_size=256,
                torchcompile=True,
                decode=given.decode,
                **precision,
            )
            print(measure(f"ResNeXt-50, decode: {given.decode}", c, device, steps, given.rounds, "bar 0.90"))


if __name__ == "__main__":
    main()
