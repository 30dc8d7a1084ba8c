"""Cutout (DeVries and Taylor 2017): one square of a single color on every training image, the same on host and device."""

from __future__ import annotations

import numpy as np
import torch

from reslt.augment.settings import GRAY, ImageSettings
from reslt.augment.transfers import to_device
from reslt.core.errors import UserError


class Cutout:
    """A filled square of `side` x `side` pixels on every image, set on uint8 pixels, that is, before normalization.

    The center is uniform over the pixels of the image; the part of the square outside the image is cut off. An even side
    covers the half-open range [c - side / 2, c + side / 2) around a center c, an odd one as many pixels on either side."""

    columns = 2  # uniform numbers per image: for the center's row and column

    def __init__(self, settings: ImageSettings):
        augment = settings.augment
        fill = {"black": (0, 0, 0), "grey": (GRAY,) * 3, "mean": [round(255 * value) for value in settings.mean]}
        self.side = augment.cutout
        self.fill = torch.tensor(fill[augment.cutout_fill], dtype=torch.uint8).view(3, 1, 1)

    @classmethod
    def of(cls, settings: ImageSettings) -> Cutout | None:
        """Return the configured Cutout, None without one. Raises UserError for a square larger than the images."""
        side = settings.augment.cutout
        if side > settings.size:
            raise UserError(
                f"--cutout {side}: the square is larger than the images of {settings.size} pixels; choose a smaller side, "
                f"such as {settings.size // 2}"
            )
        return cls(settings) if side else None

    def __call__(self, images: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 and the (N, 2) int64 rows and columns of the centers, on the same device -> (N, 3, H, W) uint8.
        The host does not wait for the device."""
        rows, columns = (
            self._covered(center, side) for center, side in zip(centers.unbind(1), images.shape[-2:], strict=True)
        )
        covered = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(covered, to_device(self.fill, images.device), images)

    def drawn(self, images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """(N, 3, H, W) uint8 on any device, (N, 2) uniform numbers in [0, 1) on the host -> (N, 3, H, W) uint8."""
        centers = (draws * np.array(images.shape[-2:])).astype(np.int64)
        return self(images, to_device(centers, images.device))

    def _covered(self, centers: torch.Tensor, length: int) -> torch.Tensor:
        """(N,) centers on a line of `length` pixels -> (N, length) bool: the pixels that the square covers."""
        from_start = torch.arange(length, device=centers.device) - (centers[:, None] - self.side // 2)
        return (from_start >= 0) & (from_start < self.side)


class CutoutOfOne:
    """Cutout on one image, (3, H, W) uint8 -> (3, H, W) uint8, with a center from torch's global generator."""

    def __init__(self, cutout: Cutout):
        self.cutout = cutout

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.cutout.drawn(image[None], torch.rand(1, Cutout.columns, dtype=torch.float64).numpy())[0]
