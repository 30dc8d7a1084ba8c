"""The state that a run saves to resume, as tensors and JSON, and the statistics of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3, distribute_bn

from reslt.core.errors import UserError
from reslt.core.waiting import Wait


@dataclass(frozen=True)
class EpochStats:
    """Means over one epoch of training."""

    loss: float
    accuracy: float  # of the fused prediction on the augmented training images, in percent; NaN if they are mixed
    images_per_second: float
    waiting: float  # fraction of the time spent waiting for data, 0..1


@dataclass
class Progress:
    """The progress of a run: the epoch, and the sums over its steps so far."""

    epoch: int = 0  # from 0
    steps: int = 0  # completed steps of this epoch
    loss_sums: list[float] = field(default_factory=list)  # of each process, over these steps
    hits: list[float] = field(default_factory=list)  # of each process: fused prediction, augmented training images
    images: int = 0  # of all processes
    seconds: float = 0.0
    waited: float = 0.0  # of these seconds, for data

    def own_sums(self, rank: int, processes: int) -> tuple[float, float]:
        """Return the sums of loss and hits that a process continues: its own; if the number of processes has changed,
        the first one takes all."""
        if len(self.loss_sums) == processes:
            return self.loss_sums[rank], self.hits[rank]
        return (sum(self.loss_sums), sum(self.hits)) if rank == 0 else (0.0, 0.0)

    def stats(self, is_mixed: bool) -> EpochStats:
        """Return the means over these steps; there is no accuracy on mixed images."""
        seconds = max(self.seconds, 1e-9)
        return EpochStats(
            loss=sum(self.loss_sums) / max(self.steps, 1),
            accuracy=float("nan") if is_mixed else 100 * sum(self.hits) / max(self.images, 1),
            images_per_second=self.images / seconds,
            waiting=self.waited / seconds,
        )


@dataclass
class TrainState:
    """Model, moving average, optimizer, and the loss scaler of fp16."""

    model: torch.nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model to evaluate: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def saved(self, accelerator: Accelerator) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        """Return {'model' | 'optimizer' | 'ema' | 'processes': named tensors}, and everything else, for JSON. Called on all
        processes.

        Each process has its own running statistics of BatchNorm. The saved model has their mean over the processes;
        'processes' contains those of each process, so that the same number of processes can resume with their own."""
        optimizer = self.optimizer.state_dict()
        tensors = {name: dict(module.state_dict()) for name, module in self._modules().items()} | {"optimizer": {}}
        if accelerator.num_processes > 1 and (statistics := self._statistics()):
            sizes = [tensor.numel() for _, _, tensor in statistics]
            with Wait("the other processes to save"):
                own = torch.cat([tensor.flatten() for _, _, tensor in statistics])
                of_all = accelerator.gather(own[None])  # (R, n)
            tensors["processes"] = {"statistics": of_all}
            for (part, name, tensor), mean in zip(statistics, of_all.mean(0).split(sizes), strict=True):
                tensors[part][name] = mean.view_as(tensor)
        per_parameter = {i: _without_tensors(v, tensors["optimizer"], str(i)) for i, v in optimizer["state"].items()}
        groups = [
            _without_tensors(g, tensors["optimizer"], f"group{i}") for i, g in enumerate(optimizer["param_groups"])
        ]
        return tensors, {
            "optimizer": {"state": per_parameter, "param_groups": groups},  # a group of LAMB counts steps in a tensor
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def restore(self, checkpoint, accelerator: Accelerator) -> None:
        """Restore a `reslt.runs.checkpoint.Checkpoint`. Raises UserError if it does not fit."""
        try:
            self._restore(checkpoint, accelerator)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as fault:
            raise UserError(
                f"--resume: {checkpoint.folder} does not fit this model and optimizer: {type(fault).__name__}: {fault}"
            ) from None

    def _restore(self, checkpoint, accelerator: Accelerator) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(checkpoint.tensors(name))
        statistics = self._statistics()
        if accelerator.num_processes > 1 and statistics and checkpoint.has("processes"):
            of_all = checkpoint.tensors("processes")["statistics"]
            if len(of_all) == accelerator.num_processes:
                sizes = [tensor.numel() for _, _, tensor in statistics]
                own = of_all[accelerator.process_index].split(sizes)
                for (_, _, tensor), value in zip(statistics, own, strict=True):
                    tensor.copy_(value.view_as(tensor))
        tensors = checkpoint.tensors("optimizer")
        saved = checkpoint.state["optimizer"]
        values = {int(index): _with_tensors(of_parameter, tensors) for index, of_parameter in saved["state"].items()}
        # The choice of kernels depends on the present device, not on that of the checkpoint.
        own = [{k: g[k] for k in ("foreach", "fused") if k in g} for g in self.optimizer.state_dict()["param_groups"]]
        groups = [group | kind for group, kind in zip(_with_tensors(saved["param_groups"], tensors), own, strict=True)]
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})
        for parameter, state in getattr(self.optimizer, "state", {}).items():  # in the parameter's memory layout again
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if self.scaler is not None and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])

    @contextmanager
    def for_evaluation(self, processes: int) -> Iterator[torch.nn.Module]:
        """Yield the model to evaluate, with BatchNorm's statistics averaged over processes. They are restored after the
        block, so evaluations do not change training."""
        with self.averaged_statistics(processes):
            yield self.evaluated

    @contextmanager
    def averaged_statistics(self, processes: int) -> Iterator[None]:
        """Within the block, all processes have the mean of their BatchNorm statistics. After it, each has its own again."""
        if processes == 1:
            yield
            return
        own = [(tensor, tensor.clone()) for _, _, tensor in self._statistics()]
        with Wait("the other processes to evaluate"):
            for module in self._modules().values():
                distribute_bn(module, processes, reduce=True)
        try:
            yield
        finally:
            for tensor, before in own:
                tensor.copy_(before)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model} | ({"ema": self.ema.module} if self.ema else {})

    def _statistics(self) -> list[tuple[str, str, torch.Tensor]]:
        """Return (part, name, tensor) of BatchNorm's running means and variances."""
        return [
            (part, name, buffer)
            for part, module in self._modules().items()
            for name, buffer in module.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        ]


def _without_tensors(value, tensors: dict[str, torch.Tensor], place: str):
    """Nested optimizer state -> the same for JSON, with each tensor moved into `tensors` under the name of its place."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, dict):
        return {key: _without_tensors(v, tensors, f"{place}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, tensors, f"{place}.{i}") for i, v in enumerate(value)]
    return value


def _with_tensors(value, tensors: dict[str, torch.Tensor]):
    """Nested optimizer state from JSON -> the same with its `tensors` inserted: the inverse of `_without_tensors`."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(v, tensors) for key, v in value.items()}
    return [_with_tensors(v, tensors) for v in value] if isinstance(value, list) else value
