"""Wall time of a whole run, from the command to its final table: CIFAR-100-LT 0.01, ResLT, 200 epochs, evaluated after each.

    python -m tests.benchmarks.cifar_run                      # plain, with AutoAugment, and with AutoAugment and mixup
    python -m tests.benchmarks.cifar_run --twice --host       # each again with warm caches, then with images on the host
    python -m tests.benchmarks.cifar_run --runs 0 1 --profile # some of the runs, with their phases
    python -m tests.benchmarks.cifar_run --demo               # three epochs of the embedded digits, the default on a CPU
    python -m tests.benchmarks.cifar_run -- --seed 1          # flags of train.py

Each run is `train.py` in a process of its own, with images on the device. The first run finds cold caches, later runs what
earlier ones left. With --twice, each run is repeated and finds its own compiled kernels and decoded images. A bar is in
seconds, for cold and for warm caches; the ratio is the bar over the seconds taken: above 1, the run took less."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import default_device, machine

PROJECT = Path(__file__).resolve().parents[2]
FAST = ["--mixed-precision", "bf16", "--channels-last", "--torchcompile"]
STRONG = ["--recipe", "cifar100_lt_0.01/resnet32_strong"]
RUNS = {  # name: flags, seconds allowed with cold caches, and with warm ones
    "CIFAR-100-LT 0.01, ResLT": (["--recipe", "cifar100_lt_0.01/resnet32", *FAST], 70, 45),
    "with AutoAugment": ([*STRONG, "--mixup", "0", *FAST], 85, 60),
    "with AutoAugment and mixup": ([*STRONG, "--mixup", "0.2", *FAST], 85, 60),
}
DEMO = {"digits, 3 epochs": (["--data", "digits_lt", "--epochs", "3", "--data-on-device", "on"], None, None)}
HOST = ["--data-on-device", "off", "--cuda-graph", "off"]


@dataclass(frozen=True)
class Times:
    """Seconds, from the start of the process."""

    to_training: float  # until the lines that state what is about to be trained
    first_epoch: float  # from then until the first epoch's line
    whole: float
    epochs: int
    accuracy: float  # last epoch, test list, percent

    @property
    def each_epoch(self) -> float:
        """The mean over the epochs after the first, including the final table; NaN if there is only one epoch."""
        left = self.epochs - 1
        return (self.whole - self.to_training - self.first_epoch) / left if left else float("nan")


def timed(flags: list[str], output: Path) -> tuple[Times, list[str]]:
    """Run train.py with these flags; return its times, and the lines of its --profile."""
    command = [sys.executable, "-u", "train.py", *flags, "--output", str(output), "--experiment", "run", "--overwrite"]
    start, moments, profile = time.perf_counter(), {}, []
    with (
        tempfile.TemporaryFile("w+") as warnings,
        subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=warnings, text=True) as process,
    ):
        for line in process.stdout:
            moments.setdefault(line.partition(" ")[0], time.perf_counter() - start)
            if profile or line.startswith("profile "):
                profile.append(line.rstrip())
        code, whole = process.wait(), time.perf_counter() - start
        warnings.seek(0)
        if code:
            sys.exit(f"{warnings.read()}{' '.join(command)} ended with {code}")
    rows = pd.read_csv(output / "run" / "summary.csv")
    times = Times(
        to_training=moments["run"],
        first_epoch=moments["epoch"] - moments["run"],
        whole=whole,
        epochs=len(rows),
        accuracy=float(rows["test_all"].iloc[-1]),
    )
    return times, profile


def shown(name: str, flags: list[str], bar: float | None = None) -> Times:
    """Run train.py in a temporary folder, print its line and return its times."""
    with tempfile.TemporaryDirectory() as output:
        times, profile = timed(flags, Path(output))
    print(
        f"{name:40} {times.to_training:11.1f} {times.first_epoch:8.1f} {times.each_epoch:9.2f} {times.whole:8.1f} "
        f"{bar or '':>5}   {times.accuracy:.1f}",
        *profile,
        sep="\n  ",
        flush=True,
    )
    return times


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the table; return the ratios to the bars and to the host."""
    parser = command_line(__doc__)
    parser.add_argument("--demo", action="store_true", help="run three epochs of the embedded digits instead")
    parser.add_argument("--runs", type=int, nargs="+", choices=range(len(RUNS)), help="run only these, counted from 0")
    parser.add_argument("--profile", action="store_true", help="print the phases of each run")
    parser.add_argument("--twice", action="store_true", help="repeat each run with warm caches")
    parser.add_argument("--warm", action="store_true", help="compare with the bars for warm caches")
    parser.add_argument(
        "--host",
        action=argparse.BooleanOptionalAction,
        help=f"repeat each run with {' '.join(HOST)}; unset: only the digits",
    )
    parser.add_argument("flags", nargs="*", help="after --: flags of train.py")
    given = parser.parse_args(arguments)
    is_demo = given.demo or default_device().type == "cpu"
    with_host = is_demo if given.host is None else given.host
    print(machine())
    print(
        f"{'seconds':40} {'to training':>11} {'epoch 1':>8} {'an epoch':>9} {'whole':>8} {'bar':>5}   last epoch, test %",
        flush=True,
    )
    rows, more = [], given.flags + ["--profile"] * given.profile
    chosen = DEMO if is_demo else RUNS
    for number, (name, (flags, cold, warm)) in enumerate(chosen.items()):
        if given.runs and number not in given.runs:
            continue
        titles = ((name, cold), (f"{name}, warm", warm))
        for title, bar in titles[1:] if given.warm else titles[: 1 + given.twice]:
            times = shown(title, flags + more, bar)
            if bar is not None:
                ratio = bar / times.whole
                rows.append(Row(f"{title}: {bar} s / seconds taken", ratio, ratio, ratio, bar=1.0))
        if with_host:
            ratio = shown(f"{name}, on the host", flags + more + HOST).whole / times.whole
            rows.append(Row(f"{name}: on the device / on the host", ratio, ratio, ratio))
    return write_rows(rows, given.json)


if __name__ == "__main__":
    main()
