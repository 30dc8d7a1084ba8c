"""Construction of a method's loss and samplers from its named parts; the names are in `reslt.config.parts`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from reslt.config.parts import CLASS_WEIGHTS, COSTS, FEATURE_LOSSES, MUTUAL, PRIORS, SAMPLERS
from reslt.config.schema import MethodSettings
from reslt.config.stages import Stage
from reslt.core.errors import UserError
from reslt.data.groups import branch_sets
from reslt.loading.batches import Order  # the loader defines what it takes as a sampler
from reslt.methods import costs, samplers
from reslt.methods.class_weights import effective_weights, inverse_weights
from reslt.methods.costs import Cost, class_prior
from reslt.methods.feature_losses import CentroidLoss, LiftedStructured, Range
from reslt.methods.losses import (
    Diversity,
    ExitsLoss,
    ExpertsLoss,
    FusionLoss,
    LossWithFeatures,
    PairwiseKL,
    ResLTLoss,
    RouterLoss,
    temperatures,
)
from reslt.methods.proco import ProCo
from reslt.models.heads import SCALES


def create_prior(method: MethodSettings, images_per_class: np.ndarray) -> torch.Tensor | None:
    """(C,) training counts -> the (C,) float32 prior that the cost of one network adds to the logits; None for no prior."""
    if "logit_adjust" not in COSTS[method.cost].settings:
        return None
    return class_prior(images_per_class, method.logit_adjust, method.logit_adjust_reversed)


def create_cost(method: MethodSettings, images_per_class: np.ndarray, head_scale: float = 1.0) -> Cost:
    """Return the cost of a method. `images_per_class`: (C,) training counts, from which the cost derives margins,
    divisors and the like; `head_scale`: of a normalized head, the unit of LDAM's margins. Raises UserError if a
    registered cost is not derived from Cost."""
    part, counts = COSTS[method.cost], images_per_class
    prior = create_prior(method, counts)
    if part.build is not None:
        cost = part.build(counts, **method.arguments_of(part))
        if not isinstance(cost, Cost):
            raise UserError(
                f"--cost {method.cost}: it builds {type(cost).__name__}; derive that from reslt.methods.costs.Cost"
            )
        cost.prior = prior
        return cost
    match method.cost:
        case "ce" | "label_aware":
            return costs.CrossEntropy(prior)
        case "ce_hard":
            return costs.HardCrossEntropy(method.hard_classes, prior)
        case "focal":
            return costs.Focal(method.focal_gamma, prior)
        case "sigmoid_focal":
            return costs.SigmoidFocal(method.focal_gamma)
        case "ldam":
            return costs.LDAM(_float(head_scale * costs.ldam_margins(counts, method.ldam_margin)), prior)
        case "vs":
            return costs.VectorScaling(_float(costs.vs_divisors(counts, method.vs_gamma)), prior)
        case "seql":
            rare = torch.as_tensor(counts / counts.sum() < method.seql_threshold)
            return costs.SoftmaxEqualization(rare, method.seql_gamma, prior)
    raise ValueError(method.cost)


def create_smoothing(method: MethodSettings, images_per_class: np.ndarray) -> float | torch.Tensor:
    """Return the smoothing of a method's costs: one number, or (C,) numbers. `images_per_class`: (C,) training counts."""
    if method.cost == "label_aware":
        return _float(costs.label_aware_smoothing(images_per_class, method.smoothing_head, method.smoothing_tail))
    return method.smoothing if "smoothing" in COSTS[method.cost].settings else 0.0


def create_class_weights(method: MethodSettings, images_per_class: np.ndarray) -> torch.Tensor | None:
    """(C,) training counts -> (C,) float32 class weights; None for equal ones."""
    part = CLASS_WEIGHTS[method.class_weights]
    if part.build is not None:
        return _float(part.build(images_per_class, **method.arguments_of(part)))
    if method.class_weights == "uniform":
        return None
    if method.class_weights == "inverse":
        return _float(inverse_weights(images_per_class))
    return _float(effective_weights(images_per_class, method.class_weight_beta))


def create_loss(
    method: MethodSettings,
    images_per_class: np.ndarray,
    experts: int = 1,
    trains_router: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:
    """Return the loss of a method. `images_per_class`: (C,) training counts, which determine prior, margins, weights,
    temperatures and the branches' class sets; `trains_router`: whether the stage trains the experts' router; `model`: the
    network, a part of which some feature losses use."""
    if trains_router:
        return RouterLoss()
    of_each = [method.of_expert(expert) for expert in range(experts)]
    differ = any(isinstance(getattr(method, name), tuple) for name in PRIORS)
    losses = [_create_loss_of_one(own, images_per_class) for own in (of_each if differ else of_each[:1])]
    loss = losses[0]
    if experts > 1:
        mutual = _create_mutual(method, images_per_class, experts)
        loss = ExpertsLoss(losses, method.expert_loss, mutual, method.mutual_weight)
    of_features = _create_feature_loss(method, images_per_class, model)
    if of_features is None:
        return loss
    return LossWithFeatures(loss, of_features, method.feature_loss_weight, method.expert_loss)


def _create_loss_of_one(method: MethodSettings, images_per_class: np.ndarray) -> FusionLoss | ResLTLoss | ExitsLoss:
    scale = (method.head_scale or SCALES[method.head]) if method.head in SCALES else 1.0
    cost = create_cost(method, images_per_class, scale)
    smoothing = create_smoothing(method, images_per_class)
    weights = create_class_weights(method, images_per_class)
    if not method.has_branches:
        loss = FusionLoss(cost, smoothing, weights)
        return ExitsLoss(loss) if method.network == "exits" else loss
    sets = branch_sets(images_per_class, method.branches, method.branch_sizes, method.branch_sets)
    of_branch = None
    if method.logit_adjust_on == "fusion":
        of_branch = create_cost(replace(method, **dict.fromkeys(PRIORS, 0.0)), images_per_class, scale)
    return ResLTLoss(sets, method.alpha, method.branch_loss, cost, smoothing, weights, of_branch)


def _create_feature_loss(
    method: MethodSettings, images_per_class: np.ndarray, model: nn.Module | None
) -> nn.Module | None:
    part = FEATURE_LOSSES[method.feature_loss]
    if part.build is not None:
        return part.build(**method.arguments_of(part))
    match method.feature_loss:
        case "off":
            return None
        case "lifted":
            return LiftedStructured(method.lifted_margin)
        case "range":
            return Range(method.range_alpha, method.range_beta, method.range_margin, method.range_k)
        case "centroids":
            return CentroidLoss(model.classifiers[0].centroids, method.feature_loss_weight)
        case "proco":
            return ProCo(model.projection.classes, class_prior(images_per_class, 1.0), method.feature_temperature)
    raise ValueError(method.feature_loss)


def _create_mutual(method: MethodSettings, images_per_class: np.ndarray, experts: int) -> nn.Module | None:
    part = MUTUAL[method.mutual]
    if part.build is not None:
        return part.build(**method.arguments_of(part))
    match method.mutual:
        case "off":
            return None
        case "pairwise_kl":
            return PairwiseKL()
        case "balanced_kl":
            found = [create_prior(method.of_expert(expert), images_per_class) for expert in range(experts)]
            even = torch.zeros(len(images_per_class))
            return PairwiseKL(torch.stack([even if p is None else p for p in found]), method.mutual_hard_classes)
        case "diversity":
            return Diversity()
        case "tempered_diversity":
            return Diversity(_float(temperatures(images_per_class, method.temperature_factor)))
    raise ValueError(method.mutual)


def create_sampler(stage: Stage, labels: np.ndarray, num_classes: int) -> Order | None:
    """Return the sampler of a stage over images with these (N,) labels; None for the loader's own order, in which every
    image occurs once per epoch."""
    return _create_sampler(stage.config.method.sampler, stage, labels, num_classes)


def create_second_sampler(stage: Stage, labels: np.ndarray, num_classes: int) -> Order | None:
    """Return the sampler of the second images of pairs; None if the stage trains on single images."""
    method = stage.config.method
    if not method.trains_on_pairs:
        return None
    return _create_sampler(method.second_sampler, stage, labels, num_classes) or samplers.Shuffled(len(labels))


def _create_sampler(name: str, stage: Stage, labels: np.ndarray, num_classes: int) -> Order | None:
    method, part = stage.config.method, SAMPLERS[name]
    if part.build is not None:
        arguments = method.arguments_of(part)
        return samplers.ClassSampler(labels, num_classes, lambda counts, epoch: part.build(counts, **arguments))
    if name == "instance":
        return None
    if name == "balanced4":
        return samplers.FourInARow(labels, num_classes)
    distribution = {
        "balanced": samplers.balanced,
        "sqrt": samplers.square_root,
        "reversed": samplers.inverse,
        "effective": samplers.effective(method.sampler_beta),
        "progressive": samplers.progressive(stage.schedule_begin, stage.config.optim.epochs),
    }[name]
    return samplers.ClassSampler(labels, num_classes, distribution)


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
