"""Loading of large images: worker processes read JPEG files; the device decodes, crops, resizes and mirrors them.

A worker itself decodes images that the device may decode wrongly, and passes on only the box: other formats; turned,
progressive, CMYK and RGB-coded JPEGs; rare subsamplings. It also rejects files, for the same reasons as the host.
torchvision's GPU decoder would decode progressive JPEGs one after the other on the main process's core; it rejects some
of the other images and may show some in wrong colors. It requires CUDA 11.6 or newer (before, nvJPEG leaked memory) and
upsamples a subsampled JPEG's colors with another filter than libjpeg, which causes small differences at colored edges.
The host may decode a large JPEG at a fraction of its size; the device always decodes it at full size.

A file that ends too early is rejected, as on the host. Neither decoder notices damage inside the coded data of a complete
JPEG that still decodes; if the data does not decode, the GPU's decoder may show something that the host rejects."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import get_sampling
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.io import ImageReadMode, decode_jpeg

from reslt.augment.decode import LONGEST, open_file
from reslt.augment.host_transforms import RandomView, pil_to_chw, seed_generators
from reslt.augment.resample import RESAMPLINGS, flipped, resized_crops
from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import to_device
from reslt.core.errors import UserError
from reslt.core.seeding import derive_seed
from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot
from reslt.loading.image_dataset import ListedImages

END_OF_IMAGE = b"\xff\xd9"  # never part of the coded data, in which a zero follows each byte of 255
BLOCK_BYTES = 1 << 30  # for decoded images, and for their boxes padded to one size, unless a single image needs more


class Sample(NamedTuple):
    """One image of a batch, as a worker returns it."""

    content: torch.Tensor  # uint8: (L,) a JPEG file, or (3, H, W) pixels
    shape: tuple[int, int]  # height, width in pixels of the decoded content
    box: tuple[int, int, int, int]  # top, left, height, width of the part to show
    resampling: int  # a number of RESAMPLINGS
    flip: bool  # whether it is mirrored
    label: int
    index: int  # of the image in the list
    draw: int  # the number that seeds its augmentation


@dataclass(frozen=True)
class EncodedBatch:
    """N samples. All contents are one tensor, because a worker sends each tensor by a file descriptor, and has few."""

    content: torch.Tensor  # uint8: all contents, one after the other
    labels: torch.Tensor  # (N,) int64
    ends: np.ndarray  # (N,) int64: the end of each content
    is_jpeg: np.ndarray  # (N,) bool: whether the content is a JPEG file, not pixels
    shapes: np.ndarray  # (N, 2) int64
    boxes: np.ndarray  # (N, 4) int64
    resampling: np.ndarray  # (N,) int64
    flips: np.ndarray  # (N,) bool
    indices: np.ndarray  # (N,) int64
    draws: np.ndarray  # (N,) int64: the numbers that seed their augmentation

    @classmethod
    def of(cls, samples: list[Sample]) -> EncodedBatch:
        """Return the batch of N samples."""
        contents, shapes, boxes, resampling, flips, labels, indices, draws = zip(*samples, strict=True)
        return cls(
            torch.cat([content.flatten() for content in contents]),
            torch.tensor(labels),
            np.cumsum([content.numel() for content in contents]),
            np.array([content.dim() == 1 for content in contents]),
            *map(np.array, (shapes, boxes, resampling, flips, indices, draws)),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> EncodedBatch:
        """Return the batch in pinned memory, for the DataLoader."""
        return replace(self, content=self.content.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> EncodedBatch:
        """Return the batch with labels on the device. The contents stay on the host, whose memory decoders read."""
        return replace(self, labels=self.labels.to(device, non_blocking=non_blocking))

    def contents(self) -> list[torch.Tensor]:
        """Return the content of each sample as (L,) uint8, pixels included."""
        return list(self.content.split(np.diff(self.ends, prepend=0).tolist()))


class EncodedImages(ListedImages):
    """The images of a list before decoding, with the keys of `ListedImages`. Box, resampling and flip are those that
    `train_transform` draws for the same seed, epoch and image."""

    def __init__(self, images: ImageList, root: ImageRoot, settings: ImageSettings, seed: int):
        super().__init__(images, root, None, seed)
        augment = settings.augment
        self.view = RandomView(
            RandomResizedCropAndInterpolation(settings.size, augment.scale, augment.ratio, augment.train_interpolation)
        )
        self.hflip = augment.hflip

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        """Return a sample. Raises LocalFault, with file and line, for an image that cannot be read."""
        epoch, i, draw = key[0], key[1], key[-1]
        content, size = self._jpeg(i)
        if content is not None:
            box, *drawn = self._drawn(epoch, draw, *size)
            return Sample(content, size, box, *drawn, int(self.labels[i]), i, draw)
        image, reason = self.decoded(i)
        if reason:
            raise self.fault(i, reason)
        (top, left, height, width), *drawn = self._drawn(epoch, draw, image.height, image.width)
        pixels = pil_to_chw(image.crop((left, top, left + width, top + height)))
        return Sample(pixels, (height, width), (0, 0, height, width), *drawn, int(self.labels[i]), i, draw)

    def _jpeg(self, i: int) -> tuple[torch.Tensor | None, tuple[int, int]]:
        """Return the (L,) bytes of a file that the device decodes, and the image's height and width. Return None for any
        other file, even a missing or broken one, which the host reports."""
        path = self.root.file(self.listed.path(i))
        try:
            with open_file(path) as file, Image.open(file, formats=["JPEG"]) as image:
                if _is_plain(image):
                    scan = file.tell()
                    file.seek(0)
                    content = bytearray(file.read())
                    if content.find(END_OF_IMAGE, scan) >= 0:
                        return torch.frombuffer(content, dtype=torch.uint8), (image.height, image.width)
        except Exception:  # PIL raises many types
            pass
        return None, (0, 0)

    def _drawn(self, epoch: int, draw: int, height: int, width: int) -> tuple[tuple[int, int, int, int], int, bool]:
        """Draw an image's box, resampling and flip."""
        seed_generators(derive_seed(self.seed, epoch, draw))
        view = self.view((width, height))
        flip = bool(torch.rand(1) < self.hflip)
        left, top, right, bottom = view.box
        return (top, left, bottom - top, right - left), RESAMPLINGS[view.resampling.name.lower()], flip


def _is_plain(image: Image.Image) -> bool:
    """Return whether every decoder shows this opened JPEG as the host does."""
    if image.format != "JPEG" or max(image.size) > LONGEST * min(image.size) or "progressive" in image.info:
        return False
    components = [number for number, *_ in image.layer]
    if image.mode == "L":
        is_common = image.layer[0][1:3] == (1, 1)
    else:  # component numbers and Adobe's marker show that the colors are YCbCr
        is_common = components == [1, 2, 3] and image.info.get("adobe_transform", 1) == 1 and get_sampling(image) >= 0
    return is_common and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


class DeviceDecoder:
    """Decoding on the device: a batch of encoded images -> (N, 3, size, size) uint8 crops."""

    def __init__(self, images: EncodedImages, device: torch.device, size: int):
        """Raises UserError if torchvision cannot decode on the device."""
        self.images, self.device, self.size = images, device, size
        # Besides the stream of torchvision's decoder. On this one, work on images waits only for other such work.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        trial = io.BytesIO()
        Image.new("RGB", (16, 16)).save(trial, "JPEG")
        try:
            self._decode([torch.frombuffer(bytearray(trial.getvalue()), dtype=torch.uint8)])
        except RuntimeError as reason:
            reason_text = str(reason).splitlines()[0]
            raise UserError(
                f"--decode device: torchvision cannot decode on {device} ({reason_text}); use --decode host"
            ) from None

    def __call__(self, batch: EncodedBatch) -> torch.Tensor:
        """Return the crops of a batch. The host waits only for the decoder; on a GPU everything runs concurrently with the
        current stream. Raises LocalFault, with file and line, for an image that neither the device nor the host can
        decode."""
        if self.stream is None:
            return self._crops(batch)
        with torch.cuda.stream(self.stream):
            crops = self._crops(batch)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        crops.record_stream(current)
        return crops

    def _crops(self, batch: EncodedBatch) -> torch.Tensor:
        crops = torch.empty((len(batch), 3, self.size, self.size), dtype=torch.uint8, device=self.device)
        contents = batch.contents()
        for block in _blocks(batch):
            boxes = batch.boxes[block]
            padded = crops.new_empty((len(block), 3, *boxes[:, 2:].max(0).tolist()))
            images = self._images(batch, contents, block)
            for place, image, (top, left, height, width) in zip(padded, images, boxes.tolist(), strict=True):
                place[:, :height, :width] = image[:, top : top + height, left : left + width]
            boxes = np.pad(boxes[:, 2:], ((0, 0), (2, 0)))  # the boxes now begin at 0, 0
            resized = resized_crops(padded, boxes, self.size, batch.resampling[block])
            crops[to_device(block, self.device)] = resized
        return flipped(crops, to_device(batch.flips, self.device))

    def _images(self, batch: EncodedBatch, contents: list[torch.Tensor], block: np.ndarray) -> list[torch.Tensor]:
        """Return each image of a block on the device, (3, H, W) uint8."""
        jpegs = block[batch.is_jpeg[block]].tolist()
        images = dict(zip(jpegs, self._decoded(batch, contents, jpegs), strict=True))
        for i in set(block.tolist()) - set(jpegs):
            pixels = contents[i].view(3, *batch.shapes[i].tolist())
            images[i] = pixels.to(self.device, non_blocking=True)
        return [images[i] for i in block.tolist()]

    def _decoded(self, batch: EncodedBatch, contents: list[torch.Tensor], jpegs: list[int]) -> list[torch.Tensor]:
        """Decode all JPEGs at once; if that fails, one by one, and those that the device rejects on the host."""
        try:
            return self._decode([contents[i] for i in jpegs]) if jpegs else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:
            if len(jpegs) > 1:
                return [self._decoded(batch, contents, [i])[0] for i in jpegs]
            index = int(batch.indices[jpegs[0]])
            image, reason = self.images.decoded(index)
            if reason:
                raise self.images.fault(index, reason) from None
            reason_text = str(fault).splitlines()[0]
            warnings.warn(
                f"{self.images.place(index)}: decoded on the host, not the device ({reason_text})", stacklevel=2
            )
            return [pil_to_chw(image).to(self.device)]

    def _decode(self, files: list[torch.Tensor]) -> list[torch.Tensor]:
        """(L,) uint8 JPEG files on the host -> (3, H, W) uint8 on the device, for each. Raises RuntimeError if one fails."""
        if self.stream is not None:
            # The decoder's stream waits for no other: it might write to memory that our earlier work still reads.
            self.stream.synchronize()
        images = decode_jpeg(files, mode=ImageReadMode.RGB, device=self.device)
        return [image.to(self.device) for image in images]  # MPS has no decoder: the CPU's is used


def _blocks(batch: EncodedBatch) -> Iterator[np.ndarray]:
    """Yield the positions of samples in the batch, in blocks with similar boxes that stay within BLOCK_BYTES."""
    areas = batch.boxes[:, 2] * batch.boxes[:, 3]
    block, decoded, height, width = [], 0, 0, 0
    for i in np.argsort(areas, kind="stable").tolist():
        decoded += 3 * int(batch.shapes[i].prod())
        height, width = max(height, int(batch.boxes[i, 2])), max(width, int(batch.boxes[i, 3]))
        if block and max(decoded, 3 * (len(block) + 1) * height * width) > BLOCK_BYTES:
            yield np.array(block)
            block, decoded = [], 3 * int(batch.shapes[i].prod())
            height, width = batch.boxes[i, 2:].tolist()
        block.append(i)
    yield np.array(block)
