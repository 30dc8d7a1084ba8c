"""The output of a network in training for losses that see features too."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Featured(NamedTuple):
    """The branch logits, (K, N, C), or (E, K, N, C) of experts, and the features that a loss sees, (N, D) or (E, N, D):
    usually those that enter the classifier, added over branches."""

    branch_logits: torch.Tensor
    features: torch.Tensor
