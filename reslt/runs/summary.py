"""summary.csv, a row per epoch: writing, reading, and the choice of the best epoch."""

from __future__ import annotations

import errno
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from reslt.core.errors import UserError
from reslt.core.files import write_atomically
from reslt.core.log import logger, warn_once
from reslt.data.groups import SHOTS
from reslt.evaluation.tables import CLASS_MEAN, COLUMNS, Evaluation, in_one_line

if TYPE_CHECKING:
    from reslt.training.state import EpochStats

KNOWN_COLUMNS = (
    r"epoch|lr|train_loss|train_accuracy|images_per_second|waiting|(val|test)_(paper_)?(many|medium|few|all)|"
    rf"(val|test)_{CLASS_MEAN}"
)


class Summary:
    """summary.csv: a row per epoch (from 1), appended when the epoch ends. The whole file is rewritten if there are new
    columns, or if something else has changed the file."""

    def __init__(self, run: Path, epochs_done: int = 0, is_written: bool = True, is_last_repeated: bool = False):
        """Keep the rows of the first `epochs_done` epochs of a resumed run. `is_written`: true on one process only.

        An incomplete last line is dropped if its row is not needed, because its epoch is a later one, or the last one and
        evaluated again (`is_last_repeated`). Raises UserError for a file that is damaged elsewhere."""
        self.file, self.rows, self.is_written = run / "summary.csv", [], is_written
        self._columns, self._size = [], None  # of the file, as this object wrote it
        if epochs_done and self.file.is_file():
            rows = _read(self.file, epochs_done - is_last_repeated)
            self.rows = [row for row in rows if row["epoch"] <= epochs_done]

    def add(self, epoch: int, lr: float, stats: EpochStats, results: dict[str, Evaluation]) -> str:
        """Append the row of an epoch (from 0), and return it as a line for the console."""
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": stats.loss, "train_accuracy": stats.accuracy}
        row |= {"images_per_second": stats.images_per_second, "waiting": stats.waiting}
        line = f"epoch {epoch + 1}  lr {lr:.4g}  loss {stats.loss:.4f}  "
        line += "" if math.isnan(stats.accuracy) else f"train {stats.accuracy:.1f}  "
        line += f"{stats.images_per_second:.0f} img/s  waiting for data {stats.waiting:.0%}"
        for split, evaluation in results.items():
            row |= evaluation.fused()
            line += f"  | {split}  {in_one_line(row, f'{split}_')}"
        if self.rows:  # empty rows for missing epochs, so that the file has no gaps
            self.rows += [{"epoch": missing} for missing in range(self.rows[-1]["epoch"] + 1, epoch + 1)]
        self.rows.append(row)
        if self.is_written:
            try:
                self._write()
            except OSError as fault:  # all rows are written again after the next epoch
                self._size = None
                warn_once("summary.csv", f"{self.file}: it cannot be written: {fault.strerror}")
        return line

    def _write(self) -> None:
        """Append the newest row, or rewrite the whole file if necessary. A checkpoint flushes the file to disk."""
        is_known = self._size is not None and set(self.rows[-1]) <= set(self._columns)
        if is_known and self.file.is_file() and self.file.stat().st_size == self._size:
            line = self._line(self.rows[-1]).encode()
            with open(self.file, "ab", buffering=0) as file:
                if file.write(line) < len(line):
                    file.truncate(self._size)  # a later checkpoint may need the row, and half a row is damage
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(line)
            return
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = ",".join(self._columns) + "\n" + "".join(map(self._line, self.rows))
        write_atomically(self.file, text)
        self._size = len(text.encode())

    def _line(self, row: dict) -> str:
        values = [row.get(name, math.nan) for name in self._columns]
        return ",".join("" if math.isnan(value) else str(value) for value in values) + "\n"

    def has(self, epoch: int) -> bool:
        """Return whether there is a row for an epoch (from 1)."""
        return any(row["epoch"] == epoch for row in self.rows)

    def column(self, name: str) -> dict[int, float]:
        """Return {epoch (from 1): value} of the rows that have a value."""
        return {row["epoch"]: row[name] for row in self.rows if not math.isnan(row.get(name, math.nan))}

    def scores(self, split: str) -> dict[int, float]:
        """Return {epoch (from 1): score} of a list; the highest score chooses the best epoch. The score is the class mean if
        the list is unbalanced (and the run recorded it, unlike earlier versions), else top-1."""
        accuracies, means = self.column(f"{split}_all"), self.column(f"{split}_class_mean")
        return means if means.keys() == accuracies.keys() else accuracies

    def latest(self, split: str) -> dict[str, float] | None:
        """Return {many, medium, few: accuracy} of the last epoch that evaluated a list; None if none did."""
        rows = [row for row in self.rows if not math.isnan(row.get(f"{split}_all", math.nan))]
        return {shot: rows[-1][f"{split}_{shot}"] for shot in SHOTS} if rows else None

    def best(self, column: str) -> dict | None:
        """Return the row with the highest value of a column, the earliest if values are equal; None if no row has a value."""
        rows = [row for row in self.rows if not math.isnan(row.get(column, math.nan))]
        return max(rows, key=lambda row: row[column]) if rows else None


def read_rows(run: Path) -> list[dict]:
    """Return the rows of a run's summary.csv, including those after its last checkpoint; [] if there is no such file. Raises
    UserError if it is damaged."""
    file = run / "summary.csv"
    return _read(file, 0) if file.is_file() else []


def _read(file: Path, needed: int) -> list[dict]:
    """Return the rows of a summary.csv; `needed`: the number of epochs that must have complete rows."""
    remedy = "restore the file from a copy, or remove it, which loses the results of earlier epochs"
    try:
        lines = file.read_bytes().decode().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "not a text file"
        raise UserError(f"{file}: {reason}; {remedy}") from None
    if not "".join(lines).strip():
        raise UserError(f"{file}: the file is empty; {remedy}")
    columns = lines[0].rstrip("\r\n").split(",")
    if unknown := [name for name in columns if not re.fullmatch(KNOWN_COLUMNS, name)]:
        raise UserError(f"{file}:1: {unknown[0][:40]!r} is not a column of a run's summary; {remedy}")
    if "epoch" not in columns or len(set(columns)) < len(columns):
        raise UserError(f"{file}:1: the column epoch is missing, or a column is a duplicate; {remedy}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        row = _row(columns, line)
        expected = rows[-1]["epoch"] + 1 if rows else None
        if row and expected in (None, row["epoch"]):
            rows.append(row)
        elif number < len(lines) or row or line.endswith("\n") or (expected or 1) <= needed:
            raise UserError(
                f"{file}:{number}: {line.rstrip()[:60]!r} is incomplete, or not the row of the next epoch with "
                f"{len(columns)} numbers; {remedy}"
            )
    if not rows and needed and len(lines) == 1:
        raise UserError(f"{file}: there is no row below the columns; {remedy}")
    if rows and rows[-1]["epoch"] < needed:  # rows could not be written, or were removed
        logger.warning(
            f"{file}: it ends at epoch {rows[-1]['epoch']}, though {needed} epochs are trained; the results of the others "
            "are missing, and the best epoch is chosen without them"
        )
    return rows


def _row(columns: list[str], line: str) -> dict | None:
    """Parse a line of the file; None if it is not a complete row of numbers. Numbers are exact, since rounding could turn a
    tie into a new best."""
    cells = line.rstrip("\r\n").split(",")
    try:
        values = [float(cell) if cell else math.nan for cell in cells]
        row = dict(zip(columns, values, strict=True))
        is_whole = line.endswith("\n") and row["epoch"] >= 1 and row["epoch"] % 1 == 0
        return row | {"epoch": int(row["epoch"])} if is_whole else None
    except ValueError:
        return None


def best_of(scores: dict[int, float]) -> int | None:
    """{epoch: score} -> the epoch with the highest score, the earliest if scores are equal; None if there is none."""
    return min(scores, key=lambda epoch: (-scores[epoch], epoch), default=None)


def best_on_test(summary: Summary) -> dict | None:
    """Return the best of the evaluated epochs (from 1) on the test list, as in the paper's protocol: epoch, many, medium, few
    and all; class_mean if the list is unbalanced; paper_many, ..., paper_all if the dataset has the paper's shot split."""
    row = summary.best("test_all")
    if row is None:
        return None
    best = {"epoch": int(row["epoch"])} | {c: row[f"test_{c}"] for c in COLUMNS}
    if not math.isnan(mean := row.get(f"test_{CLASS_MEAN}", math.nan)):
        best[CLASS_MEAN] = mean
    if any(f"test_paper_{shot}" in row for shot in SHOTS):
        best |= {f"paper_{shot}": row.get(f"test_paper_{shot}", math.nan) for shot in SHOTS}
        best["paper_all"] = best["all"]
    return best
