"""What the branches cost in inference: images/s of the plain model, of ResLT, and of ResLT folded, in one run.

    python -m tests.benchmarks.inference [--model NAME ...] [--batch-size N] [--rounds N]

Weights are random, BatchNorm statistics and branches not those that a new model has; the images are synthetic and lie
on the device. Each round times every model in turn, so a ratio compares moments that lie close together; the plain
model is timed twice in a round, and the second time's ratio shows what noise is. On a GPU: bf16, channels-last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import timm
import torch
from torch import nn

from reslt.config import Config
from reslt.models.create import create_model
from reslt.models.fold import fold, fold_branches
from tests.benchmarks.lists import machine

CLASSES = 1000
PLAIN, CONTROL = "plain model", "plain model again"
WITHIN_NOISE = "1 within noise"
FOLDED_POOLED_BAR = "at most 1.02"


@dataclass(frozen=True)
class Case:
    """A model, its input, and how long each of its forms is timed."""

    model: str
    img_size: int
    batch_size: int
    rounds: int
    warmup: int  # passes that are not timed
    block_seconds: float  # of one form in one round, about; one pass at least


@dataclass(frozen=True)
class Figures:
    """Of one form of the model."""

    images_per_second: float  # median over the rounds
    ratios: tuple[float, float, float]  # time over the plain model's of the same round: lower quartile, median, upper

    @classmethod
    def of(cls, seconds: list[float], plain: list[float], images: int) -> Figures:
        """From seconds per batch of each round."""
        lower, median, upper = statistics.quantiles(
            [own / of_plain for own, of_plain in zip(seconds, plain, strict=True)], n=4, method="inclusive"
        )
        return cls(images / statistics.median(seconds), (lower, median, upper))


def forms(case: Case, device: torch.device) -> dict[str, tuple[nn.Module, str]]:
    """{name: (module, bar)} of a model, the plain one first and last."""
    made: dict[str, tuple[nn.Module, str]] = {}
    for branch, place in (("bn", "map"), ("conv", "map"), ("conv", "pooled")):
        config = Config(model=case.model, branch=branch, branch_at=place, img_size=case.img_size)
        torch.manual_seed(0)
        model = with_statistics(create_model(config, CLASSES)).eval()
        made.setdefault(PLAIN, (model.backbone, ""))
        name = branch if branch == "bn" else f"{branch}, {'on the map' if place == 'map' else 'pooled first'}"
        bar = {"bn": WITHIN_NOISE, "conv, pooled first": FOLDED_POOLED_BAR}.get(name, "")
        made[f"{name}: unfolded"] = model, ""
        made[f"{name}: folded"] = fold(model, case.img_size)[0], bar
        made[f"{name}: folded, a row per branch"] = fold_branches(model, case.img_size)[0], bar
    made[CONTROL] = made[PLAIN]
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return {name: (form.eval().to(device, memory_format=layout), bar) for name, (form, bar) in made.items()}


@torch.no_grad()
def with_statistics(model: nn.Module) -> nn.Module:
    """The model with BatchNorm statistics and branches as training might leave them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    for parameter in model.branches.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def measure(case: Case, device: torch.device) -> dict[str, tuple[Figures, str]]:
    """{name: (figures, bar)} of every form of a model."""
    made = forms(case, device)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
    passes = {}
    for name, (form, _) in made.items():
        seconds_per_batch(form, images, case.warmup)  # allocations, and on a GPU the choice of algorithms
        passes[name] = max(1, round(case.block_seconds / seconds_per_batch(form, images, 1)))
    rounds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(case.rounds):
        order = list(made)[number % len(made) :] + list(made)[: number % len(made)]
        for name in order:
            rounds[name].append(seconds_per_batch(made[name][0], images, passes[name]))
    return {
        name: (Figures.of(seconds, rounds[PLAIN], case.batch_size), made[name][1]) for name, seconds in rounds.items()
    }


@torch.inference_mode()
def seconds_per_batch(form: nn.Module, images: torch.Tensor, passes: int) -> float:
    """Mean over `passes` forward passes, whose last one the device has ended."""
    device = images.device
    _synchronize(device)
    begun = time.perf_counter()
    for _ in range(passes):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            form(images)
    _synchronize(device)
    return (time.perf_counter() - begun) / passes


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(case: Case, figures: dict[str, tuple[Figures, str]]) -> Iterator[str]:
    """The printed lines of one model."""
    yield ""
    yield f"{case.model}, {case.img_size} px, batch {case.batch_size}, {CLASSES:,} classes, {case.rounds} rounds"
    yield f"{'':<44}{'images/s':>10}   time / plain model's: median (quartiles)   bar"
    for name, (figure, bar) in figures.items():
        lower, median, upper = figure.ratios
        ratio = f"{median:.3f} ({lower:.3f} to {upper:.3f})"
        yield f"{name:<44}{figure.images_per_second:>10,.0f}   {ratio:<41}{bar}".rstrip()


def main(arguments: list[str] | None = None) -> None:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["resnext50_32x4d"] if has_gpu else ["cifar_resnet32", "resnet18"]
    parser.add_argument("--model", nargs="+", default=models, help=f"unset: {' '.join(models)}")
    parser.add_argument("--batch-size", type=int, help="unset: 256 on a GPU, 128 for inputs up to 64 px, else 4")
    parser.add_argument("--img-size", type=int, help="unset: each model's own")
    parser.add_argument(
        "--rounds", type=int, default=21 if has_gpu else 7, help="in each of which every form is timed; at least 2"
    )
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    device = torch.device("cuda" if has_gpu else "cpu")

    name = torch.cuda.get_device_name() if has_gpu else f"{torch.get_num_threads()} threads"
    print(f"{machine()}; {name}", flush=True)
    for model in args.model:
        img_size = args.img_size or timm.get_pretrained_cfg(model).input_size[-1]
        batch_size = args.batch_size or (256 if has_gpu else 128 if img_size <= 64 else 4)
        case = Case(
            model, img_size, batch_size, args.rounds, warmup=5 if has_gpu else 1, block_seconds=0.5 if has_gpu else 0.1
        )
        for line in table(case, measure(case, device)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
