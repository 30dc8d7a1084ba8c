"""Checkpoints of the authors' code: files in their format, made here, and those networks computed by hand."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
import torchvision
from builders import model_of, predicted
from conftest import make_dataset
from torch import nn

from reslt.runs import convert as converter
from reslt.runs import folder as run_folder
from reslt.runs.released import numpy1_argsort

COUNTS = (16, 4, 8, 8, 4)  # ascending, ties by position: classes 1, 4, 2, 3, 0
ORDER = [1, 4, 2, 3, 0]


def randomize(module: nn.Module) -> nn.Module:
    """Fill a network with weights and BatchNorm statistics that all differ, small enough for logits of order 1."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "running_mean" in name or "bias" in name:
            tensor.uniform_(-0.3, 0.3)
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.3, 0.8)
    return module.eval()


class AuthorsNetwork(nn.Module):
    """A torchvision ResNet with the extra block and the classifier, under the authors' names."""

    def __init__(self, classes: int, branches: int = 3):
        super().__init__()
        resnet = torchvision.models.resnext50_32x4d()
        for name, part in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, part)
        width = resnet.fc.in_features
        self.finalBlock = nn.Sequential(
            nn.Conv2d(width, branches * width, 1, bias=False), nn.BatchNorm2d(branches * width), nn.ReLU()
        )
        self.fc = nn.Linear(width, classes)

    def map(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@pytest.fixture(scope="module")
def authors():
    torch.manual_seed(0)
    return randomize(AuthorsNetwork(len(COUNTS)))


@pytest.fixture
def data(tmp_path):
    folder = make_dataset(tmp_path / "tailed", COUNTS)
    (folder / "info.yaml").write_text(
        "image_root: images\ndefaults: {model_kwargs: {zero_init_last: false}, img_size: 64}\n"
    )
    return folder


def write_released(network: nn.Module, file):
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 180, "arch": "x", "best_acc1": np.float64(52.9), "state_dict": state, "optimizer": {}}, file)
    return file


def convert(file, data, output, *more):
    model = [] if "--model" in more else ["--model", "resnext50_32x4d"]
    converter.main(["convert", str(file), *model, "--data", str(data), "--output", str(output), *more])
    found = run_folder.find(output)

    model = model_of(found.config(), found.classes.number)
    found.load_evaluated(model)
    return model.eval(), found


@torch.no_grad()
@pytest.mark.parametrize("place", ["map", "pooled"])
@pytest.mark.parametrize("tau", [None, 0.7])
def test_a_released_network_gives_the_logits_computed_by_hand_in_the_datasets_class_order(
    authors, data, tmp_path, place, tau
):
    """Block, then pool (as trained), or pool, then block (as the authors evaluate): z_k = W pool(B_k(x)) + b, row c divided
    by its norm^tau without bias; the sum over k. Row r of the authors belongs to class ORDER[r]."""
    model, found = convert(write_released(authors, tmp_path / "best.pth.tar"), data, tmp_path / "converted")
    model.eval_branch_at = place
    images = torch.randn(4, 3, 64, 64)
    x = authors.map(images)
    x = x if place == "map" else x.mean((2, 3), keepdim=True)
    pooled = authors.finalBlock(x).mean((2, 3)).unflatten(1, (3, 2048))  # (N, 3, D)
    weight, bias = authors.fc.weight, authors.fc.bias
    if tau is not None:
        weight, bias = weight / weight.norm(dim=1, keepdim=True) ** tau, 0 * bias
    by_hand = (pooled @ weight.T + bias).movedim(1, 0)  # (3, N, C), the authors' class order
    ours = predicted(model, images, tau=tau)
    assert ours.std() > 0.05  # otherwise any order of classes would pass
    torch.testing.assert_close(ours[:, :, ORDER], by_hand, rtol=0, atol=1e-4)
    assert found.epochs_done == 180


@pytest.mark.parametrize(
    ("counts", "order"),
    [
        ([2, 1, 0] * 5 + [2], [2, 5, 8, 11, 14, 1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15]),
        ([2, 1, 0] * 5 + [2, 1], [8, 14, 2, 11, 5, 13, 10, 16, 4, 1, 7, 15, 9, 6, 12, 3, 0]),
        ([4] * 18, [0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 16, 17]),
    ],
)
def test_classes_with_equal_counts_are_ordered_as_numpy_1_ordered_them(counts, order):
    """The orders were read from NumPy 1.24.4: up to 16 counts are in stable order, more are not."""
    assert numpy1_argsort(np.array(counts)).tolist() == order


@pytest.mark.parametrize(
    ("counts", "sha256"),
    [
        (
            [int(1280 * (5 / 1280) ** (c * 377 % 1000 / 999)) for c in range(1000)],
            "b6586ef98ada3e88bcba89988ecaf52df5fc2901ba42c178388c18da05644069",
        ),
        (
            [2 + 4000 // (4 + c * 5003 % 8142) for c in range(8142)],
            "eadc90b11faa4bccf5d63c8bdcfb77b5609ab82b1f483da8cc170f4d24930645",
        ),
    ],
    ids=["1000 classes, 1280 to 5 images", "8142 classes, most of which share their count with hundreds of others"],
)
def test_the_classes_of_large_datasets_are_ordered_as_numpy_1_ordered_them(counts, sha256):
    """The digests are of the little-endian int64 indices that NumPy 1.24.4 returned; none is of a stable order."""
    order = numpy1_argsort(np.array(counts))
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == sha256


@torch.no_grad()
def test_a_class_order_file_overrides_the_derived_one(authors, data, tmp_path):
    (tmp_path / "order.txt").write_text("4\n3\n2\n1\n0\n")
    file = write_released(authors, tmp_path / "best.pth.tar")
    model, _ = convert(file, data, tmp_path / "out", "--class-order", str(tmp_path / "order.txt"))
    assert torch.equal(model.backbone.fc.weight, authors.fc.weight.flip(0))
    assert torch.equal(model.backbone.fc.bias, authors.fc.bias.flip(0))


@torch.no_grad()
def test_with_two_branches_the_first_two_of_three_are_used(authors, data, tmp_path):
    info = "image_root: images\ndefaults: {model_kwargs: {zero_init_last: false}, branches: 2, img_size: 64}\n"
    (data / "info.yaml").write_text(info)
    model, _ = convert(write_released(authors, tmp_path / "best.pth.tar"), data, tmp_path / "out")
    images = torch.randn(2, 3, 64, 64)
    pooled = authors.finalBlock(authors.map(images)).mean((2, 3)).unflatten(1, (3, 2048))[:, :2]
    torch.testing.assert_close(model(images)[:, :, ORDER], authors.fc(pooled).movedim(1, 0), rtol=0, atol=1e-4)


class AuthorsExperts(nn.Module):
    """Shared stem, layer1, layer2; layers 3 and 4 of reduced width, the extra block and the classifier per expert."""

    def __init__(self, classes: int, experts: int = 2):
        super().__init__()
        shared = torchvision.models.resnet50()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
            self.add_module(name, getattr(shared, name))
        self.layer3s, self.layer4s, self.ResLTBlocks, self.linears = (nn.ModuleList() for _ in range(4))
        for _ in range(experts):
            resnet = torchvision.models.resnet50()
            resnet.inplanes = 512
            self.layer3s.append(resnet._make_layer(type(resnet.layer3[0]), 192, 6, stride=2))
            self.layer4s.append(resnet._make_layer(type(resnet.layer3[0]), 384, 3, stride=2))
            self.ResLTBlocks.append(
                nn.Sequential(nn.Conv2d(1536, 4608, 1, bias=False), nn.BatchNorm2d(4608), nn.ReLU())
            )
            self.linears.append(nn.Linear(1536, classes))


@torch.no_grad()
def test_an_expert_checkpoint_gives_the_mean_of_its_experts(data, tmp_path):
    torch.manual_seed(0)
    authors = randomize(AuthorsExperts(len(COUNTS)))
    file = write_released(authors, tmp_path / "experts.pth.tar")
    model, found = convert(file, data, tmp_path / "out", "--model", "resnet50")
    assert (found.config()["experts"], found.config()["expert_width"]) == (2, 0.75)
    images = torch.randn(2, 3, 64, 64)
    x = authors.layer2(authors.layer1(authors.maxpool(authors.relu(authors.bn1(authors.conv1(images))))))
    for e in range(2):
        features = authors.ResLTBlocks[e](authors.layer4s[e](authors.layer3s[e](x)))
        by_hand = authors.linears[e](features.mean((2, 3)).unflatten(1, (3, 1536))).movedim(1, 0)
        torch.testing.assert_close(model(images)[e][:, :, ORDER], by_hand, rtol=0, atol=1e-4)


def test_a_released_file_evaluates_like_its_conversion(authors, data, tmp_path, run_script):
    file = write_released(authors, tmp_path / "best.pth.tar")
    convert(file, data, tmp_path / "converted")
    common = ["--eval-branch-at", "pooled", "--tau", 0.7, "--workers", 0]
    stated = ["--format", "released", "--model", "resnext50_32x4d", "--data", data]
    direct = run_script("evaluate", "--ckpt", file, *stated, *common, "--output", tmp_path / "direct")
    assert direct.code == 0, direct.err
    again = run_script("evaluate", "--ckpt", tmp_path / "converted", *common, "--output", tmp_path / "again")
    assert again.code == 0, again.err
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("direct", "again")]
    assert results[0] == results[1]
    assert (results[0]["tau"], results[0]["eval_branch_at"], results[0]["epoch"]) == (0.7, "pooled", 180)


class Harmful:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, {}, "there is no such file"),
        ({"state_dict": {"x": Harmful()}}, {}, "not readable as a checkpoint of tensors only"),
        ([1], {}, "it contains no state_dict"),
        ({"state_dict": {"conv1.weight": torch.zeros(3)}}, {}, "it contains no classifier"),
        ({"state_dict": {"fc.weight": torch.zeros(7, 2048)}}, {}, "it has 7 classes, but .* has 5"),
        (
            {"state_dict": {"fc.weight": torch.zeros(5, 9)}},
            {},
            r"does not fit resnext50_32x4d; it lacks backbone\.bn1\.bias",
        ),
        (
            {"state_dict": {"fc.weight": torch.zeros(5, 9)}},
            {"--model": None},
            "does not state its model; give it with --model",
        ),
        ({"state_dict": {"fc.weight": torch.zeros(5, 9)}}, {"--class-order": "0 1 2 3 3"}, "are not an order of 0..4"),
        ({"state_dict": {"fc.weight": torch.zeros(5, 9)}}, {"--class-order": "a b"}, "one class index per line"),
    ],
)
def test_a_file_that_cannot_be_imported_is_the_users_error(data, tmp_path, run_script, content, flags, message):
    file = tmp_path / "bad.pth.tar"
    if content is not None:
        torch.save(content, file)
    flags = {"--model": "resnext50_32x4d", "--data": data} | flags
    if "--class-order" in flags:
        (tmp_path / "order.txt").write_text(flags["--class-order"])
        flags["--class-order"] = tmp_path / "order.txt"
    stated = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
    outcome = run_script("evaluate", "--ckpt", file, "--format", "released", *stated)
    assert outcome.code == 2
    assert "executed" not in outcome.out
    assert re.search(message, outcome.err), outcome.err


def test_another_backbone_is_refused_with_the_weight_that_does_not_fit(authors, data, tmp_path, run_script):
    file = write_released(authors, tmp_path / "best.pth.tar")
    stated = ["--format", "released", "--data", data, "--model"]
    outcome = run_script("evaluate", "--ckpt", file, *stated, "resnet50")
    assert outcome.code == 2
    assert "needs" in outcome.err
    assert "is --model right?" in outcome.err
    outcome = run_script("evaluate", "--ckpt", file, *stated, "resnet18")
    assert outcome.code == 2
    assert "which the model lacks" in outcome.err
