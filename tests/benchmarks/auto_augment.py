"""AutoAugment: images per second with PIL on one core, as the host augments, and in batches on the device.

    python -m tests.benchmarks.auto_augment [--images N] [--side 32] [--rounds N] [--policies ...]
    python -m tests.benchmarks.auto_augment --check     # on a GPU: are its bytes those of the CPU?

Images are blurred noise. Decoding, cropping, and conversions between PIL and tensors are left out. Drawing an image's
operations counts on both sides; in batches it is a part of the host's planning, which is also measured alone. The rest of
the host's work is proportional to the number of calls, each of which starts a kernel on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reslt.augment.batch_operations import apply, lay_out
from reslt.augment.host_transforms import seed_generators, train_transform
from reslt.augment.policies import OperationPlan, create_policy
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import Side, Turns, default_device, in_turn, machine
from tests.builders import settings_of

POLICIES = ("cifar10", "v0", "rand-m9-mstd0.5")
PIL_IMAGES = 100  # per call
CHECKED = [
    *({"aa": aa} for aa in (*POLICIES, "v0r-mstd0.5", "original", "originalr", "rand-m9-n3-mstd0.5-inc1-p1")),
    {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
    {"rotate": 30.0},
]
PIL, BATCH, PLANNING = "PIL, one core", "in batch", "planning alone, for the batch"
GPU_BAR = 30.0


def settings(aa: str, side: int) -> ImageSettings:
    return settings_of(
        Config.of(aa=aa, img_size=side, crop="pad"),
        dict(input_size=(3, side, side), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=1.0),
    )


def blurred_noise(count: int, side: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)) for image in noise]


def sides_of(aa: str, count: int, side: int, device: torch.device) -> dict[str, Side]:
    """Return the host's transform, the batch on the device, and the host's planning of that batch."""
    image_settings = settings(aa, side)
    transform, policy = train_transform(image_settings).transforms[1], create_policy(image_settings)
    images = blurred_noise(count, side)
    on_device = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device)
    generator = np.random.default_rng(0)
    seed_generators(0)

    def by_pil() -> int:
        for image in images[:PIL_IMAGES]:
            transform(image)
        return len(images[:PIL_IMAGES])

    def drawn() -> OperationPlan:
        return policy.plan(generator.random((count, policy.columns)), side, side)

    def in_batch() -> int:
        apply(on_device, drawn())
        return count

    def planning() -> int:
        lay_out(drawn(), side, side, count)
        return count

    return {PIL: by_pil, BATCH: in_batch, PLANNING: planning}


class Counted(TorchDispatchMode):
    """A counter of the calls that compute or copy, and of the bytes that they read and write."""

    calls, moved = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or "empty" in function.name()):
            self.calls += 1
            tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
            self.moved += sum(tensor.nbytes for tensor in tensors)
        return result


def differing(augmentation: dict[str, object], count: int, side: int, device: torch.device) -> int:
    """Return the number of bytes of `count` images that differ between the device and the CPU. timm's policies choose their
    interpolation at random."""
    image_settings = settings("cifar10", side)
    changes = {"aa": None, "train_interpolation": "random", **augmentation}
    policy = create_policy(replace(image_settings, augment=replace(image_settings.augment, **changes)))
    plan = policy.plan(np.random.default_rng(1).random((count, policy.columns)), side, side)
    images = torch.from_numpy(np.stack(blurred_noise(count, side))).permute(0, 3, 1, 2).contiguous()
    return int((apply(images.to(device), plan).cpu() != apply(images, plan)).sum())


def measure(aa: str, count: int, side: int, rounds: int, device: torch.device, turn_seconds: float) -> Turns:
    return in_turn(sides_of(aa, count, side, device), rounds, device, turn_seconds=turn_seconds)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratios."""
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=4096 if on_gpu else 1024, help="images per block")
    parser.add_argument("--side", type=int, default=32, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; each side has a turn in each")
    parser.add_argument("--seconds", type=float, default=0.2, help="approximate duration of a turn")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="values of --aa")
    parser.add_argument(
        "--check", action="store_true", help="compare the device's bytes with the CPU's; measure no rates"
    )
    given = parser.parse_args(arguments)
    if min(given.images, given.side, given.rounds) < 1:
        parser.error("--images, --side and --rounds must be at least 1")
    print(machine())
    if given.check:
        if not on_gpu:
            parser.error("--check requires a GPU")
        counts = [differing(augmentation, given.images, given.side, device) for augmentation in CHECKED]
        for augmentation, count in zip(CHECKED, counts, strict=True):
            print(f"{augmentation}, {given.images} images: {count} bytes differ")
        if any(counts):
            raise SystemExit("the device's bytes differ from the CPU's")
        return []
    rows, bars = [], {BATCH: GPU_BAR} if on_gpu else {}
    for aa in given.policies:
        with Counted() as counted:
            sides_of(aa, given.images, given.side, device)[BATCH]()
        turns = measure(aa, given.images, given.side, given.rounds, device, given.seconds)
        title = f"{aa}: blocks of {given.images} images of {given.side} x {given.side}"
        print("", *turns.table(title, PIL, bars), sep="\n")
        share = turns.rate(BATCH) / turns.rate(PLANNING)
        print(
            f"  a block: {counted.calls} calls, {counted.moved / 1e6:,.0f} MB; planning: {share:.0%} of the time",
            flush=True,
        )
        rows.append(turns.row(BATCH, PIL, bars.get(BATCH), f"{aa}, {device.type}: in batch / PIL on one core"))
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
