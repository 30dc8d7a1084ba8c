"""The flags of `train.py`, one per setting, and those that describe a foreign checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from reslt.config.schema import FIELDS, HINTS
from reslt.core.command import Parser
from reslt.core.spelling import did_you_mean


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
