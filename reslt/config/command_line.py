"""The flags of `train.py`, one per setting, and those of `evaluate.py`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from pathlib import Path

from reslt.config.imports import load_imports
from reslt.config.model_arguments import refused_arguments
from reslt.config.schema import FIELDS, HINTS, SECTIONS, flag_of
from reslt.config.sweep import Sweep
from reslt.core.command import Parser
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of `train.py`: a group of flags per section. Values stay strings; omitted flags are absent."""
    parser = Parser(
        prog="train.py",
        argument_default=argparse.SUPPRESS,
        description="Train ResLT, or another method, on a long-tailed dataset described by txt lists.",
        epilog="Precedence: built-in defaults < the method's own < `defaults:` in the dataset's info.yaml < recipe < "
        "flags. A setting that may be unset takes `none`.",
    )
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="a file of settings: reslt/recipes/NAME.yaml, or any .yaml"
    )
    for section, settings in SECTIONS.items():
        group = parser.add_argument_group(section, settings.__doc__)
        for field in dataclasses.fields(settings):
            if field.metadata["is_flag"]:
                _add_flag(group, field)
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    name, hint, choices, text = field.name, HINTS[field.name], field.metadata["choices"], field.metadata["help"]
    help = ((text() if callable(text) else text) + _default(field.default)).replace("%", "%%")
    if hint is bool:
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=help)
        return
    takes_several = "tuple" in str(hint) or "dict" in str(hint)
    metavar = field.metadata["metavar"] or ("{" + ",".join(choices) + "}" if choices else name.upper())
    if field.metadata["flag"]:
        group.add_argument(flag_of(name), dest=name, action="append", metavar=metavar, help=help)
        return
    group.add_argument(flag_of(name), nargs="+" if takes_several else None, metavar=metavar, help=help)


def _default(value: object) -> str:
    if value in (None, (), dataclasses.MISSING):
        return ""
    return f" (default: {' '.join(f'{v:.4g}' for v in value) if isinstance(value, tuple) else value})"


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Add --import, as in `train.py`."""
    _add_flag(parser, FIELDS["imports"])


def load_typed_imports(arguments: list[str], prog: str) -> tuple[str, ...]:
    """Import the modules that `--import` names in a command line, and return their names. Raises UserError as `load_imports`
    does. Call this before parsing the other flags: their help and choices list the parts that the modules register."""
    parser = Parser(prog=prog, add_help=False)
    add_import_flag(parser)
    names = tuple(parser.parse_known_args(arguments)[0].imports or ())
    load_imports(names)
    return names


def unknown_arguments(arguments: list[str]) -> list[str]:
    """Return a fault for each unknown flag among the arguments that no flag takes, or one for all stray words."""
    known = ["--recipe", *(flag_of(name) for name, field in FIELDS.items() if field.metadata["is_flag"])]
    names = [argument.split("=")[0] for argument in arguments if argument.startswith("-")]
    if arguments and not names:
        return [f"{' '.join(arguments)!r} belongs to no flag (a switch takes no value: --flag or --no-flag)"]
    if "--stages" in names:
        return ["--stages: stages have no flag; list them in a recipe"]
    return [f"unknown flag {name}{did_you_mean(name, known)}; `python train.py --help` lists them" for name in names]


def without_flags(arguments: list[str], names: frozenset[str]) -> list[str]:
    """Return the arguments without the flags of these settings and their values."""
    flags, kept, dropping = {flag_of(name) for name in names}, [], False
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.split("=")[0]
            dropping = flag in flags or flag.replace("--no-", "--", 1) in flags
        if not dropping:
            kept.append(argument)
    return kept


def key_values(items: list[str] | dict, name: str = "model_kwargs") -> tuple[dict, list[str]]:
    """['width=2', 'layers=1,1,1,1'] -> {'width': 2, 'layers': (1, 1, 1, 1)}, and faults. A dict stays as it is.

    `name`: the setting; for `model_kwargs`, arguments that no model may have are faults too."""
    refused = refused_arguments if name == "model_kwargs" else lambda values: []
    if isinstance(items, dict):
        return dict(items), refused(items)
    values, faults = {}, []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            faults.append(f"{flag_of(name)}: {item!r} is not KEY=VALUE")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: nested too deeply
            values[key] = text
    return values, faults + refused(values)


def add_foreign_flags(parser: argparse.ArgumentParser, data: str, condition: str = "") -> None:
    """Add the flags for model, dataset and class order, which files of the authors' code do not record. `data`: the help of
    --data; `condition`: when the other flags apply, to begin their help with."""
    add_import_flag(parser)
    parser.add_argument("--model", help=f"{condition}the timm model, such as resnext50_32x4d")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        metavar="KEY=VALUE",
        help="arguments of the model, such as layers=1,1,1,1 (ResNet-10)"
        + "; for a run: those that are not accepted from its files, with the values used in training" * bool(condition),
    )
    parser.add_argument("--data", help=data)
    parser.add_argument(
        "--class-order",
        type=Path,
        metavar="FILE",
        help=f"{condition}class indices, one per line, in the order of the classifier's rows",
    )


def add_execution_flags(parser: argparse.ArgumentParser) -> None:
    """Add --mixed-precision, --channels-last and --torchcompile; each is None if it is not given."""
    as_trained = "unset: on a GPU as trained, on a CPU"
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help=f"precision; {as_trained} no")
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--channels-last", **switch, help=f"memory layout; {as_trained} off")
    parser.add_argument(
        "--torchcompile",
        **switch,
        help=f"compile the model, for images of more than 128 pixels a side; {as_trained} off; also off for fewer than 200,000 images",
    )


def evaluation_parser() -> argparse.ArgumentParser:
    """Return the parser of `evaluate.py`."""
    parser = Parser(prog="evaluate.py", description="Evaluate a checkpoint of a run.")
    parser.add_argument(
        "--ckpt", type=Path, required=True, help="run folder, folder of one checkpoint, or a file in it"
    )
    parser.add_argument(
        "--which",
        choices=("last", "best"),
        help="checkpoint of the run; unset: the best if validation chose one, else the last",
    )
    parser.add_argument(
        "--format", choices=("reslt", "released"), default="reslt", help="released: a file of the authors' code"
    )
    add_foreign_flags(
        parser,
        data="dataset to evaluate, by name or folder; unset: the run's own; with --format released: the one it was trained on",
        condition="with --format released: ",
    )
    parser.add_argument("--data-dir", help="folder that the list's paths start from (image root)")
    parser.add_argument(
        "--bad-images",
        choices=("stop", "skip"),
        help="stop: an unreadable image ends the evaluation; skip: leave out recorded ones; unset: as trained",
    )
    parser.add_argument(
        "--split", choices=("val", "test"), help="list to evaluate; unset: test if there is one, else val"
    )
    parser.add_argument(
        "--tau",
        help="divide classifier rows by their norm^TAU and drop the bias (even if TAU is 0); none: neither; unset: as trained",
    )
    parser.add_argument(
        "--prior-tau",
        help="rank classes by logits - PRIOR_TAU log(training frequency); none: by logits; unset: as trained",
    )
    parser.add_argument(
        "--ncm",
        metavar="{cl2,l2,raw,none}",
        help="rank classes by the nearest class mean of the training images' features (centered and normalized, normalized, "
        "or raw) instead of by the classifier; none: by the classifier; unset: as trained",
    )
    parser.add_argument(
        "--tde",
        metavar="ALPHA",
        help="deconfounded head: total direct effect with this alpha; none: without; unset: as trained",
    )
    parser.add_argument(
        "--tta",
        metavar="{flip,none}",
        help="flip: mean of the logits of the image and its mirror image; none: the image alone; unset: as trained",
    )
    parser.add_argument(
        "--fusion",
        metavar="{max,softmax,main,none}",
        help="branches: their maximum, the sum of their softmax, or the main branch alone; none: the sum of their logits; "
        "unset: as trained",
    )
    parser.add_argument(
        "--sweep",
        metavar="KEY=FROM:TO:STEP",
        help="evaluate all values of tau, prior_tau or tde (or KEY=a,b,c) in one pass over the validation list, then the test "
        "list with the best value; without a validation list, the curve is that of the test list, and no value is chosen",
    )
    parser.add_argument(
        "--eval-branch-at",
        choices=("map", "pooled"),
        help="apply the branches to the feature map or to the pooled features; unset: as trained",
    )
    parser.add_argument("--use-experts", type=int, metavar="N", help="predict with the first N experts; unset: all")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images per batch, of all processes together; unset: chosen from the image size and the training batch size",
    )
    parser.add_argument("--workers", type=int, help="processes that decode images; unset: as trained")
    add_execution_flags(parser)
    parser.add_argument(
        "--ddp-timeout",
        type=int,
        metavar="SECONDS",
        help="longest time that a process waits for the others; unset: as trained",
    )
    parser.add_argument(
        "--classes-by-index",
        action="store_true",
        help="do not compare class names: labels are indices of the model's outputs",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for result.json and per_class.csv; unset: the run folder, in which the files of all evaluations but the run's own "
        "have longer names",
    )
    parser.add_argument("--fold", type=Path, metavar="OUT", help="also write the weights folded for inference")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="OUT",
        help="also write the features that enter the classifier, for every image of the list, and the lines of the list to a .txt "
        "file of the same name",
    )
    parser.add_argument(
        "--logits", type=Path, metavar="OUT", help="also write the logits by which classes are ranked, like --features"
    )
    parser.add_argument(
        "--save-predictions",
        action="store_true",
        help="also write predictions.safetensors (label, logits and predicted classes of every image), which reslt.report reads",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="fit a temperature for these weights and settings on the validation list, and store it with the run",
    )
    parser.add_argument("--no-fold", action="store_true", help="ignored, for older scripts: evaluation never folds")
    return parser


def parse_evaluation() -> argparse.Namespace:
    """Parse the command line of `evaluate.py`, and import the modules that it names. Raises UserError for flags that
    contradict each other."""
    load_typed_imports(sys.argv[1:], "evaluate.py")
    given = evaluation_parser().parse_args()
    if given.format == "reslt" and (given.model or given.class_order):
        raise UserError("--model and --class-order belong to --format released; a run records its own")
    if given.format == "released" and given.which:
        raise UserError("--which chooses among the checkpoints of a run; drop it with --format released")
    if given.format == "released" and given.calibrate:
        raise UserError("--calibrate stores the temperature with a run, and --format released has none; drop it")
    written = {}
    for flag, file in files_of_evaluation(given).items():
        if file is None:
            continue
        if file.suffix != ".safetensors" or file.is_dir():
            raise UserError(f"{flag} {file}: give a file name that ends in .safetensors")
        if (other := written.setdefault(file.resolve(), flag)) != flag:
            raise UserError(f"{flag} {file}: {other} writes this file too; give each flag a file of its own")
    if given.sweep is not None:
        given.sweep = Sweep.parse(given.sweep)
        if getattr(given, given.sweep.key) is not None:
            raise UserError(f"--sweep {given.sweep.key}: contradicts {flag_of(given.sweep.key)}; drop one of the two")
        if given.split:
            raise UserError("--sweep reads the validation list, then the test list; drop --split")
    if given.output and given.output.exists() and not given.output.is_dir():
        raise UserError(f"--output {given.output}: it is not a folder; give another one")
    return given


def files_of_evaluation(given: argparse.Namespace) -> dict[str, Path | None]:
    """Return the files of tensors that an evaluation writes, by flag; None: not requested."""
    return {"--fold": given.fold, "--features": given.features, "--logits": given.logits}
