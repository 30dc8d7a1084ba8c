"""Gradients and weights of training, to compare one process with several: `torchrun --nproc_per_node 2 tests/processes.py
DATA OUTPUT` writes them, and the refusal of settings that differ; `compute` returns them for this process."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from builders import loading_of, loss_of, mixing_of, model_of, optimizer_of, train_loader_of

from reslt.augment.settings import ImageSettings
from reslt.config.parts import PARTS, Part
from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.core.signals import StopRequests
from reslt.data.datasets import load_dataset
from reslt.evaluation.evaluate import nearest_means
from reslt.models.freeze import freeze
from reslt.training.accelerator import create_accelerator, end_training, refuse_differences
from reslt.training.epoch import Pace, train_epoch
from reslt.training.gathering import show_features
from reslt.training.state import Progress
from reslt.training.step import TrainStep
from reslt.training.watch import Watch

MODEL = {"model": "cifar_resnet20", "model_kwargs": {"channels": (8, 16, 32)}, "branch": "bn", "img_size": 16}
BASE = Config.of(
    **MODEL, batch_size=16, crop="pad", crop_padding=2, epochs=3, lr=0.05, momentum=0.9, workers=0, alpha=0.7
)
CASES = {
    "pooled": {},
    "mean": {"branch_loss": "mean"},
    "smoothed": {"smoothing": 0.1, "logit_adjust": 1.0},
    "mixed": {"mixup": 0.8, "cutmix": 1.0, "mixup_mode": "elem"},
    "mixed mean": {"mixup": 0.8, "branch_loss": "mean", "clip_grad": 0.1},
    "cross-entropy": {"method": "ce"},
    "experts": {"experts": 2},
    "weighted": {"method": "ce", "class_weights": "effective", "class_weight_beta": 0.99},
    "weighted mean": {"class_weights": "inverse", "branch_loss": "mean", "mixup": 0.8},
    "random costs": {"method": "seql", "seql_threshold": 0.5, "class_weights": "inverse"},
    "plain mean": {"method": "cb_focal", "class_weight_beta": 0.99},
    "experts together": {
        "experts": 2,
        "mutual": "pairwise_kl",
        "expert_loss": "mean",
        "branch_loss": "mean",
        "cost": "ldam",
        "class_weights": "inverse",
    },
    "pairs": {"method": "bbn", "second_sampler": "reversed"},
    "sharpness-aware": {"sam": 0.5, "mixup": 0.8},
    "frozen": {"freeze": ("conv1", "bn1", "layer1")},
    "exits": {"method": "elf_ldam_drw", "class_weights": "inverse"},
    "gated experts": {"experts": 2, "expert_stages": 1, "expert_gates": True},
}
WITH_FEATURES = {  # computed with one micro-batch only; `oltr` is the second stage
    "lifted": {"method": "lifted"},
    "lifted, experts": {"method": "lifted", "experts": 2, "expert_loss": "mean"},
    "range": {"method": "range", "range_alpha": 0.5, "range_beta": 0.5, "range_margin": 50.0},
    "centroids": {"method": "oltr", "feature_loss": "centroids"},
    "statistics": {"method": "ce", "feature_loss": "running mean"},
}
COUNTS = [60, 20, 4]


class RunningMean(torch.nn.Module):
    """A made-up feature loss with statistics: the squared distance to a running mean, which it updates."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.lerp_(features.mean(0), 0.1)
        return (features - self.mean).square().sum(1).mean()


def freeze_batch_norm(model: torch.nn.Module) -> None:
    """Put BatchNorm in evaluation mode permanently, with statistics unlike those of a new layer."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(1 + torch.rand(module.running_var.shape, generator=generator))
            module.eval()
            module.train = lambda mode=True, module=module: module


def prepared_step(config: Config, counts, accelerator: Accelerator, micro_batches: int, normalize) -> TrainStep:
    """A step with a newly initialized model whose BatchNorm is frozen."""
    torch.manual_seed(0)
    model = model_of(config, len(counts))
    freeze(model, config.model.freeze)
    freeze_batch_norm(model)
    if config.method.head == "meta_embedding":
        model.classifiers[0].set_centroids(torch.randn(len(counts), 32))
        torch.nn.init.normal_(model.branches.out.weight)
    mixing = mixing_of(config, len(counts), steps=4)
    shard = BatchShard(
        config.optim.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        micro_batches,
        config.augment.mixes,
    )
    prepared, optimizer = accelerator.prepare(model.train(), optimizer_of(config, model))
    loss_fn = loss_of(config, np.array(counts), model)
    show_features(model, loss_fn, accelerator)
    return TrainStep(
        prepared,
        loss_fn,
        optimizer,
        accelerator,
        shard,
        normalize,
        config.run.seed,
        mixing,
        config.optim.clip_grad,
        sam=config.optim.sam,
    )


def gradients(config: Config, accelerator: Accelerator, micro_batches: int) -> dict[str, torch.Tensor]:
    """Return the gradients of one step on 16 images; those of the rarest class are all in the last process's last
    micro-batch."""
    step = prepared_step(config, COUNTS, accelerator, micro_batches, normalize=lambda x: x)
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    if not step.shard.paired:
        labels[-3:] = 2  # parts are consecutive
    else:
        labels[7:9] = 2  # pairs are (i, 15 - i): the innermost belong to the last part
    streams = [(images, labels)] + [(images.flip(3), labels.roll(5))] * config.method.trains_on_pairs
    window = [
        tuple(torch.cat([part[positions] for part in parts]) for parts in zip(*streams, strict=True))
        for positions in step.shard.positions
    ]
    loss, _ = step.gradients(step.inputs(window, step=5))
    if step.clip_grad is not None:
        accelerator.clip_grad_norm_(step.model.parameters(), step.clip_grad)
    model = accelerator.unwrap_model(step.model)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    if config.method.feature_loss == "running mean":
        found["of each process"] = accelerator.gather(step.loss_fn.of_features.mean[None])
    return found | {"loss": accelerator.reduce(loss, "sum")[None]}


def trained(data: str, accelerator: Accelerator, micro_batches: int) -> dict[str, torch.Tensor]:
    """Return the weights after three epochs on a folder's list."""
    dataset = load_dataset(data)
    config = BASE.changed(data_on_device="off", batch_size=8, mixup=0.2)
    settings = ImageSettings(16, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, config.augment)
    shard = BatchShard(8, accelerator.process_index, accelerator.num_processes, micro_batches, paired=True)
    loader = train_loader_of(dataset, config, settings, accelerator.device, shard)
    step = prepared_step(config, dataset.images_per_class.tolist(), accelerator, micro_batches, loader.normalize)
    assert step.shard == shard
    for epoch in range(3):
        train_epoch(step, loader, Progress(epoch), Watch(accelerator, StopRequests()), Pace(3 * len(loader)))
    return {k: v.clone() for k, v in accelerator.unwrap_model(step.model).state_dict().items()}


def class_means(data: str, accelerator: Accelerator, micro_batches: int) -> torch.Tensor:
    """Return the (K, C, D) class means of a folder's training images; each process averages its part."""
    dataset, config = load_dataset(data), BASE.changed(data_on_device="off")
    settings = ImageSettings(16, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, config.augment)
    shard = BatchShard(16, accelerator.process_index, accelerator.num_processes, micro_batches)
    loading = loading_of(dataset, config, settings, accelerator.device, shard)
    torch.manual_seed(0)
    model, images = model_of(config, dataset.num_classes), loading.evaluation("train", loading.pipeline(trains=False))
    freeze_batch_norm(model)
    return nearest_means(model, images, accelerator, dataset.num_classes, "cl2")[0].means.clone()


@mock.patch.dict(PARTS["feature_loss"], {"running mean": Part("of a test", build=RunningMean)})
def compute(data: str, accelerator: Accelerator, micro_batches: int) -> dict[str, torch.Tensor]:
    """Return {'<case>/<name>': gradient, 'trained/<name>': weight, 'means/0': class means}."""
    found = {}
    for case, changes in (CASES | (WITH_FEATURES if micro_batches == 1 else {})).items():
        of_case = gradients(BASE.changed(**changes), accelerator, micro_batches)
        found |= {f"{case}/{name}": tensor for name, tensor in of_case.items()}
    found |= {f"trained/{name}": tensor for name, tensor in trained(data, accelerator, micro_batches).items()}
    return found | {"means/0": class_means(data, accelerator, micro_batches)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = create_accelerator("no")
    try:
        refuse_differences({"lr": 0.1 / (1 + joined.process_index), "epochs": 3}, "setting")
    except UserError as refusal:
        Path(f"{sys.argv[2]}-refusal-{joined.process_index}.txt").write_text(str(refusal))
    for micro_batches in (1, 2):
        result = compute(sys.argv[1], joined, micro_batches)
        if joined.is_main_process:
            save_file(result, f"{sys.argv[2]}-{micro_batches}.safetensors")
    end_training(joined)
