"""docs/cli.md: the flags of every command, written from their parsers.

It is generated from the parsers' fields. Their formatted help differs between versions of Python and widths of the
terminal."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from reslt.config.methods import PARTS_OF_A_METHOD
from reslt.config.schema import HINTS, SECTIONS, flag_of
from tests.docs.commands import PARSERS, parser_of
from tests.docs.pages import PROJECT

FILE = PROJECT / "docs/cli.md"
COMMANDS = {  # the title of each, and the page that explains it
    "evaluate.py": ("python evaluate.py", "evaluation.md"),
    "reslt.prepare": ("python -m reslt.prepare", "datasets.md"),
    "reslt.reproduce": ("python -m reslt.reproduce", "reproduce.md"),
    "reslt.report": ("python -m reslt.report", "report.md"),
    "reslt.predict": ("python -m reslt.predict", "predict.md"),
    "reslt.export": ("python -m reslt.export", "export.md"),
    "reslt.checkpoint": ("python -m reslt.checkpoint", "evaluation.md"),
}
TITLES = {
    "data": "Data",
    "augment": "Augmentation",
    "model": "Model",
    "method": "Method",
    "optim": "Optimization",
    "run": "Run",
}
BOUNDS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
BEGINNING = """\
# Commands and their flags

This page lists every flag of every command. It is generated from the parsers by `python -m tests.docs cli`.

A value in capitals stands for one of your own; a flag with `...` takes several values. `--flag, --no-flag` is a switch.
Flags cannot be abbreviated.

"""
OF_TRAINING = """\
## accelerate launch train.py

Train a model. `python train.py` takes the same flags. Every flag is also a key of recipes and of `defaults:` in a dataset's
`info.yaml`, except those that belong to one run ([recipes.md](recipes.md)). Precedence, from low to high: built-in defaults,
the method's own defaults, `defaults:` of the dataset, the recipe, flags. `none` unsets a setting that may be unset.

"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    parts = [BEGINNING, _contents(), OF_TRAINING, *_of_training()]
    for command in COMMANDS:
        parts += _of_command(command)
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip() + "\n"


def write() -> Path:
    """Write docs/cli.md, and return its path."""
    FILE.write_text(reference(), encoding="utf-8")
    return FILE


def _contents() -> str:
    titles = ["accelerate launch train.py", *(title for title, _ in COMMANDS.values())]
    return (
        "".join(f"- [`{title}`](#{re.sub(r'[^a-z0-9 -]', '', title).replace(' ', '-')})\n" for title in titles) + "\n"
    )


def _of_training() -> Iterator[str]:
    (recipe,) = [action for action in parser_of("train.py")._actions if action.dest == "recipe"]
    yield _table([("flag", "meaning"), _row(recipe)])
    for section, settings in SECTIONS.items():
        yield f"### {TITLES[section]}\n\n{settings.__doc__}\n\n"
        rows = [_row_of_setting(field) for field in dataclasses.fields(settings) if field.metadata["is_flag"]]
        yield _table([("flag", "default", "values", "meaning"), *rows])


def _row_of_setting(field: dataclasses.Field) -> tuple[str, str, str, str]:
    """Return flag, default, values and meaning of a setting."""
    flag, meaning, choices = flag_of(field.name), field.metadata["help"], field.metadata["choices"]
    names = f"{flag}, --no-{flag[2:]}" if HINTS[field.name] is bool else flag
    if not callable(meaning):
        return f"`{names}`", _default_of(field), _values_of(field), _as_text(meaning)
    lines = [f"`{name}`: {_as_text(entry.described)}" for name, entry in choices.items()]  # of a registry
    return f"`{names}`", _default_of(field), "a name", "<br>".join(lines)


def _default_of(field: dataclasses.Field) -> str:
    value = field.default
    if field.name in PARTS_OF_A_METHOD:
        return "the method's"
    if value is dataclasses.MISSING or value in (None, ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(f'{v:.4g}' for v in value) if isinstance(value, tuple) else value}`"


def _values_of(field: dataclasses.Field) -> str:
    """Return choices, or the kind of value and its bounds."""
    stated, hint = field.metadata, str(HINTS[field.name])
    if stated["choices"]:
        return ", ".join(f"`{choice}`" for choice in stated["choices"])
    kind = "number" if "float" in hint else "whole number" if "int" in hint else None
    if kind is None:
        several = " ..." * ("tuple" in hint or "dict" in hint) * (stated["flag"] is None)
        return f"`{stated['metavar']}{several}`" if stated["metavar"] else ""
    if stated["length"]:
        *first, last = map(str, stated["length"])
        kind = f"{', '.join(first)}{' or ' * bool(first)}{last} {kind}s"
    elif "tuple" in hint:
        kind = f"{kind}, or one per expert" if hint.startswith("float |") else f"{kind}s"
    bounds = [f"{word} {stated[name]:.12g}" for name, word in BOUNDS.items() if stated[name] is not None]
    metavar = f"`{stated['metavar']}`: " * bool(stated["metavar"])
    return f"{metavar}{', '.join([kind, *bounds])}".replace("at least 0, at most 1", "0 to 1")


def _of_command(command: str) -> Iterator[str]:
    """Yield a heading, a sentence, and a table of flags; then the same for each command that this one has."""
    parser, (title, page) = parser_of(command), COMMANDS[command]
    described = parser.description
    if "\n" in described:  # a list of examples: the sentence is the module's
        described = sys.modules[PARSERS[command][0]].__doc__.split("\n\n")[0].partition("`: ")[2]
    yield f"## {title}\n\n{_sentence(described)} See [{page}]({page}).\n\n"
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            meanings = {choice.dest: choice.help for choice in action._choices_actions}
            for meaning in dict.fromkeys(meanings.values()):
                names = [name for name in action.choices if meanings[name] == meaning]
                yield f"### {title} {', '.join(names)}\n\n{_sentence(meaning)}\n\n"
                yield _flags(action.choices[names[0]]._actions)
            return
    yield _flags(actions)


def _flags(actions: list[argparse.Action]) -> str:
    rows = [_row(action) for action in actions if not isinstance(action, argparse._HelpAction)]
    return _table([("flag", "meaning"), *rows]) if rows else ""


def _row(action: argparse.Action) -> tuple[str, str]:
    """Return a flag with its value, and its meaning."""
    choices = action.choices and f"{{{','.join(map(str, action.choices))}}}"
    value = action.metavar or choices or action.dest.upper()
    if action.nargs == 0:
        value = ""
    elif action.nargs in ("+", "*"):
        value += " ..."
    meaning = (action.help or "").replace("%%", "%")
    if action.required and action.option_strings:
        meaning = f"required; {meaning}"
    default = action.default
    if isinstance(default, Path):
        default = Path(*default.parts[-2:])  # the same on every machine
    if default not in (None, argparse.SUPPRESS, False, True, []) and "default" not in meaning:
        meaning += f" (default: {default})"
    return f"`{' '.join(filter(None, [', '.join(action.option_strings), value]))}`", _as_text(meaning)


def _as_text(text: str) -> str:
    """Return text on one line, with escapes where Markdown would read markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def _sentence(text: str) -> str:
    text = _as_text(text)
    return f"{text[:1].upper()}{text[1:]}" + "." * (not text.endswith("."))


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *others = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others]) + "\n\n"
