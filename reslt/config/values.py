"""The conversion of a single value, from YAML or the command line, to the type of its setting."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping

from reslt.config.schema import FIELDS, HINTS
from reslt.core.spelling import did_you_mean
from reslt.core.text import has_controls


def coerce(name: str, value: object) -> object:
    """Convert a value from YAML or the command line (strings) to the type of field `name`. Raises ValueError with the
    reason."""
    arms = typing.get_args(HINTS[name]) if isinstance(HINTS[name], types.UnionType) else (HINTS[name],)
    if isinstance(value, bool) and "off" in (FIELDS[name].metadata["choices"] or ()):
        value = "on" if value else "off"  # YAML reads these words without quotes as true and false
    if value is None and types.NoneType not in arms:
        raise ValueError("no value given")
    if types.NoneType in arms:
        unset = (None, "none", ["none"]) + ("equal", ["equal"]) * (name == "branch_sizes")
        if value in unset:
            return None
    hint, *several = [arm for arm in arms if arm is not types.NoneType]
    if several and isinstance(value, (list, tuple)):  # one number, or one per expert
        if not value:
            raise ValueError("no value given")
        values = tuple(_bounded(name, _scalar(hint, item)) for item in value)
        return values if len(values) > 1 else values[0]
    origin = typing.get_origin(hint)
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        if "dict" in str(hint):
            if not all(isinstance(item, dict) for item in values):
                raise ValueError(f"{value!r} is not a list of mappings")
            return tuple(dict(item) for item in values)
        return tuple(_bounded(name, _scalar(typing.get_args(hint)[0], item)) for item in values)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a mapping of names to values")
        return dict(value)
    return _bounded(name, _scalar(hint, value))


def _scalar(kind: type, value: object) -> object:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is not true or false")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is not {'text' if kind is str else 'a number'}")
    if kind is str:
        if has_controls(str(value)):
            raise ValueError(f"{value!r} contains a control character, such as a line break")
        return str(value)
    try:
        number = kind(value)  # YAML reads 1e-4 as text; a flag's value is always text
        is_number = number == float(value) and math.isfinite(number)
    except (ValueError, OverflowError):
        is_number = False
    if not is_number:
        raise ValueError(f"{value!r} is not {'a whole number' if kind is int else 'a number'}")
    return number


def _bounded(name: str, value: object) -> object:
    bounds = FIELDS[name].metadata
    if bounds["choices"] and value not in bounds["choices"]:
        registered = "; if a module of yours registers it, give --import MODULE" * isinstance(
            bounds["choices"], Mapping
        )
        known = list(bounds["choices"])
        raise ValueError(f"{value!r} is not one of {', '.join(known)}{did_you_mean(str(value), known)}{registered}")
    if bounds["low"] is not None and value < bounds["low"]:
        raise ValueError(f"{value} is below {bounds['low']}")
    if bounds["high"] is not None and value > bounds["high"]:
        raise ValueError(f"{value} is above {bounds['high']}")
    if bounds["above"] is not None and not value > bounds["above"]:
        raise ValueError(f"{value} is not above {bounds['above']}")
    if bounds["below"] is not None and not value < bounds["below"]:
        raise ValueError(f"{value} is not below {bounds['below']}")
    return value
