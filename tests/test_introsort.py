"""Classes stand in the order in which NumPy 1.24.4's default argsort left them, ties included."""

import hashlib

import numpy as np
import pytest

from reslt.runs.introsort import numpy1_argsort


def long_tailed_counts() -> list[int]:
    """A thousand classes, from 1280 images down to 5, shuffled."""
    return [int(1280 * (5 / 1280) ** (c * 377 % 1000 / 999)) for c in range(1000)]


def many_tied_counts() -> list[int]:
    """8142 classes, most of which share their count with hundreds of others, shuffled."""
    return [2 + 4000 // (4 + c * 5003 % 8142) for c in range(8142)]


def median_of_three_killer(splits: int = 40) -> list[int]:
    """A thousand counts of which each split takes off only the two smallest, until a part full of ties is left."""
    size = 1000
    counts = [splits * 2 + c * 377 % size % 7 for c in range(size)]
    place = list(range(size))  # where the split's exchanges have moved each count
    for first in range(0, 2 * splits, 2):
        middle = (first + size - 1) // 2
        counts[place[first]], counts[place[middle]] = first, first + 1
        place[middle], place[-2] = place[-2], place[first + 1]
    return counts


@pytest.mark.parametrize(
    ("counts", "order"),
    [
        ([], []),
        ([7], [0]),
        ([5, 3, 5, 1, 3], [3, 1, 4, 0, 2]),
        ([2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2], [2, 5, 8, 11, 14, 1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15]),
        (
            [2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1],
            [8, 14, 2, 11, 5, 13, 10, 16, 4, 1, 7, 15, 9, 6, 12, 3, 0],
        ),
        ([4] * 18, [0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 16, 17]),
        (
            [9, 5, 9, 2, 5, 2, 9, 5, 1, 1, 2, 9, 5, 5, 2, 1, 9, 2, 1, 5, 9, 2, 5, 1],
            [23, 15, 8, 9, 18, 5, 21, 17, 10, 14, 3, 4, 7, 22, 12, 13, 1, 19, 20, 0, 6, 2, 16, 11],
        ),
    ],
)
def test_short_lists_are_ordered_as_numpy_1_ordered_them(counts, order):
    """The orders were read from NumPy 1.24.4: up to 16 counts stand in stable order, more do not."""
    assert numpy1_argsort(np.array(counts, dtype=np.int64)).tolist() == order


@pytest.mark.parametrize(
    ("counts", "sha256"),
    [
        (long_tailed_counts(), "b6586ef98ada3e88bcba89988ecaf52df5fc2901ba42c178388c18da05644069"),
        (many_tied_counts(), "eadc90b11faa4bccf5d63c8bdcfb77b5609ab82b1f483da8cc170f4d24930645"),
        (median_of_three_killer(), "e642d76a69016c7ba55cff4276152523c9c007e6cac2f8d1ccd65c103f317d73"),
        (median_of_three_killer(splits=18), "2848f1fbf0176359579e2cd264cdcbaf98edb716ad60f6b46880fbcd173c4979"),
    ],
    ids=["long-tailed", "many ties", "heap sort", "heap sort of the larger part only"],
)
def test_long_lists_are_ordered_as_numpy_1_ordered_them(counts, sha256):
    """The digests are of the little-endian int64 indices that NumPy 1.24.4 returned; none is of a stable order."""
    counts = np.array(counts, dtype=np.int64)
    order = numpy1_argsort(counts)
    assert order.dtype == np.int64
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == sha256


@pytest.mark.parametrize("counts", [long_tailed_counts(), many_tied_counts(), median_of_three_killer()])
def test_the_order_sorts_and_is_not_the_stable_one(counts):
    """The orders read from NumPy 1.24.4 differ from the stable one for each of these, so a stable sort must fail."""
    counts = np.array(counts, dtype=np.int64)
    order = numpy1_argsort(counts)
    assert sorted(order.tolist()) == list(range(len(counts)))
    assert (np.diff(counts[order]) >= 0).all()
    assert not np.array_equal(order, np.argsort(counts, kind="stable"))
