"""Several experts on one stem, as in RIDE: a ResNet with its last two stages, branches and classifier per expert."""

from __future__ import annotations

import inspect
import re

import torch
from torch import nn

from reslt.core.errors import UserError
from reslt.models.bbn import BBN, each_stream
from reslt.models.featured import Featured
from reslt.models.reslt import ResLT
from reslt.models.router import Routed, Router

LATE_STAGES = 2


class Experts(nn.Module):
    """`shared` ends after the early stages; each expert is a ResLT or BBN model whose backbone begins there. `router`:
    decides in evaluation how many experts predict for an image; its training stage alone sets `trains_router`."""

    def __init__(self, shared: nn.Module, experts: list[ResLT] | list[BBN], router: Router | None = None):
        super().__init__()
        self.shared, self.experts, self.router = shared, nn.ModuleList(experts), router
        self.used, self.trains_router = len(experts), False
        self.gives_features = False  # in training, for a loss that sees them

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

    def train(self, mode: bool = True) -> Experts:
        """Set training mode; while the router trains, the rest stays in evaluation mode, as it is in predictions."""
        super().train(mode)
        if mode and self.trains_router:
            self.shared.eval()
            self.experts.eval()
        return self

    @property
    def is_routed(self) -> bool:
        """Whether a router decides which of the experts in use predict."""
        return self.router is not None and self.used > 1

    def forward(self, images: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor | Routed | Featured:
        """(N, 3, H, W) -> (E, K, N, C) branch logits, whose sum over K, averaged over E, is the prediction of all experts.
        In training the router, as `route`; in training with `gives_features`, with the features of each expert.

        `shares`: of N pairs of images, for experts that are BBN models; see there."""
        if self.training and self.trains_router:
            return self.route(images)
        experts = list(self.experts)[: self.used]
        if shares is not None:
            features = each_stream(self.shared.forward_features, images)
            return torch.stack([expert(features, shares) for expert in experts])
        if self.training and self.gives_features:
            return self.with_features(images)
        features = self.shared.forward_features(images)
        return torch.stack([expert(features) for expert in experts])

    def with_features(self, images: torch.Tensor) -> Featured:
        """(N, 3, H, W) -> the branch logits and the features of all experts in use."""
        shared = self.shared.forward_features(images)
        of_each = [expert.with_features(shared) for expert in list(self.experts)[: self.used]]
        return Featured(*(torch.stack(parts) for parts in zip(*of_each, strict=True)))

    def route(self, images: torch.Tensor) -> Routed:
        """(N, 3, H, W) -> the branch logits of all experts in use, and the router's logits."""
        branch_logits, features = self.with_features(images)
        return Routed(branch_logits, self.router(branch_logits, features))


Network = ResLT | BBN | Experts  # as `create_model` returns


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
