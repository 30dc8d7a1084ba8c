"""The named methods: bundles of parts, with their own defaults. Loads no torch.

`--method NAME` sets the defaults of the parts, each of which has a flag of its own. Formulas and sources are in the docstrings
of the parts, in `reslt.methods` and `reslt.models.heads`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reslt.config.parts import OF_STAGES, PARTS, require_usable, settings_of_parts
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean

PARTS_OF_A_METHOD = (*PARTS, "stages")


@dataclass(frozen=True)
class Method:
    """A training method: its parts, by name, and its `defaults` of other settings, which those of info.yaml override.

    `stages`: mappings as in a recipe, see `reslt.config.stages`. `begins_with`: the method that trains the same first
    stage, so that runs of both can share it. `taught_by`: the method of its teachers, which `--teachers` must name."""

    described: str
    cost: str = "ce"
    class_weights: str = "uniform"
    sampler: str = "instance"
    head: str = "linear"
    network: str = "plain"
    mutual: str = "off"
    feature_loss: str = "off"
    stages: tuple[Mapping[str, object], ...] = ()
    begins_with: str | None = None
    taught_by: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)


RIDE_STAGES = ({"start": 0.8, "class_weights": "effective", "mutual": "tempered_diversity"},)
METHODS = {
    "reslt": Method("the paper's method: residual branches", network="reslt"),
    "ce": Method("plain cross-entropy"),
    "balanced_softmax": Method("cross-entropy with the prior log(n_c / N) (Ren 2020)", defaults={"logit_adjust": 1.0}),
    "focal": Method("softmax focal loss (Lin 2017)", cost="focal"),
    "cb_focal": Method(
        "sigmoid focal loss with class-balanced weights (Cui 2019)", cost="sigmoid_focal", class_weights="effective"
    ),
    "ce_drw": Method(
        "cross-entropy, deferred reweighting (Cao 2019)", stages=({"start": 0.8, "class_weights": "effective"},)
    ),
    "ce_drs": Method("cross-entropy, deferred resampling (Cao 2019)", stages=({"start": 0.8, "sampler": "effective"},)),
    "ldam": Method("label-distribution-aware margins (Cao 2019)", cost="ldam", head="cosine"),
    "ldam_drw": Method(
        "LDAM with deferred reweighting (Cao 2019)",
        cost="ldam",
        head="cosine",
        stages=({"start": 0.8, "class_weights": "effective"},),
    ),
    "seql": Method("softmax equalization loss (Tan 2020)", cost="seql"),
    "cdt": Method("class-dependent temperatures (Ye 2020)", cost="vs", defaults={"vs_gamma": 0.2}),
    "vs": Method(
        "vector scaling, logits scaled and shifted per class (Kini 2021)",
        cost="vs",
        defaults={"vs_gamma": 0.05, "logit_adjust": 0.75},
    ),
    "crt": Method(
        "classifier re-training on balanced classes (Kang 2020)",
        stages=({"epochs": 10, "train": ["classifier"], "reinit": ["classifier"], "sampler": "balanced4"},),
        begins_with="ce",
    ),
    "lws": Method(
        "learnable weight scaling on balanced classes (Kang 2020)",
        head="scaled",
        stages=({"epochs": 5, "train": ["scales"], "sampler": "balanced4"},),
        begins_with="ce",
    ),
    "tau_norm": Method("cross-entropy, tau-normalized (Kang 2020)", begins_with="ce", defaults={"tau": 1.0}),
    "ncm": Method("cross-entropy, nearest class mean (Kang 2020)", begins_with="ce", defaults={"ncm": "cl2"}),
    "posthoc_prior": Method(
        "cross-entropy, prior subtracted after training (Menon 2021)", begins_with="ce", defaults={"prior_tau": 1.0}
    ),
    "mislas": Method(
        "mixup, then label-aware smoothing and weight scaling (Zhong 2021)",
        head="scaled",
        stages=(
            {
                "epochs": 10,
                "cost": "label_aware",
                "train": {"classifier": 0.2, "scales": 1.0},
                "sampler": "balanced",
                "mixup": 0.0,
            },
        ),
        begins_with="ce",
        defaults={"mixup": 1.0},
    ),
    "causal": Method(
        "Causal Norm: deconfounded training, total direct effect (Tang 2020)",
        head="deconfounded",
        defaults={"tde": 1.5},
    ),
    "bbn": Method(
        "bilateral branches: pairs of an image and one of a reversed sampler (Zhou 2020)",
        network="bbn",
        defaults={"second_sampler": "reversed"},
    ),
    "ride": Method(
        "experts with diversity, LDAM with deferred reweighting (Wang 2021)",
        cost="ldam",
        head="cosine",
        mutual="diversity",
        stages=RIDE_STAGES,
        defaults={"experts": 3, "mutual_weight": -0.45},
    ),
    "ride_router": Method(
        "RIDE, then a router that asks for the next expert if the previous ones are wrong (Wang 2021)",
        cost="ldam",
        head="cosine",
        mutual="diversity",
        stages=(
            *RIDE_STAGES,
            {
                "epochs": 5,
                "train": ["router"],
                "bn": "eval",
                "sampler": "balanced",
                "lr": 0.01,
                "mixup": 0.0,
                "cutmix": 0.0,
            },
        ),
        defaults={"experts": 3, "mutual_weight": -0.45, "router_topk": 30},
        begins_with="ride",
    ),
    "lfme": Method(
        "cross-entropy, and teachers of the many, medium and few classes (Xiang 2020)",
        sampler="balanced4",
        taught_by="ce",
    ),
    "shike": Method(
        "gated experts with own last stages, then new classifiers with the prior log(n_c / N) (Jin 2023)",
        head="cosine",
        mutual="pairwise_kl",
        stages=(
            {
                "start": 0.9,
                "train": ["classifier"],
                "reinit": ["classifier"],
                "mutual": "off",
                "logit_adjust": 1.0,
                "warmup_epochs": 2,
            },
        ),
        defaults={
            "experts": 3,
            "expert_stages": 1,
            "expert_width": 1.0,
            "expert_gates": True,
            "mutual_weight": 0.02,
        },
    ),
    "elf_ldam_drw": Method(
        "early exits, LDAM with deferred reweighting (Duggal 2020)",
        cost="ldam",
        head="cosine",
        network="exits",
        stages=({"start": 0.8, "class_weights": "effective"},),
    ),
    "sade": Method(
        "experts for the training, the uniform and the inverse class distribution (Zhang 2022)",
        head="cosine",
        defaults={"experts": 3, "logit_adjust": (0.0, 1.0, 1.0), "logit_adjust_reversed": (0.0, 0.0, 2.0)},
    ),
    "balpoe": Method(
        "experts with the prior times 0, 1 and 2, mixup (Sanchez Aimar 2023)",
        head="cosine",
        defaults={
            "experts": 3,
            "expert_width": 1.0,
            "expert_loss": "mean",
            "logit_adjust": (0.0, 1.0, 2.0),
            "mixup": 0.4,
        },
    ),
    "ncl": Method(
        "experts that learn from each other, on all classes and on the hardest (Li 2022)",
        cost="ce_hard",
        mutual="balanced_kl",
        defaults={"experts": 3, "expert_width": 1.0, "logit_adjust": 1.0, "mutual_hard_classes": 30},
    ),
    "lifted": Method(
        "cross-entropy and lifted structured loss on balanced classes (Song 2016)",
        sampler="balanced4",
        feature_loss="lifted",
    ),
    "range": Method(
        "cross-entropy and range loss on balanced classes (Zhang 2017)", sampler="balanced4", feature_loss="range"
    ),
    "oltr": Method(
        "cross-entropy, then attention and meta-embedding on balanced classes (Liu 2019)",
        head="meta_embedding",
        network="attention",
        stages=(
            {
                "epochs": 30,
                "train": {"all": 0.1, "attention": 0.1, "classifier": 1.0, "centroids": 0.1},
                "reinit": ["centroids"],
                "sampler": "balanced4",
                "feature_loss": "centroids",
                "feature_loss_weight": 0.01,
            },
        ),
        begins_with="ce",
    ),
    "proco": Method(
        "the prior log(n_c / N), and contrast of embeddings with the distribution of each class (Du 2024)",
        feature_loss="proco",
        defaults={"logit_adjust": 1.0},
    ),
    "reslt_retrained": Method(
        "ResLT, then a new classifier with the prior log(n_c / N)",
        network="reslt",
        stages=(
            {"start": 0.9, "train": ["classifier"], "reinit": ["classifier"], "logit_adjust": 1.0, "warmup_epochs": 2},
        ),
    ),
}


def register_method(name: str, method: Method) -> None:
    """Add a method that `--method` accepts. Raises UserError for an unknown part, and for a name that is taken or unusable
    in a folder's name."""
    if name in METHODS:
        raise UserError(f"a method {name!r} exists already; register yours under another name")
    require_usable(name, "the method's name")
    for kind, known in PARTS.items():
        if (part := getattr(method, kind)) not in known:
            raise UserError(
                f"method {name}: there is no {kind} {part!r}{did_you_mean(str(part), list(known))}; register it first"
            )
    METHODS[name] = method


def list_methods() -> list[str]:
    """Return the names that `--method` accepts."""
    return list(METHODS)


def unused_settings(values: Mapping[str, object]) -> frozenset[str]:
    """Return the settings that other parts use, but none of the chosen ones.

    `values`: flat settings, which name the method and its parts, including those of the stages and the second sampler. A
    missing part is the method's. An unknown part, which its own check reports, counts as using all that its kind uses."""
    method = METHODS.get(str(values.get("method")))
    if method is None:
        return frozenset()
    stages = values.get("stages")
    stages = method.stages if stages is None else stages
    stages = [stage for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, (list, tuple)) else []
    used = set(OF_STAGES if stages else ())
    for kind, known in PARTS.items():
        chosen = values.get(kind)
        chosen = getattr(method, kind) if chosen in (None, "none") else chosen
        names = [chosen, *(stage[kind] for stage in stages if kind in stage)]
        if kind == "sampler" and values.get("second_sampler") not in (None, "none"):
            names.append(values["second_sampler"])
        for name in names:
            name = "off" if name is False else name  # as YAML reads it
            is_known = isinstance(name, str) and name in known
            used = used.union(*(part.settings for part in ([known[name]] if is_known else known.values())))
    return settings_of_parts() - used
