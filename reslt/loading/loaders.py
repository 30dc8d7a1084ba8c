"""Batches of an image list: decoded by worker processes, or from images that live on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from reslt.augment.batch_operations import apply
from reslt.augment.host_transforms import eval_transform, train_transform
from reslt.augment.policies import HostOnly, create_policy
from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import Prefetcher
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.data.datasets import Dataset
from reslt.loading.batches import Loader, OrderedBatches, ShuffledBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.resident import random_table, resident_eval_loader, resident_train_loader
from reslt.loading.workers import Workers


class HostLoader(Loader):
    """Decoded and augmented on the host."""

    where = "decoded and augmented on the host"

    def __init__(self, images: ListedImages, batches: Sampler, settings: ImageSettings, device: torch.device):
        super().__init__(images, batches, settings, device)
        self.workers = Workers(images, batches, settings.config.workers, pin_memory=device.type == "cuda")
        self.to_device = Prefetcher(device)

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.to_device(self.workers)


class DeviceDecodeLoader(Loader):
    """JPEGs that worker processes read and the device decodes; `--decode device`."""

    where = "decoded and augmented on the device"

    def __init__(self, dataset: Dataset, batches: ShuffledBatches, settings: ImageSettings, device: torch.device):
        """Raises UserError for what exists on the host alone."""
        from reslt.loading.device_decode import (  # torchvision may lose its decoder
            DeviceDecoder,
            EncodedBatch,
            EncodedImages,
        )

        c = settings.config
        try:
            if c.crop != "rrc" or c.reprob:
                raise HostOnly(f"--{'reprob' if c.reprob else 'crop pad'} is for images that the host decodes")
            self.policy = create_policy(settings)
        except HostOnly as reason:
            raise UserError(f"--decode device: {reason}; use --decode host") from None
        images = EncodedImages(dataset.lists["train"], dataset.image_root, settings, c.seed)
        super().__init__(images, batches, settings, device)
        self.workers = Workers(images, batches, c.workers, EncodedBatch.of, pin_memory=device.type == "cuda")
        self.decoder, self.size = DeviceDecoder(images, device, settings.size), settings.size

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        columns = self.policy.columns if self.policy else 0
        table = random_table(self.batches.seed, self.batches.epoch, len(self.images), columns)
        for batch in self.workers:
            images = self.decoder(batch)
            if self.policy:
                images = apply(images, self.policy.programs(table[batch.indices], self.size, self.size))
            yield images, batch.labels.to(self.device, non_blocking=True)


def train_loader(
    dataset: Dataset, settings: ImageSettings, device: torch.device, shard: BatchShard | None = None
) -> Loader:
    """Without a share, of one process that takes all. Raises UserError where the list holds less than one batch."""
    c, images = settings.config, dataset.lists["train"]
    shard = shard or BatchShard(c.batch_size)
    used = len(images) if c.limit_train is None else min(c.limit_train, len(images))
    if used < c.batch_size:
        raise UserError(f"{images.file}: {used} images are fewer than --batch-size {c.batch_size}; lower it")
    indices = np.linspace(0, len(images) - 1, used).round().astype(np.int64)
    batches = ShuffledBatches(indices, shard, c.seed)
    if resident := resident_train_loader(dataset, batches, settings, device):
        return resident
    if c.decode == "device":
        return DeviceDecodeLoader(dataset, batches, settings, device)
    listed = ListedImages(images, dataset.image_root, train_transform(settings), c.seed)
    return HostLoader(listed, batches, settings, device)


def eval_loader(
    dataset: Dataset,
    split: str,
    settings: ImageSettings,
    device: torch.device,
    shard: BatchShard | None = None,
    is_literal: bool = False,
) -> Loader:
    """A process's part of the list, in its order: the processes' parts together are every image once. The batch is the share's
    own (`is_literal`), else as large as `images_per_batch` says."""
    images, shard = dataset.lists[split], shard or BatchShard(settings.config.batch_size)
    listed = ListedImages(images, dataset.image_root, eval_transform(settings), None)
    own = -(-shard.batch_size // shard.parts)
    batch_size = own if is_literal else images_per_batch(own, settings.size, on_cpu=device.type == "cpu")
    batches = OrderedBatches(*shard.span(len(images)), batch_size)
    if resident := resident_eval_loader(dataset, listed, batches, settings, device):
        return resident
    return HostLoader(listed, batches, settings, device)


def images_per_batch(training_batch: int, img_size: int, on_cpu: bool) -> int:
    """Images of a process's batch in evaluation. Nothing is kept for a backward pass, so four training batches find room; on a CPU,
    where fresh memory and caches make larger ones slower, one. At most as many pixels as 256 images of 224 x 224 have:
    training may have had more processes to share its batch."""
    batches = 1 if on_cpu else 4
    return max(1, min(batches * training_batch, 256 * 224**2 // img_size**2))
