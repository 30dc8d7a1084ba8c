"""Loaders of image lists: images decoded by worker processes, on the GPU, or resident on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch.utils.data import Sampler
from torchvision.transforms import Compose

from reslt.augment.batch_operations import apply
from reslt.augment.cutout import Cutout
from reslt.augment.host_transforms import (
    before_random,
    contrast_transform,
    eval_transform,
    pil_to_chw,
    train_transform,
)
from reslt.augment.policies import HostOnly, create_policy
from reslt.augment.settings import ImageSettings
from reslt.augment.transfers import Prefetcher
from reslt.config.schema import DataSettings
from reslt.core.batch_shard import BatchShard
from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.log import logger
from reslt.core.turns import own_turn
from reslt.data.datasets import Dataset
from reslt.loading.batches import Loader, OrderedBatches, ShuffledBatches, limited
from reslt.loading.features import PER_BATCH, FeatureLoader, FrozenPart, features_of, views_of
from reslt.loading.image_dataset import ListedImages
from reslt.loading.kept_arrays import kept_shape
from reslt.loading.pipeline import DEVICE_DECODE, FEATURES, HOST, RESIDENT, SMALL, Facts, Pipeline, choose_pipeline
from reslt.loading.pixel_cache import PIXELS, pixels
from reslt.loading.read_ahead import read_ahead
from reslt.loading.resident import Augmentation, ResidentLoader, random_table
from reslt.loading.workers import Workers

# Upper bounds for the resident images that a GPU evaluates at once
EVALUATED_PIXELS = 1 << 22  # 4,096 images of 32 x 32
EVALUATED_LOGITS = 1 << 25  # 128 MiB in float32


class HostLoader(Loader):
    """Batches decoded and augmented on the host."""

    def __init__(
        self, images: ListedImages, batches: Sampler, settings: ImageSettings, device: torch.device, workers: int
    ):
        super().__init__(images, batches, settings, device)
        # Only the loader of training, which works longest, keeps the memory of its batches
        image_bytes = 3 * settings.size**2 if isinstance(batches, ShuffledBatches) else 0
        on_gpu = device.type == "cuda"
        self.workers = Workers(images, batches, workers, pin_memory=on_gpu, image_bytes=image_bytes)
        self.to_device = Prefetcher(device)

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.to_device(self.workers)


class DeviceDecodeLoader(Loader):
    """Batches of JPEGs that worker processes read and the device decodes: `--decode device`."""

    def __init__(
        self, dataset: Dataset, batches: ShuffledBatches, settings: ImageSettings, device: torch.device, workers: int
    ):
        """Raises UserError for an augmentation that runs only on the host."""
        # Imported here: a later torchvision may lack the decoder
        from reslt.loading.device_decode import DeviceDecoder, EncodedBatch, EncodedImages

        augment = settings.augment
        try:
            if augment.crop != "rrc" or augment.reprob:
                named = "reprob" if augment.reprob else f"crop {augment.crop}"
                raise HostOnly(f"--{named} requires images that the host decodes")
            self.policy = create_policy(settings)
        except HostOnly as reason:
            raise UserError(f"--decode device: {reason}; use --decode host") from None
        images = EncodedImages(dataset.lists["train"], dataset.image_root, settings, batches.seed)
        super().__init__(images, batches, settings, device)
        self.workers = Workers(images, batches, workers, EncodedBatch.of, pin_memory=device.type == "cuda")
        self.decoder, self.size = DeviceDecoder(images, device, settings.size), settings.size
        self.cutout = Cutout.of(settings)

    def on_device(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        columns = self.policy.columns if self.policy else 0
        all_columns = columns + (Cutout.columns if self.cutout else 0)
        table = random_table(self.batches.seed, self.batches.epoch, self.batches.draws, all_columns)
        for batch in self.workers:
            images, (operations, square) = self.decoder(batch), np.split(table[batch.draws], [columns], axis=1)
            if self.policy:
                images = apply(images, self.policy.plan(operations, self.size, self.size))
            if self.cutout:
                images = self.cutout.drawn(images, square)
            yield images, batch.labels.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Loading:
    """The loaders of a run, all of one pipeline. `shard`: this process's part of each global batch; `frozen`: the part of
    the network that computes features in place of images, None without `--tune head`; `views`: the number of views of each
    training image in its batch."""

    dataset: Dataset
    settings: ImageSettings
    data: DataSettings
    device: torch.device
    shard: BatchShard
    seed: int
    frozen: FrozenPart | None = None
    views: int = 1

    def pipeline(self, recorded: str | None = None, trains: bool = True) -> Pipeline:
        """Decide how images are loaded. `recorded`: "on", "off" or "features" if the run is resumed, which --data-on-device
        auto keeps; `trains`: whether training images are loaded at all, and must be examined.

        Raises UserError if resident images are requested but impossible, and for an image that cannot be read."""
        is_kept, facts = bool(recorded) and self.data.data_on_device == "auto", self._facts()
        if recorded not in (None, FEATURES):
            facts = replace(facts, no_features=None)
        # Resident images are flipped like features
        is_on = is_kept and (recorded == "on" or (recorded == FEATURES and facts.no_features != ""))
        on_device, decode = "on" if is_on else self.data.data_on_device, self.data.decode
        if trains and decode == "device" and self.device.type == "cpu":
            logger.warning("--decode device: on a CPU, this is many times slower; use --decode host")
        pipeline = choose_pipeline(on_device, decode, facts)
        needs_headers = trains and pipeline.training == RESIDENT and not (is_kept and recorded == "off")
        if needs_headers:  # read only if the decision depends on them
            largest = None if on_device == "on" else SMALL
            size, unequal = self._kept_size() or self._stored_images().common_size(self._stored_size, largest)
            pipeline = choose_pipeline(on_device, decode, replace(facts, stored_size=size, unequal=unequal))
        if is_kept:
            way = HOST if recorded == "off" and pipeline.is_resident else pipeline.training
            pipeline = replace(pipeline, training=way, reason="as when the run began")
        return pipeline

    def training(self, pipeline: Pipeline) -> Loader:
        """Return shuffled batches of the training list. Raises UserError if it contains less than one batch."""
        images, root = self.dataset.lists["train"], self.dataset.image_root
        indices = limited(len(images), self.data.limit_train)
        if len(indices) < self.shard.batch_size:
            raise UserError(
                f"{images.file}: {len(indices)} images are fewer than --batch-size {self.shard.batch_size}; lower it"
            )
        batches = ShuffledBatches(indices, self.shard, self.seed, views=self.views)
        if own_turn() is not None and not pipeline.is_resident:
            logger.warning(
                "--streams gains little for this run: its images are not resident on the device, and every run of the process "
                f"has --workers {self.data.workers} of its own; use --jobs"
            )
        if pipeline.training == FEATURES:
            listed = ListedImages(images, root, None, None)
            return FeatureLoader(listed, self._features("train", pipeline), batches, self.settings, self.device)
        if pipeline.training == RESIDENT:
            listed = self._stored_images()
            array = pixels(listed, self._stored_text(), self._decoding_workers())
            augmentation = Augmentation(self.settings)
            of_views = Augmentation(self.settings.of_contrast) if self.views > 1 else None
            return ResidentLoader(listed, array, batches, self.settings, self.device, augmentation, of_views=of_views)
        if root.pack is not None:
            read_ahead(root.pack)
        if pipeline.training == DEVICE_DECODE:
            return DeviceDecodeLoader(self.dataset, batches, self.settings, self.device, self.data.workers)
        of_views = contrast_transform(self.settings) if self.views > 1 else None
        listed = ListedImages(images, root, train_transform(self.settings), self.seed, of_views)
        return HostLoader(listed, batches, self.settings, self.device, self.data.workers)

    def evaluation(self, split: str, pipeline: Pipeline, batch_size: int | None = None) -> Loader:
        """Return the loader of this process's part of a list, in its order; the parts of all processes contain every image
        once. Of the training list, only the images that are trained on are loaded.

        `batch_size`: of a process; None: the number that suits the pipeline and the device."""
        listed, settings = self._evaluated_images(split), self.settings
        span = self.shard.span(len(listed))
        if pipeline.evaluation == FEATURES:
            batches = OrderedBatches(*span, batch_size or PER_BATCH)
            return FeatureLoader(listed, self._features(split, pipeline), batches, settings, self.device)
        if pipeline.evaluation == RESIDENT:
            array = pixels(listed, self._evaluation_text(), self._decoding_workers())
            on_cpu, size = self.device.type == "cpu", batch_size or self._images_per_batch()
            if not batch_size and not on_cpu:
                size = resident_batch(span[1] - span[0], size, settings.size, self.dataset.num_classes)
            # On a GPU, a smaller last batch would be compiled, and its kernels chosen, separately
            batches = OrderedBatches(*span, size, is_filled=not on_cpu)
            return ResidentLoader(listed, array, batches, settings, self.device)
        batches = OrderedBatches(*span, batch_size or self._images_per_batch())
        return HostLoader(listed, batches, settings, self.device, self.data.workers)

    def _evaluated_images(self, split: str) -> ListedImages:
        """Return the images of a list with the transforms of evaluation; of the training list, those trained on."""
        images = self.dataset.lists[split]
        if split == "train":
            images = images.without(np.setdiff1d(np.arange(len(images)), limited(len(images), self.data.limit_train)))
        return ListedImages(images, self.dataset.image_root, eval_transform(self.settings), None)

    def _features(self, split: str, pipeline: Pipeline) -> np.ndarray:
        """Return the features of `_evaluated_images`; for the training list, of as many views as the pipeline has."""
        listed, settings = self._evaluated_images(split), self.settings
        batches = OrderedBatches(0, len(listed), self._images_per_batch())
        images = HostLoader(listed, batches, settings, self.device, self.data.workers)
        return features_of(images, self.frozen, pipeline.views if split == "train" else 1, split)

    def _images_per_batch(self) -> int:
        own = -(-self.shard.batch_size // self.shard.parts)
        return images_per_batch(own, self.settings.size, on_cpu=self.device.type == "cpu")

    def _facts(self) -> Facts:
        """Return the facts without reading files, as if every image had the size of the input."""
        try:
            Augmentation(self.settings)
            host_only = ""
        except HostOnly as reason:
            host_only = str(reason)
        images, size = sum(map(len, self.dataset.lists.values())), self.settings.size
        facts = Facts(self.device.type, size, images, total_memory(self.device), (size, size), host_only=host_only)
        if self.frozen is None:
            return facts
        views = views_of(self.settings.augment)
        seen = images + (views - 1) * len(self.dataset.lists["train"])
        feature_bytes = 4 * seen * self.frozen.width
        return replace(facts, no_features=self.frozen.why_not, views=views, feature_bytes=feature_bytes)

    def _stored_images(self) -> ListedImages:
        """Return the training images in the form that is resident: after the transforms that precede anything random."""
        transform = Compose([*before_random(self.settings), pil_to_chw])
        return ListedImages(self.dataset.lists["train"], self.dataset.image_root, transform, None)

    def _kept_size(self) -> tuple[tuple[int, int], str] | None:
        """Return the result of `common_size` for `_stored_images` if they are in the cache folder, else None."""
        shape = kept_shape(PIXELS, self._stored_images(), self._stored_text())
        return shape and (shape[-2:], "")

    def _stored_text(self) -> str:
        """Describe the transforms of `_stored_images`."""
        if self.settings.augment.crop == "center":
            return self._evaluation_text()
        return f"training {before_random(self.settings)}"

    def _evaluation_text(self) -> str:
        """Describe the transforms of evaluation."""
        return f"evaluation {self.settings.size}, {self.settings.interpolation}, {self.settings.crop_pct}"

    def _stored_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a file -> that of its resident image."""
        if self.settings.augment.crop == "center":
            return self.settings.size, self.settings.size
        if not before_random(self.settings):
            return height, width
        short = min(height, width)
        return tuple(
            side if short == self.settings.size else int(self.settings.size * side / short) for side in (height, width)
        )

    def _decoding_workers(self) -> int:
        return available_cores() if self.data.workers else 0


def resident_batch(images: int, least: int, img_size: int, num_classes: int) -> int:
    """Return the batch size for evaluating resident images on a GPU. Every batch costs the host the same, so there are few,
    of equal size; only the last one may be smaller.

    `images`: of the list; `least`: a batch size that fits in memory, provided that its logits do."""
    most = max(1, min(max(least, EVALUATED_PIXELS // img_size**2), EVALUATED_LOGITS // num_classes))
    return max(1, -(-images // max(1, -(-images // most))))


def total_memory(device: torch.device) -> int:
    """Return the total memory in bytes: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def images_per_batch(training_batch: int, img_size: int, on_cpu: bool) -> int:
    """Return the batch size of a process in evaluation. Nothing is kept for a backward pass, so four training batches fit;
    on a CPU, where new memory and caches make larger ones slower, it is one training batch. The batch has at most as many
    pixels as 256 images of 224 x 224, because training may have divided its batch among more processes."""
    batches = 1 if on_cpu else 4
    return max(1, min(batches * training_batch, 256 * 224**2 // img_size**2))
