"""`python -m reslt.report RUN RUN ...`: compare finished runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from reslt.core.command import Parser, entry_point
from reslt.core.errors import UserError
from reslt.evaluation.tables import COLUMNS, render
from reslt.runs.summary import Summary, best_on_test


def comparison(runs: Iterable[Path]) -> str:
    """result.json of runs -> a row each; mean and standard deviation over runs whose names differ only in `seedN`."""
    rows, groups = [], {}
    for run in runs:
        result = read_result(run)
        fused = next(iter(result["tables"]["standard"].values()))
        best = best_on_test(Summary(run, epochs_done=result["epoch"])) or {"all": math.nan}
        label = _label(run, result)
        row = {"run": label, **{c: _number(fused[c]) for c in COLUMNS}, "best on test": best["all"]}
        rows.append(row)
        groups.setdefault(re.sub(r"-?seed\d+\b", "", label), []).append(row)
    table = pd.DataFrame(rows).set_index("run").rename_axis(None)
    for name, members in groups.items():
        if len(members) > 1:
            numbers = pd.DataFrame(members).set_index("run")
            table.loc[f"{name}: mean of {len(members)}"] = numbers.mean()
            table.loc[f"{name}: standard deviation"] = numbers.std()
    return table.to_string(float_format=lambda x: f"{x:.2f}", na_rep="n/a")


def side_by_side(runs: Iterable[Path]) -> str:
    """Return the full table of each run, side by side."""
    blocks = []
    for run in runs:
        result = read_result(run)
        table = pd.DataFrame.from_dict(result["tables"]["standard"], orient="index").astype(float)
        blocks.append([_label(run, result), *render(table).splitlines()])
    height, widths = max(map(len, blocks)), [max(map(len, block)) for block in blocks]
    padded = [block + [""] * (height - len(block)) for block in blocks]
    lines = zip(*padded, strict=True)
    return "\n".join(
        "   |   ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _label(run: Path, result: dict) -> str:
    """Return a run's name, and how its evaluation differs from that in training."""
    how = [result["split"]] * (result["split"] != "test")
    settings = ("tau", "eval_branch_at", "use_experts")
    how += [f"{name} {result[name]}" for name in settings if result.get(name) is not None]
    return run.name + (f" ({', '.join(how)})" if how else "")


def read_result(run: Path) -> dict:
    """Read a run's result.json. Raises UserError if it does not exist yet."""
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"tables", "split", "epoch"} <= set(result):
            raise ValueError("it contains no tables")
        return result
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise UserError(f"{run / 'result.json'}: {reason}; give the folder of a run that is finished") from None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


@entry_point
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m reslt.report", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--side-by-side", action="store_true", help="print the runs' full tables side by side")
    given = parser.parse_args(arguments)
    print((side_by_side if given.side_by_side else comparison)(given.runs))


if __name__ == "__main__":
    main()
