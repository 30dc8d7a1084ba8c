"""--val-from-train: a stratified part of the training list becomes the validation list."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reslt.core.errors import UserError
from reslt.data.lists import ImageList, images_per_class

LEAST_IMAGES = 3  # classes with fewer keep all their images
LEAST_LEFT = 2  # images of any other class that remain for training


def number_set_aside(counts: np.ndarray, share: float) -> np.ndarray:
    """(C,) images per class -> (C,) int64 images to set aside: round(share * n), at least 1 and at most n - 2; 0 of a
    class with fewer than three images. Halves are rounded to the even number."""
    rounded = np.rint(share * counts).astype(np.int64)
    return np.where(counts < LEAST_IMAGES, 0, np.clip(rounded, 1, np.maximum(counts - LEAST_LEFT, 1)))


def drawn(labels: np.ndarray, num_classes: int, share: float, seed: int) -> np.ndarray:
    """(N,) labels -> (N,) bool: the images to set aside, a pure function of the labels in their order and of the seed.

    Each image gets a random number, and the images with the lowest numbers of their class are drawn. The numbers are the
    raw output of PCG64, the same in all versions of NumPy, so that a run is evaluated on the images that it was validated
    on."""
    counts = images_per_class(labels, num_classes)
    numbers = np.random.PCG64(seed).random_raw(len(labels))
    by_class = np.lexsort((numbers, labels))
    place_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_drawn = np.empty(len(labels), bool)
    is_drawn[by_class] = place_in_class < np.repeat(number_set_aside(counts, share), counts)
    return is_drawn


def set_aside(
    lists: dict[str, ImageList], folder: Path, num_classes: int, share: float, seed: int
) -> dict[str, ImageList]:
    """Return the lists with a part of 'train' moved to 'val'. Raises UserError if the dataset has a validation list, or if
    no class has three training images."""
    if "val" in lists:
        raise UserError(
            f"--val-from-train {share:g}: {folder / 'val.txt'} exists, and the best epoch is chosen on it; drop the flag (or "
            "unset it with --val-from-train none)"
        )
    train = lists["train"]
    is_drawn = drawn(train.labels, num_classes, share, seed)
    if not is_drawn.any():
        raise UserError(
            f"--val-from-train {share:g}: no class of {train.file} has {LEAST_IMAGES} images, so none can be set aside; drop "
            "the flag"
        )
    return lists | {"train": train.where(~is_drawn), "val": train.where(is_drawn)}
