"""An image file -> RGB pixels, upright; the whole image, or one view of it, for which a JPEG is decoded no larger than needed."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

T = TypeVar("T")
Image.init()  # all of PIL's formats, so that those it was built without can be told from those it has
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
LONGEST = 100  # times the short side: more would become gigabytes when the short side is resized
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # what makes the width the height
SCALES = 8, 4, 2  # a JPEG's 8 x 8 coefficients can be decoded to 1, 2 or 4 pixels a side
# A scaled JPEG still has this many pixels a side for each of the result, which are then resampled as ever. Measured on
# photos at 224 pixels, mean difference from the whole decode in levels of 255, and the time of decode, crop and resize:
# 1 -> 1.1 and 1/2.1; 1.5 -> 0.6 and 1/1.7; 2 -> 0.5 and 1/1.5. Bilinear and bicubic differ by 1.3.
GAP = 1.5
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has none, and no FIFO in a folder either
# What PIL only warns of (a large image, a broken EXIF block, an odd palette) has its outcome in `decode`.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnsupportedImage(ValueError):
    """Why a file is not taken as an image; the text is the reason as the user reads it."""


@dataclass(frozen=True)
class View:
    """A box of an upright image, resized."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels
    size: tuple[int, int]  # (width, height) of the result in pixels
    resampling: Image.Resampling

    def of(self, image: Image.Image, scale: int = 1) -> Image.Image:
        """The view of an image whose sides were divided by `scale`; no pixel outside the box counts, but parts of one."""
        left, top, right, bottom = (edge / scale for edge in self.box)
        x, y = math.floor(left), math.floor(top)
        part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
        return part.resize(self.size, self.resampling, box=(left - x, top - y, right - x, bottom - y))


def decode(path: Path, view: Callable[[tuple[int, int]], View] | None = None) -> Image.Image:
    """An image file, or the first frame or page of one, as RGB, upright. Nothing is guessed, mended or substituted.

    `view` is asked, with the upright image's (width, height), what to show of it; None: the whole. A large JPEG is then
    decoded at 1/2, 1/4 or 1/8 of its sides, which shows in small differences; every other view is that of the whole image.

    By content, whatever the file is called: RGB, grey, black and white, YCbCr, LAB, CMYK and palette by PIL's conversion;
    alpha is dropped and the colours stay as stored; 16-bit values become their high byte; the EXIF orientation is applied,
    or passed over where that block is broken. Raises UnsupportedImage for a file that is empty or none, for a format that is not in
    FORMATS, for 32-bit and floating-point values (their range is unknown), for more than 100 times as long as wide; an
    error of PIL's for a truncated or broken image and for more than 178,956,970 pixels; OSError where it cannot be opened."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever a library made of it: half an image would be grey
    with _opened(path) as image:
        if view is None or not isinstance(image, JpegImageFile):
            rgb = _to_rgb(image)
            whole = _turned(rgb, _turn(image))  # in this order: a PNG's EXIF block may follow its pixels
            return whole if view is None else view(whole.size).of(whole)
        turn = _turn(image)
        shown = view(_upright(image.size, turn))
        scale = _scale_down(image, shown, turn)
        return shown.of(_turned(_to_rgb(image), turn), scale)


def size_or_reason(path: Path) -> tuple[tuple[int, int] | None, str | None]:
    """The upright (width, height) of an image file from its header alone, or the reason why `decode` would raise."""
    return _or_reason(lambda: _header_size(path))


def decode_or_reason(
    path: Path, view: Callable[[tuple[int, int]], View] | None = None
) -> tuple[Image.Image | None, str | None]:
    """What `decode` returns, or the reason why it raises, in one printable line."""
    return _or_reason(lambda: decode(path, view))


def _or_reason(read: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return read(), None
    except (FileNotFoundError, NotADirectoryError):
        return None, "there is no such image"
    except UnsupportedImage as reason:
        return None, str(reason)
    except Exception as fault:  # PIL raises many kinds for broken files; each means the same to the user
        reason_text = " ".join((getattr(fault, "strerror", None) or str(fault) or type(fault).__name__).split())
        return None, f"not a readable image ({''.join(c if c.isprintable() else '?' for c in reason_text)})"


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file of which the header is read. Raises UnsupportedImage for what is refused at sight."""
    with open(path, "rb", opener=_open_regular) as file:  # not by path: PIL would map it, and crash where it shrinks
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise UnsupportedImage(f"no image of a kind that is read here ({', '.join(FORMATS)})") from None
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            raise UnsupportedImage(f"{width} x {height} pixels, more than {LONGEST} times as long as wide; crop it")
        yield image


def _header_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return _upright(image.size, _turn(image))


def _upright(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    return size[::-1] if turn in SIDEWAYS else size


def _open_regular(path: str, flags: int) -> int:
    """How `decode` opens: without waiting for the writer of a FIFO. Raises UnsupportedImage where there is nothing to read."""
    try:
        descriptor = os.open(path, flags | NONBLOCK)
    except BlockingIOError:  # a file server on this machine holds a lease and is asked for it: wait
        descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return descriptor
    os.close(descriptor)
    raise UnsupportedImage(
        "the file is empty" if stat.S_ISREG(status.st_mode) else "not a file but a folder, pipe or device"
    )


def _scale_down(image: JpegImageFile, shown: View, turn: Image.Transpose | None) -> int:
    """Have a JPEG that is not loaded yet decoded with its sides divided by the number returned, 1 where none fits."""
    (width, height), (left, top, right, bottom) = image.size, shown.box
    spare = min((right - left) / shown.size[0], (bottom - top) / shown.size[1]) / GAP
    for scale in SCALES:
        # The last pixel of a side that is no multiple is part of one; turned, it would come first and shift the others.
        if scale <= spare and (turn is None or width % scale == height % scale == 0):
            drafted = image.draft(None, (width // scale, height // scale))
            return 1 if drafted is None else scale
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """An opened image, loaded, as RGB. Raises UnsupportedImage where its values have no known range."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # straight, PIL would warn that transparency is lost
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits, inverted = 16, False
        if image.format == "TIFF":  # PIL leaves 12 bits as they are, and white at 0
            bits, inverted = image.tag_v2[BITS_PER_SAMPLE][0], image.tag_v2.get(PHOTOMETRIC) == 0
        grey = (np.asarray(image) >> bits - 8).astype(np.uint8)
        return Image.fromarray(~grey if inverted else grey).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit values" if image.mode == "I" else "floating-point values"
        raise UnsupportedImage(f"mode {image.mode}: {kind}, whose range is unknown; convert it to 8 bits a channel")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, by its EXIF block; None where that says nothing or is broken. PIL itself turns TIFFs."""
    if "exif" not in image.info:
        return None
    try:
        exif = Image.Exif()
        exif.load(image.info["exif"])
        return UPRIGHT.get(exif.get(ORIENTATION))
    except Exception:  # whatever PIL raises for a broken block
        return None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)
