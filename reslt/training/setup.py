"""Optimizer, schedule, moving average, prepared model and step of a run, assembled for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler

from reslt.augment.mixing import Mixing
from reslt.config.schema import OptimSettings, RunSettings
from reslt.config.stages import Stage
from reslt.core.batch_shard import BatchShard
from reslt.core.seeding import derive_seed
from reslt.methods.pairs import Pairing
from reslt.models.heads import reinitialize
from reslt.training.compiled import compile_model
from reslt.training.cuda_graph import step_kind
from reslt.training.gathering import show_features
from reslt.training.optim import create_ema, create_optimizer, create_scheduler
from reslt.training.state import TrainState
from reslt.training.step import TrainStep
from reslt.training.teachers import Teachers
from reslt.training.trained_parts import heads, parameter_groups, train_only

OF_A_HEAD = -3  # seeds the initialization of heads; the seeds of steps count from 0


@dataclass
class Training:
    """A model in training, on its device: the state that is checkpointed, and the step and learning rate schedule of the
    current stage. `normalize`: for the loader's images; `is_resident`: whether these are on the device; `held`: modules that
    stay in evaluation mode."""

    model: torch.nn.Module
    optim: OptimSettings
    run: RunSettings
    accelerator: Accelerator
    shard: BatchShard
    normalize: Callable[[torch.Tensor], torch.Tensor]
    is_resident: bool = False
    held: Sequence[torch.nn.Module] = ()
    teachers: Teachers | None = None
    stage: Stage | None = None
    state: TrainState = field(init=False)
    step: TrainStep = field(init=False)
    scheduler: Scheduler = field(init=False)
    prepared: torch.nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.frozen = {parameter for parameter in self.model.parameters() if not parameter.requires_grad}
        self.state = TrainState(self.model, create_ema(self.optim, self.model), None, None)
        if self.run.torchcompile:
            compile_model(self.model)

    def enter(
        self,
        stage: Stage,
        loss_fn: torch.nn.Module,
        mixing: Mixing | Pairing | None = None,
        is_resumed: bool = False,
    ) -> None:
        """Begin a stage, or, if `is_resumed`, prepare to restore a checkpoint that was written in it. Raises UserError for an
        optimizer that timm does not have, and for a part that the model lacks."""
        if "classifier" in stage.reinit and not is_resumed:
            for number, head in enumerate(heads(self.model)):
                reinitialize(head, stage.config.method, derive_seed(self.run.seed, stage.number, OF_A_HEAD - number))
        if self.stage is None or stage.is_fresh:
            self._renew(stage)
        if self.state.ema is not None and stage.ema == "restart" and not is_resumed:
            self.state.ema.set(self.model)  # without the weights of the stage before
        show_features(self.model, loss_fn, self.accelerator)
        kind = step_kind(
            self.run.cuda_graph, self.accelerator, self.state.optimizer, self.shard.micro_batches, self.is_resident
        )
        self.step = kind(
            model=self.prepared,
            loss_fn=loss_fn.to(self.accelerator.device),
            optimizer=self.state.optimizer,
            accelerator=self.accelerator,
            shard=self.shard,
            normalize=self.normalize,
            seed=self.run.seed,
            mixing=mixing,
            clip_grad=self.optim.clip_grad,
            fusion=stage.config.method.fusion,
            keeps_statistics=stage.bn == "eval",
            held=self.held,
            sam=stage.config.optim.sam,
            teachers=self.teachers,
        )
        self.stage = stage

    @property
    def trained(self) -> int:
        """The number of parameters that the current stage trains."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def schedule(self, epoch: int) -> None:
        """Set the learning rate of an epoch (of the run, from 0)."""
        self.scheduler.step(epoch - self.stage.schedule_begin)

    def _renew(self, stage: Stage) -> None:
        """Choose the parameters to train, and create their optimizer and schedule."""
        is_prepared = self.stage is not None and self.prepared is self.model
        if self.stage is not None:
            if not is_prepared:  # DDP is created again, for the parameters that now require gradients
                self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)  # autocast would wrap it twice
            self.accelerator.free_memory()
        trained = train_only(self.model, stage.train, self.frozen)
        groups = parameter_groups(self.model, trained, stage.config.optim)
        optimizer = create_optimizer(stage.config.optim, groups, self.run.mixed_precision)
        self.scheduler = create_scheduler(stage.config.optim, optimizer)
        if not is_prepared:  # Accelerate before 1.14 would wrap the model in autocast again
            self.prepared = self.accelerator.prepare(self.model)
        self.state.optimizer = self.accelerator.prepare(optimizer)
        self.state.scaler = self.accelerator.scaler
