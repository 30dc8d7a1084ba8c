"""A digest that identifies weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the values of tensors on the CPU, such as a model's state_dict, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
