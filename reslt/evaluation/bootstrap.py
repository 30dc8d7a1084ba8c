"""Confidence intervals of accuracies, by the bootstrap over images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

RESAMPLES, LEVEL = 1000, 0.95
ENOUGH = 1000  # images: if all of so many are right, the share of wrong ones is below 3 / 1000 (rule of three)
COUNTS_AT_ONCE = 1 << 22  # of resampled counts, in int64: 32 MiB


def bootstrap_intervals(
    hits: np.ndarray,
    images: np.ndarray,
    groups: Mapping[str, np.ndarray],
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals (low, high) of accuracies, in percent, over resamples of all images with replacement.

    `hits`, `images`: (C,) per class; `groups`: {name: (C,) bool}. The interval of a name is that of the mean accuracy of its
    classes, over the classes with images in a resample; that of `all` is for the accuracy over all images. NaN for a group
    without a tested class, and for a group of fewer than ENOUGH images in which each class is entirely right or entirely
    wrong: resampling cannot estimate how other images would vary.

    No image is drawn: the hits and misses per class of a resample are multinomial, so the result is exact."""
    tested = np.flatnonzero(images > 0)
    counts = np.concatenate([hits[tested], (images - hits)[tested]])
    total, drawn = int(counts.sum()), np.flatnonzero(counts)
    members = {name: of_group[tested] for name, of_group in groups.items()}
    generator, statistics = np.random.default_rng(seed), {name: [] for name in ("all", *members)}
    at_once = max(1, COUNTS_AT_ONCE // len(counts))
    for begin in range(0, resamples, at_once):
        number = min(at_once, resamples - begin)
        resampled = np.zeros((number, len(counts)))
        resampled[:, drawn] = generator.multinomial(total, counts[drawn] / total, number)
        right, wrong = resampled[:, : len(tested)], resampled[:, len(tested) :]
        present = right + wrong > 0
        accuracies = np.divide(right, right + wrong, out=np.zeros_like(right), where=present)
        statistics["all"].append(right.sum(1) / total)
        for name, classes in members.items():
            with np.errstate(invalid="ignore"):
                statistics[name].append(accuracies[:, classes].sum(1) / present[:, classes].sum(1))
    bounds = [50 * (1 - level), 50 * (1 + level)]  # percentiles
    intervals = {name: _percentiles(np.concatenate(parts), bounds) for name, parts in statistics.items()}
    varied = (hits > 0) & (hits < images)
    varies = {name: images[of_group].sum() >= ENOUGH or varied[of_group].any() for name, of_group in groups.items()}
    varies["all"] = total >= ENOUGH or 0 < hits.sum() < total
    return {name: found if varies[name] else (np.nan, np.nan) for name, found in intervals.items()}


def _percentiles(values: np.ndarray, bounds: list[float]) -> tuple[float, float]:
    """Return two percentiles of fractions, in percent, over the resamples that have a value; NaN if none has."""
    values = values[~np.isnan(values)]
    low, high = 100 * np.percentile(values, bounds) if len(values) else (np.nan, np.nan)
    return float(low), float(high)
