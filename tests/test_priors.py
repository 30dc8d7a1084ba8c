"""Priors of each expert, priors on the fusion loss alone, and priors in the term between experts, computed by hand."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import yaml
from builders import loss_of
from conftest import TINY_FLAGS, fault

from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.methods.costs import class_prior
from reslt.methods.losses import PairwiseKL
from reslt.reproduce.rows import as_flag, parse_varied
from reslt.runs.console import describe_method, describe_stages
from reslt.runs.resume import changed_settings

COUNTS = np.array([600, 100, 250, 40, 7, 3])
E, K, N, C = 3, 3, 5, len(COUNTS)
LOG_PI = [math.log(n / 1000) for n in COUNTS.tolist()]
LOG_REVERSED = [math.log(n / 1000) for n in (3, 40, 7, 100, 250, 600)]  # the rarest class gets the largest count, ...
Z = 2 * torch.randn(E, K, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = [0, 5, 1, 4, 0]
OTHERS = [3, 1, 5, 2, 4]
WEIGHTS = [(1 - 0.9) / (1 - 0.9**n) for n in COUNTS.tolist()]
SETS = [[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]  # branch_sizes 4 2
EYE = torch.eye(C, dtype=torch.float64)


def log_softmax(row: list[float]) -> list[float]:
    log_sum = math.log(sum(math.exp(value) for value in row))
    return [value - log_sum for value in row]


def moved(row: list[float], tau: float, tau_reversed: float = 0.0) -> list[float]:
    return [z + tau * p - tau_reversed * r for z, p, r in zip(row, LOG_PI, LOG_REVERSED, strict=True)]


def cost(row: list[float], label: int, smoothing: float = 0.0) -> float:
    log_p = log_softmax(row)
    return -(1 - smoothing) * log_p[label] - smoothing * sum(log_p) / C


def fused(expert: int, image: int) -> list[float]:
    return Z[expert, :, image].sum(0).tolist()


def shares(is_mixed: bool) -> list[list[tuple[int, float]]]:
    """Return (class, share) of each class that an image has."""
    return [[(y, 0.7), (o, 0.3)] if is_mixed else [(y, 1.0)] for y, o in zip(LABELS, OTHERS, strict=True)]


def targets(is_mixed: bool) -> torch.Tensor:
    return 0.7 * EYE[LABELS] + 0.3 * EYE[OTHERS] if is_mixed else torch.tensor(LABELS)


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, "uniform"), (0.1, "effective")])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_each_expert_sees_its_own_prior(reduction, smoothing, weights, is_mixed):
    """The loss of an expert is the (class-weighted) mean over images of the costs of z + tau log(pi) - tau' log(reversed
    pi)."""
    taus, reversed_taus, total = (0.0, 1.0, -0.5), (0.0, 0.0, 2.0), 0.0
    of_class = WEIGHTS if weights == "effective" else [1.0] * C
    for e in range(E):
        numerator = denominator = 0.0
        for i, of_image in enumerate(shares(is_mixed)):
            for y, share in of_image:
                row = moved(fused(e, i), taus[e], reversed_taus[e])
                numerator += share * of_class[y] * cost(row, y, smoothing)
                denominator += share * of_class[y]
        total += numerator / denominator
    config = Config.of(
        method="ce", experts=E, logit_adjust=taus, logit_adjust_reversed=reversed_taus, expert_loss=reduction,
        smoothing=smoothing, class_weights=weights, class_weight_beta=0.9,
    )  # fmt: skip
    found = loss_of(config, COUNTS)(Z, targets(is_mixed)).item()
    assert found == pytest.approx(total / (E if reduction == "mean" else 1), rel=1e-6)


@pytest.mark.parametrize("method", ["ce", "reslt", "ride", "ncl"])
def test_equal_priors_of_all_experts_act_as_one_prior(method):
    def loss(taus):
        config = Config.of(method=method, experts=E, branch_sizes=(4, 2), logit_adjust=taus, mutual_weight=0.6)
        return loss_of(config, COUNTS)(Z, torch.tensor(LABELS))

    assert torch.equal(loss((1.0, 1.0, 1.0)), loss(1.0))
    assert torch.equal(loss((0.0, 0.0, 0.0)), loss(0.0))
    assert not torch.allclose(loss((0.0, 1.0, 2.0)), loss(1.0))


def test_the_reversed_prior_of_a_class_is_the_prior_of_the_class_of_opposite_rank():
    assert class_prior(COUNTS, 0.0, 2.0).tolist() == pytest.approx([-2 * r for r in LOG_REVERSED], rel=1e-6)
    assert class_prior(COUNTS, 1.0, 0.0).tolist() == pytest.approx(LOG_PI, rel=1e-6)
    even = class_prior(np.full(4, 5), 0.0, 1.0)
    assert even.tolist() == pytest.approx([math.log(4)] * 4)
    geometric = np.array([81, 27, 9, 3])  # with these counts, SADE's third expert has tau 3
    difference = class_prior(geometric, 1.0, 2.0) - class_prior(geometric, 3.0)
    assert difference.tolist() == pytest.approx([difference[0].item()] * 4, abs=1e-5)


@pytest.mark.parametrize(("on", "of_branches"), [("all", 1.0), ("fusion", 0.0)])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_prior_on_the_fusion_loss_alone_does_not_change_the_branches_losses(on, of_branches, is_mixed):
    fusion = numerator = denominator = 0.0
    for i, of_image in enumerate(shares(is_mixed)):
        for y, share in of_image:
            fusion += share * cost(moved(fused(0, i), 0.8), y, 0.1) / N
            for k in range(K):
                weight = share * SETS[k][y]
                numerator += weight * cost(moved(Z[0, k, i].tolist(), 0.8 * of_branches), y, 0.1)
                denominator += weight
    config = Config.of(branch_sizes=(4, 2), alpha=0.7, logit_adjust=0.8, logit_adjust_on=on, smoothing=0.1)
    found = loss_of(config, COUNTS)(Z[0], targets(is_mixed)).item()
    assert found == pytest.approx(0.3 * fusion + 0.7 * numerator / denominator, rel=1e-6)


def test_experts_with_branches_have_priors_of_their_own_on_the_fusion_loss_alone():
    settings = dict(branch_sizes=(4, 2), alpha=0.7, logit_adjust_on="fusion")
    each = [loss_of(Config.of(**settings, logit_adjust=tau), COUNTS) for tau in (0.0, 1.0, 2.0)]
    wanted = sum(loss(z, torch.tensor(LABELS)) for loss, z in zip(each, Z, strict=True))
    config = Config.of(**settings, logit_adjust=(0.0, 1.0, 2.0), experts=E)
    torch.testing.assert_close(loss_of(config, COUNTS)(Z, torch.tensor(LABELS)), wanted)


TAUS = (0.0, 1.0, 2.0)


def mutual(z: list, hard: int | None, judge: list | None = None) -> list[list[float]]:
    """Return (E, N) means over other experts f of KL(p_f || p_e) with the priors. With `hard`, add the same term over the
    `hard` classes of an image with the largest mean logits. `judge`, by default z, gives p_f and chooses these classes."""
    judge = judge or z
    found = [[0.0] * N for _ in range(E)]

    def seen(of: list, e: int, i: int, classes: list[int]) -> list[float]:
        row = moved(of[e][i], TAUS[e])
        return log_softmax([row[c] for c in classes])

    for i in range(N):
        means = [sum(judge[e][i][c] for e in range(E)) / E for c in range(C)]
        hardest = sorted(range(C), key=lambda c: -means[c])[:hard]
        for classes in [list(range(C)), *([hardest] if hard else [])]:
            for e, f in itertools.permutations(range(E), 2):
                pairs = zip(seen(judge, f, i, classes), seen(z, e, i, classes), strict=True)
                found[e][i] += sum(math.exp(a) * (a - b) for a, b in pairs) / (E - 1)
    return found


@pytest.mark.parametrize("hard", [None, 3])
def test_the_balanced_term_between_experts_equals_a_calculation_by_hand(hard):
    z, taus = Z.sum(1), TAUS
    priors = torch.tensor([[tau * p for p in LOG_PI] for tau in taus], dtype=torch.float64)
    wanted = mutual(z.tolist(), hard)
    torch.testing.assert_close(
        PairwiseKL(priors, hard)(z), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0
    )
    config = Config.of(method="ce", experts=E, mutual="balanced_kl", mutual_hard_classes=hard, logit_adjust=taus)
    loss, labels = loss_of(config.changed(mutual_weight=0.4), COUNTS), torch.tensor(LABELS)
    alone = loss_of(config.changed(mutual="off"), COUNTS)(Z, labels).item()
    assert loss(Z, labels).item() == pytest.approx(alone + 0.4 * sum(map(sum, wanted)) / N, rel=1e-6)
    assert loss(Z, 0.7 * EYE[LABELS] + 0.3 * EYE[LABELS]).item() == pytest.approx(loss(Z, labels).item(), rel=1e-6)


def test_the_gradient_of_the_balanced_term_passes_through_the_judged_expert_only():
    z, step = Z.sum(1).requires_grad_(), 1e-5
    priors = torch.tensor([[tau * p for p in LOG_PI] for tau in TAUS], dtype=torch.float64)
    PairwiseKL(priors, 3)(z).sum().backward()
    fixed = z.tolist()
    for e, i, c in ((0, 0, 0), (1, 2, 3), (2, 4, 5)):
        up, down = ([[list(row) for row in of_expert] for of_expert in fixed] for _ in range(2))
        up[e][i][c] += step
        down[e][i][c] -= step
        difference = sum(map(sum, mutual(up, 3, fixed))) - sum(map(sum, mutual(down, 3, fixed)))
        assert z.grad[e, i, c].item() == pytest.approx(difference / (2 * step), rel=1e-5, abs=1e-9)


def test_hard_classes_that_include_every_class_double_the_term():
    z = Z.sum(1)
    for hard in (C, 30):
        torch.testing.assert_close(PairwiseKL(hard_classes=hard)(z), 2 * PairwiseKL()(z))


@pytest.mark.parametrize("method", ["sade", "ncl"])
@pytest.mark.parametrize("network", ["plain", "reslt"])
def test_shards_of_a_batch_add_up_with_priors_of_each_expert(method, network):
    """Two shards, as of two processes, have the loss and the gradient of the whole batch."""
    settings = dict(logit_adjust=TAUS, hard_classes=3, mutual_hard_classes=3, class_weights="effective", experts=E)
    config = Config.of(method=method, network=network, branch_sizes=(4, 2), logit_adjust_on="fusion", **settings)
    loss, labels = loss_of(config, COUNTS), torch.tensor(LABELS)
    whole, parts = Z.clone().requires_grad_(), Z.clone().requires_grad_()
    of_whole = loss(whole, labels)
    of_whole.backward()
    shards = (slice(0, 2), slice(2, N))
    denominators = sum(loss.denominators(labels[shard]) for shard in shards)
    of_parts = sum(loss(parts[:, :, shard], labels[shard], denominators) for shard in shards)
    of_parts.backward()
    torch.testing.assert_close(of_parts, of_whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        (["--logit-adjust", "1"], 1.0),
        (["--logit-adjust", "0", "1", "2", "--experts", "3"], [0.0, 1.0, 2.0]),
        (["--logit-adjust", "-1", "1", "3", "--experts", "3"], [-1.0, 1.0, 3.0]),
        (["--method", "balpoe"], [0.0, 1.0, 2.0]),
        (["--method", "balpoe", "--experts", "2", "--logit-adjust", "1"], 1.0),
    ],
)
def test_a_prior_is_one_number_or_one_for_each_expert(flags, stored, tmp_path):
    assert resolve(flags).config.stored()["logit_adjust"] == stored
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"experts": 3, "logit_adjust": stored}))
    as_flags = [] if isinstance(stored, float) else ["--experts", "3"]
    assert resolve(["--recipe", str(recipe), *as_flags]).config.stored()["logit_adjust"] == stored


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logit-adjust", "0", "1"], "logit_adjust: 2 numbers given; give one, or --experts 2"),
        (["--method", "balpoe", "--experts", "2"], "logit_adjust: 3 numbers given; give one, or one for each of 2 experts, or --experts 3"),
        (["--logit-adjust", "1", "x"], "logit_adjust (--logit-adjust): 'x' is not a number"),
        (["--logit-adjust-on", "fusion"], "--logit-adjust-on: all losses see plain logits without --logit-adjust; leave it out"),
        (["--method", "ce", "--logit-adjust", "1", "--logit-adjust-on", "fusion"], "--logit-adjust-on: method ce does not use it (--network reslt does)"),
        (["--logit-adjust", "1", "--logit-adjust-on", "fusion", "--alpha", "1"], "logit_adjust_on: fusion leaves the prior to the fusion loss, which --alpha 1 leaves out"),
        (["--mutual", "balanced_kl"], "mutual: balanced_kl is a term between experts; give --experts 2 or more"),
        (["--experts", "2", "--mutual", "pairwise_kl", "--mutual-hard-classes", "3"], "--mutual-hard-classes: --mutual pairwise_kl does not use it (--mutual balanced_kl does)"),
    ],
)  # fmt: skip
def test_a_prior_that_does_not_match_the_other_settings_is_one_error(flags, message):
    assert fault(*flags).startswith(message)


def test_stages_may_state_a_prior_for_each_expert_and_the_losses_that_it_acts_on(tmp_path):
    recipe = tmp_path / "mine.yaml"
    stage = {"start": 0.5, "logit_adjust": [0, 1, 2], "logit_adjust_on": "fusion", "mutual_weight": 0.3}
    recipe.write_text(yaml.safe_dump({"experts": 3, "mutual": "pairwise_kl", "stages": [stage]}))
    stages = stages_of(resolve(["--recipe", str(recipe)]).config)
    second = stages[1].config.method
    assert (second.logit_adjust, second.logit_adjust_on, second.mutual_weight) == ((0.0, 1.0, 2.0), "fusion", 0.3)
    assert "logit_adjust 0 1 2; logit_adjust_on fusion" in describe_stages(stages)["stage 2"]
    assert resolve(["--recipe", str(recipe), "--logit-adjust-on", "fusion"]).config["logit_adjust_on"] == "fusion"
    assert fault("--recipe", recipe, "--experts", 2).startswith("logit_adjust: 3 numbers given")
    recipe.write_text(yaml.safe_dump({"stages": [{"start": 0.5, "logit_adjust": []}]}))
    assert "stage 2: logit_adjust: no value given" in fault("--recipe", recipe)


def test_a_prior_that_differs_from_a_stored_one_is_named_and_old_formats_are_read():
    settings = resolve(["--experts", "2"]).config
    assert changed_settings({"method": "reslt", "logit_adjust": 0.0, "experts": 2}, {"logit_adjust": 0.0}) == []
    changed = settings.changed(logit_adjust=(0.0, 2.0)).stored()
    before = json.loads(json.dumps(settings.stored()))
    assert changed_settings(before, changed) == ["logit_adjust: 0.0 -> [0.0, 2.0]"]
    assert changed_settings(json.loads(json.dumps(changed)), changed) == []


def test_varied_priors_are_one_number_or_several():
    assert parse_varied(["logit_adjust=0,1"]) == {"logit_adjust": [0.0, 1.0]}
    several = parse_varied(["logit_adjust=0 1 2,1"])["logit_adjust"]
    assert several == [(0.0, 1.0, 2.0), 1.0]
    flags = ["--experts", "3", *as_flag("logit_adjust", several[0])]
    assert resolve(flags).config["logit_adjust"] == (0.0, 1.0, 2.0)


def test_a_run_describes_its_priors_and_its_term_between_experts():
    sade, ncl = (resolve(["--method", name]).config.method for name in ("sade", "ncl"))
    text = describe_method(sade, COUNTS)
    assert "logits adjusted by 0 1 1 log(frequency) and 0 0 2 -log(reversed frequency)" in text
    assert "mutual balanced_kl (weight 0.6, also on the 30 hardest classes)" in describe_method(ncl, COUNTS)
    on_fusion = resolve(["--logit-adjust", "1", "--logit-adjust-on", "fusion"]).config.method
    assert describe_method(on_fusion, COUNTS).endswith("adjusted by 1 log(frequency) in the fusion loss only")


def test_a_run_with_a_prior_for_each_expert_trains_evaluates_and_resumes_only_unchanged(tiny, tmp_path, run_script):
    where = ("--data", tiny, "--output", tmp_path, "--experiment", "run")
    flags = (*where, *TINY_FLAGS, "--epochs", 1, "--limit-train", 8, "--method", "sade")
    trained = run_script("train", *flags)
    assert trained.code == 0, trained.err
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["config"]
    assert (stored["logit_adjust"], stored["logit_adjust_reversed"]) == ([0.0, 1.0, 1.0], [0.0, 0.0, 2.0])
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "run", "--prior-tau", 1, "--use-experts", 2)
    assert evaluated.code == 0, evaluated.err
    changed = run_script("train", *flags, "--resume", "auto", "--logit-adjust", 1)
    assert "logit_adjust: [0.0, 1.0, 1.0] -> 1.0" in changed.err
