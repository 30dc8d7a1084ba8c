"""Several experts on one stem."""

import pytest
import torch
from conftest import TINY_FLAGS

from reslt.config import Config
from reslt.errors import UserError
from reslt.losses import ExpertsLoss, ResLTLoss, create_loss
from reslt.models.create import check_forward, create_model

TEN = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "zero_init_last": False}


def experts(count: int = 2, width: float = 0.75, **changes):
    torch.manual_seed(0)
    config = Config(model="resnet18", model_kwargs=TEN, experts=count, expert_width=width, branches=3, **changes)
    return create_model(config, 5)


@torch.no_grad()
def test_experts_share_the_early_stages_and_have_their_own_late_ones():
    """Widths 8, 16 shared; 24, 48 = 0.75 x 32, 64 an expert's own. An expert is the plain model's late half."""
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
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)  # each starts from weights of its own
    early = {name.split(".")[0] for name, _ in shared.named_parameters()}
    assert early == {"conv1", "bn1", "layer1", "layer2"}
    assert {name.split(".")[0] for name, _ in model.experts[0].backbone.named_parameters()} == {
        "layer3",
        "layer4",
        "fc",
    }


def test_the_loss_is_the_sum_over_experts_and_reaches_every_weight():
    config = Config(model="resnet18", model_kwargs=TEN, experts=2, alpha=0.9)
    loss_fn = create_loss(config, torch.tensor([50, 20, 9, 5, 2]).numpy())
    assert isinstance(loss_fn, ExpertsLoss)
    model, labels = experts(), torch.tensor([0, 3, 4])
    logits = model(torch.randn(3, 3, 32, 32))
    loss = loss_fn(logits, labels)
    assert isinstance(loss_fn.of_one, ResLTLoss)
    torch.testing.assert_close(loss, loss_fn.of_one(logits[0], labels) + loss_fn.of_one(logits[1], labels))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_each_experts_classifier_is_normalised_within_the_block_alone():
    model = experts().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with model.normalized_classifier(1.0):
        for expert in model.experts:
            torch.testing.assert_close(expert.backbone.fc.weight.norm(dim=1), torch.ones(5))
            assert not expert.backbone.fc.bias.any()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_model_without_such_stages_is_refused():
    with pytest.raises(UserError, match=r"--experts 2: convnext_atto is not a ResNet"):
        create_model(Config(model="convnext_atto", experts=2), 5)


def test_experts_train_and_evaluate_from_the_command_line(tiny, tmp_path, run_script):
    flags = [
        *TINY_FLAGS,
        "--model",
        "resnet18",
        "--model-kwargs",
        "layers=1,1,1,1",
        "channels=8,16,32,64",
        "--experts",
        2,
    ]
    outcome = run_script("train", "--data", tiny, *flags, "--img-size", 32, "--output", tmp_path, "--experiment", "run")
    assert outcome.code == 0, outcome.err
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "run")
    row = next(line for line in evaluated.out.splitlines() if line.startswith("reslt (fused)"))
    assert row in outcome.out
    refused = run_script("evaluate", "--ckpt", tmp_path / "run", "--fold", tmp_path / "x.safetensors")
    assert refused.code == 2
    assert "a model with experts is not folded" in refused.err


@torch.no_grad()
def test_the_prediction_averages_over_experts():
    """Two experts, one branch: logits (2, 0, 0) and (0, 3, 0) average to class 1; each alone, or a vote, could not tell."""
    from accelerate import Accelerator

    from reslt.engine import evaluate

    class Two(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[2.0, 0, 0], [0, 3.0, 0]]).view(2, 1, 1, 3).expand(2, 1, len(images), 3)

    class OneBatch:
        def __len__(self):
            return 1

        def epoch(self, epoch):
            yield torch.zeros(2, 3, 8, 8), torch.tensor([1, 0])

    accuracies = evaluate(Two(), OneBatch(), Accelerator(cpu=True), 3)
    assert accuracies.hits.tolist() == [[0, 1, 0]]
