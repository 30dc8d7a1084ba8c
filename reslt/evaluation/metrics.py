"""Hits per class and branch, and the accuracies from them. Numbers only; `tables.py` prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from reslt.data.groups import SHOTS, STANDARD_SPLIT, shot_groups
from reslt.evaluation.calibration import ConfidenceBins
from reslt.models.fusion import fused_branches, fused_logits
from reslt.models.router import Routed, experts_used

VALUES_AT_ONCE = 1 << 18  # logits whose hits are counted at once
MOST_WAITING = 64  # batches; the labels of each, from a worker process, may occupy an open file


def logits_of_rows(
    branch_logits: torch.Tensor | Routed, fusion: str | None = None, prior: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """(K, N, C) or (E, K, N, C) branch logits, perhaps of a router -> the logits of the rows of a table, each (r, N, C): the
    fused prediction; with a router, that of all experts together; each of K > 1 branches (the mean over experts); each of
    E > 1 experts (the fused branches). `prior`: (C,), subtracted from every row."""
    if isinstance(branch_logits, Routed):
        branch_logits = branch_logits._replace(branch_logits=branch_logits.branch_logits.float())
    else:
        branch_logits = branch_logits.float()
    rows = [fused_logits(branch_logits, fusion)[None]]
    if isinstance(branch_logits, Routed):
        branch_logits = branch_logits.branch_logits
        rows.append(fused_logits(branch_logits, fusion)[None])
    of_experts = branch_logits[None] if branch_logits.ndim == 3 else branch_logits
    if of_experts.shape[1] > 1:
        rows.append(of_experts[0] if len(of_experts) == 1 else of_experts.mean(0))
    if of_experts.shape[0] > 1:
        rows.append(fused_branches(of_experts, fusion))
    return rows if prior is None else [logits - prior for logits in rows]


def table_rows(logits_per_image: tuple[int, ...], is_routed: bool = False) -> int:
    """(K,) or (E, K) -> the number of rows of a table."""
    return 1 + is_routed + sum(count for count in logits_per_image if count > 1)


class ClassHits:
    """Hits per class for the rows of `logits_of_rows`, and the confidence of the fused prediction, counted on the device.
    Batches are counted together when they have VALUES_AT_ONCE logits, or are MOST_WAITING, which saves time of the host."""

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
        `fused_branches`; `is_routed`: whether a router chooses among the experts; `temperature`: a second one, besides 1, for
        which confidence is recorded."""
        self.prior, self.fusion, self.is_routed = prior, fusion, is_routed
        self.temperatures = (1.0,) if temperature is None else (1.0, temperature)
        rows = table_rows(logits_per_image, is_routed)
        self._shapes = (rows, num_classes), (num_classes,), (), (), (len(self.temperatures), *ConfidenceBins.shape)
        # All counts are in one tensor, which is summed over processes and copied at once. float64 is exact.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._counts = torch.zeros(sum(map(math.prod, self._shapes)), dtype=dtype, device=device)
        self._waiting: list[tuple[torch.Tensor | Routed, torch.Tensor]] = []
        self._values = 0  # logits of the waiting batches

    def update(self, branch_logits: torch.Tensor | Routed, labels: torch.Tensor) -> None:
        """Add a batch: (K, N, C) or (E, K, N, C) branch logits, perhaps of a router, and (N,) labels, which must not change
        later. No host-device synchronization."""
        self._waiting.append((branch_logits, labels))
        self._values += _branch_logits(branch_logits).numel()
        if self._values >= VALUES_AT_ONCE or len(self._waiting) == MOST_WAITING:
            self._count()

    @property
    def counts(self) -> torch.Tensor:
        """All counts so far, as a flat tensor on the device."""
        if self._waiting:
            self._count()
        return self._counts

    def reduce(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the counts by those of all processes. `add_up`: a function that sums a tensor over the processes."""
        self._counts = add_up(self.counts)

    def accuracies(self) -> ClassAccuracies:
        """Return the accuracies so far. The counts are copied to the host at once."""
        hits, images, not_finite, used, confidence = self._split(self.counts.cpu())
        hits, images = hits.long().numpy(), images.long().numpy()
        return ClassAccuracies(
            hits,
            images,
            float(used) / images.sum() if self.is_routed else None,
            ConfidenceBins(self.temperatures, confidence).errors(),
            *self.temperatures[1:],
            not_finite=int(not_finite),
        )

    def _count(self) -> None:
        branch_logits, labels = _together(self._waiting)
        self._waiting, self._values = [], 0
        hits, images, not_finite, used, confidence = self._split(self._counts)
        rows = logits_of_rows(branch_logits, self.fusion, self.prior)
        if self.is_routed:
            used += experts_used(branch_logits.asks).sum()
        of_branches = _branch_logits(branch_logits)
        is_finite = of_branches.amax(-1).isfinite() & of_branches.amin(-1).isfinite()
        not_finite += (~is_finite.flatten(0, -2).all(0)).sum()
        hit = (torch.cat([_first_of_largest(logits) for logits in rows]) == labels).to(hits.dtype)
        hits.scatter_add_(1, labels.expand_as(hit), hit)
        images.scatter_add_(0, labels, torch.ones_like(labels, dtype=images.dtype))
        ConfidenceBins(self.temperatures, confidence).update(rows[0][0], hit[0])

    def _split(self, counts: torch.Tensor) -> list[torch.Tensor]:
        """Return views of `counts`: (R, C) hits; (C,) images; () images with a logit that is not finite; () experts that a
        router used; (T, 3, B) sums of `ConfidenceBins`."""
        parts = counts.split([math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _branch_logits(outputs: torch.Tensor | Routed) -> torch.Tensor:
    return outputs.branch_logits if isinstance(outputs, Routed) else outputs


def _first_of_largest(logits: torch.Tensor) -> torch.Tensor:
    """(..., C) logits -> (...) predicted classes: the first class with the largest logit."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # vectorized, unlike torch's
    return logits.argmax(-1)


def _together(
    batches: Sequence[tuple[torch.Tensor | Routed, torch.Tensor]],
) -> tuple[torch.Tensor | Routed, torch.Tensor]:
    """Concatenate batches of branch logits, perhaps of a router, and labels."""
    if len(batches) == 1:
        return batches[0]
    outputs, labels = zip(*batches, strict=True)
    together = torch.cat([_branch_logits(of_batch) for of_batch in outputs], -2)
    if isinstance(outputs[0], Routed):
        together = type(outputs[0])(together, torch.cat([of_batch.asks for of_batch in outputs], -1))
    return together, torch.cat(labels)


class ClassAccuracies:
    """Accuracies per class: `per_class` (R, C) in percent, with the rows of `ClassHits`; NaN for a class without test images.
    `experts_used`: the mean number per image; None without a router. `calibration_errors`: of the fused prediction, in
    [0, 1], a second one at the `temperature` if there is one; empty: not recorded. `not_finite`: the number of images with a
    logit that is not finite."""

    def __init__(
        self,
        hits: np.ndarray,
        images: np.ndarray,
        experts_used: float | None = None,
        calibration_errors: tuple[float, ...] = (),
        temperature: float | None = None,
        not_finite: int = 0,
    ):
        self.hits, self.images, self.experts_used, self.not_finite = hits, images, experts_used, not_finite
        self.calibration_errors, self.temperature = calibration_errors, temperature
        with np.errstate(invalid="ignore"):
            self.per_class = 100 * hits / images

    @property
    def all(self) -> np.ndarray:
        """(R,) top-1 over all images, in percent."""
        return 100 * self.hits.sum(1) / self.images.sum()

    @property
    def class_mean(self) -> np.ndarray:
        """(R,) mean accuracy of the classes, in percent."""
        return _mean_over(self.per_class, self.images > 0)

    @property
    def is_balanced(self) -> bool:
        """Whether all tested classes have the same number of images, so that `class_mean` equals `all`."""
        return len(set(self.images[self.images > 0].tolist())) <= 1

    @property
    def score(self) -> float:
        """The number by which a validation list chooses an epoch or a setting, in percent: the class mean of the fused
        prediction, which equals top-1 if the list is balanced. (On a long-tailed list, top-1 would favor frequent classes.)"""
        return float((self.all if self.is_balanced else self.class_mean)[0])

    def shots(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return {shot group: (R,) mean accuracy of its classes}, in percent; NaN for a group without a tested class."""
        return {shot: _mean_over(self.per_class, groups[shot] & (self.images > 0)) for shot in SHOTS}


def shot_accuracy(
    predictions: np.ndarray, labels: np.ndarray, images_per_class: np.ndarray, split: dict = STANDARD_SPLIT
) -> dict[str, float]:
    """(N,) predicted classes, (N,) labels, (C,) training counts -> top-1 accuracies in percent: many, medium and few, each the
    mean accuracy of its classes (NaN without a tested class), and all, over all images. `split`: see `shot_groups`."""
    predictions, labels, counts = (np.asarray(values) for values in (predictions, labels, images_per_class))
    hits = np.bincount(labels[predictions == labels], minlength=len(counts))
    found = ClassAccuracies(hits[None], np.bincount(labels, minlength=len(counts)))
    shots = {shot: float(rows[0]) for shot, rows in found.shots(shot_groups(counts, split)).items()}
    return shots | {"all": float(found.all[0])}


def _mean_over(per_class: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return per_class[:, classes].mean(1) if classes.any() else np.full(len(per_class), np.nan)
