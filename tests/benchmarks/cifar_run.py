"""Wall time of a whole run, from the command to its final table: CIFAR-100-LT 0.01, ResLT, 200 epochs, evaluated behind each.

    python -m tests.benchmarks.cifar_run                      # plain, and with AutoAugment and mixup
    python -m tests.benchmarks.cifar_run --demo               # three epochs of the embedded digits; a CPU takes these
    python -m tests.benchmarks.cifar_run -- --data-on-device off --cuda-graph off   # flags of train.py

Each run is `train.py` as a process of its own. With --twice, each is run twice, so that the second finds the compiled kernels
and decoded images of the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tests.benchmarks.turns import default_device, machine

PROJECT = Path(__file__).resolve().parents[2]
FAST = ["--mixed-precision", "bf16", "--channels-last", "--torchcompile"]
RUNS = {
    "CIFAR-100-LT 0.01, ResLT": (["--recipe", "cifar100_lt_0.01/resnet32", *FAST], 90),
    "with AutoAugment and mixup": (["--recipe", "cifar100_lt_0.01/resnet32_strong", "--mixup", "0.2", *FAST], 105),
}
DEMO = {"digits, 3 epochs": (["--data", "digits_lt", "--epochs", "3"], None)}


@dataclass(frozen=True)
class Times:
    """Seconds, from the start of the process."""

    to_training: float  # until the line that says what is about to be trained
    first_epoch: float  # from there until the first epoch's line
    whole: float
    epochs: int
    accuracy: float  # last epoch, test list, percent

    @property
    def each_epoch(self) -> float:
        """Mean over the epochs behind the first, everything included."""
        return (self.whole - self.to_training - self.first_epoch) / max(self.epochs - 1, 1)


def timed(flags: list[str], output: Path) -> Times:
    """One run."""
    command = [sys.executable, "-u", "train.py", *flags, "--output", str(output), "--experiment", "run", "--overwrite"]
    start = time.perf_counter()
    moments = {}
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        told = []
        for line in process.stdout:
            told.append(line)
            moments.setdefault(line.split()[0] if line.split() else "", time.perf_counter() - start)
    whole = time.perf_counter() - start
    if process.returncode:
        sys.exit("".join(told[-20:]) + f"{' '.join(command)} ended with {process.returncode}")
    rows = pd.read_csv(output / "run" / "summary.csv")
    return Times(
        to_training=moments["run"],
        first_epoch=moments["epoch"] - moments["run"],
        whole=whole,
        epochs=len(rows),
        accuracy=float(rows["test_all"].iloc[-1]),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--demo", action="store_true", help="three epochs of the embedded digits")
    parser.add_argument("--twice", action="store_true", help="the second run of each finds warm caches")
    parser.add_argument("flags", nargs="*", help="behind --: flags of train.py")
    given = parser.parse_args(arguments)
    device = default_device()
    print(machine(device))
    print(
        f"{'seconds':34} {'to training':>11} {'epoch 1':>8} {'an epoch':>9} {'whole':>8} {'bar':>5}   last epoch, test %"
    )
    for name, (flags, bar) in (DEMO if given.demo or device.type == "cpu" else RUNS).items():
        for number in range(1 + given.twice):
            with tempfile.TemporaryDirectory() as output:
                t = timed(flags + given.flags, Path(output))
            label = name + ", again" * number
            print(
                f"{label:34} {t.to_training:11.1f} {t.first_epoch:8.1f} {t.each_epoch:9.2f} {t.whole:8.1f} "
                f"{bar or '-':>5}   {t.accuracy:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
