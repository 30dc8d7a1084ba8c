"""The time until a command answers, and until a run has taken its first step, compiled or not.

    python -m tests.benchmarks.start [--rounds N] [--compile] [FLAG OF train.py ...]

Each measurement is a process of its own; commands take turns. The table shows medians of wall and CPU seconds. The data are
the digits, unless flags name others. With `--compile`, the first step is also measured without compilation, compiled with
an empty cache, and compiled with the cache of a run of another seed and learning rate. On a GPU: bf16, channels-last."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from tests.benchmarks.turns import machine

ROOT = Path(__file__).resolve().parents[2]
FIRST_STEP = """
import sys
import reslt.training.step as step
own = step.TrainStep.update
def update(self, window, number):
    outputs = own(self, window, number)
    float(outputs[0])
    sys.exit(0)
step.TrainStep.update = update
import train
train.main()
"""


def seconds_of(arguments: list[str], **environment: str) -> tuple[float, float]:
    """Run Python with these arguments. Return its wall and CPU time, including that of its own child processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode not in (0, 2):
        raise SystemExit(f"{' '.join(arguments)}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.start")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each command")
    parser.add_argument(
        "--compile", action="store_true", help="also measure compilation, with an empty cache and with a full one"
    )
    given, flags = parser.parse_known_args()
    fast = ["--mixed-precision", "bf16", "--channels-last"] if torch.cuda.is_available() else []
    print(f"{machine()}\n{'seconds':<44}{'wall':>8}{'CPU':>8}")
    with tempfile.TemporaryDirectory() as folder:
        trained = ["--output", folder, "--overwrite", *fast, *flags]
        seconds_of(["train.py", *trained, "--epochs", "1", "--experiment", "run"])  # also decodes the images
        first_step, run = ["-c", FIRST_STEP, *trained, "--experiment", "other"], f"{folder}/run"
        commands = {
            "train.py, to the end of the first step": first_step,
            "evaluate.py": ["evaluate.py", "--ckpt", run, "--output", folder],
            "python -m reslt.report": ["-m", "reslt.report", run],
            "train.py --help": ["train.py", "--help"],
            "train.py, with an unknown flag": ["train.py", "--epoch", "1"],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.rounds):
            for name, arguments in commands.items():
                seconds[name].append(seconds_of(arguments))
        if given.compile:
            cache, compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}, [*first_step, "--torchcompile"]
            seconds["first step, not compiled"] = [seconds_of(first_step)]
            seconds["first step, compiled, cache empty"] = [seconds_of(compiled, **cache)]
            seconds["first step, compiled, cache of another run"] = [
                seconds_of([*compiled, "--seed", "7", "--lr", "0.03"], **cache)
            ]
        for name, found in seconds.items():
            print(f"{name:<44}" + "".join(f"{median(column):>8.2f}" for column in zip(*found, strict=True)))


if __name__ == "__main__":
    main()
