"""A run's folder with saved predictions, as its report shows it: numbers, notes for the reader, and thumbnails."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from reslt.augment.decode import View, decode_or_reason
from reslt.config.methods import list_methods
from reslt.config.places import dataset_folder
from reslt.config.schema import DEFAULTS, Config
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import read_json
from reslt.core.text import shown
from reslt.data.classes import Classes
from reslt.data.datasets import Dataset, list_files, load_dataset
from reslt.evaluation.analysis import Analysis
from reslt.evaluation.predictions import SavedPredictions
from reslt.models.finite import is_temperature
from reslt.runs.calibration import FILE as CALIBRATION
from reslt.runs.calibration import calibration_of
from reslt.runs.folder import find
from reslt.runs.summary import read_rows

PREDICTIONS = "predictions.safetensors"
THUMBNAIL = 160  # pixels of the longer side, at most
SMALL = 64  # pixels: up to here a thumbnail is PNG, and is enlarged without smoothing
LONGEST_VALUE = 200  # characters of a setting
ELSEWHERE = ("data", "data_dir", "model", "method", "experiment", "output")  # settings that the page shows elsewhere
TEXTS = ("data", "split", "list_digest", "data_dir")  # entries of the description of an evaluation that must be texts
RECORDED = {  # settings of `load_dataset`, with their types
    "data_dir": str,
    "bad_images": str,
    "seed": int,
    "val_from_train": float,
    "only_shots": str,
}


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data: URI, or the reason why there is none."""

    source: str | None
    reason: str | None = None
    is_small: bool = False


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run's folder with saved predictions. `dataset`: the evaluated one, None if its lists cannot be read, for the reason
    `missing`; `stored`, `result`: the contents of config.yaml and result.json, {} without the file; `data_dir`: the image
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
        """Read a run's folder. `data_dir`: the image root, if it is not the recorded one. Raises UserError if the folder has
        no predictions, if a file in it is damaged, or if the training images per class are unknown."""
        file = run / PREDICTIONS
        if not run.is_dir():
            raise UserError(
                f"{run}: not a folder; give the folder of a run, which contains {PREDICTIONS}, or, to show another "
                "evaluation, DIR of evaluate.py --save-predictions --output DIR"
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
        """The name of the run's folder."""
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
        """The step of the evaluation in the record of a tracker, its epoch from 0; None if unknown."""
        epoch = self.described.get("epoch")
        return max(epoch - 1, 0) if isinstance(epoch, int) else None

    @property
    def experiment(self) -> str:
        """The name of the run in the record of a tracker, as in training; never a path, which could leave the folder."""
        return Path(str(self.settings.get("experiment") or "")).name or self.name

    @property
    def versions(self) -> dict:
        """{package: version} in training; {} if unknown."""
        return self.stored["versions"] if isinstance(self.stored.get("versions"), dict) else {}

    @property
    def paper(self) -> list[dict]:
        """The rows of the paper that the run reproduces; [] if there are none."""
        rows = self.stored.get("paper")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def changed_settings(self) -> dict[str, str]:
        """Return {setting: value} of the settings that differ from the defaults of the run's method."""
        settings = {name: value for name, value in self.settings.items() if name in DEFAULTS}
        method = settings.get("method")
        known = method if method in list_methods() else DEFAULTS["method"]  # a user's own module may have registered it
        defaults = json.loads(json.dumps(Config.of(method=known).flat()))
        defaults["mixed_precision"] = "no"  # a run states what "unset" became
        return {
            name: shown(str(value), LONGEST_VALUE)
            for name, value in settings.items()
            if name not in ELSEWHERE and value != defaults[name]
        }

    def notes(self) -> list[str]:
        """Return the warnings that a reader of the page needs: the evaluation is not that of result.json, probabilities are
        not calibrated, a list has changed, or images are missing."""
        notes, described = [], self.described
        differing = [
            f"{name} {shown(str(self.result[name]))} instead of {described.get(name)}"
            for name in ("data", "split", "epoch", "list_digest")
            if name in self.result and self.result[name] != described.get(name)
        ]
        if differing:
            notes.append(
                f"This page describes the evaluation in {PREDICTIONS}, and result.json another one: {', '.join(differing)}."
            )
        if self.analysis.temperature is None and (self.run / CALIBRATION).exists():
            # Predictions without the digest were saved by an earlier version.
            fits = " --calibrate" if "weights_digest" in described else ""
            notes.append(
                f"Probabilities on this page are not calibrated: {CALIBRATION} contains no temperature for these weights and "
                f"settings of prediction. Save the predictions again, with the same settings: "
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
                f"The image root {self.dataset.image_root.folder} is not a folder on this machine, so no images are shown; "
                "name another with --data-dir DIR."
            )
        return notes

    @property
    def has_images(self) -> bool:
        """Whether the image root of the evaluated dataset is on this machine."""
        return self.dataset is not None and self.dataset.image_root.folder.is_dir()

    def thumbnail(self, image: int) -> Thumbnail:
        """Return the thumbnail of an image. `image`: its place in the evaluated list."""
        if not self.has_images:
            return Thumbnail(None, "the image root is not on this machine")
        path = PurePosixPath(self.path(image).replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            return Thumbnail(None, "the path leaves the image root")
        try:
            picture, reason = decode_or_reason(self.dataset.image_root.file(self.path(image)), _fitted)
        except (ValueError, UserError) as fault:  # a path that is invalid on any file system, or a damaged pack
            picture, reason = None, str(fault)
        return Thumbnail(None, reason) if picture is None else _encoded(picture)

    def path(self, image: int) -> str:
        """Return the path of an image relative to the image root. `image`: its place in the evaluated list."""
        return "".join(self.analysis.predictions.lines[image].rsplit(maxsplit=1)[:1])


def _settings(stored: dict) -> dict:
    return stored["config"] if isinstance(stored.get("config"), dict) else {}


def _evaluated_dataset(predictions: SavedPredictions, settings: Mapping[str, object], data_dir: Path | None) -> Dataset:
    """Return the dataset that an evaluation names: that of the run, or another of that name. Raises UserError if it cannot
    be read."""
    described, own = predictions.described, settings.get("data")
    try:
        is_own = isinstance(own, str) and dataset_folder(own).resolve().name == described.get("data")
    except UserError:
        is_own = False
    data = own if is_own else str(described.get("data"))
    recorded = {
        name: settings[name] for name, kind in RECORDED.items() if is_own and isinstance(settings.get(name), kind)
    }
    if is_own and "val" in list_files(dataset_folder(data)):  # val.txt was added after the run
        recorded.pop("val_from_train", None)
    if data_dir or described.get("data_dir"):
        recorded["data_dir"] = data_dir or described["data_dir"]
    return load_dataset(data, images_needed=False, model_classes=predictions.logits.shape[1], **recorded)


def _classes_of(run: Path, number: int, dataset: Dataset | None) -> Classes:
    """Return the classes that the checkpoint of a run records, or, if it is missing or of an earlier version, those of the
    dataset. Raises UserError if neither has the training images per class."""
    try:
        found = find(run).classes
    except UserError:  # the checkpoints may have been removed
        found = Classes(number)
    of_dataset = dataset.classes if dataset and "train" in dataset.lists else Classes(number)
    if found.images_per_class is None or found.shot_splits is None:
        found = of_dataset
    if found.number != number or found.images_per_class is None:
        raise UserError(
            f"{run}: the training images per class of the predictions' {number:,} classes are unknown: no checkpoint of the "
            "run records them, and its dataset cannot be read; restore one of them"
        )
    return found


def _temperature(run: Path, predictions: SavedPredictions) -> float | None:
    """Return the temperature with which the predictions were saved, else one that was fitted later for the same weights and
    settings; None: not calibrated."""
    if is_temperature(stated := predictions.described.get("temperature")):
        return float(stated)
    calibration = calibration_of(run, predictions.described)
    return calibration and calibration.temperature


def _fitted(size: tuple[int, int]) -> View:
    """Return the view of a whole image of (width, height) `size`, reduced if it is larger than a thumbnail."""
    factor = min(1.0, THUMBNAIL / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    return View((0, 0, *size), (width, height), Image.Resampling.BICUBIC)


def _encoded(picture: Image.Image) -> Thumbnail:
    is_small, content = max(picture.size) <= SMALL, io.BytesIO()
    picture.save(content, **({"format": "PNG"} if is_small else {"format": "JPEG", "quality": 80}))
    kind, text = "png" if is_small else "jpeg", base64.b64encode(content.getvalue()).decode()
    return Thumbnail(f"data:image/{kind};base64,{text}", is_small=is_small)
