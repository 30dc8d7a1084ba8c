"""Training on features in place of images, computed once for a few fixed views of each image: `--tune head`.

If everything below the classifier and the branches is frozen, and the views of an image are always the same, so are its
features. Training and evaluation on features equal those on images up to rounding, and take seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import to_device
from reslt.config.schema import AugmentSettings, MethodSettings
from reslt.core.errors import UserError
from reslt.core.log import logger
from reslt.loading.batches import Loader, OrderedBatches, ShuffledBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.kept_arrays import Kind, kept
from reslt.loading.resident import random_table

FEATURES = Kind("features", np.dtype(np.float32), 3, "features", "computed")
PER_BATCH = 1024  # in evaluation
LINE_SECONDS = 30.0  # between two lines of progress, without a progress bar


@dataclass(frozen=True)
class FrozenPart:
    """The part of a network below its classifier and branches, which does not train.

    `features`: (N, 3, H, W) normalized images -> (N, D) float32, in evaluation mode; `width`: D; `described`: the model;
    `digest`: its weights and precision; `why_not`: why its features cannot replace images, "" if they can."""

    features: Callable[[torch.Tensor], torch.Tensor]
    width: int
    described: str
    digest: str
    why_not: str = ""


def views_of(augment: AugmentSettings) -> int:
    """Return the number of fixed views of a training image: itself and, if images are flipped, its mirror image."""
    return 2 if augment.hflip else 1


def why_views_change(stages: Iterable[tuple[AugmentSettings, MethodSettings]]) -> str:
    """Return why the views of an image change during a run, from the settings of each of its stages; "" if they are a few
    fixed ones."""
    reasons = []
    for augment, method in stages:
        if augment.crop != "center":
            reasons.append(f"--crop {augment.crop} draws a new view in each epoch, --crop center does not")
        for name, is_on in (
            ("aa", augment.aa is not None),
            ("color-jitter", any(augment.color_jitter)),
            ("rotate", augment.rotate),
            ("reprob", augment.reprob),
            ("cutout", augment.cutout),
        ):
            reasons += [f"--{name} changes images at random"] * bool(is_on)
        reasons += ["--mixup and --cutmix mix images"] * augment.mixes
        reasons += ["--second-sampler pairs images"] * method.trains_on_pairs
        reasons += [f"--tta {method.tta} evaluates mirror images (give it to evaluate.py instead)"] * bool(method.tta)
    return "; ".join(dict.fromkeys(reasons))


def features_of(images: Loader, frozen: FrozenPart, views: int, name: str) -> np.ndarray:
    """Return the (N, views, D) float32 features of all images of a loader, in its order: of each image and, with two
    views, of its mirror image. `name`: the list, for the progress bar.

    They are kept in the cache folder (see `kept`) as long as the images, the weights and the precision are unchanged.
    Raises UserError, with file and line, for an image that cannot be read."""
    settings = images.settings
    seen = (settings.size, settings.interpolation, settings.crop_pct, settings.mean, settings.std)
    described = f"features of {views} views, {frozen.described}, {seen}"
    return kept(
        FEATURES, images.images, described, lambda: _computed(images, frozen, views, name), f"\n{frozen.digest}"
    )


def _computed(images: Loader, frozen: FrozenPart, views: int, name: str) -> np.ndarray:
    count = len(images.images)
    array = np.empty((count, views, frozen.width), np.float32)
    title = f"features of {name}, {views} view{'s' * (views > 1)}"
    began = shown = time.monotonic()
    with tqdm(total=count, desc=title, unit="image", leave=False, disable=None, dynamic_ncols=True) as bar:
        for (first, end), (batch, _) in zip(images.batches.spans(), images.epoch(0), strict=True):
            for view, seen in enumerate((batch, batch.flip(-1))[:views]):
                array[first:end, view] = frozen.features(seen).cpu().numpy()
            bar.update(end - first)
            now = time.monotonic()
            if bar.disable and now - shown > LINE_SECONDS:
                shown, rate = now, end / (now - began)
                logger.info(
                    f"{title}: {end:,} of {count:,} images, {rate:.0f} img/s, {(count - end) / rate:.0f} s left"
                )
    return array


class FeatureLoader(Loader):
    """Batches of features on the device: (N, D) float32 in place of images. `normalize` does not change them."""

    def __init__(
        self,
        images: ListedImages,
        array: np.ndarray,
        batches: ShuffledBatches | OrderedBatches,
        settings: ImageSettings,
        device: torch.device,
    ):
        """`array`: (N, V, D) float32, for the images that shuffled batches order, or for the whole list. With two views, the
        mirror image is drawn like a flip of resident images."""
        super().__init__(images, batches, settings, device)
        self.normalize = torch.nn.Identity()
        self.views, self.hflip = array.shape[1], settings.augment.hflip
        try:
            self.features = torch.from_numpy(array).flatten(0, 1).to(device)  # row image x V + view
            self.labels = images.labels.to(device, torch.int64)
        except torch.OutOfMemoryError:
            size = f"{array.nbytes / 2**30:.1f} GiB of features"
            raise UserError(f"--tune head: the device lacks memory for {size}; use --data-on-device off") from None
        if isinstance(batches, ShuffledBatches):
            self.rows = np.zeros(len(images), np.int64)  # of the array, for each image of the list
            self.rows[batches.indices] = np.arange(len(array))

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._shuffled() if isinstance(self.batches, ShuffledBatches) else self._ordered()

    def _ordered(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first, end in self.batches.spans():
            yield self.features[first * self.views : end * self.views : self.views], self.labels[first:end]

    def _shuffled(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        indices, draws = self.batches.parts()  # (steps, micro-batches, N)
        rows = self.rows[indices] * self.views
        if self.views > 1:
            table = random_table(self.batches.seed, self.batches.epoch, self.batches.draws, 1)[:, 0]
            rows += table[draws] < self.hflip
        on_device = (to_device(part.reshape(-1, part.shape[-1]), self.device) for part in (rows, indices))
        for of_features, of_labels in zip(*on_device, strict=True):
            yield self.features[of_features], self.labels[of_labels]
