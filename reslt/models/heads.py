"""Classifiers that replace a timm model's own, on any model with one linear classifier.

They see the pooled features of N images, or of K N images if K branches share the classifier, so that the features of
each branch are normalized separately."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from reslt.config.parts import COSTS, HEADS
from reslt.config.schema import MethodSettings
from reslt.core.errors import UserError

SCALES = {"cosine": 30.0, "deconfounded": 16.0, "meta_embedding": 16.0}  # as published
REACH, CLOSEST = 10.0, 1e-4  # of meta-embedding: r = REACH / distance, with a distance of at least CLOSEST


class Head(nn.Module):
    """A classifier (..., D) -> (..., C) with a weight of C rows, computed in float32 at least, even under autocast."""

    def __init__(self, linear: nn.Linear):
        """`linear`: the classifier to replace."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.logits(features if features.dtype == torch.float64 else features.float())

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) in full precision -> (..., C)"""
        raise NotImplementedError


class CosineLinear(Head):
    """The cosine classifier of LDAM and RIDE, without bias: z_c = s f.w_c / (|f| |w_c|). Rows start uniform in (-1, 1),
    scaled to norm 1."""

    def __init__(self, linear: nn.Linear, scale: float = SCALES["cosine"]):
        super().__init__(linear)
        self.scale, self.bias = scale, None
        self.weight = nn.Parameter(torch.empty_like(linear.weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the rows."""
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight.uniform_(-1, 1), dim=1))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=1))


class DeconfoundedLinear(Head):
    """The multi-head normalized classifier of Causal Norm (Tang et al. 2020), Eq. (8), without bias: f and w_c are cut
    into G parts, z_c = (s / G) sum_g [f^g / |f^g|] . [w_c^g / (|w_c^g| + gamma)].

    In training it sums the features, m <- momentum m + mean(f); only the direction of m is used. With `alpha` > 0 it
    predicts the total direct effect (TDE): the part of f^g / |f^g| along m^g / |m^g| is removed alpha times. The buffer is
    named like one of BatchNorm's, so that it is averaged over processes like these."""

    def __init__(
        self,
        linear: nn.Linear,
        scale: float = SCALES["deconfounded"],
        groups: int = 2,
        gamma: float = 1 / 32,
        momentum: float = 0.9,
    ):
        """Raises UserError if the features cannot be cut into `groups` equal parts."""
        super().__init__(linear)
        if self.in_features % groups:
            raise UserError(
                f"--head-groups {groups}: {self.in_features} features cannot be cut into {groups} equal parts; "
                f"give a divisor of {self.in_features}"
            )
        self.scale, self.groups, self.gamma, self.momentum, self.bias = scale, groups, gamma, momentum, None
        self.alpha = 0.0  # of TDE, in evaluation; set by its predictor
        self.track_running_stats = True  # whether training changes the buffer, as for BatchNorm
        self.weight = nn.Parameter(torch.empty_like(linear.weight))
        self.register_buffer("running_mean", torch.zeros(self.in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the rows: uniform in +-1 / sqrt(D)."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and self.track_running_stats:
            with torch.no_grad():
                self.running_mean.mul_(self.momentum).add_(features.detach().flatten(0, -2).mean(0))
        parts = F.normalize(features.unflatten(-1, (self.groups, -1)), dim=-1)  # (..., G, D / G)
        if self.alpha and not self.training:
            direction = F.normalize(self.running_mean.to(parts.dtype).unflatten(0, (self.groups, -1)), dim=-1)
            parts = parts - self.alpha * (parts * direction).sum(-1, keepdim=True) * direction
        rows = self.weight.unflatten(1, (self.groups, -1))
        rows = rows / (rows.norm(dim=-1, keepdim=True) + self.gamma)
        return self.scale / self.groups * F.linear(parts.flatten(-2), rows.flatten(1))


class ScaledLinear(Head):
    """Learnable weight scaling (Kang et al. 2020): z_c = s_c (f.w_c + b_c). The scale multiplies the bias too, as in the
    released code. The scales start at 1; only a stage that names them trains them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.weight, self.bias = linear.weight, linear.bias
        self.scales = nn.Parameter(torch.ones(self.out_features))

    def reset_parameters(self) -> None:
        """Initialize weight and bias as in a linear layer, and the scales to 1."""
        nn.Linear.reset_parameters(self)
        nn.init.ones_(self.scales)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.scales * F.linear(features, self.weight, self.bias)

    def folded(self) -> nn.Linear:
        """Return the linear classifier with the same logits."""
        bias = self.bias is not None
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=bias).to(self.weight)
        with torch.no_grad():
            linear.weight.copy_(self.scales[:, None] * self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.scales * self.bias)
        return linear


class MetaEmbedding(Head):
    """The dynamic meta-embedding of OLTR (Liu et al. 2019), with class centroids M (C, D):

        v = softmax(W f + b) M,  e = tanh(W_s f + b_s),  r = 10 / min_c |f - M_c|,  x = r (f + e * v)
        z_c = s |x| / (1 + |x|) cos(x, w_c)

    Until its centroids are set, it is the model's own linear classifier z = W f + b. As in the released code, the gradient
    of the logits does not reach M, which `CentroidLoss` trains."""

    def __init__(self, linear: nn.Linear, scale: float = SCALES["meta_embedding"]):
        super().__init__(linear)
        self.scale, self.weight, self.bias = scale, linear.weight, linear.bias
        self.selector = nn.Linear(self.in_features, self.in_features)  # W_s, b_s
        self.rows = nn.Parameter(torch.empty_like(linear.weight))  # w
        self.centroids = nn.Parameter(torch.zeros_like(linear.weight))
        # 1: the centroids are set. A tensor, so that it is stored with the weights and costs no branch on the host.
        self.register_buffer("is_begun", torch.zeros((), dtype=torch.int64))
        self._reset_rows()

    @property
    def added(self) -> set[nn.Parameter]:
        """The parameters that the linear classifier lacks."""
        return {self.centroids, self.rows, *self.selector.parameters()}

    @torch.no_grad()
    def set_centroids(self, means: torch.Tensor) -> None:
        """Set the (C, D) centroids. From then on, logits are those of the meta-embedding."""
        self.centroids.copy_(means)
        self.is_begun.fill_(1)

    def reset_parameters(self) -> None:
        """Initialize everything except the centroids: the linear layers as usual, the rows uniform in +-1 / sqrt(D)."""
        nn.Linear.reset_parameters(self)
        self.selector.reset_parameters()
        self._reset_rows()

    def _reset_rows(self) -> None:
        nn.init.uniform_(self.rows, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        linear, memory = F.linear(features, self.weight, self.bias), self.centroids.detach()
        # |f - M_c|^2 without |f|^2 finds the nearest centroid; its distance is computed directly, without cancellation
        nearest = memory[(memory.square().sum(1) - 2 * F.linear(features, memory)).argmin(-1)]
        distance = (features - nearest).norm(dim=-1, keepdim=True).clamp(min=CLOSEST)
        infused = self.selector(features).tanh() * (linear.softmax(-1) @ memory)
        embedding = REACH / distance * (features + infused)
        squashed = embedding / (1 + embedding.norm(dim=-1, keepdim=True))
        return torch.where(self.is_begun > 0, self.scale * F.linear(squashed, F.normalize(self.rows, dim=1)), linear)


def create_head(linear: nn.Linear, method: MethodSettings) -> nn.Module:
    """Return a method's head that replaces a linear classifier: it has the same width and, for `linear` and `scaled`, the
    same weights."""
    part = HEADS[method.head]
    if part.build is not None:
        return part.build(linear, **method.arguments_of(part))
    scale = method.head_scale or SCALES.get(method.head)
    if method.head == "cosine":
        return CosineLinear(linear, scale)
    if method.head == "deconfounded":
        return DeconfoundedLinear(linear, scale, method.head_groups, method.head_gamma, method.head_momentum)
    if method.head == "meta_embedding":
        return MetaEmbedding(linear, scale)
    return ScaledLinear(linear) if method.head == "scaled" else linear


def put_head(backbone: nn.Module, method: MethodSettings) -> None:
    """Replace the classifier of a timm model with the head of a method, and set the initial bias of the method's cost.
    Raises UserError if the model has no linear classifier and the method requires one."""
    initial_bias = COSTS[method.cost].initial_bias
    if method.head == "linear" and initial_bias is None:
        return
    classifier = linear_classifier(
        backbone, f"--head {method.head}" if initial_bias is None else f"--cost {method.cost}"
    )
    head = create_head(classifier, method)
    if head is not classifier:
        name = next(name for name, module in backbone.named_modules() if module is classifier)
        backbone.set_submodule(name, head)
    set_initial_bias(head, method)


def set_initial_bias(head: nn.Module, method: MethodSettings) -> None:
    """Set the initial bias of a method's cost, if the cost has one and the head has a bias. With branches, it applies to the
    logits of each branch."""
    initial_bias = COSTS[method.cost].initial_bias
    if initial_bias is not None and getattr(head, "bias", None) is not None:
        nn.init.constant_(head.bias, initial_bias(head.out_features))


@torch.no_grad()
def reinitialize(head: nn.Module, method: MethodSettings, seed: int) -> None:
    """Initialize a head again, on the CPU, so that the new weights are the same for any device."""
    fresh = copy.deepcopy(head).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()
    set_initial_bias(fresh, method)
    head.load_state_dict(fresh.state_dict())


@torch.no_grad()
def normalized_rows(head: nn.Module, tau: float) -> nn.Linear:
    """Return a copy of a linear or scaled head in which row c, multiplied by its scale if it has one, is divided by its
    norm^tau, and the bias is 0 (Kang et al. 2020, and ResLT's released code in evaluation). Raises UserError for another
    head."""
    if isinstance(head, ScaledLinear):
        linear = head.folded()
    elif isinstance(head, nn.Linear):
        linear = copy.deepcopy(head)
    elif isinstance(head, (CosineLinear, DeconfoundedLinear)):
        raise UserError(f"--tau {tau:g}: the rows of a {type(head).__name__} head are normalized already; leave it out")
    else:
        kind = type(head).__name__
        raise UserError(
            f"--tau {tau:g} requires a model with one linear classifier, and this one has a {kind}; leave it out"
        )
    linear.weight.div_(linear.weight.norm(dim=1, keepdim=True) ** tau)
    if linear.bias is not None:
        linear.bias.zero_()
    return linear


def linear_classifier(backbone: nn.Module, wanted_by: str) -> nn.Linear:
    """Return the model's classifier. Raises UserError, which names `wanted_by`, if it is not a single nn.Linear."""
    classifier = backbone.get_classifier()
    if isinstance(classifier, nn.Linear):
        return classifier
    kind = type(classifier).__name__
    raise UserError(
        f"{wanted_by} requires a model with one linear classifier; {type(backbone).__name__} has a {kind}; choose another "
        "--model"
    )


def classifier_width(backbone: nn.Module, wanted_by: str) -> int:
    """Return the number of features that enter the model's classifier. Raises UserError, which names `wanted_by`, if the
    classifier is not a single layer."""
    width = getattr(backbone.get_classifier(), "in_features", None)
    return linear_classifier(backbone, wanted_by).in_features if width is None else width
