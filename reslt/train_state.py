"""What a run must keep to go on, as tensors and JSON."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3


@dataclass
class TrainState:
    """Model, moving average, optimizer, the scaler of fp16."""

    model: torch.nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    num_classes: int

    @property
    def evaluated(self) -> torch.nn.Module:
        """The weights that count: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def saved(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        """{'model' | 'optimizer' | 'ema': named tensors}, and what is not tensors, for JSON."""
        optimizer = self.optimizer.state_dict()
        tensors = {"model": self.model.state_dict(), "optimizer": {}}
        if self.ema:
            tensors["ema"] = self.ema.module.state_dict()
        per_parameter = {i: _without_tensors(v, tensors["optimizer"], str(i)) for i, v in optimizer["state"].items()}
        return tensors, {
            "num_classes": self.num_classes,
            "optimizer": {"state": per_parameter, "param_groups": optimizer["param_groups"]},
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def restore(self, checkpoint) -> int:
        """Put a `Checkpoint` back. Returns how many epochs are done."""
        self.model.load_state_dict(checkpoint.tensors("model"))
        if self.ema:
            self.ema.module.load_state_dict(checkpoint.tensors("ema"))
        tensors = checkpoint.tensors("optimizer")
        saved = checkpoint.state["optimizer"]
        values = {int(index): _with_tensors(of_parameter, tensors) for index, of_parameter in saved["state"].items()}
        self.optimizer.load_state_dict({"state": values, "param_groups": saved["param_groups"]})
        if self.scaler is not None and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        return checkpoint.epochs_done


def _without_tensors(value, tensors: dict[str, torch.Tensor], place: str):
    """Nested optimizer state -> the same as JSON, each tensor moved into `tensors` under the name of its place."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, dict):
        return {key: _without_tensors(v, tensors, f"{place}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, tensors, f"{place}.{i}") for i, v in enumerate(value)]
    return value


def _with_tensors(value, tensors: dict[str, torch.Tensor]):
    """The inverse of `_without_tensors`."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(v, tensors) for key, v in value.items()}
    return [_with_tensors(v, tensors) for v in value] if isinstance(value, list) else value
