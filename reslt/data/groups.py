"""The shot groups of reports and the class sets of branches, derived from class counts."""

from __future__ import annotations

import numpy as np

from reslt.core.errors import UserError

SHOTS = ("many", "medium", "few")
STANDARD_SPLIT = {"by": "count", "many_above": 100, "few_below": 20}


def by_frequency(images_per_class: np.ndarray) -> np.ndarray:
    """(C,) counts -> (C,) class indices by descending count, then ascending index."""
    return np.lexsort((np.arange(len(images_per_class)), -images_per_class))


def shot_groups(images_per_class: np.ndarray, split: dict = STANDARD_SPLIT) -> dict[str, np.ndarray]:
    """(C,) training counts -> {'many' | 'medium' | 'few': (C,) bool}. A group may be empty.

    `split` is one of
      {by: count, many_above: 100, few_below: 20}      the standard rule: many > 100, medium 20..100, few < 20
      {by: class_index, many: 35, medium: 35, few: 30} sizes of consecutive blocks of class indices, from class 0
      {by: rank, many: 390, medium: 445, few: 165}     sizes along descending count, so `few` are the rarest
    Raises UserError if it is none of these or its sizes do not add up to C."""
    num_classes, rule = len(images_per_class), dict(split) if isinstance(split, dict) else {}
    by = rule.pop("by", None)
    keys = ("many_above", "few_below") if by == "count" else SHOTS
    are_whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in rule.values())
    if by not in ("count", "class_index", "rank") or set(rule) != set(keys) or not are_whole:
        raise UserError(
            f"shot split {split}: it must be {{by: count, many_above: N, few_below: N}}, or {{by: class_index or rank, "
            f"many: N, medium: N, few: N}}, with whole numbers"
        )
    if by == "count":
        many, few = images_per_class > rule["many_above"], images_per_class < rule["few_below"]
        if (many & few).any():
            raise UserError(f"shot split {split}: many and few overlap; many_above must be at least few_below - 1")
        return dict(zip(SHOTS, (many, ~many & ~few, few), strict=True))
    sizes = [rule[shot] for shot in SHOTS]
    if sum(sizes) != num_classes:
        raise UserError(f"shot split {split}: the sizes add up to {sum(sizes)}, but there are {num_classes} classes")
    order = by_frequency(images_per_class) if by == "rank" else np.arange(num_classes)
    shot_of_class = np.empty(num_classes, np.int64)
    shot_of_class[order] = np.repeat(np.arange(len(SHOTS)), sizes)
    return {shot: shot_of_class == k for k, shot in enumerate(SHOTS)}


def branch_sets(
    images_per_class: np.ndarray, branches: int, sizes: tuple[int, ...] | None = None, kind: str = "nested"
) -> np.ndarray:
    """(C,) training counts, K -> (K, C) bool: the class sets of the branches, which may be empty unless nested.

    'nested': S_1 (all classes) .. S_K (the rarest), each a subset of the one before it. 'disjoint': each nested set without
    the next one, that is, head, medium and tail classes for K = 3. 'separate': the disjoint sets, but the first contains all
    classes. The last two are the paper's ablations (figure 2, table 1).

    Without `sizes`, groups of equal imbalance factor (Section 3.1): class c is in the nested S_{k+1} if
    n_c <= N_max (N_min / N_max)^(k/K), compared in integers. With `sizes` (K - 1 of them), S_{k+1} contains the
    sizes[k-1] last classes by descending count, then ascending index. Raises UserError if the sizes do not fit."""
    sets = _nested_sets(images_per_class, branches, sizes)
    if kind != "nested":
        begin = 0 if kind == "disjoint" else 1
        sets[begin:-1] &= ~sets[begin + 1 :]
    return sets


def _nested_sets(counts: np.ndarray, branches: int, sizes: tuple[int, ...] | None) -> np.ndarray:
    if sizes is None:
        limits = [_equal_factor_limit(int(counts.max()), int(counts.min()), k, branches) for k in range(branches)]
        return np.stack([counts <= limit for limit in limits])
    if len(sizes) != branches - 1 or any(not 0 < size <= len(counts) for size in sizes):
        raise UserError(
            f"branch_sizes {list(sizes)}: {branches} branches over {len(counts)} classes need {branches - 1} sizes in "
            f"1..{len(counts)}; see --branch-sizes"
        )
    rank = np.empty(len(counts), np.int64)
    rank[by_frequency(counts)] = np.arange(len(counts))
    return np.stack([rank >= len(counts) - size for size in (len(counts), *sizes)])


def _equal_factor_limit(most: int, least: int, k: int, branches: int) -> int:
    """Return the largest integer n with n <= most (least/most)^(k/K), that is, n^K <= most^(K-k) least^k. Exact."""
    bound = most ** (branches - k) * least**k
    n = int(most * (least / most) ** (k / branches)) + 1
    while n**branches > bound:
        n -= 1
    return n
