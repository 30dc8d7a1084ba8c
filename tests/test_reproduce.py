"""`python -m reslt.reproduce`: the runs that it starts, the tables that it makes of them, and interruptions."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ALONE, make_dataset
from filelock import __version__ as filelock_version
from reproducing import (
    PROJECT,
    SMALL,
    accuracies,
    in_session,
    pretend,
    runs_of,
    started,
    unpadded,
    wait_until,
    write_recipe,
)

from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.core.locks import is_locked, locked
from reslt.reproduce import jobs, rate
from reslt.reproduce.__main__ import main
from reslt.reproduce.rows import as_flag, create_run, of_recipes, of_the_paper, parse_varied
from reslt.reproduce.status import RunStatus
from reslt.reproduce.table_state import TableState
from reslt.runs.folder import open_run


def is_alive(process: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


class TestPlan:
    """`--plan` trains nothing and requires neither lists nor images."""

    def test_the_plan_of_table_5_lists_its_fifteen_cells_of_reslt(self, project, reproduce, tmp_path):
        """10,847 images are 84 whole batches of 128, so three seeds take 3 x 200 epochs of 10,752 images, at 5,000 a
        second."""
        planned = reproduce(
            "--table", 5, "--rows", "ResLT", "--plan", "--images-per-second", 5000, "--output", tmp_path / "out"
        )
        assert planned.code == 0, planned.err
        cells = [line.split("|")[1].strip() for line in planned.out.splitlines() if line.startswith("| cifar")]
        ten = [f"cifar10_lt_{f}/resnet32{kind}" for f in ("0.01", "0.02", "0.1") for kind in ("", "_strong")]
        hundred = [
            f"cifar100_lt_{f}/resnet32{kind}" for f in ("0.01", "0.02", "0.1") for kind in ("", "_3experts", "_strong")
        ]
        assert cells == ten + hundred
        assert "45 runs, 0 done" in planned.out
        row = "| cifar100_lt_0.01/resnet32 | ResLT | 0 1 2 | 6,451,200 | 22 min | to do, lists missing |"
        assert row in unpadded(planned.out)
        assert "python -m reslt.prepare cifar100 --imb-factor 0.02" in planned.out
        assert not (tmp_path / "out").exists()

    def test_the_plan_counts_whole_batches_of_the_epochs_that_remain(self, tiny, reproduce, tmp_path):
        """28 images in batches of 8 make 24 images an epoch. Of three seeds, one is done, one has 1 of 2 epochs left and
        one both: 24 + 48 images, at 12 a second."""
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        pretend(recipe, 0, out, accuracies(1, 2, 3, 4))
        half = pretend(recipe, 1, out, accuracies(1, 2, 3, 4))
        (half / "result.json").unlink()
        (half / "checkpoints/1-3").mkdir()
        (half / "checkpoints/last").write_text("1-3\n")
        planned = reproduce("--recipes", recipe, "--plan", "--output", out, "--images-per-second", 12)
        assert planned.code == 0, planned.err
        row = next(line for line in planned.out.splitlines() if line.startswith(f"| {recipe}"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[2:] == ["0 1 2", "72", "6 s", "done: seed 0; epoch 1 of 2: seed 1; to do: seed 2"]
        assert "3 runs, 1 done; to process: 72 training images, 6 s" in planned.out

    def test_a_trained_run_whose_result_was_replaced_is_to_be_evaluated(self, tiny, reproduce, tmp_path):
        """A result.json that evaluate.py wrote has no "last"."""
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        run = pretend(recipe, 0, out, accuracies(1, 2, 3, 4))
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps({key: result[key] for key in result if key != "last"}))
        (run / "checkpoints/last").write_text("2-6\n")
        planned = reproduce("--recipes", recipe, "--plan", "--seeds", 0, "--output", out, "--images-per-second", 12)
        assert "| 0 | 0 | 0 s | trained, to be evaluated |" in unpadded(planned.out)

    def test_the_rate_is_measured_over_all_steps_until_two_seconds_have_passed(self, monkeypatch):
        """Steps end at 1, 1.6 and 2.4 seconds, so 3 x 8 images take 2.4 seconds."""
        clock = iter([0.0, 1.0, 1.6, 2.4])
        monkeypatch.setattr(rate.time, "perf_counter", lambda: next(clock))
        config = Config.of(model="cifar_resnet20", model_kwargs={"channels": (4, 8, 16)}, batch_size=8, img_size=16)
        assert rate.measure(config, 3) == pytest.approx(10)

    def test_the_plan_knows_the_length_of_published_lists_before_they_are_fetched(self, project, reproduce, tmp_path):
        """115,846 lines make 452 batches of 256; there are 180 epochs."""
        flags = ("--seeds", 0, "--images-per-second", 1000, "--output", tmp_path)
        planned = reproduce("--recipes", "imagenet_lt/resnext50", "--plan", *flags)
        assert f"{452 * 256 * 180:,}" in planned.out
        assert "5.8 h" in planned.out  # 20,828,160 / 1,000 / 3,600
        assert "python -m reslt.prepare imagenet_lt" in planned.out

    def test_the_plan_measures_each_kind_of_network_once(self, tiny, reproduce, tmp_path, monkeypatch):
        """Two recipes share a network, which is set to 10 images a second; the third one's model does not exist."""
        measured = []

        def ten_a_second(config, num_classes):
            measured.append((config["model"], num_classes))
            return measure(config, num_classes) and 10.0

        measure = rate.measure
        monkeypatch.setattr(rate, "ENOUGH_SECONDS", 0.0)
        monkeypatch.setattr(rate, "measure", ten_a_second)
        write_recipe(tmp_path / "a.yaml", tiny)
        write_recipe(tmp_path / "b.yaml", tiny, alpha=0.5)
        write_recipe(tmp_path / "c.yaml", tiny, model="no_such_model")
        names = [tmp_path / f"{name}.yaml" for name in "abc"]
        planned = reproduce("--recipes", *names, "--plan", "--seeds", 0, "--output", tmp_path / "out")
        assert planned.code == 0, planned.err
        assert measured == [("cifar_resnet20", 3), ("no_such_model", 3)]
        times = [line.split("|")[5].strip() for line in planned.out.splitlines() if line.startswith(f"| {tmp_path}")]
        assert times == ["5 s", "5 s", "n/a"]  # 48 images at 10 a second
        assert "to process: 96 training images, 10 s, unknown for 1 more" in planned.out

    def test_the_plan_states_why_a_run_cannot_be_trained(self, tiny, reproduce, tmp_path):
        recipe = write_recipe(tmp_path / "a.yaml", tiny)
        planned = reproduce("--recipes", recipe, "--plan", "--seeds", 0, "--output", tmp_path / "o", "--limit-train", 5)
        assert planned.code == 0
        assert "not possible: 5 training images are fewer than --batch-size 8" in planned.out


class TestSelection:
    def test_rows_are_chosen_by_recipe_or_label_in_upper_or_lower_case(self, recipes, tiny, reproduce, tmp_path):
        for name, label in (("d_0.1/net", "ResLT"), ("d_0.02/net", "ResLT"), ("d_0.02/net_strong", "ResLT, Strong")):
            write_recipe(recipes / f"{name}.yaml", tiny, paper={"table": 3, "row": label})
        common = ("--table", 3, "--plan", "--images-per-second", 1, "--output", tmp_path / "out", "--rows")

        def chosen(*patterns) -> list[str]:
            lines = reproduce(*common, *patterns).out.splitlines()
            return [line.split("|")[1].strip() for line in lines if line.startswith("| d_")]

        assert chosen("*") == ["d_0.02/net", "d_0.02/net_strong", "d_0.1/net"]  # 0.02 before 0.1
        assert chosen("reslt, strong") == ["d_0.02/net_strong"]
        assert chosen("0.02*reslt") == ["d_0.02/net", "d_0.02/net_strong"]
        assert chosen("d_0.1", "STRONG") == ["d_0.02/net_strong", "d_0.1/net"]
        refused = reproduce(*common, "CE")
        assert refused.code == 2
        assert "no row matches; there are\n  d_0.02/net ResLT\n" in refused.err

    def test_numbers_within_names_are_ordered_by_their_value(self, recipes, tiny):
        for name in ("r152", "r50_strong", "r50", "r9"):
            write_recipe(recipes / f"d/{name}.yaml", tiny)
        assert [recipe for recipe, _ in of_recipes(["d/*"]).chosen] == ["d/r9", "d/r50", "d/r50_strong", "d/r152"]

    def test_a_recipe_may_be_in_several_tables_and_figures(self, recipes, tiny, reproduce, tmp_path):
        rows = [
            {"table": 2, "row": "two", "all": 22.5},
            {"table": 8, "row": "eight", "all": 88.5},
            {"figure": 4, "x": 1},
        ]
        write_recipe(recipes / "d/net.yaml", tiny, paper=rows)
        pretend("d/net", 0, tmp_path, accuracies(1, 2, 3, 40))
        for number, label, stated, difference in ((2, "two", 22.5, "+17.50"), (8, "eight", 88.5, "-48.50")):
            messages = reproduce("--table", number, "--seeds", 0, "--output", tmp_path)
            assert messages.code == 0
            assert (
                f"| d/net | {label} | {stated:.2f} | 40.00 (1) | 40.00 (1) | {difference} | 1 of 1 seeds |"
                in unpadded(messages.out)
            )
        refused = reproduce("--table", 7)
        assert refused.code == 2
        assert (
            refused.err
            == "error: --table 7: there is no recipe for it, only for tables 2, 8 and figures 4; give one of these\n"
        )

    def test_a_sweep_and_vary_name_their_runs(self, recipes, tiny):
        sweep = {"figure": 5, "row": "ResLT", "sweep": {"alpha": [0, 0.5]}, "all": 50.0}
        write_recipe(recipes / "d/net.yaml", tiny, paper=sweep)
        rows, _ = of_the_paper("figure", 5).rows([0, 1], "out", [], {})
        runs = [run for row in rows for run in row.runs]
        assert [run.config["experiment"] for run in runs] == [
            f"d-net-alpha{a}-seed{k}" for a in ("0", "0.5") for k in (0, 1)
        ]
        assert [run.config["alpha"] for run in runs] == [0, 0, 0.5, 0.5]
        assert [(row.x, row.axis, row.series, row.stated) for row in rows] == [
            (0.0, "alpha", str(tiny), {}), (0.5, "alpha", str(tiny), {})
        ]  # fmt: skip

        varied = parse_varied(["mixup=0,0.2,0.20", "branch-sizes=2 1,none", "nesterov=true"])
        rows, _ = of_recipes(["d/*"]).rows([7], "out", ["--epochs", "1"], varied)
        assert [row.runs[0].config["experiment"] for row in rows] == [
            f"d-net-mixup{m}-branch_sizes{b}-nesterovtrue-seed7" for m in ("0", "0.2") for b in ("2-1", "none")
        ]
        found = [row.runs[0].config for row in rows]
        assert [(c["mixup"], c["branch_sizes"], c["nesterov"], c["epochs"]) for c in found] == [
            (0, (2, 1), True, 1), (0, None, True, 1), (0.2, (2, 1), True, 1), (0.2, None, True, 1)
        ]  # fmt: skip
        assert resolve(list(rows[0].runs[0].arguments)).config == found[0]  # train.py resolves the same
        rows, _ = of_the_paper("figure", 5).rows([0], "out", [], parse_varied(["nesterov=true,false"]))
        lines = {
            f"{tiny}, nesterov {value}" for value in ("true", "false")
        }  # a series each, or the figure would join them
        assert {row.series for row in rows} == lines

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--table", "5", "--recipes", "x"], "not allowed with argument"),
            ([], "give one of --table N, --figure N, --recipes RECIPE or --coverage; only --plan covers all tables"),
            (["--plan", "--rows", "x"], "--rows chooses among the rows of one of them"),
            (["--recipes", "d/net", "--epochz", "1"], r"unknown flag --epochz \(did you mean --epochs\?\)"),
            (["--recipes", "d/net", "--alpha", "2"], r"alpha \(--alpha\): 2\.0 is above 1"),
            (["--recipes", "d/ney"], r"there is no recipe 'd/ney' \(did you mean d/net\?\); d/ has net"),
            (["--recipes", "no.yaml"], r"there is no recipe 'no\.yaml', nor a file of that name"),
            (
                ["--recipes", "d/net", "--seed", "3"],
                "--seed is not passed on to train.py: the seeds are given with --seeds",
            ),
            (["--recipes", "d/net", "--overwrite"], "finished work is kept"),
            (["--recipes", "d/net", "--resume", "auto"], "every run resumes from its last checkpoint"),
            (["--recipes", "d/net", "--experiment=x"], "named after their recipe"),
            (["--recipes", "d/net", "--seeds", "-1"], "seed .* below 0"),
            (["--recipes", "d/net", "--jobs", "0"], "--jobs 0"),
            (["--recipes", "d/net", "--plan", "--images-per-second", "0"], "--images-per-second 0"),
            (["--recipes", "d/net", "--vary", "alfa=1"], r"did you mean alpha\?"),
            (["--recipes", "d/net", "--vary", "alpha"], "give a setting and its values"),
            (["--recipes", "d/net", "--vary", "alpha=1,x"], "alpha: 'x' is not a number"),
            (["--recipes", "d/net", "--vary", "seed=1,2"], "--vary seed: the seeds are given with --seeds"),
            (["--recipes", "d/net", "--vary", "output=a,b"], "--vary output: all runs share --output"),
            (["--recipes", "d/net", "--vary", "alpha=0,1", "--alpha", "1"], "--alpha: this setting is varied"),
            (["--recipes", "d/net", "--vary", "alpha=0", "--vary", "alpha=1"], "alpha is already varied"),
            (["--recipes", "d/net", "--vary", "model-kwargs=layers=1,1"], "its values contain commas"),
            (["--recipes", "d/net", "--jbs", "2"], r"unknown flag --jbs \(did you mean --jobs\?\)"),
            (["--figure", "6"], "must map one setting to the list of its values"),
            (["--table", "1"], "recipe d/net: paper: all: '45 %' is not a number"),
        ],
    )
    def test_a_mistake_is_reported_before_anything_starts(self, recipes, tiny, reproduce, tmp_path, arguments, message):
        write_recipe(
            recipes / "d/net.yaml", tiny, paper=[{"figure": 6, "sweep": {"alfa": [1]}}, {"table": 1, "all": "45 %"}]
        )
        refused = reproduce(*arguments, "--output", tmp_path / "out")
        assert refused.code == 2
        assert refused.out == ""
        assert refused.err.startswith("error: ")
        assert re.search(message, refused.err)
        assert not (tmp_path / "out").exists()


class TestTable:
    """Tables of finished runs with known numbers. Nothing is trained; exit code 0 means that all runs are done."""

    def test_a_row_has_means_standard_deviations_and_the_difference_to_the_paper(self, tiny, reproduce, tmp_path):
        """Last epoch: 40, 42 and 47 have mean 43 and standard deviation sqrt((9 + 1 + 16) / 2). Best on test, which is
        compared with the paper: 50, 52 and 54 are 52 +- 2, against 51.5. The groups are those of the best epoch: few-shot
        30, 33 and 36, against 30."""
        paper = {"table": 5, "row": "ResLT", "few": 30.0, "all": 51.5}
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny, paper=paper), tmp_path / "out"
        for seed, (last, few, best) in enumerate([(40, 30, 50), (42, 33, 52), (47, 36, 54)]):
            pretend(recipe, seed, out, accuracies(60, 50, 20, last), best=accuracies(61, 51, few, best))
        messages = reproduce("--recipes", recipe, "--output", out)
        assert messages.code == 0, messages.err
        table = (out / "reproduce/recipes/table.md").read_text()
        assert table in messages.out
        row = f"| {recipe} | table 5, ResLT | 51.50 | 43.00 ± {math.sqrt(13):.2f} (3) | 52.00 ± 2.00 (3) | +0.50 | 3 of 3 seeds |"
        assert row in unpadded(table)
        assert "33.00 ± 3.00 (3), paper 30.00: +3.00" in table
        assert "| last epoch | best on test | difference |" in unpadded(table)
        assert "timm 7.6, torch 9.8" in table  # those of the runs, not those installed
        assert "settings: the recipes'" in table
        numbers = pd.read_csv(out / "reproduce/recipes/table.csv").iloc[0]
        assert numbers["last_all"] == pytest.approx(43)
        assert numbers["last_all_deviation"] == pytest.approx(math.sqrt(13), abs=1e-4)
        assert (numbers["test_few"], numbers["test_few_deviation"]) == pytest.approx((33, 3))
        assert (numbers["difference_all"], numbers["difference_few"]) == pytest.approx((0.5, 3))
        assert math.isnan(numbers["validation_all"])
        assert math.isnan(numbers["paper_many"])

    def test_a_validation_list_chooses_the_epoch_and_the_papers_split_gives_the_groups(self, tiny, reproduce, tmp_path):
        recipe = write_recipe(tmp_path / "a.yaml", tiny, paper={"table": 6, "many": 60.0, "all": 40.0})
        out = tmp_path / "out"
        last = accuracies(1, 2, 3, 39) | {"test_paper_many": 71, "test_paper_medium": 72, "test_paper_few": 73}
        chosen = {"many": 61.0, "medium": 62.0, "few": None, "all": 41.0}
        tables = {"standard": {"reslt (fused)": dict.fromkeys(chosen, 5.0)}, "paper": {"reslt (fused)": chosen}}
        pretend(recipe, 0, out, last, chosen=chosen, tables=tables)
        messages = reproduce("--recipes", recipe, "--seeds", 0, "--output", out)
        assert "| 40.00 | 39.00 (1) | 41.00 (1) | +1.00 | 1 of 1 seeds |" in unpadded(messages.out)
        assert "| last epoch | best on validation | difference |" in unpadded(messages.out)
        assert "| 61.00 (1), paper 60.00: +1.00 | 62.00 (1) | n/a |" in unpadded(messages.out)
        numbers = pd.read_csv(out / "reproduce/recipes/table.csv").iloc[0]
        assert (numbers["last_many"], numbers["validation_many"]) == (71, 61)

    def test_a_row_may_state_that_its_groups_are_those_of_the_standard_split(self, tiny, reproduce, tmp_path):
        """The row of the paper's split compares 61 with 60, and the row of the standard split 51 with 50."""
        rows = [{"table": 8, "row": "a", "many": 60.0}, {"table": 8, "row": "b", "many": 50.0, "split": "standard"}]
        out = tmp_path / "out"
        for name, row in zip("ab", rows, strict=True):
            recipe = write_recipe(tmp_path / f"{name}.yaml", tiny, paper=row)
            last = accuracies(51, 2, 3, 39) | {"test_paper_many": 61, "test_paper_medium": 72, "test_paper_few": 73}
            pretend(recipe, 0, out, last)
        messages = reproduce("--recipes", tmp_path / "a.yaml", tmp_path / "b.yaml", "--seeds", 0, "--output", out)
        assert "61.00 (1), paper 60.00: +1.00" in messages.out
        assert "51.00 (1), paper 50.00: +1.00" in messages.out
        recipe = write_recipe(tmp_path / "c.yaml", tiny, paper=rows[1] | {"split": "other"})
        refused = reproduce("--recipes", recipe, "--seeds", 0, "--output", out)
        assert "paper: split: 'other' is neither paper nor standard" in refused.err

    def test_another_configuration_in_a_runs_folder_is_reported_and_not_trained(self, tiny, reproduce, tmp_path):
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        folder = pretend(recipe, 0, out, accuracies(1, 2, 3, 4))
        before = content(folder)
        messages = reproduce(
            "--recipes", recipe, "--seeds", 0, "--output", out, "--epochs", 9, "--lr", 0.1, "--workers", 1
        )
        assert messages.code == 1
        reason = f"seed 0 failed: {folder} contains a run with another configuration (epochs: 2 -> 9; lr: 0.05 -> 0.1)"
        assert f"0 of 1 seeds; {reason}; choose another --output" in messages.out
        assert "flags: `--epochs 9 --lr 0.1 --workers 1`: not the paper's settings" in messages.out
        assert content(folder) == before
        assert not (out / "reproduce/recipes/logs").exists()

    def test_a_run_that_ended_before_its_first_checkpoint_counts_as_not_begun(self, tiny, reproduce, tmp_path):
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        folder = pretend(recipe, 0, out, accuracies(1, 2, 3, 4))
        (folder / "result.json").unlink()
        common = ("--recipes", recipe, "--seeds", 0, "--output", out, "--lr", 0.1, "--plan", "--images-per-second", 1)
        assert "| to do |" in reproduce(*common).out
        (folder / "checkpoints/1-3").mkdir()
        assert "| not possible: " in reproduce(*common).out

    def test_a_recipe_that_cannot_start_is_in_plan_and_table_and_the_others_are_unaffected(
        self, recipes, tiny, reproduce, tmp_path
    ):
        """The recipe's file of weights is missing. If no recipe can start, the command is refused."""
        rows = {"one": {}, "two": {"pretrained_file": "gone.pth"}}
        for name, more in rows.items():
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper={"table": 4, "row": name, "all": 50}, **more)
        pretend("d/one", 0, tmp_path / "out", accuracies(50, 50, 50, 51))
        flags = ["--table", 4, "--seeds", 0, "--output", tmp_path / "out"]
        planned = reproduce(*flags, "--plan", "--images-per-second", 10)
        assert planned.code == 0, planned.err
        assert "not possible: pretrained_file: there is no file gone.pth" in planned.out
        messages = reproduce(*flags)
        assert messages.code == 1
        table = unpadded((tmp_path / "out/reproduce/table4/table.md").read_text())
        assert "| d/one | one | 50.00 | 51.00 (1) |" in table
        assert "| 0 of 1 seeds; seed 0 failed: pretrained_file: there is no file gone.pth; " in table
        refused = reproduce(*flags, "--rows", "two")
        assert refused.code == 2
        assert "there is no file gone.pth" in refused.err

    def test_the_header_states_settings_that_differ_from_the_papers(self, tiny, reproduce, tmp_path):
        """They come from flags and --vary; a flag that changes no result is not one. A repeated seed counts once."""
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        pretend(recipe, 0, out, accuracies(1, 2, 3, 4))
        pretend(recipe, 0, out, accuracies(1, 2, 3, 5), settings={"alpha": 0.5})
        messages = reproduce("--recipes", recipe, "--seeds", 0, 0, "--output", out, "--workers", 1)
        assert messages.code == 0
        assert "flags: `--workers 1`\n" in messages.out
        assert "| 1 of 1 seeds |" in messages.out
        varied = reproduce("--recipes", recipe, "--seeds", 0, "--output", out, "--vary", "alpha=0.5", "--name", "mine")
        assert "varied: alpha: not the paper's settings" in varied.out
        assert (out / "reproduce/mine/table.csv").is_file()
        assert (out / "reproduce/mine/table.md").read_text().startswith("# Recipes\n")

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("checkpoints/last", "garbage"),
            ("result.json", '{"split": "test", "epoch": 2, "last": {}, "best_on_test": null, "tables": {}}'),
            ("summary.csv", ""),
            ("summary.csv", None),
        ],
    )
    def test_a_damaged_run_is_reported_and_the_others_are_unaffected(self, tiny, reproduce, tmp_path, file, text):
        recipes, out = [write_recipe(tmp_path / f"{name}.yaml", tiny) for name in "ab"], tmp_path / "out"
        folder = pretend(recipes[0], 0, out, accuracies(1, 2, 3, 4))
        pretend(recipes[1], 0, out, accuracies(1, 2, 3, 5))
        if text is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(text)
        messages = reproduce("--recipes", *recipes, "--seeds", 0, "--output", out)
        assert messages.code == 1
        assert f"seed 0 failed: {folder} is damaged (" in messages.out
        assert "| 5.00 (1) |" in unpadded(messages.out)

    def test_a_selection_of_rows_has_a_table_of_its_own(self, recipes, tiny, reproduce, tmp_path):
        """The table of all rows, which was written before, is not replaced."""
        for name in ("one", "two"):
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper={"table": 4, "row": name, "all": 50})
            pretend(f"d/{name}", 0, tmp_path / "out", accuracies(1, 2, 3, 4))
        flags = ("--table", 4, "--seeds", 0, "--output", tmp_path / "out")
        assert reproduce(*flags).code == reproduce(*flags, "--rows", "*ONE", "d/one").code == 0
        tables = {file.parent.name: file.read_text() for file in (tmp_path / "out/reproduce").glob("*/table.md")}
        assert {name: text.count("| 1 of 1 seeds |") for name, text in tables.items()} == {
            "table4": 2, "table4-rows-ONE-d-one": 1
        }  # fmt: skip

    def test_recipes_that_would_share_a_folder_are_refused(self, tiny, reproduce, tmp_path):
        recipes = [write_recipe(tmp_path / name, tiny, lr=lr) for name, lr in (("a/b.yaml", 0.1), ("a-b.yaml", 0.2))]
        refused = reproduce("--recipes", *recipes, "--seeds", 0, "--output", tmp_path / "out")
        assert refused.code == 2
        assert "would share" in refused.err

    def test_lists_that_are_missing_are_reported_and_nothing_is_started(self, project, reproduce, tmp_path):
        messages = reproduce("--table", 5, "--rows", "cifar100_lt_0.01/resnet32 ", "--seeds", 0, "--output", tmp_path)
        assert messages.code == 1
        assert (
            "seed 0 failed: make the lists of cifar100_lt_0.01 with: python -m reslt.prepare cifar100" in messages.out
        )
        assert not list(tmp_path.rglob("*.log"))

    def test_a_run_that_another_command_trains_meanwhile_is_in_the_table(self, tiny, tmp_path):
        recipe = write_recipe(tmp_path / "a.yaml", tiny)
        rows, _ = of_recipes([str(recipe)]).rows([0], str(tmp_path / "out"), [], {})
        state = TableState("recipes", rows, tmp_path / "out")
        pretend(recipe, 0, tmp_path / "out", accuracies(1, 2, 3, 77))
        state.record(rows[0].runs[0], RunStatus(fault="ended by signal SIGKILL"))
        assert "77.00 (1)" in (tmp_path / "out/table.md").read_text()

    def test_every_row_trains_its_first_seed_before_any_trains_a_second(self, tiny, tmp_path):
        recipes = [str(write_recipe(tmp_path / f"{name}.yaml", tiny)) for name in "ab"]
        rows, _ = of_recipes(recipes).rows([4, 5], str(tmp_path / "out"), [], {})
        to_do = TableState("recipes", rows, tmp_path).to_do
        assert [(Path(run.recipe).stem, run.seed) for run in to_do] == [("a", 4), ("b", 4), ("a", 5), ("b", 5)]

    def test_a_figures_lines_and_bars_are_drawn(self, recipes, tiny, reproduce, tmp_path):
        bars = {"figure": 6, "series": "tiny"}
        write_recipe(recipes / "d/net.yaml", tiny, paper=[{"figure": 5, "sweep": {"alpha": [0.5, 1]}}, bars])
        for seed in (0, 1):
            for alpha in (0.5, 1.0):
                pretend("d/net", seed, tmp_path, accuracies(1, 2, 3, 40 + seed + alpha), settings={"alpha": alpha})
            rows = {"reslt (fused)": 50.0, "branch 1 (3 classes)": 40.0, "branch 2 (2 classes)": None, "expert 1": 30.0}
            tables = {
                "standard": {name: dict.fromkeys(("many", "medium", "few", "all"), v) for name, v in rows.items()}
            }
            pretend("d/net", seed, tmp_path, accuracies(1, 2, 3, 4), tables=tables)
        for figure in (5, 6):
            messages = reproduce("--figure", figure, "--seeds", 0, 1, "--output", tmp_path)
            assert messages.code == 0, messages.err
            drawn = tmp_path / f"reproduce/figure{figure}/figure.png"
            assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert str(drawn) in messages.out
        numbers = pd.read_csv(tmp_path / "reproduce/figure5/table.csv")
        assert numbers["alpha"].tolist() == [0.5, 1]
        assert numbers["last_all"].tolist() == [41.0, 41.5]

    def test_figures_show_means_over_seeds_beside_the_papers_numbers(self, recipes, tiny, tmp_path, monkeypatch):
        """A line has x, the mean and the name of its series. Bars are the fused prediction and the branches, not the
        experts."""
        from matplotlib import pyplot

        shown = {}
        monkeypatch.setattr(pyplot, "close", lambda figure: shown.setdefault("axes", figure.axes))
        points = [{"figure": 4, "series": "small", "x": x, "all": 41.0} for x in (3, 1)]
        write_recipe(recipes / "d/net.yaml", tiny, paper=[*points, {"figure": 6, "series": "tiny"}])
        rows = {"reslt (fused)": 50.0, "branch 1 (3 classes)": 40.0, "expert 1": 30.0}
        tables = {"standard": {name: dict.fromkeys(("many", "medium", "few", "all"), v) for name, v in rows.items()}}
        for seed, value in ((0, 40.0), (1, 44.0)):
            last, best = accuracies(1, 2, 30, value - 1), accuracies(1, 2, 3, value)
            pretend("d/net", seed, tmp_path, last, best=best, tables=tables)
        main(["--figure", "4", "--seeds", "0", "1", "--output", str(tmp_path)])
        (axes,) = shown.pop("axes")
        ours, stated = (
            line.get_xydata().tolist()
            for line in axes.lines
            if line.get_linestyle() != "None" or "x" in line.get_marker()
        )
        assert ours == [[1, 42], [3, 42]]
        assert stated == [[1, 41], [3, 41]]
        assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == ["small", "small, paper"]
        main(["--figure", "6", "--seeds", "0", "1", "--output", str(tmp_path)])
        (axes,) = shown.pop("axes")
        heights = [bar.get_height() for bars in axes.containers if hasattr(bars, "patches") for bar in bars]
        assert heights == [50] * 4 + [40] * 4
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["all branches", "branch 1 (3 classes)"]


@pytest.fixture
def interrupt():
    """interrupt(signal, condition) sends this process a signal as soon as it has a run and the condition is true. It
    returns a dict that will contain the run's process and the processes of its session at that moment."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    threads = []

    def arrange(number: int, condition) -> dict[int, list[int]]:
        found = {}

        def wait_and_send():
            wait_until(lambda: runs_of(os.getpid()) and condition())
            (leader,) = runs_of(os.getpid())
            found[leader] = in_session(leader)
            os.kill(os.getpid(), number)

        threads.append(threading.Thread(target=wait_and_send))
        threads[-1].start()
        return found

    yield arrange
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGINT, before)


class TestRuns:
    """Commands whose processes train."""

    def test_a_killed_command_resumes_its_runs(self, project, tmp_path, reproduce):
        """Two recipes, two seeds. The command is killed when the first run is done and the second has an epoch, and so is
        the run that outlives it. The command is then repeated in one process: the first run keeps every byte, the second
        resumes, and the table has the means of the four runs' results."""
        flags = ("--limit-train", 64, "--batch-size", 32, "--checkpoint-seconds", 0)
        recipes = [tmp_path / f"{method}.yaml" for method in ("ce", "reslt")]
        for file, stated, epochs in zip(recipes, (20.0, 21.0), (2, 12), strict=True):
            paper = {"table": 5, "row": file.stem, "all": stated}
            write_recipe(file, "digits_lt", method=file.stem, paper=paper, epochs=epochs, eval_every=6)
        out = tmp_path / "out"
        common = ("--recipes", *recipes, "--seeds", 0, 1, "--output", out, *flags)
        stem = "-".join(tmp_path.parts[1:])
        runs = {(m, k): out / f"{stem}-{m}-seed{k}" for m in ("ce", "reslt") for k in (0, 1)}

        command = started(*common)
        second = runs["reslt", 0]
        wait_until(lambda: (second / "checkpoints/last").exists() or command.poll() is not None)
        (orphan,) = runs_of(command.pid)
        command.kill()
        assert is_alive(orphan)
        os.kill(orphan, signal.SIGKILL)
        command.communicate()
        wait_until(lambda: not in_session(orphan))
        assert (runs["ce", 0] / "result.json").exists()
        assert not (second / "result.json").exists()
        assert "1 of 4 runs done" in (out / "reproduce/recipes/table.md").read_text()
        before = content(runs["ce", 0])

        messages = reproduce(*common, "--streams", 3)
        assert messages.code == 0, messages.out + messages.err
        assert content(runs["ce", 0]) == before
        assert "[2/4]" in messages.out
        assert "[1/4]" not in messages.out
        log = (out / f"reproduce/recipes/logs/{second.name}.log").read_text()
        assert re.search(r"resuming in epoch \d+, after \d+ of its steps", log)
        results = {key: json.loads((run / "result.json").read_text()) for key, run in runs.items()}
        numbers = pd.read_csv(out / "reproduce/recipes/table.csv")
        table = (out / "reproduce/recipes/table.md").read_text()
        for row, (method, stated) in enumerate((("ce", 20.0), ("reslt", 21.0))):
            last = [results[method, k]["last"]["test_all"] for k in (0, 1)]
            best = [results[method, k]["best_on_test"]["all"] for k in (0, 1)]
            assert numbers["last_all"][row] == pytest.approx(statistics.mean(last), abs=1e-3)
            assert numbers["test_all_deviation"][row] == pytest.approx(statistics.stdev(best), abs=1e-3)
            assert numbers["difference_all"][row] == pytest.approx(statistics.mean(best) - stated, abs=1e-3)
            assert f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f} (2)" in table
        assert "4 of 4 runs done" in table

    def test_a_run_that_fails_is_in_the_table_and_the_others_finish(self, tiny, tmp_path, reproduce):
        without_images = shutil.copytree(tiny, tmp_path / "without_images", ignore=shutil.ignore_patterns("images"))
        (without_images / "info.yaml").write_text("image_root: nowhere\ndefaults: {branch: bn}\n")
        write_recipe(tmp_path / "bad.yaml", without_images, epochs=1)
        write_recipe(tmp_path / "good.yaml", tiny, epochs=1)
        recipes = [tmp_path / "bad.yaml", tmp_path / "good.yaml"]
        out = tmp_path / "out"
        messages = reproduce("--recipes", *recipes, "--seeds", 4, "--output", out, "--jobs", 2)
        assert messages.code == 1
        lines = (out / "reproduce/recipes/table.md").read_text().splitlines()
        bad, good = (next(line for line in lines if line.startswith(f"| {recipe}")) for recipe in recipes)
        assert re.search(r"\| 0 of 1 seeds; seed 4 failed: .*nowhere.* is not a folder.*, log: .*\.log \|$", bad)
        log = Path(re.search(r"log: (\S+)", bad).group(1))
        assert "error: image root" in log.read_text()
        assert re.search(r"\| \d+\.\d\d \(1\) .*\| 1 of 1 seeds \|$", good)
        assert re.search(r"\[\d/2\] \S*bad.yaml seed 4: failed: image root", messages.out)

    def test_methods_with_the_same_first_stage_share_its_last_epoch(self, tiny, tmp_path, reproduce):
        """cRT and tau-normalization wait for one run of cross-entropy. If a first stage fails, the runs that start from it
        do not begin."""
        without_images = shutil.copytree(tiny, tmp_path / "without_images", ignore=shutil.ignore_patterns("images"))
        (without_images / "info.yaml").write_text("image_root: nowhere\n")
        plain = {name: value for name, value in SMALL.items() if name != "branch"} | {"epochs": 2}
        recipes = []
        for name, data, own in (
            ("crt", tiny, {"method": "crt", "stage2_epochs": 1}),
            ("tau", tiny, {"method": "tau_norm"}),
            ("bad", without_images, {"method": "ncm"}),
        ):
            recipes.append(tmp_path / f"{name}.yaml")
            recipes[-1].write_text(yaml.safe_dump({"data": str(data), **plain, **own}))
        out = tmp_path / "out"
        messages = reproduce("--recipes", *recipes, "--seeds", 3, "--output", out, "--streams", 2)
        assert messages.code == 1
        table = (out / "reproduce/recipes/table.md").read_text()
        (first,) = [path for path in out.glob("*first_stage*") if (path / "result.json").exists()]
        runs = [create_run(str(recipe), {}, 3, str(out), [])[0].config.run_folder for recipe in recipes]
        assert f"- {first.name} is the first stage of {runs[0].name}, {runs[1].name}\n" in table
        assert re.search(r"seed 3 failed: the run that it starts from, \S*first_stage\S*, has no result", table)
        for run, epochs in zip(runs, (1, 0), strict=False):
            config = yaml.safe_load((run / "config.yaml").read_text())["config"]
            assert (config["init_from"], config["epochs"]) == (str(first / "checkpoints/last"), 0)
            assert json.loads((run / "result.json").read_text())["epoch"] == epochs
        assert json.loads((first / "result.json").read_text())["epoch"] == 2
        assert not (runs[2] / "config.yaml").exists()

    def test_an_interrupted_command_leaves_a_table_and_no_process(self, tmp_path, reproduce, interrupt):
        """Ctrl-C arrives while a run and its two workers are busy."""
        host = ("--data-on-device", "off", "--workers", 2)
        data = make_dataset(tmp_path / "d", counts=(200, 100, 50))
        recipe, out = write_recipe(tmp_path / "a.yaml", data, epochs=500), tmp_path / "out"
        run = create_run(str(recipe), {}, 0, str(out), [])[0].config.run_folder
        sessions = interrupt(signal.SIGINT, lambda: (run / "checkpoints/last").exists())
        messages = reproduce("--recipes", recipe, "--seeds", 0, "--output", out, *host)
        assert messages.code == 130
        assert "the same command resumes them" in messages.err
        assert messages.err.splitlines()[-1] == "interrupted"
        assert "are killed" not in messages.err  # the run ended when asked
        (leader,) = sessions
        assert len(sessions[leader]) > 1
        wait_until(lambda: in_session(leader) == [], seconds=5)
        assert {path.name for path in out.iterdir()} == {"reproduce", run.name, f".{run.name}.lock"}
        assert "0 of 1 runs done" in (out / "reproduce/recipes/table.md").read_text()

    def test_a_run_that_does_not_end_when_asked_is_killed(self, tiny, tmp_path, reproduce, interrupt, monkeypatch):
        """The command receives SIGTERM; here, train.py is a script that ignores it."""
        monkeypatch.setattr(jobs, "PROJECT", tmp_path)
        monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.3)
        (tmp_path / "train.py").write_text(
            "import pathlib, signal, sys, time\n"
            f"sys.path.insert(0, {str(PROJECT)!r})\n"
            "from reslt.core.locks import locked\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"with locked(pathlib.Path({str(tmp_path / 'out/tiny')!r})): time.sleep(60)"
        )
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        sessions = interrupt(signal.SIGTERM, lambda: is_locked(out / "tiny"))
        messages = reproduce("--recipes", recipe, "--seeds", 0, "--output", out)
        assert messages.code == 143
        assert "runs that did not end within 0.3 s are killed" in messages.err
        (leader,) = sessions
        wait_until(lambda: in_session(leader) == [], seconds=5)

    def test_two_recipes_of_table_5_train_on_real_images(self, real_images, tmp_path, reproduce):
        """Each trains one epoch of 256 images, in one process, and is evaluated on 500 test images."""
        data = tmp_path / "cifar100_lt_0.01"
        data.mkdir()
        (data / "info.yaml").write_text((PROJECT / "data_lists" / data.name / "info.yaml").read_text())
        lists = real_images / "lists" / data.name
        (data / "train.txt").write_text((lists / "train.txt").read_text())
        (data / "test.txt").write_text("\n".join((lists / "test.txt").read_text().splitlines()[::20]) + "\n")
        messages = reproduce(
            "--table", 5, "--rows", f"{data.name}/resnet32 ", f"{data.name}/resnet32_strong", "--seeds", 0, "--streams", 2,
            "--data", data, "--data-dir", real_images / "cifar100", "--output", tmp_path / "out", "--epochs", 1,
            "--limit-train", 256, "--workers", 0, "--name", "real",
        )  # fmt: skip
        assert messages.code == 0, messages.out + messages.err
        numbers = pd.read_csv(tmp_path / "out/reproduce/real/table.csv")
        assert numbers["paper_all"].tolist() == [45.34, 48.21]
        for name, ours in zip(numbers["recipe"], numbers["test_all"], strict=True):
            result = json.loads((tmp_path / f"out/{name.replace('/', '-')}-seed0/result.json").read_text())
            assert result["images"] == 500
            assert ours == pytest.approx(result["best_on_test"]["all"], abs=1e-3)


class TestLock:
    """A run is used by one process at a time."""

    @pytest.fixture
    def holder(self):
        """holder(run) -> a process that has locked a run's folder."""
        processes = []

        def hold(run: Path) -> subprocess.Popen:
            code = "import sys, pathlib\nfrom reslt.core.locks import locked\nwith locked(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(run)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            processes.append(process)
            process.stdout.readline()
            return process

        yield hold
        for process in processes:
            process.kill()
            process.communicate()

    def test_a_second_process_on_the_same_run_is_refused(self, tiny, tmp_path, run_script, holder):
        process = holder(tmp_path / "out/run")
        flags = [part for name, value in SMALL.items() for part in as_flag(name, value)]
        arguments = ("--data", tiny, "--output", tmp_path / "out", "--experiment", "run", *flags)
        refused = run_script("train", *arguments)
        assert refused.code == 2
        message = f"error: another process is using {tmp_path / 'out/run'}; wait for it to end, or stop it\n"
        assert refused.err.endswith(message)
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".run.lock"]
        process.kill()  # the lock ends with its process
        process.wait()
        assert run_script("train", *arguments).code == 0
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"run", ".run.lock"}

    @pytest.mark.skipif(int(filelock_version.split(".")[0]) < 4, reason="filelock 3 leaves the lock to forked workers")
    def test_a_forked_worker_does_not_keep_the_lock(self, tmp_path):
        """A loader's worker may outlive a killed run by some seconds."""
        code = (
            "import os, pathlib, sys, time\nfrom reslt.core.locks import locked\n"
            "with locked(pathlib.Path(sys.argv[1])):\n"
            "    if not os.fork(): print(flush=True)\n"
            "    time.sleep(60)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        process.stdout.readline()  # printed by the worker, which is now running
        process.kill()
        process.wait()
        try:
            assert len(in_session(process.pid)) == 1
            assert not is_locked(tmp_path / "run")
            with locked(tmp_path / "run"):
                assert [p.name for p in tmp_path.iterdir()] == [".run.lock"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)

    def test_the_command_waits_for_a_run_that_another_process_trains(self, tiny, tmp_path, holder, monkeypatch, capsys):
        """The run is done when the other process ends, so it is not trained again."""
        recipe, out = write_recipe(tmp_path / "a.yaml", tiny), tmp_path / "out"
        run, _ = create_run(str(recipe), {}, 0, str(out), [])
        process = holder(run.config.run_folder)
        monkeypatch.setattr(jobs.Processes, "start", lambda *_: pytest.fail("it was trained again"))

        def finish():
            pretend(recipe, 0, out, accuracies(1, 2, 3, 4))
            process.kill()

        timer = threading.Timer(0.3, finish)
        timer.start()
        main(["--recipes", str(recipe), "--seeds", "0", "--output", str(out)])
        timer.join()
        messages = capsys.readouterr().out
        assert f"waiting for another process that is using {run.config.run_folder}" in messages
        assert "1 of 1 seeds" in messages


def test_a_run_without_a_checkpoint_records_the_configuration_of_its_last_start(tmp_path):
    """A process that is killed before its first checkpoint leaves a configuration that no result depends on."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    stored = tmp_path / "run/config.yaml"
    for lr, stated in ((0.1, 0.1), (0.2, 0.2), (0.3, 0.2)):
        with open_run(tmp_path / "run", {"config": {"lr": lr}}, False, ALONE):
            assert yaml.safe_load(stored.read_text())["config"]["lr"] == stated
        if lr == 0.2:
            (tmp_path / "run/checkpoints/1-3").mkdir()


class TestJobs:
    def test_slots_take_the_gpus_in_turn_without_the_variables_of_a_launcher(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        assert jobs.visible_gpus() == ["4", "6"]
        found = [jobs.environment(slot, 3, ["4", "6"]) for slot in range(3)]
        assert [variables["CUDA_VISIBLE_DEVICES"] for variables in found] == ["4", "6", "4"]
        assert not {"WORLD_SIZE", "RANK"} & set(found[0])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert jobs.visible_gpus() == []

    def test_jobs_on_a_cpu_share_its_cores(self, monkeypatch):
        monkeypatch.setattr(jobs, "available_cores", lambda: 8)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert jobs.environment(0, 3, [])["OMP_NUM_THREADS"] == "2"
        assert "OMP_NUM_THREADS" not in jobs.environment(0, 1, [])
        assert "OMP_NUM_THREADS" not in jobs.environment(0, 3, ["0"])
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        assert jobs.environment(0, 3, [])["OMP_NUM_THREADS"] == "5"

    @pytest.mark.parametrize(
        ("code", "text", "reason"),
        [
            (2, "warning: w\nerror: no such model; see --model\n", "no such model; see --model"),
            (1, "Traceback\n  File\nRuntimeError: CUDA out of memory\n\n", "RuntimeError: CUDA out of memory"),
            (1, "", "exit code 1"),
            (-9, "epoch 1\n", "ended by signal SIGKILL; out of memory?"),
            (-15, "epoch 1\n", "ended by signal SIGTERM"),
        ],
    )
    def test_the_reason_of_a_failure_is_the_error_of_the_latest_attempt(self, tmp_path, code, text, reason):
        earlier = "error: of an earlier attempt\n"
        (tmp_path / "log").write_text(earlier + text)
        assert jobs.reason_of(code, tmp_path / "log", len(earlier)) == reason

    def test_durations_are_printed_in_a_fitting_unit(self):
        assert [jobs.duration(s) for s in (45, 240, 3 * 3600, 5.5 * 86400)] == ["45 s", "4 min", "3.0 h", "5.5 days"]
