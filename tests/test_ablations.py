"""The paper's ablations: class sets, tied branches, fusions, and convolutions without ResLT's loss (figures 2, 3 and 7,
table 1)."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from builders import loss_of, model_of, predicted, settings_of
from conftest import make_dataset, train_once
from torch import nn

import reslt
from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.data.classes import Classes
from reslt.data.groups import branch_sets
from reslt.evaluation.metrics import ClassHits
from reslt.methods.losses import FusionLoss
from reslt.methods.predictors import create_predictor, fold_predictor
from reslt.models.complexity import complexity, complexity_without_branches
from reslt.models.fitting import fitting
from reslt.models.fold import fold, load_folded, save_folded
from reslt.models.fusion import fused_logits
from reslt.runs.console import describe_method
from reslt.training.step import TrainStep

SMALL = {"model": "cifar_resnet20", "model_kwargs": {"channels": (4, 8, 16)}, "img_size": 8}
SETS = ("nested", "separate", "disjoint")
CPU = torch.device("cpu")


def classes_of(counts: list[int], sizes, kind: str) -> list[list[int]]:
    return [np.flatnonzero(s).tolist() for s in branch_sets(np.array(counts), 3, sizes, kind)]


def network(num_classes: int = 3, **settings) -> nn.Module:
    """Return a model in float64 and evaluation mode with no weight or statistic at its initial value."""
    torch.manual_seed(0)
    model = model_of(Config.of(**SMALL, **settings), num_classes).double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def saved_and_loaded(file: Path, folded: nn.Module, config: Config, backbone: nn.Module) -> tuple[nn.Module, dict]:
    images = settings_of(config, timm.data.resolve_model_data_config(backbone))
    save_folded(folded, config.model, config.method, images, Classes(3), file)
    loaded, described = load_folded(file)
    return loaded.double(), described


def test_separate_and_disjoint_sets_are_cut_from_the_nested_ones():
    """Sizes count the rarest classes. With equal factors between 8 and 1 images, 3 groups have the thresholds 4 and 2."""
    stated, rule = ([100, 60, 30, 10, 3], (3, 1)), ([8, 4, 2, 1, 5], None)
    assert classes_of(*stated, "nested") == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]
    assert classes_of(*stated, "separate") == [[0, 1, 2, 3, 4], [2, 3], [4]]
    assert classes_of(*stated, "disjoint") == [[0, 1], [2, 3], [4]]
    assert classes_of(*rule, "separate") == [[0, 1, 2, 3, 4], [1], [2, 3]]
    assert classes_of(*rule, "disjoint") == [[0, 4], [1], [2, 3]]


def test_disjoint_sets_contain_every_class_exactly_once_even_if_some_sets_are_empty():
    assert branch_sets(np.full(4, 7), 3, None, "disjoint").tolist() == [[False] * 4, [False] * 4, [True] * 4]
    for branches in (1, 2, 5):
        sets = branch_sets(np.arange(40, 0, -1), branches, None, "disjoint")
        assert (sets.sum(0) == 1).all()


@pytest.mark.parametrize(("kind", "pairs"), zip(SETS, [(1 + 4 + 1 + 3) / 4, (1 + 4 + 3) / 3, (1 + 3) / 2], strict=True))
def test_the_branch_loss_counts_an_image_in_the_branches_that_have_its_class(kind, pairs):
    """Classes 0, 1, 2 are head, medium and tail. In the three branches, the label of an image of class 0 has the
    probabilities 2^-1, 2^-2, 2^-3, and that of an image of class 2 has 2^-4, 2^-1, 2^-3. The tail image counts in branches
    1, 2 and 3 (nested), 1 and 3 (separate), or 3 (disjoint)."""
    exponents = torch.tensor([[1.0, 4], [2, 1], [3, 3]])  # (K, N)
    own = 0.5**exponents
    logits = ((1 - own) / 2)[..., None].repeat(1, 1, 3)
    logits[:, 0, 0], logits[:, 1, 2] = own[:, 0], own[:, 1]
    config = Config.of(alpha=1.0, branch_sizes=(2, 1), branch_sets=kind)
    loss = loss_of(config, np.array([9, 3, 1]))(logits.log(), torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(pairs * np.log(2), rel=1e-6)


def test_the_fusion_loss_does_not_depend_on_the_sets():
    logits = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    losses = [loss_of(Config.of(alpha=0.0, branch_sets=kind), np.array([9, 3, 1]))(logits, labels) for kind in SETS]
    assert losses == [losses[0]] * 3


@pytest.mark.parametrize("branch", ["conv", "bn"])
def test_tied_branches_equal_three_copies_whose_gradients_add_up(branch):
    """The copies are untied branches with the same weights. Both are in training mode."""
    tied, images = network(branch=branch, tied_branches=True).train(), images_of(6)
    copies = network(branch=branch).train()
    weights = tied.state_dict()
    repeats = {name: 3 if copies.state_dict()[name].shape != t.shape else 1 for name, t in weights.items()}
    assert set(repeats.values()) == {1, 3}
    copies.load_state_dict({k: t.repeat(repeats[k], *[1] * (t.ndim - 1)) if t.ndim else t for k, t in weights.items()})
    tied_logits, copied_logits = tied(images), copies(images)
    assert torch.equal(tied_logits, tied_logits[:1].expand(3, -1, -1))
    torch.testing.assert_close(tied_logits, copied_logits)
    factors = torch.randn(tied_logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (tied_logits * factors).sum().backward()
    (copied_logits * factors).sum().backward()
    for (name, shared), copied in zip(tied.named_parameters(), copies.parameters(), strict=True):
        expected = copied.grad.unflatten(0, (repeats[name], -1)).sum(0).view_as(shared)
        torch.testing.assert_close(shared.grad, expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("branch", ["conv", "bn"])
@torch.no_grad()
def test_tied_branches_fold_exactly_and_their_file_loads(tmp_path, branch):
    model, images = network(branch=branch, tied_branches=True), images_of(4)
    folded, _ = fold(model, 8)
    torch.testing.assert_close(folded.eval()(images), model(images).sum(0), rtol=1e-9, atol=1e-9)
    config = Config.of(**SMALL, branch=branch, tied_branches=True)
    loaded, described = saved_and_loaded(tmp_path / "f.safetensors", folded.float(), config, model.backbone)
    torch.testing.assert_close(loaded(images), model(images).sum(0), rtol=1e-4, atol=1e-4)
    assert described["tied_branches"] is True


# one image: (K, 1, C). Sums: -10, 9, -9. Softmax: branch 2 has .731, .269, 0; the others 0, .378, .622 each.
THREE = torch.tensor([[[-10.0, 0, 0.5]], [[10, 9, -10]], [[-10, 0, 0.5]]])


@pytest.mark.parametrize(("fusion", "predicted_class"), [("max", 0), (None, 1), ("softmax", 2), ("main", 2)])
def test_naive_fusions_may_predict_three_classes_for_one_image(fusion, predicted_class):
    hits = ClassHits((3,), 3, CPU, fusion=fusion)
    hits.update(THREE, torch.tensor([predicted_class]))
    assert hits.accuracies().hits[:, predicted_class].tolist() == [
        1,
        *(int(of.argmax() == predicted_class) for of in THREE),
    ]


def test_the_softmax_fusion_is_the_logarithm_of_summed_probabilities_so_that_a_prior_divides_them():
    """The sums of probabilities are .731, .269 + 2 x .378 = 1.025 and 2 x .622 = 1.245. Divided by the frequencies .4, .5, .1
    they are 1.83, 2.05, 12.4, and divided by .2, .3, .5 they are 3.66, 3.42, 2.49."""
    fused = fused_logits(THREE, "softmax")
    np.testing.assert_allclose(fused.exp().numpy(), [[0.7311, 1.0240, 1.2449]], atol=1e-4)
    for frequency, expected in (([0.4, 0.5, 0.1], 2), ([0.2, 0.3, 0.5], 0)):
        hits = ClassHits((3,), 3, CPU, prior=torch.tensor(frequency).log(), fusion="softmax")
        hits.update(THREE, torch.tensor([expected]))
        assert hits.accuracies().hits[0, expected] == 1


def test_experts_are_fused_over_their_branches_then_averaged():
    """The experts' maxima are 3 1 0 and 0 4 3.5, with mean 1.5 2.5 1.75; the experts' own rows predict 0 and 1 (as a sum,
    the second would be -9 -5 7). The branches' rows are means over experts: 1.5 2 0 and -4.5 -4 1.75."""
    logits = torch.tensor([[[3.0, 0, 0], [0, 1, 0]], [[0, 4, 0], [-9, -9, 3.5]]])[:, :, None]  # (E, K, N, C)
    assert fused_logits(logits, "max").tolist() == [[1.5, 2.5, 1.75]]
    assert fused_logits(logits, "main").tolist() == [[1.5, 2, 0]]
    hits = ClassHits((2, 2), 3, CPU, fusion="max")
    hits.update(logits, torch.tensor([1]))
    assert hits.accuracies().hits[:, 1].tolist() == [1, 1, 0, 0, 1]


@torch.no_grad()
def test_the_mean_over_two_views_is_taken_before_the_fusion():
    model, images = network(branch="bn").float(), images_of(4).float()
    predictor = create_predictor(Config.of(fusion="max", tta="flip").method, model, np.ones(3))
    assert (predictor.fusion, predictor.flips) == ("max", True)
    views = predicted(model, images, tta="flip", fusion="max")
    torch.testing.assert_close(views, (model(images) + model(images.flip(-1))) / 2)


@pytest.mark.parametrize("settings", [{"branch": "conv"}, {"branch": "bn"}, {"branch": "bn", "experts": 2}])
@torch.no_grad()
def test_the_main_branch_is_the_first_one_and_folds_with_a_prior(tmp_path, settings):
    model, images, counts = network(**settings), images_of(4), np.array([60, 30, 10])
    prior = torch.tensor(np.log(counts / 100)).float()
    logits = model(images)
    expected = logits[:, 0].mean(0) if "experts" in settings else logits[0]
    torch.testing.assert_close(fused_logits(logits, "main"), expected.float())
    config = Config.of(**SMALL, **settings, fusion="main", prior_tau=1.0)
    fold_predictor(config.method, model, counts)
    folded, _ = fold(model, 8)
    torch.testing.assert_close(folded.eval()(images), expected - prior, rtol=1e-6, atol=1e-6)
    loaded, _ = saved_and_loaded(tmp_path / "f.safetensors", folded.float(), config, model.backbone)
    torch.testing.assert_close(loaded(images), expected - prior, rtol=1e-4, atol=1e-4)


STACK = {"method": "ce", "network": "conv_stack"}


@torch.no_grad()
def test_a_stack_of_convolutions_is_on_the_map_and_has_as_many_parameters_as_the_grouped_one():
    """ResNet-20 has 269,722 parameters at 10 classes. Each of the three convolutions adds 64 x 64, and its BatchNorm
    adds 2 x 64."""
    model = model_of(Config.of(model="cifar_resnet20", **STACK), 10).eval()
    assert sum(p.numel() for p in model.parameters()) == 269_722 + 3 * (64 * 64 + 2 * 64)
    grouped = model_of(Config.of(model="cifar_resnet20", branch="conv"), 10)
    assert complexity(model, 32).parameters == complexity(grouped, 32).parameters
    plain = complexity_without_branches(model, 32)
    assert (plain.parameters, complexity(model, 32).multiply_adds) == (
        269_722,
        plain.multiply_adds + 3 * 8 * 8 * 64 * 64,
    )
    images = torch.randn(2, 3, 32, 32)
    x = model.backbone.forward_features(images)
    for conv, bn in zip(model.branches.convs, model.branches.bns, strict=True):
        x = bn(conv(x)).clamp(min=0)
    torch.testing.assert_close(model(images), model.backbone.fc(x.mean((2, 3)))[None])


@pytest.mark.parametrize("experts", [1, 2])
@torch.no_grad()
def test_a_stack_of_convolutions_folds_exactly_and_its_file_loads(tmp_path, experts):
    model, images = network(**STACK, branches=2, experts=experts), images_of(4)
    expected = fused_logits(model(images)).double()
    folded, _ = fold(model, 8)
    assert not any(isinstance(m, nn.BatchNorm2d) for name, m in folded.named_modules() if "branches" in name)
    torch.testing.assert_close(folded.eval()(images), expected, rtol=1e-5, atol=1e-6)
    config = Config.of(**SMALL, **STACK, branches=2, experts=experts)
    backbone = model.backbone
    loaded, described = saved_and_loaded(tmp_path / "f.safetensors", folded.float(), config, backbone)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)
    assert (described["network"], described["branches"]) == ("conv_stack", 2)


def test_a_stack_of_convolutions_starts_from_a_plain_network_or_another_stack():
    stack, plain = network(**STACK), network(method="ce")
    assert fitting(stack, plain.state_dict(), np.arange(3)).new_weights == {"branches": 3 * (1 + 4)}
    assert not fitting(stack, network(**STACK).state_dict(), np.arange(3)).new_weights
    assert fitting(plain, stack.state_dict(), np.arange(3)).left_out == {"branches"}


def test_a_run_describes_its_sets_tied_branches_and_convolutions():
    counts, sizes = np.array([9, 3, 1]), (2, 1)
    method = Config.of(branch="bn", branch_sizes=sizes, branch_sets="disjoint", fusion="max").method
    assert describe_method(method, counts) == (
        "reslt, alpha 0.9, bn branches on the map over [1, 1, 1] classes; evaluated with fusion max"
    )
    tied = Config.of(branch="bn", branch_sizes=sizes, tied_branches=True).method
    assert "tied bn branches on the map over [3, 2, 1] classes" in describe_method(tied, counts)
    assert describe_method(Config.of(**STACK).method, counts) == "ce, 3 1x1 convolutions before the classifier"


# train.py and evaluate.py

RUNS = {
    "naive": ("--alpha", 1, "--branch-sets", "disjoint", "--branch-sizes", "equal", "--fusion", "softmax"),
    "tied": ("--tied-branches", "--epochs", 1),
    "stack": ("--method", "ce", "--network", "conv_stack", "--branches", 2, "--epochs", 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", (30, 12, 6), test_images=12)


@pytest.fixture
def trained(data, run_script):
    """Return the folder of a run in RUNS by name; trained once for all tests that read it."""
    return lambda name: train_once(run_script, data, name, *RUNS[name])


def rows_of(file: Path) -> dict:
    return {name: row["all"] for name, row in json.loads(file.read_text())["tables"]["standard"].items()}


def test_a_finished_run_is_evaluated_with_other_fusions(trained, run_script, tmp_path):
    run = trained("naive")
    own = rows_of(run / "result.json")
    assert list(own) == ["reslt (fused)", "branch 1 (1 class)", "branch 2 (1 class)", "branch 3 (1 class)"]
    assert json.loads((run / "result.json").read_text())["fusion"] == "softmax"
    for fusion in ("max", "main", "none"):
        outcome = run_script("evaluate", "--ckpt", run, "--fusion", fusion)
        assert outcome.code == 0, outcome.err
        found = rows_of(run / f"result-tiny-test-fusion={fusion}.json")
        assert list(found.values())[1:] == list(own.values())[1:]
        assert (f", fusion {fusion}" in outcome.out) == (fusion != "none")
        if fusion == "main":
            assert found["reslt (fused)"] == own["branch 1 (1 class)"]
    assert rows_of(run / "result.json") == own
    outcome = run_script("evaluate", "--ckpt", run, "--fusion", "max", "--tta", "flip", "--sweep", "tau=0,1")
    assert outcome.code == 0, outcome.err
    assert (run / "sweep-tau-tiny-test-tta=flip-fusion=max.csv").is_file()
    refused = run_script("evaluate", "--ckpt", run, "--fold", tmp_path / "f.safetensors")
    assert refused.code == 2
    assert "would predict without --fusion softmax (folded branches are added up)" in refused.err
    folded = run_script("evaluate", "--ckpt", run, "--fusion", "main", "--fold", tmp_path / "f.safetensors")
    assert folded.code == 0, folded.err
    assert reslt.load_folded(tmp_path / "f.safetensors")[0](torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_a_run_with_tied_branches_has_equal_rows_and_is_evaluated_and_loaded(trained, run_script, tmp_path):
    run = trained("tied")
    assert len(set(rows_of(run / "result.json").values())) == 1
    outcome = run_script("evaluate", "--ckpt", run, "--ncm", "l2", "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert reslt.load_run(run)[0](torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_a_stack_of_convolutions_trains_evaluates_and_has_no_fusion(trained, run_script, tmp_path):
    run = trained("stack")
    outcome = run_script("evaluate", "--ckpt", run, "--tau", 1, "--fold", tmp_path / "f.safetensors")
    assert outcome.code == 0, outcome.err
    assert list(rows_of(run / "result-tiny-test-tau=1.json")) == ["ce"]
    refused = run_script("evaluate", "--ckpt", run, "--fusion", "max")
    assert refused.code == 2
    assert "--fusion: --network conv_stack does not use it (--network reslt does)" in refused.err


class FixedLogits(torch.nn.Module):
    """A network that returns its parameter."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits * 1


def test_the_training_accuracy_is_that_of_the_fusion():
    """Both images have class 0. The first branch is right on both, and the sum of the two branches on one."""
    logits = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 5.0]]])
    window = [(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0]))]
    for fusion, expected in ((None, 1), ("main", 2)):
        model = FixedLogits(logits)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        alone, shard = Accelerator(cpu=True), BatchShard(2)
        step = TrainStep(model, FusionLoss(), optimizer, alone, shard, lambda images: images, 0, fusion=fusion)
        assert step.update(window, 0)[1] == expected
