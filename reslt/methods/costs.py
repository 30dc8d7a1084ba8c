"""Costs of all labels at once: logits (..., C) -> costs (..., C). Entry c answers: what would it cost if the label were c?

Nearly every classification loss of the field is linear in its target, so soft targets, memberships of branches, class
weights and experts are written once for all of them, in `losses.py`. Costs are computed in float32 at least.

A prior is TAU log(pi), with pi the classes' training frequencies: the cost adds it to the logits, the prediction does
not (logit adjustment, Menon et al. 2021). With plain cross-entropy and TAU = 1, this is balanced softmax."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Cost(nn.Module):
    """The base class of costs, (..., C) logits -> (..., C) costs.

    `mean`: whether a loss with class weights divides by their sum ("weighted", as torch's CrossEntropyLoss does) or by the
    number of images ("plain"). `draws`: the number of uniform random numbers that `forward` requires for each image, C or
    0; they are drawn for the global batch from (seed, step)."""

    mean = "weighted"
    draws = 0

    def __init__(self, prior: torch.Tensor | None = None):
        """`prior`: (C,), added to the logits; None: no prior."""
        super().__init__()
        self.register_buffer("prior", prior, persistent=False)

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits with the prior, in float32, or float64 if they are."""
        logits = in_full_precision(logits)
        return logits if self.prior is None else logits + self.prior.to(logits.dtype)

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError


class CrossEntropy(Cost):
    """Cross-entropy, -log p_c."""

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        return -self.adjusted(logits).log_softmax(-1)


class HardCrossEntropy(Cost):
    """Cross-entropy, plus cross-entropy among `hard_classes` classes alone (Li et al. 2022): c and the other classes with
    the largest logits, before the prior is added."""

    def __init__(self, hard_classes: int, prior: torch.Tensor | None = None):
        """`hard_classes`: the number of classes compared, including c; 2 or more, all if there are fewer."""
        super().__init__(prior)
        self.hard_classes = hard_classes

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        adjusted = self.adjusted(logits)
        hardest = logits.topk(min(self.hard_classes, logits.shape[-1]), -1).indices  # the hardest first
        seen = adjusted.gather(-1, hardest)
        # A label that is not among the hardest replaces the last of them
        among_others = torch.logaddexp(seen[..., :-1].logsumexp(-1, keepdim=True), adjusted)
        is_hard = torch.zeros_like(adjusted, dtype=torch.bool).scatter(-1, hardest, True)
        hard = torch.where(is_hard, seen.logsumexp(-1, keepdim=True), among_others) - adjusted
        return hard - adjusted.log_softmax(-1)


class Focal(Cost):
    """The focal loss on a softmax (Lin et al. 2017): -(1 - p_c)^gamma log p_c. A class weight multiplies the cost and does
    not enter p."""

    mean = "plain"

    def __init__(self, gamma: float, prior: torch.Tensor | None = None):
        super().__init__(prior)
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        log_p = self.adjusted(logits).log_softmax(-1)
        if self.gamma == 0:
            return -log_p
        others = -torch.expm1(log_p).clamp(max=-torch.finfo(log_p.dtype).tiny)  # 1 - p, above 0 for a finite slope
        return -(others**self.gamma) * log_p


class SigmoidFocal(Cost):
    """The focal loss of C binary problems (Cui et al. 2019, Eq. (14)): sum_k (1 - q_k)^gamma (-log q_k), with q_k =
    sigmoid(z_k) for k = c and 1 - sigmoid(z_k) for the others."""

    mean = "plain"

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        logits = in_full_precision(logits)
        positive, negative = self._binary(logits), self._binary(-logits)
        return negative.sum(-1, keepdim=True) + (positive - negative)

    def _binary(self, logits: torch.Tensor) -> torch.Tensor:
        """Return (1 - sigmoid(z))^gamma (-log sigmoid(z)) for logits z."""
        return torch.exp(self.gamma * F.logsigmoid(-logits)) * -F.logsigmoid(logits)


class LDAM(Cost):
    """Label-distribution-aware margins, the cross-entropy of z - m_y e_y (Cao et al. 2019). Each label c has a margin m_c,
    larger for rare classes: log(e^(z_c - m_c) + sum_{k != c} e^(z_k)) - (z_c - m_c)."""

    def __init__(self, margins: torch.Tensor, prior: torch.Tensor | None = None):
        """`margins`: (C,), in units of the logits."""
        super().__init__(prior)
        self.register_buffer("margins", margins, persistent=False)

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.adjusted(logits)
        margins = self.margins.to(logits.dtype)
        log_p = logits.log_softmax(-1)
        top = logits.argmax(-1, keepdim=True)
        # With S = sum_k e^(z_k), the sum in the formula is S (1 - p_c (1 - e^(-m_c))). The p of the largest logit may round
        # to 1, so for that one the other terms are added up separately.
        p = log_p.exp().scatter(-1, top, 0.0)
        costs = torch.log1p(p * torch.expm1(-margins)) - log_p + margins
        others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
        of_top = F.softplus(others - (logits - margins).gather(-1, top))
        return costs.scatter(-1, top, of_top)


class VectorScaling(Cost):
    """The vector-scaling loss (VS, Kini et al. 2021): cross-entropy of z / D + prior, with D_c = (n_max / n_c)^gamma;
    without a prior, CDT (Ye et al. 2020). The prediction uses z."""

    def __init__(self, divisors: torch.Tensor, prior: torch.Tensor | None = None):
        """`divisors`: (C,) D."""
        super().__init__(prior)
        self.register_buffer("divisors", divisors, persistent=False)

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        logits = in_full_precision(logits)
        return -self.adjusted(logits / self.divisors.to(logits.dtype)).log_softmax(-1)


class SoftmaxEqualization(Cost):
    """Softmax equalization loss (Tan et al. 2020). For an image of another class, a rare class k is left out of the
    denominator with probability gamma: log(sum_k (1 - b_k r_k [k != c]) e^(z_k)) - z_c, with r_k = [k is rare] and b_k
    drawn for each image and class."""

    def __init__(self, rare: torch.Tensor, gamma: float, prior: torch.Tensor | None = None):
        """`rare`: (C,) bool."""
        super().__init__(prior)
        self.register_buffer("rare", rare, persistent=False)
        self.gamma, self.draws = gamma, len(rare) if gamma else 0

    def forward(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        """`uniform`: (N, C) in [0, 1) for (..., N, C) logits; required if gamma is above 0."""
        logits = self.adjusted(logits)
        if self.gamma == 0:
            return -logits.log_softmax(-1)
        left_out = self.rare & (uniform < self.gamma)  # (N, C)
        nothing_kept = left_out.all(-1, keepdim=True)  # then the sum is 0, and its logarithm has no slope
        kept = logits.masked_fill(left_out & ~nothing_kept, -torch.inf).logsumexp(-1, keepdim=True)
        kept = kept.masked_fill(nothing_kept, torch.finfo(logits.dtype).min)
        return torch.where(left_out, torch.logaddexp(kept, logits), kept) - logits


def in_full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def smoothed(costs: torch.Tensor, smoothing: float | torch.Tensor) -> torch.Tensor:
    """Return (1 - eps) times each label's own cost plus eps times the mean over all labels, for (..., C) costs and one
    number or (C,) numbers eps. For cross-entropy this is label smoothing; with eps per class, that of MiSLAS (Zhong et al.
    2021)."""
    return (1 - smoothing) * costs + smoothing * costs.mean(-1, keepdim=True)


def of_targets(costs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(..., N, C) costs, (N,) int64 targets or (..., N, C) weights per class -> (..., N) costs of the targets."""
    if targets.is_floating_point():
        return (costs * targets.to(costs.dtype)).sum(-1)
    return costs.gather(-1, targets.expand(costs.shape[:-1])[..., None])[..., 0]


def class_prior(images_per_class: np.ndarray, tau: float, tau_reversed: float = 0.0) -> torch.Tensor | None:
    """(C,) training counts -> (C,) float32 tau log(frequency) - tau_reversed log(reversed frequency); None if both factors
    are 0. In the reversed frequencies, the r-th rarest class has the frequency of the r-th most frequent one (SADE, Zhang
    et al. 2022)."""
    if not tau and not tau_reversed:
        return None
    frequency = torch.as_tensor(images_per_class / images_per_class.sum())
    prior = tau * frequency.log()
    if tau_reversed:
        ascending = frequency.sort(stable=True)
        of_opposite = torch.empty_like(frequency).scatter(0, ascending.indices, ascending.values.flip(0))
        prior -= tau_reversed * of_opposite.log()
    return prior.float()


def ldam_margins(images_per_class: np.ndarray, largest: float) -> np.ndarray:
    """(C,) training counts -> (C,) float64 margins, largest (n_min / n_c)^(1/4)."""
    return largest * (images_per_class.min() / images_per_class) ** 0.25


def vs_divisors(images_per_class: np.ndarray, gamma: float) -> np.ndarray:
    """(C,) training counts -> (C,) float64 divisors of the logits, (n_max / n_c)^gamma."""
    return (images_per_class.max() / images_per_class) ** gamma


def label_aware_smoothing(images_per_class: np.ndarray, head: float, tail: float) -> np.ndarray:
    """(C,) training counts -> (C,) float64 smoothing, in MiSLAS's concave form: tail + (head - tail) sin(pi (n_c - n_min) /
    (2 (n_max - n_min))); if all counts are equal, `head`."""
    least, most = images_per_class.min(), images_per_class.max()
    if least == most:
        return np.full(len(images_per_class), head)
    return tail + (head - tail) * np.sin(np.pi / 2 * (images_per_class - least) / (most - least))
