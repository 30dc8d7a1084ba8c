"""RIDE's router (Wang et al. 2021): it decides after each expert whether an image asks for the next one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 16  # outputs of the layer on an expert's features, as in the released code


class Routed(NamedTuple):
    """The branch logits of E experts, (E, K, N, C), and the router's logits after all experts but the last, (E - 1, N). An
    image asks for the next expert if its logit is 0 or more."""

    branch_logits: torch.Tensor
    asks: torch.Tensor


class Router(nn.Module):
    """The router: one logit per image after each expert i < E, by a linear layer that the experts share, of [the k largest
    mean logits of experts 1..i, in descending order; ReLU(A_i f_i / |f_i|)], with f_i the features of expert i. The linear
    layer starts at 0, so that an untrained router asks for all experts. Computed in float32 at least, even under
    autocast."""

    def __init__(self, width: int, experts: int, topk: int):
        """`width`: of an expert's features; `topk`: k, at most the number of classes."""
        super().__init__()
        self.topk = topk
        self.features = nn.ModuleList(nn.Linear(width, HIDDEN) for _ in range(experts - 1))
        self.asks = nn.Linear(topk + HIDDEN, 1)
        nn.init.zeros_(self.asks.weight)
        nn.init.zeros_(self.asks.bias)

    def forward(self, branch_logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(E, K, N, C) branch logits and (E, N, D) features of the first E experts -> (E - 1, N) logits."""
        with torch.autocast(branch_logits.device.type, enabled=False):
            largest = prefix_means(branch_logits)[:-1].topk(self.topk).values
            seen = F.normalize(_in_full_precision(features), dim=-1)
            hidden = [F.relu(layer(of_one)) for layer, of_one in zip(self.features, seen[:-1], strict=False)]
            return self.asks(torch.cat([largest, torch.stack(hidden)], -1))[..., 0]


def is_routed(model: nn.Module) -> bool:
    """Return whether a network decides for each image, in evaluation, which of its outputs predict."""
    return getattr(model, "is_routed", False)


def prefix_means(branch_logits: torch.Tensor) -> torch.Tensor:
    """(E, K, N, C) branch logits -> (E, N, C): entry i is the mean of the fused logits of experts 1..i."""
    return running_means(_in_full_precision(branch_logits).sum(1))


def running_means(fused: torch.Tensor) -> torch.Tensor:
    """(E, N, C) -> (E, N, C): entry i is the mean of the first i entries."""
    return fused.cumsum(0) / torch.arange(1, len(fused) + 1, device=fused.device)[:, None, None]


def experts_used(asks: torch.Tensor) -> torch.Tensor:
    """(E - 1, N) logits of the router -> (N,) numbers of experts that the images use, 1..E."""
    return 1 + (asks >= 0).long().cumprod(0).sum(0)


def routed_logits(fused: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
    """(E, N, C) fused logits of experts, (E - 1, N) of the router -> (N, C) means over the experts that an image uses."""
    means, last = running_means(fused), experts_used(asks) - 1
    return means.gather(0, last[None, :, None].expand(1, *means.shape[1:]))[0]


def _in_full_precision(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
