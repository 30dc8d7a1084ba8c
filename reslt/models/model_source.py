"""Models named by a repository of the Hugging Face hub or by a folder: hf-hub:ORG/NAME, local-dir:FOLDER.

Their description, config.json, comes from strangers: it chooses among timm's architectures and states, as plain values,
how images are prepared. A run records these values, so that nothing that reads the run needs the hub or the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import timm

from reslt.config.checks import build, raise_all
from reslt.config.model_arguments import foreign_arguments, model_source
from reslt.config.schema import Config, ModelSettings
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.core.log import logger
from reslt.core.text import shown
from reslt.models.pretrained import INSTEAD, WEIGHTS, hub_file, weights_of

OF_IMAGES = ("img_size", "mean", "std", "interpolation", "crop_pct")
OURS = ("num_classes", "drop_rate", "drop_path_rate")  # in timm's exports; here, dataset and flags decide them
DESCRIPTION = "config.json"
EXPORTED = ("reslt_network", "reslt_experts")  # architectures that deploy/modeling_reslt.py registers when imported


def read_source(config: Config, resumed: Path | None = None) -> dict[str, object]:
    """Read the description of the model that `config` names by its source. Return settings: model, model_kwargs, and those
    of `OF_IMAGES` that `config` leaves unset. `resumed`: the folder of a run; its record is read instead if it has the same
    source.

    Raises UserError if the source has no description, or one that cannot be used."""
    name = config.model.model
    if resumed and (recorded := _recorded(resumed, config)):
        return recorded
    file = _file(name, [DESCRIPTION], "give the model's timm name instead, or its folder: --model local-dir:FOLDER")
    try:
        content = json.loads(regular_file(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"--model {name}: {file} is not readable as JSON: {fault}") from None
    stated = content.get("pretrained_cfg", content)  # older descriptions have no such part
    architecture = str(content.get("architecture")).partition(".")[0]
    if architecture in EXPORTED:
        raise UserError(
            f"--model {name}: {file} describes an export with a head that timm's models lack; continue from its run with "
            "--init-from RUN, or from a file of evaluate.py --fold"
        )
    if not timm.is_model(architecture):
        raise UserError(
            f"--model {name}: {file}: timm has no architecture {shown(architecture)!r}; only models of timm can be trained"
        )
    typed, faults = config.model.model_kwargs, []
    arguments = content.get("model_args") or {}
    if isinstance(arguments, dict):
        arguments = {key: value for key, value in arguments.items() if key not in {*OURS, *typed}}
        faults += foreign_arguments(arguments, file)
    else:
        faults.append(f"{file}: model_args: it is not a mapping")
        arguments = {}
    found = _of_images(stated, file, [key for key in OF_IMAGES if config[key] is None], faults)
    raise_all([f"--model {name}: {fault}" for fault in faults])
    if isinstance(stated, dict) and stated.get("crop_mode", "center") != "center":
        mode = shown(str(stated["crop_mode"]))
        logger.warning(
            f"--model {name}: its crop_mode {mode} is not used; images are resized and their center is cropped"
        )
    return {"model": architecture, "model_kwargs": arguments} | found


def _of_images(stated: object, file: Path, names: list[str], faults: list[str]) -> dict[str, object]:
    """Return the settings of `OF_IMAGES` in `names` that a description states. Its faults are appended to `faults`."""
    stated = dict(stated) if isinstance(stated, Mapping) else {}
    size = stated.pop("input_size", None)
    if size is not None:
        is_square = isinstance(size, list) and len(size) == 3 and size[0] == 3 and size[1] == size[2]
        if "img_size" in names and not is_square:
            faults.append(f"{file}: input_size is {shown(str(size))}, not [3, SIDE, SIDE]; give --img-size")
        stated["img_size"] = size[1] if is_square else None
    found = {key: stated[key] for key in names if stated.get(key) is not None}
    for key, value in found.items():
        values = value if key in ("mean", "std") and isinstance(value, list) else [value]
        kind = str if key == "interpolation" else int if key == "img_size" else (int, float)
        if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
            faults.append(f"{file}: {key}: {shown(str(value))} is not a plain value; give --{key.replace('_', '-')}")
    if not faults:
        faults += build(found, dict.fromkeys(found, str(file)))[1]
    return found


def _recorded(run: Path, config: Config) -> dict[str, object] | None:
    """Return the settings of `read_source` that a run recorded; None if it has another source."""
    file = run / "config.yaml"
    recorded = read_yaml(file) if file.is_file() else {}
    settings = recorded.get("config")
    if recorded.get("model_source") != config.model.model or not isinstance(settings, dict):
        return None
    names = [name for name in OF_IMAGES if config[name] is None]
    found = {name: settings[name] for name in ("model", "model_kwargs", *names) if settings.get(name) is not None}
    arguments = found.get("model_kwargs", {})
    if isinstance(arguments, dict):
        arguments = {key: value for key, value in arguments.items() if key not in config.model.model_kwargs}
    raise_all(foreign_arguments(arguments, file) + build(found, dict.fromkeys(found, str(file)))[1])
    return found | {"model_kwargs": arguments}


def with_source(config: Config, found: Mapping[str, object]) -> Config:
    """Return a configuration with the settings of `read_source` in place of the source's name. Arguments for the model that
    the user typed take precedence."""
    found = dict(found)
    found["model_kwargs"] = dict(found.get("model_kwargs", {})) | config.model.model_kwargs
    for name in ("mean", "std"):
        if name in found:
            found[name] = tuple(map(float, found[name]))
    return config.changed(**found)


def to_start_from(model: ModelSettings, source: str | None) -> ModelSettings:
    """Return the settings of the model to create at the start of a run. If they ask for pretrained weights of `source`, a
    name as the user typed it, they name the file; those of the timm model (`source` None) are fetched into a cache.

    Raises UserError if there are no such weights, within seconds if there is no network."""
    if not model.pretrained or model.pretrained_file:
        return model
    if source is None:
        weights_of(model.model)
        return model
    return replace(model, pretrained_file=str(_file(source, WEIGHTS, INSTEAD)))


def _file(source: str, names: list[str] | tuple[str, ...], remedy: str) -> Path:
    """Return the first of these files that a source has. Raises UserError, with the remedy, if it has none."""
    kind, place = model_source(source)
    if kind == "hf-hub":
        return hub_file(place, list(names), f"--model {source}", remedy)
    folder = Path(place).expanduser()
    for name in names:
        if (folder / name).is_file():
            return folder / name
    state = f"it contains no {' and no '.join(names)}" if folder.is_dir() else "there is no such folder"
    raise UserError(f"--model {source}: {state}; give a folder as timm exports it, with config.json and {WEIGHTS[0]}")
