"""Adapters parallel to the MLPs of transformer blocks: AdaptFormer (Chen et al. 2022) as used by LIFT (Shi et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import nn

from reslt.core.errors import UserError


class Bottleneck(nn.Module):
    """An adapter: s up(relu(down(LN(x)))) with a learned scale s. As in LIFT's released code, s starts at 1, `down`
    Kaiming-normal with a = sqrt(5), and `up` at 0, so that a new adapter returns 0."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, dim), nn.Linear(dim, width)
        self.scale = nn.Parameter(torch.ones(()))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)"""
        return self.scale * self.up(torch.relu(self.down(self.norm(features))))


class AdaptedMlp(nn.Module):
    """The replacement of a block's norm2 and mlp, with an adapter beside them: x -> mlp(norm2(x)) + adapter(x).

    The block adds this sum to x, after its layer scale and stochastic depth, if any."""

    def __init__(self, norm2: nn.Module, mlp: nn.Module, adapter: Bottleneck):
        super().__init__()
        self.base, self.adapter = nn.ModuleDict({"norm2": norm2, "mlp": mlp}), adapter

    def forward(self, features: torch.Tensor, *more: object) -> torch.Tensor:
        """(..., D) -> (..., D)"""
        return self.base["mlp"](self.base["norm2"](features), *more) + self.adapter(features)


@torch.no_grad()
def add_adapters(backbone: nn.Module, dim: int | None, num_classes: int, example: torch.Tensor) -> None:
    """Add an adapter to every block of a timm model that computes x + mlp(norm2(x)) on (..., D) features, in place. The
    model's function does not change.

    `dim`: width of the adapters; None: as in LIFT, 2^floor(log2(C / (2 L))) for C classes and L blocks, at least 1.
    `example`: (1, 3, H, W) images. Raises UserError for a model without such blocks."""
    blocks = [block for block in backbone.modules() if _has_mlp(block)]
    training, before = backbone.training, None
    try:
        seen = Calls([part for block in blocks for part in (block.norm2, block.mlp)])
        with seen:
            before = backbone.eval().forward_features(example)
        blocks = [block for block in blocks if _follows(seen, block)]
        for block in blocks:
            width = seen.of(block.norm2)[0][0].shape[-1]
            adapter = Bottleneck(width, dim or 2 ** max(0, int(math.log2(num_classes / (2 * len(blocks))))))
            block.mlp = AdaptedMlp(block.norm2, block.mlp, adapter.to(next(block.parameters())))
            block.norm2 = nn.Identity()
        if not blocks or not torch.allclose(backbone.forward_features(example), before):
            raise UserError(
                f"--tune adapter: {type(backbone).__name__} has no transformer blocks of the form x + mlp(norm2(x)), as ViT, "
                "DeiT, BEiT, EVA and Swin have; use --tune norm or lora"
            )
    finally:
        backbone.train(training)


def has_adapters(module: nn.Module) -> bool:
    """Return whether a network or folded module contains adapters."""
    return bool(adapter_dims(module))


def adapter_dims(module: nn.Module) -> dict[str, int]:
    """Return {name of a block: width of its adapter} of a network or folded module."""
    return {
        name: block.mlp.adapter.down.out_features
        for name, block in module.named_modules()
        if isinstance(getattr(block, "mlp", None), AdaptedMlp)
    }


def _has_mlp(block: nn.Module) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Module) for name in ("norm2", "mlp"))


def _follows(seen: Calls, block: nn.Module) -> bool:
    """Return whether the input of the block's MLP was the output of its norm2, with channels last."""
    norms, mlps = seen.of(block.norm2), seen.of(block.mlp)
    if len(norms) != 1 or len(mlps) != 1 or mlps[0][0] is not norms[0][1]:
        return False
    features = norms[0][0]
    has_channels_last = not type(block.norm2).__name__.endswith("2d")
    return has_channels_last and tuple(getattr(block.norm2, "normalized_shape", ())) == features.shape[-1:]


class Calls:
    """The first input and the output of each call of some modules, within the context."""

    def __init__(self, modules: list[nn.Module]):
        self.modules, self.calls, self.hooks = modules, {}, []

    def __enter__(self) -> Calls:
        self.hooks = [module.register_forward_hook(self._record) for module in self.modules]
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def of(self, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the calls of one module."""
        return self.calls.get(module, [])

    def _record(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.calls.setdefault(module, []).append((inputs[0] if inputs else None, output))
