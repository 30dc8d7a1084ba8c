"""Exact folding for inference; `evaluate.py --fold OUT.safetensors` writes it.

`bn` branches are affine at inference. Where the path from them to the logits is affine too, the whole ResLT head is
one linear classifier, and the file holds a plain timm model: `timm.create_model(NAME, checkpoint_path=OUT)`.
`conv` branches: BN folds into the convolution, and the K branches are added before the classifier. Experts fold one
by one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reslt.config import FIELDS
from reslt.errors import UserError
from reslt.files import whole_file
from reslt.images import ImageSettings
from reslt.models.branches import ConvBranches
from reslt.models.create import create_model
from reslt.models.experts import Experts
from reslt.models.reslt import ResLT, is_channels_last
from reslt.validation import build, raise_all


class FusedConvBranches(nn.Module):
    """`conv` branches with BN folded in, added up: (N, D, H, W) -> (N, D) averaged over space, the sum over K."""

    def __init__(self, channels: int, branches: int):
        super().__init__()
        self.channels, self.branches = channels, branches
        self.conv = nn.Conv2d(channels, branches * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x)).mean((2, 3)).unflatten(1, (self.branches, self.channels)).sum(1)


class FoldedResLT(nn.Module):
    """A backbone, fused `conv` branches on its map or on its pooled features, one classifier: (N, 3, H, W) -> (N, C)."""

    def __init__(self, backbone: nn.Module, branches: FusedConvBranches, branch_at: str):
        super().__init__()
        self.backbone, self.branches, self.branch_at = backbone, branches, branch_at

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.backbone.forward_features(images)
        if self.branch_at == "pooled":
            features = self.backbone.forward_head(features, pre_logits=True)
        return self.backbone.get_classifier()(self.branches(as_map(features, is_channels_last(self.backbone))))


class FoldedExperts(nn.Module):
    """Shared stages and folded experts, whose logits are averaged: (N, 3, H, W) -> (N, C)."""

    def __init__(self, shared: nn.Module, experts: list[nn.Module]):
        super().__init__()
        self.shared, self.experts = shared, nn.ModuleList(experts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.shared.forward_features(images)
        return torch.stack([expert(features) for expert in self.experts]).mean(0)


class Fused(nn.Module):
    """What cannot fold further: the ResLT model with its branch logits added up, (N, 3, H, W) -> (N, C)."""

    def __init__(self, model: ResLT):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).sum(0)


def as_map(features: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Features in a timm model's layout -> (N, D, H, W) (tokens: L x 1, pooled: 1 x 1)."""
    if features.ndim == 4:
        return features.movedim(-1, 1) if channels_last else features
    return features.reshape(len(features), -1, 1, features.shape[-1]).movedim(-1, 1)


@torch.no_grad()
def fold(model: ResLT | Experts, img_size: int) -> tuple[nn.Module, str]:
    """A trained model -> a module that maps images to (N, C) fused logits, and one sentence on how far it folded.

    The arithmetic is done in float64; the model is left as it is."""
    like = next(model.parameters())
    model = copy.deepcopy(model).double().eval()
    image = torch.zeros(1, 3, img_size, img_size, dtype=torch.float64, device=like.device)
    if not isinstance(model, Experts):
        folded, how = _fold(model, image)
        is_plain = folded is model.backbone
        use = "the file holds the plain timm model" if is_plain else "reslt.models.fold.load_folded reads the file"
        return folded.to(like.dtype), f"{how}; {use}"
    features = model.shared.forward_features(image)
    experts, hows = zip(*(_fold(expert, features) for expert in list(model.experts)[: model.used]), strict=True)
    return FoldedExperts(model.shared, experts).to(like.dtype), (
        f"{len(experts)} experts, each one's head: {hows[0]}; reslt.models.fold.load_folded reads the file"
    )


def _fold(model: ResLT, example: torch.Tensor) -> tuple[nn.Module, str]:
    """`fold` of a float64 copy, which is used up. `example`: an input of its backbone."""
    backbone, branches, place = model.backbone, model.branches, model.eval_branch_at
    if branches is None:
        return backbone, "the plain model: there is nothing to fold"
    follows_directly = classifies_alone(backbone, example, place)
    if isinstance(branches, ConvBranches):
        weight, bias = _batch_norm_into_conv(branches)
        if not follows_directly:
            branches.conv = nn.Conv2d(*weight.shape[1::-1], 1).to(weight)
            branches.conv.weight.copy_(weight)
            branches.conv.bias.copy_(bias)
            branches.bn = nn.Identity()
            reason = "BN folded into the branches' convolution; the head is not pooling and one linear layer, so the "
            return Fused(model), reason + f"{branches.branches} branches pass through it one by one"
        fused = FusedConvBranches(branches.channels, branches.branches).double()
        fused.conv.weight.copy_(weight)
        fused.conv.bias.copy_(bias)
        classifier = backbone.get_classifier()
        if classifier.bias is not None:
            classifier.bias.mul_(branches.branches)
        return FoldedResLT(backbone, fused, place), "BN folded; branches added before the classifier"
    if not follows_directly:
        return Fused(model), "not folded: the head is not pooling and one linear layer; all branches are kept"
    _affine_branches_into_classifier(model)
    return backbone, "folded into the classifier, at no extra cost"


def _affine_branches_into_classifier(model: ResLT) -> None:
    """W' = sum_k W diag(g_k), b' = K b + sum_k W c_k, with g = gamma / sqrt(var + eps), c = beta - g mean."""
    bn, classifier = model.branches.bn, model.backbone.get_classifier()
    gain = model.branches.weight / torch.sqrt(bn.running_var + bn.eps)  # (K, D)
    offset = model.branches.bias - gain * bn.running_mean
    bias = classifier.weight @ offset.sum(0)
    if classifier.bias is None:
        classifier.bias = nn.Parameter(bias)
    else:
        classifier.bias.mul_(model.branches.branches).add_(bias)
    classifier.weight.mul_(gain.sum(0))


def _batch_norm_into_conv(branches: ConvBranches) -> tuple[torch.Tensor, torch.Tensor]:
    bn = branches.bn
    gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return branches.conv.weight * gain.view(-1, 1, 1, 1), bn.bias - gain * bn.running_mean


@torch.no_grad()
def classifies_alone(backbone: nn.Module, example: torch.Tensor, place: str) -> bool:
    """Whether nothing but the linear classifier (and, on the 'map', averaging) stands between branches and logits.
    `example`: an input of the backbone.

    timm states this nowhere, so it is tried: random features through the head and through the short way, which agree to
    rounding or not at all."""
    classifier = backbone.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return False
    features = backbone.forward_features(example)
    generator = torch.Generator().manual_seed(0)
    features = 10 * torch.randn(2, *features.shape[1:], generator=generator, dtype=torch.float64).to(classifier.weight)
    if place == "pooled":
        reached = backbone.forward_head(features, pre_logits=True)
    else:
        reached = as_map(features, is_channels_last(backbone)).mean((2, 3))
    if reached.shape[1:] != (classifier.in_features,):
        return False
    head, direct = backbone.forward_head(features), classifier(reached)
    return bool((head - direct).abs().max() <= 1e-6 * direct.abs().max())


def save_folded(
    folded: nn.Module, images: ImageSettings, num_classes: int, class_names: tuple[str, ...] | None, out: Path
) -> None:
    """Write folded weights; what `load_folded` and a user of the file need stands in its metadata, as JSON."""
    kept = ("model", "model_kwargs", "experts", "expert_width")
    kept += ("method", "branches", "branch", "branch_at", "eval_branch_at")
    described = {name: getattr(images.config, name) for name in kept}
    described |= {"img_size": images.size, "mean": images.mean, "std": images.std}
    described |= {"interpolation": images.interpolation, "crop_pct": images.crop_pct}
    described |= {"num_classes": num_classes, "class_names": class_names}
    if isinstance(folded, FoldedExperts):
        described["use_experts"] = len(folded.experts)
    tensors = {k: t.detach().cpu().contiguous() for k, t in folded.state_dict().items()}
    with whole_file(out) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "reslt": json.dumps(described, ensure_ascii=False)})


def load_folded(file: Path) -> tuple[nn.Module, dict]:
    """A file of `save_folded` -> the module in evaluation mode, (N, 3, H, W) -> (N, C), and its description."""
    with safe_open(file, "pt") as opened:
        described = json.loads((opened.metadata() or {}).get("reslt", "null"))
    if described is None:
        raise UserError(f"{file}: not written by evaluate.py --fold")
    values = {name: value for name, value in described.items() if name in FIELDS}
    config, faults = build(values, dict.fromkeys(values, str(file)))
    raise_all(faults)
    model = create_model(config, described["num_classes"])
    if isinstance(model, Experts):
        model.use(described["use_experts"])
    folded, _ = fold(model, described["img_size"])
    folded.load_state_dict(load_file(file))
    return folded.eval(), described
