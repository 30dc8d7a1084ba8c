"""`python -m reslt.report RUN --html FILE`: one evaluation of a run as a self-contained page, and its figures as files and in
trackers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reslt.core.errors import UserError
from reslt.core.files import regular_file, remove, write_atomically
from reslt.core.text import one_line, shown
from reslt.data.groups import SHOTS, by_frequency
from reslt.evaluation.analysis import Analysis
from reslt.evaluation.bootstrap import LEVEL, RESAMPLES
from reslt.evaluation.plots import as_pixels, as_svg, save_png
from reslt.evaluation.tables import CLASS_MEAN, COLUMNS, percent
from reslt.runs.reported_run import LONGEST_VALUE, ReportedRun

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from matplotlib.figure import Figure

DOCTYPE = b"<!DOCTYPE html>\n<!-- reslt report -->"  # the beginning of each page, which identifies it
TEMPLATE = Path(__file__).with_name("report_page.html.j2")
MISTAKES, CONFUSED, POOREST, MOST_CLASSES = 24, 20, 10, 1000  # thumbnails, and rows of tables
SMALL_MATRIX = 24  # classes: the matrix of more classes takes the whole width of the page
# Entries of the description of an evaluation that the page shows elsewhere.
SHOWN = {"data", "split", "images", "list_digest", "method", "model", "epoch", "classes", "row_names", "temperature"}
SHOWN |= {"all", CLASS_MEAN, "ece", "ece_calibrated"}
CAPTIONS = {
    "classes": "Accuracy of each class over its number of training images. Lines: means of the groups.",
    "confusion": "Confusion, in percent of the true class; classes by descending number of training images.",
    "reliability": "Accuracy of images by the confidence of their prediction, and their share. On the dashed line, "
    "confidence is right; below it, confidence is too high.",
    "loss": "Training loss.",
    "accuracy": "Accuracy of the training images as augmented, and of the evaluated lists by group.",
    "learning_rate": "Learning rate.",
}


def require_page(file: Path) -> None:
    """Raise UserError if `file` exists and is not a page, so that a page would replace it."""
    if file.exists():
        try:
            is_page = file.is_file() and regular_file(file).open("rb").read(len(DOCTYPE)) == DOCTYPE
        except OSError:
            is_page = False
        if not is_page:
            raise UserError(f"--html {file}: it exists and is not a page of this command; give another name")


def write_page(reported: ReportedRun, drawn: Mapping[str, Figure], file: Path) -> None:
    """Write the page, completely or not at all. It loads nothing from elsewhere, and is the same for the same run and file.
    `drawn`: the figures that `pictures` returns."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls
    )
    environment.filters |= {"percent": percent}
    analysis = reported.analysis
    figures = {
        name: Markup(as_svg(figure, name, str(escape(CAPTIONS[name]))))  # matplotlib escapes the text in it
        for name, figure in drawn.items()
    }
    order, poorest = by_frequency(analysis.classes.images_per_class).tolist(), analysis.poorest().tolist()
    shot_of_class = np.select([analysis.groups["standard"][shot] for shot in SHOTS], SHOTS, "").tolist()
    mistakes, matrix_is_small = analysis.worst_mistakes(MISTAKES), analysis.classes.number <= SMALL_MATRIX
    moved = ("--data-dir", str(reported.data_dir)) if reported.data_dir else ()
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        analysis=analysis,
        reported=reported,
        described=dict.fromkeys(SHOWN) | reported.described,
        figures=figures,
        captions=CAPTIONS,
        fused=next(iter(analysis.tables["standard"].values())),
        is_balanced=analysis.accuracies.is_balanced,
        columns=[*COLUMNS, *([] if analysis.accuracies.is_balanced else [CLASS_MEAN])],
        rules={name: _rule_in_words(rule) for name, rule in analysis.classes.shot_splits.items()},
        classes=[_class_row(analysis, c, shot_of_class[c]) for c in order[:MOST_CLASSES]],
        poorest=[_class_row(analysis, c, shot_of_class[c]) for c in poorest[:POOREST]],
        confused=analysis.most_confused(POOREST if matrix_is_small else CONFUSED).to_dict("records"),
        matrix_is_small=matrix_is_small,
        mistakes=[(mistake, reported.thumbnail(mistake.image), reported.path(mistake.image)) for mistake in mistakes],
        wrong=int((analysis.predicted != analysis.labels).sum()),
        level=f"{100 * LEVEL:g} %",
        resamples=RESAMPLES,
        SHOTS=SHOTS,
        command=shlex.join(["python", "-m", "reslt.report", str(reported.run), "--html", str(file), *moved]),
        other_settings={
            name: _cut(name, value) for name, value in reported.described.items() if _is_shown(name, value)
        },
    )
    write_atomically(file, text)


def _without_controls(value: object) -> object:
    """Return text from data without control characters and undecodable bytes; markup and other values unchanged."""
    return one_line(value) if type(value) is str else value


def _is_shown(name: str, value: object) -> bool:
    return name not in SHOWN and value is not None and not isinstance(value, (dict, list))


def _cut(name: str, value: object) -> str:
    """Return an entry of the description of an evaluation as text; digests are shortened."""
    if name.endswith("_digest"):
        return str(value)[:12]
    return f"{value:.4g}" if isinstance(value, float) else shown(str(value), LONGEST_VALUE)


def _class_row(analysis: Analysis, number: int, shot: str) -> dict[str, object]:
    """Return a row of a table of classes. `number`: the index of the class; `shot`: its group."""
    taken_for = int(analysis.usual_mistake[number])
    return {
        "name": analysis.names[number],
        "shot": shot,
        "training": int(analysis.classes.images_per_class[number]),
        "images": int(analysis.accuracies.images[number]),
        "accuracy": float(analysis.accuracies.per_class[0, number]),
        "taken_for": analysis.names[taken_for] if taken_for >= 0 else "",
    }


def _rule_in_words(rule: Mapping[str, object]) -> str:
    """Return the rule of a shot split (see `shot_groups`) in words."""
    if rule["by"] == "count":
        many, few = rule["many_above"], rule["few_below"]
        return f"many: more than {many:,} training images, medium: {few:,} to {many:,}, few: fewer than {few:,}"
    how = "along the class index" if rule["by"] == "class_index" else "from the most to the least frequent class"
    return f"many: {rule['many']:,}, medium: {rule['medium']:,}, few: {rule['few']:,} classes {how}"


def write_pictures(figures: Mapping[str, Figure], folder: Path) -> str:
    """Write figures as PNG files into a folder, and return a line that names them. If one fails, a new folder is removed."""
    is_new = not folder.exists()
    try:
        for name, figure in figures.items():
            save_png(figure, folder / f"{name}.png")
    except BaseException:  # a full disk, or Ctrl-C
        if is_new:
            remove(folder)
        raise
    return f"{', '.join(f'{name}.png' for name in figures)} are in {folder}"


def log_pictures(
    trackers: Iterable[GeneralTracker], drawn: Mapping[str, Figure], numbers: Mapping[str, float], step: int | None
) -> None:
    """Add the figures of `pictures` and the numbers of `scalars` to the record of Accelerate's trackers. `step`: the epoch,
    from 0, as in the record of an epoch."""
    images = {f"report/{name}": as_pixels(figure)[None] for name, figure in drawn.items()}
    for tracker in trackers:
        tracker.log(dict(numbers), step=step)
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(images, step=step, **layout)
