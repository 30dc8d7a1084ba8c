"""Batches of an image list on a device. The order of samples is a pure function of (seed, epoch)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from reslt.datasets import Dataset
from reslt.errors import UserError
from reslt.images import ImageSettings, ListedImages, eval_transform, mix, train_transform


class Normalize(torch.nn.Module):
    """(N, 3, H, W) uint8 -> float32, (x / 255 - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std


class ShuffledBatches(Sampler):
    """Batches of keys (epoch, index) over `indices`, newly shuffled for each epoch; the last incomplete one is dropped."""

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int):
        self.indices, self.batch_size, self.seed, self.epoch = indices, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = self.indices[torch.randperm(len(self.indices), generator=generator).numpy()]
        for batch in order[: len(self) * self.batch_size].reshape(len(self), self.batch_size):
            yield [(self.epoch, i) for i in batch.tolist()]


class OrderedBatches(Sampler):
    """Batches of keys (0, index) in the list's order, the last incomplete one included."""

    def __init__(self, length: int, batch_size: int):
        self.length, self.batch_size = length, batch_size
        self.epoch = 0  # set by the loader, as for the shuffled ones; the order is the same in each

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, self.length, self.batch_size):
            yield [(0, i) for i in range(start, min(start + self.batch_size, self.length))]


class Loader:
    """Iterates over (images (N, 3, H, W) float32 normalised, labels (N,) int64) on the device. Host path."""

    def __init__(self, images: ListedImages, batches: Sampler, settings: ImageSettings, device: torch.device):
        workers = min(settings.config.workers, available_cores())
        self.batches, self.device = batches, device
        self.normalize = Normalize(settings.mean, settings.std).to(device)
        self.loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else each epoch would draw a number from the global generator
            worker_init_fn=_leave_shared_pages_alone,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one epoch. Raises UserError, with file and line, at an image that cannot be read."""
        self.batches.epoch = epoch
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalize(images), labels


def available_cores() -> int:
    """CPU cores this process may use; more workers than that only take time from each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_shared_pages_alone(worker: int) -> None:
    """The garbage collector marks the objects it visits: without this, a forked worker copies every page that holds one."""
    gc.freeze()


def _collate(samples):
    return samples if isinstance(samples, UserError) else default_collate(samples)


def train_loader(dataset: Dataset, settings: ImageSettings, device: torch.device) -> Loader:
    """Raises UserError where the list holds less than one batch."""
    c, images = settings.config, dataset.lists["train"]
    used = len(images) if c.limit_train is None else min(c.limit_train, len(images))
    if used < c.batch_size:
        raise UserError(f"{images.file}: {used} images are fewer than --batch-size {c.batch_size}; lower it")
    indices = np.linspace(0, len(images) - 1, used).round().astype(np.int64)
    listed = ListedImages(images, dataset.image_root, train_transform(settings), c.seed)
    return Loader(listed, ShuffledBatches(indices, c.batch_size, c.seed), settings, device)


def eval_loader(dataset: Dataset, split: str, settings: ImageSettings, device: torch.device) -> Loader:
    """Every image of the list once, in its order."""
    images = dataset.lists[split]
    listed = ListedImages(images, dataset.image_root, eval_transform(settings), None)
    return Loader(listed, OrderedBatches(len(images), settings.config.batch_size), settings, device)
