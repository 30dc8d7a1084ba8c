"""OLTR: attention compared with its formula, and runs whose second stage turns on attention and meta-embedding."""

import math
from pathlib import Path

import pytest
import torch
from builders import ONE, Batches, model_of
from conftest import make_dataset, train_once
from safetensors.torch import load_file

from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.deploy.timm_folder import TimmModel
from reslt.evaluation.evaluate import set_centroids
from reslt.models.branches import ModulatedAttention
from reslt.models.create import check_forward
from reslt.models.fold import fold
from reslt.reproduce.first_stage import share_first_stages
from reslt.reproduce.rows import of_recipes
from reslt.training.trained_parts import parameters_of

TINY = {"model": "cifar_resnet20", "model_kwargs": {"channels": (4, 4, 6)}, "img_size": 16}
ADDED = {f"backbone.fc.{name}" for name in ("rows", "centroids", "selector.weight", "selector.bias")}


def softmax(values: list[float]) -> list[float]:
    return [math.exp(v) / sum(map(math.exp, values)) for v in values]


def linear(layer: torch.nn.Module, values: list[float]) -> list[float]:
    biases = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    rows = zip(layer.weight.flatten(1).tolist(), biases.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, values, strict=True)) + bias for row, bias in rows]


@torch.no_grad()
def test_attention_adds_a_non_local_map_times_a_share_of_each_position():
    torch.manual_seed(0)
    attention = ModulatedAttention(4, 6).double()
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    assert torch.equal(attention(x), x[None])  # its last convolution is initialized to 0
    for layer in (attention.out, attention.value, attention.query, attention.key):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    for image, found in zip(x, attention(x)[0], strict=True):
        positions = image.flatten(1).T.tolist()  # 6 of 4 channels
        value, query, key = (
            [linear(conv, p) for p in positions] for conv in (attention.value, attention.query, attention.key)
        )
        share = softmax(linear(attention.spatial, image.flatten().tolist()))
        for i, of_position in enumerate(found.flatten(1).T.tolist()):
            near = softmax([sum(a * b for a, b in zip(query[i], other, strict=True)) for other in key])
            mixed = [sum(n * v[d] for n, v in zip(near, value, strict=True)) for d in range(2)]
            mask = linear(attention.out, mixed)
            assert of_position == pytest.approx([p + share[i] * m for p, m in zip(positions[i], mask, strict=True)])


@torch.no_grad()
def test_the_network_is_the_plain_one_until_its_centroids_are_set():
    plain, oltr = (model_of(Config.of(**TINY, method=method), 3).eval() for method in ("ce", "oltr"))
    _, unexpected = oltr.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 3, 16, 16)
    assert not unexpected
    assert torch.equal(oltr(images), plain(images))
    set_centroids(oltr, Batches((images, torch.tensor([0, 1]))), ONE)
    assert (oltr(images) - plain(images)).abs().max() > 0.1
    every = {name for name, parameter in oltr.named_parameters() if parameter in parameters_of(oltr, "all")}
    assert every == dict(plain.named_parameters()).keys()
    of_classifier = parameters_of(oltr, "classifier")
    assert oltr.classifiers[0].centroids not in of_classifier  # the loss of the logits has no gradient for them


def test_centroids_are_the_class_means_of_features():
    model = model_of(Config.of(**TINY, method="oltr"), 3)
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 2, 0, 0, 2])
    set_centroids(model, Batches((images[:3], labels[:3]), (images[3:], labels[3:])), ONE)
    with torch.no_grad():
        features = model.eval().pooled(images)
    wanted = [sum(features[i] for i in of_class) / len(of_class) for of_class in ([0, 2, 3], [1, 4])]
    centroids = model.classifiers[0].centroids
    torch.testing.assert_close(centroids.detach()[[0, 2]], torch.stack(wanted))
    assert not centroids[1].any()  # a class without images


def test_attention_works_with_one_input_size_and_cannot_be_exported_to_timm():
    model = model_of(Config.of(**TINY, method="ce", network="attention"), 3)
    check_forward(model, 16, 3)
    with pytest.raises(UserError, match="does not work with 24 x 24 pixel inputs"):
        check_forward(model, 24, 3)
    folded, how = fold(model.eval(), 16)
    assert how.startswith("not folded: attention on the feature map")
    with pytest.raises(UserError, match="it cannot express attention on the feature map; export it with --format onnx"):
        TimmModel.of(folded, {"model_kwargs": {}, "img_size": 16})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("oltr") / "tiny")


def weights(run: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / "model.safetensors")


def test_the_first_stage_is_cross_entropy_and_the_second_starts_from_class_means(data, run_script):
    ce = weights(train_once(run_script, data, "ce", "--method", "ce", "--epochs", 1), "1-3")
    run = train_once(run_script, data, "oltr", "--method", "oltr", "--epochs", 1, "--stage2-epochs", 1)
    first, second = weights(run, "1-3"), weights(run, "2-6")
    assert all(torch.equal(first[name], tensor) for name, tensor in ce.items())
    assert (first["backbone.fc.is_begun"], second["backbone.fc.is_begun"]) == (0, 1)
    assert not first["branches.out.weight"].any()
    assert not first["backbone.fc.centroids"].any()
    assert second["backbone.fc.centroids"].any(1).all()
    assert all(not torch.equal(first[name], second[name]) for name in {*ADDED, "branches.out.weight"})
    evaluated = run_script("evaluate", "--ckpt", run, "--data", data)
    assert evaluated.code == 0, evaluated.err
    row = next(line for line in evaluated.out.splitlines() if line.startswith("oltr"))
    assert row in (run / "train.log").read_text()


def test_its_second_stage_can_start_from_a_run_of_cross_entropy(data, run_script):
    ce = train_once(run_script, data, "ce", "--method", "ce", "--epochs", 1)
    from_it = ("--method", "oltr", "--init-from", ce, "--epochs", 0, "--stage2-epochs", 1, "--stage2-lr", 1e-9)
    found = weights(train_once(run_script, data, "from ce", *from_it), "1-3")
    for name, tensor in weights(ce, "1-3").items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(found[name], tensor)
    assert found["backbone.fc.is_begun"] == 1


def test_reproduce_shares_the_first_stage_of_oltr_with_cross_entropy(tmp_path):
    rows, _ = of_recipes(["digits_lt/oltr"]).rows([0], str(tmp_path), [], {})
    [row] = share_first_stages(rows, str(tmp_path), [])
    assert row.runs[0].first_stage.recipe == "digits_lt/ce"
    assert row.runs[0].config.optim.epochs == 0
