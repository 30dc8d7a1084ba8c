"""The class order of the authors' released checkpoints, which was made by NumPy 1.x's default `np.argsort`.

That sort is unstable, so classes with equally many images stand in an order that only its exact algorithm yields;
newer releases of NumPy sort with other instructions and leave ties in another order.
"""

from __future__ import annotations

import numpy as np

SMALL = 16  # a part of at most so many indices is left to the insertion sort


def numpy1_argsort(values: np.ndarray) -> np.ndarray:
    """(C,) whole numbers -> (C,) int64 indices, ascending, ties in the order that NumPy 1.x's argsort left them.

    This is the introsort of NumPy 1.24, the last release that sorts alike on every processor. Each comparison and
    exchange counts: a tidier step, or the check of the depth in another place, still sorts but moves ties.
    """
    keys = values.tolist()
    order = list(range(len(keys)))
    pending = [(0, len(keys) - 1, 2 * (len(keys).bit_length() - 1))]  # first, last, splits left: 2 * floor(log2 C)
    while pending:
        first, last, splits = pending.pop()
        if splits < 0:  # asked only here: the smaller part, which is never put aside, may be split beyond the limit
            order[first : last + 1] = _heap_sorted(keys, order[first : last + 1])
            continue
        while last - first + 1 > SMALL:
            pivot = _split(keys, order, first, last)
            splits -= 1
            if pivot - first < last - pivot:  # put the larger part aside and go on with the smaller one
                pending.append((pivot + 1, last, splits))
                last = pivot - 1
            else:
                pending.append((first, pivot - 1, splits))
                first = pivot + 1
        _insertion_sort(keys, order, first, last)
    return np.array(order, dtype=np.int64)


def _split(keys: list[int], order: list[int], first: int, last: int) -> int:
    """Part order[first..last] around the median of its first, middle and last key; return where the median ends up."""
    middle = (first + last) // 2
    for low, high in ((first, middle), (middle, last), (first, middle)):
        if keys[order[high]] < keys[order[low]]:
            order[low], order[high] = order[high], order[low]
    pivot = keys[order[middle]]
    parked = last - 1  # the pivot waits here; both ends are on their side already, and stop the two scans
    order[middle], order[parked] = order[parked], order[middle]
    left, right = first, parked
    while True:
        left += 1
        while keys[order[left]] < pivot:
            left += 1
        right -= 1
        while pivot < keys[order[right]]:
            right -= 1
        if left >= right:
            break
        order[left], order[right] = order[right], order[left]  # equal keys are exchanged too: ties move here
    order[left], order[parked] = order[parked], order[left]
    return left


def _insertion_sort(keys: list[int], order: list[int], first: int, last: int) -> None:
    for at in range(first + 1, last + 1):
        index, hole = order[at], at
        while hole > first and keys[index] < keys[order[hole - 1]]:
            order[hole] = order[hole - 1]
            hole -= 1
        order[hole] = index


def _heap_sorted(keys: list[int], part: list[int]) -> list[int]:
    """The indices in `part` by ascending key, through a binary heap with the largest key at its root."""
    heap = part.copy()

    def sift_down(index: int, hole: int, size: int) -> None:
        """Put `index` where it belongs in heap[:size], at `hole` or below it."""
        while (child := 2 * hole + 1) < size:
            if child + 1 < size and keys[heap[child]] < keys[heap[child + 1]]:
                child += 1
            if not keys[index] < keys[heap[child]]:
                break
            heap[hole] = heap[child]
            hole = child
        heap[hole] = index

    for root in reversed(range(len(heap) // 2)):
        sift_down(heap[root], root, len(heap))
    for end in reversed(range(1, len(heap))):
        index, heap[end] = heap[end], heap[0]
        sift_down(index, 0, end)
    return heap
