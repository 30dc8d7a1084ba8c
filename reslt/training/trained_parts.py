"""The parts of a model that a stage trains."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from reslt.config.stages import Stage
from reslt.core.errors import UserError
from reslt.models.experts import Experts, Network
from reslt.models.heads import ScaledLinear
from reslt.models.reslt import ResLT
from reslt.models.router import Router


def networks(model: Network) -> list[ResLT]:
    """Return the model, or each of its experts."""
    return list(model.experts) if isinstance(model, Experts) else [model]


def heads(model: Network) -> list[nn.Module]:
    """Return the classifier of the model, or of each expert. Raises UserError if it is not one layer that can be
    initialized again."""
    found = [network.backbone.get_classifier() for network in networks(model)]
    if not all(isinstance(head, nn.Module) and hasattr(head, "reset_parameters") for head in found):
        kind = type(networks(model)[0].backbone).__name__
        raise UserError(
            f"stages: classifier: {kind} has no single classifier; choose a model with one linear classifier"
        )
    return found


def parameters_of(model: Network, part: str) -> set[nn.Parameter]:
    """Return the parameters of `all` (but for the scales of a scaled head and the router), `classifier` (likewise),
    `scales`, `branches` or `router`. Raises UserError if the model lacks the part."""
    scales = {head.scales for head in model.modules() if isinstance(head, ScaledLinear)}
    router = {p for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    if part == "all":
        return set(model.parameters()) - scales - router
    if part == "scales":
        found = scales
    elif part == "router":
        found = router
    elif part == "classifier":
        found = {parameter for head in heads(model) for parameter in head.parameters()} - scales
    else:
        found = {p for one in networks(model) if one.branches is not None for p in one.branches.parameters()}
    if not found:
        raise UserError(
            f"stages: train: the model has no {part}; name another part of it, or choose another --head or --network"
        )
    return found


def check_parts(model: Network, stages: Iterable[Stage]) -> None:
    """Raise UserError, before the first step, if the model lacks a part that one of the stages names, or if all that a
    stage would train is frozen."""
    for stage in stages:
        trained = set().union(*(parameters_of(model, part) for part in stage.train))
        if not any(parameter.requires_grad for parameter in trained):
            raise UserError(
                f"stages: train: --freeze leaves nothing of {', '.join(stage.train)} to train; drop one of the two"
            )
        if stage.reinit:
            heads(model)


def train_only(
    model: Network, train: Mapping[str, float], frozen: Collection[nn.Parameter] = ()
) -> nn.Module | list[dict]:
    """Let only the named parts, without the `frozen` parameters, require gradients; in training mode, the model returns the
    router's logits if it trains. -> the model, if they train at one rate, else parameter groups with their factors of it,
    `lr_scale`. The stage has passed `check_parts`."""
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
