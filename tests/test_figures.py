"""`python -m reslt.reproduce`: the paper's rows by name and number, its figures, the cost of a prediction, and stages that
several runs share."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from reproducing import accuracies, pretend, unpadded, write_recipe
from safetensors.numpy import save_file

from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.reproduce import clusters, jobs, paper, rate, speed
from reslt.reproduce.figure import error_bars
from reslt.reproduce.first_stage import share_first_stages
from reslt.reproduce.rows import of_recipes, of_the_paper, parse_varied
from reslt.reproduce.table import Spread

GROUPS = ("many", "medium", "few", "all")


class TestRowsOfThePaper:
    def test_every_row_of_the_tables_has_a_command(self):
        assert sum(paper.ROWS_OF_TABLES.values()) == 155
        keys = {paper.key_of(row) for _, row in paper.stated_rows()}
        for table, rows in paper.ROWS_OF_TABLES.items():
            assert len([key for key in keys if key[:2] == ("table", table)]) == rows

    def test_coverage_counts_a_row_of_several_recipes_once(self, recipes, tiny, reproduce):
        for name, row in (("a", "ResLT"), ("a_released", "ResLT"), ("b", "CE")):
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper={"table": 1, "row": row})
        counted = reproduce("--coverage")
        assert counted.code == 0
        lines = counted.out.splitlines()
        assert lines[0] == "table 1: 2 of 5 rows, 3 without recipe"
        assert "table 4: 0 of 11 rows, 11 without recipe" in lines
        assert lines[-1] == "2 of 155 rows of the paper's tables have a command"

    def test_rows_whose_settings_the_suite_chose_are_marked_and_counted(self, recipes, tiny, reproduce, tmp_path):
        """A row that another recipe reproduces with published settings is not counted."""
        ours = {"table": 4, "row": "OLTR", "settings": "ours"}
        write_recipe(recipes / "d/olt.yaml", tiny, paper=ours)
        write_recipe(recipes / "d/ce.yaml", tiny, paper={"table": 4, "row": "CE"})
        write_recipe(recipes / "d/ce_other.yaml", tiny, paper={"table": 4, "row": "CE", "settings": "ours"})
        for recipe in ("d/olt", "d/ce", "d/ce_other"):
            pretend(recipe, 0, tmp_path, accuracies(1, 2, 3, 4))
        flags = ("--table", 4, "--seeds", 0, "--output", tmp_path)
        planned, messages = reproduce(*flags, "--plan", "--images-per-second", 1), reproduce(*flags)
        for text in map(unpadded, (planned.out, messages.out, (tmp_path / "reproduce/table4/table.md").read_text())):
            assert "| d/olt | OLTR † |" in text
            assert "| d/ce | CE |" in text
            assert text.count("† with settings of this suite, since neither the paper nor public code states them") == 1
        assert reproduce("--coverage").out.splitlines()[-1] == (
            "2 of 155 rows of the paper's tables have a command, of which 1 with settings of this suite, since neither the "
            "paper nor public code states them"
        )
        write_recipe(recipes / "d/olt.yaml", tiny, paper=ours | {"settings": "theirs"})
        refused = reproduce(*flags, "--plan")
        assert refused.code == 2
        assert "recipe d/olt: paper: settings: 'theirs' is not `ours`" in refused.err

    def test_a_plan_without_a_table_covers_all_tables_and_measures_each_network_once(
        self, recipes, tiny, reproduce, tmp_path, monkeypatch
    ):
        measured = []
        monkeypatch.setattr(rate, "measure", lambda config, num_classes: measured.append(config["model"]) or 10.0)
        for table in paper.ROWS_OF_TABLES:
            write_recipe(recipes / f"d/net{table}.yaml", tiny, paper={"table": table, "row": "ResLT"})
        planned = reproduce("--plan", "--seeds", 0, "--output", tmp_path)
        assert planned.code == 0, planned.err
        lines = planned.out.splitlines()
        assert [line for line in lines if line.startswith("Table ")] == [f"Table {n}" for n in range(1, 10)]
        assert [line.split("|")[1].strip() for line in lines if line.startswith("| d/")] == [
            f"d/net{n}" for n in range(1, 10)
        ]
        assert measured == ["cifar_resnet20"]
        assert lines[-1] == "9 of 155 rows of the paper's tables have a command"

    def test_a_methods_own_protocol_is_run_with_own_or_if_its_row_has_no_other_recipe(
        self, recipes, tiny, reproduce, tmp_path
    ):
        rows = {"bbn": ("BBN", {}), "bbn_own": ("BBN", {"protocol": "own"}), "ride_own": ("RIDE", {"protocol": "own"})}
        for name, (row, more) in rows.items():
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper={"table": 5, "row": row} | more)
        flags = ("--table", 5, "--plan", "--images-per-second", 1, "--seeds", 0, "--output", tmp_path)

        def chosen(*more) -> list[str]:
            lines = reproduce(*flags, *more).out.splitlines()
            return [line.split("|")[1].strip() for line in lines if line.startswith("| d/")]

        assert chosen() == ["d/bbn", "d/ride_own"]
        assert chosen("--own") == ["d/bbn", "d/bbn_own", "d/ride_own"]
        write_recipe(recipes / "d/other.yaml", tiny, paper={"table": 5, "row": "x", "protocol": "theirs"})
        refused = reproduce(*flags)
        assert refused.code == 2
        assert "recipe d/other: paper: protocol: 'theirs' is not `own`" in refused.err


class TestVary:
    def test_recipes_whose_head_gives_the_setting_no_effect_are_left_out_too(self, tiny, tmp_path):
        """The rows of a cosine head are already normalized, so tau has no effect."""
        plain = str(write_recipe(tmp_path / "plain.yaml", tiny, method="ce"))
        cosine = str(write_recipe(tmp_path / "cosine.yaml", tiny, method="ce", head="cosine"))
        rows, warnings = of_recipes([plain, cosine]).rows([0], str(tmp_path), [], parse_varied(["tau=0,1"]))
        assert [(row.recipe, row.x) for row in rows] == [(plain, 0), (plain, 1)]
        assert warnings == [f"--vary tau: recipes that do not use it are left out: {cosine}"]

    def test_recipes_that_do_not_use_the_setting_are_left_out_and_named_once(self, tiny, tmp_path):
        names = [str(write_recipe(tmp_path / f"{name}.yaml", tiny)) for name in "ab"]
        plain = str(write_recipe(tmp_path / "plain.yaml", tiny, method="ce"))
        varied = parse_varied(["alpha=0,0.5"])
        rows, warnings = of_recipes([*names, plain]).rows([0, 1], str(tmp_path), [], varied)
        assert [(row.recipe, row.x, row.axis, row.series) for row in rows] == [
            (name, alpha, "alpha", name) for name in names for alpha in (0, 0.5)
        ]
        (warning,) = [text for text in warnings if "--vary" in text]
        assert warning == f"--vary alpha: recipes that do not use it are left out: {plain}"
        with pytest.raises(UserError, match="--vary alpha: method ce does not use it"):
            of_recipes([plain]).rows([0], str(tmp_path), [], varied)

    def test_a_setting_is_varied_only_with_those_values_of_another_that_use_it(self, tiny, tmp_path):
        recipe = str(write_recipe(tmp_path / "a.yaml", tiny))
        varied = parse_varied(["method=reslt,ce", "alpha=0,0.5"])
        rows, warnings = of_recipes([recipe]).rows([0], str(tmp_path), [], varied)
        assert [row.settings for row in rows] == [{"method": "reslt", "alpha": alpha} for alpha in (0, 0.5)]
        assert warnings == [f"--vary alpha: recipes that do not use it are left out: {recipe} (some rows)"]

    def test_a_curve_is_drawn_for_each_recipe_and_value_of_the_other_settings(self, tiny, reproduce, tmp_path, drawn):
        recipe = write_recipe(tmp_path / "a.yaml", tiny, paper={"table": 5, "row": "ResLT", "all": 45.0})
        for alpha, mixup in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
            settings = {"alpha": alpha, "mixup": mixup}
            pretend(recipe, 0, tmp_path, accuracies(1, 2, 3, 40 + alpha + mixup), settings=settings)
        flags = ("--vary", "alpha=0,0.5", "--vary", "mixup=0,1", "--output", tmp_path)
        messages = reproduce("--recipes", recipe, "--seeds", 0, *flags)
        assert messages.code == 0, messages.err
        assert (tmp_path / "reproduce/recipes/figure.png").is_file()
        (axes,) = drawn.pop().axes
        curves = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
        assert curves == [[[0, 40], [0.5, 40.5]], [[0, 41], [0.5, 41.5]]]
        assert {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"} == {45}  # the paper's
        assert axes.get_xlabel() == "alpha"
        names = {text.get_text() for text in axes.get_legend().get_texts()}
        assert names == {f"{recipe}, mixup {m}{paper}" for m in (0, 1) for paper in ("", ", paper")}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were drawn, kept instead of closed."""
    from matplotlib import pyplot

    found = []
    monkeypatch.setattr(pyplot, "close", found.append)
    return found


class TestComparison:
    def test_rows_of_a_dataset_are_compared_by_the_same_epoch(self, recipes, tiny, reproduce, tmp_path):
        """A run that starts from another run's weights has no best epoch on test, so no row is compared by that epoch."""
        for name in "ab":
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper={"table": 1, "row": name, "all": 30.0})
            folder = pretend(f"d/{name}", 0, tmp_path, accuracies(1, 2, 3, 40), best=accuracies(1, 2, 3, 50))

        def differences() -> list[float]:
            assert reproduce("--table", 1, "--seeds", 0, "--output", tmp_path).code == 0
            return pd.read_csv(tmp_path / "reproduce/table1/table.csv")["difference_all"].tolist()

        assert differences() == [20, 20]
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"best_on_test": None}))
        assert differences() == [10, 10]


class TestFigures:
    """Figures of invented results."""

    def test_figures_3_and_7_have_a_panel_per_dataset_and_a_bar_per_row(
        self, recipes, tiny, reproduce, tmp_path, drawn
    ):
        """The paper's number is a cross. Two recipes of one row are distinguished by name."""
        labels = {"a": "ResLT", "b": "variant (a)", "b_released": "variant (a)"}
        for data in "pq":
            for place, (name, label) in enumerate(labels.items()):
                row = {"figure": 3, "row": label, "series": f"data {data}"} | ({"all": 50.0} if name == "a" else {})
                write_recipe(recipes / f"{data}/{name}.yaml", tiny, paper=row)
                pretend(f"{data}/{name}", 0, tmp_path, accuracies(1, 2, 3, 40 + place))
        assert reproduce("--figure", 3, "--seeds", 0, "--output", tmp_path).code == 0
        panels = drawn.pop().axes
        assert [axes.get_title() for axes in panels] == ["data p", "data q"]
        for axes in panels:
            assert [bar.get_height() for bar in axes.patches] == [40, 41, 42]
            ticks = [" ".join(text.get_text().split()) for text in axes.get_xticklabels()]
            assert ticks == ["ResLT", "variant (a) (b)", "variant (a) (b_released)"]
            (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
            assert crosses.get_xydata().tolist() == [[0, 50]]
            assert axes.get_ylim()[0] == 0

    def test_figure_8_has_a_bar_per_shot_group(self, recipes, tiny, reproduce, tmp_path, drawn):
        paper_says = dict(zip(GROUPS, (9.0, 8.0, 7.0, 6.0), strict=True))
        for name, base in (("ce", 10), ("reslt", 20)):
            row = {"figure": 8, "row": name, "series": "net"} | (paper_says if name == "ce" else {})
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper=row)
            pretend(f"d/{name}", 0, tmp_path, accuracies(base, base + 1, base + 2, base + 3))
        assert reproduce("--figure", 8, "--seeds", 0, "--output", tmp_path).code == 0
        figure = drawn.pop()
        (axes,) = figure.axes
        assert [bar.get_height() for bar in axes.patches] == [10, 11, 12, 13, 20, 21, 22, 23]
        (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert crosses.get_ydata().tolist() == [9, 8, 7, 6]
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["ce", "reslt", "the paper"]

    def test_figure_4_has_a_panel_per_dataset_and_a_line_per_row(self, recipes, tiny, reproduce, tmp_path, drawn):
        """A method has one color in all panels, and the x axis the name that its rows state. Values of x that are not
        numbers are equally spaced."""
        for place, (series, label, x) in enumerate(
            [("p", "ResLT", 1), ("p", "ResLT", 3), ("p", "BBN", 1), ("q", "LWS", "big"), ("q", "ResLT", "small")]
        ):
            row = {"figure": 4, "row": label, "series": series, "x": x, "axis": f"size of {series}"}
            write_recipe(recipes / f"d/{place}.yaml", tiny, paper=row)
            pretend(f"d/{place}", 0, tmp_path, accuracies(1, 2, 3, 40 + place))
        assert reproduce("--figure", 4, "--seeds", 0, "--output", tmp_path).code == 0
        left, right = drawn.pop().axes
        assert [line.get_xydata().tolist() for line in left.lines if line.get_marker() == "o"] == [
            [[1, 40], [3, 41]], [[1, 42]]
        ]  # fmt: skip
        assert [text.get_text() for text in right.get_xticklabels()] == ["big", "small"]
        assert (left.get_xlabel(), right.get_xlabel()) == ("size of p", "size of q")
        colors = [
            {c.get_label(): c.lines[0].get_color() for c in axes.containers if hasattr(c, "lines")}
            for axes in (left, right)
        ]
        assert colors[0]["ResLT"] == colors[1]["ResLT"]
        assert len({*colors[0].values(), *colors[1].values()}) == 3

    def test_values_too_close_to_tell_apart_are_equally_spaced(self, recipes, tiny, reproduce, tmp_path, drawn):
        alphas = [0.0, 0.5, 0.99, 0.995, 1.0]
        write_recipe(recipes / "d/net.yaml", tiny, paper={"figure": 5, "sweep": {"alpha": alphas}})
        for alpha in alphas:
            pretend("d/net", 0, tmp_path, accuracies(1, 2, 3, 40 + alpha), settings={"alpha": alpha})
        assert reproduce("--figure", 5, "--seeds", 0, "--output", tmp_path).code == 0
        (axes,) = drawn.pop().axes
        (curve,) = [line for line in axes.lines if line.get_marker() == "o"]
        assert curve.get_xdata().tolist() == [0, 1, 2, 3, 4]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.5", "0.99", "0.995", "1"]

    def test_a_row_may_name_the_kind_of_its_figure(self, recipes, tiny, reproduce, tmp_path, drawn):
        write_recipe(recipes / "d/net.yaml", tiny, paper={"figure": 3, "row": "a", "kind": "groups"})
        pretend("d/net", 0, tmp_path, accuracies(1, 2, 3, 4))
        assert reproduce("--figure", 3, "--seeds", 0, "--output", tmp_path).code == 0
        (axes,) = drawn.pop().axes
        assert [bar.get_height() for bar in axes.patches] == [1, 2, 3, 4]
        write_recipe(recipes / "d/net.yaml", tiny, paper={"figure": 3, "row": "a", "kind": "pie"})
        refused = reproduce("--figure", 3, "--seeds", 0, "--output", tmp_path)
        assert (
            "recipe d/net: paper: kind: 'pie' is unknown; give one of lines, branches, bars, groups, clusters"
            in refused.err
        )


class TestErrorBars:
    def test_error_bars_end_at_0_and_100_percent_and_a_single_run_has_none(self):
        """90 +- 20 extends from 70 to 100, and 5 +- 8 from 0 to 13."""
        below, above = error_bars([Spread(90, 20, 3), Spread(5, 8, 3), Spread(50, np.nan, 1)])
        assert below[:2].tolist() == [20, 5]
        assert above[:2].tolist() == [10, 8]
        assert np.isnan([below[2], above[2]]).all()


class TestClusters:
    """Figure 9."""

    def test_figure_9_has_a_panel_per_row_and_number_of_classes(
        self, recipes, tiny, reproduce, tmp_path, drawn, monkeypatch
    ):
        """Panels show 10 and 20 of the 24 classes, the same for each row, with their indices. Two rows have recorded
        features, so nothing is evaluated for them; the third has no panel, since its evaluation fails."""
        monkeypatch.setattr(jobs.subprocess, "call", lambda *_, **__: 1)
        monkeypatch.setattr(jobs, "reason_of", lambda *_: "broken")
        generator, labels = np.random.default_rng(0), np.repeat(np.arange(24), 4)
        for name in ("CE", "ResLT", "broken"):
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper={"figure": 9, "row": name, "series": "data"})
            run = pretend(f"d/{name}", 0, tmp_path, accuracies(1, 2, 3, 4))
            file = tmp_path / "reproduce/figure9/features" / f"{run.name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            if name != "broken":
                features = generator.normal(size=(96, 5)).astype(np.float32)
                save_file({"features": features, "labels": labels}, file)
        messages = reproduce("--figure", 9, "--seeds", 0, "--output", tmp_path)
        assert messages.code == 0, messages.err
        assert "warning: no features of d/broken seed 0: broken" in messages.err
        panels = {axes.get_title(): axes for axes in drawn.pop().axes}
        assert list(panels) == [f"{row}, data: {n} classes" for n in (10, 20) for row in ("CE", "ResLT")]
        written = {title: [text.get_text() for text in axes.texts] for title, axes in panels.items()}
        assert written["CE, data: 10 classes"] == written["ResLT, data: 10 classes"]
        assert [len(texts) for texts in written.values()] == [10, 10, 20, 20]

    def test_features_older_than_the_result_are_recorded_again(self, tiny, tmp_path, monkeypatch):
        commands = []
        monkeypatch.setattr(jobs.subprocess, "call", lambda command, **_: commands.append(command) or 0)
        recipe = write_recipe(tmp_path / "a.yaml", tiny)
        folder = pretend(recipe, 0, tmp_path, accuracies(1, 2, 3, 4))
        run = of_recipes([str(recipe)]).rows([0], str(tmp_path), [], {})[0][0].runs[0]
        file = clusters.record_features(run, tmp_path / "features")
        assert commands[0][2:6] == ["--ckpt", str(folder), "--features", str(file)]
        file.write_bytes(b"")
        clusters.record_features(run, tmp_path / "features")
        assert len(commands) == 1
        os.utime(file, (0, 0))
        clusters.record_features(run, tmp_path / "features")
        assert len(commands) == 2

    def test_a_small_dataset_is_drawn_with_all_classes_and_at_most_100_images_of_each(self):
        labels = np.repeat([0, 1, 2], [150, 20, 5])
        assert [chosen.tolist() for chosen in clusters.choose_classes(labels)] == [[0, 1, 2]]
        features = np.random.default_rng(0).normal(size=(175, 4)).astype(np.float32)
        points, kept = clusters.embed(features, labels, np.array([0, 2]))
        assert np.bincount(kept).tolist() == [100, 0, 5]
        assert points.shape == (105, 2)
        again, _ = clusters.embed(features, labels, np.array([0, 2]))
        assert np.array_equal(points, again)


class TestSpeed:
    def test_parameters_and_time_of_a_network_equal_those_counted_by_hand(self, monkeypatch):
        """CIFAR's ResNet-20 with 4, 8 and 16 channels. The clock advances a second whenever it is read, so each batch
        takes one second and warm-up ends after the first."""
        clock = iter(range(1000))
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        config = Config.of(
            model="cifar_resnet20", model_kwargs={"channels": (4, 8, 16)}, img_size=8, method="ce", mixed_precision="no"
        )
        cost = speed.measure(config, 3)

        def block(inputs: int, outputs: int) -> int:  # two convolutions and two BatchNorms
            return 9 * inputs * outputs + 9 * outputs**2 + 4 * outputs

        stages = [block(before, width) + 2 * block(width, width) for before, width in ((4, 4), (4, 8), (8, 16))]
        assert cost.parameters == 9 * 3 * 4 + 2 * 4 + sum(stages) + 16 * 3 + 3
        assert cost.milliseconds == 1000
        assert next(clock) == 2 * (1 + speed.FEWEST_BATCHES)

    def test_the_cost_is_in_table_7_and_in_any_table_with_speed(self, recipes, tiny, reproduce, tmp_path, monkeypatch):
        """Two rows of one network share a measurement; a model that does not exist has none."""
        measured = []

        def cost_of(config, num_classes):
            measured.append((config["model"], num_classes))
            if config["model"] != "cifar_resnet20":
                raise ValueError("no such model")
            return speed.Cost(2_500_000, 3_000_000_000, 12.34)

        monkeypatch.setattr(speed, "measure", cost_of)
        for name, more in (("a", {}), ("b", {"alpha": 0.5}), ("c", {"model": "gone"})):
            rows = [{"table": 7, "row": name}, {"table": 3, "row": name}]
            write_recipe(recipes / f"d/{name}.yaml", tiny, paper=rows, **more)
            pretend(f"d/{name}", 0, tmp_path, accuracies(1, 2, 3, 4))
        flags = ("--seeds", 0, "--output", tmp_path)
        messages = reproduce("--table", 7, *flags)
        assert messages.code == 0, messages.err
        assert measured == [("cifar_resnet20", 3), ("gone", 3)]
        for text in (messages.out, (tmp_path / "reproduce/table7/table.md").read_text()):
            assert "| parameters | multiply-adds per image | ms per batch of 64 |" in unpadded(text)
            assert "| d/b | b | 2.50 M | 3.000 G | 12.3 |" in unpadded(text)
            assert "| d/c | c | n/a | n/a | n/a |" in unpadded(text)
        numbers = pd.read_csv(tmp_path / "reproduce/table7/table.csv")
        assert numbers["multiply_adds"].tolist()[:2] == [3e9, 3e9]
        assert "multiply-adds" not in reproduce("--table", 3, *flags).out
        planned = reproduce("--table", 3, *flags, "--speed", "--plan", "--images-per-second", 1)
        assert "| d/a | a | 2.50 M | 3.000 G | 12.3 |" in unpadded(planned.out)


class TestSharing:
    """Runs that begin with the same training."""

    def shared(self, names, out, varied=()) -> list:
        rows, _ = of_recipes(list(map(str, names))).rows([0], str(out), [], parse_varied(list(varied)))
        return [row.runs[0] for row in share_first_stages(rows, str(out), [])]

    def test_runs_that_differ_only_in_their_prediction_train_once(self, tiny, tmp_path):
        names = [
            write_recipe(tmp_path / f"{name}.yaml", tiny, **more)
            for name, more in (
                ("a", {}),
                ("b", {"tau": 1.0}),
                ("c", {"prior_tau": 1.0}),
                ("d", {"tau": 1.0, "lr": 0.1}),
            )
        ]
        first, second, third, other = self.shared(names, tmp_path / "out")
        assert (first.first_stage, other.first_stage) == (None, None)
        assert second.first_stage is third.first_stage is first
        last = str(first.config.run_folder / "checkpoints/last")
        assert (second.config.model.init_from, second.config.optim.epochs) == (last, 0)
        assert (second.config.method.tau, third.config.method.prior_tau) == (1.0, 1.0)
        assert [run.config.optim.epochs for run in (first, other)] == [2, 2]

    def test_a_run_that_is_already_trained_is_the_one_shared(self, tiny, tmp_path):
        names = [write_recipe(tmp_path / f"{n}.yaml", tiny, **more) for n, more in (("a", {}), ("b", {"tau": 1.0}))]
        pretend(names[1], 0, tmp_path / "out", accuracies(1, 2, 3, 4))
        first, trained = self.shared(names, tmp_path / "out")
        assert first.first_stage is trained
        assert trained.first_stage is None

    def test_a_run_that_began_with_a_shared_stage_keeps_it_when_it_is_run_alone(self, tiny, tmp_path):
        """--rows can select it alone. If its recipe has changed since, it trains by itself."""
        names = [write_recipe(tmp_path / f"{n}.yaml", tiny, **more) for n, more in (("a", {}), ("b", {"tau": 1.0}))]
        pretend(names[0], 0, tmp_path / "out", accuracies(1, 2, 3, 4))
        both = self.shared(names, tmp_path / "out")
        folder = both[1].config.run_folder
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps({"config": both[1].config.stored()}))
        (alone,) = self.shared(names[1:], tmp_path / "out")
        assert alone.config == both[1].config
        write_recipe(names[1], tiny, tau=1.0, alpha=0.5)
        (changed,) = self.shared(names[1:], tmp_path / "out")
        assert changed.config.optim.epochs == 2

    def test_stages_that_would_train_again_are_not_shared(self, tiny, tmp_path):
        """The method trains a new classifier in its last epochs."""
        recipe = write_recipe(tmp_path / "a.yaml", tiny, method="reslt_retrained")
        runs = self.shared([recipe], tmp_path / "out", ["tta=none,flip"])
        assert [run.config.optim.epochs for run in runs] == [2, 2]

    def test_a_router_starts_from_the_run_of_ride(self, tiny, tmp_path):
        """Its first stages are RIDE's; the router's own settings do not apply to them."""
        own = {"branch": None, "experts": 2}
        names = [
            write_recipe(tmp_path / f"{method}.yaml", tiny, method=method, **own) for method in ("ride", "ride_router")
        ]
        for name in names:
            name.write_text(name.read_text().replace("branch: null\n", ""))
        ride, router = self.shared(names, tmp_path / "out")
        assert router.first_stage is ride
        assert (router.config["router_topk"], router.config.optim.epochs) == (30, 0)


def test_groups_are_shown_even_if_the_paper_states_none(tiny, reproduce, tmp_path):
    recipe = write_recipe(tmp_path / "a.yaml", tiny, paper={"table": 5, "row": "ResLT", "all": 45.0})
    pretend(recipe, 0, tmp_path, accuracies(61, 52, 33, 44))
    messages = reproduce("--recipes", recipe, "--seeds", 0, "--output", tmp_path)
    assert "| 61.00 (1) | 52.00 (1) | 33.00 (1) |" in unpadded(messages.out)


@pytest.mark.slow
def test_every_figure_is_drawn_from_short_runs_on_the_digits(recipes, reproduce, run_script, tmp_path):
    """Each figure is a PNG of real results of two networks after one epoch; figure 9 is drawn from their features."""
    of_size = {"series": "digits", "x": 1}
    blocks = {3: {}, 4: of_size, 5: {"sweep": {"alpha": [0.5, 0.99]}}, 6: {}, 7: {}, 8: {}, 9: {}}
    for name, label in (("ce", "CE"), ("reslt", "ResLT")):
        rows = [{"figure": figure, "row": label, "series": "digits"} | more for figure, more in blocks.items()]
        rows = [row for row in rows if label == "ResLT" or row["figure"] not in (5, 6)]
        write_recipe(recipes / f"digits/{name}.yaml", "digits_lt", method=name, epochs=1, img_size=16, paper=rows)
    for figure in blocks:
        for row in paper_figure(figure, tmp_path):
            for run in row.runs:
                if not (run.config.run_folder / "result.json").exists():
                    assert run_script("train", *run.arguments).code == 0
        drawn = reproduce("--figure", figure, "--seeds", 0, "--output", tmp_path)
        assert drawn.code == 0, drawn.err
        png = tmp_path / f"reproduce/figure{figure}/figure.png"
        assert 3000 < png.stat().st_size < 100_000


def paper_figure(number: int, output) -> list:
    return of_the_paper("figure", number).rows([0], str(output), [], {})[0]
