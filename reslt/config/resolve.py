"""Where a configuration comes from: built-in defaults < the dataset's `defaults:` < recipe < flags."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from reslt.config.checks import batch_faults, build, raise_all
from reslt.config.schema import FIELDS, HINTS, Config
from reslt.core.errors import Parser, UserError, did_you_mean, is_main_process

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = PROJECT / "reslt" / "recipes"
DATA_LISTS = PROJECT / "data_lists"


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key that stands twice is a fault (YAML forbids it, PyYAML takes the last), and so is, with
    its line, a value that is none of its type, or a whole number too large to print."""

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError("too large a number")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:  # `!!int ''`, 2001-13-45
            raise yaml.constructor.ConstructorError(None, None, f"{fault} ({node.tag})", node.start_mark) from None
        return value

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []  # else super() raises its error
        keys = [self.construct_object(key, deep=True) for key, _ in pairs]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A YAML file whose top level is a mapping. Raises UserError with the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)
        if _written_out(content, {}) > 10 * len(text) + 10:  # without aliases, a value takes half a character or more
            raise ValueError("its aliases (*name) multiply what it holds, or hold themselves; write the values out")
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as fault:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(fault).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: the file must be a mapping of names to values, `name: value` per line")
    return content


def _written_out(value: object, counted: dict[int, float]) -> float:
    """How many values a value holds with every alias written out (`counted`: those met); inf where one holds itself."""
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if id(value) not in counted:
        counted[id(value)] = math.inf
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_written_out(part, counted) for part in parts)
    return counted[id(value)]


def dataset_folder(data: str) -> Path:
    """The folder of lists that `--data` names. Raises UserError with the names that exist."""
    if data not in ("", "..") and Path(data).name == data and (DATA_LISTS / data).is_dir():
        return DATA_LISTS / data
    folder = Path(os.path.expanduser(data))  # leaves ~nobody as it is, where pathlib raises
    if data and folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"data: {data} is a file; give the folder that holds it, {folder.parent}")
    known = sorted(p.name for p in DATA_LISTS.glob("[!.]*") if p.is_dir())
    raise UserError(
        f"data: {data!r} is neither a folder nor a dataset{did_you_mean(data, known)}; known: {', '.join(known) or 'none'}"
    )


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


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what a released file cannot: its model and dataset, and the order of its classes."""
    parser.add_argument("--model", help="the timm model of its backbone, such as resnext50_32x4d")
    parser.add_argument("--model-kwargs", nargs="+", metavar="KEY=VALUE", help="such as layers=1,1,1,1 (ResNet-10)")
    parser.add_argument("--data", help="name or folder of the dataset it was trained on")
    parser.add_argument(
        "--class-order",
        type=Path,
        metavar="FILE",
        help="its classes: a class index a line, in the order of its classifier",
    )


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


def _is_file(recipe: str | None) -> bool:
    return recipe is not None and recipe.endswith((".yaml", ".yml"))


def recipe_names() -> list[str]:
    """The recipes that the project ships, such as cifar100_lt_0.01/resnet32."""
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))


def no_such_recipe(flag: str, recipe: str) -> UserError:
    """The closest name, and those of the same dataset; of another or none, the datasets that have some."""
    known = recipe_names()
    data = recipe.partition("/")[0]
    names = [name.removeprefix(f"{data}/") for name in known if name.startswith(f"{data}/")]
    datasets = list(dict.fromkeys(name.partition("/")[0] for name in known))
    there = f"{data}/ has {', '.join(names)}" if names else f"there are some for {', '.join(datasets) or 'no dataset'}"
    return UserError(f"{flag}: there is no recipe {recipe!r}{did_you_mean(recipe, known)}; {there}")


def read_recipe(recipe: str) -> tuple[dict, list[dict], list[str]]:
    """A recipe's name or file -> its settings, the rows of the paper that it is for, and its faults.

    A row: `table` or `figure` with its number, `row` (its label), and what is stated of many, medium, few, all; a
    figure's `sweep` maps one setting to the values that are plotted. Raises UserError where there is no such file."""
    path = Path(recipe) if _is_file(recipe) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise no_such_recipe("--recipe", recipe)
    settings = read_yaml(path)
    rows = settings.pop("paper", None) or []
    rows = rows if isinstance(rows, list) else [rows]
    faults = _unknown_keys(settings, path)
    if not all(isinstance(row, dict) and ("table" in row) != ("figure" in row) for row in rows):
        faults.append(f"{path}: paper: must map table (or figure), row, many, medium, few, all to their values")
        rows = []
    return settings, rows, faults


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


def _unknown_keys(keys: dict, path: Path) -> list[str]:
    known = list(FIELDS)
    return [f"{path}: unknown key {key!r}{did_you_mean(str(key), known)}" for key in keys if key not in FIELDS]


def _unknown_flag(flag: str) -> str:
    flag = flag.split("=")[0]
    known = ["--recipe"] + ["--" + name.replace("_", "-") for name in FIELDS]
    return f"unknown flag {flag}{did_you_mean(flag, known)}; `python train.py --help` lists them"


def _key_values(items: list[str]) -> tuple[dict, list[str]]:
    """['width=2', 'layers=1,1,1,1'] -> {'width': 2, 'layers': (1, 1, 1, 1)}, and faults."""
    import ast

    values, faults = {}, []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            faults.append(f"--model-kwargs: {item!r} is not KEY=VALUE")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: nested too deeply
            values[key] = text
    return values, faults


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        argument_default=argparse.SUPPRESS,
        description="Train ResLT, or plain cross-entropy, on a long-tailed dataset described by txt lists.",
        epilog="Precedence: built-in defaults < `defaults:` in the dataset's info.yaml < recipe < flags. A setting that may "
        "be unset takes `none`.",
    )
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="a file of settings: reslt/recipes/NAME.yaml, or any .yaml"
    )
    for name, f in FIELDS.items():
        flag, hint, choices = "--" + name.replace("_", "-"), HINTS[name], f.metadata["choices"]
        many = "tuple" in str(hint) or "dict" in str(hint)
        help = f.metadata["help"] + _default(f.default)
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            metavar = f.metadata["metavar"] or ("{" + ",".join(choices) + "}" if choices else name.upper())
            parser.add_argument(flag, nargs="+" if many else None, metavar=metavar, help=help.replace("%", "%%"))
    return parser


def _default(value: object) -> str:
    if value in (None, (), dataclasses.MISSING):
        return ""
    return f" (default: {' '.join(f'{v:.4g}' for v in value) if isinstance(value, tuple) else value})"
