"""Shared memory that worker processes reuse for batches of images.

A new block of shared memory for each batch would cost the main process a connection to the worker, a mapping and, when
the batch is freed, work for each of its pages: 6 ms for 256 images of 224 x 224 pixels."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from reslt.core.errors import UserError

SHARED_MEMORY = Path("/dev/shm")  # on Linux; in containers it is often small
_NUMBERS = count()
_OF_PROCESS: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


class Slots:
    """A number of `slots`, each a block of `size` bytes of shared memory. The main process takes a free slot for each batch
    that it requests. A slot is free again when no tensor uses it."""

    def __init__(self, slots: int, size: int):
        # torch has no public name for this; share_memory_ would copy, and thus occupy, all of it at once
        storage = torch.UntypedStorage._new_shared(slots * size)
        self.memory = torch.empty(0, dtype=torch.uint8).set_(storage).view(slots, size)
        self.number = next(_NUMBERS)
        _OF_PROCESS[self.number] = self
        self.used: set[int] = set()  # slots that tensors of this process use
        self.begin()

    @classmethod
    def created(cls, slots: int, size: int) -> Slots | None:
        """Return new slots; None if they would not leave as much shared memory free as they may occupy, or if the system
        does not allow so large a file."""
        if SHARED_MEMORY.is_dir() and 2 * slots * size > shutil.disk_usage(SHARED_MEMORY).free:
            return None
        try:
            return cls(slots, size)
        except RuntimeError:  # raised by torch, for example beyond the user's limit (ulimit -f)
            return None

    def begin(self) -> None:
        """Forget the batches that were requested but never received."""
        self.free = [slot for slot in range(len(self.memory)) if slot not in self.used]

    def take(self) -> int | None:
        """Return a free slot; None if there is none."""
        return self.free.pop() if self.free else None

    def tensor(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the uint8 tensor of this shape that a worker has written to a slot."""
        array = self.memory[slot, : math.prod(shape)].numpy()
        self.used.add(slot)
        weakref.finalize(
            array, self._release, slot
        ).atexit = False  # the tensor's storage keeps the array, for all views
        return torch.from_numpy(array).view(shape)

    def _release(self, slot: int) -> None:
        self.used.discard(slot)
        self.free.append(slot)


class BatchesWithSlots(Sampler):
    """A sampler's batches of keys, each with a free slot."""

    def __init__(self, batches: Sampler, slots: Slots):
        self.batches, self.slots = batches, slots

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int | None, np.ndarray]]:
        self.slots.begin()  # no worker writes to a slot now: all have confirmed the end of the last epoch
        for keys in self.batches:
            yield self.slots.take(), keys


class SamplesWithSlots(Dataset):
    """Batches of a dataset's samples, (C, H, W) uint8 images and labels, each with the slot that it is for."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, requested: tuple[int | None, np.ndarray]) -> tuple[int | None, list] | UserError:
        slot, keys = requested
        samples = self.dataset.__getitems__(keys)
        return samples if isinstance(samples, UserError) else (slot, samples)


class IntoSlots:
    """A collate function: N samples and a slot -> (N, C, H, W) uint8 images, in the slot unless they are too large for it,
    and (N,) int64 labels."""

    def __init__(self, slots: Slots):
        self.memory, self.number = slots.memory, slots.number

    def __call__(self, requested: tuple[int | None, list]) -> InSlot | tuple[torch.Tensor, torch.Tensor]:
        slot, samples = requested
        images, labels = [image for image, _ in samples], np.array([label for _, label in samples], np.int64)
        shape = (len(images), *images[0].shape)
        if slot is None or math.prod(shape) > self.memory.shape[1]:
            return torch.stack(images), torch.from_numpy(labels)
        torch.stack(images, out=self.memory[slot, : math.prod(shape)].view(shape))
        return InSlot(self.number, slot, shape, labels)


class InSlot:
    """A batch in a slot, as a worker sends it. The main process receives [(N, C, H, W) images, (N,) labels]."""

    def __init__(self, *place):
        self.place = place

    def __reduce__(self):
        return _received, self.place


def _received(number: int, slot: int, shape: tuple[int, ...], labels: np.ndarray) -> list[torch.Tensor]:
    return [_OF_PROCESS[number].tensor(slot, shape), torch.from_numpy(labels)]
