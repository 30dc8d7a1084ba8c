"""The parts of a model that a stage trains, and the rate and weight decay of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from types import SimpleNamespace

import torch
from timm.models import group_parameters
from torch import nn

from reslt.config.schema import OptimSettings
from reslt.config.stages import Stage
from reslt.core.errors import UserError
from reslt.models.branches import BatchNormBranches, ModulatedAttention
from reslt.models.experts import Experts, Network
from reslt.models.heads import MetaEmbedding, ScaledLinear, classifier_width
from reslt.models.names import classifier_layers, timm_names
from reslt.models.reslt import ResLT
from reslt.models.router import Router


def networks(model: Network) -> list[ResLT]:
    """Return the model, or each of its experts."""
    return list(model.experts) if isinstance(model, Experts) else [model]


def heads(model: Network) -> list[nn.Module]:
    """Return the classifier of the model, or of each expert. Raises UserError if it is not a single layer that can be
    reinitialized."""
    found = model.classifiers
    if not all(isinstance(head, nn.Module) and hasattr(head, "reset_parameters") for head in found):
        kind = type(networks(model)[0].backbone).__name__
        raise UserError(
            f"stages: classifier: {kind} has no single classifier; choose a model with one linear classifier"
        )
    return found


def parameters_of(model: Network, part: str) -> set[nn.Parameter]:
    """Return the parameters of a part: `all` (except the scales of a scaled head, the router, attention, and what a
    meta-embedding adds to a linear classifier), `classifier` (except scales and centroids), `scales`, `branches`,
    `attention`, `centroids` or `router`. Raises UserError if the model lacks the part."""
    scales = {head.scales for head in model.modules() if isinstance(head, ScaledLinear)}
    memories = [head for head in model.modules() if isinstance(head, MetaEmbedding)]
    router, attention = (
        {p for module in model.modules() if isinstance(module, kind) for p in module.parameters()}
        for kind in (Router, ModulatedAttention)
    )
    if part == "all":
        return set(model.parameters()).difference(scales, router, attention, *(head.added for head in memories))
    if part == "scales":
        found = scales
    elif part == "router":
        found = router
    elif part == "attention":
        found = attention
    elif part == "centroids":
        found = {head.centroids for head in memories}
    elif part == "classifier":
        found = {parameter for head in heads(model) for parameter in head.parameters()} - scales
        found -= {head.centroids for head in memories}
    else:
        found = {p for one in networks(model) if one.branches is not None for p in one.branches.parameters()}
    if not found:
        raise UserError(
            f"stages: train: the model has no {part}; name another part of it, or choose another --head or --network"
        )
    return found


def check_parts(model: Network, stages: Sequence[Stage]) -> None:
    """Raise UserError, before the first step, if the model lacks a part that a stage names, if everything that a stage would
    train is frozen, if no stage trains or sets a part that has no effect until then, if a loss requires features that the
    model does not return, or if --layer-decay is given and the model's layers are unknown."""
    for stage in stages:
        layer_scales(model, stage.config.optim.layer_decay)
        trained = set().union(*(parameters_of(model, part) for part in stage.train))
        if not any(parameter.requires_grad for parameter in trained):
            raise UserError(
                f"stages: train: --freeze leaves nothing of {', '.join(stage.train)} to train; drop one of the two"
            )
        if "classifier" in stage.reinit:
            heads(model)
        if (loss := stage.config.method.feature_loss) != "off":
            for network in networks(model):
                classifier_width(network.backbone, f"--feature-loss {loss}")
    remedy = "use --method oltr, or a recipe with such a stage"
    kinds = {type(module) for module in model.modules()}
    if ModulatedAttention in kinds and not any("attention" in stage.train for stage in stages):
        raise UserError(f"--network attention: no stage has train: [attention]; {remedy}")
    if MetaEmbedding in kinds and not any("centroids" in stage.reinit for stage in stages):
        raise UserError(f"--head meta_embedding: no stage has reinit: [centroids]; {remedy}")


def train_only(
    model: Network, train: Mapping[str, float], frozen: Collection[nn.Parameter] = ()
) -> nn.Module | list[dict]:
    """Let only the named parts, without the `frozen` parameters, require gradients. If the router trains, the model returns
    the router's logits in training mode. The stage has passed `check_parts`.

    Return the model if all parts train at the same rate, else parameter groups with `lr_scale`, the factor of the rate."""
    if isinstance(model, Experts):
        model.trains_router = "router" in train
    factors = {}
    for part, factor in train.items():
        factors |= dict.fromkeys(parameters_of(model, part), factor)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in factors and parameter not in frozen)
        parameter.grad = None  # of the stage before it, which clipping would count
    trained = {parameter: factors[parameter] for parameter in model.parameters() if parameter.requires_grad}
    if set(trained.values()) == {1.0}:
        return model  # timm leaves out parameters that require no gradient
    by_factor: dict[float, list[torch.nn.Parameter]] = {}
    for parameter, factor in trained.items():
        by_factor.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "lr_scale": factor} for factor, parameters in by_factor.items()]


def parameter_groups(model: Network, trained: nn.Module | list[dict], optim: OptimSettings) -> nn.Module | list[dict]:
    """Divide `trained`, the result of `train_only`, into groups with `lr_scale` and `weight_decay`, the highest rate first, if
    --layer-decay or --weight-decay-filter require it; else return it unchanged."""
    if optim.layer_decay in (None, 1.0) and not optim.weight_decay_filter:
        return trained
    if isinstance(trained, nn.Module):
        trained = [{"params": [p for p in trained.parameters() if p.requires_grad], "lr_scale": 1.0}]
    scales = layer_scales(model, optim.layer_decay)
    without = without_decay(model) if optim.weight_decay_filter else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in trained:
        for parameter in group["params"]:
            scale = group["lr_scale"] * scales.get(parameter, 1.0)
            decay = 0.0 if parameter in without else optim.weight_decay
            groups.setdefault((scale, decay), []).append(parameter)
    in_order = sorted(groups, reverse=True)
    return [{"params": groups[key], "lr_scale": key[0], "weight_decay": key[1]} for key in in_order]


def layer_scales(model: Network, layer_decay: float | None) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of each parameter of the timm models below the classifiers:
    layer_decay^(L - l) in layer group l of 0..L. The last group contains the classifier, as in timm. Raises UserError for a
    model that does not state its layers."""
    if layer_decay is None:
        return {}
    matcher = getattr(model.backbone, "group_matcher", None)
    if matcher is None:
        kind = type(model.backbone).__name__
        raise UserError(
            f"--layer-decay {layer_decay:g}: {kind} does not state its layers (group_matcher); leave it out, or "
            "give --layer-decay none if a recipe states it"
        )
    names, parameters = timm_names(model), dict(model.named_parameters())
    # The shared and the late stages of experts as one timm model; only the names of its parameters are read
    whole = SimpleNamespace(named_parameters=lambda: ((name, None) for name in names.values()))
    layers = group_parameters(whole, matcher(coarse=False), reverse=True)
    last, of_heads = max(layers.values()), {p for layer in classifier_layers(model) for p in layer.parameters()}
    return {
        parameters[name]: layer_decay ** (last - layers.get(of_timm, last))
        for name, of_timm in names.items()
        if parameters[name] not in of_heads
    }


def without_decay(model: Network) -> set[nn.Parameter]:
    """Return the parameters that timm's filter excludes from weight decay, in the timm models and elsewhere: biases,
    parameters of fewer than two dimensions, and those that the timm model names; also the scales of `bn` branches."""
    names = timm_names(model)
    excluded = getattr(model.backbone, "no_weight_decay", set)()
    scales = {p for module in model.modules() if isinstance(module, BatchNormBranches) for p in module.parameters()}
    return scales | {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1
        or name.endswith(".bias")
        or any(fnmatchcase(names.get(name, ""), pattern) for pattern in excluded)
    }
