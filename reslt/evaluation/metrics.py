"""Hits per class and branch -> accuracies. Numbers only; `tables.py` prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from reslt.data.groups import SHOTS, STANDARD_SPLIT, shot_groups
from reslt.evaluation.calibration import ConfidenceBins
from reslt.models.exits import Exited, exited_logits
from reslt.models.featured import Featured
from reslt.models.router import Routed, experts_used, routed_logits


@dataclass(frozen=True)
class EpochStats:
    """Means over one epoch of training."""

    loss: float
    accuracy: float  # of the fused prediction on the augmented training images, in percent; NaN if they are mixed
    images_per_second: float
    waiting: float  # fraction of the time spent waiting for data, 0..1


def fused_branches(branch_logits: torch.Tensor, fusion: str | None = None) -> torch.Tensor:
    """(..., K, N, C) branch logits -> (..., N, C) float32: their sum, the prediction of ResLT, or one of the paper's
    ablations. 'max': the maximum over branches; 'softmax': the logarithm of the sum over branches of their softmax, which
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
    """(K, N, C) branch logits, or (E, K, N, C) of experts -> (N, C): fused over branches, averaged over experts; with a
    router, over those that the image uses; of early exits, those of the exit that predicts."""
    if isinstance(branch_logits, Featured):
        branch_logits = branch_logits.branch_logits
    if isinstance(branch_logits, Exited):
        return exited_logits(fused_branches(branch_logits.branch_logits, fusion), branch_logits.asks)
    if isinstance(branch_logits, Routed):
        return routed_logits(fused_branches(branch_logits.branch_logits, fusion), branch_logits.asks)
    fused = fused_branches(branch_logits, fusion)
    return fused if fused.ndim == 2 else fused.mean(0)


def logits_of_rows(
    branch_logits: torch.Tensor | Routed, fusion: str | None = None, prior: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """(K, N, C) or (E, K, N, C) branch logits, with a router's -> the logits of the rows of a table, each (r, N, C): of the
    fused prediction, with a router of all experts together, of each of K > 1 branches (with experts: their mean), of each of
    E > 1 experts (its fused branches). `prior`: (C,), subtracted from every row."""
    rows = [fused_logits(branch_logits, fusion)[None]]
    if isinstance(branch_logits, Routed):
        branch_logits = branch_logits.branch_logits
        rows.append(fused_logits(branch_logits, fusion)[None])
    of_experts = branch_logits.float()[None] if branch_logits.ndim == 3 else branch_logits.float()
    if of_experts.shape[1] > 1:
        rows.append(of_experts.mean(0))
    if of_experts.shape[0] > 1:
        rows.append(fused_branches(of_experts, fusion))
    return rows if prior is None else [logits - prior for logits in rows]


def table_rows(logits_per_image: tuple[int, ...], is_routed: bool = False) -> int:
    """(K,) or (E, K) -> the number of rows of a table."""
    return 1 + is_routed + sum(count for count in logits_per_image if count > 1)


class ClassHits:
    """Hits per class, counted on the device, of the rows of `logits_of_rows`; confidence of the fused prediction."""

    def __init__(
        self,
        logits_per_image: tuple[int, ...],
        num_classes: int,
        device: torch.device,
        prior: torch.Tensor | None = None,
        fusion: str | None = None,
        is_routed: bool = False,
        temperature: float | None = None,
    ):
        """`logits_per_image`: (K,) or (E, K); `prior`: (C,), subtracted from the logits of every row; `fusion`: see
        `fused_branches`; `is_routed`: whether a router chooses among the experts; `temperature`: at which confidence is
        recorded besides 1."""
        self.prior, self.fusion, self.is_routed = prior, fusion, is_routed
        rows = table_rows(logits_per_image, is_routed)
        self.hits = torch.zeros(rows, num_classes, dtype=torch.int64, device=device)
        self.images = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.not_finite = torch.zeros((), dtype=torch.int64, device=device)  # images with such a logit
        self.used = torch.zeros((), dtype=torch.int64, device=device)  # experts that a router used, over all images
        self.confidence = ConfidenceBins((1.0,) if temperature is None else (1.0, temperature), device)

    def update(self, branch_logits: torch.Tensor | Routed, labels: torch.Tensor) -> None:
        """(K, N, C) or (E, K, N, C) branch logits, with a router's, (N,) labels. No host-device synchronization."""
        rows = logits_of_rows(branch_logits, self.fusion, self.prior)
        if isinstance(branch_logits, Routed):
            branch_logits, asks = branch_logits
            self.used += experts_used(asks).sum()
        self.not_finite += (~branch_logits.isfinite().all(-1)).flatten(0, -2).any(0).sum()
        hit = (torch.cat([logits.argmax(-1) for logits in rows]) == labels).long()
        self.hits.scatter_add_(1, labels.expand_as(hit), hit)
        self.images.scatter_add_(0, labels, torch.ones_like(labels))
        self.confidence.update(rows[0][0], hit[0])

    def reduce(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the counts by those of all processes. `add_up`: the sum of a tensor over the processes."""
        for name in ("hits", "images", "not_finite", "used"):
            setattr(self, name, add_up(getattr(self, name)))
        self.confidence.sums = add_up(self.confidence.sums)

    def accuracies(self) -> ClassAccuracies:
        """Return the accuracies so far, from the counts on the device."""
        hits, images = self.hits.cpu().numpy(), self.images.cpu().numpy()
        used = int(self.used) / images.sum() if self.is_routed else None
        return ClassAccuracies(hits, images, used, self.confidence.errors(), *self.confidence.temperatures[1:])


class ClassAccuracies:
    """`per_class` (R, C) in percent, rows as `ClassHits` orders them; NaN for a class without test images. `experts_used`:
    by an image, on average; None: there is no router. `calibration_errors`: of the fused prediction, in [0, 1], and a second
    one at the `temperature` if there is one; empty: not recorded."""

    def __init__(
        self,
        hits: np.ndarray,
        images: np.ndarray,
        experts_used: float | None = None,
        calibration_errors: tuple[float, ...] = (),
        temperature: float | None = None,
    ):
        self.hits, self.images, self.experts_used = hits, images, experts_used
        self.calibration_errors, self.temperature = calibration_errors, temperature
        with np.errstate(invalid="ignore"):
            self.per_class = 100 * hits / images

    @property
    def all(self) -> np.ndarray:
        """(R,) top-1 over all images, in percent."""
        return 100 * self.hits.sum(1) / self.images.sum()

    @property
    def class_mean(self) -> np.ndarray:
        """(R,) mean over the classes' accuracies, in percent."""
        return _mean_over(self.per_class, self.images > 0)

    @property
    def is_balanced(self) -> bool:
        """Whether all tested classes have equally many images, so that `class_mean` is `all`."""
        return len(set(self.images[self.images > 0].tolist())) <= 1

    @property
    def score(self) -> float:
        """The number by which a validation list chooses, in percent: the class mean of the fused prediction, which is its
        top-1 if the list is balanced. (On a long-tailed list, top-1 would choose whatever favors frequent classes.)"""
        return float((self.all if self.is_balanced else self.class_mean)[0])

    def shots(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return per shot group the (R,) mean accuracy of its classes; NaN for a group without a tested class."""
        return {shot: _mean_over(self.per_class, groups[shot] & (self.images > 0)) for shot in SHOTS}


def shot_accuracy(
    predictions: np.ndarray, labels: np.ndarray, images_per_class: np.ndarray, split: dict = STANDARD_SPLIT
) -> dict[str, float]:
    """(N,) predicted and (N,) true classes, (C,) training counts -> top-1 in percent: many, medium, few, each the mean
    of its classes' accuracies (NaN without a tested class), and all, over all images. `split`: see `shot_groups`."""
    predictions, labels, counts = (np.asarray(values) for values in (predictions, labels, images_per_class))
    hits = np.bincount(labels[predictions == labels], minlength=len(counts))
    found = ClassAccuracies(hits[None], np.bincount(labels, minlength=len(counts)))
    shots = {shot: float(rows[0]) for shot, rows in found.shots(shot_groups(counts, split)).items()}
    return shots | {"all": float(found.all[0])}


def _mean_over(per_class: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return per_class[:, classes].mean(1) if classes.any() else np.full(len(per_class), np.nan)
