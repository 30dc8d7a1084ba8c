"""The model card of an exported folder: loading, results, calibration, data, training and classes. It states only what the run
recorded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from reslt.config.methods import unused_settings
from reslt.config.schema import DEFAULTS, PREDICTION, SECTIONS
from reslt.core.errors import UserError
from reslt.core.files import read_json
from reslt.core.text import counted, one_line
from reslt.evaluation.tables import CLASS_MEAN, COLUMNS
from reslt.models.fold import is_folded
from reslt.runs.folder import find
from reslt.runs.report import Reported

UNKNOWN = "unknown"
SHOWN_CLASSES = 1000
PIXELS = (
    "Grayscale files of 16 bits per value must be scaled to 8 bits (value // 256) before `convert`, which clips them. "
    "For the same pixels, probabilities agree with those of the suite to 1e-5. For a photo of at least twice the input "
    "size, the suite resamples only the part that the crop shows; about one value in 5,000 then differs by one level of "
    "255, and probabilities may differ by some 1e-4."
)
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
SECTIONS_STATED = ("augment", "model", "method", "optim")
# Settings of other sections that decide which images are used, and how these and the model are computed.
ALSO_STATED = ("val_from_train", "only_shots", "limit_train", "bad_images", "decode", "mixed_precision", "sync_bn")
# Stated always; other settings only if they are not defaults.
ALWAYS = ("model", "method", "epochs", "batch_size", "opt", "lr", "sched", "weight_decay", "seed")
OF_WEIGHTS = ("pretrained", "pretrained_file", "init_from")


@dataclass(frozen=True)
class Record:
    """The record of a run besides its weights; empty for a file of folded weights, which does not contain it."""

    settings: Mapping[str, object] = field(default_factory=dict)
    result: Mapping[str, object] | None = None  # of result.json, if it describes the exported epoch
    is_best: bool = False  # whether a validation list chose the exported epoch
    temperatures: Sequence[Mapping] = ()  # of calibration.json

    @classmethod
    def of(cls, place: Path, which: str | None) -> Record:
        """Read the record of a run or checkpoint. Missing or damaged files are left out."""
        if is_folded(place):
            return cls()
        found = find(place, which)
        try:
            result = Reported.read(found.run).result
        except UserError:
            result = None
        if result and (result.get("epoch") != found.epochs_done or found.weights not in (None, found.evaluated)):
            result = None  # it describes another checkpoint
        temperatures = read_json(found.run / "calibration.json").get("temperatures")
        entries = [one for one in temperatures if isinstance(one, dict)] if isinstance(temperatures, list) else []
        return cls(found.state["config"], result, found.is_best, entries)


def model_card(described: dict, record: Record, license: str | None, loading: Mapping, weights: Mapping) -> str:
    """Return the text of README.md.

    `described`: the description from `load_run` or `load_folded`; `license`: an identifier of the hub, None: unknown;
    `loading`: the 'architecture', its 'arguments', and the 'modules' (names of files) that register it; `weights`: timm's
    description of its own weights of this architecture, such as their license."""
    front = {"library_name": "timm", "pipeline_tag": "image-classification", "license": license or UNKNOWN}
    front["tags"] = ["image-classification", "timm", "long-tailed-recognition"]
    if record.result:
        front["metrics"] = ["accuracy"]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_text(described['model'])}, {described['num_classes']:,} classes",
        f"An image classifier trained with the method `{one_line(described['method'])}`"
        f"{_epoch(described)}. License: {license or 'unknown; its author has not stated one'}.",
        *_how_to_load(described, loading),
        *_results(record),
        *_calibration(described, record),
        *_data(described, record),
        *_training(record, weights),
        *_classes(described),
    ]
    return "\n\n".join(parts) + "\n"


def _epoch(described: dict) -> str:
    epoch = described.get("epoch")
    return f", after {counted(epoch, 'epoch')}" if isinstance(epoch, int) else ""


def _how_to_load(described: dict, loading: Mapping) -> list[str]:
    modules, temperature = loading["modules"], described.get("temperature")
    logits = "model(transform(image)[None])"
    logits = f"({logits} / {temperature:.6g})" if temperature else logits
    imports = "".join(f"import {name}  # {name}.py of this folder: registers the architecture\n" for name in modules)
    path = 'import sys\n\nsys.path.insert(0, "FOLDER")\n' if modules else ""
    code = f"""{path}import timm
import torch
from PIL import Image, ImageOps
{imports}
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright
with torch.inference_mode():
    probabilities = {logits}.softmax(-1)[0]
values, classes = probabilities.topk(min(5, len(probabilities)))"""
    if described.get("class_names"):
        code += (
            '\nprint([(model.pretrained_cfg["label_names"][c], p) for c, p in zip(classes.tolist(), values.tolist())])'
        )
    hub = (
        "`hf download USER/NAME --local-dir FOLDER`"
        if modules
        else '`"hf-hub:USER/NAME"` instead of `"local-dir:FOLDER"`'
    )
    files = "".join(f", and `{name}.py` of this folder" for name in modules)
    needs = f"timm and torch{files}"
    notes = [f"Loading requires {needs}, but not the suite that trained the model. From the hub: {hub}."]
    if modules:
        notes += ["Importing a file executes it: read it first."]
        if "adapters" in loading["arguments"]:
            notes += ["The blocks of the timm model contain adapters; their widths are in config.json."]
    else:
        weights = "FOLDER/model.safetensors"
        notes += [
            f"In that suite: `python train.py --model {loading['architecture']} --pretrained-file {weights} ...`."
        ]
    return ["## Use", f"```python\n{code}\n```", " ".join(notes), PIXELS]


def _results(record: Record) -> list[str]:
    result = record.result
    if not result:
        return ["## Results", "The exported checkpoint has no recorded evaluation."]
    images = f", {result['images']:,} images" if isinstance(result.get("images"), int) else ""
    how = [
        f"{_text(result.get('data', UNKNOWN))}, {_text(result['split'])} list{images}, epoch {result.get('epoch', UNKNOWN)}"
    ]
    how += ["chosen on the validation list" if record.is_best else "the last one, without a selection"]
    how += [f"{name} {result[name]}" for name in PREDICTION if result.get(name) is not None]
    parts = ["## Results", f"Accuracy in percent. {'; '.join(how)}."]
    for split, rows in result["tables"].items():
        columns = [*COLUMNS, *([CLASS_MEAN] if any(CLASS_MEAN in row for row in rows.values()) else [])]
        lines = [
            f"| {' | '.join(['', *(column.replace('_', ' ') for column in columns)])} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name, row in rows.items():
            cells = ["n/a" if row.get(column) is None else f"{row[column]:.1f}" for column in columns]
            lines.append(f"| {_text(name)} | {' | '.join(cells)} |")
        parts += [f"Shot groups: {_text(split)}.", "\n".join(lines)]
    return parts


def _calibration(described: dict, record: Record) -> list[str]:
    temperature, result = described.get("temperature"), record.result or {}
    text = "Not calibrated: probabilities are softmax(logits)."
    if temperature:
        text = (
            f"Probabilities are softmax(logits / {temperature:.6g}); the temperature is in config.json, and timm does not "
            "apply it by itself."
        )
        entry = next((one for one in record.temperatures if one.get("temperature") == temperature), {})
        if _are_numbers(entry, "ece_before", "ece_after"):
            text += (
                f" It was fitted on the {_text(entry.get('list', UNKNOWN))} list of {_text(entry.get('data', UNKNOWN))} "
                f"({entry.get('images', UNKNOWN)} images); there, the expected calibration error is "
                f"{entry['ece_before']:.1f} % without it and {entry['ece_after']:.1f} % with it."
            )
    if _are_numbers(result, "ece"):
        text += f" On the list of the results above, the expected calibration error is {result['ece']:.1f} %"
        if temperature and result.get("temperature") == temperature and _are_numbers(result, "ece_calibrated"):
            text += f", and {result['ece_calibrated']:.1f} % with the temperature"
        text += "."
    return ["## Calibration", text]


def _are_numbers(entries: Mapping, *names: str) -> bool:
    return all(isinstance(entries.get(name), (int, float)) for name in names)


def _data(described: dict, record: Record) -> list[str]:
    name, counts = record.settings.get("data"), described.get("images_per_class")
    lines = [
        f"- dataset: {_text(Path(str(name)).name) if name else UNKNOWN}",
        f"- classes: {described['num_classes']:,}",
    ]
    if counts:
        lines += [f"- training images: {sum(counts):,}, {max(counts):,} to {min(counts):,} per class"]
        lines += [f"- imbalance factor (fewest / most): {min(counts) / max(counts):.4g}"]
    if shots := record.settings.get("only_shots"):
        lines += [f"- trained only on the images of the {_text(str(shots))} classes"]
    if share := record.settings.get("val_from_train"):
        lines += [f"- validation list: a share of {share:g} of each class, not among these images"]
    size = described["img_size"]
    lines += [f"- input: {size} x {size} pixels, {described['interpolation']}, crop {described['crop_pct']:.4g}"]
    lines += [f"- mean {_numbers(described['mean'])}, standard deviation {_numbers(described['std'])}"]
    return ["## Data", "\n".join(lines), "License and origin of the images are unknown to this export."]


def _training(record: Record, weights: Mapping) -> list[str]:
    settings = record.settings
    if not settings:
        return ["## Training", "The model was exported from a file of folded weights, which records no settings."]
    unused = unused_settings(settings) | {*OF_WEIGHTS, "teachers"}
    stated = [f.name for section in SECTIONS_STATED for f in dataclasses.fields(SECTIONS[section])]
    stated += ALSO_STATED
    stated = [name for name in stated if name in settings and name not in unused]
    stated = [name for name in stated if name in ALWAYS or _plain(settings[name]) != _plain(DEFAULTS[name])]
    stated += [name for name in ALWAYS if name in settings and name not in stated]
    begun = [f"{name} {_value(Path(str(settings[name])).name)}" for name in OF_WEIGHTS if settings.get(name)]
    lines = [f"- {name}: {_value(settings[name])}" for name in stated]
    if teachers := settings.get("teachers"):
        lines += [f"- teachers: {', '.join(_value(Path(str(name)).name) for name in teachers)}"]
    lines += [f"- initial weights: {', '.join(begun) if begun else 'random'}"]
    if settings.get("pretrained") and not settings.get("pretrained_file"):
        lines += [f"- license of the initial weights, according to timm: {_text(weights.get('license') or UNKNOWN)}"]
    return ["## Training", "Settings, without defaults:", "\n".join(lines)]


def _classes(described: dict) -> list[str]:
    names, counts = described.get("class_names"), described.get("images_per_class")
    if not names:
        return ["## Classes", "The classes have no names: outputs are numbered as the labels of the training list."]
    if len(names) > SHOWN_CLASSES:
        return ["## Classes", f"{len(names):,} classes; their names are `label_names` in config.json."]
    lines = ["| output | class | training images |", "|---|---|---|"]
    for number, name in enumerate(names):
        lines.append(f"| {number} | {_text(name)} | {f'{counts[number]:,}' if counts else UNKNOWN} |")
    return ["## Classes", "\n".join(lines)]


def _text(text: object) -> str:
    """Return text from data in one line, escaped for Markdown."""
    return MARKDOWN.sub(r"\\\1", one_line(text))


def _plain(value: object) -> object:
    """Return a value as JSON stores it."""
    return list(value) if isinstance(value, tuple) else value


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _text(_numbers(value) if isinstance(value, (list, tuple)) else value)


def _numbers(values: object) -> str:
    return ", ".join(f"{v:.4g}" if isinstance(v, (int, float)) else str(v) for v in values)
