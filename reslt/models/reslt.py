"""ResLT on any timm model: its backbone, K branches on its features, its head shared by all branches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from timm.models import load_state_dict
from torch import nn

import reslt.models.cifar_resnet  # noqa: F401  (registers the CIFAR ResNets with timm)
from reslt.config import Config
from reslt.errors import UserError, did_you_mean
from reslt.models.branches import BRANCHES, apply_branches


class ResLT(nn.Module):
    """A timm model with branches between its features and its head; without branches, the plain model as K = 1.

    `branch_at` 'map': branches on `forward_features`, then the model's whole head (pooling, norm, classifier) on each.
    'pooled': branches on the pooled features that enter the classifier, then the classifier on each.
    `eval_branch_at`: the same in evaluation mode, a different function for `conv` branches (the released large-scale
    code trains on the map and evaluates on the pooled features)."""

    def __init__(
        self, backbone: nn.Module, branches: nn.Module | None, branch_at: str = "map", eval_branch_at: str | None = None
    ):
        super().__init__()
        self.backbone, self.branches = backbone, branches
        self.branch_at, self.eval_branch_at = branch_at, eval_branch_at or branch_at

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised images -> (K, N, C) branch logits. The prediction is their sum over K."""
        features = self.backbone.forward_features(images)
        if self.branches is None:
            return self.backbone.forward_head(features)[None]
        if (self.branch_at if self.training else self.eval_branch_at) == "map":
            stacked = apply_branches(self.branches, features, is_channels_last(self.backbone))
            logits = self.backbone.forward_head(stacked)
        else:
            pooled = self.backbone.forward_head(features, pre_logits=True)
            logits = self.backbone.get_classifier()(apply_branches(self.branches, pooled, False))
        return logits.unflatten(0, (self.branches.branches, -1))

    @torch.no_grad()
    def normalize_classifier(self, tau: float) -> None:
        """Scale classifier row c by ||w_c||^-tau and drop the bias, as the released code does at evaluation."""
        classifier = linear_classifier(self.backbone, "--tau")
        norms = classifier.weight.norm(dim=1, keepdim=True)
        classifier.weight.div_(norms**tau)
        if classifier.bias is not None:
            classifier.bias.zero_()

    @contextmanager
    def normalized_classifier(self, tau: float | None) -> Iterator[None]:
        """`normalize_classifier(tau)` within the block; the trained classifier is back after it. None: leave it alone."""
        parameters = [] if tau is None else list(linear_classifier(self.backbone, "--tau").parameters())
        trained = [p.detach().clone() for p in parameters]
        if tau is not None:
            self.normalize_classifier(tau)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)


def is_channels_last(backbone: nn.Module) -> bool:
    """Whether a 4-d feature map is (N, H, W, D): swin and its like."""
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC"


def linear_classifier(backbone: nn.Module, wanted_by: str) -> nn.Linear:
    """The model's classifier. Raises UserError where it is not one Linear."""
    classifier = backbone.get_classifier()
    if isinstance(classifier, nn.Linear):
        return classifier
    kind = type(classifier).__name__
    raise UserError(f"{wanted_by} needs a model with one linear classifier; {type(backbone).__name__} has a {kind}")


def check_model_name(name: str) -> None:
    """Raises UserError, with the closest name that exists, where timm has no such model."""
    if not timm.is_model(name):
        raise UserError(f"--model: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")


def create_backbone(c: Config, num_classes: int) -> nn.Module:
    """The timm model of a configuration. Raises UserError for an unknown name, argument or weights file."""
    check_model_name(c.model)
    cfg, arguments = timm.get_pretrained_cfg(c.model), dict(c.model_kwargs)
    if c.img_size and cfg and cfg.fixed_input_size:
        arguments.setdefault("img_size", c.img_size)
    from_network = c.pretrained and not c.pretrained_file
    try:
        backbone = timm.create_model(
            c.model,
            pretrained=from_network,
            num_classes=num_classes,
            drop_rate=c.drop,
            drop_path_rate=c.drop_path,
            **arguments,
        )
    except Exception as fault:  # whatever a foreign constructor or a reader of weights raises
        remedy = "see --model-kwargs, --drop, --drop-path"
        if from_network:
            remedy = "without network, give the weights with --pretrained-file; --no-pretrained starts without"
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"--model {c.model}{given} cannot be created: {fault}; {remedy}") from None
    if c.pretrained_file:
        load_pretrained_file(backbone, c.pretrained_file)
    return backbone


def load_pretrained_file(backbone: nn.Module, file: str) -> None:
    """Weights of a file (.safetensors, or .pth read with weights_only) into a timm model; timm's key names, torchvision's
    where they are the same (ResNet, ResNeXt) or timm converts them. A classifier for other classes is left out.

    timm itself would pass over keys that do not match. Raises UserError where a weight of the model is not in the file."""
    try:
        state = load_state_dict(file, device="cpu", weights_only=True)
        convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        own = backbone.state_dict()
        if convert is not None and not set(own) <= set(state):
            state = convert(state, backbone)
    except Exception as fault:  # a reader of weights, or a conversion of those of another model, raises anything
        raise UserError(f"--pretrained-file {file}: {type(fault).__name__}: {fault}; give a file of weights") from None
    classifiers = backbone.pretrained_cfg.get("classifier", ())
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers or ()
    of_classifier = tuple(f"{name}." for name in classifiers)
    wanted = {k for k in own if not k.startswith(of_classifier) and not k.endswith("num_batches_tracked")}
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if missing := sorted(wanted - set(fitting)):
        there = f"has shape {tuple(state[missing[0]].shape)}" if missing[0] in state else "is not in it"
        raise UserError(
            f"--pretrained-file {file}: {len(missing)} of {len(wanted)} weights do not fit {type(backbone).__name__}: "
            f"{missing[0]} {tuple(own[missing[0]].shape)} {there}; does the file belong to another --model?"
        )
    backbone.load_state_dict(fitting, strict=False)


def create_model(c: Config, num_classes: int) -> ResLT:
    """The network of a configuration, on the CPU. Draws its initial weights from torch's global generator."""
    backbone = create_backbone(c, num_classes)
    if c.tau is not None:
        linear_classifier(backbone, "--tau")
    if c.method == "ce":
        return ResLT(backbone, None)
    places = {"map": backbone.num_features}
    if "pooled" in (c.branch_at, c.eval_branch_at):
        places["pooled"] = linear_classifier(backbone, "branches on the pooled features").in_features
    channels, eval_at = places[c.branch_at], c.eval_branch_at or c.branch_at
    if places[eval_at] != channels:
        raise UserError(
            f"--eval-branch-at {eval_at}: {c.model} has {places['map']} channels on the map and {places['pooled']} pooled, "
            f"so branches trained on the {c.branch_at} fit there alone; leave the flag out"
        )
    return ResLT(backbone, BRANCHES[c.branch](channels, c.branches), c.branch_at, eval_at)


@torch.no_grad()
def check_forward(model: ResLT, size: int, num_classes: int) -> None:
    """One forward pass in evaluation mode, so that a model that cannot be used fails before the first step."""
    training, parameter = model.training, next(model.parameters())
    try:
        logits = model.eval()(torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device))
        wanted = (1 if model.branches is None else model.branches.branches, 1, num_classes)
        if tuple(logits.shape) != wanted:
            raise ValueError(f"its logits have shape {tuple(logits.shape)}, not {wanted}")
    except Exception as fault:  # whatever a foreign model raises for an input it does not take
        name = type(model.backbone).__name__
        raise UserError(
            f"--model: {name} does not work with {size} x {size} pixel inputs: {fault}; see --img-size"
        ) from None
    finally:
        model.train(training)
