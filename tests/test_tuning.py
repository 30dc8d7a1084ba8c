"""Fine-tuning a part of the timm model: only that part trains, the function is unchanged at the start and after folding,
learning rates decay by layer, a filter limits weight decay, and classifiers start at class means."""

import importlib.util
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import ONE, Batches, model_of, optimizer_of, settings_of
from conftest import TINY_FLAGS, make_dataset, train_until
from safetensors.torch import load_file, save_file
from torch import nn

import reslt
from reslt.config.schema import Config
from reslt.config.stages import Stage
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.evaluation.evaluate import start_at_class_means
from reslt.models.adapters import add_adapters
from reslt.models.fold import fold, load_folded, save_folded
from reslt.models.freeze import freeze
from reslt.models.lora import plain_tensors
from reslt.models.tuning import tune
from reslt.runs import checkpoint
from reslt.runs.init_from import initialize
from reslt.training.optim import create_optimizer
from reslt.training.trained_parts import check_parts, parameter_groups, train_only

VIT, RESNET = "test_vit.r160_in1k", "test_resnet.r160_in1k"
SHALLOW = {"depth": 2}
VIT_FLAGS = [flag for flag in TINY_FLAGS if flag not in ("--model-kwargs", "channels=8,16,32")]
VIT_FLAGS[VIT_FLAGS.index("cifar_resnet20")] = VIT
VIT_FLAGS += ["--model-kwargs", "depth=2", "--img-size", "16", "--method", "reslt"]
REST = {"interpolation": "bilinear", "crop_pct": 1.0}


def settings(model=VIT, **changes) -> Config:
    kwargs = {"model_kwargs": SHALLOW} if model == VIT else {}
    return Config.of(**{"model": model, "img_size": 32, "branch": "bn"} | kwargs | changes)


def network(seed=0, classes=3, model=VIT, **changes) -> nn.Module:
    if changes.get("tune") == "lora":
        pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = settings(model, **changes)
    created = model_of(config, classes)
    tune(created, config.model)
    freeze(created, config.model.freeze)
    return created


def as_if_trained(model: nn.Module) -> nn.Module:
    """Change every trainable parameter, as training would, and return the model in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def images(seed=0, number=2, side=32) -> torch.Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


CASES = {
    "vit norm": (VIT, {"tune": "norm"}),
    "vit lora": (VIT, {"tune": "lora"}),
    "vit adapter": (VIT, {"tune": "adapter"}),
    "resnet norm": (RESNET, {"tune": "norm"}),
    "resnet lora": (RESNET, {"tune": "lora"}),
    "experts lora": ("cifar_resnet20", {"tune": "lora", "experts": 2}),
    "bbn norm": ("cifar_resnet20", {"tune": "norm", "method": "bbn"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tuned_model_starts_with_the_weights_and_the_function_of_the_plain_one(case):
    model, changes = CASES[case]
    plain = network(model=model, **{name: value for name, value in changes.items() if name != "tune"})
    tuned = network(model=model, **changes)
    own = plain_tensors(tuned.state_dict(), 16)
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(plain.eval()(images()), tuned.eval()(images()), atol=1e-6)
    same_seed = network(model=model, **changes).state_dict()
    assert all(torch.equal(tensor, same_seed[name]) for name, tensor in tuned.state_dict().items())


def part_of(case: str, model: nn.Module) -> set[str]:
    """Return the parameters of the timm models that train, except classifiers, without the help of `tune`."""
    if case.endswith("norm"):
        kinds = (nn.LayerNorm, nn.BatchNorm2d)
        norms = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        return {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")} - {
            "branches.bn.weight",
            "branches.bn.bias",
        }
    marks = ("lora_A", "lora_B") if case.endswith("lora") else ("mlp.adapter.",)
    return {name for name, _ in model.named_parameters() if any(mark in name for mark in marks)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_changes_only_the_tuned_part_the_classifiers_and_the_branches(case):
    """Weight decay acts on every parameter with a gradient, and so moves those whose gradient is still 0."""
    name, changes = CASES[case]
    model = as_if_trained(network(model=name, **changes)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(Config.of(lr=0.1, weight_decay=0.1, momentum=0.0), model)
    model(images(number=4)).square().sum().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    heads = {id(parameter) for head in model.classifiers for parameter in head.parameters()}
    expected = {name for name, parameter in model.named_parameters() if id(parameter) in heads}
    if "bbn" not in case:  # BBN's branches are blocks of the timm model
        expected |= {name for name in before if "branches." in name}
    assert part_of(case, model)
    assert moved == expected | part_of(case, model)


def test_lora_updates_every_linear_layer_below_the_classifier_or_convolutions_if_there_is_none():
    vit, resnet = network(tune="lora", lora_rank=2), network(model=RESNET, tune="lora", lora_rank=2)
    per_block = {("qkv", 64, 192), ("proj", 64, 64), ("fc1", 64, 192), ("fc2", 192, 64)}
    linear = {name: m for name, m in vit.named_modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")}
    assert len(linear) == 2 * 4
    assert {
        (name.split(".")[-1], m.base_layer.in_features, m.base_layer.out_features) for name, m in linear.items()
    } == per_block
    assert all(tuple(m.lora_A["default"].weight.shape) == (2, m.base_layer.in_features) for m in linear.values())
    plain = network(model=RESNET)
    convolutions = {name for name, m in plain.backbone.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    assert updated_layers(resnet) == convolutions
    assert not hasattr(resnet.backbone.fc, "lora_A")


def updated_layers(model: nn.Module) -> set[str]:
    """Return the names of the timm model's layers with a low-rank update."""
    return {name for name, module in model.backbone.named_modules() if hasattr(module, "lora_A")}


def test_a_layer_whose_weight_the_model_reads_without_calling_it_gets_no_update_and_a_warning(caplog):
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    model = network(model="beit_base_patch16_224", model_kwargs=small, tune="lora")
    assert updated_layers(model) == {f"blocks.0.{name}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    assert "1 of 4 layers get no update" in caplog.text


def test_an_adapter_adds_its_bottleneck_to_the_mlp_of_its_block():
    """The attention's output x becomes x + mlp(norm2(x)) + s up(relu(down(norm(x))))."""
    model = as_if_trained(network(tune="adapter", adapter_dim=4))
    block, seen = model.backbone.blocks[1], {}
    block.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    block.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    with torch.no_grad():
        model(images())
        x = seen["x"] + block.attn(block.norm1(seen["x"]))
        norm2, mlp, adapter = block.mlp.base["norm2"], block.mlp.base["mlp"], block.mlp.adapter
        normalized = F.layer_norm(x, (64,), adapter.norm.weight, adapter.norm.bias)
        hidden = normalized @ adapter.down.weight.T + adapter.down.bias
        bottleneck = hidden.clamp(min=0) @ adapter.up.weight.T + adapter.up.bias
        assert torch.allclose(seen["output"], x + mlp(norm2(x)) + adapter.scale * bottleneck, atol=1e-5)
    assert adapter.down.weight.shape == (4, 64)
    assert adapter.scale != 1


class Block(nn.Module):
    """The second half of a transformer's block."""

    def __init__(self):
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(2), nn.Linear(2, 2)

    def forward(self, x):
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize(("classes", "blocks", "width"), [(3, 2, 1), (100, 12, 4), (1000, 12, 32), (8142, 24, 128)])
def test_adapters_have_the_width_that_lift_derives_from_classes_and_blocks(classes, blocks, width):
    """It is the largest power of 2 up to C / (2 blocks), at least 1: 3 / 4, 100 / 24 = 4.2, 1000 / 24 = 41.7, 169.6."""
    backbone = nn.Sequential(*(Block() for _ in range(blocks)))
    backbone.forward_features = backbone.forward
    add_adapters(backbone, None, classes, torch.randn(1, 5, 2))
    assert [block.mlp.adapter.down.out_features for block in backbone] == [width] * blocks


def other_block(forward, norm: nn.Module) -> nn.Module:
    block = type("Other", (nn.Module,), {"forward": forward, "forward_features": forward})()
    block.norm2, block.mlp = norm, nn.Linear(2, 2)
    return block


@pytest.mark.parametrize(
    ("forward", "norm"),
    [
        (lambda self, x: x + self.norm2(self.mlp(x)), nn.LayerNorm(2)),  # the norm follows the MLP
        (lambda self, x: x + self.norm2(x) + self.mlp(self.norm2(x)), nn.LayerNorm(2)),  # the norm has two uses
        (lambda self, x: x + self.mlp(self.norm2(x)), nn.GroupNorm(1, 2)),  # the norm is for channels before space
    ],
)
def test_a_block_of_another_form_gets_no_adapter_and_a_model_of_only_such_blocks_is_refused(forward, norm):
    block = other_block(forward, norm)
    pair = nn.Sequential(block, Block())
    pair.forward_features = pair.forward
    add_adapters(pair, 1, 3, torch.randn(1, 2, 2))
    assert [type(part.mlp).__name__ for part in pair] == ["Linear", "AdaptedMlp"]
    with pytest.raises(
        UserError, match=r"--tune adapter: Other has no transformer blocks of the form .* --tune norm or"
    ):
        add_adapters(block, 1, 3, torch.randn(1, 2, 2))


def test_a_model_whose_function_adapters_would_change_is_refused():
    """Its block also adds the output of norm2 to x, as those of MViT do between stages."""
    block = other_block(lambda self, x: (lambda y: x + y + self.mlp(y))(self.norm2(x)), nn.LayerNorm(2))
    with pytest.raises(UserError, match="--tune adapter: Other has no transformer blocks of the form"):
        add_adapters(block, 1, 3, torch.randn(1, 2, 2))


def test_a_model_without_layers_for_the_chosen_part_is_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"--tune adapter: ResNet has no transformer blocks.*use --tune norm or lora"):
        network(model=RESNET, tune="adapter")
    with pytest.raises(
        UserError, match=r"--tune lora: VisionTransformer does not work with 33 x 33 pixel.*see --img-size"
    ):
        network(tune="lora", model_kwargs=SHALLOW | {"img_size": 32}, img_size=33)
    bare = reslt.create_model(RESNET, 3, method="ce")
    for name, module in list(bare.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            bare.set_submodule(name, nn.Identity())
    with pytest.raises(UserError, match="--tune norm: ResNet has no normalization layer with parameters"):
        tune(bare, Config.of(tune="norm").model)


def test_a_missing_peft_is_an_error_of_one_line(run_script, monkeypatch, tiny):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else found(name, *more))
    outcome = run_script("train", "--data", tiny, "--tune", "lora")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "tune: lora requires peft, which is not installed; pip install peft" in outcome.err


def test_frozen_layers_are_excluded_from_the_tuned_part():
    model = network(tune="norm", freeze=("blocks.0",))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "backbone.blocks.1.norm2.weight" in trained
    assert not any(name.startswith("backbone.blocks.0") for name in trained)
    adapted = network(tune="adapter", freeze=("blocks.0.mlp.adapter", "blocks.1.norm2"))  # the plain model's names
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained if ".adapter." in name} == {"1"}


# Folding and starting from trained weights


@pytest.mark.parametrize("case", ["vit lora", "resnet lora", "experts lora"])
def test_updates_fold_into_the_plain_weights(case):
    name, changes = CASES[case]
    model = as_if_trained(network(model=name, **changes, branch_at="pooled"))
    folded, how = fold(model, 32)
    assert how.startswith("low-rank updates merged; ")
    assert not any("lora" in name or "base_layer" in name for name in folded.state_dict())
    with torch.no_grad():
        fused = model(images()).sum(-3)
        fused = fused.mean(0) if fused.ndim == 3 else fused
        assert torch.allclose(folded.eval()(images()), fused, atol=1e-4)
    if case == "vit lora":
        arguments = SHALLOW | {"num_classes": 3, "img_size": 32}
        timm.create_model(VIT, **arguments).load_state_dict(folded.state_dict())  # a plain timm model


def test_adapters_are_kept_when_a_model_folds_and_are_in_its_file(tmp_path):
    config = settings(tune="adapter", branch_at="pooled")
    model = as_if_trained(network(tune="adapter", branch_at="pooled"))
    folded, how = fold(model, 32)
    assert "folded into the classifier" in how
    assert how.endswith("; adapters are kept; reslt.models.fold.load_folded reads the file")
    data = settings_of(config, {"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1)} | REST)
    save_folded(folded, config.model, config.method, data, Classes(3), tmp_path / "folded.safetensors")
    loaded, described = load_folded(tmp_path / "folded.safetensors")
    assert (described["tune"], described["adapter_dim"]) == ("adapter", None)
    with torch.no_grad():
        assert torch.equal(loaded(images()), folded.eval()(images()))
        assert torch.allclose(loaded(images()), model(images()).sum(0), atol=1e-4)


def test_merging_tensors_adds_b_a_alpha_over_rank_to_the_weight():
    """The B of a convolution is 1 x 1, so that entry (o, i, h, w) of the update is sum_r B[o, r] A[r, i, h, w]."""
    down, up, weight = torch.randn(2, 3), torch.randn(4, 2), torch.randn(4, 3)
    kernels, mix, kernel = torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), torch.randn(4, 3, 3, 3)
    tensors = {
        "backbone.a.base_layer.weight": weight,
        "backbone.a.base_layer.bias": torch.ones(4),
        "backbone.a.lora_A.default.weight": down,
        "backbone.a.lora_B.default.weight": up,
        "backbone.base_layer.0.base_layer.weight": kernel,  # timm's DLA has such names
        "backbone.base_layer.0.lora_A.default.weight": kernels,
        "backbone.base_layer.0.lora_B.default.weight": mix,
    }
    plain = plain_tensors(tensors, 6.0)
    assert plain.keys() == {"backbone.a.weight", "backbone.a.bias", "backbone.base_layer.0.weight"}
    assert torch.allclose(plain["backbone.a.weight"], weight + 3 * up @ down, atol=1e-6)
    update = torch.einsum("or,rihw->oihw", mix[:, :, 0, 0], kernels)
    assert torch.allclose(plain["backbone.base_layer.0.weight"], kernel + 3 * update, atol=1e-5)
    for broken in ({"backbone.a.lora_B.default.weight": None}, {"backbone.a.base_layer.weight": torch.ones(2, 2)}):
        with pytest.raises(UserError, match="its low-rank updates do not fit its weights"):
            plain_tensors({name: tensor for name, tensor in (tensors | broken).items() if tensor is not None}, 6.0)
    with pytest.raises(UserError, match="its low-rank updates do not fit its weights"):
        plain_tensors(tensors, "6")


def written(folder, model: nn.Module):
    """Write a run with the weights of a model and lora_alpha 16; return its folder and its classes."""
    classes = Classes(3, ("cat", "dog", "eel"))
    state = {"epochs_done": 1, "steps_done": 1, "config": {"lora_alpha": 16.0}, "scaler": None}
    state |= {"optimizer": {"state": {}, "param_groups": []}} | classes.stored()
    checkpoint.write(folder / "checkpoints/1-1", {"model": model.state_dict()}, state)
    (folder / "checkpoints/last").write_text("1-1\n")
    return folder, classes


@pytest.mark.parametrize("source_part", ["full", "lora", "adapter"])
@pytest.mark.parametrize("target_part", ["full", "lora", "adapter"])
def test_a_run_starts_from_one_with_another_tuned_part(tmp_path, source_part, target_part):
    """Updates are merged into the weights, and adapters are left out if the model has none. In all other cases, the function
    stays the same."""
    source = as_if_trained(network(seed=1, tune=source_part))
    target = network(seed=2, tune=target_part).eval()
    run, classes = written(tmp_path, source)
    _, text = initialize(target, str(run), classes)
    with torch.no_grad():
        is_same = torch.allclose(source(images()), target(images()), atol=1e-4)
    loses = source_part == "adapter" != target_part
    assert is_same != loses
    assert ("left out: adapters" in text) == loses
    assert ("new: low-rank updates (16 weights)" in text) == (
        target_part == "lora"
    )  # 2 of each of 4 layers in 2 blocks
    assert ("new: adapters (14 weights)" in text) == (target_part == "adapter" != source_part)  # 7 in each of 2 blocks


def test_models_with_adapters_and_with_updates_start_from_timms_weights(tmp_path):
    torch.manual_seed(3)
    trained = timm.create_model(VIT, num_classes=3, img_size=32, **SHALLOW).state_dict()
    save_file(trained, tmp_path / "vit.safetensors")
    adapted = network(tune="adapter")
    initialize(adapted, str(tmp_path / "vit.safetensors"), Classes(3))
    updated = network(tune="lora", pretrained_file=str(tmp_path / "vit.safetensors"))
    for model in (adapted, updated):
        own = plain_tensors(model.state_dict(), 16.0)
        below = {name: tensor for name, tensor in trained.items() if not name.startswith("head.")}
        assert all(torch.equal(tensor, own[f"backbone.{name}"]) for name, tensor in below.items())


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("tuning") / "d")


RUN = ["--tune", "lora", "--head", "cosine", "--head-init", "class_means", "--layer-decay", "0.5"]
RUN += ["--weight-decay-filter", "--model-ema", "--model-ema-decay", "0.5"]


def test_a_tuned_run_stopped_and_resumed_ends_with_the_same_bytes_and_folds(data, run_script, monkeypatch):
    pytest.importorskip("peft")

    def flags(name, *more):
        return (*VIT_FLAGS, "--data", data, "--output", data.parent, "--experiment", name, *RUN, *more)

    whole = run_script("train", *flags("whole"))
    assert whole.code == 0, whole.err
    train_until(run_script, monkeypatch, 4, *flags("stopped"))
    resumed = run_script("train", *flags("stopped", "--resume", "auto"))
    assert resumed.code == 0, resumed.err
    files = [data.parent / name / "checkpoints/2-6" for name in ("whole", "stopped")]
    for part in ("model", "ema", "optimizer"):
        expected, found = (load_file(folder / f"{part}.safetensors") for folder in files)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    counts = {name: tensor.numel() for name, tensor in load_file(files[0] / "model.safetensors").items()}
    updates = sum(count for name, count in counts.items() if "lora" in name)
    trained = updates + 3 * 64 + 6 * 64  # classifier, scales and shifts of three branches
    everything = sum(count for name, count in counts.items() if "bn.running" not in name and "num_batches" not in name)
    assert f"tune lora: {trained:,} of {everything:,} parameters train" in whole.out
    assert "head cosine" in whole.out
    module, _ = reslt.load_run(data.parent / "whole")
    evaluated = run_script("evaluate", "--ckpt", data.parent / "whole", "--output", data.parent / "again")
    assert evaluated.code == 0, evaluated.err
    assert not any("lora" in name for name in module.state_dict())


# Optimizer


def groups_of(model: nn.Module, **changes) -> dict[str, tuple[float, float]]:
    """Return each parameter's factor of the learning rate and its weight decay."""
    config = Config.of(weight_decay=0.1, **changes)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(config.optim, parameter_groups(model, train_only(model, {"all": 1.0}), config.optim))
    return {
        names[parameter]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_without_layer_decay_and_filter_the_optimizers_groups_are_unchanged():
    model = network()
    assert parameter_groups(model, model, Config.of().optim) is model
    assert parameter_groups(model, model, Config.of(layer_decay=1.0).optim) is model
    factors = train_only(model, {"all": 1.0, "classifier": 0.2})
    assert parameter_groups(model, factors, Config.of().optim) is factors


@pytest.mark.parametrize("changes", [{}, {"tune": "lora"}, {"tune": "adapter"}])
def test_learning_rates_decrease_from_layer_to_layer_of_a_transformer(changes):
    """From the top: the classifier has 1, the last block and the final norm 1/2, the first block 1/4, the embedding 1/8."""
    expected = {"blocks.0": 0.25, "blocks.1": 0.5, "norm": 0.5, "head": 1.0, "patch_embed": 0.125, "pos_embed": 0.125}
    expected |= {"cls_token": 0.125}
    model = network(**changes)
    model.requires_grad_(True)
    found = groups_of(model, layer_decay=0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in found.items():
        parts = name.split(".")
        place = ".".join(parts[1 : 3 if parts[1] == "blocks" else 2])
        assert (scale, decay) == (1.0 if parts[0] == "branches" else expected[place], 0.1), name


def test_learning_rates_of_experts_decrease_into_the_shared_stages():
    """The layers are the stem, 8 blocks and the classifier; the experts share the stem and the first 4 blocks."""
    torch.manual_seed(0)
    model = reslt.create_model("resnet18", 3, experts=2, expert_width=0.25, branch="bn")
    found = {name: scale for name, (scale, _) in groups_of(model, layer_decay=0.5).items()}
    assert found["shared.conv1.weight"] == 0.5**9  # below 8 blocks
    assert found["shared.layer2.1.conv1.weight"] == 0.5**5
    assert {found[f"experts.{e}.backbone.layer3.0.conv1.weight"] for e in (0, 1)} == {0.5**4}
    assert {found[f"experts.{e}.backbone.layer4.1.bn2.bias"] for e in (0, 1)} == {0.5}
    assert {found[f"experts.{e}.backbone.fc.weight"] for e in (0, 1)} == {1.0}
    assert {scale for name, scale in found.items() if ".branches." in name} == {1.0}


def test_a_stages_factors_multiply_those_of_layers_and_the_first_group_has_the_highest():
    model, optim = network(), Config.of(layer_decay=0.5).optim
    groups = parameter_groups(model, train_only(model, {"all": 1.0, "classifier": 0.2}), optim)
    scales = {
        name: g["lr_scale"] for name, p in model.named_parameters() for g in groups if any(p is q for q in g["params"])
    }
    assert scales["backbone.head.weight"] == 0.2
    assert scales["backbone.blocks.0.norm1.weight"] == 0.25
    assert all(above["lr_scale"] >= below["lr_scale"] for above, below in pairwise(groups))
    assert groups[0]["lr_scale"] == 1.0


def test_a_model_that_does_not_state_its_layers_is_refused_before_the_first_step():
    model = network(model="cifar_resnet20")
    config = Config.of(layer_decay=0.5)
    with pytest.raises(UserError, match=r"--layer-decay 0\.5: CifarResNet does not state its layers"):
        check_parts(model, [Stage(1, config, 0, 1, 0)])


def test_the_filter_exempts_biases_norms_and_parameters_that_the_model_names_from_weight_decay():
    model = network(tune="adapter")
    model.requires_grad_(True)
    found = {name: decay for name, (_, decay) in groups_of(model, weight_decay_filter=True).items()}
    matrices = ("patch_embed.proj", "attn.qkv", "attn.proj", "fc1", "fc2", "head", "down", "up")
    decayed = {name for name, decay in found.items() if decay == 0.1}
    assert decayed == {name for name in found if name.endswith(tuple(f"{matrix}.weight" for matrix in matrices))}
    assert {decay for name, decay in found.items() if name not in decayed} == {0.0}
    assert {"backbone.pos_embed", "backbone.cls_token", "branches.weight", "branches.bias"} <= found.keys() - decayed
    assert {decay for _, decay in groups_of(model).values()} == {0.1}


# Class means


BATCHES = ((images(1, 4), torch.tensor([0, 1, 0, 2])), (images(2, 3), torch.tensor([2, 1, 2])))


def test_rows_of_a_cosine_classifier_start_at_the_normalized_class_means():
    """Features are normalized one by one and averaged over a class's images and then over the two branches. The rows of
    trained classes and of classes without images do not change."""
    model = network(head="cosine", branches=2, branch_at="pooled", classes=4).eval()
    for tensor in (model.branches.weight, model.branches.bn.running_mean, model.branches.bn.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    head = model.classifiers[0]
    random_rows = head.weight.detach().clone()
    with torch.no_grad():
        head.weight[1] = F.normalize(torch.ones(64), dim=0)
    start_at_class_means(model, [random_rows], Batches(*BATCHES), ONE)

    sums = torch.zeros(2, 4, 64)  # a class's mean has the same direction
    with torch.no_grad():
        for batch, labels in BATCHES:
            pooled = model.backbone.forward_head(model.backbone.forward_features(batch), pre_logits=True)
            for k, branch in enumerate(model.branches(pooled[:, :, None, None])):
                for feature, label in zip(branch.flatten(1), labels, strict=True):
                    sums[k, label] += feature / feature.norm()
    branch_means = sums[:, [0, 2]].mean(0)
    assert torch.allclose(head.weight[[0, 2]], branch_means / branch_means.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.equal(head.weight[1], F.normalize(torch.ones(64), dim=0))
    assert torch.equal(head.weight[3], random_rows[3])


def test_each_expert_starts_at_its_own_class_means():
    model = network(model="cifar_resnet20", head="cosine", experts=2, method="ce", classes=4).eval()
    start_at_class_means(model, [head.weight.detach().clone() for head in model.classifiers], Batches(*BATCHES), ONE)
    first, second = (head.weight.detach() for head in model.classifiers)
    rows = torch.cat([first, second])[[0, 1, 2, 4, 5, 6]]
    assert torch.allclose(rows.norm(dim=1), torch.ones(6), atol=1e-5)
    assert (rows >= 0).all()  # features come from a ReLU
    assert not torch.allclose(first[:3], second[:3], atol=1e-2)
