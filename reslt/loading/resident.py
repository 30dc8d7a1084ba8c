"""Small images resident on the device as uint8: cropped, flipped and augmented there, in blocks of several steps.

Augmentation is a pure function of (seed, epoch, sample): an epoch has one table of random numbers, with a row per image
or per draw of a sampler. The distribution is the same as on the host, but the draws differ, so that a run on resident
images is another sample of the same experiment."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from reslt.augment.batch_operations import apply
from reslt.augment.cutout import Cutout
from reslt.augment.policies import HostOnly, create_policy
from reslt.augment.resample import BOX_COLUMNS, RESAMPLINGS, crops_at, draw_boxes, flipped, padded, resized_crops
from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import to_device
from reslt.core.errors import UserError
from reslt.core.seeding import derive_seed
from reslt.loading.ahead import BlocksAhead
from reslt.loading.batches import Loader, OrderedBatches, ShuffledBatches
from reslt.loading.image_dataset import ListedImages

BLOCK_BYTES = 12 << 20  # of images augmented at once: 4,096 of 32 x 32 pixels
BLOCK_BYTES_ON_CPU = 3 << 20  # more would exceed its caches and take twice as long
NORMALIZED_BYTES = 256 << 20  # the largest evaluated list that stays in memory normalized, for later evaluations
TABLE = -1  # seeds the table of random numbers; the seeds of samples count from 0


def random_table(seed: int, epoch: int, draws: int, columns: int, view: int = 0) -> np.ndarray:
    """Return the (draws, columns) random numbers in [0, 1) of an epoch, for one view of each image. A row does not depend
    on the number of rows."""
    key = derive_seed(seed, epoch, TABLE, *([view] if view else []))
    return np.random.Generator(np.random.Philox(key=key)).random((draws, columns))


class Augmentation:
    """The augmentation of a block of images at once: crop, flip, AutoAugment or color jitter, Cutout."""

    def __init__(self, settings: ImageSettings):
        """Raises HostOnly, with the reason, for an augmentation that runs only on the host."""
        augment = settings.augment
        if augment.reprob:
            raise HostOnly("--reprob erases only on the host")
        self.settings, self.policy = settings, create_policy(settings)
        # rrc: the last column chooses the resampling; center: the stored images are already cropped
        self.crop_columns = {"pad": 2, "rrc": BOX_COLUMNS + 1, "center": 0}[augment.crop]
        self.policy_columns = self.policy.columns if self.policy else 0
        self.cutout = Cutout.of(settings)  # its columns come last
        self.columns = self.crop_columns + 1 + self.policy_columns + (Cutout.columns if self.cutout else 0)

    def __call__(self, images: torch.Tensor, rows: np.ndarray, indices: torch.Tensor | None = None) -> torch.Tensor:
        """(N, 3, H, W) uint8, their (N, columns) rows of the table -> (N, 3, size, size) uint8. The host does not wait.

        `indices`: the (N,) images to take from `images`, which are then in the form that `prepared` returns; None: all."""
        augment, size = self.settings.augment, self.settings.size
        ends = np.cumsum([self.crop_columns, 1, self.policy_columns])
        crop, flip, operations, square = np.split(rows, ends, axis=1)
        flip = (flip < augment.hflip).T
        if augment.crop == "pad":
            images = images if indices is not None else padded(images, augment.crop_padding)
            room = np.array(images.shape[-2:]) - size + 1  # places where the crop can begin
            tops, lefts, flip = to_device(np.concatenate([(crop * room).astype(np.int64).T, flip]), images.device)
            indices = torch.arange(len(images), device=images.device) if indices is None else indices
            images = crops_at(images, indices, tops, lefts, size)
        else:
            images = images if indices is None else images.index_select(0, indices)
            images = self._resized_crop(images, crop) if augment.crop == "rrc" else images
            flip = to_device(flip[0], images.device)
        images = flipped(images, flip.bool())
        if self.policy:
            images = apply(images, self.policy.plan(operations, size, size))
        return self.cutout.drawn(images, square) if self.cutout else images

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Return all images, (M, 3, H, W), in the form that calls with `indices` take: padded, so that a CPU does that only
        once."""
        is_padded = self.settings.augment.crop == "pad"
        return padded(images, self.settings.augment.crop_padding) if is_padded else images

    def _resized_crop(self, images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        augment = self.settings.augment
        boxes = draw_boxes(draws[:, :BOX_COLUMNS], *images.shape[-2:], augment.scale, augment.ratio)
        if augment.train_interpolation == "random":  # bilinear or bicubic, as in timm
            resampling = np.where(draws[:, -1] < 0.5, RESAMPLINGS["bilinear"], RESAMPLINGS["bicubic"])
        else:
            resampling = np.full(len(draws), RESAMPLINGS[augment.train_interpolation])
        return resized_crops(images, boxes, self.settings.size, resampling)


class ResidentLoader(Loader):
    """Batches of images that are resident on the device."""

    def __init__(
        self,
        images: ListedImages,
        array: np.ndarray,
        batches: ShuffledBatches | OrderedBatches,
        settings: ImageSettings,
        device: torch.device,
        augmentation: Augmentation | None = None,
        block_bytes: int | None = None,
        of_views: Augmentation | None = None,
    ):
        """`array`: (N, 3, H, W) uint8, all images of the list, which without `augmentation` are the inputs unchanged;
        `block_bytes`: the size of the images augmented at once, None: what suits the device; `of_views`: the augmentation
        of the views after the first, if there are several."""
        super().__init__(images, batches, settings, device)
        try:
            self.pixels, self.labels = torch.from_numpy(array).to(device), images.labels.to(device, torch.int64)
        except torch.OutOfMemoryError:
            size = f"{array.nbytes / 2**30:.1f} GiB of images"
            raise UserError(f"--data-on-device on: the device lacks memory for {size}; use auto or off") from None
        self.augmentation, self.of_views = augmentation, of_views
        self.image_bytes = self.pixels[0].numel()
        self.is_prepared = augmentation is not None and of_views is None and device.type == "cpu"
        if self.is_prepared:
            self.pixels = augmentation.prepared(self.pixels)
        self._normalized: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # the batches of evaluation
        self.block_bytes = block_bytes or (BLOCK_BYTES_ON_CPU if device.type == "cpu" else BLOCK_BYTES)
        # On a CPU, the thread would compete with the step for the same cores
        self.ahead = BlocksAhead(self._blocks, device) if augmentation and device.type == "cuda" else None

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.augmentation is not None or 4 * self.pixels.numel() > NORMALIZED_BYTES:
            return super().epoch(epoch)
        if self._normalized is None:
            self._normalized = list(super().epoch(epoch))
        return iter(self._normalized)

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._shuffled() if self.augmentation else self._ordered()

    def _ordered(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = self.batches
        for first, end in batches.spans():
            begin = max(end - batches.batch_size, batches.start) if batches.is_filled else first
            yield self.pixels[begin:end], self.labels[first:end]

    def _shuffled(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        blocks = self._blocks(self.batches) if self.ahead is None else self.ahead(self.batches)
        for images, labels in blocks:
            yield from zip(images, labels, strict=True)

    def _blocks(self, batches: ShuffledBatches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the B micro-batches of several steps at once: (B, V N, 3, size, size) uint8 in V views, (B, N) int64
        labels."""
        views = batches.views
        augmentations = [self.augmentation] + [self.of_views] * (views - 1)
        tables = [
            random_table(batches.seed, batches.epoch, batches.draws, augmentation.columns, view)
            for view, augmentation in enumerate(augmentations)
        ]
        parts, draws = batches.parts()  # (steps, micro-batches, V N) each
        steps = max(self.block_bytes // (parts[0].size * self.image_bytes), 1)
        for first in range(0, len(parts), steps):
            block = parts[first : first + steps]
            of_view = np.split(draws[first : first + steps] % batches.draws, views, axis=-1)
            indices = to_device(np.split(block, views, axis=-1)[0].reshape(-1), self.device)
            labels, size = self.labels.index_select(0, indices), (-1, block.shape[-1] // views)
            shown = (self.pixels, indices) if self.is_prepared else (self.pixels.index_select(0, indices), None)
            images = [
                augmentation(shown[0], table[rows.reshape(-1)], shown[1]).unflatten(0, size)
                for augmentation, table, rows in zip(augmentations, tables, of_view, strict=True)
            ]
            yield images[0] if views == 1 else torch.cat(images, 1), labels.unflatten(0, size)
