"""What chaos finds, the ground it happens on, and what a run came to."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from reslt.runs import folder as run_folder

CLOCK = {"images_per_second", "waiting"}  # columns of summary.csv that differ from run to run
MOST_CHECKPOINTS = 3  # of a finished run: two, and the best
FLAGS = [
    "--model", "cifar_resnet20", "--model-kwargs", "channels=8,16,32", "--img-size", "16", "--epochs", "3",
    "--batch-size", "16", "--warmup-epochs", "1", "--workers", "1", "--model-ema", "--model-ema-decay", "0.9",
    "--mixup", "0.2", "--drop", "0.1", "--eval-every", "1", "--checkpoint-minutes", "0.002", "--checkpoint-hist", "2",
    "--checkpoint-seconds", "0",
    "--data-on-device", "off", "--experiment", "run", "--resume", "auto",
]  # fmt: skip


@dataclass
class Findings:
    """What came of some trials: counts under names, and what was not survived."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __iadd__(self, other: Findings) -> Findings:
        self.counts.update(other.counts)
        self.faults += other.faults
        return self


@dataclass(frozen=True)
class Ground:
    """Where everything happens, and what an undisturbed run came to."""

    work: Path
    flags: tuple[str, ...]
    reference: Path  # the folder of the undisturbed run
    startup: float = 0.0  # seconds of a process as users start it, until it enters the run's folder
    training: float = 0.0  # seconds from there to the end


# What a run came to


def comes_to(run: Path) -> dict[str, bytes]:
    """Everything that must be the same however often a run was disturbed. Raises OSError where the run is not finished."""
    kept = {}
    for pointer in (run / "checkpoints" / "last", run / "checkpoints" / "best"):
        if pointer.name == "last" or pointer.exists():
            name = pointer.read_text().strip()
            kept[pointer.name] = name.encode()
            for file in (pointer.parent / name).glob("*.safetensors"):
                kept[f"{pointer.name} {file.name}"] = file.read_bytes()
            progress = json.loads((pointer.parent / name / "state.json").read_text())["progress"]
            kept[f"{pointer.name} progress"] = str({k: progress[k] for k in ("epoch", "steps", "loss_sums")}).encode()
    kept["per_class.csv"] = (run / "per_class.csv").read_bytes()
    kept["result.json"] = (run / "result.json").read_bytes()
    with open(run / "summary.csv", newline="") as lines:
        rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(lines)]
    kept["summary.csv"] = json.dumps(rows).encode()
    return kept


def differences(run: Path, reference: Path) -> list[str]:
    """The names of what differs between two finished runs; what keeps a run from being read, where it is not finished."""
    expected = comes_to(reference)
    try:
        found = comes_to(run)
    except (OSError, ValueError, KeyError) as fault:
        return [f"unfinished: {fault}"]
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def left_behind(run: Path) -> list[str]:
    """What a finished run should not contain: half-written files, and checkpoints beyond the two kept beside the best."""
    kept = [folder.name for folder in run_folder.newest_first(run)]
    hidden = [path.name for place in (run, run / "checkpoints") for path in place.glob(".*")]
    return hidden + ([f"checkpoints {' '.join(kept)}"] if len(kept) > MOST_CHECKPOINTS else [])
