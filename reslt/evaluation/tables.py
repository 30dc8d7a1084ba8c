"""An evaluated list as tables, result.json and per_class.csv."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reslt.config.schema import PREDICTION, MethodSettings
from reslt.core.files import write_atomically
from reslt.core.text import counted, csv_cell
from reslt.data.classes import BY_INDEX, BY_NAME
from reslt.data.datasets import Dataset
from reslt.data.groups import SHOTS, branch_sets

if TYPE_CHECKING:  # reports import no torch, and a run imports pandas after its first epoch
    import pandas as pd

    from reslt.evaluation.metrics import ClassAccuracies

COLUMNS = [*SHOTS, "all"]
CLASS_MEAN = "class_mean"  # a column only if the list is unbalanced, so that it differs from `all`
STATED = ("bad_images", "mixed_precision", "data_dir", "weights")  # in result.json if they are not as in training
SHOWN_CLASSES, SHOWN_POOREST = 20, 10


@dataclass(frozen=True)
class Evaluation:
    """One evaluated list: its accuracies, the list, and the settings of the evaluation."""

    accuracies: ClassAccuracies
    dataset: Dataset
    split: str
    method: MethodSettings
    settings: dict = field(default_factory=dict)  # epoch, tau, use_experts, ...: printed and in result.json
    run: dict = field(default_factory=dict)  # model, seed, digest of the training list: in result.json
    calibrated_on: str | None = None  # the list that the temperature of `accuracies` was fitted on
    calibration_images: int | None = None  # of that list
    outputs: dict = field(default_factory=dict)  # of `Outputs.gathered`, if they were collected

    @classmethod
    def of(
        cls,
        accuracies: ClassAccuracies,
        dataset: Dataset,
        split: str,
        method: MethodSettings,
        epochs_done: int | None,
        run: dict,
        *,
        calibrated_on: str | None = None,
        calibration_images: int | None = None,
        outputs: dict | None = None,
        **settings,
    ) -> Evaluation:
        """Return the evaluation of a method after `epochs_done` epochs. `settings`: further settings of the evaluation."""
        stated = {"epoch": epochs_done} | {name: getattr(method, name) for name in PREDICTION}
        if method.has_branches:
            stated["eval_branch_at"] = method.eval_branch_at
        if accuracies.experts_used is not None:
            stated[f"{_outputs_of(method)}s_used"] = round(accuracies.experts_used, 2)
        fitted = (calibrated_on, calibration_images)
        return cls(accuracies, dataset, split, method, stated | settings, run, *fitted, outputs or {})

    @property
    def row_names(self) -> list[str]:
        """Row names of the tables: the fused prediction; with a router, that of all experts; branches with the sizes of their
        class sets; experts."""
        method, rows = self.method, len(self.accuracies.hits)
        names = [f"{method.method} (fused)" if rows > 1 else method.method]
        if self.accuracies.experts_used is not None:
            names.append(f"all {_outputs_of(method)}s")
        if method.has_branches and method.branches > 1:
            sets = branch_sets(self.dataset.images_per_class, method.branches, method.branch_sizes, method.branch_sets)
            names += [f"branch {k} ({n} class{'es' * (n != 1)})" for k, n in enumerate(sets.sum(1).tolist(), 1)]
        return names + [f"{_outputs_of(method)} {e}" for e in range(1, rows - len(names) + 1)]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return {shot split: table in percent}, with rows `row_names` and columns many, medium, few, all, and class_mean if
        the list is unbalanced."""
        import pandas as pd

        a, tables = self.accuracies, {}
        means = {"all": a.all} | ({} if a.is_balanced else {CLASS_MEAN: a.class_mean})
        for name, groups in self.dataset.shot_groups.items():
            tables[name] = pd.DataFrame({**a.shots(groups), **means}, index=self.row_names)
        return tables

    @property
    def classes(self) -> str:
        """How the classes of labels and outputs are matched: by their names, or only by their index."""
        d = self.dataset
        return d.match.how if d.match else BY_INDEX if d.classes.names is None else BY_NAME

    def fused(self) -> dict[str, float]:
        """Return the fused row of every shot split as columns of summary.csv: test_many, test_paper_many, ..."""
        row, a = {}, self.accuracies
        for name, groups in self.dataset.shot_groups.items():
            prefix = self.split if name == "standard" else f"{self.split}_{name}"
            row |= {f"{prefix}_{shot}": float(rows[0]) for shot, rows in a.shots(groups).items()}
        row |= {f"{self.split}_all": float(a.all[0])}
        return row | ({} if a.is_balanced else {f"{self.split}_{CLASS_MEAN}": float(a.class_mean[0])})

    def title(self) -> str:
        """Return dataset, list, settings, and the matching of classes, in one line."""
        note = self.dataset.match.note if self.dataset.match else ""
        parts = [f"{self.dataset.name}, {self.split} list ({int(self.accuracies.images.sum()):,} images)"]
        chosen = self.settings.get("chosen_on", {})
        for name, value in self.settings.items():
            if value is not None and name != "chosen_on":
                note_of = {"tta": " (mean of logits)"} | dict.fromkeys(
                    ("experts_used", "exits_used"), " (mean over images)"
                )
                parts.append(f"{name} {value}{note_of.get(name, '')}")
            if name in chosen:
                parts.append(f"chosen on {chosen[name]}")
        return ", ".join(parts + [note] * bool(note))

    @property
    def list_digest(self) -> str:
        """The beginning of the digest of the evaluated list."""
        return self.dataset.digests[self.split][:12]

    def text(self) -> str:
        """Return the tables as text, with a reason for each empty group."""
        parts = [self.title()]
        for name, table in self.tables().items():
            if name != "standard":
                parts.append(f"shot split of the {name}")
            parts.append(render(table))
        return "\n".join([*parts, *self._calibration(), *self._empty_groups()])

    def calibration(self) -> dict[str, float | str | None]:
        """Return the entries of result.json on calibration: the expected calibration error of the fused prediction, in
        percent, without and with the temperature (None: not calibrated), the temperature, and the list on which it was
        fitted, with its number of images. {} if the error was not recorded."""
        if not (errors := [100 * error for error in self.accuracies.calibration_errors]):
            return {}
        calibrated = {
            "ece_calibrated": errors[-1] if len(errors) > 1 else None,
            "temperature": self.accuracies.temperature,
            "calibrated_on": self.calibrated_on,
            "calibration_images": self.calibration_images,
        }
        return {"ece": errors[0]} | calibrated

    def _calibration(self) -> list[str]:
        found = self.calibration()
        if not found:
            return []
        text = f"ECE {percent(found['ece'])} %"
        if found["temperature"] is None:
            return [text]
        images = "" if self.calibration_images is None else f", {counted(self.calibration_images, 'image')}"
        text += f"; {percent(found['ece_calibrated'])} % at temperature {found['temperature']:.3g}"
        text += f" (fitted on {self.calibrated_on}{images})"
        rises = round(found["ece_calibrated"], 1) > round(found["ece"], 1)
        reason = (
            "The ECE rises: the temperature minimizes the cross-entropy with equal weight for each class, not the ECE."
        )
        return [text] + [reason] * rises

    def classes_text(self) -> str:
        """Return the accuracies per class as text, from many to few training images; of many classes, only the lowest."""
        frame = per_class(self).rename(columns={"accuracy": "accuracy %"})
        columns = ["name"] * ("name" in frame) + ["training_images", f"{self.split}_images", "accuracy %"]
        title = "accuracy per class"
        if len(frame) > SHOWN_CLASSES:
            frame = frame.sort_values("accuracy %", kind="stable").head(SHOWN_POOREST)
            title = f"the {SHOWN_POOREST} classes with the lowest accuracy"
        frame = frame.sort_values("training_images", ascending=False, kind="stable").set_index("class")[columns]
        return f"{title}\n{render(frame)}"

    def _empty_groups(self) -> list[str]:
        notes = []
        for name, groups in self.dataset.shot_groups.items():
            for shot in SHOTS:
                if not groups[shot].any():
                    rule = ", ".join(f"{key} {value}" for key, value in self.dataset.splits[name].items())
                    notes.append(f"{shot}: n/a, the {name} split ({rule}) leaves this group without a class")
                elif not self.accuracies.images[groups[shot]].any():
                    notes.append(f"{shot}: n/a, the {self.split} list contains no image of these classes")
        return notes


def _outputs_of(method: MethodSettings) -> str:
    """Return the name in tables of the outputs of a network after its branches: exit or expert."""
    return "exit" if method.network == "exits" else "expert"


def render(table: pd.DataFrame) -> str:
    """Return a table of percentages as text, with one decimal; n/a for NaN."""
    return table.rename(columns={CLASS_MEAN: "class mean"}).to_string(float_format=lambda x: f"{x:.1f}", na_rep="n/a")


def write_results(folder: Path, evaluation: Evaluation, extra: dict | None = None, suffix: str = "") -> str:
    """Write result<suffix>.json (fused and branches, every split) and per_class<suffix>.csv into a folder, each
    atomically. Return a line that names them."""
    names = f"result{suffix}.json", f"per_class{suffix}.csv"
    result, classes = result_of(evaluation, extra), per_class(evaluation)
    if "name" in classes:
        classes["name"] = classes["name"].map(csv_cell)
    write_atomically(folder / names[0], json.dumps(result, indent=1, ensure_ascii=False))
    write_atomically(folder / names[1], classes.to_csv(index=False, float_format="%.2f"))
    return f"{names[0]} and {names[1]} are in {folder}"


def result_of(evaluation: Evaluation, extra: dict | None = None) -> dict:
    """Return the content of result.json, with None for NaN. `extra`: further keys."""
    a = evaluation.accuracies
    result = {
        "data": evaluation.dataset.name,
        "split": evaluation.split,
        "images": int(a.images.sum()),
        "list_digest": evaluation.list_digest,
        "classes": evaluation.classes,
        "method": evaluation.method.method,
        **evaluation.run,
        **evaluation.settings,
        "all": float(a.all[0]),
        "class_mean": float(a.class_mean[0]),
        "tables": {name: t.to_dict(orient="index") for name, t in evaluation.tables().items()},
        **evaluation.calibration(),
        **(extra or {}),
    }
    return _nan_to_none(result)


def per_class(evaluation: Evaluation) -> pd.DataFrame:
    """Return a row per class: name if known, training and evaluated images, accuracies (fused, branches, experts)."""
    import pandas as pd

    d, a = evaluation.dataset, evaluation.accuracies
    frame = pd.DataFrame({"class": np.arange(d.num_classes)})
    if d.class_names:
        frame["name"] = d.class_names
    frame["training_images"], frame[f"{evaluation.split}_images"] = d.images_per_class, a.images
    for place, (name, accuracy) in enumerate(zip(evaluation.row_names, a.per_class, strict=True)):
        frame["accuracy" if place == 0 else "accuracy_" + "_".join(name.split()[:2])] = accuracy
    return frame


def in_one_line(row: Mapping[str, float], prefix: str = "") -> str:
    """{'test_many': 50.0, ...} and the prefix 'test_' -> 'many 50.0  medium ...  few ...  all ...', with the class mean if
    the row has one."""
    columns = [*COLUMNS, *([CLASS_MEAN] if prefix + CLASS_MEAN in row else [])]
    return "  ".join(f"{column.replace('_', ' ')} {percent(row[prefix + column])}" for column in columns)


def percent(value: float) -> str:
    """Return a number with one decimal; n/a for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.1f}"


def _nan_to_none(value):
    if isinstance(value, dict):
        return {k: _nan_to_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
