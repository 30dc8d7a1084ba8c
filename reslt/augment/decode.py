"""Decoding of image files to upright RGB pixels, whole or as a view; for a view, a JPEG is decoded no larger than needed."""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from reslt.data.shards import PackedImage, StoredImage, UnreadableShard

T = TypeVar("T")
Image.init()  # registers all formats that this build of PIL supports
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
# The brand after `ftyp` in files that FORMATS may not cover
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
PACKAGE = "which requires: pip install"  # in the reason for a format that an optional package decodes
LONGEST = 100  # times the short side: when resized by their short side, longer images would take gigabytes
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # those that swap width and height
SCALES = 8, 4, 2  # a JPEG's 8 x 8 coefficients can be decoded to 1, 2 or 4 pixels per side
# A scaled JPEG still has at least this many pixels per side for each pixel of the result; they are resampled as usual.
# Measured on photos at 224 pixels: the mean difference from the full decode in levels of 255, and the time for decode,
# crop and resize as a fraction of the full decode's. 1: 1.1 and 1/2.1; 1.5: 0.6 and 1/1.7; 2: 0.5 and 1/1.5. Bilinear
# and bicubic resampling differ by 1.3 levels.
GAP = 1.5
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has neither this flag nor FIFOs in folders
# `decode` handles each case that PIL warns of: a large image, a broken EXIF block, an odd palette.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnsupportedImage(ValueError):
    """The error for a file that is not accepted as an image; its text is the reason, as the user sees it."""


@dataclass(frozen=True)
class View:
    """A box of an upright image, resized."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels
    size: tuple[int, int]  # (width, height) of the result in pixels
    resampling: Image.Resampling

    def of(self, image: Image.Image, scale: int = 1) -> Image.Image:
        """Return the view of an image that was decoded with its sides divided by `scale`. Only pixels that are at least
        partly in the box contribute."""
        left, top, right, bottom = (edge / scale for edge in self.box)
        x, y = math.floor(left), math.floor(top)
        part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
        return part.resize(self.size, self.resampling, box=(left - x, top - y, right - x, bottom - y))


def decode(path: StoredImage, view: Callable[[tuple[int, int]], View] | None = None) -> Image.Image:
    """Decode an image file, or its first frame or page, to upright RGB. Nothing is guessed, repaired or replaced.

    `view` is called with the upright image's (width, height) and returns the view to decode; None: the whole image. For
    a view, a large JPEG is decoded at 1/2, 1/4 or 1/8 of its sides, with small differences; all other views are exact.

    The content decides the format, not the file's name. RGB, gray, black and white, YCbCr, LAB, CMYK and palette images
    are converted by PIL; alpha is dropped and the colors stay as stored; of 16-bit values the high byte is kept; the
    EXIF orientation is applied, or ignored if that block is broken. Raises UnsupportedImage for an empty file, a folder
    or pipe, a format that is not in FORMATS, 32-bit and floating-point values (their range is unknown), and an image
    more than 100 times as long as wide; an error of PIL for a truncated or broken image and for more than 178,956,970
    pixels; OSError if opening fails."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # in case a library set it: the missing part would become gray
    with _opened(path) as image:
        if view is None or not isinstance(image, JpegImageFile):
            whole = upright_rgb(image)
            return whole if view is None else view(whole.size).of(whole)
        turn = _turn(image)
        shown = view(_upright(image.size, turn))
        scale = _scale_down(image, shown, turn)
        return shown.of(_turned(_to_rgb(image), turn), scale)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to upright RGB as `decode` does. Raises UnsupportedImage for values of unknown range and
    an error of PIL for a broken image."""
    rgb = _to_rgb(image)
    return _turned(rgb, _turn(image))  # in this order: a PNG's EXIF block may follow its pixels


def size_or_reason(path: StoredImage) -> tuple[tuple[int, int] | None, str | None]:
    """Return the upright (width, height) of an image file, from its header, or the reason why `decode` would raise."""
    return _or_reason(lambda: _header_size(path))


def decode_or_reason(
    path: StoredImage, view: Callable[[tuple[int, int]], View] | None = None
) -> tuple[Image.Image | None, str | None]:
    """Return the result of `decode`, or the reason why it raises, in one printable line."""
    return _or_reason(lambda: decode(path, view))


def _or_reason(read: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return read(), None
    except (FileNotFoundError, NotADirectoryError):
        return None, "there is no such image"
    except (UnsupportedImage, UnreadableShard) as reason:
        return None, str(reason)
    except Exception as fault:  # PIL raises many types for broken files; all mean the same to the user
        reason_text = " ".join((getattr(fault, "strerror", None) or str(fault) or type(fault).__name__).split())
        return None, f"not a readable image ({''.join(c if c.isprintable() else '?' for c in reason_text)})"


@contextmanager
def _opened(path: StoredImage) -> Iterator[Image.Image]:
    """Open an image file and read its header. Raises UnsupportedImage if the header suffices to reject it."""
    with open_file(path) as file:  # not by path: PIL would map the file, and crash if it shrinks
        image = open_image(file)
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            raise UnsupportedImage(f"{width} x {height} pixels, more than {LONGEST} times as long as wide; crop it")
        yield image


def open_file(path: StoredImage) -> BinaryIO:
    """Open an image file, or read an image in a shard whole. Raises UnsupportedImage if there is nothing to read,
    UnreadableShard for an unreadable shard, and OSError if opening fails."""
    if isinstance(path, PackedImage):
        return io.BytesIO(path.read_bytes())
    return open(path, "rb", opener=_open_regular)


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image of a supported format. HEIC requires pillow-heif, which is imported for the first such file.

    Raises UnsupportedImage for any other format; its text names the package that decodes the format, if there is one."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(12)
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS and _heif_is_registered():
        try:
            return Image.open(file, formats=["HEIF"])
        except UnidentifiedImageError:
            raise UnsupportedImage("a HEIC image that pillow-heif cannot read") from None
    if brand in HEIF_BRANDS:
        raise UnsupportedImage(f"a HEIC image, {PACKAGE} pillow-heif")
    if brand in AVIF_BRANDS and not features.check("avif"):
        raise UnsupportedImage(f"an AVIF image, {PACKAGE} --upgrade pillow")
    raise UnsupportedImage(f"not an image of a supported format ({', '.join(FORMATS)})")


@cache
def _heif_is_registered() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _header_size(path: StoredImage) -> tuple[int, int]:
    with _opened(path) as image:
        return _upright(image.size, _turn(image))


def _upright(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    return size[::-1] if turn in SIDEWAYS else size


def _open_regular(path: str, flags: int) -> int:
    """Open a file without waiting for the writer of a FIFO. Raises UnsupportedImage if there is nothing to read."""
    try:
        descriptor = os.open(path, flags | NONBLOCK)
    except BlockingIOError:  # a file server on this machine has a lease on the file: wait for its release
        descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return descriptor
    os.close(descriptor)
    raise UnsupportedImage(
        "the file is empty" if stat.S_ISREG(status.st_mode) else "not a file but a folder, pipe or device"
    )


def _scale_down(image: JpegImageFile, shown: View, turn: Image.Transpose | None) -> int:
    """Set a JPEG that is not loaded yet to be decoded with its sides divided by the returned number, 1 if none fits."""
    (width, height), (left, top, right, bottom) = image.size, shown.box
    spare = min((right - left) / shown.size[0], (bottom - top) / shown.size[1]) / GAP
    for scale in SCALES:
        # If a side is not a multiple, its last decoded pixel covers less than a whole one; turned, that pixel would come
        # first and shift the others.
        if scale <= spare and (turn is None or width % scale == height % scale == 0):
            drafted = image.draft(None, (width // scale, height // scale))
            return 1 if drafted is None else scale
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Load an opened image and convert it to RGB. Raises UnsupportedImage if the range of its values is unknown."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # directly, PIL would warn that transparency is lost
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits, inverted = 16, False
        if image.format == "TIFF":  # PIL neither scales 12 bits nor inverts images in which white is 0
            bits, inverted = image.tag_v2[BITS_PER_SAMPLE][0], image.tag_v2.get(PHOTOMETRIC) == 0
        gray = (np.asarray(image) >> bits - 8).astype(np.uint8)
        return Image.fromarray(~gray if inverted else gray).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit values" if image.mode == "I" else "floating-point values"
        raise UnsupportedImage(f"mode {image.mode}: {kind}, whose range is unknown; convert it to 8 bits per channel")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright according to its EXIF block; None if the block is absent or
    broken. PIL itself turns TIFFs."""
    if "exif" not in image.info:
        return None
    try:
        exif = Image.Exif()
        exif.load(image.info["exif"])
        return UPRIGHT.get(exif.get(ORIENTATION))
    except Exception:  # PIL raises many types for a broken block
        return None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)
