"""Shot groups and nested branch sets."""

import numpy as np
import pytest

from reslt.core.errors import UserError
from reslt.data.groups import branch_sets, shot_groups

CIFAR100_LT_001 = np.array([int(500 * 0.01 ** (c / 99)) for c in range(100)])


def classes(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_classes_of_20_to_100_images_are_medium_by_the_standard_rule():
    groups = shot_groups(np.array([101, 100, 20, 19, 500, 1]))
    assert [classes(groups[s]) for s in ("many", "medium", "few")] == [[0, 4], [1, 2], [3, 5]]


def test_a_split_by_class_index_ignores_the_counts():
    groups = shot_groups(np.array([1, 9, 2, 8]), {"by": "class_index", "many": 1, "medium": 2, "few": 1})
    assert [classes(groups[s]) for s in ("many", "medium", "few")] == [[0], [1, 2], [3]]


def test_in_a_split_by_rank_few_are_the_rarest_and_ties_are_broken_by_index():
    groups = shot_groups(np.array([5, 9, 5, 1]), {"by": "rank", "many": 1, "medium": 1, "few": 2})
    assert [classes(groups[s]) for s in ("many", "medium", "few")] == [[1], [0], [2, 3]]


@pytest.mark.parametrize(
    "split",
    [
        {"by": "class_index", "many": 1, "medium": 1, "few": 1},
        {"by": "count", "many_above": 10, "few_below": 20},
        {"by": "index", "many": 2, "medium": 1, "few": 1},
        {"by": "rank", "many": 4, "medium": True, "few": -1},
        {"by": "count", "many_above": 100},
    ],
)
def test_an_invalid_shot_split_is_refused(split):
    with pytest.raises(UserError, match="shot split"):
        shot_groups(np.array([15, 12, 11, 1]), split)


def test_branch_sets_of_cifar_lt_start_at_one_third_and_two_thirds_of_the_classes():
    """CIFAR-100: the thresholds 500 x 0.01^(k/3) are 107.7 and 23.2; n_c = 500 x 0.01^(c/99) falls to them at c = 33 and
    66, so 67 and 34 classes remain. CIFAR-10: from c = 3 and 6."""
    assert branch_sets(CIFAR100_LT_001, 3).sum(1).tolist() == [100, 67, 34]
    cifar10 = np.array([int(5000 * 0.01 ** (c / 9)) for c in range(10)])
    assert branch_sets(cifar10, 3).sum(1).tolist() == [10, 7, 4]


@pytest.mark.parametrize("branches", [1, 2, 4, 5])
def test_branch_sets_are_nested_and_start_with_all_classes(branches):
    sets = branch_sets(CIFAR100_LT_001, branches)
    assert sets.shape == (branches, 100)
    assert sets[0].all()
    assert (sets[:-1] >= sets[1:]).all()
    assert sets[-1].any()


def test_a_class_exactly_at_a_threshold_belongs_to_the_rarer_set():
    """N_max (N_min/N_max)^(1/2) of 100 and 1 is exactly 10, despite rounding; the thresholds of 8 and 1 in three sets are
    4 and 2."""
    assert branch_sets(np.array([100, 10, 11, 1]), 2)[1].tolist() == [False, True, False, True]
    assert branch_sets(np.array([8, 4, 2, 1, 5]), 3).tolist() == [[1] * 5, [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]


def test_sets_of_explicit_sizes_contain_the_rarest_classes_with_ties_broken_by_index():
    sets = branch_sets(np.array([5, 9, 5, 1]), 3, (3, 2))
    assert [classes(s) for s in sets] == [[0, 1, 2, 3], [0, 2, 3], [2, 3]]


@pytest.mark.parametrize("sizes", [(3,), (5, 2), (3, 0)])
def test_invalid_branch_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="branch_sizes"):
        branch_sets(np.array([5, 9, 5, 1]), 3, sizes)


def test_balanced_classes_are_in_every_set():
    assert branch_sets(np.full(6, 50), 3).all()
