"""Networks, losses and loaders, built from one flat configuration as in a run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from reslt.augment.mixing import Mixing, create_mixing
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.data.datasets import Dataset
from reslt.loading.batches import Loader
from reslt.loading.loaders import Loading
from reslt.methods.pairs import Pairing, create_pairing
from reslt.methods.predictors import Predictions, create_predictor
from reslt.methods.registry import create_loss
from reslt.models.create import create_backbone, create_model
from reslt.training.optim import create_optimizer

CPU = torch.device("cpu")
ONE = SimpleNamespace(
    device=CPU,
    is_main_process=False,
    num_processes=1,
    autocast=lambda: torch.autocast("cpu", enabled=False),
    gather=lambda tensor: tensor,
    reduce=lambda tensor, reduction: tensor,
)  # an Accelerator of one process


class Batches:
    """A loader of given batches."""

    images = SimpleNamespace(file="test.txt")

    def __init__(self, *batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch):
        return iter(self.batches)


def model_of(config: Config, num_classes: int) -> torch.nn.Module:
    return create_model(config.model, config.method, num_classes, config.augment.img_size)


def backbone_of(config: Config, num_classes: int) -> torch.nn.Module:
    return create_backbone(config.model, num_classes, config.augment.img_size)


def predicted(
    model: torch.nn.Module, images: torch.Tensor, images_per_class=None, means=None, **settings
) -> torch.Tensor:
    """Return the branch logits that the predictor with these settings computes for images."""
    predictor = create_predictor(Config.of(**settings).method, model, images_per_class, means)
    with torch.no_grad(), Predictions(model.eval(), [predictor]) as predictions:
        return predictions(images)[0]


def loss_of(config: Config, images_per_class: np.ndarray, model: torch.nn.Module | None = None) -> torch.nn.Module:
    return create_loss(config.method, images_per_class, config.model.experts, model=model)


def optimizer_of(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    return create_optimizer(config.optim, model, config.run.mixed_precision)


def mixing_of(config: Config, num_classes: int, steps: int = 1) -> Mixing | Pairing | None:
    pairing = create_pairing(stages_of(config)[0], num_classes, steps)
    return pairing or create_mixing(config.augment, num_classes, config.run.seed)


def settings_of(config: Config, model_data: dict) -> ImageSettings:
    return ImageSettings.of(config.augment, model_data)


def loading_of(
    dataset: Dataset,
    config: Config,
    settings: ImageSettings,
    device: torch.device = CPU,
    shard: BatchShard | None = None,
) -> Loading:
    shard = shard or BatchShard(config.optim.batch_size)
    return Loading(
        dataset, settings, config.data, device, shard, config.run.seed, views=config.method.views_in_training
    )


def train_loader_of(*arguments) -> Loader:
    loading = loading_of(*arguments)
    return loading.training(loading.pipeline())


def eval_loader_of(dataset: Dataset, split: str, *arguments) -> Loader:
    loading = loading_of(dataset, *arguments)
    return loading.evaluation(split, loading.pipeline(trains=False))
