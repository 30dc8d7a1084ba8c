"""Several experts on one stem, as in RIDE: a ResNet with its last two stages, branches and classifier per expert."""

from __future__ import annotations

import inspect
import re

import torch
from torch import nn

from reslt.core.errors import UserError
from reslt.models.reslt import ResLT

LATE_STAGES = 2


class Experts(nn.Module):
    """`shared` ends after the early stages; each expert is a ResLT model whose backbone begins there."""

    def __init__(self, shared: nn.Module, experts: list[ResLT]):
        super().__init__()
        self.shared, self.experts = shared, nn.ModuleList(experts)
        self.used = len(experts)

    def use(self, count: int) -> None:
        """Predict with only the first `count` experts. Raises UserError if there are fewer."""
        if not 1 <= count <= len(self.experts):
            raise UserError(f"--use-experts {count}: give 1 to {len(self.experts)}, the model's number of experts")
        self.used = count

    @property
    def backbone(self) -> nn.Module:
        """A timm model of the requested kind."""
        return self.shared

    @property
    def logits_per_image(self) -> tuple[int, ...]:
        """(E, K), for the experts in use."""
        return (self.used, *self.experts[0].logits_per_image)

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifier of each expert in use."""
        return [expert.backbone.get_classifier() for expert in list(self.experts)[: self.used]]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (E, K, N, C) branch logits. The prediction is their sum over K, averaged over E."""
        features = self.shared.forward_features(images)
        return torch.stack([expert(features) for expert in list(self.experts)[: self.used]])


def stages(backbone: nn.Module) -> list[str]:
    """Return the names layer1, layer2, ... of the stages of timm's ResNet class or a CIFAR ResNet; [] for others."""
    names = [name for name, _ in backbone.named_children() if re.fullmatch(r"layer\d+", name)]
    takes_widths = "channels" in inspect.signature(type(backbone).__init__).parameters
    return names if len(names) > LATE_STAGES and takes_widths else []


def stage_widths(backbone: nn.Module) -> list[int]:
    """Return the base widths of a ResNet's stages, as timm's constructors take them in `channels`."""
    blocks = [getattr(backbone, name)[-1] for name in stages(backbone)]
    outs = {info["module"]: info["num_chs"] for info in backbone.feature_info}
    return [outs[name] // getattr(block, "expansion", 1) for name, block in zip(stages(backbone), blocks, strict=True)]


def keep_early(backbone: nn.Module) -> nn.Module:
    """Remove the last stages and the classifier from a ResNet: its `forward_features` ends after the early stages."""
    for name in [*stages(backbone)[-LATE_STAGES:], "fc"]:
        setattr(backbone, name, nn.Identity())
    return backbone


def keep_late(backbone: nn.Module) -> nn.Module:
    """Remove the stem and the early stages from a ResNet: its `forward_features` begins after them."""
    late = stages(backbone)[-LATE_STAGES:]
    for name, _ in list(backbone.named_children()):
        if name not in (*late, "global_pool", "fc", "drop"):
            setattr(backbone, name, nn.Identity())
    return backbone
