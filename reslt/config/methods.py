"""The named methods as far as no torch is needed: what each is, which settings it uses, and its own defaults.

What a method builds is under the same name in `reslt.methods.registry`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A named bundle of parts. `settings`: those that not every method uses; `defaults`: its own, below info.yaml's."""

    described: str
    network: str  # "plain", or "reslt": branches between the features and the classifier
    settings: frozenset[str] = frozenset()
    defaults: Mapping[str, object] = field(default_factory=dict)


METHODS = {
    "reslt": Method(
        "the paper's",
        network="reslt",
        settings=frozenset(
            {"alpha", "branches", "branch", "branch_at", "eval_branch_at", "branch_loss", "branch_sizes"}
        ),
    ),
    "ce": Method("plain cross-entropy on the plain model", network="plain"),
}


def list_methods() -> list[str]:
    """The names that `--method` takes."""
    return list(METHODS)


def unused_settings(name: str) -> frozenset[str]:
    """The settings that some method uses, but not the named one."""
    return frozenset().union(*(method.settings for method in METHODS.values())) - METHODS[name].settings
