"""`python -m reslt.report RUN --html FILE`: one evaluation of a run as a self-contained page, and its figures for files and
trackers."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from reslt.augment.decode import View, decode_or_reason
from reslt.config.methods import list_methods
from reslt.config.places import dataset_folder
from reslt.config.schema import DEFAULTS, Config
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import read_json, regular_file, remove, write_atomically
from reslt.core.text import one_line, shown
from reslt.data.classes import Classes
from reslt.data.datasets import Dataset, list_files, load_dataset
from reslt.data.groups import SHOTS, by_frequency
from reslt.evaluation.analysis import Analysis
from reslt.evaluation.bootstrap import LEVEL, RESAMPLES
from reslt.evaluation.plots import as_pixels, as_svg, save_png
from reslt.evaluation.predictions import SavedPredictions
from reslt.evaluation.tables import CLASS_MEAN, COLUMNS, percent
from reslt.models.finite import is_temperature
from reslt.runs.calibration import FILE as CALIBRATION
from reslt.runs.calibration import calibration_of
from reslt.runs.folder import find
from reslt.runs.summary import read_rows

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from matplotlib.figure import Figure

PREDICTIONS = "predictions.safetensors"
DOCTYPE = b"<!DOCTYPE html>\n<!-- reslt report -->"  # the beginning of a page, by which it is known
TEMPLATE = Path(__file__).with_name("report_page.html.j2")
MISTAKES, CONFUSED, POOREST, MOST_CLASSES = 24, 20, 10, 1000  # thumbnails, and rows of tables
SMALL_MATRIX = 24  # classes: a matrix of more takes the page's whole width
THUMBNAIL = 160  # pixels of the longer side, at most
SMALL = 64  # pixels: up to here a thumbnail is PNG, and is enlarged without smoothing
LONGEST_VALUE = 200  # characters of a setting
ELSEWHERE = ("data", "data_dir", "model", "method", "experiment", "output")  # settings that the page shows elsewhere
# Entries of the description of an evaluation that the page shows elsewhere.
SHOWN = {"data", "split", "images", "list_digest", "method", "model", "epoch", "classes", "row_names", "temperature"}
SHOWN |= {"all", CLASS_MEAN, "ece", "ece_calibrated"}
TEXTS = ("data", "split", "list_digest", "data_dir")  # entries of it that are texts, where they are stated
RECORDED = {
    "data_dir": str,
    "bad_images": str,
    "seed": int,
    "val_from_train": float,
    "only_shots": str,
}  # settings of `load_dataset`
CAPTIONS = {
    "classes": "Accuracy of each class over its number of training images. Lines: means of the groups.",
    "confusion": "Confusion, in percent of the true class; classes by descending number of training images.",
    "reliability": "Accuracy of the images whose prediction has this confidence, and their share. On the dashed line, "
    "confidence is right; below it, too high.",
    "loss": "Training loss.",
    "accuracy": "Accuracy of the training images as augmented, and of the evaluated lists by group.",
    "learning_rate": "Learning rate.",
}


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data: URI; if there is none, the reason."""

    source: str | None
    reason: str | None = None
    is_small: bool = False


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run's folder with saved predictions. `dataset`: the evaluated one; None if its lists are not here, for the reason
    `missing`. `stored`: the content of config.yaml; `result`: of result.json; each {} without the file. `data_dir`: the image
    root that the user named."""

    run: Path
    analysis: Analysis
    stored: dict
    result: dict
    dataset: Dataset | None
    missing: str = ""
    data_dir: Path | None = None

    @classmethod
    def read(cls, run: Path, data_dir: Path | None = None) -> ReportedRun:
        """Read a run's folder; `data_dir`: the image root, if it is not the recorded one. Raises UserError if it has no
        predictions, if a file of it is damaged, or if the training images per class are unknown."""
        file = run / PREDICTIONS
        if not run.is_dir():
            raise UserError(
                f"{run}: not a folder; give the folder of a run, which contains {PREDICTIONS}, or, to show another evaluation, "
                "DIR of evaluate.py --save-predictions --output DIR"
            )
        if not file.exists():
            raise UserError(f"{file} does not exist; write it with: python evaluate.py --ckpt {run} --save-predictions")
        predictions = SavedPredictions.read(file)
        if not all(isinstance(predictions.described.get(name, ""), (str, type(None))) for name in TEXTS):
            raise UserError(
                f"{file}: its description of the evaluation is damaged; write it again with evaluate.py --save-predictions"
            )
        stored = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
        dataset, missing = None, ""
        try:
            dataset = _evaluated_dataset(predictions, _settings(stored), data_dir)
        except UserError as fault:
            missing = str(fault)
        classes = _classes_of(run, predictions.logits.shape[1], dataset)
        analysis = Analysis(predictions, classes, _temperature(run, predictions), read_rows(run))
        return cls(run, analysis, stored, read_json(run / "result.json"), dataset, missing, data_dir)

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.run.resolve().name

    @property
    def described(self) -> dict:
        """The evaluation, as result.json describes one."""
        return self.analysis.predictions.described

    @property
    def settings(self) -> dict:
        """The run's settings; {} if they are unknown."""
        return _settings(self.stored)

    @property
    def step(self) -> int | None:
        """The step of the evaluation in the record of a tracker: its epoch, from 0; None if it is unknown."""
        epoch = self.described.get("epoch")
        return max(epoch - 1, 0) if isinstance(epoch, int) else None

    @property
    def experiment(self) -> str:
        """The name of the run in the record of a tracker: that of training, which names no place outside the folder."""
        return Path(str(self.settings.get("experiment") or "")).name or self.name

    @property
    def versions(self) -> dict:
        """The versions of packages in training, by their names."""
        return self.stored["versions"] if isinstance(self.stored.get("versions"), dict) else {}

    @property
    def paper(self) -> list[dict]:
        """The rows of the paper that the run reproduces."""
        rows = self.stored.get("paper")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def changed_settings(self) -> dict[str, str]:
        """Return {setting: value} of the settings that are not the defaults of the run's method."""
        settings = {name: value for name, value in self.settings.items() if name in DEFAULTS}
        method = settings.get("method")
        known = method if method in list_methods() else DEFAULTS["method"]  # else of a user's own module
        defaults = json.loads(json.dumps(Config.of(method=known).flat())) | {
            "mixed_precision": "no"
        }  # as a run states it
        return {
            name: shown(str(value), LONGEST_VALUE)
            for name, value in settings.items()
            if name not in ELSEWHERE and value != defaults[name]
        }

    def notes(self) -> list[str]:
        """Return what a reader must know to trust the page: the evaluation is not that of result.json, a list has changed,
        images are missing."""
        notes, described = [], self.described
        differing = [
            f"{name} {shown(str(self.result[name]))} instead of {described.get(name)}"
            for name in ("data", "split", "epoch", "list_digest")
            if name in self.result and self.result[name] != described.get(name)
        ]
        if differing:
            notes.append(
                f"This page describes the evaluation in {PREDICTIONS}; result.json is of another one: {', '.join(differing)}."
            )
        if self.analysis.temperature is None and (self.run / CALIBRATION).exists():
            fits = " --calibrate" if "weights_digest" in described else ""  # else predictions of an earlier version
            notes.append(
                f"Probabilities on this page are not calibrated: {CALIBRATION} contains no temperature that is known to be "
                f"valid for these weights and settings of prediction. Save the predictions again, with the same settings: "
                f"python evaluate.py --ckpt {shlex.quote(str(self.run))}{fits} --save-predictions"
            )
        if self.dataset is None:
            notes.append(f"The lists of the evaluated dataset cannot be read: {self.missing}")
            return notes
        split, digest = described.get("split"), described.get("list_digest")
        now = self.dataset.digests.get(split)
        if now is None or (digest is not None and now[: len(digest)] != digest):
            notes.append(
                f"{self.dataset.folder / f'{split}.txt'} has changed since the evaluation; paths and labels on this page are "
                "those of the evaluated list."
            )
        if not self.has_images:
            notes.append(
                f"The image root {self.dataset.image_root.folder} is not a folder on this machine, so images cannot be shown; "
                "name another with --data-dir DIR."
            )
        return notes

    @property
    def has_images(self) -> bool:
        """Whether the image root of the evaluated dataset is on this machine."""
        return self.dataset is not None and self.dataset.image_root.folder.is_dir()

    def thumbnail(self, image: int) -> Thumbnail:
        """Return the picture of an image of the evaluated list."""
        if not self.has_images:
            return Thumbnail(None, "the image root is not on this machine")
        path = PurePosixPath(self.path(image).replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            return Thumbnail(None, "the path leaves the image root")
        try:
            picture, reason = decode_or_reason(self.dataset.image_root.file(self.path(image)), _fitted)
        except (ValueError, UserError) as fault:  # a path that no file system has; a damaged pack
            picture, reason = None, str(fault)
        return Thumbnail(None, reason) if picture is None else _encoded(picture)

    def path(self, image: int) -> str:
        """Return the path of an image of the evaluated list, relative to the image root."""
        return "".join(self.analysis.predictions.lines[image].rsplit(maxsplit=1)[:1])


def _settings(stored: dict) -> dict:
    return stored["config"] if isinstance(stored.get("config"), dict) else {}


def _evaluated_dataset(predictions: SavedPredictions, settings: Mapping[str, object], data_dir: Path | None) -> Dataset:
    """Return the dataset that an evaluation names: the run's own, or another of that name. Raises UserError if it cannot be
    read."""
    described, own = predictions.described, settings.get("data")
    try:
        is_own = isinstance(own, str) and dataset_folder(own).resolve().name == described.get("data")
    except UserError:
        is_own = False
    data = own if is_own else str(described.get("data"))
    recorded = {
        name: settings[name] for name, kind in RECORDED.items() if is_own and isinstance(settings.get(name), kind)
    }
    if is_own and "val" in list_files(dataset_folder(data)):  # which came later than the run
        recorded.pop("val_from_train", None)
    if data_dir or described.get("data_dir"):
        recorded["data_dir"] = data_dir or described["data_dir"]
    return load_dataset(data, images_needed=False, model_classes=predictions.logits.shape[1], **recorded)


def _classes_of(run: Path, number: int, dataset: Dataset | None) -> Classes:
    """Return the classes that a run's checkpoint records, completed by those of the dataset, which a run of an earlier
    version was trained on. Raises UserError if neither is of use."""
    try:
        found = find(run).classes
    except UserError:  # its checkpoints may have been removed
        found = Classes(number)
    of_dataset = dataset.classes if dataset and "train" in dataset.lists else Classes(number)
    if found.images_per_class is None or found.shot_splits is None:
        found = of_dataset
    if found.number != number or found.images_per_class is None:
        raise UserError(
            f"{run}: the training images per class of the predictions' {number:,} classes are unknown: no checkpoint of the run "
            "records them, and its dataset is not here; restore either"
        )
    return found


def _temperature(run: Path, predictions: SavedPredictions) -> float | None:
    """Return the temperature with which predictions were saved, else the one that was fitted later for their weights and
    settings; None: not calibrated."""
    if is_temperature(stated := predictions.described.get("temperature")):
        return float(stated)
    calibration = calibration_of(run, predictions.described)
    return calibration and calibration.temperature


def _fitted(size: tuple[int, int]) -> View:
    """Return the view of a whole image of this (width, height), reduced to a thumbnail if it is larger."""
    factor = min(1.0, THUMBNAIL / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    return View((0, 0, *size), (width, height), Image.Resampling.BICUBIC)


def _encoded(picture: Image.Image) -> Thumbnail:
    is_small, content = max(picture.size) <= SMALL, io.BytesIO()
    picture.save(content, **({"format": "PNG"} if is_small else {"format": "JPEG", "quality": 80}))
    kind, text = "png" if is_small else "jpeg", base64.b64encode(content.getvalue()).decode()
    return Thumbnail(f"data:image/{kind};base64,{text}", is_small=is_small)


def require_page(file: Path) -> None:
    """Raise UserError if a file exists that is not a page, and would be replaced by one."""
    if file.exists():
        try:
            is_page = file.is_file() and regular_file(file).open("rb").read(len(DOCTYPE)) == DOCTYPE
        except OSError:
            is_page = False
        if not is_page:
            raise UserError(f"--html {file}: it exists and is not a page of this command; give another name")


def write_page(reported: ReportedRun, drawn: Mapping[str, Figure], file: Path) -> None:
    """Write the page, completely or not at all. It loads nothing from elsewhere, and is the same for the same run and file.
    `drawn`: the figures of `pictures`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls
    )
    environment.filters |= {"percent": percent}
    a = reported.analysis
    figures = {
        name: Markup(as_svg(figure, name, str(escape(CAPTIONS[name]))))  # matplotlib escapes the text in it
        for name, figure in drawn.items()
    }
    order, poorest = by_frequency(a.classes.images_per_class).tolist(), a.poorest().tolist()
    shot_of_class = np.select([a.groups["standard"][shot] for shot in SHOTS], SHOTS, "").tolist()
    mistakes, matrix_is_small = a.worst_mistakes(MISTAKES), a.classes.number <= SMALL_MATRIX
    moved = ("--data-dir", str(reported.data_dir)) if reported.data_dir else ()
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        a=a,
        reported=reported,
        described=dict.fromkeys(SHOWN) | reported.described,
        figures=figures,
        captions=CAPTIONS,
        fused=next(iter(a.tables["standard"].values())),
        is_balanced=a.accuracies.is_balanced,
        columns=[*COLUMNS, *([] if a.accuracies.is_balanced else [CLASS_MEAN])],
        rules={name: _rule_in_words(rule) for name, rule in a.classes.shot_splits.items()},
        classes=[_class_row(a, c, shot_of_class[c]) for c in order[:MOST_CLASSES]],
        poorest=[_class_row(a, c, shot_of_class[c]) for c in poorest[:POOREST]],
        confused=a.most_confused(POOREST if matrix_is_small else CONFUSED).to_dict("records"),
        matrix_is_small=matrix_is_small,
        mistakes=[(mistake, reported.thumbnail(mistake.image), reported.path(mistake.image)) for mistake in mistakes],
        wrong=int((a.predicted != a.labels).sum()),
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
    """Return text from data without control characters and undecodable bytes; markup, and other values, as they are."""
    return one_line(value) if type(value) is str else value


def _is_shown(name: str, value: object) -> bool:
    return name not in SHOWN and value is not None and not isinstance(value, (dict, list))


def _cut(name: str, value: object) -> str:
    """Return an entry of the description of an evaluation as text; of a digest, its beginning."""
    if name.endswith("_digest"):
        return str(value)[:12]
    return f"{value:.4g}" if isinstance(value, float) else shown(str(value), LONGEST_VALUE)


def _class_row(a: Analysis, c: int, shot: str) -> dict[str, object]:
    taken_for = int(a.usual_mistake[c])
    return {
        "name": a.names[c],
        "shot": shot,
        "training": int(a.classes.images_per_class[c]),
        "images": int(a.accuracies.images[c]),
        "accuracy": float(a.accuracies.per_class[0, c]),
        "taken_for": a.names[taken_for] if taken_for >= 0 else "",
    }


def _rule_in_words(rule: Mapping[str, object]) -> str:
    """Return the rule of a shot split, see `shot_groups`, in words."""
    if rule["by"] == "count":
        many, few = rule["many_above"], rule["few_below"]
        return f"many: more than {many:,} training images, medium: {few:,} to {many:,}, few: fewer than {few:,}"
    how = "along the class index" if rule["by"] == "class_index" else "from the most to the least frequent class"
    return f"many: {rule['many']:,}, medium: {rule['medium']:,}, few: {rule['few']:,} classes {how}"


def write_pictures(figures: Mapping[str, Figure], folder: Path) -> str:
    """Write figures as PNG files into a folder, which is removed if it is new and one fails. Return a line that names them."""
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
    """Add the figures of `pictures` and the numbers of `scalars` to the record of Accelerate's trackers, at a step: the
    epoch, from 0, as in the record of an epoch."""
    images = {f"report/{name}": as_pixels(figure)[None] for name, figure in drawn.items()}
    for tracker in trackers:
        tracker.log(dict(numbers), step=step)
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(images, step=step, **layout)
