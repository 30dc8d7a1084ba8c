"""Early exits (ELF): the images that reach each exit, the loss and the prediction."""

import math

import numpy as np
import pytest
import torch
from builders import loss_of, model_of, predicted, settings_of
from conftest import TINY_FLAGS

import reslt
from reslt.config.checks import consistency_faults
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.deploy.timm_folder import TimmModel
from reslt.evaluation.metrics import ClassHits, logits_of_rows
from reslt.evaluation.outputs import Outputs
from reslt.methods.losses import ExitsLoss
from reslt.methods.predictors import AS_TRAINED, why_not_foldable
from reslt.models.exits import Exited, Exits
from reslt.models.fitting import fitting
from reslt.models.fold import fold, load_folded, save_folded
from reslt.models.fusion import fused_logits
from reslt.runs.init_from import describe
from reslt.training.trained_parts import parameters_of

COUNTS = np.array([60, 25, 10])
NETWORK = {"model": "cifar_resnet20", "model_kwargs": {"channels": (4, 8, 16)}, "img_size": 16, "network": "exits"}


def exits(**settings):
    torch.manual_seed(0)
    return model_of(Config.of(**(NETWORK | {"method": "ce"} | settings)), 3)


def logits_with(*probabilities: list[list[float]]) -> torch.Tensor:
    """Probabilities of each image, one list per exit -> (E, 1, N, C) logits."""
    return torch.tensor(probabilities, dtype=torch.float64).log()[:, None]


# Three images of class 0 at two exits. At the first: confident and right; confident and wrong; right, not confident.
TWO_EXITS = logits_with(
    [[0.95, 0.03, 0.02], [0.02, 0.95, 0.03], [0.6, 0.3, 0.1]],
    [[0.50, 0.25, 0.25], [0.40, 0.30, 0.30], [0.8, 0.1, 0.1]],
)


def exited(confidence: float = 0.9) -> Exited:
    return Exited(TWO_EXITS, confidence - TWO_EXITS[:-1, 0].softmax(-1).amax(-1))


def test_an_image_leaves_at_its_first_right_and_confident_exit_and_costs_the_sum_up_to_there():
    """The first image does not reach the second exit, so the loss is (-log .95 - log .02 - log .6 - log .4 - log .8) / 3."""
    loss = loss_of(Config.of(method="ce", network="exits"), COUNTS)
    labels = torch.tensor([0, 0, 0])
    assert isinstance(loss, ExitsLoss)
    assert loss.reached(exited(), labels).tolist() == [[True, True, True], [False, True, True]]
    by_hand = -sum(math.log(p) for p in (0.95, 0.02, 0.6, 0.4, 0.8)) / 3
    assert loss(exited(), labels).item() == pytest.approx(by_hand, rel=1e-6)
    assert loss.reached(exited(confidence=1.0), labels).all()  # no probability is above 1
    assert loss.reached(exited(confidence=0.5), labels)[1].tolist() == [False, True, False]


def test_an_image_that_has_left_reaches_no_later_exit():
    """The image is right and confident at the first of three exits, and wrong at the second."""
    logits = logits_with([[0.95, 0.03, 0.02]], [[0.1, 0.8, 0.1]], [[0.8, 0.1, 0.1]])
    doubt = 0.9 - logits[:-1, 0].softmax(-1).amax(-1)
    loss = loss_of(Config.of(method="ce", network="exits"), COUNTS)
    assert loss.reached(Exited(logits, doubt), torch.tensor([0])).flatten().tolist() == [True, False, False]


def test_class_weights_count_every_image_once_in_the_denominator():
    weights = torch.tensor([0.5, 2.0, 4.0])
    loss = loss_of(Config.of(method="elf_ldam_drw", cost="ce", class_weights="inverse"), COUNTS)
    loss.of_one.class_weights = weights
    labels = torch.tensor([0, 1, 2])
    # The second image is right and confident at the first exit, the third is wrong there.
    costs = 0.5 * -math.log(0.95) + 2.0 * -math.log(0.95) + 4.0 * -(math.log(0.1) + math.log(0.1))
    assert loss(exited(), labels).item() == pytest.approx(costs / 6.5, rel=1e-6)


def test_the_losses_of_micro_batches_add_up_to_the_loss_of_the_batch():
    loss, labels = loss_of(Config.of(method="elf_ldam_drw", class_weights="effective"), COUNTS), torch.tensor([0, 1, 2])
    parts = [slice(0, 1), slice(1, 3)]
    denominators = sum(loss.denominators(labels[part]) for part in parts)
    losses = [loss(Exited(TWO_EXITS[:, :, part], exited().asks[:, part]), labels[part], denominators) for part in parts]
    torch.testing.assert_close(sum(losses), loss(exited(), labels))


def test_the_first_confident_exit_predicts_or_the_last_one_if_none_is_confident():
    found = fused_logits(exited()).softmax(-1)
    wanted = [[0.95, 0.03, 0.02], [0.02, 0.95, 0.03], [0.8, 0.1, 0.1]]
    torch.testing.assert_close(found, torch.tensor(wanted))
    rows = torch.cat(logits_of_rows(exited())).argmax(-1)  # the row of all exits has their mean logits
    assert rows.tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]]
    hits = ClassHits((2, 1), 3, torch.device("cpu"), is_routed=True)
    hits.update(exited(), torch.tensor([0, 0, 0]))
    assert hits.accuracies().experts_used == pytest.approx((1 + 1 + 2) / 3)


@torch.no_grad()
def test_every_stage_ends_in_a_pooled_classifier():
    model, images = exits(head="cosine", cost="ldam").eval(), torch.randn(3, 3, 16, 16)
    backbone = model.backbone
    x = torch.relu(backbone.bn1(backbone.conv1(images)))
    for stage, head, logits in zip("123", model.classifiers, model(images), strict=True):
        x = backbone.get_submodule(f"layer{stage}")(x)
        torch.testing.assert_close(logits[0], head(x.mean((2, 3))))
        assert logits.abs().max() <= 30  # cosines times 30
    routed = model.route(images)
    torch.testing.assert_close(routed.asks, 0.9 - model(images)[:-1, 0].softmax(-1).amax(-1))
    assert len(parameters_of(model, "classifier")) == 3
    assert type(model.train()(images)) is Exited  # the loss needs to know which images have left
    assert predicted(model, images, tta="flip").asks.shape == (2, 3)
    assert model_of(Config.of(**NETWORK | {"model": "resnet18", "model_kwargs": {}}), 3).logits_per_image == (4, 1)


def test_settings_that_exits_exclude_are_refused():
    for settings, message in (
        ({"experts": 2}, r"exits are outputs of one network; drop experts"),
        ({"mixup": 0.2}, r"a mixed image is neither right nor wrong; drop mixup"),
        ({"ncm": "cl2"}, r"different widths, whose class means are not supported; drop ncm"),
        ({"feature_loss": "any"}, r"feature_loss: any needs features of one layer"),
    ):
        faults = consistency_faults(Config.of(**NETWORK, method="ce", **settings))
        assert len(faults) == 1
        assert message in faults[0]
    with pytest.raises(UserError, match="--network exits: vit_tiny_patch16_224 is neither of timm's ResNet class"):
        model_of(Config.of(model="vit_tiny_patch16_224", network="exits", method="ce"), 3)
    with pytest.raises(UserError, match="--features: the features of early exits have different widths"):
        Outputs(exits(), 3, AS_TRAINED, of_features=True)


@torch.no_grad()
def test_folding_keeps_all_exits_and_refuses_predictors_that_change_the_confidence(tmp_path):
    config = Config.of(**NETWORK, method="elf_ldam_drw", exit_confidence=0.5)
    model, images = exits(method="elf_ldam_drw", exit_confidence=0.5).eval(), torch.randn(8, 3, 16, 16)
    wanted = fused_logits(model.route(images))
    assert not torch.equal(wanted, fused_logits(model(images)))  # some images leave early
    folded, how = fold(model, 16)
    assert how.startswith("all exits are kept")
    settings = settings_of(config, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 16, 16)} | {
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"
    })  # fmt: skip
    save_folded(folded, config.model, config.method, settings, Classes(3), tmp_path / "out.safetensors")
    loaded, described = load_folded(tmp_path / "out.safetensors")
    torch.testing.assert_close(loaded(images), wanted)
    assert described["exit_confidence"] == 0.5
    with pytest.raises(UserError, match=r"--format timm: it cannot express early exits \(exits\); export it with"):
        TimmModel.of(loaded, described)
    linear = Config.of(**NETWORK, method="ce", prior_tau=1.0).method
    assert why_not_foldable(linear, exits()) == ["--prior-tau (it would change which exit predicts)"]


def test_exits_start_from_a_network_without_them_and_from_exits():
    model, plain = exits(), exits(network="plain")
    same = np.arange(3)
    found = fitting(model, plain.state_dict(), same)
    assert describe(found, None, Classes(3)).startswith(f"{found.weights} weights; new: classifier")
    assert (found.classifiers, found.new_classifiers, found.left_out) == (1, 2, set())
    swapped = fitting(model, exits().state_dict(), same[::-1].copy())  # rows follow the classes
    assert (swapped.classifiers, swapped.left_out) == (3, set())
    torch.testing.assert_close(swapped.tensors["exits.0.bias"], model.exits[0].bias.detach().flip(0))
    assert fitting(plain, model.state_dict(), same).left_out == {"exits"}


def test_exits_train_evaluate_and_predict_from_the_command_line(tiny, tmp_path, run_script):
    flags = [*TINY_FLAGS, "--method", "elf_ldam_drw", "--output", tmp_path, "--experiment", "run"]
    trained = run_script("train", "--data", tiny, *flags)
    assert trained.code == 0, trained.err
    assert "images leave at a confidence above 0.9" in trained.out
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "run")
    assert evaluated.code == 0, evaluated.err
    assert "exits_used " in evaluated.out
    names = [line.split("  ")[0] for line in evaluated.out.splitlines()[2:7]]
    assert names == ["elf_ldam_drw (fused)", "all exits", "exit 1", "exit 2", "exit 3"]
    loaded = reslt.load_run(tmp_path / "run")
    assert isinstance(loaded.module.model, Exits)
