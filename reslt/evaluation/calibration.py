"""Calibration: the agreement of confidence and accuracy, and the temperature that improves it. Numbers only.

Probabilities are softmax(logits / temperature) of the fused logits, which rank the classes, so a temperature changes no
prediction (Guo et al. 2017, On Calibration of Modern Neural Networks)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd

BINS = 15  # of equal width, ((m - 1) / BINS, m / BINS], as in Guo et al.
LOWEST, HIGHEST = 0.001, 1000.0  # temperatures: none is optimal if all predictions are right, or all are wrong
VALUES_AT_ONCE = 1 << 22  # of logits, in float64: 32 MiB


def fit_temperature(logits: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor) -> float:
    """Return the temperature in [LOWEST, HIGHEST] that minimizes `negative_log_likelihood` of (N, C) logits and (N,)
    labels; 1 if all temperatures are equally good. In float64, some rows at a time.

    Each class has equal weight, as in the choice of the best epoch: on a long-tailed list, frequent classes would dominate
    the mean over images. On a balanced list, both are the same.

    The function is convex in 1 / T, so its derivative has at most one root between the bounds."""
    from scipy.optimize import brentq

    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels).long()
    weights = _weights(labels)

    def slope(log_inverse: float) -> float:
        """Return the derivative with respect to 1 / T: the expected logit minus the logit of the label, averaged."""
        total = 0.0
        for rows, own, weight in _parts(logits, labels, weights):
            shifted = rows - rows.amax(1, keepdim=True)
            expected = ((shifted * math.exp(log_inverse)).softmax(1) * shifted).sum(1)
            actual = shifted.gather(1, own[:, None])[:, 0]
            total += float((weight * (expected - actual)).sum())
        return total

    coldest, hottest = -math.log(LOWEST), -math.log(HIGHEST)
    at_coldest, at_hottest = slope(coldest), slope(hottest)
    if at_coldest == at_hottest == 0:
        return 1.0
    if at_coldest <= 0:
        return LOWEST
    if at_hottest >= 0:
        return HIGHEST
    return math.exp(-brentq(slope, hottest, coldest, xtol=1e-5))


def negative_log_likelihood(
    logits: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor, temperature: float = 1.0
) -> float:
    """Return the cross-entropy of (N, C) logits and (N,) labels at a temperature, in nats, averaged over the images of each
    class, then over the classes that occur."""
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels).long()
    total = 0.0
    for rows, own, weight in _parts(logits, labels, _weights(labels)):
        of_labels = (rows / temperature).log_softmax(1).gather(1, own[:, None])[:, 0]
        total -= float((weight * of_labels).sum())
    return total


def probabilities_of(logits: np.ndarray | torch.Tensor, temperature: float | None = None) -> np.ndarray:
    """(N, C) fused logits -> (N, C) float32 probabilities, softmax(logits / temperature); None: not calibrated, as 1."""
    return (torch.as_tensor(logits).float() / (temperature or 1.0)).softmax(1).numpy()


def expected_calibration_error(confidences: np.ndarray, hits: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1]: the mean over images of |accuracy - mean confidence| in the bin of
    the image (Naeini et al. 2015; Guo et al. 2017, Eq. 3). NaN without images.

    `confidences`: (N,) probabilities of the predicted classes; `hits`: (N,) bool, whether these are the labels; `bins`: the
    number of bins of equal width."""
    return error_of_bins(_binned(confidences, hits, bins))


def classwise_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Return the class-wise calibration error of (N, C) probabilities and (N,) labels, in [0, 1]: the mean over all C classes
    of sum_m n_mc / N |share of class c in bin m - mean probability of c in bin m|. n_mc: the number of images with a
    probability of class c in bin m; bins have equal width (Kull et al. 2019, classwise-ECE; static calibration error of
    Nixon et al. 2019). NaN without images."""
    images, classes = probabilities.shape
    at_once, errors = max(1, VALUES_AT_ONCE // max(images, 1)), []
    for begin in range(0, classes, at_once):
        of_classes = probabilities[:, begin : begin + at_once]
        number = np.arange(begin, begin + of_classes.shape[1])
        row = np.broadcast_to(number - begin, of_classes.shape)
        errors.append(_binned(of_classes, labels[:, None] == number, bins, row, len(number)))
    return float(np.mean([error_of_bins(binned) for part in errors for binned in part])) if images else math.nan


def reliability(confidences: np.ndarray, hits: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """Return the points of a reliability diagram, a row per bin of equal width: mean `confidence` and `accuracy`, in [0, 1],
    NaN for an empty bin, and the number of `images`. Arguments: see `expected_calibration_error`."""
    import pandas as pd

    images, right, sums = _binned(confidences, hits, bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame({"confidence": sums / images, "accuracy": right / images, "images": images.astype(int)})


class ConfidenceBins:
    """Images, hits and confidence of one prediction, summed up per bin on the device, at one temperature or several."""

    shape = (3, BINS)  # of the sums of one temperature

    def __init__(self, temperatures: Sequence[float], sums: torch.Tensor):
        """`sums`: (T, *shape) so far, in float64 if the device has it; `update` adds to them."""
        self.temperatures, self.sums = temperatures, sums

    def update(self, logits: torch.Tensor, hit: torch.Tensor) -> None:
        """Add a batch: (N, C) float32 logits, (N,) hits, 0 or 1. No host-device synchronization."""
        for sums, temperature in zip(self.sums, self.temperatures, strict=True):
            scaled = logits if temperature == 1 else logits / temperature
            confidence = (scaled.amax(1) - scaled.logsumexp(1)).exp().nan_to_num(0)  # of logits that are not finite
            place = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
            sums.index_add_(1, place, torch.stack([torch.ones_like(confidence), hit, confidence]).to(sums.dtype))

    def errors(self) -> tuple[float, ...]:
        """Return the expected calibration error of each temperature, in [0, 1]."""
        return tuple(error_of_bins(binned) for binned in self.sums.double().cpu().numpy())


def error_of_bins(binned: np.ndarray) -> float:
    """(3, B) images, hits and sums of confidences per bin -> the expected calibration error, in [0, 1]; NaN without
    images."""
    images, right, sums = binned
    return float(np.abs(right - sums).sum() / images.sum()) if images.sum() else math.nan


def _binned(
    confidences: np.ndarray, hits: np.ndarray, bins: int, row: np.ndarray | int = 0, rows: int | None = None
) -> np.ndarray:
    """Return (3, B) images, hits and sums of confidences per bin; (rows, 3, B) if `row`, the row of each value, is given."""
    values = np.asarray(confidences, np.float64).reshape(-1)
    place = np.clip(np.ceil(values * bins) - 1, 0, bins - 1).astype(np.int64)
    place += np.reshape(row, -1) * bins
    length = bins * (rows or 1)
    counts = np.stack(
        [np.bincount(place, weights, length) for weights in (None, np.reshape(hits, -1).astype(float), values)]
    )
    return counts if rows is None else counts.reshape(3, rows, bins).transpose(1, 0, 2)


def _weights(labels: torch.Tensor) -> torch.Tensor:
    """(N,) labels -> (N,) float64 weights of images, equal in sum for each class that occurs, 1 in total."""
    images = torch.bincount(labels)
    return 1 / (images[labels].double() * (images > 0).sum())


def _parts(*of_images: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield parts of the rows of logits, in float64, and of further tensors of the same images."""
    rows = max(1, VALUES_AT_ONCE // of_images[0].shape[1])
    for logits, *others in zip(*(values.split(rows) for values in of_images), strict=True):
        yield logits.double(), *others
