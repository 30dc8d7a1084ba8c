"""The branches B_k of ResLT (Fig. 1(c)(III)): one feature map in, K feature maps of the same shape out. Tied branches
share the weights of one, so that the K maps are equal (Fig. 2(e))."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class ConvBranches(nn.Module):
    """A 1x1 convolution D -> K D without bias, BN, ReLU: the paper's grouped convolution of K copies of the map, computed
    as a dense convolution of the map itself."""

    def __init__(self, channels: int, branches: int, init_branches: int | None = None, tied: bool = False):
        """`init_branches`: the number of branches for the initialization, None: K. The released code initializes three
        and may use two."""
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
    """K BatchNorms side by side, without convolution or ReLU, as in the released CIFAR code.

    All of them see the same map, so their statistics are equal: they are computed and stored once, with K scales and
    shifts. The function and its gradients are those of K separate BatchNorm2d."""

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
    baseline with as many parameters as `ConvBranches` (figure 7)."""

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


class ModulatedAttention(nn.Module):
    """The modulated attention of OLTR (Liu et al. 2019), as a single branch: x + s * O(nonlocal(x)). The non-local block
    has embedded Gaussians and half of the channels; O is a 1x1 convolution; s is a softmax over positions of a linear layer
    on the whole map. O starts at 0, so that a new branch is the identity."""

    branches = 1

    def __init__(self, channels: int, positions: int):
        """`positions`: height times width of the map, which is fixed."""
        super().__init__()
        inner = max(channels // 2, 1)
        self.value, self.query, self.key = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.spatial = nn.Linear(channels * positions, positions)
        for conv in (self.value, self.query, self.key):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (1, N, D, H, W)"""
        value, query, key = (conv(x).flatten(2).mT for conv in (self.value, self.query, self.key))  # (N, H W, D / 2)
        with torch.autocast(x.device.type, enabled=False):  # the products exceed the range of half precision
            full = torch.promote_types(value.dtype, torch.float32)
            mask = (query.to(full) @ key.to(full).mT).softmax(-1).to(value.dtype) @ value
        mask = self.out(mask.mT.unflatten(2, x.shape[2:]))
        spatial = self.spatial(x.flatten(1)).softmax(-1).unflatten(1, (1, *x.shape[2:]))
        return (x + (spatial * mask).to(x.dtype))[None]


BRANCHES = {"conv": ConvBranches, "bn": BatchNormBranches}


def main_branch(branches: ConvBranches | BatchNormBranches) -> nn.Module:
    """Return a copy of the first branch alone, with its trained weights."""
    first = type(branches)(branches.channels, 1).to(next(branches.parameters()))
    own = first.state_dict()
    first.load_state_dict({k: t[: len(own[k])] if t.ndim else t for k, t in branches.state_dict().items()})
    return first.train(branches.training)


def apply_branches(branches: nn.Module, features: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Apply branches to the features of N images in a timm model's own layout: return the features of K N images, branch by
    branch, in the same layout.

    Layouts: (N, D, H, W); (N, H, W, D) with `channels_last`; (N, L, D) tokens; (N, D) pooled."""
    if features.ndim == 4 and not channels_last:
        return branches(features).flatten(0, 1)
    batch, *space, channels = features.shape
    if len(space) < 2:  # tokens or pooled features as a map of L x 1 or 1 x 1
        features = features.reshape(batch, -1, 1, channels)
    stacked = branches(features.movedim(-1, 1)).flatten(0, 1).movedim(1, -1)
    return stacked.reshape(-1, *space, channels)
