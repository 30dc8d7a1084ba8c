"""Tensors of all processes, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator


class _Gathered(torch.autograd.Function):
    """(N, ...) of each process -> (R N, ...) of all; a process's gradient is the sum of what all of them computed for it."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        ctx.accelerator = accelerator
        return accelerator.gather(tensor.contiguous())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        accelerator = ctx.accelerator
        summed = accelerator.reduce(gradient.contiguous(), "sum")
        return summed.chunk(accelerator.num_processes)[accelerator.process_index], None


def gather_with_gradient(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function (N, ...) -> (R N, ...), the tensors of all R processes in their order."""
    return lambda tensor: _Gathered.apply(tensor, accelerator)
