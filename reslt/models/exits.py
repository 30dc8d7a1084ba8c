"""Early exits, after ELF (Duggal et al. 2020): a ResNet with a classifier after every stage, the easier images leave early.

ELF's authors published no code: that there is an exit after every stage, that it is pooling and one classifier, and the
confidence at which an image leaves, are choices of this suite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from reslt.models.router import Routed, experts_used


class Exited(Routed):
    """The logits of E exits, (E, 1, N, C), and for each but the last of them (E - 1, N) how far the largest probability is
    below the confidence that lets an image leave: it asks for the next exit if that is 0 or more."""

    __slots__ = ()


class Exits(nn.Module):
    """A ResNet with classifiers on the pooled maps of its stages: `exits`, of those before the last, and its own."""

    is_routed = True  # in evaluation, the first confident exit predicts
    branches = None

    def __init__(self, backbone: nn.Module, exits: Sequence[nn.Module], confidence: float):
        """`confidence`: the probability above which an exit predicts."""
        super().__init__()
        self.backbone, self.exits, self.confidence = backbone, nn.ModuleList(exits), confidence

    @property
    def logits_per_image(self) -> tuple[int, int]:
        """(E, 1)."""
        return (len(self.exits) + 1, 1)

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifier of each exit."""
        return [*self.exits, self.backbone.get_classifier()]

    def forward(self, images: torch.Tensor) -> torch.Tensor | Exited:
        """(N, 3, H, W) -> (E, 1, N, C) logits of the exits; in training as `route`."""
        return self.route(images) if self.training else self._logits(images)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        last, maps = self.backbone.forward_intermediates(images, indices=list(range(1, len(self.exits) + 1)))
        early = [classify(one.mean((2, 3))) for classify, one in zip(self.exits, maps, strict=True)]
        return torch.stack([*early, self.backbone.forward_head(last)])[:, None]

    def route(self, images: torch.Tensor) -> Exited:
        """(N, 3, H, W) -> the logits of the exits, and which of them an image leaves unconvinced."""
        logits = self._logits(images)
        largest = logits[:-1, 0].detach().float().softmax(-1).amax(-1)
        return Exited(logits, self.confidence - largest)


def exited_logits(fused: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
    """(E, N, C) logits of exits, (E - 1, N) as in `Exited` -> (N, C), of the first exit that is confident, or the last."""
    used = experts_used(asks) - 1
    return fused.gather(0, used[None, :, None].expand(1, *fused.shape[1:]))[0]
