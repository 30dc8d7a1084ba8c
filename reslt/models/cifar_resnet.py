"""CIFAR ResNets (He et al. 2016, Section 4.2) registered with timm: `cifar_resnet20`, `32`, `44`, `56`.

They have three stages of 16, 32, 64 channels (`channels`, as in timm's ResNets), option-A shortcuts (stride and
zero-padded channels, half of them on each side, no parameters; with `shortcut="B"`, 1x1 convolution and BN) and
Kaiming-normal convolutions. ResNet-32 has 464,154 parameters with 10 classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, option A or B: (N, in, H, W) -> (N, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str = "A"):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad_channels = stride, channels - in_channels
        self.downsample = None
        if shortcut == "B" and (stride != 1 or self.pad_channels):
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride != 1 or self.pad_channels:  # option A
            before = self.pad_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.pad_channels - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A CIFAR ResNet with timm's model interface, (N, 3, 32, 32) -> (N, num_classes); depth = 6 x `blocks` + 2."""

    def __init__(
        self,
        blocks: int,
        channels: tuple[int, int, int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        shortcut: str = "A",
    ):
        super().__init__()
        if len(channels) != 3:
            raise ValueError(f"channels {tuple(channels)}: give one number for each of the three stages")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut {shortcut!r}: give A or B")
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = channels[-1]
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        for stage, out in enumerate(channels, 1):
            entering = channels[max(stage - 2, 0)]
            first = BasicBlock(entering, out, stride=1 if stage == 1 else 2, shortcut=shortcut)
            self.add_module(
                f"layer{stage}", nn.Sequential(first, *(BasicBlock(out, out, 1) for _ in range(blocks - 1)))
            )
        self.feature_info = [
            dict(num_chs=out, reduction=2**i, module=f"layer{i + 1}") for i, out in enumerate(channels)
        ]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer after the pooling."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier with a new, untrained one."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, D, H / 4, W / 4)"""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_intermediates(
        self, x: torch.Tensor, indices: Sequence[int] = (1, 2, 3)
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the map of `forward_features`, and the maps after the stages `indices` in ascending order, 0 being the
        stem, as timm's ResNets do."""
        maps = [F.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps[-1], [one for index, one in enumerate(maps) if index in indices]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, D, H, W) feature map -> (N, num_classes), or with `pre_logits` the (N, D) features before the classifier."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_CFG = dict(
    url="",
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    first_conv="conv1",
    classifier="fc",
)
default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _CFG for depth in (20, 32, 44, 56)})


def _create(variant: str, pretrained: bool, blocks: int, **kwargs) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, blocks=blocks, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Return a ResNet-20 with 3 blocks per stage; there are no pretrained weights."""
    return _create("cifar_resnet20", pretrained, blocks=3, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Return a ResNet-32 with 5 blocks per stage; there are no pretrained weights."""
    return _create("cifar_resnet32", pretrained, blocks=5, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Return a ResNet-44 with 7 blocks per stage; there are no pretrained weights."""
    return _create("cifar_resnet44", pretrained, blocks=7, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Return a ResNet-56 with 9 blocks per stage; there are no pretrained weights."""
    return _create("cifar_resnet56", pretrained, blocks=9, **kwargs)
