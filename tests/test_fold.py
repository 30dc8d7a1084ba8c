"""Folding is exact: folded modules against the trained model's branches, and their sum, in float64 and float32."""

import pytest
import timm
import torch
from builders import model_of, settings_of
from safetensors.torch import load_file
from torch import nn

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.models.complexity import cost, cost_without_branches
from reslt.models.fold import classifies_alone, fold, fold_branches, load_folded, save_folded
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
    torch.testing.assert_close(model(images).sum(0), fused, rtol=0, atol=0)  # the model itself is as it was


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("branch", ["conv", "bn"])
@pytest.mark.parametrize("place", ["map", "pooled"])
@torch.no_grad()
def test_folded_branches_give_each_branchs_logits(name, branch, place):
    size, arguments = MODELS[name]
    model = trained(Config.of(model=name, model_kwargs=arguments, branch=branch, branch_at=place, img_size=size))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model.to(dtype)
        images = torch.randn(3, 3, size, size, dtype=dtype)
        folded, _ = fold_branches(model, size)
        wanted, logits = model(images), folded.eval()(images)
        assert logits.shape == (3, 3, 6)
        assert (logits.dtype, folded.logits_per_image) == (dtype, model.logits_per_image)
        assert (logits - wanted).abs().max() < tolerance * wanted.abs().max()
        fused, wanted = logits.sum(0), wanted.sum(0)
        assert (fused - wanted).abs().max() < tolerance * wanted.abs().max()


def test_folded_branches_cost_the_plain_model_and_their_rows_of_the_classifier():
    """ResNet-20: 64 features, 3 branches, 7 classes. `bn` on the map adds two classifiers; `conv` its convolution
    D -> 3 D too, once on the pooled features, 8 x 8 times on the map."""
    convolution, classifiers = 64 * 3 * 64, 2 * 64 * 7
    for branch, place, more in (
        ("bn", "map", classifiers),
        ("bn", "pooled", classifiers),
        ("conv", "pooled", convolution + classifiers),
        ("conv", "map", 8 * 8 * convolution + classifiers),
    ):
        model = model_of(Config.of(model="cifar_resnet20", branch=branch, branch_at=place), 7)
        plain = cost_without_branches(model, 32).multiply_adds
        folded, _ = fold_branches(model, 32)
        assert cost(folded, 32).multiply_adds == plain + more
        fused, _ = fold(model, 32)
        assert cost(fused, 32).multiply_adds == plain + more - classifiers


@pytest.mark.parametrize("method", ["reslt", "ce"])
@pytest.mark.parametrize("branch", ["conv", "bn"])
@torch.no_grad()
def test_branches_of_experts_fold_for_each_expert_in_use(method, branch):
    config = Config.of(model="cifar_resnet20", method=method, experts=3, branch=branch, img_size=32)
    torch.manual_seed(0)
    model = model_of(config, 5).double().eval()
    model.use(2)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded, how = fold_branches(model, 32)
    assert folded.logits_per_image == (2, 3 if method == "reslt" else 1)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-12, atol=1e-12)
    assert how.startswith("2 experts, each one's head: ")


@torch.no_grad()
def test_a_classifier_without_bias_gets_the_branches_shifts_as_its_bias():
    model = trained(Config.of(model="cifar_resnet20", branch="bn"))
    model.backbone.fc.bias = None
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fold(model, 32)[0](images), model(images).sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fold_branches(model, 32)[0](images), model(images), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_tau_before_folding_is_kept_by_it():
    model = trained(Config.of(model="cifar_resnet20", branch="bn", img_size=32))
    model.normalize_classifier(0.7)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    folded, _ = fold(model, 32)
    torch.testing.assert_close(folded(images), model(images).sum(0), rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "alone"), [("resnet18", True), ("convnext_atto", False), ("mobilenetv3_small_050", False)]
)
def test_a_norm_in_the_head_is_noticed(name, alone):
    backbone = timm.create_model(name).double().eval()
    shape = backbone.forward_features(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape[1:]
    assert classifies_alone(backbone, shape, "map") == alone
    weight = backbone.get_classifier().weight.zero_()  # as some models begin: their files must fold as once trained
    assert classifies_alone(backbone, shape, "map") == alone
    assert not weight.any()


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("cifar_resnet20", 32)])
@torch.no_grad()
def test_folded_bn_loads_with_timm_alone(tmp_path, name, size):
    config = Config.of(model=name, branch="bn")
    model, out = trained(config).float(), tmp_path / "folded.safetensors"
    folded, _ = fold(model, size)
    save_folded(folded, settings(config, model), 6, None, out)
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
    save_folded(folded, settings(config, model), 4, ("a", "b", "c", "ü d"), tmp_path / "f.safetensors")
    loaded, described = load_folded(tmp_path / "f.safetensors")
    torch.testing.assert_close(loaded(images), model(images).sum(0), rtol=1e-4, atol=1e-4)
    assert described["mean"] == [0.485, 0.456, 0.406]
    assert described["class_names"] == ["a", "b", "c", "ü d"]
    assert described["model"] == config.model


@torch.no_grad()
def test_a_second_classifier_in_the_head_is_noticed():
    """volo adds an auxiliary classifier's logits: on the pooled features it must not fold into the plain model."""
    config = Config.of(model="volo_d1_224", branch="bn", branch_at="pooled", img_size=64)
    model = model_of(config, 4).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded, how = fold(model, 64)
    torch.testing.assert_close(folded(images), model(images).sum(0), rtol=1e-9, atol=1e-12)
    assert "not folded" in how


def test_a_file_that_was_not_folded_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not written by"):
        load_folded(tmp_path / "x.safetensors")
