"""Hits per class and branch -> accuracies. Numbers only; `report.py` prints them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from reslt.groups import SHOTS


@dataclass(frozen=True)
class EpochStats:
    """Means over one epoch of training."""

    loss: float
    images_per_second: float
    waiting: float  # share of the time spent waiting for data, 0..1


class ClassHits:
    """Counts hits per class for the fused prediction (row 0) and each branch (rows 1..K), on the device."""

    def __init__(self, branches: int, num_classes: int, device: torch.device):
        rows = 1 + branches if branches > 1 else 1
        self.hits = torch.zeros(rows, num_classes, dtype=torch.int64, device=device)
        self.images = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def update(self, branch_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """(K, N, C) branch logits, (N,) labels. No host-device synchronisation."""
        predictions = branch_logits.float().sum(0, keepdim=True).argmax(-1)
        if len(self.hits) > 1:
            predictions = torch.cat([predictions, branch_logits.argmax(-1)])
        hit = (predictions == labels).long()
        self.hits.scatter_add_(1, labels.expand_as(hit), hit)
        self.images.scatter_add_(0, labels, torch.ones_like(labels))

    def accuracies(self) -> ClassAccuracies:
        """The counts so far, read back from the device."""
        return ClassAccuracies(self.hits.cpu().numpy(), self.images.cpu().numpy())


class ClassAccuracies:
    """`per_class` (1 + K, C) in percent, fused first; NaN for a class without test images."""

    def __init__(self, hits: np.ndarray, images: np.ndarray):
        self.hits, self.images = hits, images
        with np.errstate(invalid="ignore"):
            self.per_class = 100 * hits / images

    @property
    def all(self) -> np.ndarray:
        """(1 + K,) top-1 over all images, in percent."""
        return 100 * self.hits.sum(1) / self.images.sum()

    @property
    def class_mean(self) -> np.ndarray:
        """(1 + K,) mean over the classes' accuracies, in percent."""
        return _mean_over(self.per_class, self.images > 0)

    def shots(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Per shot group (1 + K,) mean accuracy of its classes; NaN for a group without tested class."""
        return {shot: _mean_over(self.per_class, groups[shot] & (self.images > 0)) for shot in SHOTS}


def _mean_over(per_class: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return per_class[:, classes].mean(1) if classes.any() else np.full(len(per_class), np.nan)
