"""Evaluation: one pass over a list, every image once, with hits per class, branch and expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from reslt.augment.transfers import let_device_finish
from reslt.config.schema import MethodSettings
from reslt.core.errors import Stopped, UserError
from reslt.core.log import progress_bar
from reslt.core.signals import StopRequests, signal_name
from reslt.core.turns import take_turns
from reslt.core.waiting import Wait
from reslt.evaluation.metrics import ClassAccuracies, ClassHits
from reslt.evaluation.outputs import Outputs
from reslt.loading.batches import Loader
from reslt.methods.predictors import (
    AS_TRAINED,
    Features,
    NearestMean,
    Predictions,
    Predictor,
    create_predictor,
    transformed,
)
from reslt.models.router import is_routed


class NotFiniteError(UserError):
    """An evaluation without accuracies, because logits are not finite."""


def evaluate(
    model: torch.nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    num_classes: int,
    title: str = "",
    requests: StopRequests | None = None,
    predictor: Predictor = AS_TRAINED,
    outputs: Outputs | None = None,
    temperature: float | None = None,
) -> ClassAccuracies:
    """Evaluate every image once, each process its part of the list, and return accuracies per class, of the fused
    prediction, branches and experts.

    `model`: a ResLT or Experts, which returns branch logits and has `logits_per_image`; `outputs`: collects the model's
    outputs; `temperature`: that of a calibration, for a second calibration error.

    Raises Stopped, on all processes, if one of them received a signal, and NotFiniteError if a logit is not finite."""
    return evaluate_each(model, loader, accelerator, num_classes, [predictor], title, requests, outputs, temperature)[0]


@torch.inference_mode()
def evaluate_each(
    model: torch.nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    num_classes: int,
    predictors: Sequence[Predictor],
    title: str = "",
    requests: StopRequests | None = None,
    outputs: Outputs | None = None,
    temperature: float | None = None,
) -> list[ClassAccuracies]:
    """Evaluate several predictors in one pass over the images; see `evaluate`. `outputs` collects those of the first."""
    model.eval()
    device, shape = accelerator.device, model.logits_per_image
    routed = is_routed(model)
    hits_of_each = [
        ClassHits(shape, num_classes, device, by.prior, by.fusion, routed, temperature) for by in predictors
    ]
    with Predictions(model, predictors, outputs is not None and outputs.of_features) as predictions:
        for images, labels in _batches(loader, accelerator, title, requests):
            with accelerator.autocast():
                logits_of_each = predictions(images, len(labels))
            for hits, logits in zip(hits_of_each, logits_of_each, strict=True):
                hits.update(logits, labels)
            if outputs:
                outputs.add(logits_of_each[0], predictions.features, labels)
    with Wait("the other processes to add up their hits"):
        for hits in hits_of_each:
            hits.reduce(lambda counts: accelerator.reduce(counts, "sum"))
    let_device_finish(device)
    found = [hits.accuracies() for hits in hits_of_each]
    if bad := max(accuracies.not_finite for accuracies in found):
        raise NotFiniteError(
            f"{title + ': ' if title else ''}{loader.images.file}: the model's logits are not finite for {bad:,} of "
            f"{found[0].images.sum():,} images, so there are no accuracies; the weights have diverged (lower "
            "--lr), BatchNorm's statistics come from too few steps, or half precision overflows (--mixed-precision no)"
        )
    return found


def predictors_of(
    methods: Sequence[MethodSettings],
    model: torch.nn.Module,
    images_per_class: np.ndarray,
    training_images: Loader | None,
    accelerator: Accelerator,
    requests: StopRequests | None = None,
) -> list[Predictor]:
    """Return a predictor for each of `methods`, which share their `ncm`, and the present weights of a model.
    `training_images`: with the transforms of evaluation; `ncm` averages their features."""
    means, form = None, methods[0].ncm
    if form is not None:
        means = nearest_means(model, training_images, accelerator, len(images_per_class), form, requests)
    return [create_predictor(method, model, images_per_class, means) for method in methods]


@torch.inference_mode()
def nearest_means(
    model: torch.nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    num_classes: int,
    form: str,
    requests: StopRequests | None = None,
) -> list[NearestMean]:
    """Average the features of each class over the images of a loader, each process its part, and return a head per expert.

    `form`: see `transformed`; cl2 takes a pass of its own first, for the mean of all features. Raises Stopped as `evaluate`
    does."""
    model.eval()
    center = None
    if form == "cl2":
        sums, counts = _feature_sums(model, loader, accelerator, num_classes, "raw", None, requests)
        center = (sums.sum(2) / counts.sum()).float()  # (E, K, D)
    sums, counts = _feature_sums(model, loader, accelerator, num_classes, form, center, requests)
    means = (sums / counts.clamp(min=1)[:, None]).float()  # (E, K, C, D)
    centers = [None] * len(means) if center is None else center
    return [NearestMean(form, means[e], counts, centers[e]) for e in range(len(means))]


@torch.no_grad()
def start_at_class_means(
    model: torch.nn.Module, initial_rows: Sequence[torch.Tensor], loader: Loader, accelerator: Accelerator
) -> None:
    """Set the rows of cosine classifiers, in place, to the class means of the normalized features of a loader's images,
    normalized; with K branches, to the mean of the branches' class means. (LIFT starts at text features, or at means of
    features that are not normalized one by one.)

    `initial_rows`: the (C, D) rows of each classifier when the model was created. Rows that differ from them were loaded by
    --init-from and stay, as do the rows of classes without an image."""
    heads = model.classifiers
    means = nearest_means(model, loader, accelerator, len(initial_rows[0]), "l2")
    for head, initial, of_head in zip(heads, initial_rows, means, strict=True):
        rows = of_head.means.mean(0)
        is_new = (head.weight == initial.to(head.weight)).all(1) & rows.any(1)
        head.weight.copy_(torch.where(is_new[:, None], F.normalize(rows, dim=1), head.weight))


def set_centroids(model: torch.nn.Module, loader: Loader, accelerator: Accelerator) -> None:
    """Set the centroids of meta-embedding classifiers, in place, to the class means of the features of a loader's images,
    averaged over branches. The centroid of a class without an image is 0."""
    means = nearest_means(model, loader, accelerator, model.classifiers[0].out_features, "raw")
    for head, of_head in zip(model.classifiers, means, strict=True):
        head.set_centroids(of_head.means.mean(0))


def _feature_sums(
    model: torch.nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    num_classes: int,
    form: str,
    center: torch.Tensor | None,
    requests: StopRequests | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (E, K, C, D) sums of transformed features over all processes, in float64 if the device has it, and the (C,)
    numbers of images."""
    kind = {"device": accelerator.device, "dtype": torch.float32 if accelerator.device.type == "mps" else torch.float64}
    experts, branches = (1, *model.logits_per_image)[-2:]
    sums = torch.zeros(experts, branches, num_classes, model.classifiers[0].in_features, **kind)
    counts = torch.zeros(num_classes, **kind)
    with Features(model) as recorded:
        for images, labels in _batches(loader, accelerator, "class means", requests):
            with accelerator.autocast():
                _, features = recorded(images, len(labels))
            seen = transformed(torch.stack(features).unflatten(1, (-1, len(labels))), form, center)  # (E, K, N, D)
            sums.index_add_(2, labels, seen.to(sums.dtype))
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
    with Wait("the other processes to add up their features"):
        return accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum")


def _batches(
    loader: Loader, accelerator: Accelerator, title: str, requests: StopRequests | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this process's batches of a list, with a progress bar. In a filled batch, the labels belong to the last images;
    see `Loader.epoch`. Raises Stopped, on all processes, if one of them received a signal."""
    with progress_bar(accelerator.is_main_process, title, len(loader)) as bar:
        for batch in loader.epoch(0):
            if requests and requests.number:
                break
            yield batch
            bar.update()
            take_turns()
    number = requests.number if requests else 0
    if accelerator.num_processes > 1:  # a single process need not wait for the device
        let_device_finish(accelerator.device)
        came = torch.tensor([number], device=accelerator.device)
        with Wait("the other processes to evaluate their part of the list"):
            number = int(accelerator.gather(came).max())
    if number:
        raise Stopped(number, f"stopped by {signal_name(number)} while evaluating")
