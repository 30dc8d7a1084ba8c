"""Duplicate images in a dataset's lists: the same file, the same content, and content that looks the same."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

import numpy as np
import pandas as pd

from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot
from reslt.prepare.contents import near_pairs


def repeats(lists: dict[str, ImageList], root: ImageRoot) -> list[str]:
    """Return a message for each list and each pair of lists with duplicates, found after rewriting their paths.

    Paths are compared by 64-bit digests first, so that not all of them are in memory at once."""
    digests = np.concatenate([_path_digests(images, root) for images in lists.values()])
    pairs_of, messages = {}, []
    for split, i, other, j in _located(lists, _equal_neighbors(digests, np.arange(len(digests)))):
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


def copies(
    lists: dict[str, ImageList], root: ImageRoot, digests: np.ndarray, fingerprints: np.ndarray | None
) -> tuple[list[str], list[str]]:
    """Return problems (copies in two lists, or with two labels) and remarks (copies within one list and class).

    `digests`: uint64 per image of all lists, in order; 0: unknown. `fingerprints`: (N, 264) uint8, to find resized and
    recompressed copies too; None: exact copies only. Ignore files that are listed twice, which `repeats` reports."""
    known = np.flatnonzero(digests)
    exact = _equal_neighbors(digests, known)
    problems, remarks = _described(lists, root, exact, "has the same content as", "copies")
    if fingerprints is not None:
        known = known[np.unique(digests[known], return_index=True)[1]]  # one of each group of exact copies
        near = known[near_pairs(fingerprints[known])]
        more = _described(lists, root, np.sort(near, axis=1), "looks the same as", "near-copies")
        problems, remarks = problems + more[0], remarks + more[1]
    return problems, remarks


def _described(
    lists: dict[str, ImageList], root: ImageRoot, pairs: np.ndarray, relation: str, kind: str
) -> tuple[list[str], list[str]]:
    """(P, 2) pairs of images, counted over all lists -> problems and remarks, each with its number and first example."""
    found = {}
    for split, i, other, j in _located(lists, pairs):
        one, two = lists[split], lists[other]
        if _place(one, i, root) == _place(two, j, root):
            continue
        labels = f", with label {one.labels[i]} there and {two.labels[j]} here" * bool(one.labels[i] != two.labels[j])
        text = f"{two.place(j)}: {two.path(j)!r} {relation} {one.path(i)!r} at {one.place(i)}{labels}"
        groups = [f"{kind} in {split}.txt and {other}.txt"] * (split != other) + [f"{kind} with two labels"] * bool(
            labels
        )
        for group in groups or [f"{kind} within {split}.txt"]:
            found.setdefault(group, [text, 0])[1] += 1
    problems = [
        f"{text} ({group}: {n:,}); {remedy}" for group, (text, n) in found.items() if (remedy := _remedy(group))
    ]
    return problems, [f"{text} ({group}: {n:,})" for group, (text, n) in found.items() if not _remedy(group)]


def _remedy(group: str) -> str:
    if "two labels" in group:
        return "remove the line with the wrong one"
    return "remove one of the lines: lists must not share images" if " and " in group else ""


def _equal_neighbors(digests: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return (P, 2) pairs of neighbors among the positions with equal digests."""
    order = positions[np.argsort(digests[positions], kind="stable")]
    same_as_next = np.flatnonzero(digests[order][1:] == digests[order][:-1])
    return np.stack([order[same_as_next], order[same_as_next + 1]], axis=1)


def _located(lists: dict[str, ImageList], pairs: np.ndarray) -> Iterable[tuple[str, int, str, int]]:
    """Yield (list, index, list, index) for pairs of positions that are counted over all lists."""
    splits, ends = list(lists), np.cumsum([len(images) for images in lists.values()])
    starts = np.concatenate(([0], ends[:-1]))
    of_list = np.searchsorted(ends, pairs, side="right")
    for (first, second), (i, j) in zip(of_list.tolist(), (pairs - starts[of_list]).tolist(), strict=True):
        yield splits[first], i, splits[second], j


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
