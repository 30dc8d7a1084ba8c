"""The branches B_k of ResLT (Fig. 1(c)(III)): one feature map in, K feature maps of the same shape out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class ConvBranches(nn.Module):
    """1x1 convolution D -> K D without bias, BN, ReLU: the paper's grouped convolution, as a dense one on one copy."""

    def __init__(self, channels: int, branches: int, init_branches: int | None = None):
        """`init_branches`: that the initialization counts, if not K. The released code makes three and may use two."""
        super().__init__()
        self.channels, self.branches = channels, branches
        self.conv = nn.Conv2d(channels, branches * channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(branches * channels)
        # Kaiming-normal with fan-out, in the order of torch's own arithmetic
        nn.init.normal_(self.conv.weight, std=math.sqrt(2) / math.sqrt((init_branches or branches) * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (K, N, D, H, W)"""
        return F.relu(self.bn(self.conv(x))).unflatten(1, (self.branches, self.channels)).movedim(1, 0)


class BatchNormBranches(nn.Module):
    """K BatchNorms side by side, no convolution, no ReLU (the released CIFAR code).

    All of them see the same map, so their statistics are the same: computed and stored once, with K scales and shifts.
    The function and its gradients are those of K separate BatchNorm2d."""

    def __init__(self, channels: int, branches: int):
        super().__init__()
        self.channels, self.branches = channels, branches
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.weight = nn.Parameter(torch.ones(branches, channels))
        self.bias = nn.Parameter(torch.zeros(branches, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (K, N, D, H, W)"""
        scale, shift = (p.view(self.branches, 1, -1, 1, 1) for p in (self.weight, self.bias))
        return (self.bn(x) * scale + shift).to(x.dtype)  # in full precision, like BatchNorm under autocast


BRANCHES = {"conv": ConvBranches, "bn": BatchNormBranches}


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
