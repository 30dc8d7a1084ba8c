"""The images of a list in memory: decoded once, on all cores, and kept in a file for later runs."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from reslt.core.errors import UserError
from reslt.loading.batches import OrderedBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.kept_arrays import Kind, kept
from reslt.loading.workers import Workers

PIXELS = Kind("pixels", np.dtype(np.uint8), 4, "decoded images", "decoded")
BATCH = 256


def pixels(images: ListedImages, described: str, workers: int) -> np.ndarray:
    """Return all images of a list after `images.transform`, which is deterministic, as (N, 3, H, W) uint8; from the cache
    folder as long as they are unchanged (see `kept`).

    `described` describes the transform. Raises UserError, with file and line, for an image that cannot be read, or that
    differs in size from the first."""
    return kept(PIXELS, images, described, lambda: _decoded(images, workers))


def _decoded(images: ListedImages, workers: int) -> np.ndarray:
    """Decode a list, with a progress bar, to (N, 3, H, W) uint8 in its order."""
    first_image, reason = images.decoded(0)
    if reason:
        raise images.fault(0, reason)
    shape = images.transform(first_image).shape
    array = np.empty((len(images), *shape), np.uint8)
    batches = OrderedBatches(0, len(images), BATCH)
    decoded = Workers(images, batches, workers, collate=EqualSizes(shape))
    with tqdm(total=len(images), desc=f"decoding {images.file.stem}", unit="image", leave=False, disable=None) as bar:
        for (first, end), batch in zip(batches.spans(), decoded, strict=True):
            if isinstance(batch, int):
                raise UserError(
                    f"{images.place(first + batch)}: the image does not have the size that its header states; repair it, "
                    "or use --data-on-device off"
                )
            array[first:end] = batch.numpy()
            bar.update(end - first)
    return array


class EqualSizes:
    """A collate function: samples -> (N, *shape) images, or the position of the first one with another shape."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, samples: list[tuple[torch.Tensor, int]]) -> torch.Tensor | int:
        unequal = [i for i, (image, _) in enumerate(samples) if image.shape != self.shape]
        return unequal[0] if unequal else torch.stack([image for image, _ in samples])
