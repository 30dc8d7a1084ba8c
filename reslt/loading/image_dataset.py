"""The images of a list as a dataset that worker processes share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from reslt.augment.decode import decode_or_reason, size_or_reason
from reslt.augment.host_transforms import RandomView, ViewFirst, seed_generators
from reslt.core.errors import LocalFault, UserError
from reslt.core.seeding import derive_seed
from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot


class ListedImages(torch.utils.data.Dataset):
    """The images of a list. A sample is (3, H, W) uint8 and its label. A key is (epoch, index), (epoch, index, draw) or
    (epoch, index, draw, view); the draw, or else the index, seeds the transform.

    The list is in shared memory, so that worker processes do not copy it, whether forked or spawned."""

    def __init__(
        self,
        images: ImageList,
        root: ImageRoot,
        transform: Callable | None,
        seed: int | None,
        transform_of_views: Callable | None = None,
    ):
        """`transform`: PIL -> (3, H, W) uint8; if it is a ViewFirst, only its view of an image is decoded; None if no sample
        is taken. `seed` None: the transform is deterministic. `transform_of_views`: for the views of an image from
        number 1 on; view 0 gets `transform`."""
        self.file, self.root, self.transform, self.seed = images.file, root, transform, seed
        self.transform_of_views = transform_of_views
        parts = images.text, images.ends, images.labels, images.lines_without_image
        self.text, self.ends, self.labels, self.lines_without_image = (
            torch.from_numpy(part).share_memory_() for part in parts
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        epoch, i, draw = key[0], key[1], key[2] if len(key) > 2 else key[1]
        transform = self.transform_of_views if len(key) > 3 and key[3] else self.transform
        view, finish = (transform.view, transform.steps) if isinstance(transform, ViewFirst) else (None, transform)
        if self.seed is not None:
            seed_generators(derive_seed(self.seed, epoch, draw))
        image, reason = self.decoded(i, view)
        if reason:
            raise self.fault(i, reason)
        return finish(image), int(self.labels[i])

    def fault(self, i: int, reason: str) -> LocalFault:
        """Return the error for image i, which cannot be read."""
        images = self.listed
        return LocalFault(
            f"{images.place(i)}: {self.root.file(images.path(i))}: {reason}; {self.root.remedy}, remove the line from the "
            "list, or see --bad-images"
        )

    def place(self, i: int) -> str:
        """Return `file:line path` for image i."""
        images = self.listed
        return f"{images.place(i)} {images.path(i)}"

    def decoded(self, i: int, view: RandomView | None = None) -> tuple[Image.Image | None, str | None]:
        """Return image i, or a view of it, or the reason why it cannot be read."""
        return decode_or_reason(self.root.file(self.listed.path(i)), view)

    def common_size(
        self, stored: Callable[[int, int], tuple[int, int]], largest: int | None
    ) -> tuple[tuple[int, int] | None, str]:
        """Read the files' headers and return the (height, width) that all images have as stored, and ""; or None and the
        first image with another size.

        `stored`: (height, width) of a file -> (height, width) of the image as stored. The size of the first image that is
        larger than `largest` pixels a side is returned without reading on. Raises LocalFault for an unreadable file."""
        common = None
        for i in range(len(self)):
            size, reason = size_or_reason(self.root.file(self.listed.path(i)))
            if reason:
                raise self.fault(i, reason)
            found = stored(*size[::-1])
            if common is not None and found != common:
                return None, f"{self.place(i)} differs in size from the images before it"
            common = found
            if largest is not None and max(common) > largest:
                break
        return common, ""

    def __getitems__(self, keys: np.ndarray) -> list[tuple[torch.Tensor, int]] | UserError:
        """(N, 2), (N, 3) or (N, 4) keys -> the samples of a batch. An error is returned, not raised: torch would wrap a
        worker's exception in its traceback."""
        images, keys = self.listed, np.asarray(keys).tolist()
        try:
            with self.root.ahead(images.path(key[1]) for key in keys):
                return [self[key] for key in keys]
        except UserError as fault:
            return fault

    @property
    def listed(self) -> ImageList:
        """The list itself, as a view of the shared memory."""
        parts = self.text, self.ends, self.labels, self.lines_without_image
        return ImageList(self.file, *(part.numpy() for part in parts))
