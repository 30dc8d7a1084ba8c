"""The ResLT loss, Eq. (1)-(3), and plain cross-entropy: (K, N, C) branch logits, or (E, K, N, C) of experts -> scalar.

A loss is a mean, and its denominators are those of the global batch. If a process, or one of several micro-batches,
sees a part of that batch, the `denominators(targets)` of all parts are added up, `forward(..., global_denominators=the
sum)` returns the part's share, and the shares of all parts add up to the loss of the whole."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from reslt.methods.costs import CrossEntropy, of_targets


class FusionLoss(nn.Module):
    """Mean cost of the fused logits, Eq. (1): (K, N, C), targets (N,) int64 or (N, C) rows summing to 1 -> scalar."""

    def __init__(self, cost: nn.Module | None = None):
        """`cost`: (..., C) logits -> (..., C) costs; None: plain cross-entropy."""
        super().__init__()
        self.cost = cost or CrossEntropy()

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """-> (1,) the number of images."""
        return torch.full((1,), float(len(targets)), device=targets.device)

    def forward(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, global_denominators: torch.Tensor | None = None
    ) -> torch.Tensor:
        fused = branch_logits if branch_logits.dtype == torch.float64 else branch_logits.float()
        total = of_targets(self.cost(fused.sum(0)), targets).sum()
        return total / (len(targets) if global_denominators is None else global_denominators[0])


class ResLTLoss(nn.Module):
    """(1 - alpha) fusion loss + alpha branch loss, Eq. (3).

    The branch loss, Eq. (2), sums over branch k the costs of the images whose class is in S_k. 'pooled' divides by the
    number of all such (image, branch) pairs, as the released code does; 'mean' takes a mean per branch and adds them, 0
    for a branch without an image. A soft target counts per class, linearly: class c of image i weighs t_ic [c in S_k],
    in the numerator and in the denominator. Label smoothing affects each cost, not the membership."""

    def __init__(self, sets: np.ndarray, alpha: float, reduction: str = "pooled", cost: nn.Module | None = None):
        """`sets`: (K, C) bool, the nested class sets S_1..S_K. `cost`: of the fused and of each branch's logits, (...,
        C) -> (..., C); None: plain cross-entropy."""
        super().__init__()
        self.register_buffer("members", torch.as_tensor(sets, dtype=torch.float32), persistent=False)
        self.alpha, self.reduction = alpha, reduction
        self.fusion = FusionLoss(cost)

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """-> (1 + K,) the number of images, and the members' total weight per branch."""
        if targets.is_floating_point():
            members = self.members.to(targets.dtype) @ targets.sum(0)
        else:
            members = self.members[:, targets].sum(-1)
        return torch.cat([self.fusion.denominators(targets).to(members.dtype), members])

    def forward(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, global_denominators: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(K, N, C) logits, (N,) int64 or (N, C) soft targets -> scalar"""
        fusion = self.fusion(branch_logits, targets, global_denominators)
        if self.alpha == 0:
            return fusion
        sums, weights = self.branch_sums(branch_logits, targets)
        weights = weights if global_denominators is None else global_denominators[1:]
        if self.reduction == "pooled":
            branch = sums.sum() / weights.sum()
        else:
            empty = weights == 0
            branch = (sums / weights.masked_fill(empty, 1.0)).masked_fill(empty, 0.0).sum()
        return (1 - self.alpha) * fusion + self.alpha * branch

    def branch_sums(self, branch_logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (K,) sums of the members' costs, (K,) their total weights: Eq. (2) before any division."""
        costs = self.fusion.cost(branch_logits)  # (K, N, C)
        members = self.members.to(costs.dtype)
        if targets.is_floating_point():
            pair_weights = targets.to(costs.dtype) * members[:, None]  # (K, N, C)
            return of_targets(costs, pair_weights).sum(-1), pair_weights.sum(-1).sum(-1)
        weights = members[:, targets]  # (K, N)
        return (weights * of_targets(costs, targets)).sum(-1), weights.sum(-1)


class ExpertsLoss(nn.Module):
    """The sum of a loss over E experts: (E, K, N, C) -> scalar."""

    def __init__(self, of_one: nn.Module):
        super().__init__()
        self.of_one = of_one

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the denominators of one expert's loss."""
        return self.of_one.denominators(targets)

    def forward(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, global_denominators: torch.Tensor | None = None
    ) -> torch.Tensor:
        return sum(self.of_one(of_expert, targets, global_denominators) for of_expert in branch_logits)
