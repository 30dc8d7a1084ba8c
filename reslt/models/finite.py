"""Checks that the numbers of a network are finite, made wherever they are written or read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def is_temperature(value: object) -> bool:
    """Return whether a value from a file is a positive number by which float32 logits can be divided."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-9 < value < 1e9


def not_finite(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> str | None:
    """Return the name of a parameter or BatchNorm statistic of a module that has a non-finite number in `tensors`; None if
    all numbers are finite.

    If they are, this waits for the device only once. Other buffers, such as masks, may contain infinities on purpose."""
    checked = {name for name, _ in module.named_parameters()}
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if (name in checked or name.endswith(("running_mean", "running_var"))) and tensor.is_floating_point()
    }
    if torch.nn.utils.get_total_norm(found.values()).isfinite():  # a kernel or two; one bad number makes it non-finite
        return None
    return next((name for name, tensor in found.items() if not tensor.isfinite().all()), None)
