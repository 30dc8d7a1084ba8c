"""Networks for image classification that timm lacks: branches on the features of a timm model, adapters in its blocks,
normalized classifiers, and several experts on one stem. This file requires only torch and timm. Load a folder that contains
it next to config.json and model.safetensors with:

    import sys; sys.path.insert(0, FOLDER); import modeling_reslt
    model = timm.create_model("local-dir:" + FOLDER, pretrained=True)
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

LATE_STAGES = 2  # of a ResNet that each expert has for itself, unless `late_stages` is given


class NormalizedHead(nn.Module):
    """A classifier (..., D) -> (..., C) that normalizes. cosine: z_c = s f.w_c / (|f| |w_c|). deconfounded: features and
    rows are split into G groups, and each group is normalized, that of a row by |w_c| + gamma; the component of the features
    along the direction of their mean is removed `alpha` times (total direct effect)."""

    def __init__(
        self, width: int, classes: int, kind: str, scale: float, groups: int = 1, gamma: float = 0, alpha: float = 0
    ):
        super().__init__()
        self.in_features, self.out_features, self.bias = width, classes, None
        self.kind, self.scale, self.groups, self.gamma, self.alpha = kind, scale, groups, gamma, alpha
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(classes, width)))
        if kind == "deconfounded":
            self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        if self.kind == "cosine":
            return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=1))
        parts = F.normalize(features.unflatten(-1, (self.groups, -1)), dim=-1)
        if self.alpha:
            direction = F.normalize(self.running_mean.unflatten(0, (self.groups, -1)), dim=-1)
            parts = parts - self.alpha * (parts * direction).sum(-1, keepdim=True) * direction
        rows = self.weight.unflatten(1, (self.groups, -1))
        rows = rows / (rows.norm(dim=-1, keepdim=True) + self.gamma)
        return self.scale / self.groups * F.linear(parts.flatten(-2), rows.flatten(1))


class Branches(nn.Module):
    """(N, D, H, W) -> (K, N, D, H, W). conv: a 1x1 convolution and ReLU; bn: a BatchNorm; each of `own` branches has its own
    weights, and a single one is repeated. stack: a single branch of K successive convolutions."""

    def __init__(self, channels: int, kind: str, number: int, own: int):
        super().__init__()
        self.channels, self.kind, self.number, self.own = channels, kind, 1 if kind == "stack" else number, own
        if kind == "conv":
            self.conv = nn.Conv2d(channels, own * channels, 1)
        elif kind == "bn":
            self.bn = nn.BatchNorm2d(channels, affine=False)
            self.weight, self.bias = (nn.Parameter(torch.ones(own, channels)) for _ in range(2))
        else:
            self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "stack":
            for conv in self.convs:
                x = F.relu(conv(x))
            return x[None]
        if self.kind == "conv":
            own = F.relu(self.conv(x)).unflatten(1, (self.own, self.channels)).movedim(1, 0)
        else:
            scale, shift = (p.view(self.own, 1, -1, 1, 1) for p in (self.weight, self.bias))
            own = self.bn(x) * scale + shift
        return own.expand(self.number, -1, -1, -1, -1)


class Adapter(nn.Module):
    """x -> s up(relu(down(norm(x)))): (..., D) -> (..., D)."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, dim), nn.Linear(dim, width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(F.relu(self.down(self.norm(x))))


class AdaptedMlp(nn.Module):
    """A replacement for norm2 and mlp of a block, with an adapter: x -> mlp(norm2(x)) + adapter(x)."""

    def __init__(self, norm2: nn.Module, mlp: nn.Module, dim: int):
        super().__init__()
        self.base = nn.ModuleDict({"norm2": norm2, "mlp": mlp})
        self.adapter = Adapter(norm2.normalized_shape[-1], dim)

    def forward(self, x: torch.Tensor, *more: object) -> torch.Tensor:
        return self.base["mlp"](self.base["norm2"](x), *more) + self.adapter(x)


class Network(nn.Module):
    """A timm model, perhaps with a `NormalizedHead` as classifier, and with `Branches` on its feature map or pooled features:
    (N, 3, H, W) -> (N, C), the sum of the branches' logits. `added`: the branches' features are averaged over space and
    added before the classifier instead, with the same result. `adapters`: {name of a block: width of its adapter}."""

    def __init__(
        self,
        backbone: str,
        backbone_args: dict | None = None,
        head: dict | None = None,
        branches: dict | None = None,
        place: str = "map",
        added: bool = False,
        adapters: dict | None = None,
        **arguments,
    ):
        """`arguments`: further arguments of the timm model, such as num_classes, in_chans, drop_rate."""
        super().__init__()
        self.backbone = timm.create_model(backbone, **{**(backbone_args or {}), **arguments})
        classifier = self.backbone.get_classifier()
        self.num_classes, self.num_features = self.backbone.num_classes, self.backbone.num_features
        for name, dim in (adapters or {}).items():
            block = self.backbone.get_submodule(name)
            block.mlp, block.norm2 = AdaptedMlp(block.norm2, block.mlp, dim), nn.Identity()
        if head is not None:
            name = next(name for name, module in self.backbone.named_modules() if module is classifier)
            replaced = NormalizedHead(classifier.in_features, classifier.out_features, **head)
            self.backbone.set_submodule(name, replaced)
        width = self.num_features if place == "map" else getattr(classifier, "in_features", None)
        self.branches = None if branches is None else Branches(width, **branches)
        self.place, self.added = place, added
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(images)

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        if self.branches is None:
            return self.backbone.forward_head(features)
        if self.place == "pooled":
            features = self.backbone.forward_head(features, pre_logits=True)
        is_map = features.ndim == 4 and not self.channels_last
        batch, *space, channels = features.shape
        if not is_map:  # tokens become a map of L x 1, pooled features one of 1 x 1
            as_map = features if features.ndim == 4 else features.reshape(batch, -1, 1, channels)
            branched = self.branches(as_map.movedim(-1, 1))
        else:
            branched = self.branches(features)
        if self.added:
            return self.get_classifier()(branched.mean((3, 4)).sum(0))
        stacked = branched.flatten(0, 1)
        if not is_map:
            stacked = stacked.movedim(1, -1).reshape(-1, *space, channels)
        logits = self.get_classifier()(stacked) if self.place == "pooled" else self.backbone.forward_head(stacked)
        return logits.unflatten(0, (self.branches.number, -1)).sum(0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


class Gate(nn.Sequential):
    """The feature map of an early stage -> a factor for an expert's last map: a 3x3 convolution with BatchNorm and ReLU per
    stage after the early one; if there are several, the last has no ReLU."""

    def __init__(self, stage: int, channels: list[int], strides: list[int]):
        layers = []
        for before, after, stride in zip(channels[:-1], channels[1:], strides, strict=True):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*(layers[:-1] if len(strides) > 1 else layers))
        self.stage = stage


class Experts(nn.Module):
    """The early stages of a ResNet, and a network of late stages per expert: (N, 3, H, W) -> (N, C), the mean of the experts'
    logits. `expert_args`: arguments of each expert's timm model, such as its widths; `gates`: the arguments of each expert's
    `Gate`; the others are those of `Network`."""

    def __init__(
        self,
        backbone: str,
        experts: int,
        expert_args: dict,
        backbone_args: dict | None = None,
        late_stages: int = LATE_STAGES,
        gates: list[dict] | None = None,
        **arguments,
    ):
        super().__init__()
        of_model = {k: v for k, v in arguments.items() if k not in ("head", "branches", "place", "added")}
        self.shared = timm.create_model(backbone, **{**(backbone_args or {}), **of_model})
        self.num_classes, self.num_features = self.shared.num_classes, self.shared.num_features
        stages = [name for name, _ in self.shared.named_children() if name.startswith("layer")]
        for name in (*stages[-late_stages:], "fc"):
            setattr(self.shared, name, nn.Identity())
        self.experts = nn.ModuleList(Network(backbone, expert_args, **arguments) for _ in range(experts))
        self.gates = nn.ModuleList(Gate(**gate) for gate in gates or ())
        for expert in self.experts:
            for name, _ in list(expert.backbone.named_children()):
                if name not in (*stages[-late_stages:], "global_pool", "fc", "drop"):
                    setattr(expert.backbone, name, nn.Identity())

    def get_classifier(self) -> tuple[nn.Module, ...]:
        return tuple(expert.get_classifier() for expert in self.experts)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the feature map after the early stages, and, if there are gates, their factors."""
        if not len(self.gates):
            return self.shared.forward_features(images)
        seen = sorted({gate.stage for gate in self.gates})
        last, maps = self.shared.forward_intermediates(images, indices=seen)
        return last, [gate(maps[seen.index(gate.stage)]) for gate in self.gates]

    def forward_head(self, features: torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]) -> torch.Tensor:
        if not len(self.gates):
            return torch.stack([expert(features) for expert in self.experts]).mean(0)
        last, factors = features
        of_experts = zip(self.experts, factors, strict=True)
        return torch.stack([e.forward_head(e.forward_features(last) * factor) for e, factor in of_experts]).mean(0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


default_cfgs = generate_default_cfgs({"reslt_network": {}, "reslt_experts": {}})


@register_model
def reslt_network(pretrained: bool = False, **kwargs) -> Network:
    return build_model_with_cfg(Network, "reslt_network", pretrained, **kwargs)


@register_model
def reslt_experts(pretrained: bool = False, **kwargs) -> Experts:
    return build_model_with_cfg(Experts, "reslt_experts", pretrained, **kwargs)
