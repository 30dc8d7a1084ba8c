"""A model on its device: memory layout, synchronized BatchNorm."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm

from reslt.core.errors import UserError


def place(model: torch.nn.Module, sync_bn: bool, channels_last: bool, accelerator: Accelerator) -> torch.nn.Module:
    """Return the model on the accelerator's device, in the requested layout. Raises UserError for sync_bn on a CPU."""
    model = synchronize_batch_norm(model, accelerator) if sync_bn else model
    layout = torch.channels_last if channels_last else torch.preserve_format
    return model.to(device=accelerator.device, memory_format=layout)


def synchronize_batch_norm(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Return the model with BatchNorm over the images of all processes. Raises UserError on a CPU: torch has none."""
    if accelerator.device.type == "cpu":
        raise UserError("--sync-bn: it requires GPUs, and this run is on the CPU; drop it")
    return convert_sync_batchnorm(model)
