"""AutoAugment: images a second of PIL on one core, as the host augments, and in batch on the device.

    python -m tests.benchmarks.auto_augment [--images 4096] [--side 32] [--rounds 5]

Images are noise, blurred. Decoding, cropping and PIL's way to and from tensors are left out; drawing which operations an
image gets counts on both sides. They take turns, and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from reslt.auto_augment import apply
from reslt.config import Config
from reslt.images import ImageSettings, seed_generators, train_transform
from reslt.policies import Policy, create_policy
from tests.benchmarks.lists import machine

POLICIES = ("cifar10", "v0", "rand-m9-mstd0.5")
PIL_IMAGES = 500  # a round: about a tenth of a second


@dataclass(frozen=True)
class Speed:
    """Images a second; medians of the rounds."""

    pil: float
    device: float
    drawing: float  # the host's part of the device's way: which operations
    ratio: float  # device over PIL


def settings(aa: str, side: int) -> ImageSettings:
    return ImageSettings.of(
        Config(aa=aa, img_size=side, crop="pad"),
        dict(input_size=(3, side, side), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=1.0),
    )


def blurred_noise(count: int, side: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)) for image in noise]


def measure(aa: str, count: int, side: int, rounds: int, device: torch.device) -> Speed:
    s = settings(aa, side)
    transform, policy = train_transform(s).transforms[1], create_policy(s)
    images = blurred_noise(count, side)
    on_device = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device)
    generator = np.random.default_rng(0)
    seed_generators(0)
    in_batch(policy, on_device, generator)  # the first time, memory is allocated and kernels are loaded
    pil, batch, drawing = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for image in images[:PIL_IMAGES]:
            transform(image)
        pil.append(len(images[:PIL_IMAGES]) / (time.perf_counter() - start))
        start = time.perf_counter()
        drawn = in_batch(policy, on_device, generator)
        batch.append(count / (time.perf_counter() - start))
        drawing.append(count / (drawn - start))
    ratios = [b / p for p, b in zip(pil, batch, strict=True)]
    return Speed(*(statistics.median(values) for values in (pil, batch, drawing, ratios)))


def in_batch(policy: Policy, images: torch.Tensor, generator: np.random.Generator) -> float:
    """Draw and apply, until the device is done. Returns the time between the two."""
    programs = policy.programs(generator.random((len(images), policy.columns)), *images.shape[2:])
    drawn = time.perf_counter()
    apply(images, programs)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="of a block")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="values of --aa")
    args = parser.parse_args(arguments)
    if min(args.images, args.side, args.rounds) < 1:
        parser.error("--images, --side and --rounds must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    print(machine())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"device: {name}; blocks of {args.images} images of {args.side} x {args.side}; images a second")
    print(f"{'':<20}{'PIL, one core':>15}{'in batch':>12}{'ratio':>8}{'drawing alone':>15}")
    for aa in args.policies:
        speed = measure(aa, args.images, args.side, args.rounds, device)
        print(
            f"{aa:<20}{speed.pil:>15,.0f}{speed.device:>12,.0f}{speed.ratio:>8.1f}{speed.drawing:>15,.0f}", flush=True
        )


if __name__ == "__main__":
    main()
