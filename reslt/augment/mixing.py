"""timm's Mixup and CutMix as a pure function of (seed, step), drawn for the global batch and applied on the device.

Image i of a batch of B mixes with image B-1-i. timm draws from NumPy's global generator, rejects odd batches and smooths
labels by default; here the step seeds the generator, the middle image of an odd batch is mixed with itself, and only the
loss smooths labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target

from reslt.augment.transfers import to_device
from reslt.config.schema import AugmentSettings
from reslt.core.seeding import derive_seed


@dataclass(frozen=True)
class Mixes:
    """The mixing of each image of a batch, drawn on the host."""

    own: np.ndarray  # (B,) float32: lambda, the weight of the image's own label
    cut: np.ndarray  # (B,) bool: whether a box of the partner is pasted (CutMix), or all of it blended in (mixup)
    boxes: np.ndarray  # (B, 4) int64: the pasted box's top, bottom, left, right in pixels, the ends exclusive

    def __getitem__(self, positions: np.ndarray) -> Mixes:
        return Mixes(self.own[positions], self.cut[positions], self.boxes[positions])

    def to(self, device: torch.device) -> torch.Tensor:
        """Return them as (B, 6) float32: lambda, whether a box is pasted (1 or 0), top, bottom, left, right. It is one
        copy, which does not wait for the device."""
        columns = np.concatenate([self.own[:, None], self.cut[:, None], self.boxes], axis=1, dtype=np.float32)
        return to_device(columns, device)


class Mixing(Mixup):
    """Mixup and CutMix: (N, 3, H, W) images, (N,) labels -> mixed images, (N, C) soft targets with rows that sum to 1.

    A step draws the mixes of the global batch and passes each micro-batch its part in `inputs` and `targets`."""

    def __init__(self, augment: AugmentSettings, num_classes: int, seed: int):
        super().__init__(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mixup_prob,
            switch_prob=augment.mixup_switch_prob,
            mode=augment.mixup_mode,
            label_smoothing=0.0,
            num_classes=num_classes,
        )
        self.seed = seed

    def draw(self, step: int, batch_size: int, height: int, width: int) -> Mixes:
        """Draw the mixes of a global batch: timm's draws, in timm's order."""
        np.random.seed(derive_seed(self.seed, step) & 0xFFFFFFFF)
        own, cut = np.ones(batch_size, np.float32), np.zeros(batch_size, bool)
        boxes = np.zeros((batch_size, 4), np.int64)
        drawn = {"batch": 1, "pair": batch_size // 2, "elem": batch_size}[self.mode]
        own[:drawn], cut[:drawn] = self._params_per_batch() if self.mode == "batch" else self._params_per_elem(drawn)
        cut &= own != 1
        if cut.any():
            boxes[cut], own[cut] = draw_boxes(own[cut], height, width)
        i = np.arange(batch_size)
        mixes = Mixes(own, cut, boxes)
        return mixes[{"batch": 0 * i, "pair": np.minimum(i, i[::-1]), "elem": i}[self.mode]]

    def inputs(self, images: torch.Tensor, mixes: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the model's inputs in training: the mixed images."""
        return (self.mixed(images, mixes),)

    def mixed(self, images: torch.Tensor, mixes: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) images of whole pairs, their (N, 6) `Mixes` on the device -> the mixed images."""
        height, width = images.shape[-2:]
        own, cut, top, bottom, left, right = mixes.view(-1, 6, 1, 1, 1).unbind(1)  # (N, 1, 1, 1) each
        partners = 1 - own
        if self.cutmix_alpha > 0:
            y = torch.arange(height, device=images.device).view(-1, 1)
            x = torch.arange(width, device=images.device)
            inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)  # (N, 1, H, W)
            partners = torch.where(cut > 0, inside.to(partners), partners)
        return torch.lerp(images, images.flip(0), partners.to(images))

    def targets(self, labels: torch.Tensor, mixes: torch.Tensor) -> torch.Tensor:
        """(N,) labels of whole pairs, their (N, 6) `Mixes` on the device -> (N, C) soft targets."""
        return mixup_target(labels, self.num_classes, mixes[:, :1], self.label_smoothing)


def draw_boxes(own: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float32 shares of the images to keep -> (N, 4) int64 boxes as in `Mixes`, drawn for one image after the other
    as timm's `cutmix_bbox_and_lam` does, and (N,) float64 shares that the boxes leave."""
    sides = np.array([height, width])
    cut = (sides.astype(np.float32) * np.sqrt(1 - own)[:, None]).astype(np.int64)
    centers = np.random.randint(np.tile(sides, len(own))).reshape(-1, 2)
    first, end = np.clip(centers - cut // 2, 0, sides), np.clip(centers + (cut + 1) // 2, 0, sides)
    return np.stack([first, end], axis=-1).reshape(-1, 4), 1 - (end - first).prod(axis=1) / (height * width)


def create_mixing(augment: AugmentSettings, num_classes: int, seed: int) -> Mixing | None:
    """Return the configured mixing, None without one."""
    return Mixing(augment, num_classes, seed) if augment.mixes else None
