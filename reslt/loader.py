"""Batches of an image list on a device. The order of samples is a pure function of (seed, epoch)."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from reslt.datasets import Dataset
from reslt.errors import UserError
from reslt.images import ImageSettings, ListedImages, eval_transform, mix, train_transform
from reslt.shares import Share
from reslt.signals import STOP_SIGNALS


class Normalize(torch.nn.Module):
    """(N, 3, H, W) uint8 -> float32, (x / 255 - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std


class ShuffledBatches(Sampler):
    """The parts of global batches that one process takes, as keys (epoch, index) over `indices`, newly shuffled for each
    epoch; the last incomplete batch is dropped. Begins at the epoch's step `first_step`."""

    def __init__(self, indices: np.ndarray, share: Share, seed: int):
        self.indices, self.share, self.seed = indices, share, seed
        self.epoch = self.first_step = 0  # set by the loader

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return len(self.indices) // self.share.batch_size

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.share.passes

    def order(self, epoch: int) -> np.ndarray:
        """(steps, global batch) indices."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = self.indices[torch.randperm(len(self.indices), generator=generator).numpy()]
        return order[: self.steps * self.share.batch_size].reshape(self.steps, self.share.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order(self.epoch)[self.first_step :]:
            for positions in self.share.positions:
                yield [(self.epoch, i) for i in batch[positions].tolist()]


class OrderedBatches(Sampler):
    """Batches of keys (0, index) from `start` to `stop` in the list's order, the last incomplete one included."""

    def __init__(self, start: int, stop: int, batch_size: int):
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.epoch = self.first_step = 0  # set by the loader, as for the shuffled ones; the order is the same in each

    @property
    def steps(self) -> int:
        """Batches."""
        return -(-(self.stop - self.start) // self.batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(self.start, self.stop, self.batch_size):
            yield [(0, i) for i in range(first, min(first + self.batch_size, self.stop))]


class Loader:
    """Batches of a list on the device, decoded and augmented on the host."""

    def __init__(self, images: ListedImages, batches: Sampler, settings: ImageSettings, device: torch.device):
        workers = min(settings.config.workers, available_cores())
        self.images, self.batches, self.device, self.is_guarded = images, batches, device, False
        self.normalize = Normalize(settings.mean, settings.std).to(device)
        self.loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else each epoch would draw a number from the global generator
            worker_init_fn=_begin_worker,
        )

    def __len__(self) -> int:
        return self.batches.steps

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one epoch: (N, 3, H, W) float32 normalised, (N,) int64 labels."""
        for images, labels in self._on_device(epoch, 0):
            yield self.normalize(images), labels

    def windows(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """One process's passes of each step of an epoch, from its step `first_step`: (N, 3, H, W) uint8, which `normalize`
        takes when the pass's turn comes, and (N,) int64 labels."""
        window = []
        for batch in self._on_device(epoch, first_step):
            window.append(batch)
            if len(window) == self.batches.share.passes:
                yield window
                window = []

    def places(self, epoch: int, step: int) -> list[str]:
        """`train.txt:17 path/to/image.jpg` of each image of the global batch at an epoch's step."""
        return [self.images.place(i) for i in self.batches.order(epoch)[step].tolist()]

    def _on_device(self, epoch: int, first_step: int) -> Iterator[list[torch.Tensor]]:
        """(N, 3, H, W) uint8, (N,) int64. Raises UserError, with file and line, at an image that cannot be read."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        if not len(self.batches):  # nothing is left, and no worker need start
            return
        batches = iter(self.loader)
        if self.loader.num_workers and not self.is_guarded:
            atexit.register(_end_workers)  # behind torch's own, so that it comes before them
            self.is_guarded = True
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield [part.to(self.device, non_blocking=True) for part in batch]


def available_cores() -> int:
    """CPU cores this process may use; more workers than that only take time from each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_workers() -> None:
    """At this process's exit in the middle of an epoch. torch would wait five seconds for each worker, then send SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's end for a failure
    for child in multiprocessing.active_children():
        if child.daemon:  # as workers are; Python itself would end these
            child.kill()


def _begin_worker(worker: int) -> None:
    """Signals are the main process's affair: a worker that ended at one would take the run with it before its checkpoint.
    It ends with its parent. The garbage collector marks the objects it visits: without `freeze`, a forked worker copies
    every page that holds one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()


def _collate(samples):
    return samples if isinstance(samples, UserError) else default_collate(samples)


def train_loader(dataset: Dataset, settings: ImageSettings, device: torch.device, share: Share | None = None) -> Loader:
    """Without a share, of one process that takes all. Raises UserError where the list holds less than one batch."""
    c, images = settings.config, dataset.lists["train"]
    share = share or Share(c.batch_size)
    used = len(images) if c.limit_train is None else min(c.limit_train, len(images))
    if used < c.batch_size:
        raise UserError(f"{images.file}: {used} images are fewer than --batch-size {c.batch_size}; lower it")
    indices = np.linspace(0, len(images) - 1, used).round().astype(np.int64)
    listed = ListedImages(images, dataset.image_root, train_transform(settings), c.seed)
    return Loader(listed, ShuffledBatches(indices, share, c.seed), settings, device)


def eval_loader(
    dataset: Dataset, split: str, settings: ImageSettings, device: torch.device, share: Share | None = None
) -> Loader:
    """A process's part of the list, in its order: the processes' parts together are every image once."""
    images, share = dataset.lists[split], share or Share(settings.config.batch_size)
    listed = ListedImages(images, dataset.image_root, eval_transform(settings), None)
    batch_size = -(-share.batch_size // share.parts)
    return Loader(listed, OrderedBatches(*share.span(len(images)), batch_size), settings, device)
