"""Images of a list decoded in parallel, as in training: readability, digest, duration and fingerprint of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot
from reslt.loading.image_dataset import ListedImages
from reslt.loading.workers import Workers
from reslt.prepare.contents import digest_of, fingerprint

BATCH = 64


class Examined(NamedTuple):
    """An image: its index, the reason why training would stop at it or None, its digest (None: unreadable or empty), the
    seconds to read and decode it, and its fingerprint if requested."""

    index: int
    reason: str | None
    digest: bytes | None
    seconds: float
    fingerprint: bytes | None


class ExaminedImages(ListedImages):
    """The images of a list, examined on access. A key is an index."""

    def __init__(self, images: ImageList, root: ImageRoot, fingerprints: bool):
        super().__init__(images, root, None, None)
        self.fingerprints = fingerprints

    def __getitems__(self, keys: list[int]) -> list[Examined]:
        with self.root.ahead(self.listed.path(int(key)) for key in keys):
            return [self._examined(int(key)) for key in keys]

    def _examined(self, i: int) -> Examined:
        start = time.perf_counter()
        image, reason = self.decoded(i)
        seconds = time.perf_counter() - start
        digest = digest_of(self.root.file(self.listed.path(i))) if image else None
        return Examined(i, reason, digest, seconds, fingerprint(image) if image and self.fingerprints else None)


def examine(
    images: ImageList, root: ImageRoot, indices: np.ndarray, workers: int, fingerprints: bool = False
) -> Iterator[Examined]:
    """Examine images in worker processes, with a progress bar. Yield the results in order."""
    batches = np.array_split(indices, -(-len(indices) // BATCH)) if len(indices) else []
    examined = Workers(ExaminedImages(images, root, fingerprints), batches, workers, collate=list)
    with tqdm(total=len(indices), desc=f"decoding {images.file.stem}", unit="image", leave=False, disable=None) as bar:
        for batch in examined:
            bar.update(len(batch))
            yield from batch
