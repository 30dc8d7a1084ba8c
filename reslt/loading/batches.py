"""The choice of each batch's images, and the base class of loaders. The order is a pure function of (seed, epoch)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from reslt.augment.settings import ImageSettings
from reslt.core.batch_shard import BatchShard
from reslt.core.seeding import derive_seed
from reslt.loading.image_dataset import ListedImages

SECOND_STREAM = -1  # seeds the order of the second images of pairs; the seeds of epochs count from 0


class Normalize(torch.nn.Module):
    """Normalization: (N, 3, H, W) uint8 -> float32, (x / 255 - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)  # in place: fresh memory is slow


def limited(images: int, limit: int | None) -> np.ndarray:
    """Return the indices of a list of `images` that --limit-train keeps, spread evenly over it; all of them for None."""
    used = images if limit is None else min(limit, images)
    return np.linspace(0, images - 1, used).round().astype(np.int64)


def steps_per_epoch(images: int, limit: int | None, batch_size: int) -> int:
    """Return the number of global batches per epoch; an incomplete one is dropped."""
    return len(limited(images, limit)) // batch_size


class Order(Protocol):
    """A sampler: an order of an epoch's images other than the loader's own permutation."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the (N,) positions of an epoch's N images, as a pure function of the arguments."""


class ShuffledBatches(Sampler):
    """A process's shard of each global batch, as keys (epoch, index, draw) over `indices`, reshuffled in each epoch. The
    last incomplete batch is dropped. Batches begin at the epoch's step `first_step`.

    The draw is the number that seeds the augmentation: the index itself or, with a `sampler`, which may draw an image
    several times in an epoch, the place in the epoch. With a `second_sampler`, each image has a partner, drawn
    independently: the N keys of a micro-batch are followed by those of their N partners, with draws of their own. With
    several `views` of each image, the keys are (epoch, index, draw, view): those of the N first views are followed by
    those of the N second views, and so on."""

    def __init__(
        self,
        indices: np.ndarray,
        shard: BatchShard,
        seed: int,
        sampler: Order | None = None,
        second_sampler: Order | None = None,
        views: int = 1,
    ):
        self.views = views  # more than 1 only without a second sampler
        self.indices, self.shard, self.seed = indices, shard, seed
        self.sampler, self.second_sampler = sampler, second_sampler
        self.epoch = self.first_step = 0  # set by the loader

    @property
    def steps(self) -> int:
        """The number of global batches per epoch."""
        return len(self.indices) // self.shard.batch_size

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.shard.micro_batches

    @property
    def draws(self) -> int:
        """The exclusive upper bound of the draws of an epoch's first views; the draws of each further view follow."""
        images = int(self.indices.max()) + 1
        return images if self.second_sampler is None else images + len(self.indices)

    def order(self, epoch: int) -> np.ndarray:
        """Return the (steps, global batch) indices of an epoch."""
        if self.sampler is not None:
            return self._in_steps(self.sampler.order(self.seed, epoch))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        return self._in_steps(torch.randperm(len(self.indices), generator=generator).numpy())

    def second_order(self, epoch: int) -> np.ndarray:
        """Return the (steps, global batch) indices of the partners in an epoch."""
        return self._in_steps(self.second_sampler.order(derive_seed(self.seed, SECOND_STREAM), epoch))

    def _in_steps(self, positions: np.ndarray) -> np.ndarray:
        used = self.steps * self.shard.batch_size
        return self.indices[positions[:used]].reshape(self.steps, self.shard.batch_size)

    def images_of(self, epoch: int, step: int) -> list[int]:
        """Return the indices of the global batch at a step of an epoch, the partners last."""
        orders = [self.order(epoch)] if self.second_sampler is None else [self.order(epoch), self.second_order(epoch)]
        return [i for order in orders for i in order[step].tolist()]

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the (remaining steps, micro-batches, N) indices of this process's shard of the epoch from `first_step`, and
        their draws. For pairs the last axis has length 2 N, for V views V N."""
        order, shard = self.order(self.epoch), np.stack(self.shard.positions)
        places = np.arange(order.size).reshape(order.shape)
        indices, draws = [order], [order if self.sampler is None else places]
        if self.second_sampler is not None:
            indices.append(self.second_order(self.epoch))
            draws.append(self.draws - len(self.indices) + places)  # after the draws of the first images
        for view in range(1, self.views):
            indices.append(order)
            draws.append(draws[0] + view * self.draws)
        return tuple(
            np.concatenate([of_stream[self.first_step :][:, shard] for of_stream in parts], axis=-1)
            for parts in (indices, draws)
        )

    @property
    def images_at_once(self) -> int:
        """The number of images of a micro-batch, all views and partners included."""
        return len(self.shard.positions[0]) * self.views * (1 if self.second_sampler is None else 2)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the (N, 3) int64 keys of each micro-batch; with several views, (V N, 4)."""
        indices, draws = (of_all.reshape(-1, of_all.shape[-1]) for of_all in self.parts())
        for batch, of_batch in zip(indices, draws, strict=True):
            columns = [np.full(len(batch), self.epoch), batch, of_batch]
            yield np.stack(columns if self.views == 1 else [*columns, of_batch // self.draws], axis=1)


class OrderedBatches(Sampler):
    """Batches of keys (0, index) from `start` to `stop` in the list's order, including an incomplete last one.
    `is_filled`: an incomplete last batch is filled with earlier images, which come first and have no labels, so that all
    batches have the same size."""

    def __init__(self, start: int, stop: int, batch_size: int, is_filled: bool = False):
        self.start, self.stop, self.batch_size, self.is_filled = start, stop, batch_size, is_filled
        self.epoch = self.first_step = 0  # set by the loader, as for shuffled batches, without effect on the order

    @property
    def steps(self) -> int:
        """The number of batches."""
        return -(-(self.stop - self.start) // self.batch_size)

    def __len__(self) -> int:
        return self.steps

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the first index of each batch and the one after its last."""
        for first in range(self.start, self.stop, self.batch_size):
            yield first, min(first + self.batch_size, self.stop)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the (N, 2) int64 keys of each batch."""
        for first, end in self.spans():
            yield np.stack([np.zeros(end - first, np.int64), np.arange(first, end)], axis=1)


class Loader(ABC):
    """Batches of a list on a device."""

    def __init__(self, images: ListedImages, batches: Sampler, settings: ImageSettings, device: torch.device):
        self.images, self.batches, self.settings, self.device = images, batches, settings, device
        self.workers = None  # a loader with worker processes sets its `Workers`
        self.normalize = Normalize(settings.mean, settings.std).to(device)

    def __len__(self) -> int:
        return self.batches.steps

    @property
    def ordered_labels(self) -> np.ndarray:
        """The (N,) labels of the images that a sampler of shuffled batches orders."""
        return self.images.labels.numpy()[self.batches.indices]

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of one epoch: (N, 3, H, W) float32 normalized, (N,) int64 labels. If there are fewer labels than
        images, the labels belong to the last images; the other images only fill the batch."""
        for images, labels in self._begin(epoch, 0):
            yield self.normalize(images), labels

    def windows(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Yield this process's micro-batches of each step of an epoch, from step `first_step`: (N, 3, H, W) uint8, which
        the step passes to `normalize` one by one, and (N,) int64 labels. N pairs are 2 N images and labels, the first
        images first; N images in V views are V N images, the first views first, and N labels."""
        window, views = [], self.batches.views
        for images, labels in self._begin(epoch, first_step):
            window.append((images, labels if views == 1 else labels[: len(images) // views]))
            if len(window) == self.batches.shard.micro_batches:
                yield window
                window = []

    def places(self, epoch: int, step: int) -> list[str]:
        """Return `train.txt:17 path/to/image.jpg` for each image of the global batch at a step of an epoch."""
        return [self.images.place(i) for i in self.batches.images_of(epoch, step)]

    def end(self) -> None:
        """End the worker processes, if there are any. Another epoch would start new ones."""
        if self.workers is not None:
            self.workers.end()

    def _begin(self, epoch: int, first_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.batches.epoch, self.batches.first_step = epoch, first_step
        return self.on_device() if len(self.batches) else iter(())  # without batches, start no worker

    @abstractmethod
    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the current `self.batches`: (N, 3, H, W) uint8, (N,) int64 labels. With several views, there may be labels
        of the first views alone; a filled batch has labels of its last images. Raises UserError, with file and line, for an
        image that cannot be read."""
