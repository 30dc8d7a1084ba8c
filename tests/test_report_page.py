"""The report of one run: its numbers computed by hand, the page and its figures, and the page in a browser."""

import errno
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_FLAGS, make_dataset, outcome_of
from PIL import Image
from scipy.stats import binom

from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.data.datasets import load_dataset
from reslt.data.groups import STANDARD_SPLIT
from reslt.evaluation import plots
from reslt.evaluation.analysis import Analysis, pictures, scalars
from reslt.evaluation.bootstrap import bootstrap_intervals
from reslt.evaluation.confusion import confusion_matrix, macro_f1, most_confused, top_k_accuracy, usual_mistake
from reslt.evaluation.predictions import SavedPredictions
from reslt.runs import checkpoint
from reslt.runs.contents import require_replaceable
from reslt.runs.report_command import main
from reslt.runs.report_page import ReportedRun, log_pictures, write_page

NAMES = ("<script>alert(1)</script>", "$x_$", "b & c")
LABELS = np.repeat([0, 1, 2], 5).astype(np.int32)
PREDICTED = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 2, 0, 0, 0, 1], np.int32)  # 5, 3 and 1 of 5 right


def logits_of(predicted: np.ndarray, classes: int, margin: np.ndarray | float = 2.0) -> np.ndarray:
    """Return logits whose argmax is `predicted`, with a margin over all other classes."""
    return (np.eye(classes)[predicted] * np.reshape(margin, (-1, 1))).astype(np.float32)


def make_run(folder: Path, data: Path, **described) -> Path:
    """Write the folder of a run with predictions for the test list of `data`, without checkpoints."""
    lines = (data / "test.txt").read_text().splitlines()
    digest = load_dataset(str(data), images_needed=False).digests["test"][:12]
    margin = 1 + np.arange(15) / 10  # the last mistake is the most confident one
    about = {
        "data": data.name,
        "split": "test",
        "images": 15,
        "list_digest": digest,
        "method": "reslt",
        "model": "resnet50",
    }
    about |= {"epoch": 3, "row_names": ["reslt (fused)", "branch 1 (3 classes)"], "temperature": None, "seed": 0}
    rows = np.stack([PREDICTED, np.zeros(15, np.int32)])
    found = SavedPredictions(LABELS, logits_of(PREDICTED, 3, margin), rows, lines, about | described)
    folder.mkdir(parents=True)
    found.write(folder / "predictions.safetensors")
    config = {"data": str(data), "method": "reslt", "model": "resnet50", "lr": 0.025, "experiment": "made", "epochs": 3}
    stored = {"config": config, "recipe": None, "paper": [{"table": 8, "all": 52.9}], "versions": {"torch": "9.8.7"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    rows = "".join(f"{e},0.1,{4 - e},{20 * e},,,,{10 * e}\n" for e in (1, 2, 3))
    (folder / "summary.csv").write_text(
        f"epoch,lr,train_loss,train_accuracy,test_many,test_medium,test_few,test_all\n{rows}"
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a dataset whose classes have 16 (many), 8 (medium) and 4 (few) training images."""
    folder = make_dataset(tmp_path_factory.mktemp("page") / "made")
    info = {"image_root": "images", "class_names": list(NAMES)}
    info["shot_split"] = {"by": "count", "many_above": 10, "few_below": 5}
    info["paper_split"] = {"by": "rank", "many": 2, "medium": 1, "few": 0}
    (folder / "info.yaml").write_text(yaml.safe_dump(info))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", data)


@pytest.fixture(scope="module")
def analysis(run) -> Analysis:
    return ReportedRun.read(run).analysis


@pytest.fixture(scope="module")
def drawn(analysis):
    return pictures(analysis)


@pytest.fixture
def page(run, drawn, tmp_path):
    """Return a function that writes the page of a run and returns its text; its arguments are those of
    `ReportedRun.read`."""

    def written(run: Path = run, **arguments) -> str:
        write_page(ReportedRun.read(run, **arguments), drawn, tmp_path / "page.html")
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return written


def copy_of(run: Path, place: Path) -> Path:
    shutil.copytree(run, place)
    return place


class TestNumbers:
    def test_the_interval_of_an_accuracy_over_images_is_that_of_the_binomial(self):
        """If 240 of 400 images are right, resampling draws the hits from Binomial(400, .6), whatever their classes."""
        hits, images = np.array([200, 40]), np.array([250, 150])
        low, high = bootstrap_intervals(hits, images, {}, resamples=20_000)["all"]
        expected = 100 * binom.ppf([0.025, 0.975], 400, 0.6) / 400
        assert [low, high] == pytest.approx(expected, abs=0.3)  # about one image

    def test_the_interval_of_a_group_is_that_of_drawing_images(self):
        """The calculation by hand draws single images and averages over the classes that occur among them."""
        hits, images = np.array([8, 6, 1, 0]), np.array([8, 9, 1, 0])
        groups = {"few": np.array([False, True, True, True]), "none": np.array([False, False, False, True])}
        found = bootstrap_intervals(hits, images, groups, resamples=20_000, level=0.5)
        labels = np.repeat(np.arange(4), images)
        is_hit = np.concatenate([np.arange(n) < h for n, h in zip(images, hits, strict=True)])
        generator, means = np.random.default_rng(7), []
        for drawn in generator.integers(0, 18, (4000, 18)):
            class_means = [is_hit[drawn][labels[drawn] == c].mean() for c in (1, 2) if (labels[drawn] == c).any()]
            means.append(100 * np.mean(class_means) if class_means else np.nan)
        assert found["few"] == pytest.approx(np.nanpercentile(means, [25, 75]), abs=1.5)
        assert np.isnan(found["none"]).all()

    def test_an_accuracy_of_few_images_that_resampling_cannot_change_has_no_interval(self):
        """That is so if all images of a group are right, or if those of each class are all right or all wrong. With many
        images, there is an interval."""
        each = np.eye(4, dtype=bool)
        groups = {"right": each[0], "mixed": each[0] | each[1], "varied": each[1] | each[2], "large": each[3]}
        found = bootstrap_intervals(np.array([9, 0, 3, 0]), np.array([9, 8, 6, 1000]), groups)
        assert [name for name, interval in found.items() if np.isnan(interval).any()] == ["right", "mixed"]
        assert found["large"] == (0, 0)
        for hits in (0, 30):
            assert np.isnan(bootstrap_intervals(np.array([hits]), np.array([30]), {})["all"]).all()

    def test_intervals_are_reproducible_and_do_not_depend_on_how_many_counts_are_drawn_at_once(self, monkeypatch):
        hits, images = np.array([8, 3]), np.array([10, 6])
        first = bootstrap_intervals(hits, images, {"few": np.array([False, True])})
        monkeypatch.setattr("reslt.evaluation.bootstrap.COUNTS_AT_ONCE", 100)
        assert bootstrap_intervals(hits, images, {"few": np.array([False, True])}) == first

    def test_the_confusion_matrix_has_true_classes_in_rows(self):
        assert confusion_matrix(LABELS, PREDICTED, 3).tolist() == [[5, 0, 0], [2, 3, 0], [3, 1, 1]]

    def test_the_most_confused_pairs_are_listed_first_with_their_share_of_the_true_class(self):
        pairs = most_confused(LABELS, PREDICTED, 3, most=2)
        assert pairs.to_dict("list") == {
            "label": [2, 1], "predicted": [0, 0], "images": [3, 2], "share": [60.0, 40.0]
        }  # fmt: skip
        assert most_confused(LABELS, LABELS, 3, most=2).empty

    def test_the_usual_mistake_of_a_class_is_its_most_frequent_one_or_the_smallest_of_equally_frequent_ones(self):
        assert usual_mistake(LABELS, PREDICTED, 4).tolist() == [-1, 0, 0, -1]
        assert usual_mistake(np.array([0, 0, 1]), np.array([2, 1, 1]), 3).tolist() == [1, -1, -1]

    def test_macro_f1_is_the_mean_over_tested_classes(self):
        """F1 = 2 tp / (2 tp + fp + fn): 10/15, 6/9 and 2/6."""
        assert macro_f1(LABELS, PREDICTED) == pytest.approx(100 * (10 / 15 + 6 / 9 + 2 / 6) / 3)
        assert macro_f1(np.array([0, 0]), np.array([0, 2])) == pytest.approx(200 / 3)  # class 2 is not tested

    def test_among_equal_logits_the_class_with_the_smaller_index_is_ranked_first(self):
        logits = np.array([[1, 3, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
        assert [top_k_accuracy(logits, np.array([2, 1, 2]), k) for k in (1, 2, 3)] == [0, pytest.approx(200 / 3), 100]

    def test_every_row_of_every_split_has_its_accuracy_and_interval(self, analysis):
        """The fused row has 100, 60 and 20 % for classes 0, 1, 2; the branch predicts only class 0."""
        fused, branch = analysis.tables["standard"].values()
        assert [fused[c].value for c in ("many", "medium", "few", "all")] == [100, 60, 20, 60]
        assert [branch[c].value for c in ("many", "medium", "few")] == [100, 0, 0]
        assert branch["all"].value == pytest.approx(100 / 3)
        assert fused["few"].low < 20 < fused["few"].high
        assert np.isnan([fused["many"].low, fused["many"].high]).all()  # 5 images, all right
        paper = analysis.tables["paper"]["reslt (fused)"]
        assert [paper["many"].value, paper["medium"].value] == [80, 20]
        assert np.isnan([paper["few"].value, paper["few"].low]).all()

    def test_the_worst_mistakes_are_the_most_confident_ones(self, analysis):
        """The logit of the predicted class grows along the list, so that the last wrong predictions come first."""
        worst = analysis.worst_mistakes(2)
        assert [(mistake.image, mistake.label, mistake.predicted) for mistake in worst] == [(14, 2, 1), (13, 2, 0)]
        assert worst[0].confidence == pytest.approx(np.exp(2.4) / (np.exp(2.4) + 2))

    def test_a_tracker_gets_the_numbers_that_the_record_of_an_epoch_lacks(self, analysis):
        numbers = scalars(analysis)
        assert numbers["report/test_macro_f1"] == pytest.approx(55.56, abs=0.01)
        assert {"report/test_ece", "report/test_few_low", "report/test_all_high"} <= numbers.keys()
        assert "report/test_ece_calibrated" not in numbers


class Links(HTMLParser):
    """The sources that a page loads, its elements and its texts."""

    def __init__(self, text: str):
        super().__init__()
        self.sources, self.elements, self.texts = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        assert tag != "img" or dict(attributes).get("alt")

    def handle_data(self, data):
        self.texts.append(data.strip())


class TestPage:
    def test_the_page_loads_nothing_and_shows_class_names_as_text(self, page):
        links = Links(page())
        assert links.sources
        assert all(source.startswith(("#", "data:image/")) for source in links.sources)
        assert not links.elements & {"script", "link", "iframe", "object"}
        assert set(NAMES) <= set(links.texts)

    def test_the_page_states_accuracies_settings_and_origin(self, page):
        texts = Links(page()).texts
        assert {"60.0", "20.0", "0.025", "9.8.7"} <= set(texts)
        assert any("28 of 3 classes, 16 to 4 each (imbalance factor 0.25)" in text for text in texts)
        assert any("many: more than 10 training images, medium: 5 to 10, few: fewer than 5" in text for text in texts)
        assert any("table 8, all 52.9" in text for text in texts)
        assert {"too few images", "no interval: too few images"} <= set(texts)  # for class 0

    def test_the_page_states_the_command_that_writes_it(self, run, data, drawn, tmp_path):
        copy = copy_of(run, tmp_path / "it's a run")
        write_page(ReportedRun.read(copy, data / "images"), drawn, tmp_path / "my page.html")
        texts = Links((tmp_path / "my page.html").read_text()).texts
        [command] = [text for text in texts if text.startswith("python -m")]
        arguments = [str(copy), "--html", str(tmp_path / "my page.html"), "--data-dir", str(data / "images")]
        assert shlex.split(command) == ["python", "-m", "reslt.report", *arguments]

    def test_numbers_are_rounded_and_resolved_defaults_are_left_out(self, data, tmp_path):
        """Accuracies that the page shows elsewhere are not repeated with all digits."""
        run = make_run(tmp_path / "run", data, all=59.01639344262295, ece=5.12345678, tau=0.123456789)
        stored = yaml.safe_load((run / "config.yaml").read_text())
        stored["config"]["mixed_precision"] = "no"
        (run / "config.yaml").write_text(yaml.safe_dump(stored))
        reported = ReportedRun.read(run)
        assert reported.changed_settings().keys() == {"lr", "epochs"}
        write_page(reported, {}, tmp_path / "page.html")
        texts = Links((tmp_path / "page.html").read_text()).texts
        assert "0.1235" in texts
        assert not any(text.startswith(("59.01", "5.12")) for text in texts)

    def test_images_that_cannot_be_shown_are_replaced_by_the_reason(self, run, data, page, tmp_path):
        images = tmp_path / "images"
        shutil.copytree(data / "images", images)
        (images / "test/2/4.png").write_bytes(b"no image")
        (images / "test/2/3.png").unlink()
        reported = ReportedRun.read(run, data_dir=images)
        assert reported.thumbnail(14).reason.startswith("not an image of a supported format")
        assert reported.thumbnail(13).reason == "there is no such image"
        assert reported.thumbnail(12).source.startswith("data:image/png;base64,")
        text = page(data_dir=images)
        assert text.count("<img ") == 4  # of 6 mistakes
        assert "there is no such image" in text

    def test_a_large_image_is_shown_as_a_small_one(self, run, data, tmp_path):
        shutil.copytree(data / "images", tmp_path / "images")
        Image.new("RGB", (3000, 1500)).save(tmp_path / "images/test/2/4.png")
        thumbnail = ReportedRun.read(run, data_dir=tmp_path / "images").thumbnail(14)
        assert thumbnail.source.startswith("data:image/jpeg;base64,")
        assert len(thumbnail.source) < 10_000

    def test_a_path_that_leaves_the_image_root_is_not_read(self, run, tmp_path):
        copy = copy_of(run, tmp_path / "run")
        found = SavedPredictions.read(copy / "predictions.safetensors")
        lines = [*found.lines[:13], "/etc/photo.png\t2", "../../photo.png 2"]
        SavedPredictions(found.labels, found.logits, found.predicted, lines, found.described).write(
            copy / "predictions.safetensors"
        )
        reported = ReportedRun.read(copy)
        assert reported.path(13) == "/etc/photo.png"
        assert {reported.thumbnail(i).reason for i in (13, 14)} == {"the path leaves the image root"}

    def test_a_strangers_files_neither_choose_a_path_nor_end_in_a_traceback(self, run, page, tmp_path):
        copy = copy_of(run, tmp_path / "run")
        settings = yaml.safe_load((copy / "config.yaml").read_text())["config"]
        hostile = {"data_dir": 5, "seed": "x", "val_from_train": [1], "experiment": "../../elsewhere", "method": ["m"]}
        hostile |= {"lr": {"<b>": 1}}
        content = {"config": settings | hostile, "versions": 3, "paper": ["<i>", {"table": "\x1b[31m"}]}
        (copy / "config.yaml").write_text(yaml.safe_dump(content))
        assert ReportedRun.read(copy).experiment == "elsewhere"
        text = page(copy)
        assert "\x1b" not in text
        assert "&lt;b&gt;" in text
        found = SavedPredictions.read(copy / "predictions.safetensors")
        for about in ({"split": ["test"]}, {"data": 3}):
            SavedPredictions(found.labels, found.logits, found.predicted, found.lines, found.described | about).write(
                copy / "predictions.safetensors"
            )
            with pytest.raises(UserError, match="description of the evaluation is damaged"):
                ReportedRun.read(copy)

    def test_a_missing_image_root_is_stated(self, page, tmp_path):
        text = page(data_dir=tmp_path / "gone")
        assert f"The image root {tmp_path / 'gone'} is not a folder" in text
        assert "<img " not in text

    def test_a_changed_list_and_results_of_another_evaluation_are_stated(self, data, run, page, tmp_path):
        moved = tmp_path / "made"
        shutil.copytree(data, moved)
        copy = make_run(tmp_path / "run", moved)
        (copy / "result.json").write_text(json.dumps({"data": "made", "split": "val", "epoch": 2}))
        assert ReportedRun.read(run).notes() == []
        lines = (moved / "test.txt").read_text().splitlines(keepends=True)
        (moved / "test.txt").write_text("".join(lines[1:]))
        text = page(copy)
        assert "and result.json another one: split val instead of test, epoch 2 instead of 3." in text
        assert "test.txt has changed since the evaluation" in text

    def test_a_run_without_its_lists_takes_the_classes_of_its_checkpoint(self, data, page, tmp_path):
        """Without either, an error states what is missing."""
        moved = tmp_path / "made"
        shutil.copytree(data, moved)
        copy = make_run(tmp_path / "run", moved)
        classes = Classes(3, ("x", "y", "z"), np.array([300, 50, 2]), {"standard": STANDARD_SPLIT})
        shutil.rmtree(moved)
        with pytest.raises(UserError, match="training images per class of the predictions' 3 classes are unknown"):
            ReportedRun.read(copy)
        state = {"epochs_done": 3, "steps_done": 3, "config": {}, "scaler": None}
        state |= {"optimizer": {"state": {}, "param_groups": []}} | classes.stored()
        checkpoint.write(copy / "checkpoints/3-3", {"model": {"w": torch.zeros(1)}}, state)
        (copy / "checkpoints/last").write_text("3-3\n")
        reported = ReportedRun.read(copy)
        assert reported.analysis.names == ["x", "y", "z"]
        assert reported.analysis.tables["standard"]["reslt (fused)"]["few"].value == 20
        assert "The lists of the evaluated dataset cannot be read" in page(copy)

    def test_a_calibrated_evaluation_has_errors_with_and_without_its_temperature(self, data, tmp_path):
        analysis = ReportedRun.read(make_run(tmp_path / "run", data, temperature=2.5)).analysis
        assert analysis.calibration["temperature"].tolist() == [1, 2.5]
        assert analysis.confidences[14] == pytest.approx(np.exp(2.4 / 2.5) / (np.exp(2.4 / 2.5) + 2))

    @pytest.mark.parametrize("digest", [{}, {"weights_digest": "0" * 64}])
    def test_a_calibration_that_is_not_known_to_be_valid_is_stated(self, data, tmp_path, digest):
        """Predictions of earlier versions do not state their weights; those of other weights need a temperature of their
        own."""
        run = make_run(tmp_path / "the run", data, **digest)
        assert ReportedRun.read(run).notes() == []
        (run / "calibration.json").write_text('{"temperatures": []}')
        reported = ReportedRun.read(run)
        assert reported.analysis.temperature is None
        [note] = reported.notes()
        flag = "--calibrate " if digest else ""
        assert note.endswith(f"evaluate.py --ckpt '{run}' {flag}--save-predictions")


class TestFigures:
    def test_a_run_with_epochs_and_few_classes_has_all_figures(self, drawn):
        assert list(drawn) == ["classes", "reliability", "confusion", "loss", "learning_rate", "accuracy"]

    def test_more_than_fifty_classes_have_no_confusion_matrix_and_a_run_without_epochs_has_no_curves(self):
        labels = np.arange(51, dtype=np.int32)
        about = {"row_names": ["ce"], "split": "test"}
        found = SavedPredictions(labels, logits_of(labels, 51), labels[None], ["a 0"] * 51, about)
        classes = Classes(51, None, np.arange(1, 52), {"standard": STANDARD_SPLIT})
        assert list(pictures(Analysis(found, classes))) == ["classes", "reliability"]

    def test_an_svg_has_the_colors_of_the_page_and_ids_of_its_own(self, drawn):
        svg = plots.as_svg(drawn["confusion"], "confusion", "confusion matrix")
        assert svg.startswith('<svg class="figure" role="img" aria-label="confusion matrix"')
        assert plots.INK not in svg
        assert "var(--ink)" in svg
        assert svg.count(' id="') == svg.count(' id="confusion-')
        assert "&lt;script&gt;" in svg

    def test_trackers_of_accelerate_get_figures_and_numbers(self, drawn, analysis):
        def tracker(name):
            calls = []
            log = lambda values, step: calls.append(("log", values, step))  # noqa: E731
            return calls, SimpleNamespace(
                name=name, log=log, log_images=lambda values, step, **layout: calls.append((layout, values, step))
            )

        (tensorboard_calls, tensorboard), (wandb_calls, wandb) = tracker("tensorboard"), tracker("wandb")
        without_images = SimpleNamespace(name="other", log=lambda values, step: None)
        log_pictures([tensorboard, wandb, without_images], {"loss": drawn["loss"]}, scalars(analysis), 2)
        for (_, numbers, step), (layout, images, _), expected in (
            (*tensorboard_calls, {"dataformats": "NHWC"}),
            (*wandb_calls, {}),
        ):
            assert (layout, step) == (expected, 2)
            assert numbers["report/test_macro_f1"] == pytest.approx(55.56, abs=0.01)
            assert images["report/loss"].shape[::3] == (1, 3)
            assert images["report/loss"].dtype == np.uint8


class TestCommand:
    @pytest.fixture
    def report(self, capsys):
        return lambda *arguments: outcome_of(main, arguments, capsys)

    def test_page_and_figures_are_reproducible_and_may_be_overwritten_with_the_run(self, run, report, tmp_path):
        copy = copy_of(run, tmp_path / "run")
        outcome = report(copy, "--html", copy / "report.html", "--png", copy / "report")
        assert outcome.code == 0, outcome.err
        assert outcome.out.splitlines()[0] == f"{copy / 'report.html'}: the report of run"
        written = (copy / "report.html").read_text(encoding="utf-8")
        assert report(copy, "--html", copy / "report.html").code == 0
        assert (copy / "report.html").read_text(encoding="utf-8") == written
        assert Image.open(copy / "report/confusion.png").size > (400, 400)
        (copy / "predictions.safetensors").unlink()
        require_replaceable(copy)
        assert report(run, "--html", copy / "report.html").code == 0  # a page replaces a page

    def test_the_command_imports_no_large_package_before_it_can_be_interrupted(self):
        large = {"numpy", "torch", "pandas", "matplotlib", "accelerate"}
        code = f"import sys, reslt.report; sys.exit(bool({large} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0

    def test_figures_that_cannot_be_written_leave_no_new_folder(self, run, report, tmp_path, monkeypatch):
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", Mock(side_effect=full))
        (tmp_path / "own").mkdir()
        for name, remains in (("own", True), ("new", False)):
            outcome = report(run, "--png", tmp_path / name)
            assert outcome.code == 2
            assert "No space left on device" in outcome.err
            assert (tmp_path / name).exists() == remains

    def test_figures_are_added_to_the_runs_tensorboard_record(self, run, report, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        copy = copy_of(run, tmp_path / "run")
        outcome = report(copy, "--log-with", "tensorboard")
        assert outcome.out == "6 figures logged with tensorboard\n", outcome.err
        record = EventAccumulator(str(copy / "made")).Reload()
        assert "report/confusion" in record.Tags()["images"]
        assert record.Scalars("report/test_macro_f1")[0].step == 2

    def test_an_error_is_one_line_with_its_remedy(self, run, report, tmp_path, monkeypatch):
        (tmp_path / "empty").mkdir()
        own = tmp_path / "notes.html"
        own.write_text("my own")
        cases = (
            ((tmp_path / "empty", "--html", "p.html"), "python evaluate.py --ckpt"),
            ((run, run, "--html", "p.html"), "show a single run; give one folder per command"),
            ((run / "predictions.safetensors", "--png", "p"), "evaluate.py --save-predictions --output DIR"),
            ((run, "--html", own), "it exists and is not a page of this command"),
            ((run, "--png", own), "it is not a folder"),
            ((run, "--data-dir", tmp_path), "--data-dir names the images of a page"),
        )
        for arguments, message in cases:
            outcome = report(*arguments)
            assert outcome.code == 2
            assert message in outcome.err
            assert outcome.err.count("\n") == 1
        assert own.read_text() == "my own"
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "wandb is not installed; pip install wandb" in report(run, "--log-with", "wandb").err


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_errors_or_horizontal_scrolling(run, drawn, tmp_path, width, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    browser_file = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_file is None:
        pytest.skip("there is no Chromium")
    write_page(ReportedRun.read(run), drawn, tmp_path / "page.html")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = started.chromium.launch(executable_path=browser_file, args=arguments)
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        messages = []
        shown.on("console", lambda message: messages.append(message.text))
        shown.on("pageerror", lambda error: messages.append(str(error)))
        shown.goto((tmp_path / "page.html").as_uri())
        shown.evaluate("document.querySelector('details').open = true")
        assert messages == []
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert shown.evaluate("document.images.length") == 6
        tables = "[...document.querySelectorAll('table.scores')]"
        assert shown.evaluate(f"{tables}.every(table => table.scrollWidth <= table.parentElement.clientWidth)")
        ink, background = (
            shown.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, background[4:-1].split(",")))) == (scheme == "dark")
        browser.close()


def test_a_training_run_with_a_tracker_logs_the_figures_at_its_end(run_script, tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*TINY_FLAGS, "--method", "ce", "--val-from-train", "0.2", "--log-with", "tensorboard"]
    outcome = run_script("train", "--data", tiny, *flags, "--output", tmp_path, "--experiment", "logged")
    assert outcome.code == 0, outcome.err
    [events] = (tmp_path / "logged").glob("*/events.*")
    record = EventAccumulator(str(events.parent)).Reload()
    assert {"report/classes", "report/reliability", "report/confusion"} <= set(record.Tags()["images"])
    assert "report/test_macro_f1" in record.Tags()["scalars"]
    chosen = json.loads((tmp_path / "logged/result.json").read_text())["epoch"]
    assert {entry.step for entry in record.Images("report/classes")} == {chosen - 1}
