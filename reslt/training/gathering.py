"""Gathering of tensors from all processes, through which gradients flow."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from reslt.methods.losses import LossWithFeatures
from reslt.models.experts import Network


class _Gathered(torch.autograd.Function):
    """(N, ...) of each process -> (R N, ...) of all R processes, in order of rank. A process's gradient is the sum of the
    gradients that all processes computed for its tensor.

    The backward pass communicates, as DDP does when a bucket of gradients is complete. The processes must communicate in
    the same order, or they would wait for each other forever. They do: the loss is the same sequence of operations for all
    images (no operation may branch on them), so autograd has the same nodes everywhere, and one thread per device runs
    those that are ready in the opposite order of their creation. Hooks of that same thread fill DDP's buckets, and both
    use one process group, which pairs collectives by their order."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        ctx.accelerator = accelerator
        return accelerator.gather(tensor.contiguous())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        accelerator = ctx.accelerator
        summed = accelerator.reduce(gradient.contiguous(), "sum")
        return summed.chunk(accelerator.num_processes)[accelerator.process_index], None


def show_features(model: Network, loss_fn: nn.Module, accelerator: Accelerator) -> None:
    """Let a network return its features in training if the loss uses them, and let the loss gather those of all processes."""
    model.gives_features = isinstance(loss_fn, LossWithFeatures)
    if model.gives_features and accelerator.num_processes > 1:
        loss_fn.gather = lambda tensor: _Gathered.apply(tensor, accelerator)
        loss_fn.processes = accelerator.num_processes
