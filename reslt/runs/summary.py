"""summary.csv: a row per epoch."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from reslt.core.files import write_atomically
from reslt.evaluation.metrics import EpochStats
from reslt.evaluation.tables import COLUMNS, Evaluation, percent


class Summary:
    """summary.csv: a row per epoch (from 1), rewritten whole each time."""

    def __init__(self, run: Path, epochs_done: int = 0, is_written: bool = True):
        """Keep the rows of the first `epochs_done` epochs of a resumed run. Only one of several processes writes."""
        self.file, self.rows, self.is_written = run / "summary.csv", [], is_written
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
            cells = (f"{c} {percent(row[f'{split}_{c}'])}" for c in COLUMNS)
            line += f"  | {split}  " + "  ".join(cells)
        self.rows.append(row)
        if self.is_written:
            write_atomically(self.file, pd.DataFrame(self.rows).to_csv(index=False))
        return line

    def has(self, epoch: int) -> bool:
        """Return whether there is a row for an epoch (from 1)."""
        return any(row["epoch"] == epoch for row in self.rows)

    def column(self, name: str) -> dict[int, float]:
        """Return {epoch (from 1): value} of the rows that have a value."""
        return {row["epoch"]: row[name] for row in self.rows if not math.isnan(row.get(name, math.nan))}

    def best(self, column: str) -> dict | None:
        """Return the row with the highest value of a column, the earliest of equals; None if no row has one."""
        rows = [row for row in self.rows if not math.isnan(row.get(column, math.nan))]
        return max(rows, key=lambda row: row[column]) if rows else None


def best_on_test(summary: Summary) -> dict | None:
    """Return the best of the evaluated epochs (from 1) on the test list, with its groups: the paper's protocol."""
    row = summary.best("test_all")
    return row and {"epoch": int(row["epoch"])} | {c: row[f"test_{c}"] for c in COLUMNS}
