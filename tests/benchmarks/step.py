"""Images per second of the bare training step on synthetic input: this suite's step, compared with a plain loop on a timm
model with cross-entropy, as timm's own script trains.

    python -m tests.benchmarks.step [--model M] [--size S] [--batch N] [--rounds R] [--steps N] [--compile]

On a GPU: ResNeXt-50 at 224 pixels (batch 256, bf16, channels-last) and the CIFAR ResNet-32 at 32 pixels (batch 128, bf16),
each step also recorded as one CUDA graph. On a CPU: the CIFAR ResNet-32 in float32. The plain loop is measured twice: its
ratio to itself shows the noise. If compiled, ResNeXt-50's step is also compared with 4,000 images per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2

from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.loading.batches import Normalize
from reslt.training.compiled import compile_model
from reslt.training.cuda_graph import GraphedStep
from reslt.training.step import TrainStep
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import Turns, default_device, in_turn, machine
from tests.builders import backbone_of, loss_of, model_of, optimizer_of

CLASSES = 100
PLAIN, AGAIN, CE, RESLT, SHARP, GRAPH, COMPILED = (
    "timm model, plain loop, cross-entropy",
    "the same again",
    "this suite, cross-entropy",
    "this suite, ResLT",
    "this suite, ResLT, sharpness-aware",
    "this suite, ResLT, one CUDA graph",
    "this suite, ResLT, compiled",
)
BARS = {RESLT: 0.95}
COMPILED_RATE = {"resnext50_32x4d": 4000}  # img/s on a GPU


@dataclass(frozen=True)
class Bench:
    """A training to measure."""

    config: Config
    size: int  # pixels per side
    device: torch.device
    steps: int  # per turn


def plain_loop(bench: Bench) -> Callable[[], int]:
    """Return a turn of the plain loop: timm's model and optimizer on normalized float images that are on the device."""
    config = bench.config
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision, cpu=bench.device.type == "cpu")
    batch_size = config.optim.batch_size
    model = backbone_of(config.changed(method="ce"), CLASSES).to(bench.device)
    model.to(memory_format=torch.channels_last if config.run.channels_last else torch.preserve_format)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch_size, 3, bench.size, bench.size, device=bench.device)
    if config.run.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=bench.device) % CLASSES
    loss_fn = torch.nn.CrossEntropyLoss()

    def run() -> int:
        for _ in range(bench.steps):
            with accelerator.autocast():
                loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return bench.steps * batch_size

    return run


def our_step(bench: Bench, kind: type[TrainStep] = TrainStep, **changes) -> Callable[[], int]:
    """Return a turn of this suite's step from uint8 images on the device: normalization, network, loss, update."""
    config = bench.config.changed(**changes)
    batch_size = config.optim.batch_size
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision, cpu=bench.device.type == "cpu")
    model = model_of(config, CLASSES).to(bench.device)
    model.to(memory_format=torch.channels_last if config.run.channels_last else torch.preserve_format)
    counts = np.maximum(500 * 0.01 ** (np.arange(CLASSES) / (CLASSES - 1)), 1).astype(np.int64)
    data = resolve_model_data_config(model.backbone)
    optimizer = optimizer_of(config, model)
    if config.run.torchcompile:
        compile_model(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loss_fn, normalize = loss_of(config, counts).to(bench.device), Normalize(data["mean"], data["std"]).to(bench.device)
    step = kind(
        prepared, loss_fn, optimizer, accelerator, BatchShard(batch_size), normalize, seed=0, sam=config.optim.sam
    )
    images = torch.randint(0, 256, (batch_size, 3, bench.size, bench.size), dtype=torch.uint8, device=bench.device)
    labels = torch.arange(batch_size, device=bench.device) % CLASSES

    def run() -> int:
        for number in range(bench.steps):
            step.update([(images, labels)], number)
        return bench.steps * batch_size

    return run


def measure(bench: Bench, rounds: int, with_compile: bool) -> Turns:
    """Measure every kind of step that the device can do."""
    plain = plain_loop(bench)
    sides = {PLAIN: plain, AGAIN: plain, CE: our_step(bench, method="ce"), RESLT: our_step(bench)}
    sides[SHARP] = our_step(bench, sam=0.05)
    if bench.device.type == "cuda":
        sides[GRAPH] = our_step(bench, GraphedStep)
        sides[f"{SHARP}, one CUDA graph"] = our_step(bench, GraphedStep, sam=0.05)
    if with_compile:
        sides[COMPILED] = our_step(bench, torchcompile=True)
        if bench.device.type == "cuda":
            sides[f"{COMPILED}, one CUDA graph"] = our_step(bench, GraphedStep, torchcompile=True)
    return in_turn(sides, rounds, bench.device, warm_up=2)


def rows_of(bench: Bench, turns: Turns) -> list[Row]:
    """Return the ratios of all sides to the plain loop, and of the compiled step to its required rate."""
    name = bench.config.model.model
    compiled = COMPILED_RATE.get(name)
    rows = [turns.row(side, PLAIN, BARS.get(side), f"{name}: {side}") for side in turns.rates if side != PLAIN]
    if compiled and COMPILED in turns.rates and bench.device.type == "cuda":
        low, middle, high = np.quantile(turns.rates[COMPILED] / compiled, [0.25, 0.5, 0.75]).tolist()
        rows.append(Row(f"{name}: compiled / {compiled:,} img/s", middle, low, high, bar=1.0))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratios."""
    parser = command_line(__doc__)
    parser.add_argument("--model", help="any timm model; unset: those named above")
    parser.add_argument("--size", type=int, default=224, help="with --model: pixels per side")
    parser.add_argument("--batch", type=int, help="images per batch; unset: 256, or 128 for the CIFAR ResNet")
    parser.add_argument("--branch", choices=("bn", "conv"), default="conv", help="with --model: kind of branches")
    parser.add_argument("--steps", type=int, help="steps per turn; unset: 20, on a CPU 1")
    parser.add_argument(
        "--rounds", type=int, help="number of rounds; each side has a turn in each; unset: 7, on a CPU 4"
    )
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile (minutes the first time)")
    given = parser.parse_args(arguments)
    device = default_device()
    on_gpu = device.type == "cuda"
    precision = dict(mixed_precision="bf16" if on_gpu else "no", channels_last=on_gpu, lr=1e-4)
    cifar = Config.of(model="cifar_resnet32", branch="bn", batch_size=given.batch or 128, nesterov=True, **precision)
    large = Config.of(model="resnext50_32x4d", batch_size=given.batch or 256, **precision)
    chosen = [(cifar, 32), (large, 224)] if on_gpu else [(cifar, 32)]
    if given.model:
        chosen = [(large.changed(model=given.model, branch=given.branch), given.size)]
    print(machine())
    rows = []
    for config, size in chosen:
        bench = Bench(config, size, device, given.steps or (20 if on_gpu else 1))
        turns = measure(bench, given.rounds or (7 if on_gpu else 4), given.compile)
        dtype = "float32" if config.run.mixed_precision == "no" else config.run.mixed_precision
        title = f"{config.model.model}, {size} px, batch {config.optim.batch_size}, {dtype}"
        print("", *turns.table(title, PLAIN, BARS), sep="\n", flush=True)
        if not on_gpu:
            print("  one CUDA graph: not measured, there is no CUDA device")
        rows += rows_of(bench, turns)
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
