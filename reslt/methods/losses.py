"""The ResLT loss, Eq. (1)-(3), and the losses of other networks: (K, N, C) branch logits, or (E, K, N, C) of experts ->
scalar.

A loss is a mean, and its denominators are those of the global batch. If a rank shard or a micro-batch is only a part of
that batch, the `denominators(targets)` of all parts are added up, `forward(..., global_denominators=the sum)` returns the
part's share, and the shares of all parts add up to the loss of the whole.

Class weights multiply a target's weight for a class: in the numerator and the denominator, or, if the cost's mean is
"plain", in the numerator alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from reslt.methods.costs import Cost, CrossEntropy, in_full_precision, of_targets, smoothed
from reslt.models.exits import Exited
from reslt.models.featured import Featured
from reslt.models.router import Routed, prefix_means


class FusionLoss(nn.Module):
    """The mean cost of the fused logits, Eq. (1): (K, N, C), targets (N,) int64 or (N, C) with rows that sum to 1 ->
    scalar."""

    def __init__(
        self,
        cost: Cost | None = None,
        smoothing: float | torch.Tensor = 0.0,
        class_weights: torch.Tensor | None = None,
    ):
        """`cost`: None for plain cross-entropy; `smoothing`: of the costs, one number or (C,); `class_weights`: (C,), None
        for equal ones."""
        super().__init__()
        self.cost = cost or CrossEntropy()
        self.is_smoothed = isinstance(smoothing, torch.Tensor) or smoothing > 0
        if isinstance(smoothing, torch.Tensor):
            self.register_buffer("smoothing", smoothing, persistent=False)
        else:
            self.smoothing = smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    @property
    def draws(self) -> int:
        """The number of random numbers that the cost requires for each image."""
        return self.cost.draws

    @property
    def is_weighted_mean(self) -> bool:
        """Whether class weights are in the denominators too."""
        return self.class_weights is not None and self.cost.mean == "weighted"

    def costs(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        """(..., N, C) logits, (N, C) random numbers if the cost requires them -> (..., N, C) smoothed costs."""
        costs = self.cost(logits, uniform) if self.draws else self.cost(logits)
        if not self.is_smoothed:
            return costs
        smoothing = self.smoothing
        return smoothed(costs, smoothing.to(costs.dtype) if isinstance(smoothing, torch.Tensor) else smoothing)

    def of_images(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, uniform: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(K, N, C) logits, (N,) or (N, C) targets -> (N,) costs, multiplied by class weights."""
        costs, weights = self.costs(in_full_precision(branch_logits).sum(0), uniform), self.class_weights
        if weights is None:
            return of_targets(costs, targets)
        if targets.is_floating_point():
            return of_targets(costs, targets * weights.to(targets.dtype))
        return weights.to(costs.dtype)[targets] * of_targets(costs, targets)

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return (1,): the number of images, or their total class weight."""
        if self.is_weighted_mean:
            weights = self.class_weights
            return (targets @ weights.to(targets.dtype) if targets.is_floating_point() else weights[targets]).sum()[
                None
            ]
        return torch.full((1,), float(len(targets)), device=targets.device)

    def forward(
        self,
        branch_logits: torch.Tensor,
        targets: torch.Tensor,
        global_denominators: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = self.of_images(branch_logits, targets, uniform).sum()
        if global_denominators is None and not self.is_weighted_mean:
            return total / len(targets)
        return total / (self.denominators(targets) if global_denominators is None else global_denominators)[0]


class ResLTLoss(nn.Module):
    """The ResLT loss, (1 - alpha) fusion loss + alpha branch loss, Eq. (3).

    The branch loss, Eq. (2), sums for branch k the costs of the images with a class in S_k. 'pooled' divides by the number
    of all such (image, branch) pairs, as the released code does; 'mean' adds the means of the branches, 0 for a branch
    without an image. A soft target counts linearly, class by class: class c of image i weighs t_ic [c in S_k] in the
    numerator and the denominator. Label smoothing affects each cost, not the membership."""

    def __init__(
        self,
        sets: np.ndarray,
        alpha: float,
        reduction: str = "pooled",
        cost: Cost | None = None,
        smoothing: float | torch.Tensor = 0.0,
        class_weights: torch.Tensor | None = None,
        branch_cost: Cost | None = None,
    ):
        """`sets`: (K, C) bool, the class sets S_1..S_K; `branch_cost`: for each branch's logits, None: `cost`; the
        others: for the fused and each branch's logits, as for `FusionLoss`."""
        super().__init__()
        members = torch.as_tensor(sets, dtype=torch.float32)
        self.fusion = FusionLoss(cost, smoothing, class_weights)
        self.of_branch = self.fusion if branch_cost is None else FusionLoss(branch_cost, smoothing, class_weights)
        weighted = members if class_weights is None else members * class_weights
        self.register_buffer("members", weighted, persistent=False)  # weights in the numerators
        self.register_buffer("counted", weighted if self.fusion.is_weighted_mean else members, persistent=False)
        self.alpha, self.reduction = alpha, reduction

    @property
    def draws(self) -> int:
        """The number of random numbers that the cost requires for each image."""
        return self.fusion.draws

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return (1 + K,): the denominator of the fusion loss, and the total weight of the members of each branch."""
        if targets.is_floating_point():
            members = self.counted.to(targets.dtype) @ targets.sum(0)
        else:
            members = self.counted[:, targets].sum(-1)
        return torch.cat([self.fusion.denominators(targets).to(members.dtype), members])

    def forward(
        self,
        branch_logits: torch.Tensor,
        targets: torch.Tensor,
        global_denominators: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(K, N, C) logits, (N,) int64 or (N, C) soft targets -> scalar."""
        fusion = self.fusion(branch_logits, targets, global_denominators, uniform)
        if self.alpha == 0:
            return fusion
        sums, weights = self.branch_sums(branch_logits, targets, uniform)
        weights = weights if global_denominators is None else global_denominators[1:]
        if self.reduction == "pooled":
            branch = sums.sum() / weights.sum()
        else:
            empty = weights == 0
            branch = (sums / weights.masked_fill(empty, 1.0)).masked_fill(empty, 0.0).sum()
        return (1 - self.alpha) * fusion + self.alpha * branch

    def branch_sums(
        self, branch_logits: torch.Tensor, targets: torch.Tensor, uniform: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Eq. (2) before the division: the (K,) sums of the members' costs, and their (K,) total weights."""
        costs = self.of_branch.costs(branch_logits, uniform)  # (K, N, C)
        members, counted = self.members.to(costs.dtype), self.counted.to(costs.dtype)
        if targets.is_floating_point():
            targets = targets.to(costs.dtype)
            return of_targets(costs, targets * members[:, None]).sum(-1), (targets * counted[:, None]).sum(-1).sum(-1)
        return (members[:, targets] * of_targets(costs, targets)).sum(-1), counted[:, targets].sum(-1)


class ExpertsLoss(nn.Module):
    """The sum or mean of a loss over E experts, and a term between the experts that does not see the targets:
    (E, K, N, C) -> scalar."""

    def __init__(
        self,
        of_each: nn.Module | Sequence[nn.Module],
        reduction: str = "sum",
        mutual: nn.Module | None = None,
        mutual_weight: float = 0.0,
    ):
        """`of_each`: one loss for all experts, or a loss for each, with the same denominators; `reduction`: sum or mean over
        experts; `mutual`: (E, N, C) fused logits of the experts -> (E, N) terms, averaged over images and, like the loss,
        added or averaged over experts."""
        super().__init__()
        self.of_each = nn.ModuleList([of_each] if isinstance(of_each, nn.Module) else of_each)
        self.reduction, self.mutual, self.mutual_weight = reduction, mutual, mutual_weight

    @property
    def of_one(self) -> nn.Module:
        """The loss of the first expert."""
        return self.of_each[0]

    @property
    def draws(self) -> int:
        """The number of random numbers that the cost requires for each image; all experts get the same ones."""
        return self.of_one.draws

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the denominators of one expert's loss and, if there is a mutual term, the number of images."""
        of_one = self.of_one.denominators(targets)
        return of_one if self.mutual is None else torch.cat([of_one, of_one.new_full((1,), float(len(targets)))])

    def forward(
        self,
        branch_logits: torch.Tensor,
        targets: torch.Tensor,
        global_denominators: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        of_one, images = global_denominators, len(targets)
        if self.mutual is not None and global_denominators is not None:
            of_one, images = global_denominators[:-1], global_denominators[-1]
        losses = self.of_each if len(self.of_each) > 1 else [self.of_one] * len(branch_logits)
        of_each = zip(losses, branch_logits, strict=True)
        loss = sum(loss_fn(of_expert, targets, of_one, uniform) for loss_fn, of_expert in of_each)
        if self.mutual is not None:
            terms = self.mutual(in_full_precision(branch_logits).sum(1))
            loss = loss + self.mutual_weight * terms.sum() / images
        return loss / len(branch_logits) if self.reduction == "mean" else loss


class ExitsLoss(nn.Module):
    """The loss of a network with early exits, after ELF (Duggal et al. 2020). An image leaves at the first exit that is
    right and confident, and its costs at all exits up to that one are added, so that hard images weigh more. The sum
    over images is divided by the denominator of a single exit, in which every image counts once (a choice of this
    suite)."""

    def __init__(self, of_one: FusionLoss):
        """`of_one`: the loss of an exit."""
        super().__init__()
        self.of_one = of_one

    @property
    def draws(self) -> int:
        """The number of random numbers that the cost requires for each image; all exits get the same ones."""
        return self.of_one.draws

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the denominators of one exit's loss."""
        return self.of_one.denominators(targets)

    def reached(self, exited: Exited, labels: torch.Tensor) -> torch.Tensor:
        """Return (E, N) bool: whether an image reaches each exit. All images reach the first."""
        is_right = exited.branch_logits[:-1, 0].argmax(-1) == labels
        stays = (exited.asks >= 0) | ~is_right
        return torch.cat([torch.ones_like(stays[:1]), stays.cumprod(0).bool()])

    def forward(
        self,
        exited: Exited,
        targets: torch.Tensor,
        global_denominators: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`targets`: (N,) labels -> scalar"""
        costs = torch.stack([self.of_one.of_images(logits, targets, uniform) for logits in exited.branch_logits])
        total = costs.masked_fill(~self.reached(exited, targets), 0.0).sum()
        return total / (self.denominators(targets) if global_denominators is None else global_denominators)[0]


class LossWithFeatures(nn.Module):
    """A loss of the logits, plus `weight` times a loss of the features of the global batch.

    `of_features`: (N, D) features, (N,) labels -> scalar. It sees all images of the step, gathered from all processes, so
    that its pairs and statistics do not depend on the number of processes; each process contributes its share of the
    result. If there are features of several views of each image, view by view, the labels are repeated. With experts, it is
    summed or averaged over them, like the loss of the logits. There is one micro-batch per step. A part with statistics of
    an epoch has a method `begin_epoch()`, which is called before the first step of an epoch."""

    def __init__(self, of_logits: nn.Module, of_features: nn.Module, weight: float, reduction: str = "sum"):
        super().__init__()
        self.of_logits, self.of_features, self.weight, self.reduction = of_logits, of_features, weight, reduction
        self.processes, self.gather = 1, lambda tensor: tensor  # set by `show_features`

    @property
    def draws(self) -> int:
        """The number of random numbers that the cost requires for each image."""
        return self.of_logits.draws

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the denominators of the loss of the logits."""
        return self.of_logits.denominators(targets)

    def forward(
        self,
        featured: Featured,
        targets: torch.Tensor,
        global_denominators: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`targets`: (N,) labels -> scalar"""
        loss = self.of_logits(featured.branch_logits, targets, global_denominators, uniform)
        features = in_full_precision(featured.features)
        labels = self.gather(targets.repeat(features.shape[-2] // len(targets)))
        of_each = [
            self.of_features(self.gather(one), labels) for one in (features if features.ndim == 3 else [features])
        ]
        of_features = sum(of_each) / (len(of_each) if self.reduction == "mean" else 1)
        return loss + self.weight * of_features / self.processes


class RouterLoss(nn.Module):
    """The loss of RIDE's second stage: binary cross-entropy of the router's logits, averaged over experts i < E. An image
    should ask for the next expert if the mean logits of experts 1..i are wrong and those of some larger number of experts
    are right; such an image weighs `positive_weight` (100, as in the released code)."""

    draws = 0

    def __init__(self, positive_weight: float = 100.0):
        super().__init__()
        self.register_buffer("positive_weight", torch.tensor(positive_weight), persistent=False)

    def denominators(self, targets: torch.Tensor) -> torch.Tensor:
        """Return (1,): the number of images."""
        return torch.full((1,), float(len(targets)), device=targets.device)

    def wanted(self, branch_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(E, K, N, C) branch logits, (N,) labels -> (E - 1, N) bool: whether the image should ask for the next expert."""
        is_right = prefix_means(branch_logits).argmax(-1) == targets
        right_later = is_right.flip(0).cumsum(0).flip(0)[1:] > 0
        return ~is_right[:-1] & right_later

    def forward(
        self,
        routed: Routed,
        targets: torch.Tensor,
        global_denominators: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`targets`: (N,) labels -> scalar"""
        wanted = self.wanted(routed.branch_logits, targets).to(routed.asks.dtype)
        costs = F.binary_cross_entropy_with_logits(
            routed.asks, wanted, pos_weight=self.positive_weight.to(wanted.dtype), reduction="none"
        )
        total = costs.mean(0).sum()
        return total / (len(targets) if global_denominators is None else global_denominators[0])


class Diversity(nn.Module):
    """RIDE's term between experts (Wang et al. 2021). For expert e it is tbar^2 KL(softmax(zbar / T) || softmax(z_e / T)),
    with the experts' mean logits zbar, a temperature T_c for each class, and the mean temperature tbar. The gradient passes
    through z_e only. A negative weight drives the experts apart."""

    def __init__(self, temperatures: torch.Tensor | None = None):
        """`temperatures`: (C,) T; None: 1 for every class."""
        super().__init__()
        self.register_buffer("temperatures", temperatures, persistent=False)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """(E, N, C) -> (E, N)."""
        if self.temperatures is None:
            return _divergence(logits.detach().mean(0), logits)
        temperatures = self.temperatures.to(logits.dtype)
        tempered = logits / temperatures
        return temperatures.mean() ** 2 * _divergence(tempered.detach().mean(0), tempered)


def _divergence(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(N, C) logits, (E, N, C) others -> (E, N) KL(softmax(logits) || softmax(others))."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - others.log_softmax(-1))).sum(-1)


def temperatures(images_per_class: np.ndarray, factor: float) -> np.ndarray:
    """(C,) training counts -> (C,) float64 temperatures of RIDE, in proportion to C pi_c factor + 1 - factor with the class
    frequencies pi; the largest is 1."""
    found = len(images_per_class) * images_per_class / images_per_class.sum() * factor + 1 - factor
    return found / found.max()


class PairwiseKL(nn.Module):
    """The mutual KL divergence of experts. For expert e it is the mean over the other experts f of
    KL(softmax(z_f) || softmax(z_e)); the gradient passes through z_e only.

    Nested balanced online distillation (NCL, Li et al. 2022) adds the priors of training to z, and adds the same term for
    the softmax over an image's hardest classes alone. Here these are the classes with the largest mean logits of the
    experts, without prior; the authors' code takes the label and the classes of the first expert's largest logits, and lets
    the gradient pass through both sides."""

    def __init__(self, priors: torch.Tensor | None = None, hard_classes: int | None = None):
        """`priors`: (E, C), added to each expert's logits; `hard_classes`: the number of an image's hardest classes for the
        second term, all if there are fewer; None: no second term."""
        super().__init__()
        self.register_buffer("priors", priors, persistent=False)
        self.hard_classes = hard_classes

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """(E, N, C) -> (E, N)."""
        seen = logits if self.priors is None else logits + self.priors[:, None].to(logits.dtype)
        terms = self._between(seen)
        if self.hard_classes is None:
            return terms
        hardest = logits.detach().mean(0).topk(min(self.hard_classes, logits.shape[-1]), -1).indices  # (N, H)
        return terms + self._between(seen.gather(-1, hardest.expand(len(logits), -1, -1)))

    @staticmethod
    def _between(logits: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(-1)
        target = log_p.detach()
        p = target.exp()
        # (E, N): the sum over all f; the term f = e is 0, but has a gradient, so it is subtracted
        own = (p * (target - log_p)).sum(-1)
        of_all = (p * target).sum(-1).sum(0) - (p.sum(0) * log_p).sum(-1)
        return (of_all - own) / max(len(logits) - 1, 1)
