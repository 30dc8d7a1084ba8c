"""The ResLT loss, Eq. (1)-(3), and plain cross-entropy. All take (K, N, C) branch logits, or (E, K, N, C)
of experts; all compute in float32.

A loss is a mean, and its denominators are those of the global batch. Where a process, or one of several passes, sees a
part of that batch, `weights(targets)` of all parts are added up, `forward(..., whole=that sum)` gives the part's share,
and the shares of all parts add up to the loss of the whole.

Logit adjustment (Menon et al. 2021), with an `adjustment` of TAU log(pi), pi the classes' training frequencies: each
cross-entropy sees the logits plus it, the prediction does not. With plain cross-entropy and TAU = 1: balanced softmax."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from reslt.config.schema import Config
from reslt.data.groups import branch_sets


class CrossEntropyLoss(nn.Module):
    """Cross-entropy of the fused logits, Eq. (1): (K, N, C), targets (N,) int64 or (N, C) rows summing to 1 -> scalar."""

    def __init__(self, smoothing: float = 0.0, adjustment: torch.Tensor | None = None):
        """`adjustment`: (C,), added to the logits."""
        super().__init__()
        self.register_buffer("adjustment", adjustment, persistent=False)
        self.smoothing = smoothing

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """-> (1,) the number of images."""
        return torch.full((1,), float(len(targets)), device=targets.device)

    def forward(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        fused = adjusted(at_least_float32(branch_logits).sum(0), self.adjustment)
        if targets.is_floating_point():
            targets = targets.to(fused.dtype)
        total = F.cross_entropy(fused, targets, label_smoothing=self.smoothing, reduction="sum")
        return total / (len(targets) if whole is None else whole[0])


class ExpertsLoss(nn.Module):
    """The sum of a loss over E experts: (E, K, N, C) -> scalar."""

    def __init__(self, of_one: nn.Module):
        super().__init__()
        self.of_one = of_one

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """Those of the loss of one expert."""
        return self.of_one.weights(targets)

    def forward(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        return sum(self.of_one(of_expert, targets, whole) for of_expert in branch_logits)


class ResLTLoss(nn.Module):
    """(1 - alpha) fusion loss + alpha branch loss, Eq. (3).

    The branch loss, Eq. (2), sums over branch k the cross-entropies of the images whose class is in S_k. 'pooled'
    divides by the number of all such (image, branch) pairs, as the released code does; 'mean' takes a mean per branch
    and adds them, 0 for a branch without an image. A soft target counts per class, linearly: class c of image i weighs
    t_ic [c in S_k], in the numerator and in the denominator. Label smoothing acts on each cross-entropy, not on who is
    a member."""

    def __init__(
        self,
        sets: np.ndarray,
        alpha: float,
        reduction: str = "pooled",
        smoothing: float = 0.0,
        adjustment: torch.Tensor | None = None,
    ):
        """`sets`: (K, C) bool, the nested class sets S_1..S_K. `adjustment`: (C,), added to the fused and each branch's
        logits."""
        super().__init__()
        self.register_buffer("members", torch.as_tensor(sets, dtype=torch.float32), persistent=False)
        self.alpha, self.reduction, self.smoothing = alpha, reduction, smoothing
        self.fusion = CrossEntropyLoss(smoothing, adjustment)

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """-> (1 + K,) the number of images, and the members' total weight per branch."""
        if targets.is_floating_point():
            members = self.members.to(targets.dtype) @ targets.sum(0)
        else:
            members = self.members[:, targets].sum(-1)
        return torch.cat([self.fusion.weights(targets).to(members.dtype), members])

    def forward(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(K, N, C) logits, (N,) int64 or (N, C) soft targets -> scalar"""
        fusion = self.fusion(branch_logits, targets, whole)
        if self.alpha == 0:
            return fusion
        sums, weights = self.branch_sums(branch_logits, targets)
        weights = weights if whole is None else whole[1:]
        if self.reduction == "pooled":
            branch = sums.sum() / weights.sum()
        else:
            empty = weights == 0
            branch = (sums / weights.masked_fill(empty, 1.0)).masked_fill(empty, 0.0).sum()
        return (1 - self.alpha) * fusion + self.alpha * branch

    def branch_sums(self, branch_logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (K,) sums of the members' cross-entropies, (K,) their total weights: Eq. (2) before any division."""
        logits = adjusted(at_least_float32(branch_logits), self.fusion.adjustment)
        minus_log_p = -logits.log_softmax(-1)  # (K, N, C)
        members = self.members.to(minus_log_p.dtype)
        if targets.is_floating_point():
            pair_weights = targets.to(minus_log_p.dtype) * members[:, None]  # (K, N, C)
            weights = pair_weights.sum(-1)  # (K, N)
            of_target = (pair_weights * minus_log_p).sum(-1)
        else:
            weights = members[:, targets]
            of_target = weights * minus_log_p.gather(-1, targets.expand(len(members), -1)[..., None])[..., 0]
        if self.smoothing:
            uniform = weights * minus_log_p.mean(-1)
            of_target = (1 - self.smoothing) * of_target + self.smoothing * uniform
        return of_target.sum(-1), weights.sum(-1)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def adjusted(logits: torch.Tensor, adjustment: torch.Tensor | None) -> torch.Tensor:
    """(..., C) logits with a (C,) adjustment added, where there is one."""
    return logits if adjustment is None else logits + adjustment.to(logits.dtype)


def _cross_entropy(c: Config, images_per_class: np.ndarray, adjustment: torch.Tensor | None) -> nn.Module:
    return CrossEntropyLoss(c.smoothing, adjustment)


def _reslt(c: Config, images_per_class: np.ndarray, adjustment: torch.Tensor | None) -> nn.Module:
    sets = branch_sets(images_per_class, c.branches, c.branch_sizes)
    return ResLTLoss(sets, c.alpha, c.branch_loss, c.smoothing, adjustment)


LOSSES = {"reslt": _reslt, "ce": _cross_entropy}  # of the methods in `config.METHODS`


def create_loss(c: Config, images_per_class: np.ndarray) -> nn.Module:
    """The loss of a configuration's method; (C,) training counts decide the nested class sets and the adjustment."""
    adjustment = None
    if c.logit_adjust:
        frequency = torch.as_tensor(images_per_class / images_per_class.sum())
        adjustment = (c.logit_adjust * frequency.log()).float()
    loss = LOSSES[c.method](c, images_per_class, adjustment)
    return ExpertsLoss(loss) if c.experts > 1 else loss
