"""Images per second of several runs in one process together, as `reproduce --streams N` trains them, against one run.

    python -m tests.benchmarks.streams [--runs 1 3 9] [--batch N] [--steps N] [--rounds R]

Each run is the bare training step of the CIFAR ResNet-32 on synthetic input; on a GPU in bf16, as one CUDA graph on a stream
of its own. On a CPU the runs take turns, so the ratio shows the cost of handing over."""

from __future__ import annotations

import threading

import torch

from reslt.augment.transfers import let_device_finish
from reslt.config.schema import Config
from reslt.core.turns import Turns, take_turns
from reslt.reproduce.together import own_random_numbers
from reslt.training.cuda_graph import GraphedStep
from reslt.training.step import TrainStep
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.step import Bench, our_step
from tests.benchmarks.turns import Side, default_device, in_turn, machine

BARS = {9: 2.0}  # {number of runs: bar}, on a GPU


def side_of(runs: int, bench: Bench, steps: int) -> Side:
    """Return a function that does `steps` steps of each of several runs, which take turns step by step. `bench.steps` is
    1."""
    on_gpu = bench.device.type == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in range(runs)]
    made = []
    for stream in streams:
        with torch.cuda.stream(stream):  # None changes nothing
            made.append(our_step(bench, GraphedStep if on_gpu else TrainStep))

    def work(turns: Turns, step: Side, stream: torch.cuda.Stream | None) -> None:
        with turns.taking_part() as turn, own_random_numbers(turn), torch.cuda.stream(stream):
            for _ in range(steps):
                step()
                take_turns()
            let_device_finish(bench.device)

    def side() -> int:
        turns = Turns()
        threads = [threading.Thread(target=work, args=(turns, *of_run)) for of_run in zip(made, streams, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return runs * steps * bench.config.optim.batch_size

    return side


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the table; return the ratios to one run, or to the first number of --runs."""
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = command_line(__doc__)
    parser.add_argument("--runs", nargs="+", type=int, help="numbers of runs; unset: 1 3 9, on a CPU 1 3")
    parser.add_argument("--model", default="cifar_resnet32", help="timm model")
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--steps", type=int, help="steps of each run per turn; unset: 200, on a CPU 1")
    parser.add_argument(
        "--rounds", type=int, help="number of rounds; each number of runs has a turn in each; unset: 7, on a CPU 2"
    )
    given = parser.parse_args(arguments)
    numbers, steps = given.runs or ([1, 3, 9] if on_gpu else [1, 3]), given.steps or (200 if on_gpu else 1)
    precision = dict(mixed_precision="bf16" if on_gpu else "no", channels_last=on_gpu, lr=1e-4)
    config = Config.of(model=given.model, branch="bn", batch_size=given.batch, nesterov=True, **precision)
    names = {number: f"{number} run{'s' * (number > 1)}" for number in numbers}
    bench = Bench(config, given.size, device, steps=1)
    turns = in_turn(
        {name: side_of(number, bench, steps) for number, name in names.items()},
        given.rounds or (7 if on_gpu else 2),
        device,
    )
    first, bars = names[numbers[0]], {names[n]: BARS[n] for n in numbers if on_gpu and n in BARS}
    print(machine())
    title = f"{config.model.model}, {given.size} px, batch {given.batch}, all runs in sum"
    print("", *turns.table(title, first, bars), sep="\n", flush=True)
    if not on_gpu:
        print("  CUDA streams and graphs: not measured, there is no CUDA device")
    rows = [
        turns.row(name, first, bars.get(name), f"{given.model}: {name} at once / {first}")
        for name in names.values()
        if name != first
    ]
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
