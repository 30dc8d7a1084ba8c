"""The named methods: description, network, settings and defaults of each. Loads no torch.

Their losses are created in `reslt.methods.registry`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A training method. `settings`: those that only some methods use; `defaults`: its own, below info.yaml's."""

    described: str
    network: str  # "plain", or "reslt": branches between the features and the classifier
    settings: frozenset[str] = frozenset()
    defaults: Mapping[str, object] = field(default_factory=dict)


METHODS = {
    "reslt": Method(
        "the paper's method",
        network="reslt",
        settings=frozenset(
            {"alpha", "branches", "branch", "branch_at", "eval_branch_at", "branch_loss", "branch_sizes"}
        ),
    ),
    "ce": Method("plain cross-entropy on the plain model", network="plain"),
}


def list_methods() -> list[str]:
    """Return the names that `--method` accepts."""
    return list(METHODS)


def unused_settings(name: str) -> frozenset[str]:
    """Return the settings that other methods use, but not the named one."""
    return frozenset().union(*(method.settings for method in METHODS.values())) - METHODS[name].settings
