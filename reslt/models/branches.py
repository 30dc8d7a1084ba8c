"""The branches B_k of ResLT (Fig. 1(c)(III)): one feature map in, K feature maps of the same shape out. Tied ones have
the weights of a single branch, so that the K maps are equal (Fig. 2(e))."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class ConvBranches(nn.Module):
    """1x1 convolution D -> K D without bias, BN, ReLU: the paper's grouped convolution, as a dense one on one copy."""

    def __init__(self, channels: int, branches: int, init_branches: int | None = None, tied: bool = False):
        """`init_branches`: that the initialization counts, if not K. The released code makes three and may use two."""
        super().__init__()
        self.channels, self.branches, self.own = channels, branches, 1 if tied else branches
        self.conv = nn.Conv2d(channels, self.own * channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(self.own * channels)
        # Kaiming-normal with fan-out, in the order of torch's own arithmetic
        nn.init.normal_(self.conv.weight, std=math.sqrt(2) / math.sqrt((init_branches or branches) * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (K, N, D, H, W)"""
        own = F.relu(self.bn(self.conv(x))).unflatten(1, (self.own, self.channels)).movedim(1, 0)
        return own.expand(self.branches, -1, -1, -1, -1)


class BatchNormBranches(nn.Module):
    """K BatchNorms side by side, no convolution, no ReLU (the released CIFAR code).

    All of them see the same map, so their statistics are the same: computed and stored once, with K scales and shifts.
    The function and its gradients are those of K separate BatchNorm2d."""

    def __init__(self, channels: int, branches: int, tied: bool = False):
        super().__init__()
        self.channels, self.branches, self.own = channels, branches, 1 if tied else branches
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.weight = nn.Parameter(torch.ones(self.own, channels))
        self.bias = nn.Parameter(torch.zeros(self.own, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (K, N, D, H, W)"""
        scale, shift = (p.view(self.own, 1, -1, 1, 1) for p in (self.weight, self.bias))
        own = (self.bn(x) * scale + shift).to(x.dtype)  # in full precision, like BatchNorm under autocast
        return own.expand(self.branches, -1, -1, -1, -1)


class ConvStack(nn.Module):
    """K 1x1 convolutions D -> D without bias, each with BN and ReLU, one after another, as a single branch: the paper's
    baseline of as many parameters as `ConvBranches` has (figure 7)."""

    branches = 1

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(depth))
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (1, N, D, H, W)"""
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.relu(bn(conv(x)))
        return x[None]


BRANCHES = {"conv": ConvBranches, "bn": BatchNormBranches}


def main_branch(branches: ConvBranches | BatchNormBranches) -> nn.Module:
    """Return the first branch alone, a copy with its trained weights."""
    first = type(branches)(branches.channels, 1).to(next(branches.parameters()))
    own = first.state_dict()
    first.load_state_dict({k: t[: len(own[k])] if t.ndim else t for k, t in branches.state_dict().items()})
    return first.train(branches.training)


def apply_branches(branches: nn.Module, features: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Features of N images in a timm model's own layout -> those of K N images, branch by branch, in the same layout.

    Layouts: (N, D, H, W); (N, H, W, D) with `channels_last`; (N, L, D) tokens; (N, D) pooled."""
    if features.ndim == 4 and not channels_last:
        return branches(features).flatten(0, 1)
    batch, *space, channels = features.shape
    if len(space) < 2:  # tokens or pooled features as a map of L x 1 or 1 x 1
        features = features.reshape(batch, -1, 1, channels)
    stacked = branches(features.movedim(-1, 1)).flatten(0, 1).movedim(1, -1)
    return stacked.reshape(-1, *space, channels)
