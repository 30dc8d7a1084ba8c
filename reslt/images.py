"""One image of a list: decoded, augmented, as uint8. Augmentation is a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import os
import random
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from reslt.config import Config
from reslt.errors import LocalFault, UserError
from reslt.lists import ImageList
from reslt.paths import ImageRoot

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
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has none, and no FIFO in a folder either
# What PIL only warns of (a large image, a broken EXIF block, an odd palette) has its outcome in `decode`.
warnings.filterwarnings("ignore", module=r"PIL\.")


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's operation. At 0 bits, which its policies ask for, the image is black; Pillow 13 refuses to make it so."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep >= 1 else Image.new(image.mode, image.size)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = posterize


@dataclass(frozen=True)
class ImageSettings:
    """How files become inputs: the configuration's settings, and the model's own where it leaves them open."""

    size: int  # pixels, the side of the square input
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    config: Config

    @classmethod
    def of(cls, config: Config, model_data: dict) -> ImageSettings:
        """`model_data` is timm's `resolve_model_data_config(model)`."""

        def first(stated, own):
            return own if stated is None else stated

        return cls(
            size=first(config.img_size, max(model_data["input_size"][1:])),
            mean=first(config.mean, tuple(model_data["mean"])),
            std=first(config.std, tuple(model_data["std"])),
            interpolation=first(config.interpolation, model_data["interpolation"]),
            crop_pct=first(config.crop_pct, model_data["crop_pct"]),
            config=config,
        )


def train_transform(s: ImageSettings):
    """PIL RGB -> (3, size, size) uint8: RRC or pad-and-crop, flip, AutoAugment or color jitter, random erasing.

    Draws from the global generators. Raises UserError for an AutoAugment policy that timm does not understand."""
    c = s.config
    jitter = c.color_jitter * 3 if len(c.color_jitter) == 1 else c.color_jitter
    is_torchvisions = c.aa == "cifar10"
    try:
        crop, augment, to_tensor = create_transform(
            s.size,
            is_training=True,
            scale=c.scale,
            ratio=c.ratio,
            hflip=c.hflip,
            auto_augment=None if is_torchvisions else c.aa,  # timm leaves color jitter out beside it
            color_jitter=jitter if any(jitter) else None,
            interpolation=c.train_interpolation,
            mean=s.mean,  # fills what an operation leaves empty
            normalize=False,
            separate=True,
        )
    except (AssertionError, ValueError, KeyError) as fault:
        raise UserError(f"--aa {c.aa}: {fault}; a policy that timm takes is rand-m9-mstd0.5") from None
    if is_torchvisions:  # what a rotation or shear leaves empty is black, torchvision's default
        augment = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    if c.crop == "pad":
        resampling = "bilinear" if c.train_interpolation == "random" else c.train_interpolation
        crop = transforms.Compose(
            [
                transforms.Resize(s.size, str_to_interp_mode(resampling)),
                transforms.RandomCrop(s.size, padding=c.crop_padding),
                transforms.RandomHorizontalFlip(c.hflip),
            ]
        )
    erase = [ErasePixels(s)] if c.reprob else []
    return transforms.Compose([crop, augment, to_tensor, *erase])


class ErasePixels:
    """timm's random erasing on one (3, H, W) uint8 image. It expects normalised values, whose mean is 0."""

    def __init__(self, s: ImageSettings):
        self.erase = RandomErasing(s.config.reprob, mode=s.config.remode, device="cpu")
        self.mean, self.std = (255 * torch.tensor(numbers).view(3, 1, 1) for numbers in (s.mean, s.std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        erased = self.erase((image - self.mean) / self.std)
        return (erased * self.std + self.mean).round_().clamp_(0, 255).byte()


def eval_transform(s: ImageSettings):
    """PIL RGB -> (3, size, size) uint8: resize the short side to size / crop_pct, crop the centre."""
    return create_transform(
        s.size,
        is_training=False,
        interpolation=s.interpolation,
        crop_pct=s.crop_pct,
        crop_mode="center",
        normalize=False,
    )


class Refusal(ValueError):
    """Why a file is not taken as an image; the text is the reason as the user reads it."""


def decode(path: Path) -> Image.Image:
    """An image file, or the first frame or page of one, as RGB, upright. Nothing is guessed, mended or substituted.

    By content, whatever the file is called: RGB, grey, black and white, YCbCr, LAB, CMYK and palette by PIL's conversion;
    alpha is dropped and the colours stay as stored; 16-bit values become their high byte; the EXIF orientation is applied,
    or passed over where that block is broken. Raises Refusal for a file that is empty or none, for a format that is not in
    FORMATS, for 32-bit and floating-point values (their range is unknown), for more than 100 times as long as wide; an
    error of PIL's for a truncated or broken image and for more than 178,956,970 pixels; OSError where it cannot be opened."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever a library made of it: half an image would be grey
    with open(path, "rb", opener=_open_regular) as file:  # not by path: PIL would map it, and crash where it shrinks
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise Refusal(f"no image of a kind that is read here ({', '.join(FORMATS)})") from None
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            raise Refusal(f"{width} x {height} pixels, more than {LONGEST} times as long as wide; crop it")
        image.load()
        rgb = image if image.mode == "RGB" else _to_rgb(image)
        return _upright(rgb, image.info["exif"]) if "exif" in image.info else rgb  # PIL itself turns TIFFs


def _open_regular(path: str, flags: int) -> int:
    """How `decode` opens: without waiting for the writer of a FIFO. Raises Refusal where there is nothing to read."""
    try:
        descriptor = os.open(path, flags | NONBLOCK)
    except BlockingIOError:  # a file server on this machine holds a lease and is asked for it: wait
        descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return descriptor
    os.close(descriptor)
    raise Refusal("the file is empty" if stat.S_ISREG(status.st_mode) else "not a file but a folder, pipe or device")


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of another mode as RGB. Raises Refusal where its values have no known range."""
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
        raise Refusal(f"mode {image.mode}: {kind}, whose range is unknown; convert it to 8 bits a channel")
    return image.convert("RGB")


def _upright(image: Image.Image, exif_block: bytes) -> Image.Image:
    """Turned and mirrored as its EXIF block says; as it is where that block says nothing or is broken."""
    try:
        exif = Image.Exif()
        exif.load(exif_block)
        undo = UPRIGHT.get(exif.get(ORIENTATION))
    except Exception:  # whatever PIL raises for a broken block
        return image
    return image if undo is None else image.transpose(undo)


class ListedImages(torch.utils.data.Dataset):
    """The images of a list. A key is (epoch, index); a sample is (3, H, W) uint8 and its label.

    The list lies in shared memory, so that worker processes do not copy it, forked or spawned."""

    def __init__(self, images: ImageList, root: ImageRoot, transform, seed: int | None):
        """`seed` None: the transform draws nothing."""
        self.file, self.root, self.transform, self.seed = images.file, root, transform, seed
        self.lines_without_image = images.lines_without_image
        self.text, self.ends, self.labels = (
            torch.from_numpy(part).share_memory_() for part in (images.text, images.ends, images.labels)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, i = key
        image, reason = self.decoded(i)
        if reason:
            images = self._images()
            file = self.root.file(images.path(i))
            raise LocalFault(
                f"{images.place(i)}: {file}: {reason}; mend or replace the file, take the line out of the list, or see "
                "--bad-images"
            )
        if self.seed is not None:
            seed_generators(mix(self.seed, epoch, i))
        return self.transform(image), int(self.labels[i])

    def place(self, i: int) -> str:
        """`file:line path` of image i."""
        images = self._images()
        return f"{images.place(i)} {images.path(i)}"

    def decoded(self, i: int) -> tuple[Image.Image | None, str | None]:
        """Image i, or the reason why it cannot be had."""
        try:
            return decode(self.root.file(self._images().path(i))), None
        except (FileNotFoundError, NotADirectoryError):
            return None, "there is no such image"
        except Refusal as reason:
            return None, str(reason)
        except Exception as fault:  # PIL raises many kinds for broken files; each means the same to the user
            told = " ".join((getattr(fault, "strerror", None) or str(fault) or type(fault).__name__).split())
            return None, f"not a readable image ({''.join(c if c.isprintable() else '?' for c in told)})"

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]] | UserError:
        """A batch. A fault is returned, not raised: torch would wrap a worker's exception in its traceback."""
        try:
            return [self[key] for key in keys]
        except UserError as fault:
            return fault

    def _images(self) -> ImageList:
        return ImageList(self.file, self.text.numpy(), self.ends.numpy(), self.labels.numpy(), self.lines_without_image)


class DecodeFaults(ListedImages):
    """Decodes the images of a list and keeps none. A key is an index; a sample is the index, and the reason why the image
    cannot be had or None."""

    def __getitems__(self, keys: list[int]) -> list[tuple[int, str | None]]:
        return [(int(i), self.decoded(int(i))[1]) for i in keys]


def mix(*numbers: int) -> int:
    """Whole numbers -> one 63-bit number that looks random (the finalizer of SplitMix64 over each in turn)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_generators(seed: int) -> None:
    """Seed the three generators that torchvision's and timm's transforms draw from.

    `torch.manual_seed` would take 200 us a sample (it visits every device); the default generator alone takes 1."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
