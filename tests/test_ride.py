"""RIDE: the term between its experts, its temperatures, and its router."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import loss_of, model_of, predicted
from conftest import TINY_FLAGS, make_dataset, train_until
from safetensors.torch import load_file

import reslt
from reslt.config.checks import consistency_faults
from reslt.config.methods import METHODS
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.evaluation.metrics import ClassHits
from reslt.methods.losses import Diversity, RouterLoss, temperatures
from reslt.methods.registry import create_loss
from reslt.models.fitting import fitting
from reslt.models.fusion import fused_logits
from reslt.models.router import Routed, Router, experts_used
from reslt.runs.init_from import describe
from reslt.training.trained_parts import parameters_of, train_only

COUNTS = np.array([60, 25, 10, 5])
E, N, C = 3, 5, 4
Z = 3 * torch.randn(E, 1, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = [0, 3, 1, 3, 2]
NETWORK = {"model": "cifar_resnet20", "model_kwargs": {"channels": (8, 16, 32)}, "img_size": 16}
RIDE = {"method": "ride", "experts": E, "mutual_weight": -0.45}
ROUTER_STAGE = {"epochs": 2, "train": ["router"], "bn": "eval", "sampler": "balanced", "lr": 0.5}


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def divergence(logits: list, e: int, i: int, mean: list, T: list[float]) -> float:
    """Return (mean T)^2 KL(softmax(mean / T) || softmax(z_e / T)) of image i; z are the logits."""
    p = softmax([value / t for value, t in zip(mean[i], T, strict=True)])
    q = softmax([value / t for value, t in zip(logits[e][i], T, strict=True)])
    return (sum(T) / len(T)) ** 2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean_of(logits: list) -> list:
    return [[sum(expert[i][c] for expert in logits) / E for c in range(C)] for i in range(N)]


def tempered(factor: float) -> list[float]:
    """Return the temperature of each class, computed by hand."""
    raised = [C * n / 100 * factor + 1 - factor for n in COUNTS.tolist()]
    return [t / raised[0] for t in raised]


TEMPERATURES = [None, tempered(0.3)]


@pytest.mark.parametrize(
    ("classes", "head", "last", "mean"), [(100, 500, 0.806711, 0.847114), (10, 5000, 0.826750, 0.868421)]
)
def test_the_temperatures_of_the_cifar_lists_equal_independently_computed_ones(classes, head, last, mean):
    """The lists have imbalance factor 0.01, and r is 0.05."""
    counts = np.array([int(head * 0.01 ** (c / (classes - 1))) for c in range(classes)])
    found = temperatures(counts, 0.05)
    assert found[0] == 1
    assert (found[-1], found.mean()) == (pytest.approx(last, abs=1e-6), pytest.approx(mean, abs=1e-6))


@pytest.mark.parametrize("T", TEMPERATURES, ids=["plain", "tempered"])
def test_the_diversity_of_an_image_equals_a_calculation_by_hand(T):
    logits = Z[:, 0].tolist()
    expected = [[divergence(logits, e, i, mean_of(logits), T or [1.0] * C) for i in range(N)] for e in range(E)]
    found = Diversity(T and torch.tensor(T, dtype=torch.float64))(Z[:, 0])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("T", TEMPERATURES, ids=["plain", "tempered"])
def test_the_gradient_of_the_diversity_passes_only_through_the_expert(T):
    """It equals central differences in which the mean of the experts is fixed. Each expert's term has a weight of its own,
    because gradients through the mean cancel in the plain sum."""
    logits, weights = Z[:, 0].clone().requires_grad_(), torch.tensor([1.0, 2.0, 3.0])[:, None]
    (weights * Diversity(T and torch.tensor(T, dtype=torch.float64))(logits)).sum().backward()
    fixed, step = mean_of(Z[:, 0].tolist()), 1e-5
    for e, i, c in ((0, 0, 0), (1, 2, 3), (2, 4, 1)):
        moved = []
        for sign in (1, -1):
            changed = Z[:, 0].clone()
            changed[e, i, c] += sign * step
            moved.append(divergence(changed.tolist(), e, i, fixed, T or [1.0] * C))
        assert logits.grad[e, i, c].item() == pytest.approx((e + 1) * (moved[0] - moved[1]) / (2 * step), rel=1e-5)


def by_hand(weight: float, class_weights: list[float], T: list[float], labels=tuple(LABELS)) -> float:
    """Return the sum over experts of LDAM's weighted mean (margins 30 x 0.5 (n_min / n_c)^(1/4)) and of weight x the mean
    divergence."""
    logits, total = Z[:, 0].tolist(), 0.0
    for e in range(E):
        numerator = denominator = 0.0
        for i, label in enumerate(labels):
            row = list(logits[e][i])
            row[label] -= 30 * 0.5 * (5 / COUNTS[label]) ** 0.25
            numerator -= class_weights[label] * math.log(softmax(row)[label])
            denominator += class_weights[label]
            total += weight * divergence(logits, e, i, mean_of(logits), T) / N
        total += numerator / denominator
    return total


@pytest.mark.parametrize("weight", [0.0, -0.45])
def test_temperatures_and_class_weights_act_only_from_the_reweighted_stage_on(weight):
    """In the stage before, the loss is the sum of LDAMs and the plain term. With weight 0, there is no term."""
    config = Config.of(**RIDE | {"mutual_weight": weight}, epochs=200, temperature_factor=0.3, class_weight_beta=0.9)
    first, second = stages_of(config)
    assert (first.end, second.begin) == (160, 160)
    before = loss_of(first.config, COUNTS)(Z, torch.tensor(LABELS))
    after = loss_of(second.config, COUNTS)(Z, torch.tensor(LABELS))
    effective = [(1 - 0.9) / (1 - 0.9**n) for n in COUNTS.tolist()]
    assert before.item() == pytest.approx(by_hand(weight, [1.0] * C, [1.0] * C), rel=1e-6)
    assert after.item() == pytest.approx(by_hand(weight, effective, tempered(0.3)), rel=1e-6)


def test_the_loss_of_a_mixed_pair_is_the_mixture_of_its_ldams_plus_a_single_term():
    a, b, eye = LABELS, [1, 1, 0, 2, 3], torch.eye(C, dtype=torch.float64)
    loss = loss_of(Config.of(**RIDE), COUNTS)
    found = loss(Z, 0.3 * eye[a] + 0.7 * eye[b]).item()
    plain = [by_hand(0.0, [1.0] * C, [1.0] * C, labels) for labels in (a, b)]
    term = by_hand(-0.45, [1.0] * C, [1.0] * C) - plain[0]
    assert found == pytest.approx(0.3 * plain[0] + 0.7 * plain[1] + term, rel=1e-6)


ASKS = torch.randn(E - 1, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["reweighted", "mixed", "router"])
def test_the_losses_of_shards_of_a_batch_add_up_to_its_loss(kind):
    """Two processes or micro-batches have two and three of the five images."""
    targets, stage = torch.tensor(LABELS), stages_of(Config.of(**RIDE))[1]
    loss = create_loss(stage.config.method, COUNTS, E, trains_router=kind == "router")
    if kind == "mixed":
        targets = torch.eye(C, dtype=torch.float64)[LABELS] * 0.6 + 0.1

    def part(chosen: slice) -> torch.Tensor | Routed:
        return Routed(Z[:, :, chosen], ASKS[:, chosen]) if kind == "router" else Z[:, :, chosen]

    shards = (slice(0, 2), slice(2, N))
    denominators = sum(loss.denominators(targets[shard]) for shard in shards)
    shares = [loss(part(shard), targets[shard], denominators).item() for shard in shards]
    assert sum(shares) == pytest.approx(loss(part(slice(N)), targets).item(), rel=1e-6)


# The classes that the means of expert 1, of experts 1 and 2, and of all three predict for images of class 0, and whether the
# image should ask for another expert after expert 1 and after expert 2.
PREFIXES = {
    (0, 0, 0): (False, False),
    (0, 0, 1): (False, False),
    (1, 0, 0): (True, False),
    (0, 1, 0): (False, True),
    (0, 1, 1): (False, False),
    (1, 0, 1): (True, False),
    (1, 1, 0): (True, True),
    (1, 2, 1): (False, False),
}


def logits_with(prefixes) -> torch.Tensor:
    """Return (E, 1, N, 3) logits whose means over the first experts are one-hot in the given classes."""
    means = torch.eye(3, dtype=torch.float64)[torch.tensor(list(prefixes)).T]  # (E, N, 3)
    sums = means * torch.arange(1, E + 1)[:, None, None]
    return torch.cat([sums[:1], sums.diff(dim=0)])[:, None]


def test_an_image_should_ask_for_more_experts_if_those_so_far_are_wrong_and_more_are_right():
    found = RouterLoss().wanted(logits_with(PREFIXES), torch.zeros(len(PREFIXES), dtype=torch.long))
    assert [tuple(decisions) for decisions in found.T.tolist()] == list(PREFIXES.values())


def test_the_routers_loss_equals_a_calculation_by_hand():
    """An image that should ask costs -100 log sigmoid(a), and any other -log(1 - sigmoid(a)); the loss is the mean over two
    decisions and the images."""
    asks = torch.randn(2, len(PREFIXES), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = 0.0
    for i, should in enumerate(PREFIXES.values()):
        for decision in range(2):
            p = 1 / (1 + math.exp(-asks[decision, i].item()))
            total += -100 * math.log(p) if should[decision] else -math.log(1 - p)
    found = RouterLoss()(Routed(logits_with(PREFIXES), asks), torch.zeros(len(PREFIXES), dtype=torch.long))
    assert found.item() == pytest.approx(total / 2 / len(PREFIXES), rel=1e-12)


def test_an_image_uses_experts_until_it_asks_for_none():
    """The third of the four images has stopped, so that its second decision has no effect. A logit of 0 asks."""
    asks = torch.tensor([[1.0, 2.0, -1.0, 0.0], [0.5, -0.1, 3.0, -2.0]])
    assert experts_used(asks).tolist() == [3, 2, 1, 2]
    logits = torch.randn(E, 2, 4, C)
    fused = logits.sum(1)
    by_hand = [fused[:3, 0].mean(0), fused[:2, 1].mean(0), fused[0, 2], fused[:2, 3].mean(0)]
    torch.testing.assert_close(fused_logits(Routed(logits, asks)), torch.stack(by_hand))


def test_the_table_counts_the_routed_prediction_and_that_of_all_experts():
    """The experts predict 0, 1 and 2, and their mean 2. Three images of class 2 use 1, 3 and 2 experts; one of class 0
    uses 1."""
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]])[:, None, None].expand(E, 1, 4, 3)
    asks = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0]])
    hits = ClassHits((E, 1), 3, torch.device("cpu"), is_routed=True)
    hits.update(Routed(logits, asks), torch.tensor([2, 2, 2, 0]))
    found = hits.accuracies()
    assert found.hits.tolist() == [[1, 0, 1], [0, 0, 3], [1, 0, 0], [0, 0, 0], [0, 0, 3]]
    assert found.experts_used == (1 + 3 + 2 + 1) / 4


def routed_model(**changes):
    torch.manual_seed(0)
    return model_of(Config.of(**NETWORK, method="ride_router", experts=E, router_topk=2, **changes), C)


@torch.no_grad()
def test_the_router_sees_the_largest_mean_logits_and_the_normalized_features():
    router, logits, features = Router(8, E, 2), Z.repeat(1, 2, 1, 1), torch.randn(E, N, 8, dtype=torch.float64)
    torch.nn.init.normal_(router.asks.weight), torch.nn.init.normal_(router.asks.bias)
    router.double()
    weight, bias = router.asks.weight[0], router.asks.bias
    for e, i in ((0, 0), (0, 3), (1, 1), (1, 4)):
        mean = 2 * sum(Z[f, 0, i] for f in range(e + 1)) / (e + 1)  # two equal branches
        largest = torch.stack(sorted(mean, reverse=True)[:2])
        hidden = router.features[e].weight @ (features[e, i] / features[e, i].norm()) + router.features[e].bias
        by_hand = weight @ torch.cat([largest, hidden.clamp(min=0)]) + bias
        torch.testing.assert_close(router(logits, features)[e, i], by_hand[0])
    torch.testing.assert_close(
        router(logits[:2], features[:2]), router(logits, features)[:1]
    )  # with fewer experts in use


@pytest.mark.parametrize(
    "network", [{}, {"network": "reslt", "branch": "bn"}, {"network": "reslt", "branch_at": "pooled"}]
)
@torch.no_grad()
def test_an_untrained_router_asks_for_all_experts(network):
    """Its features are those that enter the classifier, summed over branches."""
    model, images = routed_model(**network).eval(), torch.randn(6, 3, 16, 16)
    branch_logits, asks = predicted(model, images)
    assert asks.tolist() == [[0.0] * 6] * 2
    torch.testing.assert_close(branch_logits, model(images))
    torch.testing.assert_close(fused_logits(Routed(branch_logits, asks)), fused_logits(branch_logits))
    seen = []
    for head in model.classifiers:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model.route(images)
    torch.testing.assert_close(seen[-1], torch.stack(seen[:-1]).unflatten(1, (-1, 6)).sum(1))


@torch.no_grad()
def test_predictors_change_the_logits_and_not_the_decisions_of_the_router():
    """Half of these images stop after one expert. With mirrored views, the router's logits are means as well."""
    model, images = routed_model(head="linear", cost="ce").eval(), torch.randn(8, 3, 16, 16)
    torch.nn.init.normal_(model.router.asks.weight)
    asks = model.route(images).asks
    model.router.asks.bias.sub_(asks[0].median())
    asks = model.route(images).asks
    assert 0 < (asks[0] >= 0).sum() < 8
    branch_logits, decided = predicted(model, images, tau=1.0)
    assert torch.equal(decided, asks)
    assert not torch.allclose(branch_logits, model(images))
    views = model.route(images), model.route(images.flip(-1))
    means = predicted(model, images, tta="flip")
    for found, first, second in zip(means, *views, strict=True):
        torch.testing.assert_close(found, (first + second) / 2)


def test_only_the_routers_stage_trains_it_and_returns_its_logits():
    model, images = routed_model().train(), torch.randn(4, 3, 16, 16)
    router = {name for name, _ in model.named_parameters() if name.startswith("router.")}
    for train, is_router in (
        ({"all": 1.0}, False),
        ({"classifier": 1.0}, False),
        ({"router": 1.0}, True),
        ({"all": 1.0}, False),
    ):
        train_only(model, train)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert (trained == router) if is_router else not trained & router
        assert isinstance(model(images), Routed) == is_router
        assert not isinstance(model.eval()(images), Routed)
        model.train()
    with pytest.raises(UserError, match="stages: train: the model has no router"):
        parameters_of(model_of(Config.of(**NETWORK, **RIDE), C), "router")


def test_a_router_sees_no_more_logits_than_there_are_classes():
    assert model_of(Config.of(**NETWORK, method="ride_router", experts=2, router_topk=30), C).router.topk == C


def test_a_run_with_a_router_can_start_from_one_without():
    source, target = model_of(Config.of(**NETWORK, **RIDE), C), routed_model()
    found = fitting(target, source.state_dict(), np.arange(C))
    assert found.new_weights == {"router": 2 * 2 + 2}
    assert describe(found, None, Classes(C)).endswith(
        "new: router (6 weights), classifier (the classes of its rows are unknown)"
    )
    assert "router" in fitting(source, target.state_dict(), np.arange(C)).left_out


ROUTED = {"method": "ride_router", "experts": E, "router_topk": 2}
MIXED = "stages: stage 2: train: router: a prediction for a mixed image is neither right nor wrong; state mixup: 0 and "
NO_STAGE = (
    "router_topk: no stage trains the router; use --method ride_router, or a recipe with a stage of train: [router]"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ROUTED, None),
        (ROUTED | {"mixup": 0.2, "cutmix": 1.0}, None),  # the method's own stage of the router mixes no images
        (RIDE | {"router_topk": 2}, NO_STAGE),
        ({"method": "ride_router", "experts": E}, "stages: stage 3: train: router: the model has none without --router-topk; give it"),
        (ROUTED | {"experts": 1, "mutual": "off", "stages": (ROUTER_STAGE,)}, "router_topk: a router chooses among experts; give --experts 2 or more, or "),
        (ROUTED | {"stages": ({"epochs": 1, "train": ["router", "classifier"]},)}, "stages: stage 2: train: router: it has a loss of its own; train other parts in"),
        (ROUTED | {"stages": ({"epochs": 1, "train": ["router"], "cost": "ce"},)}, "stages: stage 2: cost: the router's loss does not use it; leave it out"),
        (ROUTED | {"stages": ({"epochs": 1, "train": ["router"]},), "mixup": 0.2}, MIXED),
        (ROUTED | {"network": "bbn"}, "router_topk: network bbn has no router; use network plain or reslt"),
        (RIDE | {"mutual": "off", "experts": 1}, "mutual: tempered_diversity is a term between experts; give --experts 2 or more"),
        (RIDE | {"mutual": "off", "experts": 1, "stages": ()}, None),
    ],
)  # fmt: skip
def test_a_router_or_term_that_does_not_fit_is_reported_as_one_error(settings, message):
    errors = consistency_faults(Config.of(epochs=10, **settings))
    assert len(errors) == (message is not None)
    assert not errors or errors[0].startswith(message)


def test_off_in_a_file_needs_no_quotes(tmp_path):
    """YAML reads the word as False."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "method: ride\nmutual: off\nstages: [{start: 0.5, mutual: off}]\ncuda_graph: on\ndata_on_device: off\n"
    )
    config = resolve(["--recipe", str(recipe)]).config
    assert [config[name] for name in ("mutual", "cuda_graph", "data_on_device")] == ["off", "on", "off"]
    assert stages_of(config)[1].config.method.mutual == "off"
    recipe.write_text("method: ride\nmutual: off\nstages: []\nmutual_weight: 0.5\n")
    with pytest.raises(UserError, match="mutual_weight: --mutual off does not use it"):
        resolve(["--recipe", str(recipe)])


def test_the_router_of_the_method_follows_ride():
    """Its other settings are RIDE's, and so are its first stages."""
    ride, routed = METHODS["ride"], METHODS["ride_router"]
    assert routed.stages[:-1] == ride.stages
    assert routed.stages[-1].items() >= {"epochs": 5, "train": ["router"], "bn": "eval", "sampler": "balanced"}.items()
    assert dict(routed.defaults) == {**ride.defaults, "router_topk": 30}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("ride") / "d")


@pytest.fixture(scope="module")
def runs():
    """Return the finished runs by method, which `trained` adds."""
    return {}


EVERYTHING = ("--model-ema", "--model-ema-decay", "0.5", "--drop", "0.3", "--grad-accum-steps", "2")


def flags(data, output, method: str) -> list:
    """Return the flags of a run of two epochs, the second reweighted, and, with a router, of two epochs for it."""
    stages = [{"start": 0.5, "class_weights": "effective", "mutual": "tempered_diversity"}]
    stages += [ROUTER_STAGE] * (method == "ride_router")
    recipe = data / f"{method}.yaml"
    recipe.write_text(yaml.safe_dump({"method": method, "stages": stages}))
    return ["--recipe", recipe, "--data", data, "--output", output, "--experiment", "run", *TINY_FLAGS, *EVERYTHING]


@pytest.fixture
def trained(run_script, data, runs):
    def run(method: str):
        if method not in runs:
            outcome = run_script("train", *flags(data, data.parent / method, method))
            assert outcome.code == 0, outcome.err
            runs[method] = (data.parent / method / "run", outcome.out)
        return runs[method]

    return run


def tensors(run, checkpoint: str, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / f"{part}.safetensors")


def test_the_routers_stage_begins_with_rides_weights_and_changes_only_the_router(trained):
    """All bits are compared, including those of BatchNorm's statistics."""
    (ride, _), (run, _) = trained("ride"), trained("ride_router")
    ride_weights, before, after = tensors(ride, "2-6"), tensors(run, "2-6"), tensors(run, "4-12")
    assert before.keys() - ride_weights.keys() == {name for name in before if name.startswith("router.")}
    assert all(torch.equal(before[name], tensor) for name, tensor in ride_weights.items())
    assert {name for name in after if not torch.equal(before[name], after[name])} == before.keys() - ride_weights.keys()
    assert before["router.asks.weight"].abs().max() == 0


def test_a_run_reports_its_router_and_the_experts_used(trained, run_script, tmp_path):
    run, printed = trained("ride_router")
    lines = printed.splitlines()
    assert any("mutual diversity (weight -0.45), a router on the 3 largest logits" in line for line in lines)
    assert any(
        line.startswith("stage 3 epochs 3 to 4; trains router; sampler balanced; lr 0.5, cosine;") for line in lines
    )
    result = json.loads((run / "result.json").read_text())
    table = result["tables"]["standard"]
    assert list(table) == ["ride_router (fused)", "all experts", "expert 1", "expert 2", "expert 3"]
    assert 1 <= result["experts_used"] <= E
    assert f"experts_used {result['experts_used']} (mean over images)" in printed
    assert "accuracy_all_experts" in pd.read_csv(run / "per_class.csv").columns
    for used, rows in ((2, 4), (1, 1)):
        outcome = run_script("evaluate", "--ckpt", run, "--use-experts", used, "--output", tmp_path / str(used))
        assert outcome.code == 0, outcome.err
        found = json.loads((tmp_path / f"{used}/result.json").read_text())
        assert len(found["tables"]["standard"]) == rows
        assert found.get("experts_used", 1) <= used
    assert list(found["tables"]["standard"].values()) == [table["expert 1"]]


def test_photos_are_predicted_with_the_router(trained, data, run_script, tmp_path):
    run, _ = trained("ride_router")
    file = tmp_path / "logits.safetensors"
    assert run_script("evaluate", "--ckpt", run, "--logits", file, "--output", tmp_path).code == 0
    model, expected = reslt.load_run(run), load_file(file)["logits"]
    lines = (data / "test.txt").read_text().splitlines()
    predicted = model.predict(data / "images" / line.split()[0] for line in lines)
    assert [prediction.classes[0] for prediction in predicted] == expected.argmax(1).tolist()
    highest = [prediction.probabilities[0] for prediction in predicted]
    torch.testing.assert_close(torch.tensor(highest), expected.softmax(1).amax(1), rtol=1e-4, atol=1e-5)


def test_folding_a_router_is_refused_and_loading_its_run_warns(trained, run_script, tmp_path, caplog):
    run, _ = trained("ride_router")
    refused = run_script("evaluate", "--ckpt", run, "--fold", tmp_path / "x.safetensors")
    assert refused.code == 2
    assert (
        "would predict without the router (each image would use all 3 experts); turn it off with none (a router: "
        in refused.err
    )
    module, _ = reslt.load_run(run)
    assert "the module predicts without the router (each image would use all 3 experts)" in caplog.text
    model = model_of(Config.of(**NETWORK, method="ride_router", experts=E, router_topk=30), 3).eval()
    model.load_state_dict(tensors(run, "4-12", "ema"))
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(module(images), fused_logits(model(images)))
    folded = run_script("evaluate", "--ckpt", run, "--use-experts", 1, "--fold", tmp_path / "x.safetensors")
    assert folded.code == 0, folded.err


def test_a_run_stopped_in_the_routers_stage_and_resumed_ends_with_the_same_bytes(
    trained, data, tmp_path, run_script, monkeypatch
):
    whole, _ = trained("ride_router")
    command = flags(data, tmp_path, "ride_router")
    train_until(run_script, monkeypatch, 7, *command)
    resumed = run_script("train", *command, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "resuming in epoch 3, after 2 of its steps" in resumed.out
    for part in ("model", "ema", "optimizer"):
        files = (run / f"checkpoints/4-12/{part}.safetensors" for run in (whole, tmp_path / "run"))
        expected, found = (file.read_bytes() for file in files)
        assert found == expected


def test_the_experts_are_in_evaluation_mode_while_the_router_trains():
    """Dropout and BatchNorm of the experts and their gates act as in prediction, and no statistics change."""
    gated = {"drop": 0.5, "expert_stages": 1, "expert_gates": True}
    config = Config.of(**NETWORK | gated, method="ride_router", experts=E, router_topk=3)
    model = model_of(config, 3)
    images = torch.randn(4, 3, 16, 16)
    expected = model.eval()(images)
    model.trains_router = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    routed = model.train()(images)
    assert model.router.training
    torch.testing.assert_close(routed.branch_logits, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.trains_router = False
    assert all(module.training for module in model.train().modules())


def test_the_router_computes_in_float32_under_autocast():
    router = Router(8, E, 2)
    torch.nn.init.normal_(router.asks.weight)
    logits, features = torch.randn(E, 1, 5, 3), torch.randn(E, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        asks = router(logits.bfloat16(), features.bfloat16())
    assert asks.dtype == torch.float32
    assert torch.equal(asks, router(logits.bfloat16().float(), features.bfloat16().float()))


def test_a_folded_file_of_one_expert_loads_without_a_term_between_experts(run_script, data, tmp_path):
    recipe = tmp_path / "one.yaml"
    recipe.write_text(yaml.safe_dump({"method": "ride", "experts": 1, "mutual": False, "stages": []}))
    base = ["--recipe", recipe, "--data", data, "--output", tmp_path, "--experiment", "one", *TINY_FLAGS, "--epochs", 1]
    assert run_script("train", *base).code == 0
    file = tmp_path / "one.safetensors"
    assert run_script("evaluate", "--ckpt", tmp_path / "one", "--fold", file).code == 0
    module, _ = reslt.load_folded(file)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module(images), reslt.load_run(tmp_path / "one")[0](images))


def test_create_model_has_the_methods_own_defaults():
    model = reslt.create_model("cifar_resnet20", 4, method="ride_router")
    assert (len(model.experts), model.router.topk) == (3, 4)
