"""The images of a list in one file: decoded once, on all cores, then mapped into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from reslt.core.cache import cache_folder
from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.loading.batches import OrderedBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.workers import Workers

FORMAT = "pixels 1"  # part of every file's name; change it when the format changes
BATCH = 256


def pixels(images: ListedImages, described: str, workers: int) -> np.ndarray:
    """Return (N, 3, H, W) uint8, all images of a list after `images.transform`, which is deterministic.

    `described` states what that transform does. The array is a private mapping of a file in the cache folder; the
    file's name contains a digest of the list, of its images' folder, sizes and times on disk, and of `described`. (If
    the cache folder cannot be written, the array is only in memory.) Raises UserError, with file and line, for an image
    that cannot be read, or whose size differs from that of the first."""
    file = (
        cache_folder() / f"{images.file.parent.resolve().name}-{images.file.stem}-{digest(images, described)[:24]}.npy"
    )
    kept = _mapped(file, len(images))
    if kept is not None:
        return kept
    shape = (len(images), *images.transform(_first(images)).shape)
    try:
        # Written, not mapped: a full disk is an error then, not the end of the process. "x": never another machine's.
        with atomic_file(file, durable=False) as temporary, open(temporary, "xb") as handle:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(handle, header)
            for _, batch in _decoded(images, shape[1:], workers):
                handle.write(batch.data)
            handle.flush()
        kept = _mapped(file, len(images))
    except OSError:  # the folder cannot be written, or the disk is full
        pass
    if kept is None:
        kept = np.empty(shape, np.uint8)
        for place, batch in _decoded(images, shape[1:], workers):
            kept[place] = batch
    return kept


def _mapped(file: Path, images: int) -> np.ndarray | None:
    """Map the content of `file`; None if it is missing or damaged. Private, since torch requires writable memory."""
    try:
        array = np.lib.format.open_memmap(file, mode="c")
    except Exception:  # NumPy's parser raises many types for a damaged header
        return None
    return array if array.dtype == np.uint8 and array.ndim == 4 and array.shape[:2] == (images, 3) else None


def digest(images: ListedImages, described: str) -> str:
    """Return the digest of everything that determines the pixels, as far as known without reading the image files."""
    listed = images.listed
    parts = (
        FORMAT,
        PIL.__version__,
        described,
        listed.digest,
        str(images.root.folder.resolve()),
        repr(images.root.rules),
    )
    stats = np.zeros((len(images), 2), np.int64)
    for i in range(len(images)):
        try:
            found = os.stat(images.root.file(listed.path(i)))
            stats[i] = found.st_size, found.st_mtime_ns
        except OSError:  # decoding will report it
            pass
    return hashlib.sha256("\n".join(parts).encode() + stats.tobytes()).hexdigest()


def _first(images: ListedImages):
    image, _ = images.decoded(0)
    if image is None:
        images[0, 0]  # raises the error, with its place
    return image


def _decoded(images: ListedImages, shape: tuple[int, ...], workers: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (slice of the list, (N, *shape) uint8) over the whole list, in its order, with a progress bar."""
    batches = OrderedBatches(0, len(images), BATCH)
    decoded = Workers(images, batches, workers, collate=EqualSizes(shape))
    with tqdm(total=len(images), desc=f"decoding {images.file.stem}", unit="image", leave=False, disable=None) as bar:
        for (first, end), batch in zip(batches.spans(), decoded, strict=True):
            if isinstance(batch, int):
                raise UserError(
                    f"{images.place(first + batch)}: the image does not have the size that its header states; repair it, "
                    "or use --data-on-device off"
                )
            yield slice(first, end), batch.numpy()
            bar.update(end - first)


class EqualSizes:
    """A collate function: samples -> (N, *shape) images, or the position of one that has another shape."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, samples: list[tuple[torch.Tensor, int]]) -> torch.Tensor | int:
        unequal = [i for i, (image, _) in enumerate(samples) if image.shape != self.shape]
        return unequal[0] if unequal else torch.stack([image for image, _ in samples])
