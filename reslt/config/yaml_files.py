"""YAML files read safely: duplicate keys, wrong types and alias bombs are errors with a line number."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import yaml

from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.core.text import shown


class _Loader(yaml.SafeLoader):
    """The safe loader, with an error and its line for a duplicate key (YAML forbids it, PyYAML takes the last), for a
    value that does not match its tag, and for a whole number too large to print."""

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError("the number is too large")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:  # `!!int ''`, 2001-13-45
            raise yaml.constructor.ConstructorError(None, None, f"{fault} ({node.tag})", node.start_mark) from None
        return value

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []  # else super() raises its error
        keys = [self.construct_object(key, deep=True) for key, _ in pairs]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """Read a YAML file whose top level is a mapping. Raises UserError with the file and the line."""
    try:
        text = regular_file(path).read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)
        if _written_out(content, {}) > 10 * len(text) + 10:  # without aliases, a value takes at least half a character
            raise ValueError("its aliases (*name) multiply its content, or contain themselves; write the values out")
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as fault:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(fault).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: the file must be a mapping of names to values, `name: value` per line")
    return content


def require_texts_as_written(path: Path, content: dict, key: str) -> None:
    """Raise UserError, with the line, if a text under a top-level key, or in a list there, lacks the quotes without which
    YAML reads it as something else: 001 as 1, no as False. Whole numbers in their usual form need no quotes.

    `content` is the result of `read_yaml(path)`."""
    values = content.get(key)
    values = values if isinstance(values, list) else [values]
    if all(isinstance(value, str) for value in values):
        return
    top = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
    node = next((value for name, value in top.value if name.value == key), None)
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for node, value in zip(nodes, values, strict=False):
        is_as_written = isinstance(value, str) or (type(value) is int and str(value) == getattr(node, "value", None))
        if isinstance(node, yaml.ScalarNode) and not is_as_written:
            text, expected = shown(node.value), "a list of distinct strings" if len(nodes) > 1 else "a text"
            raise UserError(
                f"{path}:{node.start_mark.line + 1}: {key} must be {expected}: {text or 'an empty entry'} is read as "
                f'{shown(str(value))} ({type(value).__name__}), not as text; write it in quotes: "{text}"'
            )


def _written_out(value: object, counted: dict[int, float]) -> float:
    """Return the number of values with all aliases written out; inf if one contains itself. `counted`: by id, so far."""
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if id(value) not in counted:
        counted[id(value)] = math.inf
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_written_out(part, counted) for part in parts)
    return counted[id(value)]
