"""Freezing of backbone parameters, chosen by name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.models.experts import Network
from reslt.models.names import timm_names

SHOWN_NAMES = 8


def freeze(model: Network, patterns: Iterable[str] | None) -> None:
    """Exclude the backbone's matching parameters from training, in place. BatchNorm's statistics in frozen layers still
    follow the images, as in the released scripts.

    Raises UserError for a pattern that matches nothing, and if no parameter is left to train."""
    names = frozen_names(model, patterns)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"--freeze {' '.join(patterns)}: no parameter is left to train; freeze fewer")


def frozen_names(model: Network, patterns: Iterable[str] | None) -> set[str]:
    """Return the names, as in `model.named_parameters()`, of the parameters that the patterns freeze.

    A pattern (with `*`, `?`, `[01]`, as for file names) is compared with the names of the timm model's own parameters and
    modules: `layer1`, `layer4.[01]`, `*.bn1.weight`. With experts, it applies to the shared stages and to those of each
    expert. Raises UserError for a pattern that matches nothing."""
    found: dict[str, set[str]] = {pattern: set() for pattern in patterns or ()}
    own_names = []
    for full_name, name in timm_names(model).items():
        own_names.append(name)
        for pattern, names in found.items():
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
                names.add(full_name)
    for pattern, names in found.items():
        if not names:
            raise UserError(
                f"--freeze {pattern}: it matches no parameter of the model; {_existing(pattern, own_names)}"
            )
    return set().union(*found.values())


def _existing(pattern: str, names: list[str]) -> str:
    """Return a message's list of names that a pattern could have meant: those in its parent, if that exists, else at the
    top."""
    parent, _, _ = pattern.rpartition(".")
    inside = [name for name in names if parent and fnmatchcase(name, f"{parent}.*")]
    depth = parent.count(".") + 2 if inside else 1
    children = list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in inside or names))
    more = f" and {len(children) - SHOWN_NAMES} more" if len(children) > SHOWN_NAMES else ""
    where = f"{parent} has" if inside else "there are"
    return f"{where} {', '.join(children[:SHOWN_NAMES])}{more}{did_you_mean(pattern, children)}"
