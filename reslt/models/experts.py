"""Several experts on one stem, as in RIDE: a ResNet with last stages, branches and a classifier for each expert."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence

import torch
from torch import nn

from reslt.core.errors import UserError
from reslt.models.bbn import BBN, each_stream
from reslt.models.exits import Exits
from reslt.models.featured import Featured
from reslt.models.reslt import ResLT
from reslt.models.router import Routed, Router


class Gate(nn.Sequential):
    """SHIKE's knowledge fusion (Jin et al. 2023): the map of an early stage -> a factor for an expert's last map, of the
    same shape. For each stage after the early one it has a 3x3 convolution with BN and ReLU; if there are several, the last
    lacks ReLU."""

    def __init__(self, stage: int, channels: Sequence[int], strides: Sequence[int]):
        """`stage`: the number of the early stage, from 1; `channels`: of its map and of the maps of the stages after it;
        `strides`: of the stages after it."""
        layers = []
        for (before, after), stride in zip(itertools.pairwise(channels), strides, strict=True):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*(layers[:-1] if len(strides) > 1 else layers))
        self.stage, self.channels, self.strides = stage, list(channels), list(strides)


def create_gates(shared: nn.Module, expert: nn.Module, own_stages: int, count: int) -> list[Gate]:
    """Return the gates of `count` experts, which take the shared stages in turn. `shared`: the whole timm model;
    `expert`: the timm model of an expert, whose last stages may be narrower; `own_stages`: the number of stages of an
    expert, fewer than all."""
    of_shared, of_expert = stage_infos(shared), stage_infos(expert)
    infos = of_shared[:-own_stages] + of_expert[-own_stages:]
    widths, reductions = ([info[name] for info in infos] for name in ("num_chs", "reduction"))
    strides = [after // before for before, after in itertools.pairwise(reductions)]
    early = [e % (len(infos) - own_stages) for e in range(count)]
    return [Gate(stage + 1, widths[stage:], strides[stage:]) for stage in early]


def maps_and_gates(
    shared: nn.Module, gates: Sequence[Gate], images: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(N, 3, H, W) -> the map after the shared stages, and the outputs of the gates."""
    if not gates:
        return shared.forward_features(images), []
    seen = sorted({gate.stage for gate in gates})
    last, maps = shared.forward_intermediates(images, indices=seen)
    return last, [gate(maps[seen.index(gate.stage)]) for gate in gates]


class Experts(nn.Module):
    """Experts on shared early stages. `shared`: the backbone up to the last early stage; `experts`: ResLT or BBN models
    whose backbones begin after it; `router`: decides in evaluation how many experts predict for an image (only its
    training stage sets `trains_router`); `gates`: one for each expert, or none."""

    def __init__(
        self,
        shared: nn.Module,
        experts: list[ResLT] | list[BBN],
        router: Router | None = None,
        gates: Sequence[Gate] = (),
    ):
        super().__init__()
        self.shared, self.experts, self.router = shared, nn.ModuleList(experts), router
        self.gates = nn.ModuleList(gates)
        self.used, self.trains_router = len(experts), False
        self.gives_features = False  # whether it returns features in training, for a loss that sees them

    def use(self, count: int) -> None:
        """Predict with only the first `count` experts. Raises UserError if there are fewer."""
        if not 1 <= count <= len(self.experts):
            raise UserError(f"--use-experts {count}: give 1 to {len(self.experts)}, the model's number of experts")
        self.used = count

    @property
    def backbone(self) -> nn.Module:
        """A timm model of the requested kind."""
        return self.shared

    @property
    def logits_per_image(self) -> tuple[int, ...]:
        """(E, K), for the experts in use."""
        return (self.used, *self.experts[0].logits_per_image)

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifier of each expert in use."""
        return [expert.backbone.get_classifier() for expert in list(self.experts)[: self.used]]

    def train(self, mode: bool = True) -> Experts:
        """Set training mode. While the router trains, the rest stays in evaluation mode, as in prediction."""
        super().train(mode)
        if mode and self.trains_router:
            self.shared.eval()
            self.experts.eval()
            self.gates.eval()
        return self

    @property
    def is_routed(self) -> bool:
        """Whether a router decides which of the experts in use predict."""
        return self.router is not None and self.used > 1

    def forward(self, images: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor | Routed | Featured:
        """(N, 3, H, W) -> (E, K, N, C) branch logits. Their sum over K, averaged over E, is the prediction of all experts.
        While the router trains, the result is that of `route`; in training with `gives_features`, it includes the features
        of each expert.

        `shares`: of N pairs of images, for experts that are BBN models (see `BBN.forward`)."""
        if self.training and self.trains_router:
            return self.route(images)
        if shares is not None:
            features = each_stream(self.shared.forward_features, images)
            return torch.stack([expert(features, shares) for expert in list(self.experts)[: self.used]])
        if self.training and self.gives_features:
            return self.with_features(images)
        return torch.stack([expert(*inputs) for expert, inputs in self._inputs(images)])

    def with_features(self, images: torch.Tensor) -> Featured:
        """(N, 3, H, W) -> the branch logits and the features of all experts in use."""
        of_each = [expert.with_features(*inputs) for expert, inputs in self._inputs(images)]
        return Featured(*(torch.stack(parts) for parts in zip(*of_each, strict=True)))

    def _inputs(self, images: torch.Tensor) -> list[tuple[nn.Module, tuple[torch.Tensor, ...]]]:
        """(N, 3, H, W) -> each expert in use, and its inputs: the shared map, and its gate if there are gates."""
        experts = list(self.experts)[: self.used]
        features, gates = maps_and_gates(self.shared, list(self.gates)[: self.used], images)
        return [(expert, (features, *gates[e : e + 1])) for e, expert in enumerate(experts)]

    def route(self, images: torch.Tensor) -> Routed:
        """(N, 3, H, W) -> the branch logits of all experts in use, and the router's logits."""
        branch_logits, features = self.with_features(images)
        return Routed(branch_logits, self.router(branch_logits, features))


Network = ResLT | BBN | Experts | Exits  # the types that `create_model` returns


def stages(backbone: nn.Module) -> list[str]:
    """Return the names layer1, layer2, ... of the stages of timm's ResNet class or a CIFAR ResNet; [] for others."""
    names = [name for name, _ in backbone.named_children() if re.fullmatch(r"layer\d+", name)]
    takes_widths = "channels" in inspect.signature(type(backbone).__init__).parameters
    return names if len(names) > 2 and takes_widths else []


def stage_widths(backbone: nn.Module) -> list[int]:
    """Return the base widths of a ResNet's stages, as timm's constructors take them in `channels`."""
    blocks = [getattr(backbone, name)[-1] for name in stages(backbone)]
    outs = [info["num_chs"] for info in stage_infos(backbone)]
    return [out // getattr(block, "expansion", 1) for out, block in zip(outs, blocks, strict=True)]


def stage_infos(backbone: nn.Module) -> list[dict]:
    """Return timm's description of each stage of a ResNet, with `num_chs`, its width, and `reduction`, its stride from the
    image."""
    by_name = {info["module"]: info for info in backbone.feature_info}
    return [by_name[name] for name in stages(backbone)]


def keep_early(backbone: nn.Module, late: int) -> nn.Module:
    """Remove the `late` last stages and the classifier from a ResNet: its `forward_features` ends after the early stages."""
    for name in [*stages(backbone)[-late:], "fc"]:
        setattr(backbone, name, nn.Identity())
    return backbone


def keep_late(backbone: nn.Module, late: int) -> nn.Module:
    """Keep only the `late` last stages and the classifier of a ResNet: its `forward_features` begins with those stages."""
    kept = stages(backbone)[-late:]
    for name, _ in list(backbone.named_children()):
        if name not in (*kept, "global_pool", "fc", "drop"):
            setattr(backbone, name, nn.Identity())
    return backbone
