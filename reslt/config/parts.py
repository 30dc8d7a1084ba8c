"""The named parts of a method: their descriptions, and the settings that they use. Loads no torch.

Other rooms build them: `reslt.methods` costs, class weights, samplers and mutual terms, `reslt.models.heads` heads, and
`reslt.models.create` networks. A module given with `--import` adds its own with `register`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reslt.core.errors import UserError

PRIORS = ("logit_adjust", "logit_adjust_reversed")  # one number, or one per expert
SOFTMAX = frozenset({*PRIORS, "smoothing"})  # settings of the costs that are a softmax over classes


@dataclass(frozen=True)
class Part:
    """A part of a method. `settings`: the flat settings that it uses and other parts may not use."""

    described: str
    settings: frozenset[str] = frozenset()
    initial_bias: Callable[[int], float] | None = None  # for a cost: number of classes -> the classifier's initial bias
    build: Callable | None = None  # for a registered part
    arguments: Mapping[str, object] = field(default_factory=dict)  # for a registered part, with their defaults


COSTS = {
    "ce": Part("cross-entropy", SOFTMAX),
    "focal": Part("softmax focal loss", SOFTMAX | {"focal_gamma"}),
    "sigmoid_focal": Part(
        "focal loss of C binary problems (Cui et al. 2019)",
        frozenset({"focal_gamma"}),
        initial_bias=lambda classes: -math.log(classes - 1),
    ),
    "ldam": Part("label-distribution-aware margins (Cao et al. 2019)", SOFTMAX | {"ldam_margin"}),
    "vs": Part("vector scaling (Kini et al. 2021); CDT if --logit-adjust is 0", SOFTMAX | {"vs_gamma"}),
    "seql": Part("softmax equalization loss (Tan et al. 2020)", SOFTMAX | {"seql_gamma", "seql_threshold"}),
    "ce_hard": Part(
        "cross-entropy, plus that of the label among the classes with the largest logits (hard category mining of NCL, Li "
        "et al. 2022)",
        SOFTMAX | {"hard_classes"},
    ),
    "label_aware": Part(
        "cross-entropy with more smoothing for frequent classes (MiSLAS, Zhong et al. 2021)",
        frozenset({*PRIORS, "smoothing_head", "smoothing_tail"}),
    ),
}
CLASS_WEIGHTS = {
    "uniform": Part("1 for every class"),
    "inverse": Part("1 / n_c"),
    "effective": Part("1 / effective number (Cui et al. 2019)", frozenset({"class_weight_beta"})),
}
SAMPLERS = {
    "instance": Part("every image once per epoch"),
    "balanced": Part("every class equally often"),
    "balanced4": Part("every class equally often, four of its images in a row (cRT's released code)"),
    "sqrt": Part("class probability in proportion to sqrt(n_c)"),
    "progressive": Part("from instance at the first epoch of the schedule to balanced at its last"),
    "effective": Part("image probability in proportion to 1 / effective number", frozenset({"sampler_beta"})),
    "reversed": Part("class probability in proportion to 1 / n_c (BBN)"),
}
HEADS = {
    "linear": Part("the model's own classifier"),
    "cosine": Part("scaled cosine of feature and class vector, without bias", frozenset({"head_scale", "head_init"})),
    "deconfounded": Part(
        "multi-head normalized classifier of Causal Norm (Tang et al. 2020)",
        frozenset({"head_scale", "head_groups", "head_gamma", "head_momentum", "tde"}),
    ),
    "scaled": Part("linear, with a learned scale per class (LWS, Kang et al. 2020)"),
    "meta_embedding": Part(
        "linear until a stage sets its class centroids; then the meta-embedding of feature and centroids (OLTR, Liu et al. "
        "2019)",
        frozenset({"head_scale"}),
    ),
}
NETWORKS = {
    "plain": Part("the timm model"),
    "reslt": Part(
        "residual branches between features and classifier",
        frozenset(
            {
                "alpha",
                "branches",
                "branch",
                "branch_at",
                "eval_branch_at",
                "branch_loss",
                "branch_sizes",
                "branch_sets",
                "branch_init_branches",
                "tied_branches",
                "fusion",
                "logit_adjust_on",
            }
        ),
    ),
    "bbn": Part(
        "a ResNet with two last blocks, whose features are concatenated (BBN, Zhou et al. 2020)",
        frozenset({"second_sampler", "cumulative_epochs"}),
    ),
    "exits": Part(
        "a ResNet with a classifier after every stage; an image leaves at the first confident one (after ELF, Duggal et al. "
        "2020)",
        frozenset({"exit_confidence"}),
    ),
    "conv_stack": Part(
        "the timm model with 1x1 convolutions, one after another, before its classifier", frozenset({"branches"})
    ),
    "attention": Part("the timm model with modulated attention on its feature map (OLTR)"),
}
MUTUAL = {
    "off": Part("none"),
    "pairwise_kl": Part("mutual KL divergence between the experts' predictions", frozenset({"mutual_weight"})),
    "balanced_kl": Part(
        "mutual KL divergence between predictions with the prior of training, on all classes and on the hardest "
        "(--mutual-hard-classes; NCL, Li et al. 2022)",
        frozenset({"mutual_weight", "mutual_hard_classes"}),
    ),
    "diversity": Part(
        "KL divergence of each expert from the experts' mean; with a negative weight, diversity (RIDE, Wang et al. 2021)",
        frozenset({"mutual_weight"}),
    ),
    "tempered_diversity": Part(
        "diversity with a temperature per class, lower for rarer classes (RIDE)",
        frozenset({"mutual_weight", "temperature_factor"}),
    ),
}
FEATURE_LOSSES = {
    "off": Part("none"),
    "lifted": Part(
        "lifted structured loss of all pairs of a class (Song et al. 2016)",
        frozenset({"feature_loss_weight", "lifted_margin"}),
    ),
    "range": Part(
        "range loss: the largest distances within classes, the smallest between their means (Zhang et al. 2017)",
        frozenset({"feature_loss_weight", "range_alpha", "range_beta", "range_margin", "range_k"}),
    ),
    "centroids": Part("distances to the centroids of a meta-embedding head (OLTR)", frozenset({"feature_loss_weight"})),
    "proco": Part(
        "contrast of other views of an image with the distribution of each class (ProCo, Du et al. 2024)",
        frozenset({"feature_loss_weight", "views", "feature_temperature"}),
    ),
}
PARTS: dict[str, dict[str, Part]] = {
    "cost": COSTS,
    "class_weights": CLASS_WEIGHTS,
    "sampler": SAMPLERS,
    "head": HEADS,
    "network": NETWORKS,
    "mutual": MUTUAL,
    "feature_loss": FEATURE_LOSSES,
}
OF_STAGES = frozenset({"stage2_epochs", "stage2_lr"})  # settings of methods with a second stage


def register(kind: str, name: str, build: Callable, described: str = "", **arguments: object) -> None:
    """Add a user's own part: after `register("cost", "poly", PolyCost, epsilon=1.0)`, `--cost poly` chooses it.

    `build` is called with the (C,) training counts for a cost, for class weights (-> (C,) array) and for a sampler (-> (C,)
    class probabilities), with the model's linear classifier for a head, and with `arguments` as keywords, whose values
    `--part-kwargs epsilon=2` changes. A feature loss is called with features and labels, see
    `reslt.methods.losses.LossWithFeatures`. Raises UserError for an unknown kind, and for a name that is taken or unusable."""
    kinds = [kind for kind in PARTS if kind != "network"]
    if kind not in kinds:
        raise UserError(f"register: {kind!r} is not a kind of part; give one of {', '.join(kinds)}")
    if name in PARTS[kind]:
        raise UserError(f"a {kind} {name!r} exists already; register yours under another name")
    require_usable(name, f"the name of a {kind}")
    settings = frozenset({"part_kwargs"}) if arguments else frozenset()
    weight = {"mutual": frozenset({"mutual_weight"}), "feature_loss": frozenset({"feature_loss_weight"})}
    settings |= ({"cost": SOFTMAX} | weight).get(kind, frozenset())
    PARTS[kind][name] = Part(described or f"{kind} of a user's module", settings, None, build, arguments)


def require_usable(name: str, subject: str) -> None:
    """Raise UserError, beginning with `subject`, for a name that cannot be part of a folder's name or that means "unset"."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or name == "none":
        raise UserError(f"{subject} {name!r} must consist of letters, digits, _, ., + and -, and not be none")


def described(registry: Mapping[str, Part]) -> Callable[[], str]:
    """Return a function that lists the parts of a registry, for help texts."""
    return lambda: (
        "; ".join(f"{name}: {part.described}" for name, part in registry.items()) + " (default: the method's)"
    )


def settings_of_parts() -> frozenset[str]:
    """Return the settings that only some parts use."""
    return OF_STAGES.union(*(part.settings for parts in PARTS.values() for part in parts.values())) | {"part_kwargs"}


def users_of(setting: str) -> dict[str, list[str]]:
    """Return the names of the parts that use a setting, by kind: {"cost": ["focal", "sigmoid_focal"]}."""
    users = {kind: [name for name, part in parts.items() if setting in part.settings] for kind, parts in PARTS.items()}
    return {kind: names for kind, names in users.items() if names}
