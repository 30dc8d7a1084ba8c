"""Losses of features, beside that of the logits."""

import pytest
import torch

from reslt.config.parts import PARTS, Part
from reslt.config.schema import Config
from reslt.methods.losses import LossWithFeatures
from reslt.methods.registry import create_loss
from reslt.models.create import create_model
from reslt.models.featured import Featured

TINY = dict(model="cifar_resnet20", model_kwargs={"channels": [4, 4, 8]})


class SquaredNorm(torch.nn.Module):
    """A made-up feature loss: the sum over images of label times squared norm."""

    def forward(self, features, labels):
        return (labels * features.square().sum(-1)).sum()


@pytest.mark.parametrize(("experts", "reduction", "share"), [(1, "sum", 1.0), (2, "sum", 1.0), (2, "mean", 0.5)])
def test_a_feature_loss_sees_what_enters_the_classifier_and_is_combined_as_the_experts_losses(
    experts, reduction, share, monkeypatch
):
    monkeypatch.setitem(PARTS["feature_loss"], "norm", Part("made up", build=lambda: SquaredNorm()))
    config = Config.of(
        **TINY, method="ce", experts=experts, expert_loss=reduction, feature_loss="norm", feature_loss_weight=3.0
    )
    torch.manual_seed(0)
    model = create_model(config.model, config.method, 3).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    counts = torch.tensor([4, 2, 1]).numpy()
    model.gives_features = True
    featured = model(images)
    assert isinstance(featured, Featured)
    loss = create_loss(config.method, counts, experts, model=model)
    plain = create_loss(Config.of(**TINY, method="ce", experts=experts, expert_loss=reduction).method, counts, experts)
    assert isinstance(loss, LossWithFeatures)
    of_features = (labels * featured.features.square().sum(-1)).sum()
    wanted = plain(featured.branch_logits, labels) + 3.0 * share * of_features
    torch.testing.assert_close(loss(featured, labels), wanted)
    model.eval()
    assert isinstance(model(images), torch.Tensor)
