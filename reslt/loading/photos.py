"""Loading of photos to predict, outside any dataset, by worker processes. An unreadable photo does not stop the others."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from reslt.augment.decode import decode_or_reason
from reslt.augment.host_transforms import eval_transform
from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import Prefetcher
from reslt.data.paths import ImageRoot
from reslt.loading.batches import Normalize, OrderedBatches
from reslt.loading.workers import Workers


class PhotoFiles(torch.utils.data.Dataset):
    """Photo files with the transform of evaluation. A key is (0, index); a sample is (3, size, size) uint8 and None or, for
    a file that cannot be read, a black image and the reason.

    The paths are in shared memory, so that worker processes do not copy them, whether forked or spawned."""

    def __init__(self, paths: Sequence[str], root: ImageRoot, settings: ImageSettings):
        encoded = [os.fsencode(path) for path in paths]
        self.text = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8)).share_memory_()
        self.ends = torch.from_numpy(np.cumsum([len(path) for path in encoded], dtype=np.int64)).share_memory_()
        self.root, self.size, self.transform = root, settings.size, eval_transform(settings)

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, i: int) -> str:
        """Return path i, as given."""
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.text[start : int(self.ends[i])].numpy().tobytes())

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, str | None]:
        image, reason = decode_or_reason(self.root.file(self.path(key[1])))
        if reason:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), reason
        return self.transform(image), None


class PhotoBatches:
    """Batches of photos on a device, in order: (N, 3, size, size) float32 normalized, and for each photo None or the reason
    why it cannot be read."""

    def __init__(
        self, photos: PhotoFiles, settings: ImageSettings, device: torch.device, batch_size: int, workers: int
    ):
        batches = OrderedBatches(0, len(photos), batch_size)
        self.workers = Workers(photos, batches, workers, _stacked, pin_memory=device.type == "cuda")
        self.normalize = Normalize(settings.mean, settings.std).to(device)
        self.to_device = Prefetcher(device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[str | None]]]:
        reasons: deque[list[str | None]] = deque()  # of the batches that are prefetched

        def images() -> Iterator[list[torch.Tensor]]:
            for batch, of_batch in self.workers:
                reasons.append(of_batch)
                yield [batch]

        for (batch,) in self.to_device(images()):
            yield self.normalize(batch), reasons.popleft()


def _stacked(samples: list[tuple[torch.Tensor, str | None]]) -> tuple[torch.Tensor, list[str | None]]:
    images, reasons = zip(*samples, strict=True)
    return torch.stack(images), list(reasons)
