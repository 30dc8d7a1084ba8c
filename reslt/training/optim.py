"""Optimizer and schedule from timm's factories, with the paper's conventions converted to timm's."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3

from reslt.config.schema import OptimSettings
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean


def create_optimizer(
    optim: OptimSettings, model: torch.nn.Module | list[dict], mixed_precision: str | None = None
) -> torch.optim.Optimizer:
    """Return timm's optimizer for a model, or for parameter groups. Weight decay applies to ALL parameters, including
    BatchNorm and biases (timm excludes these by default), unless a group states another. Frozen parameters have no gradient
    and do not change.

    Raises UserError for an optimizer that timm does not have."""
    kwargs = {"nesterov": optim.nesterov} if optim.sgd_variant else {}  # timm's "sgd" has it on by default
    first = next(model.parameters()) if isinstance(model, torch.nn.Module) else model[0]["params"][0]
    if optim.opt.lower() == "sgd" and mixed_precision != "fp16" and first.device.type == "cuda":
        # One kernel, and a learning rate that a CUDA graph can read from the device. (Under fp16, if the loss scaler
        # skipped the first step, momentum would be left uninitialized.)
        kwargs["fused"] = True
    try:
        return create_optimizer_v2(
            model,
            opt=optim.opt,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            filter_bias_and_bn=False,
            **kwargs,
        )
    except (ValueError, TypeError, AssertionError) as fault:
        raise UserError(f"--opt {optim.opt}: {fault}{did_you_mean(optim.opt, list_optimizers())}") from None


def create_scheduler(optim: OptimSettings, optimizer: torch.optim.Optimizer) -> Scheduler:
    """Return a scheduler. Its `step(epoch)` sets the learning rate of that epoch (from 0):

      epoch < W:  warmup_lr (1 - f) + lr f,  f = (epoch + 1) / W     so the warm-up's last epoch is at the peak
      multistep:  lr decay_rate^(number of milestones <= epoch)
      cosine:     min_lr + (lr - min_lr) (1 + cos(pi (epoch - o) / (E - o))) / 2,  o = max(W - 1, 0)

    timm counts a warm-up from its first rate and omits the last, and its multistep decays one epoch early."""
    warm = max(optim.warmup_epochs - 1, 0)
    first = optim.warmup_lr + (optim.lr - optim.warmup_lr) / max(optim.warmup_epochs, 1)
    if optim.sched == "multistep":
        milestones = [epoch + 1 for epoch in optim.decay_milestones]
        return MultiStepLRScheduler(
            optimizer,
            decay_t=milestones,
            decay_rate=optim.decay_rate,
            warmup_t=warm,
            warmup_lr_init=first,
            warmup_prefix=False,
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=max(optim.epochs - warm, 2),  # timm warns at 1; the rate is the peak either way
        lr_min=optim.min_lr,
        warmup_t=warm,
        warmup_lr_init=first,
        warmup_prefix=True,
    )


def create_ema(optim: OptimSettings, model: torch.nn.Module) -> ModelEmaV3 | None:
    """Return timm's moving average of weights and buffers, if the settings ask for one."""
    return ModelEmaV3(model, decay=optim.model_ema_decay) if optim.model_ema else None
