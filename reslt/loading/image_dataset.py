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
    """The images of a list. A key is (epoch, index), whose index seeds the transform, or (epoch, index, draw), whose draw
    does, or (epoch, index, draw, view); a sample is (3, H, W) uint8 and its label.

    The list is in shared memory, so that worker processes do not copy it, forked or spawned."""

    def __init__(self, images: ImageList, root: ImageRoot, transform, seed: int | None, transform_of_views=None):
        """`seed` None: the transform is deterministic. If it is a ViewFirst, only its view of an image is decoded.
        `transform_of_views`: of the views of an image from 1; view 0 gets the other."""
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
        """Return the error for image i."""
        images = self.listed
        return LocalFault(
            f"{images.place(i)}: {self.root.file(images.path(i))}: {reason}; {self.root.remedy}, remove the line from the "
            "list, or see --bad-images"
        )

    def place(self, i: int) -> str:
        """Return `file:line path` of image i."""
        images = self.listed
        return f"{images.place(i)} {images.path(i)}"

    def decoded(self, i: int, view: RandomView | None = None) -> tuple[Image.Image | None, str | None]:
        """Return image i, or a view of it, or the reason why it cannot be read."""
        return decode_or_reason(self.root.file(self.listed.path(i)), view)

    def common_size(
        self, stored: Callable[[int, int], tuple[int, int]], largest: int | None
    ) -> tuple[tuple[int, int] | None, str]:
        """Return the (height, width) of all images as stored, and ""; or None and where sizes differ. Reads headers.

        `stored`: (height, width) of a file -> that of the image as stored. Reading ends at the first image that is
        larger than `largest` pixels a side, whose size is returned. Raises LocalFault for an unreadable file."""
        common = None
        for i in range(len(self)):
            size, reason = size_or_reason(self.root.file(self.listed.path(i)))
            if reason:
                raise self.fault(i, reason)
            found = stored(*size[::-1])
            if common is not None and found != common:
                return None, f"{self.place(i)} has another size than the images before it"
            common = found
            if largest is not None and max(common) > largest:
                break
        return common, ""

    def __getitems__(self, keys: np.ndarray) -> list[tuple[torch.Tensor, int]] | UserError:
        """(N, 2), (N, 3) or (N, 4) keys -> a batch, or an error instead of raising it: torch would wrap a worker's
        exception in its traceback."""
        images, keys = self.listed, np.asarray(keys).tolist()
        try:
            with self.root.ahead(images.path(key[1]) for key in keys):
                return [self[key] for key in keys]
        except UserError as fault:
            return fault

    @property
    def listed(self) -> ImageList:
        """The list itself, over the shared memory."""
        parts = self.text, self.ends, self.labels, self.lines_without_image
        return ImageList(self.file, *(part.numpy() for part in parts))
