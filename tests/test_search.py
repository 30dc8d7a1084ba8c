"""`reproduce --vary ... --on val`: settings are compared on the validation list, and the choice alone sees the test list."""

import json
import os
import re
import shlex
import string
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import make_dataset
from reproducing import PROJECT, unpadded, write_recipe

from reslt.reproduce import jobs, search
from reslt.reproduce.__main__ import parse_arguments, select
from reslt.reproduce.rows import of_recipes, parse_varied
from reslt.reproduce.search import SearchState, search_rows


def rows_of(recipes, out, *vary, seeds=(0, 1), flags=()):
    return search_rows(
        of_recipes(list(map(str, recipes))), list(seeds), str(out), list(flags), parse_varied(list(vary))
    )


def finish(rows, scores: dict[tuple, float]) -> None:
    """Leave what finished runs would: {(value, seed): class mean on val}. Micro-averaged accuracy would choose otherwise."""
    for row in rows:
        for run in row.runs:
            folder = run.config.run_folder
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump({"config": run.config.stored(), "versions": {}}))
            for pointer in ("last", "best"):
                (folder / "checkpoints" / pointer).write_text("2-6\n")
            class_mean = scores[(*row.settings.values(), run.seed)]
            last = {f"val_{c}": 100.0 - class_mean for c in ("many", "medium", "few", "all")}
            of_best = dict.fromkeys(("many", "medium", "few", "all"), 99.0)
            result = {"split": "val", "epoch": 2, "last": last | {"val_class_mean": class_mean}, "best_on_test": None}
            result["tables"] = {"standard": {"reslt (fused)": of_best}}
            (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def evaluations(monkeypatch):
    """The evaluations on test that a search asks for: (experiment, arguments); their results are 50 + seed."""
    called = []

    def evaluate(run, arguments, log):
        called.append((run.config.run.experiment, arguments[:4]))
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir(parents=True)
        row = {"many": 60.0, "medium": None, "few": 40.0, "all": 50.0 + run.seed}
        (output / "result.json").write_text(json.dumps({"tables": {"standard": {"reslt (fused)": row}}}))

    monkeypatch.setattr(search, "run_evaluation", evaluate)
    monkeypatch.setattr(jobs.Processes, "start", lambda *_: pytest.fail("it was trained again"))
    return called


def test_the_best_mean_over_seeds_on_val_is_chosen_and_evaluated_on_test_once(tiny, reproduce, tmp_path, evaluations):
    """Class means at the last epoch: alpha 0: 30, 34; 0.5: 33, 35; 1: 20, 47. Means 32, 34, 33.5. On test 50 and 51: mean
    50.5, deviation sqrt 0.5."""
    recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
    rows, _ = rows_of([recipe], out, "alpha=0,0.5,1")
    finish(rows, {(0, 0): 30, (0, 1): 34, (0.5, 0): 33, (0.5, 1): 35, (1, 0): 20, (1, 1): 47})
    command = ("--recipes", recipe, "--vary", "alpha=0,0.5,1", "--on", "val", "--seeds", 0, 1, "--output", out)
    messages = reproduce(*command)
    assert messages.code == 0, messages.err
    chosen = [rows[1].runs[seed].config.run.experiment for seed in (0, 1)]
    assert evaluations == [(name, ["--which", "last", "--split", "test"]) for name in chosen]
    table = (out / "reproduce/search-alpha/table.md").read_text()
    assert table in messages.out
    table = unpadded(table)
    assert f"| {recipe} | 0.5 | 34.00 ± 1.41 (2) | chosen | 2 of 2 seeds |" in table
    assert f"| {recipe} | 1 | 33.50 ± 19.09 (2) | | 2 of 2 seeds |" in table
    assert "| recipe | alpha | many | medium | few | all | status |" in table  # a balanced list has no other class mean
    assert f"| {recipe} | 0.5 | 60.00 ± 0.00 (2) | n/a | 40.00 ± 0.00 (2) | 50.50 ± 0.71 (2) | 2 of 2 seeds |" in table
    assert (
        "alpha 0.5 chosen on val (10 % of the training images set aside, drawn by the seed), seeds 0, 1, evaluated on test "
        "once, with the weights after the last epoch. It was trained without the images set aside, and was not "
        "trained again with them."
    ) in table
    assert "No other candidate was evaluated on test." in table
    numbers = pd.read_csv(out / "reproduce/search-alpha/table.csv")
    assert numbers["val"].tolist() == [32, 34, 33.5]
    assert numbers["chosen"].tolist() == [False, True, False]
    assert numbers["test_all"].dropna().tolist() == [50.5]
    assert not (out / "reproduce/search-alpha/figure.png").exists()

    again = reproduce(*command)  # nothing is trained or evaluated
    assert again.code == 0
    assert len(evaluations) == 2
    assert table == unpadded((out / "reproduce/search-alpha/table.md").read_text())


def test_of_equal_means_the_first_value_is_chosen_for_each_recipe(tiny, tmp_path):
    recipes = [write_recipe(tmp_path / f"{name}.yaml", tiny) for name in "ab"]
    rows, _ = rows_of(recipes, tmp_path, "alpha=0.5,0", seeds=[3])
    finish(rows, {(0.5, 3): 40, (0, 3): 40})
    chosen = SearchState("search", rows, tmp_path / "table").chosen
    assert [(line.row.recipe, line.row.settings) for line in chosen] == [(str(r), {"alpha": 0.5}) for r in recipes]


def test_there_is_no_choice_and_no_test_while_a_run_is_missing(tiny, tmp_path, evaluations):
    recipe = write_recipe(tmp_path / "a.yaml", tiny)
    rows, _ = rows_of([recipe], tmp_path, "alpha=0,1")
    finish(rows, dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 40))
    (rows[1].runs[1].config.run_folder / "result.json").unlink()
    state = SearchState("search", rows, tmp_path / "table")
    state.test_choices()
    assert evaluations == []
    assert not state.is_done
    assert "No choice yet; it follows when all runs are done." in state.as_markdown()


def test_another_choice_after_more_values_is_tested_too_and_the_table_says_so(tiny, tmp_path, evaluations):
    """A run that was trained again since its test is tested again."""
    recipe = write_recipe(tmp_path / "a.yaml", tiny)
    scores = {(0, 0): 40, (1, 0): 30, (0.5, 0): 50}
    tables = []
    for vary in ("alpha=0,1", "alpha=0,0.5,1"):
        rows, _ = rows_of([recipe], tmp_path, vary, seeds=[0])
        finish(rows, scores)
        state = SearchState("search", rows, tmp_path / "table")
        state.test_choices()
        assert state.is_done
        tables.append(state.as_markdown())
    first, second = (name for name, _ in evaluations)
    assert (first.endswith("alpha0-seed0"), second.endswith("alpha0.5-seed0")) == (True, True)
    assert "No other candidate was evaluated on test." in tables[0]
    assert f"Earlier calls evaluated other choices on test too: {first}." in tables[1]
    tested = tmp_path / "table/test" / second / "result.json"
    os.utime(tested, (1, 1))
    assert not SearchState("search", rows, tmp_path / "table").is_done


def test_a_failed_test_is_reported(tiny, tmp_path, monkeypatch):
    rows, _ = rows_of([write_recipe(tmp_path / "a.yaml", tiny)], tmp_path, "alpha=0", seeds=[0])
    finish(rows, {(0, 0): 40})
    monkeypatch.setattr(search, "run_evaluation", lambda *_: "there is no test.txt, log: x.log")
    state = SearchState("search", rows, tmp_path / "table")
    state.test_choices()
    assert not state.is_done
    assert "| 0 of 1 seeds; seed 0 failed: there is no test.txt, log: x.log |" in unpadded(state.as_markdown())
    assert "seeds 0, to be evaluated on test," in state.as_markdown()


def test_runs_have_folders_of_their_own_and_see_val_alone(tiny, tmp_path):
    """A dataset with a val.txt uses it; a recipe, and flags, may state another share."""
    with_val = make_dataset(tmp_path / "with_val", splits=("val", "test"))
    recipes = [write_recipe(tmp_path / "a.yaml", tiny), write_recipe(tmp_path / "b.yaml", with_val)]
    recipes.append(write_recipe(tmp_path / "c.yaml", tiny, val_from_train=0.3))
    for flags, shares in (((), (0.1, None, 0.3)), (("--val-from-train", "0.2"), (0.2, None, 0.2))):
        rows, _ = rows_of(recipes, tmp_path / "out", "alpha=0.5", seeds=[0], flags=flags)
        data = {row.recipe: row.runs[0].config.data for row in rows}
        assert [data[str(recipe)].val_from_train for recipe in recipes] == list(shares)
        assert {(d.eval_split, d.final_split) for d in data.values()} == {("val", "val")}
        assert {row.runs[0].config.run_folder.parent for row in rows} == {tmp_path / "out/on_val"}
    rows, _ = rows_of(["imagenet_lt/resnext50"], tmp_path, "alpha=0.5", seeds=[0])
    assert rows[0].runs[0].config.data.val_from_train is None  # its lists may not exist yet, but have been published


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "digits_lt/ce"], "--on val chooses among settings of recipes; give these with --recipes RECIPE --vary"),
        (["--table", "5", "--vary", "alpha=0,1"], "--on val chooses among settings of recipes"),
        (["--recipes", "digits_lt/ce", "--vary", "lr=1,2", "--eval-split", "both"], "--eval-split: the runs of --on val use only"),
        (["--recipes", "digits_lt/ce", "--vary", "val_from_train=0.1,0.2"], "--vary val_from_train: --on val compares settings"),
    ],
)  # fmt: skip
def test_a_search_that_would_not_be_one_is_refused(reproduce, tmp_path, arguments, message):
    refused = reproduce(*arguments, "--on", "val", "--output", tmp_path / "out")
    assert refused.code == 2
    assert refused.err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_search_trains_without_reading_test_and_then_tests_its_choice(tiny, tmp_path, run_script, monkeypatch):
    """The test images are unreadable until the choice is made. Its table stays that of the validation list."""
    recipe = write_recipe(tmp_path / "a.yaml", tiny, epochs=1, method="ce")
    rows, _ = rows_of([recipe], tmp_path / "out", "lr=0.01,0.1", seeds=[0])
    state = SearchState("search", rows, tmp_path / "table")
    images = {file: file.read_bytes() for file in (tiny / "images/test").rglob("*.png")}
    for file in images:
        file.write_bytes(b"unreadable")
    for run in state.to_do:
        outcome = run_script("train", *run.arguments)
        assert outcome.code == 0, outcome.err
        assert "val list (4 images)" in outcome.out  # two of 16, one of 8 and of 4
        assert "test" not in pd.read_csv(run.config.run_folder / "summary.csv").columns.str.partition("_")[0]
    state = SearchState("search", rows, tmp_path / "table")
    for file, content in images.items():
        file.write_bytes(content)

    def evaluate(run, arguments, log):
        assert run_script("evaluate", "--ckpt", run.config.run_folder, *arguments).code == 0

    monkeypatch.setattr(search, "run_evaluation", evaluate)
    state.test_choices()
    assert state.is_done
    (chosen,) = state.chosen
    tested = json.loads((tmp_path / "table/test" / chosen.runs[0][0].config.run.experiment / "result.json").read_text())
    assert (tested["split"], tested["images"], tested["epoch"]) == ("test", 15, 1)
    assert state.tests(chosen)["all"].mean == pytest.approx(tested["all"])
    assert json.loads((chosen.runs[0][0].config.run_folder / "result.json").read_text())["split"] == "val"
    folder = chosen.runs[0][0].config.run_folder
    assert run_script("evaluate", "--ckpt", folder, "--split", "test").code == 0  # by hand, it has a name of its own
    assert json.loads((folder / "result.json").read_text())["split"] == "val"
    assert [json.loads(file.read_text())["split"] for file in folder.glob("result-*.json")] == ["test"]


PAGE = (PROJECT / "docs/beyond.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m reslt\.reproduce .*", PAGE, re.MULTILINE)
TEXTS = dict(re.findall(r'^([A-Z]+)="(.*)"$', PAGE, re.MULTILINE))


@pytest.mark.parametrize(("place", "runs"), enumerate([6, 4, 4, 4, 4, 6, 4, 12]))
def test_the_commands_of_the_open_questions_start_the_runs_that_they_name(place, runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = string.Template(COMMANDS[place]).substitute(TEXTS)
    arguments = shlex.split(command)[3:]
    assert "--streams" in arguments
    streams = arguments.index("--streams")
    given, flags = parse_arguments(arguments[:streams] + arguments[streams + 2 :])
    _, selection = select(given)
    find = search_rows if given.on else lambda selection, *others: selection.rows(*others)
    rows, warnings = find(selection, given.seeds, given.output, flags, parse_varied(given.vary))
    assert not warnings
    assert len({run.config.run_folder for row in rows for run in row.runs}) == runs
    assert len(COMMANDS) == 8
