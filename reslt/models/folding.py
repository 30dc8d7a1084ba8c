"""Exact folding for inference: a trained model becomes a module that maps images to (N, C) fused logits.

`bn` branches are affine in inference. If the path from them to the logits is affine too, the whole ResLT head is one
linear classifier, and the folded model is a plain timm model. For `conv` branches, BN folds into the convolution, and the
K branches are added before the classifier. Experts are folded one by one. Low-rank updates are merged into the weights;
adapters, which are not linear, are kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from reslt.core.errors import UserError
from reslt.models.adapters import has_adapters
from reslt.models.bbn import BBN
from reslt.models.branches import BatchNormBranches, ConvBranches, ConvStack, ModulatedAttention
from reslt.models.exits import Exits, exited_logits
from reslt.models.experts import Experts, Gate, Network, maps_and_gates
from reslt.models.heads import ScaledLinear
from reslt.models.lora import merge_updates
from reslt.models.reslt import ResLT, is_channels_last

SAME = 1e-2  # of the largest logit: far above rounding in float32, or TF32 on a GPU, and far below a wrong fold


class FoldedResLT(nn.Module):
    """A backbone, `conv` branches with BN folded in, and one classifier: (N, 3, H, W) -> (N, C). The branches are on the
    map or the pooled features; their outputs are averaged over space and added."""

    def __init__(self, backbone: nn.Module, branches: ConvBranches, branch_at: str):
        super().__init__()
        self.backbone, self.branches, self.branch_at = backbone, branches, branch_at

    def forward(self, images: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        features = self.backbone.forward_features(images)
        if gate is not None:
            features = features * gate
        if self.branch_at == "pooled":
            features = self.backbone.forward_head(features, pre_logits=True)
        pooled = self.branches(as_map(features, is_channels_last(self.backbone))).mean((3, 4))  # (K, N, D)
        return self.backbone.get_classifier()(pooled.sum(0))


class FoldedExperts(nn.Module):
    """Shared stages and folded experts with averaged logits, and gates, which are not folded: (N, 3, H, W) -> (N, C)."""

    def __init__(self, shared: nn.Module, experts: list[nn.Module], gates: Sequence[Gate] = ()):
        super().__init__()
        self.shared, self.experts, self.gates = shared, nn.ModuleList(experts), nn.ModuleList(gates)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features, gates = maps_and_gates(self.shared, list(self.gates), images)
        if not gates:
            return torch.stack([expert(features) for expert in self.experts]).mean(0)
        return torch.stack(
            [_gated(expert, features, gate) for expert, gate in zip(self.experts, gates, strict=True)]
        ).mean(0)


class Fused(nn.Module):
    """A ResLT or BBN model that cannot be folded further, with its branch logits added up: (N, 3, H, W) -> (N, C)."""

    def __init__(self, model: ResLT | BBN):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        return self.model(images, *gate).sum(0)


class FoldedExits(nn.Module):
    """A network with early exits, the first confident one of which predicts: (N, 3, H, W) -> (N, C)."""

    def __init__(self, model: Exits):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits, asks = self.model.route(images)
        return exited_logits(logits[:, 0], asks)


def _gated(expert: nn.Module, features: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the logits of a folded expert, a plain timm model or one with branches, after a gate multiplies its last
    map."""
    if isinstance(expert, (Fused, FoldedResLT)):
        return expert(features, gate)
    return expert.forward_head(expert.forward_features(features) * gate)


def as_map(features: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Convert features in a timm model's layout to (N, D, H, W): tokens to L x 1, pooled features to 1 x 1."""
    if features.ndim == 4:
        return features.movedim(-1, 1) if channels_last else features
    number, *_, width = features.shape  # `len` would fix the number of images of a program that is exported
    return features.reshape(number, -1, 1, width).movedim(-1, 1)


@torch.no_grad()
def fold(model: Network, img_size: int) -> tuple[nn.Module, str]:
    """Return a module that maps images to the (N, C) fused logits of a trained model, and one sentence on how far the model
    folded.

    The arithmetic is done in float64; the model is not changed. Raises UserError if the module's logits of random images
    differ from the model's, or are not finite."""
    folded, how = fold_unchecked(model, img_size)
    _require_same_logits(model, folded, img_size)
    return folded, how


@torch.no_grad()
def fold_unchecked(model: Network, img_size: int) -> tuple[nn.Module, str]:
    """Fold as `fold` does, without comparing logits: for a model without its trained weights."""
    like = next(model.parameters())
    copied = copy.deepcopy(model).eval()
    if isinstance(copied, ResLT):
        copied.projection = None  # only training uses it
    merged = "low-rank updates merged; " * merge_updates(copied)
    example = torch.zeros(1, 3, img_size, img_size, dtype=like.dtype, device=like.device)
    if isinstance(copied, Experts):
        example = copied.shared.forward_features(example)
        heads, hows = zip(*(_fold(expert, example) for expert in list(copied.experts)[: copied.used]), strict=True)
        plural = "s" * (len(heads) > 1)
        how = f"{merged}{len(heads)} expert{plural}, each head: {hows[0]}; reslt.models.fold.load_folded reads the file"
        gates = list(copied.gates)[: copied.used]
        return FoldedExperts(copied.shared, [head.to(like.dtype) for head in heads], gates), how
    if isinstance(copied, Exits):
        for i, head in enumerate(copied.exits):
            copied.exits[i] = head.folded() if isinstance(head, ScaledLinear) else head
        has_scales = _fold_scales(copied.backbone)
        kept = "all exits are kept; reslt.models.fold.load_folded reads the file"
        return FoldedExits(copied), f"{merged}{'scales folded into the classifiers; ' * has_scales}{kept}"
    folded, how = _fold(copied, example)
    is_plain = folded is copied.backbone and not has_adapters(folded)
    is_plain = is_plain and isinstance(folded.get_classifier(), (nn.Linear, nn.Conv2d, tuple, nn.ModuleList))
    use = "the file contains the plain timm model" if is_plain else "reslt.models.fold.load_folded reads the file"
    kept = "; adapters are kept" * has_adapters(folded)
    return folded.to(like.dtype), f"{merged}{how}{kept}; {use}"


def _require_same_logits(model: Network, folded: nn.Module, img_size: int) -> None:
    """Raise UserError unless a folded module computes the fused logits of its model up to rounding."""
    like = next(model.parameters())
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)).to(like)
    evaluated = copy.deepcopy(model).eval()
    of_branches = evaluated(images).double()  # (K, N, C), or (E, K, N, C)
    if isinstance(model, Exits):
        fused = FoldedExits(evaluated)(images)
    else:
        fused = of_branches.sum(-3) if of_branches.ndim == 3 else of_branches.sum(-3).mean(0)
    difference, largest = (folded.eval()(images) - fused).abs().max().item(), of_branches.abs().max().item()
    rounding = max(SAME, 16 * torch.finfo(like.dtype).eps)
    if not difference <= rounding * largest:  # true for NaN
        raise UserError(
            f"the folded weights do not compute the model's logits: they differ by {difference:.3g}, and the largest logit "
            f"is {largest:.3g}; use the model without folding it"
        )


def _fold(model: ResLT | BBN, example: torch.Tensor) -> tuple[nn.Module, str]:
    """Return the folded module of a model in evaluation mode, in float64, and how far it folded. The model is modified.
    `example`: an input of its backbone."""
    backbone, has_scales = model.backbone, _fold_scales(model.backbone)
    if isinstance(model, BBN):
        how = "scales folded into the classifier; both last blocks are kept"
        return Fused(model), how if has_scales else "not folded: it has two last blocks, and the plain model has one"
    branches, place = model.branches, model.eval_branch_at
    if branches is None:
        return (
            backbone,
            "scales folded into the classifier" if has_scales else "the plain model: there is nothing to fold",
        )
    if isinstance(branches, ModulatedAttention):
        return Fused(model), "not folded: attention on the feature map is not linear"
    shape = backbone.forward_features(example).shape[1:]  # in its own precision: not every model supports another
    model.double()
    if isinstance(branches, ConvStack):
        branches.convs = nn.ModuleList(map(fuse_conv_bn_eval, branches.convs, branches.bns))
        branches.bns = nn.ModuleList(nn.Identity() for _ in branches.convs)
        return Fused(model), "BN folded into the convolutions before the head"
    follows_directly, classifier = classifies_alone(backbone, shape, place), backbone.get_classifier()
    if isinstance(branches, ConvBranches):
        branches.conv, branches.bn = fuse_conv_bn_eval(branches.conv, branches.bn), nn.Identity()
        if not follows_directly:
            reason = (
                "BN folded into the branches' convolution; the head is not just pooling and one linear layer, so the "
            )
            return Fused(model), f"{reason}{branches.branches} branches pass through it one by one"
        if classifier.bias is not None:
            classifier.bias.mul_(branches.branches)
        return FoldedResLT(backbone, branches, place), "BN folded; branches added before the classifier"
    if not follows_directly:
        return Fused(model), "not folded: the head is not just pooling and one linear layer; all branches are kept"
    _into_classifier(classifier, branches)
    return backbone, "folded into the classifier, at no extra cost"


def _fold_scales(backbone: nn.Module) -> bool:
    """Replace a classifier that has a scale per class with the linear classifier that has the same logits. Return whether
    there was one."""
    head = backbone.get_classifier()
    if not isinstance(head, ScaledLinear):
        return False
    name = next(name for name, module in backbone.named_modules() if module is head)
    backbone.set_submodule(name, head.folded())
    return True


def _into_classifier(classifier: nn.Linear, branches: BatchNormBranches) -> None:
    """Fold K affine maps B_k(x) = g_k x + c_k into the classifier that follows each of them, the logits being added:
    W' = W diag(sum g_k), b' = K b + W sum c_k, with g = gamma / sqrt(var + eps), c = beta - g mean."""
    gamma, beta = (p.expand(branches.branches, -1) for p in (branches.weight, branches.bias))  # (K, D)
    gain = gamma / torch.sqrt(branches.bn.running_var + branches.bn.eps)
    offset = beta - gain * branches.bn.running_mean
    bias = classifier.weight @ offset.sum(0)
    if classifier.bias is not None:
        bias += branches.branches * classifier.bias
    classifier.weight = nn.Parameter(classifier.weight * gain.sum(0))
    classifier.bias = nn.Parameter(bias)


@torch.no_grad()
def classifies_alone(backbone: nn.Module, shape: tuple[int, ...], place: str) -> bool:
    """Return whether only the linear classifier (and, on the 'map', averaging) comes between branches and logits.
    `backbone`: in float64 and evaluation mode; `shape`: of one image's features.

    timm does not state this, so it is tested: the results of random features through the head and through the short path
    agree up to rounding or not at all. Meanwhile the classifier's weights are random: with zeros, as in some new models,
    any two paths would agree."""
    classifier = backbone.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return False
    generator = torch.Generator().manual_seed(0)
    trained = classifier.weight
    classifier.weight = nn.Parameter(torch.randn(trained.shape, generator=generator, dtype=torch.float64).to(trained))
    features = 10 * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(trained)
    if place == "pooled":
        reached = backbone.forward_head(features, pre_logits=True)
    else:
        reached = as_map(features, is_channels_last(backbone)).mean((2, 3))
    agree = reached.shape[1:] == (classifier.in_features,)
    if agree:
        head, direct = backbone.forward_head(features), classifier(reached)
        agree = bool((head - direct).abs().max() <= 1e-6 * direct.abs().max())
    classifier.weight = trained
    return agree
