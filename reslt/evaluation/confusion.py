"""Labels and predicted classes -> the classes that a model confuses, and scores that depend on them."""

from __future__ import annotations

import numpy as np
import pandas as pd

VALUES_AT_ONCE = 1 << 24  # of logits, compared in a piece


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) labels, (N,) predicted classes -> (C, C) int64 images: rows are true classes, columns are predicted ones."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(labels: np.ndarray, predicted: np.ndarray, num_classes: int, most: int) -> pd.DataFrame:
    """Return the most frequent mistakes, a row per pair of classes: `label`, `predicted`, `images`, and `share`, in percent,
    of the label's images. By descending number of images, then share. No matrix of all classes is made."""
    wrong = labels != predicted
    pairs, images = np.unique(labels[wrong].astype(np.int64) * num_classes + predicted[wrong], return_counts=True)
    own, taken_for = np.divmod(pairs, num_classes)
    share = 100 * images / np.bincount(labels, minlength=num_classes)[own]
    first = np.lexsort((pairs, -share, -images))[:most]
    columns = {"label": own, "predicted": taken_for, "images": images, "share": share}
    return pd.DataFrame({name: values[first] for name, values in columns.items()})


def usual_mistake(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return for each class the (C,) other class that its images are most often predicted as, the smallest of several; -1
    if all are right, or there are none."""
    wrong, found = labels != predicted, np.full(num_classes, -1)
    pairs, images = np.unique(labels[wrong].astype(np.int64) * num_classes + predicted[wrong], return_counts=True)
    own, taken_for = np.divmod(pairs, num_classes)
    ascending = np.lexsort((-taken_for, images))  # of entries of one class, the last one is kept
    found[own[ascending]] = taken_for[ascending]
    return found


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of images, in percent, whose label is among the k classes with the highest of (N, C) logits; of equal
    logits, the class with the smaller index is ranked first, as by argmax."""
    images, classes = logits.shape
    at_once, right = max(1, VALUES_AT_ONCE // classes), 0
    for begin in range(0, images, at_once):
        rows, own = logits[begin : begin + at_once], labels[begin : begin + at_once, None]
        of_label = np.take_along_axis(rows, own, 1)
        is_first = (rows > of_label) | ((rows == of_label) & (np.arange(classes) < own))
        right += int((is_first.sum(1) < k).sum())
    return 100 * right / images


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean over the classes with images of their F1 scores, in percent; 0 for a class that is never predicted."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))
