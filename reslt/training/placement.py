"""Placement of a model on its device: memory layout and synchronized BatchNorm."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm

from reslt.core.errors import UserError


def place(model: torch.nn.Module, sync_bn: bool, channels_last: bool, accelerator: Accelerator) -> torch.nn.Module:
    """Return the model on the accelerator's device, in the requested memory layout; `sync_bn`: with BatchNorm over the images
    of all processes. Raises UserError for `sync_bn` on a CPU."""
    if sync_bn:
        if accelerator.device.type == "cpu":  # torch has no synchronized BatchNorm there
            raise UserError("--sync-bn: it requires GPUs, and this run is on the CPU; drop it")
        model = convert_sync_batchnorm(model)
    layout = torch.channels_last if channels_last else torch.preserve_format
    return model.to(device=accelerator.device, memory_format=layout)
