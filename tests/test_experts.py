"""Several experts on shared early stages."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from builders import loss_of, model_of, predicted, settings_of
from conftest import TINY_FLAGS
from safetensors.torch import save_file

from reslt.config.checks import consistency_faults
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.methods.losses import ExpertsLoss, ResLTLoss
from reslt.models.create import check_forward
from reslt.models.experts import Experts, keep_early, keep_late
from reslt.models.fitting import fitting
from reslt.models.fold import fold, load_folded, save_folded
from reslt.models.fusion import fused_logits
from reslt.models.reslt import ResLT
from reslt.runs.init_from import describe

RESNET10 = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "zero_init_last": False}


def experts(count: int = 2, width: float = 0.75, **changes):
    torch.manual_seed(0)
    config = Config.of(
        model="resnet18", model_kwargs=RESNET10, experts=count, expert_width=width, branches=3, **changes
    )
    return model_of(config, 5)


@torch.no_grad()
def test_experts_share_the_early_stages_and_have_their_own_late_ones():
    """Shared widths 8, 16; an expert's own 24, 48 = 0.75 x 32, 64. An expert is the plain model's late half."""
    model = experts().eval()
    check_forward(model, 32, 5)
    images = torch.randn(3, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (2, 3, 3, 5)
    shared = model.shared
    x = shared.layer2(shared.layer1(shared.maxpool(shared.act1(shared.bn1(shared.conv1(images))))))
    assert x.shape[1] == 16
    for e, expert in enumerate(model.experts):
        features = expert.backbone.layer4(expert.backbone.layer3(x))
        assert features.shape[1] == 48
        by_hand = expert.backbone.fc(expert.branches(features).mean((3, 4)))
        torch.testing.assert_close(logits[e], by_hand)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)  # each has its own initial weights
    early = {name.split(".")[0] for name, _ in shared.named_parameters()}
    assert early == {"conv1", "bn1", "layer1", "layer2"}
    assert {name.split(".")[0] for name, _ in model.experts[0].backbone.named_parameters()} == {
        "layer3",
        "layer4",
        "fc",
    }


def test_the_loss_is_the_sum_over_experts_and_reaches_every_weight():
    config = Config.of(model="resnet18", model_kwargs=RESNET10, experts=2, alpha=0.9)
    loss_fn = loss_of(config, torch.tensor([50, 20, 9, 5, 2]).numpy())
    assert isinstance(loss_fn, ExpertsLoss)
    model, labels = experts(), torch.tensor([0, 3, 4])
    logits = model(torch.randn(3, 3, 32, 32))
    loss = loss_fn(logits, labels)
    assert isinstance(loss_fn.of_one, ResLTLoss)
    torch.testing.assert_close(loss, loss_fn.of_one(logits[0], labels) + loss_fn.of_one(logits[1], labels))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_each_experts_classifier_is_normalized_for_the_prediction_and_not_changed():
    model, images = experts().eval(), torch.randn(2, 3, 32, 32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ours = predicted(model, images, tau=1.0)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    for expert in model.experts:
        fc = expert.backbone.fc
        fc.weight.copy_(fc.weight / fc.weight.norm(dim=1, keepdim=True))
        fc.bias.zero_()
    assert torch.equal(ours, model(images))


def test_a_model_without_resnet_stages_is_refused():
    with pytest.raises(UserError, match=r"--experts 2: convnext_atto is neither of timm's ResNet class"):
        model_of(Config.of(model="convnext_atto", experts=2), 5)


def test_cifar_experts_share_the_first_stage_alone():
    """RIDE's ResNet-32: 16 channels shared, then 24 and 48 per expert, shortcuts padded by (out - in) / 2 per side."""
    model = model_of(Config.of(model="cifar_resnet32", branch="bn", experts=3), 100)
    assert {name.split(".")[0] for name, _ in model.shared.named_parameters()} == {"conv1", "bn1", "layer1"}
    late = model.experts[0].backbone
    assert (late.layer2[0].conv1.in_channels, late.layer2[0].conv1.out_channels) == (16, 24)
    assert (late.layer3[0].conv1.out_channels, late.fc.in_features) == (48, 48)
    assert (late.layer2[0].pad_channels, late.layer3[0].pad_channels) == (8, 24)

    def stage(entering, out):  # five blocks of two 3x3 convolutions and two BatchNorms
        return 9 * out * (entering + 9 * out) + 10 * 2 * out

    of_stem = 9 * 3 * 16 + 2 * 16 + stage(16, 16)
    of_expert = stage(16, 24) + stage(24, 48) + 100 * 48 + 100 + 3 * 2 * 48
    assert sum(p.numel() for p in model.parameters()) == of_stem + 3 * of_expert
    check_forward(model, 32, 100)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "seresnet50", "res2net50_26w_4s"])
def test_resnets_of_timm_are_narrowed_from_their_own_widths(name):
    with torch.device("meta"):
        model = model_of(Config.of(model=name, model_kwargs={"layers": (1, 1, 1, 1)}, experts=2), 7)
        plain = dict(timm.create_model(name, layers=(1, 1, 1, 1)).named_parameters())
    for stage, by in (("layer3", 0.75), ("layer4", 0.75)):
        of_expert = model.experts[0].backbone.get_parameter(f"{stage}.0.conv3.weight")
        assert of_expert.shape[0] == by * plain[f"{stage}.0.conv3.weight"].shape[0]


@pytest.mark.parametrize(
    ("name", "late"), [("cifar_resnet20", 1), ("cifar_resnet20", 2), ("cifar_resnet20", 3), ("resnet18", 4)]
)
@torch.no_grad()
def test_one_expert_of_full_width_is_the_plain_model(name, late):
    """The expert consists of the plain model's own parts; `--experts 1` is the plain model itself."""
    config = Config.of(model=name, branch="bn")
    plain = model_of(config, 5).eval()
    shared, own = keep_early(copy.deepcopy(plain.backbone), late), keep_late(copy.deepcopy(plain.backbone), late)
    of_one = Experts(shared, [ResLT(own, plain.branches)]).eval()
    stages = {name.split(".")[0] for name, _ in own.named_parameters() if name.startswith("layer")}
    assert len(stages) == late
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(of_one(images), plain(images)[None], rtol=0, atol=0)
    assert isinstance(model_of(config.changed(experts=1), 5), ResLT)


CIFAR = {"model": "cifar_resnet20", "model_kwargs": {"channels": [4, 8, 16]}}


@torch.no_grad()
def test_gates_of_early_stages_multiply_the_last_maps_of_experts():
    """Experts 1 and 3 from stage 1 by two convolutions, the last without ReLU; expert 2 from stage 2 by one with it."""
    gated = {"experts": 3, "expert_stages": 1, "expert_gates": True, "expert_width": 0.5, "branch": "bn"}
    model, images = model_of(Config.of(**CIFAR, **gated), 5).eval(), torch.randn(3, 3, 32, 32)
    shared = model.shared
    maps = [shared.layer1(torch.relu(shared.bn1(shared.conv1(images))))]
    maps.append(shared.layer2(maps[0]))
    kinds = [[type(layer).__name__ for layer in gate] for gate in model.gates]
    of_one = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == [[*of_one, "Conv2d", "BatchNorm2d"], of_one, [*of_one, "Conv2d", "BatchNorm2d"]]
    for expert, gate, early, logits in zip(model.experts, model.gates, [0, 1, 0], model(images), strict=True):
        factors, last = gate(maps[early]), expert.backbone.layer3(maps[1])
        assert factors.shape == last.shape == (3, 8, 8, 8)
        by_hand = expert.backbone.fc(expert.branches(factors * last).mean((3, 4)))
        torch.testing.assert_close(logits, by_hand)
    model.use(2)
    folded, _ = fold(model, 32)
    torch.testing.assert_close(folded(images), fused_logits(model(images)), rtol=1e-4, atol=1e-4)
    large = model_of(Config.of(model="resnet50", model_kwargs=RESNET10 | {"channels": (4, 8, 16, 32)}, **gated), 5)
    convolutions = [[layer for layer in gate if hasattr(layer, "stride")] for gate in large.gates]
    assert [[one.out_channels for one in gate] for gate in convolutions] == [[32, 64, 64], [64, 64], [64]]
    check_forward(large, 50, 5)  # with an odd map too


def test_gated_experts_start_from_the_weights_that_fit():
    settings = {"method": "ce", "experts": 2, "expert_width": 1.0}
    gated = model_of(Config.of(**CIFAR, **settings, expert_stages=1, expert_gates=True), 5)
    found = fitting(gated, model_of(Config.of(**CIFAR, **settings), 5).state_dict(), np.arange(5))
    assert {name.split(".")[0] for name in found.tensors} == {"shared", "experts"}  # stage 2 comes from expert 1
    assert found.new_weights == {"gates": 2 * 5 + 5}  # a convolution and a BatchNorm each
    assert "; new: gates (15 weights), classifier" in describe(found, None, Classes(5))
    all_own = model_of(Config.of(**CIFAR, **settings, expert_stages=3), 5)
    found = fitting(all_own, gated.state_dict(), np.arange(5))
    assert (found.new_weights, found.left_out) == ({}, {"gates"})


def test_experts_have_no_more_stages_than_the_backbone():
    for settings, message in (
        ({"expert_stages": 4}, "--expert-stages 4: cifar_resnet20 has 3 stages; give 1 to 3"),
        ({"expert_stages": 3}, "--expert-stages 3: experts with all stages of their own are as wide as cifar_resnet20"),
        ({"expert_stages": 3, "expert_gates": True}, "has 3 stages, one of which gates need; give 1 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            model_of(Config.of(**CIFAR, experts=2, **settings), 5)
    bbn = Config.of(**CIFAR, experts=2, expert_gates=True, method="bbn")
    assert "expert_gates: network bbn has two last maps; drop it" in consistency_faults(bbn)[0]


def test_shortcuts_of_option_b_are_convolutions():
    with_them = model_of(Config.of(**CIFAR | {"model_kwargs": {"shortcut": "B"}}, method="ce"), 10)
    plain = model_of(Config.of(model="cifar_resnet20", method="ce"), 10)
    more = with_them.state_dict().keys() - plain.state_dict().keys()
    assert {name.rpartition(".downsample.")[0] for name in more} == {"backbone.layer2.0", "backbone.layer3.0"}
    count = sum(p.numel() for p in with_them.parameters()) - sum(p.numel() for p in plain.parameters())
    assert count == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    with pytest.raises(UserError, match="shortcut 'C': give A or B"):
        model_of(Config.of(**CIFAR | {"model_kwargs": {"shortcut": "C"}}), 10)


@torch.no_grad()
def test_the_first_experts_alone_predict_their_mean():
    model, images = experts(3).eval(), torch.randn(4, 3, 32, 32)
    of_all = model(images)
    by_hand = (of_all[0].sum(0) + of_all[1].sum(0)) / 2
    model.use(2)
    assert model.logits_per_image == (2, 3)
    torch.testing.assert_close(fused_logits(model(images)), by_hand)
    for count in (0, 4):
        with pytest.raises(UserError, match=f"--use-experts {count}: give 1 to 3, the model's number"):
            model.use(count)


@pytest.mark.parametrize("width", [0.75, 1.0])
@torch.no_grad()
def test_pretrained_weights_are_loaded_wherever_they_fit(tmp_path, width):
    """Full-width experts load all stages; narrower ones only the shared stages."""
    whole = timm.create_model("resnet18", num_classes=7, **RESNET10)
    file = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), file)
    model = experts(2, width, pretrained_file=str(file))
    torch.testing.assert_close(model.shared.layer1[0].conv1.weight, whole.layer1[0].conv1.weight)
    late = [expert.backbone.layer3[0].conv1.weight for expert in model.experts]
    if width == 1:
        assert all(torch.equal(weight, whole.layer3[0].conv1.weight) for weight in late)
    else:
        assert late[0].shape == (24, 16, 3, 3)
        assert not torch.equal(late[0], late[1])


@pytest.mark.parametrize("method", [{"branch": "bn"}, {"branch": "conv"}, {"method": "ce"}], ids=["bn", "conv", "ce"])
@pytest.mark.parametrize("used", [1, 3])
@torch.no_grad()
def test_experts_fold_one_by_one(tmp_path, method, used):
    config = Config.of(model="resnet18", model_kwargs=RESNET10, experts=3, img_size=32, **method)
    torch.manual_seed(0)
    model = model_of(config, 5).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2), torch.nn.init.normal_(module.running_mean, std=0.1)
    model.use(used)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = fused_logits(model(images)).double()  # in float32, as everywhere
    folded, how = fold(model, 32)
    assert f"{used} expert{'s' * (used > 1)}, each head: " in how
    torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5)
    settings = settings_of(config, timm.data.resolve_model_data_config(model.backbone))
    save_folded(folded.float(), config.model, config.method, settings, Classes(5), tmp_path / "out.safetensors")
    loaded, _ = load_folded(tmp_path / "out.safetensors")
    torch.testing.assert_close(loaded(images.float()), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["reslt", "ce"])
def test_experts_train_and_evaluate_from_the_command_line(tiny, tmp_path, run_script, method):
    """An evaluation with one expert prints the numbers of expert 1 in the evaluation of all."""
    more = ["--experts", 3, "--method", method, "--mixup", 0.2]
    run = tmp_path / "run"
    trained = run_script("train", "--data", tiny, *TINY_FLAGS, *more, "--output", tmp_path, "--experiment", "run")
    assert trained.code == 0, trained.err
    assert "cifar_resnet20, 3 experts, 16 x 16 px" in trained.out
    rows = {"fused": 1, "branch": 3 * (method == "reslt"), "expert": 3}
    of_all = run_script("evaluate", "--ckpt", run, "--output", tmp_path / "all", "--fold", tmp_path / "x.safetensors")
    assert of_all.code == 0, of_all.err
    table = json.loads((tmp_path / "all/result.json").read_text())["tables"]["standard"]
    assert len(table) == sum(rows.values())
    assert list(table)[-3:] == ["expert 1", "expert 2", "expert 3"]
    columns = pd.read_csv(tmp_path / "all/per_class.csv").columns
    assert [c for c in columns if "expert" in c] == ["accuracy_expert_1", "accuracy_expert_2", "accuracy_expert_3"]
    assert [c for c in columns if "branch" in c] == [f"accuracy_branch_{k}" for k in (1, 2, 3)] * (method == "reslt")
    row = next(line for line in of_all.out.splitlines() if line.startswith(f"{method} (fused)"))
    assert row in trained.out
    of_one = run_script("evaluate", "--ckpt", run, "--use-experts", 1, "--output", tmp_path / "one")
    assert "use_experts 1" in of_one.out
    fused = next(iter(json.loads((tmp_path / "one/result.json").read_text())["tables"]["standard"].values()))
    assert fused == table["expert 1"]


def test_use_experts_is_checked_against_the_model(tiny, tmp_path, run_script):
    """The error comes before data and weights are read."""
    flags = ["--data", tiny, *TINY_FLAGS, "--epochs", 1, "--output", tmp_path, "--experiment", "run"]
    assert run_script("train", *flags).code == 0
    (tiny / "train.txt").unlink()
    refused = run_script("evaluate", "--ckpt", tmp_path / "run", "--use-experts", 2)
    assert refused.code == 2
    assert "--use-experts 2: give 1 to 1, the model's number of experts" in refused.err


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("model", "width", "message"),
    [
        ("cifar_resnet32", 0.01, r"--expert-width 0\.01: cifar_resnet32 cannot have last stages of width 0, 0: "),
        (
            "resnet50_gn",
            0.7,
            r"--expert-width 0\.7: resnet50_gn cannot have last stages of width 179, 358: .*choose anoth",
        ),
    ],
)
def test_an_impossible_width_is_refused(model, width, message):
    with pytest.raises(UserError, match=message):
        model_of(Config.of(model=model, experts=2, expert_width=width), 10)


def test_experts_have_the_requested_share_of_any_models_widths():
    """Stages of 8, 16, 32, 64 channels, by arguments and with a bottleneck's expansion of 4."""
    kwargs = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
    model = model_of(Config.of(model="resnet50", model_kwargs=kwargs, experts=2, expert_width=0.5), 10)
    late = model.experts[1].backbone
    assert [late.layer3[0].conv3.out_channels, late.layer4[0].conv3.out_channels] == [4 * 16, 4 * 32]
    assert late.layer3[0].conv1.in_channels == 4 * 16  # the width of the shared second stage
