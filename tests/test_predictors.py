"""Predictors, by hand and in evaluate.py: their scores, their reports, and sweeps over one setting."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import ONE, Batches, eval_loader_of, model_of, predicted
from conftest import TINY_FLAGS, make_dataset, train_once
from torch import nn

import reslt
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.config.sweep import Sweep
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.evaluation.curve import Curve
from reslt.evaluation.evaluate import evaluate, evaluate_each, nearest_means
from reslt.evaluation.metrics import ClassAccuracies, ClassHits
from reslt.evaluation.outputs import Outputs
from reslt.methods.predictors import Predictor, create_predictor, fold_predictor
from reslt.models.fusion import fused_logits
from reslt.models.heads import ScaledLinear, normalized_rows
from reslt.models.reslt import ResLT
from reslt.runs import report

SMALL = {"model": "cifar_resnet20", "model_kwargs": {"channels": (4, 8, 16)}, "branch": "bn", "img_size": 8}
COUNTS = np.array([60, 30, 10])


def network(seed: int = 0, **settings) -> nn.Module:
    """A model with random statistics, biases and branches, so that no two of its parts are alike."""
    torch.manual_seed(seed)
    model = model_of(Config.of(**SMALL, **settings), 3).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_()
    return model


def images_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def features_of(model: ResLT, images: torch.Tensor) -> torch.Tensor:
    """(K, N, D) features before the classifier, by the model's own head without the classifier."""
    features = model.backbone.forward_features(images)
    if model.branches is None:
        return model.backbone.forward_head(features, pre_logits=True)[None]
    return torch.stack([model.backbone.forward_head(of, pre_logits=True) for of in model.branches(features)])


@torch.no_grad()
def test_tau_is_a_matrix_product_with_scaled_rows_and_without_bias():
    model, images = network(), images_of(4)
    weight = model.backbone.fc.weight.double().numpy()
    scaled = weight / np.linalg.norm(weight, axis=1, keepdims=True) ** 0.7
    by_hand = features_of(model, images).double().numpy() @ scaled.T
    np.testing.assert_allclose(predicted(model, images, tau=0.7).numpy(), by_hand, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tau_equals_the_model_with_changed_weights_to_the_bit_and_leaves_the_model_as_it_was():
    """Earlier versions divided the rows in place and set the bias to 0. With tau 0 only the bias is dropped."""
    for tau in (0.0, 1.0):
        model, images = network(), images_of(4)
        trained, fc = model(images), model.backbone.fc
        ours = predicted(model, images, tau=tau)
        assert torch.equal(model(images), trained)
        fc.weight.div_(fc.weight.norm(dim=1, keepdim=True) ** tau)
        fc.bias.zero_()
        assert torch.equal(ours, model(images))
        assert not torch.equal(ours, trained)


@torch.no_grad()
def test_tau_of_a_scaled_head_includes_the_scales_in_the_rows():
    head = ScaledLinear(nn.Linear(4, 3))
    head.scales.copy_(torch.tensor([2.0, 1.0, 0.5]))
    rows = head.scales[:, None] * head.weight
    torch.testing.assert_close(normalized_rows(head, 0.5).weight, rows / rows.square().sum(1, keepdim=True) ** 0.25)


def test_a_prior_is_subtracted_once_from_the_logits_of_every_row():
    """(E, K, N, C) = (2, 2, 1, 2); pi = (.9, .1), so class 1 gains log 9 = 2.197 over class 0.

    Fused: the mean over experts of sums, (3 + 2) / 2 = 2.5 for class 0, stays. Branches, means over experts: 1.5 and 1.0
    change to class 1. Experts, sums over branches: 3 stays, 2 changes."""
    logits = torch.zeros(2, 2, 1, 2)
    logits[..., 0] = torch.tensor([[[2.0], [1.0]], [[1.0], [1.0]]])
    hits = ClassHits((2, 2), 2, torch.device("cpu"), prior=torch.tensor([0.9, 0.1]).log())
    hits.update(logits, torch.tensor([1]))
    assert hits.accuracies().hits[:, 1].tolist() == [0, 1, 1, 0, 1]


def test_the_prior_is_that_of_the_training_counts_and_its_tau():
    predictor = create_predictor(Config.of(prior_tau=2.0).method, network(), COUNTS)
    np.testing.assert_allclose(predictor.prior.numpy(), 2 * np.log([0.6, 0.3, 0.1]), rtol=1e-6)
    assert predictor.heads is None
    assert create_predictor(Config.of(prior_tau=0.0).method, network(), COUNTS) == Predictor()


def training_batches() -> Batches:
    """Seven images in two batches; class 2 has none."""
    return Batches((images_of(4, 2), torch.tensor([0, 1, 0, 0])), (images_of(3, 3), torch.tensor([1, 1, 0])))


@pytest.mark.parametrize("form", ["cl2", "l2", "raw"])
def test_class_mean_scores_agree_with_numpy(form):
    """Minus the squared distance of the transformed feature to its branch's means, on a model of three branches."""
    model, batches, images = network(), training_batches(), images_of(5)
    seen, labels = (torch.cat([batch[i] for batch in batches.batches]) for i in (0, 1))

    def transform(features, mean):
        features = features - mean if form == "cl2" else features
        return features if form == "raw" else features / np.linalg.norm(features, axis=-1, keepdims=True)

    expected = np.empty((3, 5, 2))
    training, test = features_of(model, seen).double().numpy(), features_of(model, images).double().numpy()
    for k in range(3):
        own, mean = transform(training[k], training[k].mean(0)), training[k].mean(0)
        for c in (0, 1):
            center = own[labels.numpy() == c].mean(0)
            expected[k, :, c] = -np.square(transform(test[k], mean) - center).sum(-1)
    means = nearest_means(model, batches, ONE, 3, form)
    scores = predicted(model, images, COUNTS, means, ncm=form).double().numpy()
    np.testing.assert_allclose(scores[..., :2], expected, rtol=1e-4, atol=1e-4)
    assert (scores[..., 2] < -1e20).all()  # a class without an image is never predicted
    assert np.isfinite(scores.sum(0)).all()


def test_each_expert_has_its_own_class_means_and_the_fused_scores_are_the_mean():
    model, batches, images = network(experts=2), training_batches(), images_of(5)
    together = predicted(model, images, COUNTS, nearest_means(model, batches, ONE, 3, "cl2"), ncm="cl2")
    assert together.shape == (2, 3, 5, 3)
    shared = model.shared
    for e, expert in enumerate(model.experts):
        alone = Batches(*((shared.forward_features(seen).detach(), labels) for seen, labels in batches.batches))
        means = nearest_means(expert, alone, ONE, 3, "cl2")
        own = predicted(expert, shared.forward_features(images).detach(), COUNTS, means, ncm="cl2")
        torch.testing.assert_close(together[e], own)
    torch.testing.assert_close(fused_logits(together), together.sum(1).mean(0))


def test_class_means_average_the_images_that_are_trained_on(data):
    """--limit-train 5 keeps 5 of 48 images at equal distances: 0, 11.75, 23.5, ..., rounded."""
    config = Config.of(**SMALL, data=str(data), limit_train=5, workers=0)
    settings = ImageSettings(8, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, config.augment)
    dataset = load_dataset(str(data))
    [(_, labels)] = eval_loader_of(dataset, "train", config, settings).epoch(0)
    assert labels.tolist() == dataset.lists["train"].labels[[0, 12, 24, 35, 47]].tolist() == [0, 0, 0, 1, 2]


def test_the_images_of_two_processes_give_the_class_means_of_one():
    model, both = network(), training_batches()
    whole = nearest_means(model, both, ONE, 3, "cl2")[0]
    sent = []  # sums and counts of the other process, in the order of their reduction

    def passed(batch, reduce):
        accelerator = SimpleNamespace(**{**vars(ONE), "reduce": reduce})
        return nearest_means(model, Batches(batch), accelerator, 3, "l2")[0]

    passed(both.batches[1], lambda tensor, _: sent.append(tensor.clone()) or tensor)
    merged = passed(both.batches[0], lambda tensor, _: tensor + sent.pop(0))
    one = nearest_means(model, both, ONE, 3, "l2")[0]
    torch.testing.assert_close(merged.means, one.means, rtol=0, atol=1e-7)
    assert not torch.allclose(one.means, whole.means, atol=1e-3)


@torch.no_grad()
def test_tde_follows_its_formula_and_with_alpha_0_is_the_head_itself_to_the_bit():
    model, images = network(method="ce", head="deconfounded"), images_of(5)
    head = model.backbone.fc
    head.running_mean.normal_()
    assert torch.equal(predicted(model, images, COUNTS, tde=0.0), model(images))
    features = features_of(model, images)[0].double().numpy()
    weight, mean = head.weight.double().numpy(), head.running_mean.double().numpy()
    expected = 0
    for f, w, m in zip(np.split(features, 2, 1), np.split(weight, 2, 1), np.split(mean, 2), strict=True):
        x = f / np.linalg.norm(f, axis=1, keepdims=True)
        d = m / np.linalg.norm(m)
        rows = w / (np.linalg.norm(w, axis=1, keepdims=True) + 1 / 32)
        expected = expected + 16 / 2 * (x - 1.5 * np.outer(x @ d, d)) @ rows.T
    np.testing.assert_allclose(predicted(model, images, COUNTS, tde=1.5)[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert head.alpha == 0


@torch.no_grad()
def test_tde_of_a_model_in_training_mode_is_the_same_and_leaves_the_direction_alone():
    """Evaluations during training choose the predictor before the model enters evaluation mode."""
    model, images = network(method="ce", head="deconfounded"), images_of(5)
    model.backbone.fc.running_mean.normal_()
    before, expected = model.backbone.fc.running_mean.clone(), predicted(model, images, COUNTS, tde=1.5)
    assert torch.equal(predicted(model.train(), images, COUNTS, tde=1.5), expected)
    assert torch.equal(model.backbone.fc.running_mean, before)


@torch.no_grad()
def test_flip_is_the_mean_of_the_logits_of_two_passes():
    model, images = network(), images_of(5)
    assert torch.equal(predicted(model, images, tta="flip"), (model(images) + model(images.flip(-1))) / 2)
    both = predicted(model, images, tau=1.0, tta="flip")
    one, other = (predicted(model, view, tau=1.0) for view in (images, images.flip(-1)))
    torch.testing.assert_close(both, (one + other) / 2)


def test_several_predictors_share_one_pass_and_count_as_each_alone(monkeypatch):
    model, passes, original = network(), [], ResLT.forward
    monkeypatch.setattr(ResLT, "forward", lambda self, images: passes.append(len(images)) or original(self, images))
    batches = Batches((images_of(40, 4), torch.arange(40) % 3), (images_of(20, 5), torch.arange(20) % 3))
    settings = [{}, {"tau": 0.5}, {"tau": 1.0}, {"prior_tau": 1.0}, {"tau": 2.0, "prior_tau": 0.5}]
    predictors = [create_predictor(Config.of(**chosen).method, model, COUNTS) for chosen in settings]
    each = evaluate_each(model, batches, ONE, 3, predictors)
    assert passes == [40, 20]
    alone = [evaluate(model, batches, ONE, 3, "", None, predictor) for predictor in predictors]
    assert [found.hits.tolist() for found in each] == [found.hits.tolist() for found in alone]
    assert len({str(found.hits.tolist()) for found in alone}) > 2  # they differ from each other


def test_predictors_of_one_pass_may_fuse_the_branches_in_different_ways():
    """Branches 5 0 0 and 0 3 0 and 0 3 0: their maximum predicts class 0, their sum class 1."""

    class Fixed(nn.Module):
        logits_per_image = (3,)

        def forward(self, images):
            return torch.tensor([[[5.0, 0, 0]], [[0, 3, 0]], [[0, 3, 0]]])

    images = Batches((images_of(1), torch.tensor([0])))
    each = evaluate_each(Fixed(), images, ONE, 3, [Predictor(fusion="max"), Predictor(), Predictor(fusion="main")])
    assert [found.hits[0, 0] for found in each] == [1, 0, 1]


def test_a_model_whose_logits_are_not_those_of_its_classifier_alone_is_refused():
    model = network(method="ce")
    model.backbone.forward_head = lambda x, head=model.backbone.forward_head: head(x) + x.mean((1, 2, 3))[:, None] + 5
    with pytest.raises(UserError, match=r"logits are those of one classifier; \w+ computes them from more"):
        predicted(model, images_of(2), tau=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 1.0, "head": "cosine"}, "rows of a CosineLinear head are normalized already"),
        ({"tde": 1.0}, "--tde 1 requires a deconfounded head, and the model has a Linear"),
    ],
)
def test_a_head_that_a_predictor_does_not_fit_is_refused(settings, message):
    head = {"head": settings.pop("head")} if "head" in settings else {}
    with pytest.raises(UserError, match=message):
        predicted(network(**head), images_of(2), COUNTS, **settings)


@torch.no_grad()
def test_a_prior_folds_into_the_biases_of_branches_and_experts():
    model, images = network(experts=2), images_of(5)
    method = Config.of(tau=0.5, prior_tau=1.0).method
    expected = fused_logits(predicted(model, images, tau=0.5)) - torch.tensor(np.log(COUNTS / 100)).float()
    fold_predictor(method, model, COUNTS)
    torch.testing.assert_close(fused_logits(model(images)), expected)


def test_sweeps_are_ranges_that_include_their_end_and_lists():
    assert Sweep.parse("tau=0:2:0.1").values == tuple(round(0.1 * i, 10) for i in range(21))
    assert Sweep.parse("prior-tau=1,0.5,-1,1") == Sweep("prior_tau", (-1.0, 0.5, 1.0))
    assert Sweep.parse("tau=0:1:0.4").values == (0.0, 0.4, 0.8)
    for text, reason in (
        ("ncm=1,2", "give one of tau, prior_tau, tde"),
        ("tau", "give one of"),
        ("tau=0:2:0", "STEP > 0"),
        ("tau=2:0:1", "FROM <= TO"),
        ("tau=0:1e9:0.1", "at most 1000 values"),
        ("tau=0:2", "it is not FROM:TO:STEP; give numbers"),
        ("tau=a", "give numbers"),
        ("tau=nan", "not a number"),
        ("tde=-1", "below 0"),
    ):
        with pytest.raises(UserError, match=f"--sweep {text}: .*{reason}"):
            Sweep.parse(text)


def test_of_equally_good_values_the_smallest_is_chosen():
    def evaluation(hits):
        accuracies = ClassAccuracies(np.array([hits]), np.array([5, 5]))
        return SimpleNamespace(split="val", accuracies=accuracies)

    curve = Curve("tau", (0.0, 0.5, 1.0), [evaluation(hits) for hits in ([3, 3], [5, 2], [3, 4])])
    assert curve.chosen == 0.5


def test_on_an_unbalanced_list_the_class_mean_decides():
    """Top-1: 9 of 12 and 7 of 12; class means: 45 and 75."""

    def evaluation(hits):
        return SimpleNamespace(split="val", accuracies=ClassAccuracies(np.array([hits]), np.array([10, 2])))

    assert Curve("tau", (0.0, 1.0), [evaluation([9, 0]), evaluation([5, 2])]).chosen == 1


def test_values_that_validation_chose_may_differ_between_seeds_that_are_averaged(tmp_path):
    def differences(**more):
        one, other = (report.Reported(tmp_path / str(tau), {"epoch": 2, "tau": tau} | more) for tau in (0.5, 0.7))
        return one.differences(other)

    assert differences() == ["tau (0.5, 0.7)"]
    assert differences(chosen_on={"tau": "val"}) == []


# evaluate.py on finished runs

RUNS = {
    "experts": ("--experts", 2),
    "causal": ("--method", "causal", "--limit-train", 40),
}
NCM_RUN = ("--method", "ncm", "--limit-train", 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", (30, 12, 6), test_images=12, splits=("val", "test"))


@pytest.fixture
def trained(data, run_script):
    """trained(name of RUNS) -> folder of a run, trained once for all tests that read it."""
    return lambda name: train_once(run_script, data, name, *RUNS[name])


def table_of(file: Path) -> dict:
    return json.loads(file.read_text())["tables"]["standard"]


def test_a_sweep_chooses_on_val_and_reports_test_once(trained, run_script):
    """Each point of the curve equals a single evaluation; the table is that of the chosen value."""
    run = trained("experts")
    own = (run / "result.json").read_bytes()
    outcome = run_script("evaluate", "--ckpt", run, "--sweep", "tau=0,1,2")
    assert outcome.code == 0, outcome.err
    curve = pd.read_csv(run / "sweep-tau-tiny-val.csv")
    assert (curve["tau"].tolist(), set(curve["list"])) == ([0, 1, 2], {"val"})
    for row in curve.itertuples():
        assert run_script("evaluate", "--ckpt", run, "--split", "val", "--tau", row.tau).code == 0
        fused = next(iter(table_of(run / f"result-tiny-val-tau={row.tau:g}.json").values()))
        assert row.all == pytest.approx(fused["all"], rel=1e-9)
    best = curve.sort_values(["all", "tau"], ascending=[False, True]).iloc[0]["tau"]
    assert curve[curve["remark"] == "chosen"]["tau"].tolist() == [best]
    assert f"tau {best:g} is chosen on the validation list" in outcome.out
    assert re.search(rf"test list \(36 images\), epoch \d, tau {float(best)}, chosen on val", outcome.out)
    swept = json.loads((run / f"result-tiny-test-tau={best:g}.json").read_text())
    assert (swept["tau"], swept["chosen_on"]) == (best, {"tau": "val"})
    assert run_script("evaluate", "--ckpt", run, "--tau", best).code == 0
    assert table_of(run / f"result-tiny-test-tau={best:g}.json") == swept["tables"]["standard"]
    assert (run / "result.json").read_bytes() == own
    assert (run / "sweep-tau-tiny-val.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_validation_list_the_curve_is_that_of_the_test_list_and_nothing_is_chosen(
    trained, run_script, tmp_path
):
    without_val = make_dataset(tmp_path / "tiny", (30, 12, 6), test_images=12)
    run, out = trained("experts"), tmp_path / "out"
    flags = ("--ckpt", run, "--which", "last", "--data", without_val, "--output", out, "--sweep", "prior_tau=0:2:1")
    outcome = run_script("evaluate", *flags)
    assert outcome.code == 0, outcome.err
    assert "prior_tau swept; on the test list: no value is chosen" in outcome.out
    assert "chosen on" not in outcome.out.replace("no value is chosen on", "")
    curve, result = pd.read_csv(out / "sweep-prior_tau.csv"), json.loads((out / "result.json").read_text())
    assert set(curve["remark"]) == {"on the test list: no value is chosen"}
    assert result["prior_tau"] is None  # the run's own setting
    assert result["all"] == pytest.approx(curve["all"][0])  # that is, without a prior
    assert (out / "sweep-prior_tau.png").is_file()


def test_each_predictor_of_a_run_has_its_own_file_and_name(trained, run_script):
    run = trained("experts")
    outcome = run_script("evaluate", "--ckpt", run, "--ncm", "cl2", "--prior-tau", 1, "--tta", "flip")
    assert outcome.code == 0, outcome.err
    assert "prior_tau 1.0, ncm cl2, tta flip (mean of logits)" in outcome.out
    file = run / "result-tiny-test-prior_tau=1-ncm=cl2-tta=flip.json"
    assert len(table_of(file)) == 1 + 3 + 2  # fused, branches, experts
    result = json.loads(file.read_text())
    assert (result["prior_tau"], result["ncm"], result["tta"], result["tau"]) == (1.0, "cl2", "flip", None)
    assert "prior_tau 1.0, ncm cl2, tta flip" in report.Reported.read(file).name


def test_a_method_that_is_a_predictor_applies_in_training_and_can_be_switched_off(data, run_script, tmp_path):
    """--limit-train: the class means are those of the 40 images that are trained on, 5 of them from the rarest class."""
    run = tmp_path / "ncm"
    where = ("--data", data, "--output", tmp_path, "--experiment", "ncm")
    outcome = run_script("train", *TINY_FLAGS, *NCM_RUN, *where, "--epochs", 1)
    assert outcome.code == 0, outcome.err
    assert "test list (36 images), epoch 1, ncm cl2" in outcome.out
    own = table_of(run / "result.json")
    assert run_script("evaluate", "--ckpt", run).code == 0
    assert table_of(run / "result.json") == own
    assert run_script("evaluate", "--ckpt", run, "--ncm", "none").code == 0
    assert json.loads((run / "result-tiny-test-ncm=none.json").read_text())["ncm"] is None
    refused = run_script("evaluate", "--ckpt", run, "--fold", tmp_path / "out.safetensors")
    assert refused.code == 2
    assert "would predict without --ncm cl2" in refused.err
    images = np.zeros((1, 3, 16, 16), np.float32)
    assert reslt.load_run(run)[0](torch.from_numpy(images)).shape == (1, 3)


def test_tde_of_a_deconfounded_run_folds_and_is_swept(trained, run_script, tmp_path):
    run, file = trained("causal"), tmp_path / "folded.safetensors"
    outcome = run_script("evaluate", "--ckpt", run, "--sweep", "tde=0.5,3", "--fold", file)
    assert outcome.code == 0, outcome.err
    chosen = json.loads(next(run.glob("result-tiny-test-tde=*.json")).read_text())["tde"]
    folded, described = reslt.load_folded(file)
    assert folded.get_classifier().alpha == described["tde"] == chosen
    assert reslt.load_run(run)[0].get_classifier().alpha == 1.5  # the method's


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tau", 1, "--ncm", "l2"), "tau: it scales the classifier, which ncm replaces by class means"),
        (("--tde", 1), "--tde: --head linear does not use it (--head deconfounded does)"),
        (("--tta", "crop"), "'crop' is not one of flip"),
        (("--sweep", "tau=0,1", "--tau", 1), "--sweep tau: contradicts --tau"),
        (("--sweep", "tau=0,1", "--split", "val"), "drop --split"),
        (("--sweep", "tde=0,1"), "--tde: --head linear does not use it"),
        (("--sweep", "tau=0,1", "--ncm", "l2"), "drop one (--tau none, or --ncm none)"),
    ],
)
def test_contradictory_flags_are_refused(trained, run_script, flags, message):
    outcome = run_script("evaluate", "--ckpt", trained("experts"), *flags)
    assert outcome.code == 2
    assert message in outcome.err


def test_training_refuses_tau_with_a_cosine_head(data, run_script, tmp_path):
    outcome = run_script("train", "--data", data, *TINY_FLAGS, "--head", "cosine", "--tau", 1, "--output", tmp_path)
    assert outcome.code == 2
    assert "tau: the rows of a cosine head are normalized already" in outcome.err


def test_overwrite_replaces_a_run_with_curves(data, run_script, tmp_path):
    flags = (*TINY_FLAGS, "--data", data, "--method", "ce", "--output", tmp_path, "--experiment", "run", "--epochs", 1)
    assert run_script("train", *flags).code == 0
    assert run_script("evaluate", "--ckpt", tmp_path / "run", "--sweep", "tau=0,1").code == 0
    assert len(list((tmp_path / "run").glob("sweep-tau-*"))) == 2
    assert run_script("train", *flags, "--overwrite").code == 0
    assert not list((tmp_path / "run").glob("sweep-tau-*"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"experts": 2}, {"network": "exits", "method": "ce", "model_kwargs": None}],
    ids=["one", "two", "exits"],
)
def test_images_that_only_fill_a_batch_are_not_counted(settings):
    """Two of the five images of the second batch have labels, the last ones."""
    is_exits = "network" in settings
    if is_exits:
        layers = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
        model = model_of(Config.of(**SMALL | settings | {"model": "resnet18", "model_kwargs": layers}), 3).eval()
    else:
        model = network(**settings)
    images, labels = images_of(7), torch.tensor([0, 1, 2, 0, 0, 1, 2])
    filled = Batches((images[:5], labels[:5]), (images[2:], labels[5:]))
    plain = Batches((images[:5], labels[:5]), (images[5:], labels[5:]))
    found = []
    for batches in (filled, plain):
        outputs = Outputs(model, 3, Predictor(), of_branches=True, of_features=not is_exits)
        accuracies = evaluate(model, batches, ONE, 3, outputs=outputs, predictor=Predictor(flips=is_exits))
        means = [] if is_exits else nearest_means(model, batches, ONE, 3, "cl2")
        found.append((accuracies, outputs.gathered(ONE), [mean.means for mean in means]))
    (accuracies, outputs, means), (expected, expected_outputs, expected_means) = found
    assert accuracies.images.tolist() == [3, 2, 2]
    assert np.array_equal(accuracies.hits, expected.hits)
    assert accuracies.experts_used == expected.experts_used
    for name, value in expected_outputs.items():
        torch.testing.assert_close(outputs[name], value)
    torch.testing.assert_close(means, expected_means)
