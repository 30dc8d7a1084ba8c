"""How settings are combined: built-in defaults < the dataset's `defaults:` < recipe < flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from reslt.config.checks import batch_faults, build, raise_all
from reslt.config.command_line import _key_values, _parser, _unknown_flag
from reslt.config.places import dataset_folder
from reslt.config.recipes import _is_file, _unknown_keys, read_recipe
from reslt.config.schema import FIELDS, Config
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.ranks import is_main_process


@dataclass
class Resolved:
    """A configuration with what surrounds it: the recipe's name, the paper's rows, warnings to print once."""

    config: Config
    recipe: str | None = None
    paper: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resolve(arguments: list[str]) -> Resolved:
    """Command-line arguments -> a checked configuration. Raises one UserError that lists every fault."""
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    flags = vars(given)
    faults = [_unknown_flag(flag) for flag in unknown if flag.startswith("-")]
    if unknown and not faults:
        faults.append(f"{' '.join(unknown)!r} belongs to no flag (a switch takes no value: --flag or --no-flag)")
    recipe_name = flags.pop("recipe", None)
    config, stated, paper = _lay_over(flags, recipe_name, faults)
    raise_all(batch_faults(config, int(os.environ.get("WORLD_SIZE", "1"))))

    if config.mixed_precision is None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in FIELDS["mixed_precision"].metadata["choices"]:
            raise UserError(f"accelerate launch --mixed_precision {launched}: this suite trains with no, bf16 or fp16")
        config = replace(config, mixed_precision=launched)
    if config.experiment is None:
        stem = recipe_name and Path(recipe_name).with_suffix("").as_posix() if _is_file(recipe_name) else recipe_name
        stem = stem or f"{dataset_folder(config.data).resolve().name}-{config.model}-{config.method}"
        config = replace(config, experiment=f"{stem.strip('/').replace('/', '-')}-seed{config.seed}")
    # Of several processes, another one than the first would see the folder that the first has made.
    may_exist = config.resume or config.overwrite or not is_main_process()
    if not may_exist and (config.run_folder / "config.yaml").exists():
        raise UserError(
            f"{config.run_folder} holds a run already; --resume auto goes on with it, --overwrite replaces it, "
            "--experiment NAME starts another"
        )
    return Resolved(config, recipe_name, paper, _surprises(config, flags, stated))


def configure(flags: dict) -> Config:
    """Flags (names and values as in a recipe) over the dataset's defaults, for use without training."""
    return _lay_over(dict(flags), None, [])[0]


def _lay_over(flags: dict, recipe_name: str | None, faults: list[str]) -> tuple[Config, dict, list[dict]]:
    """Dataset's defaults < recipe < flags -> the configuration, what the first two state, and the paper's rows.

    Raises one UserError that lists every fault, the given ones too."""
    paper, recipe = [], {}
    if recipe_name is not None:
        recipe, paper, more = read_recipe(recipe_name)
        faults += more

    data = str(flags.get("data", recipe.get("data", Config.data)))
    defaults, info = {}, None
    try:
        info = dataset_folder(data) / "info.yaml"
    except UserError as fault:
        faults.append(str(fault))
    else:
        defaults, more = _dataset_defaults(info, flags.get("model", recipe.get("model")))
        faults += more
    if "model_kwargs" in flags:
        flags["model_kwargs"], more = _key_values(flags["model_kwargs"])
        faults += more

    values, where = {}, {}
    for source, layer in ((str(info), defaults), (f"recipe {recipe_name}", recipe), (None, flags)):
        for name, value in layer.items():
            if name in FIELDS:
                if isinstance(value, dict) and isinstance(values.get(name), dict):
                    value = values[name] | value  # one argument of the model given anew leaves the others
                values[name], where[name] = value, source or "--" + name.replace("_", "-")
    config, more = build(values, where)
    raise_all(faults + more)
    return config, {**defaults, **recipe}, paper


def _surprises(config: Config, flags: dict, stated: dict) -> list[str]:
    warnings = []
    if "batch_size" in flags and "lr" not in flags and stated.get("batch_size", config.batch_size) != config.batch_size:
        warnings.append(
            f"--batch-size {config.batch_size} differs from the stated {stated['batch_size']}, but the learning rate is "
            f"unchanged ({config.lr}); the usual rule scales it in proportion (--lr)"
        )
    if config.aa and "3a" not in config.aa and any(config.color_jitter):
        warnings.append(f"--aa {config.aa} takes the place of --color-jitter, which is left out (as timm does)")
    if config.experts > 1 and config.expert_width != 1 and (config.pretrained or config.pretrained_file):
        warnings.append("the pretrained weights fit the stages that the experts share; --expert-width 1 takes them all")
    if config.warmup_epochs >= config.epochs:
        warnings.append(f"epochs ({config.epochs}) end within the warm-up ({config.warmup_epochs})")
    return warnings


def _dataset_defaults(info: Path, model: str | None) -> tuple[dict, list[str]]:
    """`defaults:` of an info.yaml, with its `per_model:` overrides for the chosen model laid over, and its faults.

    A model with a tag of its pretrained weights (resnet50.tv_in1k) takes the overrides of its plain name."""
    defaults = (read_yaml(info) if info.is_file() else {}).get("defaults") or {}
    per_model = defaults.pop("per_model", None) or {} if isinstance(defaults, dict) else {}
    layers = [defaults, *(per_model.values() if isinstance(per_model, dict) else [per_model])]
    if not all(isinstance(layer, dict) for layer in layers):
        return {}, [f"{info}: defaults: must map names to values, and its per_model: must map models to such mappings"]
    faults = [fault for layer in layers for fault in _unknown_keys(layer, info)]
    chosen = model or defaults.get("model")
    if not isinstance(chosen, str):
        return defaults, faults
    return defaults | per_model.get(chosen, per_model.get(chosen.partition(".")[0], {})), faults
