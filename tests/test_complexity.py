"""Parameters and multiply-adds against counts by hand."""

import pytest
from builders import model_of

from reslt.config.schema import Config
from reslt.models.complexity import complexity, complexity_without_branches


def test_a_cifar_resnets_multiply_adds_are_those_of_its_convolutions_and_classifier():
    """ResNet-20: 3x3 convolutions of 3 blocks per stage, on 32, 16 and 8 pixels; three branches share a classifier."""
    model = model_of(Config.of(model="cifar_resnet20", branch="bn"), 10)
    stem = 32 * 32 * 9 * 3 * 16
    stages = 32 * 32 * 6 * 9 * 16 * 16
    stages += 16 * 16 * (9 * 16 * 32 + 5 * 9 * 32 * 32)
    stages += 8 * 8 * (9 * 32 * 64 + 5 * 9 * 64 * 64)
    parameters = sum(p.numel() for p in model.parameters())
    assert complexity(model, 32).multiply_adds == stem + stages + 3 * 64 * 10
    assert complexity(model, 32).parameters == parameters
    assert complexity_without_branches(model, 32).multiply_adds == stem + stages + 64 * 10
    assert complexity_without_branches(model, 32).parameters == parameters - 3 * 2 * 64
    assert model.training
    assert model.branches is not None  # removed while counting only


@pytest.mark.parametrize(("place", "maps"), [("map", 2 * 2), ("pooled", 1)])
def test_conv_branches_cost_their_convolution_once_per_place_of_the_map(place, maps):
    """D -> K D at each of the 2 x 2 places of a 64-pixel image's map, or once; the classifier runs K times instead of once."""
    config = Config.of(model="resnet18", model_kwargs={"channels": (8, 16, 32, 64)}, experts=2, eval_branch_at=place)
    model = model_of(config, 7)
    more = complexity(model, 64).multiply_adds - complexity_without_branches(model, 64).multiply_adds
    width = 48  # 0.75 x 64
    assert more == 2 * (maps * width * 3 * width + 2 * width * 7)


def test_a_plain_model_costs_the_same_without_branches():
    model = model_of(Config.of(model="cifar_resnet20", method="ce"), 10)
    assert complexity(model, 32) == complexity_without_branches(model, 32)
    assert str(complexity(model, 32)) == "0.27 M parameters, 0.041 G multiply-adds"
