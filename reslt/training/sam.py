"""Sharpness-aware minimization: the gradient at weights where the loss is higher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST_NORM = 1e-12  # added to the gradient's norm, as published: a gradient of 0 moves no weight


class SharpnessAware:
    """The perturbation of sharpness-aware minimization (Foret et al. 2021, Algorithm 1): weights w and gradient g of the
    global batch -> w + rho g / |g|, with one norm over all trained parameters. The factor of fp16's loss scaler cancels."""

    def __init__(self, model: torch.nn.Module, loss_fn: torch.nn.Module, rho: float):
        """`model`, `loss_fn`: those in training; `rho`: the distance. Allocates a second copy of the trained weights."""
        self.rho = rho
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept = [torch.empty_like(parameter, requires_grad=False) for parameter in self.parameters]
        modules = (*model.modules(), *loss_fn.modules())
        self.counting = [module for module in modules if getattr(module, "track_running_stats", False)]

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Within the block, the weights are perturbed along their gradients, which are overwritten, and no statistics are
        counted: `track_running_stats` is off for every module in training mode that has it (BatchNorm, counting heads and
        losses). After the block, the weights are restored bit by bit. No synchronization."""
        counting = [module for module in self.counting if module.training]
        self._perturb()
        for module in counting:
            module.track_running_stats = False
        try:
            yield
        finally:
            for module in counting:
                module.track_running_stats = True
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.kept)

    @torch.no_grad()
    def _perturb(self) -> None:
        torch._foreach_copy_(self.kept, self.parameters)
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        steps = [parameter.grad for parameter in moved]
        norm = torch.nn.utils.get_total_norm(steps)
        torch._foreach_mul_(steps, self.rho / (norm + LEAST_NORM))
        torch._foreach_add_(moved, steps)
