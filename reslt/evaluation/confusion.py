"""Confusion of classes, and scores that depend on it, from labels and predicted classes."""

from __future__ import annotations

import numpy as np
import pandas as pd

VALUES_AT_ONCE = 1 << 24  # logits that are compared at once


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) labels, (N,) predicted classes -> (C, C) int64 numbers of images; rows: true classes, columns: predicted ones."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(labels: np.ndarray, predicted: np.ndarray, num_classes: int, most: int) -> pd.DataFrame:
    """Return the `most` most frequent mistakes, a row per pair of classes: `label`, `predicted`, `images`, and `share` of the
    label's images, in percent. By descending number of images, then share. Allocates no matrix of all classes."""
    wrong = labels != predicted
    pairs, images = np.unique(labels[wrong].astype(np.int64) * num_classes + predicted[wrong], return_counts=True)
    own, taken_for = np.divmod(pairs, num_classes)
    share = 100 * images / np.bincount(labels, minlength=num_classes)[own]
    first = np.lexsort((pairs, -share, -images))[:most]
    columns = {"label": own, "predicted": taken_for, "images": images, "share": share}
    return pd.DataFrame({name: values[first] for name, values in columns.items()})


def usual_mistake(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (C,) the class for which the images of each class are most often mistaken, the smallest if several are; -1 if all
    are right, or there are no images."""
    wrong, found = labels != predicted, np.full(num_classes, -1)
    pairs, images = np.unique(labels[wrong].astype(np.int64) * num_classes + predicted[wrong], return_counts=True)
    own, taken_for = np.divmod(pairs, num_classes)
    ascending = np.lexsort((-taken_for, images))  # for each class, the assignment keeps the last entry
    found[own[ascending]] = taken_for[ascending]
    return found


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of images, in percent, with their label among the k highest of (N, C) logits. If logits are equal, the
    class with the smaller index ranks first, as in argmax."""
    images, classes = logits.shape
    at_once, right = max(1, VALUES_AT_ONCE // classes), 0
    for begin in range(0, images, at_once):
        rows, own = logits[begin : begin + at_once], labels[begin : begin + at_once, None]
        of_label = np.take_along_axis(rows, own, 1)
        is_first = (rows > of_label) | ((rows == of_label) & (np.arange(classes) < own))
        right += int((is_first.sum(1) < k).sum())
    return 100 * right / images


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean F1 score of the classes with images, in percent; that of a class that is never predicted is 0."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))
