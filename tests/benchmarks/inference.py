"""The cost of the branches in inference: images/s of the plain model, of ResLT and of folded ResLT, in one run.

    python -m tests.benchmarks.inference [--model NAME ...] [--batch-size N] [--rounds N]

Weights are random; BatchNorm statistics and branches differ from those of a new model; the images are synthetic and on the
device. The plain model is measured twice: its ratio to itself shows the noise. On a GPU: bf16, channels-last."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn

from reslt.config.schema import Config
from reslt.models.fold import fold
from tests.benchmarks.rows import WITHIN_NOISE, Row, command_line, write_rows
from tests.benchmarks.turns import Side, Turns, default_device, in_turn, machine
from tests.builders import model_of

CLASSES = 1000
PLAIN, CONTROL = "plain model", "plain model again"
FOLDED_POOLED_BAR = 0.98


@dataclass(frozen=True)
class Case:
    """A model and its input."""

    model: str
    img_size: int
    batch_size: int


def forms(case: Case, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, float | str]]:
    """Return {name: form of a model}, the plain one first and last, and {name: bar}."""
    made: dict[str, nn.Module] = {}
    for branch, place in (("bn", "map"), ("conv", "map"), ("conv", "pooled")):
        config = Config.of(model=case.model, branch=branch, branch_at=place, img_size=case.img_size)
        torch.manual_seed(0)
        model = with_statistics(model_of(config, CLASSES)).eval()
        made.setdefault(PLAIN, model.backbone)
        name = branch if branch == "bn" else f"{branch}, {'on the map' if place == 'map' else 'pooled first'}"
        made[f"{name}: unfolded"] = model
        made[f"{name}: folded"] = fold(model, case.img_size)[0]
    made[CONTROL] = made[PLAIN]
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    bars = {"bn: folded": WITHIN_NOISE, "conv, pooled first: folded": FOLDED_POOLED_BAR}
    return {name: form.eval().to(device, memory_format=layout) for name, form in made.items()}, bars


@torch.no_grad()
def with_statistics(model: nn.Module) -> nn.Module:
    """Return the model, with BatchNorm statistics and branches as training might leave them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    for parameter in model.branches.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def measure(case: Case, rounds: int, device: torch.device, turn_seconds: float) -> tuple[Turns, dict[str, float | str]]:
    """Measure every form of a model; return the rates and the bars."""
    made, bars = forms(case, device)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
    warm_up = 5 if device.type == "cuda" else 1  # allocations, and on a GPU the choice of algorithms
    sides = {name: forward_of(form, images) for name, form in made.items()}
    return in_turn(sides, rounds, device, warm_up, turn_seconds), bars


def forward_of(form: nn.Module, images: torch.Tensor) -> Side:
    """Return a function that does one forward pass."""
    device = images.device.type

    @torch.inference_mode()
    def forward() -> int:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            form(images)
        return len(images)

    return forward


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratios."""
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = command_line(__doc__)
    models = ["resnext50_32x4d"] if on_gpu else ["cifar_resnet32", "resnet18"]
    parser.add_argument("--model", nargs="+", default=models, help=f"timm models; unset: {' '.join(models)}")
    parser.add_argument("--batch-size", type=int, help="unset: 256 on a GPU, 128 for inputs up to 64 px, else 4")
    parser.add_argument("--img-size", type=int, help="pixels per side; unset: each model's own")
    parser.add_argument(
        "--rounds", type=int, default=21 if on_gpu else 7, help="number of rounds; each form has a turn in each"
    )
    parser.add_argument("--seconds", type=float, default=0.5 if on_gpu else 0.1, help="approximate duration of a turn")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    print(machine(), flush=True)
    rows = []
    for model in given.model:
        img_size = given.img_size or timm.get_pretrained_cfg(model).input_size[-1]
        case = Case(model, img_size, given.batch_size or (256 if on_gpu else 128 if img_size <= 64 else 4))
        turns, bars = measure(case, given.rounds, device, given.seconds)
        title = f"{model}, {img_size} px, batch {case.batch_size}, {CLASSES:,} classes"
        print("", *turns.table(title, PLAIN, bars), sep="\n", flush=True)
        rows += [turns.row(side, PLAIN, bars.get(side), f"{model}, {side}") for side in turns.rates if side != PLAIN]
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
