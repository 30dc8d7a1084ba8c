"""Comparison of finished runs, and of evaluations of them: a row each, or their tables side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from reslt.config.schema import DEFAULTS, PREDICTION
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.core.text import one_line
from reslt.data.classes import BY_INDEX
from reslt.evaluation.tables import CLASS_MEAN, COLUMNS, STATED, render
from reslt.runs.resume import changed_settings
from reslt.runs.summary import Summary, best_on_test

SETTINGS = (*PREDICTION, "eval_branch_at", "use_experts", *STATED)
# Keys of result.json in which results that are averaged over seeds must agree, with their names in messages. Results of
# earlier versions lack some of them.
SHARED = {
    "data": "data",
    "split": "list",
    "images": "number of images",
    "list_digest": "content of the list",
    "train_digest": "content of the training list",
    "classes": "classes",
    "model": "model",
    "method": "method",
}


@dataclass(frozen=True)
class Reported:
    """A result to report: the one in a run's folder, or a result file of `evaluate.py`."""

    place: Path
    result: dict

    @classmethod
    def read(cls, place: Path) -> Reported:
        """Read a run's result.json, or a file. Raises UserError if it does not exist yet, or contains no result."""
        result = read_result(place)
        tables = result["tables"].get("standard") if isinstance(result["tables"], dict) else None
        rows = list(tables.values()) if isinstance(tables, dict) else []
        if not rows or not all(isinstance(row, dict) and _are_accuracies(row) for row in rows):
            raise UserError(f"{place}: its tables are damaged; evaluate the run again with evaluate.py")
        if not isinstance(result["split"], str) or not isinstance(result["epoch"], (int, type(None))):
            raise UserError(f"{place}: its list or epoch is damaged; evaluate the run again with evaluate.py")
        return cls(place, result)

    @property
    def run(self) -> Path:
        """The folder of the run, or of the file."""
        return self.place.parent if self.place.is_file() else self.place

    @cached_property
    def folder(self) -> Path:
        """The folder of the run by its real path, which identifies it."""
        return self.run.resolve()

    @property
    def name(self) -> str:
        """The name of the run, and the settings in which the evaluation differs from that of training."""
        how = [f"{name} {self.result[name]}" for name in SETTINGS if self.result.get(name) is not None]
        how += ["classes by index"] * (self.result.get("classes") == BY_INDEX and self.is_file_of_its_own)
        return one_line(self.run.absolute().name + (f" ({', '.join(how)})" if how else ""))

    @property
    def is_file_of_its_own(self) -> bool:
        """Whether it is a file other than the run's own result."""
        return self.place.is_file() and self.place.name != "result.json"

    @property
    def data(self) -> str:
        """The dataset's name."""
        return str(self.result.get("data", "n/a"))

    def row(self) -> dict:
        """Return a row of the report: data, list, and accuracies in percent."""
        fused = next(iter(self.result["tables"]["standard"].values()))
        summary = None if self.is_file_of_its_own else Summary(self.run, epochs_done=self.result["epoch"])
        best = summary and best_on_test(summary)
        numbers = {c: _number(fused[c]) for c in COLUMNS} | {"class mean": _number(self.result.get(CLASS_MEAN))}
        numbers |= {"best on test": best["all"] if best else math.nan}
        return {"data": self.data, "list": self.result["split"], **numbers}

    def differences(self, other: Reported) -> list[str]:
        """Return the reasons why its accuracies and those of `other` must not be averaged: ['list (val, test)', ...]."""
        ours, theirs = self.result, other.result
        pairs = {name: (ours[key], theirs[key]) for key, name in SHARED.items() if key in ours and key in theirs}
        chosen = [result.get("chosen_on") for result in (ours, theirs)]
        # A setting that both sweeps chose on the same list may have another value per seed.
        alike = set(chosen[0]) if chosen[0] == chosen[1] and isinstance(chosen[0], dict) else set()
        pairs |= {name: (ours.get(name), theirs.get(name)) for name in SETTINGS if name not in alike}
        if not (self.is_of_a_whole_run and other.is_of_a_whole_run):  # validation may choose another epoch per seed
            pairs |= {name: (ours.get(name), theirs.get(name)) for name in ("epoch", "steps_of_the_next")}
        settings = self._settings(), other._settings()
        if None not in settings and all(own.get("val_from_train") for own in settings):
            pairs.pop(SHARED["train_digest"], None)  # each seed sets other images aside
            if ours["split"] == "val":
                pairs.pop(SHARED["list_digest"], None)
        differences = [f"{name} ({_in_words(a)}, {_in_words(b)})" for name, (a, b) in pairs.items() if a != b]
        if None not in settings:
            changed = changed_settings(*settings)
            # The seed may differ, and `pairs` contains the others.
            compared = ("seed: ", *(f"{name}: " for name in (*pairs, "data")))
            differences += [change for change in changed if not change.startswith(compared)]
        return differences

    @property
    def is_of_a_whole_run(self) -> bool:
        """Whether training has ended, and the last epoch or the best on validation was evaluated."""
        return "last" in self.result or self.result.get("which") == "best"

    def _settings(self) -> dict | None:
        """Return the run's settings; None if its folder does not state them."""
        file = self.run / "config.yaml"
        settings = read_yaml(file).get("config") if file.is_file() else None
        if not isinstance(settings, dict):
            return None
        return {
            name: value for name, value in json.loads(json.dumps(settings, default=str)).items() if name in DEFAULTS
        }


def comparison(places: Iterable[Path]) -> str:
    """Return the results of runs as a table: a row per run, with the class mean if a list is unbalanced, and mean and
    standard deviation over comparable runs whose names differ only in `seedN`. A note names runs that differ only in
    `seedN`, but are not comparable."""
    reported = [Reported.read(place) for place in places]
    rows = pd.DataFrame([entry.row() for entry in reported], index=[entry.name for entry in reported])
    if not ((rows["class mean"] - rows["all"]).abs() > 1e-6).any():
        rows = rows.drop(columns="class mean")
    of_name: dict[str, list[int]] = {}
    for number, entry in enumerate(reported):
        of_name.setdefault(re.sub(r"-?seed\d+\b", "", entry.run.absolute().name), []).append(number)
    notes, means = [], []
    for name, members in of_name.items():
        groups = _comparable(reported, members)
        for group in groups:
            if len(group) > 1:
                means += _mean(rows.iloc[group], re.sub(r"-?seed\d+\b", "", reported[group[0]].name))
        notes += _not_averaged(name, [[reported[k] for k in group] for group in groups])
    table = pd.concat([rows, *means])
    return "\n".join([table.to_string(float_format=lambda x: f"{x:.2f}", na_rep="n/a"), *notes])


def _comparable(reported: list[Reported], members: list[int]) -> list[list[int]]:
    """Return the members (indices) in groups that may be averaged: comparable results of different runs."""

    def fits(entry: Reported, group: list[int]) -> bool:
        others = [reported[other] for other in group]
        return all(entry.folder != other.folder and not entry.differences(other) for other in others)

    groups: list[list[int]] = []
    for k in members:
        fitting = (group for group in groups if fits(reported[k], group))
        if group := next(fitting, None):
            group.append(k)
        else:
            groups.append([k])
    return groups


def _mean(rows: pd.DataFrame, name: str) -> list[pd.DataFrame]:
    """Return two rows, the mean and the standard deviation of comparable rows."""
    shared, numbers = rows.iloc[0][["data", "list"]].to_dict(), rows.drop(columns=["data", "list"])
    found = {f"{name}: mean of {len(rows)}": numbers.mean(), f"{name}: standard deviation": numbers.std()}
    return [pd.DataFrame([shared | row.to_dict()], index=[title]) for title, row in found.items()]


def _not_averaged(name: str, groups: list[list[Reported]]) -> list[str]:
    """Return a line of reasons if a run is not averaged with any other, although only the seeds of their names differ."""
    averaged = {entry.folder for group in groups if len(group) > 1 for entry in group}
    for entry in (entry for group in groups for entry in group if entry.folder not in averaged):
        others = [other for group in groups for other in group if other.folder != entry.folder]
        if differences := min((entry.differences(other) for other in others), key=len, default=[]):
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            return [f"{name}: not averaged, since the results differ in {', '.join(differences[:3])}{more}"]
    return []


def side_by_side(places: Iterable[Path]) -> str:
    """Return the full tables of runs, side by side; labels state data and list if these differ."""
    reported = [Reported.read(place) for place in places]
    differ = len({(entry.data, entry.result["split"]) for entry in reported}) > 1
    blocks = []
    for entry in reported:
        table = pd.DataFrame.from_dict(entry.result["tables"]["standard"], orient="index").astype(float)
        label = f"{entry.name}, {entry.data}, {entry.result['split']} list" if differ else entry.name
        blocks.append([label, *render(table).splitlines()])
    height, widths = max(map(len, blocks)), [max(map(len, block)) for block in blocks]
    padded = [block + [""] * (height - len(block)) for block in blocks]
    lines = zip(*padded, strict=True)
    return "\n".join(
        "   |   ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def read_result(place: Path) -> dict:
    """Read the result.json of a run's folder, or another file of `evaluate.py`. Raises UserError if there is none."""
    file = place if place.is_file() else place / "result.json"
    try:
        result = json.loads(regular_file(file).read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"tables", "split", "epoch"} <= set(result):
            raise KeyError
        return result
    except (OSError, ValueError, KeyError, RecursionError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it contains no tables of an evaluation"
        raise UserError(f"{file}: {reason}; give the folder of a run that is finished, or a result file") from None


def _are_accuracies(row: dict) -> bool:
    """Return whether a row of a table has a number or None in every column; the class mean may be missing."""
    cells = [row.get(column, "") for column in COLUMNS] + [row.get(CLASS_MEAN)]
    return all(isinstance(cell, (int, float, type(None))) for cell in cells)


def _in_words(value: object) -> str:
    """Return a value of a result for a message; "none" if it is not set."""
    return "none" if value is None else one_line(value)[:40]


def _number(value: float | None) -> float:
    return value if isinstance(value, (int, float)) else math.nan
