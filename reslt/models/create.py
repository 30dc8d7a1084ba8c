"""Creation of networks from settings: any timm model, with branches; a ResNet also with experts, BBN or exits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

import reslt.models.cifar_resnet  # noqa: F401  (registers the CIFAR ResNets with timm)
from reslt.config.schema import MethodSettings, ModelSettings
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.models.bbn import BBN
from reslt.models.branches import BRANCHES, ConvStack, ModulatedAttention
from reslt.models.complexity import Complexity, complexity_without_branches, forward_counted
from reslt.models.contrastive import Projection
from reslt.models.exits import Exits
from reslt.models.experts import (
    Experts,
    Network,
    create_gates,
    keep_early,
    keep_late,
    stage_infos,
    stage_widths,
    stages,
)
from reslt.models.heads import classifier_width, create_head, normalized_rows, put_head, set_initial_bias
from reslt.models.pretrained import weights_of
from reslt.models.reslt import ResLT
from reslt.models.router import Router
from reslt.models.tuning import add_parts
from reslt.models.weight_files import load_pretrained_file


def check_model_name(name: str) -> None:
    """Raise UserError, with the closest existing name, if timm has no such model. Names of hubs and folders, from which timm
    would read and run code, are rejected too: `read_source` resolves those that a user types before."""
    if set(name) & set(":/\\") or not timm.is_model(name):
        raise UserError(f"--model: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")


def create_backbone(model: ModelSettings, num_classes: int, img_size: int | None = None) -> nn.Module:
    """Return the timm model that the settings name, with random or pretrained weights.

    `img_size`: pixels per side, for models that are built for one size; None: their own. Raises UserError for an unknown
    name, argument or weights file."""
    check_model_name(model.model)
    cfg, arguments = timm.get_pretrained_cfg(model.model), dict(model.model_kwargs)
    if img_size and cfg and cfg.fixed_input_size:
        arguments.setdefault("img_size", img_size)
    is_pretrained = model.pretrained and not model.pretrained_file
    weights = weights_of(model.model) if is_pretrained else None
    try:
        with _weights_only():
            backbone = timm.create_model(
                model.model,
                pretrained=is_pretrained,
                pretrained_cfg_overlay=weights,
                num_classes=num_classes,
                drop_rate=model.drop,
                drop_path_rate=model.drop_path,
                **arguments,
            )
    except Exception as fault:  # third-party constructors and readers of weights raise anything
        remedy = "see --model-kwargs, --drop, --drop-path"
        if is_pretrained:
            remedy += "; --no-pretrained starts without the weights, --pretrained-file FILE with others"
        given = f" with {arguments}" if arguments else ""
        reason = f"{type(fault).__name__}: {next(iter(str(fault).splitlines()), '')}"  # torch adds a stack trace
        raise UserError(f"--model {model.model}{given} cannot be created: {reason}; {remedy}") from None
    if model.pretrained_file:
        load_pretrained_file(backbone, model.pretrained_file)
    return backbone


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within the context, let torch unpickle nothing but tensors, whatever its caller asks for: timm asks for all objects of
    a file in its cache."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def create_model(
    model: ModelSettings, method: MethodSettings, num_classes: int, img_size: int | None = None
) -> Network:
    """Return the network of a method on a timm model, on the CPU, including the parts that `--tune` adds. Its weights are
    drawn from torch's global generator."""
    network = _create_network(model, method, num_classes, img_size)
    add_parts(network, model, num_classes, img_size)
    return network


def _create_network(model: ModelSettings, method: MethodSettings, num_classes: int, img_size: int | None) -> Network:
    """Return the network without the parts that `--tune` adds."""
    first = create_backbone(model, num_classes, img_size)
    backbones = 2 if method.network == "bbn" else 1  # that one network is made of
    positions = map_positions(first, img_size) if method.network == "attention" else 0
    if not stages(first) and (method.network in ("bbn", "exits") or model.experts > 1):
        wanted_by = f"--network {method.network}" if model.experts == 1 else f"--experts {model.experts}"
        raise UserError(
            f"{wanted_by}: {model.model} is neither of timm's ResNet class (resnet50, resnext50_32x4d, seresnet50, "
            "res2net50_26w_4s, ...) nor a CIFAR ResNet; choose one of these"
        )
    if model.experts == 1:
        others = [create_backbone(model, num_classes, img_size) for _ in range(backbones - 1)]
        network = with_branches(method, first, *others, positions=positions)
        if method.views_in_training > 1:
            width = classifier_width(network.backbone, f"--feature-loss {method.feature_loss}")
            network.projection = Projection(width, num_classes, method.views_in_training)
        return network
    own, late_stages, all_stages = model, model.expert_stages, len(stages(first))
    if late_stages > all_stages - model.expert_gates:
        to_gate = ", one of which gates need" * model.expert_gates
        raise UserError(
            f"--expert-stages {late_stages}: {model.model} has {all_stages} stages{to_gate}; give 1 to "
            f"{all_stages - model.expert_gates}"
        )
    if late_stages == all_stages and model.expert_width != 1:
        raise UserError(
            f"--expert-stages {late_stages}: experts with all stages of their own are as wide as {model.model}, whose stem "
            "they share; give --expert-width 1"
        )
    if model.expert_width != 1:
        widths = stage_widths(first)
        widths[-late_stages:] = [int(model.expert_width * width) for width in widths[-late_stages:]]
        own = replace(model, model_kwargs=model.model_kwargs | {"channels": widths})
        own = replace(own, pretrained=False, pretrained_file=None)  # pretrained weights fit only the shared stages
    try:
        late = [
            keep_late(create_backbone(own, num_classes, img_size), late_stages)
            for _ in range(model.experts * backbones)
        ]
        if any(0 in p.shape for backbone in late for p in backbone.parameters()):
            raise UserError("a layer would have no channel")
    except UserError as fault:
        if own is model:
            raise
        late_widths = ", ".join(map(str, widths[-late_stages:]))
        raise UserError(
            f"--expert-width {model.expert_width:g}: {model.model} cannot have last stages of width {late_widths}: {fault}; "
            "choose another width"
        ) from None
    experts = [with_branches(method, *late[e :: model.experts], positions=positions) for e in range(model.experts)]
    router = None
    if method.router_topk is not None:
        width = classifier_width(experts[0].backbone, "--router-topk")
        router = Router(width, len(experts), min(method.router_topk, num_classes))
    gates = create_gates(first, late[0], late_stages, model.experts) if model.expert_gates else []
    return Experts(keep_early(first, late_stages), experts, router, gates)


@torch.no_grad()
def map_positions(backbone: nn.Module, img_size: int | None) -> int:
    """Return the number of positions of a timm model's feature map: height times width, or the number of tokens.
    `img_size`: pixels per side; None: the model's own."""
    size = img_size or max(resolve_model_data_config(backbone)["input_size"][1:])
    features = backbone.eval().forward_features(torch.zeros(1, 3, size, size))
    backbone.train()
    return features.numel() // backbone.num_features


def with_branches(
    method: MethodSettings, backbone: nn.Module, twin: nn.Module | None = None, positions: int = 0
) -> ResLT | BBN | Exits:
    """Return a backbone with the method's head and with its branches or exits, if any, newly initialized. `twin`: for BBN, a
    second backbone that gives its last block; `positions`: for attention, the number of positions of the feature map."""
    network = ResLT(backbone, None) if twin is None else BBN(backbone, twin, stages(backbone)[-1])
    put_head(backbone, method)
    if method.tau is not None:
        normalized_rows(backbone.get_classifier(), method.tau)  # raises if that is impossible
    if method.ncm is not None:
        classifier_width(backbone, "--ncm")
    if method.network == "exits":
        return Exits(backbone, _early_heads(method, backbone), method.exit_confidence)
    if method.network == "conv_stack":
        return ResLT(backbone, ConvStack(backbone.num_features, method.branches))
    if method.network == "attention":
        return ResLT(backbone, ModulatedAttention(backbone.num_features, positions))
    if not method.has_branches:
        return network
    places = {"map": backbone.num_features}
    if "pooled" in (method.branch_at, method.eval_branch_at):
        places["pooled"] = classifier_width(backbone, "branches on the pooled features")
    channels, eval_at = places[method.branch_at], method.eval_branch_at or method.branch_at
    if places[eval_at] != channels:
        raise UserError(
            f"--eval-branch-at {eval_at}: {type(backbone).__name__} has {places['map']} channels on the map and "
            f"{places['pooled']} pooled, so branches trained on the {method.branch_at} fit only there; drop the flag"
        )
    counted = {"init_branches": method.branch_init_branches} if method.branch == "conv" else {}
    branches = BRANCHES[method.branch](channels, method.branches, tied=method.tied_branches, **counted)
    return ResLT(backbone, branches, method.branch_at, eval_at)


def _early_heads(method: MethodSettings, backbone: nn.Module) -> list[nn.Module]:
    """Return the classifiers of the exits before the last stage of a ResNet."""
    heads = [
        create_head(nn.Linear(info["num_chs"], backbone.num_classes), method) for info in stage_infos(backbone)[:-1]
    ]
    for head in heads:
        set_initial_bias(head, method)
    return heads


@torch.no_grad()
def check_forward(model: Network, size: int, num_classes: int) -> tuple[Complexity, Complexity]:
    """Pass one image through the model in evaluation mode, so that an unusable model fails before the first step, and return
    its complexity with and without branches. Raises UserError if the model does not return logits of the right shape."""
    training = model.training
    try:
        logits, found = forward_counted(model.eval(), size)
        wanted = (*model.logits_per_image, 1, num_classes)
        if tuple(logits.shape) != wanted:
            raise ValueError(f"its logits have shape {tuple(logits.shape)}, not {wanted}")
    except Exception as fault:  # third-party models raise anything for an input they do not accept
        name = type(model.backbone).__name__
        raise UserError(
            f"--model: {name} does not work with {size} x {size} pixel inputs: {fault}; see --img-size"
        ) from None
    finally:
        model.train(training)
    return found, complexity_without_branches(model, size)
