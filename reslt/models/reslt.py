"""ResLT on any timm model: its backbone, K branches on its features, its head shared by all branches."""

from __future__ import annotations

import timm
import torch
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
    overlay = dict(file=c.pretrained_file) if c.pretrained_file else None
    pretrained = c.pretrained or overlay is not None
    try:
        return timm.create_model(
            c.model,
            pretrained=pretrained,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            drop_rate=c.drop,
            drop_path_rate=c.drop_path,
            **arguments,
        )
    except Exception as fault:  # whatever a foreign constructor or a reader of weights raises
        remedy = "see --model-kwargs, --drop, --drop-path"
        if pretrained:
            remedy = "give a matching file" if overlay else "without network, give the weights with --pretrained-file"
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"--model {c.model}{given} cannot be created: {fault}; {remedy}") from None


def create_model(c: Config, num_classes: int) -> ResLT:
    """The network of a configuration, on the CPU. Draws its initial weights from torch's global generator."""
    backbone = create_backbone(c, num_classes)
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
