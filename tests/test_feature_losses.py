"""Losses of features, added to the loss of the logits: compared with formulas in plain Python, and in batches without
pairs."""

import itertools
import math

import pytest
import torch

from reslt.config.checks import consistency_faults
from reslt.config.parts import PARTS, Part
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.errors import UserError
from reslt.methods.feature_losses import CentroidLoss, LiftedStructured, Range
from reslt.methods.losses import LossWithFeatures
from reslt.methods.registry import create_loss
from reslt.models.create import create_model
from reslt.models.featured import Featured
from reslt.training.trained_parts import check_parts

TINY = dict(model="cifar_resnet20", model_kwargs={"channels": [4, 4, 8]})


class SquaredNorm(torch.nn.Module):
    """A feature loss for this test: the sum over images of label times squared norm."""

    def forward(self, features, labels):
        return (labels * features.square().sum(-1)).sum()


@pytest.mark.parametrize(("experts", "reduction", "share"), [(1, "sum", 1.0), (2, "sum", 1.0), (2, "mean", 0.5)])
def test_a_feature_loss_sees_the_classifiers_input_and_is_combined_as_experts_losses_are(
    experts, reduction, share, monkeypatch
):
    monkeypatch.setitem(PARTS["feature_loss"], "norm", Part("made up", build=lambda: SquaredNorm()))
    config = Config.of(
        **TINY, method="ce", experts=experts, expert_loss=reduction, feature_loss="norm", feature_loss_weight=3.0
    )
    torch.manual_seed(0)
    model = create_model(config.model, config.method, 3).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    counts = torch.tensor([4, 2, 1]).numpy()
    model.gives_features = True
    featured = model(images)
    assert isinstance(featured, Featured)
    loss = create_loss(config.method, counts, experts, model=model)
    plain = create_loss(Config.of(**TINY, method="ce", experts=experts, expert_loss=reduction).method, counts, experts)
    assert isinstance(loss, LossWithFeatures)
    of_features = (labels * featured.features.square().sum(-1)).sum()
    wanted = plain(featured.branch_logits, labels) + 3.0 * share * of_features
    torch.testing.assert_close(loss(featured, labels), wanted)
    model.eval()
    assert isinstance(model(images), torch.Tensor)


LABELS = [3, 0, 0, 7, 3, 0, 3, 0, 9]  # classes of 3, 4, 1 and 1 images


def features_of(number: int, width: int = 5) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def lifted_by_hand(features: list[list[float]], labels: list[int], margin: float) -> float:
    pairs = [(i, j) for i, j in itertools.combinations(range(len(labels)), 2) if labels[i] == labels[j]]
    total = 0.0
    for i, j in pairs:
        negatives = [
            math.exp(margin - math.dist(features[one], features[other]))
            for one in (i, j)
            for other in range(len(labels))
            if labels[other] != labels[one]
        ]
        if negatives:
            total += max(0.0, math.log(sum(negatives)) + math.dist(features[i], features[j])) ** 2
    return total / (2 * len(pairs)) if pairs else 0.0


def range_by_hand(features, labels, alpha: float, beta: float, margin: float, largest: int) -> float:
    of_class = {c: [f for f, label in zip(features, labels, strict=True) if label == c] for c in labels}
    within = 0.0
    for images in of_class.values():
        squared = sorted((math.dist(a, b) ** 2 for a, b in itertools.combinations(images, 2)), reverse=True)[:largest]
        within += len(squared) / sum(1 / d for d in squared) if squared else 0.0
    means = [[sum(column) / len(images) for column in zip(*images, strict=True)] for images in of_class.values()]
    between = [max(0.0, margin - math.dist(a, b) ** 2) for a, b in itertools.combinations(means, 2)]
    return alpha * within + beta * max(between, default=0.0)


BY_HAND = {
    "lifted": (LiftedStructured(1.0), lambda f, y: lifted_by_hand(f, y, 1.0)),
    "lifted, margin 5": (LiftedStructured(5.0), lambda f, y: lifted_by_hand(f, y, 5.0)),
    "range": (Range(0.3, 0.7, 9.0, 2), lambda f, y: range_by_hand(f, y, 0.3, 0.7, 9.0, 2)),
    "range, k 4": (Range(0.3, 0.7, 9.0, 4), lambda f, y: range_by_hand(f, y, 0.3, 0.7, 9.0, 4)),
}
BATCHES = {
    "classes of 4, 3, 1 and 1": LABELS,
    "four in a row": [5, 5, 5, 5, 2, 2, 2, 2],
    "no pair": [4, 1, 0, 2, 3],
    "one class": [6, 6, 6],
    "two images": [1, 1],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("loss", BY_HAND)
def test_a_loss_of_a_batch_is_its_formula_with_its_gradient(loss, batch):
    of_features, by_hand = BY_HAND[loss]
    labels = torch.tensor(BATCHES[batch])
    features = features_of(len(labels)).requires_grad_()
    assert of_features(features, labels).item() == pytest.approx(by_hand(features.tolist(), labels.tolist()), rel=1e-9)
    assert torch.autograd.gradcheck(lambda f: of_features(f, labels), features)
    single = of_features(features.float(), labels)
    torch.testing.assert_close(single.double(), of_features(features, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", BY_HAND)
def test_close_features_of_a_large_batch_have_exact_distances(loss):
    """Forty images far from 0: squared norms minus products would leave no correct digit of the distances in float32."""
    of_features, _ = BY_HAND[loss]
    features, labels = (100 + 0.01 * features_of(40)).float(), torch.arange(40) % 5
    exact = of_features(features.double(), labels).item()
    assert of_features(features, labels).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("loss", BY_HAND)
def test_without_a_pair_or_without_another_class_there_is_nothing_to_pull_or_push(loss):
    of_features, _ = BY_HAND[loss]
    far = 100 * features_of(5)  # beyond the margin
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        features = far.clone().requires_grad_()
        value = of_features(features, labels)
        value.backward()
        if len(labels.unique()) > 1 or isinstance(of_features, LiftedStructured):
            assert value.item() == features.grad.abs().max().item() == 0


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("loss", BY_HAND)
def test_identical_features_have_a_finite_gradient(loss, size):
    """All distances are 0, or all except those to one image; the square root has no finite slope at 0."""
    of_features, _ = BY_HAND[loss]
    for changed in (0.0, size):
        features = torch.full((9, 5), size)
        features[0] += changed
        value = of_features(features.requires_grad_(), torch.tensor(LABELS))
        assert value.isfinite()
        assert torch.autograd.grad(value, features)[0].isfinite().all()


def test_the_centroid_loss_pulls_features_and_centroids_and_pushes_other_centroids_away():
    centroids, weight = torch.nn.Parameter(0.5 * features_of(4)), 0.01
    features, labels = features_of(6).requires_grad_(), torch.tensor([0, 2, 2, 1, 2, 1])
    rows = zip(features.tolist(), labels.tolist(), strict=True)
    own, others = 0.0, 0.0
    for f, y in rows:
        own += math.dist(f, centroids[y].tolist()) ** 2 / 2 / 6
        others += sum(math.dist(f, m) ** 2 for c, m in enumerate(centroids.tolist()) if c != y) / (6 * 4)
    assert others < 10  # so that the second term is not cut off at 0
    loss = CentroidLoss(centroids, weight)
    value = loss(features, labels)
    assert value.item() == pytest.approx(own + 0.01 * (10 - others), rel=1e-9)
    of_features, of_centroids = torch.autograd.grad(value, [features, centroids])
    torch.testing.assert_close(of_features, _gradient(lambda f: loss(f, labels), features))

    def to_others(moved):
        distances = (features.detach()[:, None] - moved).square().sum(-1)
        return -0.01 * (distances.sum() - distances[torch.arange(6), labels].sum()) / (6 * 4)

    pushed = _gradient(to_others, centroids)
    for c, images in {0: [0], 1: [3, 5], 2: [1, 2, 4], 3: []}.items():
        pulled = sum(centroids[c] - features[i] for i in images) / ((1 + len(images)) * 6 * weight) if images else 0.0
        torch.testing.assert_close(of_centroids[c], pulled + pushed[c])
    assert not list(loss.parameters())  # the centroids belong to the network


def _gradient(function, at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `function` at a point by central differences."""
    at, found = at.detach(), torch.zeros_like(at)
    for i in range(at.numel()):
        step = torch.zeros(at.numel(), dtype=at.dtype)
        step[i] = 1e-6
        found.view(-1)[i] = (function(at + step.view_as(at)) - function(at - step.view_as(at))) / 2e-6
    return found


CENTROIDS = {"epochs": 1, "reinit": ["centroids"], "train": ["all", "centroids"], "feature_loss": "centroids"}
FAULTS = {
    "feature_loss: lifted compares images by their labels": {"method": "lifted", "mixup": 0.2},
    "feature_loss: range sees the whole batch at once": {"method": "range", "grad_accum_steps": 2},
    "feature_loss: lifted needs features of single images": {"method": "bbn", "feature_loss": "lifted"},
    "feature_loss: range: a router has a loss of its own": {"method": "ride_router", "experts": 2, "router_topk": 2}
    | {"feature_loss": "range"},
    "feature_loss: centroids: head linear has none": {"method": "oltr", "head": "linear", "stages": ()}
    | {"feature_loss": "centroids"},
    "feature_loss: centroids: no stage up to stage 1 sets them": {"method": "oltr", "feature_loss": "centroids"},
    "feature_loss: centroids: they require one network": {"method": "oltr", "experts": 2},
    "reinit: centroids: the model has none without --head meta_embedding": {"method": "ce", "stages": (CENTROIDS,)},
    "train: attention: the model has none without --network attention": {"method": "oltr", "network": "plain"},
    "train: centroids: no other loss has a gradient for them": {
        "method": "oltr",
        "stages": (CENTROIDS | {"feature_loss": "off"},),
    },
}


@pytest.mark.parametrize("message", FAULTS)
def test_settings_that_exclude_a_feature_loss_are_refused(message):
    assert any(message in fault for fault in consistency_faults(Config.of(**FAULTS[message])))


def test_mixing_is_refused_only_in_stages_that_compare_images():
    mixed = Config.of(method="oltr", mixup=0.2)
    assert any("drop mixup" in fault for fault in consistency_faults(mixed))
    stages = (mixed.method.stages[0] | {"mixup": 0.0},)
    assert not consistency_faults(mixed.changed(stages=stages))


def test_parts_that_no_stage_uses_and_features_without_one_classifier_are_refused():
    def refused(message: str, **settings) -> None:
        config = Config.of(**TINY | settings)
        with pytest.raises(UserError, match=message):
            check_parts(create_model(config.model, config.method, 3), stages_of(config))

    refused("--network attention: no stage has train", method="ce", network="attention")
    refused("--head meta_embedding: no stage has reinit", method="ce", head="meta_embedding")
    distilled = {"embed_dim": 48, "depth": 1, "num_heads": 2, "img_size": 32}
    refused(
        "--feature-loss lifted requires a model with one linear classifier",
        model="deit_tiny_distilled_patch16_224",
        model_kwargs=distilled,
        method="lifted",
    )
