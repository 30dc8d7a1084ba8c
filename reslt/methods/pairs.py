"""Cumulative learning (BBN, Zhou et al. 2020): training on pairs of an image and a partner that a second sampler draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import one_hot

from reslt.augment.transfers import to_device
from reslt.config.stages import Stage


@dataclass(frozen=True)
class Shares:
    """The share lambda of the first image in each pair of a batch."""

    first: np.ndarray  # (B,) float32

    def __getitem__(self, positions: np.ndarray) -> Shares:
        return Shares(self.first[positions])

    def to(self, device: torch.device) -> torch.Tensor:
        """Return them as (N,) float32 on the device, without waiting for it."""
        return to_device(self.first, device)


@dataclass(frozen=True)
class Pairing:
    """Pairs with shares: (2 N, 3, H, W) images, the N first images and then their partners, (2 N,) labels -> the model's
    inputs, (N, C) soft targets lambda onehot(y_first) + (1 - lambda) onehot(y_partner).

    In epoch e, counted from 0, lambda is 1 - (e / D)^2; after D epochs, it is 0. The interface is that of `Mixing`."""

    num_classes: int
    epochs: int  # D
    steps: int  # per epoch
    begin: int = 0  # the epoch of the run at which e is 0

    def share(self, epoch: int) -> float:
        """Return lambda in an epoch of the run, counted from 0."""
        return max(1 - ((epoch - self.begin) / self.epochs) ** 2, 0.0)

    def draw(self, step: int, batch_size: int, height: int, width: int) -> Shares:
        """Return the shares of a global batch of pairs at a step of the run. Nothing is random."""
        return Shares(np.full(batch_size, self.share(step // self.steps), np.float32))

    def inputs(self, images: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's inputs in training: the images of N pairs, and the (N,) shares."""
        return images, shares

    def targets(self, labels: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """(2 N,) labels of N pairs, (N,) shares -> (N, C) soft targets."""
        first, partner = one_hot(labels, self.num_classes).chunk(2)
        return torch.lerp(partner, first, shares[:, None])


def create_pairing(stage: Stage, num_classes: int, steps: int) -> Pairing | None:
    """Return the pairing of a stage whose epochs have `steps` steps; None if it trains on single images."""
    method = stage.config.method
    if not method.trains_on_pairs:
        return None
    return Pairing(
        num_classes, method.cumulative_epochs or stage.config.optim.epochs, steps, begin=stage.schedule_begin
    )
