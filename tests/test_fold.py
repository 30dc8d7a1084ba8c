"""Folding is exact: the folded model and the sum of the trained model's branches agree in float64."""

import pytest
import timm
import torch
from builders import model_of, settings_of
from safetensors.torch import load_file, save_file
from torch import nn

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.methods.predictors import fold_predictor
from reslt.models.complexity import complexity, complexity_without_branches
from reslt.models.fold import fold, load_folded, save_folded
from reslt.models.folding import classifies_alone
from reslt.models.reslt import ResLT

MODELS = {
    "cifar_resnet20": (32, {}),
    "resnext50_32x4d": (64, {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}),
    "regnety_002": (64, {}),
    "convnext_atto": (64, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
}
AFFINE_ON_THE_MAP = {"cifar_resnet20", "resnext50_32x4d", "regnety_002", "mixer_s32_224"}


def trained(config: Config, classes: int = 6) -> ResLT:
    """A model whose branches and statistics are not at their initial values, in float64 and evaluation mode."""
    torch.manual_seed(0)
    model = model_of(config, classes).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2), nn.init.normal_(module.running_mean, std=0.1)
    for p in model.branches.parameters():
        p.data += 0.3 * torch.randn_like(p)
    nn.init.normal_(model.backbone.get_classifier().bias)
    return model


def settings(config: Config, model: ResLT) -> ImageSettings:
    return settings_of(config.changed(img_size=64), timm.data.resolve_model_data_config(model.backbone))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("branch", ["conv", "bn"])
@pytest.mark.parametrize("place", ["map", "pooled"])
@torch.no_grad()
def test_the_folded_model_gives_the_fused_logits(name, branch, place):
    size, arguments = MODELS[name]
    model = trained(Config.of(model=name, model_kwargs=arguments, branch=branch, branch_at=place, img_size=size))
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    fused = model(images).sum(0)
    folded, how = fold(model, size)
    difference = (folded.eval()(images) - fused).abs().max() / fused.abs().max()
    assert difference < 1e-9
    folds_to_plain = branch == "bn" and (place == "pooled" or name in AFFINE_ON_THE_MAP)
    assert isinstance(folded, type(model.backbone)) == folds_to_plain
    assert ("not folded" in how) == (branch == "bn" and not folds_to_plain)
    torch.testing.assert_close(model(images).sum(0), fused, rtol=0, atol=0)  # the model itself is unchanged


def test_folding_leaves_only_the_cost_of_the_plain_model_and_of_conv_branches():
    """ResNet-20: 64 features, 3 branches. `bn` branches cost nothing; `conv` branches cost their convolution D -> 3 D,
    once on the pooled features, 8 x 8 times on the map."""
    convolution = 64 * 3 * 64
    for branch, place, more in (
        ("bn", "map", 0),
        ("bn", "pooled", 0),
        ("conv", "pooled", convolution),
        ("conv", "map", 8 * 8 * convolution),
    ):
        model = model_of(Config.of(model="cifar_resnet20", branch=branch, branch_at=place), 7)
        plain = complexity_without_branches(model, 32).multiply_adds
        folded, _ = fold(model, 32)
        assert complexity(folded, 32).multiply_adds == plain + more


@torch.no_grad()
def test_a_classifier_without_bias_gets_one_from_the_branches_shifts():
    model = trained(Config.of(model="cifar_resnet20", branch="bn"))
    model.backbone.fc.bias = None
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fold(model, 32)[0](images), model(images).sum(0), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_folding_keeps_tau():
    model = trained(Config.of(model="cifar_resnet20", branch="bn", img_size=32))
    before = model.backbone.fc.weight.clone()
    fold_predictor(Config.of(tau=0.7).method, model, None)
    torch.testing.assert_close(model.backbone.fc.weight.norm(dim=1), before.norm(dim=1) ** 0.3)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    folded, _ = fold(model, 32)
    torch.testing.assert_close(folded(images), model(images).sum(0), rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "alone"), [("resnet18", True), ("convnext_atto", False), ("mobilenetv3_small_050", False)]
)
def test_a_norm_in_the_head_is_detected(name, alone):
    backbone = timm.create_model(name).double().eval()
    shape = backbone.forward_features(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape[1:]
    assert classifies_alone(backbone, shape, "map") == alone
    weight = (
        backbone.get_classifier().weight.zero_()
    )  # as some models are initialized: they must fold as after training
    assert classifies_alone(backbone, shape, "map") == alone
    assert not weight.any()


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("cifar_resnet20", 32)])
@torch.no_grad()
def test_folded_bn_loads_with_timm_alone(tmp_path, name, size):
    config = Config.of(model=name, branch="bn")
    model, out = trained(config).float(), tmp_path / "folded.safetensors"
    folded, _ = fold(model, size)
    save_folded(folded, config.model, config.method, settings(config, model), Classes(6), out)
    loaded = timm.create_model(name, num_classes=6, checkpoint_path=str(out)).eval()
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(loaded(images), model(images).sum(0), rtol=1e-4, atol=1e-4)
    assert set(load_file(out)) == set(timm.create_model(name).state_dict())


@pytest.mark.parametrize(
    "config",
    [
        Config.of(model="resnet18", branch="conv", branch_at="map"),
        Config.of(model="resnet18", branch="conv", branch_at="map", eval_branch_at="pooled"),
        Config.of(model="convnext_atto", branch="conv"),
        Config.of(model="convnext_atto", branch="bn"),
        Config.of(model="resnet18", method="ce"),
    ],
)
@torch.no_grad()
def test_a_folded_file_of_any_kind_loads_back_with_its_description(tmp_path, config):
    model = model_of(config, 4).eval()
    images = torch.randn(2, 3, 64, 64)
    folded, _ = fold(model, 64)
    names = ("a", "b", "c", "ü d")
    save_folded(
        folded, config.model, config.method, settings(config, model), Classes(4, names), tmp_path / "f.safetensors"
    )
    loaded, described = load_folded(tmp_path / "f.safetensors")
    torch.testing.assert_close(loaded(images), model(images).sum(0), rtol=1e-4, atol=1e-4)
    assert described["mean"] == [0.485, 0.456, 0.406]
    assert described["class_names"] == ["a", "b", "c", "ü d"]
    assert described["model"] == config.model.model


@torch.no_grad()
def test_a_second_classifier_in_the_head_is_detected():
    """volo adds an auxiliary classifier's logits: on the pooled features it must not fold into the plain model."""
    config = Config.of(model="volo_d1_224", branch="bn", branch_at="pooled", img_size=64)
    model = model_of(config, 4).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded, how = fold(model, 64)
    torch.testing.assert_close(folded(images), model(images).sum(0), rtol=1e-9, atol=1e-12)
    assert "not folded" in how


def test_a_file_that_was_not_folded_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not written by"):
        load_folded(tmp_path / "x.safetensors")
