"""The bilateral-branch network (BBN, Zhou et al. 2020): a ResNet with two last blocks, one for an image, one for its
partner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from reslt.models.heads import linear_classifier


class BBN(nn.Module):
    """A ResNet with two last blocks, the conventional and the rebalancing branch. Their feature maps are concatenated for
    the head, which has a classifier with twice as many inputs."""

    def __init__(self, backbone: nn.Module, twin: nn.Module, last_stage: str):
        """`backbone`: a ResNet, which loses its last block and gets a new classifier; `twin`: another ResNet, which gives
        its last block to the second branch; `last_stage`: the name of the stage that ends with the block, such as layer4."""
        super().__init__()
        stage = getattr(backbone, last_stage)
        self.last_block = f"{last_stage}.{len(stage) - 1}"  # its name in the backbone
        self.branches = nn.ModuleList([stage[-1], getattr(twin, last_stage)[-1]])
        del stage[-1]
        old = linear_classifier(backbone, "--network bbn")
        backbone.fc = nn.Linear(2 * old.in_features, old.out_features, bias=old.bias is not None)
        self.backbone = backbone

    @property
    def logits_per_image(self) -> tuple[int]:
        """(1,)."""
        return (1,)

    @property
    def classifiers(self) -> list[nn.Module]:
        """The only classifier."""
        return [self.backbone.get_classifier()]

    def forward(self, images: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        """(N, 3, H, W) normalized images, which both branches see -> (1, N, C) logits.

        Training on N pairs: (2 N, 3, H, W), the N first images and then their partners, (N,) the share lambda of each
        first image -> (1, N, C). A first image passes through branch 1, its partner through branch 2, and their maps are
        scaled by 2 lambda and 2 (1 - lambda). With lambda 0.5, a pair of equal images has the logits of the single image."""
        if shares is None:
            features = self.backbone.forward_features(images)
            maps = [branch(features) for branch in self.branches]
        else:
            streams = each_stream(self.backbone.forward_features, images).chunk(2)
            factors = 2 * shares, 2 * (1 - shares)
            maps = [
                (branch(features) * factor.view(-1, 1, 1, 1)).to(features.dtype)
                for branch, features, factor in zip(self.branches, streams, factors, strict=True)
            ]
        return self.backbone.forward_head(torch.cat(maps, dim=1))[None]


def each_stream(layers: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Pass the first images of N pairs and then their partners through layers, so that BatchNorm sees them separately:
    (2 N, ...) -> (2 N, ...)."""
    return torch.cat([layers(stream) for stream in inputs.chunk(2)])
