"""Class weights and class distributions of samplers: (C,) training counts -> (C,) float64."""

from __future__ import annotations

import numpy as np


def effective_numbers(images_per_class: np.ndarray, beta: float) -> np.ndarray:
    """(C,) counts n -> (C,) effective numbers of images, (1 - beta^n) / (1 - beta) (Cui et al. 2019, Eq. (2)); for beta 1
    the limit n."""
    counts = images_per_class.astype(np.float64)
    if beta == 1:
        return counts
    with np.errstate(divide="ignore"):  # beta 0
        return -np.expm1(counts * np.log(np.float64(beta))) / (1 - beta)


def effective_weights(images_per_class: np.ndarray, beta: float) -> np.ndarray:
    """(C,) counts -> (C,) weights inverse to the effective numbers, with sum C."""
    return with_sum_of_classes(1 / effective_numbers(images_per_class, beta))


def inverse_weights(images_per_class: np.ndarray) -> np.ndarray:
    """(C,) counts -> (C,) weights inverse to the counts, with sum C."""
    return with_sum_of_classes(1 / images_per_class)


def with_sum_of_classes(weights: np.ndarray) -> np.ndarray:
    """(C,) weights -> (C,) weights in the same proportion, with sum C."""
    return weights * (len(weights) / weights.sum())
