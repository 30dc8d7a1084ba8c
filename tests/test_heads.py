"""Heads agree with formulas in plain Python, on several models, with branches and experts, and after folding."""

import math

import pytest
import timm
import torch
from builders import backbone_of, model_of, settings_of

from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.models.branches import apply_branches
from reslt.models.fold import fold, load_folded, save_folded
from reslt.models.heads import CosineLinear, DeconfoundedLinear, MetaEmbedding, ScaledLinear, reinitialize
from reslt.training.trained_parts import heads

CLASSES = 5
MODELS = {
    "cifar": {"model": "cifar_resnet20", "model_kwargs": {"channels": (8, 16, 32)}, "img_size": 16},
    "resnet": {
        "model": "resnet18",
        "model_kwargs": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
        "img_size": 32,
    },
    "vit": {
        "model": "vit_tiny_patch16_224",
        "model_kwargs": {"embed_dim": 48, "depth": 1, "num_heads": 2},
        "img_size": 32,
    },
}
KINDS = {
    "cosine": CosineLinear,
    "deconfounded": DeconfoundedLinear,
    "scaled": ScaledLinear,
    "meta_embedding": MetaEmbedding,
}


def config_of(model: str, head: str, **more) -> Config:
    return Config.of(**MODELS[model], method=more.pop("method", "ce"), head=head, **more)


def randomized(config: Config) -> torch.nn.Module:
    """Return a model in float64 and evaluation mode with random parameters and statistics; a meta-embedding has
    centroids."""
    torch.manual_seed(0)
    model = model_of(config, CLASSES).double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var") or "scales" in name:
            torch.nn.init.uniform_(tensor, 0.5, 2)
        elif name.endswith(("running_mean", "branches.out.weight")) or "bias" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    for head in heads(model) if config.method.head == "meta_embedding" else ():
        head.set_centroids(torch.randn(head.centroids.shape))
    return model


def images(model: str) -> torch.Tensor:
    side = MODELS[model]["img_size"]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def norm(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def halves(values: list[float]) -> list[list[float]]:
    return [values[: len(values) // 2], values[len(values) // 2 :]]


def by_hand(head: torch.nn.Module, features: torch.Tensor, alpha: float = 0.0) -> list[list[float]]:
    """Return the (N, C) logits of (N, D) features, computed in plain Python."""
    rows, found = head.weight.tolist(), []
    for f in features.tolist():
        if isinstance(head, CosineLinear):
            found.append([30 * dot(f, w) / norm(f) / norm(w) for w in rows])
        elif isinstance(head, ScaledLinear):
            terms = zip(head.scales.tolist(), rows, head.bias.tolist(), strict=True)
            found.append([scale * (dot(f, w) + bias) for scale, w, bias in terms])
        elif isinstance(head, MetaEmbedding):
            found.append(meta_embedding_by_hand(head, f))
        else:
            logits = []
            for w in rows:
                total = 0.0
                for part, row_part, m in zip(halves(f), halves(w), halves(head.running_mean.tolist()), strict=True):
                    x, d = [v / norm(part) for v in part], [v / norm(m) for v in m]
                    x = [v - alpha * dot(x, d) * e for v, e in zip(x, d, strict=True)] if alpha else x
                    total += dot(x, row_part) / (norm(row_part) + 1 / 32)
                logits.append(16 / 2 * total)
            found.append(logits)
    return found


def meta_embedding_by_hand(head: MetaEmbedding, f: list[float]) -> list[float]:
    """Return the logits of one feature: shares of the centroids, memory, concept selector, reachability, cosine."""
    centroids, linear = head.centroids.tolist(), zip(head.weight.tolist(), head.bias.tolist(), strict=True)
    shares = [math.exp(dot(f, w) + bias) for w, bias in linear]
    memory = [sum(s * m[d] for s, m in zip(shares, centroids, strict=True)) / sum(shares) for d in range(len(f))]
    selected = zip(head.selector.weight.tolist(), head.selector.bias.tolist(), strict=True)
    concept = [math.tanh(dot(f, w) + bias) for w, bias in selected]
    reach = 10 / min(math.dist(f, m) for m in centroids)
    x = [reach * (a + e * v) for a, e, v in zip(f, concept, memory, strict=True)]
    return [16 * norm(x) / (1 + norm(x)) * dot(x, w) / norm(x) / norm(w) for w in head.rows.tolist()]


def assert_by_hand(logits: torch.Tensor, head: torch.nn.Module, features: torch.Tensor, alpha: float = 0.0) -> None:
    expected = torch.tensor(by_hand(head, features, alpha), dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_head_replaces_the_linear_classifier_of_any_model(model, head):
    network, x = randomized(config_of(model, head)), images(model)
    classifier = network.backbone.get_classifier()
    assert type(classifier) is KINDS[head]
    pooled = network.backbone.forward_head(network.backbone.forward_features(x), pre_logits=True)
    assert_by_hand(network(x)[0], classifier, pooled)


@pytest.mark.parametrize("at", ["map", "pooled"])
@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("model", ["resnet", "vit"])
@torch.no_grad()
def test_the_features_of_each_branch_are_classified_separately(model, head, at):
    network = randomized(config_of(model, head, method="reslt", branch="bn", branch_at=at))
    x, backbone = images(model), network.backbone
    features = backbone.forward_features(x)
    if at == "pooled":
        pooled = apply_branches(network.branches, backbone.forward_head(features, pre_logits=True), False)
    else:
        pooled = backbone.forward_head(apply_branches(network.branches, features, False), pre_logits=True)
    logits = network(x)
    assert logits.shape == (3, 3, CLASSES)
    for branch_logits, features_of_branch in zip(logits, pooled.unflatten(0, (3, -1)), strict=True):
        assert_by_hand(branch_logits, backbone.get_classifier(), features_of_branch)
        if head == "cosine":
            assert branch_logits.abs().max() <= 30
    if head != "scaled":  # these heads normalize, so that their logits do not add up to those of summed features
        together = backbone.get_classifier()(pooled.unflatten(0, (3, -1)).sum(0))
        assert (network(x).sum(0) - together).abs().max() > 0.1


@pytest.mark.parametrize("head", KINDS)
@torch.no_grad()
def test_every_expert_has_a_head_of_its_own(head):
    network, x = randomized(config_of("resnet", head, experts=2)), images("resnet")
    first, second = heads(network)
    assert type(first) is type(second) is KINDS[head]
    assert not torch.equal(first.weight, second.weight)
    shared = network.shared.forward_features(x)
    for expert, logits in zip(network.experts, network(x), strict=True):
        pooled = expert.backbone.forward_head(expert.backbone.forward_features(shared), pre_logits=True)
        assert_by_hand(logits[0], expert.backbone.get_classifier(), pooled)


@pytest.mark.parametrize("head", KINDS)
def test_a_model_without_one_linear_classifier_is_refused(head):
    kwargs = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    model = "deit_tiny_distilled_patch16_224"
    config = Config.of(model=model, model_kwargs=kwargs, img_size=32, method="ce", head=head)
    expected = f"--head {head} requires a model with one linear classifier; VisionTransformerDistilled has a tuple"
    with pytest.raises(UserError, match=expected):
        model_of(config, CLASSES)
    with pytest.raises(UserError, match="--cost sigmoid_focal requires a model with one linear classifier"):
        model_of(config.changed(head="linear", cost="sigmoid_focal"), CLASSES)


@pytest.mark.parametrize("head", KINDS)
@torch.no_grad()
def test_under_autocast_a_head_computes_in_float32(head):
    network = model_of(config_of("cifar", head), CLASSES).eval()
    classifier = network.backbone.get_classifier()
    features = torch.randn(4, classifier.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(features.bfloat16())
        assert network(images("cifar").float()).dtype == torch.float32
    assert logits.dtype == torch.float32
    assert torch.equal(logits, classifier(features.bfloat16().float()))


def test_the_gradients_of_every_head_reach_features_and_weights():
    for kind in KINDS.values():
        torch.manual_seed(0)
        head = kind(torch.nn.Linear(6, 3)).double().eval()
        trained = dict(head.named_parameters())
        if kind is MetaEmbedding:
            head.set_centroids(torch.randn(3, 6))
            trained.pop("centroids")  # only a loss of features trains them
        features = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(head, features)
        head(features).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
        assert kind is not MetaEmbedding or head.centroids.grad is None


def test_the_mean_feature_is_accumulated_with_momentum_only_in_training():
    torch.manual_seed(0)
    head = DeconfoundedLinear(torch.nn.Linear(4, 3), momentum=0.8)
    batches = torch.randn(3, 5, 4)
    for batch in batches:
        head(batch)
    means = [[sum(column) / 5 for column in zip(*batch.tolist(), strict=True)] for batch in batches]
    expected = [0.8 * (0.8 * a + b) + c for a, b, c in zip(*means, strict=True)]
    assert head.running_mean.tolist() == pytest.approx(expected, rel=1e-5)
    head.eval()(batches[0])
    assert head.running_mean.tolist() == pytest.approx(expected, rel=1e-5)
    assert "running_mean" in head.state_dict()


@torch.no_grad()
def test_the_total_direct_effect_removes_the_part_along_the_mean_feature_only_in_evaluation():
    torch.manual_seed(0)
    head = DeconfoundedLinear(torch.nn.Linear(6, 3)).double()
    head.running_mean.normal_()
    features = torch.randn(4, 6, dtype=torch.float64)
    trained = head.eval()(features)
    head.alpha = 1.5
    assert_by_hand(head(features), head, features, alpha=1.5)
    assert (head(features) - trained).abs().max() > 0.1
    direction = head.running_mean.clone()
    assert torch.equal(head.train()(features), trained)
    head.running_mean.copy_(direction)
    head.alpha = 0.0
    assert torch.equal(head.eval()(features), trained)


def test_head_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(UserError, match="--head-groups 3: 32 features cannot be cut into 3 equal parts"):
        model_of(config_of("cifar", "deconfounded", head_groups=3), CLASSES)


def test_rows_are_initialized_as_published():
    torch.manual_seed(0)
    cosine, deconfounded = (kind(torch.nn.Linear(400, 50)) for kind in (CosineLinear, DeconfoundedLinear))
    assert cosine.weight.norm(dim=1).tolist() == pytest.approx([1.0] * 50)
    assert cosine.weight.min() < -0.05  # uniform in (-1, 1), then normalized: about +-sqrt(3 / 400) = +-0.087
    assert cosine.weight.abs().max() < 0.1
    assert 0.049 < deconfounded.weight.abs().max() <= 0.05  # 1 / sqrt(400)
    assert cosine.bias is None
    assert deconfounded.bias is None
    assert ScaledLinear(torch.nn.Linear(4, 3)).scales.tolist() == [1.0] * 3


def test_the_bias_of_the_sigmoid_focal_cost_gives_every_class_the_same_probability():
    config = config_of("cifar", "linear", cost="sigmoid_focal", experts=2)
    for head in heads(model_of(config, CLASSES)):
        assert torch.sigmoid(head.bias).tolist() == pytest.approx([1 / CLASSES] * CLASSES)
        torch.nn.init.zeros_(head.bias)
        reinitialize(head, config.method, 0)
        assert torch.sigmoid(head.bias).tolist() == pytest.approx([1 / CLASSES] * CLASSES)
    assert heads(model_of(config_of("cifar", "cosine", cost="sigmoid_focal"), CLASSES))[0].bias is None


@pytest.mark.parametrize("head", ["linear", "scaled"])
def test_a_linear_head_is_the_models_own_classifier_and_draws_no_random_numbers(head):
    config = config_of("cifar", head)
    torch.manual_seed(0)
    plain = backbone_of(config, CLASSES).state_dict()
    next_draw = torch.rand(1)
    torch.manual_seed(0)
    weights = model_of(config, CLASSES).backbone.state_dict()
    assert torch.equal(torch.rand(1), next_draw)
    weights.pop("fc.scales", None)
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("head", KINDS)
def test_a_head_is_reinitialized_as_a_function_of_the_seed(head):
    torch.manual_seed(0)
    first = model_of(config_of("cifar", head), CLASSES).backbone.get_classifier()
    before, state = {k: v.clone() for k, v in first.state_dict().items()}, torch.get_rng_state()
    reinitialize(first, config_of("cifar", head).method, 5)
    second = model_of(config_of("cifar", head), CLASSES).backbone.get_classifier()
    torch.set_rng_state(state)
    reinitialize(second, config_of("cifar", head).method, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.weight, before["weight"])
    reinitialize(second, config_of("cifar", head).method, 6)
    assert not torch.equal(first.weight, second.weight)


def saved(config: Config, model: torch.nn.Module, file) -> str:
    """Fold a model, write it to a file, and return the description of how far it folded."""
    folded, how = fold(model, config.augment.img_size)
    settings = settings_of(config, timm.data.resolve_model_data_config(model.backbone))
    save_folded(folded.float(), config.model, config.method, settings, Classes(CLASSES), file)
    return how


FOLDED = {
    "scaled": {"head": "scaled"},
    "lws": {"method": "lws"},
    "scaled by a stage of the recipe": {"head": "scaled", "stages": ({"epochs": 1, "train": ["scales"]},)},
    "scaled, bn branches": {"method": "reslt", "head": "scaled", "branch": "bn"},
    "scaled, conv branches": {"method": "reslt", "head": "scaled", "branch": "conv"},
    "cosine": {"head": "cosine", "head_scale": 20.0},
    "ldam": {"method": "ldam"},
    "linear ldam": {"method": "ldam", "head": "linear"},
    "cosine, bn branches": {"method": "reslt", "head": "cosine", "branch": "bn"},
    "cosine, conv branches": {"method": "reslt", "head": "cosine", "branch": "conv"},
    "deconfounded": {"method": "causal", "head_groups": 4, "head_gamma": 0.1, "head_scale": 10.0},
    "cosine experts": {"head": "cosine", "experts": 2},
    "scaled experts": {"head": "scaled", "experts": 2},
    "oltr": {"method": "oltr", "head_scale": 10.0},
    "attention experts": {"network": "attention", "experts": 2},
}


@pytest.mark.parametrize("case", FOLDED)
@torch.no_grad()
def test_a_folded_file_computes_the_logits_of_its_model(tmp_path, case):
    config = Config.of(**MODELS["resnet"], **({"method": "ce"} | FOLDED[case]))
    model, x = randomized(config), images("resnet")
    logits = model(x).sum(-3)
    expected = (logits if config.model.experts == 1 else logits.mean(0)).float()
    how = saved(config, model, tmp_path / "x.safetensors")
    loaded, _ = load_folded(tmp_path / "x.safetensors")
    torch.testing.assert_close(loaded(x.float()), expected, rtol=1e-4, atol=1e-4)
    is_plain = case in ("scaled", "lws", "scaled by a stage of the recipe", "scaled, bn branches", "linear ldam")
    assert ("the file contains the plain timm model" in how) == is_plain
    if is_plain:
        weights = tmp_path / "x.safetensors"
        kwargs = MODELS["resnet"]["model_kwargs"]
        timm_model = timm.create_model("resnet18", num_classes=CLASSES, checkpoint_path=weights, **kwargs).eval()
        torch.testing.assert_close(timm_model(x.float()), expected, rtol=1e-4, atol=1e-4)


def test_a_head_has_the_settings_of_its_method():
    model = model_of(
        config_of("cifar", "deconfounded", head_scale=9.0, head_groups=4, head_gamma=0.5, head_momentum=0.1), 5
    )
    head = model.backbone.get_classifier()
    assert (head.scale, head.groups, head.gamma, head.momentum) == (9.0, 4, 0.5, 0.1)
    assert model_of(config_of("cifar", "cosine", head_scale=12.0), 5).backbone.get_classifier().scale == 12.0
    assert model_of(config_of("cifar", "cosine"), 5).backbone.get_classifier().scale == 30.0
