"""Accuracies -> tables, result.json, per_class.csv, summary.csv. `python -m reslt.report RUN RUN ...` compares runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from reslt.config import Config
from reslt.datasets import Dataset
from reslt.errors import Parser, UserError, entry_point
from reslt.files import write_whole
from reslt.groups import SHOTS, branch_sets
from reslt.metrics import ClassAccuracies, EpochStats
from reslt.models.cost import Cost

COLUMNS = [*SHOTS, "all"]
SHOWN_CLASSES, SHOWN_POOREST = 20, 10


@dataclass(frozen=True)
class Evaluation:
    """One evaluated list: accuracies, what was evaluated, and how."""

    accuracies: ClassAccuracies
    dataset: Dataset
    split: str
    config: Config
    settings: dict = field(default_factory=dict)  # epoch, tau, eval_branch_at: goes to result.json

    @property
    def row_names(self) -> list[str]:
        """Of the tables: the fused prediction, the branches with the sizes of their class sets, the experts."""
        c, rows = self.config, len(self.accuracies.hits)
        names = [f"{c.method} (fused)" if rows > 1 else c.method]
        if c.has_branches and c.branches > 1:
            sets = branch_sets(self.dataset.images_per_class, c.branches, c.branch_sizes)
            names += [f"branch {k} ({n} class{'es' * (n != 1)})" for k, n in enumerate(sets.sum(1).tolist(), 1)]
        return names + [f"expert {e}" for e in range(1, rows - len(names) + 1)]

    def tables(self) -> dict[str, pd.DataFrame]:
        """{shot split: rows fused, branch 1..K, expert 1..E; columns many, medium, few, all}, in percent."""
        tables = {}
        for name, groups in self.dataset.shot_groups.items():
            columns = {**self.accuracies.shots(groups), "all": self.accuracies.all}
            tables[name] = pd.DataFrame(columns, index=self.row_names)
        return tables

    def fused(self) -> dict[str, float]:
        """The fused row of every split as flat columns of summary.csv: test_many, test_paper_many, ..."""
        row = {}
        for name, table in self.tables().items():
            prefix = self.split if name == "standard" else f"{self.split}_{name}"
            row |= {f"{prefix}_{column}": float(table.iloc[0][column]) for column in SHOTS}
        return row | {f"{self.split}_all": float(self.accuracies.all[0])}

    def title(self) -> str:
        """Dataset, list and settings, in one line."""
        said = [f"{self.dataset.name}, {self.split} list ({int(self.accuracies.images.sum()):,} images)"]
        said += [f"{name} {value}" for name, value in self.settings.items() if value is not None]
        return ", ".join(said)

    def text(self) -> str:
        """The tables as printed, with a reason for each empty group."""
        parts = [self.title()]
        for name, table in self.tables().items():
            if name != "standard":
                parts.append(f"shot split of the {name}")
            parts.append(render(table))
        return "\n".join(parts + self._empty_groups())

    def classes_text(self) -> str:
        """Accuracy per class by name, from many to few training images; of more than SHOWN_CLASSES, the poorest."""
        frame = per_class(self).rename(columns={"accuracy": "accuracy %"})
        columns = ["name"] * ("name" in frame) + ["training_images", f"{self.split}_images", "accuracy %"]
        title = "accuracy per class"
        if len(frame) > SHOWN_CLASSES:
            frame = frame.sort_values("accuracy %", kind="stable").head(SHOWN_POOREST)
            title = f"the {SHOWN_POOREST} poorest classes"
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
                    notes.append(f"{shot}: n/a, the {self.split} list holds no image of these classes")
        return notes


def render(table: pd.DataFrame) -> str:
    """Percent with one decimal; n/a for NaN."""
    return table.to_string(float_format=lambda x: f"{x:.1f}", na_rep="n/a")


def write_results(folder: Path, evaluation: Evaluation, extra: dict | None = None) -> None:
    """Write result.json (fused and branches, every split) and per_class.csv into a folder, each whole or not at all."""
    a = evaluation.accuracies
    result = {
        "data": evaluation.dataset.name,
        "split": evaluation.split,
        "images": int(a.images.sum()),
        "model": evaluation.config.model,
        "method": evaluation.config.method,
        "seed": evaluation.config.seed,
        **evaluation.settings,
        "all": float(a.all[0]),
        "class_mean": float(a.class_mean[0]),
        "tables": {name: t.to_dict(orient="index") for name, t in evaluation.tables().items()},
        **(extra or {}),
    }
    write_whole(folder / "result.json", json.dumps(_nan_to_none(result), indent=1, ensure_ascii=False))
    write_whole(folder / "per_class.csv", per_class(evaluation).to_csv(index=False, float_format="%.2f"))


def per_class(evaluation: Evaluation) -> pd.DataFrame:
    """A row per class: name if known, training and test images, accuracy fused, per branch and per expert."""
    d, a = evaluation.dataset, evaluation.accuracies
    frame = pd.DataFrame({"class": np.arange(d.num_classes)})
    if d.class_names:
        frame["name"] = d.class_names
    frame["training_images"], frame[f"{evaluation.split}_images"] = d.images_per_class, a.images
    for place, (name, accuracy) in enumerate(zip(evaluation.row_names, a.per_class, strict=True)):
        frame["accuracy" if place == 0 else "accuracy_" + "_".join(name.split()[:2])] = accuracy
    return frame


class Summary:
    """summary.csv: a row per epoch (from 1), rewritten whole each time."""

    def __init__(self, run: Path, epochs_done: int = 0):
        """Keeps the rows of the first `epochs_done` epochs of a resumed run."""
        self.file, self.rows = run / "summary.csv", []
        if epochs_done and self.file.is_file():
            kept = pd.read_csv(self.file, dtype=str).map(float)  # exact, else a tie could look like a new best
            kept["epoch"] = kept["epoch"].astype(int)
            self.rows = kept[kept["epoch"] <= epochs_done].to_dict(orient="records")

    def add(self, epoch: int, lr: float, stats: EpochStats, results: dict[str, Evaluation]) -> str:
        """Append the row of an epoch (from 0), and return it as a line for the console."""
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": stats.loss, "train_accuracy": stats.accuracy}
        row |= {"images_per_second": stats.images_per_second, "waiting": stats.waiting}
        line = f"epoch {epoch + 1}  lr {lr:.4g}  loss {stats.loss:.4f}  "
        line += "" if math.isnan(stats.accuracy) else f"train {stats.accuracy:.1f}  "
        line += f"{stats.images_per_second:.0f} img/s  waiting for data {stats.waiting:.0%}"
        for split, evaluation in results.items():
            row |= evaluation.fused()
            cells = (f"{c} {_percent(row[f'{split}_{c}'])}" for c in COLUMNS)
            line += f"  | {split}  " + "  ".join(cells)
        self.rows.append(row)
        write_whole(self.file, pd.DataFrame(self.rows).to_csv(index=False))
        return line

    def best(self, column: str) -> dict | None:
        """The row with the highest value of a column, the earliest of equals; None where no row has one."""
        rows = [row for row in self.rows if not math.isnan(row.get(column, math.nan))]
        return max(rows, key=lambda row: row[column]) if rows else None

    def last_is_best(self, column: str) -> bool:
        """Whether the newest row has a value in this column that no earlier one reaches."""
        return self.best(column) is self.rows[-1]


def opening(
    run: Path,
    dataset: Dataset,
    config: Config,
    costs: tuple[Cost, Cost],
    img_size: int,
    device: torch.device,
    start: int,
) -> str:
    """What is about to be trained, for the console. `costs`: of the model, and of the plain one without branches."""
    counts, groups = dataset.images_per_class, dataset.shot_groups["standard"]
    limited = f" ({min(config.limit_train, counts.sum()):,} of them used)" if config.limit_train else ""
    experts = f", {config.experts} experts" if config.experts > 1 else ""
    shots = " / ".join(str(int(groups[shot].sum())) for shot in SHOTS)
    lines = [
        f"data    {dataset.name}: {counts.sum():,} training images{limited}, {dataset.num_classes} classes with "
        f"{counts.max():,}..{counts.min():,} each (imbalance factor {counts.min() / counts.max():.3g}); "
        f"many / medium / few: {shots} classes; images in {dataset.image_root.folder}",
        f"model   {config.model}{experts}, {img_size} x {img_size} px, on {device.type}, precision {config.mixed_precision}",
        f"        {costs[0]} an image" + (f" (without branches {costs[1]})" if costs[0] != costs[1] else ""),
        f"method  {config.method}",
    ]
    if config.has_branches:
        sets = branch_sets(counts, config.branches, config.branch_sizes).sum(1).tolist()
        lines[-1] += f", alpha {config.alpha:g}, {config.branch} branches on the {config.branch_at} over {sets} classes"
    if config.logit_adjust:
        lines[-1] += f", logits adjusted by {config.logit_adjust:g} log(frequency)"
    lines.append(f"run     {run}" + (f", going on behind epoch {start}" if start else ""))
    return "\n".join(lines)


def best_on_test(summary: Summary) -> dict | None:
    """The best of the evaluated epochs (from 1) by the test list, with its groups: what the paper's protocol reports."""
    row = summary.best("test_all")
    return row and {"epoch": int(row["epoch"])} | {c: row[f"test_{c}"] for c in COLUMNS}


def conclude(run: Path, outcomes: list[Evaluation], summary: Summary, paper: list[dict]) -> str:
    """Write the last outcome (the best on validation where there is one) as the run's result, and return all tables.

    Where only a test list exists, the paper's protocol, which selects on it, is told beside the last epoch."""
    names = ["the last epoch", "the best epoch on the validation list"]
    text = [f"{name}: {outcome.text()}" for name, outcome in zip(names, outcomes, strict=False)]
    row = best_on_test(summary) if "val" not in outcomes[0].dataset.lists else None
    if row:
        cells = "  ".join(f"{c} {_percent(row[c])}" for c in COLUMNS)
        text.append(f"the paper's protocol, best epoch on test (epoch {row['epoch']}):  {cells}")
    text.append(outcomes[-1].classes_text())
    for stated in paper:
        if cells := "  ".join(f"{c} {stated[c]}" for c in COLUMNS if c in stated):
            text.append(f"the paper, table {stated['table']}:  {cells}")
    write_results(run, outcomes[-1], {"last": outcomes[0].fused(), "best_on_test": row, "paper": paper})
    return "\n\n".join(text) + f"\n\nresult.json and per_class.csv are in {run}"


def comparison(runs: Iterable[Path]) -> str:
    """Runs' result.json -> one row per run, and mean and deviation over runs whose names differ in `seedN` alone."""
    rows, groups = [], {}
    for run in runs:
        result = read_result(run)
        fused = next(iter(result["tables"]["standard"].values()))
        best = best_on_test(Summary(run, epochs_done=result["epoch"])) or {"all": math.nan}
        how = [result["split"]] * (result["split"] != "test")
        how += [f"{name} {result[name]}" for name in ("tau", "eval_branch_at") if result.get(name) is not None]
        label = run.name + (f" ({', '.join(how)})" if how else "")
        row = {"run": label, **{c: _number(fused[c]) for c in COLUMNS}, "best on test": best["all"]}
        rows.append(row)
        groups.setdefault(re.sub(r"-?seed\d+\b", "", label), []).append(row)
    table = pd.DataFrame(rows).set_index("run").rename_axis(None)
    for name, members in groups.items():
        if len(members) > 1:
            numbers = pd.DataFrame(members).set_index("run")
            table.loc[f"{name}: mean of {len(members)}"] = numbers.mean()
            table.loc[f"{name}: deviation"] = numbers.std()
    return table.to_string(float_format=lambda x: f"{x:.2f}", na_rep="n/a")


def side_by_side(runs: Iterable[Path]) -> str:
    """The full table of each run, one beside the other."""
    blocks = []
    for run in runs:
        result = read_result(run)
        table = pd.DataFrame.from_dict(result["tables"]["standard"], orient="index").astype(float)
        blocks.append([run.name, *render(table).splitlines()])
    height, widths = max(map(len, blocks)), [max(map(len, block)) for block in blocks]
    padded = [block + [""] * (height - len(block)) for block in blocks]
    lines = zip(*padded, strict=True)
    return "\n".join(
        "   |   ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def read_result(run: Path) -> dict:
    """A run's result.json. Raises UserError where it is not there yet."""
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"tables", "split", "epoch"} <= set(result):
            raise ValueError("it holds no tables")
        return result
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise UserError(f"{run / 'result.json'}: {reason}; give the folder of a run that is finished") from None


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.1f}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _nan_to_none(value):
    if isinstance(value, dict):
        return {k: _nan_to_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@entry_point
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m reslt.report", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--side-by-side", action="store_true", help="print the runs' full tables beside each other")
    given = parser.parse_args(arguments)
    print((side_by_side if given.side_by_side else comparison)(given.runs))


if __name__ == "__main__":
    main()
