"""Costs of all labels at once. Losses are linear in them, so soft targets require no second form.

A prior is TAU log(pi), with pi the classes' training frequencies: the cost adds it to the logits, the prediction does
not (logit adjustment, Menon et al. 2021). With plain cross-entropy and TAU = 1, that is balanced softmax."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class CrossEntropy(nn.Module):
    """(..., C) logits -> (..., C) costs -log p(c), in float32 at least; float64 stays."""

    def __init__(self, smoothing: float = 0.0, prior: torch.Tensor | None = None):
        """`smoothing`: eps, (1 - eps) of a label's own cost plus eps of the mean over all labels. `prior`: (C,)."""
        super().__init__()
        self.register_buffer("prior", prior, persistent=False)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.prior is not None:
            logits = logits + self.prior.to(logits.dtype)
        costs = -logits.log_softmax(-1)
        if self.smoothing:
            costs = (1 - self.smoothing) * costs + self.smoothing * costs.mean(-1, keepdim=True)
        return costs


def of_targets(costs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(..., N, C) costs, (N,) int64 targets or (..., N, C) weights per class -> (..., N)."""
    if targets.is_floating_point():
        return (costs * targets.to(costs.dtype)).sum(-1)
    return costs.gather(-1, targets.expand(costs.shape[:-1])[..., None])[..., 0]


def class_prior(images_per_class: np.ndarray, tau: float) -> torch.Tensor | None:
    """(C,) training counts -> (C,) float32 tau log(frequency); None for tau 0."""
    if not tau:
        return None
    frequency = torch.as_tensor(images_per_class / images_per_class.sum())
    return (tau * frequency.log()).float()
