"""The logits that a network predicts with: its branches fused, its experts averaged."""

from __future__ import annotations

import torch

from reslt.models.exits import Exited, exited_logits
from reslt.models.featured import Featured
from reslt.models.router import Routed, routed_logits


def fused_branches(branch_logits: torch.Tensor, fusion: str | None = None) -> torch.Tensor:
    """(..., K, N, C) branch logits -> (..., N, C) float32: their sum, which is ResLT's prediction, or, by `fusion`, one of the
    paper's ablations. 'max': the maximum over branches; 'softmax': the logarithm of the sum of the branches' softmax, which
    ranks classes as that sum does (table 1, naive fusions (1) and (3)); 'main': the first branch (figure 2(d))."""
    logits = branch_logits.float()
    match fusion:
        case "max":
            return logits.amax(-3)
        case "softmax":
            return logits.log_softmax(-1).logsumexp(-3)
        case "main":
            return logits.select(-3, 0)
    return logits.sum(-3)


def fused_logits(branch_logits: torch.Tensor | Routed | Featured, fusion: str | None = None) -> torch.Tensor:
    """(K, N, C) branch logits, or (E, K, N, C) of experts -> (N, C): fused over branches and averaged over experts; with a
    router, over those that the image uses; with early exits, those of the exit that predicts."""
    if isinstance(branch_logits, Featured):
        branch_logits = branch_logits.branch_logits
    if isinstance(branch_logits, Exited):
        return exited_logits(fused_branches(branch_logits.branch_logits, fusion), branch_logits.asks)
    if isinstance(branch_logits, Routed):
        return routed_logits(fused_branches(branch_logits.branch_logits, fusion), branch_logits.asks)
    fused = fused_branches(branch_logits, fusion)
    return fused if fused.ndim == 2 else fused.mean(0)
