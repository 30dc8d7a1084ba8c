"""The assembly of what a run trains with: optimizer, schedule, moving average, the prepared model and its step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler

from reslt.augment.mixing import Mixing
from reslt.config.schema import OptimSettings, RunSettings
from reslt.core.batch_shard import BatchShard
from reslt.core.cache import cache_folder, make_writable
from reslt.core.log import warn_once
from reslt.training.cuda_graph import step_kind
from reslt.training.optim import create_ema, create_optimizer, create_scheduler
from reslt.training.state import TrainState
from reslt.training.step import TrainStep


@dataclass(frozen=True)
class Training:
    """The state that is checkpointed, the step that changes it, and the schedule of its learning rate."""

    state: TrainState
    step: TrainStep
    scheduler: Scheduler


def prepare_training(
    model: torch.nn.Module,
    loss_fn: torch.nn.Module,
    optim: OptimSettings,
    run: RunSettings,
    accelerator: Accelerator,
    shard: BatchShard,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    mixing: Mixing | None = None,
    is_resident: bool = False,
) -> Training:
    """Create everything that trains a model, which is on its device already. `normalize`: for the loader's images;
    `is_resident`: whether they are on the device. Raises UserError for an optimizer that timm does not have."""
    optimizer = create_optimizer(optim, model, run.mixed_precision)
    scheduler = create_scheduler(optim, optimizer)
    ema = create_ema(optim, model)
    if run.torchcompile:
        compile_model(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    kind = step_kind(run.cuda_graph, accelerator, optimizer, shard.micro_batches, is_resident)
    step = kind(
        model=prepared,
        loss_fn=loss_fn.to(accelerator.device),
        optimizer=optimizer,
        accelerator=accelerator,
        shard=shard,
        normalize=normalize,
        seed=run.seed,
        mixing=mixing,
        clip_grad=optim.clip_grad,
    )
    return Training(TrainState(model, ema, optimizer, accelerator.scaler), step, scheduler)


def compile_model(model: torch.nn.Module) -> None:
    """Apply torch.compile, in place. Its cache is next to the other ones: torch's own place, which is used if that cannot
    be written, is lost at a reboot."""
    if (cache := cache_folder()) is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        compiled = cache / "compiled"
        try:
            make_writable(compiled)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)
        except OSError as fault:
            warn_once("compiled", f"{compiled}: compiled code cannot be kept there ({fault.strerror})")
    model.compile()
