"""The findings of the chaos test, the ground that it runs on, and the final bytes of a run."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from reslt.runs import folder as run_folder

CLOCK = {"images_per_second", "waiting"}  # columns of summary.csv that differ from run to run
MOST_CHECKPOINTS = 3  # in a finished run: two, and the best
FLAGS = [
    "--model", "cifar_resnet20", "--model-kwargs", "channels=8,16,32", "--img-size", "16", "--epochs", "3",
    "--batch-size", "16", "--warmup-epochs", "1", "--workers", "1", "--model-ema", "--model-ema-decay", "0.9",
    "--mixup", "0.2", "--drop", "0.1", "--eval-every", "1", "--checkpoint-minutes", "0.002", "--checkpoint-hist", "2",
    "--checkpoint-seconds", "0",
    "--data-on-device", "off", "--experiment", "run", "--resume", "auto",
]  # fmt: skip


@dataclass
class Findings:
    """Results of trials: counts by name, and descriptions of faults."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __iadd__(self, other: Findings) -> Findings:
        self.counts.update(other.counts)
        self.faults += other.faults
        return self


@dataclass(frozen=True)
class Ground:
    """The folder and the flags of all trials, and an undisturbed run for reference."""

    work: Path
    flags: tuple[str, ...]
    reference: Path  # the folder of the undisturbed run
    startup: float = 0.0  # seconds of a process as users start it, until it enters the run's folder
    training: float = 0.0  # seconds from there to the end


# The end of a run


def final_bytes(run: Path) -> dict[str, bytes]:
    """Return everything that must be equal however often a run was disturbed. Raise OSError if the run is not finished."""
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
    """Return the names of the differences between two finished runs, or the error that reading an unfinished run raises."""
    expected = final_bytes(reference)
    try:
        found = final_bytes(run)
    except (OSError, ValueError, KeyError) as fault:
        return [f"unfinished: {fault}"]
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def leftovers(run: Path) -> list[str]:
    """Return the names of half-written files, and of checkpoints if there are more than the two kept and the best."""
    kept = [folder.name for folder in run_folder.newest_first(run)]
    hidden = [path.name for place in (run, run / "checkpoints") for path in place.glob(".*")]
    return hidden + ([f"checkpoints {' '.join(kept)}"] if len(kept) > MOST_CHECKPOINTS else [])
