"""The fixed cost of an epoch: time outside its steps and outside the forward passes of its evaluation.

    python -m tests.benchmarks.epoch [--against FOLDER] [--rounds N] [--epochs N]

An epoch is 84 steps of a tiny network on batches of 128 resident digits of 32 x 32 pixels, then an evaluation of 10,000 test
images, as with CIFAR-100-LT 0.01. Each run is `train.py` in a process of its own. A step begins when its batch is ready and
ends when the next one is requested, as in the share of waiting that a run prints. `--against` names another checkout of this
project, which takes turns with this one; the ratio is that of the rates, so above 1 this checkout is faster. `start` is the
time from the command to the end of the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parents[2]
STEPS, BATCH, TEST_IMAGES = 84, 128, 10_000
ONE = "--one-run"  # the script's own flag for the process of one run


def write_lists(folder: Path) -> None:
    """Write lists of the embedded digits, each repeated until there are enough."""
    from reslt.config.places import lists_folder
    from reslt.prepare.subsets import make_if_embedded

    make_if_embedded("digits_lt")
    source = lists_folder() / "digits_lt"
    folder.mkdir()
    (folder / "info.yaml").write_text((source / "info.yaml").read_text())
    for name, count in (("train", STEPS * BATCH), ("test", TEST_IMAGES)):
        lines = (source / f"{name}.txt").read_text().splitlines()
        (folder / f"{name}.txt").write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(count)))


def one_run(data: str, images: str, output: str, epochs: str) -> None:
    """Train, and print as JSON: the seconds from the process's start to the end of the first step and, for each epoch after
    the first, its seconds, those of its steps and those of the forward passes of its evaluation."""
    started = time.time() - time.perf_counter()
    import psutil

    import train
    from reslt.methods.predictors import Predictions
    from reslt.runs.summary import Summary
    from reslt.training.step import TrainStep

    spent, rows, first_step = {"step": 0.0, "forward": 0.0}, [], []

    def timed(owner: type, name: str, kind: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            since = time.perf_counter()
            result = function(*args, **kwargs)
            spent[kind] += time.perf_counter() - since
            if not first_step and kind == "step":
                first_step.append(started + time.perf_counter() - psutil.Process().create_time())
            return result

        setattr(owner, name, wrapped)

    timed(TrainStep, "update", "step")  # for the first one
    timed(Predictions, "__call__", "forward")
    add = Summary.add

    def add_timed(summary, epoch, lr, stats, results):
        line = add(summary, epoch, lr, stats, results)
        steps = (1 - stats.waiting) * STEPS * BATCH / stats.images_per_second
        rows.append([time.perf_counter(), steps + (rows[-1][1] if rows else 0), spent["forward"]])
        return line

    Summary.add = add_timed
    flags = ["--data", data, "--data-dir", images, "--model", "cifar_resnet20", "--model-kwargs", "channels=2,4,8"]
    flags += ["--img-size", "32", "--batch-size", str(BATCH), "--warmup-epochs", "0", "--epochs", epochs]
    flags += ["--eval-every", "1", "--data-on-device", "on", "--output", output, "--experiment", "run", "--overwrite"]
    sys.argv = ["train.py", *flags]
    train.main()
    print(json.dumps({"first_step": first_step[0], "epochs": np.diff(rows, axis=0).tolist()}))


def measured(checkout: Path, data: Path, output: Path, epochs: int) -> tuple[list[float], float]:
    """Run a checkout once. Return the milliseconds of each epoch outside steps and forward passes, and the seconds to the
    end of the first step."""
    from reslt.config.places import default_images_folder

    command = [sys.executable, __file__, ONE, data, default_images_folder() / "digits_lt", output, str(epochs)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    ended = subprocess.run(list(map(str, command)), cwd=checkout, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stderr)
    found = json.loads(ended.stdout.splitlines()[-1])
    return [1000 * (whole - step - forward) for whole, step, forward in found["epochs"][1:]], found["first_step"]


def main(arguments: list[str] | None = None) -> list:
    """Print the table; return the ratios to the other checkout."""
    from tests.benchmarks.rows import Row, command_line, write_rows
    from tests.benchmarks.turns import machine

    parser = command_line(__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout")
    parser.add_argument("--epochs", type=int, default=6, help="of each run; the first two do not count")
    given = parser.parse_args(arguments)
    sides = {"this checkout": PROJECT} | ({"the other one": given.against.resolve()} if given.against else {})
    outside, starts = {name: [] for name in sides}, {name: [] for name in sides}
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        write_lists(Path(folder) / "lists")
        for _ in range(given.rounds):
            for name, checkout in sides.items():
                epochs, start = measured(checkout, Path(folder) / "lists", Path(folder) / "output", given.epochs)
                outside[name] += epochs
                starts[name].append(start)
    print(f"{'':<20}{'ms of an epoch outside steps and forward passes (quartiles)':<64}{'start, s':>10}")
    for name in sides:
        low, median, high = np.percentile(outside[name], [25, 50, 75])
        print(f"{name:<20}{f'{median:.1f} ({low:.1f} to {high:.1f})':<64}{np.median(starts[name]):>10.2f}")
    rows = []
    if given.against:
        for title, values in (("an epoch's fixed cost", outside), ("start to first step", starts)):
            this, other = (np.array(values[name]) for name in sides)
            low, middle, high = np.percentile(np.median(other) / this, [25, 50, 75])
            rows.append(Row(f"{title}: the other checkout / this one", middle, low, high))
    for row in rows:
        print(f"{row.name}: {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})")
    return write_rows(rows, given.json)


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE]:
        one_run(*sys.argv[2:])
    else:
        main()
