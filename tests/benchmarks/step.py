"""Images per second of the bare training step on synthetic input: a plain loop on a timm model with cross-entropy, as timm's
own script trains, against this suite's step.

    python -m tests.benchmarks.step [--model M] [--size S] [--batch N] [--rounds R] [--steps N] [--compile]

On a GPU: ResNeXt-50 at 224 pixels (batch 256, bf16, channels-last) and the CIFAR ResNet-32 at 32 (batch 128, bf16), where
the step is also recorded as one CUDA graph. On a CPU: the latter in float32. The plain loop is measured twice: its ratio to
itself shows what noise is. Compiled, ResNeXt-50's step is also compared with 4,000 images a second.
"""

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
    """What is trained."""

    config: Config
    size: int  # pixels a side
    device: torch.device
    steps: int  # of one turn


def plain_loop(b: Bench) -> Callable[[], int]:
    """timm's model and optimizer, normalized float images that are on the device already."""
    c, accelerator = b.config, Accelerator(mixed_precision=b.config.run.mixed_precision, cpu=b.device.type == "cpu")
    batch_size = c.optim.batch_size
    model = backbone_of(c.changed(method="ce"), CLASSES).to(b.device)
    model.to(memory_format=torch.channels_last if c.run.channels_last else torch.preserve_format)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch_size, 3, b.size, b.size, device=b.device)
    if c.run.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=b.device) % CLASSES
    loss_fn = torch.nn.CrossEntropyLoss()

    def run() -> int:
        for _ in range(b.steps):
            with accelerator.autocast():
                loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return b.steps * batch_size

    return run


def our_step(b: Bench, kind: type[TrainStep] = TrainStep, **changes) -> Callable[[], int]:
    """This suite's step, from uint8 images on the device: normalization, network, loss, update."""
    c = b.config.changed(**changes)
    batch_size, accelerator = (
        c.optim.batch_size,
        Accelerator(mixed_precision=c.run.mixed_precision, cpu=b.device.type == "cpu"),
    )
    model = model_of(c, CLASSES).to(b.device)
    model.to(memory_format=torch.channels_last if c.run.channels_last else torch.preserve_format)
    counts = np.maximum(500 * 0.01 ** (np.arange(CLASSES) / (CLASSES - 1)), 1).astype(np.int64)
    data = resolve_model_data_config(model.backbone)
    optimizer = optimizer_of(c, model)
    if c.run.torchcompile:
        compile_model(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loss_fn, normalize = loss_of(c, counts).to(b.device), Normalize(data["mean"], data["std"]).to(b.device)
    step = kind(prepared, loss_fn, optimizer, accelerator, BatchShard(batch_size), normalize, seed=0, sam=c.optim.sam)
    images = torch.randint(0, 256, (batch_size, 3, b.size, b.size), dtype=torch.uint8, device=b.device)
    labels = torch.arange(batch_size, device=b.device) % CLASSES

    def run() -> int:
        for number in range(b.steps):
            step.update([(images, labels)], number)
        return b.steps * batch_size

    return run


def measure(b: Bench, rounds: int, with_compile: bool) -> Turns:
    """Every kind of step that the device has."""
    plain = plain_loop(b)
    sides = {PLAIN: plain, AGAIN: plain, CE: our_step(b, method="ce"), RESLT: our_step(b)}
    sides[SHARP] = our_step(b, sam=0.05)
    if b.device.type == "cuda":
        sides[GRAPH] = our_step(b, GraphedStep)
        sides[f"{SHARP}, one CUDA graph"] = our_step(b, GraphedStep, sam=0.05)
    if with_compile:
        sides[COMPILED] = our_step(b, torchcompile=True)
        if b.device.type == "cuda":
            sides[f"{COMPILED}, one CUDA graph"] = our_step(b, GraphedStep, torchcompile=True)
    return in_turn(sides, rounds, b.device, warm_up=2)


def rows_of(b: Bench, turns: Turns) -> list[Row]:
    """Every side against the plain loop, and the compiled one against its rate."""
    name = b.config.model.model
    compiled = COMPILED_RATE.get(name)
    rows = [turns.row(side, PLAIN, BARS.get(side), f"{name}: {side}") for side in turns.rates if side != PLAIN]
    if compiled and COMPILED in turns.rates and b.device.type == "cuda":
        low, middle, high = np.quantile(turns.rates[COMPILED] / compiled, [0.25, 0.5, 0.75]).tolist()
        rows.append(Row(f"{name}: compiled / {compiled:,} img/s", middle, low, high, bar=1.0))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratios."""
    parser = command_line(__doc__)
    parser.add_argument("--model", help="any timm model; unset: those named above")
    parser.add_argument("--size", type=int, default=224, help="with --model: pixels a side")
    parser.add_argument("--batch", type=int, help="unset: 256, or 128 for the CIFAR ResNet")
    parser.add_argument("--branch", choices=("bn", "conv"), default="conv", help="with --model")
    parser.add_argument("--steps", type=int, help="in one turn; unset: 20, on a CPU 1")
    parser.add_argument("--rounds", type=int, help="unset: 7, on a CPU 4")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes the first time)")
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
    for c, size in chosen:
        b = Bench(c, size, device, given.steps or (20 if on_gpu else 1))
        turns = measure(b, given.rounds or (7 if on_gpu else 4), given.compile)
        dtype = "float32" if c.run.mixed_precision == "no" else c.run.mixed_precision
        title = f"{c.model.model}, {size} px, batch {c.optim.batch_size}, {dtype}"
        print("", *turns.table(title, PLAIN, BARS), sep="\n", flush=True)
        if not on_gpu:
            print("  one CUDA graph: not measured, there is no CUDA device")
        rows += rows_of(b, turns)
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
