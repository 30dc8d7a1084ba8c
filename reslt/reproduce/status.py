"""The status of a run, its progress and its result, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reslt.config.stages import total_epochs
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.evaluation.tables import CLASS_MEAN
from reslt.reproduce.rows import COLUMNS, Run
from reslt.runs.report import read_result
from reslt.runs.resume import changed_settings
from reslt.runs.summary import Summary


@dataclass(frozen=True)
class Result:
    """Top-1 accuracies of a finished run in one shot split, in percent: {many, medium, few, all}, NaN for an empty group."""

    last: dict[str, float]  # the last epoch
    selected: dict[str, float] | None  # the best epoch on the validation list, if there is one
    protocol: dict[str, float] | None  # the best epoch on the test list, if there is no validation list
    # Fused, branches and experts, at the epoch that counts, in the standard split
    predictions: dict[str, dict[str, float]]
    versions: dict[str, str]
    score: float = math.nan  # at the last epoch: the class mean if the list is unbalanced, else `all`

    @property
    def compared(self) -> dict[str, float]:
        """The result to compare: by the paper's protocol, else of the epoch that validation chose, else of the last."""
        return self.protocol or self.selected or self.last


@dataclass(frozen=True)
class RunStatus:
    """The status of a run: done if it has a result, failed or impossible if it has a fault."""

    epochs_done: int = 0
    result: Result | None = None  # in the paper's shot split if the dataset has one
    standard: Result | None = None  # the same in the standard split
    fault: str | None = None


def read_status(run: Run) -> RunStatus:
    """Read the status of a run from disk. It has a fault if its folder contains a run of another configuration."""
    if run.fault:
        return RunStatus(fault=run.fault)
    folder = run.config.run_folder
    is_begun = (folder / "result.json").exists() or any((folder / "checkpoints").glob("[0-9]*-*"))
    if not (folder / "config.yaml").exists() or not is_begun:
        return RunStatus()
    try:
        described = read_yaml(folder / "config.yaml")
        changed = changed_settings(described["config"], run.config.stored())
    except (UserError, KeyError, TypeError) as fault:
        return RunStatus(fault=f"{folder / 'config.yaml'} is not readable ({fault}); choose another --output")
    if changed:
        reason = f"{folder} contains a run with another configuration ({'; '.join(changed)}); choose another --output"
        return RunStatus(fault=reason)
    try:
        epochs, versions = total_epochs(run.config), described.get("versions", {})
        results = (_read_result(folder, epochs, versions, split) for split in ("paper", "standard"))
        return RunStatus(_epochs_done(folder), *results)
    except (UserError, OSError, KeyError, TypeError, ValueError, StopIteration) as fault:
        reason = f"{folder} is damaged ({type(fault).__name__}: {fault}); remove it, or choose another --output"
        return RunStatus(fault=reason)


def _epochs_done(folder: Path) -> int:
    last = folder / "checkpoints" / "last"
    return int(last.read_text().partition("-")[0]) if last.is_file() else 0


def _read_result(folder: Path, epochs: int, versions: dict[str, str], shot_split: str) -> Result | None:
    """Return the result with the groups of a shot split, or of the standard one if the dataset lacks it. None if the run is
    not finished, or if evaluate.py has overwritten its final result."""
    try:
        result = read_result(folder)
    except UserError:
        return None
    if "last" not in result:
        return None
    split, tables = result["split"], result["tables"]
    selected = next(iter(tables.get(shot_split, tables["standard"]).values()))
    on_test = Summary(folder, epochs).best("test_all") if result["best_on_test"] else None
    if result["best_on_test"] and not on_test:
        raise ValueError("summary.csv contains no accuracy on the test list")
    return Result(
        last=_accuracies(result["last"], f"{split}_", shot_split),
        selected=_accuracies(selected) if (folder / "checkpoints" / "best").is_file() else None,
        protocol=on_test and _accuracies(on_test, "test_", shot_split),
        predictions={name: _accuracies(row) for name, row in tables["standard"].items()},
        versions=versions,
        score=result["last"].get(f"{split}_{CLASS_MEAN}", result["last"][f"{split}_all"]),
    )


def _accuracies(row: Mapping, prefix: str = "", shot_split: str = "standard") -> dict[str, float]:
    """Return the columns <prefix>many, ..., or, in the paper's split, <prefix>paper_many, ... if they exist. None becomes
    NaN."""
    found = {c: row.get(f"{prefix}{c}") for c in COLUMNS}
    if shot_split == "paper":
        found = {c: row.get(f"{prefix}paper_{c}", value) for c, value in found.items()}
    return {column: math.nan if value is None else float(value) for column, value in found.items()}
