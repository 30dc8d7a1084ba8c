"""The ResLT loss, compared with calculations by hand in plain Python floats."""

import math

import numpy as np
import pytest
import torch
from builders import loss_of

from reslt.config.methods import METHODS
from reslt.config.schema import Config
from reslt.methods.costs import CrossEntropy, class_prior, of_targets
from reslt.methods.losses import FusionLoss, ResLTLoss
from reslt.models.featured import Featured

SETS = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=bool)  # all, medium + tail, tail
ALPHA = 0.7


def logits(images: int) -> torch.Tensor:
    return torch.randn(3, images, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cross_entropy(row: list[float], label: int, smoothing: float = 0.0) -> float:
    log_sum = math.log(sum(math.exp(z) for z in row))
    uniform = sum(log_sum - z for z in row) / len(row)
    return (1 - smoothing) * (log_sum - row[label]) + smoothing * uniform


def by_hand(z: torch.Tensor, labels: list[int], reduction: str, smoothing: float = 0.0) -> float:
    """Eq. (1)-(3), image by image and branch by branch."""
    rows = z.tolist()
    fused = [[sum(rows[k][i][c] for k in range(3)) for c in range(4)] for i in range(len(labels))]
    fusion = sum(cross_entropy(f, y, smoothing) for f, y in zip(fused, labels, strict=True)) / len(labels)
    members = [[cross_entropy(rows[k][i], y, smoothing) for i, y in enumerate(labels) if SETS[k][y]] for k in range(3)]
    if reduction == "pooled":
        branch = sum(map(sum, members)) / sum(map(len, members))
    else:
        branch = sum(sum(m) / len(m) for m in members if m)
    return (1 - ALPHA) * fusion + ALPHA * branch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["pooled", "mean"])
@pytest.mark.parametrize("labels", [[0, 1, 3, 3, 2], [0, 0, 1], [0, 0]], ids=["tail", "no tail", "head only"])
def test_the_loss_equals_a_calculation_by_hand(labels, reduction, smoothing):
    z = logits(len(labels))
    loss = ResLTLoss(SETS, ALPHA, reduction, smoothing=smoothing)(z, torch.tensor(labels))
    assert loss.item() == pytest.approx(by_hand(z, labels, reduction, smoothing), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["pooled", "mean"])
def test_one_hot_targets_equal_hard_labels(reduction, smoothing):
    z, labels = logits(5), torch.tensor([0, 1, 3, 3, 2])
    loss = ResLTLoss(SETS, ALPHA, reduction, smoothing=smoothing)
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    torch.testing.assert_close(loss(z, one_hot), loss(z, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_pair_weighs_numerator_and_denominator_by_lambda(smoothing):
    """Image i carries label a_i with weight l_i and b_i with 1 - l_i; pairs join tail with non-tail classes."""
    z, a, b, lam = logits(3), [0, 3, 1], [3, 0, 2], [0.8, 0.6, 0.25]
    rows = z.tolist()
    numerator = denominator = fusion = 0.0
    for i in range(3):
        fused = [sum(rows[k][i][c] for k in range(3)) for c in range(4)]
        for label, weight in ((a[i], lam[i]), (b[i], 1 - lam[i])):
            fusion += weight * cross_entropy(fused, label, smoothing) / 3
            for k in range(3):
                if SETS[k][label]:
                    numerator += weight * cross_entropy(rows[k][i], label, smoothing)
                    denominator += weight
    one_hot = torch.eye(4, dtype=torch.float64)
    weights = torch.tensor(lam, dtype=torch.float64)[:, None]
    targets = weights * one_hot[a] + (1 - weights) * one_hot[b]
    loss = ResLTLoss(SETS, ALPHA, "pooled", smoothing=smoothing)(z, targets)
    assert loss.item() == pytest.approx((1 - ALPHA) * fusion + ALPHA * numerator / denominator, rel=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_the_pooled_loss_agrees_with_finite_differences(soft):
    z = logits(4).requires_grad_()
    targets = torch.tensor([0, 3, 1, 3])
    if soft:
        targets = (
            0.7 * torch.eye(4, dtype=torch.float64)[targets] + 0.3 * torch.eye(4, dtype=torch.float64)[[3, 0, 2, 1]]
        )
    loss = ResLTLoss(SETS, ALPHA, "pooled", smoothing=0.05)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), z, eps=1e-6, atol=1e-8)


def test_an_empty_branch_has_a_zero_gradient_and_no_nan_under_mean():
    z = logits(2).requires_grad_()
    ResLTLoss(SETS, 1.0, "mean")(z, torch.tensor([0, 0])).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad[0].abs().sum() > 0
    assert z.grad[1:].abs().sum() == 0  # neither branch 2 nor branch 3 has a member


def test_half_precision_logits_are_computed_in_float32():
    """In bfloat16 log-softmax would lose 3 digits: the loss must equal that of the same numbers in float64."""
    half = (10 * logits(6)).bfloat16()
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    loss = ResLTLoss(SETS, ALPHA)
    assert loss(half, labels).dtype == torch.float32
    torch.testing.assert_close(loss(half, labels).double(), loss(half.double(), labels), rtol=1e-6, atol=0)


def test_plain_cross_entropy_is_that_of_the_summed_branches():
    z, labels = logits(3), torch.tensor([1, 0, 3])
    expected = torch.nn.functional.cross_entropy(z.sum(0), labels, label_smoothing=0.1)
    torch.testing.assert_close(FusionLoss(smoothing=0.1)(z, labels), expected)


def test_one_branch_is_plain_cross_entropy_for_any_alpha():
    z, labels = logits(3)[:1], torch.tensor([1, 0, 3])
    loss = ResLTLoss(np.ones((1, 4), dtype=bool), 0.3)
    torch.testing.assert_close(loss(z, labels), torch.nn.functional.cross_entropy(z[0], labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_cross_entropy_of_reslt_sees_the_adjusted_logits(smoothing):
    """Fusion: sum of the branches plus the adjustment, once. Branches: each plus the adjustment."""
    z, labels, adjustment = logits(5), [0, 1, 3, 3, 2], [0.0, -0.5, -1.0, -3.0]
    rows = z.tolist()
    fused = [[sum(rows[k][i][c] for k in range(3)) + adjustment[c] for c in range(4)] for i in range(5)]
    fusion = sum(cross_entropy(f, y, smoothing) for f, y in zip(fused, labels, strict=True)) / 5
    pairs = [(k, i) for k in range(3) for i in range(5) if SETS[k][labels[i]]]
    adjusted = [[rows[k][i][c] + adjustment[c] for c in range(4)] for k, i in pairs]
    branch = sum(cross_entropy(row, labels[i], smoothing) for row, (_, i) in zip(adjusted, pairs, strict=True)) / len(
        pairs
    )
    loss = ResLTLoss(SETS, ALPHA, "pooled", CrossEntropy(torch.tensor(adjustment)), smoothing)
    expected = (1 - ALPHA) * fusion + ALPHA * branch
    assert loss(z, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-7)
    one_hot = torch.eye(4, dtype=torch.float64)[labels]
    assert loss(z, one_hot).item() == pytest.approx(expected, rel=1e-7)


def test_cross_entropy_adjusted_by_one_is_balanced_softmax():
    """-log(n_y e^{z_y} / sum_c n_c e^{z_c}), Ren et al. 2020, Eq. (3); with TAU, the counts are raised to the power TAU."""
    counts, z, labels = np.array([60, 25, 10, 5]), logits(3)[:1], [3, 0, 1]
    for tau in (1.0, 0.5):
        loss = loss_of(Config.of(method="ce", logit_adjust=tau), counts)(z, torch.tensor(labels)).item()
        weighted = [[counts[c] ** tau * math.exp(value) for c, value in enumerate(row)] for row in z[0].tolist()]
        expected = -sum(math.log(row[y] / sum(row)) for row, y in zip(weighted, labels, strict=True)) / 3
        assert loss == pytest.approx(expected, rel=1e-6)


def test_neither_zero_nor_even_adjustment_changes_the_loss():
    z, labels = logits(3), torch.tensor([1, 0, 3])
    plain = loss_of(Config.of(branch_sizes=(3, 1)), np.array([9, 5, 3, 2]))(z, labels)
    for counts, tau in (([9, 5, 3, 2], 0.0), ([4, 4, 4, 4], 1.0)):
        loss = loss_of(Config.of(branch_sizes=(3, 1), logit_adjust=tau), np.array(counts))
        torch.testing.assert_close(loss(z, labels), plain)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.network != "exits"])
def test_every_method_has_a_loss_of_one_network_and_of_experts(method):
    """The loss of experts is the sum of theirs: an expert and its copy have twice the loss of one."""
    counts, z, labels = np.array([9, 5, 3, 2]), logits(3), torch.tensor([1, 0, 3])
    config = Config.of(method=method, feature_loss="off", branch_sizes=(3, 1), logit_adjust=0.5, smoothing=0.1)
    loss = loss_of(config, counts)
    drawn = [torch.rand(3, 4)] * bool(loss.draws)
    pair = torch.stack([z, z])
    if config.method.feature_loss != "off":
        features = torch.randn(3, 6, dtype=z.dtype)
        z, pair = Featured(z, features), Featured(pair, torch.stack([features, features]))
    of_one = loss(z, labels, None, *drawn)
    assert of_one > 0
    of_two = loss_of(config.changed(experts=2), counts)(pair, labels, None, *drawn)
    torch.testing.assert_close(of_two, 2 * of_one)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_cost_is_that_of_each_label_with_smoothing_and_prior(smoothing):
    """With eps: (1 - eps) of the label's -log p plus eps of their mean; p is the softmax of the logits plus the prior."""
    z, prior = logits(2), [0.0, -0.5, -1.0, -3.0]
    adjusted = [[[value + prior[c] for c, value in enumerate(row)] for row in branch] for branch in z.tolist()]
    expected = [[[cross_entropy(row, c, smoothing) for c in range(4)] for row in branch] for branch in adjusted]
    costs = FusionLoss(CrossEntropy(torch.tensor(prior, dtype=torch.float64)), smoothing).costs(z)
    torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_prior_is_tau_times_the_log_of_the_class_frequencies():
    prior = class_prior(np.array([60, 25, 10, 5]), 0.5)
    assert prior.tolist() == pytest.approx([0.5 * math.log(share) for share in (0.6, 0.25, 0.1, 0.05)], rel=1e-6)
    assert class_prior(np.array([60, 25, 10, 5]), 0) is None


def test_the_cost_of_a_target_is_linear_in_it():
    """A one-hot target costs what its hard label costs; a mixture, the mixture of the costs."""
    costs, a, b = FusionLoss(smoothing=0.1).costs(logits(3)), torch.tensor([0, 3, 1]), torch.tensor([3, 0, 2])
    one_hot = torch.eye(4, dtype=torch.float64)
    assert of_targets(costs, a).shape == of_targets(costs, one_hot[a]).shape == (3, 3)  # per branch and image
    torch.testing.assert_close(of_targets(costs, one_hot[a]), of_targets(costs, a), rtol=1e-12, atol=0)
    mixed = of_targets(costs, 0.3 * one_hot[a] + 0.7 * one_hot[b])
    torch.testing.assert_close(mixed, 0.3 * of_targets(costs, a) + 0.7 * of_targets(costs, b), rtol=1e-12, atol=0)
