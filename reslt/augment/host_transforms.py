"""Augmentation of one image at a time with PIL, torchvision and timm: a pure function of the generators' seed."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from torchvision import transforms

from reslt.augment.cutout import Cutout, CutoutOfOne
from reslt.augment.decode import View
from reslt.augment.settings import GRAY, ImageSettings
from reslt.core.errors import UserError


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """Posterize as timm does. At 0 bits, which its policies contain, the image is black; Pillow 13 rejects that."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep >= 1 else Image.new(image.mode, image.size)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = posterize


class RandomView:
    """A drawing of views: (width, height) of an image -> the View that timm's random resized crop would draw from the
    global generators."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, size: tuple[int, int]) -> View:
        crop, (width, height) = self.crop, size
        of_that_size = torch.empty(()).expand(height, width)  # takes no memory
        top, left, box_height, box_width = crop.get_params(of_that_size, crop.scale, crop.ratio)
        modes = crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        # timm rounds a side of less than half a pixel to 0
        left, top = min(left, width - 1), min(top, height - 1)
        box = (left, top, left + max(box_width, 1), top + max(box_height, 1))
        return View(box, crop.size[::-1], str_to_pil_interp(mode.value))


class ViewFirst(transforms.Compose):
    """A random view of a PIL image, then further steps. A decoder may apply `view` itself and call only `steps`."""

    def __init__(self, view: RandomView, steps: list):
        super().__init__(steps)
        self.view = view

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.steps(self.view(image.size).of(image))

    def steps(self, seen: Image.Image) -> torch.Tensor:
        """Apply the steps that follow the view."""
        return super().__call__(seen)


def pil_to_chw(image: Image.Image) -> torch.Tensor:
    """PIL RGB -> (3, H, W) uint8, contiguous. torchvision's tensors are interleaved: stacking them into a batch would
    take ten times as long."""
    pixels = bytearray().join(image.tobytes("raw", band) for band in "RGB")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(3, image.height, image.width)


def train_transform(settings: ImageSettings) -> transforms.Compose:
    """Return the transform of training images, PIL RGB -> (3, size, size) uint8: random resized crop, pad-and-crop or
    center crop; flip; AutoAugment, color jitter or rotation (the second of its `transforms`); random erasing; Cutout.
    With a random resized crop it is a ViewFirst.

    It draws from the global generators. Raises UserError for an AutoAugment policy that timm does not know."""
    augment = settings.augment
    jitter = augment.color_jitter * 3 if len(augment.color_jitter) == 1 else augment.color_jitter
    is_torchvisions = augment.aa == "cifar10"
    fill = {"black": (0.0,) * 3, "grey": (GRAY / 255,) * 3, "mean": settings.mean, None: None}[augment.aa_fill]
    try:
        crop, policy, _ = create_transform(
            settings.size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            auto_augment=None if is_torchvisions else augment.aa,  # with it, timm omits color jitter
            color_jitter=jitter if any(jitter) else None,
            color_jitter_prob=settings.jitter_prob,
            grayscale_prob=settings.gray_prob,
            interpolation=augment.train_interpolation,
            mean=fill or settings.mean,  # fills pixels that an operation leaves empty
            normalize=False,
            separate=True,
        )
    except (AssertionError, ValueError, KeyError) as fault:
        raise UserError(f"--aa {augment.aa}: {fault}; a policy that timm accepts is rand-m9-mstd0.5") from None
    if is_torchvisions:  # without a fill, pixels that a rotation or shear leaves empty are black
        pixel = fill and [round(255 * value) for value in fill]
        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=pixel)
    if augment.rotate:
        policy = transforms.RandomRotation(augment.rotate)
    erase = [ErasePixels(settings)] if augment.reprob else []
    erase += [CutoutOfOne(cutout)] if (cutout := Cutout.of(settings)) else []
    if augment.crop != "rrc":
        crop = pad_and_crop(settings).transforms if augment.crop == "pad" else [CenterOfResized(settings)]
        flipped = transforms.Compose([*crop, transforms.RandomHorizontalFlip(augment.hflip)])
        return transforms.Compose([flipped, policy, pil_to_chw, *erase])
    resized_crop, *flip = crop.transforms
    return ViewFirst(RandomView(resized_crop), [transforms.Compose(flip), policy, pil_to_chw, *erase])


def contrast_transform(settings: ImageSettings) -> transforms.Compose:
    """Return the transform of an image's further views, for a contrastive loss: PIL RGB -> (3, size, size) uint8. They
    are cropped after the transforms of training images that precede anything random."""
    view = train_transform(settings.of_contrast)
    before = before_random(settings)
    return transforms.Compose([*before, view]) if before else view


def before_random(settings: ImageSettings) -> list:
    """Return the transforms PIL -> PIL of training images that precede anything random."""
    if settings.augment.crop == "center":
        return [CenterOfResized(settings)]
    return pad_and_crop(settings).transforms[:1] if settings.augment.crop == "pad" else []


def pad_and_crop(settings: ImageSettings) -> transforms.Compose:
    """Return a transform PIL -> PIL: resize the short side to the input's, pad with zeros, crop a random square."""
    augment = settings.augment
    resampling = "bilinear" if augment.train_interpolation == "random" else augment.train_interpolation
    return transforms.Compose(
        [
            transforms.Resize(settings.size, str_to_interp_mode(resampling)),
            transforms.RandomCrop(settings.size, padding=augment.crop_padding),
        ]
    )


class ErasePixels:
    """timm's random erasing on one (3, H, W) uint8 image, which is normalized for it, as timm expects."""

    def __init__(self, settings: ImageSettings):
        self.erase = RandomErasing(settings.augment.reprob, mode=settings.augment.remode, device="cpu")
        self.mean, self.std = (255 * torch.tensor(numbers).view(3, 1, 1) for numbers in (settings.mean, settings.std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        erased = self.erase((image - self.mean) / self.std)
        return (erased * self.std + self.mean).round_().clamp_(0, 255).byte()


class CenterOfResized:
    """timm's view for evaluation, PIL -> PIL: the short side resized to size / crop_pct, the center cropped.

    If a photo is at least SHRUNK times as large, only the part that the crop shows is resampled, which takes a quarter
    less time. PIL takes the part's edges in single precision, so about one value in 5,000 differs, by one level of 255."""

    SHRUNK = 2
    TALL = 1.5  # height / width above which PIL would resample the part in another order than the whole

    def __init__(self, settings: ImageSettings):
        self.size, self.short = settings.size, math.floor(settings.size / settings.crop_pct)
        self.resampling = str_to_pil_interp(settings.interpolation)
        self.whole = transforms.Compose(
            create_transform(
                settings.size,
                is_training=False,
                interpolation=settings.interpolation,
                crop_pct=settings.crop_pct,
                crop_mode="center",
                normalize=False,
            ).transforms[:-1]
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        size, short_side = self.size, min(image.size)
        if short_side < self.SHRUNK * self.short or image.height > self.TALL * image.width:
            return self.whole(image)
        resized = [int(self.short * side / short_side) for side in image.size]  # torchvision rounds down
        scales = [side / of_resized for side, of_resized in zip(image.size, resized, strict=True)]
        starts = [round((of_resized - size) / 2) * scale for of_resized, scale in zip(resized, scales, strict=True)]
        ends = [min(start + size * scale, side) for start, scale, side in zip(starts, scales, image.size, strict=True)]
        return image.resize((size, size), self.resampling, box=(*starts, *ends))


def eval_transform(settings: ImageSettings) -> transforms.Compose:
    """Return the transform of evaluation, PIL RGB -> (3, size, size) uint8: resize the short side to size / crop_pct,
    crop the center."""
    return transforms.Compose([CenterOfResized(settings), pil_to_chw])


def seed_generators(seed: int) -> None:
    """Seed the three generators that torchvision's and timm's transforms draw from.

    `torch.manual_seed` visits every device and would take 200 us per sample; the default generator alone takes 1 us."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
