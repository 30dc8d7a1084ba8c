"""`--vary ... --on val`: a search that compares settings on a validation list, and evaluates only its choice on test."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from reslt.config.command_line import without_flags
from reslt.config.places import dataset_folder
from reslt.config.schema import Config, flag_of
from reslt.core.errors import UserError
from reslt.core.files import read_json
from reslt.core.text import csv_cell
from reslt.data.datasets import list_files, read_info
from reslt.evaluation.tables import CLASS_MEAN
from reslt.reproduce.first_stage import share_first_stages, with_teachers
from reslt.reproduce.jobs import run_evaluation
from reslt.reproduce.rows import COLUMNS, Row, Run, Selection, as_text, create_run, flag_names
from reslt.reproduce.table import Spread, TableRow, list_costs, markdown
from reslt.reproduce.table_state import TableState

SHARE = 0.1  # of each class's training images, set aside if the dataset has no validation list
ON_VAL_ALONE = {"eval_split": "val", "final_split": "val"}  # settings that keep a run from the test list
OF_THE_LISTS = {*ON_VAL_ALONE, "val_from_train", "data"}  # candidates are compared on one list
RUNS = "on_val"  # folder of the runs, under --output: their settings differ from those of runs of the same names there
OF_TEST = (*COLUMNS, CLASS_MEAN)
CANDIDATES = """\
All candidates, only on the validation list: mean ± sample standard deviation (number of seeds) at the last epoch, of
top-1 accuracy in percent, or of its mean over classes if the list is unbalanced."""


def search_rows(
    selection: Selection, seeds: list[int], output: str, flags: list[str], varied: dict[str, list]
) -> tuple[list[Row], list[str]]:
    """Return the candidates as rows, with runs that are evaluated only on the validation list, and the warnings of the
    configurations.

    If a dataset has no validation list, each run sets a share of its training list aside: --val-from-train of `flags`, else
    the recipe's, else SHARE. Raises UserError as `Selection.rows` does, and for settings that a search determines."""
    for name in flag_names(flags):
        if name in ON_VAL_ALONE:
            raise UserError(f"{flag_of(name)}: the runs of --on val use only the validation list; drop it")
    for name in varied:
        if name in OF_THE_LISTS:
            raise UserError(
                f"--vary {name}: --on val compares settings on one validation list; start a search per value"
            )
    output, by_flags = str(Path(output) / RUNS), {}
    for chosen in selection.chosen:
        config = create_run(chosen[0], {}, seeds[0], output, flags)[0].config
        by_flags.setdefault(tuple(_flags(config, flags)), []).append(chosen)
    rows, warnings = [], []
    for own_flags, chosen in by_flags.items():
        found, surprises = replace(selection, chosen=chosen).rows(seeds, output, list(own_flags), varied)
        rows += share_first_stages(with_teachers(found), output, list(own_flags))
        warnings += surprises
    return rows, warnings


def _flags(config: Config | None, flags: list[str]) -> list[str]:
    """Return the flags of the runs of a recipe. `config`: that of the recipe with `flags`, None if it is impossible."""
    own = [part for name, split in ON_VAL_ALONE.items() for part in (flag_of(name), split)]
    if config is not None and _has_validation_list(config.data.data):
        return [*without_flags(flags, frozenset({"val_from_train"})), *own, flag_of("val_from_train"), "none"]
    is_stated = config is None or config.data.val_from_train is not None
    return [*flags, *own, *([] if is_stated else [flag_of("val_from_train"), str(SHARE)])]


def _has_validation_list(data: str) -> bool:
    """Return whether a dataset has a validation list, or will have one when its lists are made."""
    folder = dataset_folder(data)
    published = (read_info(folder).get("published") or {}).get("lists", {})
    return "val" in (list_files(folder) or published)


class SearchState(TableState):
    """The state of a search: the candidates' runs, and the tests of the choices.

    When all runs of a recipe's candidates are done, one candidate is chosen: the one with the highest mean over seeds of the
    last epoch's score on the validation list (the class mean if it is unbalanced, else top-1), the first if scores are
    equal."""

    def __init__(self, name: str, rows: list[Row], folder: Path):
        super().__init__(name, rows, folder)
        self.faults: dict[Run, str] = {}  # of evaluations on test

    @property
    def chosen(self) -> list[TableRow]:
        """The chosen candidate of each recipe, if all its runs are done."""
        by_recipe: dict[str, list[TableRow]] = {}
        for line in self.lines:
            by_recipe.setdefault(line.row.recipe, []).append(line)
        complete = [lines for lines in by_recipe.values() if all(line.done == len(line.runs) for line in lines)]
        return [max(lines, key=lambda line: np.nan_to_num(score(line).mean, nan=-1.0)) for lines in complete]

    @property
    def is_done(self) -> bool:
        """Whether every run has a result, and each choice was evaluated on test."""
        return super().is_done and all(self._tested(run) for line in self.chosen for run, _ in line.runs)

    def test_choices(self) -> None:
        """Evaluate the last epoch of each chosen candidate's runs on the test list, unless an earlier call did."""
        for line in self.chosen:
            for run, _ in line.runs:
                if self._tested(run):
                    continue
                name = run.config.run.experiment
                log = self.folder / "logs" / f"{name}-test.log"
                print(f"chosen: {run.name}, evaluated on test, log: {log}", flush=True)
                output = self.folder / "test" / name
                reason = run_evaluation(run, ["--which", "last", "--split", "test", "--output", output], log)
                if reason:
                    self.faults[run] = reason

    def _tested(self, run: Run) -> dict:
        """Return the result of a run on the test list; {} if it was not evaluated there after training."""
        file = self.folder / "test" / run.config.run.experiment / "result.json"
        trained = run.config.run_folder / "checkpoints" / "last"
        is_valid = file.is_file() and trained.is_file() and file.stat().st_mtime >= trained.stat().st_mtime
        return read_json(file) if is_valid else {}

    def tests(self, line: TableRow) -> dict[str, Spread]:
        """Return {column: spread over seeds} of a candidate on test: many, medium, few, all, and class_mean if unbalanced."""
        found = [
            next(iter(result["tables"]["standard"].values())) for run, _ in line.runs if (result := self._tested(run))
        ]
        values = {c: [math.nan if row[c] is None else row[c] for row in found if c in row] for c in OF_TEST}
        return {column: Spread.of(numbers) for column, numbers in values.items() if numbers}

    def as_markdown(self) -> str:
        names, chosen = list(dict.fromkeys(name for line in self.lines for name in line.row.settings)), self.chosen
        tests = [(line, self.tests(line)) for line in chosen]
        groups = [column for column in OF_TEST if any(column in spreads for _, spreads in tests)]
        candidates = [
            [*_cells(line, names), str(score(line)), "chosen" * (line in chosen), line.status] for line in self.lines
        ]
        of_test = [
            [*_cells(line, names), *(str(spreads.get(column, "")) for column in groups), self._state(line)]
            for line, spreads in tests
        ]
        parts = [f"# {self.title}", "\n".join(f"- {fact}" for fact in self.header()), CANDIDATES]
        parts += [markdown(["recipe", *names, "val", "choice", "status"], candidates)]
        if chosen:
            columns = [column.replace("_", " ") for column in groups]
            parts += ["The choice, on the test list:", markdown(["recipe", *names, *columns, "status"], of_test)]
            parts += [*(self._statement(line) for line in chosen), self._others_tested(chosen)]
        else:
            parts += ["No choice yet; it follows when all runs are done."]
        parts += [list_costs(self.lines)] * bool(self.costs)
        return "\n\n".join(parts) + "\n"

    def as_csv(self) -> str:
        rows, chosen = [], self.chosen
        for line in self.lines:
            row = {"recipe": line.row.recipe} | {name: as_text(value) for name, value in line.row.settings.items()}
            row |= {"runs": len(line.runs), "done": line.done}
            row |= {"val": score(line).mean, "val_deviation": score(line).deviation, "chosen": line in chosen}
            spreads = self.tests(line) if line in chosen else {}
            for column in OF_TEST:
                spread = spreads.get(column, Spread.of([]))
                row |= {f"test_{column}": spread.mean, f"test_{column}_deviation": spread.deviation}
            rows.append(row | {"status": csv_cell(line.status)})
        return pd.DataFrame(rows).to_csv(index=False, float_format="%.4f")

    def _state(self, line: TableRow) -> str:
        """Return the number of seeds of a choice that were evaluated on test, and the reasons for the others, as text."""
        done = sum(bool(self._tested(run)) for run, _ in line.runs)
        faults = [f"seed {run.seed} failed: {self.faults[run]}" for run, _ in line.runs if run in self.faults]
        return "; ".join([f"{done} of {len(line.runs)} seeds", *faults])

    def _statement(self, line: TableRow) -> str:
        """Return a sentence on how a choice was made and tested."""
        run, seeds = line.runs[0][0], ", ".join(str(run.seed) for run, _ in line.runs)
        share = run.config.data.val_from_train
        setting = ", ".join(f"{name} {as_text(value)}" for name, value in line.row.settings.items())
        on = (
            f"{100 * share:g} % of the training images set aside, drawn by the seed"
            if share
            else "the dataset's val.txt"
        )
        trained = (
            "without the images set aside, and was not trained again with them" if share else "on the training list"
        )
        is_tested = all(self._tested(run) for run, _ in line.runs)
        tested = "evaluated on test once" if is_tested else "to be evaluated on test"
        return (
            f"{line.row.recipe}: {setting} chosen on val ({on}), seeds {seeds}, {tested}, with the weights after the last "
            f"epoch. It was trained {trained}."
        )

    def _others_tested(self, chosen: list[TableRow]) -> str:
        """Return a sentence on other choices that earlier calls, with other candidates or recipes, evaluated on test."""
        now = {run.config.run.experiment for line in chosen for run, _ in line.runs}
        earlier = sorted({file.parent.name for file in (self.folder / "test").glob("*/result.json")} - now)
        if not earlier:
            return "No other candidate was evaluated on test."
        return f"Earlier calls evaluated other choices on test too: {', '.join(earlier)}."


def score(line: TableRow) -> Spread:
    """Return the spread over seeds of a candidate's score on the validation list at the last epoch."""
    return Spread.of([result.score for result in line.results])


def _cells(line: TableRow, settings: list[str]) -> list[str]:
    values = line.row.settings
    return [line.row.recipe, *(as_text(values[name]) if name in values else "" for name in settings)]
