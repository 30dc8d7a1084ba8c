"""The cost of inference with a model: parameters and multiply-adds, with and without branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reslt.models.contrastive import Projection
from reslt.models.reslt import ResLT


@dataclass(frozen=True)
class Complexity:
    """The cost of inference on one image."""

    parameters: int
    multiply_adds: int  # called FLOPs in the literature and in the paper

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.multiply_adds / 1e9:.3f} G multiply-adds"


@torch.no_grad()
def forward_counted(model: nn.Module, img_size: int) -> tuple[torch.Tensor, Complexity]:
    """Pass one image of zeros through a model in its current mode; return the output and the cost, as torch's own counter
    counts it (convolutions, matrix products). Parameters that only training uses are not counted."""
    like = next(model.parameters())
    of_training = {p for m in model.modules() if isinstance(m, Projection) for p in m.parameters()}
    parameters = sum(p.numel() for p in model.parameters() if p not in of_training)
    with FlopCounterMode(display=False) as counter:
        out = model(torch.zeros(1, 3, img_size, img_size, dtype=like.dtype, device=like.device))
    return out, Complexity(parameters, counter.get_total_flops() // 2)


def complexity(model: nn.Module, img_size: int) -> Complexity:
    """Return the complexity of a model in evaluation mode. Branches on the map and on the pooled features differ in cost;
    the ones that evaluation uses are counted."""
    training = model.training
    _, found = forward_counted(model.eval(), img_size)
    model.train(training)
    return found


def complexity_without_branches(model: nn.Module, img_size: int) -> Complexity:
    """Return the complexity of the plain model: the backbone, or the experts' backbones, with one pass of a classifier."""
    with_branches = [m for m in model.modules() if isinstance(m, ResLT) and m.branches is not None]
    taken = [m.branches for m in with_branches]
    try:
        for m in with_branches:
            m.branches = None
        return complexity(model, img_size)
    finally:
        for m, branches in zip(with_branches, taken, strict=True):
            m.branches = branches
