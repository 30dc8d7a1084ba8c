"""The ResLT head on timm models, and the CIFAR ResNets."""

import pytest
import timm
import torch
from builders import model_of
from safetensors.torch import save_file
from torch import nn

from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.models.branches import BatchNormBranches, ConvBranches
from reslt.models.create import check_forward, with_branches
from reslt.models.heads import normalized_rows
from reslt.models.reslt import ResLT

ARCHITECTURES = {
    "resnet18": (64, {"layers": (1, 1, 1, 1)}),  # ResNet-10
    "resnext50_32x4d": (64, {}),
    "seresnet50": (64, {}),
    "cifar_resnet32": (32, {}),
    "regnety_002": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "ghostnet_050": (64, {}),
    "convnext_atto": (64, {}),
    "vgg11": (64, {}),
    "repvgg_a0": (64, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (1, 1, 1, 1)}),
    "mambaout_femto": (64, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "deit3_small_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "poolformer_s12": (64, {}),
    "edgenext_xx_small": (64, {}),
}


class IdentityBranches(nn.Module):
    """Three copies of the input."""

    branches = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(3, *x.shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_with_identity_branches_every_branch_equals_the_plain_model(name):
    size, arguments = ARCHITECTURES[name]
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=7, **arguments).eval()
    for p in backbone.get_classifier().parameters():  # some models start with a classifier of zeros
        nn.init.normal_(p)
    images = torch.randn(2, 3, size, size)
    plain = backbone(images)
    places = ["map"] + ["pooled"] * isinstance(backbone.get_classifier(), nn.Linear)
    for place in places:
        branch_logits = ResLT(backbone, IdentityBranches(), place).eval()(images)
        assert branch_logits.shape == (3, 2, 7)
        for logits in branch_logits:
            torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
    assert plain.std() > 0  # else any two functions would agree


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("branch", ["conv", "bn"])
@pytest.mark.parametrize("place", ["map", "pooled"])
def test_any_layout_trains_with_any_branch(name, branch, place):
    """The layouts are NCHW, NCHW with a norm in the head, NHWC, and tokens. All give K logits per image and a gradient in
    every parameter."""
    size, arguments = ARCHITECTURES[name]
    config = Config.of(model=name, model_kwargs=arguments, branch=branch, branch_at=place, branches=4, img_size=size)
    model = model_of(config, 5)
    branch_logits = model(torch.randn(3, 3, size, size))
    assert branch_logits.shape == (4, 3, 5)
    branch_logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_shared_statistics_equal_three_separate_batch_norms():
    """Outputs, gradients and running statistics are compared in training mode."""
    torch.manual_seed(0)
    ours, separate = BatchNormBranches(6, 3), [nn.BatchNorm2d(6) for _ in range(3)]
    for k, bn in enumerate(separate):
        nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
        ours.weight.data[k], ours.bias.data[k] = bn.weight.data, bn.bias.data
    x = torch.randn(8, 6, 5, 5)
    x1, x2, weights = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(3, 8, 6, 5, 5)
    out1, out2 = ours(x1), torch.stack([bn(x2) for bn in separate])
    (out1 * weights).sum().backward()
    (out2 * weights).sum().backward()
    torch.testing.assert_close(out1, out2)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, torch.stack([bn.weight.grad for bn in separate]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.bias.grad, torch.stack([bn.bias.grad for bn in separate]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.bn.running_var, separate[2].running_var)


def test_the_dense_convolution_equals_the_papers_grouped_one():
    """The paper has a 1x1 convolution with 3 groups over [x; x; x], BN and ReLU."""
    torch.manual_seed(0)
    ours = ConvBranches(6, 3)
    grouped = nn.Sequential(nn.Conv2d(18, 18, 1, groups=3, bias=False), nn.BatchNorm2d(18), nn.ReLU())
    grouped[0].weight.data = ours.conv.weight.data.clone()
    x = torch.randn(4, 6, 5, 5)
    expected = grouped(torch.cat([x, x, x], 1)).view(4, 3, 6, 5, 5).transpose(0, 1)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize(("counted", "expected"), [(None, 0.0221), (3, 0.0180)])
def test_conv_branches_are_initialized_for_the_stated_number_of_branches(counted, expected):
    """The standard deviation of two branches is sqrt(2 / (2 * 2048)) = .0221 by default, and sqrt(2 / (3 * 2048)) = .0180
    if they are initialized as two of three."""
    config = Config.of(branches=2, branch="conv", branch_init_branches=counted)
    backbone = nn.Module()
    backbone.num_features = 2048
    torch.manual_seed(0)
    weight = with_branches(config.method, backbone).branches.conv.weight
    assert weight.shape == (2 * 2048, 2048, 1, 1)
    assert float(weight.detach().std()) == pytest.approx(expected, abs=5e-5)


def test_conv_branches_start_with_torchs_kaiming_normal_weights_of_fan_out():
    torch.manual_seed(0)
    ours = ConvBranches(6, 3).conv.weight
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 18, 1, bias=False).weight
    nn.init.kaiming_normal_(theirs, mode="fan_out", nonlinearity="relu")
    assert torch.equal(ours, theirs)


def test_branches_move_to_the_pooled_features_only_in_evaluation():
    config = Config.of(model="cifar_resnet20", branch="conv", eval_branch_at="pooled", img_size=32)
    model = model_of(config, 5)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = model.eval().backbone.forward_features(images)
        pooled_first = model.branches(features.mean((2, 3), keepdim=True))[..., 0, 0]
        torch.testing.assert_close(model(images), model.backbone.fc(pooled_first))
        model.eval_branch_at = "map"
        torch.testing.assert_close(model(images), model.backbone.fc(model.branches(features).mean((3, 4))))


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_cifar_resnets_have_the_known_number_of_parameters(depth, parameters):
    """A convolution has k x k x in x out parameters, BN 2 per channel. One more block per stage, 6 layers, adds 97,216."""
    model = timm.create_model(f"cifar_resnet{depth}", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_an_option_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    block = timm.create_model("cifar_resnet20").layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # the residual is 0, so that the block's output is its shortcut
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert out.shape == (1, 32, 4, 4)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0
    assert out[:, 24:].abs().sum() == 0


def test_cifar_resnets_take_channels_and_start_with_kaiming_normal_weights():
    model = timm.create_model("cifar_resnet32", num_classes=10, channels=(32, 64, 128))
    assert model.fc.in_features == 128
    weight = model.layer3[1].conv1.weight  # Kaiming-normal, fan-in 128 x 9
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config.of(model="resnet5"), r"timm has no model 'resnet5'.*did you mean resnet"),
        (
            Config.of(model="resnet18", model_kwargs={"layerz": 3}),
            "resnet18 with .*layerz.* cannot be created.*model-kwargs",
        ),
        (Config.of(model="mobilenetv3_small_050", eval_branch_at="pooled"), "eval-branch-at pooled.*288.*1024"),
        (Config.of(model="deit_tiny_distilled_patch16_224", branch_at="pooled"), "one linear classifier"),
    ],
)
def test_a_setting_that_a_model_cannot_have_is_refused_with_the_reason(config, message):
    with pytest.raises(UserError, match=message):
        model_of(config, 5)


def test_an_input_size_that_the_model_does_not_accept_is_refused_before_training():
    model = model_of(Config.of(model="vit_tiny_patch16_224", model_kwargs={"depth": 1}), 5)
    with pytest.raises(UserError, match=r"32 x 32 pixel inputs.*img-size"):
        check_forward(model, 32, 5)


def test_img_size_is_passed_to_models_with_a_fixed_input_size():
    model = model_of(Config.of(model="vit_tiny_patch16_224", model_kwargs={"depth": 1}, img_size=32), 5)
    check_forward(model, 32, 5)


def test_tau_scales_rows_by_their_norm_and_drops_the_bias():
    model = model_of(Config.of(model="cifar_resnet20", method="ce"), 5)
    before = model.backbone.fc.weight.clone()
    nn.init.ones_(model.backbone.fc.bias)
    normalized = normalized_rows(model.backbone.fc, 0.5)
    row = before[2] / before[2].square().sum() ** 0.25
    torch.testing.assert_close(normalized.weight[2], row)
    assert normalized.bias.abs().sum() == 0
    assert torch.equal(model.backbone.fc.weight, before)  # the model is unchanged


def test_pretrained_weights_load_from_a_file_with_another_number_of_classes(tmp_path):
    source = timm.create_model("resnet18", num_classes=1000)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = model_of(Config.of(model="resnet18", pretrained_file=str(tmp_path / "weights.safetensors")), 5)
    torch.testing.assert_close(model.backbone.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert model.backbone.fc.out_features == 5
