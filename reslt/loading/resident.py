"""Small images that live on the device as uint8 and are cropped, flipped and augmented there, in blocks of several steps.

Augmentation is a pure function of (seed, epoch, sample): an epoch has one table of random numbers, a row per image. Its
distribution is the host path's; the draws are others, so a run on the device is another sample of the same experiment."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torchvision.transforms import Compose

from reslt.augment.batch_operations import apply
from reslt.augment.host_transforms import pad_and_crop, pil_to_chw
from reslt.augment.policies import HostOnly, create_policy
from reslt.augment.resample import BOX_COLUMNS, RESAMPLINGS, draw_boxes, flipped, pad_crops, resized_crops
from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import to_device
from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.seeding import derive_seed
from reslt.data.datasets import Dataset
from reslt.loading.batches import Loader, OrderedBatches, ShuffledBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.pixel_cache import UnequalSizes, pixels

SMALL = 128  # pixels a side, of what `auto` keeps on the device
SHARE_OF_MEMORY = 1 / 5  # of the device's, of what `auto` keeps there
BLOCK_BYTES = 12 << 20  # of images that are augmented at once: 4,096 of 32 x 32 pixels
TABLE = -1  # seeds the table of random numbers beside the samples' own seeds, which count from 0


def random_table(seed: int, epoch: int, images: int, columns: int) -> np.ndarray:
    """(images, columns) numbers in [0, 1): those of an epoch, a row per image of the list."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, epoch, TABLE))).random((images, columns))


class Augmentation:
    """Crop, flip, then AutoAugment or color jitter, for a block of images at once."""

    def __init__(self, s: ImageSettings):
        """Raises HostOnly, with the reason, for what exists on the host alone."""
        c = s.config
        if c.reprob:
            raise HostOnly("--reprob erases on the host alone")
        self.settings, self.policy = s, create_policy(s)
        self.crop_columns = 2 if c.crop == "pad" else BOX_COLUMNS + 1  # the last one chooses the resampling
        self.columns = self.crop_columns + 1 + (self.policy.columns if self.policy else 0)

    def __call__(self, images: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """(N, 3, H, W) uint8 and their rows of the table -> (N, 3, size, size) uint8. No synchronisation."""
        c, size = self.settings.config, self.settings.size
        crop, flip, rest = np.split(rows, [self.crop_columns, self.crop_columns + 1], axis=1)
        images = (self._pad_crop if c.crop == "pad" else self._resized_crop)(images, crop)
        images = flipped(images, to_device(flip[:, 0] < c.hflip, images.device))
        return images if self.policy is None else apply(images, self.policy.programs(rest, size, size))

    def _pad_crop(self, images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        c, size = self.settings.config, self.settings.size
        room = np.array(images.shape[-2:]) + 2 * c.crop_padding - size + 1  # places that the crop can begin at
        tops, lefts = to_device((draws * room).astype(np.int64).T, images.device)
        return pad_crops(images, tops, lefts, size, c.crop_padding)

    def _resized_crop(self, images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        c = self.settings.config
        boxes = draw_boxes(draws[:, :BOX_COLUMNS], *images.shape[-2:], c.scale, c.ratio)
        if c.train_interpolation == "random":  # as timm: bilinear or bicubic
            resampling = np.where(draws[:, -1] < 0.5, RESAMPLINGS["bilinear"], RESAMPLINGS["bicubic"])
        else:
            resampling = np.full(len(draws), RESAMPLINGS[c.train_interpolation])
        return resized_crops(images, boxes, self.settings.size, resampling)


class ResidentLoader(Loader):
    """Batches of images that are on the device."""

    where = "on the device, and augmented there"

    def __init__(
        self,
        images: ListedImages,
        array: np.ndarray,
        batches: ShuffledBatches | OrderedBatches,
        settings: ImageSettings,
        device: torch.device,
        augmentation: Augmentation | None,
    ):
        """`array`: (N, 3, H, W) uint8, all images of the list. Without augmentation they are the inputs as they are."""
        super().__init__(images, batches, settings, device)
        try:
            self.pixels, self.labels = torch.from_numpy(array).to(device), images.labels.to(device, torch.int64)
        except torch.OutOfMemoryError:
            size = f"{array.nbytes / 2**30:.1f} GiB of images"
            raise UserError(f"--data-on-device on: the device has no room for {size}; use auto or off") from None
        self.augmentation = augmentation

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._shuffled() if self.augmentation else self._ordered()

    def _ordered(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first, end in self.batches.spans():
            yield self.pixels[first:end], self.labels[first:end]

    def _shuffled(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        table = random_table(self.batches.seed, self.batches.epoch, len(self.images), self.augmentation.columns)
        parts = self.batches.parts()  # (steps, passes, N)
        steps = max(BLOCK_BYTES // (parts[0].size * self.pixels[0].numel()), 1)
        for first in range(0, len(parts), steps):
            block = parts[first : first + steps]
            indices = to_device(block.reshape(-1), self.device)
            images = self.augmentation(self.pixels[indices], table[block.reshape(-1)])
            batches = (part.unflatten(0, (-1, block.shape[-1])) for part in (images, self.labels[indices]))
            yield from zip(*batches, strict=True)


def resident_train_loader(
    dataset: Dataset, batches: ShuffledBatches, s: ImageSettings, device: torch.device
) -> ResidentLoader | None:
    """The loader of `--data-on-device`; None where the host augments. Raises UserError where `on` cannot be."""
    c = s.config
    if not _is_wanted(s, device):
        return None
    prepared = pad_and_crop(s).transforms[:1] if c.crop == "pad" else []  # what comes before anything random: a resize
    listed = ListedImages(dataset.lists["train"], dataset.image_root, Compose([*prepared, pil_to_chw]), None)
    try:
        augmentation = Augmentation(s)
        array = _taken(listed, f"training {prepared}", dataset, s, device)
    except (HostOnly, UnequalSizes) as reason:
        if c.data_on_device == "on":
            raise UserError(f"--data-on-device on: {reason}; use auto or off") from None
        return None
    return ResidentLoader(listed, array, batches, s, device, augmentation)


def resident_eval_loader(
    dataset: Dataset, listed: ListedImages, batches: OrderedBatches, s: ImageSettings, device: torch.device
) -> ResidentLoader | None:
    """The same for a list that is evaluated. `listed` makes every image an input of one size."""
    if not _is_wanted(s, device):
        return None
    described = f"evaluation {s.size}, {s.interpolation}, {s.crop_pct}"
    try:
        array = _taken(listed, described, dataset, s, device)
    except UnequalSizes:
        return None
    return ResidentLoader(listed, array, batches, s, device, None)


def _is_wanted(s: ImageSettings, device: torch.device) -> bool:
    wanted = s.config.data_on_device
    is_right = device.type == "cuda" and s.size <= SMALL and s.config.decode == "host"
    return wanted == "on" or (wanted == "auto" and is_right)


def _taken(
    listed: ListedImages, described: str, dataset: Dataset, s: ImageSettings, device: torch.device
) -> np.ndarray:
    """The pixels of a list. Raises UnequalSizes where `auto` does not take them."""
    if s.config.data_on_device == "auto":
        image, _ = listed.decoded(0)
        if image is not None:  # else decoding tells what is wrong
            *_, height, width = listed.transform(image).shape
            if max(height, width) > SMALL:
                raise UnequalSizes(f"images of {width} x {height} pixels are not small")
            largest = max(height * width, s.size**2)
            needed = 3 * largest * sum(map(len, dataset.lists.values()))
            if needed > SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory:
                raise UnequalSizes("the images do not fit in a fifth of the device's memory")
    return pixels(listed, described, available_cores() if s.config.workers else 0)
