"""Optimizer and schedule through timm's factories, with the paper's conventions converted to timm's."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3

from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean


def create_optimizer(c: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; weight decay on ALL parameters, BN and bias included (timm leaves those out by default)."""
    kwargs = {"nesterov": c.nesterov} if c.sgd_variant else {}  # timm's "sgd" has it on unless told
    if c.opt.lower() == "sgd" and c.mixed_precision != "fp16" and next(model.parameters()).device.type == "cuda":
        # One kernel, and a learning rate that a CUDA graph can read from the device. (Under fp16, a first step that the loss
        # scaler leaves out would leave its momentum as the memory was.)
        kwargs["fused"] = True
    try:
        return create_optimizer_v2(
            model,
            opt=c.opt,
            lr=c.lr,
            weight_decay=c.weight_decay,
            momentum=c.momentum,
            filter_bias_and_bn=False,
            **kwargs,
        )
    except (ValueError, TypeError, AssertionError) as fault:
        raise UserError(f"--opt {c.opt}: {fault}{did_you_mean(c.opt, list_optimizers())}") from None


def create_scheduler(c: Config, optimizer: torch.optim.Optimizer) -> Scheduler:
    """`scheduler.step(epoch)` sets the rate of that epoch (from 0):

      epoch < W:  warmup_lr (1 - f) + lr f,  f = (epoch + 1) / W     so the warm-up's last epoch is at the peak
      multistep:  lr decay_rate^(number of milestones <= epoch)
      cosine:     min_lr + (lr - min_lr) (1 + cos(pi (epoch - o) / (E - o))) / 2,  o = max(W - 1, 0)

    timm counts a warm-up from its first rate and leaves out the last, and its multistep decays one epoch early."""
    warm = max(c.warmup_epochs - 1, 0)
    first = c.warmup_lr + (c.lr - c.warmup_lr) / max(c.warmup_epochs, 1)
    if c.sched == "multistep":
        milestones = [epoch + 1 for epoch in c.decay_milestones]
        return MultiStepLRScheduler(
            optimizer,
            decay_t=milestones,
            decay_rate=c.decay_rate,
            warmup_t=warm,
            warmup_lr_init=first,
            warmup_prefix=False,
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=max(c.epochs - warm, 2),  # timm warns at 1, where the rate is the peak's either way
        lr_min=c.min_lr,
        warmup_t=warm,
        warmup_lr_init=first,
        warmup_prefix=True,
    )


def create_ema(c: Config, model: torch.nn.Module) -> ModelEmaV3 | None:
    """timm's moving average of weights and buffers, where the configuration asks for one."""
    return ModelEmaV3(model, decay=c.model_ema_decay) if c.model_ema else None
