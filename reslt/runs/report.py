"""What a run tells: its opening lines, summary.csv, its last tables. `python -m reslt.report RUN RUN ...` compares runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from accelerate import Accelerator

from reslt.config.schema import Config
from reslt.core.errors import Parser, UserError, entry_point
from reslt.core.files import write_whole
from reslt.data.datasets import Dataset
from reslt.data.groups import SHOTS, branch_sets
from reslt.evaluation.metrics import EpochStats
from reslt.evaluation.tables import COLUMNS, Evaluation, percent, render, write_results
from reslt.models.complexity import Cost
from reslt.training.state import Progress


class Summary:
    """summary.csv: a row per epoch (from 1), rewritten whole each time."""

    def __init__(self, run: Path, epochs_done: int = 0, is_written: bool = True):
        """Keeps the rows of the first `epochs_done` epochs of a resumed run. Of several processes, one writes."""
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
            write_whole(self.file, pd.DataFrame(self.rows).to_csv(index=False))
        return line

    def has(self, epoch: int) -> bool:
        """Whether there is a row for an epoch (from 1)."""
        return any(row["epoch"] == epoch for row in self.rows)

    def column(self, name: str) -> dict[int, float]:
        """{epoch (from 1): value} of the rows that have a value."""
        return {row["epoch"]: row[name] for row in self.rows if not math.isnan(row.get(name, math.nan))}

    def best(self, column: str) -> dict | None:
        """The row with the highest value of a column, the earliest of equals; None where no row has one."""
        rows = [row for row in self.rows if not math.isnan(row.get(column, math.nan))]
        return max(rows, key=lambda row: row[column]) if rows else None


def opening(
    run: Path,
    dataset: Dataset,
    config: Config,
    costs: tuple[Cost, Cost],
    img_size: int,
    images_are: str,
    accelerator: Accelerator,
    progress: Progress,
) -> str:
    """What is about to be trained, for the console. `costs`: of the model, and of the plain one without branches;
    `images_are`: where the loader has them."""
    counts, groups = dataset.images_per_class, dataset.shot_groups["standard"]
    limited = f" ({min(config.limit_train, counts.sum()):,} of them used)" if config.limit_train else ""
    device, processes = accelerator.device.type, accelerator.num_processes
    where = f"{processes} processes on {device}" if processes > 1 else f"on {device}"
    if config.grad_accum_steps > 1:
        where += f", a batch in {config.grad_accum_steps} passes"
    experts = f", {config.experts} experts" if config.experts > 1 else ""
    shots = " / ".join(str(int(groups[shot].sum())) for shot in SHOTS)
    lines = [
        f"data    {dataset.name}: {counts.sum():,} training images{limited}, {dataset.num_classes} classes with "
        f"{counts.max():,}..{counts.min():,} each (imbalance factor {counts.min() / counts.max():.3g}); "
        f"many / medium / few: {shots} classes; images in {dataset.image_root.folder}",
        f"augment {augmentation(config)}; images are {images_are}",
        f"model   {config.model}{experts}, {img_size} x {img_size} px, {where}, precision {config.mixed_precision}",
        f"        {costs[0]} an image" + (f" (without branches {costs[1]})" if str(costs[0]) != str(costs[1]) else ""),
        f"method  {config.method}",
    ]
    if config.has_branches:
        sets = branch_sets(counts, config.branches, config.branch_sizes).sum(1).tolist()
        lines[-1] += f", alpha {config.alpha:g}, {config.branch} branches on the {config.branch_at} over {sets} classes"
    if config.logit_adjust:
        lines[-1] += f", logits adjusted by {config.logit_adjust:g} log(frequency)"
    going_on = ""
    if progress.epoch >= config.epochs:
        going_on = ", all of its epochs are trained"
    elif progress.epoch or progress.steps:
        going_on = f", going on in epoch {progress.epoch + 1}, behind {progress.steps} of its steps"
    lines.append(f"run     {run}{going_on}")
    return "\n".join(lines)


def augmentation(c: Config) -> str:
    """What training does to its images, in words."""
    said = ["random resized crop" if c.crop == "rrc" else f"{c.crop_padding} px padding and crop"]
    said += [f"flip {c.hflip:g}"] * (c.hflip > 0)
    if c.aa:
        said.append(f"AutoAugment {c.aa}")
    elif any(c.color_jitter):
        said.append("color jitter " + " ".join(f"{v:g}" for v in c.color_jitter))
    said += [f"erasing {c.reprob:g} ({c.remode})"] * (c.reprob > 0)
    said += [f"{name} {value:g}" for name, value in (("mixup", c.mixup), ("CutMix", c.cutmix)) if value]
    if (c.mixup or c.cutmix) and (c.mixup_prob < 1 or c.mixup_mode != "batch"):
        said.append(f"mixed with probability {c.mixup_prob:g} per {c.mixup_mode}")
    return ", ".join(said)


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
        cells = "  ".join(f"{c} {percent(row[c])}" for c in COLUMNS)
        text.append(f"the paper's protocol, best epoch on test (epoch {row['epoch']}):  {cells}")
    text.append(outcomes[-1].classes_text())
    for stated in paper:
        if cells := "  ".join(f"{c} {stated[c]}" for c in COLUMNS if c in stated):
            place = f"table {stated['table']}" if "table" in stated else f"figure {stated['figure']}"
            text.append(f"the paper, {place}:  {cells}")
    write_results(run, outcomes[-1], {"last": outcomes[0].fused(), "best_on_test": row, "paper": paper})
    return "\n\n".join(text) + f"\n\nresult.json and per_class.csv are in {run}"


def comparison(runs: Iterable[Path]) -> str:
    """Runs' result.json -> one row per run, and mean and deviation over runs whose names differ in `seedN` alone."""
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
            table.loc[f"{name}: deviation"] = numbers.std()
    return table.to_string(float_format=lambda x: f"{x:.2f}", na_rep="n/a")


def side_by_side(runs: Iterable[Path]) -> str:
    """The full table of each run, one beside the other."""
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
    """A run's name, and what its evaluation differs in from that of training."""
    how = [result["split"]] * (result["split"] != "test")
    settings = ("tau", "eval_branch_at", "use_experts")
    how += [f"{name} {result[name]}" for name in settings if result.get(name) is not None]
    return run.name + (f" ({', '.join(how)})" if how else "")


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


def _number(value: float | None) -> float:
    return math.nan if value is None else value


@entry_point
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m reslt.report", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--side-by-side", action="store_true", help="print the runs' full tables beside each other")
    given = parser.parse_args(arguments)
    print((side_by_side if given.side_by_side else comparison)(given.runs))


if __name__ == "__main__":
    main()
