"""Early exits, after ELF (Duggal et al. 2020): a ResNet with a classifier after every stage. Easier images leave early.

ELF's authors published no code. Three choices are this suite's: there is an exit after every stage; an exit is pooling and
one classifier; and the confidence at which an image leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from reslt.models.router import Routed, experts_used


class Exited(Routed):
    """The logits of E exits, (E, 1, N, C), and for all exits but the last, (E - 1, N), the confidence at which an image
    leaves minus its largest probability: the image asks for the next exit if this is 0 or more."""

    __slots__ = ()


class Exits(nn.Module):
    """A ResNet with classifiers on the pooled maps of its stages: `exits` on all but the last, its own on the last."""

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
        """(N, 3, H, W) -> (E, 1, N, C) logits of the exits; in training, the result of `route`."""
        return self.route(images) if self.training else self._logits(images)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        last, maps = self.backbone.forward_intermediates(images, indices=list(range(1, len(self.exits) + 1)))
        early = [classify(one.mean((2, 3))) for classify, one in zip(self.exits, maps, strict=True)]
        return torch.stack([*early, self.backbone.forward_head(last)])[:, None]

    def route(self, images: torch.Tensor) -> Exited:
        """(N, 3, H, W) -> the logits of the exits, and whether an image asks for the next one."""
        logits = self._logits(images)
        largest = logits[:-1, 0].detach().float().softmax(-1).amax(-1)
        return Exited(logits, self.confidence - largest)


def exited_logits(fused: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
    """(E, N, C) logits of exits, (E - 1, N) as in `Exited` -> (N, C) logits of the first confident exit, or of the last."""
    used = experts_used(asks) - 1
    return fused.gather(0, used[None, :, None].expand(1, *fused.shape[1:]))[0]
