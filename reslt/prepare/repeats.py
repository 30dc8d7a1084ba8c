"""Duplicate images in a dataset's lists."""

from __future__ import annotations

import posixpath

import numpy as np
import pandas as pd

from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot


def repeats(lists: dict[str, ImageList], root: ImageRoot) -> list[str]:
    """Return a message for each list and each pair of lists that contain duplicates, after rewriting their paths.

    Paths are compared by 64-bit digests first, so that they are never all in memory."""
    splits = list(lists)
    digests = np.concatenate([_path_digests(lists[split], root) for split in splits])
    ends = np.cumsum([len(lists[split]) for split in splits])
    order = np.argsort(digests, kind="stable")
    same_as_next = np.flatnonzero(digests[order][1:] == digests[order][:-1])
    if not len(same_as_next):
        return []

    def at(position: int) -> tuple[str, int]:
        k = int(np.searchsorted(ends, position, side="right"))
        return splits[k], position - (int(ends[k - 1]) if k else 0)

    pairs_of, messages = {}, []
    for a, b in zip(order[same_as_next].tolist(), order[same_as_next + 1].tolist(), strict=True):
        (split, i), (other, j) = at(a), at(b)
        if _place(lists[split], i, root) == _place(lists[other], j, root):
            pairs_of.setdefault((split, other), []).append((i, j))
    for (split, other), pairs in pairs_of.items():
        i, j = pairs[0]
        one, two = lists[split], lists[other]
        places = f"{two.place(j)}: {two.path(j)!r} is already listed at {one.place(i)}"
        if one.path(i) != two.path(j):
            places = f"{two.place(j)}: {two.path(j)!r} is the same file as {one.path(i)!r} at {one.place(i)}"
        labels = (
            f", with label {one.labels[i]} there and {two.labels[j]} here" if one.labels[i] != two.labels[j] else ""
        )
        kind = "duplicates within one list" if split == other else "duplicates in two lists"
        messages.append(f"{places}{labels} ({kind}: {len(pairs):,}); remove one of the lines")
    return messages


def _place(images: ImageList, i: int, root: ImageRoot) -> str:
    """Return the place of image i below the root, in one spelling (of a//b and ./a/b)."""
    return posixpath.normpath(root.rewritten(images.path(i)))


def _path_digests(images: ImageList, root: ImageRoot) -> np.ndarray:
    """Return (N,) uint64 digests of the images' places."""
    parts = []
    for start in range(0, len(images), 100_000):
        paths = [_place(images, i, root) for i in range(start, min(start + 100_000, len(images)))]
        parts.append(pd.util.hash_array(np.array(paths, dtype=object), categorize=False))
    return np.concatenate(parts)
