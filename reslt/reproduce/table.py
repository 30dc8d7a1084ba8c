"""Tables of results, ours and the paper's, as Markdown and CSV.

table.csv has a line per row. Its columns:

recipe, row, each varied setting, runs (one per seed), done;
paper_<group>, the paper's number in percent;
<epoch>_<group> and <epoch>_<group>_deviation, the mean and sample standard deviation over finished runs in percent;
difference_<group>, ours minus the paper's;
if measured, parameters, multiply_adds (per image) and milliseconds (per batch);
status.

<group> is many, medium, few or all. <epoch> is last, validation (the best on the validation list) or test (the best on the
test list, the paper's protocol). Unknown cells are empty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from reslt.core.text import csv_cell
from reslt.reproduce.paper import WHY_OURS
from reslt.reproduce.rows import COLUMNS, MARK, Row, Run, as_text
from reslt.reproduce.speed import BATCH, Cost
from reslt.reproduce.status import Result, RunStatus

EPOCHS = {"last": "last epoch", "validation": "best on validation", "test": "best on test"}
NOTE = """\
Top-1 accuracy in percent: mean ± sample standard deviation (number of seeds). "best on test" is the paper's protocol,
for datasets without a validation list. The difference is the rightmost of our numbers that all finished rows of the
dataset have, minus the paper's: a row that starts from the weights of another has only the last epoch."""


@dataclass(frozen=True)
class Spread:
    """The mean and the sample standard deviation (NaN for a single value) of some values."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of values; NaN without values, or if one of them is NaN (an empty group)."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)) if values else math.nan, deviation, len(values))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "n/a"
        deviation = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{deviation} ({self.count})"


@dataclass(frozen=True)
class TableRow:
    """A row of the paper with the status of its runs."""

    row: Row
    runs: list[tuple[Run, RunStatus]]
    cost: Cost | None = None  # of a prediction, if measured
    by_last: bool = False  # whether the last epoch is compared, since another row of the dataset has no other

    @property
    def results(self) -> list[Result]:
        """The results of finished runs, in the shot split of the paper's row."""
        found = [p.standard if self.row.shot_split == "standard" else p.result for _, p in self.runs]
        return [result for result in found if result]

    def spread(self, epoch: str, column: str) -> Spread | None:
        """Return the spread over finished runs at one of EPOCHS; None if no run distinguishes that epoch."""
        key = {"last": "last", "validation": "selected", "test": "protocol"}[epoch]
        found = [getattr(result, key) for result in self.results if getattr(result, key)]
        return Spread.of([accuracies[column] for accuracies in found]) if found else None

    def compared(self, column: str) -> Spread:
        """Return the spread that is compared with the paper."""
        return Spread.of([(result.last if self.by_last else result.compared)[column] for result in self.results])

    def difference(self, column: str) -> float:
        """Return ours minus the paper's, NaN if either is missing."""
        return self.compared(column).mean - self.row.stated.get(column, math.nan)

    @property
    def done(self) -> int:
        """Number of runs with a result."""
        return sum(p.result is not None for _, p in self.runs)

    @property
    def status(self) -> str:
        """The number of seeds that are done, and the reasons for failed ones, as text."""
        faults = [f"seed {run.seed} failed: {p.fault}" for run, p in self.runs if p.fault]
        return "; ".join([f"{self.done} of {len(self.runs)} seeds", *faults])


def to_markdown(title: str, header: list[str], lines: list[TableRow]) -> str:
    """Return the content of table.md: the header, our results and the paper's, those of shot groups and the cost of a
    prediction if known, and notes."""
    names = list(dict.fromkeys(name for line in lines for name in line.row.settings))
    epochs = [epoch for epoch in EPOCHS if epoch == "last" or any(line.spread(epoch, "all") for line in lines)]
    cells = [
        [
            *_names(line, names),
            _number(line.row.stated.get("all", math.nan)),
            *(str(line.spread(epoch, "all") or "") for epoch in epochs),
            _number(line.difference("all"), "+.2f"),
            line.status,
        ]
        for line in lines
    ]
    columns = ["recipe", "row", *names, "paper", *(EPOCHS[epoch] for epoch in epochs), "difference", "status"]
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in header), markdown(columns, cells)]
    parts += [f"{note_on_marks(lines)}{NOTE}"]
    if any(line.done or set(line.row.stated) - {"all"} for line in lines):
        groups = COLUMNS[:-1]
        cells = [[*_names(line, names), *(_beside_paper(line, group) for group in groups)] for line in lines]
        parts += ["By images per class, of the same runs and epochs as the difference:"]
        parts += [markdown(["recipe", "row", *names, *groups], cells)]
    if any(line.cost for line in lines):
        parts += [list_costs(lines)]
    return "\n\n".join(parts) + "\n"


def note_on_marks(lines: Sequence[TableRow]) -> str:
    """Return a line that explains the mark of rows; "" if none is marked."""
    return f"{MARK} {WHY_OURS}.\n" * any(line.row.is_ours for line in lines)


def list_costs(lines: list[TableRow]) -> str:
    """Return a table of the cost of a prediction with the network of each row."""
    names = list(dict.fromkeys(name for line in lines for name in line.row.settings))
    cells = []
    for line in lines:
        numbers = ["n/a"] * 3
        if (cost := line.cost) is not None:
            numbers = [
                f"{cost.parameters / 1e6:.2f} M",
                f"{cost.multiply_adds / 1e9:.3f} G",
                f"{cost.milliseconds:.1f}",
            ]
        cells.append([*_names(line, names), *numbers])
    columns = ["parameters", "multiply-adds per image", f"ms per batch of {BATCH}"]
    return f"The cost of a prediction:\n\n{markdown(['recipe', 'row', *names, *columns], cells)}"


def to_csv(lines: list[TableRow]) -> str:
    """Return the content of table.csv, as described at the top of this file."""
    rows = []
    for line in lines:
        row = {"recipe": line.row.recipe, "row": line.row.label}
        row |= {name: as_text(value) for name, value in line.row.settings.items()}
        row |= {"runs": len(line.runs), "done": line.done}
        row |= {f"paper_{column}": line.row.stated.get(column) for column in COLUMNS}
        for epoch in EPOCHS:
            for column in COLUMNS:
                spread = line.spread(epoch, column) or Spread.of([])
                row |= {f"{epoch}_{column}": spread.mean, f"{epoch}_{column}_deviation": spread.deviation}
        row |= {f"difference_{column}": line.difference(column) for column in COLUMNS}
        if any(other.cost for other in lines):
            row |= {field.name: getattr(line.cost, field.name, None) for field in fields(Cost)}
        rows.append(row | {"status": csv_cell(line.status)})
    return pd.DataFrame(rows).to_csv(index=False, float_format="%.4f")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table that is also legible as plain text."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = 3  # the last column may contain long reasons: it is not padded
    drawn = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([drawn[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *drawn[1:]])


def _names(line: TableRow, settings: list[str]) -> list[str]:
    values = line.row.settings
    return [line.row.recipe, line.row.marked, *(as_text(values[name]) if name in values else "" for name in settings)]


def _beside_paper(line: TableRow, group: str) -> str:
    stated = line.row.stated.get(group)
    cells = [str(line.compared(group))] if line.done else []
    cells += [] if stated is None else [f"paper {stated:.2f}"]
    difference = _number(line.difference(group), "+.2f")
    return ", ".join(cells) + (f": {difference}" if difference else "")


def _number(value: float, form: str = ".2f") -> str:
    return "" if math.isnan(value) else format(value, form)
