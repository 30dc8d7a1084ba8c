"""Tensors of all processes, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from reslt.methods.losses import LossWithFeatures
from reslt.models.experts import Network


class _Gathered(torch.autograd.Function):
    """(N, ...) of each process -> (R N, ...) of all; a process's gradient is the sum of what all of them computed for it.

    The backward pass communicates, as DDP does when a bucket of gradients is complete. Both orders must be the same on all
    processes, or each would wait for another's. They are: the loss is one sequence of operations whatever the images are
    (none may branch on them), so autograd has the same nodes everywhere, and one thread per device runs those that are
    ready in the opposite order of their creation. DDP's buckets are filled by hooks of that same thread, and both use one
    process group, which pairs collectives by their order."""

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


def show_features(model: Network, loss_fn: nn.Module, accelerator: Accelerator) -> None:
    """Let a network return its features in training if the loss sees them, and let the loss see those of all processes."""
    model.gives_features = isinstance(loss_fn, LossWithFeatures)
    if model.gives_features and accelerator.num_processes > 1:
        loss_fn.gather, loss_fn.processes = gather_with_gradient(accelerator), accelerator.num_processes
