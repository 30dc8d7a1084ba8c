"""Frozen parameters: which ones a pattern names, and that training leaves exactly these unchanged."""

import shutil

import pytest
import torch
from builders import optimizer_of
from conftest import TINY_FLAGS, last_checkpoint
from safetensors.torch import load_file

import reslt
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.models.create import create_model
from reslt.models.freeze import freeze, frozen_names

STEM = ["conv1", "bn1"]


def network(**changes):
    config = Config.of(model="cifar_resnet20", branch="bn", **changes)
    return create_model(config.model, config.method, 3)


def test_a_pattern_names_parameters_or_the_modules_that_contain_them():
    model = network()
    own = {name for name, _ in model.backbone.named_parameters()}
    assert frozen_names(model, None) == frozen_names(model, ()) == set()
    assert frozen_names(model, ["conv1"]) == {"backbone.conv1.weight"}
    expected = {f"backbone.{name}" for name in own if name.startswith(("layer3.0.", "layer3.1."))}
    assert len(expected) == 2 * 6
    assert frozen_names(model, ["layer3.[01]"]) == expected
    expected = {f"backbone.{name}" for name in own if name.endswith("bn2.bias")}
    assert frozen_names(model, ["*.bn2.bias", "layer1.0.bn2.bias"]) == expected
    assert len(expected) == 9


def test_with_experts_a_pattern_applies_to_the_shared_stages_and_to_each_experts_own():
    model = network(experts=2)
    assert frozen_names(model, ["conv1"]) == {"shared.conv1.weight"}
    classifiers = {f"experts.{e}.backbone.fc.{kind}" for e in (0, 1) for kind in ("weight", "bias")}
    assert frozen_names(model, ["conv1", "fc"]) == {"shared.conv1.weight"} | classifiers
    freeze(model, ["conv1", "fc"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"shared.conv1.weight"} | classifiers


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer9", r"layer9: it matches no parameter of the model; there are conv1, bn1, layer1, layer2, layer3, fc"),
        ("layer3.7", r"layer3 has layer3\.0, layer3\.1, layer3\.2"),
        ("LAYER1", r"there are conv1, bn1"),
        ("con1", r"did you mean conv1\?"),
        ("branches", r"there are conv1, bn1"),
    ],
)
def test_a_pattern_without_a_match_is_refused_with_the_names_that_exist(pattern, message):
    with pytest.raises(UserError, match=message):
        freeze(network(), ["conv1", pattern])


def test_the_message_about_a_pattern_lists_only_a_few_names_of_a_large_model():
    config = Config.of(model="vit_tiny_patch16_224", branch="bn")
    model = create_model(config.model, config.method, 3)
    with pytest.raises(UserError, match=r"blocks has blocks\.0, .*, blocks\.7 and 4 more"):
        freeze(model, ["blocks.12"])


def test_a_model_without_a_parameter_to_train_is_refused():
    """Patterns name parameters of the timm model. ResLT's branches are not among them, so that with branches the whole
    timm model may be frozen."""
    with pytest.raises(UserError, match=r"--freeze \*: no parameter is left to train"):
        freeze(network(method="ce"), ["*"])
    model = network()
    freeze(model, ["*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"branches.weight", "branches.bias"}


def test_weight_decay_leaves_frozen_parameters_alone():
    """All gradients are 0, so that only weight decay moves the other parameters, by lr x weight_decay = 1 %."""
    model = network()
    freeze(model, STEM)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(Config.of(lr=0.1, weight_decay=0.1, momentum=0.0), model)
    logits = model(torch.zeros(2, 3, 16, 16))
    (0 * logits).sum().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    started_at_0 = {name for name, value in before.items() if not value.any()}
    frozen = {"backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"}
    assert moved == before.keys() - started_at_0 - frozen


def test_the_python_interface_freezes_a_network_too():
    model = reslt.create_model("cifar_resnet20", 3, branch="bn", freeze=["fc", "layer1"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == frozen_names(network(), ["fc", "layer1"])


def test_freeze_is_a_flag_and_a_recipes_key_that_a_flag_unsets(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("freeze: [conv1, layer1]\n")
    assert resolve(["--recipe", str(recipe)]).config["freeze"] == ("conv1", "layer1")
    assert resolve(["--recipe", str(recipe), "--freeze", "none"]).config["freeze"] is None
    assert resolve(["--freeze", "layer4.[01]", "bn1"]).config["freeze"] == ("layer4.[01]", "bn1")


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(last_checkpoint(run) / "model.safetensors")


def test_a_run_trains_all_parameters_except_the_frozen_stem_and_resumes_to_the_same_weights(tiny, tmp_path, run_script):
    flags = ["--data", tiny, *TINY_FLAGS, "--output", tmp_path, "--freeze", *STEM]
    whole = run_script("train", *flags, "--experiment", "whole")
    assert whole.code == 0, whole.err
    assert "frozen: conv1 bn1" in whole.out + whole.err
    torch.manual_seed(0)
    config = Config.of(model="cifar_resnet20", model_kwargs={"channels": (8, 16, 32)}, branch="bn", img_size=16)
    initial = create_model(config.model, config.method, 3, 16).state_dict()
    trained = weights(tmp_path / "whole")
    unchanged = {name for name, value in trained.items() if torch.equal(value, initial[name])}
    assert unchanged == {"backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"}
    # freezing leaves BatchNorm in training mode
    assert not torch.equal(trained["backbone.bn1.running_mean"], initial["backbone.bn1.running_mean"])

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(last_checkpoint(cut))
    resumed = run_script("train", *flags, "--experiment", "cut", "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "resuming in epoch 2" in resumed.out
    resumed_weights = weights(cut)
    assert all(torch.equal(value, resumed_weights[name]) for name, value in trained.items())
