"""Settings combined from their sources: built-in defaults < the method's own < the dataset's `defaults:` < recipe < flags.

A setting that the chosen method does not use is a fault if it is clearly intended: given as a flag, or stated in a recipe
that also states the method. Elsewhere it is ignored."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reslt.config.checks import NOT_IN_A_DATASET, batch_faults, build, file_faults, missing_init_faults, raise_all
from reslt.config.command_line import key_values, load_typed_imports, train_parser, unknown_arguments
from reslt.config.imports import naming_imports, recorded_imports
from reslt.config.methods import METHODS, PARTS_OF_A_METHOD, unused_settings
from reslt.config.model_arguments import describes_architecture, model_source
from reslt.config.parts import OF_STAGES, users_of
from reslt.config.places import dataset_folder
from reslt.config.recipes import is_recipe_file, read_recipe
from reslt.config.schema import DEFAULTS, FIELDS, TUNE_DEFAULTS, Config, flag_of
from reslt.config.stages import stages_of
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.ranks import is_main_process

PRETRAINED = ("pretrained", "pretrained_file")


@dataclass
class Resolved:
    """A configuration with its context: the recipe's name, the paper's rows, warnings to print once."""

    config: Config
    recipe: str | None = None
    paper: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resolve(arguments: list[str], ignore_unused: bool = False) -> Resolved:
    """Import the modules that `--import` names, and return the checked configuration of these command-line arguments. Raises
    one UserError that lists every fault.

    `ignore_unused`: ignore flags that the method does not use, and missing teachers, for a command that passes its flags to
    many runs and adds the teachers itself."""
    load_typed_imports(arguments, "train.py")
    given, unknown = train_parser().parse_known_args(arguments)
    flags, faults = vars(given), unknown_arguments(unknown)
    recipe_name = flags.pop("recipe", None)
    with naming_imports(recorded_imports(_resumed_run(flags))):
        config, stated, paper = _combine(flags, recipe_name, faults, ignore_unused)
    if config.optim.epochs == 0 and config.model.init_from is None:
        raise UserError(
            "--epochs 0: without a first stage, trained weights are required; give them with --init-from RUN"
        )
    if config.method.described.taught_by and config.model.teachers is None and not ignore_unused:
        raise UserError(
            f"--method {config.method.method}: give its teachers with --teachers MANY MEDIUM FEW, three runs of --method "
            f"{config.method.described.taught_by} --only-shots many, medium and few (`python -m reslt.reproduce` trains them "
            "itself)"
        )
    raise_all(batch_faults(config, int(os.environ.get("WORLD_SIZE", "1"))))

    if config.run.mixed_precision is None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in FIELDS["mixed_precision"].metadata["choices"]:
            raise UserError(f"accelerate launch --mixed_precision {launched}: this suite trains with no, bf16 or fp16")
        config = config.changed(mixed_precision=launched)
    if config.run.experiment is None:
        config = config.changed(experiment=f"{_stem(config, recipe_name)}-seed{config.run.seed}")
    _check_run_folder(config)
    paper = [] if config.data.only_shots else paper  # it states no numbers for a part of the classes
    return Resolved(config, recipe_name, paper, _surprises(config, flags, stated))


def _check_run_folder(config: Config) -> None:
    """Raise UserError if the run would overwrite another one, or the weights that it starts from."""
    folder = config.run_folder
    has_run, has_checkpoints = (folder / "config.yaml").exists(), any((folder / "checkpoints").glob("[0-9]*-*"))
    # Only the main process checks: the others would see the folder that it has just created.
    is_new = not config.run.resume and is_main_process()
    if is_new and has_run and not config.run.overwrite:
        raise UserError(
            f"{folder} already contains a run; continue it with --resume auto, replace it with --overwrite, or start "
            "another with --experiment NAME"
        )
    if is_new and not has_run and has_checkpoints:
        raise UserError(
            f"{folder} contains checkpoints, but no config.yaml: they may be another run's; start this one with "
            "--experiment NAME, or move that folder away (--resume auto continues from them if their settings match)"
        )
    source = config.model.init_from
    if source and config.run.overwrite and Path(source).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"init_from: {source} is in the run that --overwrite replaces; start another with --experiment NAME"
        )
    if config.run.resume and not has_checkpoints:  # the run starts from the beginning
        raise_all(missing_init_faults(config.model))


def _resumed_run(flags: dict) -> Path | None:
    """Return the folder of the run to resume if the flags alone name it, else None."""
    resume = flags.get("resume", "none")
    if resume != "auto":
        return None if resume == "none" else Path(resume)
    return Path(flags.get("output", DEFAULTS["output"])) / flags["experiment"] if "experiment" in flags else None


def configure(flags: dict) -> Config:
    """Combine flags (names and values as in a recipe) with the dataset's defaults, for use without training."""
    return _combine(dict(flags), None, [], ignore_unused=True)[0]


def raise_for_unused(names: Iterable[str], values: Mapping[str, object]) -> None:
    """Raise UserError for settings, given as flags, that a method does not use; `values`: the method and its parts."""
    raise_all(_unused_faults(unused_settings(values).intersection(names), values, None))


def _combine(
    flags: dict, recipe_name: str | None, faults: list[str], ignore_unused: bool
) -> tuple[Config, dict, list[dict]]:
    """Combine all sources. Return the configuration, the settings that info.yaml and the recipe state, and the paper's rows.

    Raises one UserError that lists every fault, including the given `faults`."""
    paper, recipe = [], {}
    if recipe_name is not None:
        recipe, paper, more = read_recipe(recipe_name)
        faults += more
        if not {"data"} & {*recipe, *flags} and not is_recipe_file(recipe_name):
            faults.append(f"recipe {recipe_name}: it is for any dataset; name one with --data NAME")

    data = str(flags.get("data", recipe.get("data", DEFAULTS["data"])))
    defaults, info = {}, None
    try:
        info = dataset_folder(data) / "info.yaml"
    except UserError as fault:
        faults.append(str(fault))
    else:
        defaults, more = _dataset_defaults(info, flags.get("model", recipe.get("model")))
        faults += more
    for name in ("model_kwargs", "part_kwargs"):
        if name in flags:
            flags[name], more = key_values(flags[name], name)
            faults += more

    parts = _chosen_parts(defaults, recipe, flags)
    method, unused = parts["method"], unused_settings(parts)
    own = METHODS[method].defaults if isinstance(method, str) and method in METHODS else {}  # `build` reports others
    if not ignore_unused:
        faults += _unused_faults(flags.keys() & unused, parts, None)
    if "method" in recipe and not flags.keys() & {"method", *PARTS_OF_A_METHOD}:
        faults += _unused_faults(recipe.keys() & unused, parts, recipe_name)

    tune = flags.get("tune", recipe.get("tune", defaults.get("tune")))
    of_tune = TUNE_DEFAULTS.get(tune, {}) if isinstance(tune, str) else {}
    layers = [
        (f"method {method}", own),
        (f"--tune {tune}", of_tune),
        (str(info), defaults),
        (f"recipe {recipe_name}", recipe),
        (None, flags),
    ]
    replaced = PRETRAINED if flags.get("init_from", "none") != "none" else ()  # if a file states them
    values, where = {}, {}
    for source, layer in layers:
        for name, value in layer.items():
            if name in FIELDS and name not in unused and not (name in replaced and source):
                if isinstance(value, dict) and isinstance(values.get(name), dict):
                    value = values[name] | value  # a later source replaces single arguments
                values[name], where[name] = value, source or flag_of(name)
    for name in PARTS_OF_A_METHOD:
        if values.get(name) is not None and name not in parts:  # a later source has replaced this part's method
            del values[name], where[name]
    config, more = build(values, where)
    if not ignore_unused:
        typed = [name for name in config.without_effect if flags.get(name, "none") not in ("none", None)]
        more += [f"{flag_of(name)}: {config.without_effect[name]}; leave it out" for name in typed]
    raise_all(faults + more)
    return config, {**defaults, **recipe}, paper


def _chosen_parts(*layers: dict) -> dict[str, object]:
    """Return the method and the parts, including a second sampler, that the sources state; later sources override earlier
    ones. A source that states another method also discards the parts of earlier sources."""
    chosen = {"method": DEFAULTS["method"]}
    for layer in layers:
        if layer.get("method", chosen["method"]) != chosen["method"]:
            chosen = {"method": layer["method"]}
        stated = {name: layer[name] for name in (*PARTS_OF_A_METHOD, "second_sampler") if name in layer}
        chosen |= {name: "off" if value is False else value for name, value in stated.items()}  # as YAML reads it
    return chosen


def _unused_faults(names: Iterable[str], chosen: Mapping[str, object], recipe_name: str | None) -> list[str]:
    """Return a fault for each of these settings, which the `chosen` method and parts do not use. `recipe_name`: the recipe
    that states them; None: flags."""
    faults = []
    for name in sorted(names):
        where = f"recipe {recipe_name}: {name}" if recipe_name else flag_of(name)
        users = users_of(name)
        stated = [f"{flag_of(kind)} {chosen[kind]}" for kind in users if chosen.get(kind) not in (None, "none")]
        subject = stated[0] if stated else f"method {chosen['method']}"
        faults.append(f"{where}: {subject} does not use it ({_users_text(name, users)} does); leave it out")
    return faults


def _users_text(setting: str, users: Mapping[str, list[str]]) -> str:
    """Return the users of a setting as text: '--cost focal or sigmoid_focal'."""
    if setting in OF_STAGES:
        return "a method with a second stage"
    texts = [
        f"{flag_of(kind)} {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}"
        for kind, names in users.items()
    ]
    return " or ".join(texts) or "a part of a module given with --import"


def _stem(config: Config, recipe_name: str | None) -> str:
    """Return the name of a run without its seed: the recipe's; data, model and recipe for a recipe for any dataset; data,
    model and method without a recipe."""
    if recipe_name is None:
        stem = f"{_names_of(config)}-{config.method.method}"
    elif is_recipe_file(recipe_name):
        stem = Path(recipe_name).with_suffix("").as_posix()
    else:
        stem = recipe_name if "/" in recipe_name else f"{_names_of(config)}-{recipe_name}"
    return stem.strip("/").replace("/", "-")


def _names_of(config: Config) -> str:
    """Return the names of dataset and model, for a folder's name."""
    model = config.model.model
    if source := model_source(model):
        model = re.sub(r"[^\w.@-]+", "-", source[1] if source[0] == "hf-hub" else Path(source[1]).resolve().name)
    return f"{dataset_folder(config.data.data).resolve().name}-{model}"


def _surprises(config: Config, flags: dict, stated: dict) -> list[str]:
    """Return warnings about settings whose effect the user may not expect."""
    augment, model, optim, warnings = config.augment, config.model, config.optim, []
    if "batch_size" in flags and "lr" not in flags and stated.get("batch_size", optim.batch_size) != optim.batch_size:
        warnings.append(
            f"--batch-size {optim.batch_size} differs from the stated {stated['batch_size']}, but the learning rate is "
            f"unchanged ({optim.lr}); the usual rule scales it in proportion (--lr)"
        )
    if augment.aa and "3a" not in augment.aa and any(augment.color_jitter):
        warnings.append(f"--aa {augment.aa} replaces --color-jitter, which is ignored (as in timm)")
    if model.experts > 1 and model.expert_width != 1 and (model.pretrained or model.pretrained_file):
        warnings.append("the pretrained weights fit only the stages that the experts share; --expert-width 1 loads all")
    if optim.layer_decay not in (None, 1) and not (model.pretrained or model.pretrained_file or model.init_from):
        warnings.append(
            f"--layer-decay {optim.layer_decay:g}: layers far from the classifier hardly train, and no trained weights are "
            "given; to train from scratch, give --layer-decay none, which trains all layers alike"
        )
    if unusual := [name for name, value in model.model_kwargs.items() if not describes_architecture(name, value)]:
        typed = " ".join(f"{name}={shlex.quote(str(model.model_kwargs[name]))}" for name in unusual)
        warnings.append(
            f"--model-kwargs {typed}: such arguments are not accepted from files, not even from a run's own; evaluate this "
            "run with the same --model-kwargs"
        )
    if optim.warmup_epochs >= optim.epochs > 0:
        warnings.append(f"epochs ({optim.epochs}) end within the warm-up ({optim.warmup_epochs})")
    first, *others = stages_of(config)
    for stage in (first, *others):
        if stage.begin == stage.end and (optim.epochs or stage is not first):
            warnings.append(f"stage {stage.number} has none of the {optim.epochs} --epochs; give more to train it")
    for stage in others:
        warmup, epochs = stage.config.optim.warmup_epochs, stage.end - stage.begin
        if stage.is_fresh and warmup >= epochs > 0:
            warnings.append(f"the epochs of stage {stage.number} ({epochs}) end within its warm-up ({warmup})")
    return warnings


def _dataset_defaults(info: Path, model: str | None) -> tuple[dict, list[str]]:
    """Return `defaults:` of an info.yaml, with the `per_model:` overrides for the chosen model applied, and its faults.

    A model with a tag of its pretrained weights (resnet50.tv_in1k) uses the overrides of its plain name."""
    defaults = (read_yaml(info) if info.is_file() else {}).get("defaults") or {}
    per_model = defaults.pop("per_model", None) or {} if isinstance(defaults, dict) else {}
    layers = [defaults, *(per_model.values() if isinstance(per_model, dict) else [per_model])]
    if not all(isinstance(layer, dict) for layer in layers):
        return {}, [f"{info}: defaults: must map names to values, and its per_model: must map models to such mappings"]
    faults = [fault for layer in layers for fault in file_faults(layer, info, NOT_IN_A_DATASET)]
    chosen = model or defaults.get("model")
    if not isinstance(chosen, str):
        return defaults, faults
    return defaults | per_model.get(chosen, per_model.get(chosen.partition(".")[0], {})), faults
