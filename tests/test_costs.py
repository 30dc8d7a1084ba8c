"""Costs, class weights and means compared with formulas in plain Python floats and with each other."""

import math

import numpy as np
import pytest
import torch
from builders import loss_of

from reslt.config.schema import Config
from reslt.methods.class_weights import effective_weights, inverse_weights
from reslt.methods.costs import class_prior, label_aware_smoothing, ldam_margins, vs_divisors
from reslt.methods.losses import ExpertsLoss, FusionLoss, PairwiseKL, ResLTLoss
from reslt.methods.registry import create_cost, create_smoothing

COUNTS = np.array([600, 250, 100, 40, 7, 3])  # frequencies .6 .. .003
CLASSES = len(COUNTS)
PI = [float(n) / COUNTS.sum() for n in COUNTS]
Z = 2 * torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
UNIFORM = torch.rand(5, CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
PRIORS = ["ce", "focal", "ldam", "vs", "seql", "ce_hard", "label_aware"]  # the costs that are a softmax
COSTS = {
    "ce": {},
    "focal": {"focal_gamma": 1.5},
    "sigmoid_focal": {"focal_gamma": 1.5},
    "ldam": {"ldam_margin": 0.5},
    "vs": {"vs_gamma": 0.15},
    "seql": {"seql_gamma": 0.6, "seql_threshold": 0.05},
    "ce_hard": {"hard_classes": 3},
    "label_aware": {"smoothing_head": 0.3, "smoothing_tail": 0.05},
}
CASES = [(name, tau) for name in COSTS for tau in ((0.0, 0.7) if name in PRIORS else (0.0,))]


def config(cost: str, tau: float = 0.0, **more) -> Config:
    return Config.of(method="ce", cost=cost, logit_adjust=tau, **{**COSTS[cost], **more})


def log_sum(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def by_hand(cost: str, z: list[float], label: int, tau: float = 0.0, uniform: list[float] | None = None) -> float:
    """Return the cost of an image with logits z if its label is `label`, straight from the formula."""
    own, plain = COSTS[cost], z
    divisors = [(max(COUNTS) / n) ** own["vs_gamma"] for n in COUNTS] if cost == "vs" else [1.0] * CLASSES
    z = [value / divisors[k] + tau * math.log(PI[k]) for k, value in enumerate(z)]
    if cost == "sigmoid_focal":
        total = 0.0
        for k, value in enumerate(z):
            right = 1 / (1 + math.exp(-value if k == label else value))  # probability of the right answer
            total += (1 - right) ** own["focal_gamma"] * -math.log(right)
        return total
    if cost == "ldam":
        z = list(z)
        z[label] -= own["ldam_margin"] * (min(COUNTS) / COUNTS[label]) ** 0.25
    if cost == "seql":
        left_out = [PI[k] < own["seql_threshold"] and uniform[k] < own["seql_gamma"] for k in range(CLASSES)]
        return log_sum([v for k, v in enumerate(z) if k == label or not left_out[k]]) - z[label]
    minus_log_p = [log_sum(z) - value for value in z]
    if cost == "ce_hard":  # beside the label, the two others with the largest logits, without the prior
        others = sorted(set(range(CLASSES)) - {label}, key=lambda k: -plain[k])[:2]
        return minus_log_p[label] + log_sum([z[k] for k in (label, *others)]) - z[label]
    if cost == "focal":
        return (1 - math.exp(-minus_log_p[label])) ** own["focal_gamma"] * minus_log_p[label]
    if cost == "label_aware":
        head, tail, n = own["smoothing_head"], own["smoothing_tail"], COUNTS[label]
        angle = math.pi * (n - min(COUNTS)) / (2 * (max(COUNTS) - min(COUNTS)))
        eps = tail + (head - tail) * math.sin(angle)
        return (1 - eps) * minus_log_p[label] + eps * sum(minus_log_p) / CLASSES
    return minus_log_p[label]


def costs_of(configuration: Config, z: torch.Tensor, uniform: torch.Tensor = UNIFORM) -> torch.Tensor:
    loss = FusionLoss(create_cost(configuration.method, COUNTS), create_smoothing(configuration.method, COUNTS))
    return loss.costs(z, uniform if loss.draws else None)


@pytest.mark.parametrize(("cost", "tau"), CASES)
def test_the_costs_of_all_labels_equal_the_formula(cost, tau):
    """Constants such as margins are float32, so at most seven digits agree."""
    found = costs_of(config(cost, tau), Z)
    for i, z in enumerate(Z.tolist()):
        wanted = [by_hand(cost, z, c, tau, UNIFORM[i].tolist()) for c in range(CLASSES)]
        assert found[i].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("cost", "tau"), CASES)
def test_the_gradient_of_every_cost_equals_the_formulas_slope(cost, tau):
    """Central differences of the formula in plain Python."""
    step = 1e-5
    for label in (0, CLASSES - 1):
        z = Z[:2].clone().requires_grad_()
        costs_of(config(cost, tau), z, UNIFORM[:2])[:, label].sum().backward()
        for i, row in enumerate(Z[:2].tolist()):
            for k in range(CLASSES):
                up, down = list(row), list(row)
                up[k] += step
                down[k] -= step
                uniform = UNIFORM[i].tolist()
                difference = by_hand(cost, up, label, tau, uniform) - by_hand(cost, down, label, tau, uniform)
                assert z.grad[i, k].item() == pytest.approx(difference / (2 * step), rel=1e-5, abs=1e-7)


EXTREME = torch.tensor(
    [
        [80.0, -80, 0, 0, 0, 0],
        [-80.0, 80, 80, 0, 0, 0],  # two probabilities of one half
        [-80.0, -80, -80, -80, -80, 80],
        [0.0, 0, 0, 0, 0, 0],
        [15.0, 0, -15, 0, 0, 15.5],
        [17.0, 0, 0, 0, 0, 0],  # p rounds to 1 in float32
    ]
)
EXTREME_CASES = [(cost, tau, {}) for cost, tau in CASES]
EXTREME_CASES += [(cost, 0.0, {"focal_gamma": gamma}) for cost in ("focal", "sigmoid_focal") for gamma in (0.0, 0.5)]


@pytest.mark.parametrize(("cost", "tau", "more"), EXTREME_CASES)
def test_extreme_logits_have_exact_costs_and_finite_gradients_in_float32(cost, tau, more):
    configuration = config(cost, tau, **more).changed(ldam_margin=15.0)
    uniform = torch.zeros(6, CLASSES)
    uniform[0, 4:] = 1.0
    z = EXTREME.clone().requires_grad_()
    costs = costs_of(configuration, z, uniform)
    exact = costs_of(configuration, EXTREME.double(), uniform.double())
    torch.testing.assert_close(costs.double(), exact, rtol=1e-5, atol=1e-6)
    for label in range(CLASSES):
        (gradient,) = torch.autograd.grad(costs[:, label].sum(), z, retain_graph=True)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("margin", [15, 30])
def test_a_large_margin_leaves_the_slope_of_a_label_whose_p_rounds_to_one(margin):
    """z = (17, 0, 0, 0, 0, 0): label 0 has 17 - m, the five others 0, so its slope is -5 / (5 + e^(17 - m))."""
    cost = create_cost(config("ldam", ldam_margin=float(margin)).method, np.array([5] * CLASSES))  # one margin for all
    z = EXTREME[5:].clone().requires_grad_()
    cost(z)[0, 0].backward()
    assert z.grad[0, 0].item() == pytest.approx(-5 / (5 + math.exp(17 - margin)), rel=1e-6)


def test_if_every_class_is_left_out_a_label_costs_nothing_and_has_no_slope():
    cost = create_cost(config("seql", seql_threshold=1.0, seql_gamma=1.0).method, COUNTS)
    z = Z.clone().requires_grad_()
    costs = cost(z, torch.zeros_like(z))
    costs.sum().backward()
    assert costs.abs().max() == 0
    assert z.grad.abs().max() == 0


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, CLASSES).double()


@pytest.mark.parametrize("weights", ["uniform", "effective"])
@pytest.mark.parametrize("network", ["plain", "reslt"])
@pytest.mark.parametrize("cost", COSTS)
def test_losses_are_linear_in_soft_targets(cost, network, weights):
    """The targets 0.3 a + 0.7 b have 0.3 times the loss of a plus 0.7 times the loss of b, if all three are divided by the
    mixture's denominators, which mix alike. One-hot targets have the loss of hard labels."""
    configuration = config(cost).changed(network=network, class_weights=weights, branch_sizes=(4, 2))
    loss = loss_of(configuration, COUNTS)
    z = torch.stack([Z, Z.flip(0), -Z]) if network == "reslt" else Z[None]
    drawn = [UNIFORM] * bool(loss.draws)
    a, b = torch.tensor([0, 5, 1, 4, 3]), torch.tensor([5, 0, 2, 3, 3])
    mixed = 0.3 * one_hot(a) + 0.7 * one_hot(b)
    whole = loss.denominators(mixed)
    expected = 0.3 * loss.denominators(a) + 0.7 * loss.denominators(b)
    torch.testing.assert_close(whole.double(), expected.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(z, one_hot(a), None, *drawn), loss(z, a, None, *drawn), rtol=1e-6, atol=0)
    wanted = 0.3 * loss(z, one_hot(a), whole, *drawn) + 0.7 * loss(z, one_hot(b), whole, *drawn)
    torch.testing.assert_close(loss(z, mixed, None, *drawn), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize(
    ("cost", "zero"),
    [
        ("focal", {"focal_gamma": 0.0}),
        ("ldam", {"ldam_margin": 0.0}),
        ("vs", {"vs_gamma": 0.0}),
        ("seql", {"seql_gamma": 0.0}),
        ("seql", {"seql_threshold": 0.0}),
        ("label_aware", {"smoothing_head": 0.0, "smoothing_tail": 0.0}),
    ],
)
def test_without_its_parameter_a_cost_is_cross_entropy(cost, zero, tau):
    """This is also true with a prior, with which VS becomes logit adjustment."""
    plain = costs_of(config("ce", tau), Z)
    torch.testing.assert_close(costs_of(config(cost, tau, **zero), Z), plain, rtol=1e-12, atol=1e-12)


def test_without_gamma_the_sigmoid_focal_cost_is_the_sum_of_binary_cross_entropies():
    found = costs_of(config("sigmoid_focal", focal_gamma=0.0), Z)
    wanted = [
        torch.nn.functional.binary_cross_entropy_with_logits(Z, one_hot(torch.full((5,), c)), reduction="none")
        for c in range(CLASSES)
    ]
    torch.testing.assert_close(found, torch.stack([w.sum(-1) for w in wanted], -1))


def test_label_aware_smoothing_with_equal_values_is_label_smoothing():
    smoothed = FusionLoss(create_cost(config("ce").method, COUNTS), 0.2).costs(Z)
    torch.testing.assert_close(
        costs_of(config("label_aware", smoothing_head=0.2, smoothing_tail=0.2), Z), smoothed, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("head", "scale"), [("linear", 1.0), ("cosine", 30.0), ("deconfounded", 16.0)])
def test_ldams_margin_is_in_units_of_a_normalized_heads_logits(head, scale):
    """The cost takes s (z - m e_y) for a head whose logits are s z, so the margins are multiplied by s. s is --head-scale
    or, without it, the head's own scale."""
    for given, used in ((None, scale), (8.0, 8.0 if head != "linear" else 1.0)):
        configuration = Config.of(method="ldam", head=head, head_scale=given, ldam_margin=0.5)
        margins = loss_of(configuration, COUNTS).cost.margins
        wanted = [used * 0.5 * (3 / n) ** 0.25 for n in COUNTS]
        assert margins.tolist() == pytest.approx(wanted, rel=1e-6)


def exponential(most: int, classes: int, factor: float = 0.01) -> np.ndarray:
    return np.array([int(most * factor ** (c / (classes - 1))) for c in range(classes)])


OF_CIFAR_100, OF_CIFAR_10 = exponential(500, 100), exponential(5000, 10)


def test_the_constants_of_cifar_lt_are_the_published_ones():
    """Counts are int(n_max 0.01^(c / (C - 1))); the first, middle and last class are compared."""
    for counts in (OF_CIFAR_100, OF_CIFAR_10):
        assert ldam_margins(counts, 0.5)[[0, -1]].tolist() == pytest.approx([0.158114, 0.5], abs=1e-6)
        assert vs_divisors(counts, 0.2)[[0, -1]].tolist() == pytest.approx([1, 2.5119], abs=1e-4)
    smoothing = label_aware_smoothing(OF_CIFAR_100, 0.4, 0.1), label_aware_smoothing(OF_CIFAR_10, 0.4, 0.1)
    assert smoothing[0][[0, 50, -1]].tolist() == pytest.approx([0.4, 0.1408, 0.1], abs=1e-4)
    assert smoothing[1][[0, 5, -1]].tolist() == pytest.approx([0.4, 0.1320, 0.1], abs=1e-4)
    for counts, rare in ((OF_CIFAR_100, 52), (OF_CIFAR_10, 1)):
        assert int(create_cost(Config.of(method="seql").method, counts).rare.sum()) == rare


@pytest.mark.parametrize(
    ("beta", "of_100", "of_10"),
    [
        (0.9999, (0.044876, 0.457055, 4.378313), (0.050611, 0.524590, 3.992724)),
        (0.999, (0.055076, 0.462350, 4.344514), (0.181187, 0.560581, 3.688319)),
        (0.99, (0.196524, 0.510131, 3.983524), (0.783832, 0.800201, 1.984417)),
        (0.9, (0.820194, 0.825446, 2.002866), (0.999466, 0.999466, 1.004644)),
    ],
)
def test_class_balanced_weights_of_cifar_lt_are_the_published_ones(beta, of_100, of_10):
    for counts, middle, wanted in ((OF_CIFAR_100, 50, of_100), (OF_CIFAR_10, 5, of_10)):
        weights = effective_weights(counts, beta)
        assert weights[[0, middle, -1]].tolist() == pytest.approx(wanted, abs=2e-6)
        assert weights.sum() == pytest.approx(len(counts), rel=1e-12)


def test_effective_weights_lie_between_equal_and_inverse_weights():
    """A class's effective number of images is 1 with beta 0, and the number of its images with beta 1."""
    assert effective_weights(COUNTS, 0.0).tolist() == pytest.approx([1.0] * CLASSES)
    inverse = [CLASSES * (1 / n) / sum(1 / m for m in COUNTS) for n in COUNTS]
    assert inverse_weights(COUNTS).tolist() == pytest.approx(inverse)
    assert effective_weights(COUNTS, 1.0).tolist() == pytest.approx(inverse)
    assert effective_weights(COUNTS, 1 - 1e-9).tolist() == pytest.approx(inverse, rel=1e-5)


WEIGHTS = [0.2, 0.4, 0.6, 1.0, 1.5, 2.3]
LABELS = [0, 5, 1, 4, 0]
SETS = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]], dtype=bool)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("cost", ["ce", "focal"])
def test_class_weights_are_in_the_denominator_of_a_weighted_mean_only(cost, soft):
    """Cross-entropy has a weighted mean, as in torch; focal divides by the number of images."""
    loss = FusionLoss(create_cost(config(cost).method, COUNTS), class_weights=torch.tensor(WEIGHTS))
    shares = [[(y, 1.0)] for y in LABELS]
    if soft:
        shares = [[(y, 0.6), ((y + 3) % CLASSES, 0.4)] for y in LABELS]
    numerator = denominator = 0.0
    targets = torch.zeros(5, CLASSES, dtype=torch.float64)
    for i, (z, of_image) in enumerate(zip(Z.tolist(), shares, strict=True)):
        for label, share in of_image:
            numerator += share * WEIGHTS[label] * by_hand(cost, z, label)
            denominator += share * WEIGHTS[label]
            targets[i, label] += share
    found = loss(Z[None], targets if soft else torch.tensor(LABELS)).item()
    assert found == pytest.approx(numerator / (denominator if cost == "ce" else 5), rel=1e-6)
    if cost == "ce" and not soft:
        of_torch = torch.nn.functional.cross_entropy(
            Z, torch.tensor(LABELS), weight=torch.tensor(WEIGHTS).double()
        ).item()
        assert found == pytest.approx(of_torch, rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["pooled", "mean"])
@pytest.mark.parametrize("cost", ["ce", "focal"])
def test_class_weights_multiply_the_memberships_of_branches(cost, reduction, soft):
    alpha, z = 0.7, torch.stack([Z, Z.flip(0), -Z])
    loss = ResLTLoss(
        SETS, alpha, reduction, create_cost(config(cost).method, COUNTS), class_weights=torch.tensor(WEIGHTS)
    )
    shares = [[(y, 0.6), ((y + 3) % CLASSES, 0.4)] if soft else [(y, 1.0)] for y in LABELS]
    targets = torch.zeros(5, CLASSES, dtype=torch.float64)
    fusion, total, sums, weights = 0.0, 0.0, [0.0] * 3, [0.0] * 3
    for i, of_image in enumerate(shares):
        fused = [sum(z[k, i, c].item() for k in range(3)) for c in range(CLASSES)]
        for y, share in of_image:
            targets[i, y] += share
            fusion += share * WEIGHTS[y] * by_hand(cost, fused, y)
            total += share * WEIGHTS[y] if cost == "ce" else share
            for k in range(3):
                if SETS[k, y]:
                    sums[k] += share * WEIGHTS[y] * by_hand(cost, z[k, i].tolist(), y)
                    weights[k] += share * WEIGHTS[y] if cost == "ce" else share
    branch = (
        sum(sums) / sum(weights) if reduction == "pooled" else sum(s / w for s, w in zip(sums, weights, strict=True))
    )
    wanted = (1 - alpha) * fusion / total + alpha * branch
    assert loss(z, targets if soft else torch.tensor(LABELS)).item() == pytest.approx(wanted, rel=1e-6)


OF_EXPERTS = torch.stack([Z[None], Z.flip(0)[None], -0.5 * Z[None]])  # (E, K, N, C)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 1 / 3)])
def test_losses_of_experts_and_the_term_between_them_are_added_or_averaged(reduction, factor):
    labels = torch.tensor(LABELS)
    own = sum(by_hand("ce", z[0, i].tolist(), y) / 5 for z in OF_EXPERTS for i, y in enumerate(LABELS))
    alone = ExpertsLoss(FusionLoss(), reduction)(OF_EXPERTS, labels).item()
    assert alone == pytest.approx(factor * own, rel=1e-9)
    joint = ExpertsLoss(FusionLoss(), reduction, PairwiseKL(), 0.6)(OF_EXPERTS, labels).item()
    assert joint == pytest.approx(factor * (own + 0.6 * divergence(OF_EXPERTS.tolist())), rel=1e-9)


def softmax(z: list[float]) -> list[float]:
    return [math.exp(value - log_sum(z)) for value in z]


def divergence(z: list, targets: list | None = None) -> float:
    """Return the sum over experts e of the mean over others f and over images of KL(p_f || p_e). `targets` are the logits
    of p_f."""
    targets, experts, total = targets or z, len(z), 0.0
    for e in range(experts):
        for f in set(range(experts)) - {e}:
            for i in range(len(z[e][0])):
                of_f, of_e = softmax(targets[f][0][i]), softmax(z[e][0][i])
                total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(of_f, of_e, strict=True))
    return total / (experts - 1) / len(z[0][0])


def test_the_term_between_experts_has_a_gradient_through_the_judged_expert_only():
    """Central differences with the other experts' predictions fixed."""
    z = OF_EXPERTS.clone().requires_grad_()
    (PairwiseKL()(z[:, 0]).sum() / 5).backward()
    step, fixed = 1e-5, OF_EXPERTS.tolist()
    for e, i, c in ((0, 0, 0), (0, 3, 5), (1, 2, 1), (2, 4, 4)):
        moved = []
        for sign in (1, -1):
            changed = OF_EXPERTS.clone()
            changed[e, 0, i, c] += sign * step
            moved.append(divergence(changed.tolist(), fixed))
        assert z.grad[e, 0, i, c].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("reduction", ["pooled", "mean"])
@pytest.mark.parametrize("network", ["plain", "reslt"])
def test_shards_of_a_batch_add_up_with_weights_draws_and_a_term_between_experts(network, reduction):
    """Two shards, as of two processes, have the loss and the gradient of the whole batch. One of them contains all images
    of the rarest class."""
    configuration = config("seql").changed(
        network=network, class_weights="effective", branch_sizes=(4, 2), branch_loss=reduction, experts=2,
        mutual="pairwise_kl", expert_loss="mean",
    )  # fmt: skip
    loss, branches = loss_of(configuration, COUNTS), 3 if network == "reslt" else 1
    z = torch.randn(2, branches, 6, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 0, 5, 5, 4])
    whole, parts = z.clone().requires_grad_(), z.clone().requires_grad_()
    of_whole = loss(whole, labels, None, uniform)
    of_whole.backward()
    shards = (slice(0, 2), slice(2, 6))
    denominators = sum(loss.denominators(labels[shard]) for shard in shards)
    shares = [loss(parts[:, :, shard], labels[shard], denominators, uniform[shard]) for shard in shards]
    sum(shares).backward()
    torch.testing.assert_close(sum(shares), of_whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_a_uniform_prior_changes_no_cost_and_any_other_changes_every_softmax():
    even = np.full(CLASSES, 10)
    for cost in PRIORS:
        of_even = [create_cost(config(cost, tau).method, even) for tau in (0.0, 1.0)]
        drawn = [UNIFORM] * bool(of_even[0].draws)
        torch.testing.assert_close(of_even[1](Z, *drawn), of_even[0](Z, *drawn), rtol=1e-6, atol=1e-6)
        assert (costs_of(config(cost, 1.0), Z) - costs_of(config(cost), Z)).abs().max() > 0.1
    assert class_prior(COUNTS, 1.0)[0].item() == pytest.approx(math.log(0.6), rel=1e-6)
